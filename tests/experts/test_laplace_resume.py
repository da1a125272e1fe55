"""A fit that is cut short goes on where it was, bit for bit; what cannot go on says why and is left as it is."""

import json
import os
import random
import signal

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import bmoe_utils as bm
from bmoe_utils.experts import curvature, fitting
from bmoe_utils.models import checkpoint
from bmoe_utils.models.layers import expert_layers

BATCHES = [tiny_batch(4, length=5, seed=s) for s in range(7)]
STRUCTURES = [dict(), dict(fisher="mc"), dict(rank=2, fisher="mc"), dict(hessian_structure="ekfac", rank=3, fisher="mc"),
              dict(hessian_structure="diag"), dict(hessian_structure="full"), dict(token_setting="reduce", rank=0.9)]


class Killed(BaseException):
    pass


def fit(model, folder=None, batches=BATCHES, every=2, **options):
    kept = {k: options.pop(k) for k in ("memory_budget",) if k in options}
    return bm.ExpertLaplace(model, **options).fit(batches, checkpoint=folder, every=every, progress=False, **kept)


def same(one, other):
    """Everything a fit leaves, bit for bit."""
    assert (one.log_likelihood, one.num_items) == (other.log_likelihood, other.num_items)
    assert torch.equal(one.tokens_per_expert, other.tokens_per_expert) and one.answer_only == other.answer_only
    for p, q in zip(one.posteriors, other.posteriors, strict=True):
        assert p.tensors().keys() == q.tensors().keys()
        assert all(torch.equal(v, q.tensors()[k]) or v.isnan().any() for k, v in p.tensors().items())
    return True


def kill_after(monkeypatch, batches):
    """The process dies as it begins this batch (counted over passes)."""
    original, seen = fitting.read_out, []

    def dying(*args):
        seen.append(1)
        if len(seen) > batches:
            raise Killed
        return original(*args)

    monkeypatch.setattr(fitting, "read_out", dying)


