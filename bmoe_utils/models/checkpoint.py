"""State of a long loop on disk, so that a killed one goes on where it was: tensors in safetensors, the rest in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..storage import Folder, fingerprint

FILES = Folder("state", manifest="state.json")


class Checkpoint:
    """One resumable loop's last saved state in ``folder``; ``key`` is what determines the loop (JSON values).

    ``save`` replaces the state whole or not at all. ``load``, to be asked before the loop begins,
    gives None where there is none (no folder, an empty one, or one whose first save was cut short);
    what is another loop's, damaged or something else is refused and left as it is.
    ``folder=None``: nothing is ever written.
    """

    def __init__(self, folder: str | Path | None, key: Mapping):
        self.folder, self.key = None if folder is None else Path(folder), fingerprint(dict(key))

    def save(self, values: Mapping, tensors: Mapping[str, torch.Tensor]) -> None:
        """``values`` of JSON, ``tensors`` by name."""
        if self.folder is not None:
            # cloned: safetensors refuses tensors that share storage
            copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            state = {"key": self.key, "values": values}
            FILES.save(self.folder, lambda path: save_file(copies, path), state)

    def load(self) -> tuple[dict, dict[str, torch.Tensor]] | None:
        """What was saved last, ``(values, tensors)``. ``ValueError`` if the folder holds anything
        else than this loop's state."""
        if self.folder is None:
            return None
        if not FILES.holds_one(self.folder):
            return None
        state, tensors = FILES.read(self.folder, load_file)
        if state["key"] != self.key:
            raise ValueError(f"{self.folder} holds the checkpoint of another fit (another model, "
                             "other options or other data); give the fit it belongs to, or remove "
                             "the folder to start over")
        return state["values"], tensors

    def remove(self) -> None:
        """At the end of the loop: its own files, and the folder if nothing else is in it."""
        if self.folder is not None:
            FILES.remove(self.folder)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[list, dict[str, torch.Tensor]]:
    """An optimizer's parameter groups as JSON values and its per-parameter tensors by name."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, slots in state["state"].items() for name, value in slots.items()}
    return state["param_groups"], tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, groups: list, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what :func:`optimizer_state` gave."""
    slots: dict[int, dict] = {}
    for name, value in tensors.items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
