"""Question files: reading them row by row, and turning every row into an item or into a fault that is named."""

from __future__ import annotations

import csv
import json
import random
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

LETTERS = string.ascii_uppercase
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
FAULTS_SHOWN = 100


class MalformedQuestions(ValueError):
    """Rows that are no questions. ``faults``: every one of them as ``(line or row number, what is wrong)``; the message
    lists the first ``FAULTS_SHOWN``."""

    def __init__(self, where: str | Path, unit: str, faults: list[tuple[int, str]], total: int):
        self.faults = sorted(faults)
        shown = [f"{unit} {number}: {reason}" for number, reason in self.faults[:FAULTS_SHOWN]]
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        super().__init__(f"{where}: {len(faults)} malformed of {total} questions\n  " + "\n  ".join(shown + more))


def read_questions(path: Path) -> list[dict]:
    """The items of one file. :class:`MalformedQuestions` names the file, and line (row in parquet and JSON lists) and fault
    of every malformed row; none is dropped. ``ValueError`` if the file as a whole cannot be read or is empty."""
    unit = "line" if path.suffix in (".jsonl", ".csv") or (path.suffix == ".json" and not _is_json_list(path)) else "row"
    try:
        return to_items(_rows(path), where=path, unit=unit, prefix=path.stem)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def to_items(rows: Iterable[tuple[int, dict | ValueError]], *, where: str | Path, unit: str, prefix: str) -> list[dict]:
    """Items of numbered rows (or of what is wrong with them); a row without an id is called by prefix and number."""
    items, faults = [], []
    for number, row in rows:
        try:
            items.append(named_item(row, f"{prefix}-{number:05d}"))
        except ValueError as error:
            faults.append((number, str(error)))
    if faults:
        raise MalformedQuestions(where, unit, faults, len(items) + len(faults))
    if not items:
        raise ValueError(f"{where} holds no question")
    return items


def named_item(row: dict | ValueError, default_id: str) -> dict:
    """:func:`to_item` with its ``id`` in front. ``ValueError`` says what is wrong with the row."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"a question is an object with fields, not {row!r}")
    name = row.get("id")
    try:
        return {"id": default_id if name in (None, "") else str(name), **to_item(row)}
    except KeyError as error:
        raise ValueError(f"no field {error}") from None


# ---- files -> rows --------------------------------------------------------------------------------------------------
def _is_json_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="ignore") as file:
        return file.read(1000).lstrip().startswith("[")


def _rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Every row with its number, counted from 1; where it cannot be read, what is wrong."""
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
        yield from enumerate(table.to_pylist(), 1)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".json" and _is_json_list(path):
        try:
            yield from enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    elif text := path.read_text(encoding="utf-8-sig").rstrip():
        for number, line in enumerate(text.split("\n"), 1):  # only newlines end a row: JSON strings may hold other separators
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, ValueError(f"not JSON ({error})")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Rows by the line they start on. All cells are text, so an answer that is a number needs care (:func:`_csv_row`)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, ValueError(f"not CSV ({error})")
                continue
            if not cells:  # an empty line
                continue
            try:
                if len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells where the header has {len(header)}")
                yield line, _csv_row(dict(zip(header, cells, strict=True)))
            except ValueError as error:
                yield line, error


def _csv_row(row: dict) -> dict:
    """``choices`` as the list that its JSON text is. A number that is one option's index and another's text is refused:
    in a format without types nothing tells which is meant."""
    if "choices" not in row:
        return row
    choices, answer = _json_list(row["choices"]), row.get("answer", "").strip()
    texts = [str(c).strip() for c in choices]
    if answer.isdecimal() and answer in texts and int(answer) < len(texts) and texts[int(answer)] != answer:
        raise ValueError(f"answer {answer!r} is the text of one option and the index of another: give its letter")
    return row | {"choices": choices}


def _json_list(text: str) -> list:
    try:
        if isinstance(value := json.loads(text), list):
            return value
    except json.JSONDecodeError:
        pass
    raise ValueError(f'choices {text!r} is not a JSON list such as ["yes", "no"]')


