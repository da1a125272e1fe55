"""Layouts of question files: where each keeps its question, options and answer, brought into one
form.

A layout is a line of ``LAYOUTS``: what its rows are known by, and a converter of a few lines. A row
goes to the first that knows it. What its answer means is not settled here: see :mod:`.answers`.
"""

from __future__ import annotations

import ast
import io
import json
import math
import random
import re
import reprlib
import string
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

LETTERS = string.ascii_uppercase
QUESTIONS = ("question", "question_stem", "sentence", "query")
PASSAGES = ("passage", "article", "context")
ANSWERS = ("answerKey", "answer", "answer_idx", "answer_index", "correct_option", "label",
           "correct", "gold", "target")  # fmt: skip
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 4, 80, 80


@dataclass(frozen=True)
class Asked:
    """A row whose question, options and passage are text, and whose answer is still what the file
    says.

    ``column`` is where the answer stood, ``labels`` what the layout itself calls its options,
    ``counts_from`` what a number counts from (None: the file has to tell). ``numbers``: the answer
    can be nothing but a number. ``typed``: a number that is text there is meant as text (not so in
    CSV). ``again``: the answer as another column states it.
    """

    question: str
    choices: list[str]
    answer: object
    column: str = "answer"
    labels: Sequence[str] | None = None
    counts_from: int | None = None
    numbers: bool = False
    typed: bool = True
    passage: str | None = None
    again: object = None


class Index(int):
    """An answer that is known to be an option's index from 0, whatever its layout."""


def asked(row: object, *, typed: bool = True) -> Asked:
    """A row of any known layout. ``ValueError`` says what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"a question is an object with fields, not {shown(row)}")
    try:
        convert = next(convert for _, known, convert in LAYOUTS if known(row))
        found = convert(row)
    except KeyError as error:
        raise ValueError(f"no field {error}") from None
    question = text("question", found.question)
    if not isinstance(found.choices, (list, tuple)) or not 2 <= len(found.choices) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} options")
    choices = [text("option", choice) for choice in found.choices]
    passage = None if missing(found.passage) else text("passage", found.passage)
    return replace(found, question=question, choices=choices, passage=passage, typed=typed)


def text(what: str, value: object) -> str:
    """A question, option, passage or id, stripped; a number is text, ``None`` or NaN is not."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{what} {shown(value)} is not text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} {value} is not text")
    if not (stripped := str(value).strip()):
        raise ValueError(f"{'an' if what == 'option' else 'the'} {what} is empty")
    if "\0" in stripped:
        raise ValueError(f"{what} {shown(stripped)} holds a NUL character")
    # JSON can write one; no tokenizer can read it
    if not stripped.isascii() and re.search(r"[\ud800-\udfff]", stripped):
        raise ValueError(f"{what} {shown(stripped)} holds half a character (a lone surrogate)")
    return stripped


def missing(value: object) -> bool:
    """What stands for no value: ``None``, an empty text, pandas' NaN."""
    return value is None or value == "" or value != value


def shown(value: object) -> str:
    """``repr`` in at most 120 characters, however long or deep the value is."""
    full = _repr.repr(value)
    return full if len(full) <= 120 else full[:117] + "..."


# ---- parts of a row -----------------------------------------------------------------------------
def _question(row: Mapping) -> object:
    return row[next((name for name in QUESTIONS if row.get(name) is not None), "question")]


def _answer(row: Mapping, names: Sequence[str] = ANSWERS) -> tuple[str, object]:
    """The column the answer stands in, and what is there; of a list of one (AGIEval), that one."""
    present = [name for name in names if name in row]
    if not present:
        raise KeyError("answer")
    column = next((name for name in present if not missing(row[name])), present[0])
    value = row[column]
    return column, value[0] if isinstance(value, list) and len(value) == 1 else value


