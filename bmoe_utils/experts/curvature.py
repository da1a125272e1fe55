"""The maths of the experts' Laplace posterior: pure functions of tensors, no model, no hook, no file.

What is summed to get there is in :mod:`bmoe_utils.experts.sums`, what is done with Jacobians in :mod:`bmoe_utils.experts.jacobians`.

Notation and layout, the same everywhere: ``E`` experts, ``d`` output and ``f`` input width of the second linear layer,
``S`` routed slots sorted by expert, ``B`` items, ``C`` classes, ``P = d f`` weights of one expert.

    a [S, f]     inputs            g [K, S, d]   d <v_k, f> / d z for K cotangents v_k (or a sequence of K)
    routes       the slots' items, 0..B-1, and the slots per expert, counts [E]  (jacobians.Routes)

The generalised Gauss-Newton of one expert is ``H = sum_n J_n^T Lambda_n J_n`` with ``J_{n,c} = sum_{t in n} g_{t,c}
a_t^T`` and ``Lambda = diag(p) - p p^T``, summed (not averaged) over items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import float64, moved
from .jacobians import Columns, Routes, drop_inactive, inner_products, item_jacobians, project

# Of several prior precisions, as many are taken together as have weights of this many elements in all (16 MiB of float32).
WEIGHTS = 2**22


def softmax_hessian_root(logits: Tensor) -> Tensor:
    """``S [B, C, C-1]`` with ``S S^T = diag(p) - p p^T``, ``p = softmax(logits)``.

    ``Lambda = D^(1/2) (I - q q^T) D^(1/2)`` with ``q = sqrt(p)`` a unit vector, so ``S = D^(1/2) Q`` for any
    orthonormal basis ``Q`` of q's complement: the last C-1 columns of a Householder reflection that sends q to an
    axis. The rank is C-1, so C-1 columns (and backward passes) are all that is needed. Options with logit -inf
    have zero rows.
    """
    q = logits.softmax(-1).sqrt()
    v = q.clone()
    v[:, 0] += torch.where(q[:, 0] >= 0, 1.0, -1.0)  # the sign that does not cancel; q >= 0, so +
    v = v / v.norm(dim=-1, keepdim=True)
    reflection = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - 2 * v[:, :, None] * v[:, None, :]
    return q[:, :, None] * reflection[:, :, 1:]


def fisher_columns(logits: Tensor, fisher: str, labels: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Cotangents ``v [K, B, C]`` on the class logits with ``sum_k v_k v_k^T`` (in expectation) the Fisher's ``Lambda``.

    ``exact``: K = C-1 columns of a root of Lambda. ``mc``: K = 1, ``e_y - p`` with y drawn from the model (unbiased).
    ``empirical``: K = 1 with the observed label (biased: it is not the Fisher; it vanishes on memorised items).
    """
    if fisher == "exact":
        return softmax_hessian_root(logits).permute(2, 0, 1)
    p = logits.softmax(-1)
    if fisher == "mc":
        labels = torch.multinomial(p.cpu(), 1, generator=generator).squeeze(1).to(p.device)
    return (torch.nn.functional.one_hot(labels, p.shape[-1]).to(p.dtype) - p)[None]


