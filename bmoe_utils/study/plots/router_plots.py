"""Figures of the router chapters; the same manners as ``plots``: finished numbers and an ``ax`` in, the ``ax`` out."""

import numpy as np
import seaborn as sns
from matplotlib.lines import Line2D

from . import NOTE, READING, legend_outside, named_rows, style, to_numpy

MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", ">"]


def layer_curves(x, values, ax, *, labels=None, xlabel=None, ylabel=None, legend=True):
    """A line per MoE layer (or other ordered thing) with a band of one standard deviation over seeds.

    `x` [P]; `values` [S, L, P], S seeds; `labels`: L names. One seed draws no band.
    """
    values = to_numpy(values).astype(float)
    labels = labels or [f"Layer {layer}" for layer in range(values.shape[1])]
    for layer, colour in enumerate(sns.color_palette("viridis", values.shape[1])):
        mean = values[:, layer].mean(0)
        ax.plot(x, mean, color=colour, marker=MARKERS[layer % len(MARKERS)], markeredgecolor="white", label=labels[layer])
        if len(values) > 1:
            spread = values[:, layer].std(0, ddof=1)
            ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
    ax.set(xlabel=xlabel or "", ylabel=ylabel or "")
    return legend_outside(ax) if legend else ax


def two_inferences(inside, whole, metric, ax, *, references=(), legend=True):
    """One metric of every method under both inferences: hollow inside the layers, filled over whole passes, a line between.

    `inside`, `whole`: `tables.comparison_table`s with the same methods; a bar is the standard deviation over seeds.
    `references`: methods of `inside` drawn as vertical lines instead of rows.
    """
    methods = [m for m in inside.index if m not in references]
    for row, method in enumerate(methods):
        look, means = style(method), []
        for table, filled in ((inside, False), (whole, True)):
            mean, std = table.loc[method, metric][["mean", "std"]]
            means.append(mean)
            ax.errorbar(mean, row + (0.12 if filled else -0.12), xerr=std if np.isfinite(std) else None, color=look.colour, marker=look.marker,
                        markersize=9, capsize=3, markerfacecolor=look.colour if filled else "white", markeredgewidth=2)  # fmt: skip
        ax.plot(means, [row - 0.12, row + 0.12], color=look.colour, linewidth=1, alpha=0.5)
    handles = [Line2D([], [], color=NOTE, marker="o", linestyle="", markersize=9, markerfacecolor=face, markeredgewidth=2, label=label)
               for face, label in (("white", "Inside: average in each layer"), (NOTE, "Whole model: average of passes"))]
    for method in references:
        look = style(method)
        line = ax.axvline(inside.loc[method, metric]["mean"], color=look.colour, linestyle="--", linewidth=1.5, label=look.label)
        handles.append(line)
    named_rows(ax, [style(m).label for m in methods], xlabel=f"{metric} ({READING.get(metric, 'lower is better')})")
    if legend:
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    return ax


def matrix(values, ax, *, rows, columns, label, low=None, high=None, centre=None, digits=2, annotate=True, bar=True):
    """A table of numbers as colours, with the numbers in it; NaN stays blank. Diverging around `centre` where it is given."""
    values = to_numpy(values).astype(float)
    shade = sns.diverging_palette(230, 20, as_cmap=True) if centre is not None else sns.light_palette("#0072b2", as_cmap=True)
    sns.heatmap(values, ax=ax, vmin=low, vmax=high, center=centre, cmap=shade, annot=annotate, fmt=f".{digits}f", linewidths=0.5,
                xticklabels=columns, yticklabels=rows, mask=~np.isfinite(values), cbar=bar, cbar_kws={"label": label} if bar else None, annot_kws={"fontsize": 11})
    ax.tick_params(axis="x", rotation=40, length=0)
    ax.tick_params(axis="y", rotation=0, length=0)
    for tick in ax.get_xticklabels():
        tick.set_ha("right")
    return ax


def intervals(rows, ax, *, xlabel, chance=None, legend=True):
    """Values with intervals, a row each: `rows` maps a name to [(label, colour, marker, value, low, high), ...] drawn in that row."""
    for row, entries in enumerate(rows.values()):
        offsets = np.linspace(-0.22, 0.22, len(entries)) if len(entries) > 1 else [0.0]
        for offset, (label, colour, marker, value, low, high) in zip(offsets, entries):
            ax.errorbar(value, row + offset, xerr=[[value - low], [high - value]], color=colour, marker=marker, markersize=8, capsize=3,
                        linestyle="", label=label)  # fmt: skip
    if chance is not None:
        ax.axvline(chance, color=NOTE, linestyle="--", linewidth=1.2, label="Chance")
    named_rows(ax, rows, xlabel=xlabel)
    return legend_outside(ax) if legend else ax
