"""The routers themselves trained on a task's answers, with all else frozen: the "MAP routers"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .attach import attach_routers
from .fit import fit_routers


def tune_routers(model: torch.nn.Module, train_loader: Iterable[Mapping[str, Tensor]], val_loader=None, *,
                 layers: str | Sequence[int | str] = "all", **options) -> dict[str, Tensor]:
    """The "MAP routers": the model's routers trained on the answers with all else frozen. Router name -> weight ``[E, d]``.

    The model is left as it was; hand the weights to ``attach_routers(prior_mean=...)``, with method ``deterministic`` for the
    MAP routers themselves. ``options``: of the loop of :func:`fit_routers`.
    """
    # a dropout router without dropout is a deterministic router that can be trained
    with attach_routers(model, "mcdropout", layers=layers, dropout=0.0, num_samples=1) as routers:
        fit_routers(routers, train_loader, val_loader, **options)
        return {name: (f.weight + f.delta).detach() for name, f in zip(routers.layers, routers.families, strict=True)}