class Countdown(TorchDispatchMode):
    """Runs out of luck at an operation: ``left`` is how many are still granted."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def step(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.step()
        return op(*args, **(kwargs or {}))


def counted(countdown, monkeypatch):
    """Every step of writing a checkpoint counts as an operation too."""
    for owner, name in ((checkpoint, "save_file"), (json, "dumps"), (os, "replace"), (os, "open"), (os, "unlink"), (os, "mkdir"),
                        (os, "rmdir")):
        original = getattr(owner, name)

        def stepping(*args, original=original, **kwargs):
            countdown.step()
            out = original(*args, **kwargs)
            countdown.step()
            return out

        monkeypatch.setattr(owner, name, stepping)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed cheaply")
@pytest.mark.parametrize("part", range(4))
def test_killed_at_any_moment_and_resumed_it_is_the_uninterrupted_fit(part, tmp_path, monkeypatch):
    """20 random moments in all, in the middle of anything, by a signal that cannot be caught; each a fresh process. The checkpoint
    in place is whole at every one of them."""
    model = tiny_model()
    options = STRUCTURES[3] if part % 2 else STRUCTURES[2]
    whole = fit(model, **options)
    with monkeypatch.context() as patch:
        total = Countdown(-1)
        counted(total, patch)
        with total:
            fit(model, tmp_path / "counted", **options)
    operations, moments = -1 - total.left, random.Random(part)
    assert operations > 1000 and not (tmp_path / "counted").exists()
    resumed = 0
    for number in range(5):
        folder = tmp_path / f"{number}"
        child = os.fork()
        if child == 0:  # nothing of this process's is cleaned up: it ends by the signal
            fate = Countdown(moments.randrange(1, operations))
            counted(fate, monkeypatch)
            with fate:
                fit(model, folder, **options)
            os._exit(0)
        moments.randrange(1, operations)  # the child's draw is not seen here
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if checkpoint.FILES.holds_one(folder):
            checkpoint.FILES.read(folder, checkpoint.load_file)
            resumed += 1
        assert same(fit(model, folder, **options), whole)
        assert not folder.exists()
    assert resumed >= 1


@pytest.mark.parametrize("options", STRUCTURES)
def test_every_structure_resumes_from_every_checkpoint(options, tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    whole = fit(model, **options)
    passes = 2 if options.get("hessian_structure") == "ekfac" else 1
    for done in range(1, passes * len(BATCHES), 3):
        with monkeypatch.context() as patch:
            kill_after(patch, done)
            with pytest.raises(Killed):
                fit(model, folder, **options)
        with monkeypatch.context() as patch:
            seen, original = [], fitting.read_out
            patch.setattr(fitting, "read_out", lambda *a: (seen.append(1), original(*a))[1])
            assert same(fit(model, folder, **options), whole)
        in_pass, before = done % len(BATCHES), done - done % len(BATCHES)
        kept = before + in_pass - in_pass % 2 if in_pass >= 2 else (before - 1 if before else 0)  # the last of a pass is its sixth
        assert len(seen) == passes * len(BATCHES) - kept  # what a checkpoint holds is not done again
        assert not folder.exists()


def test_it_may_be_cut_short_more_than_once(tmp_path, monkeypatch):
    model, options = tiny_model(), STRUCTURES[3]
    whole = fit(model, **options)
    for _ in range(4):
        with monkeypatch.context() as patch:
            kill_after(patch, 3)
            with pytest.raises(Killed):
                fit(model, tmp_path / "state", **options)
    assert same(fit(model, tmp_path / "state", **options), whole)


def halted(model, folder, monkeypatch, after=5, **options):
    with monkeypatch.context() as patch:
        kill_after(patch, after)
        with pytest.raises(Killed):
            fit(model, folder, **options)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def unchanged(folder, before):
    return {p.name: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("change, message", [
    (dict(model=tiny_model(seed=1)), "another model"), (dict(fisher="empirical"), "other options"), (dict(rank=2), "other options"),
    (dict(layers=[0]), "other options"), (dict(seed=3), "other options"), (dict(memory_budget=10_000), "other options"),
    (dict(batches=BATCHES[1:]), "not those of the checkpoint"),
    (dict(batches=BATCHES[:2]), "stands after 4 batches and the loader has 2")])
def test_another_fits_checkpoint_is_refused_and_left_alone(change, message, tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    before = halted(model, folder, monkeypatch)
    with pytest.raises(ValueError, match=message):
        fit(**{"model": model, "folder": folder} | change)
    assert unchanged(folder, before)
    assert same(fit(model, folder), fit(model))


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    halted(model, folder, monkeypatch)
    good = {p: p.read_bytes() for p in folder.iterdir()}
    for path, content in good.items():
        for damaged in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
            path.write_bytes(damaged)
            before = {p.name: p.read_bytes() for p in folder.iterdir()}
            with pytest.raises(ValueError, match="no whole checkpoint|another fit"):
                fit(model, folder)
            assert unchanged(folder, before)
        path.write_bytes(content)
    assert same(fit(model, folder), fit(model))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_said_and_the_previous_checkpoint_intact(error, tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    before = halted(model, folder, monkeypatch, after=3)
    original = checkpoint.save_file

    def half(tensors, path):
        original(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", half)
        with pytest.raises(OSError, match="after batch 4 could not be written.*No space left.*the one before it"):
            fit(model, folder)
    assert unchanged(folder, before)
    assert same(fit(model, folder), fit(model))


def test_at_the_end_of_a_fit_only_its_own_files_go(tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    halted(model, folder, monkeypatch)
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    fit(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["figures", "notes.txt"]


def test_without_a_folder_nothing_is_written_and_an_empty_one_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tiny_model())
    assert not list(tmp_path.iterdir())
    fit(tiny_model(), tmp_path)
    (tmp_path / "notes").mkdir(parents=True)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        fit(tiny_model(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(ValueError, match="every=0"):
        fit(tiny_model(), every=0)


# ---- layers in groups -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(), dict(rank=2, fisher="mc"), dict(hessian_structure="ekfac"),
                                     dict(hessian_structure="diag")])
def test_layers_fitted_in_groups_are_those_fitted_together(options, tmp_path, monkeypatch):
    model, test = tiny_model(), tiny_batch(3, seed=9)
    whole, passes = fit(model, **options), 2 if options.get("hessian_structure") == "ekfac" else 1
    need = fitting.factor_bytes(whole.options, whole.shapes[0], torch.zeros(0, dtype=torch.float64))
    seen, original = [], fitting.read_out
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "read_out", lambda *args: (seen.append(tuple(args[1])), original(*args))[1])
        moved, to = [], curvature.Eigenbasis.to
        patch.setattr(curvature.Eigenbasis, "to", lambda self, device: (moved.append(device), to(self, device))[1])
        apart = fit(model, memory_budget=need, **options)
    assert [where for where in moved if where == "cpu"] == ["cpu"] * len(whole.layers) * passes  # else: bases to their layer's device
    assert seen == [(layer,) for layer in whole.layers for _ in range(passes * len(BATCHES))]
    assert same(whole, apart)
    assert torch.equal(whole.predictive_logits(test)[1], apart.predictive_logits(test)[1])
    folder = tmp_path / "state"
    halted(model, folder, monkeypatch, after=passes * len(BATCHES) + 3, memory_budget=need, **options)  # in the second group
    assert same(fit(model, folder, memory_budget=need, **options), whole)
    with pytest.raises(ValueError, match="memory_budget=.*need"):
        fit(model, memory_budget=need - 1, **options)
    with pytest.raises(ValueError, match="'full' grow with the data"):
        fit(model, memory_budget=need, hessian_structure="full")


# ---- faults in the data ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_activation_names_its_layer_and_batch_and_keeps_the_checkpoint(bad, tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "state"
    layers = expert_layers(model)
    names = list(layers)
    first_seen = {t: next((i for i, b in enumerate(BATCHES) if (b["input_ids"] == t).any()), 0) for t in range(2, 50)}
    token, number = max(first_seen.items(), key=lambda x: x[1])  # a token that the first batches do not have
    assert number >= 3
    whole = fit(model)
    embedding = model.get_input_embeddings().weight
    kept = embedding[token].clone()
    with torch.no_grad():
        embedding[token] = bad
    with pytest.raises(ValueError, match=f"batch {number}, layer {names[0]!r}: an activation is not finite"):
        fit(model, folder)
    assert folder.is_dir()
    with torch.no_grad():
        embedding[token] = kept
    with pytest.raises(ValueError, match="another model"):  # it was fitted on a model with a broken embedding
        fit(model, folder)
    assert same(fit(model, tmp_path / "other"), whole)
    with torch.no_grad():
        layers[names[1]].gate_up_proj[:] = bad
    with pytest.raises(ValueError, match=f"batch 0, layer {names[1]!r}: an activation"):
        fit(model)


def test_a_non_finite_gradient_names_the_layer_it_begins_in(monkeypatch):
    model = tiny_model()
    names, original = list(expert_layers(model)), torch.autograd.grad

    def broken(outputs, inputs, *args, **kwargs):
        out = list(original(outputs, inputs, *args, **kwargs))
        return [torch.full_like(g, float("nan")) for g in out]

    monkeypatch.setattr(torch.autograd, "grad", broken)
    with pytest.raises(ValueError, match=f"batch 0, layer {names[-1]!r}: a gradient"):
        fit(model)


def test_batches_without_items_and_loaders_without_batches():
    model, empty = tiny_model(), {k: v[:0] for k, v in tiny_batch().items()}
    with pytest.raises(ValueError, match="batch 1 holds no item"):
        fit(model, batches=[tiny_batch(), empty])
    with pytest.raises(ValueError, match="no batch"):
        fit(model, batches=[])
