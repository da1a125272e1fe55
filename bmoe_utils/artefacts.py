"""Load-or-compute: artefacts addressed by their content, and where figures and their numbers go.

A chapter asks a `Store` for an artefact by what determines it (config, code, library versions). If a finished one is on
disk it is returned, otherwise it is built beside its place and moved there, so that every chapter runs alone, a re-run
recomputes nothing and an interrupted build never looks finished.
"""
from __future__ import annotations

import ast, hashlib, io, json, math, os, re, shutil, sys, time, uuid
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .tables import csv_text

PACKAGE = Path(__file__).resolve().parent
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


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write beside `path`, then move: a reader sees the old content or the new, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------- fingerprints
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
    raise TypeError(f"{where} is a {type(obj).__name__}: use JSON values (for data or a model, its fingerprint)")


def fingerprint(obj) -> str:
    """sha256 of JSON values (whatever the order of keys), of bytes, or of the content of a file or folder (a `Path`)."""
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
    text = json.dumps(_canonical(obj, "config"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(model) -> str:
    """sha256 over names, shapes, dtypes and bytes of parameters and persistent buffers; the device does not matter."""
    import torch
    from . import offload
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            owner, _, leaf = name.rpartition(".")
            tensor = offload.values(model.get_submodule(owner), leaf)
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        flat = tensor.detach().reshape(-1)
        for block in flat.split(1 << 22):             # in blocks: a large model is never copied to the host whole
            digest.update(memoryview(block.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def code_version(modules) -> str:
    """Hash of what the named bmoe_utils modules do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for module in sorted(modules, key=str):
        path = PACKAGE / f"{module.removeprefix('bmoe_utils.')}.py" if isinstance(module, str) else Path(module.__file__)
        if not path.is_file():
            raise ValueError(f"no module {module!r} in {PACKAGE.name}: {', '.join(sorted(p.stem for p in PACKAGE.glob('*.py')))}")
        digest.update(f"{path.stem}\0{_source_hash(path, path.stat().st_mtime_ns)}\0".encode())
    return digest.hexdigest()


@cache
def _source_hash(path: Path, modified: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, False) is not None:
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@cache
def _versions() -> dict:
    """major.minor of the libraries whose numerics an artefact depends on."""
    found = {"python": "%d.%d" % sys.version_info[:2]}
    for name in ("torch", "transformers"):
        try:
            found[name] = ".".join(version(name).split("+")[0].split(".")[:2])
        except PackageNotFoundError:
            found[name] = None
    return found


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

    def folder(self, kind: str, config: dict, build, *, modules=(), fresh: bool = False) -> Path:
        """The finished folder for this key; where there is none, `build(path)` fills a new one, which is then moved in place.

        The key covers kind, config, the code of `modules` (names in bmoe_utils) and the library versions. `fresh`, or the
        environment's `BMOE_FRESH=<run id>`, ignores a finished folder; a run id does so once per run and artefact.
        """
        if not re.fullmatch(r"[A-Za-z0-9_]+", kind):
            raise ValueError(f"kind {kind!r}: letters, digits and underscores only")
        key = {"kind": kind, "config": _canonical(config, "config"), "code": code_version(modules), "versions": _versions()}
        final = self.root / f"{kind}-{fingerprint(key)[:12]}"
        run = {"": "", "0": "", "1": _PROCESS_RUN}.get(value := os.environ.get("BMOE_FRESH", ""), value)
        if not fresh and self._finished(final, run):
            return final
        with self._lock(final.name):                  # a second process waits here, then finds the first one's result
            if not fresh and self._finished(final, run):
                return final
            self._sweep(final.name)
            beside = self.root / f".building-{final.name}-{uuid.uuid4().hex[:6]}"
            beside.mkdir()
            try:
                start = time.perf_counter()
                build(beside)
                files = {p.relative_to(beside).as_posix(): p.stat().st_size for p in sorted(beside.rglob("*")) if p.is_file()}
                manifest = {**key, "run": run, "files": files, "seconds": round(time.perf_counter() - start, 2),
                            "peak_rss_mb": peak_memory_mb(), "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
                atomic_write(beside / "manifest.json", json.dumps(manifest, indent=1))
                if final.exists():                    # stale or damaged: moved aside first, a folder cannot replace a folder
                    final.rename(self.root / f".building-{final.name}-old{uuid.uuid4().hex[:6]}")
                beside.rename(final)
            finally:
                self._sweep(final.name)
        return final

    def json(self, kind: str, config: dict, compute, *, modules=(), fresh: bool = False):
        """`compute()`'s JSON value, from disk where it is finished (tuples come back as lists)."""
        def build(path):
            atomic_write(path / "value.json", json.dumps(_canonical(compute(), "value"), ensure_ascii=False))
        return json.loads((self.folder(kind, config, build, modules=modules, fresh=fresh) / "value.json").read_text(encoding="utf-8"))

    def arrays(self, kind: str, config: dict, compute, *, modules=(), fresh: bool = False) -> dict:
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
        with safe_open(self.folder(kind, config, build, modules=modules, fresh=fresh) / "arrays.safetensors", "pt") as file:
            numpy = json.loads(file.metadata()["numpy"])
            return {name: file.get_tensor(name).numpy() if name in numpy else file.get_tensor(name) for name in file.keys()}

    def _finished(self, final: Path, run: str) -> bool:
        try:
            manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
            whole = all((final / name).stat().st_size == size for name, size in manifest["files"].items())
            return whole and (not run or manifest["run"] == run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @contextmanager
    def _lock(self, name: str):
        from filelock import FileLock, Timeout
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / f".{name}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"waiting: another process is building {name}", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, name: str):
        """Remove what unfinished builds of this artefact left (its lock is held, so none of them is alive)."""
        for leftover in self.root.glob(f".building-{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _numeric(name: str, value):
    import numpy as np
    array = np.array(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"arrays: {name!r} has dtype {array.dtype}, not a numeric one")
    return array


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
    if hasattr(numbers, "to_csv"):
        plain = all(index is None for index in numbers.index.names)          # an unnamed index carries nothing
        atomic_write(_target(chapter, name, ".tex"), latex(numbers, index=not plain))
        return atomic_write(_target(chapter, name, ".csv"), csv_text(numbers, index=not plain))
    return atomic_write(_target(chapter, name, ".json"), json.dumps(_plain(numbers), indent=1, ensure_ascii=False) + "\n")


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
    if numbers is not None:
        save_result(chapter, name, numbers)
    atomic_write(path, written.getvalue())
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
