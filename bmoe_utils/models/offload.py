"""Weights that accelerate keeps on the host or on disk between forward passes (``device_map="auto"`` on too small a device).

Such a parameter is on the ``meta`` device until its module runs. What needs its values outside of a forward pass asks here.
"""

from __future__ import annotations

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn


def values(module: nn.Module, name: str) -> Tensor:
    """The module's own parameter or buffer with its values: as it is, or if offloaded a copy on the device it runs on."""
    tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    with align_module_device(module):
        return getattr(module, name)


def runs_on(module: nn.Module) -> torch.device:
    """The device that an offloaded module's values are brought to when it runs."""
    return torch.device(module._hf_hook.execution_device)


def keep(module: nn.Module) -> None:
    """Puts an offloaded module, and what is in it, on the device it runs on for good."""
    for part in module.modules():
        names = [name for own in (part._parameters, part._buffers) for name, t in own.items() if t is not None and t.is_meta]
        found = {name: values(part, name) for name in names}
        if found:
            remove_hook_from_module(part)
        for name, tensor in found.items():
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(tensor, part._parameters[name].requires_grad)
            else:
                part._buffers[name] = tensor
