"""The routers' maths against exact references in float64: distributions, enumerations, long samples."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal, kl_divergence

from bmoe_utils.experts.curvature import probit_probabilities
from bmoe_utils.routers import maths

F64 = torch.float64


def total_variation(p, q):
    return 0.5 * (p - q).abs().sum(-1)


# ---- divergences ----------------------------------------------------------------------------------------------------
def test_divergences_equal_those_of_torch():
    mu, log_std = torch.randn(6, 5, dtype=F64), 0.7 * torch.randn(6, 5, dtype=F64)
    expected = kl_divergence(Normal(mu, log_std.exp()), Normal(torch.zeros(5, dtype=F64), 1.0)).sum(-1)
    torch.testing.assert_close(maths.kl_diagonal(mu, log_std), expected, rtol=1e-12, atol=1e-12)

    L = torch.randn(6, 5, 5, dtype=F64).tril(-1) + torch.diag_embed(log_std.exp())
    standard = MultivariateNormal(torch.zeros(5, dtype=F64), torch.eye(5, dtype=F64))
    expected = kl_divergence(MultivariateNormal(mu, scale_tril=L), standard)
    torch.testing.assert_close(maths.kl_cholesky(mu, L), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maths.kl_cholesky(mu, torch.diag_embed(log_std.exp())), maths.kl_diagonal(mu, log_std))

    V = torch.randn(6, 5, 2, dtype=F64)
    expected = kl_divergence(LowRankMultivariateNormal(mu, V, (2 * log_std).exp()), standard)
    torch.testing.assert_close(maths.kl_low_rank(mu, log_std, V), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(maths.kl_low_rank(mu, log_std, 0 * V), maths.kl_diagonal(mu, log_std))

    prior = Normal(torch.tensor(-0.7, dtype=F64), 0.3)
    torch.testing.assert_close(maths.kl_normal(mu, log_std, -0.7, 0.3), kl_divergence(Normal(mu, log_std.exp()), prior))
    zero = torch.zeros(3, dtype=F64)
    assert maths.kl_diagonal(zero, zero) == 0 and maths.kl_cholesky(zero, torch.eye(3, dtype=F64)) == 0


def test_means_over_real_tokens_do_not_see_the_padding():
    x, real = torch.randn(3, 6, dtype=F64), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0] * 5 + [1]]).bool()
    expected = torch.stack([row[keep].mean() for row, keep in zip(x, real, strict=True)])
    torch.testing.assert_close(maths.masked_mean(x, real), expected)
    torch.testing.assert_close(maths.masked_mean(x.masked_fill(~real, torch.nan), real), expected)


def test_entropy_and_jaccard_by_hand():
    log_p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4], dtype=F64).log()
    torch.testing.assert_close(maths.entropy(log_p), torch.tensor([1.5 * math.log(2), math.log(4)], dtype=F64))
    a = torch.tensor([[0, 1, 2], [3, 4, 5], [7, 1, 0]])
    b = torch.tensor([[2, 0, 1], [0, 1, 2], [0, 9, 8]])
    torch.testing.assert_close(maths.jaccard(a, b), torch.tensor([1.0, 0.0, 0.2], dtype=F64))


# ---- random numbers -------------------------------------------------------------------------------------------------
def test_antithetic_pairs_are_the_noise_and_its_negative_and_average_better():
    half = torch.randn(3, 7, dtype=F64)
    for S in (5, 6):  # odd: the last of the half stands alone
        samples = maths.mirrored(half, S)
        assert torch.equal(samples[:3], half) and torch.equal(samples[3:], -half[: S - 3]) and len(samples) == S
    mean, std = 2 * torch.randn(200, 16, dtype=F64), 0.3
    exact = torch.stack([(mean + std * torch.randn(200, 16, dtype=F64)).softmax(-1) for _ in range(2000)]).mean(0)
    errors = {}
    for name, noise in [("independent", torch.randn(35, 200, 16, dtype=F64)),
                        ("pairs", maths.mirrored(torch.randn(18, 200, 16, dtype=F64), 35))]:
        errors[name] = total_variation((mean + std * noise).softmax(-1).mean(0), exact).mean()
    assert errors["pairs"] < 0.5 * errors["independent"]  # measured: 0.3 of it; 0.62 at std 1, 0.82 at std 2


@pytest.mark.parametrize("p", [0.004, 0.1, 0.7])
def test_bernoulli_positions_have_the_law_of_independent_trials(p):
    """Three neighbours' outcomes together: all eight patterns as often as independence has them."""
    n = 200_000
    at = maths.bernoulli_positions(3 * n, p, torch.zeros((), dtype=F64), torch.Generator().manual_seed(0))
    assert (at.diff() > 0).all() and at[0] >= 0 and at[-1] < 3 * n
    hits = torch.zeros(3 * n, dtype=torch.long).index_fill(0, at, 1).view(n, 3)
    counts = torch.bincount(hits @ torch.tensor([1, 2, 4]), minlength=8) / n
    for pattern in range(8):
        k = pattern.bit_count()
        exact = p**k * (1 - p) ** (3 - k)
        assert abs(counts[pattern] - exact) < 5 * math.sqrt(exact / n) + 1e-12


