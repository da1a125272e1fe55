"""Fitting routers on tiny models: the loss by hand, gradients only where intended, references in float64."""

import math

import pytest
import torch
from test_routers import ARCHITECTURES, assert_same, moe, snapshot, stir, wide
from tiny import single_items, tiny_batch

from bmoe_utils.experts.capture import capturing
from bmoe_utils.models.checkpoint import Checkpoint
from bmoe_utils.models.readout import option_logits
from bmoe_utils.models.training import answer_nll
from bmoe_utils.routers import fit as router_training
from bmoe_utils.routers.attach import Routers, attach_routers, find_routers
from bmoe_utils.routers.families import FAMILIES
from bmoe_utils.routers.fit import fit_routers, router_gradients, validate

TRAINED = [m for m in FAMILIES if m not in ("deterministic", "temperature", "laplace")]
ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(params=[*ARCHITECTURES, "deepseek_v3"])
def architecture(request):
    return request.param


def fit(routers, batches, val=None, **options):
    return fit_routers(routers, batches, val, progress=False, **options)


def router_inputs(model, batch):
    """What every router sees in the plain model, ``[N, d]`` each."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, o: seen.append(a[0].reshape(-1, 16))) for m in find_routers(model).values()]
    with torch.no_grad():
        option_logits(model, batch)
    for h in hooks:
        h.remove()
    return seen


# ---- the loss -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, variant", [("mfvr", {}), ("fcvr", {}), ("fcvr", {"rank": 2}), ("vtsr", {})])
def test_the_divergence_is_its_formulas_mean_over_real_tokens(method, variant):
    model, batch = moe(), tiny_batch()
    u = router_inputs(model, batch)[0][batch["attention_mask"].bool().flatten()]
    for b in (batch, wide(batch)):
        with attach_routers(model, method, layers=[0], **variant) as routers:
            family = stir(routers).families[0]
            with torch.no_grad():
                if method == "vtsr":
                    expected = -torch.nn.functional.softplus(family.net(family.trunk(u))).log().mean()
                else:
                    mu, root = family.moments(u)
                    cov = root @ root.mT if root.dim() == 3 else torch.diag_embed(root.square())
                    q = [torch.distributions.MultivariateNormal(m, c) for m, c in zip(mu, cov)]
                    prior = torch.distributions.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
                    expected = torch.stack([torch.distributions.kl_divergence(x, prior) for x in q]).mean()
            row, = fit(routers, [b], epochs=1, lr=1e-12)
            assert row["divergence"] == pytest.approx(float(expected), rel=1e-6)
    with attach_routers(model, method, **variant) as routers:  # summed over layers: here both at their (equal) start
        both, = fit(routers, [batch], epochs=1, lr=1e-12)
    with attach_routers(model, method, layers=[0], **variant) as routers:
        one, = fit(routers, [batch], epochs=1, lr=1e-12)
    assert both["divergence"] == pytest.approx(2 * one["divergence"], rel=1e-6, abs=1e-9)


def test_the_likelihood_is_the_answers_and_beta_weighs_the_divergence():
    model, batch = moe(), tiny_batch(8)
    with torch.no_grad():
        expected = answer_nll(option_logits(model, batch), batch["labels"])
    with attach_routers(model, "mcdropout", dropout=0.0) as routers:
        row, = fit(routers, [batch], epochs=1, lr=1e-12)
        assert row["nll"] == pytest.approx(float(expected), rel=1e-9) and row["divergence"] == 0
    ends = {}
    for beta in (0.0, 100.0):
        with attach_routers(model, "mfvr", init_std=0.1) as routers:
            history = fit(routers, [batch], epochs=80, lr=0.06, beta=beta)
            ends[beta] = history[-1]
            assert history[0]["divergence"] == pytest.approx(8 * 0.5 * (0.01 - 1 - 2 * math.log(0.1)), rel=1e-6)  # std .1, 8 logits
    assert ends[100.0]["divergence"] < 0.3  # all but at the prior, from 14.4
    assert ends[0.0]["divergence"] > 5 and ends[0.0]["nll"] < 0.8 * expected


@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss_and_repeats_itself(method):
    model, batches = moe(), [tiny_batch(6, seed=s) for s in range(3)]
    states = []
    for seed in (0, 0, 1):
        with attach_routers(model, method, **{"members": 2} if method == "ensemble" else {}) as routers:
            history = fit(routers, batches, epochs=8, lr=0.02, seed=seed, beta=1e-3)
            states.append(torch.cat([p.detach().flatten() for p in routers.parameters()]))
        for member in {row["member"] for row in history}:
            rows = [r for r in history if r["member"] == member]
            assert len(rows) == 8
            if method != "vtsr":  # one temperature a token has nothing to fit in random labels; its gradient is tested below
                assert sum(r["nll"] for r in rows[-3:]) < sum(r["nll"] for r in rows[:3]) - 0.1
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2], atol=1e-4)


# ---- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, variant", [*((m, {}) for m in [*TRAINED, "laplace"]), ("mcdropout", {"mask": "sample"}), ("fcvr", {"rank": 2})])
def test_only_and_all_of_the_routers_own_parameters_learn(architecture, method, variant):
    model, batch = moe(architecture), tiny_batch()
    model.train()
    model.get_input_embeddings().eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    options = {"temperature_prior": (1.0, 0.5)} if method == "vtsr" else {"members": 2} if method == "ensemble" else variant
    routers = attach_routers(model, method, num_samples=2, **options)
    start = [p.detach().clone() for p in routers.parameters()]
    fit(routers, [batch], epochs=3, lr=0.01)
    assert all(p.isfinite().all() for p in routers.families.state_dict().values())
    assert all(not torch.equal(p, s) for p, s in zip(routers.parameters(), start, strict=True))
    assert all(p.grad is None and p.requires_grad for p in routers.parameters())
    routers.detach()
    assert_same(before, snapshot(model))


def test_no_parameter_of_the_model_is_in_the_graph_while_training(monkeypatch):
    model, seen = moe(), []
    original = router_training.option_logits

    def spy(m, batch):
        f = original(m, batch)
        seen.append((f.requires_grad, any(p.requires_grad for p in m.parameters()), any(x.training for x in m.modules())))
        return f

    monkeypatch.setattr(router_training, "option_logits", spy)
    model.train()
    with attach_routers(model, "mfvr") as routers:
        fit(routers, [tiny_batch()], epochs=2)
    assert seen == [(True, False, False)] * 2 and all(p.requires_grad for p in model.parameters()) and model.training


def test_accumulated_gradients_are_those_of_one_large_batch():
    model, whole = moe(), tiny_batch(6, ragged=False)
    parts = [{k: v[:4] for k, v in whole.items()}, {k: v[4:] for k, v in whole.items()}]
    deltas = []
    for batches, accumulation in [([whole], 1), (parts, 2), (parts, 5), (parts, 1)]:
        with attach_routers(model, "mcdropout", dropout=0.0) as routers:
            fit(routers, batches, epochs=3, lr=0.01, accumulation=accumulation)
            deltas.append(torch.stack([f.delta.detach() for f in routers.families]))
    torch.testing.assert_close(deltas[1], deltas[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(deltas[2], deltas[0], rtol=1e-3, atol=1e-5)
    assert (deltas[3] - deltas[0]).abs().max() > 1e-3  # twice as many steps: the comparison can fail


# ---- early stopping, failure ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["mfvr", "ensemble"])
def test_the_best_state_on_the_validation_set_is_kept(method):
    model, train, val = moe(), [tiny_batch(8, seed=1)], [tiny_batch(8, seed=2)]
    options = {"members": 2} if method == "ensemble" else {"init_std": 0.1}
    with attach_routers(model, method, num_samples=4, **options) as routers:
        history = fit(routers, train, val, epochs=12, lr=0.05)
        for member in {row["member"] for row in history}:
            curve = [row["val_nll"] for row in history if row["member"] == member]
            assert min(curve) < curve[-1]  # it did overfit, so that keeping the last state would show
            assert validate(routers, val, member)[0] == pytest.approx(min(curve), rel=1e-9)
    with attach_routers(model, method, num_samples=4, **options) as routers:
        short = fit(routers, train, val, epochs=12, lr=0.05, patience=2)
    curve = [row["val_nll"] for row in short if row["member"] == 0]
    assert len(curve) == min(12, curve.index(min(curve)) + 1 + 2) < 12


def test_validation_is_what_the_routers_predict():
    model, batch = moe(), tiny_batch()
    for inference in ("inside", "whole-model"):
        with attach_routers(model, "mfvr", num_samples=3, inference=inference) as routers:
            stir(routers)
            p = routers(batch).gather(1, batch["labels"][:, None])
            assert validate(routers, [batch])[0] == pytest.approx(float(-p.log().mean()))


@pytest.mark.parametrize("method", ["mfvr", "swag", "laplace"])
def test_a_failed_fit_puts_the_previous_state_back(method, monkeypatch):
    model, batch = moe(), tiny_batch()
    with attach_routers(model, method) as routers:
        fit(routers, [batch], epochs=2, lr=0.01)
        state, fitted = {k: v.clone() for k, v in routers.families.state_dict().items()}, routers.fitted
        before, calls, original = snapshot(model), [], router_training.option_logits

        def breaks(*args):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError("no room")
            return original(*args)

        monkeypatch.setattr(router_training, "option_logits", breaks)
        with pytest.raises(MemoryError):
            fit(routers, [batch] * 5, epochs=3, lr=0.1)
        after = routers.families.state_dict()
        assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
        assert routers.fitted is fitted and routers.tape is None and not routers.training
        assert_same(before, snapshot(model))


def test_a_diverging_loss_is_an_error_not_a_router_of_nans():
    model = moe()
    with torch.no_grad():
        model.lm_head.weight[:] = torch.inf
    with attach_routers(model, "mfvr") as routers:
        with pytest.raises(ValueError, match="loss is nan in epoch 1"):
            fit(routers, [tiny_batch()])
        assert all(p.isfinite().all() for p in routers.parameters())


def test_bad_options_are_named_and_change_nothing():
    model, batch = moe(), tiny_batch()
    with attach_routers(model, "mfvr") as routers:
        start = [p.detach().clone() for p in routers.parameters()]
        for options, message in [(dict(beta=-0.1), "beta=-0.1 must be at least 0"), (dict(beta=math.nan), "beta"), (dict(lr=0.0), "positive"),
                                 (dict(epochs=0), "epochs=0"), (dict(accumulation=0), "accumulation"), (dict(patience=0), "patience"),
                                 (dict(tail=0.5), "no option 'tail'")]:
            with pytest.raises(ValueError, match=message):
                fit(routers, [batch], **options)
        unlabelled = batch | {"labels": torch.full((5,), -1)}
        for train, val, message in [([], None, "train_loader gave no batch"), ([batch, unlabelled], None, "batch 1 has items without"),
                                    ([batch], [unlabelled], "val_loader: batch 0"), (iter([batch]), None, "only once")]:
            with pytest.raises(ValueError, match=message):
                fit(routers, train, val)
        assert all(torch.equal(p, s) for p, s in zip(routers.parameters(), start, strict=True)) and routers.fitted is None
    with pytest.raises(RuntimeError, match="detached"):
        fit(routers, [batch])
    for method, options in [("laplace", dict(fisher="true")), ("laplace", dict(token_setting="sum")), ("laplace", dict(prior_grid=())),
                            ("swag", dict(tail=0.0)), ("ensemble", dict(member_noise=-1.0))]:
        with attach_routers(model, method) as routers, pytest.raises(ValueError, match=next(iter(options))):
            fit(routers, [batch], **options)


@pytest.mark.parametrize("method", ["deterministic", "temperature"])
def test_what_has_nothing_to_learn_is_left_as_it_is(method):
    with attach_routers(moe(), method) as routers:
        assert fit(routers, [tiny_batch()]) == [] and routers.fitted["history"] == []


@pytest.mark.parametrize("method", [*TRAINED, "laplace"])
def test_a_fit_survives_its_file(tmp_path, method):
    model, batch = moe(), tiny_batch()
    with attach_routers(model, method, num_samples=3) as routers:
        routers.fit([batch], [batch], epochs=4, lr=0.02, progress=False)
        expected = routers(batch)
        routers.save(tmp_path / "r")
    with Routers.load(tmp_path / "r", model) as again:
        assert torch.equal(again(batch), expected) and again.fitted == routers.fitted


# ---- temperature ----------------------------------------------------------------------------------------------------
def test_the_published_temperature_regulariser_has_no_minimum_and_the_divergence_to_a_prior_has():
    """Under the regulariser alone (beta large) T runs away as long as training lasts; under the divergence it stays at T0."""
    model, batch, ends = moe(), tiny_batch(), {}
    for prior in (None, (0.5, 0.3)):
        for epochs in (40, 160):
            with attach_routers(model, "vtsr", temperature=1.0, temperature_prior=prior) as routers:
                history = fit(routers, [batch], epochs=epochs, lr=0.02, beta=1e3)
                routers(batch)
                ends[prior, epochs] = float(routers.signals()["temperature_mean"].mean()), history[-1]["divergence"]
    assert ends[None, 160][0] > 1.8 * ends[None, 40][0] > 1.8 * 1.5
    assert ends[None, 160][1] < ends[None, 40][1] < 0  # no divergence: it is negative, and falls without end
    temperature, divergence = ends[(0.5, 0.3), 160]
    assert abs(temperature - 0.5) < 0.02 and 0 <= divergence < 0.01


@pytest.mark.parametrize("prior", [None, (1.0, 0.5)])
def test_the_answers_gradient_in_the_temperature_is_the_derivative_at_fixed_noise(architecture, prior):
    model, batch = moe(architecture), tiny_batch(8)
    with attach_routers(model, "vtsr", layers="last:1", temperature_prior=prior) as routers, router_training.frozen(model):
        stir(routers, scale=0.1)
        routers.train()
        bias = routers.families[0].net.bias

        def loss():
            routers.stream(7)
            return answer_nll(option_logits(model, batch), batch["labels"])

        (slope,) = torch.autograd.grad(loss(), bias)
        assert (slope.abs() > 1e-6).all()
        for i in range(len(bias)):
            with torch.no_grad():
                bias[i] += 1e-4
                up = loss()
                bias[i] -= 2e-4
                down = loss()
                bias[i] += 1e-4
            torch.testing.assert_close((up - down) / 2e-4, slope[i], rtol=2e-2, atol=1e-3)  # float32 rules: noise of 1e-7 / 1e-4


# ---- SWAG, ensembles ------------------------------------------------------------------------------------------------
def test_swag_keeps_the_moments_of_the_tail_of_its_trajectory(monkeypatch):
    model, batches, trail = moe(), [tiny_batch(6, seed=s) for s in range(4)], []
    after = router_training._SwagCollector.after
    monkeypatch.setattr(router_training._SwagCollector, "after",
                        lambda self, step: (trail.append(self.families[1].delta.detach().clone()), after(self, step)))
    with attach_routers(model, "swag", rank=5) as routers:
        fit(routers, batches, epochs=10, lr=0.01, tail=0.5)
        family = routers.families[1]
        assert len(trail) == 40
        points = torch.stack(trail[21::2])  # the second half, every other step: about twice the rank
        torch.testing.assert_close(family.mean, points.mean(0))
        torch.testing.assert_close(family.variance, points.var(0, unbiased=False))
        assert family.low_rank.shape == (5, 4, 16) and (family.variance > 0).any()
        routers(batches[0])
        assert (routers.signals()["mc_logit_variance_mean"] > 0).all()


def test_ensemble_members_are_trained_one_by_one():
    model, batches = moe(), [tiny_batch(6, seed=s) for s in range(3)]
    with attach_routers(model, "ensemble", members=3) as routers:
        fit(routers, batches, epochs=3, lr=0.02, weight_decay=0.5)
        together = routers.families[0].delta.detach()
    with attach_routers(model, "ensemble", members=3) as routers:  # the first alone: what is trained later does not touch it
        router_training._spread_members(routers, 0.01, 0)
        routers.activate(0)
        with router_training.frozen(model):
            router_training._train(routers, batches, None, beta=0.0, lr=0.02, epochs=3, weight_decay=0.5, accumulation=1, patience=None,
                                   seed=0, member=0, tail=None, history=[], checkpoint=Checkpoint(None, {}), progress=False)
        torch.testing.assert_close(routers.families[0].delta[0].detach(), together[0])
    assert min(float((together[i] - together[j]).abs().max()) for i in range(3) for j in range(i)) > 1e-3


# ---- Laplace --------------------------------------------------------------------------------------------------------
def test_router_gradients_are_those_of_the_task_by_autograd(architecture):
    model, batch = moe(architecture), tiny_batch()
    modules = list(find_routers(model).values())
    for item in single_items(batch):
        C = int((item["option_ids"] >= 0).sum())
        f = option_logits(model, item)
        expected = [torch.autograd.grad(f[0, c], [m.weight for m in modules], retain_graph=True) for c in range(C)]
        with attach_routers(model, "laplace") as routers, capturing(model):
            columns = lambda f: torch.eye(C, f.shape[1], dtype=f.dtype)[:, None]  # noqa: E731, B023 - every class alone
            _, captured = router_gradients(routers, item, columns)
        for layer, (u, g) in enumerate(captured):
            for c in range(C):
                # float32 inside the rules: their backward rounds to it
                torch.testing.assert_close(g[c].mT @ u, expected[c][layer], rtol=1e-4, atol=1e-5 * float(expected[c][layer].abs().max()) + 1e-12)


def test_factors_are_exact_where_kfac_is_and_sum_over_items(architecture):
    """Last layer, one item: one token has a gradient, so ``active`` gives the dense GGN. Two items: their factors' sums."""
    model, batch = moe(architecture), tiny_batch(2)
    weight = list(find_routers(model).values())[-1].weight
    E, factors = weight.shape[0], []
    for items in (*([i] for i in single_items(batch)), [batch], [wide(batch)]):
        with attach_routers(model, "laplace", layers="last:1") as routers:
            fit(routers, items, token_setting="active")
            f = routers.families[0]
            factors.append(((f.basis_a * f.alpha) @ f.basis_a.mT, (f.basis_g * f.gamma) @ f.basis_g.mT, float(f.count)))
    for (A, G, n), item in zip(factors, single_items(batch)):
        logits = option_logits(model, item)
        C = int((item["option_ids"] >= 0).sum())
        J = torch.stack([torch.autograd.grad(logits[0, c], weight, retain_graph=True)[0].flatten() for c in range(C)])
        p = logits[0, :C].softmax(-1).detach()
        dense = J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J
        assert n == 1
        torch.testing.assert_close(torch.kron(G, A) / n, dense, rtol=1e-3, atol=1e-5 * float(dense.abs().max()))
        assert dense.shape == (16 * E, 16 * E) and dense.abs().max() > 1e-6
    for both in factors[2:]:
        for k in range(3):
            expected = factors[0][k] + factors[1][k]
            torch.testing.assert_close(torch.as_tensor(both[k]), torch.as_tensor(expected), rtol=1e-4, atol=1e-6 * float(torch.as_tensor(expected).abs().max()))


