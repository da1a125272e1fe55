"""What every test shares. Set before torch and the hub are imported: no network, and figures never to figures/."""
import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")                  # tiny matrices: threads only get into each other's way
for name in ("BMOE_FIGURES", "BMOE_FRESH", "BMOE_ROOT"):       # a caller's run must not leak into the tests
    os.environ.pop(name, None)


def pytest_configure(config):
    import matplotlib
    matplotlib.use("Agg")                                     # not through the environment: notebook kernels draw inline


def pytest_collection_modifyitems(items):
    """The longest file first: begun last, it would leave the other processes without work."""
    items.sort(key=lambda item: "test_gpu_profile" not in item.nodeid)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every test, alone or in the suite; torch and numpy only where they are loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def ax():
    """Empty axes to draw in, closed afterwards."""
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots()
    yield axes
    plt.close(fig)


@pytest.fixture
def root() -> Path:
    """The project folder."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real question files, one folder a task with train and test; they are not part of the repository."""
    folder = Path(os.environ.get("BMOE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real")
    if not folder.is_dir():
        pytest.skip("no real question files: put them in ../shared/data/real or point BMOE_REAL_DATA at them")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project folder that artefacts, figures and the runner take for theirs."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("BMOE_ROOT", str(tmp_path))
    return tmp_path
