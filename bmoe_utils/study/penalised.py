"""MAP fine-tuning under the very prior that a Laplace posterior is then given, and with smoothed labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..models import training
from ..precision import at_least_float32


def smoothed_nll(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of ``softmax(logits)`` to ``(1 - smoothing)`` on the label and the rest even over the item's options (-inf:
    no such option, which gets none)."""
    log_p = logits.log_softmax(-1)
    present = logits.isfinite()
    even = log_p.masked_fill(~present, 0.0).sum(-1) / present.sum(-1)
    return -((1 - smoothing) * log_p.gather(1, labels.to(logits.device)[:, None]).squeeze(1) + smoothing * even).mean()


def fine_tune(model: nn.Module, loader: Iterable[Mapping[str, Tensor]], *, epochs: int, lr: float, precision: Mapping[str, float] | None = None,
              smoothing: float = 0.0, seed: int = 0, progress: bool = True) -> None:
    """``training.fine_tune`` on ``-log p(D|W) + sum_i lambda_i / 2 ||W_i - W_0i||^2`` (per item): the mode that the posterior with the prior
    ``N(W_0, I / lambda)`` expands about. In place.

    ``precision``: parameter name -> its ``lambda`` (others are free); ``W_0`` is 1 for the scales of norms, 0 for all else. A penalty in
    the loss, not AdamW's decoupled weight decay, whose optimum is that of no such objective.
    """
    named = dict(model.named_parameters())
    if unknown := set(precision or {}) - set(named):
        raise ValueError(f"no parameter {', '.join(sorted(unknown))}")
    held = [(named[name], 1.0 if "norm" in name else 0.0, lam) for name, lam in (precision or {}).items()]
    items = sum(len(b["labels"]) for b in loader)

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        penalty = sum(0.5 * lam / items * (at_least_float32(p) - centre).square().sum()
                      for p, centre, lam in held)
        return smoothed_nll(logits, labels, smoothing) + penalty

    training.fine_tune(model, loader, epochs=epochs, lr=lr, seed=seed, loss=objective, progress=progress)
