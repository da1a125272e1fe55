"""What a Bayesian router is centred on, and how wide its prior is."""

import copy

import pytest
import torch
from test_routers import DEEPSEEK, assert_same, moe, snapshot, stir
from tiny import ARCHITECTURES, tiny_batch

from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers.attach import Routers, attach_routers, find_routers
from bmoe_utils.routers.families import FAMILIES
from bmoe_utils.routers.fit import fit_routers
from bmoe_utils.routers.tune import tune_routers


def with_routers_of(model, other):
    """The model with the other's routers in place of its own."""
    hybrid = copy.deepcopy(model)
    for mine, theirs in zip(find_routers(hybrid).values(), find_routers(other).values(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return hybrid


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "deepseek_v3"])
def test_routers_centred_on_another_model_route_as_it_does(architecture):
    assert DEEPSEEK  # the sixth table entry lives in test_routers
    model, other, batch = moe(architecture), moe(architecture, seed=1), tiny_batch()
    if architecture == "deepseek_v3":  # a correction belongs to the rule, which stays the model's own
        for mine, theirs in zip(find_routers(model).values(), find_routers(other).values(), strict=True):
            theirs.e_score_correction_bias.copy_(mine.e_score_correction_bias)
    before = snapshot(model)
    with torch.no_grad():
        expected, own = option_logits(with_routers_of(model, other), batch).softmax(-1), option_logits(model, batch).softmax(-1)
        for method in ("deterministic", "mfvr", "mcdropout", "temperature"):
            with attach_routers(model, method, prior_mean=other) as routers:
                routers.noise_scale = 0.0
                # W u + (V - W) u in float64 against V u, through float32 norms
                torch.testing.assert_close(option_logits(model, batch).softmax(-1), expected, rtol=1e-5, atol=1e-5)
    assert (expected - own).abs().max() > 1e-3
    assert_same(before, snapshot(model))


def test_the_noise_of_dropout_is_that_of_the_prior_means_weight():
    model, other, batch = moe(), moe(seed=1), tiny_batch()
    for centred, mean in ((with_routers_of(model, other), None), (model, other)):
        with attach_routers(centred, "mcdropout", prior_mean=mean, num_samples=3) as routers:
            said = routers(batch)
        if mean is None:
            expected = said
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)


def test_the_prior_mean_is_recorded_saved_and_loaded_without_the_other_model(tmp_path):
    model, other, batch = moe(), moe(seed=1), tiny_batch()
    with attach_routers(model, "mfvr", prior_mean=other) as routers:
        said = stir(routers)(batch)
        assert routers.prior_mean.startswith("model ")
        routers.save(tmp_path / "routers")
    with Routers.load(tmp_path / "routers", model) as again:
        assert torch.equal(again(batch), said) and again.prior_mean == routers.prior_mean
    with attach_routers(model, "mfvr") as routers:
        assert routers.prior_mean == "current"
        assert (stir(routers)(batch) - said).abs().max() > 1e-4


def test_the_laplace_curvature_is_taken_at_the_prior_mean():
    model, other, batch = moe(), moe(seed=1), tiny_batch()
    factors = []
    for centred, mean in ((with_routers_of(model, other), None), (model, other)):
        with attach_routers(centred, "laplace", prior_mean=mean) as routers:
            fit_routers(routers, [batch], progress=False)
            factors.append(torch.cat([torch.cat([f.alpha, f.gamma]) for f in routers.families]))
    torch.testing.assert_close(factors[1], factors[0], rtol=1e-4, atol=1e-6)


def test_a_prior_mean_that_does_not_fit_is_refused_and_the_model_untouched():
    model = moe()
    before = snapshot(model)
    weights = {name: m.weight for name, m in find_routers(model).items()}
    first, second = weights
    for mean, message in [({first: weights[first]}, f"router '{second}' is not among {first}"),
                          (weights | {first: torch.zeros(3, 16)}, "has shape"),
                          (moe(hidden_size=32), r"has shape \(4, 32\); it must be \[4, 16\]")]:
        with pytest.raises(ValueError, match=message):
            attach_routers(model, "mfvr", prior_mean=mean)
    assert_same(before, snapshot(model))


def test_tuned_routers_are_the_models_trained_alone():
    model, batch = moe(), tiny_batch(8)
    before = snapshot(model)
    tuned = tune_routers(model, [batch], epochs=6, lr=0.05, progress=False)
    assert_same(before, snapshot(model))
    by_hand = copy.deepcopy(model).requires_grad_(False)
    weights = [m.weight.requires_grad_() for m in find_routers(by_hand).values()]
    optimizer = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.0)
    from transformers import get_cosine_schedule_with_warmup
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 6)
    for _ in range(6):
        torch.nn.functional.cross_entropy(option_logits(by_hand, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for weight, name in zip(weights, tuned, strict=True):
        torch.testing.assert_close(tuned[name], weight.detach(), rtol=1e-3, atol=1e-4)  # Adam's sign of a rounding-size gradient
    with attach_routers(model, "deterministic", prior_mean=tuned), torch.no_grad():
        torch.testing.assert_close(option_logits(model, batch), option_logits(by_hand, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["mfvr", "fcvr"])
def test_an_unfitted_router_is_its_prior(method):
    """At the start q is the prior N(l_det, prior_std^2 I); the charge is the KL to it, of either size."""
    model, batch, u = moe(), tiny_batch(), torch.randn(7, 16, dtype=torch.float64)
    for prior_std in (1.0, 2.5):
        with attach_routers(model, method, prior_std=prior_std) as routers:
            family = routers.families[0]
            with torch.no_grad():
                mu, root = family.moments(u)
                cov = root.square().diag_embed() if root.dim() == 2 else root @ root.mT
                torch.testing.assert_close(cov, prior_std**2 * torch.eye(4, dtype=torch.float64).expand(7, 4, 4))
                assert not mu.any() and family.divergence(u).abs().max() < 1e-12
                stir(routers)
                mu, root = family.moments(u)
                tril = root.diag_embed() if root.dim() == 2 else root
                q = torch.distributions.MultivariateNormal(mu, scale_tril=tril)
                prior = torch.distributions.MultivariateNormal(torch.zeros(4).double(), prior_std**2 * torch.eye(4).double())
                torch.testing.assert_close(family.divergence(u), torch.distributions.kl_divergence(q, prior))
            assert routers(batch).isfinite().all()


def test_answer_information_is_what_the_passes_disagree_by():
    model, batch = moe(), tiny_batch()
    with attach_routers(model, "mfvr", inference="whole-model", num_samples=6) as routers:
        routers(batch)
        information = routers.signals()["answer_information"]
        assert (information > 1e-6).any() and (information >= 0).all()
        each = []
        for number in range(6):
            routers.stream(number)
            with torch.no_grad():
                each.append(option_logits(model, batch).softmax(-1))
        each = torch.stack(each)
        terms = torch.where(each > 0, each * (each / each.mean(0)).log(), 0.0)  # mean over passes of KL(pass || average)
        torch.testing.assert_close(information, terms.sum(-1).mean(0), rtol=1e-6, atol=1e-9)
        routers.noise_scale = 0.0
        routers(batch)
        assert routers.signals()["answer_information"].abs().max() < 1e-12
    assert "mfvr" in FAMILIES
