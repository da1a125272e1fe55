"""Answer or abstain: what a probability is good for once somebody acts on it.

``uncertainty [N]`` (higher = answered later) and ``correct [N]`` bool, as in :func:`metrics.risk_coverage`. *Coverage* is the share
of items answered, *error* the share of those that is wrong. An item is answered where its uncertainty is **at most** the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .metrics import _checked, risk_coverage, to_numpy
from .predictions import Predictions
from .significance import _same_items, resamples


def answers(run: Predictions, score: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``(uncertainty, correct)`` of a run: by the signal ``score``, or by default one minus the top option's probability."""
    probs, labels = _checked(run.probs, run.labels)
    if score is not None and score not in run.signals:
        raise ValueError(f"these predictions have no signal {score!r}; they have: {', '.join(run.signals) or 'none'}")
    return 1 - probs.max(1) if score is None else run.signals[score], probs.argmax(1) == labels


def accuracy_at_coverage(uncertainty, correct, coverage: float = 0.8) -> float:
    """Accuracy on the ``ceil(coverage N)`` most certain items; of items that tie at the border, their mean."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage={coverage} must lie in (0, 1]")
    _, risk = risk_coverage(uncertainty, correct)
    return float(1 - risk[int(np.ceil(coverage * len(risk) - 1e-9)) - 1])  # 0.8 * 5 is a hair above 4


def threshold_for(uncertainty, correct, target: float) -> float:
    """The largest threshold at which the error among these (validation) items is at most ``target``; ``-inf`` where none is.

    Nothing is promised beyond these items: the largest of many thresholds that pass has also been the luckiest.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target={target} must be an error rate in [0, 1]")
    _, risk = risk_coverage(uncertainty, correct)
    ordered = np.sort(to_numpy(uncertainty).astype(np.float64))
    last = np.r_[ordered[1:] != ordered[:-1], True]  # the last of each group of ties: the group is answered as a whole
    within = ordered[last & (risk <= target + 1e-12)]
    return float(within[-1]) if len(within) else -np.inf


def at_threshold(uncertainty, correct, threshold: float) -> tuple[float, float]:
    """``(error, coverage)``; the error is NaN where nothing is answered."""
    answered = to_numpy(uncertainty) <= threshold
    return float(1 - to_numpy(correct)[answered].mean()) if answered.any() else np.nan, float(answered.mean())


def abstention_cost(probs, labels, cost: float) -> float:
    """Mean cost of Chow's rule (1970): abstain, at ``cost``, where the top option's probability of being wrong exceeds it; else 1 for
    an error. No threshold is chosen on any data, so this is where a probability must mean what it says; p* itself is optimal."""
    if not 0 <= cost <= 1:
        raise ValueError(f"cost={cost} must lie in [0, 1], the cost of an error")
    probs, labels = _checked(probs, labels)
    return float(np.where(1 - probs.max(1) > cost, cost, probs.argmax(1) != labels).mean())


def abstention_table(validation: Mapping[str, Sequence[Predictions]], tests: Mapping[str, Mapping[str, Sequence[Predictions]]],
                     targets: Sequence[float], *, score: str | None = None, n: int = 1000, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """"Abstain above a threshold chosen on validation to err at most so often": what that gives on every split of ``tests``.

    ``validation``: method -> runs over seeds; ``tests``: split -> method -> runs over the same seeds. A row per method, target and
    split: error and coverage pooled over the seeds' answers, each seed at its own threshold (``threshold``: their mean, NaN where one
    never answers), with percentile intervals over ``n`` resamples of the split's items, thresholds held; and ``within``, on how many
    seeds the error stayed at or below the target. Where nothing is answered there is no error: NaN, and the target is kept.
    """
    splits = {name: resamples(_same_items([run for runs in rows.values() for run in runs]), n, seed) for name, rows in tests.items()}
    out = []
    for method, runs in validation.items():
        for target in targets:
            thresholds = [threshold_for(*answers(run, score), target) for run in runs]
            for split, weights in splits.items():
                if len(tests[split][method]) != len(runs):
                    raise ValueError(f"{method!r} has {len(runs)} seeds on validation and {len(tests[split][method])} on {split!r}")
                said = [answers(run, score) for run in tests[split][method]]
                answered = np.stack([u <= t for (u, _), t in zip(said, thresholds)])  # [S, N]
                wrong = answered & ~np.stack([correct for _, correct in said])
                number, errors = weights @ answered.sum(0), weights @ wrong.sum(0)  # [1 + n]
                with np.errstate(invalid="ignore"):
                    values = {"error": errors / np.where(number > 0, number, np.nan), "coverage": number / answered.size}
                held = np.mean(thresholds) if np.isfinite(thresholds).all() else np.nan
                row = {"method": method, "target": target, "split": split, "threshold": held}
                for name, drawn in values.items():
                    some = drawn[1:][np.isfinite(drawn[1:])]
                    low, high = np.quantile(some, [(1 - level) / 2, (1 + level) / 2]) if len(some) else (np.nan, np.nan)
                    row |= {name: drawn[0], f"{name}_low": low, f"{name}_high": high}
                kept = int((wrong.sum(1) <= (target + 1e-12) * answered.sum(1)).sum())
                out.append(row | {"within": f"{kept}/{len(runs)}"})
    return pd.DataFrame(out)
