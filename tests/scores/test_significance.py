"""Paired, pooled, corrected: against explicit resampling and published values, and under a null where the error rate is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bmoe_utils.scores import metrics, significance
from bmoe_utils.scores.predictions import Predictions


def runs(rng, seeds=3, n=120, options=4, sharpness=1.0, labels=None, p_star=None):
    """Runs of one method over seeds on the same items."""
    p_star = rng.dirichlet(np.ones(options), size=n) if p_star is None else p_star
    labels = (rng.random((n, 1)) > p_star.cumsum(1)).sum(1) if labels is None else labels
    said = [np.exp(sharpness * np.log(p_star) + 0.3 * rng.normal(size=p_star.shape)) for _ in range(seeds)]
    return [Predictions(x / x.sum(1, keepdims=True), labels, p_star=p_star) for x in said]


def like(rng, first, sharpness):
    return runs(rng, len(first), labels=first[0].labels, p_star=first[0].p_star, sharpness=sharpness)


EXPLICIT = {"accuracy": metrics.accuracy, "nll": metrics.nll, "brier": metrics.brier, "ece": metrics.ece,
            "aurc": lambda probs, labels: metrics.aurc(1 - probs.max(1), probs.argmax(1) == labels)}


@pytest.mark.parametrize("metric", EXPLICIT)
@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_counts_are_those_of_resampled_items(metric, ties):
    rng = np.random.default_rng(0)
    run = runs(rng, 1)[0]
    if ties:
        probs = np.round(run.probs, 1) + 0.02
        run = Predictions(probs / probs.sum(1, keepdims=True), run.labels)
    index = rng.integers(len(run), size=(6, len(run)))
    counts = np.stack([np.bincount(i, minlength=len(run)) for i in index]).astype(float)
    expected = [EXPLICIT[metric](run.probs[i], run.labels[i]) for i in index]
    assert significance.RESAMPLED[metric](run, counts) == pytest.approx(expected, abs=1e-12)
    assert significance.RESAMPLED[metric](run, significance.resamples(len(run), 3))[0] == pytest.approx(EXPLICIT[metric](run.probs, run.labels))


def test_kl_of_counts():
    run = runs(np.random.default_rng(1), 1)[0]
    assert significance.RESAMPLED["kl"](run, np.ones((1, len(run))))[0] == pytest.approx(metrics.kl_to(run.p_star, run.probs))


def test_one_seed_is_the_paired_bootstrap():
    rng = np.random.default_rng(2)
    first = runs(rng, 1, n=400)
    second = like(rng, first, 2.0)
    d = significance.paired_difference("nll", first, second, n=4000)
    value, low, high = metrics.paired_bootstrap(metrics.nll, first[0].probs, second[0].probs, first[0].labels, n=4000)
    assert d.value == pytest.approx(value)
    assert d == d.__class__(**vars(significance.paired_difference("nll", first, second, n=4000, seeds="fixed")) | {"by_seed": d.by_seed})
    assert (d.low, d.high) == (pytest.approx(low, abs=0.1 * (high - low)), pytest.approx(high, abs=0.1 * (high - low)))


def test_seeds_that_disagree_widen_the_interval():
    """Items that all agree, seeds 1, 2 and 3: the interval is Student's over the three."""
    draws = np.tile([1.0, 2.0, 3.0], (101, 1))
    draws[1:] += 1e-9 * np.random.default_rng(0).normal(size=(100, 1))
    d = significance.pooled_difference(draws, 500)
    expected = stats.ttest_1samp([1, 2, 3], 0)
    assert (d.value, d.p) == (2.0, pytest.approx(expected.pvalue, rel=1e-6))
    assert (d.low, d.high) == pytest.approx(expected.confidence_interval(), rel=1e-6)
    fixed = significance.pooled_difference(draws, 500, seeds="fixed")
    assert fixed.p < 1e-12 and fixed.high - fixed.low < 1e-6


def test_the_same_answers_do_not_differ():
    first = runs(np.random.default_rng(3))
    d = significance.paired_difference("ece", first, first)
    assert (d.value, d.low, d.high, d.p) == (0, 0, 0, 1)


def test_holm_known_values():
    # Holm (1979) on .01, .04, .03, .005 of four: .005 * 4, .01 * 3, .03 * 2, then monotone
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert significance.holm([0.2]) == pytest.approx([0.2]) and len(significance.holm([])) == 0


def null_draws(rng, seeds, tests, seed_effect, item_effect, noise, n_items=60, n=200):
    """Per-item differences of expectation zero: shared by the seed, by the item, and neither."""
    weights = significance.resamples(n_items, n, int(rng.integers(2**31))) / n_items
    d = (seed_effect * rng.normal(size=(tests, seeds, 1)) + item_effect * rng.normal(size=(tests, 1, n_items))
         + noise * rng.normal(size=(tests, seeds, n_items)))
    return [weights @ x.T for x in d]


@pytest.mark.parametrize("effects", [(0.3, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.2, 0.2)], ids=["both", "items", "seeds"])
def test_family_wise_error_is_controlled_under_the_null(effects):
    rng, trials = np.random.default_rng(4), 400
    wrong = naive = 0
    for _ in range(trials):
        draws = null_draws(rng, 3, 6, *effects)
        wrong += significance.holm([significance.pooled_difference(d, 60).p for d in draws]).min() <= 0.05
        naive += min(significance.pooled_difference(d, 60, seeds="fixed").p for d in draws) <= 0.05
    # 400 trials: a rate of .05 stays under .083 with probability .997
    assert wrong / trials < 0.083, wrong / trials
    assert naive / trials > 0.2, naive / trials  # what would be claimed with the seeds left out and no correction


