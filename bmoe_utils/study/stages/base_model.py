"""The base model: the study's own small one, trained here, or a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.tasks import learning_texts
from ...data.world import world_file
from ...models import checkpoints, embedded, loading, training
from ...storage import atomic_write, fingerprint
from .data import Data


class BaseModel(Data):
    """Stage 1."""

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
            tokenizer = embedded.train_tokenizer([*texts, *[f" {w}" for w in words] * 100], self.vocab_size, self.tokenizer_kind)
            shape = {n: self.settings[n] for n in ("width", "layers", "experts", "top_k", "expert_width")}
            model = embedded.build_model(embedded.tiny_config(self.architecture, len(tokenizer), **shape), seed=0)
            losses = []
            if self.pretrain_steps:
                losses = training.pretrain(model, tokenizer, texts, steps=self.pretrain_steps, batch_size=self.pretrain_batch,
                                        lr=self.pretrain_lr)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            atomic_write(folder / "losses.json", json.dumps(losses))

        return self.store.folder("base", config, build)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base()[1]

    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A fresh copy of the base model, with its tokenizer."""
        where = self.base_folder if self.embedded else self.model_name
        return self._copied(where, lambda: loading.load_model(where, dtype=self.dtype, device_map=self.device_map))

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
        """What the base model is: a folder's content, a hub id with its commit, and of an adapter that of its own base too."""
        if self.embedded:
            return self.base_folder.name
        name, revision, keys = self.model_name, None, []
        while True:
            folder = checkpoints.require(name, revision)
            if folder is None:  # on the hub, and not here yet
                loading.load_model(name, dtype=self.dtype, device_map=self.device_map, revision=revision)
            keys.append(fingerprint(folder) if Path(name).is_dir() else f"{name}@{checkpoints.commit(name, revision)}")
            if folder is None or not checkpoints.is_adapter(folder):
                return "+".join(keys)
            name, revision = checkpoints.base_of(folder)
