"""The routers' stages of the pipeline at their smallest: computed once, selected on validation, regimes side by side."""

import numpy as np
import pytest
import torch
from test_study import TINY, small_world  # noqa: F401 - the fixture is autouse in a module that imports it

from bmoe_utils.routers import fit
from bmoe_utils.routers.attach import Routers
from bmoe_utils.scores import predictions
from bmoe_utils.study.output import Store
from bmoe_utils.study.profiles import PROFILES
from bmoe_utils.study.stages import map_model
from bmoe_utils.study.stages import routers as router_stage
from bmoe_utils.study.study import Study

ROUTERS = TINY | {"layers": 2, "router_epochs": 1, "router_samples": 3, "router_passes": 2, "validation_passes": 2, "members": 2,
                  "router_validation": 9, "router_items": 12, "noise_items": 8, "gammas": [0.1], "router_batch": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("routers"))


def tiny(store, **overrides):
    return Study("smoke", overrides=ROUTERS | overrides, store=store)


def numbers(s, seed=0):
    said = [s.router_predictions(seed, "mfvr"), s.router_predictions(seed, "mfvr", inference="whole-model"),
            s.router_predictions(seed, "mfvr", num_samples=None), s.router_predictions(seed, "mfvr", fitted=False),
            s.router_predictions(seed, "laplace", "near"), s.router_predictions(seed, "temperature", layers=[1], temperature=3.0),
            s.router_predictions(seed, "mcdropout", prior_mean="pretrained"), s.router_predictions(seed, "deterministic", prior_mean="tuned"),
            s.noisy_predictions(seed, 0.5, "router"), s.regime("lora").router_predictions(seed, "mfvr")]
    return [p.probs for p in said] + [s.stability(seed, 0.5).numpy(), s.stability(seed, 0.5, "mfvr", fresh=False).numpy(),
                                      np.array(s.susceptible_layers(seed))]


def test_a_second_study_computes_nothing_and_says_the_same(store, monkeypatch):
    first = numbers(tiny(store))
    assert all((a.shape != b.shape) or (a != b).any() for i, a in enumerate(first[:9]) for b in first[:i])  # each is its own

    def fail(*_, **__):
        raise AssertionError("computed again")

    for owner, name in ((Routers, "fit"), (map_model, "predict"), (router_stage, "routing_stability"), (router_stage, "tune_routers"), (fit, "_train")):
        monkeypatch.setattr(owner, name, fail)
    for a, b in zip(numbers(tiny(store)), first, strict=True):
        assert np.array_equal(a, b)


def test_predictions_are_those_of_the_routers_with_their_signals(store):
    s = tiny(store)
    said = s.router_predictions(0, "laplace", inference="whole-model")
    assert len(said) == 12 and {"answer_information", "logit_variance_last", "gate_entropy_mean", "answer_entropy"} <= set(said.signals)
    with s.routers(0, "laplace", inference="whole-model") as routers:
        assert routers.inference == "whole-model" and routers.num_samples == 2
        again = predictions.predict(routers, s.loader(s.task["test"].subset(12), batch_size=5), progress=False)
    assert np.array_equal(again.probs, said.probs) and np.array_equal(again.signals["answer_information"], said.signals["answer_information"])


def test_validation_alone_chooses_and_for_laplace_under_the_inference_it_is_used_with(store, monkeypatch):
    s, seen = tiny(store, router_epochs=2), []
    original = fit.validate

    def spy(routers, loader, *args):
        seen.append((routers.inference, [int(x) for batch in loader for x in batch["input_ids"].sum(1)]))
        return original(routers, loader, *args)

    monkeypatch.setattr(fit, "validate", spy)
    expected = [int(x) for batch in s.loader(s.task["validation"].subset(9)) for x in batch["input_ids"].sum(1)]
    for inference in ("inside", "whole-model"):
        s.routers(0, "laplace", inference=inference).detach()
        assert seen and all(entry == (inference, expected) for entry in seen)
        seen.clear()
    s.routers(0, "vtsr").detach()
    assert seen and all(entry == ("whole-model", expected) for entry in seen)


def test_one_fit_serves_both_kinds_of_inference(store, monkeypatch):
    s, fits = tiny(store), []
    original = Routers.fit
    monkeypatch.setattr(Routers, "fit", lambda self, *a, **k: (fits.append(self.method), original(self, *a, **k))[1])
    for method in ("ensemble", "swag", "fcvr"):
        for inference in ("inside", "whole-model"):
            with s.routers(0, method, inference=inference, **{"rank": 2} if method == "swag" else {}) as routers:
                assert routers.inference == inference
    assert fits == ["ensemble", "swag", "fcvr"]


def test_prior_means(store):
    s = tiny(store)
    shifts = {}
    for mean in ("current", "pretrained", "tuned"):
        with s.routers(0, "mfvr", prior_mean=mean) as routers:
            shifts[mean] = [f.mean_shift for f in routers.families]
    assert not len(shifts["current"][0]) and all(x.abs().max() > 0 for m in ("pretrained", "tuned") for x in shifts[m])
    weights = s.map_routers(0)
    with s.routers(0, "mfvr", prior_mean="tuned") as routers:
        for family, weight in zip(routers.families, weights.values(), strict=True):
            torch.testing.assert_close(family.weight, weight)
    with pytest.raises(ValueError, match="'current', 'pretrained' or 'tuned'"):
        s.routers(0, "mfvr", prior_mean="zero")


def test_regimes_share_data_and_base_and_differ_in_the_map_model(store):
    s = tiny(store)
    lora = s.regime("lora")
    assert lora.method == "lora" and lora.router_mean == "tuned" and s.method == "full"
    assert lora.base_folder == s.base_folder and lora.data_key == s.data_key and lora.map_folder(0) != s.map_folder(0)
    assert s.regime("full").map_folder(0) == s.map_folder(0)
    with pytest.raises(ValueError, match="'frozen'; there are: full, lora"):
        s.regime("frozen")
    for profile in PROFILES.values():
        assert all(set(change) <= set(profile) for change in profile["regimes"].values())


def test_a_killed_fit_is_resumed_by_the_next_study(store, monkeypatch):
    s, steps = tiny(store, router_epochs=3, patience=None, router_lr=2e-3), []
    original = torch.optim.AdamW.step

    def dying(self, *args, **options):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", dying)
        s.routers(0, "mfvr")
    assert len(list((store.root / "unfinished").iterdir())) == 1
    steps.clear()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), original(self, *a, **k))[1])
    s.routers(0, "mfvr").detach()
    per_epoch = -(-24 // s.batch_size)
    assert len(steps) == 3 * per_epoch - (4 // per_epoch) * per_epoch
    assert not list((store.root / "unfinished").iterdir())
