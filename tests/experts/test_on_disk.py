"""Posteriors that rest in files: the same bits as in memory, a layer at a time, and nothing left behind."""

import gc
import os
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.experts import curvature, on_disk
from bmoe_utils.experts.fitting import factor_bytes
from bmoe_utils.experts.on_disk import OnDisk

BATCHES, TEST = [tiny_batch(4, seed=s) for s in range(3)], tiny_batch(3, seed=9)


def fit(model, folder=None, budget=False, **options):
    la = bm.ExpertLaplace(model, **options)
    need = factor_bytes(la.options, la.shapes[0], torch.zeros(0, dtype=torch.float64)) if budget else None
    return la.fit(BATCHES, offload=folder, memory_budget=need, progress=False)


@pytest.mark.parametrize("options", [dict(), dict(rank=3), dict(hessian_structure="ekfac", rank=0.8), dict(hessian_structure="ekfac"),
                                     dict(hessian_structure="diag"), dict(hessian_structure="full")])
def test_everything_a_posterior_gives_has_the_same_bits(options, tmp_path):
    model = tiny_model()
    whole = fit(model, **options)
    la = fit(model, tmp_path / "off", budget=options.get("hessian_structure") != "full", **options)
    assert all(isinstance(p, OnDisk) for p in la.posteriors)
    for a, b in zip(la.predictive_logits(TEST), whole.predictive_logits(TEST), strict=True):
        assert torch.equal(a, b)
    for x in (la, whole):
        x.optimize_prior_precision(granularity="expert")
    assert torch.equal(la.prior_precision, whole.prior_precision)
    assert torch.equal(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert torch.equal(la.captured_energy.nan_to_num(-1), whole.captured_energy.nan_to_num(-1))
    assert torch.equal(la.posteriors[0].spectrum(1), whole.posteriors[0].spectrum(1))
    la.save(tmp_path / "saved")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "saved" / "posterior.safetensors").read_bytes() == (tmp_path / "whole" / "posterior.safetensors").read_bytes()
    again = bm.ExpertLaplace.load(tmp_path / "saved", model)
    assert torch.equal(again.predictive_logits(TEST)[1], whole.predictive_logits(TEST)[1])


def test_a_layer_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Of those that the fit finishes, and of those that a prediction reads: one, and briefly a copy of it."""
    made, most, original = [], [], curvature.Eigenbasis.__init__

    def counting(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.eigenvalues.untyped_storage().nbytes() == self.eigenvalues.nbytes:  # not a view of a file
            made.append(weakref.ref(self))
            most.append(sum(x() is not None for x in made))

    monkeypatch.setattr(curvature.Eigenbasis, "__init__", counting)
    model = tiny_model(num_hidden_layers=5)
    la = fit(model, tmp_path, budget=True, rank=2)
    fitted = len(most)
    la.predictive_logits(TEST)
    assert fitted >= 5 and len(most) >= fitted + 5 and max(most) <= 2
    most.clear()
    in_memory = fit(model, budget=True, rank=2)
    assert max(most) >= 5 == len(in_memory.posteriors)


def test_the_files_go_with_the_posterior_and_a_refit_leaves_the_previous_ones(tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "off"
    la = fit(model, folder)
    before = la.predictive_logits(TEST)[1]
    assert len(list(folder.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "save_file", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"offload='.*off': .*No space left.*takes [\d,]+ bytes, with [\d,]+ free.* is intact"):
            la.fit(BATCHES[:1], offload=folder, progress=False)
    gc.collect()
    assert torch.equal(la.predictive_logits(TEST)[1], before) and len(list(folder.iterdir())) == 1
    la.fit(BATCHES[:1], offload=folder, progress=False)
    gc.collect()
    assert not torch.equal(la.predictive_logits(TEST)[1], before) and len(list(folder.iterdir())) == 1
    del la
    gc.collect()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_says_what_is_needed_and_where(error, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "save_file", lambda *a: (_ for _ in ()).throw(error))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=12_345))
    la = bm.ExpertLaplace(tiny_model())
    need = sum(t.nbytes for t in fit(tiny_model()).posteriors[0].tensors().values())
    with pytest.raises(OSError, match=f"{tmp_path}': .*No space left.*takes {need:,} bytes, with 12,345 free there") as said:
        la.fit(BATCHES, offload=tmp_path, progress=False)
    assert "\n" not in str(said.value) and la.posteriors is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    model, folder = tiny_model(), tmp_path / "off"
    alive = fit(model, folder)
    before = alive.predictive_logits(TEST)[1]
    for kept in ("posterior-of-may", "offloaded-by-me"):
        (folder / kept).mkdir()
        (folder / kept / "posterior.safetensors").touch()
    child = os.fork()
    if child == 0:
        scratch = on_disk.Scratch(folder)
        scratch.rest(0, alive.posteriors[0].to("cpu"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(folder.iterdir())) == 4
    other = fit(model, folder)
    assert len(list(folder.iterdir())) == 4  # the killed one's is gone, the new one's is there
    assert torch.equal(alive.predictive_logits(TEST)[1], before) and torch.equal(other.predictive_logits(TEST)[1], before)
    del alive, other
    gc.collect()
    assert sorted(p.name for p in folder.iterdir()) == ["offloaded-by-me", "posterior-of-may"]


def test_with_a_checkpoint_it_is_refused(tmp_path):
    la = bm.ExpertLaplace(tiny_model())
    with pytest.raises(ValueError, match="checkpoint and offload exclude each other"):
        la.fit(BATCHES, offload=tmp_path / "off", checkpoint=tmp_path / "state", progress=False)
    assert not list(tmp_path.iterdir())
