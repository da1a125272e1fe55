"""Which layers LoRA adapts, over every MoE causal LM of transformers and the mixed kinds of layers
they can have; and that one set of adapters never goes over another."""

import re
import warnings

import pytest
import torch
from architectures import FAILS, batch_for, build, found
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from torch import nn
from transformers import set_seed

import bmoe_utils as bm
from bmoe_utils.baselines.lora_laplace import lora_linears
from bmoe_utils.models import training
from bmoe_utils.models.lora_targets import adapters, lora_targets

PROTOCOL = ["k_proj", "q_proj", "v_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
TWO = {"layer_types": ["linear_attention", "full_attention"]}
# What the tiny configs of the architectures leave out: layers of both kinds, queries without a low
# rank, shared keys and values.
VARIANTS = {
    "bailing_hybrid+latent": TWO,
    "deepseek_v2+lite": {"q_lora_rank": None},
    "gemma4_text+shared": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
    "granitemoehybrid+attention": TWO,
    "jamba+attention": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear+latent": TWO,
    "qwen3_5_moe_text+attention": TWO,
    "qwen3_next+attention": TWO,
    "qwen4_exp_text+attention": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 1,
    },
}
# By the last part of the name, where it is not the protocol's in all layers.
EXPECTED = {
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "deepseek_v32": LATENT, "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "deepseek_v2+lite": ["kv_a_proj_with_mqa", "kv_b_proj", "q_proj"],
    "granitemoehybrid": ["in_proj"], "granitemoehybrid+attention": ["in_proj", *PROTOCOL],
    "jamba": ["in_proj", "x_proj"], "jamba+attention": ["in_proj", *PROTOCOL, "x_proj"],
    "kimi_linear+latent": sorted(PROTOCOL + LATENT),
    "bailing_hybrid+latent": ["g_proj", "k_proj", *LATENT[:2], "q_proj", "v_proj"],
    "lfm2_moe": ["in_proj", *PROTOCOL], "nemotron_h": ["in_proj", *PROTOCOL],
    "minimax": ["k_proj", "output_gate", "q_proj", "qkv_proj", "v_proj"],
    "qwen3_next": ["in_proj_ba", "in_proj_qkvz"],
    "qwen3_next+attention": ["in_proj_ba", "in_proj_qkvz", *PROTOCOL],
    "qwen3_moe": PROTOCOL, "gpt_oss": PROTOCOL, "mixtral": PROTOCOL, "granitemoe": PROTOCOL,
}  # fmt: skip
KINDS = [k for k in found()[0] if FAILS.get(k, (None,))[0] is None]


def mixes_tokens(module: nn.Module) -> bool:
    """By its class's name, where the targets are found by the attribute's."""
    return re.search(r"Attention|Mamba|DeltaNet|ShortConv$", type(module).__name__) is not None


@pytest.mark.parametrize("case", [*KINDS, *VARIANTS])
def test_every_layer_with_attention_is_adapted_and_nothing_else_is_trained(case):
    kind = case.partition("+")[0]
    model, batch = build(kind, **VARIANTS.get(case, {})), batch_for(kind)
    if (
        kind == "zaya"
    ):  # its build leaves a scale of the keys at zero, where no gradient reaches q and k
        for layer in model.model.layers:
            nn.init.ones_(layer.self_attn.qk_norm.temp)
    # both before any adapter wraps a layer
    attending = {
        n.split(".")[2]
        for n, m in model.named_modules()
        if n.startswith("model.layers.") and mixes_tokens(m)
    }
    layers = {str(i) for i in range(len(model.model.layers))}
    with torch.no_grad():
        expected = bm.option_logits(model, batch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = training.add_lora(model, rank=2)
    said = [str(w.message) for w in said if "adapter" in str(w.message)]
    with torch.no_grad():  # B = 0
        assert torch.equal(bm.option_logits(adapted, batch), expected)

    names = [
        n.removeprefix("base_model.model.").removesuffix(".default") for n in lora_linears(adapted)
    ]
    assert {n.split(".")[2] for n in names} == attending
    assert said == ([] if attending == layers else [said[0]])
    for layer in layers - attending:
        assert re.search(rf"model\.layers\.{layer}(,|$)", said[0])
    last = sorted({n.rpartition(".")[2] for n in names})
    assert last == EXPECTED.get(case, last) and not {"o_proj", "out_proj"} & set(last)
    for n in names:  # the protocol's alone, wherever a mixer has all three
        mixer, _, own = n.rpartition(".")
        if all(hasattr(model.get_submodule(mixer), q) for q in PROTOCOL):
            assert own in PROTOCOL

    before = {k: v.detach().clone() for k, v in adapted.named_parameters()}
    training.fine_tune(adapted, [batch], epochs=2, lr=1e-2, progress=False)
    changed = {k for k, v in adapted.named_parameters() if not torch.equal(v, before[k])}
    assert changed == set(training.adapted_weights(adapted)) and len(changed) == 2 * len(names)


def test_where_q_k_and_v_exist_the_adapters_are_those_of_these_names_bit_for_bit():
    by_name = LoraConfig(
        r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj"]
    )
    plain = tiny_model(dtype=torch.float32)
    set_seed(3)
    expected = get_peft_model(plain, by_name)
    model = training.add_lora(tiny_model(dtype=torch.float32), seed=3)
    state = expected.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (
        sorted(model.peft_config["default"].target_modules) == PROTOCOL
    )  # what a saved adapter says


def test_whole_names_where_the_ends_would_select_more():
    model = build("deepseek_v4")  # its attention's compressor has a kv_proj too
    targets = lora_targets(model)
    assert len(targets) == 6 and all(
        t.startswith("model.layers.") and "compressor" not in t for t in targets
    )
    assert {
        n.removeprefix("base_model.model.").removesuffix(".default")
        for n in lora_linears(training.add_lora(model))
    } == set(targets)


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["o_proj"], {"o_proj"}),
        (r".*layers\.\d\.self_attn\.[qo]_proj", {"q_proj", "o_proj"}),
        (
            "all-linear",
            {
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "shared_expert_gate",
            },
        ),
    ],
)
def test_other_targets_are_taken_as_peft_takes_them(targets, expected):
    names = lora_linears(training.add_lora(tiny_model(), target_modules=targets))
    assert {n.split(".")[-2] for n in names} == expected


