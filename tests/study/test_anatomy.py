"""Chapter 13's measurements: the check without labels against its definition, the models taken apart, and what is kept on disk."""

import json
import math
import re

import numpy as np
import pytest
import torch
from test_study import TINY
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.data import world
from bmoe_utils.experts.exact import prior_predictive
from bmoe_utils.models.readout import option_logits
from bmoe_utils.study import anatomy, blocks, reach
from bmoe_utils.study.output import Store

SETTINGS = TINY | {"dense_fit": 10, "dense_items": 6, "prior_mean": "zero"}


@pytest.fixture(scope="module", autouse=True)
def small_world():
    patch, full = pytest.MonkeyPatch(), world.build_splits(world.load_world())
    patch.setattr("bmoe_utils.data.tasks.build_splits", lambda *_, **__: {k: full[k][:n] for k, n in {"train": 30, "validation": 20, "test": 20}.items()})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    return bm.Study("smoke", overrides=SETTINGS, store=Store(tmp_path_factory.mktemp("store")))


# ---- the check ------------------------------------------------------------------------------------------------------
def test_reach_is_of_the_posterior_and_of_the_prior_and_needs_no_labels():
    model, batch = tiny_model(), tiny_batch()
    la = bm.ExpertLaplace(model, prior_precision=2.0).fit([batch], progress=False)
    found = anatomy.expert_reach(la, [batch | {"labels": torch.full((5,), -1)}])
    mean, cov = la.predictive_logits(batch)
    lead, deviation = reach.leads(mean, cov)
    (_, prior), = prior_predictive(la, [batch], progress=False)
    np.testing.assert_allclose(found.lead, lead)
    np.testing.assert_allclose(found.posterior, deviation)
    np.testing.assert_allclose(found.prior, reach.leads(mean, prior)[1])
    assert (found.posterior < found.prior).all()


def test_its_summary_is_medians_shares_and_temperatures():
    found = anatomy.Reach(np.array([1.0, 2.0, 9.0]), np.array([1.0, 0.9, 2.0]), np.array([1.0, 2.0, 5.0])).summary()
    assert (found["lead"], found["posterior"], found["prior"]) == (2.0, 1.0, 2.0)
    assert found["within"] == pytest.approx(1 / 3) and found["prior_within"] == 1
    assert found["temperature"] == pytest.approx(math.sqrt(1 + math.pi / 8)) and found["prior_temperature"] == pytest.approx(math.sqrt(1 + math.pi / 2))


def test_recovered_is_a_share_of_temperature_scaling_s_gain():
    row = {"map": {"nll": 2.0}, "temperature": {"nll": 1.0}, "laplace": {"nll": 1.75}}
    assert anatomy.recovered(row) == 0.25
    assert math.isnan(anatomy.recovered(row | {"temperature": {"nll": 2.0}}))


# ---- the final norm -------------------------------------------------------------------------------------------------
def test_the_bound_is_where_the_state_points_at_the_answer():
    """Cosine and sine of the same angle, the sine from the gradient of the lead in the state before the norm."""
    model, batch = tiny_model(), tiny_batch(options=3, ragged=False)
    bound, radius = anatomy.final_norm_bound(model, [batch])
    states = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    f = option_logits(model, batch)
    hook.remove()
    top = f.topk(2, dim=1).values
    lead = top[:, 0] - top[:, 1]
    gradient = torch.autograd.grad(lead.sum(), states[0])[0][:, -1].norm(dim=1)
    cosine, sine = lead.detach().double() / bound, gradient * radius / bound
    assert (cosine < 1).all()
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-4)  # the norm's epsilon, and its float32


def test_another_ending_is_named():
    model = tiny_model("gpt_oss")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    with pytest.raises(ValueError, match="RMS norm and a linear head without bias"):
        anatomy.final_norm_bound(model, [tiny_batch()])


# ---- the models taken apart -----------------------------------------------------------------------------------------
def test_regimes_differ_in_pretraining_alone(of):
    found = anatomy.regimes(of)
    assert list(found) == ["pretrained", "scratch"]
    different = {k for k in found["scratch"].settings if found["scratch"].settings[k] != found["pretrained"].settings[k]}
    assert different == {"pretrain_steps", "lr"} and found["scratch"].pretrain_steps == 0
    assert all(s.train_size == 10 and len(s.train_items(0)) == 10 for s in found.values())


