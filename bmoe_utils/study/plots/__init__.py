"""The study's figures: every function takes finished numbers and an `ax`, draws, and returns the `ax`.

Nothing here computes more than a quantile or a share. `METHODS` is the one place that gives a method its name, colour
and marker, so that it looks the same in every figure. Only `use_house_style` touches matplotlib's global state.
"""

from dataclasses import dataclass

import numpy as np
import seaborn as sns
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from ...scores.metrics import to_numpy


@dataclass(frozen=True)
class Style:
    label: str
    colour: str
    marker: str


# Families by hue (after Okabe and Ito), members by shade and marker. Two methods whose colours come close, also to an eye
# without red or green cones, differ in their marker.
METHODS = {
    # references: greys
    "oracle": Style("Oracle p*", "#000000", "*"),
    "base": Style("Base model", "#a6a6a6", "h"),
    "map": Style("MAP", "#595959", "s"),
    "map_lora": Style("MAP (LoRA)", "#808080", "D"),
    # output-space and model-averaging baselines: golds
    "temperature": Style("Temperature scaling", "#e69f00", "o"),
    "ensemble": Style("Deep ensemble", "#a87800", "s"),
    "checkpoint_ensemble": Style("Checkpoint ensemble", "#c98f00", "X"),
    "expert_dropout": Style("Expert dropout", "#d9b02e", "v"),
    "mc_dropout": Style("MC dropout", "#f2cf5b", "D"),
    "swag": Style("SWAG", "#6e5a00", "^"),
    # Laplace on the experts: blues
    "laplace_kron": Style("Expert Laplace", "#0072b2", "o"),
    "laplace_kron_reduce": Style("Laplace (reduce)", "#3a94c9", "s"),
    "laplace_kron_active": Style("Laplace (active tokens)", "#16689c", "v"),
    "laplace_ekfac": Style("Laplace (EKFAC)", "#004f7c", "D"),
    "laplace_lowrank": Style("Laplace (low rank)", "#6cb5de", "^"),
    "laplace_diag": Style("Laplace (diagonal)", "#83c0e3", "v"),
    "laplace_full": Style("Laplace (full)", "#002b45", "P"),
    "laplace_val": Style("Laplace (val. prior)", "#1f83bd", "X"),
    "laplace_probit": Style("Laplace (probit)", "#56a8d6", "<"),
    "laplace_map": Style("Laplace (mean only)", "#83c0e3", ">"),
    "laplace_mc_fisher": Style("Laplace (MC Fisher)", "#00629a", "h"),
    "laplace_empirical": Style("Laplace (empirical F.)", "#4a9ecf", "p"),
    "laplace_pretrained": Style("Laplace (pretrained centre)", "#00557f", "*"),
    "laplace_prior_global": Style("Laplace (global prior)", "#2f8fc4", "h"),
    "laplace_prior_layer": Style("Laplace (layer prior)", "#003b5e", "8"),
    "laplace_prior_expert": Style("Laplace (expert prior)", "#0a7abb", "d"),
    # posteriors elsewhere in the network: greens
    "last_layer_laplace": Style("Last-layer Laplace", "#009e73", "p"),
    "laplace_lora": Style("Laplace-LoRA", "#006e50", "h"),
    "blob": Style("BLoB", "#4cc3a0", "d"),
    "tfb": Style("TFB", "#8fdcc5", "<"),
    # routers in weight space: reds. "router_" + the name that attach_routers takes
    "router_deterministic": Style("Deterministic router", "#737373", "v"),
    "router_mcdropout": Style("MC-dropout router", "#f28e7f", "v"),
    "router_swag": Style("SWAG router", "#d9442b", "P"),
    "router_ensemble": Style("Ensemble router", "#a3200f", "X"),
    "router_laplace": Style("Laplace router", "#660f05", ">"),
    # routers in logit space: pinks
    "router_mfvr": Style("MFVR", "#e29ac6", "o"),
    "router_mfvr_wide": Style("MFVR (prior by val.)", "#c76aa6", "^"),
    "router_fcvr": Style("FCVR", "#b0448a", "p"),
    # routers in selection space: violets
    "router_temperature": Style("Temperature sampling", "#a08be0", "8"),
    "router_vtsr": Style("VTSR (published)", "#5b3fb8", "*"),
    "router_vtsr_kl": Style("VTSR (KL)", "#8468d6", "h"),
    "router_random": Style("Experts at random", "#8c8c8c", "X"),
    # experts and routers together
    "joint": Style("Experts + router", "#4a0033", "d"),
    "joint_routers": Style("Both (router prior by val.)", "#8a3a70", "^"),
    "joint_tuned": Style("Both (tuned together)", "#6b1f55", "X"),
    "joint_probit": Style("Both (tuned, probit)", "#a8619a", "<"),
}

