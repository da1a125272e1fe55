"""A fit that is cut short goes on where it was, bit for bit."""

import pytest
import torch
from test_routers import moe
from tiny import tiny_batch

from bmoe_utils.models.checkpoint import Checkpoint
from bmoe_utils.routers import fit as router_training
from bmoe_utils.routers.attach import attach_routers
from bmoe_utils.routers.fit import fit_routers

OPTIONS = {"swag": {"rank": 3}, "ensemble": {"members": 2}, "mfvr": {"init_std": 0.1}}


class Killed(Exception):
    pass


def fit(model, method, folder=None, train=None, **options):
    batches = train or [tiny_batch(6, seed=s) for s in range(3)]
    with attach_routers(model, method, num_samples=3, **OPTIONS.get(method, {})) as routers:
        history = fit_routers(routers, batches, [tiny_batch(6, seed=9)], epochs=4, lr=0.03, progress=False, checkpoint=folder, **options)
        return history, {k: v.clone() for k, v in routers.families.state_dict().items()}


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def kill_at(monkeypatch, step):
    """The process dies at this optimizer step."""
    original, taken = torch.optim.AdamW.step, []

    def dying(self, *args, **options):
        taken.append(1)
        if len(taken) == step:
            raise Killed
        return original(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)


@pytest.mark.parametrize("method, step", [*((m, s) for m in ("mfvr", "vtsr", "mcdropout", "swag", "ensemble") for s in (2, 5, 11)),
                                          ("ensemble", 20)])  # an ensemble of two takes 24 steps, the others 12
def test_a_resumed_fit_is_the_uninterrupted_one(method, step, tmp_path, monkeypatch):
    model, folder = moe(), tmp_path / "state"
    whole = fit(model, method)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            fit(model, method, folder)
    assert folder.is_dir() == (step > 3)  # three steps an epoch
    steps = []
    with monkeypatch.context() as patch:
        original = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), original(self, *a, **k))[1])
        assert same(fit(model, method, folder), whole)
    assert len(steps) == 12 * (2 if method == "ensemble" else 1) - 3 * ((step - 1) // 3)  # finished epochs are not done again
    assert not folder.exists()


def test_patience_survives_the_resumption(tmp_path, monkeypatch):
    model, folder = moe(), tmp_path / "state"
    whole = fit(model, "mcdropout", patience=1)
    for step in range(4, 3 * len(whole[0]) + 1, 3):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                fit(model, "mcdropout", folder, patience=1)
        assert same(fit(model, "mcdropout", folder, patience=1), whole)


def halted(model, folder, monkeypatch):
    """An unfinished fit's folder, and what is in it."""
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            fit(model, "mfvr", folder)
    return {p: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("change", [{"beta": 0.5}, {"seed": 3}, {"train": [tiny_batch(6, seed=7)]}, {"patience": 3}])
def test_another_fits_state_is_refused_and_left_alone(change, tmp_path, monkeypatch):
    model, folder = moe(), tmp_path / "state"
    before = halted(model, folder, monkeypatch)
    with pytest.raises(ValueError, match="checkpoint of another fit .* remove the folder to start over"):
        fit(model, "mfvr", folder, **change)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert same(fit(model, "mfvr", folder), fit(model, "mfvr"))


@pytest.mark.parametrize("kind, damage", [(".safetensors", lambda data: data[:-7]), (".json", lambda data: b"{"), (".json", None),
                                          (".safetensors", None), (".json", lambda data: b"[]")])
def test_a_damaged_state_is_refused_and_left_alone(kind, damage, tmp_path, monkeypatch):
    """Written whole or not at all, it can only be damaged by something else, which should be known; the routers are as they were."""
    model, folder = moe(), tmp_path / "state"
    there = halted(model, folder, monkeypatch)
    (name,) = (p.name for p in there if p.suffix == kind)
    good = there[folder / name]
    (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage(good))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with attach_routers(model, "mfvr", num_samples=3, init_std=0.1) as routers:
        state = {k: v.clone() for k, v in routers.families.state_dict().items()}
        with pytest.raises(ValueError, match="no whole checkpoint"):
            fit_routers(routers, [tiny_batch(6, seed=s) for s in range(3)], [tiny_batch(6, seed=9)], epochs=4, lr=0.03,
                        progress=False, checkpoint=folder)
        assert routers.fitted is None and all(torch.equal(v, state[k]) for k, v in routers.families.state_dict().items())
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    (folder / name).write_bytes(good)
    assert same(fit(model, "mfvr", folder), fit(model, "mfvr"))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(moe(), "mfvr")
    assert not list(tmp_path.iterdir())
    assert Checkpoint(None, {}).load() is None
    assert router_training.Checkpoint is Checkpoint
