"""The maths of the experts' Laplace posterior: pure functions of tensors, no model, no hook, no file.

Notation and layout, the same everywhere: ``E`` experts, ``d`` output and ``f`` input width of the second linear layer,
``S`` routed slots sorted by expert, ``B`` items, ``C`` classes, ``P = d f`` weights of one expert.

    a [S, f]     inputs            g [K, S, d]   d <v_k, f> / d z for K cotangents v_k
    expert [S]   0..E-1, sorted    item [S]      0..B-1        counts [E]   slots per expert

The generalised Gauss-Newton of one expert is ``H = sum_n J_n^T Lambda_n J_n`` with ``J_{n,c} = sum_{t in n} g_{t,c}
a_t^T`` and ``Lambda = diag(p) - p p^T``, summed (not averaged) over items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Per-item Jacobians are formed for as many items at once as fit into this many elements (64 MiB in float32).
CHUNK_ELEMENTS = 2**24


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


def gram_by_expert(x: Tensor, counts: Tensor) -> Tensor:
    """``sum_{s routed to e} x_s x_s^T`` for every expert. ``x [S, m]`` or ``[K, S, m]`` (summed over K) -> ``[E, m, m]``."""
    x = x if x.dim() == 3 else x[None]
    out = x.new_zeros(len(counts), x.shape[-1], x.shape[-1])
    for e, rows in enumerate(x.split(counts.tolist(), dim=1)):
        if rows.shape[1]:
            rows = rows.reshape(-1, rows.shape[-1])
            out[e] = rows.mT @ rows
    return out


def reduce_by_item(a: Tensor, g: Tensor, expert: Tensor, item: Tensor, num_experts: int, num_items: int):
    """KFAC-reduce: one sample per (expert, item) that meet. Mean of ``a``, sum of ``g`` over the item's slots there.

    Returns ``a [R, f]``, ``g [K, R, d]``, ``counts [E]`` (items that reached each expert).
    """
    pair, inverse = torch.unique(expert * num_items + item, return_inverse=True)  # sorted: stays sorted by expert
    tokens = torch.bincount(inverse, minlength=len(pair)).to(a.dtype)
    a_mean = a.new_zeros(len(pair), a.shape[1]).index_add_(0, inverse, a) / tokens[:, None]
    g_sum = g.new_zeros(g.shape[0], len(pair), g.shape[2]).index_add_(1, inverse, g)
    return a_mean, g_sum, torch.bincount(pair // num_items, minlength=num_experts)


def drop_inactive(a: Tensor, g: Tensor, item: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots with a gradient. The others add nothing to a Jacobian: in the last layer, all but the token that answers."""
    active = (g != 0).any(2).any(0)
    if active.all():
        return a, g, item, counts
    expert = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return a[active], g[:, active], item[active], torch.bincount(expert[active], minlength=len(counts))


