"""Finished posteriors of layers that rest in files while neither the device nor the host's memory has room for all of them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .curvature import DenseBlocks, Eigenbasis
from .jacobians import Columns, Routes


class Scratch:
    """A folder of its own below ``folder``, for as long as something that rests in it is in use; then it is removed."""

    def __init__(self, folder: str | Path):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._own = TemporaryDirectory(prefix="posterior-", dir=folder, ignore_cleanup_errors=True)

    def rest(self, layer: int, posterior: Eigenbasis | DenseBlocks) -> OnDisk:
        """Writes the layer's posterior. ``OSError`` where there is no room."""
        path = Path(self._own.name) / f"{layer}.safetensors"
        save_file({k: v.detach().cpu() for k, v in posterior.tensors().items()}, path)
        return OnDisk(path, type(posterior), self)


class OnDisk:
    """The posterior of one layer in a safetensors file, with the methods of those in memory and the same bits: what one of them
    needs is read and let go again, so that a prediction holds a layer at a time."""

    def __init__(self, path: Path, kind: type, scratch: Scratch):
        self.path, self.kind, self._scratch = path, kind, scratch

    def tensors(self) -> dict[str, Tensor]:
        """Mapped from the file: their memory is the file's, which the system may drop and read again."""
        return load_file(self.path)

    def to(self, device: torch.device | str) -> Eigenbasis | DenseBlocks:
        """A copy in memory."""
        return self.kind.from_tensors(self.tensors()).to(device)

    def _mapped(self) -> Eigenbasis | DenseBlocks:
        tensors = self.tensors()
        if self.kind is Eigenbasis:
            return Eigenbasis(**tensors)
        return DenseBlocks(*([tensors[f"{name}.{e}"] for e in range(len(tensors) // 2)] for name in ("values", "vectors")))

    @property
    def captured(self) -> Tensor | None:
        return getattr(self._mapped(), "captured", None)

    def spectrum(self, expert: int) -> Tensor:
        return self._mapped().spectrum(expert)

    def spectra(self) -> Tensor:
        return self._mapped().spectra()

    def covariance(self, a: Tensor, g: Columns, routes: Routes, precision: Tensor) -> Tensor:
        return self.to(a.device).covariance(a, g, routes, precision)
