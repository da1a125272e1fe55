"""Loading MoE language models, building the embedded ones, and reading out the options' logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GraniteMoeConfig,
    Mxfp4Config,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    set_seed,
)

from . import checkpoints
from .adapters import load_adapted, read_tokenizer
from .capture import expert_layers, serve_experts, unwrap
from .precision import at_least_float32, moved

# Checkpoints whose experts are packed, by their quant_method, and what has transformers unpack them.
UNPACKING = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"


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
    chat template it was saved with (:mod:`~bmoe_utils.adapters`). A relative path to the base counts
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


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> PreTrainedTokenizerFast:
    """A tokenizer trained on ``texts``, as a normal pretrained one (padding on the left). Deterministic.

    ``bpe``: byte-level, for any text. ``word``: a token for every word of ``texts`` with the space before it (the most
    frequent ``vocab_size``), for the embedded world's closed vocabulary, where it keeps the softmax small.
    """
    special = {"special_tokens": [PAD, END, UNKNOWN][: 3 if kind == "word" else 2], "show_progress": False}
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, **special)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                      **special)
    else:
        raise ValueError(f"tokenizer kind {kind!r} is not 'bpe' or 'word'")
    tokenizer.train_from_iterator(texts, trainer)
    unknown = {"unk_token": UNKNOWN} if kind == "word" else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left", **unknown)


def tiny_config(
    architecture: str,
    vocab_size: int,
    *,
    width: int = 64,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    expert_width: int = 64,
    heads: int = 4,
) -> PreTrainedConfig:
    """Config of an embedded model: ``qwen2_moe`` (with a shared expert), ``granitemoe`` or ``olmoe``."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.01,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    match architecture:
        case "qwen2_moe":
            return Qwen2MoeConfig(**common, num_experts=experts, moe_intermediate_size=expert_width,
                                  shared_expert_intermediate_size=expert_width, norm_topk_prob=True)
        case "granitemoe":
            return GraniteMoeConfig(**common, num_local_experts=experts, intermediate_size=expert_width)
        case "olmoe":
            return OlmoeConfig(**common, num_experts=experts, intermediate_size=expert_width, norm_topk_prob=True)
    raise ValueError(f"architecture {architecture!r} is not one of 'qwen2_moe', 'granitemoe', 'olmoe'")


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A randomly initialised float32 causal LM of ``config``; the seed fixes every weight."""
    set_seed(seed)
    return serve_experts(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of the model's first parameter that is on one (where a sharded model takes its input)."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    return {k: moved(v, device) for k, v in batch.items()}


@contextmanager
def _reading_out(head: nn.Linear, option_ids: Tensor) -> Iterator[None]:
    """While active, ``head`` gives the last position's logits of ``option_ids [B, C]`` alone, as ``[B, 1, C]``.

    So the model's own forward still does whatever it does to its logits (scaling, soft-capping), but on C numbers
    per item and not on the vocabulary.
    """

    def forward(hidden: Tensor) -> Tensor:
        last = hidden[:, -1]  # [B, d]; the batch is padded on the left
        rows = head.weight[option_ids]  # [B, C, d]
        logits = torch.einsum("bcd,bd->bc", rows, last)
        return (logits if head.bias is None else logits + head.bias[option_ids])[:, None]

    head.forward = forward  # an instance attribute in front of the class's method
    try:
        yield
    finally:
        del head.forward


def option_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The class logits ``f [B, C]``: the LM logits of each item's option tokens at the last position.

    ``batch``: ``input_ids [B, T]``, ``attention_mask [B, T]`` (left-padded), ``option_ids [B, C]`` (-1: no such option,
    whose logit is -inf). In the graph if gradients are on. Letters are the case where every item has the same ids.
    The model's own numbers, at least float32: so is then all that is made of them.
    ``ValueError`` on a right-padded batch or an item without options.
    """
    batch = to_device(batch, serve_experts(model))
    mask, option_ids = batch["attention_mask"], batch["option_ids"]
    if not mask[:, -1].all():
        raise ValueError("the batch must be padded on the left: the last position is the one that answers")
    missing = option_ids < 0
    if missing.all(1).any():
        raise ValueError("an item has no option at all")
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        # Counted from the first real token, so that padding moves nothing even where positions are absolute.
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    head = unwrap(model).get_output_embeddings()
    ids = option_ids.clamp(min=0)
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if plain:
        with _reading_out(head, ids.to(head.weight.device)):
            logits = model(**inputs).logits[:, -1]
    else:  # a head that something else has wrapped (LoRA on it, offloading): all of the last position's logits
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].gather(1, ids)
    return at_least_float32(logits).masked_fill(missing.to(logits.device), -torch.inf)
