"""Where a run may write: paths as they are given, the study's own places, and one run at a time in a folder."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmoe_utils.study.run.engine import UsageError
from bmoe_utils.study.source import PACKAGE
from bmoe_utils.study.store import project_root

SOURCES = ("notebooks", "bmoe_utils", "tests", "figures", ".git", ".ci")


def shown(value) -> str:
    """A given value as an error message quotes it: on one line, and not the whole of a long one."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def short(path: Path) -> str:
    """`path` from the working directory where it lies below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def located(value: str | Path, what: str) -> Path:
    """A path as given, `~` and links followed; a UsageError where no file system could hold it."""
    try:
        path = Path(value).expanduser().resolve()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:         # too long a name, no such user, links in a circle, a zero byte
        raise UsageError(f"--{what} {shown(str(value))}: {getattr(error, 'strerror', None) or error}") from None


def same(a: Path, b: Path) -> bool:
    """One place, also by another name: a link, other letters' case where the file system does not tell them apart."""
    try:
        return a == b or a.samefile(b)
    except OSError:                                   # one of them is not there
        return False


def refuse_sources(folder: Path, what: str):
    """A :class:`UsageError` where ``folder`` holds the study, or is or lies in a place of its own files."""
    root, package = project_root().resolve(), PACKAGE.resolve()
    above = [folder, *folder.parents]

    def inside(place: Path) -> bool:
        return any(same(place, one) for one in above)
    for own in (root, package):
        if any(same(folder, one) for one in (own, *own.parents)):
            raise UsageError(f"{what} {folder} holds the study itself: choose a folder for the run alone")
    for own in (package, *(root / name for name in SOURCES)):
        if inside(own):
            raise UsageError(f"{what} {folder} is a place of the study's own files ({own}): choose a folder for the run alone")
    runs = root / "data" / "runs"
    if inside(root / "data") and (not inside(runs) or same(folder, runs)):
        raise UsageError(f"{what} {folder} is a place of the study's own data: choose {runs / 'NAME'}, or a folder elsewhere")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Held while a run writes to its folder: two at once would mix their chapters."""
    from filelock import FileLock, Timeout
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another run is writing to {short(folder)}/: wait for it, or choose another folder with --out") from None
    try:
        yield
    finally:
        lock.release()
