"""What the figures of both posteriors draw is what they were given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bmoe_utils.study import plots
from bmoe_utils.study.plots import joint_plots

SIGNALS = {"aleatoric": np.array([0.1, 0.6, 0.3]), "expert_epistemic": np.array([0.2, 0.3, 0.1]), "routing_epistemic": np.array([0.05, 0.1, 0.0])}


@pytest.fixture
def ax():
    fig, ax = plt.subplots(layout="constrained")
    yield ax
    plt.close(fig)


def legend_of(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_parts_are_stacked_in_the_order_of_their_totals(ax):
    assert joint_plots.parts_by_item(SIGNALS, ax, truth=[0.5, 0.7, 0.6], window=1) is ax
    order = [0, 2, 1]  # totals .35, .4, 1.0
    edges = np.cumsum([np.zeros(3)] + [SIGNALS[k][order] for k in joint_plots.PARTS], 0)
    for band, low, high in zip(ax.collections, edges[:-1], edges[1:], strict=True):
        outline = band.get_paths()[0].vertices
        for item in range(3):  # its step reaches half way to its neighbours
            inside = outline[np.abs(outline[:, 0] - item) <= 0.5]
            assert any(np.isclose(inside[:, 1], low[item])) and any(np.isclose(inside[:, 1], high[item]))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.5, 0.6, 0.7]] * 2
    assert legend_of(ax) == [*(p.label for p in joint_plots.PARTS.values()), "True entropy H(p*), running mean"]


def test_running_mean_stands_over_its_window(ax):
    joint_plots.parts_by_item(SIGNALS, ax, truth=[0.5, 0.7, 0.6], window=3, legend=False)
    assert ax.lines[1].get_xdata().tolist() == [1.0] and ax.lines[1].get_ydata().tolist() == pytest.approx([0.6]) and ax.get_legend() is None


def test_mean_parts_stack_means_over_seeds(ax):
    groups = {"test": {k: [v, v + 0.2] for k, v in zip(joint_plots.PARTS, (0.3, 0.2, 0.1))}, "near": {k: [0.5, 0.5] for k in joint_plots.PARTS}}
    joint_plots.mean_parts(groups, ax, truth={"test": 0.9, "near": 1.0})
    bars = [(b.get_y(), b.get_height()) for b in ax.patches]
    assert np.allclose(bars, [(0, 0.4), (0.4, 0.3), (0.7, 0.2), (0, 0.5), (0.5, 0.5), (1.0, 0.5)])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["test", "near"] and len(ax.containers) == 12  # a bar and a whisker each
    assert any(np.allclose(line.get_ydata(), [0.9, 1.0]) for line in ax.lines)
    assert len(legend_of(ax)) == 4


def test_one_seed_has_no_whisker(ax):
    joint_plots.mean_parts({"test": {k: [0.3] for k in joint_plots.PARTS}}, ax)
    assert len(ax.containers) == 3


def test_tuning_grid_shows_what_is_lost_and_where_each_choice_lies(ax):
    chosen = [("o", "red", "alone", [(0, 1)]), ("X", "blue", "together", [(1, 0), (1, 0)])]
    joint_plots.tuning_grid([[1.5, 1.25], [1.3, 1.4]], ax, precisions=[0.1, 10.0], scales=[1.0, 4.0], chosen=chosen)
    assert sorted(t.get_text() for t in ax.texts) == ["0.00", "0.05", "0.15", "0.25"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.1", "10"] and [t.get_text() for t in ax.get_xticklabels()] == ["× 1", "× 4"]
    at = [(int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in ax.lines]
    assert at == [(0, 1), (1, 0), (1, 0)] and ax.lines[1].get_xdata() != ax.lines[2].get_xdata()
    assert legend_of(ax) == ["alone", "together"]


def test_binned_means_are_of_equal_numbers_in_the_order_of_x(ax):
    x = np.array([3.0, 1.0, 2.0, 4.0])
    joint_plots.binned_means(x, [(joint_plots.TOTAL, 10 * x), (plots.style("map"), -x)], ax, bins=2, xlabel="x", ylabel="y", diagonal=True)
    drawn = [(c.lines[0].get_xdata().tolist(), c.lines[0].get_ydata().tolist()) for c in ax.containers]
    assert drawn == [([1.5, 3.5], [15.0, 35.0]), ([1.5, 3.5], [-1.5, -3.5])]
    assert ax.containers[0].lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([15 - 5, 15 + 5])  # 10 sd .7071 / sqrt 2
    assert set(legend_of(ax)) == {"Total", "MAP", "Equal"}


@pytest.mark.parametrize("draw", [
    lambda ax: joint_plots.parts_by_item(SIGNALS, ax), lambda ax: joint_plots.mean_parts({"a": {k: [0.1] for k in joint_plots.PARTS}}, ax),
    lambda ax: joint_plots.tuning_grid(np.ones((2, 2)), ax, precisions=[1, 2], scales=[1, 2], chosen=[("o", "red", "a", [(0, 0)])]),
    lambda ax: joint_plots.binned_means(np.arange(9.0), [(joint_plots.TOTAL, np.arange(9.0))], ax)])
def test_legend_lies_outside_the_data(draw, ax):
    draw(ax)
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent())
