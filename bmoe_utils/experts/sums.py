"""What is summed over a fitting set to make a posterior: one running sum per MoE layer and structure. Pure functions of tensors.

All take a batch in the same steps, since a backward pass gives one Fisher column of every layer and is then let go:

    open(a, energy, routes)   inputs a [S, f] of the batch's slots, their squared norms [S], and where they belong
    column(g, energy)         one Fisher column's gradients g [S, d] and their squared norms, not kept; once per column
    close()                   the batch is over

``finish()`` gives the posterior, ``state()`` all that was summed as named tensors, ``restore(tensors)`` puts it back, ``merge(other)``
adds the sums of another part of the set. ``summands()``: the tensors that have only to be added for that, those of parts in place;
None where it takes a merge.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .curvature import DenseBlocks, Eigenbasis, dense_block, eigh
from .jacobians import Routes, item_jacobians, project
from .sketch import Sketch

# Gram matrices are symmetric: block rows of this many columns, from the diagonal on, are 5/8 of the work at four blocks. On a
# device with many cores one call for the whole is faster.
BLOCK = {"cpu": 128}


class Gram:
    """The running Gram matrix of one factor of a layer's experts, ``[E, m, m]``; summed in its upper block triangle alone."""

    def __init__(self, experts: int, width: int, like: Tensor):
        self.M = like.new_zeros(experts, width, width)
        self.block = BLOCK.get(like.device.type, width)

    def add(self, x: Tensor, routes: Routes, energy: Tensor | None = None) -> None:
        """More samples ``x [S, m]``, sorted by expert."""
        for e, lo, hi in routes.bounds:
            rows = x[lo:hi]
            for i in range(0, rows.shape[1], self.block):
                self.M[e, i : i + self.block, i:].addmm_(rows[:, i : i + self.block].mT, rows[:, i:])

    def close(self) -> None:
        """The batch is over."""

    def matrix(self) -> Tensor:
        return self.M.triu() + self.M.triu(1).mT

    def eigen(self) -> tuple[Tensor, Tensor, None]:
        """Eigenvalues ``[E, m]`` ascending and eigenvectors ``[E, m, m]``; nothing is left out."""
        values, vectors = eigh(self.matrix())
        return values.clamp(min=0), vectors.contiguous(), None  # a sum of squares: below zero is rounding

    def merge(self, other: Gram) -> None:
        self.M += other.M

    def summands(self) -> list[Tensor]:
        return [self.M]

    def tensors(self) -> dict[str, Tensor]:
        return {"M": self.M}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.M.copy_(tensors["M"])


class KronSums:
    """Running Kronecker factors of one layer, ``A = sum a a^T`` and ``G = sum_k g g^T``, and the samples ``n [E]``.

    ``A``, ``G``: :class:`Gram` or :class:`~bmoe_utils.experts.sketch.Sketch`. ``expand``: every routed token is a sample. ``reduce``: one
    sample per item and expert. ``active``: every routed token with a gradient; one without adds nothing to the exact GGN, but
    under ``expand`` it enters ``A`` and ``n``.
    """

    def __init__(self, A: Gram | Sketch, G: Gram | Sketch, n: Tensor, token_setting: str = "expand"):
        self.A, self.G, self.n, self.token_setting = A, G, n, token_setting

    def open(self, a: Tensor, energy: Tensor, routes: Routes) -> None:
        self._a, self._energy, self._routes = a, energy, routes
        self._active = torch.zeros(len(a), dtype=torch.bool, device=a.device)

    def column(self, g: Tensor, energy: Tensor) -> None:
        routes, active = self._routes, energy > 0
        self._active |= active
        if self.token_setting == "reduce":
            routes, energy, g = routes.by_pair, None, routes.sum_pairs(g)
        elif 2 * int(active.sum()) < len(g):  # rows of zeros add nothing, and in the last layer nearly all are
            routes, energy, g = routes.keep(active), energy[active], g[active]
        self.G.add(g, routes, energy)

    def close(self) -> None:
        a, energy, routes = self._a, self._energy, self._routes
        if self.token_setting == "active" and not self._active.all():
            a, energy, routes = a[self._active], energy[self._active], routes.keep(self._active)
        elif self.token_setting == "reduce":
            a, energy, routes = routes.sum_pairs(a) / routes.pairs[1][:, None], None, routes.by_pair
        self.A.add(a, routes, energy)
        self.n += routes.counts
        self.A.close()
        self.G.close()
        del self._a, self._energy, self._routes, self._active

    def finish(self) -> Eigenbasis:
        """``H_e ~ G_e (x) A_e / n_e``. An expert without samples has zero curvature: it keeps its prior."""
        (alpha, basis_a, of_a), (gamma, basis_g, of_g) = self.A.eigen(), self.G.eigen()
        values = gamma[:, :, None] * alpha[:, None, :] / self.n.clamp(min=1)[:, None, None]
        return Eigenbasis(values, basis_a, basis_g, None if of_a is None else torch.stack([of_a, of_g], 1))

    def state(self) -> dict[str, Tensor]:
        factors = {f"{name}.{k}": v for name, of in (("A", self.A), ("G", self.G)) for k, v in of.tensors().items()}
        return factors | {"n": self.n}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.n.copy_(tensors["n"])
        for name, factor in (("A", self.A), ("G", self.G)):
            factor.restore({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})

    def merge(self, other: KronSums) -> None:
        self.A.merge(other.A)
        self.G.merge(other.G)
        self.n += other.n

    def summands(self) -> list[Tensor] | None:
        A, G = self.A.summands(), self.G.summands()
        return None if A is None or G is None else [*A, *G, self.n]


