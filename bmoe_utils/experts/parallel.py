"""Several processes fit one posterior, each on its own shard of the data: what torch.distributed's collectives need around them.

A stage of the fit ends in three steps, the same on every rank and in the same order. *Reduce*: every layer's sums go to the layer's
owner (layer i of the stage: rank ``i mod R``), so that each rank holds a share of the whole. *Finish*: each rank makes the posteriors
of its layers. *Share*: their owners broadcast them, so that all ranks hold the same bits, on whatever hardware they run.

Work between these steps is done :meth:`Ranks.together`: a rank that fails there tells the others, and all raise. Where a process is
gone altogether, the collective fails (or, by the process group's own timeout, waits no longer), and the others raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


class Ranks:
    """The processes that fit together, by ``group``: None (this one alone), ``"world"`` or a ``torch.distributed.ProcessGroup``."""

    def __init__(self, group: dist.ProcessGroup | str | None = None):
        self.rank, self.size = 0, 1
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: torch.distributed is not initialised; start the script with torchrun or accelerate launch and "
                             "call torch.distributed.init_process_group() in it (accelerate.Accelerator() does), or leave group out")
        self.group = dist.group.WORLD if group == "world" else group
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(f"group={group!r} is not None, 'world' or a process group that this process belongs to")
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        backends = dict(part.split(":") for part in dist.get_backend_config(self.group).split(","))
        fast = [kind for kind, backend in backends.items() if kind != "cpu" and backend != "gloo"]  # gloo's cannot all of this
        self.device = torch.device(fast[0], torch.accelerator.current_device_index()) if fast else torch.device("cpu")

    # ---- failures ---------------------------------------------------------------------------------------------------
    @contextmanager
    def together(self) -> Iterator[None]:
        """For work without collectives that has to succeed on all ranks. Where it does not, every rank raises on leaving: those it
        failed on their own error, the others a ``RuntimeError`` that says which these are and what they said."""
        failure = None
        try:
            yield
        except Exception as error:  # an interrupt is not waited with
            failure = error
        said = self.texts("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if any(said):
            raise RuntimeError("there is no posterior of all ranks' data: " + "; ".join(f"rank {r} failed ({x})" for r, x in enumerate(said) if x))

    def _call(self, collective: Callable, *args, **where) -> None:
        try:
            collective(*args, group=self.group, **where)
        except RuntimeError as error:  # torch's own, also of a timeout
            raise RuntimeError(f"rank {self.rank} of {self.size} lost the others: a process has ended, or was not ready within the process "
                               f"group's timeout; there is no posterior of all ranks' data ({error})") from error

    def _in_place(self, collective: Callable, tensor: Tensor, **where) -> Tensor:
        """Of a tensor on any device, by way of the one that the backend serves."""
        there = tensor.to(self.device)
        self._call(collective, there, **where)
        return tensor if there is tensor else tensor.copy_(there)

    # ---- small things -----------------------------------------------------------------------------------------------
    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, on each."""
        return tensor if self.size == 1 else self._in_place(dist.all_reduce, tensor)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's ``values [n]`` on every rank, whatever their number; on the CPU."""
        if self.size == 1:
            return [values]
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        self._call(dist.all_gather, sizes, torch.tensor([len(values)], device=self.device))
        sizes = torch.cat(sizes).tolist()
        mine = pad(values, (0, max(sizes) - len(values))).to(self.device)
        parts = [torch.empty_like(mine) for _ in sizes]
        if max(sizes):
            self._call(dist.all_gather, parts, mine)
        return [part[:n].cpu() for part, n in zip(parts, sizes, strict=True)]

    def texts(self, text: str) -> list[str]:
        """Every rank's text on every rank."""
        return [bytes(part.tolist()).decode() for part in self.gather(torch.tensor(list(text.encode()), dtype=torch.uint8))]

    # ---- sums and posteriors ----------------------------------------------------------------------------------------
    def owner(self, layer: int) -> int:
        """Who finishes the stage's layer of this number."""
        return layer % self.size

    def reduce(self, sums: Sequence, empty: Callable[[int], object]) -> list[list]:
        """Per layer, what its owner has to merge into one (itself first, the others in the order of their ranks) and nothing elsewhere.

        Sums whose tensors add up are summed by the backend, in place. Others, sketches that have restarted and dense rows, travel to
        the owner whole; ``empty(layer)`` makes what they are put back into.
        """
        if self.size == 1:
            return [[s] for s in sums]
        whole = self.total(torch.tensor([s.summands() is None for s in sums], dtype=torch.long)).tolist()
        out = []
        for i, mine in enumerate(sums):
            owner = self.owner(i)
            out.append([mine] if self.rank == owner else [])
            if not whole[i]:  # on no rank
                for tensor in mine.summands():
                    self._in_place(dist.reduce, tensor, group_dst=owner)
                continue
            state = {name: t.contiguous() for name, t in mine.state().items()}
            for source, described in enumerate(self.texts(_described(state))):
                if self.rank == source != owner:
                    for tensor in state.values():
                        self._call(dist.send, tensor.to(self.device), group_dst=owner)
                elif self.rank == owner != source:
                    received = {}
                    for name, tensor in _room(described, self.device):
                        self._call(dist.recv, tensor, group_src=source)
                        received[name] = tensor
                    other = empty(i)
                    other.restore(received)
                    out[-1].append(other)
        return out

    def share(self, layer: int, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The owner's ``tensors`` on every rank, there on ``device``."""
        if self.size == 1:
            return tensors
        owner = self.owner(layer)
        described = self.texts(_described(tensors) if self.rank == owner else "")[owner]
        room = tensors.items() if self.rank == owner else _room(described, device)
        return {name: self._in_place(dist.broadcast, tensor, group_src=owner) for name, tensor in room}


def _described(tensors: dict[str, Tensor]) -> str:
    return json.dumps([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()])


def _room(described: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Empty tensors of the names, types and shapes that were described."""
    for name, dtype, shape in json.loads(described):
        yield name, torch.empty(shape, dtype=getattr(torch, dtype), device=device)
