"""What a result depends on in the source: the modules that the code computing it imports, directly or not.

Found by reading the imports, so that there is no list to keep by hand. A function counts with the whole of its module; what a
module imports for type checkers alone does not count, nor do comments, docstrings and layout. The package's own ``__init__``,
which only says where the public names are, is left out.

A process computes with the code as it was when it began: a module is read once, and if its file changes later, results are still
those of, and kept under, the code that runs (:func:`code_version` says so once).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import marshal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Source:
    """One file: a hash of what it does, the package's modules and the other libraries that it imports."""

    digest: str
    modules: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its name: ``bmoe_utils.study.stages.data``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def closure(roots: Iterable[Callable | str]) -> dict[str, Source]:
    """Name -> source of all files that the functions (or modules of the package, by name) can reach: their own, and what these
    import, directly or not."""
    found: dict[str, Source] = {}
    left = [_place(root) for root in roots]
    while left:
        name, source = left.pop()
        if name not in found:
            found[name] = source
            left += [(module, _read(modules()[module])) for module in source.modules]
    return found


def code_version(reached: Mapping[str, Source]) -> str:
    """A hash of the files of a :func:`closure`."""
    _tell_of_changes()
    return _hash("".join(f"{name}\0{source.digest}\0" for name, source in sorted(reached.items())))


def library_versions(reached: Mapping[str, Source]) -> dict[str, str]:
    """``major.minor`` of Python and of every library that the files of a :func:`closure` import, by the library's name."""
    names = {d for source in reached.values() for library in source.libraries for d in _distributions().get(library, ())}
    numbers = {name: ".".join(version(name).split("+")[0].split(".")[:2]) for name in sorted(names)}
    return {"python": "%d.%d" % sys.version_info[:2]} | numbers


_distributions = cache(packages_distributions)


def _place(root: Callable | str) -> tuple[str, Source]:
    """Where the search begins: the module named, or the one that holds the function. Code that is in no file (typed into a
    notebook) counts as it stands, and may call anything of the package."""
    if isinstance(root, str):
        if root not in modules():
            raise ValueError(f"no module {root!r} in {PACKAGE.name}: {', '.join(modules())}")
        return root, _read(modules()[root])
    while isinstance(root, partial):
        root = root.func
    name = getattr(root, "__module__", None) or type(root).__module__
    path = modules().get(name) or getattr(sys.modules.get(name), "__file__", None)
    if path:
        return name, _read(Path(path))
    try:
        text = inspect.getsource(root)
    except (OSError, TypeError):
        text = marshal.dumps(getattr(root, "__code__", None)).hex()
    return f"{name}.{getattr(root, '__qualname__', '')}", Source(_hash(text), frozenset(modules()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _read(path: Path) -> Source:
    _written[path] = path.stat().st_mtime_ns
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1]) if path.is_relative_to(PACKAGE) else ""
    imported = {name for node in _running(tree) for name in _imports(node, package)}
    own = {part for name in imported for part in _own(name)}
    foreign = {top for name in imported if (top := name.partition(".")[0]) not in (PACKAGE.name, *sys.stdlib_module_names)}
    for node in ast.walk(tree):
        described = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if described and ast.get_docstring(node, False) is not None:
            del node.body[0]
    return Source(_hash(ast.dump(tree)), frozenset(own), frozenset(foreign))


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that ``if TYPE_CHECKING:`` guards."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", None)) == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    """What the statement imports, by full name: a module, or a name in one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _own(name: str) -> Iterator[str]:
    """The modules of the package that importing ``name`` runs, or that a public name of the package stands for: then all."""
    if name.partition(".")[0] != PACKAGE.name:
        return
    parts = name.split(".")
    inside = [".".join(parts[:n]) for n in range(2, len(parts) + 1) if ".".join(parts[:n]) in modules()]
    yield from inside or (module for module in modules() if module != PACKAGE.name)


_written: dict[Path, int] = {}  # of the files read, their time at that moment


def _tell_of_changes() -> None:
    for path, then in list(_written.items()):
        if not path.exists() or path.stat().st_mtime_ns != then:
            del _written[path]  # said once
            warnings.warn(f"{path.name} has changed since this process read it: results are still those of the code as it was then. "
                          "Restart (in a notebook: the kernel) to compute with the new", stacklevel=5)
