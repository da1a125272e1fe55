"""Averages over dropout masks, members and SWAG's samples: what each must equal, and that the model is left as it was."""

import math
from functools import partial

import pytest
import torch
from tiny import ARCHITECTURES, tiny_batch, tiny_model
from torch import nn

from bmoe_utils.baselines import averaging
from bmoe_utils.baselines.averaging import (
    GaussianLogits,
    MCDropout,
    WeightEnsemble,
    expert_dropout,
    fit_swag,
    lora_dropout,
    set_weights,
    swag_states,
    training_only,
    weights_set,
)
from bmoe_utils.experts.capture import capturing
from bmoe_utils.experts.curvature import sample_probabilities
from bmoe_utils.models import training as train
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits
from bmoe_utils.models.training import adapted_weights
from bmoe_utils.routers.maths import SwagMoments
from bmoe_utils.scores.predictions import predict


def lora_model(dropout=0.0, seed=0, **options):
    """LoRA with a B that is not zero, as after training."""
    model = train.add_lora(tiny_model(**options), rank=2, dropout=dropout, seed=seed).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return model.double()


def own(model, batch):
    with torch.no_grad():
        return option_logits(model, batch).double().softmax(-1)


def state_of(model):
    """Everything a call must leave alone: weights, what takes a gradient, and every module's mode."""
    flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    return model_fingerprint(model), flags, [m.training for m in model.modules()]


