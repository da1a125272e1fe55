"""Whose uncertainty an answer's is: entropies and mutual informations of a mixture of mixtures. Pure functions of tensors.

A routing ``r`` is drawn, then the experts' weights ``w``, then the answer ``y ~ p(y | r, w)``. With ``H`` the entropy,

    H(y)  =  E_r E_w H(y | r, w)  +  E_r I(y; w | r)  +  I(y; r)
    total        aleatoric               expert           routing          nats

(the chain rule of mutual information, in this order: routing outside, weights given the routing inside). Both informations are
taken as mean Kullback-Leibler divergences to the mixture and never as differences of entropies, so that they are 0.0 where all
components agree, never negative, and small ones keep their digits; that the four add up is then a check.

All of this is exact for the finite mixture that answers. As an estimate for infinitely many draws an information of ``n``
independent components is too low by about a share ``1/n`` of itself (to second order in their spread), and the entropy of the
mixture with it: with ten routings, a tenth of the routing part is missing. The weights' draws are quasi-random, and many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..precision import float64

# Always drawn, whatever a batch needs: an item's noise must not depend on how many options its neighbours have. 26 is the most
# that any question has.
OPTIONS = 26


@dataclass(frozen=True)
class Decomposition:
    """Uncertainty of ``B`` items, float64 ``[B]`` each, in nats: ``total = aleatoric + expert + routing`` to rounding."""

    total: Tensor
    aleatoric: Tensor
    expert: Tensor
    routing: Tensor

    def signals(self) -> dict[str, Tensor]:
        """By the names predictions keep them under."""
        return {"total": self.total, "aleatoric": self.aleatoric, "expert_epistemic": self.expert, "routing_epistemic": self.routing}


def normal_points(num_samples: int, options: int, seed: int) -> Tensor:
    """Standard normal points ``[M, options]``, float64: a scrambled Sobol sequence (the best balanced for powers of two).

    The same for a seed whatever ``options`` is, up to 26.
    """
    uniform = SobolEngine(max(options, OPTIONS), scramble=True, seed=seed).draw(num_samples, dtype=torch.float64)
    half_step = 2.0**-31  # of the sequence, whose numbers have 30 bits: 0 would be minus infinity
    return torch.special.ndtri(uniform[:, :options] + half_step)


def sampled_answers(mean: Tensor, cov: Tensor, points: Tensor) -> Tensor:
    """``softmax(mean + cov^(1/2) point)`` for every point, float64 ``[M, B, C]``.

    ``mean [B, C]`` (-inf: no such option), ``cov [B, C, C]``, ``points [M, C]``. The symmetric root, so that every option keeps its
    own column of the points, however many more there are.
    """
    values, vectors = torch.linalg.eigh(float64(cov))
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT  # cov is PSD up to rounding
    return (float64(mean) + torch.einsum("bij,mj->mbi", root, points.to(root))).softmax(-1)


def entropy(p: Tensor) -> Tensor:
    """``[..., C]`` -> ``[...]``."""
    return torch.special.entr(p).sum(-1)


def average(x: Tensor) -> Tensor:
    """Over the first axis; of equal entries exactly that entry, which a sum divided by their number need not be."""
    return x[0] + (x - x[0]).mean(0)


def mixture(p: Tensor) -> tuple[Tensor, Tensor]:
    """The average answer ``[B, C]`` of ``p [n, B, C]``, and the information between answer and component ``[B]``."""
    mean = average(p)
    ratio = p / mean.clamp(min=torch.finfo(p.dtype).tiny)  # 0 where no component gives the option anything: 0 log 0 = 0
    return mean, torch.special.xlogy(p, ratio).sum(-1).mean(0).clamp(min=0)


def given_routing(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One routing's part, from its ``p [M, B, C]``: ``E_w p [B, C]``, ``E_w H(p) [B]``, ``I(y; w | r) [B]``."""
    mean, information = mixture(p)
    return mean, average(entropy(p)), information


def decompose(routings: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Decomposition]:
    """The average answer ``[B, C]`` and its uncertainty's parts, from :func:`given_routing` of every routing."""
    means, entropies, informations = (torch.stack(x) for x in zip(*routings, strict=True))
    mean, routing = mixture(means)
    parts = Decomposition(entropy(mean), average(entropies), average(informations), routing)
    return mean, parts


def averaged_answer(means: Tensor, covs: Tensor, points: Tensor) -> tuple[Tensor, Decomposition]:
    """:func:`decompose` of Gaussian logits under every routing, ``means [S, B, C]`` and ``covs [S, B, C, C]``; on the CPU."""
    routings = (given_routing(sampled_answers(mean, cov, points)) for mean, cov in zip(means, covs, strict=True))
    return decompose([tuple(x.cpu() for x in routing) for routing in routings])
