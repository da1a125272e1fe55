"""Figures of the comparison and decision chapters; the same manners as ``plots``: finished numbers and an ``ax`` in, the ``ax`` out."""

import textwrap

import numpy as np
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from . import NOTE, curve, legend_outside, method_dots, named_rows, style, to_numpy

# The parts of an item's uncertainty: what no model could know, what the experts' and what the routers' weights leave open.
PARTS = {"aleatoric": ("Aleatoric", "#bdbdbd"), "expert": ("Experts", style("laplace_kron").colour),
         "routing": ("Routing", style("router_mfvr").colour)}
OTHER = 0.05  # a band below this share of the panel's width is too narrow for its number


# ------------------------------------------------------------------------------------------------ the main table, ranks


def main_table(table, axes, *, metrics=("ACC", "NLL", "ECE"), marks=None):
    """`plots.method_dots` of several metrics side by side, a row per method, with marks behind the printed means.

    `table`: `tables.comparison_table`; `axes`: one per metric; `marks`: (method, metric) -> text, for instance "*" where a
    difference survives its correction. Returns `axes`.
    """
    for ax, metric in zip(axes, metrics, strict=True):
        method_dots(table, metric, ax, values=False)
        for row, method in enumerate(table.index):
            mean = table.loc[method, metric]["mean"]
            if np.isfinite(mean):
                ax.annotate(f"{mean:.3f}{(marks or {}).get((method, metric), '')}", (1.02, row), xycoords=("axes fraction", "data"),
                            va="center", color=NOTE)  # fmt: skip
    return axes


