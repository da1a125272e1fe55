"""The forward of fused experts, which serves where transformers' own does not, and can be watched.

transformers dispatches the forward of every fused experts module through a registry. The one function registered here computes what
the stock implementations compute, sorted by expert, and shows what passes through it to a tape, where there is one
(:func:`~bmoe_utils.experts.capture.recording`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .layers import unwrap

if TYPE_CHECKING:
    from ..experts.capture import Tape

IMPLEMENTATION = "bmoe_capture"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The tape in use, if any. A module-level name because transformers hands the registered function nothing but the
# experts module and its inputs; `recording` alone sets it, and always resets it.
_tape: Tape | None = None


def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``x [S, m]`` sorted by expert times ``weight [E, m, k]``: row s meets the weight of its expert. ``[S, k]``."""
    if grouped_mm_serves(weight):
        return nn.functional.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
    parts = [rows @ w for rows, w in zip(x.split(counts.tolist()), weight, strict=True) if len(rows)]
    return torch.cat(parts)


def grouped_mm_serves(weight: Tensor) -> bool:
    """Whether ``grouped_mm`` takes this weight ``[E, m, k]``, in either layout, and inputs of its
    type: no float64, rows of a multiple of 16 bytes, and on CUDA an Ampere card or newer."""
    if weight.dtype not in FLOATS[1:]:
        return False
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


def serve_experts(model: nn.Module) -> nn.Module:
    """The model. Where it would run its experts by transformers' ``grouped_mm`` (the default) and
    that does not take one of their weights, they run by the forward that captures from now on,
    which asks :func:`grouped_mm_serves` before every product."""
    inner = unwrap(model)
    chosen = getattr(inner, "get_experts_implementation", dict)()
    if "grouped_mm" in chosen.values() and not all(map(grouped_mm_serves, _fused_weights(inner))):
        inner.set_experts_implementation({k: IMPLEMENTATION if v == "grouped_mm" else v for k, v in chosen.items()})
    return model


def _fused_weights(model: nn.Module) -> Iterator[Tensor]:
    """All experts', in floating point. Not by :func:`expert_layers`, which takes several times as
    long: every prediction asks."""
    for module in model.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            weight = module._parameters.get(name)
            if weight is not None and weight.dim() == 3 and weight.dtype in FLOATS:
                yield weight


def _capturing_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward of transformers (any layout its registry serves), recording ``a`` and ``z`` on the tape."""
    k = top_k_index.shape[-1]
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    if _tape is not None and _tape.real.numel() == len(hidden_states):
        chosen = _tape.wanted(module).to(order.device)[order // k].nonzero().squeeze(1)
        expert, order = expert[chosen], order[chosen]
    token = order // k
    counts = torch.bincount(expert, minlength=module.num_experts)
    if counts.numel() > module.num_experts:
        raise RuntimeError("expert-parallel models are not supported: load the model with device_map instead")

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        y = _grouped_linear(x.to(weight.dtype), weight if module.is_transposed else weight.mT, counts)
        return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y

    x = hidden_states[token]
    if module.has_gate:
        a = module._apply_gate(linear(x, "gate_up_proj"))
    else:
        a = module.act_fn(linear(x, "up_proj"))
    z = linear(a, "down_proj")
    if _tape is not None and module in _tape.names:
        if not z.requires_grad:  # nothing below this layer is in the graph: it starts here
            z.requires_grad_()
        _tape.record(module, a, (z,), expert, token)
    y = module.post_expert_norm(z) if getattr(module, "has_post_expert_norm", False) else z
    y = y * top_k_weights.reshape(-1)[order, None]
    y = y.new_zeros(top_k_index.numel(), y.shape[-1]).index_copy(0, order, y)  # in token order: a sum over k then needs no atomics
    return y.view(-1, k, y.shape[-1]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _capturing_experts)
