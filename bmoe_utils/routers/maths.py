"""The maths of the Bayesian routers: pure functions of tensors, no model, no hook, no file.

Layout, the same everywhere: ``N`` tokens, ``E`` experts, ``K`` experts per token, ``S`` samples, ``d`` hidden width.

    logits [N, E]    samples [S, N, E]    u [N, d] a router's input    W [E, d] its weight, l = W u

A distribution over routings is handed on as a *shift* of the deterministic logits: ``rule(l + shift)`` is the model's own
top-K rule under the averaged scores. Every shift here is exactly 0.0 where there is no variance, so that such a router is
the deterministic one bit for bit and not to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..precision import at_least_float32

# Nodes of the one-dimensional Gauss-Hermite rule of the sample-free path. 9 integrate a sigmoid under N(m, s^2) to 1e-6, 4e-4,
# 4e-3 at s = 1, 2, 3 (measured, worst m), a tenth of the error of the step before it.
SAMPLE_FREE_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


# ---- divergences ----------------------------------------------------------------------------------------------------
def kl_diagonal(mu: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(mu, diag s^2) || N(0, I)) = 1/2 sum_i (s_i^2 + mu_i^2 - 1 - 2 log s_i)``. ``[..., E]`` each -> ``[...]``."""
    return 0.5 * ((2 * log_std).exp() + mu.square() - 1 - 2 * log_std).sum(-1)


