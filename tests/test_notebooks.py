"""The form of the chapters, without running them (nbval runs them)."""
import ast
import re
from pathlib import Path

import nbformat
import pytest

from bmoe_utils.study.run.runner import PARAMETERS

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = sorted(FOLDER.glob("*.ipynb"))
KEPT = {"keep_output", "nbval-check-output"}
MACHINE = re.compile(r"/(?:home|root|work|tmp|Users|mnt|opt)/|[A-Z]:\\\\|file://")


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def nb(path):
    return nbformat.read(path, as_version=4)


def kept(cell) -> bool:
    return bool(KEPT & set(cell.metadata.get("tags", []))) or "# NBVAL_CHECK_OUTPUT" in cell.source


def test_chapters_are_numbered_in_reading_order():
    if not CHAPTERS:
        pytest.skip("notebooks/ holds no chapter yet")
    names = [path.name for path in CHAPTERS]
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", name) for name in names), names
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))


def test_is_a_valid_notebook_for_the_standard_kernel(nb):
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3" and nb.metadata.kernelspec.get("language", "python") == "python"


def test_opens_with_its_title_and_claim(nb):
    first = nb.cells[0]
    title, _, claim = first.source.strip().partition("\n")
    assert first.cell_type == "markdown" and re.match(r"# \S", title) and claim.strip(), "first cell: # title, then the claim"
    assert sum(cell.cell_type == "markdown" and bool(re.match(r"# \S", cell.source)) for cell in nb.cells) == 1, "one title"


def test_declares_the_four_parameters_with_smoke_values(nb):
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(tagged[0].source).body}
    assert values == {"profile": "smoke", "task": "world", "model": None, "overrides": {}} and tuple(values) == PARAMETERS
    assert next(cell for cell in nb.cells if cell.cell_type == "code") is tagged[0], "nothing runs before the parameters"


def test_formulas_are_whole(nb):
    """A lone dollar sign means a formula that lost its beginning."""
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            prose = re.sub(r"`[^`]*`", "", cell.source)
            assert prose.count("$") % 2 == 0, f"cell {index + 1}"
            assert all(part.strip() for part in prose.replace("$$", "$").split("$")[1::2]), f"cell {index + 1}: an empty formula"


def test_outputs_are_stripped_but_for_the_checked_ones(nb):
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            assert kept(cell) or not cell.outputs, f"cell {index + 1} keeps output: strip it, or tag it keep_output"
            # nbval takes a cell without a count for one that was never run, and then its output for an error
            assert (cell.execution_count is None) == (not cell.outputs), f"cell {index + 1}: an execution count where there is output, and only there"
            if "# NBVAL_CHECK_OUTPUT" in cell.source or "nbval-check-output" in cell.metadata.get("tags", []):
                assert cell.outputs, f"cell {index + 1} is to be checked against an output it does not have"
            assert not {"image/png", "image/svg+xml"} & {key for output in cell.outputs for key in output.get("data", {})}, f"cell {index + 1} keeps an image"


def test_holds_no_trace_of_a_machine(path):
    found = MACHINE.search(path.read_text(encoding="utf-8"))
    assert not found, f"a path of one machine: {found and found.group()}"
    assert path.stat().st_size < 200_000