def differences(table, ax, *, xlabel, legend=True):
    """Paired differences with their intervals, a row per method; filled where the corrected p decides, hollow where it leaves it open.

    `table`: rows of `significance.compare` for one metric and one reference.
    """
    for row, entry in enumerate(table.itertuples()):
        look = style(entry.method)
        ax.errorbar(entry.difference, row, xerr=[[entry.difference - entry.low], [entry.high - entry.difference]], color=look.colour,
                    marker=look.marker, markersize=9, capsize=4, markeredgewidth=2,
                    markerfacecolor=look.colour if entry.verdict else "white")  # fmt: skip
        ax.annotate(entry.better, (1.02, row), xycoords=("axes fraction", "data"), va="center", color=NOTE)
    ax.axvline(0, color=NOTE, linestyle="--", linewidth=1.2)
    named_rows(ax, [style(m).label for m in table["method"]], xlabel=xlabel, room=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if legend:
        handles = [Line2D([], [], color=NOTE, marker="o", linestyle="", markersize=9, markeredgewidth=2, markerfacecolor=face, label=label)
                   for face, label in ((NOTE, "Decided after Holm's correction"), ("white", "Open"))]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return ax


def ranks(found, ax, *, legend=True):
    """Mean ranks with intervals, best on top; a grey band reaches from the best as far as the critical difference.

    `found`: `significance.Ranks`.
    """
    table = found.table.sort_values("rank", kind="stable")
    best = table["rank"].iloc[0]
    ax.axvspan(best, best + found.critical_difference, color="#ececec", zorder=0, label="Within the critical difference of the best")
    for row, (method, entry) in enumerate(table.iterrows()):
        look = style(method)
        ax.plot([entry["low"], entry["high"]], [row, row], color=look.colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot(entry["rank"], row, look.marker, color=look.colour, markersize=10, markeredgecolor="white")
        ax.annotate(f"{entry['rank']:.2f}", (1.02, row), xycoords=("axes fraction", "data"), va="center", color=NOTE)
    ax.set_yticks(range(len(table)), [style(m).label for m in table.index])
    ax.set(xlim=(0.7, len(table) + 0.3), ylim=(len(table) - 0.4, -0.6), xlabel=f"Mean rank over {found.blocks} blocks (1 is best)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(axis="y", length=0)
    sns.despine(ax=ax, left=True)
    if legend:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return ax


# --------------------------------------------------------------------------------------------------- decisions, budgets


def risk_coverage(curves, ax, *, least=0.05, title=None, legend=True):
    """Error rate of the most certain share of the items against that share, the mean over seeds.

    `curves`: method -> list over seeds of `metrics.risk_coverage`; the left end, below a share of `least`, is a handful of items
    and not drawn.
    """
    for method, seeds in curves.items():
        look, grid = style(method), seeds[0][0]
        risk = np.mean([np.interp(grid, coverage, error) for coverage, error in seeds], 0)
        shown = grid >= least
        spots = np.flatnonzero(shown)[:: max(1, int(shown.sum() / 6))]  # markers tell close colours apart
        ax.plot(grid[shown], risk[shown], color=look.colour, marker=look.marker, markevery=(spots - spots[0]).tolist(),
                markeredgecolor="white", label=look.label)  # fmt: skip
    ax.set(xlim=(0, 1), xlabel="Coverage (share answered)", ylabel="Error among the answered", title=title or "")
    return legend_outside(ax) if legend else ax


def savings(cost, values, ax, *, title=None, legend=True):
    """What acting on the probabilities saves, `values`: method -> `[S, P]` over seeds and the `cost [P]` of abstaining; above zero it
    pays to listen to them. Band: one standard deviation over seeds."""
    for method, saved in values.items():
        saved = to_numpy(saved).astype(float)
        curve(cost, saved.mean(0), saved.std(0, ddof=1) if len(saved) > 1 else None, ax, method=method, legend=False)
    ax.axhline(0, color=NOTE, linestyle="--", linewidth=1.2)
    ax.set(xlabel="Cost of abstaining (an error costs 1)", ylabel="Saved per question", title=title or "")
    return legend_outside(ax) if legend else ax


def data_efficiency(sizes, values, ax, *, ylabel, legend=True):
    """A metric against the number of fine-tuning questions, `values`: method -> `[S, P]` over seeds and `sizes [P]`; band: one
    standard deviation over seeds."""
    for method, measured in values.items():
        measured = to_numpy(measured).astype(float)
        curve(sizes, measured.mean(0), measured.std(0, ddof=1) if len(measured) > 1 else None, ax, method=method, legend=False)
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set(xlabel="Fine-tuning questions", ylabel=ylabel)
    return legend_outside(ax) if legend else ax


# ------------------------------------------------------------------------------------------------------- one question


def question_panel(choices, probs, axes, *, reference=None, p_star=None, answer=None, parts=None, most=None, title=None, method="joint",
                   reference_method="map", legend=True):
    """One question: every option's probability as a bar, and below it a strip of where the answer's uncertainty comes from.

    `choices`: C texts; `probs` [C] of `method`; `reference` [C] of `reference_method`, a thin bar under it; `p_star` [C], stars;
    `answer`: the labelled option's index, set bold. `axes`: (options, strip); `parts`: {"aleatoric", "expert", "routing"} in nats, or
    None for an empty strip; `most`: the strip's right end in nats, by default log C, as uncertain as C options can be. Returns `axes`.
    """
    ax, strip = axes
    choices, probs = list(choices), to_numpy(probs).astype(float)[: len(choices)]
    rows, look, plain = np.arange(len(choices)), style(method), style(reference_method)
    ax.barh(rows - (0.12 if reference is not None else 0), probs, 0.5, color=look.colour, label=look.label)
    if reference is not None:
        ax.barh(rows + 0.29, to_numpy(reference).astype(float)[: len(choices)], 0.22, color=plain.colour, alpha=0.75, label=plain.label)
    if p_star is not None:
        ideal = style("oracle")
        ax.plot(to_numpy(p_star).astype(float)[: len(choices)], rows, linestyle="", marker=ideal.marker, color=ideal.colour, markersize=13,
                markeredgecolor="white", label="True probability p*", clip_on=False, zorder=5)  # fmt: skip
    for row, p in zip(rows, probs):
        ax.annotate(f"{p:.0%}", (1.03, row), xycoords=("axes fraction", "data"), va="center", color=NOTE)
    ax.set_yticks(rows, [textwrap.shorten(str(c), 40, placeholder=" …") for c in choices])
    if answer is not None and 0 <= answer < len(choices):
        ax.get_yticklabels()[answer].set_fontweight("bold")
    ax.set(xlim=(0, 1), ylim=(len(choices) - 0.4, -0.6), xlabel="Probability")
    ax.set_title("\n".join(textwrap.wrap(title or "", 52)), fontsize="medium")
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    sns.despine(ax=ax, left=True)
    _uncertainty_strip(strip, parts, np.log(len(choices)) if most is None else most)
    if legend:
        handles = ax.get_legend_handles_labels()[0] + [Patch(color=colour, label=label) for label, colour in PARTS.values()] * (parts is not None)
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.16, 1.0), borderaxespad=0.0, frameon=False)
    return axes


def _uncertainty_strip(ax, parts, most):
    left = 0.0
    for name, (label, colour) in PARTS.items() if parts is not None else ():
        value = float(parts[name])
        ax.barh(0, value, 0.8, left=left, color=colour, label=label)
        if value > OTHER * 2 * most:
            ax.text(left + value / 2, 0, f"{value:.2f}", ha="center", va="center", fontsize="small",
                    color="white" if name == "expert" else "black")  # fmt: skip
        left += value
    ax.set(xlim=(0, most), ylim=(-0.5, 0.5), yticks=[], xlabel="Uncertainty of the answer (nats; the axis ends at guessing)")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(False)
    sns.despine(ax=ax, left=True)
