"""What the answers of a question file mean: which option a label, letter, text or number is.

A number is an index from 0 in one file and from 1 in the next, in the same columns (MedMCQA's
``cop``), and one read for the other shifts every label in silence. So nothing is assumed: all rows
of a task are looked at together, and where they cannot tell, the task is refused until its user
says.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .layouts import LETTERS, Asked, Index, shown


@dataclass(frozen=True)
class Counting:
    """By the answer's column and its layout's own rule, what numbers count from; by column, which
    kind of answer (``"letter"`` or ``"number"``) is out of place, being rarer where both occur."""

    start: Mapping[tuple[str, int | None], int] = field(default_factory=dict)
    odd: Mapping[str, str] = field(default_factory=dict)


def counting(rows: Iterable[Asked], stated: int | None = None) -> Counting:
    """How the rows of a task count. An answer 0 says from 0; one that is its row's number of
    options, where none is 0, says from 1. ``stated`` overrides both, and what the layout says.

    ``ValueError`` where numbers occur and none of them tells.
    """
    numbers, kinds = defaultdict(Counter), defaultdict(Counter)
    for row in rows:
        kind = _kind(row)
        if row.counts_from is None and kind:
            kinds[row.column][kind] += 1
        if kind == "number":
            value = number(row.answer)
            place = "last" if value == len(row.choices) else value
            if 0 <= value <= len(row.choices):  # any other is wrong whatever they count from
                numbers[row.column, row.counts_from][place] += 1
    start = {}
    for (column, known), seen in numbers.items():
        if stated is not None or known is not None:
            start[column, known] = known if stated is None else stated
        elif 0 in seen or "last" in seen:
            start[column, known] = 0 if 0 in seen else 1
        else:
            values = ", ".join(str(value) for value in sorted(seen)[:6])
            raise ValueError(
                f"it cannot be told whether the answers in {column!r} count from 0 or from 1: they "
                f"are {values}, never 0 and never the number of options; say so by answer_base=0 "
                "or answer_base=1 (load_task, read_questions; on the command line -p answer_base=1)"
            )
    odd = {c: seen.most_common()[-1][0] for c, seen in kinds.items() if len(seen) > 1}
    return Counting(start, odd)


def answer_index(row: Asked, how: Counting) -> int:
    """The right option's index from 0. ``ValueError`` says why there is none."""
    count, own = len(row.choices), how.start.get((row.column, row.counts_from), 0)
    odd = how.odd.get(row.column) if row.counts_from is None else None
    if odd and _kind(row) == odd:
        most = {"letter": "numbers", "number": "letters"}[odd]
        said = f"is a {odd} where most of {row.column!r} are {most}"
        raise ValueError(f"answer {shown(row.answer)} {said}")
    if (index := named(row, row.answer)) is None:
        value = number(row.answer)
        if value is None or (row.labels and isinstance(row.answer, str)):
            said = "is no index, letter or text of the options"
            raise ValueError(f"answer {shown(row.answer)} {said}")
        index = value - own
    if not 0 <= index < count:
        said = f"answer {shown(row.answer)} is not among the {count} options, counted from {own}"
        hint = " (answer_base=1 where they count from 1)" if (own, index) == (0, count) else ""
        raise ValueError(said + hint)
    if row.again is not None and _again(row, index) not in (None, index):
        both = f"{shown(row.answer)} and {shown(row.again)}"
        raise ValueError(f"answer {both} are different options")
    if [_form(choice) for choice in row.choices].count(_form(row.choices[index])) > 1:
        # a wrong option may be there twice (OpenBookQA has such rows), the right one not
        raise ValueError(f"the right option {shown(row.choices[index])} is there twice")
    return index


def named(row: Asked, answer: object) -> int | None:
    """The option that an answer names by its label, letter or text; None where it names none so."""
    if isinstance(answer, Index):
        return int(answer)
    value = number(answer)
    said = answer.strip() if isinstance(answer, str) else "" if value is None else str(value)
    if row.labels and said in row.labels:  # what the layout says, whatever the options' texts are
        return row.labels.index(said)
    if row.numbers or not isinstance(answer, str):
        return None
    by_letter = _letter(row, said)
    by_text = _place(said, row.choices)
    if None not in (by_letter, by_text) and by_letter != by_text:
        what = "is the letter of one option and the text of another: give its index"
        raise ValueError(f"answer {shown(answer)} {what}")
    meant_as_text = row.labels or (row.typed and row.counts_from == 0)
    if by_text is not None and value is not None and not meant_as_text:
        starts = (0, 1) if row.counts_from is None else (row.counts_from,)
        if any(0 <= value - s < len(row.choices) and value - s != by_text for s in starts):
            what = "is the text of one option and the index of another: give its letter"
            raise ValueError(f"answer {shown(answer)} {what}")
    return by_letter if by_text is None else by_text


def number(answer: object) -> int | None:
    """The whole number that an answer is or spells (2, 2.0, "2", "2.0"); None where it is none."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, (int, float)):
        return int(answer) if abs(answer) < 1e9 and answer == int(answer) else None
    if isinstance(answer, str) and re.fullmatch(r"\s*[+-]?\d{1,9}(\.0+)?\s*", answer):
        return int(answer.partition(".")[0])
    return None


def _kind(row: Asked) -> str | None:
    """``"letter"``, ``"number"`` or, for a label or text (or nothing of use), None."""
    try:
        index = named(row, row.answer)
    except ValueError:  # said when the row's own turn comes
        return None
    if index is None:
        none = number(row.answer) is None or (row.labels and isinstance(row.answer, str))
        return None if none else "number"
    said = row.answer.strip() if isinstance(row.answer, str) else ""
    return "letter" if index == _letter(row, said) and _place(said, row.choices) is None else None


def _letter(row: Asked, said: str) -> int | None:
    letters = list(LETTERS[: len(row.choices)])
    return letters.index(said) if said in letters and not row.labels else None


def _place(said: str, choices: list[str]) -> int | None:
    """Where a text stands among the options: to the letter, or else as the same characters composed
    another way."""
    if said in choices:
        return choices.index(said)
    forms = [_form(choice) for choice in choices]
    return forms.index(_form(said)) if _form(said) in forms else None


def _again(row: Asked, index: int) -> int | None:
    """The option that the other column states. An explanation states none; a number agrees whether
    it counts from 0 or 1."""
    try:
        other = named(row, row.again)
    except ValueError:
        return None
    if other is None and (value := number(row.again)) is not None and value >= 0:
        return index if index in (value, value - 1) else value
    return other


def _form(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)
