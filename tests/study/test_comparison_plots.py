"""What the comparison figures draw is what they were given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bmoe_utils.scores import significance, tables
from bmoe_utils.study import plots
from bmoe_utils.study.plots import comparison_plots


@pytest.fixture
def pair():
    fig, axes = plt.subplots(2, 1)
    yield axes
    plt.close(fig)


def test_main_table_prints_means_with_their_marks(pair):
    rows = {m: [{"accuracy": a, "nll": n, "ece": 0.1}] for m, a, n in (("map", 0.5, 1.5), ("joint", 0.4, 1.2))}
    comparison_plots.main_table(tables.comparison_table(rows), pair, metrics=("ACC", "NLL"), marks={("joint", "NLL"): " *"})
    assert [t.get_text() for t in pair[1].texts] == ["1.500", "1.200 *"] and [t.get_text() for t in pair[0].texts] == ["0.500", "0.400"]
    assert [t.get_text() for t in pair[1].get_yticklabels()] == [plots.style("map").label, plots.style("joint").label]


def test_differences_are_filled_where_decided(ax):
    table = pd.DataFrame([{"method": "temperature", "difference": -0.3, "low": -0.4, "high": -0.1, "verdict": "better", "better": "3/3"},
                          {"method": "joint", "difference": 0.1, "low": -0.1, "high": 0.2, "verdict": "", "better": "1/3"}])
    comparison_plots.differences(table, ax, xlabel="NLL")
    bars = [c[2][0].get_segments()[0][:, 0].tolist() for c in ax.containers]
    assert bars == [pytest.approx([-0.4, -0.1]), pytest.approx([-0.1, 0.2])]
    assert [c.lines[0].get_markerfacecolor() for c in ax.containers] == [plots.style("temperature").colour, "white"]
    assert [t.get_text() for t in ax.texts] == ["3/3", "1/3"]


def test_ranks_are_sorted_and_the_band_is_the_critical_difference(ax):
    table = pd.DataFrame({"rank": [2.5, 1.25], "low": [2.0, 1.0], "high": [3.0, 2.0]}, index=["map", "joint"])
    comparison_plots.ranks(significance.Ranks(table, 4.0, 0.05, 0.9, 4), ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == [plots.style("joint").label, plots.style("map").label]
    assert [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1] == [1.25, 2.5]
    band = ax.patches[0]
    assert (band.get_x(), band.get_width()) == (1.25, pytest.approx(0.9)) and "4 blocks" in ax.get_xlabel()


def test_risk_coverage_averages_seeds_and_drops_the_first_handful(ax):
    coverage = np.arange(1, 11) / 10
    curves = {"map": [(coverage, coverage / 2), (coverage, coverage)], "joint": [(coverage, coverage / 4)]}
    comparison_plots.risk_coverage(curves, ax, least=0.15)
    drawn = ax.lines[0]
    assert drawn.get_xdata() == pytest.approx(coverage[1:]) and drawn.get_ydata() == pytest.approx(0.75 * coverage[1:])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [plots.style("map").label, plots.style("joint").label]


def test_savings_and_data_efficiency_draw_mean_and_spread(ax):
    values = {"map": [[0.2, 0.4], [0.4, 0.4]], "joint": [[0.1, 0.2]]}
    comparison_plots.savings([0.1, 0.5], values, ax)
    assert [line.get_ydata() for line in ax.lines] == [pytest.approx([0.3, 0.4]), pytest.approx([0.1, 0.2]), [0, 0]]
    assert len(ax.collections) == 1  # one seed has no band
    ax.clear()
    comparison_plots.data_efficiency([125, 1000], values, ax, ylabel="ECE")
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["125", "1,000"]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.3 - np.std([0.2, 0.4], ddof=1), 0.3 + np.std([0.2, 0.4], ddof=1)))


def test_question_panel(pair):
    parts = {"aleatoric": 0.5, "expert": 0.2, "routing": 0.01}
    comparison_plots.question_panel(["pond", "barn", "nest"], [0.6, 0.3, 0.1, 0.0], pair, reference=[0.9, 0.05, 0.05, 0.0],
                                    p_star=[0.5, 0.4, 0.1, 0.0], answer=1, parts=parts, title="Where?")
    ax, strip = pair
    assert [b.get_width() for b in ax.patches] == [0.6, 0.3, 0.1, 0.9, 0.05, 0.05]
    assert ax.lines[0].get_xdata().tolist() == [0.5, 0.4, 0.1] and [t.get_text() for t in ax.texts] == ["60%", "30%", "10%"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["pond", "barn", "nest"]
    assert [t.get_fontweight() for t in ax.get_yticklabels()] == ["normal", "bold", "normal"]
    assert [b.get_x() for b in strip.patches] == pytest.approx([0, 0.5, 0.7])
    assert [b.get_width() for b in strip.patches] == pytest.approx([0.5, 0.2, 0.01])
    assert strip.get_xlim() == (0, pytest.approx(np.log(3)))
    assert [t.get_text() for t in strip.texts] == ["0.50", "0.20"]  # the routing's is too narrow for a number


def test_question_panel_without_truth_or_parts(pair):
    comparison_plots.question_panel(["a", "b"], [0.6, 0.4], pair, answer=-1)
    assert len(pair[0].patches) == 2 and not pair[0].lines and not pair[1].patches
    assert {t.get_text() for t in pair[0].get_legend().get_texts()} == {plots.style("joint").label}
