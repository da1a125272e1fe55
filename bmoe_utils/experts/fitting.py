"""The passes over a fitting set that make the experts' posterior: one column of the Fisher at a time, resumable, on one process or
several, named faults."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..models.checkpoint import Checkpoint
from ..models.files import model_fingerprint
from ..models.layers import down_weight
from ..progress import track
from ..storage import fingerprint
from . import curvature
from .capture import Slots, capturing
from .columns import backward_passes, read_out, routes_of, slot_rows
from .labels import drawn_labels, item_marks
from .on_disk import Scratch
from .parallel import Ranks
from .sums import DenseRows, KronSums, SquareSums, factor_bytes, first_sums

# Below tiny / eps a float32 loses digits and then all of them: the squares that are summed, and the products of two of these. Entries
# above the fourth root cannot get there.
LEAST_SQUARE = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps

# What a checkpoint keeps of a fit beside its sums, its finished posteriors and its stage.
CARRIED = ("batches", "items", "seen", "log_likelihood", "labelled", "digest")


class Fit:
    """One fit of ``layers`` (names; their ``modules``): what it has summed so far and where it stands.

    ``options``: those of :class:`~bmoe_utils.experts.laplace.ExpertLaplace`. A *stage* is one pass over the data for a group of layers: the
    factors, and for ``ekfac`` a second one for the moments in their eigenbasis. ``memory_budget`` (bytes of running sums at once)
    makes groups of layers, whose finished posteriors rest in host memory; without one all layers are a group. ``offload``: a folder
    where they rest instead. ``ranks``: the processes that pass over a shard each; every stage ends with the posterior of all.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], modules: Sequence[nn.Module], options: Mapping,
                 memory_budget: int | None = None, offload: str | Path | None = None, ranks: Ranks | None = None):
        self.model, self.layers, self.options = model, list(layers), dict(options)
        # Of the weights only shape, type and device: where a layer is offloaded, adapted or separate modules, they are copies.
        self.shapes, self.like = map(list, zip(*((tuple(w.shape), w.new_empty(0)) for w in map(down_weight, modules)), strict=True))
        self.ranks = ranks or Ranks()
        self.on_host, self.offload, self.scratch = memory_budget is not None, offload, None
        passes = ("factors", "moments") if options["hessian_structure"] == "ekfac" else ("factors",)
        self.stages = [(what, group) for group in self._groups(memory_budget) for what in passes]
        self.posteriors: list = [None] * len(self.layers)
        self.stage = self.batches = self.items = self.seen = 0
        self.log_likelihood, self.labelled, self.digest = 0.0, True, ""
        self.tokens = torch.zeros(len(self.layers), max(shape[0] for shape in self.shapes), dtype=torch.long)
        # At other positions than the answer's, until one of them has a gradient: slots met, once a column, and those that had.
        self.elsewhere = torch.zeros(len(self.layers), 2, dtype=torch.long)
        # The largest |entry| of an expert's inputs, and of its gradients; from LEAST_SQUARE ** 0.25 on, a lower bound of it.
        self.largest = torch.zeros(2, *self.tokens.shape, dtype=torch.float64)
        self.marks: list[int] = []  # of this rank's items, where there are several

    def _groups(self, budget: int | None) -> list[list[int]]:
        if budget is None:
            return [list(range(len(self.layers)))]
        if self.options["hessian_structure"] == "full":
            raise ValueError("memory_budget bounds sums of a fixed size; those of 'full' grow with the data")
        groups, room = [], 0
        for i, (shape, like) in enumerate(zip(self.shapes, self.like, strict=True)):
            need = factor_bytes(self.options, shape, like)
            if need > budget:
                raise ValueError(f"memory_budget={budget} bytes is less than the sums of one layer, {self.layers[i]!r}, need: {need}")
            if not groups or need > room:
                groups.append([])
                room = budget
            groups[-1].append(i)
            room -= need
        return groups

    @property
    def answer_only(self) -> list[str]:
        """The layers where of all positions the answer's alone had a gradient so far: behind them nothing looks back."""
        return [name for name, (others, reached) in zip(self.layers, self.elsewhere.tolist(), strict=True) if others and not reached]

    def begin(self) -> None:
        """Empty sums for the current stage."""
        _, group = self.stages[self.stage]
        self.batches, self.seen, self.digest = 0, 0, ""
        self.sums = [self._empty(k) for k in range(len(group))]

    def _empty(self, k: int) -> KronSums | SquareSums | DenseRows:
        """Of the current stage's layer of this number."""
        what, group = self.stages[self.stage]
        like, basis = self.like[group[k]], self.posteriors[group[k]]
        if what == "factors":
            return first_sums(self.options, self.shapes[group[k]], like)
        basis = basis.to(like.device)
        return SquareSums(torch.zeros_like(basis.eigenvalues), basis)

    def run(self, loader: Iterable[Mapping[str, Tensor]], *, checkpoint: str | Path | None, every: int, progress: bool) -> None:
        """All stages that are left, from where ``checkpoint`` stands if there is one. What was counted is then that of all ranks."""
        with self.ranks.together():
            if len(self.stages) > 1 and iter(loader) is loader:
                raise ValueError(f"this fit goes through the data {len(self.stages)} times, and the loader can be used only once: "
                                 "give a list of batches or a DataLoader")
            if checkpoint is not None and self.offload is not None:
                raise ValueError("checkpoint and offload exclude each other: a checkpoint holds all finished posteriors, in memory while "
                                 "it is written")
            resumed = self._open(checkpoint)
            self.scratch = None if self.offload is None else Scratch(self.offload)
        self._check_ranks()
        with capturing(self.model):
            while self.stage < len(self.stages):
                with self.ranks.together():
                    if not resumed:
                        self.begin()
                        if self.ranks.size > 1 and self.stage:  # so that all ranks' checkpoints stand in the same pass
                            self._save()
                    self._pass(loader, every, progress)
                resumed = False
                self._end_stage()
        self.ranks.total(self.tokens)
        self.ranks.total(self.elsewhere)
        self.ranks.total(self.largest)
        items, self.log_likelihood, unlabelled = self.ranks.total(
            torch.tensor([self.items, self.log_likelihood, not self.labelled], dtype=torch.float64)).tolist()
        self.items, self.labelled = int(items), not unlabelled
        self._state.remove()
        if self.ranks.size > 1 and checkpoint is not None:
            with suppress(OSError):  # the last rank's
                Path(checkpoint).rmdir()
        self._warn_of_underflow()

    def _end_stage(self) -> None:
        """The posteriors of the current stage's layers, from the sums of all ranks."""
        if self.stage == 0:
            self._check_shards()
        _, group = self.stages[self.stage]
        parts = self.ranks.reduce(self.sums, self._empty)
        self.sums = []
        finished = [None] * len(group)
        with self.ranks.together():
            for k, mine in enumerate(parts):
                if mine:
                    for other in mine[1:]:
                        mine[0].merge(other)
                    finished[k] = mine[0].finish()
                parts[k] = None
        for k, i in enumerate(group):
            if self.ranks.size > 1:
                tensors = self.ranks.share(k, {} if finished[k] is None else finished[k].tensors(), self.like[i].device)
                finished[k] = posterior_class(self.options).from_tensors(tensors)
            with self.ranks.together():
                self.posteriors[i] = self._rested(i, finished[k])
            finished[k] = None
        self.stage += 1

    def _rested(self, layer: int, posterior):
        """The finished posterior of a layer, where it is to be until the end."""
        if self.scratch is not None:
            return self.scratch.rest(layer, posterior)
        return posterior.to("cpu") if self.on_host else posterior

    def _check_ranks(self) -> None:
        """``ValueError`` on all of them where they do not fit the same thing from the same pass on."""
        said = self.ranks.texts(fingerprint({"options": self.options, "layers": self.layers, "stages": self.stages,
                                             "shapes": self.shapes}))
        if len(set(said)) > 1:
            raise ValueError("the ranks fit different things: model, options, layers and memory budget must be the same on all")
        if len(set(stages := self.ranks.texts(str(self.stage)))) > 1:
            raise ValueError(f"the ranks' checkpoints stand in different passes ({', '.join(stages)}): they were cut short between two; "
                             "remove the folder to start over")

    def _check_shards(self) -> None:
        """Whether there were any data, and whether ranks were given the same."""
        if not (total := int(self.ranks.total(torch.tensor([self.seen])))):
            raise ValueError("the loader gave no batch: there is nothing to fit on (a generator can be used only once)")
        if self.ranks.size == 1:
            return
        shards = self.ranks.gather(torch.tensor(self.marks, dtype=torch.long))
        if all(torch.equal(shard.sort().values, shards[0].sort().values) for shard in shards):
            raise ValueError(f"all {self.ranks.size} ranks passed over the same {len(shards[0])} items, which would count them as often: "
                             "give each rank its own shard of the data")
        if self.ranks.rank == 0 and (repeated := total - len(torch.cat(shards).unique())):
            warnings.warn(f"{repeated} of the {total} items of all ranks are repeats of others and counted again. Some samplers repeat "
                          "items to give ranks equally many (DistributedSampler; accelerate unless even_batches=False)", stacklevel=2)

    def _meet(self, which: int, layer: int, x: Tensor, expert: Tensor) -> None:
        """Takes the rows ``x [S, m]`` of the experts ``expert [S]`` up into :attr:`largest`, inputs (0) or gradients (1)."""
        small = self.largest[which, layer] < LEAST_SQUARE**0.25
        if small.any() and (rows := small.to(expert.device)[expert]).any():
            found = x[rows].abs().amax(1).cpu().double()  # not a square, which may be what vanishes
            self.largest[which, layer].scatter_reduce_(0, expert[rows].cpu(), found, "amax")

    def _warn_of_underflow(self) -> None:
        inputs, gradients = self.largest.square()
        # Where one of them is 0 itself (no token of the expert's reaches the answer), zero curvature is what there is.
        lost = (inputs * gradients > 0) & (torch.minimum(torch.minimum(inputs, gradients), inputs * gradients) < LEAST_SQUARE)
        for like, row in zip(self.like, lost, strict=True):
            row &= like.dtype != torch.float64
        if lost.any() and self.ranks.rank == 0:
            layers = [f"{name!r} ({n})" for name, n in zip(self.layers, lost.sum(1).tolist(), strict=True) if n]
            warnings.warn(f"{int(lost.sum())} experts have inputs or gradients whose squares are below {LEAST_SQUARE:.0e}, where float32 "
                          f"loses digits and then the numbers: their posterior may be no more than the prior. In {', '.join(layers)}. "
                          "Fit the model in float64 (model.double()), or rescale these layers", stacklevel=3)

    def _pass(self, loader: Iterable[Mapping[str, Tensor]], every: int, progress: bool) -> None:
        done, stored, digest = self.batches, self.digest, ""
        number = -1
        for number, batch in enumerate(track(loader, f"expert Laplace: {self.stages[self.stage][0]}", progress)):
            if self._state.folder is not None:
                digest = _chained(digest, batch)
            if self.ranks.size > 1 and self.stage == 0:
                self.marks += item_marks(batch)
            if number < done:
                if number + 1 == done and digest != stored:
                    raise ValueError(f"{self._state.folder}: the first {done} batches of the loader are not those of the checkpoint; "
                                     "resume with the same data in the same order, or remove the folder to start over")
                continue
            self.add(number, batch)
            self.batches, self.digest = number + 1, digest
            if self._state.folder is not None and self.batches % every == 0:
                self._save()
        if number + 1 < done:
            raise ValueError(f"{self._state.folder}: the checkpoint stands after {done} batches and the loader has {number + 1}")
        if self.stage == 0:
            self.items = self.seen
        elif self.seen != self.items:
            raise ValueError(f"the loader gave {self.items} items the first time and {self.seen} now; the passes need the same data")

    def add(self, number: int, batch: Mapping[str, Tensor]) -> None:
        """The batch of this number to the current stage's sums; inside ``capturing(model)``."""
        what, group = self.stages[self.stage]
        labels, fisher = batch["labels"], self.options["fisher"]
        if not len(labels):
            raise ValueError(f"batch {number} holds no item")
        labelled = bool((labels >= 0).all())
        if fisher == "empirical" and not labelled:
            raise ValueError(f"batch {number} has unlabelled items; fisher='empirical' needs every label")
        logits, layers = read_out(self.model, [self.layers[i] for i in group], batch)
        energies = _check_forward(number, logits.detach(), layers)
        for i, slots, energy, sums in zip(group, layers, energies, self.sums, strict=True):
            sums.open(slots.a, energy, routes_of(slots, len(labels)))
            if what == "factors":
                self.tokens[i, : len(slots.counts)] += slots.counts.cpu()
                self._meet(0, i, slots.a, slots.expert)
        if fisher == "mc":  # the column of a label is the same, drawn or observed
            fisher, labels = "empirical", drawn_labels(logits, batch, self.options["seed"])
        v = curvature.fisher_columns(logits.detach(), fisher, labels.to(logits.device), None)
        z = layers[0].z[0]
        buffer = z.new_empty(max(len(s.a) for s in layers), z.shape[-1])
        for gradients in backward_passes(logits, layers, v):
            # in the order of the backward pass
            for i, slots, sums in zip(reversed(group), reversed(layers), reversed(self.sums), strict=True):
                g = slot_rows(gradients.pop(), slots, buffer)
                energy = torch.linalg.vecdot(g, g)
                if not energy.sum().isfinite():
                    raise ValueError(f"batch {number}, layer {slots.name!r}: a gradient is not finite, or its square is not")
                if not self.elsewhere[i, 1]:
                    reached, others = energy > 0, ~slots.last
                    here, *there = torch.stack([(reached & slots.last).sum(), others.sum(), (reached & others).sum()]).tolist()
                    if here:  # a column without a gradient says nothing
                        self.elsewhere[i] += torch.tensor(there)
                if what == "factors":
                    self._meet(1, i, g, slots.expert)
                sums.column(g, energy)
                del g
        for sums in self.sums:
            sums.close()
        self.seen += len(labels)
        if self.stage == 0:
            self.labelled &= labelled
            if self.labelled:
                log_p = logits.detach().cpu().double().log_softmax(-1)
                self.log_likelihood += float(log_p.gather(1, batch["labels"].cpu()[:, None]).sum())

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _open(self, folder: str | Path | None) -> bool:
        """Takes up what ``folder`` holds, if anything. ``ValueError`` where that is damaged or another fit's; it is left as it is."""
        key = {} if folder is None else {
            "format": 4, "options": self.options, "layers": self.layers, "shapes": self.shapes,
            "stages": self.stages, "model": model_fingerprint(self.model)}
        if folder is not None and self.ranks.size > 1:  # each rank has its own below it
            folder, name = Path(folder), f"rank-{{}}-of-{self.ranks.size}"
            known = {name.format(r) for r in range(self.ranks.size)}
            if folder.exists() and any(p.name not in known and not p.name.startswith(".") for p in folder.iterdir()):
                raise ValueError(f"{folder} holds something else than checkpoints of {self.ranks.size} ranks; give the fit it belongs to "
                                 "as many ranks as it had, or a new or an empty folder")
            folder = folder / name.format(self.ranks.rank)
        self._state = Checkpoint(folder, key)
        saved = self._state.load()
        if saved is None:
            return False
        values, tensors = saved
        self.stage = values["stage"]
        for i, like in enumerate(self.like):
            if done := _under(f"done.{i}", tensors):
                posterior = posterior_class(self.options).from_tensors(done)
                self.posteriors[i] = posterior if self.on_host else posterior.to(like.device)
        self.begin()
        for k, sums in enumerate(self.sums):
            sums.restore(_under(f"sums.{k}", tensors))
        self.tokens, self.elsewhere, self.largest = (tensors[name] for name in ("tokens", "elsewhere", "largest"))
        for name in CARRIED:
            setattr(self, name, values[name])
        return True

    def _save(self) -> None:
        tensors = {"tokens": self.tokens, "elsewhere": self.elsewhere, "largest": self.largest}
        tensors |= {f"sums.{k}.{name}": v for k, sums in enumerate(self.sums) for name, v in sums.state().items()}
        tensors |= {f"done.{i}.{k}": v for i, p in enumerate(self.posteriors) if p is not None for k, v in p.tensors().items()}
        values = {"stage": self.stage} | {name: getattr(self, name) for name in CARRIED}
        try:
            self._state.save(values, tensors)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the checkpoint after batch {self.batches} could not be written to {self._state.folder} ({error}); "
                          "the one before it, if any, is intact: fit again to resume from it") from error


def posterior_class(options: Mapping) -> type:
    return curvature.DenseBlocks if options["hessian_structure"] == "full" else curvature.Eigenbasis


def _check_forward(number: int, logits: Tensor, layers: Sequence[Slots]) -> list[Tensor]:
    """Every layer's squared norms of ``a [S]``. ``ValueError`` that names the first layer whose activations are not finite, or
    the logits."""
    energies = [torch.linalg.vecdot(slots.a, slots.a) for slots in layers]
    for slots, energy in zip(layers, energies, strict=True):
        if not energy.sum().isfinite():
            raise ValueError(f"batch {number}, layer {slots.name!r}: an activation is not finite, or its square is not")
    if logits.isnan().any() or (logits.logsumexp(-1) == torch.inf).any():
        raise ValueError(f"batch {number}: a class logit is not finite")
    return energies


def _chained(digest: str, batch: Mapping[str, Tensor]) -> str:
    """The fingerprint of all batches so far from that of those before (``digest``) and this one."""
    chain = hashlib.sha256(digest.encode())
    for name in ("input_ids", "attention_mask", "option_ids", "labels"):
        tensor = batch[name].cpu().contiguous()
        chain.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        chain.update(memoryview(tensor.view(torch.uint8).numpy()))
    return chain.hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
