"""DeepSeek-MoE-16B's architecture: a tiny checkpoint in the hub's layout, against a forward pass written out from the paper."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from tiny import autograd_jacobians, captured_jacobians, single_items, tiny_batch, write_checkpoint
from tokenizers import Tokenizer
from torch.nn.functional import silu

import bmoe_utils as bm
from bmoe_utils.models.deepseek import DeepseekConfig, DeepseekForCausalLM
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.routers.families import FAMILIES

# The keys of deepseek-ai/deepseek-moe-16b-base's config.json, made small.
CONFIG = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "modeling_deepseek.DeepseekModel",
                 "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 20, "max_position_embeddings": 64,
    "model_type": "deepseek", "moe_intermediate_size": 6, "moe_layer_freq": 1, "n_routed_experts": 6, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 2, "num_experts_per_tok": 3, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 100,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "float64",
    "transformers_version": "4.36.0", "use_cache": True, "vocab_size": 300,
}
# transformers takes norms, rotary angles and routing probabilities in float32 even in a float64 model: 4e-6 of the
# largest logit is what is left of that after three layers (measured). Another routing rule changes it by tenths.
FLOAT32_INSIDE = 3e-5


def original_tensors():
    """Every weight under its name on the hub, random float64."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.5 * torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    c, d = CONFIG, CONFIG["hidden_size"]

    def mlp(name, width):
        return {f"{name}.gate_proj.weight": draw(width, d), f"{name}.up_proj.weight": draw(width, d),
                f"{name}.down_proj.weight": draw(d, width)}

    tensors = {"model.embed_tokens.weight": draw(c["vocab_size"], d), "lm_head.weight": draw(c["vocab_size"], d),
               "model.norm.weight": 1 + draw(d)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.self_attn.{p}_proj.weight": draw(d, d) for p in "qkvo"}
        tensors |= {f"{layer}.{norm}_layernorm.weight": 1 + draw(d) for norm in ("input", "post_attention")}
        if i < c["first_k_dense_replace"]:
            tensors |= mlp(f"{layer}.mlp", c["intermediate_size"])
            continue
        tensors |= {f"{layer}.mlp.gate.weight": draw(c["n_routed_experts"], d)}
        tensors |= mlp(f"{layer}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        for e in range(c["n_routed_experts"]):
            tensors |= mlp(f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"])
    return tensors


def paper_logits(w, ids):
    """Logits ``[T, V]`` of one sequence, token by token as arXiv 2401.06066 and the Llama blocks it builds on define them: rotary
    multi-head attention; ``h + sum_shared FFN_i(u) + sum_topK s_i FFN_i(u)`` with ``s`` the softmax over all routed experts,
    its K largest kept as they are; the shared experts K_s separate networks; the first layer one dense network."""
    c, T = CONFIG, len(ids)
    d, heads = c["hidden_size"], c["num_attention_heads"]
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]  # noqa: E731

    def ffn(x, name, rows=slice(None)):
        gate, up, down = (w[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return down[:, rows] @ (silu(gate[rows] @ x) * (up[rows] @ x))

    def rotate(x):  # [T, d/heads]: pairs (j, j + half), angle t theta^(-j/half)
        half = x.shape[1] // 2
        angle = torch.arange(T)[:, None] * c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    h = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = norm(h, f"{layer}.input_layernorm")
        q, k, v = ((x @ w[f"{layer}.self_attn.{p}_proj.weight"].T).split(d // heads, 1) for p in "qkv")
        mixed = []
        for head in range(heads):
            scores = rotate(q[head]) @ rotate(k[head]).T / math.sqrt(d // heads)
            mixed.append(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(1) @ v[head])
        h = h + torch.cat(mixed, 1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        u, out = norm(h, f"{layer}.post_attention_layernorm"), []
        for t in range(T):
            if i < c["first_k_dense_replace"]:
                out.append(ffn(u[t], f"{layer}.mlp"))
                continue
            m = c["moe_intermediate_size"]
            y = sum(ffn(u[t], f"{layer}.mlp.shared_experts", slice(s * m, (s + 1) * m)) for s in range(c["n_shared_experts"]))
            s = (w[f"{layer}.mlp.gate.weight"] @ u[t]).softmax(0)
            for e in s.argsort(descending=True)[: c["num_experts_per_tok"]].tolist():
                y = y + s[e] * ffn(u[t], f"{layer}.mlp.experts.{e}")
            out.append(y)
        h = h + torch.stack(out)
    return norm(h, "model.norm") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "deepseek"
    return write_checkpoint(folder, CONFIG, original_tensors(), tokenizer_class="LlamaTokenizerFast")


@pytest.fixture(scope="module")
def model(checkpoint):
    model, _ = bm.load_model(checkpoint)
    model.set_experts_implementation("eager")  # the other stock implementations take no float64
    return model


def test_the_logits_are_those_of_the_paper(model):
    assert type(model) is DeepseekForCausalLM and {p.dtype for p in model.parameters()} == {torch.float64}
    ids, w = torch.randint(300, (2, 9)), original_tensors()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, logits[:, -2:], rtol=1e-12, atol=1e-12)
    for row, got in zip(ids, logits, strict=True):
        expected = paper_logits(w, row)
        assert (got - expected).abs().max() < FLOAT32_INSIDE * expected.abs().max()


def test_generation_with_the_cache_is_that_without(model):
    ids = torch.randint(2, 300, (1, 5))
    kept = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(kept, model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False))


def test_every_weight_is_in_its_place_and_goes_back_under_its_name(model, tmp_path):
    w, m = original_tensors(), CONFIG["moe_intermediate_size"]
    state = model.state_dict()
    for i in (1, 2):
        for e in range(6):
            name = f"model.layers.{i}.mlp.experts"
            assert torch.equal(state[f"{name}.gate_up_proj"][e, :m], w[f"{name}.{e}.gate_proj.weight"])
            assert torch.equal(state[f"{name}.gate_up_proj"][e, m:], w[f"{name}.{e}.up_proj.weight"])
            assert torch.equal(state[f"{name}.down_proj"][e], w[f"{name}.{e}.down_proj.weight"])
    assert all(torch.equal(v, state[k]) for k, v in w.items() if ".experts." not in k)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(w)
        assert all(torch.equal(file.get_tensor(k), v) for k, v in w.items())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "deepseek" and "auto_map" not in saved
    assert all(saved[k] == CONFIG[k] for k in ("first_k_dense_replace", "moe_layer_freq", "n_shared_experts", "norm_topk_prob"))


def test_the_tokenizer_is_the_files_own(checkpoint):
    """The hub's tokenizer_config.json names Llama's class, of another pre-tokenizer than the byte-level tokenizer.json."""
    text = "does ice float? größer"
    assert bm.load_model(checkpoint)[1].encode(text, add_special_tokens=False) == Tokenizer.from_file(
        str(checkpoint / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_the_posterior_and_the_routers(model):
    assert list(expert_layers(model)) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    batch = tiny_batch(3)
    for item in single_items(batch):
        (J, f), (expected, f_expected) = captured_jacobians(model, item), autograd_jacobians(model, item)
        torch.testing.assert_close(f, f_expected, rtol=1e-10, atol=1e-10)
        assert expected.abs().max() > 1e-3 and (J - expected).abs().max() <= 1e-10 * expected.abs().max()
    with torch.no_grad():
        plain = bm.option_logits(model, batch)
        for method in FAMILIES:
            with bm.attach_routers(model, method, num_samples=3) as routers:
                routers.noise_scale = 0.0
                assert torch.equal(bm.option_logits(model, batch), plain)
                assert routers.rules[0].link == "softmax" and not routers.rules[0].normalised


@pytest.mark.parametrize("change", [{"norm_topk_prob": True}, {"scoring_func": "sigmoid"}, {"n_shared_experts": None}])
def test_a_variant_that_the_blocks_do_not_compute_is_refused(change):
    keys = {k: v for k, v in CONFIG.items() if k not in ("model_type", "torch_dtype")} | change
    with pytest.raises(ValueError, match="norm_topk_prob=false"):
        DeepseekConfig(**keys)


def test_which_layers_are_sparse():
    keys = {k: v for k, v in CONFIG.items() if k not in ("model_type", "torch_dtype")}
    kinds = DeepseekConfig(**keys | {"num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2}).mlp_layer_types
    assert kinds == ["dense", "dense", "sparse", "dense", "sparse", "dense"]
