"""What was fitted on a model, as a folder: tensors, and a manifest that says whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..storage import Folder
from . import offload


@dataclass(frozen=True)
class CheckedFolder(Folder):
    """Tensors and JSON values, with the fingerprint of the model they were fitted on."""

    def save_fitted(self, folder: str | Path, tensors: Mapping[str, Tensor], values: Mapping,
                    model: nn.Module) -> None:
        """``tensors`` on the CPU; whole or not at all. ``ValueError`` where the folder is not free,
        ``OSError`` where it cannot be written."""
        self.check_free(folder)
        values = {**values, "model": model_fingerprint(model)}
        try:
            self.save(folder, lambda path: save_file(dict(tensors), path), values)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written ({error}); what was there before, if "
                          "anything, is intact") from error

    def load_fitted(self, folder: str | Path, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
        """The manifest, and the tensors by name on the CPU. ``ValueError`` if the folder is
        missing, damaged, of another kind or format, or belongs to a model of other weights."""
        manifest, tensors = self.read(folder, load_file)
        if model_fingerprint(model) != manifest["model"]:
            raise ValueError(f"{folder} was fitted on a model with other weights; load that model, "
                             "or fit again")
        return manifest, tensors


def model_fingerprint(model) -> str:
    """sha256 over names, shapes, dtypes and bytes of parameters and persistent buffers; the device does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            owner, _, leaf = name.rpartition(".")
            tensor = offload.values(model.get_submodule(owner), leaf)
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        flat = tensor.detach().reshape(-1)
        for block in flat.split(1 << 22):             # in blocks: a large model is never copied to the host whole
            digest.update(memoryview(block.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
