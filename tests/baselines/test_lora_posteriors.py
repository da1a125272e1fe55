"""BLoB and TFB: their KL, noise and search against what they must be."""

import math

import pytest
import torch
from test_baselines import lora_model, own, state_of
from tiny import tiny_batch

from bmoe_utils.baselines import lora_posteriors
from bmoe_utils.baselines.averaging import WeightEnsemble
from bmoe_utils.baselines.lora_laplace import lora_linears
from bmoe_utils.baselines.lora_posteriors import (
    fit_blob,
    flipout,
    kl_shares,
    kl_to_prior,
    largest_within,
    mean_field_states,
    tfb_directions,
    tfb_states,
)
from bmoe_utils.models.training import adapted_weights


# ---- BLoB -----------------------------------------------------------------------------------------------------------
def test_kl_equals_that_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(3, 5, generator=g, dtype=torch.float64), torch.rand(3, 5, generator=g, dtype=torch.float64) + 0.01
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(torch.zeros_like(mean), torch.full_like(mean, 0.2))).sum()
    torch.testing.assert_close(kl_to_prior(mean, std, 0.2), expected)
    assert kl_to_prior(torch.zeros(2), torch.full((2,), 0.2), 0.2) == 0


@pytest.mark.parametrize("batches", [1, 5, 2000])
def test_kl_shares_double_and_sum_to_one(batches):
    shares = kl_shares(batches)
    assert len(shares) == batches and shares.sum() == pytest.approx(1, abs=1e-12)
    if batches < 1000:  # later shares of a long epoch underflow, as they should
        assert shares.tolist() == pytest.approx([2**i / (2**batches - 1) for i in range(batches)])


@pytest.mark.parametrize("drawn", ["anew", "once"])
def test_flipout_has_the_law_of_sampled_weights_and_items_signs_of_their_own(drawn, monkeypatch):
    """One matrix: of many passes, mean and covariance of the noise at two items are those of ``E x``, ``E ~ N(0, std^2)``, drawn anew
    for each. With one E of ones throughout they are the same: the signs of inputs and outputs alone see to that."""
    if drawn == "once":
        monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    A = torch.nn.Linear(3, 2, bias=False).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 3, generator=g, dtype=torch.float64)
    std = torch.rand(2, 3, generator=g, dtype=torch.float64)
    n = 4_000
    with torch.no_grad(), flipout({"A": A}, {"A": std}):
        noise = torch.stack([A(x) for _ in range(n)]) - torch.nn.functional.linear(x, A.weight)
    assert not A._forward_hooks
    noise = noise.flatten(1)  # [n, items x r]
    variance = (x[:, 0].square() @ std.square().mT).flatten()
    # five standard errors of a Gaussian's variance; twice that, since E drawn anew times signs has heavier tails
    error = 10 * math.sqrt(2 / n) * variance.max().item()
    torch.testing.assert_close(torch.cov(noise.T), torch.diag(variance), rtol=0, atol=error)
    assert noise.mean(0).abs().max() < 5 * math.sqrt(variance.max().item() / n)


def test_flipout_s_items_are_the_first_axis_however_many_follow():
    """Latent attention has ``[B, 1, T, d]``: the same noise as ``[B, T, d]``, one weight a pass and item for all of its tokens."""
    A, std = torch.nn.Linear(3, 2, bias=False).double(), torch.full((2, 3), 0.4, dtype=torch.float64)
    x, said = torch.randn(4, 5, 3, dtype=torch.float64), []
    for inputs in (x, x[:, None]):
        torch.manual_seed(3)
        with torch.no_grad(), flipout({"A": A}, {"A": std}):
            said.append(A(inputs).view(4, 5, 2))
    assert torch.equal(*said) and not torch.equal(said[0], A(x))


def test_without_noise_the_posterior_is_the_map_model():
    model, batch = lora_model(), tiny_batch()
    state = {k: v.detach() for k, v in adapted_weights(model).items()}
    std = {k: torch.zeros_like(v) for k, v in state.items() if "lora_A" in k}
    assert torch.equal(WeightEnsemble(model, mean_field_states(state, std, 4))(batch), own(model, batch))
    wide = mean_field_states(state, {k: v + 0.1 for k, v in std.items()}, 500)
    name, other = next(iter(std)), next(k for k in state if "lora_B" in k)
    assert torch.stack([s[name] - state[name] for s in wide]).std().item() == pytest.approx(0.1, rel=0.03)
    assert all(s[other] is state[other] for s in wide)


