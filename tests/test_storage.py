"""Whole or not at all: a folder or file that is replaced, whatever stops the writer, whoever reads
meanwhile, whatever else is there."""
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from bmoe_utils import storage
from bmoe_utils.storage import Folder, Lock, atomic_write, kind_of, locked

KIND, OTHER = Folder("posterior", format=2), Folder("routers", format=2)


def content(n):
    return f"{n} ".encode() * (1000 + 37 * (n % 50))  # of other lengths: a mix would show


def save(folder, n, kind=KIND):
    def write(path):
        beside = path.with_name(f".tmp{random.random()}")  # as safetensors' own does
        beside.write_bytes(content(n))
        beside.rename(path)
    kind.save(folder, write, {"n": n})


def read(folder, kind=KIND):
    """Which save is there; whole, or this raises."""
    manifest, data = kind.read(folder, Path.read_bytes)
    assert data == content(manifest["n"])
    return manifest["n"]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- kills, interrupts, readers
def forked(work):
    """A process of its own that does ``work()`` and ends, 0 if that went well; nothing of the
    tests' is cleaned up in it."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def killed_writer(folder, start, after, at_work=lambda: True):
    """A process that replaces the folder over and over, killed by what cannot be caught: some time
    after it is ``at_work``, which a fork on a busy machine may take long to be."""
    child = forked(lambda: [save(folder, n) for n in itertools.count(start + 1)])
    until(at_work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def until(there, seconds=60):
    begun = time.monotonic()
    while not there():
        assert time.monotonic() - begun < seconds
        time.sleep(0.0005)


def reading(folder, log):
    """A process that reads the folder over and over and writes down what it finds; the first
    failure ends it."""
    def work():
        with open(log, "a") as file:
            while True:
                file.write(f"{read(folder)}\n")
                file.flush()
    return forked(work)


needs_kill = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks, to be killed")


@needs_kill
def test_killed_at_any_moment_it_is_the_old_or_the_new_and_readers_never_notice(tmp_path, kills=40):
    folder, moments, at = tmp_path / "saved", random.Random(0), 0
    began = time.perf_counter()
    for n in range(-5, 1):
        save(folder, n)
    span = time.perf_counter() - began  # kills meet any step of one
    reader = reading(folder, tmp_path / "log")
    try:
        until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size)
        for _ in range(kills):
            killed_writer(folder, at, moments.uniform(0, span), lambda at=at: read(folder) > at)
            assert (now := read(folder)) >= at
            at = now
        assert os.waitpid(reader, os.WNOHANG) == (0, 0)                     # it has not failed
    finally:
        os.kill(reader, signal.SIGKILL)
    seen = [int(line) for line in (tmp_path / "log").read_text().split("\n")[:-1]]
    assert at >= kills and seen == sorted(seen)  # and never went back to an older one
    save(folder, at + 1)
    assert read(folder) == at + 1 and len(names(folder)) == 2  # what killed ones left is gone


@needs_kill
def test_a_first_save_that_is_killed_leaves_nothing_that_counts(tmp_path):
    for n, wait in enumerate((0.0, 0.0005, 0.001, 0.002, 0.004)):
        folder = tmp_path / f"{n}"
        killed_writer(folder, 0, wait)
        if KIND.holds_one(folder):
            assert read(folder) >= 1
        save(folder, 0)
        assert read(folder) == 0 and len(names(folder)) == 2


class Stopped(BaseException):
    """As an interrupt: not caught by ``except Exception``."""


def stepwise(monkeypatch, stop_at, before):
    """Every change to the file system counts as a step; Stopped at this one, before or after it is
    done. Returns the count."""
    count = [0]
    calls = [(os, name) for name in ("replace", "unlink", "open", "mkdir", "rmdir", "close")]
    for owner, name in [*calls, (Path, "write_bytes")]:
        def step(*args, original=getattr(owner, name), **kwargs):
            count[0] += 1
            if count[0] == stop_at and before:
                raise Stopped
            out = original(*args, **kwargs)
            if count[0] == stop_at:
                raise Stopped
            return out
        monkeypatch.setattr(owner, name, step)
    return count


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("there", [0, 1, 2], ids=["first save", "second save", "third save"])
def test_interrupted_at_any_step_it_is_the_old_or_the_new(there, before, tmp_path, monkeypatch):
    outcomes, number, total = set(), 0, 10**6
    while number < total:
        number += 1
        folder = tmp_path / f"{number}"
        for n in range(there):
            save(folder, n)
        if there:
            (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            count = stepwise(patch, number, before)
            try:
                save(folder, 9)
                total = count[0]                                            # all have been tried
            except (Stopped, OSError):  # rmtree closes twice then
                pass
        outcomes.add(now := read(folder) if KIND.holds_one(folder) else None)
        assert now in (9, there - 1 if there else None)
        save(folder, 10)
        assert read(folder) == 10 and len(names(folder)) == 2 + bool(there)
    assert total > 8 and outcomes == {9, there - 1 if there else None}


def test_a_failed_save_says_so_and_leaves_what_was_there(tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        KIND.save(tmp_path / "new", full, {})
    assert not (tmp_path / "new").exists()
    save(tmp_path / "old", 1)
    before = {p: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    with pytest.raises(OSError, match="No space left"):
        KIND.save(tmp_path / "old", full, {})
    with pytest.raises(TypeError, match="JSON"):
        KIND.save(tmp_path / "old", lambda path: path.write_bytes(b"x"), {"n": object()})
    assert {p: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize("error", [FileNotFoundError, RuntimeError, ValueError])
def test_replaced_while_it_is_read_it_is_read_again(error, tmp_path):
    """Also by its equal, with another one in between, whatever a reader makes of a file gone."""
    save(tmp_path, 1)
    tried = []

    def load(path):
        tried.append(path.name)
        if len(tried) == 1:
            save(tmp_path, 2)
            save(tmp_path, 1)
            raise error("gone")
        return path.read_bytes()

    assert KIND.read(tmp_path, load)[1] == content(1) and len(tried) == 2
    with pytest.raises(PermissionError):  # not damage, and nothing changed
        KIND.read(tmp_path, lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))


# ---------------------------------------------------------------- names, and what is not ours
def test_names_are_plain_until_other_data_take_their_place(tmp_path):
    folder = tmp_path / "saved"
    save(folder, 1)
    assert names(folder) == ["manifest.json", "posterior.safetensors"]
    save(folder, 1)                                                         # the same again
    assert names(folder) == ["manifest.json", "posterior.safetensors"]
    save(folder, 2)
    manifest, other = names(folder)
    assert re.fullmatch(r"posterior-[0-9a-f]{12}\.safetensors", other)
    assert json.loads((folder / manifest).read_text())["file"] == other
    (folder / "posterior-notes.txt").write_text("mine")
    (folder / "posterior-of-may.safetensors").write_text("mine")
    save(folder, 3)
    assert len(names(folder)) == 4
    KIND.remove(folder)
    assert names(folder) == ["posterior-notes.txt", "posterior-of-may.safetensors"]


def test_a_folder_from_before_manifests_named_their_file_is_read_and_replaced(tmp_path):
    (tmp_path / "posterior.safetensors").write_bytes(content(5))
    manifest = {"format": 2, "n": 5, "options": {}, "model": "ab"}
    manifest["checksum"] = storage._checksum(tmp_path / "posterior.safetensors", manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert kind_of(tmp_path) == "posterior" and read(tmp_path) == 5
    save(tmp_path, 6)
    assert read(tmp_path) == 6 and len(names(tmp_path)) == 2


def weights(folder):
    (folder / "model.safetensors").write_bytes(b"hours of training")
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("fill, says", [
    (weights, r"holds something else \(config.json, model.safetensors\), and no whole posterior"),
    (lambda folder: [(folder / f"{i}.txt").touch() for i in range(5)], "0.txt, 1.txt, 2.txt and 2"),
    (lambda folder: (folder / ".git").mkdir(), ".git"),
    (lambda folder: save(folder, 1, OTHER), r"holds routers \(manifest.json, routers"),
    (lambda folder: (folder / "manifest.json").write_text('{"name": "an app"}'), "something else"),
    (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "something else"),
    (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "something else"),
    (lambda folder: (folder / "posterior.safetensors").write_bytes(b"x"), "something else"),
], ids=["weights", "many", "repository", "other kind", "other app", "nested", "not text", "none"])
def test_a_folder_of_something_else_is_refused_and_left_alone(fill, says, tmp_path):
    fill(tmp_path)
    before = {p: p.is_dir() or p.read_bytes() for p in tmp_path.iterdir()}
    called = []
    with pytest.raises(ValueError, match=says) as refused:
        KIND.save(tmp_path, called.append, {})
    said = str(refused.value)
    assert "\n" not in said and "give a new or an empty folder" in said and not called
    KIND.remove(tmp_path)
    assert {p: p.is_dir() or p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match="x is a file"):
        save(tmp_path / "x", 1)


@pytest.mark.parametrize("kind, says", [
    (OTHER, "holds a posterior, not routers"),
    (Folder("state", manifest="state.json"), "holds a posterior, not the checkpoint of a fit"),
    (Folder("posterior", format=3), "format 2, this version reads 3")])
def test_reading_another_kind_says_what_it_is(kind, says, tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=says):
        kind.read(tmp_path, Path.read_bytes)


@pytest.mark.parametrize("damage", [
    lambda data, manifest: data.write_bytes(data.read_bytes()[:-1]),
    lambda data, manifest: data.unlink(),
    lambda data, manifest: data.write_bytes(data.read_bytes()[:-1] + b"?"),
    lambda data, manifest: manifest.write_text(manifest.read_text().replace('"n": 1', '"n": 2')),
    lambda data, manifest: manifest.write_text(manifest.read_text().replace('"checksum"', '"x"'))])
def test_damage_is_said(damage, tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "posterior.safetensors", tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="no whole posterior: it is cut short, or changed"):
        KIND.read(tmp_path, Path.read_bytes)


# ---------------------------------------------------------------- the lock, and files
def _count(path, turns):
    for _ in range(turns):
        with locked(path.with_name(".lock")):
            n = int(path.read_text())
            time.sleep(0)
            path.write_text(str(n + 1))


def test_one_at_a_time_and_nothing_left(tmp_path):
    path = tmp_path / "counter"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    everyone = [context.Process(target=_count, args=(path, 40)) for _ in range(3)]
    [p.start() for p in everyone]
    [p.join() for p in everyone]
    assert path.read_text() == "120" and names(tmp_path) == ["counter"]


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "filelock"])
def test_a_lock_that_is_held_is_not_taken_twice(flock, tmp_path, monkeypatch, capfd):
    if not flock:
        monkeypatch.setattr(storage, "fcntl", None)  # as where the system has none
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take() and not two.take(wait=False)
    timer = threading.Timer(1.2, one.let_go)
    timer.start()
    assert two.take(say="waiting for it") and "waiting for it" in capfd.readouterr().err
    timer.join()
    two.let_go()
    assert one.take(wait=False)
    one.let_go()


@needs_kill
def test_what_a_killed_write_left_is_gone_after_the_next(tmp_path):
    path = tmp_path / "table.json"

    def die():
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        atomic_write(path, "half")
    os.waitpid(forked(die), 0)
    assert not path.exists() and len(names(tmp_path)) == 2                  # the half, and the lock
    atomic_write(path, "whole")
    assert names(tmp_path) == ["table.json"] and path.read_text() == "whole"


def test_a_checksum_is_read_once_while_the_file_is_the_same(tmp_path, monkeypatch):
    path, reads, digest = tmp_path / "x", [], storage.hashlib.file_digest
    monkeypatch.setattr(storage.hashlib, "file_digest", lambda *a: (reads.append(1), digest(*a))[1])
    path.write_bytes(b"abc")
    first = storage.sha256(path)
    path.write_bytes(b"abd")  # perhaps at the same time
    assert storage.sha256(path) != first
    os.utime(path, (1e9, 1e9))
    seen = len(reads)
    assert storage.sha256(path) == storage.sha256(path) and len(reads) == seen + 1
    path.rename(tmp_path / "y")
    storage.sha256(tmp_path / "y")
    assert len(reads) == seen + 1  # moved, it is the same file


def test_it_needs_no_torch():
    code = "import sys, bmoe_utils.storage; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
