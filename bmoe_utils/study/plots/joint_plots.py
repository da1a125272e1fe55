"""Figures of the two posteriors together; the same manners as ``plots``: finished numbers and an ``ax`` in, the ``ax`` out."""

import numpy as np
import seaborn as sns

from . import NOTE, Style, legend_outside, style, to_numpy
from .router_plots import matrix

# The parts of an answer's uncertainty, from the bottom of a stack to its top; keys of `Predictions.signals`.
PARTS = {
    "aleatoric": Style("Aleatoric", "#b8b8b8", "o"),
    "expert_epistemic": Style("Epistemic, experts", "#0072b2", "s"),
    "routing_epistemic": Style("Epistemic, routing", "#d9442b", "D"),
}
TOTAL = Style("Total", "#4a0033", "d")


def _float(values):
    return to_numpy(values).astype(float)


def parts_by_item(signals, ax, *, truth=None, window=25, legend=True):
    """Every item's parts stacked, items sorted by their total. `signals`: the keys of `PARTS` -> [N].

    `truth` [N]: the entropy of the true answer, a dot an item and a line of its mean over `window` neighbours.
    """
    parts = np.stack([_float(signals[key]) for key in PARTS])
    order = np.argsort(parts.sum(0), kind="stable")
    x, base = np.arange(len(order)), np.zeros(len(order))
    for (key, look), values in zip(PARTS.items(), parts[:, order]):
        ax.fill_between(x, base, base + values, step="mid", color=look.colour, linewidth=0, label=look.label)
        base = base + values
    if truth is not None:
        truth, look = _float(truth)[order], style("oracle")
        ax.plot(x, truth, ".", color=look.colour, markersize=3, alpha=0.35)
        window = min(window, len(x))
        mean = np.convolve(truth, np.ones(window) / window, mode="valid")
        ax.plot(np.arange(len(mean)) + (window - 1) / 2, mean, color=look.colour, label="True entropy H(p*), running mean")
    ax.set(xlim=(0, max(len(x) - 1, 1)), ylim=(0, None), xlabel="Questions, sorted by total uncertainty", ylabel="Nats")
    return legend_outside(ax, "below", ncols=2) if legend else ax


def mean_parts(groups, ax, *, truth=None, legend=True):
    """A stacked bar of mean parts for every group. `groups`: name -> the keys of `PARTS` -> [S], a mean for each seed.

    Bars are means over seeds, whiskers the standard deviation of each part (one seed: none). `truth`: name -> true entropy, a star.
    """
    for x, parts in enumerate(groups.values()):
        base = 0.0
        for key, look in PARTS.items():
            values = _float(parts[key])
            middle = values.mean()
            ax.bar(x, middle, 0.62, bottom=base, color=look.colour, edgecolor="white", label=look.label if x == 0 else None)
            if len(values) > 1:
                # beside each other, or those of thin parts would cover their neighbours'
                at = x + 0.16 * (list(PARTS).index(key) - 1)
                ax.errorbar(at, base + middle, values.std(ddof=1), color=NOTE, capsize=3, linewidth=1.3)
            base += middle
    if truth is not None:
        look = style("oracle")
        ax.plot(range(len(groups)), [truth[name] for name in groups], look.marker, color=look.colour, markersize=13, markeredgecolor="white",
                linestyle="", label="True entropy H(p*)")  # fmt: skip
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set(ylabel="Mean uncertainty (nats)")
    ax.grid(False, axis="x")
    return legend_outside(ax) if legend else ax


def tuning_grid(nll, ax, *, precisions, scales, chosen=(), label="Validation NLL above the best (nats)"):
    """Validation NLL `nll` [P, Q] over routers' prior precisions (rows) and factors of the experts' (columns), above its least.

    `chosen`: (marker, colour, label, [(row, column), ...]) for each way of choosing, drawn beside the number in the cell.
    """
    nll = _float(nll)
    matrix(nll - nll.min(), ax, rows=[f"{p:g}" for p in precisions], columns=[f"× {s:g}" for s in scales], label=label, low=0)
    for number, (marker, colour, name, cells) in enumerate(chosen):
        for i, (row, column) in enumerate(cells):
            ax.plot(column + 0.14 + 0.24 * number + 0.08 * (i % 3), row + 0.8, marker, color=colour, markersize=9, markeredgecolor="white",
                    linestyle="", label=name if i == 0 else None, clip_on=False)  # fmt: skip
    ax.set(xlabel="Experts' prior precision (× evidence's)", ylabel="Routers' prior precision")
    ax.tick_params(axis="x", rotation=0)
    for tick in ax.get_xticklabels():
        tick.set_ha("center")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1, frameon=False)
    return ax


def binned_means(x, series, ax, *, bins=8, xlabel=None, ylabel=None, diagonal=False, legend=True):
    """Means of several quantities in bins of equal numbers of items, sorted by `x` [N].

    `series`: (`Style`, [N]) pairs; a whisker is the standard error of the bin's mean. `diagonal`: where both sides would agree.
    """
    x = _float(x)
    groups = np.array_split(np.argsort(x, kind="stable"), min(bins, len(x)))
    at = [x[g].mean() for g in groups]
    for look, values in series:
        values = _float(values)
        error = [values[g].std(ddof=1) / np.sqrt(len(g)) if len(g) > 1 else 0.0 for g in groups]
        ax.errorbar(at, [values[g].mean() for g in groups], error, color=look.colour, marker=look.marker, capsize=3, label=look.label,
                    markeredgecolor="white")  # fmt: skip
    if diagonal:
        ends = [min(at), max(at)]
        ax.plot(ends, ends, "--", color=NOTE, linewidth=1.2, label="Equal")
    ax.set(xlabel=xlabel or "", ylabel=ylabel or "", ylim=(0, None))
    sns.despine(ax=ax)
    return legend_outside(ax) if legend else ax
