"""The MAP model, fine-tuned from the base model, and the predictions of any model or method of the study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ...models import loading, training
from ...scores.metrics import fit_temperature, softmax
from ...scores.predictions import Predictions, predict
from ...storage import atomic_write
from .base_model import BaseModel


class MapModel(BaseModel):
    """Stage 2, on a base model, a seed, an epoch count and a training-set size."""

    def _map_config(self, seed: int, epochs: int | None, size: int | None) -> dict:
        names = ("method", "lora_targets", "batch_size", "lr", "weight_decay", "dtype")
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
                model = training.add_lora(model, seed=seed, target_modules=self.lora_targets)
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
                    kept.update({f"{epoch}/{k}": v.detach().to("cpu", copy=True) for k, v in training.adapted_weights(model).items()})

            if config["every_epoch"]:
                score(0)
            training.fine_tune(model, self.loader(items, batch_size=self.batch_size, shuffle=True, seed=seed),
                            epochs=config["epochs"], lr=self.lr, weight_decay=self.weight_decay, seed=seed,
                            after_epoch=after_epoch)
            if not config["every_epoch"]:
                score(config["epochs"])
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save_file(kept, folder / "checkpoints.safetensors")
            atomic_write(folder / "history.json", json.dumps(history))

        return self.store.folder("map", config, build)

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
            return loading.load_model(folder, dtype=self.dtype, device_map=self.device_map)[0]

        return self._copied(folder, load)

    # ---- predictions ------------------------------------------------------------------------------------------------
    def predictions(self, name: str, split: str, config: Mapping, predictor: Callable[[], Callable | nn.Module], *,
                    items: int | None = None, batch_size: int | None = None) -> Predictions:
        """Predictions on a split (its first ``items``) under a key: ``config`` must hold all that determines them beside the data.

        ``predictor()`` makes the model or callable; it is called only where the predictions are not there yet.
        """
        key = {"name": name, "split": split, "data": self.data_key, **config} | ({"items": items} if items else {})

        def build(folder: Path) -> None:
            predict(predictor(), self.loader(self.task[split].subset(items), batch_size=batch_size)).save(folder / "predictions.safetensors")

        folder = self.store.folder("predictions", key, build, code=(predictor,))
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
