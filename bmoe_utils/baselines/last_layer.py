"""Last-layer Laplace: a posterior over the rows of the language-model head that read out options (arXiv 2106.14806).

``f_{n,c} = w_{v(n,c)} . phi_n`` with ``phi_n [d]`` what the head reads at the answering token and ``v(n,c)`` the token of option c.
The weights are the rows of every token that is an option of the fitting set, V of them: the letters, or every word where options are
read as words, of which each item sees its own C. A token never seen there is one more row, without curvature: it keeps the prior.

    H = sum_n sum_k (r_{n,k} r_{n,k}^T) (x) (phi_n phi_n^T),   r_{n,k} = sum_c S_{n,ck} e_{v(n,c)},   S S^T = diag p - p p^T

    kron   (sum r r^T) (x) (sum phi phi^T) / N      diag   the exact diagonal      full   exact, in the dual form

The head is linear in its weights, so the predictive is exact given the posterior. Everything is float64: it is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..experts import prior
from ..experts.curvature import softmax_hessian_root
from ..models.layers import unwrap
from ..models.modes import frozen
from ..models.readout import option_logits, to_device
from ..precision import float64
from ..progress import track
from .averaging import GaussianLogits

STRUCTURES = ("kron", "diag", "full")


class LastLayerLaplace(GaussianLogits):
    """Args: ``hessian_structure``: see above; ``full`` needs ``(N (C-1))^2`` numbers. ``prior_precision``: of every weight, around zero.
    ``num_samples``, ``seed``: of the logits drawn when it is called. A head's bias, if any, stays at its MAP value.
    """

    def __init__(self, model: nn.Module, *, hessian_structure: str = "kron", prior_precision: float = 1.0, num_samples: int = 1000,
                 seed: int = 0):
        if hessian_structure not in STRUCTURES:
            raise ValueError(f"hessian_structure={hessian_structure!r} is not one of {', '.join(map(repr, STRUCTURES))}")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self.model, self.structure, self.num_samples, self.seed = model, hessian_structure, num_samples, seed
        self.prior_precision = torch.as_tensor(float(prior_precision), dtype=torch.float64)
        self.tokens: Tensor | None = None  # [V] ascending, once fitted

    # ---- what the head reads ----------------------------------------------------------------------------------------
    def features(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits ``f [B, C]``, ``phi [B, d]``, and ``d f_c / d (w . phi) [B, C]``: 1, or what the model scales or caps its
        logits by (0 for a missing option). float64."""
        batch = to_device(batch, self.model)
        ids, seen = batch["option_ids"], {}

        def keep(_, args, output):
            if not output.requires_grad:
                output.requires_grad_()
            seen["phi"], seen["z"] = args[0].detach()[:, -1], output

        handle = unwrap(self.model).get_output_embeddings().register_forward_hook(keep)
        try:
            with frozen(self.model):
                f = option_logits(self.model, batch)
                (slope,) = torch.autograd.grad(f[ids >= 0].sum(), seen["z"])
        finally:
            handle.remove()
        slope = slope[:, -1]
        if slope.shape[1] != ids.shape[1]:  # a wrapped head gives the whole vocabulary
            slope = slope.gather(1, ids.clamp(min=0))
        return float64(f.detach()), float64(seen["phi"]), float64(slope.masked_fill(ids < 0, 0))

    # ---- fitting ----------------------------------------------------------------------------------------------------
    def fit(self, loader: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> LastLayerLaplace:
        """``ValueError`` for an empty loader or an item without a label; the previous posterior then stays."""
        parts = []
        for number, batch in enumerate(track(loader, "last-layer Laplace", progress)):
            if (batch["labels"] < 0).any():
                raise ValueError(f"batch {number} has items without a label")
            f, phi, slope = self.features(batch)
            root = (softmax_hessian_root(f) * slope[:, :, None]).mT  # [B, C-1, C]
            picked = f.log_softmax(-1).gather(1, batch["labels"].to(f.device)[:, None])
            parts.append((phi, root, batch["option_ids"].to(f.device), float(picked.sum())))
        if not parts:
            raise ValueError("the loader gave no batch: there is nothing to fit on")
        self.log_likelihood = sum(p[3] for p in parts)
        self.tokens = torch.cat([ids[ids >= 0] for _, _, ids, _ in parts]).unique()
        phi, V = torch.cat([p[0] for p in parts]), len(self.tokens)
        rows = torch.cat([self._spread(root, ids)[..., :V].flatten(0, 1) for _, root, ids, _ in parts])  # r: [sum of B (C-1), V]
        beside = torch.cat([p[0].repeat_interleave(p[1].shape[1], 0) for p in parts])  # and the phi that goes with each
        head = unwrap(self.model).get_output_embeddings().weight.detach()[self.tokens]
        self.distance = float(float64(head).square().sum())
        if self.structure == "kron":
            (alpha, self.basis_a), (gamma, self.basis_g) = torch.linalg.eigh(phi.mT @ phi), torch.linalg.eigh(rows.mT @ rows)
            self.curvature = gamma.clamp(min=0)[:, None] * alpha.clamp(min=0) / len(phi)  # [V, d]
        elif self.structure == "diag":
            self.curvature = rows.square().mT @ beside.square()
        else:
            self.rows, self.phi = rows, beside
            values, self.basis = torch.linalg.eigh((rows @ rows.mT) * (self.phi @ self.phi.mT))
            self.curvature = values.clamp(min=0)
        return self

    def _spread(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x [B, K, C]`` over options -> ``[B, K, V + 1]`` over tokens; the last column has what belongs to none that was seen."""
        return x.new_zeros(*x.shape[:2], len(self.tokens) + 1).scatter_add(2, self._where(ids)[:, None].expand_as(x), x)

    def _where(self, ids: Tensor) -> Tensor:
        """Every option's place among the tokens, ``[B, C]``; V if it has none."""
        at = torch.searchsorted(self.tokens, ids.clamp(min=0).contiguous()).clamp(max=len(self.tokens) - 1)
        return torch.where((ids >= 0) & (self.tokens[at] == ids), at, len(self.tokens))

    def _fitted(self) -> Tensor:
        if self.tokens is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first")
        return self.curvature

    # ---- evidence ---------------------------------------------------------------------------------------------------
    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """``log p(D|W_MAP) - 1/2 lambda ||W||^2 + 1/2 P log lambda - 1/2 log det(H + lambda I)``, nats over the fitting set; 0-d."""
        precision = self.prior_precision if prior_precision is None else torch.as_tensor(prior_precision, dtype=torch.float64)
        return self.log_likelihood - prior.evidence_penalty(*self._spectrum())(precision.view(1, 1)).sum()

    def _spectrum(self) -> tuple[list[Tensor], Tensor]:
        """The curvature's eigenvalues that can be nonzero, ``[[1, R]]``, and ``||W||^2 [1, 1]``: one group, one layer."""
        return [self._fitted().flatten()[None]], torch.full((1, 1), self.distance, dtype=torch.float64)

    def optimize_prior_precision(self) -> Tensor:
        """Sets (and returns) the prior precision of largest evidence."""
        best = prior.best_by_evidence(*self._spectrum(), prior.groups("global", 1, 1), self.prior_precision.view(1, 1))
        self.prior_precision = best.squeeze()
        return self.prior_precision

    # ---- prediction -------------------------------------------------------------------------------------------------
    def predictive_logits(self, batch):
        """Mean ``[B, C]`` and covariance ``[B, C, C]``; linear in the weights, so nothing is linearised but what follows the head."""
        curvature, lam = self._fitted(), self.prior_precision.item()
        f, phi, slope = self.features(batch)
        ids = batch["option_ids"].to(f.device)
        J, V = self._spread(torch.diag_embed(slope), ids), len(self.tokens)  # [B, C, V + 1]
        same = (ids[:, :, None] == ids[:, None, :]) * slope[:, :, None] * slope[:, None, :]
        alone = phi.square().sum(1)[:, None, None] / lam * same  # the prior's own
        unseen = (self._where(ids) == V)[:, :, None]
        J = J[..., :V]
        if self.structure == "full":
            inside = (J @ self.rows.mT * (phi @ self.phi.mT)[:, None]) @ self.basis  # [B, C, R]: J of the fitting set's rows
            cov = alone - (inside / (curvature + lam)) @ inside.mT / lam
        else:
            if self.structure == "kron":
                J, phi = J @ self.basis_g, phi @ self.basis_a
            variance = phi.square() @ (1 / (curvature + lam)).mT  # [B, V]
            cov = torch.where(unseen, alone, 0.0) + (J * variance[:, None]) @ J.mT
        return f, (cov + cov.mT) / 2