def kl_cholesky(mu: Tensor, L: Tensor) -> Tensor:
    """``KL(N(mu, L L^T) || N(0, I)) = 1/2 (||L||_F^2 + ||mu||^2 - E - 2 sum_i log L_ii)`` (arXiv 2603.09453).

    ``mu [..., E]``, ``L [..., E, E]`` lower triangular with a positive diagonal -> ``[...]``.
    """
    log_det = torch.diagonal(L, dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (L.square().sum((-2, -1)) + mu.square().sum(-1) - mu.shape[-1]) - log_det


def kl_low_rank(mu: Tensor, log_std: Tensor, V: Tensor) -> Tensor:
    """``KL(N(mu, diag s^2 + V V^T) || N(0, I))``, ``mu``, ``log_std [..., E]``, ``V [..., E, R]`` -> ``[...]``.

    :func:`kl_diagonal`, plus half of ``||V||_F^2 - log det(I + V^T diag(s^-2) V)`` (the matrix determinant lemma).
    """
    scaled = V / log_std.exp()[..., None]
    root = torch.linalg.cholesky(torch.eye(V.shape[-1], dtype=V.dtype, device=V.device) + scaled.mT @ scaled)
    half_log_det = torch.diagonal(root, dim1=-2, dim2=-1).log().sum(-1)
    return kl_diagonal(mu, log_std) + 0.5 * V.square().sum((-2, -1)) - half_log_det


def kl_normal(mean: Tensor, log_std: Tensor, prior_mean: float, prior_std: float) -> Tensor:
    """``KL(N(mean, s^2) || N(prior_mean, prior_std^2))`` of scalars, elementwise."""
    return math.log(prior_std) - log_std + 0.5 * (((2 * log_std).exp() + (mean - prior_mean).square()) / prior_std**2 - 1)


def masked_mean(x: Tensor, real: Tensor) -> Tensor:
    """Each item's mean of ``x [B, T]`` over its real tokens, ``real [B, T]`` bool -> ``[B]``. Padding may hold anything."""
    return x.masked_fill(~real, 0).sum(1) / real.sum(1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats of normalised ``log_p [..., E]`` (-inf allowed) -> ``[...]``."""
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """``|A & B| / |A | B|`` of top-K index sets ``[..., K]`` (distinct within a row, any order) -> float64 ``[...]``."""
    both = (a[..., :, None] == b[..., None, :]).sum((-2, -1)).double()
    return both / (a.shape[-1] + b.shape[-1] - both)


# ---- random numbers -------------------------------------------------------------------------------------------------
def mirrored(half: Tensor, num_samples: int) -> Tensor:
    """``half [ceil(S/2), ...]`` of symmetric noise followed by its negatives, cut to ``S``: antithetic pairs.

    Each sample keeps its law; the two of a pair are dependent, so that whatever is odd in the noise cancels. Half the random
    numbers, and a nearer average. With ``S`` odd the last of ``half`` stands alone.
    """
    return torch.cat([half, -half])[:num_samples]


def bernoulli_positions(total: int, p: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which of ``total`` independent trials of probability ``p < 1`` succeed: ascending int64, on ``like``'s device.

    By the gaps between successes, which are geometric: ``p total`` uniform numbers (of ``like``'s dtype) and not ``total``.
    """
    found, last = torch.zeros(0, dtype=torch.long, device=like.device), -1
    while p > 0 and last < total:  # once; with probability 3e-7 the draws do not reach the end, and it goes on
        trials = total - last
        draws = int(trials * p + 5 * math.sqrt(trials * p * (1 - p))) + 5
        uniform = torch.rand(draws, dtype=like.dtype, device=like.device, generator=generator)
        gaps = uniform.clamp_(min=torch.finfo(like.dtype).tiny).log_().mul_(1 / math.log1p(-p)).long()  # P(gap >= k) = (1 - p)^k
        found = torch.cat([found, gaps.add_(1).cumsum(0).add_(last)])
        last = int(found[-1])
    return found[: int(torch.searchsorted(found, total))]


# ---- averaged scores ------------------------------------------------------------------------------------------------
def log_scores(logits: Tensor, link: str) -> Tensor:
    """The rule's score of every expert, log: ``softmax`` over the experts, or ``sigmoid`` of each on its own."""
    return logits.log_softmax(-1) if link == "softmax" else logsigmoid(logits)


def sampled_shift(logits: Tensor, samples: Tensor, link: str = "softmax") -> Tensor:
    """``shift [N, E]`` with ``score(logits + shift) = mean_s score(samples_s)``: averages scores, not logits.

    ``logits [N, E]``, ``samples [S, N, E]``. Taken as the log of a mean of ratios, which is 0.0
    where all ratios are 1: on any processor, though sigmoids of tensors of two shapes may differ in
    the last bit (vectors, and a scalar remainder). A softmax is taken row by row, alike in every
    shape; ratios of sigmoids come from the logits' differences.
    """
    floor = torch.finfo(logits.dtype).tiny ** 0.8  # so small a score never matters, and no ratio overflows

    def log_mean(ratio: Tensor, start: Tensor) -> Tensor:
        # The mean has the floor and not every score: one pass over [S, N, E] less. Below it, and
        # unmoved, the ratio is 1 again.
        return torch.maximum(ratio.mean(0), floor / start).log()

    if link == "softmax":
        start = logits.softmax(-1).clamp(min=floor)
        return log_mean(samples.softmax(-1) / start, start)
    # sigmoid(l + d) / sigmoid(l) = 1 / (p + q e^-d), p = sigmoid(l), q = 1 - p. The smaller of the
    # two is computed and the other is what is left of 1: they add up to exactly 1; e^0 is 1 too.
    less = torch.sigmoid(-logits.abs()).clamp(min=floor)
    p, q = torch.where(logits > 0, 1 - less, less), torch.where(logits > 0, less, 1 - less)
    d = samples - logits
    # log odds: mean sigmoid(l) against mean sigmoid(-l)
    return log_mean(1 / (p + q * (-d).exp()), p) - log_mean(1 / (q + p * d.exp()), q)


def _log_ratio_of_sigmoids(start: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``log E[sigmoid(y)] - log sigmoid(start)``, ``y ~ N(mean, variance)``, by Gauss-Hermite; exactly 0 if nothing moved."""
    nodes, weights = (torch.as_tensor(x, dtype=mean.dtype, device=mean.device) for x in (SAMPLE_FREE_NODES, _WEIGHTS))
    tiny = torch.finfo(mean.dtype).tiny
    std = variance.clamp(min=tiny).sqrt()  # sqrt(0) has no gradient; tiny is no variance
    # Far out a sigmoid is an exponential, so that the ratio is the same from a start at which nothing underflows.
    near = start.clamp(min=0.8 * math.log(tiny))
    y = torch.addcmul(near + (mean - start), std, nodes.view(-1, *[1] * mean.dim()))  # [nodes, N, E]
    average = torch.tensordot(weights, y.sigmoid(), 1).clamp(min=tiny)
    return torch.where((variance > 0) | (mean != start), average.log() - logsigmoid(near), 0)


def sample_free_shift(mean: Tensor, cov: Tensor, link: str = "softmax") -> Tensor:
    """``shift [N, E]`` with ``score(mean + shift) ~ E[score(l)]``, ``l ~ N(mean, cov)``, without sampling.

    ``cov``: variances ``[N, E]`` or a full covariance ``[N, E, E]``. Expert c is chosen by its log odds against all the
    others, ``y_c = l_c - logsumexp_{i != c} l_i`` and ``softmax(l)_c = sigmoid(y_c)``. ``y_c`` is taken as Gaussian, its
    mean to second and its variance to first order in the noise (with ``w`` the others' softmax at the mean,

        E y_c ~ y_c(mean) - 1/2 (w . v - w^T Cov w),    Var y_c ~ (e_c - w)^T Cov (e_c - w)),

    and ``E[sigmoid]`` is one-dimensional: 9 Gauss-Hermite nodes. For two experts that is all the error there is. O(E) for variances and O(E^2)
    for a covariance. The pairwise probit (:func:`curvature.probit_probabilities`) serves a handful of answer options but not
    a router: at E = 60 and unit variance it errs as much as ignoring the variance does, twenty times as much as this. ``sigmoid``: no closure is needed.
    """
    full = cov.dim() == mean.dim() + 1
    v = torch.diagonal(cov, dim1=-2, dim2=-1) if full else cov
    if link == "sigmoid":
        return _log_ratio_of_sigmoids(mean, mean, v) - _log_ratio_of_sigmoids(-mean, -mean, v)
    times = (lambda x: (cov * x[..., None, :]).sum(-1)) if full else (lambda x: cov * x)
    tiny = torch.finfo(mean.dtype).tiny
    q = mean.softmax(-1)
    # The moments of every expert's rivals are what is left of the sums over all. For the most probable expert that would
    # cancel: its rivals are summed themselves.
    top = q.argmax(-1, keepdim=True)
    rivals = q.scatter(-1, top, 0)
    total = rivals.sum(-1, keepdim=True).clamp(min=tiny)
    rest = (1 - q).scatter(-1, top, total)
    Cq, qv = times(q), q * v
    qCq, wC = q * Cq, (Cq - qv) / rest
    wCw = (qCq.sum(-1, keepdim=True) - 2 * qCq + q * qv) / rest.square()
    bend, variance = (qv.sum(-1, keepdim=True) - qv) / rest - wCw, v + wCw - 2 * wC
    w = rivals / total
    Cw = times(w)
    wCw = (w * Cw).sum(-1, keepdim=True)
    bend = bend.scatter(-1, top, (w * v).sum(-1, keepdim=True) - wCw)
    variance = variance.scatter(-1, top, v.gather(-1, top) + wCw - 2 * Cw.gather(-1, top))
    y = q.clamp(min=tiny).log() - rest.log()
    return _log_ratio_of_sigmoids(y, y - 0.5 * bend, variance)


# ---- sampling without replacement -----------------------------------------------------------------------------------
def gumbel_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of ``like``'s shape, dtype and device."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    tiny = torch.finfo(like.dtype).tiny
    return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()


def gumbel_topk(logits: Tensor, k: int, temperature: float | Tensor = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """K experts without replacement from ``softmax(logits / T)``, indices ``[N, K]`` in the order of the draws.

    Top-K of ``l + T g`` (arXiv 1903.06059); it orders as ``l / T + g`` does, and ``T = 0`` is the deterministic top-K.
    ``temperature``: a number or ``[N, 1]``.
    """
    return (logits + temperature * gumbel_noise(logits, generator)).topk(k, dim=-1).indices


def inclusion_probabilities(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Exact probability that each expert is among K drawn without replacement, by enumeration. ``logits [E]`` -> ``[E]``.

    ``E! / (E-K)!`` orders: a reference for small ``E`` and ``K``.
    """
    p = (logits.double() / temperature).softmax(-1).tolist()
    out = torch.zeros(len(p), dtype=torch.float64)
    for order in permutations(range(len(p)), k):
        probability, left = 1.0, 1.0
        for e in order:
            probability, left = probability * p[e] / left, left - p[e]
        out[list(order)] += probability
    return out


# ---- weight space: moments and Gaussians over the logits ------------------------------------------------------------
def kron_logit_variance(u: Tensor, alpha: Tensor, basis_a: Tensor, gamma: Tensor, n: float | Tensor, precision: float) -> Tensor:
    """The exact Gaussian over the logits of a router with Kronecker curvature and an isotropic prior.

    ``Sigma^-1 = G (x) A / n + lambda I`` over ``W [E, d]`` with ``A = U_A diag(alpha) U_A^T`` and ``G = U_G diag(gamma)
    U_G^T`` gives ``l | u ~ N(W_MAP u, U_G diag(v) U_G^T)``, ``v_j = sum_i (U_A^T u)_i^2 / (alpha_i gamma_j / n + lambda)``.
    Without the prior this is the familiar ``(u^T A^-1 u) G^-1`` (times n). ``u [N, d]`` -> ``v [N, E]``. As in
    :class:`curvature.Eigenbasis`, ``basis_a [d, r]`` may be a low rank: the rest of u's norm keeps the prior's variance.
    """
    inside = (u @ basis_a).square()
    weight = 1 / (alpha[:, None] * gamma[None, :] / n + precision)  # [r, E]
    if basis_a.shape[1] == basis_a.shape[0]:
        return inside @ weight
    outside = (u.square().sum(-1, keepdim=True) - inside.sum(-1, keepdim=True)).clamp(min=0)
    return inside @ weight + outside / precision


@dataclass
class SwagMoments:
    """Running first and second moments and the last ``rank`` deviations of weights along a trajectory (arXiv 1902.02476).

    ``N(mean, scale (diag(variance) + D D^T / (K - 1)))`` with ``D`` the deviations from the running mean; the paper's
    ``scale`` is 1/2: half of the variance from each of two estimates of it. ``mean``, ``square [...]`` of any shape.
    """

    mean: Tensor
    square: Tensor
    deviations: list[Tensor] = field(default_factory=list)
    count: int = 0
    rank: int = 20

    @classmethod
    def like(cls, weight: Tensor, rank: int = 20) -> SwagMoments:
        zeros = at_least_float32(torch.zeros_like(weight))  # bf16 takes no small steps
        return cls(zeros, zeros.clone(), rank=rank)

    def update(self, weight: Tensor) -> None:
        """One more point of the trajectory."""
        self.count += 1
        delta = weight - self.mean
        self.mean = self.mean + delta / self.count
        self.square = self.square + (delta * (weight - self.mean) - self.square) / self.count  # Welford: no cancellation
        self.deviations = [*self.deviations, weight - self.mean][-self.rank :]

    @property
    def variance(self) -> Tensor:
        """The diagonal: the trajectory's (biased) variance of every weight."""
        return self.square

    def matrix(self) -> Tensor:
        """``D / sqrt(K - 1)`` stacked on the first axis, ``[K, ...]``; zero while there is no second point."""
        if len(self.deviations) < 2:
            return self.mean.new_zeros(1, *self.mean.shape)
        return torch.stack(self.deviations) / math.sqrt(len(self.deviations) - 1)


def swag_sample(mean: Tensor, variance: Tensor, low_rank: Tensor, num_samples: int, *, scale: float = 0.5,
                generator: torch.Generator | None = None) -> Tensor:
    """``num_samples`` weights ``[S, ...]`` from ``N(mean, scale (diag(variance) + low_rank^T low_rank))``.

    ``mean``, ``variance [...]``, ``low_rank [K, ...]`` as :meth:`SwagMoments.matrix` gives it.
    """
    draw = lambda *shape: torch.randn(*shape, dtype=mean.dtype, device=mean.device, generator=generator)  # noqa: E731
    diagonal = variance.sqrt() * draw(num_samples, *mean.shape)
    along = torch.tensordot(draw(num_samples, low_rank.shape[0]), low_rank, 1)
    return mean + math.sqrt(scale) * (diagonal + along)