def _options(value: object) -> tuple[object, list[str] | None]:
    """Options and the labels they have: of a list, of ``{"text": [...], "label": [...]}``, of
    ``{"A": text, ...}``, of ``[{"key": label, "value": text}, ...]``, or of one of these as text.
    """
    if isinstance(value, str):
        value = literal(value)
    if isinstance(value, Mapping):
        if "text" in value or "label" in value:
            texts, labels = value["text"], value["label"]
        else:  # a column of structs has nulls for no option
            labels = [label for label, option in value.items() if option is not None]
            texts = [value[label] for label in labels]
    elif isinstance(value, (list, tuple)) and value and all(isinstance(o, Mapping) for o in value):
        texts = [o["value"] if "value" in o else o["text"] for o in value]
        labels = [o["key"] if "key" in o else o["label"] for o in value]
    else:
        return value, None
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise ValueError(f"labels {shown(labels)} do not fit the options {shown(texts)}")
    labels = [str(label) for label in labels]
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels {shown(labels)} are not all different")
    return texts, labels


def _numbered(row: Mapping, pattern: str, marks: str) -> list:
    """The options of columns like ``option1``, ``option2``, up to the last there is; ``KeyError``
    on a gap, which would shift those behind it."""
    names = [pattern.format(mark) for mark in marks]
    last = max(i for i, name in enumerate(names) if name in row)
    return [row[name] for name in names[: last + 1]]


def _mixed(question: str, options: list, right: int) -> Asked:
    """Options whose right one has a fixed place, in an order drawn from the question: the same in
    every run, and the place tells nothing."""
    order = list(range(len(options)))
    random.Random(question).shuffle(order)
    return Asked(question, [options[i] for i in order], Index(order.index(right)))


def literal(cell: str) -> object:
    """The list or object that a cell spells: as JSON, as Python prints it, or as numpy does.

    Nothing is evaluated: of calls, ``array([...])`` alone is read, as its argument.
    """
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        if not cell.lstrip().startswith(("[", "{", "(", "array(")):
            raise ValueError
        tokens = tokenize.generate_tokens(io.StringIO(cell.strip()).readline)
        tokens = [t for t in tokens if t.string.strip()]
        is_value = [t.type in (tokenize.STRING, tokenize.NUMBER) for t in tokens]
        if [t.string for t, value in zip(tokens, is_value, strict=True) if not value] == ["[", "]"]:
            # as numpy prints it, without commas, where Python would join the texts
            return [ast.literal_eval(t.string) for t in tokens[1:-1]]
        return ast.literal_eval(_Arrays().visit(ast.parse(cell.strip(), mode="eval")))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        said = f'choices {shown(cell)} is not a JSON list such as ["yes", "no"]'
        raise ValueError(said) from None


class _Arrays(ast.NodeTransformer):
    """``array(x, dtype=object)`` as ``x``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "array" and len(node.args) == 1:
            return self.visit(node.args[0])
        return node  # literal_eval refuses it


# ---- layouts ------------------------------------------------------------------------------------
def _choices(row: Mapping) -> Asked:
    """Our own, MMLU (the same), and with labels OpenBookQA, ARC, CommonsenseQA."""
    options, labels = _options(row["choices"])
    question, (column, answer) = _question(row), _answer(row)
    own = 0 if labels is None and column == "answer" else None
    return Asked(question, options, answer, column, labels, own, passage=row.get("passage"))


def _nested(row: Mapping) -> Asked:
    """AI2's files of ARC, OpenBookQA and CommonsenseQA: ``{"question": {"stem", "choices"}}``."""
    inner = row["question"]
    choices, right = inner["choices"], row["answerKey"]
    return _choices({"question": inner["stem"], "choices": choices, "answerKey": right})


def _listed(row: Mapping) -> Asked:
    """MMLU-Pro (``answer``, ``answer_index``), MedQA (``answer_idx``, ``answer``), RACE, LogiQA."""
    options, labels = _options(row["options"])
    question, (column, answer) = _question(row), _answer(row, ("answer_idx", *ANSWERS))
    passage = next((row[name] for name in PASSAGES if not missing(row.get(name))), None)
    again = {"answer_idx": "answer", "answer": "answer_index"}.get(column)
    return Asked(question, options, answer, column, labels, passage=passage, again=row.get(again))


def _medmcqa(row: Mapping) -> Asked:
    options = _numbered(row, "op{}", "abcdefgh")
    return Asked(_question(row), options, row["cop"], "cop", numbers=True)


def _winogrande(row: Mapping) -> Asked:
    options = _numbered(row, "option{}", "123456789")
    return Asked(_question(row), options, row["answer"], numbers=True)


