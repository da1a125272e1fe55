"""The references every approximation is held against: the dense GGN posterior over all experts of all layers at once, and
the prior alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..precision import float64
from ..progress import track
from .capture import capturing
from .columns import routes_of
from .curvature import softmax_hessian_root
from .jacobians import item_jacobians
from .laplace import ExpertLaplace


def _rows(captured: list, scale: Tensor, num_items: int) -> Tensor:
    """Per-item Jacobians over all weights, each scaled by its expert's ``lambda^-1/2``: ``[B, K, sum of all P]``."""
    layers = []
    for (slots, g), s in zip(captured, scale, strict=True):
        out = slots.a.new_zeros(num_items, len(g), len(slots.counts), g[0].shape[1] * slots.a.shape[1])
        for e, items, J in item_jacobians(slots.a, g, routes_of(slots, num_items)):
            out[items, :, e] = J.flatten(2) * s[e].to(J.dtype)
        layers.append(out.flatten(2))
    return torch.cat(layers, 2)


def joint_predictive(
    la: ExpertLaplace, fit_loader: Iterable[Mapping[str, Tensor]], loader: Iterable[Mapping[str, Tensor]], *,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The linearised predictive of the exact GGN posterior, without the block-diagonal and any other approximation.

    ``Cov = J (H + Lambda)^-1 J^T`` with the dense ``H`` of all of ``la``'s layers and experts, in the dual form: with the
    rows ``Phi = S^T J Lambda^-1/2`` of the fitting set and ``J Lambda^-1/2`` of an item, ``Cov = J J^T - J Phi^T (I + Phi
    Phi^T)^-1 Phi J^T``. Needs ``items x (C-1) x all expert weights`` numbers: small models only. ``la`` gives model, layers
    and prior precision, and need not be fitted. Yields mean ``[B, C]`` and covariance ``[B, C, C]`` per batch.
    """
    scale = la.prior_precision_by_expert().rsqrt()
    with capturing(la.model):
        rows = []
        for batch in track(fit_loader, "dense posterior: rows", progress):
            f, captured = la.captured(batch, lambda f: softmax_hessian_root(f).permute(2, 0, 1))
            rows.append(_rows(captured, scale, len(f)).flatten(0, 1))
        rows = torch.cat(rows)
        rows = rows[(rows != 0).any(1)]  # those of missing options are zero
        kernel = float64(rows @ rows.mT)
        kernel.diagonal().add_(1)
        root = torch.linalg.cholesky(kernel)
        for batch in track(loader, "dense posterior: predictions", progress):
            f, captured = la.captured(batch)
            J = _rows(captured, scale, len(f))
            inside = float64(J.flatten(0, 1) @ rows.mT)
            inside = torch.linalg.solve_triangular(root, inside.mT, upper=False).mT.view(*f.shape, -1)
            yield f, (float64(J @ J.mT) - inside @ inside.mT).to(f.dtype).to(f.device)


def prior_predictive(
    la: ExpertLaplace, loader: Iterable[Mapping[str, Tensor]], *, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """The linearised predictive of the prior alone, ``Cov = J Lambda^-1 J^T``: what a posterior without curvature would say.

    Any size of model: the Jacobians are formed expert by expert. Yields mean ``[B, C]`` and covariance ``[B, C, C]``.
    """
    precision = la.prior_precision_by_expert()
    with capturing(la.model):
        for batch in track(loader, "prior: predictions", progress):
            f, captured = la.captured(batch)
            cov = float64(f.new_zeros(*f.shape, f.shape[1]))
            for (slots, g), by_expert in zip(captured, precision, strict=True):
                for e, items, J in item_jacobians(slots.a, g, routes_of(slots, len(f))):
                    J = J.flatten(2)
                    own = float64(J @ J.mT) / by_expert[e].item()
                    cov[items.to(cov.device)] += own.to(cov.device)
            yield f, cov.to(f.dtype).to(f.device)
