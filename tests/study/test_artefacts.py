"""Load-or-compute: what is finished is reused, what is not never looks finished."""
import importlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bmoe_utils import storage
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.study import output
from bmoe_utils.study import store as stores
from bmoe_utils.study.output import Store, atomic_write, fingerprint, project_root, save_figure, save_result


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


class Counter:
    """A build that counts its calls and writes one file."""
    calls = 0

    def __call__(self, path):
        self.calls += 1
        (path / "weights.bin").write_bytes(b"w" * 100)


def finished(store):
    return [p.name for p in store.root.iterdir() if not p.name.startswith(".")]


# ---------------------------------------------------------------- the store
def test_second_request_is_served_from_disk(store):
    build = Counter()
    first = store.folder("model", {"steps": 3, "lr": 0.1}, build)
    assert store.folder("model", {"lr": 0.1, "steps": 3}, build) == first and build.calls == 1
    assert first.name.startswith("model-") and len(first.name) == len("model-") + 12
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["config"] == {"steps": 3, "lr": 0.1} and manifest["files"] == {"weights.bin": fingerprint(b"w" * 100)}
    assert {"code", "versions", "created", "seconds", "peak_rss_mb"} <= set(manifest)


def test_config_kind_and_versions_each_change_the_key(store, monkeypatch):
    build = Counter()
    store.folder("model", {"steps": 3}, build)
    store.folder("model", {"steps": 4}, build)
    store.folder("other", {"steps": 3}, build)
    monkeypatch.setattr(stores, "library_versions", lambda _: {"torch": "2.99"})
    store.folder("model", {"steps": 3}, build)
    assert build.calls == 4 and len(finished(store)) == 4


def test_the_code_that_computes_is_in_the_key(store):
    """Of the build, and of what it is given; what that is: tests/study/test_source.py."""
    build, value = Counter(), {"x": np.zeros(2)}
    # by name: what this file imports is the build's own already
    routing, sketch = (importlib.import_module(f"bmoe_utils.{name}") for name in ("routers.maths", "experts.sketch"))
    folders = [store.folder("model", {}, build, code=code) for code in ((), (routing.entropy,), (sketch.gaussian,))]
    assert len(set(folders)) == 3 and store.folder("model", {}, build, code=(routing.jaccard,)) == folders[1]
    for kind, give in (("arrays", lambda: value), ("json", lambda: {"x": 1})):
        assert getattr(store, kind)(kind, {}, give) and getattr(store, kind)(kind, {}, give, code=(routing.entropy,))
    assert len(finished(store)) == 3 + 4


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_failed_build_leaves_nothing(store, error):
    def build(path):
        (path / "half").write_text("x")
        raise error
    with pytest.raises(type(error)):
        store.folder("model", {}, build)
    assert not [p for p in store.root.iterdir() if p.is_dir()]
    good = Counter()
    store.folder("model", {}, good)
    assert good.calls == 1


def _killed(root):
    def build(path):
        (path / "weights.bin").write_bytes(b"half")
        os._exit(9)                                   # as the kernel's out-of-memory killer would: no cleaning up
    Store(root).folder("model", {}, build)


def test_killed_build_is_swept_by_the_next(store):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(store.root,))
    process.start()
    process.join()
    assert process.exitcode == 9 and list(store.root.glob(".building-*")) and not finished(store)
    build = Counter()
    folder = store.folder("model", {}, build)
    assert build.calls == 1 and (folder / "weights.bin").stat().st_size == 100 and not list(store.root.glob(".building-*"))


def _slow(root, log, barrier):
    def build(path):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (path / "weights.bin").write_bytes(b"w" * 100)
    barrier.wait()
    assert (Store(root).folder("model", {}, build) / "weights.bin").stat().st_size == 100


