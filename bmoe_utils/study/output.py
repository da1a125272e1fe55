"""Where figures and their numbers go, and how they are written; and the names of the store, for those who look here."""
from __future__ import annotations

import io
import json
import math
import os
import re
from pathlib import Path

from ..storage import atomic_write, fingerprint  # noqa: F401
from .source import PACKAGE  # noqa: F401
from .store import Store, peak_memory_mb, project_root  # noqa: F401
from .tables import csv_text


# ---------------------------------------------------------------------------------------------- figures and their numbers
def figures_folder() -> Path:
    """`BMOE_FIGURES`, set by the runner; without it data/runs/interactive/figures, so that a stroll in JupyterLab or a
    test never overwrites the committed figures."""
    return Path(os.environ.get("BMOE_FIGURES") or project_root() / "data" / "runs" / "interactive" / "figures")


def _target(chapter, name: str, suffix: str) -> Path:
    chapter = f"{chapter:02d}" if isinstance(chapter, int) else chapter
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", f"{chapter}_{name}"):
        raise ValueError(f"figure name {chapter}_{name}: letters, digits, _ and - only")
    return figures_folder() / f"{chapter}_{name}{suffix}"


def _plain(value):
    """JSON values for a results file: floats to 6 significant digits, which is what another run can be held to; no NaN."""
    if hasattr(value, "tolist"):                      # numpy and torch, scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def save_result(chapter: str, name: str, numbers) -> Path:
    """Write a dict (or list) as <chapter>_<name>.json, a DataFrame as .csv (and .tex), into the run's figures folder."""
    for path, text in (files := _as_files(chapter, name, numbers)).items():
        atomic_write(path, text)
    return next(iter(files))


def _as_files(chapter: str, name: str, numbers) -> dict[Path, str]:
    """What :func:`save_result` writes, the file it returns first."""
    if hasattr(numbers, "to_csv"):
        plain = all(index is None for index in numbers.index.names)          # an unnamed index carries nothing
        return {_target(chapter, name, ".csv"): csv_text(numbers, index=not plain),
                _target(chapter, name, ".tex"): latex(numbers, index=not plain)}
    return {_target(chapter, name, ".json"): json.dumps(_plain(numbers), indent=1, ensure_ascii=False) + "\n"}


def latex(table, *, index: bool = True) -> str:
    """A DataFrame as a LaTeX tabular (booktabs); arrows and plus-minus signs as LaTeX has them, all else escaped."""
    signs = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--", "λ": r"$\lambda$", "γ": r"$\gamma$", "β": r"$\beta$"}
    text = (table.reset_index() if index else table).to_latex(index=False, escape=True, float_format="%.4g")
    for sign, command in signs.items():
        text = text.replace(sign, command)
    return text


def save_figure(fig, chapter: str, name: str, numbers=None, *, dpi: int = 150) -> Path:
    """Write `fig` as <chapter>_<name>.png, and its numbers beside it; in a notebook, show it as it was written and close it.

    The same figure gives the same bytes, and one that is there already, pixel by pixel, keeps those it has, whatever library wrote them.
    Nothing is written before all of it is made, and numbers never without the picture they belong to: it is written first.
    """
    from PIL import Image
    path, drawn, written = _target(chapter, name, ".png"), io.BytesIO(), io.BytesIO()
    # no software version in it, or an upgrade would touch every figure
    fig.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None}, pil_kwargs={"compress_level": 1})
    with Image.open(drawn) as picture:
        width = picture.width
        if _pixels(path) == (picture.size, picture.tobytes()):
            written.write(path.read_bytes())
        else:
            picture.save(written, format="png", dpi=(dpi, dpi), optimize=True)
    for target, content in ({path: written.getvalue()} | ({} if numbers is None else _as_files(chapter, name, numbers))).items():
        atomic_write(target, content)
    _show(fig, written.getvalue(), width * 100 // dpi)
    return path


def _pixels(path: Path) -> tuple | None:
    """The picture's size and pixels, if there is one."""
    from PIL import Image
    try:
        with Image.open(path) as picture:
            return picture.size, picture.tobytes()
    except OSError:
        return None


def _show(fig, png: bytes, width: int):
    """In a notebook, in place of what the inline backend would draw at the cell's end, which takes as long again."""
    import matplotlib
    if "inline" not in matplotlib.get_backend():
        return
    import matplotlib.pyplot as plt
    from IPython.display import Image, display
    plt.close(fig)
    display(Image(png, width=width))
