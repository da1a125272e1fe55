"""What chapter 13's figures draw is what they were given."""

import itertools

import numpy as np
import pytest

from bmoe_utils.study.plots import reach_plots


def test_regimes_differ_in_colour_and_marker():
    for a, b in itertools.combinations(reach_plots.REGIMES.values(), 2):
        assert a.colour != b.colour and a.marker != b.marker and a.label != b.label


def test_grouped_keeps_rows_values_and_references(ax):
    rows = {"head": {"pretrained": 1.0, "scratch": 2.0}, "routers": {"scratch": np.nan}}
    reach_plots.grouped(rows, ax, xlabel="NLL", references={"MAP": {"scratch": 3.0}}, log=True)
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [float(d.get_xdata()[0]) for d in dots] == [1.0, 2.0] and dots[0].get_ydata()[0] < dots[1].get_ydata()[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["head", "routers"] and ax.get_xscale() == "log"
    assert any(np.allclose(line.get_xdata(), 3.0) and line.get_linestyle() == "--" for line in ax.lines)
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"Pretrained", "From scratch", "MAP (from scratch)"}


def test_bars_are_as_long_as_the_values(ax):
    reach_plots.grouped({"a": {"scratch": 0.25, "pretrained": 0.5}}, ax, xlabel="Share", bars=True)
    assert sorted(p.get_width() for p in ax.patches) == [0.25, 0.5]


def test_two_ways_are_told_apart_and_relative_to_their_maximum(ax):
    reach_plots.two_ways({"scratch": (([1, 10], [-5.0, -7.0]), ([2, 20], [1.0, 4.0]))}, ax, names=("as trained", "own mode"), relative=True, floor=-10, references={"scratch": 0.5})
    first, second, line = ax.lines
    assert first.get_xdata().tolist() == [1, 10] and second.get_xdata().tolist() == [2, 20]
    assert first.get_ydata().tolist() == [0, -2] and second.get_ydata().tolist() == [-3, 0]
    assert (first.get_linestyle(), second.get_linestyle(), second.get_markerfacecolor()) == ("-", "--", "white")
    assert ax.get_ylim() == (-10, 0.4) and line.get_ydata()[0] == 0.5


def test_the_bound_s_curve_ends_where_nothing_is_left(ax):
    share = np.linspace(0.1, 0.95, 20)
    reach_plots.against_bound(share, 3 * np.sqrt(1 - share**2), ax, regime="boolq")
    points, curve = ax.lines
    assert points.get_xdata().tolist() == share.tolist()
    assert curve.get_ydata()[0] == pytest.approx(3) and curve.get_ydata()[-1] == 0


def test_check_numbers_its_points(ax):
    reach_plots.check([("plain", "scratch", 1.2, 0.1), ("early", "pretrained", 4.0, 0.8), ("gone", "boolq", 1.0, 0.0)], ax, ylabel="Share")
    drawn = {t.get_text(): (line.get_xdata()[0], line.get_ydata()[0]) for t, line in zip(ax.texts, ax.lines, strict=False)}
    assert drawn == {"1": (pytest.approx(0.2), 0.1), "2": (3.0, 0.8), "3": (0.01, 0.0)}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["1  plain", "2  early", "3  gone"]