# ---- dropout --------------------------------------------------------------------------------------------------------
def test_lora_dropout_at_p_zero_is_the_map_model_bit_for_bit_and_else_is_not():
    model, batch = lora_model(dropout=0.3), tiny_batch()
    before, random = state_of(model), torch.get_rng_state()
    predictor = MCDropout(model, partial(lora_dropout, model), passes=4)
    said = predictor(batch)
    assert (said - own(model, batch)).abs().max() > 1e-3
    assert state_of(model) == before and torch.equal(random, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(said, predictor(batch))  # its random numbers are its own
    assert not torch.equal(said, MCDropout(model, partial(lora_dropout, model), passes=4, seed=1)(batch))
    draws = predictor.draws(batch)
    assert len(draws) == 4 and not torch.equal(draws[0], draws[1])
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    assert torch.equal(predictor(batch), own(model, batch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expert_dropout_drops_inputs_of_the_second_layer_and_nothing_at_p_zero(architecture):
    model, batch = tiny_model(architecture), tiny_batch()
    before, implementation = state_of(model), model.get_experts_implementation()
    with capturing(model):  # the implementation it runs in
        stock = own(model, batch)
    none = MCDropout(model, partial(expert_dropout, model, 0.0), passes=2)
    assert torch.equal(none(batch), stock)
    torch.testing.assert_close(stock, own(model, batch))
    some = MCDropout(model, partial(expert_dropout, model, 0.5), passes=4)
    assert (some(batch) - stock).abs().max() > 1e-3
    assert state_of(model) == before and model.get_experts_implementation() == implementation
    assert all("_apply_gate" not in vars(m) for m in expert_layers(model).values())
    torch.testing.assert_close(own(model, batch), stock)


def test_expert_dropout_is_inverted_dropout_of_a(monkeypatch):
    """With a mask that drops every other input, the model is the one whose second layer has lost those columns."""
    model, batch = tiny_model(), tiny_batch()
    keep = torch.tensor([1.0, 0.0] * 3, dtype=torch.float64)
    monkeypatch.setattr(nn.functional, "dropout", lambda a, p, training: a * keep / (1 - p))
    with expert_dropout(model, 0.5):
        dropped = own(model, batch)
    with torch.no_grad():
        for experts in expert_layers(model).values():
            experts.down_proj *= keep / 0.5
    torch.testing.assert_close(dropped, own(model, batch))


def test_dropout_that_is_not_there_is_an_error():
    model = lora_model(dropout=0.0)
    with pytest.raises(ValueError, match="no LoRA dropout"):
        MCDropout(model, partial(lora_dropout, model))(tiny_batch())
    with pytest.raises(ValueError, match=r"dropout=1.0 is not in \[0, 1\)"), expert_dropout(model, 1.0):
        pass
    with pytest.raises(ValueError, match="passes=0"):
        MCDropout(model, partial(lora_dropout, model), passes=0)


# ---- ensembles ------------------------------------------------------------------------------------------------------
def test_an_ensemble_of_one_is_that_member_and_of_two_their_mean():
    model, other, batch = lora_model(seed=0), lora_model(seed=1), tiny_batch()
    states = [{k: v.detach().clone() for k, v in adapted_weights(m).items()} for m in (model, other)]
    assert all("lora_" in k for k in states[0])
    before, member = state_of(model), own(other, batch)  # both adapters sit on the same frozen weights
    assert torch.equal(WeightEnsemble(model, states[1:])(batch), member)
    both = WeightEnsemble(model, states)
    p = torch.stack([own(model, batch), member])
    torch.testing.assert_close(both(batch), p.mean(0))
    entropy = lambda p: -(p * p.clamp(min=1e-300).log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(both.signals()["answer_information"], entropy(p.mean(0)) - entropy(p).mean(0))
    assert state_of(model) == before
    said = predict(both, [batch], progress=False)
    assert (said.signals["answer_information"] > 0).all()


def test_weights_come_back_whatever_happens():
    model = lora_model()
    before, name = state_of(model), next(iter(adapted_weights(model)))
    with pytest.raises(KeyboardInterrupt), weights_set(model, {name: torch.zeros_like(adapted_weights(model)[name])}):
        assert not adapted_weights(model)[name].any()
        raise KeyboardInterrupt
    assert state_of(model) == before
    good = {name: torch.zeros_like(adapted_weights(model)[name])}
    for wrong in ({"nothing": torch.zeros(1)}, {k: v[:1] for k, v in good.items()}):
        with pytest.raises(ValueError, match="another model"):
            set_weights(model, good | wrong)
        with pytest.raises(ValueError, match="another model"), weights_set(model, good | wrong):
            pass
    assert state_of(model) == before
    with pytest.raises(ValueError, match="at least one"):
        WeightEnsemble(model, [])
    assert adapted_weights(tiny_model()).keys() == dict(tiny_model().named_parameters()).keys()


def test_training_only_trains_those_and_forgets():
    model, batch = lora_model(), tiny_batch()
    chosen = adapted_weights(model)
    for p in model.parameters():
        p.requires_grad_(False)
    before = state_of(model)
    with training_only(model, chosen.values()):
        assert model.training
        option_logits(model, batch)[0, 0].backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == chosen.keys()
    assert state_of(model) == before


def test_gaussian_logits_draw_as_the_expert_posterior_does():
    class Known(GaussianLogits):
        num_samples, seed = 50, 3

        def predictive_logits(self, batch):
            return batch

    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 3, 3, generator=g, dtype=torch.float64)
    mean = torch.randn(4, 3, generator=g, dtype=torch.float64)
    root[1, 2], mean[1, 2] = 0, -torch.inf
    cov = root @ root.mT
    expected = sample_probabilities(mean, cov, 50, torch.Generator().manual_seed(3))
    torch.testing.assert_close(Known()((mean, cov)), expected)


# ---- SWAG -----------------------------------------------------------------------------------------------------------
def test_swag_moments_are_those_of_the_points_that_sgd_passed(monkeypatch):
    model, batches = lora_model(), [tiny_batch(seed=i) for i in range(4)]
    before, points = state_of(model), []
    start = {k: v.detach().clone() for k, v in adapted_weights(model).items()}
    update = SwagMoments.update
    monkeypatch.setattr(SwagMoments, "update", lambda self, w: (points.append(w), update(self, w))[1])
    moments = fit_swag(model, batches, epochs=3, lr=0.05, rank=3, per_epoch=2, progress=False)
    assert state_of(model) == before
    assert len(points) == 3 * 2 * len(moments)
    for i, (name, m) in enumerate(moments.items()):
        path = torch.stack(points[i :: len(moments)])
        torch.testing.assert_close(m.mean, path.mean(0))
        torch.testing.assert_close(m.variance, path.var(0, unbiased=False))
        assert len(m.deviations) == 3 and (path[-1] - start[name]).abs().max() > 0.01


def test_swag_samples_have_the_covariance_of_the_paper():
    """Known moments of two weights; covariance of many samples against ``1/2 (diag + D D^T / (K - 1))``, across weights too."""
    g = torch.Generator().manual_seed(0)
    moments = {}
    for name, shape in (("a", (2, 2)), ("b", (3,))):
        m = SwagMoments.like(torch.zeros(shape, dtype=torch.float64), 4)
        for _ in range(6):
            m.update(torch.randn(shape, generator=g, dtype=torch.float64))
        moments[name] = m
    flat = lambda part: torch.cat([part(m).flatten() for m in moments.values()])  # noqa: E731
    D = torch.cat([m.matrix().flatten(1) for m in moments.values()], 1)
    expected = 0.5 * (torch.diag(flat(lambda m: m.variance)) + D.mT @ D)
    n = 20_000
    states = swag_states(moments, n)
    assert states[0]["a"].shape == (2, 2)
    x = torch.stack([torch.cat([s["a"].flatten(), s["b"]]) for s in states])
    # a covariance entry's standard error is at most sqrt(2 / n) of the largest variance; 5 of them over 28 entries
    torch.testing.assert_close(torch.cov(x.T), expected, rtol=0, atol=5 * math.sqrt(2 / n) * expected.diagonal().max().item())
    torch.testing.assert_close(x.mean(0), flat(lambda m: m.mean), rtol=0, atol=5 * math.sqrt(expected.diagonal().max().item() / n))
    off = expected[:4, 4:]
    assert off.abs().max() > 10 * math.sqrt(2 / n) * expected.diagonal().max()  # so that the draw in common is seen
    for s in swag_states(moments, 3, scale=0.0):
        assert all(torch.equal(s[k], m.mean) for k, m in moments.items())


@pytest.mark.parametrize("options", [{"epochs": 0}, {"rank": 1}, {"epochs": 1, "per_epoch": 1}])
def test_swag_needs_two_points(options):
    with pytest.raises(ValueError, match="at least two points"):
        averaging.fit_swag(lora_model(), [tiny_batch()], **{"epochs": 2, "lr": 0.1, **options})
