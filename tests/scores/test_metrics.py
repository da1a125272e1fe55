"""Metrics against hand-worked cases, scikit-learn, an independent loop, and properties that must hold."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from bmoe_utils.scores import metrics as m

RNG = np.random.default_rng(7)
# Two items, three classes; worked by hand below. Item 1 has only two options.
PROBS = np.array([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0]])
LABELS = np.array([0, 0])


def random_case(n=400, c=4, sharpness=2.0, seed=0):
    rng = np.random.default_rng(seed)
    probs = m.softmax(sharpness * rng.standard_normal((n, c)))
    return probs, rng.integers(c, size=n)


def loop_ece_mce(probs, labels, n_bins=15):
    """The definition, item by item and bin by bin."""
    bins = [[] for _ in range(n_bins)]
    for row, label in zip(probs, labels):
        top = max(range(len(row)), key=lambda c: row[c])
        for k in range(n_bins):
            if (k / n_bins < row[top] <= (k + 1) / n_bins) or (k == 0 and row[top] == 0):
                bins[k].append((row[top], top == label))
                break
        else:
            raise AssertionError(f"no bin for {row[top]}")
    gaps = [(len(b), abs(sum(c for c, _ in b) - sum(r for _, r in b)) / len(b)) for b in bins if b]
    return sum(n * g for n, g in gaps) / len(labels), max(g for _, g in gaps)


# ------------------------------------------------------------------------------------------------------- worked by hand


def test_hand_worked_values():
    assert m.accuracy(PROBS, LABELS) == 0.5
    assert m.nll(PROBS, LABELS) == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    # item 0: .25 + .09 + .04 = .38; item 1: .81 + .81 = 1.62
    assert m.brier(PROBS, LABELS) == pytest.approx(1.0)
    # bins of .5 (right, gap +.5) and .9 (wrong, gap -.9)
    assert m.ece(PROBS, LABELS) == pytest.approx(0.7)
    assert m.mce(PROBS, LABELS) == pytest.approx(0.9)
    assert m.entropy(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])) == pytest.approx([np.log(2), 0.0])


def test_brier_reaches_two_when_certain_and_wrong():
    assert m.brier([[1.0, 0.0]], [1]) == 2.0
    assert m.brier([[1.0, 0.0]], [0]) == 0.0


def test_kl_by_hand_and_its_direction():
    p_star, probs = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.25, 0.5]])
    assert m.kl_to(p_star, probs) == pytest.approx(np.log(2))  # 0 log 0 = 0; the reverse direction would be floored
    assert m.kl_to(probs, probs) == 0
    assert m.kl_to(probs, p_star) > 100  # mass where the other has none: large, finite


def test_nll_is_floored_not_infinite():
    assert m.nll([[1.0, 0.0]], [1]) == pytest.approx(-np.log(np.finfo(np.float64).tiny))


def test_signs_and_nan_of_the_bins():
    bins = m.reliability_bins(PROBS, LABELS)
    assert bins.count.tolist() == [0] * 7 + [1] + [0] * 5 + [1, 0]
    assert bins.gap[7] == pytest.approx(0.5) and bins.gap[13] == pytest.approx(-0.9)
    assert np.isnan(bins.gap[0]) and np.isnan(bins.accuracy[0]) and bins.edges.shape == (16,)


def test_oracle_bounds_by_hand():
    bounds = m.oracle_bounds([[0.75, 0.25], [1.0, 0.0]])
    assert bounds["accuracy"] == pytest.approx(0.875)
    assert bounds["nll"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / 2)
    assert bounds["brier"] == pytest.approx((1 - 0.625) / 2)
    assert bounds["kl"] == 0


def test_oracle_bounds_are_the_expected_score_and_a_lower_bound():
    p_star, _ = random_case(n=40_000, seed=3)
    labels = (p_star.cumsum(1) < np.random.default_rng(4).random((len(p_star), 1))).sum(1)
    bounds, got = m.oracle_bounds(p_star), m.summary(p_star, labels, p_star)
    for name in ("accuracy", "nll", "brier"):
        assert got[name] == pytest.approx(bounds[name], abs=0.012)
    hedged = 0.7 * p_star + 0.3 / 4
    assert m.nll(hedged, labels) > got["nll"] and m.brier(hedged, labels) > got["brier"]
    # the gap in NLL is the KL divergence, in expectation over labels
    assert m.nll(hedged, labels) - got["nll"] == pytest.approx(m.kl_to(p_star, hedged), abs=0.01)


# -------------------------------------------------------------------------------------------------------- other people's


def test_against_sklearn():
    probs, labels = random_case()
    classes = list(range(4))
    assert m.nll(probs, labels) == pytest.approx(sk.log_loss(labels, probs, labels=classes), rel=1e-12)
    assert m.brier(probs, labels) == pytest.approx(4 * sk.mean_squared_error(np.eye(4)[labels], probs), rel=1e-12)
    binary = np.stack([1 - probs[:, 0], probs[:, 0]], 1)
    assert m.brier(binary, labels % 2) == pytest.approx(2 * sk.brier_score_loss(labels % 2, probs[:, 0]), rel=1e-12)
    assert m.accuracy(probs, labels) == sk.accuracy_score(labels, probs.argmax(1))
    score, is_ood = RNG.standard_normal(300), RNG.integers(2, size=300)
    pairs = score[is_ood == 1][:, None] - score[is_ood == 0]
    assert m.auroc(score, is_ood) == pytest.approx((pairs > 0).mean())
    precision, recall, _ = sk.precision_recall_curve(is_ood, score)
    assert m.auprc(score, is_ood) == pytest.approx(-np.sum(np.diff(recall) * precision[:-1]))


def test_ood_direction_is_never_flipped():
    score, is_ood = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    assert m.auroc(score, is_ood) == 1 and m.auroc(-score, is_ood) == 0
    assert m.auprc(score, is_ood) == 1 and m.auprc(-score, is_ood) == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize("n_bins", [1, 7, 15])
@pytest.mark.parametrize("sharpness", [0.3, 2.0, 40.0])
def test_ece_and_mce_against_a_loop(n_bins, sharpness):
    probs, labels = random_case(sharpness=sharpness)
    expected = loop_ece_mce(probs, labels, n_bins)
    assert (m.ece(probs, labels, n_bins), m.mce(probs, labels, n_bins)) == pytest.approx(expected, abs=1e-12)


def test_bin_edges_close_on_the_right():
    top = np.array([k / 15 for k in range(8, 16)])  # every edge that two classes can reach, 1.0 included
    probs = np.stack([top, 1 - top], 1)
    bins = m.reliability_bins(probs, np.zeros(len(top), int))
    assert bins.count.tolist() == [0] * 7 + [1] * 8
    assert m.ece(probs, np.zeros(8, int)) == pytest.approx(loop_ece_mce(probs, np.zeros(8, int))[0], abs=1e-15)


def test_confidence_one_shares_the_last_bin():
    # certain and wrong, .95 and right: together (.975 - .5); in bins of their own it would be (1 + .05) / 2
    probs = np.array([[1.0, 0.0], [0.95, 0.05]])
    assert m.ece(probs, [1, 0]) == pytest.approx(0.475)
    # a softmax in float32 may exceed 1 by rounding and still belongs there
    assert m.reliability_bins(np.array([[1 + 1e-7, 0.0]]), [0]).count.tolist() == [0] * 14 + [1]


# ------------------------------------------------------------------------------------------------------------ properties


def test_order_of_items_and_classes_is_irrelevant():
    probs, labels = random_case(seed=1)
    p_star, _ = random_case(seed=2)
    before = m.summary(probs, labels, p_star)
    items, classes = RNG.permutation(len(labels)), RNG.permutation(4)
    after = m.summary(probs[items][:, classes], np.argsort(classes)[labels[items]], p_star[items][:, classes])
    assert after == pytest.approx(before, rel=1e-12)
    assert list(before) == ["accuracy", "nll", "ece", "mce", "brier", "kl"]
    assert "kl" not in m.summary(probs, labels)


def test_padding_with_missing_options_changes_nothing():
    probs, labels = random_case()
    wide = np.hstack([probs, np.zeros((len(probs), 3))])
    assert m.summary(wide, labels) == pytest.approx(m.summary(probs, labels), rel=1e-12)


def test_calibrated_by_construction_has_small_ece_and_sharpening_raises_it():
    p_star, _ = random_case(n=20_000, sharpness=1.5, seed=5)
    labels = (p_star.cumsum(1) < np.random.default_rng(6).random((len(p_star), 1))).sum(1)
    # |gap| of a calibrated bin of n items is about sqrt(.25 / n) at most, weighted by n / N: at most sqrt(15 / N) / 2
    assert m.ece(p_star, labels) < 0.5 * np.sqrt(15 / len(labels))
    assert m.ece(m.softmax(3 * np.log(p_star)), labels) > 0.1


def test_torch_and_numpy_agree():
    probs, labels = random_case()
    tensor = torch.tensor(probs, requires_grad=True)
    assert m.summary(tensor, torch.tensor(labels), tensor) == m.summary(probs, labels, probs)
    half = torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16)
    assert m.nll(half, [0]) == pytest.approx(np.log(2))


def test_risk_coverage_by_hand_and_with_ties():
    coverage, risk = m.risk_coverage([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0])
    assert coverage == pytest.approx([0.25, 0.5, 0.75, 1]) and risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert m.aurc([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0]) == pytest.approx(1 / 3)
    correct = RNG.integers(2, size=50)
    assert m.risk_coverage(np.ones(50), correct)[1] == pytest.approx(np.full(50, 1 - correct.mean()))
    best, worst = m.aurc(1 - correct, correct), m.aurc(correct, correct)
    assert best < m.aurc(np.ones(50), correct) < worst


# ------------------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_covers_a_known_accuracy():
    rng, covered, widths = np.random.default_rng(0), [], []
    for seed in range(200):
        right = rng.random(150) < 0.7
        probs = np.where(right[:, None], [0.8, 0.2], [0.2, 0.8])
        _, low, high = m.bootstrap(m.accuracy, probs, np.zeros(150, int), n=200, seed=seed)
        covered.append(low <= 0.7 <= high)
        widths.append(high - low)
    assert 0.89 <= np.mean(covered) <= 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 150), rel=0.08)


def test_bootstrap_shortcut_equals_the_general_path():
    probs, labels = random_case(n=60)
    for metric in (m.accuracy, m.nll, m.brier):
        slow = m.bootstrap(lambda p, y, f=metric: f(p, y), probs, labels, n=50)
        assert m.bootstrap(metric, probs, labels, n=50) == pytest.approx(slow, rel=1e-12)
    other, _ = random_case(n=60, seed=9)
    fast = m.paired_bootstrap(m.nll, probs, other, labels, n=50)
    assert fast == pytest.approx(m.paired_bootstrap(lambda p, y: m.nll(p, y), probs, other, labels, n=50))
    assert m.bootstrap(m.kl_to, other, probs, n=50)[0] == m.kl_to(other, probs)


def test_bootstrap_is_seeded_and_orders_its_levels():
    probs, labels = random_case(n=80)
    assert m.bootstrap(m.ece, probs, labels, n=60, seed=1) == m.bootstrap(m.ece, probs, labels, n=60, seed=1)
    _, low50, high50 = m.bootstrap(m.nll, probs, labels, level=0.5)
    _, low95, high95 = m.bootstrap(m.nll, probs, labels, level=0.95)
    assert low95 < low50 < high50 < high95


def test_pairing_is_tighter_than_two_separate_intervals():
    probs, labels = random_case()
    worse = m.softmax(1.2 * np.log(probs))
    difference, low, high = m.paired_bootstrap(m.nll, worse, probs, labels)
    assert low < difference < high and difference == pytest.approx(m.nll(worse, labels) - m.nll(probs, labels))
    _, low_a, high_a = m.bootstrap(m.nll, probs, labels)
    assert high - low < 0.5 * (high_a - low_a)
    assert m.paired_bootstrap(m.nll, probs, probs, labels) == (0, 0, 0)


def test_strata_keep_both_classes():
    score, is_ood = np.arange(10.0), np.array([0] * 9 + [1])  # unstratified, a third of resamples have no OoD item
    assert m.bootstrap(m.auroc, score, is_ood, n=100, strata=is_ood) == (1, 1, 1)
    with pytest.raises(ValueError, match="both classes"):
        m.bootstrap(m.auroc, score, is_ood, n=100)


# ----------------------------------------------------------------------------------------------------------- temperature


def sampled_logits(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, 5))
    logits[::2, 4] = -np.inf  # half of the items have four options
    labels = (m.softmax(logits).cumsum(1) < rng.random((n, 1))).sum(1)
    return logits, labels


def test_temperature_recovers_the_scale():
    logits, labels = sampled_logits()
    base = m.fit_temperature(logits, labels)
    assert base == pytest.approx(1, abs=0.06)
    for scale in (0.2, 3.0, 10.0):
        assert m.fit_temperature(scale * logits, labels) == pytest.approx(scale * base, rel=1e-5)


def test_temperature_minimises_the_nll():
    logits, labels = sampled_logits(n=500, seed=2)
    t = m.fit_temperature(4 * logits, labels)
    best = m.nll(m.softmax(4 * logits, t), labels)
    for factor in np.geomspace(0.02, 20, 41):
        assert best <= m.nll(m.softmax(4 * logits, t * factor), labels) + 1e-12
    chosen = np.take_along_axis(4 * logits, labels[:, None], 1)[:, 0]
    mean_logit = np.nansum(m.softmax(4 * logits, t) * np.where(np.isinf(logits), 0, 4 * logits), 1)
    assert mean_logit.mean() == pytest.approx(chosen.mean(), abs=1e-4)  # the stationarity condition in 1 / T


def all_right(n, margin=3.0, seed=0):
    """Items with the label on top everywhere: no finite temperature is best."""
    labels = np.random.default_rng(seed).integers(4, size=n)
    logits = np.random.default_rng(seed + 1).uniform(0, 1, (n, 4))
    logits[np.arange(n), labels] += margin
    return logits, labels


@pytest.mark.parametrize("n", [8, 60, 300])
def test_labels_that_fix_no_temperature_are_told_and_weighed_against_the_prior(n):
    logits, labels = all_right(n)
    with pytest.warns(UserWarning, match=f"{n} items has no optimum .* rests on no label$"):
        plain = m.fit_temperature(logits, labels, prior=None)
    with pytest.warns(UserWarning, match=r"rests on no label and is that of a prior log T ~ N\(log 1, 1\^2\)"):
        shrunk = m.fit_temperature(logits, labels)
    assert plain < 0.1 < shrunk < 1
    wrong = labels.copy()  # one in ten otherwise, as elsewhere
    wrong[::10] = (wrong[::10] + 1) % 4
    nll = [m.nll(m.softmax(logits, T), wrong) for T in (plain, shrunk, 1)]
    assert nll[0] > 3 * nll[2] and nll[1] - nll[2] < 0.1 * (nll[0] - nll[2])


def test_labels_worse_than_chance_are_told_too():
    logits, labels = all_right(200)
    with pytest.warns(UserWarning, match="no optimum"):
        assert m.fit_temperature(-logits, labels, prior=None) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("prior", [None, "auto", (2.5, 0.3)])
def test_logits_that_no_temperature_changes_keep_the_centre(prior):
    logits = np.full((30, 4), 17.3)
    logits[::2, 3] = -np.inf
    assert m.fit_temperature(logits, np.arange(30) % 3, prior=prior) == (2.5 if prior == (2.5, 0.3) else 1)


def test_the_prior_s_temperature_is_the_most_probable_one():
    logits, labels = sampled_logits(n=12, seed=4)
    logits *= 3
    densities = {T: 12 * m.nll(m.softmax(logits, T), labels) + np.log(T / 2) ** 2 / (2 * 0.4**2) for T in np.geomspace(0.1, 30, 4001)}
    assert m.fit_temperature(logits, labels, prior=(2.0, 0.4)) == pytest.approx(min(densities, key=densities.get), rel=2e-3)


def test_few_labels_are_shrunk_and_many_are_not():
    logits, labels = sampled_logits(n=400, seed=3)
    for n, shrinks in ((m.FEW_LABELS - 1, True), (m.FEW_LABELS, False), (400, False)):
        some = logits[:n] * 4, labels[:n]
        plain, auto = m.fit_temperature(*some, prior=None), m.fit_temperature(*some)
        assert (1 < auto < plain) if shrinks else auto == plain
    assert m.fit_temperature(logits[:20] * 4, labels[:20], prior=(1, 1e6)) == pytest.approx(
        m.fit_temperature(logits[:20] * 4, labels[:20], prior=None), rel=1e-6)  # so wide a prior says nothing


def test_a_temperature_s_prior_is_positive():
    with pytest.raises(ValueError, match=r"prior=\(1.0, 0.0\) is not None, 'auto' or a pair"):
        m.fit_temperature(*all_right(5), prior=(1.0, 0.0))


def test_softmax_handles_missing_options_and_large_logits():
    probs = m.softmax(torch.tensor([[1000.0, 1000.0, -torch.inf], [0.0, np.log(3.0), -torch.inf]]))
    assert probs == pytest.approx(np.array([[0.5, 0.5, 0], [0.25, 0.75, 0]]), abs=1e-7)
    assert (probs[:, 2] == 0).all() and probs.dtype == np.float64


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "probs, labels, message",
    [
        ([0.5, 0.5], [0], "must be \\[N, C\\]"),
        (np.zeros((0, 3)), np.zeros(0, int), "must be \\[N, C\\]"),
        ([[0.5, np.nan]], [0], "finite"),
        ([[1.5, -0.5]], [0], "non-negative"),
        ([[0.5, 0.5], [0.5, 0.4]], [0, 0], "row 1"),
        ([[0.5, 0.5]], [0, 1], "labels must be \\[N = 1\\]"),
        ([[0.5, 0.5]], [0.0], "integers"),
        ([[0.5, 0.5]], [2], "\\[0, 2\\)"),
        ([[0.5, 0.5]], [-1], "unknown label"),
    ],
)
@pytest.mark.parametrize("metric", [m.accuracy, m.nll, m.ece, m.mce, m.brier, m.summary, m.reliability_bins])
def test_bad_input_is_named(metric, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: m.kl_to([[0.5, 0.5]], [[0.5, 0.5, 0.0]]), "differ in shape"),
        (lambda: m.kl_to([[0.5, 0.6]], [[0.5, 0.5]]), "p_star"),
        (lambda: m.oracle_bounds([[0.5, 0.6]]), "p_star"),
        (lambda: m.auroc([0.1, 0.2], [0, 0]), "both classes"),
        (lambda: m.auroc([0.1, np.nan], [0, 1]), "finite"),
        (lambda: m.auprc([0.1, 0.2], [0, 2]), "both classes"),
        (lambda: m.auprc([0.1], [0, 1]), "\\[N\\]"),
        (lambda: m.risk_coverage([0.1], [2]), "0 and 1"),
        (lambda: m.bootstrap(m.nll, PROBS, LABELS[:1]), "first axis"),
        (lambda: m.bootstrap(m.nll, PROBS, LABELS, level=95), "level"),
        (lambda: m.bootstrap(m.nll, PROBS, LABELS, n=0), "n >= 1"),
        (lambda: m.fit_temperature([[0.0, np.nan]], [0]), "-inf"),
        (lambda: m.fit_temperature([[0.0, np.inf]], [0]), "-inf"),
        (lambda: m.fit_temperature([[0.0, -np.inf]], [1]), "missing option"),
        (lambda: m.fit_temperature([[0.0, 1.0]], [-1]), "unknown label"),
        (lambda: m.softmax([[-np.inf, -np.inf]]), "no option"),
        (lambda: m.softmax([[0.0, 1.0]], 0), "positive"),
        (lambda: m.ece(PROBS, LABELS, n_bins=0), "n_bins"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