ACCENT, COUNTS, NOTE = "#d55e00", "#b8b8b8", "#404040"  # gaps and layer optima; count strips; reference lines


def style(method):
    """`METHODS[method]`, with an error that lists the methods."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    return METHODS[method]


def use_house_style():
    """Set the study's matplotlib defaults: large type (figures are read at half size), constrained layout, no boxes."""
    sns.set_theme(
        style="ticks",
        rc={
            "figure.figsize": (6.4, 4.4),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "font.size": 13,
            "axes.labelsize": 14,
            "axes.titlesize": 14,
            "xtick.labelsize": 12.5,
            "ytick.labelsize": 12.5,
            "legend.fontsize": 12.5,
            "legend.title_fontsize": 12.5,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "lines.linewidth": 2.0,
            "lines.markersize": 7,
        },
    )


def legend_outside(ax, where="right", source=None, **options):
    """Place the legend of `ax` (or of another axes, `source`) beside ("right") or under ("below") `ax`, never over the data.

    Returns `ax`.
    """
    if where == "right":
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
    elif where == "below":
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "borderaxespad": 0.0}
    else:
        raise ValueError(f'where must be "right" or "below", got {where!r}')
    handles, labels = (source or ax).get_legend_handles_labels()
    if handles:
        ax.legend(*_unique(handles, labels), **(place | {"frameon": False} | options))
    return ax


def named_rows(ax, names, *, xlabel, room=0.5):
    """One row per name, the first on top, `room` above it and below the last; no ticks, a light grid."""
    names = list(names)
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 1 + room, -room), xlabel=xlabel)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="both")
    sns.despine(ax=ax, left=True)


def _unique(handles, labels):
    first = {label: handle for handle, label in reversed(list(zip(handles, labels)))}
    order = list(dict.fromkeys(labels))
    return [first[label] for label in order], order


def _numbers(values):
    """`values` (numpy, torch, list) as float64."""
    return to_numpy(values).astype(np.float64)


# --------------------------------------------------------------------------------------------------------- calibration

SPARSE = 0.005  # a bin with a smaller share of the items says little: pale in a reliability diagram


def reliability(bins, ax, *, method="map", oracle=None, title=True, legend=True):
    """Reliability diagram: accuracy per confidence bin as bars, the gap to the confidence hatched, counts in a strip above.

    `bins`, `oracle`: `metrics.ReliabilityBins`; the oracle's is drawn as a line. Empty bins draw nothing; those with
    under 0.5% of the items are pale, and left out of the oracle's line. `title` names the method and its ECE.
    """
    look, width = style(method), np.diff(bins.edges)
    middle, total = bins.edges[:-1] + width / 2, max(bins.count.sum(), 1)
    common = bins.count >= SPARSE * total
    for held, alpha in (((bins.count > 0) & common, 1.0), ((bins.count > 0) & ~common, 0.25)):
        if not held.any():
            continue
        named = alpha == 1
        ax.bar(
            middle[held], bins.accuracy[held], width[held],
            color=look.colour, alpha=0.85 * alpha, edgecolor="white", label="Accuracy" if named else None,
        )  # fmt: skip
        ax.bar(
            middle[held], bins.gap[held], width[held], bottom=bins.confidence[held], facecolor="none",
            edgecolor=ACCENT, hatch="////", linewidth=1.2, alpha=alpha, label="Gap to confidence" if named else None,
        )  # fmt: skip
    ax.plot([0, 1], [0, 1], color=NOTE, linestyle="--", linewidth=1.2, label="Perfect calibration")
    if oracle is not None:
        seen = (oracle.count > 0) & (oracle.count >= SPARSE * oracle.count.sum())
        ideal = style("oracle")
        ax.plot(
            oracle.confidence[seen], oracle.accuracy[seen], color=ideal.colour, marker=ideal.marker,
            markersize=10, linewidth=1.2, markeredgecolor="white", label=ideal.label,
        )  # fmt: skip
    # In a row of panels with a common scale only the first one names it.
    inner = ax.get_subplotspec() and not ax.get_subplotspec().is_first_col()
    alone = not (inner and len(ax.get_shared_y_axes().get_siblings(ax)) > 1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="Confidence (top probability)", ylabel="Accuracy" if alone else "")
    if title:
        ax.set_title(f"{look.label}\nECE {bins.ece:.3f}")
    ax.grid(False)
    strip = ax.inset_axes([0, 1.03, 1, 0.12], sharex=ax)
    share = bins.count / total
    strip.bar(middle, share, width, color=COUNTS, edgecolor="white")
    strip.set_yticks([share.max()], [f"{share.max():.0%}"])
    strip.tick_params(axis="x", which="both", length=0, labelbottom=False)
    if alone:
        strip.set_ylabel("Items", rotation=0, ha="right", va="center")
    strip.grid(False)
    sns.despine(ax=strip)
    return legend_outside(ax) if legend else ax


