"""Question files: reading them row by row, and turning every row into an item or into a fault that
is named."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from .answers import Counting, answer_index, counting
from .layouts import EXPECTED, LETTERS, Asked, Index, asked, missing, shown, text

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
FAULTS_SHOWN = 100
DIGITS = 4000  # of a whole number; Python itself refuses to read more than 4300


@dataclass
class Rows:
    """A file's rows by number, or what is wrong with them, and how they are called: the file,
    ``"line"`` or ``"row"``, and what names a row without an id. ``typed``: numbers and texts are
    told apart (not so in CSV)."""

    where: str | Path
    unit: str
    prefix: str
    rows: list[tuple[int, dict | ValueError]]
    typed: bool = True


class MalformedQuestions(ValueError):
    """Rows that are no questions. ``faults``: every one of them, of each file in turn, as ``(line
    or row number, what is wrong)``; the message lists the first ``FAULTS_SHOWN`` of every file, or,
    where no row of it is a question and all for the same reason, one of them, the fields found and
    those expected."""

    def __init__(self, message: str, faults: list[tuple[int, str]]):
        super().__init__(message)
        self.faults = faults


def _malformed(source: Rows, faults: list[tuple[int, str]]) -> str:
    """What is said of one file."""
    total = len(source.rows)
    fields = next((list(row) for _, row in source.rows if isinstance(row, Mapping)), [])
    lines = [f"{source.unit} {number}: {reason}" for number, reason in faults[:FAULTS_SHOWN]]
    more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    alike = ""
    if len(faults) == total and len({_kind(reason) for _, reason in faults}) == 1:
        lines, alike = lines[:1], ", all alike" if total > 1 else ""
        more = _how_to_rename(source, fields) if fields else []
    first = f"{source.where}: {len(faults)} malformed of {total} questions{alike}"
    return "\n  ".join([first, *lines, *more])


def _kind(reason: str) -> str:
    """A reason without the values in it."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", reason)


def _how_to_rename(source: Rows, fields: Sequence[str]) -> list[str]:
    """Lines that name the fields found and expected, and how to get from the one to the other."""
    old, where = ", ".join(shown(name)[1:-1] for name in fields), str(source.where)
    read, write = {
        ".parquet": ("pandas.read_parquet({})", "to_parquet('renamed.parquet')"),
        ".csv": ("pandas.read_csv({})", "to_csv('renamed.csv', index=False)"),
        ".jsonl": ("pandas.read_json({}, lines=True)", "to_json('renamed.json', orient='records')"),
        ".json": ("pandas.read_json({})", "to_json('renamed.json', orient='records')"),
        "": ("datasets.load_from_disk({}).to_pandas()", "to_parquet('renamed.parquet')"),
    }[Path(where).suffix if Path(where).suffix in SUFFIXES else ""]
    renamed = f"{read.format(repr(where))}.rename(columns={{'YOURS': 'question'}}).{write}"
    return [
        f"fields found: {old if len(old) <= 300 else old[:297] + '...'}",
        f"fields expected: {EXPECTED}",
        f"to rename them: {renamed}",
    ]


def read_questions(path: Path, *, answer_base: int | None = None) -> list[dict]:
    """The items of one file. :class:`MalformedQuestions` names the file, and line (row in parquet
    and JSON lists) and fault of every malformed row; none is dropped. ``ValueError`` if the file as
    a whole cannot be read or is empty, or if nothing in it tells whether its answers count from 0
    or from 1: then ``answer_base`` must."""
    return to_items([read_rows(Path(path))], answer_base)[0]


