"""Run a predictor over a loader, and keep what it said."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from ..models import readout
from ..progress import track
from ..storage import atomic_write
from . import metrics


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

    `predictor`: a causal LM, read out through `readout.option_logits` in eval mode without gradients, every module's
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
                logits = _float64(readout.option_logits(model, batch))
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


# -------------------------------------------------------------------------------------------------------------- tables
