"""Tables as CSV files that a spreadsheet program shows as they are, and never runs."""
from __future__ import annotations

import csv
import io
import re

# A cell that begins with one of these is a formula to spreadsheet programs, whoever wrote the text (also in their full width).
STARTS = tuple("=+-@\t\r\n＝＋－＠")
# But not so a dash, a number, nor what a table adds to one: an interval, a deviation, a star. No letter, "|" or "!", without
# which no formula can name a cell, a function or a program.
NUMBER = re.compile(r"[+-](?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?:[\d\s.,;±–−%*()\[\]]|(?<=\[)-|(?<=, )-)*|inf|nan)?")


def harmless(text: str) -> str:
    """``text``, behind an apostrophe where a spreadsheet program would take it for a formula; numbers stay as they are."""
    return f"'{text}" if text.startswith(STARTS) and not NUMBER.fullmatch(text) else text


def csv_text(table, *, index: bool) -> str:
    """A DataFrame as CSV, floats to six significant digits; no cell and no label is a formula."""
    # written with "\r\n", so that a cell that holds either of them is quoted: it would else end its row
    plain = io.StringIO(table.to_csv(index=index, float_format="%.6g", lineterminator="\r\n"), newline="")
    return "".join(_line([harmless(cell) for cell in row]) for row in csv.reader(plain))


def _line(cells: list[str]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"
