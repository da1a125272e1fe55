"""Methods compared over seeds: the table of their scores, as numbers, as text and as Markdown."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .predictions import Predictions

# summary key -> (column, arrow towards better); the one order of columns in every table
COLUMNS = {
    "accuracy": ("ACC", "↑"),
    "nll": ("NLL", "↓"),
    "ece": ("ECE", "↓"),
    "mce": ("MCE", "↓"),
    "brier": ("Brier", "↓"),
    "kl": ("KL", "↓"),
    "jaccard": ("Jaccard", "↑"),
}


def comparison_table(rows):
    """Mean and standard deviation over seeds, a row per method, in the order given.

    `rows`: method -> list over seeds of `Predictions` or of `metrics.summary` dicts. Returns a DataFrame indexed by
    method with columns (metric, "mean" | "std") in the order of `COLUMNS`; a metric no row has (KL without p*) gets
    no column, one that only some rows have is NaN in the others. The deviation is the sample one (n - 1), NaN for
    one seed.
    """
    table = {}
    for method, runs in rows.items():
        if isinstance(runs, (Predictions, Mapping)) or not len(runs):
            raise ValueError(f"{method!r} needs a non-empty list over seeds")
        runs = [run.summary() if isinstance(run, Predictions) else run for run in runs]
        if any(run.keys() != runs[0].keys() for run in runs):
            raise ValueError(f"the seeds of {method!r} differ in their metrics: {[sorted(run) for run in runs]}")
        frame = pd.DataFrame(runs)
        table[method] = {
            (name, statistic): value
            for key, (name, _) in COLUMNS.items()
            if key in frame
            for statistic, value in (("mean", frame[key].mean()), ("std", frame[key].std(ddof=1)))
        }
    if not table:
        raise ValueError("no rows")
    present = {column for row in table.values() for column in row}
    order = [(name, s) for name, _ in COLUMNS.values() for s in ("mean", "std") if (name, s) in present]
    columns = pd.MultiIndex.from_tuples(order, names=["metric", "statistic"])
    data = [[row.get(column, np.nan) for column in order] for row in table.values()]
    return pd.DataFrame(data, index=pd.Index(table, name="method"), columns=columns, dtype=float)


def oracle_row(predictions):
    """The oracle's row for `comparison_table`: its summaries on the items and labels of each seed's `Predictions`."""
    return [part.oracle().summary() for part in predictions]


def format_table(table, *, labels=None, digits=3):
    """`comparison_table` as strings, "0.471 ± .006", with arrows towards better; "–" where there is no number.

    `labels`: method -> name to show, for instance from `plots.METHODS`.
    """
    arrows = {name: arrow for name, arrow in COLUMNS.values()}
    names = list(dict.fromkeys(table.columns.get_level_values(0)))

    def cell(mean, std):
        if not np.isfinite(mean):
            return "–"
        if not np.isfinite(std):
            return f"{mean:.{digits}f}"
        spread = f"{std:.{digits}f}"
        return f"{mean:.{digits}f} ± {spread[1:] if spread.startswith('0.') else spread}"

    text = {
        f"{name} {arrows[name]}": [cell(*pair) for pair in table[name][["mean", "std"]].to_numpy()] for name in names
    }
    return pd.DataFrame(text, index=pd.Index([(labels or {}).get(m, m) for m in table.index], name="method"))


def to_markdown(formatted):
    """A formatted table as GitHub Markdown: methods left, numbers right."""
    head = [formatted.index.name or "", *map(str, formatted.columns)]
    lines = [head, [":--", *["--:"] * len(formatted.columns)]]
    lines += [[str(method), *map(str, row)] for method, row in zip(formatted.index, formatted.to_numpy())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
