"""What the curvature needs from one forward pass: every expert's inputs, and the graph at its outputs.

transformers dispatches the forward of every fused experts module through a registry. One function registered
there computes what the stock implementations compute, sorted by expert, and keeps per MoE layer

    a   [S, f]  input of the second linear layer, one row per routed (token, expert) slot
    z   [S, d]  its output before the routing weight, still in the autograd graph

so that ``d f_c / d z`` is all that has to be differentiated: the Jacobian with respect to an expert's weight is
``J_{n,c} = sum_{t in n} g_{t,c} a_t^T`` and no weight gradient is ever built (every parameter is frozen meanwhile).
Experts are not asked for what nothing depends on: padding, and other positions than the answer's where these are known to have
no gradient (in most models the last layer's). Experts that are modules of their own (:mod:`unfused`) give the same through hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import offload
from .unfused import is_unfused, second_layer, watching

IMPLEMENTATION = "bmoe_capture"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Slots:
    """One MoE layer's routed slots in one forward pass, real tokens only, sorted by expert.

    ``a [S, f]``, ``expert [S]`` in ``0..E-1`` (non-decreasing), ``item [S]`` in ``0..B-1``, ``counts [E]`` slots per
    expert, ``last [S]`` bool: slots at the answer's position. ``rows [S]`` picks these slots out of ``z``, one or
    several tensors of the graph with ``S_all`` rows ``d`` wide in all, which also hold the padding's.
    """

    name: str
    a: Tensor
    expert: Tensor
    item: Tensor
    counts: Tensor
    last: Tensor
    rows: Tensor
    z: tuple[Tensor, ...]


@dataclass
class Tape:
    """Collects one :class:`Slots` per captured layer, in the order of the forward pass."""

    real: Tensor  # [B, T] bool: True on real tokens, False on padding
    names: dict[nn.Module, str] = field(default_factory=dict)
    answer_only: frozenset[str] = frozenset()  # layers of which only the answer's position is wanted
    slots: list[Slots] = field(default_factory=list)

    def wanted(self, module: nn.Module) -> Tensor:
        """Which of the batch's tokens, row by row, a layer's experts have to serve, ``[B * T]`` bool."""
        wanted = self.real.clone()
        if self.names.get(module) in self.answer_only:
            wanted[:, :-1] = False
        return wanted.flatten()

    def record(self, module: nn.Module, a: Tensor, z: tuple[Tensor, ...], expert: Tensor, token: Tensor) -> None:
        """A layer's slots, padding and all, sorted by expert: ``a [S_all, f]``, ``z`` of as many rows, ``expert`` and ``token``
        ``[S_all]``."""
        name = self.names[module]
        if any(s.name == name for s in self.slots):
            raise RuntimeError(f"layer {name!r} ran its experts twice in one forward pass; it cannot be captured")
        if (batch_tokens := self.real.numel()) <= int(token.max()):
            raise RuntimeError(f"layer {name!r} saw more tokens than the batch's {batch_tokens}; it cannot be captured")
        rows, a = self.wanted(module).to(token.device)[token].nonzero().squeeze(1), a.detach()
        if len(rows) < len(token):  # fused experts were given no others
            a, expert, token = a[rows], expert[rows], token[rows]
        T = self.real.shape[1]
        counts = torch.bincount(expert, minlength=num_experts(module))
        self.slots.append(Slots(name, a, expert, token // T, counts, token % T == T - 1, rows, z))


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


@contextmanager
def capturing(model: nn.Module) -> Iterator[None]:
    """Puts the model, :func:`frozen`, in the state in which ``recording`` works, and its experts' implementation back on
    leaving, whatever happens."""
    inner = unwrap(model)
    if all(isinstance(m, nn.ModuleList) for m in expert_layers(model).values()):  # their own forward serves
        with frozen(model):
            yield
        return
    implementation = inner.get_experts_implementation()
    with frozen(model):
        try:
            inner.set_experts_implementation(IMPLEMENTATION)
            yield
        finally:
            inner.set_experts_implementation(implementation)


@contextmanager
def recording(model: nn.Module, names: Sequence[str], attention_mask: Tensor, answer_only: Sequence[str] = ()) -> Iterator[Tape]:
    """Records the next forward pass of the named layers. Only inside :func:`capturing`.

    ``attention_mask [B, T]``: nonzero on real tokens; slots of padding are dropped. ``answer_only``: those of the layers whose slots at
    other positions than the last one are dropped as well. Fused experts compute nothing for what is dropped.
    """
    global _tape
    layers = expert_layers(model)
    tape = Tape(attention_mask.bool(), {bare(layers[name]): name for name in names}, frozenset(answer_only))
    _tape = tape
    try:
        with ExitStack() as stack:
            for name, experts in ((n, layers[n]) for n in names):
                if isinstance(experts, nn.ModuleList):
                    block = unwrap(model).get_submodule(name.rpartition(".")[0])
                    stack.enter_context(watching(name, block, experts, partial(tape.record, experts)))
            yield tape
    finally:
        _tape = None
    if missing := set(names) - {s.name for s in tape.slots}:
        raise RuntimeError(f"layers {sorted(missing)} did not run their experts in this forward pass")