class SquareSums:
    """Running diagonal of the exact GGN in a Kronecker basis, ``sum_n sum_k (U_G^T J_{n,k} U_A)^2 [E, r_G, r_A]``: squares of
    *per-item* Jacobians, the terms between an item's tokens included.

    In the standard basis (``basis=None``) that is ``diag``. In the factors' eigenbasis it is EKFAC (arXiv 1806.03884): of all
    curvatures diagonal there, and zero outside its span, the one nearest to the exact GGN in Frobenius norm.
    """

    def __init__(self, H: Tensor, basis: Eigenbasis | None = None):
        self.H, self.basis = H, basis

    def open(self, a: Tensor, energy: Tensor, routes: Routes) -> None:
        self._a, self._routes = a if self.basis is None else project(a, self.basis.basis_a, routes), routes

    def column(self, g: Tensor, energy: Tensor) -> None:
        a, routes, active = self._a, self._routes, energy > 0
        if not active.all():
            a, g, routes = a[active], g[active], routes.keep(active)
        g = g if self.basis is None else project(g, self.basis.basis_g, routes)
        for e, _, J in item_jacobians(a, g[None], routes):
            self.H[e] += J.square().sum((0, 1))

    def close(self) -> None:
        del self._a, self._routes

    def finish(self) -> Eigenbasis:
        if self.basis is None:
            return Eigenbasis(self.H)
        return Eigenbasis(self.H, self.basis.basis_a, self.basis.basis_g, self.basis.captured)

    def state(self) -> dict[str, Tensor]:
        return {"H": self.H}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.H.copy_(tensors["H"])

    def merge(self, other: SquareSums) -> None:
        self.H += other.H

    def summands(self) -> list[Tensor]:
        return [self.H]


class DenseRows:
    """The rows ``sum_c v_{k,c} J_{n,c} [.., P]`` of the exact GGN of every expert; for small models only."""

    def __init__(self, experts: int, size: int, like: Tensor):
        self.rows: list[list[Tensor]] = [[like.new_zeros(0, size)] for _ in range(experts)]

    def open(self, a: Tensor, energy: Tensor, routes: Routes) -> None:
        self._a, self._routes = a, routes

    def column(self, g: Tensor, energy: Tensor) -> None:
        for e, _, J in item_jacobians(self._a, g[None], self._routes):
            self.rows[e].append(J.flatten(1))

    def close(self) -> None:
        del self._a, self._routes

    def finish(self) -> DenseBlocks:
        blocks = [dense_block(torch.cat(rows)) for rows in self.rows]
        return DenseBlocks([v for v, _ in blocks], [u for _, u in blocks])

    def state(self) -> dict[str, Tensor]:
        return {str(e): torch.cat(rows) for e, rows in enumerate(self.rows)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.rows = [[tensors[str(e)].clone().to(rows[0])] for e, rows in enumerate(self.rows)]

    def merge(self, other: DenseRows) -> None:
        for mine, others in zip(self.rows, other.rows, strict=True):
            mine += others

    def summands(self) -> None:
        return None


def first_sums(options: Mapping, shape: tuple[int, int, int], like: Tensor) -> KronSums | SquareSums | DenseRows:
    """What the (first) pass over the data sums for a layer of ``shape [E, d, f]``, on the device of ``like``; at least float32,
    since a sum over a whole set needs more than bf16's 8 bits."""
    E, d, f = shape
    like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    match options["hessian_structure"]:
        case "diag":
            return SquareSums(like.new_zeros(E, d, f))
        case "full":
            return DenseRows(E, d * f, like)
    n = torch.zeros(E, dtype=torch.long, device=like.device)
    if options["rank"] is None:
        return KronSums(Gram(E, f, like), Gram(E, d, like), n, options["token_setting"])
    A, G = (Sketch(E, width, options["rank"], options["seed"], like) for width in (f, d))
    return KronSums(A, G, n, options["token_setting"])


def factor_bytes(options: Mapping, shape: tuple[int, int, int], like: Tensor) -> int:
    """The most memory that a layer's sums take, in the first pass or with their bases in the second one of ``ekfac``."""
    first = first_sums(options, shape, like.to("meta")).state()
    total = sum(t.numel() * t.element_size() for t in first.values())
    if options["hessian_structure"] != "ekfac":
        return total
    r_a, r_g = (first[f"{name}.{'M' if options['rank'] is None else 'U'}"].shape[2] for name in "AG")  # at most
    E, d, f = shape
    return max(total, E * (f * r_a + d * r_g + 2 * r_a * r_g) * next(iter(first.values())).element_size())