@dataclass
class Eigenbasis:
    """Curvature of one layer's experts, diagonal in a Kronecker basis: ``H_e = (U_G x U_A) diag(h) (U_G x U_A)^T``.

    ``eigenvalues [E, r_G, r_A] >= 0``; ``basis_g [E, d, r_G]``, ``basis_a [E, f, r_A]`` hold orthonormal columns (or, with zero
    curvature, columns of zeros; ``None``: the identity, as for ``diag``). With ``r < width`` (low rank) the rest of the space has
    zero curvature: it keeps the prior precision, it is *not* zero variance. ``captured [E, 2]``: the share of the traces of
    ``A`` and ``G`` that the bases hold, where that is not all.
    """

    eigenvalues: Tensor
    basis_a: Tensor | None = None
    basis_g: Tensor | None = None
    captured: Tensor | None = None

    def spectrum(self, expert: int) -> Tensor:
        """The expert's curvature eigenvalues that can be nonzero, ``[R]``, ``R <= P``."""
        return self.eigenvalues[expert].flatten()

    def spectra(self) -> Tensor:
        """Every expert's, ``[E, R]``."""
        return self.eigenvalues.flatten(1)

    def covariance(self, a: Tensor, g: Columns, routes: Routes, precision: Tensor) -> Tensor:
        """``<J_c, (H_e + lambda_e I)^-1 J_c'>`` for every expert and item. ``precision [E]`` (or several, ``[Q, E]``) ->
        ``[E, B, C, C]`` (``[Q, E, B, C, C]``).

        Exact up to rounding, which low rank makes one of the prior's part: ``eps <J, J> / lambda``.
        """
        a, g, routes = drop_inactive(a, g, routes)
        low_rank = self.basis_a is not None and self.eigenvalues[0].numel() < g[0].shape[1] * a.shape[1]
        prior = inner_products(a, g, routes) if low_rank else 0.0
        if self.basis_a is not None:
            a, g = project(a, self.basis_a, routes), [project(x, self.basis_g, routes) for x in g]
        h, out = self.eigenvalues.to(a), []
        for rows in precision.to(a).view(-1, len(h), 1, 1).split(max(1, WEIGHTS // max(1, h.numel()))):
            if low_rank:  # 1/(h + lambda) = 1/lambda - h/(h + lambda)/lambda: the prior everywhere, less what was learned
                out.append((prior - inner_products(a, g, routes, h / (h + rows))) / rows[..., None])
            else:
                out.append(inner_products(a, g, routes, 1 / (h + rows)))
        out = torch.cat(out)
        return out.view(*precision.shape, *out.shape[2:])

    def to(self, device: torch.device | str) -> Eigenbasis:
        return Eigenbasis(**{k: moved(v, device) for k, v in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {k: v.contiguous() for k, v in vars(self).items() if v is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Eigenbasis:
        """Copies: where a file's bytes begin, a matrix product may round differently."""
        return cls(**{k: v.clone() for k, v in tensors.items()})


@dataclass
class DenseBlocks:
    """The exact GGN of every expert of one layer, ``H_e = V_e diag(h_e) V_e^T`` over all ``P = d f`` weights.

    ``values``: E tensors ``[R_e]``; ``vectors``: E tensors ``[P, R_e]`` (row-major over ``[d, f]``), ``R_e`` at most the
    number of Jacobian rows seen, so the rest of the spectrum is exactly zero and never stored.
    """

    values: list[Tensor]
    vectors: list[Tensor]

    def spectrum(self, expert: int) -> Tensor:
        return self.values[expert]

    def spectra(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(self.values, batch_first=True)

    def covariance(self, a: Tensor, g: Columns, routes: Routes, precision: Tensor) -> Tensor:
        """As :meth:`Eigenbasis.covariance`; outside the span of ``V`` the precision is the prior's."""
        K = len(g)
        rows = precision.to(a).view(-1, len(self.values))
        out = a.new_zeros(len(rows), len(self.values), routes.num_items, K, K)
        for e, items, J in item_jacobians(a, g, routes):
            J = J.flatten(2)
            inside, whole = J @ self.vectors[e].to(J), J @ J.mT
            for q, row in enumerate(rows):
                shrink = self.values[e].to(J) / (self.values[e].to(J) + row[e])
                out[q, e, items] = (whole - (inside * shrink) @ inside.mT) / row[e]
        return out.view(*precision.shape, *out.shape[2:])

    def to(self, device: torch.device | str) -> DenseBlocks:
        return DenseBlocks([v.to(device) for v in self.values], [v.to(device) for v in self.vectors])

    def tensors(self) -> dict[str, Tensor]:
        named = {f"values.{e}": v for e, v in enumerate(self.values)}
        return named | {f"vectors.{e}": v.contiguous() for e, v in enumerate(self.vectors)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> DenseBlocks:
        experts = range(len(tensors) // 2)
        return cls([tensors[f"values.{e}"].clone() for e in experts], [tensors[f"vectors.{e}"].clone() for e in experts])


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``M``, as :func:`torch.linalg.eigh`; on the CPU for MPS, where torch has none."""
    values, vectors = torch.linalg.eigh(M.cpu() if M.device.type == "mps" else M)
    return values.to(M.device), vectors.to(M.device)


def dense_block(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of ``H = rows^T rows`` from ``rows [R, P]``: values ``[r]`` > 0 and vectors ``[P, r]``.

    Goes through the smaller of the two Gram matrices; directions at rounding level are dropped (their curvature is
    below ``eps * largest``, and they stay at the prior).
    """
    R, P = rows.shape
    if R == 0:
        return rows.new_zeros(0), rows.new_zeros(P, 0)
    values, vectors = eigh(rows @ rows.mT if R < P else rows.mT @ rows)
    keep = values > max(R, P) * torch.finfo(rows.dtype).eps * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    if R < P:
        vectors = rows.mT @ (vectors / values.sqrt())
    return values, vectors


def log_det_ratio(eigenvalues: Tensor, precision: Tensor) -> Tensor:
    """``log det(H + lambda I) - P log lambda`` from the curvature's eigenvalues ``[.., R]``; zeros add nothing. ``[..]``, float64."""
    eigenvalues = float64(eigenvalues)
    return torch.log1p(eigenvalues / precision.to(eigenvalues.device)[..., None]).sum(-1)


def sample_answers(mean: Tensor, cov: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """``softmax f``, ``f ~ N(mean, cov)``, float64 ``[S, B, C]``. ``mean [B, C]`` (-inf: no such option), ``cov [B, C, C]``."""
    mean = float64(mean)
    noise = torch.randn(num_samples, *mean.shape, dtype=torch.float64, generator=generator).to(mean.device)
    return answers(mean, cov, noise)


def answers(mean: Tensor, cov: Tensor, noise: Tensor) -> Tensor:
    """:func:`sample_answers` from standard normal ``noise [S, B, C]``, float64."""
    mean, cov = float64(mean), float64(cov)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]  # cov is PSD up to rounding; it may well be singular
    return (mean + torch.einsum("bij,sbj->sbi", root, noise)).softmax(-1)


def sample_probabilities(mean: Tensor, cov: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """``E[softmax f]`` by sampling, ``[B, C]`` in the mean's dtype and on its device."""
    return sample_answers(mean, cov, num_samples, generator).mean(0).to(mean.dtype).to(mean.device)


def probit_probabilities(mean: Tensor, cov: Tensor) -> Tensor:
    """The multi-class probit approximation over pairs of options (mean-field, arXiv 2006.07584), closed form:

    ``p_c ~ 1 / sum_c' exp(-(m_c - m_c') / sqrt(1 + pi/8 v_cc'))``, ``v_cc' = Var(f_c - f_c')``, normalised.

    Pairs, because only differences of logits matter: it is MacKay's probit for two options, and a shift of all logits,
    fixed or random, changes nothing (the form with ``diag cov`` alone has neither property).
    """
    variance = torch.diagonal(cov, dim1=-2, dim2=-1)
    variance = (variance[:, :, None] + variance[:, None, :] - cov - cov.mT).clamp(min=0)
    missing = mean.isinf()
    mean = mean.masked_fill(missing, 0)
    scaled = (mean[:, None, :] - mean[:, :, None]) / (1 + torch.pi / 8 * variance).sqrt()  # [B, c, c']
    log_p = -scaled.masked_fill(missing[:, None, :], -torch.inf).logsumexp(-1)
    return log_p.masked_fill(missing, -torch.inf).softmax(-1)