def test_pooled_interval_covers_and_is_not_idle():
    rng, trials, inside, width = np.random.default_rng(5), 500, 0, []
    for _ in range(trials):
        draws = null_draws(rng, 3, 1, 0.1, 1.0, 0.5)[0] + 0.7
        d = significance.pooled_difference(draws, 60)
        inside += d.low < 0.7 < d.high
        width.append((d.high - d.low) / 2)
    true = np.sqrt(0.1**2 / 3 + 1 / 60 + 0.25 / 180)
    assert inside / trials > 0.95 and np.median(width) < 2 * 1.96 * true


def test_compare_finds_what_is_there_and_corrects_over_the_table():
    rng = np.random.default_rng(6)
    rows = {"map": runs(rng, 3, n=300, sharpness=3.0)}
    rows["temperature"], rows["joint"] = like(rng, rows["map"], 1.0), like(rng, rows["map"], 1.05)
    table = significance.compare(rows, scores=("nll", "accuracy"), n=300)
    assert list(zip(table.method, table.reference, table.metric)) == [
        (m, r, s) for s in ("nll", "accuracy") for m, r in (("temperature", "map"), ("joint", "map"), ("joint", "temperature"))]
    assert table.holm.to_numpy() == pytest.approx(significance.holm(table.p))
    at = table.set_index(["method", "reference", "metric"])
    assert at.loc[("joint", "map", "nll"), "verdict"] == "better" and at.loc[("joint", "map", "nll"), "better"] == "3/3"
    assert at.loc[("joint", "temperature", "nll"), "verdict"] == ""
    expected = np.mean([a.summary()["nll"] - b.summary()["nll"] for a, b in zip(rows["joint"], rows["map"])])
    assert at.loc[("joint", "map", "nll"), "difference"] == pytest.approx(expected)
    worse = significance.compare({"map": rows["temperature"], "joint": rows["map"]}, references=("map",), scores=("nll",), n=300)
    assert worse.verdict.tolist() == ["worse"] and worse.better.tolist() == ["0/3"]


# Decision trees on 14 data sets (Demšar 2006, table 6): C4.5, with m, with cf, with both; the two of .975 are ranked 2 and 3 there
DEMSAR = np.array([
    [.763, .768, .771, .798], [.599, .591, .590, .569], [.954, .971, .968, .967], [.628, .661, .654, .657], [.882, .888, .886, .898],
    [.936, .931, .916, .931], [.661, .668, .609, .685], [.583, .583, .563, .625], [.775, .838, .866, .875], [1, 1, 1, 1],
    [.940, .962, .965, .962], [.619, .666, .614, .669], [.972, .981, .9751, .975], [.957, .978, .946, .970]])  # fmt: skip


def test_friedman_and_nemenyi_on_the_published_example():
    rank, statistic, p = significance.friedman(DEMSAR, higher=True)
    assert rank == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    # the paper's 9.28 is without the correction for ties
    k, n = 4, 14
    assert 12 * n / (k * (k + 1)) * ((rank**2).sum() - k * (k + 1) ** 2 / 4) == pytest.approx(9.28, abs=0.01)
    ties = 1 - sum(c**3 - c for row in DEMSAR for c in np.unique(row, return_counts=True)[1]) / (n * (k**3 - k))
    assert statistic == pytest.approx(9.28 / ties, abs=0.02) and p < 0.05
    assert significance.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert significance.critical_difference(5, 30) == pytest.approx(2.728 * np.sqrt(30 / 180), abs=1e-3)


def test_mean_ranks_over_blocks_and_seeds():
    rng, blocks = np.random.default_rng(7), {}
    for block in ("test", "near"):
        sharp = runs(rng, 3, n=200, sharpness=3.0)
        blocks[block] = {"map": sharp, "temperature": like(rng, sharp, 1.0), "joint": like(rng, sharp, 1.0)}
    ranks = significance.mean_ranks(blocks, "nll", n=200)
    by_hand = np.mean([stats.rankdata([rows[m][s].summary()["nll"] for m in rows]) for rows in blocks.values() for s in range(3)], 0)
    assert ranks.table["rank"].to_numpy() == pytest.approx(by_hand) and ranks.blocks == 6
    assert ranks.table.loc["map", ["rank", "low", "high"]].tolist() == [3, 3, 3] and ranks.p < 0.05
    spread = ranks.table.loc["joint", "high"] - ranks.table.loc["joint", "low"]
    assert spread > 0.2 and ranks.table.low.le(ranks.table["rank"]).all() and ranks.table.high.ge(ranks.table["rank"]).all()
    higher = significance.mean_ranks({"a": {"x": [_sure(0)], "y": [_sure(1)]}}, "accuracy", n=10)
    assert higher.table["rank"].tolist() == [1, 2] and np.isnan(higher.p)


def _sure(option):
    return Predictions(np.eye(2)[[option] * 4] * 0.8 + 0.1, np.zeros(4, int))


def test_bad_input_is_named():
    rng = np.random.default_rng(8)
    first, other = runs(rng, 2), runs(rng, 2)
    with pytest.raises(ValueError, match="other labels"):
        significance.paired_difference("nll", first, other)
    with pytest.raises(ValueError, match="same seeds"):
        significance.paired_difference("nll", first, first[:1])
    with pytest.raises(ValueError, match="unknown metric 'f1'"):
        significance.paired_difference("f1", first, first)
    with pytest.raises(ValueError, match="'map' is not among"):
        significance.compare({"joint": first})
    with pytest.raises(ValueError, match="same seeds"):
        significance.compare({"map": first, "joint": first[:1]}, references=("map",))
    with pytest.raises(ValueError, match="must hold the methods"):
        significance.mean_ranks({"a": {"x": first}, "b": {"y": first}}, "nll")
    assert isinstance(significance.compare({"map": first}, references=("map",)), pd.DataFrame)
