"""Choosing prior precisions by the evidence, a gradient on log lambda, and the grids that are looked at. Pure maths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .curvature import log_det_ratio

# The precisions looked at: far wider than any optimum seen, so that an end is reached only where there is no optimum.
# 8 steps a decade put the best grid point within 15% of the optimum before it is refined.
GRID = torch.logspace(-4, 8, 97, dtype=torch.float64)
# For the validation NLL two steps a decade: it is flat and noisy, and a finer choice would fit the noise.
COARSE = GRID[::4]
# The refinement's L-BFGS takes the groups together. One whose evidence is steep beside the others' can stop it for all, and with
# thousands a hundred iterations do not do: what is left with a slope (nats per e-fold) above the tolerance is found by halving.
JOINTLY, TOLERANCE, HALVINGS = 256, 1e-2, 30
# Spectra of up to this many eigenvalues are held in float64 and evaluated in one call for all layers; larger ones layer by layer.
AT_ONCE = 2**24


def groups(granularity: str, layers: int, experts: int) -> Tensor:
    """Which precision each expert shares, ``[L, E]``: one for all (``global``), one per ``layer`` or per ``expert``."""
    match granularity:
        case "global":
            return torch.zeros(layers, experts, dtype=torch.long)
        case "layer":
            return torch.arange(layers)[:, None].expand(layers, experts)
        case "expert":
            return torch.arange(layers * experts).view(layers, experts)
    raise ValueError(f"granularity={granularity!r} is not one of 'global', 'layer', 'expert'")


def evidence_penalty(spectra: Sequence[Tensor], distance: Tensor) -> Callable[[Tensor], Tensor]:
    """What the evidence loses by a prior of ``precision [L, E]``, expert by expert ``[L, E]`` (float64, CPU, differentiable):

    ``1/2 lambda ||W_MAP - W_0||^2 + 1/2 log det(H + lambda I) - 1/2 P log lambda``,

    from each layer's curvature eigenvalues ``spectra[l] [E_l, R]`` and ``distance [L, E]`` ``= ||W_MAP - W_0||^2`` alone.
    """
    L, E = distance.shape
    width = max(h.shape[1] for h in spectra)
    if L * E * width <= AT_ONCE:
        spectra = [torch.stack([pad(h.cpu().double(), (0, width - h.shape[1], 0, E - len(h)))
                                for h in spectra])]

    def penalty(precision: Tensor) -> Tensor:
        if spectra[0].dim() == 3:
            ratios = log_det_ratio(spectra[0], precision)
        else:
            ratios = torch.stack([pad(log_det_ratio(h, lam[: len(h)]).cpu(), (0, E - len(h)))
                                  for h, lam in zip(spectra, precision, strict=True)])
        return 0.5 * (precision * distance + ratios)

    return penalty


def best_by_evidence(spectra: Sequence[Tensor], distance: Tensor, group: Tensor, current: Tensor) -> Tensor:
    """The precision of largest evidence of every group, float64 ``[groups]``. Where the data give no curvature at all, the
    evidence would only shrink ``lambda ||W||^2``, to no prior: such an expert takes its layer's optimum, such a layer keeps
    ``current [L, E]``."""
    return _best(evidence_penalty(spectra, distance), _reached(spectra, distance), group, current)


def _reached(spectra: Sequence[Tensor], distance: Tensor) -> Tensor:
    """Which experts have any curvature, ``[L, E]``."""
    return torch.stack([pad((h > 0).any(1).cpu(), (0, distance.shape[1] - len(h))) for h in spectra])


def _best(penalty: Callable[[Tensor], Tensor], reached: Tensor, group: Tensor, current: Tensor) -> Tensor:
    n = int(group.max()) + 1
    informed = torch.zeros(n, dtype=torch.long).index_add(0, group.flatten(), reached.flatten().long()) > 0
    best = maximise_evidence(penalty, group, current)
    if informed.all():
        return best
    by_layer = groups("layer", *group.shape)
    fallback = current if torch.equal(group, by_layer) else _best(penalty, reached, by_layer, current)[by_layer]
    return torch.where(informed, best, torch.zeros(n, dtype=torch.float64).scatter(0, group.flatten(), fallback.flatten()))


def maximise_evidence(penalty: Callable[[Tensor], Tensor], group: Tensor, current: Tensor) -> Tensor:
    """The precision of least penalty (largest evidence) of every group, float64 ``[groups]``.

    ``penalty(precision [L, E]) -> [L, E]`` is what the evidence loses, expert by expert;
    ``group [L, E]`` from :func:`groups`. The best grid point, refined by L-BFGS on ``log lambda``
    within its cell, or where that fails by halving it. A group whose penalty does not depend on the
    precision (no data, no distance) keeps its ``current`` ``[L, E]``.
    """
    n = int(group.max()) + 1

    def by_group(precision: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add(0, group.flatten(), penalty(precision).flatten())

    with torch.no_grad():
        table = torch.stack([by_group(lam.expand(group.shape)) for lam in GRID])  # [grid, n]
    start = GRID[table.argmin(0)].log()
    log_precision = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([log_precision], max_iter=100, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-8, tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = by_group(log_precision.exp()[group]).sum()  # separable: each group's gradient is its own
        loss.backward()
        return loss

    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(by_group(x.exp()[group]).sum(), x)[0]

    if n <= JOINTLY:
        optimizer.step(closure)
    step = float(GRID[1].log() - GRID[0].log())
    low, high = start - step, start + step
    best = log_precision.detach().clamp(low, high)
    if (unfinished := slope(best).abs() > TOLERANCE).any():  # each by itself: the minimum lies between the points beside the best
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            rising = slope(middle) > 0
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        best = torch.where(unfinished, (low + high) / 2, best)
    best = best.exp().clamp(GRID[0], GRID[-1])
    kept = torch.zeros(n, dtype=torch.float64).scatter(0, group.flatten(), current.flatten())
    return torch.where(table.amax(0) == table.amin(0), kept, best)