def test_layers_that_the_callers_targets_leave_out_are_named():
    with pytest.warns(
        UserWarning, match=r"1 decoder layers have no LoRA adapter.*: model\.layers\.1$"
    ):
        training.add_lora(tiny_model(), target_modules=["layers.0.self_attn.q_proj"])


def test_no_attention_to_be_found_says_what_to_do():
    model = tiny_model()
    for layer in model.model.layers:
        layer.inside, layer.self_attn = layer.self_attn, None
    with pytest.raises(
        ValueError, match="no attention was found in Qwen2MoeForCausalLM's.*target_modules="
    ):
        training.add_lora(model)
    assert adapters(model) == []


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapters_of_a_half_precision_model_are_float32(dtype, kind):
    model, batch = build(kind).to(dtype), batch_for(kind)
    with torch.no_grad():
        expected = bm.option_logits(model, batch)
    model = training.add_lora(model)
    with torch.no_grad():
        assert torch.equal(bm.option_logits(model, batch), expected)
    training.fine_tune(model, [batch], epochs=2, lr=1e-3, progress=False)
    matrices = training.adapted_weights(model)
    assert {p.dtype for p in matrices.values()} == {torch.float32}
    assert all(p.isfinite().all() and p.any() for p in matrices.values())
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {dtype}


def test_an_offloaded_model_is_adapted_too(tmp_path):
    from accelerate import dispatch_model

    whole, model, batch = (
        tiny_model(dtype=torch.float32),
        tiny_model(dtype=torch.float32),
        tiny_batch(),
    )
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    dispatch_model(
        model, places | {"model.layers.0": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    whole, model = training.add_lora(whole), training.add_lora(model)
    matrices = training.adapted_weights(model)
    assert (
        not any(p.is_meta for p in matrices.values())
        and model.model.model.layers[0].self_attn.q_proj.weight.is_meta
    )
    assert all(p.abs().max() > 0 for k, p in matrices.items() if "lora_A" in k)
    with torch.no_grad():
        for k, p in training.adapted_weights(whole).items():
            matrices[k].copy_(p.normal_())
        a, b = (bm.option_logits(m, batch) for m in (whole, model))
    torch.testing.assert_close(a, b)


# ---- a model that has adapters
# --------------------------------------------------------------------------------------
def wrapped():
    return training.add_lora(tiny_model())


def injected():
    model = tiny_model()
    model.add_adapter(
        LoraConfig(target_modules=["q_proj"]), adapter_name="mine"
    )  # transformers' own way
    return model


def inside():
    return wrapped().base_model.model


def prompts():
    return get_peft_model(
        tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


@pytest.mark.parametrize(
    "make, name",
    [(wrapped, "default"), (injected, "mine"), (inside, "default"), (prompts, "default")],
)
def test_a_second_set_of_adapters_is_refused_and_the_first_untouched(make, name):
    model = make()
    with torch.no_grad():
        for k, p in model.named_parameters():
            if "lora_B" in k:
                p.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"already has an adapter \('{name}'\).*merge_and_unload"
    ) as error:
        training.add_lora(model, seed=1)
    assert "\n" not in str(error.value)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in after.items()
    )


def test_a_merged_model_takes_new_adapters():
    assert adapters(training.add_lora(wrapped().merge_and_unload())) == ["default"]


def test_what_is_trained_and_read_is_the_active_adapter_s():
    model = wrapped()
    one = set(training.adapted_weights(model))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert set(training.adapted_weights(model)) == one
    model.set_adapter("other")
    other = training.adapted_weights(model)
    assert len(other) == 4 and all(".other." in k for k in other)
    assert {f"{k.rpartition('.lora_')[0]}.other" for k in other} == set(lora_linears(model))
