"""Which differences between methods are more than luck: paired over items, pooled over seeds, corrected for many looks; and ranks.

A *run* is the :class:`predictions.Predictions` of one seed; the runs of one method are a list over seeds, and all methods and seeds
answer the same items in the same order. ``weights [R, N]`` are counts of ``R`` bootstrap resamples of the items (rows sum to N),
one set for everything that is compared: what an easy or a hard item does, it does to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.special import digamma, stdtrit

from . import calibration, metrics
from .predictions import Predictions
from .tables import COLUMNS

HIGHER_IS_BETTER = tuple(key for key, (_, arrow) in COLUMNS.items() if arrow == "↑")

# ----------------------------------------------------------------------------------------------- metrics of resamples


def _aurc(uncertainty: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """:func:`metrics.aurc` of every resample, ``[R]``, in closed form.

    A group of equal uncertainty, ``m`` items with mean error ``e`` after ``W`` items with ``E`` errors, adds
    ``sum_{i=1..m} (E + i e) / (W + i) = m e + (E - e W) (H(W + m) - H(W))``, ``H`` the harmonic numbers.
    """
    _, group = np.unique(uncertainty, return_inverse=True)
    member = np.eye(group.max() + 1)[group]  # [N, G], most certain group first
    size, errors = weights @ member, weights @ (member * wrong[:, None])
    before, errors_before = size.cumsum(1) - size, errors.cumsum(1) - errors
    mean = errors / np.maximum(size, 1)
    harmonic = digamma(before + size + 1) - digamma(before + 1)
    return (errors + (errors_before - mean * before) * harmonic).sum(1) / weights.sum(1)


def _mean(items: Callable[[Predictions], np.ndarray]) -> Callable[[Predictions, np.ndarray], np.ndarray]:
    return lambda run, weights: weights @ items(run) / len(run)


# metric -> (run, weights [R, N]) -> its value on every resample [R]; the keys of metrics.summary and some more
RESAMPLED: dict[str, Callable[[Predictions, np.ndarray], np.ndarray]] = {
    "accuracy": _mean(lambda run: metrics._correct_items(run.probs, run.labels)),
    "nll": _mean(lambda run: metrics._nll_items(run.probs, run.labels)),
    "brier": _mean(lambda run: metrics._brier_items(run.probs, run.labels)),
    "kl": _mean(lambda run: metrics._kl_items(run.p_star, run.probs)),
    "ece": lambda run, weights: calibration.ece(run.probs, run.labels, weights=weights),
    "smooth_ece": lambda run, weights: calibration.smooth_ece(run.probs, run.labels, weights=weights, tolerance=1e-4),
    "aurc": lambda run, weights: _aurc(1 - run.probs.max(1), 1 - metrics._correct_items(run.probs, run.labels), weights),
}


def _known(metric: str) -> Callable[[Predictions, np.ndarray], np.ndarray]:
    if metric not in RESAMPLED:
        raise ValueError(f"unknown metric {metric!r}; there are: {', '.join(RESAMPLED)}")
    return RESAMPLED[metric]


def resamples(n_items: int, n: int = 1000, seed: int = 0) -> np.ndarray:
    """The whole sample in the first row, then counts of ``n`` bootstrap resamples: ``[1 + n, N]``, rows sum to N."""
    drawn = np.random.default_rng(seed).multinomial(n_items, np.full(n_items, 1 / n_items), size=n)
    return np.concatenate([np.ones((1, n_items)), drawn])


def _same_items(runs: Sequence[Predictions]) -> int:
    """Their number, or a ValueError where runs are of different items."""
    first = runs[0]
    for run in runs[1:]:
        if len(run) != len(first) or not np.array_equal(run.labels, first.labels):
            raise ValueError(f"every run must answer the same {len(first)} items in the same order; one has {len(run)}"
                             + " with other labels" * (len(run) == len(first)))
    return len(first)


# ------------------------------------------------------------------------------------------------- paired differences


@dataclass(frozen=True)
class Difference:
    """``first - second``: mean over seeds, its interval and two-sided p-value, and each seed's own, ``by_seed [S]``."""

    value: float
    low: float
    high: float
    p: float
    by_seed: np.ndarray