def item_jacobians(a: Tensor, g: Tensor, item: Tensor, counts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``J_{n,k} = sum_{t in n} g_{t,k} a_t^T`` for every expert and every item that reached it, exact.

    Yields ``(expert, items [n], J [n, K, d, f])`` in chunks of items that bound the memory; an (expert, item) pair
    comes at most once, and where it does not, ``J = 0``.
    """
    a, g, item, counts = drop_inactive(a, g, item, counts)
    K, _, d = g.shape
    f = a.shape[1]
    at_once = max(1, CHUNK_ELEMENTS // (K * d * f))
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        items, inverse, tokens = torch.unique(item[rows], return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        a_e, g_e = a[rows][order].split(tokens.tolist()), g[:, rows][:, order].split(tokens.tolist(), dim=1)
        for lo in range(0, len(items), at_once):
            hi = lo + at_once
            # Items differ in how many of their tokens came here: pad with zero rows, then one batched product.
            a_pad = torch.nn.utils.rnn.pad_sequence(a_e[lo:hi], batch_first=True)  # [n, t, f]
            g_pad = torch.nn.utils.rnn.pad_sequence([x.transpose(0, 1) for x in g_e[lo:hi]], batch_first=True)
            J = g_pad.permute(0, 2, 3, 1).reshape(len(a_pad), K * d, -1) @ a_pad  # [n, K d, t] @ [n, t, f]
            yield e, items[lo:hi], J.view(-1, K, d, f)


@dataclass
class Eigenbasis:
    """Curvature of one layer's experts, diagonal in a Kronecker eigenbasis: ``H_e = (U_G x U_A) diag(h) (U_G x U_A)^T``.

    ``eigenvalues [E, r_G, r_A] >= 0``; ``basis_g [E, d, r_G]``, ``basis_a [E, f, r_A]`` hold orthonormal columns
    (``None``: the identity, as for ``diag``). With ``r < width`` (low rank) the rest of the space has zero curvature:
    it keeps the prior precision, it is *not* zero variance.
    """

    eigenvalues: Tensor
    basis_a: Tensor | None = None
    basis_g: Tensor | None = None

    def spectrum(self, expert: int) -> Tensor:
        """The expert's curvature eigenvalues that can be nonzero, ``[R]``, ``R <= P``."""
        return self.eigenvalues[expert].flatten()

    def covariance(self, a: Tensor, g: Tensor, item: Tensor, counts: Tensor, precision: Tensor, num_items: int) -> Tensor:
        """``<J_c, (H_e + lambda_e I)^-1 J_c'>`` for every expert and item. ``precision [E]`` -> ``[E, B, C, C]``."""
        out = a.new_zeros(len(counts), num_items, g.shape[0], g.shape[0])
        h, precision = self.eigenvalues.to(a.dtype), precision.to(a.dtype)[:, None, None]
        truncated = self.basis_a is not None and h.shape[1] * h.shape[2] < g.shape[2] * a.shape[1]
        if truncated:  # 1/(h + lambda) = 1/lambda - h/(h + lambda)/lambda: the prior everywhere, less what was learned
            for e, items, J in item_jacobians(a, g, item, counts):
                J = J.flatten(2)
                out[e, items] = J @ J.mT / precision[e]
            weight = h / (h + precision) / precision
        else:
            weight = 1 / (h + precision)
        if self.basis_a is not None:
            splits = counts.tolist()
            a = torch.cat([x @ u for x, u in zip(a.split(splits), self.basis_a.to(a.dtype), strict=True)])
            g = torch.cat([x @ u for x, u in zip(g.split(splits, 1), self.basis_g.to(g.dtype), strict=True)], 1)
        for e, items, J in item_jacobians(a, g, item, counts):
            inside = ((J * weight[e]).flatten(2)) @ J.flatten(2).mT
            out[e, items] = out[e, items] - inside if truncated else inside
        return out

    def tensors(self) -> dict[str, Tensor]:
        named = {"eigenvalues": self.eigenvalues, "basis_a": self.basis_a, "basis_g": self.basis_g}
        return {k: v.contiguous() for k, v in named.items() if v is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Eigenbasis":
        return cls(**tensors)


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

    def covariance(self, a: Tensor, g: Tensor, item: Tensor, counts: Tensor, precision: Tensor, num_items: int) -> Tensor:
        """As :meth:`Eigenbasis.covariance`; outside the span of ``V`` the precision is the prior's."""
        out = a.new_zeros(len(counts), num_items, g.shape[0], g.shape[0])
        for e, items, J in item_jacobians(a, g, item, counts):
            J = J.flatten(2)
            inside = J @ self.vectors[e].to(J.dtype)
            shrink = (self.values[e] / (self.values[e] + precision[e])).to(J.dtype)
            out[e, items] = (J @ J.mT - (inside * shrink) @ inside.mT) / precision[e].to(J.dtype)
        return out

    def tensors(self) -> dict[str, Tensor]:
        named = {f"values.{e}": v for e, v in enumerate(self.values)}
        return named | {f"vectors.{e}": v.contiguous() for e, v in enumerate(self.vectors)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "DenseBlocks":
        experts = range(len(tensors) // 2)
        return cls([tensors[f"values.{e}"] for e in experts], [tensors[f"vectors.{e}"] for e in experts])


@dataclass
class KronSums:
    """Running Kronecker factors of one layer: ``A = sum a a^T``, ``G = sum_k g g^T`` and the samples ``n`` per expert.

    ``expand``: every routed token is a sample. ``reduce``: one sample per item and expert. ``active``: every routed token
    with a gradient; one without adds nothing to the exact GGN, but under ``expand`` it enters ``A`` and ``n``.
    """

    A: Tensor
    G: Tensor
    n: Tensor
    token_setting: str = "expand"
    rank: int | None = None

    def update(self, a: Tensor, g: Tensor, expert: Tensor, item: Tensor, counts: Tensor, num_items: int) -> None:
        if self.token_setting == "active":
            a, g, item, counts = drop_inactive(a, g, item, counts)
        elif self.token_setting == "reduce":
            a, g, counts = reduce_by_item(a, g, expert, item, len(counts), num_items)
        self.A += gram_by_expert(a, counts)
        self.G += gram_by_expert(g, counts)
        self.n += counts

    def finish(self) -> Eigenbasis:
        return kron_eigenbasis(self.A, self.G, self.n, self.rank)


@dataclass
class DiagSum:
    """Running exact diagonal of the GGN, ``[E, d, f]``: squares of *per-item* Jacobians, cross-token terms included."""

    H: Tensor

    def update(self, a: Tensor, g: Tensor, expert: Tensor, item: Tensor, counts: Tensor, num_items: int) -> None:
        for e, _, J in item_jacobians(a, g, item, counts):
            self.H[e] += J.square().sum((0, 1))

    def finish(self) -> Eigenbasis:
        return Eigenbasis(self.H)


@dataclass
class DenseRows:
    """The rows ``sum_c v_{k,c} J_{n,c}`` of the exact GGN of every expert, ``[.., P]``; for small models only.

    ``none [0, P]``: what an expert without rows has.
    """

    rows: list[list[Tensor]]
    none: Tensor

    def update(self, a: Tensor, g: Tensor, expert: Tensor, item: Tensor, counts: Tensor, num_items: int) -> None:
        for e, _, J in item_jacobians(a, g, item, counts):
            self.rows[e].append(J.flatten(2).flatten(0, 1))

    def finish(self) -> DenseBlocks:
        blocks = [dense_block(torch.cat([self.none, *rows])) for rows in self.rows]
        return DenseBlocks([v for v, _ in blocks], [u for _, u in blocks])


def kron_eigenbasis(A: Tensor, G: Tensor, n: Tensor, rank: int | None = None) -> Eigenbasis:
    """``H_e ~ G_e (x) A_e / n_e`` from the Kronecker factors ``A [E, f, f]``, ``G [E, d, d]`` and sample counts ``n [E]``.

    ``rank``: keep that many leading eigenvectors of each factor. An expert without samples has zero curvature: it keeps
    its prior.
    """
    alpha, basis_a = torch.linalg.eigh(A)  # ascending
    gamma, basis_g = torch.linalg.eigh(G)
    if rank is not None:
        alpha, basis_a = alpha[:, -rank:], basis_a[:, :, -rank:]
        gamma, basis_g = gamma[:, -rank:], basis_g[:, :, -rank:]
    basis_a, basis_g = basis_a.contiguous(), basis_g.contiguous()  # as they will be read back from a file
    # Factors are sums of squares: an eigenvalue below zero is rounding.
    values = gamma.clamp(min=0)[:, :, None] * alpha.clamp(min=0)[:, None, :] / n.clamp(min=1)[:, None, None]
    return Eigenbasis(values, basis_a, basis_g)


def dense_block(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of ``H = rows^T rows`` from ``rows [R, P]``: values ``[r]`` > 0 and vectors ``[P, r]``.

    Goes through the smaller of the two Gram matrices; directions at rounding level are dropped (their curvature is
    below ``eps * largest``, and they stay at the prior).
    """
    R, P = rows.shape
    if R == 0:
        return rows.new_zeros(0), rows.new_zeros(P, 0)
    values, vectors = torch.linalg.eigh(rows @ rows.mT if R < P else rows.mT @ rows)
    keep = values > max(R, P) * torch.finfo(rows.dtype).eps * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    if R < P:
        vectors = rows.mT @ (vectors / values.sqrt())
    return values, vectors


def log_det_ratio(eigenvalues: Tensor, precision: Tensor) -> Tensor:
    """``log det(H + lambda I) - P log lambda`` from the curvature's eigenvalues ``[R]``; zeros add nothing. 0-d, float64."""
    return torch.log1p(eigenvalues.double() / precision).sum()


def sample_probabilities(mean: Tensor, cov: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """``E[softmax f]``, ``f ~ N(mean, cov)``, by sampling. ``mean [B, C]`` (-inf: no such option), ``cov [B, C, C]``."""
    values, vectors = torch.linalg.eigh(cov.double())
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]  # cov is PSD up to rounding; it may well be singular
    noise = torch.randn(num_samples, *mean.shape, dtype=torch.float64, generator=generator).to(mean.device)
    return (mean.double() + torch.einsum("bij,sbj->sbi", root, noise)).softmax(-1).mean(0).to(mean.dtype)


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
