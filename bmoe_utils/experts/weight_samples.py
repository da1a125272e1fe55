"""Predictions with weights drawn from the experts' posterior: what linearisation leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..models.layers import bare, down_weight
from ..models.readout import option_logits
from ..precision import at_least_float32
from ..progress import track
from .curvature import Eigenbasis
from .laplace import ExpertLaplace


def deviations(posterior: Eigenbasis, precision: Tensor, noise: Tensor) -> Tensor:
    """``(H_e + lambda_e I)^(-1/2) z`` of every expert: ``noise [E, d, f]`` standard normal, ``precision [E]`` -> ``[E, d, f]``, a draw of the
    weights' deviation from the mean. Outside the bases (low rank) the prior's."""
    precision = precision.to(noise)[:, None, None]
    h = posterior.eigenvalues.to(noise)
    if posterior.basis_a is None:
        return noise / (h + precision).sqrt()
    U_g, U_a = posterior.basis_g.to(noise), posterior.basis_a.to(noise)
    inside = (1 / (h + precision).sqrt() - 1 / precision.sqrt()) * (U_g.mT @ noise @ U_a)
    return noise / precision.sqrt() + U_g @ inside @ U_a.mT


def sampled_logits(la: ExpertLaplace, loader: Iterable[Mapping[str, Tensor]], num_samples: int, *, seed: int = 0,
                   progress: bool = True) -> Tensor:
    """Class logits ``[S, N, C]`` (float64; -inf: no such option) of the model with its experts'
    weights drawn from the fitted posterior ``la`` at its prior precision and rounded to the model's
    dtype: not linearised. The model is left bit for bit as it was. ``ValueError`` for experts that
    are modules of their own or offloaded, and for dense blocks, whose samples are not written."""
    if not all(isinstance(p, Eigenbasis) for p in la._fitted()):
        raise ValueError("weight samples are drawn in a Kronecker basis: fit with hessian_structure 'kron', 'ekfac' or 'diag'")
    if any(isinstance(m, nn.ModuleList) or bare(m).down_proj.is_meta for m in la._modules):
        raise ValueError("weight samples need experts in one parameter that is on a device: not offloaded, not separate modules")
    generator, precision = torch.Generator().manual_seed(seed), la.prior_precision_by_expert()
    weights = [down_weight(m) for m in la._modules]
    means, out = [w.detach().clone() for w in weights], []
    try:
        with torch.no_grad():
            for _ in track(range(num_samples), "weight samples", progress):
                for weight, mean, posterior, lam in zip(weights, means, la.posteriors, precision, strict=True):
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    mean = at_least_float32(mean)  # a bf16 weight is rounded once, as it is written
                    deviation = deviations(posterior.to("cpu"), lam[: len(weight)], noise)
                    weight.copy_(mean + deviation.to(mean))
                parts = [option_logits(la.model, batch).cpu().double() for batch in loader]
                width = max(p.shape[1] for p in parts)
                out.append(torch.cat([nn.functional.pad(p, (0, width - p.shape[1]), value=-torch.inf) for p in parts]))
    finally:
        with torch.no_grad():
            for weight, mean in zip(weights, means, strict=True):
                weight.copy_(mean)
    return torch.stack(out)
