"""Calibration, accuracy and ranking metrics: pure functions of arrays, all in float64.

Layout, the same everywhere:

    probs   [N, C]  float; each row sums to 1; exactly zero where an item has fewer than C options
    labels  [N]     int in [0, C)
    p_star  [N, C]  float; the true answer distribution, laid out like `probs`
    logits  [N, C]  float; -inf where an item has fewer options

Torch tensors on any device are accepted. Ties for the top option go to the lowest index. Input that does not fit
(shapes, NaN, rows that do not sum to 1, labels out of range, -1 included) raises `ValueError`.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import entr, logsumexp, rel_entr
from scipy.special import softmax as _scipy_softmax

N_BINS = 15
TINY = np.finfo(np.float64).tiny  # floor under every logarithm: an impossible answer costs 708 nats, not infinity
ROW_SUM_TOLERANCE = 1e-4  # a float32 softmax passes, a half-precision one does not: cast the logits first


# ---------------------------------------------------------------------------------------------------- input checks


def to_numpy(array):
    """`array` (numpy, torch, list) as a numpy array; bfloat16, which numpy lacks, and half become float64."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.double() if array.is_floating_point() else array
    return np.asarray(array)


def _distribution(probs, name="probs"):
    probs = to_numpy(probs).astype(np.float64)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(f"{name} must be [N, C] with N, C >= 1, got shape {probs.shape}")
    if not np.isfinite(probs).all() or (probs < 0).any():
        raise ValueError(f"{name} must be finite and non-negative")
    error = np.abs(probs.sum(1) - 1)
    if error.max() > ROW_SUM_TOLERANCE:
        raise ValueError(f"every row of {name} must sum to 1; row {error.argmax()} is off by {error.max():.3g}")
    return probs