def test_two_processes_build_once(store, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    barrier = context.Barrier(2)
    both = [context.Process(target=_slow, args=(store.root, log, barrier)) for _ in range(2)]
    [p.start() for p in both]
    [p.join() for p in both]
    assert [p.exitcode for p in both] == [0, 0] and len(log.read_text().split()) == 1 and len(finished(store)) == 1


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "manifest.json").write_text("{"),
    lambda folder: (folder / "manifest.json").write_text("[]"),
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "weights.bin").write_bytes(b"w" * 40),
    lambda folder: (folder / "weights.bin").unlink(),
], ids=["cut manifest", "odd manifest", "no manifest", "cut file", "no file"])
def test_damaged_artefact_is_rebuilt(store, damage):
    build = Counter()
    folder = store.folder("model", {}, build)
    damage(folder)
    assert store.folder("model", {}, build) == folder and build.calls == 2
    assert (folder / "weights.bin").stat().st_size == 100 and len(finished(store)) == 1


@pytest.mark.parametrize("place", [0, 57, 99])
def test_a_flipped_bit_is_found_by_the_next_process_and_built_again(store, place, capfd):
    build = Counter()
    folder = store.folder("model", {}, build)
    data = bytearray((folder / "weights.bin").read_bytes())
    data[place] ^= 0b0100_0000
    (folder / "weights.bin").write_bytes(data)                              # of the same size
    assert store.folder("model", {}, build) == folder and build.calls == 2
    assert (folder / "weights.bin").read_bytes() == b"w" * 100
    said = capfd.readouterr().err
    assert said == f"{folder.name} is damaged (weights.bin has changed since it was written): building it again\n"


def test_what_has_no_checksums_is_built_again_in_silence(store, capfd):
    build = Counter()
    folder = store.folder("model", {}, build)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {"weights.bin": 100}}))
    assert store.folder("model", {}, build) == folder and build.calls == 2 and not capfd.readouterr().err


def test_contents_are_read_once_in_a_process(store, monkeypatch):
    build, read, digest = Counter(), [], storage.hashlib.file_digest
    folder = store.folder("model", {}, build)
    os.utime(folder / "weights.bin", (1e9, 1e9))                            # not just written
    monkeypatch.setattr(storage.hashlib, "file_digest", lambda *a: (read.append(1), digest(*a))[1])
    for _ in range(5):
        store.folder("model", {}, build)
    assert build.calls == 1 and len(read) == 1


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("number", range(6))
def test_a_replacement_that_is_cut_short_loses_neither_and_readers_find_every_file(store, number, monkeypatch):
    """Stopped before each move; nothing that would have cleaned up runs, as after a kill."""
    calls, moved = [], []

    def build(path):
        calls.append(1)
        for name in "abc":
            (path / name).write_text(f"{name}{len(calls)}")

    folder = store.folder("model", {}, build)

    def stopping(move):
        def stop(source, target):
            if source.name != ".manifest.json.bmoe-new":                    # that is still the build
                moved.append(target)
                if len(moved) > number:
                    raise Stopped
            return move(source, target)
        return stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping(os.replace))
        patch.setattr(Path, "rename", stopping(Path.rename))
        try:
            store.folder("model", {}, build, fresh=True)
        except Stopped:
            pass
    assert len(moved) > number or len(moved) == 4                           # three files and the manifest
    assert all((folder / name).read_text() in (f"{name}1", f"{name}2") for name in "abc")
    assert store.folder("model", {}, build) == folder and len(calls) == 2   # what was built is not built again
    now = 2 if number else 1                                                # before the first move it is still the old one
    assert [(folder / name).read_text() for name in "abc"] == [f"a{now}", f"b{now}", f"c{now}"]
    store.folder("model", {}, build, fresh=True)
    assert [p.name for p in store.root.iterdir()] == [folder.name]


def test_a_build_that_fails_after_a_manifest_of_its_own_is_not_taken_for_whole(store):
    def build(path):
        (path / "manifest.json").write_text('{"what": "posterior"}')
        raise RuntimeError("no room")
    with pytest.raises(RuntimeError, match="no room"):
        store.folder("model", {}, build)
    assert not list(store.root.iterdir())