def read_rows(path: Path) -> Rows:
    """The rows of one file. ``ValueError`` if it cannot be read as a whole."""
    in_rows = path.suffix == ".parquet" or (path.suffix == ".json" and _is_json_list(path))
    try:
        rows = list(_rows(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    return Rows(path, "row" if in_rows else "line", path.stem, rows, typed=path.suffix != ".csv")


def to_items(sources: Sequence[Rows], answer_base: int | None = None) -> list[list[dict]]:
    """The items of every source. What their answers count from is decided from all of them
    together, unless it is stated (``answer_base`` 0 or 1); malformed rows are named for all of them
    at once."""
    if answer_base not in (None, 0, 1):
        raise ValueError(f"answer_base is 0 or 1 (or None: the files tell), not {answer_base!r}")
    read = [
        [(n, row, _tried(asked, row, typed=source.typed)) for n, row in source.rows]
        for source in sources
    ]
    sound = [found for rows in read for *_, found in rows if isinstance(found, Asked)]
    try:
        how = counting(sound, answer_base)
    except ValueError as error:
        raise ValueError(f"{', '.join(str(source.where) for source in sources)}: {error}") from None
    items, malformed = [], []
    for source, rows in zip(sources, read, strict=True):
        name = f"{source.prefix}-{{:05d}}"
        made = [(n, _tried(_item, row, found, how, name.format(n))) for n, row, found in rows]
        items.append([item for _, item in made if not isinstance(item, ValueError)])
        if faults := [(number, str(item)) for number, item in made if isinstance(item, ValueError)]:
            malformed.append((_malformed(source, faults), faults))
        elif not made:
            raise ValueError(f"{source.where} holds no question")
    if malformed:
        message = "\n".join(said for said, _ in malformed)
        raise MalformedQuestions(message, [fault for _, faults in malformed for fault in faults])
    return items


def to_item(row: Mapping, default_id: str | None = None, *, answer_base: int | None = None) -> dict:
    """A row in any known layout (:mod:`.layouts`) as ``{"question", "choices", "answer": index}``
    and, where it has one, ``"passage"``; with a ``default_id`` also its ``"id"``, in front.
    ``ValueError`` says what is wrong with it."""
    found = asked(row)
    return _item(row, found, counting([found], answer_base), default_id)


def _item(row: Mapping, found: Asked | ValueError, how: Counting, default_id: str | None) -> dict:
    if isinstance(found, ValueError):
        raise found
    name = row.get("id")
    item = {} if default_id is None else {"id": default_id if missing(name) else text("id", name)}
    answer = answer_index(found, how)
    item |= {"question": found.question, "choices": found.choices, "answer": answer}
    return item if found.passage is None else item | {"passage": found.passage}


def _tried(make, *given, **more):
    """What ``make`` gives, or the ``ValueError`` that it raises."""
    try:
        return make(*given, **more)
    except ValueError as error:
        return error


# ---- files -> rows ------------------------------------------------------------------------------
def _is_json_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="ignore") as file:
        return file.read(1000).lstrip().startswith("[")


def _rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Every row with its number, counted from 1; where it cannot be read, what is wrong."""
    if path.suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(path)
            rows = table.to_pylist()
        except FileNotFoundError:
            raise
        except (pyarrow.ArrowException, OSError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a parquet file: {said}") from None
        yield from enumerate(indexed(rows, _class_labels(table.schema)), 1)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".json" and _is_json_list(path):
        if isinstance(rows := _tried(_json, path.read_text(encoding="utf-8-sig")), ValueError):
            raise ValueError(f"{path} is {rows}")
        yield from enumerate(rows, 1)
    elif content := path.read_text(encoding="utf-8-sig").rstrip():
        # only newlines end a row: JSON strings may hold other separators
        lines = content.split("\n")
        if path.suffix == ".json" and isinstance(_tried(_json, content), dict):
            lines = [content]  # one object, maybe over several lines
        yield from ((number, _tried(_json, line)) for number, line in enumerate(lines, 1))


def _json(line: str) -> object:
    """The value of a JSON text. ``ValueError`` on what is none, and on what Python cannot hold."""
    try:
        return json.loads(line, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"not JSON that can be read (a number of {len(digits)} digits)")
    return int(digits)


def indexed(rows: Iterable[dict], names: Mapping[str, list[str]]) -> Iterator[dict]:
    """The rows with the class numbers of some columns (the datasets library's ``ClassLabel``) as
    what they are, indices from 0: of the class's name among the sorted names where these are
    letters or digits, and of the class itself elsewhere."""
    order = {c: sorted(o) if all(len(x) == 1 for x in o) else list(o) for c, o in names.items()}
    for row in rows:
        known = {c: row[c] for c in names if row.get(c) in range(len(names[c]))}
        yield {**row, **{c: Index(order[c].index(names[c][value])) for c, value in known.items()}}


def _class_labels(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """The class names of a parquet file's columns that the datasets library wrote as such."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {c: f for c, f in features.items() if isinstance(f, dict)}
        return {c: f["names"] for c, f in kinds.items() if f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError):
        return {}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Rows by the line they start on; all cells are text. A first row that ends in one of its
    options' letters is no header: MMLU's authors give question, options and letter without one."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        letters = LETTERS[: max(len(header) - 2, 0)]
        if len(letters) > 1 and "question" not in header and header[-1].strip() in list(letters):
            yield 1, dict(zip(("question", *letters, "answer"), header, strict=True))
            header = ["question", *letters, "answer"]
        if len(header) == 1 and (other := next((x for x in ";\t|" if x in header[0]), None)):
            said = f"its cells are separated by {other!r}; a .csv file's are by commas"
            raise ValueError(f"{path} has one column, {shown(header[0])}: {said}")
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise ValueError(f"{path}: the header has {shown(twice[0])} twice")
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
            if len(cells) != len(header):
                yield line, ValueError(f"{len(cells)} cells where the header has {len(header)}")
            else:
                yield line, dict(zip(header, cells, strict=True))
