"""Tuning the prior precision of the experts' posterior, by the evidence and by validation."""

import warnings

import pytest
import torch
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.experts import prior
from bmoe_utils.models.layers import expert_layers


def fitted(model, batches, **options):
    return bm.ExpertLaplace(model, **options).fit(batches, progress=False)


def test_finer_granularity_never_lowers_the_evidence_and_the_gradient_vanishes():
    model, batch = tiny_model(), tiny_batch(16, seed=6)
    la = fitted(model, [batch])
    evidence = []
    for granularity, shape in (("global", ()), ("layer", (2,)), ("expert", (2, 4))):
        best = la.optimize_prior_precision(method="marglik", granularity=granularity)
        assert best.shape == shape
        x = best.log().requires_grad_()
        value = la.log_marginal_likelihood(x.exp())
        (slope,) = torch.autograd.grad(value, x)
        assert slope.abs().max() < 1e-3  # nats per e-fold of the precision
        evidence.append(float(value.detach()))
    assert evidence[0] <= evidence[1] + 1e-9 <= evidence[2] + 2e-9
    around = [float(la.log_marginal_likelihood(best * s)) for s in (0.8, 1.25)]
    assert max(around) < evidence[2]


def test_pretrained_prior_mean():
    base, model, batch = tiny_model(), tiny_model(), tiny_batch(8)
    with torch.no_grad():
        for m in expert_layers(model).values():
            m.down_proj += 0.1
    la = fitted(model, [batch], prior_mean=base)
    size = expert_layers(model)[la.layers[0]].down_proj[0].numel()
    torch.testing.assert_close(la._distance, torch.full((2, 4), 0.01 * size, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape"):
        bm.ExpertLaplace(model, prior_mean=tiny_model(moe_intermediate_size=5))


@pytest.mark.parametrize("options", [dict(), dict(rank=2), dict(hessian_structure="full"), dict(hessian_structure="ekfac", rank=0.9)])
def test_evidence_of_all_layers_at_once_layer_by_layer_and_by_hand(options, monkeypatch):
    """From the eigenvalues alone; large spectra are taken layer by layer."""
    la = fitted(tiny_model(), [tiny_batch(8)], **options)
    lam = torch.rand(2, 4, dtype=torch.float64) + 0.1
    penalties = [lam[i, e] * la._distance[i, e] + torch.log1p(p.spectrum(e).double() / lam[i, e]).sum()
                 for i, p in enumerate(la.posteriors) for e in range(4)]
    by_hand = la.log_likelihood - 0.5 * sum(penalties)
    together, best = la.log_marginal_likelihood(lam), la.optimize_prior_precision(granularity="expert")
    monkeypatch.setattr(prior, "AT_ONCE", 0)
    for value in (together, la.log_marginal_likelihood(lam)):
        torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(la.optimize_prior_precision(granularity="expert"), best, rtol=1e-6, atol=0)


def test_tuning_by_evidence_touches_neither_model_nor_data(monkeypatch):
    la = fitted(tiny_model(), [tiny_batch(8)])
    monkeypatch.setattr(type(la.model), "forward", None)
    la.optimize_prior_precision(granularity="expert")


def test_an_expert_never_reached_takes_its_layers_precision():
    """Its own evidence is -1/2 lambda ||W||^2: it would choose no prior at all."""
    la = fitted(tiny_model(), [tiny_batch(1, length=1, ragged=False)])
    per_layer = la.optimize_prior_precision(granularity="layer")
    per_expert = la.optimize_prior_precision(granularity="expert")
    idle = la.tokens_per_expert == 0
    assert idle.any() and not idle.all(1).any()
    assert torch.equal(per_expert[idle], per_layer[:, None].expand(2, 4)[idle])
    assert not torch.isclose(per_expert[~idle], per_layer[:, None].expand(2, 4)[~idle]).any()


def test_weights_at_their_prior_mean_have_no_best_precision_and_it_says_so():
    model, batch = tiny_model(), tiny_batch(8)
    with pytest.warns(UserWarning, match="end of the range"):
        fitted(model, [batch], prior_mean=model).optimize_prior_precision()


@pytest.mark.parametrize("granularity", ["global", "layer", "expert"])
def test_validation_tuning_finds_the_grid_point_of_least_nll(granularity):
    model, batch, val = tiny_model(), tiny_batch(16, seed=6), tiny_batch(16, seed=7)
    la = fitted(model, [batch])
    nll = lambda lam: float(-la._link(*la.predictive_logits(val, lam), "probit", 0).gather(1, val["labels"][:, None]).log().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on random labels the best precision may well be the largest
        best = la.optimize_prior_precision(method="val_nll", granularity=granularity, val_loader=[val], link_approx="probit",
                                           progress=False)
    by_hand = min(nll(lam) for lam in prior.COARSE)
    if granularity == "global":
        torch.testing.assert_close(nll(best), by_hand)
    else:
        assert nll(best) <= by_hand + 1e-9
    with pytest.raises(ValueError, match="val_loader"):
        la.optimize_prior_precision(method="val_nll")


def spectra(layers, experts, rank=16):
    """One expert in twenty was never reached."""
    return [(2 * torch.randn(experts, rank)).exp() * torch.rand(experts, 1) * (torch.rand(experts, 1) > 0.05) for _ in range(layers)]


@pytest.mark.parametrize("layers, experts", [(3, 8), (48, 128)])
def test_every_expert_of_many_has_its_own_optimum(layers, experts):
    """Of 6,144 taken together, 5,822 were left where the grid had them, with slopes of up to 4 nats an e-fold."""
    h, distance = spectra(layers, experts), 10 + 1000 * torch.rand(layers, experts, dtype=torch.float64)
    group = prior.groups("expert", layers, experts)
    best = prior.best_by_evidence(h, distance, group, torch.ones(layers, experts).double()).view(layers, experts)
    x = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(prior.evidence_penalty(h, distance)(x.exp()).sum(), x)
    inside = torch.stack([(y > 0).any(1) for y in h]) & (best > prior.GRID[0]) & (best < prior.GRID[-1])
    assert inside.float().mean() > 0.9 and slope[inside].abs().max() <= prior.TOLERANCE


def test_a_layer_without_an_optimum_does_not_move_the_others():
    """Enormous weights, whose evidence falls by 1e36 nats an e-fold, moved the other layer's precision by a tenth."""
    h, distance = spectra(2, 4), torch.full((2, 4), 100.0, dtype=torch.float64)
    group, ones = prior.groups("layer", 2, 4), torch.ones(2, 4).double()
    alone = prior.best_by_evidence(h, distance, group, ones)
    distance[0] = 1e40
    best = prior.best_by_evidence(h, distance, group, ones)
    # within the slope that is tolerated, of a curvature in log lambda of several
    assert best[0] == prior.GRID[0] and float(best[1]) == pytest.approx(float(alone[1]), rel=prior.TOLERANCE)
