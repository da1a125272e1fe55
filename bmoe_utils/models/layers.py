"""Where a model keeps its experts, whatever wraps them: the MoE layers by name, and their second linear weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import offload
from .unfused import is_unfused, second_layer


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def bare(module: nn.Module) -> nn.Module:
    """The module inside peft's wrappers of it or of its parameters."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> experts of every MoE layer, in the model's order: the module that transformers keeps them fused in (with peft's
    wrappers, if it has any), or their ``ModuleList``. Raises ``ValueError`` where there is none."""
    found = {}
    for name, module in unwrap(model).named_modules():
        inner = bare(module)
        fused = hasattr(inner, "is_transposed") and getattr(inner, "down_proj", None) is not None
        if (fused or is_unfused(name, module)) and "base_layer" not in name.split("."):
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no fused mixture-of-experts layer, and no ModuleList of experts; "
            "the posterior sits on the experts' down projection, so it needs a MoE model"
        )
    return found


def num_experts(module: nn.Module) -> int:
    """Of a layer of :func:`expert_layers`."""
    return len(module) if isinstance(module, nn.ModuleList) else bare(module).num_experts


def select_layers(available: Sequence[str], layers: str | Sequence[int | str] | None) -> list[str]:
    """The chosen MoE layers' names, in the model's order: ``None`` or ``"all"``, indices (negative count from the
    end of the MoE layers) or names. ``ValueError`` on anything unknown, twice or nothing at all."""
    if layers is None or layers == "all":
        return list(available)
    if isinstance(layers, str):
        layers = [layers]
    chosen = set()
    for layer in layers:
        if isinstance(layer, int) and -len(available) <= layer < len(available):
            name = available[layer]
        elif layer in available:
            name = layer
        else:
            raise ValueError(f"no MoE layer {layer!r}; give 'all', indices below {len(available)}, or names of "
                             f"{', '.join(available)}")
        if name in chosen:
            raise ValueError(f"MoE layer {name!r} is named twice")
        chosen.add(name)
    if not chosen:
        raise ValueError("no MoE layer chosen")
    return [name for name in available if name in chosen]


def down_weight(module: nn.Module) -> Tensor:
    """The second linear weight ``[E, d, f]`` of a layer of :func:`expert_layers` as its forward pass uses it, whatever the layout:
    a view, or where it is offloaded, separate or under LoRA a copy."""
    if isinstance(module, nn.ModuleList):
        return torch.stack([_adapted(second_layer(expert), "weight") for expert in module])
    weight = _adapted(module, "down_proj")
    return weight.mT if bare(module).is_transposed else weight


def _adapted(module: nn.Module, name: str) -> Tensor:
    """A parameter of the bare module with what peft's LoRA wrappers around it add to it."""
    weight = offload.values(bare(module), name)
    while hasattr(module, "base_layer"):
        if getattr(module, "parameter_name", name) == name and not (module.merged or module.disable_adapters):
            for adapter in set(module.active_adapters) & set(module.lora_A):
                weight = weight + module.get_delta_weight(adapter).detach()
        module = module.base_layer
    return weight
