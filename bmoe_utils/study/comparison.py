"""The baselines as stages of a study: what each is trained or fitted on, with which settings, and kept under which key.

Every one starts from the same base model, items, epochs, batches and learning rate as the seed's MAP model. Settings are those of the
papers; what they leave open was chosen on the validation split. Nothing here sees the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..baselines.averaging import MCDropout, WeightEnsemble, expert_dropout, fit_swag, lora_dropout, set_weights, swag_states
from ..baselines.last_layer import LastLayerLaplace
from ..baselines.lora_laplace import LoraLaplace
from ..baselines.lora_posteriors import fit_blob, largest_within, mean_field_states, tfb_directions, tfb_states
from ..models import training
from ..routers.maths import SwagMoments
from ..scores.predictions import predict
from .stages.map_model import MapModel

EITHER = ("ensemble", "checkpoint_ensemble", "expert_dropout", "last_layer_laplace")  # in every regime
ON_LORA = ("mc_dropout", "swag", "laplace_lora", "blob", "tfb")  # where the MAP model is a LoRA adapter
NAMES = (*EITHER, *ON_LORA)


def names(study) -> tuple[str, ...]:
    """The baselines that the study's regime allows."""
    return NAMES if study.method == "lora" else EITHER


def settings(study, name: str, options: Mapping) -> dict:
    """The baseline's settings, with ``options`` in place of the defaults. ``ValueError`` on an unknown name or option, or a
    posterior over LoRA where there is none."""
    if name not in NAMES:
        raise ValueError(f"unknown baseline {name!r}; there are: {', '.join(NAMES)}")
    if name not in names(study):
        raise ValueError(f"{name!r} sits on LoRA, and this study fine-tunes by method={study.method!r}: ask study.regime('lora')")
    defaults = {
        "ensemble": {"members": study.members},
        "checkpoint_ensemble": {"checkpoints": min(study.members, study.epochs)},
        "mc_dropout": {"dropout": 0.1, "samples": 10},
        "expert_dropout": {"dropout": 0.1, "samples": 10},
        "swag": {"epochs": max(1, study.epochs // 4), "lr": study.lr, "rank": 20, "scale": 0.5, "samples": 10},
        "last_layer_laplace": {"hessian_structure": "kron", "samples": study.mc_samples},
        "laplace_lora": {"rank": 10, "samples": study.mc_samples},
        "blob": {"prior_std": 0.2, "init": 0.05, "kl_weight": 1.0, "reweight": True, "samples": 10},
        "tfb": {"tolerance": 0.003, "samples": 10},
    }[name]
    if unknown := set(options) - set(defaults):
        raise ValueError(f"{name} has no option {min(unknown)!r}; it has: {', '.join(defaults)}")
    return defaults | dict(options)


class Run:
    """One baseline on one seed (and fine-tuning-set ``size``, None: the profile's) of a study; ``options`` as :func:`settings` gives."""

    def __init__(self, study: MapModel, seed: int, name: str, options: Mapping, size: int | None):
        self.study, self.seed, self.name, self.options = study, seed, name, dict(options)
        self.which = {} if size is None else {"size": size}
        self.items = study.train_items(seed, size)

    @property
    def key(self) -> dict:
        return {"baseline": self.name, "map": self.study.map_folder(self.seed, **self.which).name}

    def predictor(self) -> Callable[[Mapping], Tensor]:
        """``batch -> probs [B, C]``; fits what is not there yet."""
        return getattr(self, f"_{self.name}")(**self.options)

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _map_model(self) -> nn.Module:
        return self.study.map_model(self.seed, **self.which)

    def _stored(self, compute: Callable[[], Mapping[str, Tensor]], **fit) -> dict[str, Tensor]:
        return self.study.store.arrays("baseline", self.key | fit, compute)

    def _batches(self, order: int | None = None):
        """The fine-tuning set: shuffled for training by the seed ``order``, or in order for one pass."""
        if order is None:
            return self.study.loader(self.items, batch_size=self.study.router_batch)
        return self.study.loader(self.items, batch_size=self.study.batch_size, shuffle=True, seed=order)

    def _train(self, seed: int, *, dropout: float = 0.0, within: Callable = nullcontext) -> nn.Module:
        """A model fine-tuned as the MAP model is, ``seed`` fixing the order of the items, LoRA's initial values and the dropout."""
        s = self.study
        model = s.base()[0]
        if s.method == "lora":
            model = training.add_lora(model, dropout=dropout, seed=seed, target_modules=s.lora_targets)
        with within(model):
            training.fine_tune(model, self._batches(seed), epochs=s.epochs, lr=s.lr, weight_decay=s.weight_decay, seed=seed)
        return model.eval()

    # ---- the baselines ----------------------------------------------------------------------------------------------
    def _ensemble(self, members: int):
        """The MAP model and ``members - 1`` more on the same items: another order, and under LoRA other initial values."""
        more = [self._stored(lambda m=m: _state(self._train(self.seed + 1000 * m)), member=m) for m in range(1, members)]
        model = self._map_model()
        return WeightEnsemble(model, [_state(model), *more])

    def _checkpoint_ensemble(self, checkpoints: int):
        """What the MAP model was after each of its last epochs."""
        model, before = self._map_model(), self.study.map_checkpoints(self.seed, **self.which)
        if not 1 <= checkpoints <= len(before) + 1:
            raise ValueError(f"checkpoints={checkpoints} must lie between 1 and the {len(before) + 1} that the run kept (`members`, `epochs`)")
        return WeightEnsemble(model, [*before[len(before) + 1 - checkpoints:], _state(model)])

    def _mc_dropout(self, dropout: float, samples: int):
        state = self._stored(lambda: _state(self._train(self.seed, dropout=dropout)), dropout=dropout)
        model = training.add_lora(self.study.base()[0], dropout=dropout, seed=self.seed, target_modules=self.study.lora_targets).eval()
        set_weights(model, state)
        return MCDropout(model, partial(lora_dropout, model), samples, self.seed)

    def _expert_dropout(self, dropout: float, samples: int):
        state = self._stored(lambda: _state(self._train(self.seed, within=partial(expert_dropout, p=dropout))), dropout=dropout)
        model = self._map_model()
        set_weights(model, state)
        return MCDropout(model, partial(expert_dropout, model, dropout), samples, self.seed)

    def _swag(self, epochs: int, lr: float, rank: int, scale: float, samples: int):
        model, per_epoch = self._map_model(), -(-rank // epochs)

        def compute() -> dict[str, Tensor]:
            moments = fit_swag(model, self._batches(self.seed), epochs=epochs, lr=lr, rank=rank, per_epoch=per_epoch, seed=self.seed)
            return {f"{part}/{k}": v for k, m in moments.items()
                    for part, v in (("mean", m.mean), ("square", m.square), ("deviations", torch.stack(m.deviations)))}

        found = self._stored(compute, epochs=epochs, lr=lr, rank=rank)
        moments = {k: SwagMoments(found[f"mean/{k}"], found[f"square/{k}"], list(found[f"deviations/{k}"]), rank=rank)
                   for k in training.adapted_weights(model)}
        return WeightEnsemble(model, swag_states(moments, samples, scale=scale, seed=self.seed))

    def _last_layer_laplace(self, hessian_structure: str, samples: int):
        la = LastLayerLaplace(self._map_model(), hessian_structure=hessian_structure, num_samples=samples, seed=self.seed)
        la.fit(self._batches()).optimize_prior_precision()
        return la

    def _laplace_lora(self, rank: int, samples: int):
        la = LoraLaplace(self._map_model(), rank=rank, num_samples=samples, seed=self.seed)
        la.fit(self._batches()).optimize_prior_precision()
        return la

    def _blob(self, samples: int, **options):
        model = training.add_lora(self.study.base()[0], seed=self.seed, target_modules=self.study.lora_targets).eval()

        def compute() -> dict[str, Tensor]:
            state, std = fit_blob(model, self._batches(self.seed), epochs=self.study.epochs, lr=self.study.lr, seed=self.seed, **options)
            return state | {f"std/{k}": v for k, v in std.items()}

        found = self._stored(compute, **options)
        std = {k.removeprefix("std/"): v for k, v in found.items() if k.startswith("std/")}
        state = {k: v for k, v in found.items() if not k.startswith("std/")}
        return WeightEnsemble(model, mean_field_states(state, std, samples, self.seed))

    def _tfb(self, tolerance: float, samples: int):
        """The anchor set is the fine-tuning set, the performance its NLL, the tolerance its relative growth."""
        model = self._map_model()
        directions = tfb_directions(model, samples, self.seed)

        def largest() -> float:
            anchor = list(self._batches())
            nll = lambda p: predict(p, anchor, progress=False).summary()["nll"]  # noqa: E731
            at_map = nll(model)
            return largest_within(lambda sigma: nll(WeightEnsemble(model, tfb_states(model, sigma, directions))) / at_map - 1, tolerance,
                                  steps=5)

        sigma = self.study.store.json("baseline", self.key | {"tolerance": tolerance, "samples": samples}, largest)
        return WeightEnsemble(model, tfb_states(model, sigma, directions))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in training.adapted_weights(model).items()}
