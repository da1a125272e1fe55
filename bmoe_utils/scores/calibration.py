"""Calibration errors without the bias of the binned ECE: debiased, smooth, and the floor that sampling alone puts under the ECE.

All look at the top option: confidence ``f_i = max_c p_ic``, ``y_i`` whether that option is the label, residual ``r_i = y_i - f_i``.
Layout and checks as in :mod:`bmoe_utils.scores.metrics`. ``weights [R, N]`` (rows sum to N) ask for ``R`` reweighted data sets at once,
such as the counts of bootstrap resamples; without them a float comes back, with them ``[R]``.
"""

from __future__ import annotations

import numpy as np
from scipy.fft import dct

from .metrics import N_BINS, _checked

# Smooth ECE: the smallest bandwidth looked at; cosines whose weight at that bandwidth is above rounding; points of the integral.
SIGMA_MIN = 1e-3
TERMS = int(np.ceil(np.sqrt(-2 * np.log(np.finfo(float).eps)) / (np.pi * SIGMA_MIN)))
GRID = 4096


def residuals(probs, labels) -> tuple[np.ndarray, np.ndarray]:
    """``(confidence [N], correct - confidence [N])`` of the top option, float64."""
    probs, labels = _checked(probs, labels)
    confidence = probs.max(1)
    return confidence, (probs.argmax(1) == labels) - confidence


def _in_bins(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    """``[N, n_bins]`` membership in the bins of :func:`metrics.reliability_bins`: equal width, closed on the right."""
    edges = np.arange(1, n_bins) / n_bins
    return np.eye(n_bins)[np.searchsorted(edges, confidence, side="left")]


def _weights(weights, n_items: int) -> np.ndarray:
    return np.ones((1, n_items)) if weights is None else np.asarray(weights, dtype=float)


def _result(values: np.ndarray, weights):
    return float(values[0]) if weights is None else values


def ece(probs, labels, *, n_bins: int = N_BINS, weights=None):
    """The plug-in ECE of :func:`metrics.ece`, for many reweighted data sets at once."""
    confidence, r = residuals(probs, labels)
    w = _weights(weights, len(r))
    return _result(np.abs(w @ (_in_bins(confidence, n_bins) * r[:, None])).sum(1) / len(r), weights)


def debiased_square_ece(probs, labels, *, n_bins: int = N_BINS):
    """Debiased squared calibration error: unbiased for ``sum_b n_b / N (E[r | bin b])^2``, so it may come out negative.

    The plug-in square of a bin's mean residual is too large by the variance of that mean. As in Kumar et al. (2019, 1909.10155,
    section 4), that is estimated and subtracted; here from the residuals, ``s_b^2 / n_b``, which is the mean of ``r_i r_j`` over
    pairs ``i != j``, exactly unbiased whatever the confidences within a bin (and theirs where they are all equal). A bin with a
    single item has no such pair and adds nothing. Same bins as the ECE, so that the two differ in bias and power alone.
    """
    confidence, r = residuals(probs, labels)
    member = _in_bins(confidence, n_bins)
    count, total, square = member.sum(0), r @ member, r**2 @ member
    pairs = np.where(count > 1, (total**2 - square) / np.maximum(count - 1, 1), 0.0)  # n_b times the mean of r_i r_j
    return float(pairs.sum() / len(r))


def debiased_ece(probs, labels, *, n_bins: int = N_BINS):
    """``sign(v) sqrt(|v|)`` of :func:`debiased_square_ece`: on the ECE's scale (a root mean square, so at least the ECE in the limit)."""
    value = debiased_square_ece(probs, labels, n_bins=n_bins)
    return float(np.sign(value) * np.sqrt(abs(value)))


def ece_floor(probs, *, n_bins: int = N_BINS, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """``(mean, level quantile)`` of the ECE that a *calibrated* model with these confidences would show on as many items.

    Consistency resampling (Bröcker and Smith 2007): whether the top option is right is drawn with its own confidence.
    """
    confidence, _ = residuals(probs, np.zeros(len(probs), dtype=int))
    right = np.random.default_rng(seed).random((n, len(confidence))) < confidence
    errors = np.abs((right - confidence) @ _in_bins(confidence, n_bins)).sum(1) / len(confidence)
    return float(errors.mean()), float(np.quantile(errors, level))


def smooth_ece_at(sigma, probs, labels, *, weights=None):
    """``smECE_sigma = int_0^1 |1/N sum_i r_i K_sigma(t, f_i)| dt`` (Błasiok and Nakkiran 2023, 2309.12236), ``sigma >= SIGMA_MIN``.

    ``K_sigma`` is the Gaussian reflected at 0 and 1, that is the heat kernel of the unit interval without flux at its ends,
    ``1 + 2 sum_k exp(-(k pi sigma)^2 / 2) cos(k pi t) cos(k pi f)``: smoothing is a damping of cosines, whatever the number of items.
    """
    return _result(_at(np.asarray(sigma, float), _cosines(probs, labels, _weights(weights, len(labels)))), weights)


def smooth_ece(probs, labels, *, weights=None, tolerance: float = 1e-6):
    """smECE: the ``sigma`` at which ``smECE_sigma = sigma`` (unique, since the left side falls with sigma), to ``tolerance``.

    No bins, continuous in the predictions, and consistent; it falls with the number of items, as the ECE does, but not with the
    number of bins. Where the solution lies below ``SIGMA_MIN``, the value there, which is a lower bound of it.
    """
    coefficients = _cosines(probs, labels, _weights(weights, len(labels)))
    low, high = np.full(len(coefficients), SIGMA_MIN), np.ones(len(coefficients))
    lowest = _at(low, coefficients)
    for _ in range(int(np.ceil(np.log2(1 / tolerance)))):
        middle = (low + high) / 2
        above = _at(middle, coefficients) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return _result(np.where(lowest < SIGMA_MIN, lowest, (low + high) / 2), weights)


def _cosines(probs, labels, w: np.ndarray) -> np.ndarray:
    """``1/N sum_i w_ri r_i cos(k pi f_i)``, ``[R, TERMS]``; items in blocks, so that memory does not grow with their number."""
    confidence, r = residuals(probs, labels)
    k, out = np.arange(TERMS), np.zeros((len(w), TERMS))
    for start in range(0, len(r), 2048):
        block = slice(start, start + 2048)
        out += w[:, block] @ (r[block, None] * np.cos(np.pi * confidence[block, None] * k))
    return out / len(r)


def _at(sigma: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """smECE at a bandwidth per row; the midpoint rule on GRID points, where a sum of cosines is a type-III DCT."""
    if (sigma < SIGMA_MIN).any():
        raise ValueError(f"sigma must be at least {SIGMA_MIN}, got {sigma.min()}")
    damped = coefficients * np.exp(-((np.arange(TERMS) * np.pi * np.reshape(sigma, (-1, 1))) ** 2) / 2)
    padded = np.pad(damped, ((0, 0), (0, GRID - TERMS)))
    return np.abs(dct(padded, type=3, axis=1)).mean(1)  # DCT-III is x_0 + 2 sum_k x_k cos(pi k (j + 1/2) / GRID)
