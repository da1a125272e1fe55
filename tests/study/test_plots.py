"""Figures: what is drawn is what was given, nothing is hidden, nothing global changes, the odd cases draw too."""

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from bmoe_utils.scores import metrics, tables
from bmoe_utils.study import plots

RNG = np.random.default_rng(0)
PROBS = metrics.softmax(2 * RNG.standard_normal((300, 4)))
LABELS = RNG.integers(4, size=300)
BINS = metrics.reliability_bins(PROBS, LABELS)
SUMMARY = {"accuracy": 0.47, "nll": 1.2, "ece": 0.04, "mce": 0.1, "brier": 0.6}
TABLE = tables.comparison_table(
    {"map": [SUMMARY | {"ece": e} for e in (0.2, 0.3)], "oracle": [SUMMARY | {"ece": 0.01, "kl": 0.0}]}
)
ERRORS = pd.DataFrame({"method": ["laplace_kron"] * 3 + ["my own"], "error": [0.1, 0.2, 0.4, 0.0]})
EIGENVALUES = [np.exp(-np.arange(20.0)) * np.ones((8, 1)), np.vstack([np.zeros(5), np.arange(5.0)])]
COUNTS = np.array([[6, 2, 0, 0], [1, 1, 1, 1]])
OPTIMA = np.array([[1.0, 10.0, np.nan], [5.0, 0.1, 2.0]])
PRECISIONS = np.logspace(-2, 3, 40)

DRAWN = {
    "reliability": lambda ax: plots.reliability(BINS, ax, oracle=BINS),
    "curve": lambda ax: plots.curve([1, 2, 3], [0.1, 0.2, 0.2], 0.01, ax, xlabel="Epochs", ylabel="ECE"),
    "method_dots": lambda ax: plots.method_dots(TABLE, "ECE", ax),
    "approximation_error": lambda ax: plots.approximation_error(ERRORS, ax),
    "expert_load": lambda ax: plots.expert_load(COUNTS, ax),
    "spectra": lambda ax: plots.spectra(EIGENVALUES, ax),
    "evidence": lambda ax: plots.evidence(PRECISIONS, -PRECISIONS, PRECISIONS, ax, best_evidence=0.01, best_val=3.0),
    "optima": lambda ax: plots.optima(OPTIMA, ax, layer_values=[2.0, 3.0], global_value=2.5),
    "scatter_p_star": lambda ax: plots.scatter_p_star(PROBS[::-1], PROBS, ax),
}
WITH_LEGEND = ("reliability", "curve", "approximation_error", "spectra", "evidence", "optima")


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        _, axes = plt.subplots(layout="constrained")
        yield axes
        plt.close("all")


def line(ax, label):
    return next(found for found in ax.get_lines() if found.get_label() == label)


# ------------------------------------------------------------------------------------------------------- every function


@pytest.mark.parametrize("name", DRAWN)
def test_returns_the_axes_with_its_scales_named(name, ax):
    assert DRAWN[name](ax) is ax
    ax.figure.canvas.draw()
    assert ax.get_xlabel()
    assert ax.get_ylabel() or [tick.get_text() for tick in ax.get_yticklabels()]  # methods name their own rows


@pytest.mark.parametrize("name", DRAWN)
def test_leaves_global_state_and_other_axes_alone(name, ax):
    _, other = plt.subplots()
    before, seen = dict(matplotlib.rcParams), len(other.get_children())
    DRAWN[name](ax)
    ax.figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before
    assert plt.gca() is other and len(other.get_children()) == seen and len(plt.get_fignums()) == 2


@pytest.mark.parametrize("name", WITH_LEGEND)
def test_legend_lies_outside_the_data(name, ax):
    plots.use_house_style()
    DRAWN[name](ax)
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent())
    figure = ax.figure.bbox
    assert legend.x0 >= figure.x0 - 1 and legend.x1 <= figure.x1 + 1 and legend.y0 >= figure.y0 - 1


def test_the_cloud_of_single_errors_is_not_random(ax):
    for _ in range(2):
        plots.approximation_error(ERRORS, ax)
    first, again = [found.get_ydata() for found in ax.get_lines() if len(found.get_xdata()) == 3]
    assert len(set(first)) == 3 and np.abs(first).max() < 0.3
    np.testing.assert_array_equal(first, again)


def test_house_style_is_the_only_one_to_change_the_defaults():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        plots.use_house_style()
        assert dict(matplotlib.rcParams) != before
        assert matplotlib.rcParams["figure.constrained_layout.use"] and matplotlib.rcParams["font.size"] >= 12


