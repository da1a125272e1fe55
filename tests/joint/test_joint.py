"""Both posteriors together: exact where one is switched off, where routings can be enumerated, and in every Jacobian."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from test_routers import stir, wide
from tiny import tiny_batch, tiny_model

from bmoe_utils.experts.laplace import ExpertLaplace
from bmoe_utils.joint import information
from bmoe_utils.joint.posterior import SCALES, JointPosterior
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers.attach import attach_routers
from bmoe_utils.routers.families import FAMILIES
from bmoe_utils.scores import predictions

S = 4
STOCHASTIC = [m for m in FAMILIES if m != "deterministic"]
# an ensemble's passes are its members, without any noise; dropout's amount is an option
SILENT = {"mcdropout": {"dropout": 0.0}, "temperature": {"temperature": 0.0}, "ensemble": {}}


@functools.cache
def _fitted(architecture):
    model = tiny_model(architecture)
    return model, ExpertLaplace(model).fit([tiny_batch(seed=5), tiny_batch(seed=6)], progress=False)


def fitted(architecture="qwen2_moe"):
    """A model of one's own and its posterior, fitted once."""
    return copy.deepcopy(_fitted(architecture))


def joined(method="mfvr", *, precision=3.0, stirred=True, **options):
    model, la = fitted()
    la.prior_precision = precision
    routers = attach_routers(model, method, inference="whole-model", num_samples=S, seed=3, **options)
    return JointPosterior(la, stir(routers) if stirred else routers)


def same(a, b):
    """Bit for bit, dataclasses and dicts too."""
    a, b = (vars(x) if isinstance(x, information.Decomposition) else x for x in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a) if isinstance(a, dict) else torch.equal(a, b)