def scatter_p_star(p_star, probs, ax, *, method="map", gridsize=30):
    """Predicted against true probability of every option, [N, C] each, as hexagons coloured by their number of options.

    Options that an item lacks (zero in both) are left out. On the diagonal the model knows what is uncertain in the
    world; above it the model is too sure of the option.
    """
    p_star, probs = _numbers(p_star).ravel(), _numbers(probs).ravel()
    real = (p_star > 0) | (probs > 0)
    shade = sns.light_palette(style(method).colour, as_cmap=True)
    # A fixed extent gives every panel the same hexagons, whatever its data.
    cells = ax.hexbin(p_star[real], probs[real], gridsize=gridsize, extent=(0, 1, 0, 1), mincnt=1, norm=LogNorm(), cmap=shade)
    ax.plot([0, 1], [0, 1], color=NOTE, linestyle="--", linewidth=1.2)
    ax.figure.colorbar(cells, ax=ax, label="Options (count)")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="True probability p*", ylabel="Predicted probability", title=style(method).label)
    ax.grid(False)
    return ax


# ------------------------------------------------------------------------------------------------------ curves and dots


def curve(x, mean, spread, ax, *, method="map", label=None, xlabel=None, ylabel=None, legend=True):
    """A line with a band of ± `spread` around it (over seeds).

    `x`, `mean` [P]; `spread` [P], a number, or None. NaN (the deviation of one seed) draws no band.
    """
    look = style(method)
    x, mean = _numbers(x), _numbers(mean)
    ax.plot(x, mean, color=look.colour, marker=look.marker, markeredgecolor="white", label=label or look.label)
    if spread is not None:
        spread = np.broadcast_to(_numbers(spread), mean.shape)
        if np.isfinite(spread).any():
            ax.fill_between(x, mean - spread, mean + spread, color=look.colour, alpha=0.2, linewidth=0)
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    return legend_outside(ax) if legend else ax


READING = {"ACC": "higher is better", "NLL": "nats, lower is better", "KL": "nats, lower is better"}


