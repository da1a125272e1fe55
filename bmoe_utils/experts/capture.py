"""What the curvature needs from one forward pass: every expert's inputs, and the graph at its outputs.

The forward that fused experts are given meanwhile (:mod:`~bmoe_utils.models.experts_forward`) runs them sorted by expert, and shows
the tape, for each MoE layer,

    a   [S, f]  input of the second linear layer, one row per routed (token, expert) slot
    z   [S, d]  its output before the routing weight, still in the autograd graph

so that ``d f_c / d z`` is all that has to be differentiated: the Jacobian with respect to an expert's weight is
``J_{n,c} = sum_{t in n} g_{t,c} a_t^T`` and no weight gradient is ever built (every parameter is frozen meanwhile).
Experts are not asked for what nothing depends on: padding, and other positions than the answer's where these are known to have
no gradient (in most models the last layer's). Experts that are modules of their own (:mod:`~bmoe_utils.models.unfused`) give the
same through hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..models import experts_forward, readout
from ..models.experts_forward import IMPLEMENTATION
from ..models.layers import bare, expert_layers, num_experts, unwrap
from ..models.modes import frozen
from ..models.unfused import watching


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
    layers = expert_layers(model)
    tape = Tape(attention_mask.bool(), {bare(layers[name]): name for name in names}, frozenset(answer_only))
    experts_forward._tape = tape
    try:
        with ExitStack() as stack:
            for name, experts in ((n, layers[n]) for n in names):
                if isinstance(experts, nn.ModuleList):
                    block = unwrap(model).get_submodule(name.rpartition(".")[0])
                    stack.enter_context(watching(name, block, experts, partial(tape.record, experts)))
            yield tape
    finally:
        experts_forward._tape = None
    if missing := set(names) - {s.name for s in tape.slots}:
        raise RuntimeError(f"layers {sorted(missing)} did not run their experts in this forward pass")


def routed_tokens(model: torch.nn.Module, loader: Iterable[Mapping]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many real tokens of ``loader`` each expert got, ``[L, E]`` int64: all of them, and those at the answer's position.

    Layers with fewer experts than the widest are filled with zeros.
    """
    names = list(expert_layers(model))
    totals = None
    with capturing(model):
        for batch in loader:
            batch = readout.to_device(batch, model)
            with recording(model, names, batch["attention_mask"]) as tape:
                readout.option_logits(model, batch)
            by_name = {s.name: s for s in tape.slots}
            width = max(len(s.counts) for s in tape.slots)
            last = [torch.bincount(by_name[n].expert[by_name[n].last], minlength=width).cpu() for n in names]
            every = [torch.nn.functional.pad(by_name[n].counts, (0, width - len(by_name[n].counts))).cpu() for n in names]
            step = torch.stack([torch.stack(every), torch.stack(last)])
            totals = step if totals is None else totals + step
    return totals[0], totals[1]
