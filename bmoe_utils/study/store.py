"""Load-or-compute: artefacts addressed by their content.

A chapter asks a `Store` for an artefact by what determines it (config, code, library versions). If a finished one is on
disk it is returned, otherwise it is built beside its place and moved there, so that every chapter runs alone, a re-run
recomputes nothing and an interrupted build never looks finished.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path

from ..storage import _canonical, atomic_write, fingerprint, locked, replace_file, sha256
from .source import PACKAGE, closure, code_version, library_versions

_PROCESS_RUN = uuid.uuid4().hex[:12]                  # stands in for the run id when BMOE_FRESH is just "1"


def project_root() -> Path:
    """The folder that holds notebooks/ and data/; `BMOE_ROOT` overrides it. Never the working directory by itself."""
    if os.environ.get("BMOE_ROOT"):
        return Path(os.environ["BMOE_ROOT"]).resolve()
    cwd = Path.cwd()                                  # searched only when the package was installed away from its project
    for folder in (PACKAGE.parent, cwd, *cwd.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "bmoe_utils").is_dir():
            return folder
    raise FileNotFoundError("no project folder above the working directory: set BMOE_ROOT to the one that holds notebooks/")


def peak_memory_mb(children: bool = False) -> float | None:
    """Peak resident memory of this process so far, or of the largest child that has ended; None where unknown."""
    try:
        import resource
    except ImportError:                               # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


# ---------------------------------------------------------------------------------------------- the store
class Store:
    """Finished artefacts in `root` (default data/cache), each a folder `kind-<12 hex of its key>` with a manifest.json."""

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root).resolve() if root else project_root() / "data" / "cache"

    def folder(self, kind: str, config: dict, build, *, code=(), fresh: bool = False) -> Path:
        """The finished folder for this key; where there is none, `build(path)` fills a new one, which is then moved in place.

        The key covers kind, config, all code that `build`, the functions in `code` and this store can reach, and the versions of
        the libraries that this code imports (`source`). `fresh`, or the environment's `BMOE_FRESH=<run id>`, ignores a finished
        folder; a run id does so once per run and artefact.
        """
        if not re.fullmatch(r"[A-Za-z0-9_]+", kind):
            raise ValueError(f"kind {kind!r}: letters, digits and underscores only")
        reached = closure((Store.folder, build, *code))
        key = {"kind": kind, "config": _canonical(config, "config"), "code": code_version(reached), "versions": library_versions(reached)}
        final = self.root / f"{kind}-{fingerprint(key)[:12]}"
        run = {"": "", "0": "", "1": _PROCESS_RUN}.get(value := os.environ.get("BMOE_FRESH", ""), value)
        if not fresh and self._finished(final, run):
            return final
        beside = self.root / f".building-{final.name}"
        # a second process waits here, then finds the first one's result
        waiting = f"waiting: another process is building {final.name}"
        with locked(self.root / f".{final.name}.lock", say=waiting):
            self._settle(beside, final)
            if not fresh and self._finished(final, run):
                return final
            if damage := self._damage(final):
                print(f"{final.name} is damaged ({damage}): building it again",
                      file=sys.stderr, flush=True)
            beside.mkdir()
            try:
                start = time.perf_counter()
                build(beside)
                files = {p.relative_to(beside).as_posix(): sha256(p)
                         for p in sorted(beside.rglob("*")) if p.is_file()}
                manifest = {**key, "run": run, "files": files, "seconds": round(time.perf_counter() - start, 2),
                            "peak_rss_mb": peak_memory_mb(), "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
                replace_file(beside / "manifest.json", json.dumps(manifest, indent=1))
            finally:
                self._settle(beside, final)
        return final

    def json(self, kind: str, config: dict, compute, *, code=(), fresh: bool = False):
        """`compute()`'s JSON value, from disk where it is finished (tuples come back as lists)."""
        def build(path):
            atomic_write(path / "value.json", json.dumps(_canonical(compute(), "value"), ensure_ascii=False))
        return json.loads((self.folder(kind, config, build, code=(compute, *code), fresh=fresh) / "value.json").read_text(encoding="utf-8"))

    def arrays(self, kind: str, config: dict, compute, *, code=(), fresh: bool = False) -> dict:
        """`compute()`'s dict of numpy arrays and torch tensors, as safetensors; each comes back as the type it was, on the CPU."""
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        def build(path):
            values, numpy = {}, []
            for name, value in compute().items():
                if not isinstance(value, torch.Tensor):
                    numpy.append(name)
                    value = torch.from_numpy(_numeric(name, value))
                values[name] = value.detach().cpu().contiguous().clone()      # safetensors refuses views and shared storage
            save_file(values, path / "arrays.safetensors", metadata={"numpy": json.dumps(numpy)})
        with safe_open(self.folder(kind, config, build, code=(compute, *code), fresh=fresh) / "arrays.safetensors", "pt") as file:
            numpy = json.loads(file.metadata()["numpy"])
            return {name: file.get_tensor(name).numpy() if name in numpy else file.get_tensor(name) for name in file.keys()}

    def _finished(self, final: Path, run: str) -> bool:
        """Whether every file's content, read once in a process, is what the manifest says."""
        if (manifest := _manifest(final)) is None or run and manifest.get("run") != run:
            return False
        try:
            return all(sha256(final / name) == known for name, known in manifest["files"].items())
        except OSError:
            return False

    def _damage(self, final: Path) -> str | None:
        """What is wrong with what was finished once, in a few words; None also where the manifest
        is an older version's and has no checksums."""
        if not final.exists():
            return None
        if (manifest := _manifest(final)) is None:
            return "manifest.json cannot be read"
        for name, known in manifest["files"].items():
            if not (final / name).is_file():
                return f"{name} is missing"
            if isinstance(known, str) and sha256(final / name) != known:
                return f"{name} has changed since it was written"
        return None

    def _settle(self, beside: Path, final: Path):
        """Put a build that is whole, which its manifest says, in place; remove one that is not. The
        artefact's lock is held.

        Where another one is in place (asked for afresh, or damaged), it is replaced file by file,
        its manifest last, so that whoever reads from there meanwhile finds every file; when that is
        cut short, the next call goes on with it.
        """
        if (manifest := _manifest(beside)) is not None:
            names = [*manifest["files"], "manifest.json"]
            if not final.exists():
                beside.rename(final)
                return
            for name in names:
                if (beside / name).exists():
                    (final / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(beside / name, final / name)
            for path in final.rglob("*"):
                if path.is_file() and path.relative_to(final).as_posix() not in names:
                    path.unlink()
        for leftover in self.root.glob(f"{beside.name}*"):  # with a suffix: of earlier versions
            shutil.rmtree(leftover, ignore_errors=True)


def _manifest(folder: Path) -> dict | None:
    """An artefact's; None where there is none, or it cannot be read, or it is of something else."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _numeric(name: str, value):
    import numpy as np
    array = np.array(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"arrays: {name!r} has dtype {array.dtype}, not a numeric one")
    return array