def _rebuilding(root):
    def build(path):
        content = os.urandom(1) * 5000
        for name in "ab":
            (path / name).write_bytes(content)
    while True:
        Store(root).folder("model", {}, build, fresh=True)


def test_killed_while_it_is_replaced_it_is_whole_for_the_next(store):
    moments, context = random.Random(0), multiprocessing.get_context("fork")

    def build(path):
        raise AssertionError("there was one")

    folder = store.folder("model", {}, lambda path: [(path / name).write_text("x") for name in "ab"])
    for _ in range(20):
        process = context.Process(target=_rebuilding, args=(store.root,))
        process.start()
        time.sleep(moments.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert store.folder("model", {}, build) == folder
        assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    store.folder("model", {}, lambda path: None, fresh=True)
    assert [p.name for p in store.root.iterdir()] == [folder.name]


def test_fresh_ignores_what_is_finished(store, monkeypatch):
    build = Counter()
    store.folder("model", {}, build)
    store.folder("model", {}, build, fresh=True)
    assert build.calls == 2
    for run, calls in [("a", 3), ("a", 3), ("b", 4), ("1", 5), ("1", 5), ("0", 5), ("", 5)]:
        monkeypatch.setenv("BMOE_FRESH", run)
        store.folder("model", {}, build)
        assert build.calls == calls, run


def test_failed_rebuild_keeps_the_finished_one(store):
    build = Counter()
    folder = store.folder("model", {}, build)
    with pytest.raises(ZeroDivisionError):
        store.folder("model", {}, lambda path: 1 / 0, fresh=True)
    assert store.folder("model", {}, build) == folder and build.calls == 1


@pytest.mark.parametrize("config, says", [
    ({"model": {"dtype": torch.float32}}, r"config\.model\.dtype is a dtype"),
    ({"seeds": [0, object()]}, r"config\.seeds\[1\] is a object"),
    ({"lr": float("nan")}, r"config\.lr is nan"),
    ({"x": {1: 2}}, r"config\.x has the key 1"),
    ({"x": np.zeros(3)}, r"config\.x is a ndarray"),
])
def test_config_that_is_not_json_says_where(store, config, says):
    with pytest.raises(TypeError, match=says):
        store.json("x", config, dict)


def test_numpy_scalars_and_tuples_are_the_same_config(store):
    assert fingerprint({"a": np.float64(0.5), "b": (1, np.int64(2))}) == fingerprint({"b": [1, 2], "a": 0.5})


def test_json_and_arrays_come_back_as_they_went_in(store):
    value = {"nll": 0.1 + 0.2, "names": ["é", None], "ok": True}
    assert store.json("table", {}, lambda: value) == store.json("table", {}, lambda: 1 / 0) == value
    x = torch.arange(6.0).reshape(2, 3)
    made = {"t": x.T, "same": x, "bf": x.to(torch.bfloat16), "n": np.arange(4)[::-1], "scalar": np.float64(2.5), "flags": np.array([True, False])}
    for compute in (lambda: made, lambda: 1 / 0):
        back = store.arrays("probs", {}, compute)
        for name, array in made.items():
            assert isinstance(back[name], torch.Tensor if isinstance(array, torch.Tensor) else np.ndarray)
            assert back[name].dtype == array.dtype and (back[name] == array).all()
    with pytest.raises(TypeError, match="'words'"):
        store.arrays("bad", {}, lambda: {"words": np.array(["a"])})


# ---------------------------------------------------------------- fingerprints and writing
def test_model_fingerprint_sees_every_weight_and_only_them():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    before = model_fingerprint(model)
    model.train(), model[0].weight.requires_grad_(False)
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model[0].weight[2, 3] += 1
    changed = model_fingerprint(model)
    model[1].running_mean[0] += 1
    assert len({before, changed, model_fingerprint(model), model_fingerprint(model.float())}) == 4


def test_fingerprint_of_files(tmp_path):
    (tmp_path / "a").write_text("x")
    one = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(tmp_path) != one and fingerprint(tmp_path / "b") != fingerprint(b"x") != fingerprint("x")


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "new" / "table.json", "old")
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_root_does_not_depend_on_the_working_directory(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_root() == root and Store().root == root / "data" / "cache"
    monkeypatch.setenv("BMOE_ROOT", str(tmp_path))
    assert project_root() == tmp_path


# ---------------------------------------------------------------- figures and results
def _figure():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1], label="MAP")
    ax.legend()
    return fig


