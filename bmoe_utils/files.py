"""Files written so that an interruption never leaves half of one, and read so that a damaged or foreign one is never taken up."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .artefacts import model_fingerprint


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to fill; it takes its place at the end, or vanishes if filling it failed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{uuid.uuid4().hex[:8]}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)  # a folder cannot be moved onto a filled one
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class CheckedFolder:
    """A kind of folder that holds what was fitted on a model: ``<what>.safetensors``, and a ``manifest.json`` with its ``format``,
    JSON values, the fingerprint of the model and a checksum over all of it."""

    what: str
    format: int

    def save(self, folder: str | Path, tensors: Mapping[str, Tensor], values: Mapping, model: nn.Module) -> None:
        """``tensors`` (on the CPU) and JSON ``values``; whole or not at all."""
        with replace_folder(folder) as temporary:
            save_file(dict(tensors), self.path(temporary))
            manifest = {"format": self.format, **values, "model": model_fingerprint(model)}
            manifest["checksum"] = _checksum(self.path(temporary), manifest)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def values(self, folder: str | Path) -> dict:
        """The manifest, to be asked before the tensors are read. ``ValueError`` if it is missing, damaged or of another format."""
        try:
            manifest = json.loads((Path(folder) / "manifest.json").read_text())
            found = manifest.get("format")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder} holds no readable {self.what} (manifest.json: {error})") from None
        if found != self.format:
            raise ValueError(f"{folder}: format {found!r}, this version reads {self.format}; fit again")
        return manifest

    def tensors(self, folder: str | Path, manifest: Mapping, model: nn.Module) -> dict[str, Tensor]:
        """By name, on the CPU. ``ValueError`` if the folder is damaged or belongs to a model of other weights."""
        path = self.path(folder)
        if not path.exists() or _checksum(path, manifest) != manifest.get("checksum"):
            raise ValueError(f"{folder} is cut short or changed since it was written; fit again")
        if model_fingerprint(model) != manifest["model"]:
            raise ValueError(f"{folder} was fitted on a model with other weights; load that model, or fit again")
        return load_file(path)

    def path(self, folder: str | Path) -> Path:
        """Of the tensors' file."""
        return Path(folder) / f"{self.what}.safetensors"


def _checksum(path: Path, manifest: Mapping) -> str:
    """Over the tensors' file and the rest of the manifest: either changed by hand, or cut short, no longer fits."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())
    return digest.hexdigest()
