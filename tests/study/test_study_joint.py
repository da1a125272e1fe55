"""Both posteriors' stage of the pipeline at its smallest: computed once, chosen on validation, what JointPosterior says."""

import numpy as np
import pytest
import torch
from test_study import small_world  # noqa: F401 - the fixture is autouse in a module that imports it
from test_study_routers import tiny

import bmoe_utils as bm
from bmoe_utils.joint.posterior import SCALES, JointPosterior
from bmoe_utils.models import training as train
from bmoe_utils.routers.attach import Routers
from bmoe_utils.scores import predictions as evaluate
from bmoe_utils.study.output import Store
from bmoe_utils.study.stages import map_model

SIGNALS = {"total", "aleatoric", "expert_epistemic", "routing_epistemic"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("joint"))


@pytest.fixture
def s(store):
    return tiny(store, router_precisions=[0.1, 10.0])


def said(s):
    p = [s.joint_predictions(0), s.joint_predictions(0, "near", tune="joint"), s.joint_predictions(0, tune="routers", link_approx="probit"),
         s.joint_predictions(0, method="mfvr", num_samples=3, items=7, prior_std=3.0, fitted=False),
         s.joint_predictions(0, experts={"tune": "val_nll", "granularity": "global"}), s.joint_predictions(0, size=8)]
    return [x.probs for x in p] + [s.joint_grid(0)["nll"].numpy()]


def test_a_second_study_computes_nothing_and_says_the_same(store, s, monkeypatch):
    first = said(s)
    assert all((a.shape != b.shape) or (a != b).any() for i, a in enumerate(first) for b in first[:i])  # each is its own

    def fail(*_, **__):
        raise AssertionError("computed again")

    for owner, name in ((Routers, "fit"), (bm.ExpertLaplace, "fit"), (JointPosterior, "__init__"), (map_model, "predict"), (train, "fine_tune")):
        monkeypatch.setattr(owner, name, fail)
    for a, b in zip(said(tiny(store, router_precisions=[0.1, 10.0])), first, strict=True):
        assert np.array_equal(a, b)


def test_predictions_are_those_of_the_joint_posterior_with_its_signals(s):
    for tune, link in (("independent", "mc"), ("joint", "mc"), ("joint", "probit")):
        predictions, joint = s.joint_predictions(0, tune=tune, link_approx=link), s.joint(0, tune=tune)
        assert joint.num_routings == s.router_passes == 2 and len(predictions) == 12
        again = evaluate.predict(lambda batch: (joint(batch, link_approx=link), joint.signals()), s.loader(s.task["test"].subset(12), batch_size=5), progress=False)  # noqa: B023
        joint.routers.detach()
        np.testing.assert_allclose(again.probs, predictions.probs, rtol=1e-12)
        assert np.array_equal(again.labels, predictions.labels) and np.array_equal(again.p_star, predictions.p_star)
        assert (SIGNALS <= set(predictions.signals)) == (link == "mc")
        for name in SIGNALS & set(predictions.signals):
            np.testing.assert_allclose(again.signals[name], predictions.signals[name], rtol=1e-9, atol=1e-12)


def test_validation_alone_chooses(s, monkeypatch):
    seen, original = [], JointPosterior.predictive_logits

    def spy(self, batch, scales=None):
        seen.extend(int(x) for x in batch["input_ids"].sum(1))
        return original(self, batch, scales)

    monkeypatch.setattr(JointPosterior, "predictive_logits", spy)
    grid = tiny(s.store, router_precisions=[0.2, 10.0]).joint_grid(0)
    expected = [int(x) for batch in s.loader(s.task["validation"].subset(9), batch_size=5) for x in batch["input_ids"].sum(1)]
    assert sorted(set(seen)) == sorted(set(expected)) and grid["nll"].shape == (2, len(SCALES))


def test_what_the_grid_chooses(s, monkeypatch):
    nll = torch.tensor([[1.0, 0.9, 0.3, 1.0], [1.0, 0.8, 0.7, 0.6]], dtype=torch.float64)
    grid = {"nll": nll, "precisions": torch.tensor([0.1, 10.0], dtype=nll.dtype), "scales": torch.tensor(SCALES, dtype=nll.dtype)}
    monkeypatch.setattr(type(s), "joint_grid", lambda *_, **__: grid)
    assert s.joint_choice(0) == (None, 1.0) and s.joint_choice(0, "routers") == (10.0, 1.0) and s.joint_choice(0, "joint") == (0.1, 4.0)
    evidence = s.tuned_laplace(0).prior_precision
    joint = s.joint(0, tune="joint")
    assert joint.router_precision == pytest.approx(0.1) and torch.equal(joint.laplace.prior_precision, 4 * evidence)
    with pytest.raises(ValueError, match="tune 'both' is not"):
        s.joint_choice(0, "both")
    with pytest.raises(ValueError, match="have no prior precision"):
        monkeypatch.undo()
        s.joint_choice(0, "joint", method="mfvr")


def test_another_size_is_that_sizes_study(s):
    assert s.joint_predictions(0, size=s.train_size).probs.tolist() == s.joint_predictions(0).probs.tolist()
    small = s.joint_predictions(0, size=8, link_approx="map", num_samples=1, method="deterministic")
    np.testing.assert_allclose(small.probs, s.map_predictions(0, size=8).probs[:12], rtol=1e-5)
