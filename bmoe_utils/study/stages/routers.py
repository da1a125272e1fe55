"""Bayesian routers on a MAP model: fitted, asked for answers, and shaken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from torch import nn

from ...models import readout
from ...routers.attach import Routers, attach_routers, find_routers
from ...routers.stability import perturbed, routing_stability
from ...routers.tune import tune_routers
from ...scores.predictions import Predictions
from ...storage import fingerprint
from ..source import closure, code_version
from .map_model import MapModel


class BayesianRouters(MapModel):
    """Stage 3, beside the experts' posterior."""

    def map_routers(self, seed: int, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """Router name -> weight of the seed's MAP model after its routers have been trained further, all else frozen."""
        config = self._router_config(seed, "validation_nll") | {"epochs": self.router_epochs}

        def compute() -> dict:
            return tune_routers(model or self.map_model(seed), self._router_loader(seed), self._router_validation(), **self._loop(seed))

        return self.store.arrays("map_routers", config, compute)

    def _router_loader(self, seed: int):
        return self.loader(self.train_items(seed), batch_size=self.batch_size)

    def _router_validation(self):
        return self.loader(self.task["validation"].subset(self.router_validation), batch_size=self.router_batch)

    def _loop(self, seed: int) -> dict:
        return {"epochs": self.router_epochs, "lr": self.router_lr, "beta": self.beta, "patience": self.patience,
                "accumulation": self.accumulation, "seed": seed}

    def _router_config(self, seed: int, *which) -> dict:
        return {"map": self.map_folder(seed).name, "loop": self._loop(seed), "batch": self.batch_size, "data": self.data_key,
                "validation": self.router_validation, "batches": self.router_batch, "which": list(which)}

    def routers(self, seed: int, method: str, *, inference: str = "inside", layers: str | list = "all", prior_mean: str | None = None,
                loop: Mapping | None = None, fitted: bool = True, model: nn.Module | None = None, **options) -> Routers:
        """Bayesian routers fitted on the seed's fine-tuning set, attached to its MAP model (``routers.model``); a context manager.

        One fit serves both kinds of inference, its epoch chosen by the validation NLL of whole passes; but a Laplace router's prior
        precision is chosen under the ``inference`` it will be used with. ``prior_mean``: ``current``,
        ``pretrained`` or ``tuned``, by default the profile's. ``loop``: other options of the fit; ``fitted=False``: none, the prior itself. ``options``: those
        of the method.
        """
        model = model or self.map_model(seed)
        mean, loop = prior_mean or self.router_mean, self._loop(seed) | dict(loop or {})
        if mean not in ("current", "pretrained", "tuned"):
            raise ValueError(f"prior_mean {mean!r} is not 'current', 'pretrained' or 'tuned'")
        if method == "ensemble":
            options = {"members": self.members} | options
        if method == "laplace":
            loop = {"prior_grid": self.router_precisions} | loop
        fitted_for = inference if method == "laplace" else "whole-model"
        samples = self.router_samples if fitted_for == "inside" else self.validation_passes
        config = self._router_config(seed, method, layers, mean, fitted_for, samples) | {"fit": loop if fitted else None, "options": options}

        def build(folder: Path) -> None:
            centre = {"current": lambda: None, "pretrained": lambda: self.base()[0], "tuned": lambda: self.map_routers(seed, model)}[mean]()
            with attach_routers(model, method, layers=layers, inference=fitted_for, num_samples=samples, seed=seed, prior_mean=centre,
                                **options) as routers:
                # outlives a killed build, but not a change of the code, whose state may be another
                resume = self.store.root / "unfinished" / fingerprint(config | {"code": code_version(closure([build]))})[:12]
                if fitted:
                    routers.fit(self._router_loader(seed), self._router_validation(), checkpoint=resume, **loop)
                routers.save(folder / "routers")

        routers = Routers.load(self.store.folder("routers", config, build) / "routers", model)
        routers.inference = inference
        return routers

    def router_predictions(self, seed: int, method: str, split: str = "test", *, inference: str = "inside", num_samples: int | None = -1,
                           **which) -> Predictions:
        """Predictions, with their signals, of :meth:`routers` on a split's first ``router_items``; ``num_samples``: samples or
        passes, by default the profile's; None: without sampling."""
        if num_samples == -1:
            num_samples = self.router_samples if inference == "inside" else self.router_passes
        config = {**self._router_config(seed, method, inference, num_samples, which.get("prior_mean") or self.router_mean),
                  "members": self.members, "passes": self.validation_passes} | which

        def predictor() -> Callable:
            routers = self.routers(seed, method, inference=inference, **which)
            routers.num_samples = num_samples
            return routers

        return self.predictions("routers", split, config, predictor, items=self.router_items, batch_size=self.router_batch)

    def stability(self, seed: int, gamma: float, method: str | None = None, *, where: str = "embedding", fresh: bool = True,
                  num_samples: int | None = -1, **which) -> torch.Tensor:
        """Mean Jaccard overlap per layer ``[L]`` under noise on the first ``noise_items`` test questions
        (:func:`stability.routing_stability`); of the MAP model itself where no ``method`` is named."""
        config = {**self._router_config(seed, method, gamma, where, fresh, self.router_mean), "items": self.noise_items,
                  "samples": self.router_samples if num_samples == -1 else num_samples} | which

        def compute() -> dict:
            items = self.loader(self.task["test"].subset(self.noise_items), batch_size=self.router_batch)
            if method is None:
                return {"jaccard": routing_stability(self.map_model(seed), items, gamma, where, seed=seed)}
            with self.routers(seed, method, **which) as routers:
                if num_samples != -1:
                    routers.num_samples = num_samples
                return {"jaccard": routing_stability(routers.model, items, gamma, where, routers=routers, fresh=fresh, seed=seed)}

        return self.store.arrays("stability", config, compute)["jaccard"]

    def noisy_predictions(self, seed: int, gamma: float, where: str) -> Predictions:
        """The MAP model's predictions on the first ``noise_items`` test questions under noise (:func:`stability.perturbed`)."""
        config = {"map": self.map_folder(seed).name, "gamma": gamma, "where": where}

        def predictor() -> Callable:
            model = self.map_model(seed)
            numbers = count()

            def predict_noisily(batch: Mapping) -> torch.Tensor:
                with torch.no_grad(), perturbed(model, batch["attention_mask"], gamma, where, seed * 100_003 + next(numbers)):
                    return readout.option_logits(model, batch).softmax(-1)

            return predict_noisily

        return self.predictions("noisy", "test", config, predictor, items=self.noise_items)

    def susceptible_layers(self, seed: int, temperature: float = 1.0) -> list[int]:
        """The third of the MoE layers (at least one) whose answers' validation NLL moves most when that layer alone samples its
        experts at ``temperature``, in the model's order."""
        plain = self.router_predictions(seed, "deterministic", "validation").summary()["nll"]
        number = len(find_routers(self.map_model(seed)))
        moved = [abs(self.router_predictions(seed, "temperature", "validation", layers=[i], temperature=temperature).summary()["nll"] - plain)
                 for i in range(number)]
        return sorted(sorted(range(number), key=lambda i: -moved[i])[: max(1, number // 3)])
