"""The dependency lists agree, the pins solve the ranges, the commands say what they are."""
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


@pytest.fixture
def listed(root):
    """What the package needs, and what its extras do."""
    with open(root / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    return [Requirement(line) for part in (project["dependencies"], *project["optional-dependencies"].values()) for line in part]


@pytest.fixture
def pinned(root):
    lines = [line.strip() for line in (root / "constraints.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_conda_installs_the_same_list(root, listed):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip[-1] == "-e ."
    assert {str(Requirement(item)) for item in pip[:-1]} == {str(item) for item in listed}
    with open(root / "pyproject.toml", "rb") as file:
        python = tomllib.load(file)["project"]["requires-python"]
    assert f"python{python}" in plain and "pip" in plain


def test_pins_solve_the_ranges(listed, pinned):
    pins = {canonicalize_name(item.name): item for item in pinned}
    assert len(pins) == len(pinned), "a package is pinned twice"
    for item in listed:
        (spec,) = pins[canonicalize_name(item.name)].specifier
        assert spec.operator == "==" and item.specifier.contains(spec.version), f"{item} against {spec}"


def test_every_pin_admits_the_oldest_python_promised(root, pinned):
    """Debian 12's is 3.11.2. Where other versions than the pinned are installed, those packages say nothing."""
    with open(root / "pyproject.toml", "rb") as file:
        (promised,) = SpecifierSet(tomllib.load(file)["project"]["requires-python"])
    oldest = ".".join([*promised.version.split("."), "0", "0"][:3])
    checked, refusing = 0, []
    for item in pinned:
        try:
            found = metadata(item.name)
        except PackageNotFoundError:  # of another platform
            continue
        if item.specifier.contains(found["Version"].partition("+")[0]):
            checked += 1
            if not SpecifierSet(found.get("Requires-Python", "")).contains(oldest):
                refusing.append(f"{item} asks for Python {found.get('Requires-Python')}")
    assert not refusing and checked


def test_pins_are_portable(root, pinned):
    text = (root / "constraints.txt").read_text()
    assert "://" not in text and "--" not in text and "@" not in text
    for item in pinned:
        (spec,) = item.specifier
        assert spec.operator == "==" and Version(spec.version).local is None, item


def test_ranges_cover_what_the_study_promises(listed):
    ranges = {item.name: item.specifier for item in listed}
    assert all(ranges["torch"].contains(v) for v in ("2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu"))
    assert all(ranges["transformers"].contains(v) for v in ("5.17.0", "5.23.0", "5.30.0"))


def test_nothing_asks_for_torchvision_or_cuda(listed, pinned):
    names = {canonicalize_name(item.name) for item in [*listed, *pinned]}
    assert not {name for name in names if re.match(r"torchvision|torchaudio|nvidia|cuda|triton", name)}


def test_package_imports_only_what_is_listed(root, listed):
    """A module that is there by luck (through another package) would be missing on the next machine."""
    import ast
    names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    known = {canonicalize_name(item.name) for item in listed} | {"bmoe-utils"}
    for path in sorted((root / "bmoe_utils").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
                assert canonicalize_name(names.get(top, top)) in known, f"{path.name} imports {top}, which pyproject.toml does not list"


def test_make_alone_explains_itself(root):
    shown = subprocess.run(["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, timeout=10)
    assert shown.returncode == 0
    for target in ("reproduce", "test", "smoke", "lab", "clean"):
        assert f"make {target} " in shown.stdout


def test_make_names_the_python_it_needs(root, tmp_path):
    """Without a suitable Python: a sentence, not a traceback, and no half-made environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((root / name).read_text())
    tried = subprocess.run(["make", "install", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True, timeout=10)
    assert tried.returncode != 0 and "Python 3.11" in tried.stderr and not (tmp_path / ".venv").exists()


def test_ci_runs_the_tests(root):
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


# ---- what a visitor sees --------------------------------------------------------------------------------------------
def test_the_readme_shows_the_committed_run(root):
    """Its table is the run's own, every figure it names is there, and every committed figure is shown."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    header, *rows = [line.split(",") for line in (root / "figures" / "04_table.csv").read_text(encoding="utf-8").splitlines()]
    for cells in [header, *rows]:
        assert "| " + " | ".join(cells) + " |" in readme
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in (root / "figures").glob("*.png")) and shown
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)#:]+)\)", readme):
        assert (root / target).exists(), target
