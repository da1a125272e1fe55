"""The NLL of held-out items as a function of every group's prior precision, and the precisions of least NLL.

The predictive covariance is a sum over groups of experts, so every group's part at every point of
the grid is all that it takes: one pass over the items, then a change of one group's precision
changes one summand. The parts are most of the memory, ``grid x groups x items x C^2`` numbers; what
is beyond a budget is kept in temporary files. Nothing else grows with groups times items but the
sums of ``BLOCK`` groups each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import moved
from ..progress import track
from .curvature import answers, probit_probabilities
from .prior import COARSE

# Summands that are added up anew for every trial, in their order; sums of as many stand for the
# others. So nothing is ever subtracted, no rounding builds up over a sweep, and up to this many
# groups are one sum.
BLOCK = 32
SAMPLES = 100  # of the "mc" link


class ValidationNLL:
    """Mean ``-log p(y)`` of the items added, nats, under the prior precisions ``COARSE[choice]``, one
    for each of the groups.

    ``group [L, E]``: :func:`prior.groups`. ``link``: ``mc`` (the same noise for every precision, by
    ``seed``), ``probit`` or ``map``. ``memory_budget``: bytes of tabulated parts that may stay in
    memory.
    """

    def __init__(self, group: Tensor, link: str, seed: int, memory_budget: int):
        self.group, self.groups, self.link, self.seed = group, int(group.max()) + 1, link, seed
        self.room = memory_budget
        self.means, self.labels, self.tables = [], [], []  # a batch each; tables [groups, grid, B, C, C] on the host

    def add(self, mean: Tensor, labels: Tensor, covariances: Iterable[Tensor]) -> None:
        """A batch: logits ``[B, C]``, labels ``[B]`` and every layer's ``[grid, E, B, C, C]``, expert by expert."""
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        table = self._table((self.groups, len(COARSE), *mean.shape, mean.shape[-1]), mean.dtype)
        for group, cov in zip(self.group, covariances, strict=True):
            table.index_add_(0, group[: cov.shape[1]], cov.to(table).transpose(0, 1))
        self.means.append(mean)
        self.labels.append(labels)
        self.tables.append(table)

    def _table(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros; beyond the budget in a temporary file that nobody else sees and that is gone with its tensor. ``OSError`` where the
        disk is full."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self.room:
            self.room -= size
            return torch.zeros(shape, dtype=dtype)
        with TemporaryFile(prefix="bmoe-validation-") as file:
            if hasattr(os, "posix_fallocate"):  # or a full disk would end the process when a page is written
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, f"f{dtype.itemsize}", "w+", shape=shape))

    def ready(self) -> ValidationNLL:
        """All items are there. ``ValueError`` if one has no label, or there is none."""
        if not self.means:
            raise ValueError("the validation loader gave no batch (a generator can be used only once)")
        labels = torch.cat(self.labels)
        if not (labels >= 0).all():
            raise ValueError("method='val_nll' needs a label on every validation item")
        self.width = max(m.shape[1] for m in self.means)
        self.mean = torch.cat([pad(m, (0, self.width - m.shape[1]), value=-torch.inf) for m in self.means])
        self.label = labels.to(self.mean.device)
        self.noise = None
        if self.link == "mc":
            noise = torch.randn(SAMPLES, *self.mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
            self.noise = moved(noise, self.mean.device)
        return self

    # ---- the covariance ---------------------------------------------------------------------------------------------
    def _items(self, of_batch: Callable[[Tensor], Tensor]) -> Tensor:
        """``of_batch(table) [.., B, C, C]`` of every batch, ``[.., N, C, C]``."""
        return torch.cat([pad(of_batch(t), (0, self.width - t.shape[-1]) * 2) for t in self.tables], -3)

    def _blocks(self) -> Iterator[slice]:
        return (slice(i, min(i + BLOCK, self.groups)) for i in range(0, self.groups, BLOCK))

    # ---- the NLL ----------------------------------------------------------------------------------------------------
    def _label_probability(self, covariances: Iterable[Tensor], items: Tensor | slice = slice(None)) -> Tensor:
        """Under each of Q covariances ``[N, C, C]`` of these items, ``[Q, N]`` on the host. One after another: together
        they took no less time on a processor, and a curve of several points would round otherwise than its points do."""
        mean, label = self.mean[items], self.label[items]
        noise = None if self.noise is None else self.noise[:, items]
        out = []
        for cov in covariances:
            cov = cov.to(mean.device)
            match self.link:
                case "map":
                    p = mean.softmax(-1)
                case "probit":
                    p = probit_probabilities(mean, cov)
                case "mc":
                    p = answers(mean, cov, noise).mean(0).to(mean.dtype).to(mean.device)
            out.append(p.gather(1, label[:, None]).squeeze(1))
        return torch.stack(out).cpu()

    def common(self) -> list[float]:
        """With all groups at the same point of the grid, for each of its points."""
        return [_nll(p) for p in self._common()]

    def _common(self) -> Tensor:
        return self._label_probability(sum(self._items(lambda t, mine=mine: t[mine].sum(0)) for mine in self._blocks()))

    def minimise(self, sweeps: int = 5, progress: bool = True) -> Tensor:
        """The choice of least NLL, indices into ``COARSE`` ``[groups]``: the best common one, then coordinate descent (``sweeps`` at
        most; it stops as soon as one changes nothing)."""
        probability = self._common()
        values = [_nll(p) for p in probability]
        best = values.index(min(values))
        choice = torch.full((self.groups,), best)
        if self.groups == 1:
            return choice
        probability = probability[best]
        sums = [self._items(lambda t, mine=mine: t[mine, best].sum(0)) for mine in self._blocks()]
        for number in range(1, sweeps + 1):
            before = choice.clone()
            for _ in track(self._sweep(choice, probability, sums), f"prior precisions, sweep {number}", progress, total=self.groups):
                pass
            if torch.equal(choice, before):
                break
        return choice

    def _sweep(self, choice: Tensor, probability: Tensor, sums: list[Tensor]) -> Iterator[int]:
        """Every group in turn takes the point of least NLL given the others'. In place: ``choice``, the labels' ``probability [N]``
        under it and each block's part of the covariance, ``sums``."""
        for block, mine in enumerate(self._blocks()):
            rest = sum((s for i, s in enumerate(sums) if i != block), torch.zeros_like(sums[block]))
            groups = torch.arange(mine.start, mine.stop)
            now = self._items(lambda t, groups=groups: t[groups, choice[groups]])  # [block, N, C, C]
            for j, which in enumerate(groups.tolist()):
                parts = self._items(lambda t, which=which: t[which])  # [grid, N, C, C]
                met = parts.any(3).any(2).any(0)  # the other items' probabilities are what they are
                if met.any():
                    met = slice(None) if met.all() else met.nonzero().squeeze(1)
                    trial, total = now[:, met].clone(), []
                    for part in parts[:, met]:
                        trial[j] = part
                        total.append(rest[met] + trial.sum(0))
                    trials = probability.repeat(len(COARSE), 1)
                    trials[:, met] = self._label_probability(total, met)
                    values = [_nll(p) for p in trials]
                    best = values.index(min(values))
                    if values[best] < values[choice[which]]:
                        choice[which], now[j] = best, parts[best]
                        probability.copy_(trials[best])
                yield which
            sums[block] = now.sum(0)


def _nll(probability: Tensor) -> float:
    return float(-probability.log().mean())
