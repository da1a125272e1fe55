"""Abstention on cases small enough to count by hand."""

import numpy as np
import pytest

from bmoe_utils.scores import decisions, metrics
from bmoe_utils.scores.predictions import Predictions

U = np.array([0.1, 0.2, 0.2, 0.3, 0.4])
RIGHT = np.array([True, True, False, True, False])


def run(top, right, **signals):
    """Two options, the first on top with these probabilities."""
    top = np.asarray(top, float)
    return Predictions(np.stack([top, 1 - top], 1), np.where(right, 0, 1), signals)


def test_accuracy_at_coverage():
    assert decisions.accuracy_at_coverage(U, RIGHT, 0.8) == pytest.approx(3 / 4)
    assert decisions.accuracy_at_coverage(U, RIGHT, 1.0) == pytest.approx(3 / 5)
    assert decisions.accuracy_at_coverage(U, RIGHT, 0.4) == pytest.approx(1.5 / 2)  # half of the two that tie
    assert decisions.accuracy_at_coverage(U, RIGHT, 0.01) == 1.0  # at least one is answered
    with pytest.raises(ValueError, match="coverage=0 "):
        decisions.accuracy_at_coverage(U, RIGHT, 0)


@pytest.mark.parametrize(("target", "threshold"), [(0.0, 0.1), (0.25, 0.3), (0.3, 0.3), (1 / 3, 0.3), (0.4, 0.4), (1.0, 0.4)])
def test_threshold_is_the_largest_that_passes(target, threshold):
    found = decisions.threshold_for(U, RIGHT, target)
    assert found == threshold
    error, coverage = decisions.at_threshold(U, RIGHT, found)
    assert error <= target + 1e-12 and coverage == (threshold >= U).mean()


def test_ties_are_answered_together():
    assert decisions.threshold_for([0.5, 0.5], [True, False], 0.25) == -np.inf
    assert decisions.threshold_for([0.5, 0.5], [True, False], 0.5) == 0.5


def test_no_threshold_answers_nothing():
    assert decisions.threshold_for(U, ~RIGHT, 0.0) == -np.inf
    error, coverage = decisions.at_threshold(U, RIGHT, -np.inf)
    assert np.isnan(error) and coverage == 0
    with pytest.raises(ValueError, match="target=1.5"):
        decisions.threshold_for(U, RIGHT, 1.5)


def test_thresholds_agree_with_the_curve():
    rng = np.random.default_rng(0)
    u, right = np.round(rng.random(200), 2), rng.random(200) < 0.7
    coverage, risk = metrics.risk_coverage(u, right)
    for target in (0.1, 0.25, 0.29):
        t = decisions.threshold_for(u, right, target)
        error, share = decisions.at_threshold(u, right, t)
        assert error <= target and risk[np.searchsorted(coverage, share - 1e-9)] == pytest.approx(error)
        above = np.unique(u[u > t])
        assert all(decisions.at_threshold(u, right, x)[0] > target for x in above)


def test_cost_of_abstaining():
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    assert decisions.abstention_cost(probs, labels, 0.35) == pytest.approx((0 + 1 + 0.35) / 3)
    assert decisions.abstention_cost(probs, labels, 0.0) == 0 and decisions.abstention_cost(probs, labels, 1.0) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="cost=2"):
        decisions.abstention_cost(probs, labels, 2)


def test_the_truth_is_the_cheapest():
    """In expectation over labels, item by item: min(cost, P(wrong)) is what p* pays and no other rule pays less."""
    rng = np.random.default_rng(1)
    p_star = rng.dirichlet(np.ones(3), size=4000)
    labels = (rng.random((4000, 1)) > p_star.cumsum(1)).sum(1)
    sure = p_star**4 / (p_star**4).sum(1, keepdims=True)
    for cost in (0.1, 0.3, 0.5):
        assert decisions.abstention_cost(p_star, labels, cost) == pytest.approx(np.minimum(cost, 1 - p_star.max(1)).mean(), abs=0.02)
        assert decisions.abstention_cost(p_star, labels, cost) < decisions.abstention_cost(sure, labels, cost)


def test_abstention_table_by_hand():
    validation = {"map": [run([0.9, 0.8, 0.7, 0.6], [True, True, False, False]), run([0.9, 0.8, 0.7, 0.6], [True, False, True, True])]}
    test = {"map": [run([0.95, 0.85, 0.75, 0.65], [True, False, True, True]), run([0.65, 0.95, 0.95, 0.75], [True, False, True, True])]}
    row = decisions.abstention_table(validation, {"test": test}, [0.0, 0.3]).set_index("target")
    # target 0: thresholds .2 and .1; answered: items 1, 2 (one wrong), and items 2, 3 (one wrong)
    assert row.loc[0.0, ["threshold", "error", "coverage", "within"]].tolist() == [pytest.approx(0.15), 0.5, 0.5, "0/2"]
    # target .3: seed 0 .2 (with the third, 1/3 err), seed 1 .4 (1/4): 1/2 and 1/4 of what is answered
    assert row.loc[0.3, ["threshold", "error", "coverage", "within"]].tolist() == [pytest.approx(0.3), pytest.approx(2 / 6), 6 / 8, "1/2"]
    assert (row.error_low <= row.error).all() and (row.error <= row.error_high).all() and (row.coverage_low <= row.coverage).all()


def test_abstention_table_intervals_are_those_of_explicit_resamples():
    rng = np.random.default_rng(2)
    runs = [run(0.5 + rng.random(80) / 2, rng.random(80) < 0.7) for _ in range(2)]
    labels = runs[0].labels
    runs = [Predictions(r.probs, labels) for r in runs]
    validation = {"map": [run([0.9, 0.7], [True, False])] * 2}
    row = decisions.abstention_table(validation, {"test": {"map": runs}}, [0.0], n=4000).iloc[0]
    drawn = []
    for _ in range(4000):
        index = rng.integers(80, size=80)
        kept = [(p := r.probs[index]).max(1) >= 0.9 for r in runs]
        wrong = [k & (r.probs[index].argmax(1) != labels[index]) for k, r in zip(kept, runs)]
        drawn.append(np.sum(wrong) / np.sum(kept))
    assert (row.error_low, row.error_high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert row.error == pytest.approx(np.mean(np.concatenate([(r.probs.argmax(1) != labels)[r.probs.max(1) >= 0.9] for r in runs])))


def test_never_answering_keeps_the_target():
    row = decisions.abstention_table({"map": [run([0.9], [False])]}, {"far": {"map": [run([0.9, 0.8], [True, True])]}}, [0.1]).iloc[0]
    assert np.isnan(row.error) and np.isnan(row.threshold) and row.coverage == 0 and row.within == "1/1"


def test_other_signals_and_bad_input():
    said = run([0.9, 0.6], [True, False], routing_epistemic=[0.5, 0.1])
    assert decisions.answers(said, "routing_epistemic")[0].tolist() == [0.5, 0.1]
    assert decisions.answers(said)[0] == pytest.approx([0.1, 0.4])
    with pytest.raises(ValueError, match="no signal 'total'; they have: routing_epistemic"):
        decisions.answers(said, "total")
    with pytest.raises(ValueError, match="2 seeds on validation and 1 on 'test'"):
        decisions.abstention_table({"map": [said, said]}, {"test": {"map": [said]}}, [0.1])