# ---- rows -> items --------------------------------------------------------------------------------------------------
def to_item(row: Mapping) -> dict:
    """A row in any known layout as ``{"question", "choices", "answer": index}`` and, where it has one, ``"passage"``.

    Layouts: a user's own (``question``, ``choices``, ``answer`` as index, letter or text) and the hub's of OpenBookQA, ARC,
    CommonsenseQA (``choices`` with labels, ``answerKey``), MMLU, WinoGrande, BoolQ, SciQ and MedMCQA. SciQ's right answer
    comes first in its rows: its options are put in an order drawn from the question's text, the same in every run; its
    ``support``, which often holds the answer, is not shown. ``KeyError`` on a missing field, ``ValueError`` on a bad one.
    """
    name = next((k for k in ("question", "question_stem", "sentence") if row.get(k) is not None), "question")
    question = _text("question", row[name])
    choices, labels, answer = _options(row, question)
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} options")
    choices = [_text("option", c) for c in choices]
    index = _index(answer, choices, labels)
    if choices.count(choices[index]) > 1:  # a wrong option may be there twice (OpenBookQA has such rows), the right one not
        raise ValueError(f"the right option {choices[index]!r} is there twice")
    item = {"question": question, "choices": choices, "answer": index}
    passage = row.get("passage")
    return item if passage in (None, "") else item | {"passage": _text("passage", passage)}


def _options(row: Mapping, question: str) -> tuple[list, list[str] | None, object]:
    """Options, the labels that the layout itself gives them, and the answer as the row has it."""
    if (choices := row.get("choices")) is not None:
        choices = _json_list(choices) if isinstance(choices, str) else choices
        if not isinstance(choices, Mapping):
            return choices, None, row["answerKey"] if "answerKey" in row else row["answer"]
        texts, labels = choices["text"], choices["label"]
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise ValueError(f"labels {labels!r} do not fit the options {texts!r}")
        return texts, [str(x) for x in labels], row["answerKey"] if "answerKey" in row else row["answer"]
    if "opa" in row:  # MedMCQA
        return [row[f"op{x}"] for x in "abcd"], None, row["cop"]
    if "option1" in row:  # WinoGrande
        return [row["option1"], row["option2"]], ["1", "2"], str(row["answer"])
    if "correct_answer" in row:  # SciQ
        options = [row["correct_answer"], *(row[f"distractor{i}"] for i in (1, 2, 3))]
        order = list(range(4))
        random.Random(question).shuffle(order)
        return [options[i] for i in order], None, order.index(0)
    if isinstance(row["answer"], bool):  # BoolQ
        return ["no", "yes"], None, int(row["answer"])
    raise KeyError("choices")


def _text(what: str, value: object) -> str:
    """A question, option or passage as stripped text; a number is one, ``None``, a truth value or a list is not."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise ValueError(f"{what} {value!r} is not text")
    if not (text := str(value).strip()):
        raise ValueError(f"{'an' if what == 'option' else 'the'} {what} is empty")
    return text


def _index(answer: object, choices: list[str], labels: list[str] | None) -> int:
    """The right option's index, from index, letter (or the layout's own label) or text."""
    if isinstance(answer, float) and answer.is_integer():  # what a column of integers becomes where one is missing
        answer = int(answer)
    text = "" if isinstance(answer, bool) or not isinstance(answer, (int, str)) else str(answer).strip()
    if labels and text in labels:  # the layout says what it means, whatever the options' texts are
        return labels.index(text)
    letters = list(LETTERS[: len(choices)])
    by_letter = letters.index(text) if text in letters and not labels else None
    by_text = choices.index(text) if isinstance(answer, str) and choices.count(text) == 1 else None
    if None not in (by_letter, by_text) and by_letter != by_text:
        raise ValueError(f"answer {answer!r} is the letter of one option and the text of another: give its index")
    if by_letter is not None or by_text is not None:
        return by_letter if by_text is None else by_text
    if not text or not (isinstance(answer, int) or text.isdecimal()) or (labels and isinstance(answer, str)):
        raise ValueError(f"answer {answer!r} is no index, letter or text of the options")
    if not 0 <= int(text) < len(choices):
        raise ValueError(f"answer {answer!r} is not among the {len(choices)} options")
    return int(text)
