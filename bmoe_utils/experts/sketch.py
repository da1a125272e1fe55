"""Low-rank Kronecker factors found in one pass, never holding a square one, batched over experts.

A factor is a sum of outer products, ``M_e = sum_s x_s x_s^T [m, m]`` per expert. Kept instead are an orthonormal ``U_e [m, k]``, k a
little above the rank that is wanted, and ``M_e U_e = sum_s x_s (x_s^T U_e)``. Nystrom's approximation from these,

    M^ = (M U) (U^T M U)^+ (M U)^T,     0 <= M^ <= M,

cut to its leading eigenpairs, is the result (Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736): curvature is never invented, and
what is missed stays at the prior. With a random ``U`` the trace that is missed is at most ``1 + r/(k-r-1)`` times what the best rank
r misses, in expectation (ibid., Theorem 4.1). Where eigenvalues fall slowly that is felt, so the sketch *restarts*, ever more
rarely: ``M^`` so far, cut to a little above r, becomes the base, its eigenvectors the new ``U``, and a few random columns look for
what comes later. Every restart is a step of subspace iteration, and the bounds above hold from one to the next. The result is as
good as an incremental SVD's (tests/experts/test_sketch.py), at the price of two thin products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import float64
from .curvature import eigh
from .jacobians import Routes

# Columns of U beyond the rank: this share of it (at least LEAST_SPARE) is kept at a restart, and as many are random after it.
SPARE, LEAST_SPARE = 1 / 8, 4
# Where an energy is asked for and the rank is not known beforehand, the sketch has this share of the width.
ENERGY_SHARE, LEAST_COLUMNS = 0.25, 32
# Restarts come after 2k samples an expert, then whenever these have grown fourfold, at the latest after another 64k: a restart costs
# about as much as 10k samples.
FIRST_RESTART, GROWTH, LATEST_RESTART = 2, 4, 64
# Eigenvalues below this share of the largest are dropped in float64 too: beneath, directions are not orthogonal any more.
LEAST_RATIO = 1e-12


def sketch_size(rank: int | float, width: int) -> tuple[int, int]:
    """How many columns a sketch for this rank (or share of the energy) of a factor of this width has, and keeps at a restart."""
    if isinstance(rank, float):
        columns = min(width, max(LEAST_COLUMNS, round(ENERGY_SHARE * width)))
        return columns, columns - max(LEAST_SPARE, round(SPARE * columns))
    spare = max(LEAST_SPARE, round(SPARE * rank))
    return min(width, rank + 2 * spare), rank + spare


def next_restart(seen: float, columns: int) -> float:
    """After how many samples an expert the sketch that restarts now does so again."""
    return min(GROWTH * seen, seen + LATEST_RESTART * columns)


def gaussian(width: int, columns: int, seed: int) -> Tensor:
    """``[m, k]`` float64 on the CPU."""
    return torch.randn(width, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(W: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``W [E, m, k]``, the first ones' span first; Cholesky QR, twice for its rounding."""
    for _ in range(2):
        root = torch.linalg.cholesky(float64(W.mT @ W))
        W = torch.linalg.solve_triangular(root.mT.to(W), W, upper=True, left=False)
    return W


