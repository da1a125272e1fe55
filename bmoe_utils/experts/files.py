"""A fitted posterior of the experts as files: tensors, and a ``manifest.json`` that says whose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..models.files import CheckedFolder
from ..models.layers import down_weight
from .fitting import posterior_class

FILES = CheckedFolder("posterior", format=2)


def save(la, folder: str | Path) -> None:
    """See :meth:`ExpertLaplace.save`."""
    FILES.check_free(folder)
    tensors = {f"{i}.{k}": v.cpu() for i, p in enumerate(la.posteriors) for k, v in p.tensors().items()}
    tensors |= {"prior_precision": la.prior_precision, "distance": la._distance, "tokens": la.tokens_per_expert}
    values = {"options": la.options, "layers": la.layers, "shapes": la.shapes, "num_items": la.num_items,
              "log_likelihood": la.log_likelihood, "answer_only": la.answer_only}
    FILES.save_fitted(folder, tensors, values, la.model)


def load(cls: type, folder: str | Path, model: nn.Module, expected: Mapping):
    """See :meth:`ExpertLaplace.load`."""
    saved, tensors = FILES.load_fitted(folder, model)
    for option, value in expected.items():
        if option not in saved["options"]:
            raise ValueError(f"{option!r} is no option of a posterior; there are {', '.join(saved['options'])}")
        if saved["options"][option] != value:
            raise ValueError(f"{folder} was fitted with {option}={saved['options'][option]!r}, not {value!r}")
    la = cls(model, layers=saved["layers"], **saved["options"])
    if [list(s) for s in la.shapes] != saved["shapes"]:
        raise ValueError(f"{folder}: layer shapes {saved['shapes']} do not fit the model's {la.shapes}")
    la.prior_precision = tensors.pop("prior_precision")
    la._distance, la.tokens_per_expert = tensors.pop("distance"), tensors.pop("tokens")
    la.num_items, la.log_likelihood, la.answer_only = saved["num_items"], saved["log_likelihood"], saved.get("answer_only", [])
    la.posteriors = []
    for i, module in enumerate(la._modules):
        named = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{i}.")}
        la.posteriors.append(posterior_class(la.options).from_tensors(named).to(down_weight(module).device))
    return la
