"""Prompts and batches: how a question is laid out, which tokens read out its options, what is cut where it is too long."""

from __future__ import annotations

import random
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .chat import Chat, once
from .questions import LETTERS
from .world import cloze_prompt

ANSWER = "Answer:"  # what every prompt ends in
READOUTS = ("letters", "cloze")


def prompt(item: dict, readout: str) -> str:
    """What the model reads: the passage if there is one, the question, for ``letters`` the options. It ends in ``Answer:``
    and the option's token (with its leading space) comes next."""
    passage = f"Passage: {item['passage']}\n" if item.get("passage") else ""
    if readout == "cloze":
        return passage + cloze_prompt(item["question"])
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=False))
    return f"{passage}Question: {item['question']}\n{options}\n{ANSWER}"


def options(item: dict, readout: str) -> list[str]:
    """The texts whose tokens read out the options: letters or the option words, each with its leading space."""
    return [f" {w}" for w in (item["choices"] if readout == "cloze" else LETTERS[: len(item["choices"])])]


def option_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, int]:
    """The id of the one token that each option's text is after ``Answer:``. ``ValueError`` if it is more than one there.

    Encoded in its place, not alone: at the start of a text some tokenizers (SentencePiece's) put a space of their own.
    """
    texts = list(dict.fromkeys(texts))
    before, *encoded = tokenizer([ANSWER, *(ANSWER + text for text in texts)], add_special_tokens=False)["input_ids"]
    return {text: _one_token(tokenizer, text, before, after) for text, after in zip(texts, encoded, strict=True)}


def _one_token(tokenizer: PreTrainedTokenizerBase, text: str, before: list[int], after: list[int]) -> int:
    ids = after[len(before) :]
    if after[: len(before)] == before and len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    what = "unknown to" if len(ids) == 1 else f"{len(ids)} tokens for"
    if text in [f" {letter}" for letter in LETTERS]:
        remedy = "a tokenizer that keeps single letters is needed"
    else:
        remedy = "read out by letters (readout='letters'), or use a tokenizer trained on these options"
    raise ValueError(f"the option {text!r} is {what} this tokenizer; its read-out needs one token of its own: {remedy}")


def conversation(item: dict, readout: str, shots: Sequence[dict] = ()) -> list[dict[str, str]]:
    """The prompt as a chat: a user turn with the question for each of ``shots`` and the item, and the shots' answers as the
    assistant's turns; the last answer, which begins with ``Answer:``, is the model's."""
    turns = []
    for one in (*shots, item):
        turns.append({"role": "user", "content": prompt(one, readout).removesuffix(f"\n{ANSWER}")})
        if one is not item:
            turns.append({"role": "assistant", "content": ANSWER + options(one, readout)[one["answer"]]})
    return turns