def method_dots(table, metric, ax, *, values=True):
    """Mean ± standard deviation of one metric, a row per method, in the order of `table`.

    `table`: `tables.comparison_table`; `metric`: one of its columns, for instance "ECE". A method without that
    number keeps its row, empty; one seed draws no bar. `values` prints the mean beside the axes.
    """
    rows = np.arange(len(table))
    for row, method in zip(rows, table.index):
        look, (mean, std) = style(method), table.loc[method, metric][["mean", "std"]]
        if not np.isfinite(mean):
            continue
        ax.errorbar(
            mean, row, xerr=std if np.isfinite(std) else None, color=look.colour, marker=look.marker,
            markersize=9, capsize=4, linewidth=2, label=look.label,
        )  # fmt: skip
        if values:
            ax.annotate(f"{mean:.3f}", (1.02, row), xycoords=("axes fraction", "data"), va="center", color=NOTE)
    named_rows(ax, [style(method).label for method in table.index], xlabel=f"{metric} ({READING.get(metric, 'lower is better')})", room=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return ax


def approximation_error(table, ax, *, by="method", error="error", xlabel="Relative error of the predictive covariance"):
    """Relative errors on a log axis: every single one faint, the median solid, a bar over the central 80%.

    `table`: DataFrame in long form, columns `by` (keys of `METHODS`, or any text) and `error` (>= 0). Rows appear in
    the order of first appearance. An error of zero is drawn at 1e-16, the precision of the numbers.
    """
    groups = list(dict.fromkeys(table[by]))
    for row, group in enumerate(groups):
        look = METHODS.get(group, Style(str(group), "#8c8c8c", "X"))  # grey: no method of the study
        errors = np.maximum(_numbers(table.loc[table[by] == group, error]), 1e-16)
        errors = errors[np.isfinite(errors)]
        if not len(errors):
            continue
        # A fixed spiral of offsets, not random jitter: the same numbers draw the same figure.
        offset = 0.24 * (2 * np.modf(np.arange(len(errors)) * 0.618034)[0] - 1)
        ax.plot(errors, row + offset, ".", color=look.colour, alpha=0.4, markersize=5, markeredgewidth=0, zorder=2)
        low, middle, high = np.quantile(errors, [0.1, 0.5, 0.9])
        ax.plot([low, high], [row, row], color=look.colour, linewidth=3, alpha=0.9, solid_capstyle="butt", zorder=3)
        ax.plot(middle, row, look.marker, color=look.colour, markersize=11, markeredgecolor="white", zorder=4)
    ax.set_xscale("log")
    ax.set_yticks(range(len(groups)), [METHODS[g].label if g in METHODS else str(g) for g in groups])
    ax.set(ylim=(len(groups) - 0.4, -0.6), xlabel=xlabel)
    ax.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=NOTE, marker="o", linestyle="", markersize=9, markeredgecolor="white", label="Median"),
        Line2D([], [], color=NOTE, linewidth=3, label="10% to 90%"),
        Line2D([], [], color=NOTE, marker=".", linestyle="", alpha=0.5, label="One item"),
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3, frameon=False, columnspacing=1.2)
    return ax


# ----------------------------------------------------------------------------------------- experts, factors and priors


