"""The data of a study: a task's splits, what a seed is fine-tuned on, and batches of it."""

from __future__ import annotations

from functools import cached_property

from ...data.tasks import Split, draw, load_task, make_loader
from ...storage import fingerprint


class Data:
    """What every stage rests on. The settings are those of :class:`~bmoe_utils.study.study.Study`."""

    @property
    def embedded(self) -> bool:
        """Whether the base model is the study's own small one."""
        return self.model_name is None
    @cached_property
    def task(self) -> dict[str, Split]:
        """The task's splits; ``test_size`` keeps the first so many of every split that is only evaluated on."""
        # letters are what the papers use on large models, whose tokenizers cut many an option's word into pieces
        readout = self.readout or (None if self.embedded else "letters")
        splits = load_task(self.task_name, readout=readout, answer_base=self.answer_base)
        return {k: v if k in ("train", "validation") else v.subset(self.test_size) for k, v in splits.items()}

    @cached_property
    def data_key(self) -> str:
        """Fingerprint of every question of the task and of how they are read out."""
        layout = {"readout": self.task["train"].readout, "max_length": self.max_length, **self._chat()}
        return fingerprint({k: list(v) for k, v in self.task.items()} | layout)

    @property
    def shifts(self) -> list[str]:
        """The splits beside train, validation and test."""
        return [k for k in self.task if k not in ("train", "validation", "test")]

    def train_items(self, seed: int, size: int | None = None) -> Split:
        """The fine-tuning set of a seed: ``size`` (default ``train_size``) items drawn from the pool; nested in size."""
        return draw(self.task["train"], seed, self.train_size if size is None else size)

    def loader(self, items: Split, *, batch_size: int | None = None, **options):
        return make_loader(items, self.tokenizer, batch_size=batch_size or self.eval_batch, max_length=self.max_length, **self._chat(),
                           **options)

    def _chat(self) -> dict:
        return {name: self.settings[name] for name in ("chat", "chat_template_kwargs", "assistant_prefix")}
