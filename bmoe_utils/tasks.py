"""Questions: loading them, laying them out as prompts, and batching them with their options' tokens."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas
import pyarrow.parquet
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .world import build_splits, cloze_prompt, load_world, pretraining_lines

LETTERS = string.ascii_uppercase
VALIDATION_SHARE = 0.1


class Split(list):
    """A list of items ``{"id", "question", "choices": [...], "answer": int}`` (and ``"p_star"`` where it is known) that
    knows how its questions are read out: ``letters`` at ``Answer:``, or ``cloze``, the option's own word there."""

    def __init__(self, items: Sequence[dict], readout: str):
        super().__init__(items)
        self.readout = readout

    def subset(self, n: int | None) -> Split:
        """The first ``n`` items (all if None or more than there are)."""
        return Split(self[:n], self.readout)


def load_task(name: str | Path, *, seed: int = 0, readout: str | None = None) -> dict[str, Split]:
    """Splits of a task by name: ``"world"`` (the embedded one, with the true ``p_star``) or a folder of question files.

    A folder holds ``train`` and ``test`` (and ``validation``, else a seeded tenth of train is cut off for it; never the
    reverse) as ``.parquet``, ``.jsonl``, ``.json`` or ``.csv``, one row a question: ``question`` with ``choices`` and ``answer``
    (index, letter or text), or the hub's layouts of OpenBookQA, ARC and BoolQ. ``readout`` defaults to ``cloze`` where
    every option is one of a few recurring single words (yes / no), to ``letters`` elsewhere.
    """
    if str(name) == "world":
        return {k: Split(v, readout or "cloze") for k, v in build_splits(load_world(), seed=seed).items()}
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"task {str(name)!r} is neither 'world' nor a folder with train and test questions "
                         "(.parquet, .jsonl, .json or .csv)")
    splits = {}
    for split in ("train", "validation", "test"):
        files = [folder / f"{split}{ext}" for ext in (".parquet", ".jsonl", ".json", ".csv")]
        if found := [f for f in files if f.exists()]:
            splits[split] = read_questions(found[0])
    if missing := {"train", "test"} - set(splits):
        raise ValueError(f"{folder} has no {' and no '.join(sorted(missing))} file (.parquet, .jsonl, .json or .csv)")
    if "validation" not in splits:
        items = splits["train"]
        random.Random(seed).shuffle(items)
        cut = max(1, round(VALIDATION_SHARE * len(items)))
        same = lambda item: (item["question"], *sorted(item["choices"]))
        held = {same(item) for item in items[:cut]}  # a question asked twice goes to one side
        splits["validation"] = [item for item in items if same(item) in held]
        splits["train"] = [item for item in items if same(item) not in held]
    words = {c for item in splits["train"] for c in item["choices"]}
    readout = readout or ("cloze" if len(words) <= 10 and all(w.isalpha() for w in words) else "letters")
    return {k: Split(splits[k], readout) for k in ("train", "validation", "test")}


def read_questions(path: Path) -> list[dict]:
    """The items of one file. ``ValueError`` names file, row and fault of the first malformed rows; none is dropped."""
    rows, faults = [], []  # rows: (number, parsed row)
    if path.suffix == ".parquet":
        rows = list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    elif path.suffix == ".csv":  # as text: a reader that guesses types would turn answers into numbers and booleans
        table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        rows = list(enumerate(table.to_dict("records"), 1))
    else:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            try:
                rows = list(enumerate(json.loads(text), 1))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON: {error}") from None
        else:  # only newlines end a row: JSON strings may hold other line separators
            for number, line in enumerate(text.rstrip().split("\n"), 1):
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    faults.append((number, f"not JSON ({error})"))
    items = []
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a question is an object with fields, not {row!r}")
            name = row.get("id")
            items.append({"id": f"{path.stem}-{number:05d}" if name in (None, "") else str(name), **_item(row)})
        except (ValueError, KeyError, TypeError) as error:
            faults.append((number, f"no field {error}" if isinstance(error, KeyError) else str(error)))
    if not items and (not faults or not path.read_bytes().strip()):
        raise ValueError(f"{path} holds no question")
    if faults:
        shown = [f"row {number}: {reason}" for number, reason in sorted(faults)]
        shown = "\n  ".join(shown[:10]) + (f"\n  and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{path}: {len(faults)} malformed of {len(items) + len(faults)} questions\n  {shown}")
    return items


