"""Finished posteriors of layers that rest in files while neither the device nor the host's memory has room for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..storage import Lock, locked
from .curvature import DenseBlocks, Eigenbasis
from .jacobians import Columns, Routes

OWNER = ".bmoe-in-use"  # locked by the process whose posterior rests there


class Scratch:
    """A folder of its own below ``folder``, for as long as something that rests in it is in use;
    then it is removed. What killed processes left beside it goes with the next one made there."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        with locked(self.folder / ".bmoe-lock"):
            for left in self.folder.glob("offloaded-*"):
                lock = Lock(left / OWNER)
                if not any(left.iterdir()) or lock.path.exists() and lock.take(wait=False):
                    _remove(left, lock, os.getpid())
            self._own = Path(tempfile.mkdtemp(prefix="offloaded-", dir=self.folder))
            (lock := Lock(self._own / OWNER)).take()
        weakref.finalize(self, _remove, self._own, lock, os.getpid())

    def rest(self, layer: int, posterior: Eigenbasis | DenseBlocks) -> OnDisk:
        """Writes the layer's posterior. ``OSError`` where there is no room."""
        path = self._own / f"{layer}.safetensors"
        tensors = {k: v.detach().cpu() for k, v in posterior.tensors().items()}
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            need, free = sum(t.nbytes for t in tensors.values()), "an unknown number"
            with suppress(OSError):
                free = f"{shutil.disk_usage(self.folder).free:,}"
            raise OSError(f"offload={str(self.folder)!r}: the posterior of a layer could not be "
                          f"written ({error}); it takes {need:,} bytes, with {free} free there. "
                          "The posterior before this fit, if any, is intact: make room or give another "
                          "folder") from error
        return OnDisk(path, type(posterior), self)


def _remove(folder: Path, lock: Lock, process: int) -> None:
    """With the sign of whose it is last, so that what may be left is still known for ours."""
    if os.getpid() != process:  # a fork of the owner ends
        return
    for path in folder.iterdir():
        if path != lock.path:
            with suppress(OSError):
                path.unlink()
    lock.let_go()
    with suppress(OSError):
        folder.rmdir()


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