# ---- the Gaussian under one routing ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_covariance_is_that_of_the_sampled_pass_and_of_the_posterior_fitted_on_the_models_own_routing(method, architecture):
    """Against plain autograd through the stock experts behind the same routers, and the dense posterior of the unattached model."""
    model, batch = tiny_model(architecture), tiny_batch(items=3)
    reference = ExpertLaplace(model, hessian_structure="full", prior_precision=3.0).fit([tiny_batch(seed=5)], progress=False)
    options = {"members": 2} if method == "ensemble" else {}
    with stir(attach_routers(model, method, inference="whole-model", num_samples=2, seed=3, **options)) as routers:
        mean, cov = JointPosterior(reference, routers).predictive_logits(batch)
        weights = [m.down_proj for m in expert_layers(model).values()]
        expected, logits = [], []
        for number in range(2):
            routers.stream(number)
            routers.activate(number)
            f = option_logits(model, batch)
            logits.append(f.detach())
            rows = []
            for b, c in itertools.product(*map(range, f.shape)):
                if batch["option_ids"][b, c] < 0:
                    rows.append(torch.zeros_like(rows[-1]))
                    continue
                grads = torch.autograd.grad(f[b, c], weights, retain_graph=True, materialize_grads=True)
                rows.append(torch.stack([(g.mT if m.is_transposed else g).flatten(1) for g, m in zip(grads, expert_layers(model).values(), strict=True)]))
            J = torch.stack(rows).view(*f.shape, *rows[0].shape)  # [B, C, L, E, P]
            total = 0
            for layer, posterior in enumerate(reference.posteriors):
                for e, (h, V) in enumerate(zip(posterior.values, posterior.vectors, strict=True)):
                    Sigma = torch.linalg.inv((V * h) @ V.mT + 3.0 * torch.eye(len(V), dtype=V.dtype))
                    total = total + J[:, :, layer, e] @ Sigma @ J[:, :, layer, e].mT
            expected.append(total)
        routers.stream(0)
    torch.testing.assert_close(mean, torch.stack(logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cov, torch.stack(expected), rtol=1e-8, atol=1e-10)
    assert method == "temperature" or not torch.allclose(mean[0], mean[1], rtol=1e-3)


# ---- one of the two switched off -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", STOCHASTIC)
def test_without_routing_noise_it_is_the_expert_laplace_bit_for_bit(method):
    joint = joined(method, stirred=False, **SILENT.get(method, {}))
    joint.routers.noise_scale, batch = 0.0, tiny_batch()
    means, covs = joint.predictive_logits(batch)
    probs, parts = joint(batch), joint.decompose(batch)
    probit = joint(batch, link_approx="probit")
    joint.routers.detach()
    mean, cov = joint.laplace.predictive_logits(batch)
    assert joint.num_routings == (5 if method == "ensemble" else S)
    assert all(torch.equal(m, mean) for m in means) and all(torch.equal(c, cov) for c in covs)
    assert (parts.routing == 0).all() and (parts.expert > 1e-3).all()
    alone, entropies, informed = information.given_routing(information.sampled_answers(mean, cov, information.normal_points(256, 4, 0)))
    assert torch.equal(probs, alone) and torch.equal(parts.aleatoric, entropies) and torch.equal(parts.expert, informed)
    torch.testing.assert_close(probit, joint.laplace(batch, link_approx="probit"), rtol=1e-13, atol=1e-15)
    # the same integral by other draws: the Laplace's own, 1 / sqrt(20000) of a deviation of at most a half
    torch.testing.assert_close(probs, joint.laplace(batch, num_samples=20_000), rtol=0, atol=4 * 0.5 / 20_000**0.5)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_without_the_experts_variance_it_is_the_routers_average_of_passes(method):
    joint, batch = joined(method, precision=1e30), tiny_batch()
    parts, expected = joint.decompose(batch), joint.routers(batch)
    disagreement = joint.routers.signals()["answer_information"]
    for link in ("mc", "probit", "map"):
        torch.testing.assert_close(joint(batch, link_approx=link), expected, rtol=1e-12, atol=1e-14)
    assert parts.expert.max() < 1e-14
    torch.testing.assert_close(parts.routing, disagreement, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(parts.total, information.entropy(expected), rtol=1e-12, atol=1e-14)


def test_map_link_is_the_routers_average_whatever_the_experts_posterior():
    joint, batch = joined("laplace"), tiny_batch()
    torch.testing.assert_close(joint(batch, link_approx="map"), joint.routers(batch), rtol=1e-13, atol=1e-15)
    assert joint.signals() == {}


# ---- both on -----------------------------------------------------------------------------------------------------------
def test_an_enumerated_case_by_quadrature():
    """Three routings (an ensemble's members) and 64^3 Gauss-Hermite nodes over the logits: every part of the decomposition."""
    joint, batch = joined("ensemble", members=3), tiny_batch(options=3, ragged=False)
    means, covs = joint.predictive_logits(batch)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    grid = torch.tensor(list(itertools.product(nodes, repeat=3)))
    weight = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=3))).prod(1)
    xi, h = [], []
    for mean, cov in zip(means, covs, strict=True):
        values, vectors = torch.linalg.eigh(cov)
        f = mean + torch.einsum("bij,mj->mbi", vectors * values.clamp(min=0).sqrt()[:, None], grid)
        p = f.softmax(-1)
        xi.append(torch.einsum("m,mbc->bc", weight, p))
        h.append(weight @ -(p * p.log()).sum(-1))
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    xi, aleatoric = torch.stack(xi), torch.stack(h).mean(0)
    inner, total = entropy(xi).mean(0), entropy(xi.mean(0))
    probs, parts = joint(batch, num_samples=8192), joint.decompose(batch, num_samples=8192)
    close = dict(rtol=0, atol=3e-4)  # 5 times the error of 8192 Sobol points over seeds; that of the quadrature is 3e-7
    torch.testing.assert_close(probs, xi.mean(0), **close)
    for found, expected in ((parts.total, total), (parts.aleatoric, aleatoric), (parts.expert, inner - aleatoric), (parts.routing, total - inner)):
        assert expected.min() > 0.004
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_parts_add_up_and_none_is_negative(method):
    joint, batch = joined(method), tiny_batch()
    parts = joint.decompose(batch, num_samples=33)
    torch.testing.assert_close(parts.aleatoric + parts.expert + parts.routing, parts.total, rtol=0, atol=1e-12)
    assert all((x >= 0).all() and x.shape == (5,) and x.dtype == torch.float64 for x in vars(parts).values())
    assert (parts.expert > 1e-4).all() and (parts.routing > 1e-6).any()
    probs = joint(batch, num_samples=33)
    assert same(joint.signals(), parts.signals())
    torch.testing.assert_close(information.entropy(probs), parts.total, rtol=0, atol=1e-15)


