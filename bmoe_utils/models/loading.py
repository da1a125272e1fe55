"""Loading MoE language models, and refusing what would fail later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import checkpoints
from .adapters import load_adapted, read_tokenizer
from .experts_forward import serve_experts
from .layers import expert_layers

# Checkpoints whose experts are packed, by their quant_method, and what has transformers unpack them.
UNPACKING = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: object | None = None,
    max_memory: dict | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers MoE causal LM and its tokenizer (padding on the left), from a local folder or a hub id.

    Either may be a peft adapter: its base model, with the adapter merged in, and the tokenizer and
    chat template it was saved with (:mod:`~bmoe_utils.models.adapters`). A relative path to the base counts
    from the adapter's folder, or else from the working directory.

    Args:
        dtype: of the weights; ``"auto"`` as the checkpoint has them.
        device_map: as in transformers; ``"auto"`` spreads the layers over all GPUs, and what they cannot hold over the host
            (within ``max_memory``, device -> bytes) and then ``offload_folder``.
        revision: branch, tag or commit of a hub id. ``model.config._commit_hash`` says which commit it was (None: a folder).
            What is whole in the hub's cache is taken as it is there, without asking the hub.
        trust_remote_code: run the checkpoint's own code. Off unless asked for.
        quantization_config: as in transformers. It must leave the experts to floating point, as bitsandbytes' do. Checkpoints
            whose experts are packed (MXFP4 as gpt-oss, FP8 as DeepSeek-V3) are unpacked to ``dtype``.

    The model is in eval mode. ``FileNotFoundError``, of one line and at once, if it is not here and cannot be had, or not whole.
    ``ValueError`` if it has no mixture-of-experts layer, or experts that no gradient passes.
    """
    folder = checkpoints.require(name_or_path, revision)
    if folder is not None and checkpoints.is_adapter(folder):
        how = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code,
               "quantization_config": quantization_config, "max_memory": max_memory,
               "offload_folder": offload_folder}
        model, tokenizer = load_adapted(
            folder, lambda base, at: load_model(base, revision=at, **how),
            trust_remote_code=trust_remote_code)
        model.config._commit_hash = checkpoints.commit(name_or_path, revision)
        # what an adapter trained on this one will call its base
        model.name_or_path = model.config.name_or_path = str(name_or_path)
        return model, tokenizer
    here = {"revision": revision, "local_files_only": folder is not None}
    description, _ = PreTrainedConfig.get_config_dict(name_or_path, **here)
    if description.get("model_type") == "deepseek":
        from . import deepseek
        deepseek.register()
    quantised = description.get("quantization_config") or {}
    if not isinstance(quantised, dict):
        raise ValueError(f"no model can be built from the config.json of {name_or_path}: "
                         f"quantization_config is {quantised!r}, not an object")
    packed = quantised.get("quant_method")
    if quantization_config is None and packed in UNPACKING:
        quantization_config = UNPACKING[packed](dequantize=True)
    where = {**here, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(name_or_path, **where)
    except Exception as error:  # an unknown type, code that is not to be run, a value out of range
        raise ValueError(f"no model can be built from the config.json of {name_or_path}: "
                         f"{' '.join(str(error).split())}") from error
    tokenizer = read_tokenizer(name_or_path, **where)
    options = {"quantization_config": quantization_config, "max_memory": max_memory, "offload_folder": offload_folder}
    model, read = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, device_map=device_map, **where,
        output_loading_info=True, ignore_mismatched_sizes=True,  # what is found then is refused below
        **{k: v for k, v in options.items() if v is not None})
    _check_weights(name_or_path, read)
    _check_experts(model)
    if packed in UNPACKING and not getattr(model, "is_quantized", False):
        vars(model).pop("_weight_conversions", None)  # or save_pretrained would take the weights for packed ones
    model.config._commit_hash = checkpoints.commit(name_or_path, revision)
    return serve_experts(model).eval(), tokenizer


def _check_weights(name: str | Path, read: Mapping) -> None:
    """``ValueError`` for weights that the checkpoint lacks or has in another size, which would stay
    random numbers."""
    lost = sorted(read["missing_keys"])
    for key, has, wanted in sorted(read["mismatched_keys"]):
        lost.append(f"{key} ({list(has)}, not {list(wanted)})")
    if lost:
        raise ValueError(f"the weights of {name} do not fit its config.json: {len(lost)} are not "
                         f"there or of another size, such as {', '.join(lost[:3])}; copy or "
                         "download both again")


def _check_experts(model: PreTrainedModel) -> None:
    """``ValueError`` without MoE layers, or if quantisation left the experts in numbers that no gradient passes."""
    quantised = getattr(model, "is_quantized", False)
    try:
        types = {p.dtype for m in expert_layers(model).values() for p in m.parameters()}
    except ValueError:
        if not quantised:
            raise
        types = {"modules of the quantisation's own"}
    floats = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    if packed := sorted(map(str, types - floats)):
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "quantisation")
        raise ValueError(f"{method} keeps the experts as {', '.join(packed)}, which no gradient passes, and the posterior needs one: "
                         "unpack them (quantization_config=...(dequantize=True)), or quantise in a way that leaves the experts alone "
                         "(bitsandbytes does), or load another checkpoint")
