"""The passes over a fitting set that make the experts' posterior: one column of the Fisher at a time, resumable, named faults."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import curvature
from .artefacts import model_fingerprint
from .capture import Slots, capturing, down_weight, recording
from .checkpoint import Checkpoint
from .jacobians import Routes
from .models import option_logits, to_device
from .progress import track
from .sums import SquareSums, factor_bytes, first_sums


def read_out(model: nn.Module, layers: Sequence[str], batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Slots]]:
    """The class logits ``[B, C]`` in the graph, and the slots of the ``layers``, in their order and with ``a`` at least float32.

    Inside ``capture.capturing(model)``.
    """
    batch = to_device(batch, model)
    with recording(model, layers, batch["attention_mask"]) as tape:
        logits = option_logits(model, batch)
    position = {name: i for i, name in enumerate(layers)}
    for slots in tape.slots:
        slots.a = _at_least_float32(slots.a)
    return logits, sorted(tape.slots, key=lambda s: position[s.name])


def backward_passes(logits: Tensor, layers: Sequence[Slots], v: Tensor) -> Iterator[list[Tensor]]:
    """For every cotangent of ``v [K, B, C]`` one backward pass: ``d <v_k, f> / d z`` of each layer, padding's rows included.

    One after another: a batched backward of all K (``is_grads_batched``) gives the same bits, holds K times the gradients, and was
    not faster where it was measured (tests/benchmarks/curvature_floor.py).
    """
    outputs, v = [z for s in layers for z in s.z], v.to(logits.dtype)
    for k in range(len(v)):
        grads = iter(torch.autograd.grad(logits, outputs, v[k], retain_graph=k + 1 < len(v), materialize_grads=True))
        parts = [[next(grads).flatten(0, -2) for _ in s.z] for s in layers]  # one, or several where experts are separate modules
        yield [torch.cat(p) if len(p) > 1 else p[0] for p in parts]


def slot_rows(g: Tensor, slots: Slots, out: Tensor | None = None) -> Tensor:
    """``g [S, d]`` of the real slots, at least float32, from the gradient at all of the layer's outputs. ``out [>= S, d]``: to write
    them into, since fresh memory for every layer and column costs more than the copy."""
    if len(slots.rows) == len(g):
        return _at_least_float32(g)
    if out is None or out.dtype != g.dtype or out.device != g.device or out.shape[1] != g.shape[1] or len(out) < len(slots.rows):
        return _at_least_float32(g[slots.rows])
    return _at_least_float32(torch.index_select(g, 0, slots.rows, out=out[: len(slots.rows)]))


def captured_columns(logits: Tensor, layers: Sequence[Slots], v: Tensor) -> list[tuple[Slots, list[Tensor]]]:
    """All cotangents' gradients, per layer ``(slots, K gradients [S, d])``, for what needs them together.

    Where most slots have no gradient, in the last layer, only those that have one are kept, since all of them at once is what a
    prediction needs memory for; the slots are cut to those as well.
    """
    kept: list[list] = [[] for _ in layers]
    for gradients in backward_passes(logits, layers, v):
        for of, slots, g in zip(kept, layers, gradients, strict=True):
            g = slot_rows(g, slots)
            active = torch.linalg.vecdot(g, g) > 0
            of.append((g[active], active) if 2 * int(active.sum()) < len(g) else (g, None))
        del gradients, g
    out = []
    for slots, of in zip(layers, kept, strict=True):
        slots.z = ()  # the graph is spent; this frees what it held
        if any(active is None for _, active in of):
            chosen = torch.ones(len(slots.a), dtype=torch.bool, device=slots.a.device)
        else:
            chosen = torch.stack([active for _, active in of]).any(0)
            counts = torch.bincount(slots.expert[chosen], minlength=len(slots.counts))
            slots = replace(slots, counts=counts, **{k: getattr(slots, k)[chosen] for k in ("a", "expert", "item", "last", "rows")})
        columns = []
        for g, active in of:
            if active is not None:  # where this column's gradients are among those kept
                g = g.new_zeros(len(chosen), g.shape[1]).index_copy(0, active.nonzero().squeeze(1), g)[chosen]
            columns.append(g)
        out.append((slots, columns))
    return out


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def routes_of(slots: Slots, num_items: int) -> Routes:
    return Routes(slots.item, slots.counts, num_items)


class Fit:
    """One fit of ``layers`` (names; their ``modules``): what it has summed so far and where it stands.

    ``options``: those of :class:`~bmoe_utils.laplace.ExpertLaplace`. A *stage* is one pass over the data for a group of layers: the
    factors, and for ``ekfac`` a second one for the moments in their eigenbasis. ``memory_budget`` (bytes of running sums at once)
    makes groups of layers, whose finished posteriors rest in host memory; without one all layers are a group.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], modules: Sequence[nn.Module], options: Mapping,
                 memory_budget: int | None = None):
        self.model, self.layers, self.options = model, list(layers), dict(options)
        self.weights = [down_weight(m) for m in modules]
        self.offload = memory_budget is not None
        passes = ("factors", "moments") if options["hessian_structure"] == "ekfac" else ("factors",)
        self.stages = [(what, group) for group in self._groups(memory_budget) for what in passes]
        self.posteriors: list = [None] * len(self.layers)
        self.stage = self.batches = self.items = self.seen = 0
        self.log_likelihood, self.labelled, self.digest = 0.0, True, ""
        self.tokens = torch.zeros(len(self.layers), max(len(w) for w in self.weights), dtype=torch.long)

    def _groups(self, budget: int | None) -> list[list[int]]:
        if budget is None:
            return [list(range(len(self.layers)))]
        if self.options["hessian_structure"] == "full":
            raise ValueError("memory_budget bounds sums of a fixed size; those of 'full' grow with the data")
        groups, room = [], 0
        for i, weight in enumerate(self.weights):
            need = factor_bytes(self.options, tuple(weight.shape), weight)
            if need > budget:
                raise ValueError(f"memory_budget={budget} bytes is less than the sums of one layer, {self.layers[i]!r}, need: {need}")
            if not groups or need > room:
                groups.append([])
                room = budget
            groups[-1].append(i)
            room -= need
        return groups

    def begin(self) -> None:
        """Empty sums for the current stage."""
        what, group = self.stages[self.stage]
        self.generator = torch.Generator().manual_seed(self.options["seed"])  # every pass draws the same labels
        self.batches, self.seen, self.digest = 0, 0, ""
        if what == "factors":
            self.sums = [first_sums(self.options, tuple(self.weights[i].shape), self.weights[i]) for i in group]
        else:
            bases = [self.posteriors[i] for i in group]
            self.sums = [SquareSums(torch.zeros_like(b.eigenvalues, device=self.weights[i].device), b)
                         for i, b in zip(group, bases, strict=True)]

    def run(self, loader: Iterable[Mapping[str, Tensor]], *, checkpoint: str | Path | None, every: int, progress: bool) -> None:
        """All stages that are left, from where ``checkpoint`` stands if there is one."""
        if len(self.stages) > 1 and iter(loader) is loader:
            raise ValueError(f"this fit goes through the data {len(self.stages)} times, and the loader can be used only once: "
                             "give a list of batches or a DataLoader")
        state = self._open(checkpoint)
        with capturing(self.model):
            while self.stage < len(self.stages):
                if state is None:
                    self.begin()
                self._pass(loader, every, progress)
                state = None
                for i, sums in zip(self.stages[self.stage][1], self.sums, strict=True):
                    posterior = sums.finish()
                    self.posteriors[i] = posterior.to("cpu") if self.offload else posterior
                self.stage += 1
        self._state.remove()

    def _pass(self, loader: Iterable[Mapping[str, Tensor]], every: int, progress: bool) -> None:
        done, stored, digest = self.batches, self.digest, ""
        number = -1
        for number, batch in enumerate(track(loader, f"expert Laplace: {self.stages[self.stage][0]}", progress)):
            if self._state.folder is not None:
                digest = _chained(digest, batch)
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
        if not self.seen:
            raise ValueError("the loader gave no batch: there is nothing to fit on (a generator can be used only once)")
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
        v = curvature.fisher_columns(logits.detach(), fisher, labels.to(logits.device), self.generator)
        z = layers[0].z[0]
        buffer = z.new_empty(max(len(s.a) for s in layers), z.shape[-1])
        for gradients in backward_passes(logits, layers, v):
            for slots, sums in zip(reversed(layers), reversed(self.sums), strict=True):  # in the order of the backward pass
                g = slot_rows(gradients.pop(), slots, buffer)
                energy = torch.linalg.vecdot(g, g)
                if not energy.sum().isfinite():
                    raise ValueError(f"batch {number}, layer {slots.name!r}: a gradient is not finite, or its square is not")
                sums.column(g, energy)
                del g
        for sums in self.sums:
            sums.close()
        self.seen += len(labels)
        if self.stage == 0:
            self.labelled &= labelled
            if self.labelled:
                picked = logits.detach().double().log_softmax(-1).gather(1, labels.to(logits.device)[:, None])
                self.log_likelihood += float(picked.sum())

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _open(self, folder: str | Path | None) -> Mapping | None:
        """Takes up what ``folder`` holds. ``ValueError`` where that is damaged or another fit's; it is left as it is."""
        key = {} if folder is None else {
            "options": self.options, "layers": self.layers, "shapes": [list(w.shape) for w in self.weights],
            "stages": [[what, group] for what, group in self.stages], "model": model_fingerprint(self.model)}
        self._state = Checkpoint(folder, key)
        saved = self._state.load()
        if saved is None:
            return None
        values, tensors = saved
        self.stage = values["stage"]
        for i, weight in enumerate(self.weights):
            if done := _under(f"done.{i}", tensors):
                posterior = posterior_class(self.options).from_tensors(done)
                self.posteriors[i] = posterior if self.offload else posterior.to(weight.device)
        self.begin()
        for i, sums in enumerate(self.sums):
            sums.restore(_under(f"sums.{i}", tensors))
        self.generator.set_state(tensors["generator"])
        self.tokens = tensors["tokens"]
        for name in ("batches", "items", "seen", "log_likelihood", "labelled", "digest"):
            setattr(self, name, values[name])
        return values

    def _save(self) -> None:
        tensors = {"generator": self.generator.get_state(), "tokens": self.tokens}
        tensors |= {f"sums.{i}.{k}": v for i, sums in enumerate(self.sums) for k, v in sums.state().items()}
        tensors |= {f"done.{i}.{k}": v for i, p in enumerate(self.posteriors) if p is not None for k, v in p.tensors().items()}
        values = {name: getattr(self, name) for name in
                  ("stage", "batches", "items", "seen", "log_likelihood", "labelled", "digest")}
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
