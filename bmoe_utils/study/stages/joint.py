"""Both posteriors together, each alone or tuned with the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch import nn

from ...joint.information import normal_points
from ...joint.posterior import SAMPLES, SCALES, JointPosterior, linked
from ...scores.predictions import Predictions
from .experts import Experts
from .routers import BayesianRouters


class Joint(Experts, BayesianRouters):
    """Stage 4, on both."""

    def joint(self, seed: int, *, method: str = "laplace", tune: str = "independent", experts: Mapping | None = None,
              model: nn.Module | None = None, **options) -> JointPosterior:
        """The experts' and the routers' posterior on the seed's MAP model; ``.routers.detach()`` gives the model back.

        ``experts``: options of :meth:`tuned_laplace`, by default the evidence's prior. ``options``: of :meth:`routers`. ``tune``:
        ``independent``: each was tuned without the other (Laplace routers by the validation NLL of their own whole passes);
        ``routers``: the Laplace routers' prior precision by validation NLL of both together; ``joint``: that and a factor of the
        experts' prior precision.
        """
        precision, scale = self.joint_choice(seed, tune, method=method, experts=experts, **options)
        return self._joint(seed, method, precision, scale, experts, options, model)

    def _joint(self, seed: int, method: str, precision: float | None, scale: float, experts: Mapping | None, options: Mapping,
               model: nn.Module | None = None) -> JointPosterior:
        model = model or self.map_model(seed)
        la = self.tuned_laplace(seed, model=model, **dict(experts or {}))  # fitted on the model's own routing, before any other is attached
        la.prior_precision = scale * la.prior_precision
        joint = JointPosterior(la, self.routers(seed, method, inference="whole-model", model=model, **options))
        joint.routers.num_samples = self.router_passes
        if precision is not None:
            joint.router_precision = precision
        return joint

    def joint_choice(self, seed: int, tune: str = "independent", *, method: str = "laplace", experts: Mapping | None = None,
                     **options) -> tuple[float | None, float]:
        """The prior precision of Laplace routers (None: as they were fitted) and the factor of the experts' that ``tune`` chooses."""
        if tune not in ("independent", "routers", "joint"):
            raise ValueError(f"tune {tune!r} is not 'independent', 'routers' or 'joint'")
        if tune == "independent":
            return None, 1.0
        grid = self.joint_grid(seed, method=method, experts=experts, **options)
        allowed = grid["nll"] if tune == "joint" else grid["nll"].masked_fill(grid["scales"] != 1, torch.inf)
        i, j = divmod(int(allowed.argmin()), len(grid["scales"]))
        return float(grid["precisions"][i]), float(grid["scales"][j])

    def joint_grid(self, seed: int, *, method: str = "laplace", experts: Mapping | None = None, **options) -> dict[str, torch.Tensor]:
        """Validation NLL of both together ``nll [P, Q]`` over the Laplace routers' prior ``precisions [P]`` and ``scales [Q]`` of the
        experts', on the routers' validation items with ``validation_passes`` routings."""
        config = self._joint_config(seed, method, experts, options) | {"grid": [self.router_precisions, list(SCALES)], "samples": SAMPLES}

        def compute() -> dict:
            joint = self._joint(seed, method, None, 1.0, experts, options)
            joint.routers.num_samples = self.validation_passes
            nll = joint.validation_nll(self._router_validation(), self.router_precisions, SCALES)
            return {"nll": nll, "precisions": torch.tensor(self.router_precisions, dtype=nll.dtype), "scales": torch.tensor(SCALES, dtype=nll.dtype)}

        return self.store.arrays("joint_grid", config, compute)

    def _joint_config(self, seed: int, method: str, experts: Mapping | None, options: Mapping) -> dict:
        return self._router_config(seed, "joint", method, self.validation_passes, self.router_mean, self.members, self.prior_mean) | {
            "experts": dict(experts or {}), "options": dict(options), "precisions": self.router_precisions}

    def joint_logits(self, seed: int, split: str = "test", *, method: str = "laplace", tune: str = "independent",
                     num_samples: int | None = None, items: int | None = None, experts: Mapping | None = None,
                     **options) -> dict[str, torch.Tensor]:
        """The Gaussians behind :meth:`joint_predictions`: ``mean [N, S, C]`` (-inf: no such option), ``covariance [N, S, C, C]``."""
        precision, scale = self.joint_choice(seed, tune, method=method, experts=experts, **options)
        num_samples, items = num_samples or self.router_passes, items or self.router_items
        config = self._joint_config(seed, method, experts, options) | {
            "split": split, "items": items, "routings": num_samples, "precision": precision, "scale": scale}

        def compute() -> dict:
            joint = self._joint(seed, method, precision, scale, experts, options)
            joint.routers.num_samples = num_samples
            said = [joint.predictive_logits(b) for b in self.loader(self.task[split].subset(items), batch_size=self.router_batch)]
            C = max(mean.shape[-1] for mean, _ in said)
            means = [nn.functional.pad(mean, (0, C - mean.shape[-1]), value=-torch.inf) for mean, _ in said]
            covs = [nn.functional.pad(cov, (0, C - cov.shape[-1]) * 2) for _, cov in said]
            parts = {"mean": torch.cat(means, 1), "covariance": torch.cat(covs, 1)}
            return {k: v.transpose(0, 1).to("cpu", torch.promote_types(v.dtype, torch.float32)) for k, v in parts.items()}

        return self.store.arrays("joint_logits", config, compute)

    def joint_predictions(self, seed: int, split: str = "test", *, method: str = "laplace", tune: str = "independent",
                          link_approx: str = "mc", num_samples: int | None = None, items: int | None = None, size: int | None = None,
                          experts: Mapping | None = None, **options) -> Predictions:
        """Predictions of :meth:`joint`, under ``mc`` with the parts of their uncertainty as signals (``total``, ``aleatoric``,
        ``expert_epistemic``, ``routing_epistemic``), on a split's first ``items`` (by default ``router_items``). ``num_samples``:
        routings, by default ``router_passes``. ``size``: fine-tuned on so many items, by default ``train_size``."""
        which = {"method": method, "num_samples": num_samples or self.router_passes, "items": items or self.router_items, "experts": experts} | options
        if size is not None and size != self.train_size:
            # without curves, as map_model(seed, size=size) trains it
            return self.sized(size).joint_predictions(seed, split, tune=tune, link_approx=link_approx, **which)
        choice = self.joint_choice(seed, tune, method=method, experts=experts, **options)
        config = self._joint_config(seed, method, experts, options) | {
            "routings": which["num_samples"], "choice": list(choice), "link": link_approx, "samples": SAMPLES}

        def predictor() -> Callable:
            logits, done = self.joint_logits(seed, split, tune=tune, **which), count(step=self.router_batch)

            def answer(batch: Mapping) -> tuple:
                B, C = batch["option_ids"].shape
                start = next(done)
                mean, cov = (logits[k][start : start + B].transpose(0, 1) for k in ("mean", "covariance"))
                return linked(mean[..., :C], cov[..., :C, :C], link_approx, normal_points(SAMPLES, C, seed))

            return answer

        return self.predictions("joint", split, config, predictor, items=which["items"], batch_size=self.router_batch)