# ---------------------------------------------------------------------------------------------------- what is drawn is so


def test_reliability_draws_the_bins(ax):
    plots.reliability(BINS, ax)
    tops = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in ax.containers[0]}
    common = BINS.count >= plots.SPARSE * BINS.count.sum()
    middle = (BINS.edges[:-1] + BINS.edges[1:]) / 2
    assert tops == pytest.approx({round(x, 6): a for x, a in zip(middle[common], BINS.accuracy[common])})
    gaps = ax.containers[1]
    np.testing.assert_allclose([g.get_y() + g.get_height() for g in gaps], BINS.accuracy[common])
    assert f"{BINS.ece:.3f}" in ax.get_title() and "MAP" in ax.get_title()
    (strip,) = ax.child_axes
    np.testing.assert_allclose([bar.get_height() for bar in strip.patches], BINS.count / 300)


def test_reliability_of_one_item_and_of_sparse_bins(ax):
    plots.reliability(metrics.reliability_bins([[1.0, 0.0]], [1]), ax)
    ax.figure.canvas.draw()
    plots.reliability(metrics.reliability_bins(np.tile([[0.9, 0.1]], (999, 1)), np.zeros(999, int)), ax)
    ax.clear()
    rows = np.vstack([np.tile([[0.9, 0.1]], (999, 1)), [[0.55, 0.45]]])
    plots.reliability(metrics.reliability_bins(rows, np.zeros(1000, int)), ax)
    alphas = {round(bar.get_x(), 2): bar.get_alpha() for container in ax.containers[::2] for bar in container}
    assert alphas[0.53] < 0.5 < alphas[0.87]  # one item of a thousand is pale


def test_panels_share_one_scale_name():
    figure, panels = plt.subplots(1, 2, sharey=True)
    for panel in panels:
        plots.reliability(BINS, panel, legend=False)
    assert [panel.get_ylabel() for panel in panels] == ["Accuracy", ""]
    assert all(panel.get_legend() is None for panel in panels)
    plt.close(figure)


def test_curve_line_and_band(ax):
    plots.curve([1, 2], torch.tensor([0.1, 0.2]), [0.01, 0.02], ax, method="laplace_kron")
    np.testing.assert_allclose(line(ax, "Expert Laplace").get_xydata(), [[1, 0.1], [2, 0.2]], rtol=1e-6)
    corners = ax.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.09) and corners[:, 1].max() == pytest.approx(0.22)


@pytest.mark.parametrize("spread", [None, np.nan, [np.nan, np.nan]])
def test_curve_of_one_seed_has_no_band(ax, spread):
    plots.curve([1, 2], [0.1, 0.2], spread, ax)
    assert not ax.collections and len(ax.get_lines()) == 1


