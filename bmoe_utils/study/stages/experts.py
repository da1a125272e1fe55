"""The experts' Laplace posterior on a MAP model, its prior precision, and the dense posterior it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from torch import nn

from ...experts.capture import capturing
from ...experts.exact import joint_predictive, prior_predictive
from ...experts.laplace import ExpertLaplace
from ...scores.predictions import Predictions
from .map_model import MapModel


class Experts(MapModel):
    """Stage 3, on a MAP model."""

    def laplace(self, seed: int, *, model: nn.Module | None = None, prior_mean: str | None = None, **options) -> ExpertLaplace:
        """The expert Laplace posterior of the seed's MAP model, fitted on its fine-tuning set, prior precision 1.

        ``model``: the MAP model if it is at hand already (it must be that of the seed). ``prior_mean``: ``"zero"`` or
        ``"pretrained"``, by default the profile's. ``options``: those of :class:`ExpertLaplace`.
        """
        model = model or self.map_model(seed)
        mean, options = prior_mean or self.prior_mean, {"seed": seed, **options}
        if mean not in ("zero", "pretrained"):
            raise ValueError(f"prior_mean {mean!r} is not 'zero' or 'pretrained'")

        def build(folder: Path) -> None:
            la = ExpertLaplace(model, prior_mean=self.base()[0] if mean == "pretrained" else 0.0, **options)
            la.fit(self.loader(self.train_items(seed))).save(folder / "posterior")

        config = {"map": self.map_folder(seed).name, "prior_mean": mean, "options": options}
        return ExpertLaplace.load(self.store.folder("laplace", config, build) / "posterior", model)

    def tuned_laplace(self, seed: int, *, tune: str = "marglik", granularity: str = "layer", **which) -> ExpertLaplace:
        """:meth:`laplace` with its prior precision tuned: by the evidence, or by NLL on the validation split."""
        la = self.laplace(seed, **which)
        which.pop("model", None)

        def compute() -> dict:
            val = self.loader(self.task["validation"]) if tune == "val_nll" else None
            return {"prior_precision": la.optimize_prior_precision(tune, granularity, val_loader=val)}

        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "tune": tune, "granularity": granularity}
        la.prior_precision = self.store.arrays("prior", config | which, compute)["prior_precision"]
        return la

    def validation_curve(self, seed: int) -> dict[str, torch.Tensor]:
        """:meth:`ExpertLaplace.validation_curve` of :meth:`laplace` on the validation split: ``precision [P]``, ``nll [P]``."""
        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "data": self.data_key}

        def compute() -> dict:
            curve = self.laplace(seed).validation_curve(self.loader(self.task["validation"]))
            return dict(zip(("precision", "nll"), curve, strict=True))

        return self.store.arrays("validation_curve", config, compute)

    def laplace_predictions(self, seed: int, split: str = "test", *, link_approx: str = "mc", items: int | None = None, **which) -> Predictions:
        """Predictions of :meth:`tuned_laplace` with its options on a split (its first ``items``)."""
        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "tune": "marglik", "granularity": "layer",
                  "link": link_approx, "samples": self.mc_samples}

        def predictor() -> Callable:
            la = self.tuned_laplace(seed, **which)
            captured = self._capturer(la, config["map"], split, items)
            return lambda batch: la(batch, link_approx, self.mc_samples, captured(batch))

        return self.predictions("laplace", split, config | which, predictor, items=items)

    def _capturer(self, la: ExpertLaplace, *of) -> Callable:
        """``la.captured`` for one pass over a split, ``of`` saying which. An embedded model's last pass is kept: another posterior over
        the same layers and weights that is asked about the same questions next has its Jacobians already."""
        key = (*of, *la.layers)
        if self._passed[0] != key:
            self._passed = key, []
        kept, number = self._passed[1], count()

        def captured(batch: Mapping) -> tuple:
            i = next(number)
            if i < len(kept):
                return kept[i]
            with capturing(la.model):
                found = la.captured(batch)
            if self.embedded:
                kept.append(found)
            return found

        return captured

    # ---- against the exact posterior --------------------------------------------------------------------------------
    def covariances(self, seed: int, precision: float, structure: str = "kron", **options) -> torch.Tensor:
        """Predictive covariances ``[exact_items, C, C]`` of the first test items at one prior precision, each posterior
        fitted on the first ``exact_fit`` items of the fine-tuning set.

        ``structure``: ``joint``, the dense GGN posterior over all experts together (:mod:`bmoe_utils.experts.exact`); ``prior``, no
        curvature at all; or a ``hessian_structure``.
        """
        config = {"map": self.map_folder(seed).name, "precision": precision, "structure": structure, "options": options,
                  "fit": self.exact_fit, "items": self.exact_items, "data": self.data_key}

        def compute() -> dict:
            model, items = self.map_model(seed), self.loader(self.task["test"].subset(self.exact_items))
            fit_on = self.loader(self.train_items(seed).subset(self.exact_fit))
            if structure in ("joint", "prior"):
                la = ExpertLaplace(model, prior_precision=precision)
                said = joint_predictive(la, fit_on, items) if structure == "joint" else prior_predictive(la, items)
                parts = [cov for _, cov in said]
            else:
                la = ExpertLaplace(model, hessian_structure=structure, prior_precision=precision, seed=seed, **options)
                la.fit(fit_on)
                parts = [la.predictive_logits(batch)[1] for batch in items]
            width = max(p.shape[1] for p in parts)
            return {"covariance": torch.cat([nn.functional.pad(p, (0, width - p.shape[1]) * 2) for p in parts])}

        return self.store.arrays("covariance", config, compute)["covariance"]