def _sciq(row: Mapping) -> Asked:
    """Its ``support``, which often holds the answer, is not shown."""
    options = [row["correct_answer"], *_numbered(row, "distractor{}", "123456789")]
    return _mixed(text("question", _question(row)), options, 0)


def _truthfulqa(row: Mapping) -> Asked:
    """mc1, whose right answer stands first in every row: left there, A would always be right."""
    targets = row["mc1_targets"]
    targets = literal(targets) if isinstance(targets, str) else targets
    found = targets if isinstance(targets, Mapping) else {}
    options, labels = found.get("choices"), found.get("labels")
    lists = isinstance(options, list) and isinstance(labels, list) and len(options) == len(labels)
    right = [i for i, label in enumerate(labels) if label == 1] if lists else []
    if len(right) != 1:
        raise ValueError(f"mc1_targets {shown(targets)} do not mark one of their options")
    return _mixed(text("question", _question(row)), options, right[0])


def _hellaswag(row: Mapping) -> Asked:
    context = row["ctx"] if not missing(row.get("ctx")) else f"{row['ctx_a']} {row['ctx_b']}"
    return Asked(context, _options(row["endings"])[0], row["label"], "label", numbers=True)


def _piqa(row: Mapping) -> Asked:
    options = _numbered(row, "sol{}", "123456789")
    return Asked(row["goal"], options, row["label"], "label", numbers=True)


def _siqa(row: Mapping) -> Asked:
    options = _numbered(row, "answer{}", LETTERS)
    question, label, context = row["question"], row["label"], row["context"]
    return Asked(question, options, label, "label", numbers=True, passage=context)


def _copa(row: Mapping) -> Asked:
    asks = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
    if (kind := str(row["question"])) not in asks:
        raise ValueError(f"question {shown(row['question'])} is neither 'cause' nor 'effect'")
    options = _numbered(row, "choice{}", "123456789")
    return Asked(f"{row['premise']} {asks[kind]}", options, row["label"], "label", numbers=True)


def _lettered(row: Mapping) -> Asked:
    """Columns A, B, C, D: the CSV files of MMLU's authors, which have no header."""
    options, (column, answer) = _numbered(row, "{}", LETTERS), _answer(row)
    while options and missing(options[-1]):
        options.pop()
    return Asked(_question(row), options, answer, column, passage=row.get("passage"))


def _boolq(row: Mapping) -> Asked:
    right = str(row["answer"]).lower() == "true"
    return Asked(_question(row), ["no", "yes"], Index(right), passage=row.get("passage"))


def _unknown(row: Mapping) -> Asked:
    _question(row)
    raise KeyError("choices")


def _has(*columns: str) -> Callable[[Mapping], bool]:
    return lambda row: all(column in row for column in columns)


LAYOUTS: tuple[tuple[str, Callable[[Mapping], bool], Callable[[Mapping], Asked]], ...] = (
    ("AI2's nested files", lambda row: isinstance(row.get("question"), Mapping), _nested),
    ("MMLU, ARC, OpenBookQA, CommonsenseQA", lambda row: row.get("choices") is not None, _choices),
    ("MedMCQA", _has("opa", "opb"), _medmcqa),
    ("WinoGrande", _has("option1", "option2"), _winogrande),
    ("SciQ", _has("correct_answer", "distractor1"), _sciq),
    ("TruthfulQA", _has("mc1_targets"), _truthfulqa),
    ("HellaSwag", _has("endings"), _hellaswag),
    ("PIQA", _has("goal", "sol1", "sol2"), _piqa),
    ("SIQA", _has("context", "answerA", "answerB"), _siqa),
    ("COPA", _has("premise", "question", "choice1", "choice2"), _copa),
    ("MMLU's CSV", _has("A", "B"), _lettered),
    ("MMLU-Pro, MedQA, RACE, LogiQA", lambda row: row.get("options") is not None, _listed),
    ("BoolQ", lambda row: str(row.get("answer")).lower() in ("true", "false"), _boolq),
    ("none of these", lambda row: True, _unknown),
)  # fmt: skip
EXPECTED = (
    f"question, choices (a list of 2 to {len(LETTERS)} texts), answer (one's index from 0, its "
    f"letter or text); or the columns of {', '.join(name for name, *_ in LAYOUTS[:-1])}"
)
