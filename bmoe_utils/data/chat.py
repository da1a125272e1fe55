"""Where an answer goes in a chat: after the tokenizer's own template, with what that writes before
an answer's text.

A template's *generation prompt* is what a model is given to go on from. In some it is less than
what stands before an answer (Harmony's ends in the role, and the header of the final channel has to
follow; Mistral's lacks a space; Qwen3's lacks the empty reasoning), in others more (DeepSeek-R1's
opens the reasoning). Both are asked of the template itself, by having it lay out an answer that is
given.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

OURS = {
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
}
REASONING = re.compile(
    r"[<\[]\|?(/?)(?:think|thinking|thought|thoughts|reasoning|reason|analysis)\|?[>\]]",
    re.IGNORECASE,
)


@dataclass
class Chat:
    """The layout of a conversation up to an answer that begins with ``begins``. ``options``: the
    template's own arguments (``enable_thinking=False``). ``prefix``: what stands between the
    generation prompt and the answer; None: what the template writes there. ``ValueError`` without a
    template, or for an option that is not the template's."""

    tokenizer: PreTrainedTokenizerBase
    begins: str
    options: Mapping = field(default_factory=dict)
    prefix: str | None = None

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template: chat=True is for instruct models"
            )
        if ours := sorted(OURS & set(self.options)):
            raise ValueError(
                f"chat_template_kwargs cannot set {', '.join(ours)}: that is decided here"
            )

    def settle(self, turns: Sequence[Mapping[str, str]]) -> None:
        """Finds the prefix by a conversation like those that will be laid out. A warning where the
        answer would stand inside of the model's reasoning, or where the template's own answers
        begin otherwise."""
        before, otherwise = self._laid_out(turns), False
        if self.prefix is None:
            answered = self._answered(turns)
            otherwise = answered is not None and not answered.startswith(before)
            self.prefix = "" if answered is None or otherwise else answered[len(before) :]
        header = (before + self.prefix).rpartition(turns[-1]["content"].strip())[2]
        marks = list(REASONING.finditer(header))
        if marks and not marks[-1][1]:
            closed = re.sub(r"(\w)", r"/\1", marks[-1][0], count=1)
            warnings.warn(
                f"the prompt ends in open reasoning, {header[-40:]!r}, and {self.begins!r} would "
                f"stand inside of it: close it (assistant_prefix={closed!r}), or where the "
                "template can leave it out have it do so "
                "(chat_template_kwargs={'enable_thinking': False})",
                stacklevel=3,
            )
        elif otherwise and not marks:
            warnings.warn(
                f"the prompt ends in {header[-40:]!r}, but this template lays an answer out as "
                f"{answered[-40:] + self.begins!r}: say by assistant_prefix= what stands before it",
                stacklevel=3,
            )

    def text(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The conversation, up to the answer's beginning and with it."""
        return self._laid_out(turns) + (self.prefix or "") + self.begins

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens. Special tokens are the template's to write; only where the tokenizer's
        configuration asks for a token at the beginning (``add_bos_token``) and the template wrote
        none, it is added."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if bos is None or not getattr(self.tokenizer, "add_bos_token", False):
            return encoded
        return [ids if bos in ids[:2] else [bos, *ids] for ids in encoded]

    def _laid_out(self, turns: Sequence[Mapping[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True, **self.options
        )

    def _answered(self, turns: Sequence[Mapping[str, str]]) -> str | None:
        """What the template writes before the text of an answer that is given; None where it takes
        none."""
        answer = {"role": "assistant", "content": self.begins}
        try:
            text = self.tokenizer.apply_chat_template(
                [*turns, answer], tokenize=False, continue_final_message=True, **self.options
            )
        except (TemplateError, ValueError, TypeError):  # another order of roles, no text of answers
            return None
        return text.removesuffix(self.begins) if text.endswith(self.begins) else None


def once(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens with one token for the beginning, however many were put there, and none for
    the end."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(ids) > 1 and first is not None and ids[:2] == [first, first]:
        ids = ids[1:]
    return ids[:-1] if len(ids) > 1 and ids[-1] == last else ids
