"""How far a posterior over some of a network's weights can move its answers: linearised Laplace in the dual form.

All of a small network's weights at once are too many for a ``P x P`` matrix, but a linearised posterior over them needs only the
inner products of per-item Jacobians, ``K_b = J_b J_b^T`` of every block ``b`` of weights. With the prior ``N(W_0, I / lambda_b)``
and the rows ``R`` of a root of the likelihood's curvature,

    Sigma_x = K_xx - K_xf R (I + R^T K R)^-1 R^T K_fx,      K = sum_b K_b / lambda_b,

(Woodbury's identity) is the exact GGN posterior, and the evidence, the share of every block and the linearised model's own mode
follow from the same matrices. So a choice of blocks, of precisions or of curvature costs nothing more than linear algebra.

Only differences of logits matter to a softmax, so everything is written in ``k = C - 1`` orthonormal contrasts of an item's options
instead of its ``C`` logits: ``D [N, k, C]``, ``D D^T = I``, ``D 1 = 0``. ``n = N k`` rows of a fitting set, ``T`` items looked at. Pure
functions, float64; prior precisions ``{block: lambda}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..experts.curvature import log_det_ratio, softmax_hessian_root
from ..experts.prior import best_by_evidence, groups

NEWTON_STEPS = 200
TOLERANCE = 1e-10  # of the penalised log-likelihood, nats per row


# ---- contrasts and curvature ----------------------------------------------------------------------------------------
def contrasts(present: Tensor) -> Tensor:
    """Orthonormal contrasts ``D [N, C-1, C]`` of each item's options, ``present [N, C]`` bool (Helmert's: every option against the mean
    of those before it). An item of ``m`` options has ``m - 1``; its other rows are zero."""
    rank = present.long().cumsum(1) - 1  # [N, C]
    row = torch.arange(1, present.shape[1], device=present.device)[None, :, None]  # [1, C-1, 1]
    rank = rank[:, None, :]
    weight = torch.where(rank < row, 1.0, torch.where(rank == row, -row.double(), 0.0)) / (row * (row + 1.0)).sqrt()
    exists = row < present.sum(1)[:, None, None]
    return (weight * present[:, None, :] * exists).double()


def likelihood_root(logits: Tensor, D: Tensor, kind: str = "exact", *, labels: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """``R [N, k, r]`` with ``R R^T = D Lambda D^T``, the curvature of each item's ``-log p`` in its contrasts.

    ``exact``: ``Lambda = diag p - p p^T`` at ``p = softmax(logits)``; with ``smoothing`` at ``(1 - smoothing) p + smoothing / C``, which
    no saturation makes vanish. ``empirical``: ``(e_y - p)(e_y - p)^T``, ``labels [N]``.
    """
    logits = logits.double()
    if kind == "exact":
        if smoothing:
            present = logits.isfinite()
            p = (1 - smoothing) * logits.softmax(-1) + smoothing * present / present.sum(-1, keepdim=True)
            logits = p.log()
        return D @ softmax_hessian_root(logits)
    if kind == "empirical":
        return _residual(logits, labels, D).view(len(D), -1, 1)
    raise ValueError(f"kind={kind!r} is not 'exact' or 'empirical'")


def _times(K: Tensor, root: Tensor) -> Tensor:
    """``K R``, ``[m, n] -> [m, N r]``, ``R`` block-diagonal with blocks ``root [N, k, r]``."""
    N, k, r = root.shape
    return torch.einsum("pnk,nkr->pnr", K.view(len(K), N, k), root).reshape(len(K), N * r)


def whitened(K: Tensor, root: Tensor) -> Tensor:
    """``R^T K R [N r, N r]``: its eigenvalues are the non-zero ones of the GGN ``sum_n J_n^T Lambda_n J_n``."""
    return _times(_times(K, root).mT.contiguous(), root)


# ---- kernels --------------------------------------------------------------------------------------------------------
@dataclass
class Kernels:
    """Inner products of Jacobians (contrasts), by block of weights; all float64. ``k = C - 1``.

    ``fit``: block -> ``[n, n]``; ``cross``: block -> ``[T k, n]``; ``own``: block -> ``[T, k, k]``, of an item with itself.
    ``fit_slope [n]``, ``own_slope [T k]``: ``J_b (W_b - W_0)``; ``distance``: ``||W_b - W_0||^2``; ``size``: weights.
    ``fit_logits [N, C]``, ``fit_labels [N]``; ``logits [T, C]`` of the items looked at.
    """

    fit: dict[str, Tensor]
    cross: dict[str, Tensor]
    own: dict[str, Tensor]
    fit_slope: dict[str, Tensor]
    own_slope: dict[str, Tensor]
    distance: dict[str, float]
    size: dict[str, int]
    fit_logits: Tensor
    fit_labels: Tensor
    logits: Tensor
    fit_contrasts: Tensor = field(init=False)
    contrasts: Tensor = field(init=False)

    def __post_init__(self):
        self.fit_contrasts, self.contrasts = contrasts(self.fit_logits.isfinite()), contrasts(self.logits.isfinite())

    @property
    def blocks(self) -> list[str]:
        return list(self.fit)

    def root(self, kind: str = "exact", *, logits: Tensor | None = None, **options) -> Tensor:
        """:func:`likelihood_root` of the fitting set, at the model's own logits or at others."""
        logits = self.fit_logits if logits is None else logits
        return likelihood_root(logits, self.fit_contrasts, kind, labels=self.fit_labels, **options)

    def summed(self, precision: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
        """``sum_b K_b / lambda_b`` over the named blocks (the others are held fixed): ``fit``, ``cross``, ``own``."""
        if unknown := set(precision) - set(self.fit):
            raise ValueError(f"no block {', '.join(sorted(unknown))}; there are: {', '.join(self.fit)}")
        if not precision or not all(value > 0 for value in precision.values()):
            raise ValueError("precision must name at least one block, and be positive")
        return tuple(sum(getattr(self, key)[b] / value for b, value in precision.items()) for key in ("fit", "cross", "own"))


# ---- posterior ------------------------------------------------------------------------------------------------------
def covariance(kernels: Kernels, precision: Mapping[str, float], root: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The predictive covariance ``[T, C, C]`` of the (centred) logits under the posterior over the named blocks, and each block's part
    of it in variance, ``tr Cov(f_b, f) [T]``, ``f_b = J_b (W_b - W_MAP)``: they add up to ``tr Sigma_x``.

    ``root [N, k, r]``: of the curvature; ``None``: no data, the prior alone. A part can be negative where the posterior plays blocks
    off against each other.
    """
    K, cross, own = kernels.summed(precision)
    T, k = own.shape[:2]
    total, parts = own, {b: kernels.own[b].diagonal(dim1=1, dim2=2).sum(1) / value for b, value in precision.items()}
    if root is not None:
        A = whitened(K, root)
        A.diagonal().add_(1)
        right = _times(cross, root)  # [T k, N r]
        solved = torch.cholesky_solve(right.mT, torch.linalg.cholesky(A)).mT  # K_xf R (I + R^T K R)^-1
        total = own - solved.view(T, k, -1) @ right.view(T, k, -1).mT
        for b, value in precision.items():
            parts[b] = parts[b] - (_times(kernels.cross[b], root) * solved).reshape(T, -1).sum(1) / value
    D = kernels.contrasts
    return D.mT @ ((total + total.mT) / 2) @ D, parts


# ---- evidence -------------------------------------------------------------------------------------------------------
def spectrum(kernels: Kernels, blocks: list[str], root: Tensor) -> Tensor:
    """The eigenvalues ``[N r]`` of the dense GGN over the blocks' weights together that can be non-zero."""
    return torch.linalg.eigvalsh(whitened(sum(kernels.fit[b] for b in blocks), root)).clamp(min=0)


def log_evidence(log_likelihood: float, eigenvalues: Tensor, distance: float, precision: Tensor) -> Tensor:
    """Laplace evidence at each ``precision [P]``: ``log p(D|W) - 1/2 lambda ||W - W_0||^2 - 1/2 log det(I + H / lambda)``, ``[P]``."""
    ratios = log_det_ratio(eigenvalues.expand(len(precision), -1), precision)
    return log_likelihood - 0.5 * (precision * distance + ratios)


def best_precision(eigenvalues: Tensor, distance: float) -> float:
    """The precision of largest :func:`log_evidence`, shared by all the weights that ``eigenvalues`` and ``distance`` are of."""
    group = groups("global", 1, 1)
    return float(best_by_evidence([eigenvalues[None]], torch.tensor([[float(distance)]]).double(), group, torch.ones(1, 1).double()))


def mode_gap(kernels: Kernels, precision: Mapping[str, float]) -> dict[str, float]:
    """How far the weights are from a mode of the posterior whose evidence is taken, over the named blocks: the norms of the gradient of the
    log-likelihood (``likelihood``), of the log-prior (``prior``), and of their sum (``sum``), which is zero at a mode."""
    residual = _residual(kernels.fit_logits, kernels.fit_labels, kernels.fit_contrasts)
    pairs = [(float(residual @ (kernels.fit[b] @ residual)), lam * float(residual @ kernels.fit_slope[b]), lam**2 * kernels.distance[b])
             for b, lam in precision.items()]
    likelihood, inner, prior = (sum(column) for column in zip(*pairs))
    return {"likelihood": likelihood**0.5, "prior": prior**0.5, "sum": max(likelihood - 2 * inner + prior, 0.0) ** 0.5}


def _residual(logits: Tensor, labels: Tensor, D: Tensor) -> Tensor:
    """``D (e_y - p) [n]``, the gradient of the log-likelihood in the contrasts."""
    onehot = torch.nn.functional.one_hot(_known(labels), logits.shape[1])
    return torch.einsum("nkc,nc->nk", D, onehot - logits.double().softmax(-1)).flatten()


def _known(labels: Tensor) -> Tensor:
    if not (labels >= 0).all():
        raise ValueError("this needs a label on every item of the fitting set")
    return labels


# ---- the linearised model's own mode --------------------------------------------------------------------------------
@dataclass
class LinearMode:
    """The mode of the linearised model ``f(x) + J (W - W_MAP)`` under prior and likelihood: ``fit_logits [N, C]``, ``logits [T, C]``
    there (centred; -inf: no such option), ``log_likelihood``, and by block ``||W* - W_0||^2``."""

    fit_logits: Tensor
    logits: Tensor
    log_likelihood: float
    distance: dict[str, float]


def linear_mode(kernels: Kernels, precision: Mapping[str, float]) -> LinearMode:
    """Where the weights would be if the linearised model were trained to the optimum of the posterior whose evidence is taken.

    A network that was trained without that prior is at no mode of it, and the evidence's ``lambda ||W||^2`` is then of weights that
    the prior never held in check (arXiv 2206.08900). The linearised model is convex: with ``W* = W_0 + J^T alpha / lambda`` the mode
    is ``alpha = D (e_y - p)``, found by Newton's method in function space (Rasmussen and Williams, algorithm 3.3), halving steps
    that overshoot. ``RuntimeError`` if it does not converge.
    """
    D, labels = kernels.fit_contrasts, _known(kernels.fit_labels)
    N, k, _ = D.shape
    K, cross, _ = kernels.summed(precision)
    missing = ~kernels.fit_logits.isfinite()
    of = lambda logits, D: torch.einsum("nkc,nc->nk", D, logits.double().nan_to_num(neginf=0.0)).flatten()  # noqa: E731
    offset = of(kernels.fit_logits, D) - sum(kernels.fit_slope[b] for b in precision)

    def logits_of(f: Tensor, D: Tensor, missing: Tensor) -> Tensor:
        return torch.einsum("nkc,nk->nc", D, f.view(-1, k)).masked_fill(missing, -torch.inf)

    def objective(alpha: Tensor) -> tuple[float, Tensor, float]:
        logits = logits_of(offset + K @ alpha, D, missing)
        ll = float(logits.log_softmax(-1).gather(1, labels[:, None]).sum())
        return ll - 0.5 * float(alpha @ (K @ alpha)), logits, ll

    alpha = torch.zeros(N * k, dtype=torch.float64)
    value, logits, ll = objective(alpha)
    for _ in range(NEWTON_STEPS):
        root = likelihood_root(logits, D)
        gradient = _residual(logits, labels, D)
        A = whitened(K, root)
        A.diagonal().add_(1)
        f = K @ alpha
        b = _block_apply(root, f) + gradient
        inner = torch.cholesky_solve(_times((K @ b)[None], root).mT, torch.linalg.cholesky(A)).squeeze(1)
        direction = b - torch.einsum("nkr,nr->nk", root, inner.view(N, -1)).flatten() - alpha
        step = 1.0
        while True:
            trial = objective(alpha + step * direction)
            if trial[0] >= value or step < 1e-8:
                break
            step /= 2
        gain, alpha = trial[0] - value, alpha + step * direction
        value, logits, ll = trial
        if gain < TOLERANCE * N:
            break
    else:
        raise RuntimeError(f"the linearised model's mode was not reached in {NEWTON_STEPS} Newton steps")
    there = of(kernels.logits, kernels.contrasts) - sum(kernels.own_slope[b] for b in precision) + cross @ alpha
    distance = {b: float(alpha @ (kernels.fit[b] @ alpha)) / lam**2 for b, lam in precision.items()}
    return LinearMode(logits, logits_of(there, kernels.contrasts, ~kernels.logits.isfinite()), ll, distance)


def _block_apply(root: Tensor, f: Tensor) -> Tensor:
    """``R R^T f``."""
    N, k, _ = root.shape
    return torch.einsum("nkr,nr->nk", root, torch.einsum("nkr,nk->nr", root, f.view(N, k))).flatten()


# ---- leads ----------------------------------------------------------------------------------------------------------
def leads(logits: Tensor, cov: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """How far each item's top option leads the second, in logits ``[N]``, and the standard deviation of that lead under ``cov
    [N, C, C]``. An over-confident answer is undone only where the second is as large as the first."""
    top, index = logits.double().topk(2, dim=1)
    if cov is None:
        return top[:, 0] - top[:, 1], None
    a, b = index.T
    rows, cov = torch.arange(len(logits)), cov.double()
    variance = cov[rows, a, a] + cov[rows, b, b] - cov[rows, a, b] - cov[rows, b, a]
    return top[:, 0] - top[:, 1], variance.clamp(min=0).sqrt()
