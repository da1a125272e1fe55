"""Figures of what things cost; the same manners as ``plots``: finished numbers and an ``ax`` in, the ``ax`` out."""

import numpy as np
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from . import ACCENT, NOTE, Style, legend_outside

# Whose measurement it is: this study's in the blues of the experts' posterior, the others' libraries each a hue and a marker.
LIBRARIES = {
    "this study, full factors": Style("This study, full factors", "#0072b2", "o"),
    "this study, rank 64": Style("This study, rank 64", "#6cb5de", "^"),
    "curvlinops": Style("curvlinops", "#009e73", "D"),
    "laplace-torch": Style("laplace-torch (kron)", "#d55e00", "s"),
    "bayesian_lora, full factors": Style("bayesian_lora, full factors", "#b0448a", "v"),
    "bayesian_lora, rank 64": Style("bayesian_lora, rank 64", "#e29ac6", "P"),
    "bayesian_lora": Style("bayesian_lora, Jacobian alone", "#7a2e60", "X"),
}
OPERATIONS = ["products", "gather, copy, allocate", "norms and sums", "sorting slots", "views", "autograd's own", "other"]


def against_floor(rows, ax, *, xlabel="Time / floor", log=False, values=True, legend=True):
    """Ratios to a floor, a row each: the median as a marker, the range as a bar, the target as an upright dash, the floor as a line.

    `rows` maps a name to [(style, ratio, low, high), ...], or to ([...], target); `low` and `high` may be None. A ratio of None keeps
    its place, empty. `log`: a logarithmic axis, for ratios far apart.
    """
    handles = {}
    for row, entry in enumerate(rows.values()):
        entries, target = entry if isinstance(entry, tuple) else (entry, None)
        entries = [e for e in entries if e[1] is not None]
        offsets = np.linspace(-0.26, 0.26, len(entries)) if len(entries) > 1 else [0.0] * len(entries)
        for offset, (look, ratio, low, high) in zip(offsets, entries):
            spread = None if low is None else [[ratio - low], [high - ratio]]
            bar = ax.errorbar(ratio, row + offset, xerr=spread, color=look.colour, marker=look.marker, markersize=8.5, capsize=3,
                              markeredgecolor="white", linestyle="", linewidth=1.6)  # fmt: skip
            handles.setdefault(look.label, bar)
            if values:
                ax.annotate(f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", (high or ratio, row + offset), xytext=(7, 0),
                            textcoords="offset points", va="center", fontsize=10.5, color=NOTE)  # fmt: skip
        if target is not None:
            ax.vlines(target, row - 0.42, row + 0.42, color=ACCENT, linewidth=2.5)
            handles.setdefault("Target", Line2D([], [], color=ACCENT, linewidth=2.5))
    handles.setdefault("Floor", ax.axvline(1.0, color=NOTE, linestyle="--", linewidth=1.2))
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel)
    if log:
        plain_log(ax.set_xscale, ax.xaxis)
    ax.margins(x=0.14)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="both")
    sns.despine(ax=ax, left=True)
    if legend:
        ax.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0, frameon=False)
    return ax


def plain_log(set_scale, axis):
    """A logarithmic axis with numbers as they are read, 1 2 5 10, not powers."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def excess(rows, ax, *, legend=True):
    """What is spent beyond the floor, by group of operations, in per cent of it: bars stacked to the right, less than the floor to
    the left; a dot at the sum. `rows` maps a name to {group: share of the floor}."""
    colours = dict(zip(OPERATIONS, sns.color_palette("colorblind", len(OPERATIONS))))
    for row, groups in enumerate(rows.values()):
        ends = {1: 0.0, -1: 0.0}
        for group in OPERATIONS:
            share = 100 * groups.get(group, 0.0)
            side = 1 if share >= 0 else -1
            ax.barh(row, share, left=ends[side], color=colours[group], edgecolor="white", height=0.7, label=group.capitalize())
            ends[side] += share
        ax.plot(sum(ends.values()), row, "o", color=NOTE, markersize=7, markeredgecolor="white", label="Sum")
    ax.axvline(0.0, color=NOTE, linewidth=1.2)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="Beyond the floor (% of it)")
    ax.tick_params(axis="y", length=0)
    sns.despine(ax=ax, left=True)
    return legend_outside(ax) if legend else ax


def scaling(x, series, ax, *, xlabel=None, ylabel=None, legend=True):
    """Costs against a size, log-log, with the slope of each in the figure. `series`: label -> (style, values [P], slope)."""
    for label, (look, values, slope) in series.items():
        ax.plot(x, values, color=look.colour, marker=look.marker, markeredgecolor="white", label=f"{label}: slope {slope:.2f}")
    ax.set(xscale="log", yscale="log", xlabel=xlabel or "", ylabel=ylabel or "")
    ax.set_xticks(list(x), [f"{v:g}" for v in x])
    ax.xaxis.set_minor_formatter(NullFormatter())
    if legend:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=11.5)
    return ax


def error_against_time(points, ax, *, ladder=None, xlabel="Fit (in units of the exact Fisher's floor)",
                       ylabel="Relative error of the covariance", reference=None, legend=True):
    """A point per method: its time and its error. `points`: label -> (style, time, error). `ladder`: label -> (style, times, errors,
    names), a line through settings of one method, each named. `reference`: (label, error), a horizontal line."""
    for label, (look, times, errors, names) in (ladder or {}).items():
        ax.plot(times, errors, color=look.colour, marker=look.marker, markeredgecolor="white", linewidth=1.4, label=label)
        for index, (time, error, name) in enumerate(zip(times, errors, names)):
            beside = ((0, 8), (10, 6), (-6, 8), (2, -17))[index % 4]  # each on its own side: later settings lie close together
            ax.annotate(name, (time, error), xytext=beside, textcoords="offset points", ha="center", fontsize=10.5, color=NOTE)
    for label, (look, time, error) in points.items():
        ax.plot(time, error, color=look.colour, marker=look.marker, markersize=11, markeredgecolor="white", linestyle="", label=label)
    if reference is not None:
        ax.axhline(reference[1], color=NOTE, linestyle="--", linewidth=1.2, label=reference[0])
    plain_log(ax.set_xscale, ax.xaxis)
    ax.set(ylim=(0, None), xlabel=xlabel, ylabel=ylabel)
    return legend_outside(ax) if legend else ax


def paired_bars(groups, series, ax, *, ylabel=None, legend=True, digits=2):
    """Bars side by side in every group, with their values. `groups`: names; `series`: label -> (colour, values, one a group)."""
    width = 0.8 / len(series)
    for index, (label, (colour, values)) in enumerate(series.items()):
        at = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        bars = ax.bar(at, values, width * 0.94, color=colour, label=label)
        ax.bar_label(bars, [f"{v:.{digits}f}" for v in values], fontsize=11, padding=2)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(ylabel=ylabel or "")
    ax.margins(y=0.12)
    ax.grid(False, axis="x")
    return legend_outside(ax) if legend else ax