def test_same_figure_same_bytes(project, monkeypatch):
    numbers = pd.DataFrame({"method": ["MAP"], "nll": [1 / 3]})
    first = save_figure(_figure(), "04", "reliability", numbers)
    assert first == project / "data" / "runs" / "interactive" / "figures" / "04_reliability.png"
    monkeypatch.setenv("BMOE_FIGURES", str(project / "figures"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    second = save_figure(_figure(), 4, "reliability", numbers)
    assert second.parent == project / "figures" and second.read_bytes() == first.read_bytes()
    assert second.with_suffix(".csv").read_text() == "method,nll\nMAP,0.333333\n"
    assert second.stat().st_size < 100_000 and b"Matplotlib" not in second.read_bytes()


def test_numbers_are_never_there_without_their_picture(project, monkeypatch):
    with pytest.raises(TypeError):
        save_figure(_figure(), "04", "line", {"x": object()})
    assert not (project / "data" / "runs").exists()                         # neither
    written = []
    monkeypatch.setattr(output, "atomic_write", lambda path, content: written.append(path.name))
    save_figure(_figure(), "04", "line", {"x": 1})
    save_figure(_figure(), "04", "line", pd.DataFrame({"x": [1]}))
    assert written == ["04_line.png", "04_line.json", "04_line.png", "04_line.csv", "04_line.tex"]


def test_a_figure_that_is_there_keeps_its_bytes_and_another_replaces_it(project):
    from PIL import Image
    path = save_figure(_figure(), "04", "line")
    ours = path.read_bytes()
    with Image.open(path) as picture:
        picture.save(path, compress_level=1)          # as another zlib might have written it
    theirs = path.read_bytes()
    assert theirs != ours and save_figure(_figure(), "04", "line").read_bytes() == theirs
    other = _figure()
    other.axes[0].set_title("another")
    replaced = save_figure(other, "04", "line").read_bytes()
    assert replaced not in (ours, theirs)
    path.write_bytes(theirs[:1000])                   # damaged
    assert save_figure(_figure(), "04", "line").read_bytes() == ours


def test_in_a_notebook_a_figure_is_shown_once_as_it_was_written(project, monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt
    fig, shown = _figure(), []
    save_figure(fig, "04", "line")
    assert plt.fignum_exists(fig.number)
    monkeypatch.setattr("matplotlib.get_backend", lambda: "inline")
    monkeypatch.setattr(IPython.display, "display", shown.append)
    path = save_figure(fig, "04", "line")
    (image,) = shown
    assert image.data == path.read_bytes() and not plt.fignum_exists(fig.number)
    assert image.width == plt.imread(path).shape[1] * 100 // 150      # written at 150 pixels an inch, shown at 100


def test_results_are_plain_and_rounded(project):
    path = save_result("04", "table", {"nll": np.float32(1.23456789), "probs": torch.tensor([0.5, 1 / 3]), "n": np.int64(3), "none": float("nan"), 1: "x"})
    assert json.loads(path.read_text()) == {"nll": 1.23457, "probs": [0.5, 0.333333], "n": 3, "none": None, "1": "x"}
    named = save_result("04", "pivot", pd.DataFrame({"nll": [1.0]}, index=pd.Index(["MAP"], name="method")))
    assert named.read_text() == "method,nll\nMAP,1\n"
    with pytest.raises(ValueError, match="name"):
        save_result("04", "../x", {})