def nystrom(Y: Tensor, U: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenpairs of ``Y (U^T Y)^+ Y^T`` from ``Y = M U``: values ``[E, k]`` ascending and >= 0 (float64), vectors ``[E, m, k]``.

    ``Y``, ``U [E, m, k]``; ``Y`` was summed with relative rounding ``eps``, so what lies below ``10 eps`` of the core's largest
    eigenvalue is noise and dropped. Only ``k x k`` problems are solved, in float64; thin products are in ``Y``'s precision.
    """
    core = float64(U.mT @ Y)
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    keep = values > max(10 * eps, LEAST_RATIO) * values[:, -1:].clamp(min=0)
    return eigenpairs(Y @ (vectors * torch.where(keep, values, torch.inf).rsqrt()[:, None]).to(Y))  # M^ = B B^T


def eigenpairs(B: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``B B^T``, ``B [E, m, k]``: eigenvalues ``[E, k]`` ascending (float64), eigenvectors ``[E, m, k]`` (zero where those are)."""
    values, vectors = torch.linalg.eigh(float64(B.mT @ B))
    keep = values > max(torch.finfo(B.dtype).eps, LEAST_RATIO) * values[:, -1:].clamp(min=0)
    return values * keep, B @ (vectors * torch.where(keep, values, torch.inf).rsqrt()[:, None]).to(B)


def polished(vectors: Tensor) -> Tensor:
    """Columns that small eigenvalues left a little off orthonormal, made so (Newton-Schulz); zero columns stay zero."""
    for _ in range(2):
        vectors = 1.5 * vectors - 0.5 * vectors @ (vectors.mT @ vectors)
    return vectors


def leading(values: Tensor, vectors: Tensor, rank: int | float, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenpairs of every expert (ascending), or, of an energy share, as many as the neediest expert
    wants to reach it (all of them where it cannot). ``energy [E]``: the traces of the factors."""
    if isinstance(rank, float):
        reached = values.flip(1).cumsum(1) >= rank * energy[:, None]  # [E, k], by number of eigenpairs
        needed = torch.where(reached.any(1), reached.long().argmax(1) + 1, values.shape[1])
        rank = int(torch.where(energy > 0, needed, 1).max())
    return values[:, -rank:].contiguous(), vectors[:, :, -rank:].contiguous()


class Sketch:
    """The running sketch of one factor of a layer's experts.

    ``U [E, m, k]``; ``base [E, k]``: the part of ``M`` before the last restart is ``U diag(base) U^T``; ``Y [E, m, k]``: ``M U`` of the
    part since; ``energy [E]``: the whole trace (float64). ``progress``: samples seen an expert on average, how many until the next
    restart, and restarts so far.
    """

    def __init__(self, experts: int, width: int, rank: int | float, seed: int, like: Tensor):
        columns, self.kept = sketch_size(rank, width)
        self.rank, self.seed = rank, seed
        self.U = torch.linalg.qr(gaussian(width, columns, seed)).Q.to(like).repeat(experts, 1, 1)
        self.Y, self.base = torch.zeros_like(self.U), like.new_zeros(experts, columns)
        self.energy = float64(like.new_zeros(experts))
        self.progress = torch.tensor([0.0, FIRST_RESTART * columns, 0.0], dtype=torch.float64)

    def add(self, x: Tensor, routes: Routes, energy: Tensor | None = None) -> None:
        """More samples ``x [S, m]``; ``energy [S]`` their squared norms if they are known already."""
        for e, lo, hi in routes.bounds:
            self.Y[e].addmm_(x[lo:hi].mT, x[lo:hi] @ self.U[e])
        energy = torch.linalg.vecdot(x, x) if energy is None else energy
        ends = pad(routes.counts.cumsum(0), (1, 0)).to(self.energy.device)
        self.energy += pad(float64(energy).cumsum(0), (1, 0))[ends].diff()
        self.progress[0] += len(x) / len(self.U)

    def close(self) -> None:
        """The batch is over: restarts if it is time."""
        seen, due, restarts = self.progress.tolist()
        m, k = self.U.shape[1:]
        if seen < due or k == m:  # with all columns nothing is missed
            return
        self._restart(*(x.flip(-1) for x in self._eigenpairs()))
        self.progress.copy_(torch.tensor([seen, next_restart(seen, k), restarts + 1]))

    def _restart(self, values: Tensor, vectors: Tensor) -> None:
        """From the ``kept`` leading of these eigenpairs (descending; ``k`` of them or more) and random columns."""
        k = self.U.shape[2]
        values, vectors = values[:, :k].clone(), vectors[:, :, :k]
        values[:, self.kept :] = 0
        fresh = gaussian(self.U.shape[1], k, self.seed + 1 + int(self.progress[2])) / self.U.shape[1] ** 0.5
        kept = (values[:, None] > 0).to(vectors.device)
        self.U.copy_(orthonormal(torch.where(kept, vectors, fresh.to(vectors))))
        self.base.copy_(values)
        self.Y.zero_()

    def _eigenpairs(self, cast: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
        """Of ``M^``; its thin products in the sums' precision, or in that of ``cast``."""
        U, Y = cast(self.U), cast(self.Y + self.U * self.base[:, None])
        if U.shape[1] == U.shape[2]:  # U is a basis of the whole space: the factor itself
            values, vectors = eigh(Y @ U.mT)
            return float64(values.clamp(min=0)), vectors
        return nystrom(Y, U, torch.finfo(self.Y.dtype).eps)

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues ``[E, r]`` ascending, eigenvectors ``[E, m, r]`` (zero where the value is) and the share of each trace they
        hold ``[E]``."""
        values, vectors = leading(*self._eigenpairs(float64), self.rank, self.energy)
        captured = values.sum(1) / self.energy  # without samples 0/0: not a number
        return values.to(self.U), polished(vectors).to(self.U).contiguous(), captured

    def merge(self, other: Sketch) -> None:
        """Adds the sketch of other samples. With the same ``U`` (neither has restarted, or both go on from one base) that is a sum,
        otherwise the sum of the two approximations, cut to what a restart keeps."""
        if torch.equal(self.U, other.U):
            self.Y += other.Y
        else:
            pairs = (x._eigenpairs() for x in (self, other))
            both = [vectors * values.sqrt().to(vectors)[:, None] for values, vectors in pairs]
            self._restart(*(x.flip(-1) for x in eigenpairs(torch.cat(both, 2))))
        self.energy += other.energy
        self.progress[0] += other.progress[0]

    def summands(self) -> list[Tensor] | None:
        """Before the first restart all sketches of a seed have the same ``U``, and are the sketch of all samples when added."""
        return None if self.progress[2] else [self.Y, self.energy]

    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.U, "Y": self.Y, "base": self.base, "energy": self.energy, "progress": self.progress}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
