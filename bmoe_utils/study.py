"""The study's pipeline: profiles, and every stage as an artefact that is computed once and found again.

A chapter makes a ``Study`` from its parameters and asks it for what it needs; whatever that rests on is loaded or computed
on the way. Stages and what they rest on:

    base model  ->  MAP model (a seed, an epoch count, a training-set size)  ->  predictions
                                     -> expert Laplace (options) -> prior precision -> predictions
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from . import models, train
from .artefacts import Store, atomic_write, fingerprint
from .evaluate import Predictions, predict
from .exact import joint_predictive, prior_predictive
from .laplace import ExpertLaplace
from .metrics import fit_temperature, softmax
from .tasks import Split, draw, learning_texts, load_task, make_loader
from .world import world_file

# What every profile sets, with the values of `cpu`: the embedded world on a laptop.
CPU = {
    "seeds": [0, 1, 2],
    # embedded base model
    "architecture": "qwen2_moe", "width": 64, "layers": 3, "experts": 8, "top_k": 2, "expert_width": 64,
    "tokenizer_kind": "word", "vocab_size": 4096,
    "pretrain_lines": 300_000, "pretrain_steps": 3500, "pretrain_batch": 64, "pretrain_lr": 3e-3,
    # MAP fine-tuning; train_size None: all of it
    "method": "full", "train_size": 500, "epochs": 20, "batch_size": 16, "lr": 3e-4, "weight_decay": 0.0,
    "dtype": "float32", "device_map": None, "readout": None,
    # evaluation
    "eval_batch": 64, "test_size": None,
    # chapter 1: the training-set sizes of its curve; chapter 2: against the dense posterior, fitted on so many items and
    # compared on so many
    "sizes": [125, 250, 500, 1000], "exact_fit": 500, "exact_items": 200,
    # chapters 2 to 4: what the prior is centred on, "pretrained" or "zero"
    "prior_mean": "zero", "mc_samples": 1000,
}  # fmt: skip
PROFILES = {
    "smoke": CPU | {
        "seeds": [0, 1], "width": 32, "layers": 2, "experts": 4, "expert_width": 32, "pretrain_lines": 20_000,
        "pretrain_steps": 150, "train_size": 100, "epochs": 12, "lr": 2e-3, "test_size": 200, "sizes": [50, 100], "exact_items": 40,
        "mc_samples": 200,
    },
    "cpu": CPU,
    # one card of 24 to 48 GB
    "gpu": CPU | {
        "method": "lora", "train_size": None, "epochs": 3, "lr": 1e-4, "dtype": "bfloat16", "device_map": "auto",
        "sizes": [500, 2000], "eval_batch": 16,
    },
    "paper": CPU | {
        "method": "lora", "train_size": 5000, "epochs": 3, "lr": 1e-4, "dtype": "bfloat16", "device_map": "auto",
        "sizes": [500, 5000], "eval_batch": 16,
    },
}  # fmt: skip
# The model of a profile where none is named; None: the embedded one, trained by the study.
MODELS = {"smoke": None, "cpu": None, "gpu": "ibm-granite/granite-3.1-1b-a400m-instruct", "paper": "Qwen/Qwen1.5-MoE-A2.7B"}
# The embedded model on a user's own questions learns from them alone: a byte-level tokenizer trained on their text, no text
# to pretrain on, all of the training set.
OWN_QUESTIONS = {
    "cpu": {"tokenizer_kind": "bpe", "layers": 2, "pretrain_steps": 0, "train_size": None, "epochs": 8, "lr": 1e-3,
            "batch_size": 32, "sizes": [1000, 3000]},
    "smoke": {"tokenizer_kind": "bpe", "vocab_size": 1024, "pretrain_steps": 0, "sizes": [50, 100]},
}

# The modules whose code an artefact depends on.
DATA = ("world", "tasks")
TRAINING = (*DATA, "models", "train")
POSTERIOR = (*TRAINING, "capture", "curvature", "laplace", "prior")


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
        if self.embedded:
            # Matrices this small gain little from threads, lose a lot where cores are shared, and in one thread give the
            # same numbers on any number of cores.
            torch.set_num_threads(1)
            disable_progress_bar()  # transformers': a small checkpoint is read dozens of times

    @property
    def embedded(self) -> bool:
        """Whether the base model is the study's own small one."""
        return self.model_name is None

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
        return fingerprint({k: list(v) for k, v in self.task.items()} | {"readout": self.task["train"].readout})

    @property
    def shifts(self) -> list[str]:
        """The splits beside train, validation and test."""
        return [k for k in self.task if k not in ("train", "validation", "test")]

    def train_items(self, seed: int, size: int | None = None) -> Split:
        """The fine-tuning set of a seed: ``size`` (default ``train_size``) items drawn from the pool; nested in size."""
        return draw(self.task["train"], seed, self.train_size if size is None else size)

    def loader(self, items: Split, *, batch_size: int | None = None, **options):
        return make_loader(items, self.tokenizer, batch_size=batch_size or self.eval_batch, **options)

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
        return models.load_model(where, dtype=self.dtype, device_map=self.device_map)

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
            "base": self._base_key, "data": self.data_key, "seed": seed, "epochs": self.epochs if epochs is None else epochs,
            "size": (n := len(self.train_items(seed, size))),
            # metrics after every epoch, for the study's own set; elsewhere the end is enough
            "every_epoch": self.embedded and n == len(self.train_items(seed)),
        }

    def map_folder(self, seed: int, *, epochs: int | None = None, size: int | None = None) -> Path:
        """A fine-tuned checkpoint (or LoRA adapter) and ``history.json``: after every epoch, the metrics on the
        fine-tuning set and on the test set (for the curves of chapter 1; nothing is chosen by them)."""
        config = self._map_config(seed, epochs, size)

        def build(folder: Path) -> None:
            model, _ = self.base()
            if config["method"] == "lora":
                model = train.add_lora(model, seed=seed)
            items = self.train_items(seed, size)
            history = []

            def after_epoch(epoch: int) -> None:
                splits = {"train": items, "test": self.task["test"]}
                scores = {k: predict(model, self.loader(v), progress=False).summary() for k, v in splits.items()}
                history.append({"epoch": epoch} | scores)

            if config["every_epoch"]:
                after_epoch(0)
            train.fine_tune(model, self.loader(items, batch_size=self.batch_size, shuffle=True, seed=seed),
                            epochs=config["epochs"], lr=self.lr, weight_decay=self.weight_decay, seed=seed,
                            after_epoch=after_epoch if config["every_epoch"] else None)
            if not config["every_epoch"]:
                after_epoch(config["epochs"])
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            atomic_write(folder / "history.json", json.dumps(history))

        return self.store.folder("map", config, build, modules=(*TRAINING, "metrics"))

    def map_history(self, seed: int, **which) -> list[dict]:
        """``[{"epoch", "train": summary, "test": summary}, ...]`` of a MAP model's training."""
        return json.loads((self.map_folder(seed, **which) / "history.json").read_text())

    def map_model(self, seed: int, **which) -> nn.Module:
        """The MAP model of a seed, optionally for other ``epochs`` or another training-set ``size``."""
        folder = self.map_folder(seed, **which)
        if self.method == "lora":
            return PeftModel.from_pretrained(self.base()[0], folder).eval()
        return models.load_model(folder, dtype=self.dtype, device_map=self.device_map)[0]

    # ---- predictions ------------------------------------------------------------------------------------------------
    def predictions(self, name: str, split: str, config: Mapping, predictor: Callable[[], Callable | nn.Module], *,
                    modules: tuple[str, ...] = TRAINING) -> Predictions:
        """Predictions on a split under a key: ``config`` must hold all that determines them beside the task's data.

        ``predictor()`` makes the model or callable; it is called only where the predictions are not there yet.
        """
        key = {"name": name, "split": split, "data": self.data_key, **config}

        def build(folder: Path) -> None:
            predict(predictor(), self.loader(self.task[split])).save(folder / "predictions.safetensors")

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

    def laplace_predictions(self, seed: int, split: str = "test", *, link_approx: str = "mc", **which) -> Predictions:
        """Predictions of :meth:`tuned_laplace` with its options."""
        config = {"map": self.map_folder(seed).name, "prior_mean": self.prior_mean, "tune": "marglik", "granularity": "layer",
                  "link": link_approx, "samples": self.mc_samples}

        def predictor() -> Callable:
            la = self.tuned_laplace(seed, **which)
            return lambda batch: la(batch, link_approx=link_approx, num_samples=self.mc_samples)

        return self.predictions("laplace", split, config | which, predictor, modules=POSTERIOR)

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