def test_legend_names_a_method_once(ax):
    for _ in range(2):
        plots.curve([1, 2], [0.1, 0.2], None, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MAP"]
    with pytest.raises(ValueError, match="where"):
        plots.legend_outside(ax, "left")


def test_method_dots_in_the_given_order_with_spread(ax):
    plots.method_dots(TABLE, "ECE", ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["MAP", "Oracle p*"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    points, bars = ax.containers[0].lines[0], ax.containers[0].lines[2]
    assert points.get_xdata() == pytest.approx([0.25])
    ends = bars[0].get_segments()[0][:, 0]
    assert ends == pytest.approx(0.25 + np.array([-1, 1]) * np.std([0.2, 0.3], ddof=1))
    assert not ax.containers[1].lines[2]  # one seed: no bar
    assert [text.get_text() for text in ax.texts] == ["0.250", "0.010"] and "lower" in ax.get_xlabel()
    with pytest.raises(ValueError, match="unknown method 'mapp'"):
        plots.method_dots(TABLE.rename(index={"map": "mapp"}), "ECE", ax)


def test_method_dots_keep_an_empty_row_for_a_missing_number(ax):
    plots.method_dots(TABLE, "KL", ax)
    assert len(ax.containers) == 1 and len(ax.get_yticklabels()) == 2
    assert ax.containers[0].lines[0].get_ydata() == [1]


def test_approximation_error_medians_and_zero(ax):
    plots.approximation_error(ERRORS, ax)
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Expert Laplace", "my own"]
    big = [found.get_xdata()[0] for found in ax.get_lines() if found.get_markersize() == 11]
    assert big == pytest.approx([0.2, 1e-16])
    cloud = next(found for found in ax.get_lines() if len(found.get_xdata()) == 3)
    assert sorted(cloud.get_xdata()) == pytest.approx([0.1, 0.2, 0.4])


def test_expert_load_shares_and_unused_experts(ax):
    plots.expert_load(COUNTS, ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[75, 25, 0, 0], [25] * 4])
    assert [text.get_text() for text in ax.texts] == ["75", "25", "×", "×", "25", "25", "25", "25"]


def test_expert_load_without_any_token(ax):
    plots.expert_load(np.zeros((2, 3)), ax)
    ax.figure.canvas.draw()
    assert (ax.images[0].get_array() == 0).all()


def test_spectra_are_sorted_normalised_and_skip_empty_experts(ax):
    plots.spectra(EIGENVALUES, ax, labels=["A", "G"])
    np.testing.assert_allclose(line(ax, "A").get_ydata(), np.exp(-np.arange(20.0)))
    np.testing.assert_allclose(line(ax, "G").get_ydata(), [1, 0.75, 0.5, 0.25, 1e-12])  # zeros sit at the floor
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    plots.spectra([np.zeros((3, 4)), np.ones(4)], ax)  # all empty; a single expert
    with pytest.raises(ValueError, match="1 labels for 2"):
        plots.spectra(EIGENVALUES, ax, labels=["A"])


def test_evidence_on_two_scales(ax):
    plots.evidence(PRECISIONS, -PRECISIONS, 2 * PRECISIONS, ax, best_evidence=0.01, best_val=torch.tensor(3.0))
    twin = next(other for other in ax.figure.axes if other is not ax)
    np.testing.assert_allclose(line(ax, "Log evidence (training data)").get_ydata(), -PRECISIONS)
    np.testing.assert_allclose(line(twin, "Validation NLL").get_ydata(), 2 * PRECISIONS)
    assert "evidence" in ax.get_ylabel() and "Validation NLL" in twin.get_ylabel()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[2:] == ["Best by evidence: λ = 0.01", "Best by validation: λ = 3"]


def test_evidence_without_validation(ax):
    plots.evidence(PRECISIONS, -PRECISIONS, None, ax)
    assert ax.figure.axes == [ax] and len(ax.get_legend().get_texts()) == 1


def test_optima_per_expert_layer_and_all(ax):
    plots.optima(OPTIMA, ax, layer_values=[2.0, 3.0], global_value=2.5)
    np.testing.assert_array_equal([found.get_ydata() for found in ax.get_lines()[:2]], OPTIMA)
    assert [segment[0, 1] for segment in ax.collections[0].get_segments()] == [2, 3]
    assert line(ax, "All layers").get_ydata()[0] == 2.5 and ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["One expert", "Whole layer", "All layers"]


def test_optima_of_single_experts_alone(ax):
    plots.optima(OPTIMA[:, :1], ax)
    assert len(ax.get_legend().get_texts()) == 1


def test_p_star_leaves_missing_options_out(ax):
    p_star, probs = np.array([[0.3, 0.7, 0.0]] * 5), np.array([[0.6, 0.4, 0.0]] * 5)
    plots.scatter_p_star(p_star, probs, ax)
    assert ax.collections[0].get_array().sum() == 10


# ---------------------------------------------------------------------------------------------------------- the methods

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
EYES = {
    "usual": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, eye):
    """CIELAB of a colour as `eye` sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(EYES[eye]) @ linear, 0, 1) / (TO_XYZ @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", EYES)
def test_close_colours_differ_in_their_marker(eye):
    seen = {method: lab(look.colour, eye) for method, look in plots.METHODS.items()}
    for first, second in itertools.combinations(plots.METHODS, 2):
        if plots.METHODS[first].marker == plots.METHODS[second].marker:
            assert np.linalg.norm(seen[first] - seen[second]) > 15, (first, second)


@pytest.mark.parametrize("eye", EYES)
def test_the_main_comparison_is_told_apart_by_colour_alone(eye):
    main = ["oracle", "map", "temperature", "laplace_kron", "last_layer_laplace"]
    for first, second in itertools.combinations(main, 2):
        assert np.linalg.norm(lab(plots.style(first).colour, eye) - lab(plots.style(second).colour, eye)) > 20


def test_methods_of_the_public_names_are_there():
    routers = "deterministic mcdropout swag ensemble laplace mfvr fcvr temperature vtsr".split()
    structures = "kron ekfac diag full".split()
    assert {f"router_{r}" for r in routers} | {f"laplace_{s}" for s in structures} <= plots.METHODS.keys()
    labels = [look.label for look in plots.METHODS.values()]
    assert len(set(labels)) == len(labels)
    with pytest.raises(ValueError, match="unknown method 'sgd'; known are oracle"):
        plots.style("sgd")
