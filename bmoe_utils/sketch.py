"""Low-rank Kronecker factors found in one pass, never holding a square one: the Nystrom sketch, batched over experts.

A factor is a sum of outer products, ``M_e = sum_s x_s x_s^T [m, m]`` per expert. Kept instead is its product with one fixed
random matrix, ``Y_e = M_e Omega = sum_s x_s (x_s^T Omega) [m, k]``, ``k`` a little above the rank that is wanted. It is linear in
the data: it streams, and sketches of parts with the same seed add up to the sketch of the whole. At the end

    M^ = Y (Omega^T Y)^+ Y^T,     cut to its r leading eigenpairs (Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736, Alg. 3)

``0 <= M^ <= M``: curvature is never invented, and what is missed stays at the prior. For Gaussian ``Omega`` the trace that is
missed is at most ``1 + r/(k-r-1)`` times what the best rank r would miss, in expectation (ibid., Theorem 4.1).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .jacobians import Routes

# Columns beyond the rank: a quarter of it, at least 8, so the bound above is a factor of about 5 and what is seen is a few per cent.
OVERSAMPLING, LEAST_OVERSAMPLING = 0.25, 8
# Where an energy is asked for and the rank is not known beforehand, the sketch has this share of the width.
ENERGY_SHARE, LEAST_COLUMNS = 0.25, 32
# Eigenvalues of the core below this share of its largest are dropped in float64 too: beneath, directions are not orthogonal any more.
LEAST_RATIO = 1e-12


def sketch_columns(rank: int | float, width: int) -> int:
    """How many columns a sketch for this rank (or share of the energy) of a factor of this width has."""
    if isinstance(rank, int):
        return min(width, rank + max(LEAST_OVERSAMPLING, round(OVERSAMPLING * rank)))
    return min(width, max(LEAST_COLUMNS, round(ENERGY_SHARE * width)))


@lru_cache(maxsize=16)
def random_basis(width: int, columns: int, seed: int) -> Tensor:
    """``Omega [m, k]`` float64 on the CPU: an orthonormal basis of the range of a Gaussian matrix, fixed by width and seed.

    Nystrom's approximation depends on the range alone; the basis is the one in which its core is conditioned best.
    """
    gaussian = torch.randn(width, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian).Q


def nystrom(Y: Tensor, omega: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenpairs of ``Y (Omega^T Y)^+ Y^T`` in float64: values ``[E, k]`` ascending and >= 0, vectors ``[E, m, k]``.

    ``Y [E, m, k]`` was summed with relative rounding ``eps``: what lies below ``10 eps`` of the core's largest eigenvalue is noise
    and dropped. Vectors are orthonormal, those of dropped directions zero. Only ``k x k`` problems are solved.
    """
    Y, omega = Y.double(), omega.double()
    core = omega.mT @ Y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    keep = values > max(10 * eps, LEAST_RATIO) * values[:, -1:].clamp(min=0)
    B = Y @ (vectors * torch.where(keep, values, torch.inf).rsqrt()[:, None])  # M^ = B B^T
    values, vectors = torch.linalg.eigh(B.mT @ B)
    keep = values > LEAST_RATIO * values[:, -1:].clamp(min=0)
    values = values * keep
    U = B @ (vectors * torch.where(keep, values, torch.inf).rsqrt()[:, None])
    for _ in range(2):  # towards orthonormal columns: squares the rounding error that small values let grow
        U = 1.5 * U - 0.5 * U @ (U.mT @ U)
    return values, U


def leading(values: Tensor, vectors: Tensor, rank: int | float, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenpairs of every expert (ascending), or, of an energy share, as many as the neediest expert
    wants to reach it (all of them where it cannot). ``energy [E]``: the traces of the factors."""
    if not isinstance(rank, int):
        reached = values.flip(1).cumsum(1) >= rank * energy[:, None].to(values)  # [E, k], by number of eigenpairs
        needed = torch.where(reached.any(1), reached.long().argmax(1) + 1, values.shape[1])
        rank = int(torch.where(energy.to(needed.device) > 0, needed, 1).max())
    return values[:, -rank:].contiguous(), vectors[:, :, -rank:].contiguous()


class Sketch:
    """The running sketch of one factor of a layer's experts: ``Y [E, m, k]`` and the traces ``energy [E]`` (float64)."""

    def __init__(self, experts: int, width: int, rank: int | float, seed: int, like: Tensor):
        self.rank = rank
        self.omega = random_basis(width, sketch_columns(rank, width), seed).to(like)
        self.Y = like.new_zeros(experts, width, self.omega.shape[1])
        self.energy = torch.zeros(experts, dtype=torch.float64, device=like.device)

    def add(self, x: Tensor, routes: Routes, energy: Tensor | None = None) -> None:
        """More samples ``x [S, m]``; ``energy [S]`` their squared norms if they are known already."""
        projected = x @ self.omega
        for e, lo, hi in routes.bounds:
            self.Y[e].addmm_(x[lo:hi].mT, projected[lo:hi])
        energy = torch.linalg.vecdot(x, x) if energy is None else energy
        upto = torch.nn.functional.pad(energy.double().cumsum(0), (1, 0))[torch.nn.functional.pad(routes.counts.cumsum(0), (1, 0))]
        self.energy += upto.diff()

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues ``[E, r]`` ascending, eigenvectors ``[E, m, r]`` and the share of each trace they hold ``[E]``."""
        E, m, k = self.Y.shape
        if k == m:  # Omega is orthogonal: the factor itself
            values, vectors = torch.linalg.eigh((self.Y @ self.omega.mT).double())
            values = values.clamp(min=0)
        else:
            values, vectors = nystrom(self.Y, self.omega, torch.finfo(self.Y.dtype).eps)
        values, vectors = leading(values, vectors, self.rank, self.energy)
        return values.to(self.Y), vectors.to(self.Y), values.sum(1) / self.energy  # without samples 0/0: not a number

    def tensors(self) -> dict[str, Tensor]:
        return {"Y": self.Y, "energy": self.energy}
