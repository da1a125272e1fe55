"""Figures of chapter 13; the same manners as ``plots``: finished numbers and an ``ax`` in, the ``ax`` out."""

import numpy as np
from matplotlib.lines import Line2D

from . import NOTE, Style, legend_outside, named_rows, to_numpy

# What a model was before it was trained on the questions; colours and markers both tell them apart.
REGIMES = {
    "pretrained": Style("Pretrained", "#0072b2", "o"),
    "scratch": Style("From scratch", "#d55e00", "s"),
    "all": Style("From scratch, all questions", "#7a3600", "D"),
    "own": Style("Your checkpoint", "#009e73", "^"),
    "boolq": Style("BoolQ, from scratch", "#a3007f", "v"),
}

LEAST = 0.01  # temperatures closer to 1 than this are drawn here: they change nothing


def grouped(rows, ax, *, xlabel, bars=False, references=None, log=False, legend=True):
    """A row per thing with a dot (or bar) per regime: `rows` maps a label to {regime: value}; a missing or NaN value draws nothing.

    `references`: {name: {regime: value}}, vertical lines in the regimes' colours, dashed and dotted in turn.
    """
    regimes = [r for r in REGIMES if any(r in values for values in rows.values())]
    offsets = dict(zip(regimes, np.linspace(-0.2, 0.2, len(regimes)) if len(regimes) > 1 else [0.0]))
    for row, values in enumerate(rows.values()):
        for regime, value in values.items():
            look = REGIMES[regime]
            if not np.isfinite(value):
                continue
            if bars:
                ax.barh(row + offsets[regime], value, 0.8 / len(regimes) / 1.1, color=look.colour, label=look.label)
            else:
                ax.plot(value, row + offsets[regime], look.marker, color=look.colour, markersize=9, label=look.label)
    for (name, values), dash in zip((references or {}).items(), ("--", ":")):
        for regime, value in values.items():
            ax.axvline(value, color=REGIMES[regime].colour, linestyle=dash, linewidth=1.5, label=f"{name} ({REGIMES[regime].label.lower()})")
    if log:
        ax.set_xscale("log")
    named_rows(ax, rows, xlabel=xlabel)
    return legend_outside(ax) if legend else ax


def two_ways(curves, ax, *, names, xlabel="Prior precision λ", ylabel="", relative=False, floor=None, references=None, legend=True):
    """Two lines per regime over precisions on a log axis: `curves` maps a regime to two pairs (x, y), the first drawn solid and filled, the
    second dashed and hollow; `names` of the two. `relative`: every line less its own maximum; `floor`: lowest y shown.
    `references` {regime: value}: dotted horizontal lines."""
    for regime, lines in curves.items():
        look = REGIMES[regime]
        for (x, y), name, filled in zip(lines, names, (True, False)):
            y = to_numpy(y).astype(float)
            ax.plot(x, y - y.max() if relative else y, color=look.colour, marker=look.marker, linestyle="-" if filled else "--",
                    markevery=max(1, len(y) // 10), markerfacecolor=look.colour if filled else "white", markeredgewidth=1.5,
                    label=f"{look.label}: {name}")  # fmt: skip
    for regime, value in (references or {}).items():
        ax.axhline(value, color=REGIMES[regime].colour, linestyle=":", linewidth=1.5)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    if floor is not None:
        ax.set_ylim(floor, -0.04 * floor)
    return legend_outside(ax) if legend else ax


def against_bound(share, deviation, ax, *, regime="scratch", legend=True):
    """Deviations of the lead [N], each in units of its own bound and state (B / |h|), over how much of the bound the lead has used up,
    `share` [N] in [0, 1]; with the curve sqrt(1 - share^2) that a final norm prescribes, scaled to the median ratio."""
    share, deviation, look = to_numpy(share), to_numpy(deviation), REGIMES[regime]
    ax.plot(share, deviation, look.marker, color=look.colour, alpha=0.45, markeredgewidth=0, label="One question")
    sine = lambda x: np.sqrt(np.clip(1 - x**2, 0, None))  # noqa: E731
    scale = np.median(deviation / np.maximum(sine(share), 1e-9))
    grid = np.linspace(0, 1, 200)
    ax.plot(grid, scale * sine(grid), "--", color=NOTE, linewidth=1.5, label="√(1 − share²)")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.05 * max(deviation.max(), scale)), xlabel="Lead / largest possible lead", ylabel="Deviation of the lead × ‖h‖ / B",
           title=look.label)
    return legend_outside(ax) if legend else ax


def check(points, ax, *, ylabel, legend=True):
    """What the posterior gained over the temperature it amounts to, less 1 and at least LEAST: `points`: [(label, regime, temperature, y),
    ...], numbered in their order."""
    for rank, i in enumerate(sorted(range(len(points)), key=lambda i: points[i][2])):
        _, regime, temperature, y = points[i]
        look, x = REGIMES[regime], max(temperature - 1, LEAST)
        ax.plot(x, y, look.marker, color=look.colour, markersize=10, alpha=0.85)
        side = ((8, 5), (8, -11), (-8, 5), (-8, -11))[rank % 4]  # neighbours' numbers on different sides, or they cover one another
        ax.annotate(str(i + 1), (x, y), xytext=side, textcoords="offset points", fontsize=10, color=NOTE, ha="left" if side[0] > 0 else "right")
    ax.axhline(0, color=NOTE, linewidth=1)
    ax.axhline(1, color=NOTE, linewidth=1, linestyle="--")
    ax.set(xscale="log", xlabel="Temperature the posterior amounts to − 1", ylabel=ylabel)
    ax.xaxis.set_major_formatter("{x:g}")
    if legend:
        handles = [Line2D([], [], color=REGIMES[r].colour, marker=REGIMES[r].marker, linestyle="", markersize=9, label=f"{n}  {label}")
                   for n, (label, r, _, _) in enumerate(points, 1)]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=11)
    return ax