def _item(row: dict) -> dict:
    """One row in any of the known layouts -> question, choices and answer index."""
    question = row.get("question") or row.get("question_stem")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    choices = row.get("choices")
    labels = None
    if choices is None and isinstance(row["answer"], bool):  # BoolQ
        return {"question": question.strip(), "choices": ["no", "yes"], "answer": int(row["answer"])}
    if isinstance(choices, str):  # csv: choices as a JSON list
        choices = json.loads(choices)
    if isinstance(choices, dict):  # OpenBookQA, ARC: {"text": [...], "label": [...]}
        choices, labels = choices["text"], [str(x) for x in choices["label"]]
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} options")
    choices = [str(c).strip() for c in choices]
    if not all(choices):
        raise ValueError("an option is empty")
    answer = row["answerKey"] if "answerKey" in row else row["answer"]
    labels = labels or list(LETTERS[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    elif str(answer).strip() in labels:
        index = labels.index(str(answer).strip())
    elif choices.count(str(answer).strip()) == 1:
        index = choices.index(str(answer).strip())
    elif str(answer).strip().isdigit():
        index = int(answer)
    else:
        raise ValueError(f"answer {answer!r} is no index, letter or text of the options")
    if not 0 <= index < len(choices):
        raise ValueError(f"answer {answer!r} is not among the {len(choices)} options")
    if choices.count(choices[index]) > 1:  # a wrong option may be there twice (OpenBookQA has such rows), the right one not
        raise ValueError(f"the right option {choices[index]!r} is there twice")
    return {"question": question.strip(), "choices": choices, "answer": index}


def prompt(item: dict, readout: str) -> str:
    """What the model reads; it ends in ``Answer:`` and the option's token (with its leading space) comes next."""
    if readout == "cloze":
        return cloze_prompt(item["question"])
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=False))
    return f"Question: {item['question']}\n{options}\nAnswer:"


def options(item: dict, readout: str) -> list[str]:
    """The texts whose tokens read out the options: letters or the option words, each with its leading space."""
    return [f" {w}" for w in (item["choices"] if readout == "cloze" else LETTERS[: len(item["choices"])])]


def draw(pool: Split, seed: int, size: int | None) -> Split:
    """A seeded sample of ``size`` items (all if None) in seeded order; nested in ``size``."""
    order = list(range(len(pool)))
    random.Random(1000 + seed).shuffle(order)
    return Split([pool[i] for i in order[:size]], pool.readout)


def learning_texts(name: str, train: Split, lines: int) -> tuple[list[str], list[str]]:
    """What an embedded model learns its language from, and the option words that must be single tokens.

    ``"world"``: ``lines`` lines of its pretraining text, and its values. Any other task: the prompts of ``train`` and their
    options, never which one is right.
    """
    if name == "world":
        world = load_world()
        values = {value for relation in world.relations for value in world.vocabulary(relation)}
        return pretraining_lines(world, lines), sorted(values)
    words = {word for item in train for word in item["choices"]} if train.readout == "cloze" else LETTERS
    return [prompt(item, train.readout) for item in train], sorted(words)


def option_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of an option's only token. ``ValueError`` if it has more than one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = "unknown to" if len(ids) == 1 else f"{len(ids)} tokens for"
        raise ValueError(f"the option {text!r} is {what} this tokenizer; its read-out needs one token of its own. Read out by "
                         "letters, or use a tokenizer trained on these options")
    return ids[0]


def make_loader(
    items: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    readout: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
    max_length: int | None = None,
) -> DataLoader:
    """Batches of prompts, padded on the left: a dict of ``input_ids [B, T]``, ``attention_mask [B, T]``,
    ``option_ids [B, C]`` (-1: fewer options), ``labels [B]`` (-1: unknown), and ``p_star [B, C]`` where every item has it.

    ``readout``: ``letters`` or ``cloze``; the split's own by default. Prompts are never cut: ``ValueError`` if one is
    longer than ``max_length`` tokens.
    """
    readout = readout or getattr(items, "readout", "letters")
    if readout not in ("letters", "cloze"):
        raise ValueError(f"readout {readout!r} is not 'letters' or 'cloze'")
    token = {}  # each option text is checked once
    encoded = []
    for item in items:
        ids = tokenizer.encode(prompt(item, readout), add_special_tokens=True)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"question {item['id']!r} is {len(ids)} tokens long, more than max_length={max_length}")
        for text in options(item, readout):
            token.setdefault(text, None)
            if token[text] is None:
                token[text] = option_token(tokenizer, text)
        option_ids = [token[text] for text in options(item, readout)]
        if len(set(option_ids)) < len(option_ids):
            raise ValueError(f"question {item['id']!r}: two options share a token")
        encoded.append((ids, option_ids, item["answer"] if item.get("answer") is not None else -1, item.get("p_star")))

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
    return DataLoader(encoded, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)


def length_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless seeded batches of indices of similar length, so that little of a batch is padding."""
    rng = random.Random(seed)
    while True:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        yield from batches