def test_bernoulli_positions_at_the_edges(monkeypatch):
    like = torch.zeros(())
    assert len(maths.bernoulli_positions(50, 0.0, like, None)) == len(maths.bernoulli_positions(0, 0.5, like, None)) == 0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))  # the longest gap there is
    assert len(maths.bernoulli_positions(50, 0.5, like, None)) == 0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.99))  # every gap 0: the draws run out, and go on
    assert torch.equal(maths.bernoulli_positions(500, 0.5, like, None), torch.arange(500))


# ---- averaged scores ------------------------------------------------------------------------------------------------
WIDTHS = """
import sys, torch
from bmoe_utils.routers.maths import sampled_shift
wrong, inexact, generator = [], 0, torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for n in range(1, 40):
        logits = 3 * torch.randn(n, 5, dtype=dtype, generator=generator)
        samples = logits.expand(7, n, 5).contiguous()
        # as a product over other axes leaves them in memory
        permuted = samples.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        inexact += int((samples.sigmoid() != logits.sigmoid()).any())
        for link in ("softmax", "sigmoid"):
            if any((sampled_shift(logits, x, link) != 0).any() for x in (samples, permuted)):
                wrong.append((dtype, n, link))
print(torch.backends.cpu.get_cpu_capability(), inexact)
sys.exit(f"{len(wrong)} of 156 shifts are not 0.0, {wrong[:2]}" if wrong else 0)
"""


