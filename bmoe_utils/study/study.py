"""The study's pipeline: one profile on one task and model, and every stage as an artefact that is computed once and found again.

A chapter makes a ``Study`` from its parameters and asks it for what it needs; whatever that rests on is loaded or computed
on the way. Stages and what they rest on:

    base model  ->  MAP model (a seed, an epoch count, a training-set size)  ->  predictions
                                     -> expert Laplace (options) -> prior precision -> predictions
                                     -> baselines (name, options) -> predictions
                                     -> MAP routers -> Bayesian routers (method, options) -> predictions, stability
                                     -> both posteriors -> validation grid -> predictions

Each is a class in :mod:`bmoe_utils.study.stages`; this one only holds the settings.
"""

from __future__ import annotations

import gc
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version

import torch
from transformers.utils.logging import disable_progress_bar

from .profiles import MODELS, OWN_QUESTIONS, PROFILES
from .stages.baselines import Baselines
from .stages.joint import Joint
from .store import Store


class Study(Joint, Baselines):
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

    def claim_process(self) -> None:
        """Makes this process the study's own, for good: for a chapter or a script, whose process it is, never for a library.

        With the embedded model: one thread (matrices this small gain little from more, lose a lot where cores are shared, and in
        one thread give the same numbers on any number of cores); Python's garbage collector need not walk what the libraries
        brought, and comes less often (a sixth of the time of training so small a model); and no progress bars of transformers,
        which reads a small checkpoint dozens of times.
        """
        # peft still reads a property that transformers has renamed; nobody here can act on it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        if not self.embedded:
            return
        torch.set_num_threads(1)
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            gc.set_threshold(10_000, *gc.get_threshold()[1:])
        disable_progress_bar()

    def regime(self, name: str) -> Study:
        """The same study under one of its MAP regimes (``study.regimes``)."""
        if name not in self.regimes:
            raise ValueError(f"unknown regime {name!r}; there are: {', '.join(self.regimes)}")
        return self._changed(self.regimes[name])

    def _changed(self, settings: Mapping) -> Study:
        """The same study, data and base model under other settings, which must not concern those."""
        other = type(self)(self.profile, task=self.task_name, model=self.model_name, overrides=self.settings | dict(settings), store=self.store)
        vars(other).update({k: v for k, v in vars(self).items() if k in ("task", "data_key", "base_folder", "tokenizer", "_base_key", "_read")})
        return other

    def sized(self, size: int) -> Study:
        """The same study fine-tuned on ``size`` items; without metrics epoch by epoch, as ``map_model(seed, size=size)`` is trained."""
        return self._changed({"train_size": size, "curves": False})

    def provenance(self) -> dict:
        """What this study's results rest on, JSON values to write beside them: settings, origin of every split, model, versions, device."""
        names = ("torch", "transformers", "peft", "datasets", "tokenizers", "numpy", "scikit-learn")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        model = "embedded" if self.embedded else self.model_name
        return {"profile": self.profile, "settings": self.settings, "task": {k: v.origin | {"items": len(v)} for k, v in self.task.items()},
                "model": {"name": model, "fingerprint": self._base_key}, "device": device,
                "versions": {"python": platform.python_version()} | {name: version(name) for name in names}}