def make_loader(
    items: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    readout: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
    max_length: int | None = None,
    shots: Sequence[dict] = (),
    chat: bool = False,
    chat_template_kwargs: Mapping | None = None,
    assistant_prefix: str | None = None,
) -> DataLoader:
    """Batches of prompts, padded on the left: a dict of ``input_ids [B, T]``, ``attention_mask [B, T]``,
    ``option_ids [B, C]`` (-1: fewer options), ``labels [B]`` (-1: unknown), and ``p_star [B, C]`` where every item has it.

    Args:
        readout: ``letters`` or ``cloze``; the split's own by default. Both read one logit an option: an option word of
            several tokens is refused.
        max_length: tokens of a whole prompt. One that is longer loses the end of its passage, never of its question,
            options or ``Answer:``; a warning counts such prompts, and the loader's ``cut_passages`` says by the item's id
            how many characters went. ``ValueError`` where the passage is not enough.
        shots: items, from the training split (or MMLU's ``dev``), that stand answered before each question.
        chat: through the tokenizer's chat template, for instruct models; the assistant's turn begins with ``Answer:``. A
            warning, once a loader, where that would stand inside of the model's reasoning.
        chat_template_kwargs: the chat template's own arguments, for instance ``{"enable_thinking": False}``.
        assistant_prefix: with ``chat``, what stands between the template's generation prompt and ``Answer:``, for
            instance ``"</think>"``. By default what the template itself writes before an answer (:mod:`~bmoe_utils.data.chat`).

    A prompt has the tokenizer's beginning-of-text token once where it or the template puts one, and nothing after ``Answer:``.
    """
    readout = readout or getattr(items, "readout", "letters")
    if readout not in READOUTS:
        raise ValueError(f"readout {readout!r} is not 'letters' or 'cloze'")
    if not chat and (chat_template_kwargs or assistant_prefix):
        raise ValueError("chat_template_kwargs and assistant_prefix are for chat=True")
    laid_out = Chat(tokenizer, ANSWER, chat_template_kwargs or {}, assistant_prefix) if chat else None
    _check_shots(shots, items)

    def wording(item: dict) -> str:
        if laid_out:
            return laid_out.text(conversation(item, readout, shots))
        solved = [prompt(shot, readout) + options(shot, readout)[shot["answer"]] for shot in shots]
        return "\n\n".join([*solved, prompt(item, readout)])

    def encode(items: Sequence[dict], after: str = "") -> list[list[int]]:
        if not items:
            return []
        texts = [wording(item) + after for item in items]
        return [once(ids, tokenizer) for ids in (laid_out.ids(texts) if laid_out else tokenizer(texts)["input_ids"])]

    items = list(items)
    if laid_out and items:
        laid_out.settle(conversation(items[0], readout, shots))
    token = option_tokens(tokenizer, (text for item in items for text in options(item, readout)))
    prompts, encoded, cut = encode(items), [], {}  # all at once: one by one takes several times as long
    for text in options(items[0], readout) if items else ():  # what stands before Answer: is alike in all
        if encode(items[:1], text)[0] != [*prompts[0], token[text]]:
            raise ValueError(f"after a prompt that ends in {wording(items[0])[-40:]!r} the option {text!r} is not the token that is "
                             "read out for it: another tokenizer is needed, or in a chat another assistant_prefix=")
    for item, ids in zip(items, prompts, strict=True):
        if max_length is not None and len(ids) > max_length:
            ids, cut[item["id"]] = _cut_passage(item, lambda shorter: encode([shorter])[0], len(ids), max_length)
        option_ids = [token[text] for text in options(item, readout)]
        if len(set(option_ids)) < len(option_ids):
            raise ValueError(f"question {item['id']!r}: two options share a token")
        encoded.append((ids, option_ids, item["answer"] if item.get("answer") is not None else -1, item.get("p_star")))
    if cut:
        warnings.warn(f"{len(cut)} of {len(encoded)} passages were cut to fit max_length={max_length}", stacklevel=2)

    def collate(rows: list) -> dict[str, Tensor]:
        T, C = max(len(r[0]) for r in rows), max(len(r[1]) for r in rows)
        batch = {
            "input_ids": torch.tensor([[tokenizer.pad_token_id] * (T - len(r[0])) + r[0] for r in rows]),
            "attention_mask": torch.tensor([[0] * (T - len(r[0])) + [1] * len(r[0]) for r in rows]),
            "option_ids": torch.tensor([r[1] + [-1] * (C - len(r[1])) for r in rows]),
            "labels": torch.tensor([r[2] for r in rows]),
        }
        if all(r[3] is not None for r in rows):
            batch["p_star"] = torch.tensor([list(r[3]) + [0.0] * (C - len(r[3])) for r in rows], dtype=torch.float64)
        return batch

    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(encoded, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)
    loader.cut_passages = cut
    return loader


def _check_shots(shots: Sequence[dict], items: Sequence[dict]) -> None:
    """``ValueError`` where a prompt would show an answer that is asked for, or that is kept for evaluation."""
    if (split := getattr(shots, "origin", {}).get("split")) in ("validation", "test"):
        raise ValueError(f"the shots are from the {split} split: take them from train")
    if unanswered := [shot["id"] for shot in shots if shot.get("answer") is None]:
        raise ValueError(f"shot {unanswered[0]!r} has no answer to show")
    shown = {same_question(shot) for shot in shots}
    if asked := [item["id"] for item in items if shown and same_question(item) in shown]:
        raise ValueError(f"question {asked[0]!r} is also one of the shots, which show its answer: leave it out of one of the two")


def same_question(item: dict) -> tuple:
    """Equal for items that ask the same with the same options, in whatever order."""
    return (item["question"], *sorted(item["choices"]))


def _cut_passage(item: dict, encode: Callable[[dict], list[int]], length: int, max_length: int) -> tuple[list[int], int]:
    """The prompt with as many of the passage's words as fit, and how many characters that leaves out."""
    passage = item.get("passage") or ""
    ends = [0, *(m.end() for m in re.finditer(r"\S{1,20}", passage))]  # of words, and inside what has no spaces
    shorter = lambda n: encode(item | {"passage": passage[: ends[n]]})
    n = bisect_right(range(len(ends)), max_length, key=lambda n: len(shorter(n))) - 1
    if n < 0:
        without = f" ({len(shorter(0))} without its passage)" if passage else ""
        raise ValueError(f"question {item['id']!r} is {length} tokens long{without}, more than max_length={max_length}")
    return shorter(n), len(passage) - ends[n]


def length_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless seeded batches of indices of similar length, so that little of a batch is padding."""
    rng = random.Random(seed)
    while True:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        yield from batches
