"""The state that a model is put in for a while, and taken out of whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model takes a gradient and every module is in eval mode, with gradients on; on leaving, whatever
    happens, every ``requires_grad`` and every train/eval flag is as before."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}  # names: offloading makes new ones of them
    training = [m for m in model.modules() if m.training]
    try:
        for p in model.parameters():
            p.requires_grad_(False)
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)
        for m in training:
            m.training = True
