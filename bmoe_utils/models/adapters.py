"""A peft adapter on its base model, merged into it, with the tokenizer that it was trained with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoints, offload
from .intact import read_json, tensors


def load_adapted(
    folder: Path, load_base: Callable, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the adapter merged in, and the adapter's tokenizer or chat template where
    it has them, else the base's.

    ``load_base(name, revision)`` loads the base. Its embeddings get as many rows as those that the
    adapter saved, or, where it saved none, as its tokenizer needs. ``FileNotFoundError`` and
    ``ValueError``, of one line, name the adapter.
    """
    described = read_json(folder / checkpoints.ADAPTER)
    kind = described.get("peft_type")
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(str(kind)), "merge_and_unload"):
        raise ValueError(
            f"{folder} is an adapter of peft_type {kind!r}, which cannot be merged into its base: "
            "LoRA and its like can"
        )
    name, revision = checkpoints.base_of(folder)
    try:
        model, tokenizer = load_base(name, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is an adapter of {name}, its base_model_name_or_path: {error}"
        ) from None
    tokenizer = _tokenizer(folder, tokenizer, trust_remote_code)
    saved = _saved(folder)
    places = _places(model, saved)
    for place in set(places.values()) - {""}:  # peft would lose what it reads for an offloaded one
        offload.keep(model.get_submodule(place))
    _resize(model, _rows(model, saved), len(tokenizer))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    # or peft would distribute an offloaded model anew, which fails on experts
    devices = vars(model).pop("hf_device_map", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError, KeyError, UserWarning) as error:
        raise ValueError(
            f"the adapter {folder} does not fit its base {name}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    if lost := _left_out(model, places, PEFT_TYPE_TO_PREFIX_MAPPING[kind]):
        raise ValueError(
            f"the adapter {folder} does not fit its base {name}: {len(lost)} of the layers that it "
            f"saved have no place there or are not in its target_modules, such as {lost[0]}"
        )
    _untie_adapted(model)
    model = adapted.merge_and_unload()
    if devices is not None:
        model.hf_device_map = devices
    for key, p in model.named_parameters():  # what was trained whole comes in a type of its own
        p.data = p.data.to(dtypes.get(key, p.dtype))
    embeddings, head = _ends(model)
    if head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False  # or saving it would lose one of the two
    return model.eval(), tokenizer


def _ends(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _untie_adapted(model: PreTrainedModel) -> None:
    """Where embeddings and head share a weight and one of them is adapted, the head gets a copy:
    merging would change both."""
    ends = _ends(model)
    if any(isinstance(m, BaseTunerLayer) for m in ends) and ends[0].weight is ends[1].weight:
        head = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _tokenizer(
    folder: Path, base: PreTrainedTokenizerBase, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The adapter's own; else the base's, with the adapter's chat template if it has one."""
    files = "tokenizer.json", "tokenizer.model", "vocab.json"
    if any((folder / name).is_file() for name in files):
        return read_tokenizer(folder, trust_remote_code=trust_remote_code)
    if (template := folder / "chat_template.jinja").is_file():
        base.chat_template = template.read_text(encoding="utf-8")
    return base


def read_tokenizer(name_or_path: str | Path, **where) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left; ``ValueError``, of one line, where it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **where)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(
            f"the tokenizer of {name_or_path} cannot be read "
            f"({' '.join(str(error).split())[:300]}): copy or download its files again"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _saved(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of what the adapter saved, by the base's names."""
    path = folder / checkpoints.ADAPTER_WEIGHTS[0]
    if path.is_file():
        shapes = tensors(path)
    else:
        loaded = torch.load(
            path.with_suffix(".bin"), map_location="cpu", mmap=True, weights_only=True
        )
        shapes = {name: list(t.shape) for name, t in loaded.items()}
    return {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}


def _places(model: PreTrainedModel, saved: Iterable[str]) -> dict[str, str]:
    """Saved name -> the base's module that it changes or replaces: the innermost whose name it
    begins with."""
    modules, found = {name for name, _ in model.named_modules()}, {}
    for name in saved:
        place = name
        while place not in modules:
            place = place.rpartition(".")[0]
        found[name] = place
    return found


def _left_out(model: PreTrainedModel, places: Mapping[str, str], prefix: str) -> list[str]:
    """The saved layers that peft did not adapt, of which it says nothing: what ``target_modules``
    does not name, and experts saved one by one in a model where it cannot fuse them."""
    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    served = {name[:i] for name in adapted for i, c in enumerate(f"{name}.") if c == "."} | {""}
    lost = [name for name, at in places.items() if f".{prefix}" in name and at not in served]
    return list(dict.fromkeys(name.partition(f".{prefix}")[0] for name in lost))


def _rows(model: PreTrainedModel, saved: Mapping[str, list[int]]) -> int | None:
    """The rows of the embeddings that the adapter was saved with; None if it has none of its
    own."""
    names = [name for name, m in model.named_modules() if m in _ends(model)]
    keys = {f"{name}.{part}weight" for name in names for part in ("", "base_layer.")}
    return max((shape[0] for key, shape in saved.items() if key in keys), default=None)


def _resize(model: PreTrainedModel, rows: int | None, needed: int) -> None:
    """Embeddings of ``rows``, or of at least ``needed`` tokens. New rows are drawn by a fixed seed,
    and the adapter's own replace them."""
    has = model.get_input_embeddings().weight.shape[0]
    if rows is None:
        rows = max(has, needed)
    if rows != has:
        for end in _ends(model):
            offload.keep(end)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(rows, mean_resizing=False)
