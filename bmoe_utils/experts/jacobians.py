"""Per-item Jacobians of routed experts and their inner products, in whichever form costs least. Pure functions of tensors.

Layout as in :mod:`bmoe_utils.experts.curvature`: ``S`` slots sorted by expert, ``a [S, m_A]`` inputs, ``g`` K gradients ``[S, m_G]`` (a
sequence, or one tensor ``[K, S, m_G]``), the widths being the layer's own (``f`` and ``d``) or those of a basis. A *pair* is an
(expert, item) that meet in at least one slot; its Jacobian is ``J_k = sum_{t in pair} g_{k,t} a_t^T [m_G, m_A]``, and 0 where they
do not meet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Pairs are taken together until what they need reaches this many elements. On the CPU 1 MiB of float32, so that they stay in
# the cache; elsewhere 256 MiB, so that the device is busy.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**26
# ... and until the smallest has fewer than this share of the largest's slots, since all are padded to that.
FILLED = 0.7
# Weights of at most this many elements an expert are copied for every pair; with larger ones a chunk has a single expert.
SMALL_WEIGHT = 2**13


class Chunk(NamedTuple):
    """Some pairs: ``expert [p]``, ``item [p]`` and their slots ``index [p, t]``, padded where not ``real [p, t]``.

    ``only``: the expert, where all are one's.
    """

    expert: Tensor
    item: Tensor
    index: Tensor
    real: Tensor
    only: int | None


@dataclass
class Routes:
    """Where one layer's slots belong, sorted by expert: ``item [S]`` in ``0..num_items-1``, ``counts [E]`` slots per expert."""

    item: Tensor
    counts: Tensor
    num_items: int

    @cached_property
    def splits(self) -> list[int]:
        return self.counts.tolist()

    @cached_property
    def bounds(self) -> list[tuple[int, int, int]]:
        """``(expert, first slot, end)`` of every expert with a slot."""
        out, start = [], 0
        for e, count in enumerate(self.splits):
            if count:
                out.append((e, start, start + count))
            start += count
        return out

    @cached_property
    def expert(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.counts), device=self.counts.device), self.counts)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """``key [P] = expert * num_items + item`` ascending, slots per pair ``[P]``, and the slots in their order ``[S]``."""
        key, order = (self.expert * self.num_items + self.item).sort(stable=True)
        key, tokens = torch.unique_consecutive(key, return_counts=True)
        return key, tokens, order

    @cached_property
    def by_pair(self) -> Routes:
        """The pairs themselves as slots."""
        key = self.pairs[0]
        experts = torch.bincount(key // self.num_items, minlength=len(self.counts))
        return Routes(key % self.num_items, experts, self.num_items)

    def sum_pairs(self, x: Tensor) -> Tensor:
        """The sum of ``x [S, m]`` over every pair's slots, ``[P, m]``, in the order of :attr:`by_pair`."""
        _, tokens, order = self.pairs
        # not index_add_, whose order of adding is left to chance on CUDA
        return torch.segment_reduce(x[order], "sum", lengths=tokens, axis=0) if len(x) else x

    def keep(self, chosen: Tensor) -> Routes:
        """Only the ``chosen [S]`` (bool) slots."""
        return Routes(self.item[chosen], torch.bincount(self.expert[chosen], minlength=len(self.counts)), self.num_items)

    def chunks(self, elements: Callable[[int], int], by_expert: bool = False) -> Iterator[Chunk]:
        """All pairs, once each. ``elements(t)``: how many numbers a pair of ``t`` slots needs; ``by_expert``: never mix experts."""
        key, tokens, order = self.pairs
        device = order.device
        limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ELSEWHERE)
        start = tokens.cumsum(0) - tokens
        group = key // self.num_items if by_expert else torch.zeros_like(key)
        rank = (group * (int(tokens.max()) + 1 if len(tokens) else 1) - tokens).argsort(stable=True)  # most slots first
        length, of = tokens[rank].tolist(), group[rank].tolist()
        lo = 0
        while lo < len(length):
            t = length[lo]
            hi = min(lo + max(1, limit // elements(t)), bisect_right(of, of[lo]))
            hi = bisect_right(length, -FILLED * t, lo, hi, key=lambda n: -n)  # lengths fall within [lo, hi)
            chosen = rank[lo:hi]
            step = torch.arange(t, device=device)
            real = step < tokens[chosen][:, None]
            index = order[(start[chosen][:, None] + step).clamp(max=len(order) - 1)]
            yield Chunk(key[chosen] // self.num_items, key[chosen] % self.num_items, index, real, of[lo] if by_expert else None)
            lo = hi


Columns = Sequence[Tensor] | Tensor


def drop_inactive(a: Tensor, g: Columns, routes: Routes) -> tuple[Tensor, Columns, Routes]:
    """The slots with a gradient. The others add nothing to a Jacobian: in the last layer, all but the token that answers."""
    active = sum(torch.linalg.vecdot(x, x) for x in g) > 0
    if active.all():
        return a, g, routes
    return a[active], [x[active] for x in g], routes.keep(active)


def _padded(a: Tensor, g: Columns, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The chunk's slots, ``[p, t, m_A]`` and ``[K, p, t, m_G]``. Padded rows of ``a`` are zero, so that whatever stands in
    those of ``g`` meets a zero."""
    p, t = chunk.index.shape
    flat = chunk.index.flatten()
    rows = g[0].new_empty(len(g), len(flat), g[0].shape[1])
    for out, x in zip(rows, g, strict=True):  # each in its place: the copy that stacking makes costs as much again
        torch.index_select(x, 0, flat, out=out)
    return a.index_select(0, flat).view(p, t, -1) * chunk.real[:, :, None], rows.view(len(g), p, t, -1)


def _form(a: Tensor, g: Columns, chunk: Chunk) -> Tensor:
    """``J [K, p, m_G, m_A]`` of the chunk's pairs."""
    a, g = _padded(a, g, chunk)
    return g.mT @ a


def item_jacobians(a: Tensor, g: Columns, routes: Routes) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every pair's Jacobian, exact: ``(expert, items [p], J [p, K, m_G, m_A])``, in chunks that bound the memory."""
    a, g, routes = drop_inactive(a, g, routes)
    size = len(g) * g[0].shape[1] * a.shape[1]
    for chunk in routes.chunks(lambda t: size, by_expert=True):
        yield chunk.only, chunk.item, _form(a, g, chunk).transpose(0, 1)


def inner_products(a: Tensor, g: Columns, routes: Routes, weight: Tensor | None = None, form: str | None = None) -> Tensor:
    """``sum_ij w_e,ij J_k,ij J_k',ij`` of every expert and item, ``[E, B, K, K]``; ``weight [E, m_G, m_A] >= 0`` or all ones. Several,
    ``weight [Q, E, m_G, m_A]``, share what does not depend on them: ``[Q, E, B, K, K]``.

    Two forms, the same to rounding. ``jacobian`` forms ``J`` (``m_G x m_A`` a pair). ``gram`` never does: with the slots' Gram
    matrix ``(A A^T)_tu = a_t . a_u`` it is ``sum_tu (A A^T)_tu g_k,t . g_k',u``, and with weights, ``sum_tui (sum_j w_ij a_tj a_uj)
    g_k,ti g_k',ui``. By default each pair takes the one that needs fewer operations: without weights nearly always ``gram``, with
    weights where a pair has few slots.
    """
    K, m_g, m_a = len(g), g[0].shape[1], a.shape[1]
    area = m_g * m_a
    weighted = weight is not None
    several = weighted and weight.dim() == 4
    weights = weight.unbind() if several else [weight]
    roots = [w.sqrt() for w in weights] if weighted else weights
    out = a.new_zeros(len(weights), len(routes.counts), routes.num_items, K, K)

    def grams(t: int) -> bool:
        """Whether ``gram`` needs fewer multiplications for a pair of ``t`` slots."""
        direct = t * K * area + K * K * area + weighted * K * area
        by_gram = (t * t * area if weighted else t * t * m_a) + t * t * K * m_g + K * K * t * m_g
        return by_gram < direct if form is None else form == "gram"

    def elements(t: int) -> int:
        inputs = t * (m_a + K * m_g)
        if grams(t):
            return inputs + (t * t * (m_a + (K + 1) * m_g) if weighted else t * t + t * K * m_g)
        return inputs + (1 + weighted) * K * area

    for chunk in routes.chunks(elements, by_expert=weighted and area > SMALL_WEIGHT):
        p, t = chunk.index.shape
        which = chunk.expert if chunk.only is None else chunk.only  # of a weight: [p, m_G, m_A], or one expert's [m_G, m_A]
        if not grams(t):
            J = _form(a, g, chunk)
            for of, root in zip(out, roots, strict=True):
                left = (J * root[which] if weighted else J).view(K, p, area).transpose(0, 1)
                of[chunk.expert, chunk.item] = left @ left.mT
            continue
        a_p, g_p = _padded(a, g, chunk)
        right = g_p.view(K, p, t * m_g).permute(1, 2, 0)
        both = (a_p[:, :, None] * a_p[:, None]).view(p, t * t, m_a) if weighted else a_p @ a_p.mT
        for of, w in zip(out, weights, strict=True):
            if weighted:  # sum_t over the other slot, [K, p, t, m_G]
                left = ((both @ w[which].mT).view(p, t, t, m_g) * g_p[:, :, None]).sum(3)
            else:
                left = both @ g_p
            of[chunk.expert, chunk.item] = left.view(K, p, t * m_g).transpose(0, 1) @ right
    return out if several else out[0]


def project(x: Tensor, basis: Tensor, routes: Routes) -> Tensor:
    """Every slot on its expert's basis: ``x [S, m]``, ``basis [E, m, r]`` -> ``[S, r]``."""
    basis = basis.to(x)
    out = x.new_empty(len(x), basis.shape[-1])
    for e, lo, hi in routes.bounds:
        torch.mm(x[lo:hi], basis[e], out=out[lo:hi])
    return out
