"""A fitted posterior of the experts as files: ``posterior.safetensors`` and a ``manifest.json`` that says what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from .artefacts import model_fingerprint
from .capture import down_weight
from .files import replace_folder
from .fitting import posterior_class

FORMAT = 2


def save(la, folder: str | Path) -> None:
    """See :meth:`ExpertLaplace.save`."""
    tensors = {f"{i}.{k}": v.cpu() for i, p in enumerate(la.posteriors) for k, v in p.tensors().items()}
    tensors |= {"prior_precision": la.prior_precision, "distance": la._distance, "tokens": la.tokens_per_expert}
    with replace_folder(folder) as temporary:
        save_file(tensors, temporary / "posterior.safetensors")
        manifest = {
            "format": FORMAT,
            "options": la.options,
            "layers": la.layers,
            "shapes": la.shapes,
            "num_items": la.num_items,
            "log_likelihood": la.log_likelihood,
            "model": model_fingerprint(la.model),
        }
        manifest["checksum"] = _checksum(temporary / "posterior.safetensors", manifest)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))


def load(cls: type, folder: str | Path, model: nn.Module, expected: Mapping):
    """See :meth:`ExpertLaplace.load`."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no readable posterior (manifest.json: {error})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}; fit it again")
    for option, value in expected.items():
        if option not in manifest["options"]:
            raise ValueError(f"{option!r} is no option of a posterior; there are {', '.join(manifest['options'])}")
        if manifest["options"][option] != value:
            raise ValueError(f"{folder} was fitted with {option}={manifest['options'][option]!r}, not {value!r}")
    path = folder / "posterior.safetensors"
    if not path.exists() or _checksum(path, manifest) != manifest.get("checksum"):
        raise ValueError(f"{folder} is cut short or changed since it was written; fit it again")
    if model_fingerprint(model) != manifest["model"]:
        raise ValueError(f"{folder} was fitted on a model with other weights; load that model, or fit again")
    la = cls(model, layers=manifest["layers"], **manifest["options"])
    if [list(s) for s in la.shapes] != manifest["shapes"]:
        raise ValueError(f"{folder}: layer shapes {manifest['shapes']} do not fit the model's {la.shapes}")
    tensors = load_file(path)
    la.prior_precision = tensors.pop("prior_precision")
    la._distance, la.tokens_per_expert = tensors.pop("distance"), tensors.pop("tokens")
    la.num_items, la.log_likelihood = manifest["num_items"], manifest["log_likelihood"]
    la.posteriors = []
    for i, module in enumerate(la._modules):
        named = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
        la.posteriors.append(posterior_class(la.options).from_tensors(named).to(down_weight(module).device))
    return la


def _checksum(path: Path, manifest: Mapping) -> str:
    """Over the tensors' file and the rest of the manifest: either changed by hand, or cut short, no longer fits."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())
    return digest.hexdigest()
