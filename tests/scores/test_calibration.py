"""Debiased, smooth and floor: against brute force, known cases, and what they are for (no bias where the ECE has one)."""

import numpy as np
import pytest
from scipy.integrate import quad

from bmoe_utils.scores import calibration, metrics


def calibrated(rng, n, options=4):
    """Predictions that are right: labels drawn from the probabilities themselves."""
    probs = rng.dirichlet(np.full(options, 0.7), size=n)
    return probs, (rng.random((n, 1)) > probs.cumsum(1)).sum(1)


def overconfident(rng, n):
    """The top option is right with .6 where .9 is said: E[r] = -.3, whatever the bins."""
    probs = np.tile([0.9, 0.1], (n, 1))
    return probs, (rng.random(n) > 0.6).astype(int)


def test_plain_ece_is_that_of_metrics_and_takes_bootstrap_counts():
    rng = np.random.default_rng(0)
    probs, labels = calibrated(rng, 300)
    assert calibration.ece(probs, labels) == pytest.approx(metrics.ece(probs, labels), abs=1e-14)
    index = rng.integers(300, size=(5, 300))
    counts = np.stack([np.bincount(i, minlength=300) for i in index])
    expected = [metrics.ece(probs[i], labels[i]) for i in index]
    assert calibration.ece(probs, labels, weights=counts) == pytest.approx(expected, abs=1e-14)
    expected = [calibration.smooth_ece(probs[i], labels[i]) for i in index]
    assert calibration.smooth_ece(probs, labels, weights=counts) == pytest.approx(expected, abs=1e-12)


def test_of_a_calibrated_model_the_ece_is_biased_and_the_debiased_is_not():
    rng = np.random.default_rng(1)
    runs = [calibrated(rng, 500) for _ in range(300)]
    plain = np.array([metrics.reliability_bins(*run) for run in runs], dtype=object)
    square = np.array([np.nansum(bins.gap**2 * bins.count) / 500 for bins in plain])
    debiased = np.array([calibration.debiased_square_ece(*run) for run in runs])
    error = debiased.std(ddof=1) / np.sqrt(len(runs))
    assert abs(debiased.mean()) < 3 * error
    assert np.mean([bins.ece for bins in plain]) > 0.04 and square.mean() > 20 * error  # the bias that was taken away
    signed = [calibration.debiased_ece(*run) for run in runs]
    assert np.sign(signed).tolist() == np.sign(debiased).tolist() and np.square(signed) == pytest.approx(np.abs(debiased))


def test_debiased_is_unbiased_also_where_the_model_is_wrong():
    rng = np.random.default_rng(2)
    values = np.array([calibration.debiased_square_ece(*overconfident(rng, 40)) for _ in range(2000)])
    assert values.mean() == pytest.approx(0.09, abs=3 * values.std() / np.sqrt(2000))
    plugin = np.array([metrics.ece(*overconfident(rng, 40)) ** 2 for _ in range(2000)])
    assert plugin.mean() > 0.09 + 0.24 / 40 - 4 * plugin.std() / np.sqrt(2000)  # too large by the variance of the bin's mean


def test_debiased_is_the_mean_over_pairs():
    probs, labels = calibrated(np.random.default_rng(3), 60)
    confidence, r = calibration.residuals(probs, labels)
    bins = np.ceil(np.round(confidence * 15, 9))
    total = 0.0
    for b in np.unique(bins):
        own = r[bins == b]
        pairs = [x * y for i, x in enumerate(own) for j, y in enumerate(own) if i != j]
        total += len(own) / 60 * np.mean(pairs) if pairs else 0.0
    assert calibration.debiased_square_ece(probs, labels) == pytest.approx(total, abs=1e-15)
    # equal confidences within a bin: Kumar et al.'s form, with the variance of the labels alone
    probs, labels = overconfident(np.random.default_rng(3), 30)
    right = np.mean(labels == 0)
    kumar = (0.9 - right) ** 2 - right * (1 - right) / 29
    assert calibration.debiased_square_ece(probs, labels) == pytest.approx(kumar, abs=1e-15)


def test_floor_is_the_ece_of_calibrated_labels():
    rng = np.random.default_rng(4)
    probs, _ = calibrated(rng, 200)
    drawn = [metrics.ece(probs, (rng.random((200, 1)) > probs.cumsum(1)).sum(1)) for _ in range(800)]
    mean, high = calibration.ece_floor(probs)
    assert mean == pytest.approx(np.mean(drawn), abs=0.003) and high == pytest.approx(np.quantile(drawn, 0.95), abs=0.006)
    assert calibration.ece_floor(np.eye(3)[[0, 1, 2]]) == (0.0, 0.0)


def reflected(t, f, sigma):
    images = np.concatenate([t + 2 * np.arange(-4, 5), -t + 2 * np.arange(-4, 5)])
    return np.exp(-((images - f) ** 2) / (2 * sigma**2)).sum() / (sigma * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.7])
def test_smooth_ece_is_the_integral_over_the_reflected_gaussian(sigma):
    probs, labels = calibrated(np.random.default_rng(5), 12)
    confidence, r = calibration.residuals(probs, labels)
    signed = lambda t: np.mean([x * reflected(t, f, sigma) for x, f in zip(r, confidence)])  # noqa: E731
    grid = np.linspace(0, 1, 2001)
    values = np.array([signed(t) for t in grid])
    zeros = grid[1:][values[1:] * values[:-1] < 0]  # the integrand's kinks, for quad
    brute = quad(lambda t: abs(signed(t)), 0, 1, points=zeros if len(zeros) else None, epsabs=1e-10, limit=200)[0]
    # 1e-6: the midpoint rule at the kinks of |.|, O(1 / GRID^2)
    assert calibration.smooth_ece_at(sigma, probs, labels) == pytest.approx(brute, abs=1e-6)


def test_smooth_ece_is_the_fixed_point():
    probs, labels = calibrated(np.random.default_rng(6), 300)
    value = calibration.smooth_ece(probs, labels)
    assert calibration.smooth_ece_at(value, probs, labels) == pytest.approx(value, abs=5e-6)
    at = [calibration.smooth_ece_at(s, probs, labels) for s in (0.01, 0.05, 0.2, 1.0)]
    assert at == sorted(at, reverse=True)


def test_smooth_ece_of_known_cases():
    # residuals of one sign: the kernel has mass 1, so smECE = |mean residual| at every bandwidth
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    assert calibration.smooth_ece(probs, np.array([1, 1, 1])) == pytest.approx((0.9 + 0.8 + 0.6) / 3, abs=2e-6)
    assert calibration.smooth_ece(np.eye(2), np.array([0, 1])) == 0.0  # sure and right
    rng = np.random.default_rng(7)
    small, large = (np.mean([calibration.smooth_ece(*calibrated(rng, n)) for _ in range(8)]) for n in (100, 2000))
    assert large < 0.5 * small  # consistent


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="sigma must be at least"):
        calibration.smooth_ece_at(1e-5, np.eye(2), np.array([0, 1]))
    with pytest.raises(ValueError, match="labels must lie"):
        calibration.smooth_ece(np.eye(2), np.array([0, -1]))