def pooled_difference(draws: np.ndarray, n_items: int, *, seeds: str = "random", level: float = 0.95) -> Difference:
    """A difference between two methods, pooled over seeds.

    ``draws [1 + R, S]``: each seed's difference on the whole sample (first row) and on ``R`` resamples of the items, the same ones
    for every seed. Seeds and items are crossed (each seed answers every item), so both are resampled. The mean's variance has two
    parts, ``V_S + V_N``:

    - the seeds', ``s^2 / S``, which is what drawing ``S - 1`` of the ``S`` with replacement has (Rao and Wu 1988), and
    - the items', the variance of the resamples' means over seeds.

    The noise of one item under one seed is in both, so the interval errs on the wide side. Few seeds know little of their own
    variance: the interval is ``+- sqrt(t_{S-1}^2 V_S + t_{N-1}^2 V_N)`` with Student's quantiles, which covers at least at ``level``
    whatever the two parts' ratio (Banerjee 1960), and the p-value is one minus the level at which it would touch zero.
    (Satterthwaite's degrees of freedom would take a seed variance that happens to come out small for none.)

    ``seeds="fixed"`` leaves the seeds' part out, as one seed must: a statement about these trained models on other items.
    """
    if seeds not in ("random", "fixed"):
        raise ValueError(f"seeds={seeds!r} is neither 'random' nor 'fixed'")
    by_seed, S = draws[0], draws.shape[1]
    value = float(by_seed.mean())
    parts = [(draws[1:].mean(1).var(ddof=1), n_items - 1)]
    if S > 1 and seeds == "random":
        parts.append((by_seed.var(ddof=1) / S, S - 1))

    def half(log_alpha: float) -> float:
        with np.errstate(over="ignore"):  # infinite is what it is
            return float(np.sqrt(sum(variance * stdtrit(df, np.exp(log_alpha) / 2) ** 2 for variance, df in parts)))

    width, smallest = half(np.log(1 - level)), -600.0  # e^-600: beyond it quantiles of two degrees of freedom overflow
    if half(smallest) < abs(value):
        p = 0.0 if value else 1.0
    else:
        p = 1.0 if value == 0 else float(np.exp(brentq(lambda x: half(x) - abs(value), smallest, 0.0, xtol=1e-10)))
    return Difference(value, value - width, value + width, p, by_seed)


def paired_difference(metric: str, first: Sequence[Predictions], second: Sequence[Predictions], *, n: int = 1000, seed: int = 0,
                      seeds: str = "random", level: float = 0.95) -> Difference:
    """``metric(first) - metric(second)`` over seeds and items (:func:`pooled_difference`). ``metric``: a key of ``RESAMPLED``."""
    statistic = _known(metric)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"both methods need the same seeds, at least one; got {len(first)} and {len(second)} runs")
    n_items = _same_items([*first, *second])
    if n_items < 2:
        raise ValueError("one item has no spread to speak of: give at least 2")
    weights = resamples(n_items, n, seed)
    return pooled_difference(np.stack([statistic(a, weights) - statistic(b, weights) for a, b in zip(first, second)], 1), n_items,
                             seeds=seeds, level=level)


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values adjusted by Holm's step-down (1979): rejecting those up to alpha keeps the chance of *any* false one below alpha,
    whatever the tests' dependence."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0))
    return adjusted[np.argsort(order)]


def compare(rows: Mapping[str, Sequence[Predictions]], references: Sequence[str] = ("map", "temperature"),
            scores: Sequence[str] = ("nll", "ece", "brier", "accuracy"), *, n: int = 1000, seed: int = 0, seeds: str = "random",
            level: float = 0.95) -> pd.DataFrame:
    """Every method against every reference in every score, in long form; ``holm``: p adjusted over *all* rows returned.

    ``seeds``: as in :func:`pooled_difference`. With three of them at random hardly anything survives a correction, since they say
    little about the next three; "fixed" asks about these models, and ``better`` says whether the seeds agree.

    Columns: method, reference, metric, difference, low, high, p, holm, ``better`` (seeds on which the method is better, as "2/3") and
    ``verdict``: "better", "worse", or "" where the adjusted p leaves it open at ``1 - level``. A reference is compared with those
    named before it.
    """
    if missing := [r for r in references if r not in rows]:
        raise ValueError(f"reference {missing[0]!r} is not among the methods: {', '.join(rows)}")
    numbers = {method: len(runs) for method, runs in rows.items()}
    if len(set(numbers.values())) != 1:
        raise ValueError(f"every method needs the same seeds, got {numbers}")
    weights = resamples(_same_items([run for runs in rows.values() for run in runs]), n, seed)
    out = []
    for metric in scores:
        values = {method: np.stack([_known(metric)(run, weights) for run in runs], 1) for method, runs in rows.items()}
        sign = 1 if metric in HIGHER_IS_BETTER else -1
        for i, reference in enumerate(references):
            for method in rows:
                if method in references[: i + 1]:
                    continue
                d = pooled_difference(values[method] - values[reference], weights.shape[1], seeds=seeds, level=level)
                out.append({"method": method, "reference": reference, "metric": metric, "difference": d.value, "low": d.low, "high": d.high,
                            "p": d.p, "better": f"{int((sign * d.by_seed > 0).sum())}/{len(d.by_seed)}", "sign": np.sign(sign * d.value)})
    table = pd.DataFrame(out)
    if len(table):
        table.insert(7, "holm", holm(table["p"]))
        table["verdict"] = np.where(table["holm"] > 1 - level, "", np.where(table.pop("sign") > 0, "better", "worse"))
    return table


