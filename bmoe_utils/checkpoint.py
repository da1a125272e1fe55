"""State of a long loop on disk, so that a killed one goes on where it was: tensors in safetensors, the rest in JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .artefacts import fingerprint
from .files import replace_folder


class Checkpoint:
    """One resumable loop's last saved state in ``folder``; ``key`` is what determines the loop (JSON values).

    ``save`` replaces the state whole or not at all. ``load`` gives None where there is none (no folder, or an empty one); what is
    another loop's, or damaged, is refused and left as it is. ``folder=None``: nothing is ever written.
    """

    def __init__(self, folder: str | Path | None, key: Mapping):
        self.folder, self.key = None if folder is None else Path(folder), fingerprint(dict(key))

    def save(self, values: Mapping, tensors: Mapping[str, torch.Tensor]) -> None:
        """``values`` of JSON, ``tensors`` by name."""
        if self.folder is None:
            return
        with replace_folder(self.folder) as temporary:
            # cloned: safetensors refuses tensors that share storage
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary / "state.safetensors")
            state = {"key": self.key, "tensors": fingerprint(temporary / "state.safetensors"), "values": values}
            (temporary / "state.json").write_text(json.dumps(state))

    def load(self) -> tuple[dict, dict[str, torch.Tensor]] | None:
        """What was saved last, ``(values, tensors)``. ``ValueError`` if the folder holds anything else than this loop's state."""
        if self.folder is None or not self.folder.exists() or self.folder.is_dir() and not any(self.folder.iterdir()):
            return None
        try:
            state, path = json.loads((self.folder / "state.json").read_text()), self.folder / "state.safetensors"
            if not (foreign := state["key"] != self.key) and fingerprint(path) == state["tensors"]:
                return state["values"], load_file(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            foreign = False
        what = ("the checkpoint of another fit (another model, other options or other data)" if foreign
                else "no whole checkpoint (cut short, changed, or something else)")
        raise ValueError(f"{self.folder} holds {what}; give the fit it belongs to, or remove the folder to start over")

    def remove(self) -> None:
        """At the end of the loop."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


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
