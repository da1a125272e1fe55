"""The embedded models: a tokenizer trained on the embedded world's text, and small mixtures of random weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    set_seed,
)

from .experts_forward import serve_experts

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"


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