def test_the_input_factor_counts_every_real_token_and_no_padding():
    model, batch = moe(), tiny_batch()
    real = batch["attention_mask"].bool().flatten()
    inputs = [u[real] for u in router_inputs(model, batch)]
    for b in (batch, wide(batch)):
        with attach_routers(model, "laplace") as routers:
            fit(routers, [b])
            for family, u in zip(routers.families, inputs, strict=True):
                torch.testing.assert_close((family.basis_a * family.alpha) @ family.basis_a.mT, u.mT @ u, rtol=1e-5, atol=1e-4)
                assert int(family.count) == int(real.sum())


def test_the_laplace_posterior_narrows_the_prior_and_its_precision_is_the_grids_best():
    model, batch, val = moe(), tiny_batch(16, seed=1), tiny_batch(16, seed=2)
    with attach_routers(model, "laplace", num_samples=None) as routers:
        routers(batch)
        prior = routers.signals()["logit_variance_mean"]
        fit(routers, [batch])
        routers(batch)
        assert (routers.signals()["logit_variance_mean"] < 0.999 * prior).all()
        history = fit(routers, [batch], [val], prior_grid=(0.1, 1.0, 10.0, 1e3))
        nll = {row["prior_precision"]: row["val_nll"] for row in history}
        assert list(nll) == [0.1, 1.0, 10.0, 1e3]
        assert float(routers.families[0].precision) == min(nll, key=nll.get)
        assert validate(routers, [val])[0] == pytest.approx(min(nll.values()), rel=1e-6)
    with attach_routers(model, "laplace") as routers:
        fit(routers, [batch], rank=3)
        assert routers.families[0].basis_a.shape == (16, 3)


def test_a_monte_carlo_fisher_is_the_exact_one_on_average():
    model, batch = moe(), tiny_batch(4, ragged=False)
    with attach_routers(model, "laplace", layers="last:1") as routers:
        fit(routers, [batch])
        exact = float(routers.families[0].gamma.sum())
        draws = []
        for seed in range(60):
            fit(routers, [batch], fisher="mc", seed=seed)
            draws.append(float(routers.families[0].gamma.sum()))
    draws = torch.tensor(draws)
    assert abs(draws.mean() - exact) < 4 * draws.std() / 60**0.5 and draws.std() > 0


def test_peft_models_can_be_fitted():
    from bmoe_utils.models.training import add_lora
    model = add_lora(moe()).double().eval()
    before = snapshot(model)
    routers = attach_routers(model, "mfvr", init_std=0.1)
    history = fit(routers, [tiny_batch()], epochs=2, lr=0.01)
    assert history[0]["divergence"] > 0
    routers.detach()
    assert_same(before, snapshot(model))