def test_every_pass_is_another_routing_and_the_same_the_next_time():
    joint, batch = joined("laplace"), tiny_batch()
    before = joint.routers(batch)
    means, _ = joint.predictive_logits(batch)
    for i, j in itertools.combinations(range(S), 2):
        assert not torch.allclose(means[i], means[j], rtol=1e-4)
    torch.testing.assert_close(means.softmax(-1).mean(0), before, rtol=1e-12, atol=1e-14)  # those the routers themselves draw
    assert torch.equal(joint(batch), joint(batch)) and same(joint.decompose(batch), joint.decompose(batch))
    assert torch.equal(joint.routers(batch), before)


# ---- what must not change an answer ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", STOCHASTIC)
def test_padding_changes_nothing(method):
    joint, batch = joined(method), tiny_batch()
    padded = joint.decompose(wide(batch))
    for name, value in vars(joint.decompose(batch)).items():
        torch.testing.assert_close(getattr(padded, name), value, rtol=1e-5, atol=1e-6)  # rotary angles are float32 inside transformers
    torch.testing.assert_close(joint(wide(batch)), joint(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), [("swag", {}), ("ensemble", {}), ("laplace", {"noise_scale": 0.0})])
def test_batch_size_order_and_company_change_nothing_where_one_draw_serves_a_pass(method, options):
    """SWAG's weights, an ensemble's members, no routing noise at all: what is left is the logits' noise."""
    joint, batch = joined(method), tiny_batch()
    vars(joint.routers).update(options)
    probs, parts = joint(batch), joint.decompose(batch)
    for rows in ([3, 1, 4, 0, 2], [0, 2], [1]):
        some = pick(batch, rows)
        if rows == [1]:  # alone it is as narrow as it has options
            some["option_ids"] = some["option_ids"][:, :3]
        torch.testing.assert_close(joint(some), probs[rows][:, : some["option_ids"].shape[1]], rtol=1e-5, atol=1e-6)
        for name, value in vars(joint.decompose(some)).items():
            torch.testing.assert_close(value, getattr(parts, name)[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["laplace", "mcdropout", "vtsr"])
def test_one_by_one_an_item_has_its_own_answer_in_any_order(method):
    """Token-by-token noise is drawn for the batch's tokens: in batches of one, for the item's alone."""
    joint, batch = joined(method), tiny_batch()
    forwards = {i: joint(pick(batch, [i])) for i in range(5)}
    backwards = {i: joint(pick(wide(batch), [i])) for i in reversed(range(5))}
    for i in range(5):
        torch.testing.assert_close(backwards[i], forwards[i], rtol=1e-5, atol=1e-6)


def test_in_other_company_the_law_is_the_same():
    """... and with many passes the answer is, within what is left of Monte Carlo."""
    joint, batch = joined("mfvr"), tiny_batch(items=2)
    joint.routers.num_samples = 24
    means, _ = joint.predictive_logits(pick(batch, [0]))
    spread = means.softmax(-1)[:, 0].std(0)
    there, alone = joint(batch, link_approx="map")[0], joint(pick(batch, [0]), link_approx="map")[0]
    assert (there != alone).any()
    assert ((there - alone).abs() < 4 * spread * (2 / 24) ** 0.5).all()


def pick(batch, rows):
    return {k: v[rows] for k, v in batch.items()}


def test_missing_options_have_no_probability():
    joint, batch = joined("laplace"), tiny_batch()
    for link in ("mc", "probit", "map"):
        probs = joint(batch, link_approx=link)
        assert (probs[batch["option_ids"] < 0] == 0).all() and torch.allclose(probs.sum(1), torch.ones(5, dtype=torch.float64))


# ---- what it leaves behind -------------------------------------------------------------------------------------------
def test_model_and_routers_are_left_as_they_were(monkeypatch):
    joint, batch = joined("fcvr"), tiny_batch()
    model, routers = joint.laplace.model.train(), joint.routers.train()
    next(model.parameters()).requires_grad_(False)
    seen = [model_fingerprint(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()],
            model.get_experts_implementation()]

    def unchanged():
        return seen == [model_fingerprint(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()],
                        model.get_experts_implementation()]

    joint(batch)
    assert unchanged() and routers.training and routers._pass == 0 and all(p.grad is None for p in [*model.parameters(), *routers.parameters()])
    calls = []
    original = joint.laplace.predictive_logits

    def dying(batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(batch)

    monkeypatch.setattr(joint.laplace, "predictive_logits", dying)
    with pytest.raises(KeyboardInterrupt):
        joint(batch)
    assert unchanged() and routers.training and routers._pass == 0
    routers.detach()
    assert seen[0] == model_fingerprint(model)


def test_as_a_predictor_it_gives_its_signals():
    joint, loader = joined("mfvr"), [tiny_batch(seed=1) | {"p_star": torch.full((5, 4), 0.25)}, tiny_batch(items=3, seed=2) | {"p_star": torch.full((3, 4), 0.25)}]
    said = predictions.predict(joint, loader, progress=False)
    parts = [joint.decompose(batch) for batch in loader]
    for name, field in (("total", "total"), ("aleatoric", "aleatoric"), ("expert_epistemic", "expert"), ("routing_epistemic", "routing")):
        assert np.array_equal(said.signals[name], torch.cat([getattr(p, field) for p in parts]).numpy())
    assert np.allclose(said.signals["total"], said.signals["answer_entropy"], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_run(dtype):
    model = tiny_model(dtype=dtype)
    la = ExpertLaplace(model).fit([tiny_batch(seed=5)], progress=False)
    with attach_routers(model, "laplace", inference="whole-model", num_samples=2) as routers:
        parts = JointPosterior(la, routers).decompose(tiny_batch())
    torch.testing.assert_close(parts.aleatoric + parts.expert + parts.routing, parts.total, rtol=0, atol=1e-12)


def test_scaled_priors_share_their_passes():
    joint, batch = joined("laplace"), tiny_batch()
    means, covs = joint.predictive_logits(batch, (0.25, 1.0, 16.0))
    mine = joint.laplace.prior_precision
    for cov, scale in zip(covs, (0.25, 1.0, 16.0), strict=True):
        joint.laplace.prior_precision = scale * mine
        mean, alone = joint.predictive_logits(batch)
        assert torch.equal(means, mean)
        torch.testing.assert_close(cov, alone, rtol=1e-12, atol=1e-15)


# ---- tuning ----------------------------------------------------------------------------------------------------------
def test_validation_nll_is_that_of_the_predictive_at_every_point_of_the_grid():
    joint, loader = joined("laplace", stirred=False), [tiny_batch(seed=1), tiny_batch(items=3, options=3, seed=2)]
    precisions, scales = (0.5, 20.0), (0.25, 1.0, 16.0)
    mine, before = joint.laplace.prior_precision, joint.router_precision
    found = joint.validation_nll(loader, precisions, scales, num_samples=64, progress=False)
    assert joint.router_precision == before and torch.equal(joint.laplace.prior_precision, mine)
    for (i, precision), (j, scale) in itertools.product(enumerate(precisions), enumerate(scales)):
        joint.router_precision, joint.laplace.prior_precision = precision, scale * mine
        nll = [-joint(b, num_samples=64).gather(1, b["labels"][:, None]).log() for b in loader]
        assert found[i, j] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-10)
    assert found.unique().numel() == 6


def test_validation_nll_needs_laplace_routers_and_labels():
    joint, batch = joined("laplace", stirred=False), tiny_batch()
    with pytest.raises(ValueError, match="label"):
        joint.validation_nll([batch | {"labels": torch.full((5,), -1)}], (1.0,), progress=False)
    with pytest.raises(ValueError, match="empty"):
        joint.validation_nll([], (1.0,), progress=False)
    with pytest.raises(ValueError, match="not positive"):
        joint.validation_nll([batch], (1.0, 0.0), progress=False)
    assert joint.router_precision == 1.0 and 1.0 in SCALES
    with pytest.raises(ValueError, match="'mfvr' have no prior precision"):
        joined("mfvr").validation_nll([batch], (1.0,), progress=False)


# ---- what does not belong together -----------------------------------------------------------------------------------
def test_refusals():
    (model, la), batch = fitted(), tiny_batch()
    with attach_routers(tiny_model(), "laplace", inference="whole-model") as other, pytest.raises(ValueError, match="different model objects"):
        JointPosterior(la, other)
    with attach_routers(model, "laplace", num_samples=2) as routers:
        with pytest.raises(ValueError, match="whole-model"):
            JointPosterior(la, routers)
        routers.inference = "whole-model"
        with pytest.raises(RuntimeError, match="not fitted"):
            JointPosterior(ExpertLaplace(model), routers)
        joint = JointPosterior(la, routers)
        with pytest.raises(ValueError, match="num_samples=0"):
            joint(batch, num_samples=0)
        with pytest.raises(ValueError, match="link_approx='bridge'"):
            joint(batch, link_approx="bridge")
        routers.inference = "inside"
        with pytest.raises(ValueError, match="whole-model"):
            joint(batch)
        routers.inference = "whole-model"
    for call in (joint, joint.decompose, joint.predictive_logits):
        with pytest.raises(RuntimeError, match="detached"):
            call(batch)


def test_the_deterministic_router_has_one_routing():
    joint = joined("deterministic", stirred=False)
    assert joint.num_routings == 1 and (joint.decompose(tiny_batch()).routing == 0).all()


# ---- the maths -------------------------------------------------------------------------------------------------------
def test_decomposition_of_a_case_done_by_hand():
    """Two routings: one whose weights disagree completely about two options, one sure of the first."""
    p = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]], dtype=torch.float64)  # [M, B, C]
    sure = torch.tensor([[[1.0, 0.0, 0.0]]] * 2, dtype=torch.float64)
    mean, parts = information.decompose([information.given_routing(p), information.given_routing(sure)])
    log2 = np.log(2)
    total = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert torch.equal(mean, torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64))
    for found, expected in ((parts.total, total), (parts.aleatoric, 0), (parts.expert, log2 / 2), (parts.routing, total - log2 / 2)):
        assert float(found) == pytest.approx(expected, abs=1e-15)