def test_blob_without_data_ends_at_the_prior_and_leaves_the_model_alone(monkeypatch):
    """With a likelihood that says nothing, the KL alone is left, whose minimum is the prior."""
    monkeypatch.setattr(lora_posteriors, "option_logits", lambda model, batch: torch.zeros(5, 4))
    model = lora_model()
    before = state_of(model)
    state, std = fit_blob(model, [tiny_batch()] * 3, epochs=150, lr=0.02, reweight=False, progress=False)
    assert state_of(model) == before
    for name, s in std.items():
        torch.testing.assert_close(s, torch.full_like(s, 0.2), rtol=0.02, atol=0)
        assert state[name].abs().max() < 0.01
    assert state.keys() == adapted_weights(model).keys() and len(std) == len(state) / 2


def test_blob_begins_as_said_and_learns_from_the_data():
    model, batches = lora_model(), [tiny_batch(8, seed=i, ragged=False) for i in range(2)]
    _, std = fit_blob(model, batches, epochs=1, lr=1e-12, progress=False)
    values = torch.cat([s.flatten() for s in std.values()]).sqrt()
    assert 0.05 / math.sqrt(2) < values.min() < 0.037 and 0.048 < values.max() < 0.05 + 1e-6
    state, std = fit_blob(model, batches, epochs=30, lr=0.02, kl_weight=0.01, progress=False)
    nll = lambda p: -sum(p(b).gather(1, b["labels"][:, None]).log().mean() for b in batches)  # noqa: E731
    assert nll(WeightEnsemble(model, mean_field_states(state, std, 10))) < 0.8 * nll(lambda b: own(model, b))


def test_blob_errors():
    for wrong in ({"prior_std": 0.0}, {"init": -1.0}, {"epochs": 0}):
        with pytest.raises(ValueError, match="BLoB needs"):
            fit_blob(lora_model(), [tiny_batch()], **{"epochs": 1, "lr": 0.1, **wrong})
    with pytest.raises(ValueError, match="num_samples=0"):
        mean_field_states({}, {}, 0)


# ---- TFB ------------------------------------------------------------------------------------------------------------
def test_tfb_noise_of_the_weights_is_low_rank_and_isotropic():
    """``B (A_sample - A) = sigma U E``: covariance ``sigma^2 U U^T`` in every column, none between columns. The same draw that has std
    ``sigma / d_i`` on row i of ``V^T A``."""
    model = lora_model()
    A, B = next(iter(lora_linears(model).values()))
    name = next(k for k in adapted_weights(model) if "lora_A" in k)
    U, d, Vh = torch.linalg.svd(B.weight.detach(), full_matrices=False)
    n, sigma = 3_000, 0.3
    noise = torch.stack([s[name] - A.weight.detach() for s in tfb_states(model, sigma, tfb_directions(model, n))])  # [n, r, d_in]
    error = 5 * math.sqrt(2 / n)
    rows = (Vh @ noise) * d[:, None] / sigma
    torch.testing.assert_close(torch.cov(rows.flatten(1).T), torch.eye(rows[0].numel(), dtype=rows.dtype), rtol=0, atol=error)
    weights = B.weight.detach() @ noise  # [n, d_out, d_in]
    expected = sigma**2 * (U @ U.mT)
    columns = torch.cov(weights[:, :, :2].mT.flatten(1).T)
    torch.testing.assert_close(columns, torch.block_diag(expected, expected), rtol=0, atol=error * sigma**2)


def test_tfb_of_a_singular_b_is_finite_and_without_noise_the_map_model():
    model, batch = lora_model(), tiny_batch()
    before = state_of(model)
    assert torch.equal(WeightEnsemble(model, tfb_states(model, 0.0, tfb_directions(model, 4)))(batch), own(model, batch))
    (_, B), *_ = lora_linears(model).values()
    with torch.no_grad():
        B.weight[:, 1] = 2 * B.weight[:, 0]
    first = next(k for k in adapted_weights(model) if "lora_A" in k)
    for one in tfb_directions(model, 2):
        assert one[first].abs().max() < 1e3
        assert torch.linalg.matrix_rank(one[first]) == 1  # no noise where none reaches the weights
    with torch.no_grad():
        B.weight.zero_()
    assert not tfb_directions(model, 1)[0][first].any()
    with torch.no_grad(), pytest.raises(ValueError, match="num_samples=0"):
        tfb_directions(model, 0)
    assert before[1:] == state_of(model)[1:]


@pytest.mark.parametrize("threshold", [0.003, 0.0099, 0.01, 0.3, 50.0])
def test_the_search_returns_the_largest_within_its_precision(threshold):
    tried = []

    def change(x):
        tried.append(x)
        return (x / threshold) ** 2

    x = largest_within(change, 1.0, steps=8)
    assert x in tried and change(x) <= 1.0 and threshold / 2 ** (2**-8) <= x <= threshold


def test_the_search_ends_where_nothing_changes_or_everything_does():
    assert 100 <= largest_within(lambda x: 0.0, 0.1) < math.inf
    with pytest.raises(ValueError, match="even a noise of"):
        largest_within(lambda x: 1.0, 0.1)
    with pytest.raises(ValueError, match="tolerance=0"):
        largest_within(lambda x: 0.0, 0)
