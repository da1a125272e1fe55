"""Executed chapters as Markdown, for whoever only reads: prose, code, output, tables, pictures.

Made from an executed notebook alone, and holding nothing that differs by the machine or the moment,
but for what a chapter itself measures and prints. A picture is a link to the file in ``figures`` of
the same bytes, which is how `save_figure` shows it.
"""
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from bmoe_utils.storage import atomic_write

SHORT = (8, 800)                      # most lines and characters of a code cell that is not folded
FOLDER = "rendered"                                    # in that of the notebooks
# results that say nothing to a reader
NOTHING = re.compile(r"(Posix|Windows)Path\(.*\)|<.* at 0x[0-9a-f]+>|None|", re.DOTALL)
BAR = re.compile(r"\d+%\|.*\|")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
DISPLAYED = re.compile(r"\s*\$\$(.+?)\$\$\s*", re.DOTALL)
INLINE = re.compile(r"(?<!\\)\$([^$`]+)\$")


def read(notebook: Path):
    import nbformat
    return nbformat.read(notebook, as_version=4)


def _is(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def source_hash(nb) -> str:
    """Of what a notebook's cells say; the same for its executed copy, whatever that was given."""
    own = [cell for cell in nb.cells if not _is(cell, "injected-parameters")]
    said = [[cell.cell_type, cell.source] for cell in own]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()


# ------------------------------------------------------------------------------- prose and text
def prose(text: str) -> str:
    """A Markdown cell for a file one folder deeper. Formulas are written as code hosts take them
    whole: between mere dollar signs, backslashes and underscores may be read as Markdown first."""
    def plain(part: str) -> str:
        part = re.sub(r"(\]\(|\b(?:src|href)=[\"'])(?![a-z][a-z+.-]*:|[#/])", r"\1../", part)
        texts = DISPLAYED.split(part)                  # text, formula, text, ...
        for i, one in enumerate(texts):
            alone = f"\n\n```math\n{one.strip()}\n```\n\n"
            texts[i] = alone if i % 2 else INLINE.sub(r"$`\1`$", one)
        return "".join(texts)
    parts = CODE.split(text)
    return "".join(part if i % 2 else plain(part) for i, part in enumerate(parts)).strip()


def fenced(text: str, language: str = "") -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def code(source: str) -> str:
    """A code cell, folded where it is long."""
    source = re.sub(r"^# NBVAL_\w+\n?", "", source.strip(), flags=re.MULTILINE).strip()
    lines = source.count("\n") + 1
    if not source or (lines <= SHORT[0] and len(source) <= SHORT[1]):
        return source and fenced(source, "python")
    summary = f"<summary>code ({lines} line{'s' * (lines > 1)})</summary>"
    return f"<details>{summary}\n\n{fenced(source, 'python')}\n\n</details>"


def printed(text: str) -> str:
    """Printed text as a terminal would have left it, without progress bars."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join(line for line in lines if not BAR.search(line)).strip("\n")


# ------------------------------------------------------------------------------- tables
class _Rows(HTMLParser):
    """The rows of a table: (is in the head, [(is a heading, text, columns, rows)])."""

    def __init__(self, html: str):
        super().__init__()
        self.rows, self._head, self._open = [], False, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("thead", "tbody"):
            self._head = tag == "thead"
        elif tag == "tr":
            self.rows.append((self._head, []))
        elif tag in ("th", "td") and self.rows:
            span = [int(dict(attributes).get(name, 1)) for name in ("colspan", "rowspan")]
            self.rows[-1][1].append((tag == "th", "", *span))
            self._open = True

    def handle_endtag(self, tag):
        self._open &= tag not in ("th", "td")

    def handle_data(self, data):
        if self._open:
            heading, text, *span = self.rows[-1][1][-1]
            self.rows[-1][1][-1] = (heading, text + data, *span)


def _grid(rows: list, fill: bool) -> list[list[str]]:
    """Texts by row and column; one that spans several is repeated across if ``fill``, not down."""
    grid, covered = [], {}            # column -> the rows to come that a cell above reaches into
    for cells in rows:
        line = []

        def below(line=line):
            while covered.get(len(line), 0):
                covered[len(line)] -= 1
                line.append("")
        for _, text, across, down in cells:
            below()
            for i in range(across):
                covered[len(line)] = down - 1
                line.append(" ".join(text.split()) if fill or not i else "")
        below()
        grid.append(line)
    return grid


def _cell(text: str) -> str:
    return re.sub(r"([\\`*_|$~])", r"\\\1", text).replace("<", "&lt;")


def table(html: str) -> str:
    """A DataFrame's HTML as a Markdown table: head rows in one, and no index that only counts."""
    rows = [(head, cells) for head, cells in _Rows(html).rows if cells]
    body = [cells for head, cells in rows if not head]
    heads, lines = _grid([cells for head, cells in rows if head], True), _grid(body, False)
    width = max(map(len, heads + lines), default=0)
    if not heads or not width:
        return ""
    heads, lines = ([row + [""] * (width - len(row)) for row in part] for part in (heads, lines))
    named = max((sum(heading for heading, *_ in cells) for cells in body), default=0)

    def title_of(column: int) -> str:
        """Of an index (the first ``named``) the last row has the name, of others each a part."""
        parts = [row[column] for row in heads[-1 if column < named else 0:]]
        return " ".join(dict.fromkeys(filter(None, parts)))
    title = [title_of(column) for column in range(width)]
    counts = [str(i) for i in range(len(lines))]
    if named == 1 and not title[0] and [line[0] for line in lines] == counts:
        title, lines, named = title[1:], [line[1:] for line in lines], 0
    number = re.compile(r"[-+−±<>]?\.?\d.*|–|NaN|nan|None|")
    columns = [[line[i] for line in lines] for i in range(len(title))]
    right = [i >= named and all(map(number.fullmatch, column)) for i, column in enumerate(columns)]
    rule = ["--:" if one else ":--" for one in right]
    head, *lines = ([_cell(text) for text in line] for line in (title, *lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *lines))


# ------------------------------------------------------------------------------- a chapter
def _outputs(outputs: list, pictures: dict[bytes, str]) -> list[str]:
    parts, said = [], ""

    def flush():
        nonlocal said
        if text := printed(said):
            parts.append(fenced(text))
        said = ""
    for output in outputs:
        if output.output_type == "stream":
            said += output.text if output.name == "stdout" else ""
            continue
        flush()
        if output.output_type == "error":
            parts.append(fenced(f"{output.ename}: {output.evalue}"))
            continue
        data = output.data
        if "image/png" in data:
            link = pictures.get(base64.b64decode(data["image/png"]))
            name = Path(link or "").stem[3:].replace("_", " ")
            parts.append(f"![{name}]({link})" if link else "*(a picture that is not kept)*")
        elif made := table(data.get("text/html", "")):
            parts.append(made)
        elif not NOTHING.fullmatch(text := printed(data.get("text/plain", ""))):
            parts.append(fenced(text))
    flush()
    return parts


def markdown(nb, name: str, pictures: dict[bytes, str]) -> str:
    """An executed notebook, called ``name``, as Markdown. ``pictures``: bytes -> link."""
    injected = any(_is(cell, "injected-parameters") for cell in nb.cells)
    source = source_hash(nb)
    parts = [f"<!-- Made from {name}, source {source}. Do not edit: a run writes it anew. -->"]
    about = f"*[{name}](../{name}) as the committed run left it; long code is folded.*"
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = prose(cell.source)
            if about and text.startswith("# "):
                heading, _, rest = text.partition("\n")
                text, about = "\n\n".join(filter(None, (heading, about, rest.strip()))), None
            parts.append(text)
        elif cell.cell_type == "code":
            if _is(cell, "injected-parameters") or (_is(cell, "parameters") and not injected):
                lines = cell.source.splitlines()
                given = [f"`{line}`" for line in lines if line and line[0] != "#"]
                parts.append("Parameters: " + ", ".join(given))
            elif not _is(cell, "parameters"):
                parts += [code(cell.source), *_outputs(cell.outputs, pictures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render(executed: Path, figures: Path, target: Path) -> Path:
    """Write an executed chapter as Markdown to ``target``, one folder below the notebooks."""
    place = Path(os.path.relpath(figures, target.parent)).as_posix()
    own = sorted(figures.glob(f"{executed.name[:2]}_*.png"))
    pictures = {path.read_bytes(): f"{place}/{path.name}" for path in own}
    return atomic_write(target, markdown(read(executed), executed.name, pictures))


def render_all(
    run: Path, figures: Path, notebooks: Path, names: Iterable[str] | None = None
) -> list[Path]:
    """:func:`render` of the executed chapters in a run's folder, all or those called ``names``
    (without a suffix), into ``notebooks``/rendered."""
    names = sorted(path.stem for path in run.glob("[0-9][0-9]_*.ipynb")) if names is None else names
    into = notebooks / FOLDER
    return [render(run / f"{name}.ipynb", figures, into / f"{name}.md") for name in names]
