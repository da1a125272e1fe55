"""The study's pipeline: profiles, and every stage as an artefact that is computed once and found again.

A chapter makes a ``Study`` from its parameters and asks it for what it needs; whatever that rests on is loaded or computed
on the way. Stages and what they rest on:

    base model  ->  MAP model (a seed, an epoch count, a training-set size)  ->  predictions
                                     -> expert Laplace (options) -> prior precision -> predictions
                                     -> baselines (name, options) -> predictions
                                     -> MAP routers -> Bayesian routers (method, options) -> predictions, stability
                                     -> both posteriors -> validation grid -> predictions
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import warnings
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from . import comparison, models, train
from .artefacts import Store, atomic_write, code_version, fingerprint
from .capture import capturing
from .evaluate import Predictions, predict
from .exact import joint_predictive, prior_predictive
from .information import normal_points
from .joint import SAMPLES, SCALES, JointPosterior, linked
from .laplace import ExpertLaplace
from .metrics import fit_temperature, softmax
from .profiles import MODELS, OWN_QUESTIONS, PROFILES
from .router_training import tune_routers
from .routers import Routers, attach_routers, find_routers
from .stability import perturbed, routing_stability
from .tasks import Split, draw, learning_texts, load_task, make_loader
from .world import world_file

# The modules whose code an artefact depends on.
DATA = ("world", "tasks", "questions", "hub", "prompts")
TRAINING = (*DATA, "models", "checkpoints", "deepseek", "offload", "train")
POSTERIOR = (*TRAINING, "capture", "unfused", "curvature", "sums", "sketch", "jacobians", "columns", "labels", "parallel", "on_disk", "fitting",
             "files", "laplace", "laplace_files", "prior")
ROUTING = (*TRAINING, "capture", "unfused", "curvature", "routing", "router_families", "router_rules", "routers", "router_training", "files")
BOTH = (*dict.fromkeys(POSTERIOR + ROUTING), "information", "joint")
BASELINES = (*TRAINING, "capture", "unfused", "curvature", "jacobians", "columns", "sums", "sketch", "prior", "routing", "information", "baselines", "last_layer",
             "lora_laplace", "lora_posteriors", "comparison")


@cache
def _spare_the_collector() -> None:
    """Once a process: Python's garbage collector need not walk what the libraries brought, and comes less often. In training a model
    as small as the embedded one it took a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, *gc.get_threshold()[1:])


