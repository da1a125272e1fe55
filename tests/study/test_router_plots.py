"""What the router chapters' figures draw is what they were given."""

import numpy as np
import pytest

from bmoe_utils.scores import tables
from bmoe_utils.study import plots
from bmoe_utils.study.plots import router_plots


def test_layer_curves_draw_means_and_spreads(ax):
    values = np.array([[[1.0, 0.8], [0.9, 0.5]], [[0.8, 0.6], [0.7, 0.3]]])  # 2 seeds, 2 layers, 2 points
    router_plots.layer_curves([0.1, 1.0], values, ax, xlabel="x", ylabel="y")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.9, 0.7], pytest.approx([0.8, 0.4])]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["Layer 0", "Layer 1"] and len(ax.collections) == 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.9 + values[:, 0, 0].std(ddof=1))


def test_one_seed_draws_no_band(ax):
    router_plots.layer_curves([1, 2], np.zeros((1, 3, 2)), ax, legend=False)
    assert len(ax.lines) == 3 and not ax.collections and ax.get_legend() is None


def test_two_inferences_tell_hollow_from_filled(ax):
    def table(shift):
        rows = {m: [{"accuracy": 0.5, "nll": 1.0 + shift, "ece": 0.1}, {"accuracy": 0.5, "nll": 1.2 + shift, "ece": 0.1}] for m in ("router_mfvr", "router_vtsr")}
        return tables.comparison_table(rows | {"map": rows["router_mfvr"]})

    router_plots.two_inferences(table(0.0), table(-0.3), "NLL", ax, references=("map",))
    drawn = [(c.lines[0].get_xdata()[0], c.lines[0].get_markerfacecolor()) for c in ax.containers]
    assert [x for x, _ in drawn] == pytest.approx([1.1, 0.8] * 2)
    assert [f == "white" for _, f in drawn] == [True, False] * 2
    assert [t.get_text() for t in ax.get_yticklabels()] == [plots.style("router_mfvr").label, plots.style("router_vtsr").label]
    assert any(np.allclose(line.get_xdata(), 1.1) and line.get_linestyle() == "--" for line in ax.lines)  # the reference


def test_matrix_writes_its_numbers_and_leaves_gaps(ax):
    router_plots.matrix([[0.25, np.nan], [0.5, 1.0]], ax, rows=["a", "b"], columns=["c", "d"], label="AUROC", low=0, high=1, centre=0.5)
    assert sorted(t.get_text() for t in ax.texts) == ["0.25", "0.50", "1.00"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and [t.get_text() for t in ax.get_xticklabels()] == ["c", "d"]


def test_intervals_keep_rows_and_bounds(ax):
    router_plots.intervals({"near": [("A", "red", "o", 0.5, 0.4, 0.7)], "far": [("A", "red", "o", 0.9, 0.8, 0.95), ("B", "blue", "s", 0.6, 0.5, 0.65)]},
                           ax, xlabel="AUROC", chance=0.5)
    bars = [c[2][0].get_segments()[0][:, 0].tolist() for c in ax.containers]
    assert bars == [pytest.approx([0.4, 0.7]), pytest.approx([0.8, 0.95]), pytest.approx([0.5, 0.65])]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"A", "B", "Chance"}
