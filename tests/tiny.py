"""Tiny random models and batches for the exactness tests, in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

VOCAB = 50
COMMON = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
              num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
              eos_token_id=1, bos_token_id=None)
ARCHITECTURES = {
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=6, shared_expert_intermediate_size=12),
    "granitemoe": dict(num_local_experts=4, intermediate_size=6),
    "olmoe": dict(num_experts=4, intermediate_size=6),
    "mixtral": dict(num_local_experts=4, intermediate_size=6),
    # transposed weights, biases, interleaved gate
    "gpt_oss": dict(num_local_experts=4, intermediate_size=6, head_dim=8, layer_types=["full_attention"] * 2),
}


def tiny_model(architecture="qwen2_moe", seed=0, dtype=torch.float64, scale=0.5, **overrides):
    """By default with weights large enough that every nonlinearity bends and every expert gets tokens."""
    config = AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES[architecture], **overrides})
    # sdpa: eager attention takes its softmax in float32, where a float64 mask of padding overflows to nan
    config._attn_implementation = "eager" if architecture == "gpt_oss" else "sdpa"
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, scale)
    model.set_experts_implementation("eager")  # the other stock implementations take no float64
    return model


def tiny_batch(items=5, length=7, options=4, seed=0, ragged=True):
    """Left-padded items of different lengths, the second with one option less."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (items,), generator=g) if ragged else torch.full((items,), length)
    lengths[0] = length
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    ids = torch.randint(2, VOCAB, (items, length), generator=g) * mask
    option_ids = torch.stack([torch.randperm(VOCAB - 2, generator=g)[:options] + 2 for _ in range(items)])
    labels = torch.randint(0, options - 1, (items,), generator=g)
    if ragged and items > 1 and options > 2:
        option_ids[1, -1] = -1
    return {"input_ids": ids, "attention_mask": mask, "option_ids": option_ids, "labels": labels}


def single_items(batch):
    """The same items one by one, without their padding."""
    for i, mask in enumerate(batch["attention_mask"].bool()):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        yield one | {k: one[k][:, mask] for k in ("input_ids", "attention_mask")}


def autograd_jacobians(model, batch):
    """The reference: ``J [B, C, L, E, P]`` of every expert's down projection by plain autograd through the stock
    forward, one item (without padding) and one class at a time. Also the logits ``[B, C]``."""
    from bmoe_utils.models.layers import expert_layers
    from bmoe_utils.models.readout import option_logits
    from bmoe_utils.models.unfused import second_layer

    modules = list(expert_layers(model).values())
    weights = [[second_layer(e).weight for e in m] if isinstance(m, torch.nn.ModuleList) else [m.down_proj] for m in modules]
    rows, logits = [], []
    for item in single_items(batch):
        f = option_logits(model, item)[0]
        logits.append(f.detach())
        for c, value in enumerate(f):
            if item["option_ids"][0, c] < 0:
                rows.append(torch.zeros_like(rows[-1]))
                continue
            row = []
            for m, w in zip(modules, weights):
                grads = torch.autograd.grad(value, w, retain_graph=True, materialize_grads=True)
                g = torch.stack(grads) if isinstance(m, torch.nn.ModuleList) else grads[0]
                row.append((g.mT if getattr(m, "is_transposed", False) else g).flatten(1))
            rows.append(torch.stack(row))
    logits = torch.stack(logits)
    return torch.stack(rows).view(*logits.shape, *rows[0].shape), logits


def captured_jacobians(model, batch):
    """``J [B, C, L, E, P]`` and the logits ``[B, C]`` from the capture."""
    from bmoe_utils.experts.capture import capturing
    from bmoe_utils.experts.columns import routes_of
    from bmoe_utils.experts.jacobians import item_jacobians
    from bmoe_utils.experts.laplace import ExpertLaplace

    la = ExpertLaplace(model)
    with capturing(model):
        logits, captured = la.captured(batch)
    E, d, f = la.shapes[0]
    J = torch.zeros(*logits.shape, len(captured), E, d * f, dtype=torch.float64)
    for layer, (s, g) in enumerate(captured):
        for e, items, block in item_jacobians(s.a, g, routes_of(s, len(logits))):
            J[items, :, layer, e] = block.flatten(2).to(J)
    return J, logits


def dense_ggn(J, logits):
    """``H [L, E, P, P] = sum_n J_n^T (diag p - p p^T) J_n``."""
    p = logits.softmax(-1)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncleP,ncd,ndleQ->lePQ", J, Lambda, J)


def skip_without_router_logits(model):
    """Some transformers releases (5.17 for Granite-MoE) give no router logits, so there is no balancing loss to test."""
    with torch.no_grad():
        given = model.model(input_ids=torch.tensor([[2, 3]]), output_router_logits=True).router_logits
    if given is None:
        pytest.skip(f"this transformers gives no router logits for {type(model).__name__}")


def write_checkpoint(folder, config, tensors, *, tokenizer_class="PreTrainedTokenizerFast", shards=2):
    """A folder as the hub has it: ``config.json`` as given, the weights in numbered shards with their index, a tokenizer of
    ``VOCAB`` tokens under the given class name."""
    from bmoe_utils.models.embedded import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, places = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    train_tokenizer(["does ice float on water?", "no, never."], 300).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    return folder