class Study:
    """One profile on one task and model. Every setting of the profile is an attribute (``study.epochs``).

    Args:
        profile: a key of ``PROFILES``. task: ``"world"`` or a folder of questions. model: a checkpoint's folder or hub id,
            ``None`` for the profile's own. overrides: other values for some settings.
    """

    def __init__(self, profile: str = "smoke", *, task: str = "world", model: str | None = None,
                 overrides: Mapping | None = None, store: Store | None = None):
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r}; there are: {', '.join(PROFILES)}")
        overrides = dict(overrides or {})
        if unknown := set(overrides) - set(PROFILES[profile]):
            raise ValueError(f"unknown parameter {', '.join(sorted(unknown))}; profile {profile!r} has: "
                             f"{', '.join(sorted(PROFILES[profile]))}")
        self.profile, self.task_name = profile, str(task)
        self.model_name = model or MODELS[profile]
        own = OWN_QUESTIONS.get(profile, {}) if self.embedded and self.task_name != "world" else {}
        self.settings = PROFILES[profile] | own | overrides
        vars(self).update(self.settings)
        self.store = store or Store()
        self._read: dict = {}
        self._passed: tuple = None, []
        if self.embedded:
            # Matrices this small gain little from threads, lose a lot where cores are shared, and in one thread give the
            # same numbers on any number of cores.
            torch.set_num_threads(1)
            _spare_the_collector()
            disable_progress_bar()  # transformers': a small checkpoint is read dozens of times
            # peft still reads a property that transformers has renamed; nobody here can act on it
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    @property
    def embedded(self) -> bool:
        """Whether the base model is the study's own small one."""
        return self.model_name is None

    def regime(self, name: str) -> Study:
        """The same study under one of its MAP regimes (``study.regimes``)."""
        if name not in self.regimes:
            raise ValueError(f"unknown regime {name!r}; there are: {', '.join(self.regimes)}")
        return self._changed(self.regimes[name])

    def _changed(self, settings: Mapping) -> Study:
        """The same study, data and base model under other settings, which must not concern those."""
        other = Study(self.profile, task=self.task_name, model=self.model_name, overrides=self.settings | dict(settings), store=self.store)
        vars(other).update({k: v for k, v in vars(self).items() if k in ("task", "data_key", "base_folder", "tokenizer", "_base_key", "_read")})
        return other

    def sized(self, size: int) -> Study:
        """The same study fine-tuned on ``size`` items; without metrics epoch by epoch, as ``map_model(seed, size=size)`` is trained."""
        return self._changed({"train_size": size, "curves": False})

    # ---- data -------------------------------------------------------------------------------------------------------
    @cached_property
    def task(self) -> dict[str, Split]:
        """The task's splits; ``test_size`` keeps the first so many of every split that is only evaluated on."""
        # letters are what the papers use on large models, whose tokenizers cut many an option's word into pieces
        splits = load_task(self.task_name, readout=self.readout or (None if self.embedded else "letters"))
        return {k: v if k in ("train", "validation") else v.subset(self.test_size) for k, v in splits.items()}

    @cached_property
    def data_key(self) -> str:
        """Fingerprint of every question of the task and of how they are read out."""
        layout = {"readout": self.task["train"].readout, "max_length": self.max_length, "chat": self.chat}
        return fingerprint({k: list(v) for k, v in self.task.items()} | layout)

    @property
    def shifts(self) -> list[str]:
        """The splits beside train, validation and test."""
        return [k for k in self.task if k not in ("train", "validation", "test")]

    def train_items(self, seed: int, size: int | None = None) -> Split:
        """The fine-tuning set of a seed: ``size`` (default ``train_size``) items drawn from the pool; nested in size."""
        return draw(self.task["train"], seed, self.train_size if size is None else size)

    def loader(self, items: Split, *, batch_size: int | None = None, **options):
        return make_loader(items, self.tokenizer, batch_size=batch_size or self.eval_batch, max_length=self.max_length, chat=self.chat, **options)

    def provenance(self) -> dict:
        """What this study's results rest on, JSON values to write beside them: settings, origin of every split, model, versions, device."""
        names = ("torch", "transformers", "peft", "datasets", "tokenizers", "numpy", "scikit-learn")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        model = "embedded" if self.embedded else self.model_name
        return {"profile": self.profile, "settings": self.settings, "task": {k: v.origin | {"items": len(v)} for k, v in self.task.items()},
                "model": {"name": model, "fingerprint": self._base_key}, "device": device,
                "versions": {"python": platform.python_version()} | {name: version(name) for name in names}}

    # ---- base model -------------------------------------------------------------------------------------------------
    @cached_property
    def base_folder(self) -> Path:
        """The base model's checkpoint: a normal ``save_pretrained`` folder, with ``losses.json`` if trained here."""
        names = ("architecture", "width", "layers", "experts", "top_k", "expert_width", "tokenizer_kind", "vocab_size",
                 "pretrain_lines", "pretrain_steps", "pretrain_batch", "pretrain_lr")
        config = {n: self.settings[n] for n in names}
        config["data"] = fingerprint(world_file()) if self.task_name == "world" else fingerprint(list(self.task["train"]))

        def build(folder: Path) -> None:
            texts, words = learning_texts(self.task_name, self.task["train"], self.pretrain_lines)
            # often enough that a byte-pair tokenizer, too, makes each word one token
            tokenizer = models.train_tokenizer([*texts, *[f" {w}" for w in words] * 100], self.vocab_size, self.tokenizer_kind)
            shape = {n: self.settings[n] for n in ("width", "layers", "experts", "top_k", "expert_width")}
            model = models.build_model(models.tiny_config(self.architecture, len(tokenizer), **shape), seed=0)
            losses = []
            if self.pretrain_steps:
                losses = train.pretrain(model, tokenizer, texts, steps=self.pretrain_steps, batch_size=self.pretrain_batch,
                                        lr=self.pretrain_lr)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            atomic_write(folder / "losses.json", json.dumps(losses))

        return self.store.folder("base", config, build, modules=TRAINING)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base()[1]

    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A fresh copy of the base model, with its tokenizer."""
        where = self.base_folder if self.embedded else self.model_name
        return self._copied(where, lambda: models.load_model(where, dtype=self.dtype, device_map=self.device_map))

    def _copied(self, folder: Path | str, load: Callable):
        """What ``load()`` reads from a folder; an embedded model, small and wanted hundreds of times, is read once and copied."""
        if not self.embedded:
            return load()
        key = str(folder), self.dtype
        if key not in self._read:
            self._read[key] = load()
        return copy.deepcopy(self._read[key])

    @cached_property
    def _base_key(self) -> str:
        if self.embedded:
            return self.base_folder.name
        folder = Path(self.model_name)
        if folder.is_dir():
            return fingerprint(folder)
        config = self.base()[0].config
        return f"{self.model_name}@{getattr(config, '_commit_hash', None)}"

    # ---- MAP --------------------------------------------------------------------------------------------------------
    def _map_config(self, seed: int, epochs: int | None, size: int | None) -> dict:
        names = ("method", "batch_size", "lr", "weight_decay", "dtype")
        return {n: self.settings[n] for n in names} | {
            # the data first: where they are missing, that is known before a large model is loaded
            "data": self.data_key, "base": self._base_key, "seed": seed, "epochs": self.epochs if epochs is None else epochs,
            "size": (n := len(self.train_items(seed, size))),
            # metrics after every epoch, for the study's own set; elsewhere the end is enough
            "every_epoch": self.curves and self.embedded and n == len(self.train_items(seed)),
            "members": self.members,
        }

    def map_folder(self, seed: int, *, epochs: int | None = None, size: int | None = None) -> Path:
        """A fine-tuned checkpoint (or LoRA adapter); ``history.json``: after every epoch, the metrics on the
        fine-tuning set and on the test set (for the curves of chapter 1; nothing is chosen by them); ``checkpoints.safetensors``: the
        weights after the ``members - 1`` epochs before the last."""
        config = self._map_config(seed, epochs, size)

        def build(folder: Path) -> None:
            model, _ = self.base()
            if config["method"] == "lora":
                model = train.add_lora(model, seed=seed)
            items = self.train_items(seed, size)
            history, kept = [], {}

            def score(epoch: int) -> None:
                splits = {"train": items, "test": self.task["test"]}
                scores = {k: predict(model, self.loader(v), progress=False).summary() for k, v in splits.items()}
                history.append({"epoch": epoch} | scores)

            def after_epoch(epoch: int) -> None:
                if config["every_epoch"]:
                    score(epoch)
                if 0 < config["epochs"] - epoch < config["members"]:
                    kept.update({f"{epoch}/{k}": v.detach().to("cpu", copy=True) for k, v in train.adapted_weights(model).items()})

            if config["every_epoch"]:
                score(0)
            train.fine_tune(model, self.loader(items, batch_size=self.batch_size, shuffle=True, seed=seed),
                            epochs=config["epochs"], lr=self.lr, weight_decay=self.weight_decay, seed=seed,
                            after_epoch=after_epoch)
            if not config["every_epoch"]:
                score(config["epochs"])
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save_file(kept, folder / "checkpoints.safetensors")
            atomic_write(folder / "history.json", json.dumps(history))

        return self.store.folder("map", config, build, modules=(*TRAINING, "metrics"))

    def map_history(self, seed: int, **which) -> list[dict]:
        """``[{"epoch", "train": summary, "test": summary}, ...]`` of a MAP model's training."""
        return json.loads((self.map_folder(seed, **which) / "history.json").read_text())

    def map_checkpoints(self, seed: int, **which) -> list[dict[str, torch.Tensor]]:
        """The weights that fine-tuning trains, by name, after each of the last epochs before the MAP model's own, in their order."""
        states: dict[int, dict] = {}
        for name, value in load_file(self.map_folder(seed, **which) / "checkpoints.safetensors").items():
            epoch, _, parameter = name.partition("/")
            states.setdefault(int(epoch), {})[parameter] = value
        return [states[epoch] for epoch in sorted(states)]

    def map_model(self, seed: int, **which) -> nn.Module:
        """The MAP model of a seed, optionally for other ``epochs`` or another training-set ``size``."""
        folder = self.map_folder(seed, **which)

        def load() -> nn.Module:
            if self.method == "lora":
                return PeftModel.from_pretrained(self.base()[0], folder).eval()
            return models.load_model(folder, dtype=self.dtype, device_map=self.device_map)[0]

        return self._copied(folder, load)

    # ---- predictions ------------------------------------------------------------------------------------------------
    def predictions(self, name: str, split: str, config: Mapping, predictor: Callable[[], Callable | nn.Module], *,
                    items: int | None = None, batch_size: int | None = None, modules: tuple[str, ...] = TRAINING) -> Predictions:
        """Predictions on a split (its first ``items``) under a key: ``config`` must hold all that determines them beside the data.

        ``predictor()`` makes the model or callable; it is called only where the predictions are not there yet.
        """
        key = {"name": name, "split": split, "data": self.data_key, **config} | ({"items": items} if items else {})

        def build(folder: Path) -> None:
            predict(predictor(), self.loader(self.task[split].subset(items), batch_size=batch_size)).save(folder / "predictions.safetensors")

        folder = self.store.folder("predictions", key, build, modules=(*modules, "evaluate", "metrics"))
        return Predictions.load(folder / "predictions.safetensors")

    def base_predictions(self, split: str = "test") -> Predictions:
        return self.predictions("base", split, {"base": self._base_key}, lambda: self.base()[0])

    def map_predictions(self, seed: int, split: str = "test", **which) -> Predictions:
        config = {"map": self.map_folder(seed, **which).name}
        return self.predictions("map", split, config, lambda: self.map_model(seed, **which))

    def temperature_predictions(self, seed: int, split: str = "test") -> tuple[Predictions, float]:
        """Temperature scaling of the MAP model, the temperature fitted on the validation split; and the temperature."""
        validation, mine = self.map_predictions(seed, "validation"), self.map_predictions(seed, split)
        temperature = fit_temperature(validation.logits, validation.labels)
        return Predictions(softmax(mine.logits, temperature), mine.labels, p_star=mine.p_star), temperature

    # ---- expert Laplace ---------------------------------------------------------------------------------------------
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
        return ExpertLaplace.load(self.store.folder("laplace", config, build, modules=POSTERIOR) / "posterior", model)

    def tuned_laplace(self, seed: int, *, tune: str = "marglik", granularity: str = "layer", **which) -> ExpertLaplace:
        """:meth:`laplace` with its prior precision tuned: by the evidence, or by NLL on the validation split."""
        la = self.laplace(seed, **which)
        which.pop("model", None)

        def compute() -> dict:
            val = self.loader(self.task["validation"]) if tune == "val_nll" else None
            return {"prior_precision": la.optimize_prior_precision(tune, granularity, val_loader=val)}

        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "tune": tune, "granularity": granularity}
        la.prior_precision = self.store.arrays("prior", config | which, compute, modules=POSTERIOR)["prior_precision"]
        return la

    def laplace_predictions(self, seed: int, split: str = "test", *, link_approx: str = "mc", items: int | None = None, **which) -> Predictions:
        """Predictions of :meth:`tuned_laplace` with its options on a split (its first ``items``)."""
        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "tune": "marglik", "granularity": "layer",
                  "link": link_approx, "samples": self.mc_samples}

        def predictor() -> Callable:
            la = self.tuned_laplace(seed, **which)
            captured = self._capturer(la, config["map"], split, items)
            return lambda batch: la(batch, link_approx, self.mc_samples, captured(batch))

        return self.predictions("laplace", split, config | which, predictor, items=items, modules=POSTERIOR)

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

    # ---- baselines --------------------------------------------------------------------------------------------------
    def baseline_predictions(self, seed: int, name: str, split: str = "test", *, items: int | None = None, size: int | None = None,
                             **options) -> Predictions:
        """Predictions of a baseline (:data:`comparison.NAMES`) on a split (its first ``items``), fitted as the seed's MAP model is, on
        its fine-tuning set of ``size`` items. ``options``: other settings than those of :func:`comparison.settings`."""
        run = comparison.Run(self, seed, name, comparison.settings(self, name, options), size, BASELINES)
        return self.predictions("baseline", split, run.key | {"options": run.options}, run.predictor, items=items,
                                batch_size=self.router_batch, modules=BASELINES)

    # ---- against the exact posterior --------------------------------------------------------------------------------
    def covariances(self, seed: int, precision: float, structure: str = "kron", **options) -> torch.Tensor:
        """Predictive covariances ``[exact_items, C, C]`` of the first test items at one prior precision, each posterior
        fitted on the first ``exact_fit`` items of the fine-tuning set.

        ``structure``: ``joint``, the dense GGN posterior over all experts together (:mod:`bmoe_utils.exact`); ``prior``, no
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

        return self.store.arrays("covariance", config, compute, modules=(*POSTERIOR, "exact"))["covariance"]

    # ---- routers ----------------------------------------------------------------------------------------------------
    def map_routers(self, seed: int, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """Router name -> weight of the seed's MAP model after its routers have been trained further, all else frozen."""
        config = self._router_config(seed, "validation_nll") | {"epochs": self.router_epochs}

        def compute() -> dict:
            return tune_routers(model or self.map_model(seed), self._router_loader(seed), self._router_validation(), **self._loop(seed))

        return self.store.arrays("map_routers", config, compute, modules=ROUTING)

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
                resume = self.store.root / "unfinished" / fingerprint(config | {"code": code_version(ROUTING)})[:12]
                if fitted:
                    routers.fit(self._router_loader(seed), self._router_validation(), checkpoint=resume, **loop)
                routers.save(folder / "routers")

        routers = Routers.load(self.store.folder("routers", config, build, modules=ROUTING) / "routers", model)
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

        return self.predictions("routers", split, config, predictor, items=self.router_items, batch_size=self.router_batch,
                                modules=ROUTING)

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

        return self.store.arrays("stability", config, compute, modules=(*ROUTING, "stability"))["jaccard"]

    def noisy_predictions(self, seed: int, gamma: float, where: str) -> Predictions:
        """The MAP model's predictions on the first ``noise_items`` test questions under noise (:func:`stability.perturbed`)."""
        config = {"map": self.map_folder(seed).name, "gamma": gamma, "where": where}

        def predictor() -> Callable:
            model = self.map_model(seed)
            numbers = count()

            def predict_noisily(batch: Mapping) -> torch.Tensor:
                with torch.no_grad(), perturbed(model, batch["attention_mask"], gamma, where, seed * 100_003 + next(numbers)):
                    return models.option_logits(model, batch).softmax(-1)

            return predict_noisily

        return self.predictions("noisy", "test", config, predictor, items=self.noise_items, modules=(*ROUTING, "stability"))

    def susceptible_layers(self, seed: int, temperature: float = 1.0) -> list[int]:
        """The third of the MoE layers (at least one) whose answers' validation NLL moves most when that layer alone samples its
        experts at ``temperature``, in the model's order."""
        plain = self.router_predictions(seed, "deterministic", "validation").summary()["nll"]
        number = len(find_routers(self.map_model(seed)))
        moved = [abs(self.router_predictions(seed, "temperature", "validation", layers=[i], temperature=temperature).summary()["nll"] - plain)
                 for i in range(number)]
        return sorted(sorted(range(number), key=lambda i: -moved[i])[: max(1, number // 3)])

    # ---- both posteriors --------------------------------------------------------------------------------------------
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

        return self.store.arrays("joint_grid", config, compute, modules=BOTH)

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

        return self.store.arrays("joint_logits", config, compute, modules=BOTH)

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

        return self.predictions("joint", split, config, predictor, items=which["items"], batch_size=self.router_batch, modules=BOTH)