def _labels(labels, n_items, n_options):
    labels = to_numpy(labels)
    if labels.shape != (n_items,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be [N = {n_items}] integers, got shape {labels.shape} and dtype {labels.dtype}")
    if labels.min() < 0 or labels.max() >= n_options:
        wrong = labels[(labels < 0) | (labels >= n_options)][0]
        raise ValueError(f"labels must lie in [0, {n_options}), got {wrong}" + " (unknown label)" * bool(wrong == -1))
    return labels


def _checked(probs, labels):
    probs = _distribution(probs)
    return probs, _labels(labels, *probs.shape)


def _pair(p_star, probs):
    p_star, probs = _distribution(p_star, "p_star"), _distribution(probs)
    if p_star.shape != probs.shape:
        raise ValueError(f"p_star and probs differ in shape: {p_star.shape} and {probs.shape}")
    return p_star, probs


# --------------------------------------------------------------------------------------------------- means over items
# Each has a per-item form, so that a bootstrap resamples N numbers instead of recomputing the metric.


def _correct_items(probs, labels):
    probs, labels = _checked(probs, labels)
    return (probs.argmax(1) == labels).astype(np.float64)


def _nll_items(probs, labels):
    probs, labels = _checked(probs, labels)
    return -np.log(np.maximum(probs[np.arange(len(labels)), labels], TINY))


def _brier_items(probs, labels):
    probs, labels = _checked(probs, labels)
    return ((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(1)


def _kl_items(p_star, probs):
    p_star, probs = _pair(p_star, probs)
    return rel_entr(p_star, np.maximum(probs, TINY)).sum(1)  # rel_entr(0, .) = 0


def accuracy(probs, labels):
    """Share of items whose top option is the label."""
    return float(_correct_items(probs, labels).mean())


def nll(probs, labels):
    """Mean of -log p(label) in nats; p is floored at the smallest normal float64 (`TINY`)."""
    return float(_nll_items(probs, labels).mean())


def brier(probs, labels):
    """Multi-class Brier score: squared error summed over *all* classes, averaged over items; in [0, 2].

    For two classes this is twice the usual binary score.
    """
    return float(_brier_items(probs, labels).mean())


def kl_to(p_star, probs):
    """Mean KL(p* || p) in nats, with 0 log 0 = 0 and p floored at `TINY`."""
    return float(_kl_items(p_star, probs).mean())


def entropy(probs):
    """Entropy of each row in nats, [N]."""
    return entr(_distribution(probs)).sum(1)


# -------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class ReliabilityBins:
    """Items binned by the probability of their top option. Arrays over the bins; NaN in a bin without items."""

    edges: np.ndarray  # [n_bins + 1]
    confidence: np.ndarray  # [n_bins] mean top probability
    accuracy: np.ndarray  # [n_bins] share correct
    count: np.ndarray  # [n_bins] items

    @property
    def gap(self):
        """accuracy - confidence per bin: negative where the model is over-confident."""
        return self.accuracy - self.confidence

    @property
    def ece(self):
        """Expected calibration error: |gap| averaged with the bins' counts."""
        return float(np.nansum(np.abs(self.gap) * self.count) / self.count.sum())

    @property
    def mce(self):
        """Maximum calibration error: the largest |gap| of any occupied bin, however few items it holds."""
        return float(np.nanmax(np.abs(self.gap)))


def reliability_bins(probs, labels, n_bins=N_BINS):
    """`ReliabilityBins` over `n_bins` equal-width bins (lo, hi]; confidence 0 belongs to the first, 1 to the last."""
    probs, labels = _checked(probs, labels)
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    edges = np.arange(n_bins + 1) / n_bins  # not linspace: k / n is the float that a confidence of k / n would be
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    # Only inner edges are searched, so nothing falls below the first bin, nor, by rounding, above the last.
    index = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=n_bins)
    occupied = np.where(count > 0, count, np.nan)
    return ReliabilityBins(
        edges=edges,
        confidence=np.bincount(index, confidence, n_bins) / occupied,
        accuracy=np.bincount(index, correct, n_bins) / occupied,
        count=count,
    )


def ece(probs, labels, n_bins=N_BINS):
    """Expected calibration error of the top option; see `reliability_bins`."""
    return reliability_bins(probs, labels, n_bins).ece


def mce(probs, labels, n_bins=N_BINS):
    """Maximum calibration error of the top option; see `reliability_bins`."""
    return reliability_bins(probs, labels, n_bins).mce


def summary(probs, labels, p_star=None):
    """`{"accuracy", "nll", "ece", "mce", "brier"}`, and `"kl"` to `p_star` where it is given; floats."""
    bins = reliability_bins(probs, labels)
    out = {
        "accuracy": accuracy(probs, labels),
        "nll": nll(probs, labels),
        "ece": bins.ece,
        "mce": bins.mce,
        "brier": brier(probs, labels),
    }
    return out if p_star is None else out | {"kl": kl_to(p_star, probs)}


def oracle_bounds(p_star):
    """What predicting `p_star` itself scores in expectation over labels drawn from it; no predictor can do better.

    Keys as in `summary`, without the two calibration errors: their expectation depends on the number of items.
    """
    p_star = _distribution(p_star, "p_star")
    return {
        "accuracy": float(p_star.max(1).mean()),
        "nll": float(entropy(p_star).mean()),
        "brier": float((1 - (p_star**2).sum(1)).mean()),
        "kl": 0.0,
    }


# ------------------------------------------------------------------------------------------------ ranking by uncertainty


def _scores(score, is_ood):
    score, is_ood = to_numpy(score).astype(np.float64), to_numpy(is_ood)
    if score.ndim != 1 or score.shape != is_ood.shape:
        raise ValueError(f"score and is_ood must both be [N], got {score.shape} and {is_ood.shape}")
    if not np.isfinite(score).all():
        raise ValueError("score must be finite")
    if set(np.unique(is_ood).tolist()) != {0, 1}:
        raise ValueError("is_ood must hold both classes: 0 (in distribution) and 1 (out of distribution), nothing else")
    return score, is_ood.astype(int)


def auroc(score, is_ood):
    """Area under the ROC curve of `score` [N] for `is_ood` [N] (ID = 0, OoD = 1).

    A higher score must mean "more out of distribution". The direction is never flipped: below .5 is a result.
    """
    from sklearn.metrics import roc_auc_score  # not above: its import draws from Python's random numbers

    score, is_ood = _scores(score, is_ood)
    return float(roc_auc_score(is_ood, score))


def auprc(score, is_ood):
    """Average precision with OoD as the positive class; directions as in `auroc`. Chance is the share of OoD items."""
    from sklearn.metrics import average_precision_score

    score, is_ood = _scores(score, is_ood)
    return float(average_precision_score(is_ood, score))


def risk_coverage(uncertainty, correct):
    """Error rate among the k most certain items, for k = 1..N.

    `uncertainty` [N] (higher = answered later), `correct` [N] bool. Returns `(coverage [N], risk [N])`. Items with
    equal uncertainty carry their group's mean error, so the curve does not depend on their order.
    """
    uncertainty, correct = to_numpy(uncertainty).astype(np.float64), to_numpy(correct).astype(np.float64)
    if uncertainty.ndim != 1 or uncertainty.shape != correct.shape or not len(correct):
        raise ValueError(f"uncertainty and correct must both be [N], got {uncertainty.shape} and {correct.shape}")
    if not np.isfinite(uncertainty).all() or not np.isin(correct, (0, 1)).all():
        raise ValueError("uncertainty must be finite, correct must hold 0 and 1 only")
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    mean_error = np.bincount(group, 1 - correct) / size
    answered = np.arange(1, len(correct) + 1)
    return answered / len(correct), np.cumsum(np.repeat(mean_error, size)) / answered


def aurc(uncertainty, correct):
    """Area under the risk-coverage curve (mean risk over k = 1..N); lower is better."""
    return float(risk_coverage(uncertainty, correct)[1].mean())


# ------------------------------------------------------------------------------------------------------------ bootstrap

_PER_ITEM = {accuracy: _correct_items, nll: _nll_items, brier: _brier_items, kl_to: _kl_items}


def _interval(statistic, n_items, value, n, seed, level, strata=None):
    """Percentile interval of `statistic(index)` over `n` resamples of the items, within `strata` if given."""
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"need n >= 1 and 0 < level < 1, got n = {n}, level = {level}")
    if strata is not None and len(strata) != n_items:
        raise ValueError(f"strata must be [N = {n_items}], got {len(strata)} entries")
    rng = np.random.default_rng(seed)
    groups = [np.arange(n_items)] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
    draws = [statistic(np.concatenate([g[rng.integers(len(g), size=len(g))] for g in groups])) for _ in range(n)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(value), float(low), float(high)


def _same_length(arrays):
    arrays = [to_numpy(a) for a in arrays]
    lengths = {a.shape[0] if a.ndim else None for a in arrays}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise ValueError(f"arrays must share a first axis of N >= 1 items, got shapes {[a.shape for a in arrays]}")
    return arrays, lengths.pop()


def bootstrap(metric, *arrays, n=1000, seed=0, level=0.95, strata=None):
    """`(value, low, high)`: `metric(*arrays)` and its percentile interval over `n` resamples of the items.

    Every array has the items as its first axis. `strata` [N] resamples within each group, which keeps both classes
    present: pass `is_ood` with `auroc`. The ECE of a resample is biased upwards (a resample is noisier than the
    sample), so its interval may lie mostly above the value.
    """
    arrays, n_items = _same_length(arrays)
    value = metric(*arrays)
    if metric in _PER_ITEM:
        items = _PER_ITEM[metric](*arrays)
        statistic = lambda index: items[index].mean()  # noqa: E731
    else:
        statistic = lambda index: metric(*(a[index] for a in arrays))  # noqa: E731
    return _interval(statistic, n_items, value, n, seed, level, None if strata is None else to_numpy(strata))


def paired_bootstrap(metric, first, second, *shared, n=1000, seed=0, level=0.95):
    """`(difference, low, high)` of `metric(first, *shared) - metric(second, *shared)` on the same resampled items.

    Two methods judged on one test set share its easy and its hard items; pairing removes that common noise.
    """
    arrays, n_items = _same_length((first, second, *shared))
    first, second, *shared = arrays
    value = metric(first, *shared) - metric(second, *shared)
    if metric in _PER_ITEM:
        items = _PER_ITEM[metric](first, *shared) - _PER_ITEM[metric](second, *shared)
        return _interval(lambda index: items[index].mean(), n_items, value, n, seed, level)

    def difference(index):
        rest = [a[index] for a in shared]
        return metric(first[index], *rest) - metric(second[index], *rest)

    return _interval(difference, n_items, value, n, seed, level)


# -------------------------------------------------------------------------------------------------- temperature scaling

TEMPERATURE_BOUNDS = (1e-2, 1e2)
# What few labels, or labels that fix no temperature, are weighed against: T between 1/7 and 7 at 95%, as wide as any temperature
# that fine-tuned models were seen to need.
SHRUNK = (1.0, 1.0)
FEW_LABELS = 50  # from about so many on, a temperature gets no better
FLAT = 1e-9  # nats an item over the whole range: far above rounding, far below what a label can tell


def _logits(logits):
    logits = to_numpy(logits).astype(np.float64)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must be [N, C] with N, C >= 1, got shape {logits.shape}")
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ValueError("logits must be finite, or -inf for a missing option")
    if np.isneginf(logits).all(1).any():
        raise ValueError(f"item {np.isneginf(logits).all(1).argmax()} has no option: all of its logits are -inf")
    return logits


def softmax(logits, temperature=1.0):
    """softmax(logits / temperature) [N, C] in float64; exactly zero where the logit is -inf."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _scipy_softmax(_logits(logits) / temperature, axis=1)


def fit_temperature(logits, labels, *, prior="auto"):
    """The temperature T minimising the NLL of softmax(logits / T) on held-out items (Guo et al. 2017, 1706.04599).

    `prior`: a pair (centre, deviation), log T ~ N(log centre, deviation^2), whose density the items' summed likelihood is
    multiplied by; None: none, as published; "auto": none where there are at least `FEW_LABELS` items and the NLL has an optimum,
    else `SHRUNK`. Where no minimum exists between `TEMPERATURE_BOUNDS` (every item answered right: T -> 0) a warning says so, and
    without a prior the result sits where the NLL stops falling. Where T changes nothing (equal logits) it is the centre: 1.
    """
    logits = _logits(logits)
    labels = _labels(labels, *logits.shape)
    chosen = logits[np.arange(len(labels)), labels]
    if np.isneginf(chosen).any():
        raise ValueError(f"the label of item {np.isneginf(chosen).argmax()} points at a missing option")
    if prior not in (None, "auto") and not (len(prior) == 2 and min(prior) > 0):
        raise ValueError(f"prior={prior!r} is not None, 'auto' or a pair (centre, deviation) of positive numbers")

    def mean_nll(log_t):
        scale = np.exp(-log_t)
        return (logsumexp(logits * scale, axis=1) - chosen * scale).mean()

    bounds = tuple(np.log(TEMPERATURE_BOUNDS))
    # convex in 1/T, hence with one valley in log T, whose bottom a bounded search finds
    plain = minimize_scalar(mean_nll, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    ends = [mean_nll(end) for end in bounds]
    if max(*ends, plain.fun) - min(*ends, plain.fun) < FLAT:
        return float(SHRUNK[0] if prior in (None, "auto") else prior[0])
    optimum = plain.fun < min(ends)
    if prior == "auto":
        prior = None if optimum and len(labels) >= FEW_LABELS else SHRUNK
    fitted = float(np.exp(plain.x if prior is None else _most_probable(mean_nll, len(labels), *prior)))
    if not optimum:
        shrunk = "" if prior is None else f" and is that of a prior log T ~ N(log {prior[0]:g}, {prior[1]:g}^2)"
        why = "T falls for ever where every item is answered right, and grows where answers are worse than chance"
        warnings.warn(f"the NLL of {len(labels)} items has no optimum between the temperatures {TEMPERATURE_BOUNDS[0]:g} and "
                      f"{TEMPERATURE_BOUNDS[1]:g} ({why}): T = {fitted:.3g} rests on no label{shrunk}", stacklevel=2)
    return fitted


def _most_probable(mean_nll, items, centre, deviation):
    """log T of the largest product of the likelihood of `items` and the prior; the best of a grid, refined within its cell."""
    objective = lambda x: mean_nll(x) + 0.5 * ((x - np.log(centre)) / deviation) ** 2 / items  # noqa: E731
    grid = np.linspace(*np.log(TEMPERATURE_BOUNDS), 185)  # 20 steps a decade: the sum may have two valleys
    best = int(np.argmin([objective(x) for x in grid]))
    cell = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return minimize_scalar(objective, bounds=cell, method="bounded", options={"xatol": 1e-8}).x