def test_information_of_equal_components_is_zero_to_the_last_bit():
    p = torch.softmax(3 * torch.randn(50, 6, dtype=torch.float64), -1)
    mean, informed = information.mixture(p.expand(7, -1, -1))
    assert torch.equal(mean, p) and (informed == 0).all()


@pytest.mark.parametrize("n", [5, 10])
def test_a_finite_number_of_components_loses_one_over_n_of_the_information(n):
    g = torch.Generator().manual_seed(0)
    p = (0.5 * torch.randn(400_000, 1, 4, generator=g, dtype=torch.float64)).softmax(-1)
    full = float(information.mixture(p)[1])
    groups = p.view(-1, n, 4).transpose(0, 1)  # n components of many repetitions
    lost = 1 - float(information.mixture(groups)[1].mean()) / full
    assert lost == pytest.approx(1 / n, rel=0.05)


def test_points_are_standard_normal_and_the_same_for_any_number_of_options():
    points = information.normal_points(4096, 5, seed=1)
    assert torch.equal(points[:, :3], information.normal_points(4096, 3, seed=1)) and points.isfinite().all()
    assert not torch.equal(points, information.normal_points(4096, 5, seed=2))
    torch.testing.assert_close(points.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=2e-3)
    torch.testing.assert_close(points.T @ points / 4096, torch.eye(5, dtype=torch.float64), rtol=0, atol=2e-2)


def test_sampled_answers_have_the_gaussians_moments():
    root = torch.randn(2, 3, 3, dtype=torch.float64)
    cov, mean = root @ root.mT, torch.randn(2, 3, dtype=torch.float64)
    log_p = information.sampled_answers(mean, cov, information.normal_points(8192, 3, 0)).log()
    f = log_p - log_p.mean(-1, keepdim=True)  # softmax forgets a common shift
    centre = torch.eye(3, dtype=torch.float64) - 1 / 3
    torch.testing.assert_close(f.mean(0), mean @ centre, rtol=0, atol=5e-3)
    torch.testing.assert_close(torch.einsum("mbi,mbj->bij", f - f.mean(0), f - f.mean(0)) / 8192, centre @ cov @ centre, rtol=1e-2, atol=1e-2)
