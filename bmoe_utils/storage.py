"""Writing that is whole or not at all: a lock, files moved into place, folders with a manifest;
and fingerprints, by which what was written is known.

At whatever moment a writer is killed, interrupted or out of room, a place holds the old content or
the new one, and a reader beside it gets one of them. What a killed writer leaves is taken over or
removed by the next writer of the same place. What is not ours is never overwritten or removed.
Nothing here imports torch.
"""
from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:                                   # Windows
    fcntl = None

T = TypeVar("T")


# ---------------------------------------------------------------------- one writer at a time
class Lock:
    """Held by one process, or thread, at a time. The file `path` is there while it is held and is
    then removed by whoever holds it; the system lets go of it for a process that was killed."""

    def __init__(self, path: str | Path):
        self.path, self._held = Path(path), None

    def take(self, wait: bool = True, say: str | None = None) -> bool:
        """Whether it is held now; without `wait`, False where another one holds it. `say`: to
        stderr, after a second of waiting."""
        began = time.monotonic()
        while not (taken := self._try()) and wait:
            if say and time.monotonic() - began > 1:
                print(say, file=sys.stderr, flush=True)
                say = None
            time.sleep(0.02)
        return taken

    def _try(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return self._try_filelock()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:                     # its folder went with the last holder
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not where the last holder has removed it: what has no name locks nobody out.
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                self._held, descriptor = descriptor, None
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return self._try_filelock()
            raise
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return self._held is not None

    def _try_filelock(self) -> bool:
        """Where the system has no flock: filelock knows what there is instead."""
        from filelock import FileLock, Timeout
        lock = FileLock(self.path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._held = lock
        return True

    def let_go(self) -> None:
        held, self._held = self._held, None
        if isinstance(held, int):
            try:
                with suppress(OSError):
                    self.path.unlink()                # before it is let go: nobody else's, then
            finally:
                os.close(held)
        elif held is not None:
            held.release()


@contextmanager
def locked(path: str | Path, say: str | None = None):
    """A `Lock` for the time of the block."""
    lock = Lock(path)
    try:
        lock.take(say=say)
        yield
    finally:
        lock.let_go()


# ---------------------------------------------------------------------- files
def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.bmoe-{kind}")


def replace_file(path: Path, content: str | bytes) -> None:
    """Write beside `path`, then move; under the lock that guards it, so that the name beside it can
    be the same every time."""
    new = _beside(path, "new")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write beside `path`, then move: a reader sees the old content or the new, never half."""
    path = Path(path)
    with locked(_beside(path, "lock")):
        replace_file(path, content)
    return path


_known: dict[tuple, str] = {}


def sha256(path: str | Path) -> str:
    """Of a file's content, in hex; read once in a process, while its device, number, size and time
    of change stay the same."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if known in _known:
            return _known[known]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A later change shows in the time, which some file systems keep in whole seconds.
    if time.time_ns() - status.st_mtime_ns > 2e9:
        _known[known] = digest
    return digest


# ---------------------------------------------------------------------- folders
_NAMED = {"posterior": "a posterior", "routers": "routers", "state": "the checkpoint of a fit"}
_MANIFESTS = ("manifest.json", "state.json")
# What is there only while something is written, or after a kill.
_LOCK, _NEW = ".bmoe-lock", ".bmoe-new"
_PASSING = (_LOCK, _NEW, *(_beside(Path(name), "new").name for name in _MANIFESTS))


def kind_of(folder: str | Path) -> str | None:
    """Which kind of :class:`Folder` this is, by its manifest; None: of none."""
    for name in _MANIFESTS:
        manifest = _read_json(Path(folder) / name)
        if isinstance(manifest, dict):
            if manifest.get("what") in _NAMED:
                return manifest["what"]
            # from before a manifest said what it is of
            if {"format", "model", "checksum"} <= manifest.keys():
                return "routers" if "method" in manifest else "posterior"
    return None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Folder:
    """A kind of folder that holds one file of data, ``<what>.safetensors``, and a JSON manifest
    with its name and a checksum.

    Replacing it, the new data get a name of their own, ``<what>-<12 hex of sha256>.safetensors``;
    then the new manifest takes the place of the old one, in one step; then the old data go. So the
    folder is the old one or the new one at every moment, on any file system and without a rename of
    folders, and what else is in it stays. Data that are the same keep their name.
    """

    what: str
    format: int | None = None
    manifest: str = "manifest.json"

    # ---- writing
    def check_free(self, folder: str | Path) -> None:
        """``ValueError`` where writing would meet what is not ours: the folder is not empty and
        holds none of this kind."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder, a new or an empty one")
        if not folder.exists() or kind_of(folder) == self.what:
            return
        if there := sorted(p.name for p in folder.iterdir() if p.name not in _PASSING):
            more = f" and {len(there) - 3} more" if len(there) > 3 else ""
            found = _NAMED.get(kind_of(folder), "something else")
            raise ValueError(f"{folder} holds {found} ({', '.join(there[:3])}{more}), and no whole "
                             f"{self._title} of ours that could be replaced: give a new or an "
                             "empty folder, or empty this one")

    def save(self, folder: str | Path, write: Callable[[Path], None], values: Mapping) -> None:
        """What ``write(path)`` writes, with JSON ``values``; whole or not at all. ``ValueError`` as
        :meth:`check_free`."""
        folder = Path(folder)
        self.check_free(folder)
        first = not folder.exists()
        try:
            with locked(folder / _LOCK):
                self.check_free(folder)
                self._sweep(folder)
                try:
                    self._save(folder, write, values)
                finally:
                    self._sweep(folder)
        finally:
            if first:
                with suppress(OSError):               # not empty, unless it failed
                    folder.rmdir()

    def _save(self, folder: Path, write: Callable[[Path], None], values: Mapping) -> None:
        new, manifest = folder / _NEW / self.what, folder / self.manifest
        new.parent.mkdir()                            # for what the writer itself may put beside
        if kind_of(folder) is None:                   # so that there never are data of nobody's
            self._mark_unfinished(folder)
        write(new)
        before = _read_json(manifest)
        path = self._data(folder, before)
        if "unfinished" not in before:
            digest = sha256(new)
            if not (path.exists() and sha256(path) == digest):
                path = folder / f"{self.what}-{digest[:12]}.safetensors"
        os.replace(new, path)
        after = {"what": self.what, "format": self.format, **values, "file": path.name}
        replace_file(manifest, json.dumps(after | {"checksum": _checksum(path, after)}, indent=1))

    def remove(self, folder: str | Path) -> None:
        """What is ours; and the folder, if nothing else is in it."""
        folder = Path(folder)
        if kind_of(folder) != self.what:
            return
        with locked(folder / _LOCK):
            self._mark_unfinished(folder)
            self._sweep(folder)
        with suppress(OSError):
            folder.rmdir()

    def _mark_unfinished(self, folder: Path) -> None:
        replace_file(folder / self.manifest, json.dumps({"what": self.what, "unfinished": True}))

    # ---- reading
    def holds_one(self, folder: str | Path) -> bool:
        """Whether one has been saved here. ``ValueError`` as :meth:`check_free`."""
        self.check_free(folder)
        ours = kind_of(folder) == self.what
        return ours and "unfinished" not in _read_json(Path(folder) / self.manifest)

    def values(self, folder: str | Path) -> dict:
        """The manifest. ``ValueError`` if it is missing, damaged, of another kind or format, or of
        a first save that was cut short."""
        if (kind := kind_of(folder)) not in (None, self.what):
            raise ValueError(f"{folder} holds {_NAMED[kind]}, not {_NAMED[self.what]}")
        try:
            manifest = json.loads((Path(folder) / self.manifest).read_text(encoding="utf-8"))
            unfinished, found = "unfinished" in manifest, manifest.get("format")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder} holds no readable {self._title} "
                             f"({self.manifest}: {error})") from None
        if kind is None or unfinished:
            why = "of one that was cut short" if unfinished else "something else's"
            raise ValueError(f"{folder} holds no readable {self._title} ({self.manifest} is {why})")
        if found != self.format:
            raise ValueError(f"{folder}: format {found!r}, this version reads {self.format}; "
                             "fit again")
        return manifest

    def read(self, folder: str | Path, load: Callable[[Path], T]) -> tuple[dict, T]:
        """The manifest and ``load(path)`` of its data, both of one save whatever is written
        meanwhile. ``ValueError`` as :meth:`values`, or if either is damaged."""
        while True:
            version, manifest = self._version(folder), self.values(folder)
            path, failure = self._data(Path(folder), manifest), None
            try:
                if _checksum(path, manifest) == manifest.get("checksum"):
                    return manifest, load(path)
            except Exception as error:                # whatever a reader makes of a file just gone
                failure = error
            if self._version(folder) != version:      # replaced in the meantime
                continue
            if failure is None or isinstance(failure, FileNotFoundError):
                raise ValueError(f"{folder} holds no whole {self._title}: it is cut short, or "
                                 "changed since it was written; remove it and fit again") from None
            raise failure

    # ---- names
    @property
    def _title(self) -> str:
        return "checkpoint" if self.what == "state" else self.what

    def _version(self, folder: str | Path) -> tuple | None:
        """Another one whenever the manifest has been replaced, also by an equal one."""
        with suppress(OSError):
            status = os.stat(Path(folder) / self.manifest)
            return status.st_ino, status.st_mtime_ns
        return None

    def _data(self, folder: Path, manifest: Mapping) -> Path:
        return folder / Path(str(manifest.get("file", f"{self.what}.safetensors"))).name

    def _sweep(self, folder: Path) -> None:
        """Removes what is ours and belongs to no whole save; the lock is held."""
        shutil.rmtree(folder / _NEW, ignore_errors=True)
        _beside(folder / self.manifest, "new").unlink(missing_ok=True)
        if kind_of(folder) != self.what:
            return
        manifest = _read_json(folder / self.manifest)
        unfinished = "unfinished" in manifest
        for path in folder.glob(f"{self.what}*.safetensors"):
            ours = re.fullmatch(rf"{self.what}(-[0-9a-f]{{12}})?\.safetensors", path.name)
            if ours and (unfinished or path != self._data(folder, manifest)):
                with suppress(OSError):               # open in a reader, on Windows: the next does
                    path.unlink()
        if unfinished:
            (folder / self.manifest).unlink()


def _checksum(path: Path, manifest: Mapping) -> str:
    """Over the data and the rest of the manifest: what is changed or cut short no longer fits."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- fingerprints
def _canonical(obj, where: str):
    """`obj` as plain JSON values, or a TypeError that says where in the config the culprit is."""
    if hasattr(obj, "dtype") and getattr(obj, "ndim", None) == 0:          # a numpy or torch scalar
        obj = obj.item()
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        if math.isfinite(obj):
            return obj
        raise TypeError(f"{where} is {obj}, which JSON cannot hold")
    if isinstance(obj, (list, tuple)):
        return [_canonical(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    if isinstance(obj, dict):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: keys must be strings")
        return {key: _canonical(value, f"{where}.{key}") for key, value in obj.items()}
    raise TypeError(f"{where} is a {type(obj).__name__}: use JSON values (for data or a model, its "
                    "fingerprint)")


def fingerprint(obj) -> str:
    """sha256 of JSON values (whatever the order of keys), of bytes, or of the content of a file or
    folder (a `Path`)."""
    if isinstance(obj, bytes):
        return hashlib.sha256(obj).hexdigest()
    if isinstance(obj, Path):
        digest = hashlib.sha256()
        files = sorted(p for p in obj.rglob("*") if p.is_file()) if obj.is_dir() else [obj]
        for file in files:
            name = file.relative_to(obj).as_posix() if obj.is_dir() else ""
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()
    text = json.dumps(_canonical(obj, "config"), sort_keys=True, separators=(",", ":"),
                      ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