def test_kernels_come_back_as_they_were_computed(of):
    s = anatomy.regimes(of)["scratch"]
    first = anatomy.kernels(s, 0)
    model = blocks.untied(s.map_model(0))
    again = blocks.block_kernels(model, s.loader(s.train_items(0)), s.loader(s.task["test"].subset(6)), progress=False)
    for b in again.blocks:
        assert torch.equal(first.fit[b], again.fit[b]) and torch.equal(first.own[b], again.own[b])
        assert first.distance[b] == again.distance[b] and first.size[b] == again.size[b]
    assert torch.equal(first.logits, again.logits) and first.blocks == again.blocks and "head" in first.blocks


def test_the_prior_s_answers_are_averages_over_the_block(of):
    k = anatomy.kernels(anatomy.regimes(of)["scratch"], 0)
    tight = anatomy.under_the_prior(k, [anatomy.EXPERTS], 1e12)
    torch.testing.assert_close(tight.exp(), k.fit_logits.softmax(-1), rtol=0, atol=1e-6)
    same = reach.Kernels(**{n: getattr(k, n) for n in ("cross", "own", "fit_slope", "own_slope", "distance", "size", "fit_labels")}, fit=k.fit,
                         fit_logits=k.fit_logits, logits=k.fit_logits)
    N, c, _ = k.fit_contrasts.shape
    same.own = {b: torch.stack([v.view(N, c, N, c)[i, :, i] for i in range(N)]) for b, v in k.fit.items()}
    same.cross = dict(k.fit)
    cov = reach.covariance(same, {anatomy.EXPERTS: 0.01}, None)[0]
    expected = anatomy.sample_probabilities(k.fit_logits, cov, 1000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(anatomy.under_the_prior(k, [anatomy.EXPERTS], 0.01).exp(), expected)


def test_variants_are_measured_and_kept(of, monkeypatch):
    s = anatomy.regimes(of)["scratch"]
    plain = anatomy.variant(s, 0)
    held = anatomy.variant(s, 0, precision={anatomy.EXPERTS: 1e4})
    assert plain["map"] == pytest.approx(s.map_predictions(0).summary())
    assert held["map"] != plain["map"] and held["reach"]["posterior"] != plain["reach"]["posterior"]
    monkeypatch.setattr(anatomy, "measure", lambda *_: pytest.fail("computed again"))
    assert anatomy.variant(s, 0) == plain


def test_variants_are_each_trained_under_what_the_one_before_it_chose(of, monkeypatch):
    s, asked = anatomy.regimes(of)["scratch"], []

    def variant(of, seed, **options):
        asked.append(options)
        return {"precision": float(len(asked))}

    monkeypatch.setattr(anatomy, "variant", variant)
    found = anatomy.variants(s, 0)
    k, experts = anatomy.kernels(s, 0), anatomy.EXPERTS
    whole = asked[-1]["precision"]
    assert asked[:-1] == [{}, {"epochs": max(1, s.epochs // 4)}, {"smoothing": 0.1}, {"precision": {experts: found["as trained"]["precision"]}},
                          {"precision": {experts: found["under the experts' prior"]["precision"]}}]
    assert list(whole) == k.blocks and len(set(whole.values())) == 1
    around = whole[experts] * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    evidence = reach.log_evidence(0.0, reach.spectrum(k, k.blocks, k.root()), sum(k.distance.values()), around)
    assert evidence.argmax() == 1


def test_drawn_weights_agree_with_linearisation_where_the_prior_is_tight(of):
    wide, tight = anatomy.linear_and_sampled(anatomy.regimes(of)["scratch"], 0, [1e-3, 1e8], num_samples=200)
    assert tight["sampled"] == pytest.approx(tight["linear"], rel=0.25)  # 200 samples, a median over 6 items
    assert tight["sampled_test"]["nll"] == pytest.approx(tight["map_test"]["nll"], rel=1e-3)
    assert wide["linear"] > 10 * wide["sampled"]  # the final norm bounds what drawn weights can do


# ---- the committed measurement on real questions --------------------------------------------------------------------
def test_the_file_on_real_questions_holds_what_the_chapter_reads(root):
    text = (root / "figures" / "13_boolq.json").read_text(encoding="utf-8")
    said = json.loads(text)
    assert "--only 13" in said["command"] and said["provenance"]["profile"] == "cpu" and not re.search(r"/(?:work|home|root|tmp)/", text)
    assert {"scratch", "all"} == set(said["failure"]["MAP"]) == set(said["variants"]) == set(said["drawn"])
    assert {"embeddings", "head", "all weights", anatomy.EXPERTS} <= set(said["blocks"])
    share, deviation = (np.array(said["geometry"]["scratch"][k]) for k in ("share", "deviation"))
    assert len(share) == len(deviation) > 100 and ((share >= 0) & (share <= 1.001)).all() and (deviation >= 0).all()