# -------------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of k methods over n blocks, 1 the best. ``table``: mean, low, high by method; Friedman's statistic and p (NaN for
    fewer than three methods or two blocks); ``critical_difference``, Nemenyi's, at ``level``."""

    table: pd.DataFrame
    statistic: float
    p: float
    critical_difference: float
    blocks: int


def critical_difference(methods: int, blocks: int, level: float = 0.95) -> float:
    """Nemenyi: mean ranks of ``methods`` over ``blocks`` further apart than this differ (Demšar 2006), ``q sqrt(k (k + 1) / 6 n)``."""
    q = stats.studentized_range.ppf(level, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def friedman(values: np.ndarray, *, higher: bool = False) -> tuple[np.ndarray, float, float]:
    """Mean ranks ``[k]`` (1 the best, ties shared) of ``values [n, k]``, Friedman's statistic corrected for ties, and its p."""
    ranks = stats.rankdata(-values if higher else values, axis=1)
    if min(values.shape[0], values.shape[1] - 1) < 2:
        return ranks.mean(0), np.nan, np.nan
    statistic, p = stats.friedmanchisquare(*values.T)
    return ranks.mean(0), float(statistic), float(p)


def mean_ranks(blocks: Mapping[str, Mapping[str, Sequence[Predictions]]], metric: str, *, n: int = 500, seed: int = 0,
               level: float = 0.95) -> Ranks:
    """Ranks of the methods in every block and seed, averaged. ``blocks``: task or split -> method -> runs over seeds.

    The intervals are bootstrap percentiles: items resampled in every block (for all methods and seeds at once), seeds for all blocks
    at once, ``S - 1`` of ``S``; they hold what Friedman's test and Nemenyi's difference do not know, that the blocks of one seed
    share a model. Those two treat each (block, seed) as independent, as they do in the literature: read them as a lower bound.
    """
    names = list(next(iter(blocks.values())))
    rng, drawn = np.random.default_rng(seed), []  # drawn: [1 + n, seeds, methods] per block
    for block, rows in blocks.items():
        if list(rows) != names or len({len(runs) for runs in rows.values()}) != 1:
            raise ValueError(f"block {block!r} must hold the methods {', '.join(names)}, each with the same seeds")
        weights = resamples(_same_items([run for runs in rows.values() for run in runs]), n, int(rng.integers(2**31)))
        drawn.append(np.stack([[_known(metric)(run, weights) for run in rows[name]] for name in names], -1).transpose(1, 0, 2))
    seeds = {d.shape[1] for d in drawn}
    if len(seeds) != 1:
        raise ValueError(f"every block needs the same seeds, got {sorted(seeds)}")
    values = np.stack(drawn, 1)  # [1 + n, blocks, seeds, methods]
    higher, S = metric in HIGHER_IS_BETTER, seeds.pop()
    whole = values[0].reshape(-1, len(names))
    mean, statistic, p = friedman(whole, higher=higher)
    ranks = stats.rankdata(-values[1:] if higher else values[1:], axis=-1).mean(1)  # [n, seeds, methods]
    chosen = rng.integers(S, size=(n, max(S - 1, 1)))
    resampled = np.take_along_axis(ranks, chosen[:, :, None], 1).mean(1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    table = pd.DataFrame({"rank": mean, "low": low, "high": high}, index=pd.Index(names, name="method"))
    return Ranks(table, statistic, p, critical_difference(len(names), len(whole), level), len(whole))
