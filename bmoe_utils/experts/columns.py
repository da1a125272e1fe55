"""What one batch gives the curvature: its slots, and the gradients at them of one column after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.readout import option_logits, to_device
from ..precision import at_least_float32
from .capture import Slots, recording
from .jacobians import Routes


def read_out(model: nn.Module, layers: Sequence[str], batch: Mapping[str, Tensor],
             answer_only: Sequence[str] = ()) -> tuple[Tensor, list[Slots]]:
    """The class logits ``[B, C]`` in the graph, and the slots of the ``layers``, in their order and with ``a`` at least float32; of
    those in ``answer_only``, which have a gradient at the answer's position alone, only the slots there.

    Inside ``capture.capturing(model)``.
    """
    batch = to_device(batch, model)
    with recording(model, layers, batch["attention_mask"], answer_only) as tape:
        logits = option_logits(model, batch)
    position = {name: i for i, name in enumerate(layers)}
    for slots in tape.slots:
        slots.a = at_least_float32(slots.a)
    return logits, sorted(tape.slots, key=lambda s: position[s.name])


def backward_passes(logits: Tensor, layers: Sequence[Slots], v: Tensor) -> Iterator[list[Tensor]]:
    """For every cotangent of ``v [K, B, C]`` one backward pass: ``d <v_k, f> / d z`` of each layer, padding's rows included.

    One after another: a batched backward of all K (``is_grads_batched``) gives the same bits, holds K times the gradients, and was
    not faster where it was measured (tests/benchmarks/curvature_floor.py).
    """
    outputs, v = [z for s in layers for z in s.z], v.to(logits.dtype)
    for k in range(len(v)):
        grads = iter(torch.autograd.grad(logits, outputs, v[k], retain_graph=k + 1 < len(v), materialize_grads=True))
        parts = [[next(grads).flatten(0, -2) for _ in s.z] for s in layers]  # one, or several where experts are separate modules
        yield [torch.cat(p) if len(p) > 1 else p[0] for p in parts]


def slot_rows(g: Tensor, slots: Slots, out: Tensor | None = None) -> Tensor:
    """``g [S, d]`` of the real slots, at least float32, from the gradient at all of the layer's outputs. ``out [>= S, d]``: to write
    them into, since fresh memory for every layer and column costs more than the copy."""
    if len(slots.rows) == len(g):
        return at_least_float32(g)
    if out is None or out.dtype != g.dtype or out.device != g.device or out.shape[1] != g.shape[1] or len(out) < len(slots.rows):
        return at_least_float32(g[slots.rows])
    return at_least_float32(torch.index_select(g, 0, slots.rows, out=out[: len(slots.rows)]))


def captured_columns(logits: Tensor, layers: Sequence[Slots], v: Tensor) -> list[tuple[Slots, list[Tensor]]]:
    """All cotangents' gradients, per layer ``(slots, K gradients [S, d])``, for what needs them together.

    Where most slots have no gradient, in the last layer, only those that have one are kept, since all of them at once is what a
    prediction needs memory for; the slots are cut to those as well.
    """
    kept: list[list] = [[] for _ in layers]
    for gradients in backward_passes(logits, layers, v):
        for of, slots, g in zip(kept, layers, gradients, strict=True):
            g = slot_rows(g, slots)
            active = torch.linalg.vecdot(g, g) > 0
            of.append((g[active], active) if 2 * int(active.sum()) < len(g) else (g, None))
        del gradients, g
    out = []
    for slots, of in zip(layers, kept, strict=True):
        slots.z = ()  # the graph is spent; this frees what it held
        if any(active is None for _, active in of):
            chosen = torch.ones(len(slots.a), dtype=torch.bool, device=slots.a.device)
        else:
            chosen = torch.stack([active for _, active in of]).any(0)
            counts = torch.bincount(slots.expert[chosen], minlength=len(slots.counts))
            slots = replace(slots, counts=counts, **{k: getattr(slots, k)[chosen] for k in ("a", "expert", "item", "last", "rows")})
        columns = []
        for g, active in of:
            if active is not None:  # where this column's gradients are among those kept
                g = g.new_zeros(len(chosen), g.shape[1]).index_copy(0, active.nonzero().squeeze(1), g)[chosen]
            columns.append(g)
        out.append((slots, columns))
    return out


def routes_of(slots: Slots, num_items: int) -> Routes:
    return Routes(slots.item, slots.counts, num_items)