def expert_load(counts, ax, *, annotate=None):
    """Share of each layer's routed slots that every expert received, [L, E] counts; a cross marks an unused expert.

    `annotate` writes the shares in per cent; by default where there are few enough to read.
    """
    counts = _numbers(counts)
    n_layers, n_experts = counts.shape
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shade = sns.light_palette(METHODS["laplace_kron"].colour, as_cmap=True)
    cells = ax.imshow(share, cmap=shade, vmin=0, vmax=max(share.max(), 200 / n_experts), aspect="auto")
    if annotate is None:
        annotate = n_experts <= 16 and n_layers <= 12
    for layer, expert in np.ndindex(*counts.shape):
        if counts[layer, expert] == 0:
            ax.text(expert, layer, "×", ha="center", va="center", color="black", fontsize="x-large")
        elif annotate:
            tone = "white" if share[layer, expert] > 0.55 * cells.norm.vmax else "black"
            ax.text(expert, layer, f"{share[layer, expert]:.0f}", ha="center", va="center", color=tone)
    bar = ax.figure.colorbar(cells, ax=ax, label="Share of the layer's slots (%)")
    bar.ax.axhline(100 / n_experts, color=NOTE, linewidth=1.5)
    bar.ax.annotate("even", (0, 100 / n_experts), xytext=(-3, 0), textcoords="offset points", ha="right", va="center",
                    fontsize="small", color=NOTE)  # fmt: skip
    ax.set(xlabel="Expert", ylabel="MoE layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    return ax


def spectra(eigenvalues, ax, *, labels=None, floor=1e-12, legend=True):
    """Spectra over their own largest eigenvalue, log-log: the median over experts and a band over the central 80%.

    `eigenvalues`: list of [E, n] arrays (one per layer or factor, any order within a row); `labels`: their names. Rows
    of zeros (experts without tokens) are left out; values are floored at `floor` of the largest.
    """
    labels = labels or [f"Layer {index}" for index in range(len(eigenvalues))]
    if len(labels) != len(eigenvalues):
        raise ValueError(f"{len(labels)} labels for {len(eigenvalues)} spectra")
    markers = ["o", "s", "D", "^", "v", "P", "X", "<", ">"]
    for index, (values, colour) in enumerate(zip(eigenvalues, sns.color_palette("viridis", len(labels)))):
        values = np.sort(np.atleast_2d(_numbers(values)), axis=1)[:, ::-1]
        values = values[values[:, 0] > 0]
        if not len(values):
            continue
        values = np.maximum(values / values[:, :1], floor)
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        rank = np.arange(1, values.shape[1] + 1)
        spots = np.unique(np.geomspace(1, len(rank), 7).astype(int)) - 1  # markers evenly spaced on the log axis
        ax.plot(rank, middle, color=colour, marker=markers[index % len(markers)], markevery=spots.tolist(),
                markeredgecolor="white", label=labels[index])  # fmt: skip
        ax.fill_between(rank, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.set(xscale="log", yscale="log", xlabel="Rank of the eigenvalue", ylabel="Eigenvalue / largest")
    return legend_outside(ax) if legend else ax


def evidence(precisions, log_evidence, val_nll, ax, *, best_evidence=None, best_val=None):
    """Log evidence (left axis) and validation NLL (right axis) against the prior precision; vertical lines at the optima.

    `precisions`, `log_evidence`, `val_nll` [P]; `val_nll` may be None.
    """
    precisions, left, right = _numbers(precisions), METHODS["laplace_kron"].colour, METHODS["temperature"].colour
    every = max(1, len(precisions) // 25)  # a fine grid is a line with markers, not a string of beads
    ax.plot(precisions, _numbers(log_evidence), color=left, marker="o", markevery=every, markeredgecolor="white",
            label="Log evidence (training data)")  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("Prior precision λ")
    ax.set_ylabel("Log evidence (nats)", color=left)
    ax.tick_params(axis="y", colors=left)
    handles, labels = ax.get_legend_handles_labels()
    if val_nll is not None:
        twin = ax.twinx()
        twin.plot(precisions, _numbers(val_nll), color=right, marker="s", markevery=every, markeredgecolor="white",
                  label="Validation NLL")  # fmt: skip
        twin.set_ylabel("Validation NLL (nats per item)", color=_darker(right))
        twin.tick_params(axis="y", colors=_darker(right))
        twin.grid(False)
        sns.despine(ax=twin, left=True, right=False)
        handles, labels = handles + twin.get_legend_handles_labels()[0], labels + twin.get_legend_handles_labels()[1]
    for best, colour, dash, name in (
        (best_evidence, left, "--", "Best by evidence"),
        (best_val, right, ":", "Best by validation"),
    ):
        if best is not None:
            handles.append(ax.axvline(float(best), color=colour, linestyle=dash, linewidth=2))
            labels.append(f"{name}: λ = {float(best):.3g}")
    ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, columnspacing=1.2)
    return ax


def _darker(colour):
    return tuple(0.75 * c for c in to_rgb(colour))


def optima(values, ax, *, layer_values=None, global_value=None, ylabel="Optimal prior precision λ"):
    """Every expert's optimum by layer, on a log axis, [L, E]; NaN leaves an expert out.

    `layer_values` [L]: the optimum of one precision per layer, a dash; `global_value`: that of a single one, a line.
    """
    values = _numbers(values)
    blue = METHODS["laplace_kron"].colour
    n_layers, n_experts = values.shape
    spread = np.linspace(-0.28, 0.28, n_experts) if n_experts > 1 else np.zeros(1)
    for layer in range(n_layers):
        ax.plot(layer + spread, values[layer], "o", color=blue, alpha=0.65, markeredgecolor="white",
                label="One expert" if layer == 0 else None)  # fmt: skip
    if layer_values is not None:
        ax.hlines(_numbers(layer_values), np.arange(n_layers) - 0.38, np.arange(n_layers) + 0.38,
                  color=ACCENT, linewidth=3, zorder=1.5, label="Whole layer")  # fmt: skip
    if global_value is not None:
        ax.axhline(float(global_value), color=NOTE, linestyle="--", zorder=1.4, label="All layers")
    ax.set(yscale="log", xlabel="MoE layer", ylabel=ylabel, xlim=(-0.6, n_layers - 0.4))
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # often less than a decade: plain numbers, not powers
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_xticks(range(n_layers))
    return legend_outside(ax)