def test_without_noise_the_sampled_shift_is_zero_at_every_vector_width_of_this_processor(root):
    """All sizes of the remainder after the last whole vector, of AVX-512's 16 numbers and below; a
    process each, side by side, since the kernels are chosen as torch starts. That the sigmoid
    itself does differ between the shapes shows that these sizes could go wrong."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    widths = ["default", "avx2", "avx512"]
    widths = widths[: widths.index(widest) + 1] if widest in widths else ["default"]
    own = os.environ | {"PYTHONPATH": str(root)}
    start = partial(subprocess.Popen, [sys.executable, "-c", WIDTHS], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True)
    runs = {w: start(env=own | {"ATEN_CPU_CAPABILITY": w}) for w in widths}
    for width, run in runs.items():
        out, error = run.communicate(timeout=120)
        assert run.returncode == 0, f"{width}: {error}"
        used, inexact = out.split()
        assert used.lower() == width and (width == "default" or int(inexact) > 0), out


def test_a_sampled_shift_of_sigmoids_keeps_its_digits_far_out():
    logits = torch.tensor([[-80.0, -60, -30, -8, 0, 8, 30, 60, 80]])
    samples = logits + 3 * torch.randn(35, 1, 9, generator=torch.Generator().manual_seed(0))
    samples = samples.double()
    yes, no = (1 / (1 + (sign * samples).exp()) for sign in (-1, 1))
    up = yes.mean(0).log() - no.mean(0).log()  # log odds of the mean
    got = maths.sampled_shift(logits, samples.float(), "sigmoid")
    torch.testing.assert_close(got.double(), up - logits.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_sampled_shift_gives_the_mean_score_and_nothing_without_variance(link, dtype):
    logits, samples = 3 * torch.randn(7, 6, dtype=dtype), 3 * torch.randn(35, 7, 6, dtype=dtype)
    score = (lambda x: x.softmax(-1)) if link == "softmax" else torch.sigmoid
    shifted = score(logits + maths.sampled_shift(logits, samples, link))
    torch.testing.assert_close(shifted, score(samples).mean(0), rtol=1e-10 if dtype == F64 else 1e-4, atol=1e-6 if dtype != F64 else 1e-12)
    assert (maths.sampled_shift(logits, logits.expand(35, 7, 6), link) == 0).all()
    far = 300 * torch.randn(7, 6, dtype=dtype)  # logits so far apart that probabilities underflow
    assert maths.sampled_shift(far, far + torch.randn(35, 7, 6, dtype=dtype), link).isfinite().all()
    assert (maths.sampled_shift(far, far.expand(35, 7, 6), link) == 0).all()


def random_gaussians(E, std, full, items=12):
    mean = 2 * torch.randn(items, E, dtype=F64)
    if full:
        root = torch.randn(items, E, E, dtype=F64) / math.sqrt(E)
        return mean, std**2 * root @ root.mT, root * std
    variance = std**2 * 2 * torch.rand(items, E, dtype=F64)
    return mean, variance, torch.diag_embed(variance.sqrt())


def by_sampling(mean, root, num_samples, link="softmax"):
    score = (lambda x: x.softmax(-1)) if link == "softmax" else torch.sigmoid
    return torch.stack([score(m + torch.randn(num_samples, len(m), dtype=F64) @ r.mT).mean(0) for m, r in zip(mean, root)])


# Total variation from up to 10^5 samples, 12 random cases. Measured over 20 draws of such cases per E (10 seeds, both kinds of covariance): the worst
# case errs by 0.0013 / 0.043 / 0.21 at std 0.3 / 1 / 2, and the worst mean of 12 by 0.0007 / 0.011 / 0.067. The error grows
# with the variance because log odds against several noisy rivals are no longer Gaussian. The papers' 35 samples err by
# 0.012-0.018 / 0.04-0.065 / 0.06-0.15 on average.
@pytest.mark.parametrize("std, bound, mean_bound", [(0.3, 0.004, 0.0015), (1.0, 0.05, 0.016), (2.0, 0.3, 0.08)])
@pytest.mark.parametrize("E", [4, 16, 60])
@pytest.mark.parametrize("full", [False, True])
def test_the_sample_free_softmax_is_within_its_stated_error_and_beats_35_samples(std, bound, mean_bound, E, full):
    mean, cov, root = random_gaussians(E, std, full)
    exact = by_sampling(mean, root, 100_000 if E == 4 else 25_000)
    error = total_variation((mean + maths.sample_free_shift(mean, cov)).softmax(-1), exact)
    assert error.max() < bound and error.mean() < mean_bound
    assert error.mean() < 0.8 * total_variation(by_sampling(mean, root, 35), exact).mean()
    assert error.mean() < 0.5 * total_variation(mean.softmax(-1), exact).mean()  # and ignoring the variance


def test_the_pairwise_probit_would_not_do_for_a_router():
    mean, cov, root = random_gaussians(60, 1.0, True)
    exact = by_sampling(mean, root, 20_000)
    ours = total_variation((mean + maths.sample_free_shift(mean, cov)).softmax(-1), exact).mean()
    assert 5 * ours < total_variation(probit_probabilities(mean, cov), exact).mean()


def test_the_sample_free_softmax_is_exact_for_two_experts_and_shared_noise():
    mean, cov, _ = random_gaussians(2, 1.5, True)
    y, variance = mean[:, 0] - mean[:, 1], cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1]
    grid = torch.linspace(-9, 9, 20001, dtype=F64)
    density = torch.exp(-grid.square() / 2)
    exact = ((y[:, None] + variance.sqrt()[:, None] * grid).sigmoid() * density).sum(1) / density.sum()
    got = (mean + maths.sample_free_shift(mean, cov)).softmax(-1)[:, 0]
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-2)  # what 9 nodes leave at a std of the log odds of up to 4: 0.013 at worst; 0.0004 at 2

    mean = torch.randn(5, 8, dtype=F64)  # a random shift of all logits alike changes no softmax
    assert maths.sample_free_shift(mean, torch.full((5, 8, 8), 4.0, dtype=F64)).abs().max() < 1e-6


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_sample_free_shift_without_variance_is_exactly_zero(link, dtype):
    for scale in (1, 30, 500):
        mean = scale * torch.randn(9, 12, dtype=dtype)
        for cov in (torch.zeros(9, 12, dtype=dtype), torch.zeros(9, 12, 12, dtype=dtype)):
            assert (maths.sample_free_shift(mean, cov, link) == 0).all()
        assert maths.sample_free_shift(mean, torch.ones_like(mean), link).isfinite().all()
    # Far out a sigmoid is an exponential, and E exp(y) = exp(mean + variance / 2) also where it underflows.
    far = torch.tensor([[-120.0, 120.0]], dtype=dtype)
    torch.testing.assert_close(maths.sample_free_shift(far, torch.full_like(far, 0.5), "sigmoid"), torch.tensor([[0.25, -0.25]], dtype=dtype),
                               rtol=1e-4, atol=0)


def test_the_sample_free_sigmoid_matches_samples_and_a_diagonal_covariance_matches_its_variances():
    mean, variance, root = random_gaussians(6, 1.5, False)
    got = (mean + maths.sample_free_shift(mean, variance, "sigmoid")).sigmoid()
    torch.testing.assert_close(got, by_sampling(mean, root, 100_000, "sigmoid"), rtol=0, atol=6e-3)  # 4 standard errors
    for link in ("softmax", "sigmoid"):
        full = maths.sample_free_shift(mean, torch.diag_embed(variance), link)
        torch.testing.assert_close(full, maths.sample_free_shift(mean, variance, link), rtol=1e-10, atol=1e-12)


def test_gradients_reach_mean_and_variance_through_the_sample_free_shift_also_at_zero():
    mean = torch.randn(4, 5, dtype=F64, requires_grad=True)
    variance = torch.rand(4, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(maths.sample_free_shift, (mean, variance))
    zero = torch.zeros(4, 5, dtype=F64, requires_grad=True)
    for g in torch.autograd.grad(maths.sample_free_shift(mean, zero).square().sum() + zero.sum(), (mean, zero)):
        assert g.isfinite().all()


# ---- sampling without replacement -----------------------------------------------------------------------------------
@pytest.mark.parametrize("E, K, T", [(4, 2, 1.0), (5, 3, 0.5), (5, 2, 2.0), (3, 1, 1.0)])
def test_gumbel_top_k_has_the_exact_inclusion_probabilities(E, K, T):
    logits = torch.randn(E, dtype=F64)
    exact = maths.inclusion_probabilities(logits, K, T)
    torch.testing.assert_close(exact.sum(), torch.tensor(float(K), dtype=F64))
    n = 100_000
    drawn = maths.gumbel_topk(logits.expand(n, E), K, T, torch.Generator().manual_seed(1))
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()  # without replacement
    assert (torch.bincount(drawn.flatten(), minlength=E) / n - exact).abs().max() < 5 * 0.5 / math.sqrt(n)
    # the first draw alone is the categorical one; this tells the draws' order from the sorted top-K
    first = torch.bincount(drawn[:, 0], minlength=E) / n
    assert (first - (logits / T).softmax(-1)).abs().max() < 5 * 0.5 / math.sqrt(n)


def test_inclusion_by_enumeration_against_a_case_by_hand():
    got = maths.inclusion_probabilities(torch.tensor([0.5, 0.3, 0.2], dtype=F64).log(), 2)
    third = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7  # pairs without the third
    torch.testing.assert_close(got[2], torch.tensor(1 - third, dtype=F64))


def test_temperature_zero_is_the_deterministic_top_k():
    logits = torch.randn(50, 8, dtype=F64)
    assert torch.equal(maths.gumbel_topk(logits, 3, 0.0), logits.topk(3).indices)
    T = torch.cat([torch.zeros(25, 1), torch.full((25, 1), 50.0)]).double()
    mixed = maths.gumbel_topk(logits, 3, T)
    assert torch.equal(mixed[:25], logits[:25].topk(3).indices) and not torch.equal(mixed[25:], logits[25:].topk(3).indices)


# ---- weight space ---------------------------------------------------------------------------------------------------
def test_laplace_logits_are_the_dense_gaussians_and_those_of_sampled_weights():
    E, d, n, precision = 4, 6, 30.0, 0.3
    A, G = (x @ x.mT for x in (torch.randn(d, 9, dtype=F64), torch.randn(E, 9, dtype=F64)))
    (alpha, U_A), (gamma, U_G) = torch.linalg.eigh(A), torch.linalg.eigh(G)
    u = torch.randn(3, d, dtype=F64)
    v = maths.kron_logit_variance(u, alpha, U_A, gamma, n, precision)
    cov = torch.einsum("ej,nj,fj->nef", U_G, v, U_G)
    dense = torch.linalg.inv(torch.kron(G, A) / n + precision * torch.eye(E * d, dtype=F64))  # over W, row-major
    J = torch.stack([torch.kron(torch.eye(E, dtype=F64), x) for x in u])  # l = J vec(W)
    torch.testing.assert_close(cov, J @ dense @ J.mT, rtol=1e-9, atol=1e-12)
    weights = MultivariateNormal(torch.zeros(E * d, dtype=F64), dense).sample((100_000,)).view(-1, E, d)
    for i in range(3):
        sampled = torch.cov((weights @ u[i]).mT)
        assert (sampled - cov[i]).abs().max() < 0.03 * torch.diagonal(cov[i]).max()  # 5 standard errors
    # without the prior: the textbook (u^T A^-1 u) G^-1, times n
    v = maths.kron_logit_variance(u, alpha, U_A, gamma, n, 0.0)
    textbook = n * (u @ torch.linalg.inv(A) * u).sum(1)[:, None, None] * torch.linalg.inv(G)
    torch.testing.assert_close(torch.einsum("ej,nj,fj->nef", U_G, v, U_G), textbook, rtol=1e-8, atol=1e-10)


def test_laplace_logits_in_low_rank_keep_the_prior_outside():
    A = torch.randn(6, 2, dtype=F64)
    alpha, U = torch.linalg.eigh(A @ A.mT)  # rank 2: nothing is lost by keeping two
    gamma, u = torch.rand(4, dtype=F64), torch.randn(3, 6, dtype=F64)
    whole = maths.kron_logit_variance(u, alpha.clamp(min=0), U, gamma, 5.0, 0.3)
    torch.testing.assert_close(maths.kron_logit_variance(u, alpha[-2:], U[:, -2:], gamma, 5.0, 0.3), whole)


def test_swag_moments_are_those_of_the_trajectory():
    points = 100 + torch.randn(30, 3, 4, dtype=F64)  # far from zero: E[x^2] - E[x]^2 would lose digits
    moments = maths.SwagMoments.like(points[0], rank=5)
    for p in points:
        moments.update(p)
    torch.testing.assert_close(moments.mean, points.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, points.var(0, unbiased=False), rtol=1e-10, atol=0)
    expected = torch.stack([points[i] - points[: i + 1].mean(0) for i in range(25, 30)]) / 2  # / sqrt(5 - 1)
    torch.testing.assert_close(moments.matrix(), expected, rtol=1e-9, atol=1e-11)


def test_swag_samples_have_the_papers_law_and_recover_a_known_gaussian():
    mean, variance, low = torch.randn(2, 2, dtype=F64), torch.rand(2, 2, dtype=F64), torch.randn(3, 2, 2, dtype=F64)
    samples = maths.swag_sample(mean, variance, low, 200_000, generator=torch.Generator().manual_seed(0)).flatten(1)
    D = low.flatten(1)
    expected = 0.5 * (torch.diag(variance.flatten()) + D.mT @ D)
    assert (samples.mean(0) - mean.flatten()).abs().max() < 0.02
    assert (torch.cov(samples.mT) - expected).abs().max() < 0.02 * torch.diagonal(expected).max() * 2
    nothing = maths.swag_sample(mean, 0 * variance, 0 * low, 7)
    assert torch.equal(nothing, mean.expand(7, 2, 2))

    truth = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=F64)  # a long trajectory of N(m, truth): half and half of it
    points = MultivariateNormal(torch.tensor([1.0, -2.0], dtype=F64), truth).sample((4000,))
    moments = maths.SwagMoments.like(points[0], rank=2000)
    for p in points:
        moments.update(p)
    D = moments.matrix()
    total = 0.5 * (torch.diag(moments.variance) + D.mT @ D)
    assert (total - 0.5 * (torch.diag(torch.diagonal(truth)) + truth)).abs().max() < 0.15
    assert (moments.mean - torch.tensor([1.0, -2.0])).abs().max() < 0.1


def test_a_trajectory_of_one_point_has_no_spread():
    moments = maths.SwagMoments.like(torch.zeros(2, 3))
    moments.update(torch.ones(2, 3))
    assert (moments.variance == 0).all() and (moments.matrix() == 0).all() and (moments.mean == 1).all()
