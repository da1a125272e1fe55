"""Run a predictor over a loader, keep what it said, and compare methods over seeds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from . import metrics, models
from .capture import capturing, expert_layers, recording
from .progress import track
from .storage import atomic_write

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


@dataclass(frozen=True)
class Predictions:
    """What one method said about N items, in loader order. Arrays of other kinds are converted.

    probs [N, C] float64, rows sum to 1, zero at missing options; labels [N] int64, -1 where unknown;
    signals: name -> [N] float64, higher = more uncertain; logits [N, C] float64, -inf at missing options;
    p_star [N, C] float64, the true distribution where the task knows it.
    """

    probs: np.ndarray
    labels: np.ndarray
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None
    p_star: np.ndarray | None = None

    def __post_init__(self):
        keep = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - the dataclass is frozen
        keep("probs", _float64(self.probs))
        keep("labels", metrics.to_numpy(self.labels).astype(np.int64))
        keep("signals", {name: _float64(signal) for name, signal in self.signals.items()})
        for name in ("logits", "p_star"):
            array = getattr(self, name)
            if array is not None:
                keep(name, _float64(array))
                if getattr(self, name).shape != self.probs.shape:
                    raise ValueError(f"{name} must be shaped like probs {self.probs.shape}, got {array.shape}")
        for name, array in {"labels": self.labels, **self.signals}.items():
            if array.shape != self.probs.shape[:1]:
                raise ValueError(f"{name} must be [N = {len(self.probs)}], got shape {array.shape}")

    def __len__(self):
        return len(self.probs)

    def head(self, n):
        """The first `n` items (all if None)."""
        cut = lambda array: None if array is None else array[:n]  # noqa: E731
        signals = {name: signal[:n] for name, signal in self.signals.items()}
        return Predictions(self.probs[:n], self.labels[:n], signals, cut(self.logits), cut(self.p_star))

    def summary(self):
        """`metrics.summary` of these predictions, with "kl" where `p_star` is known. `ValueError` on unknown labels."""
        return metrics.summary(self.probs, self.labels, self.p_star)

    def bins(self):
        """`metrics.reliability_bins` of these predictions."""
        return metrics.reliability_bins(self.probs, self.labels)

    def oracle(self):
        """The oracle's predictions on the same items and labels: probs = p_star."""
        if self.p_star is None:
            raise ValueError("these items come without p_star: there is no oracle")
        return Predictions(self.p_star, self.labels, default_signals(self.p_star), p_star=self.p_star)

    @classmethod
    def concat(cls, parts):
        """One `Predictions` after another, padded to the widest; signals, logits and p_star where every part has them."""
        parts = list(parts)
        if not parts:
            raise ValueError("nothing to concatenate")
        shared = [name for name in parts[0].signals if all(name in part.signals for part in parts)]

        def optional(name, fill):
            arrays = [getattr(part, name) for part in parts]
            return None if any(a is None for a in arrays) else _stack(arrays, fill)

        return cls(
            probs=_stack([part.probs for part in parts], 0.0),
            labels=np.concatenate([part.labels for part in parts]),
            signals={name: np.concatenate([part.signals[name] for part in parts]) for name in shared},
            logits=optional("logits", -np.inf),
            p_star=optional("p_star", 0.0),
        )

    def save(self, path):
        """Write a safetensors file, beside and then moved, so that no reader meets half of one."""
        tensors = {"probs": self.probs, "labels": self.labels, "logits": self.logits, "p_star": self.p_star}
        tensors |= {f"signals.{name}": signal for name, signal in self.signals.items()}
        atomic_write(path, to_bytes({k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. `ValueError` where the file is truncated or holds something else."""
        try:
            tensors = from_bytes(Path(path).read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        if not {"probs", "labels"} <= tensors.keys():
            raise ValueError(f"{path} holds no predictions, only {sorted(tensors)}")
        signals = {k.removeprefix("signals."): v for k, v in sorted(tensors.items()) if k.startswith("signals.")}
        return cls(tensors["probs"], tensors["labels"], signals, tensors.get("logits"), tensors.get("p_star"))


def _float64(array):
    return metrics.to_numpy(array).astype(np.float64)


def _stack(arrays, fill):
    """[n_i, C_i] arrays under each other, [sum n_i, max C_i], the missing columns filled."""
    width = max(a.shape[1] for a in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays])


def default_signals(probs):
    """Uncertainty that any answer distribution has: `answer_entropy` in nats and `max_prob` = 1 - max p; [N] each."""
    return {"answer_entropy": metrics.entropy(probs), "max_prob": 1 - np.asarray(probs).max(1)}


# ------------------------------------------------------------------------------------------------------------- predict


def predict(predictor: torch.nn.Module | Callable, loader: Iterable[Mapping], *, progress=True) -> Predictions:
    """Predict every item of `loader`.

    `predictor`: a causal LM, read out through `models.option_logits` in eval mode without gradients, every module's
    mode restored afterwards, also after an exception; or a callable `batch -> probs [B, C]`, or
    `batch -> (probs [B, C], signals {name: [B]})`, which runs as it is (a method `signals()` gives those of the last
    batch: attached `Routers` are such a callable). `loader` yields batches with
    `option_ids` [B, C] (-1 missing), `labels` [B] (-1 unknown) and optionally `p_star` [B, C]; C may differ
    between batches. Raises `ValueError` on an empty loader, a wrong shape, mass on a missing option, or a label that
    points at one.
    """
    if isinstance(predictor, torch.nn.Module):
        run = _predict_with_model
    elif callable(predictor):
        run = _predict_with_callable
    else:
        raise TypeError(f"predictor must be a torch module or a callable, got {type(predictor).__name__}")
    parts = list(run(predictor, track(loader, "predict", progress, unit="batch")))
    if not parts:
        raise ValueError("the loader is empty")
    return Predictions.concat(parts)


def _predict_with_model(model, batches):
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in batches:
            with torch.no_grad():
                logits = _float64(models.option_logits(model, batch))
            yield _part(batch, metrics.softmax(logits), {}, logits)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _predict_with_callable(predictor, batches):
    for batch in batches:
        said = predictor(batch)
        signals_of = getattr(predictor, "signals", dict)  # attached routers keep the last batch's
        probs, signals = said if isinstance(said, tuple) else (said, signals_of())
        yield _part(batch, probs, signals, None)


def _part(batch, probs, signals, logits):
    """The checked `Predictions` of one batch."""
    missing = metrics.to_numpy(batch["option_ids"]) < 0  # [B, C]
    labels = metrics.to_numpy(batch["labels"]).astype(np.int64)  # [B]
    if getattr(probs, "dtype", None) in (torch.bfloat16, torch.float16):
        raise ValueError(f"the predictor's probabilities are {probs.dtype}, whose rows do not sum to 1: "
                         "take the softmax of float32 logits (logits.float().softmax(-1))")
    probs = _float64(probs)
    if probs.shape != missing.shape:
        raise ValueError(f"expected probs shaped like option_ids {missing.shape}, got {probs.shape}")
    if (probs[missing] != 0).any():
        raise ValueError("the predictor puts probability on a missing option (option_ids = -1)")
    known = np.flatnonzero(labels != -1)
    if (labels < -1).any() or (labels >= missing.shape[1]).any() or missing[known, labels[known]].any():
        raise ValueError(f"a label points at a missing option: labels {labels.tolist()}")
    return Predictions(probs, labels, default_signals(probs) | dict(signals), logits, batch.get("p_star"))

def routed_tokens(model: torch.nn.Module, loader: Iterable[Mapping]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many real tokens of ``loader`` each expert got, ``[L, E]`` int64: all of them, and those at the answer's position.

    Layers with fewer experts than the widest are filled with zeros.
    """
    names = list(expert_layers(model))
    totals = None
    with capturing(model):
        for batch in loader:
            batch = models.to_device(batch, model)
            with recording(model, names, batch["attention_mask"]) as tape:
                models.option_logits(model, batch)
            by_name = {s.name: s for s in tape.slots}
            width = max(len(s.counts) for s in tape.slots)
            last = [torch.bincount(by_name[n].expert[by_name[n].last], minlength=width).cpu() for n in names]
            every = [torch.nn.functional.pad(by_name[n].counts, (0, width - len(by_name[n].counts))).cpu() for n in names]
            step = torch.stack([torch.stack(every), torch.stack(last)])
            totals = step if totals is None else totals + step
    return totals[0], totals[1]


# -------------------------------------------------------------------------------------------------------------- tables


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
