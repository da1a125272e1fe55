"""Every MoE causal LM of the installed transformers, found by itself and built tiny; and the table of what works on each.

    python tests/architectures.py        writes data/architectures.md
"""

import dataclasses
import re
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from tiny import VOCAB, autograd_jacobians, captured_jacobians, single_items, tiny_batch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import bmoe_utils as bm
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers.attach import Routers, attach_routers
from bmoe_utils.routers.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "data" / "architectures.md"
MODELS = Path(transformers.__file__).parent / "models"

# What a config's fields are set to, where it has them: two layers, four experts, every one of its parts a few numbers wide.
SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    kv_channels=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    layer_types=None, sliding_window=4, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=5,
    # feed-forward widths
    intermediate_size=12, moe_intermediate_size=6, shared_expert_intermediate_size=12, shared_intermediate_size=12,
    dense_intermediate_size=12, intermediate_size_mlp=12, ffn_hidden_size=12, expert_ffn_hidden_size=6,
    shared_experts_intermediate_size=12, moe_shared_expert_intermediate_size=12, router_hidden_size=8,
    # experts
    num_experts=4, n_routed_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2,
    top_k_experts=2, n_group=2, topk_group=1, n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    zero_expert_num=2, enable_moe_block=True, is_moe=True,
    # an expert layer in every block
    first_k_dense_replace=0, num_dense_layers=0, mlp_layer_types=["sparse", "sparse"], mlp_only_layers=[],
    moe_layer_start_index=0, moe_layer_end_index=-1, expert_layer_period=1, expert_layer_offset=0,
    # latent, indexed and linear attention, state spaces
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, o_lora_rank=4, o_groups=2,
    index_head_dim=8, index_n_heads=2, index_topk=64, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_head_dim=8, linear_num_heads=2, mamba_d_state=4, mamba_n_heads=2, mamba_d_head=16,
    mamba_n_groups=1, mamba_dt_rank=2, mamba_chunk_size=4, ssm_state_size=4, mamba_num_heads=2, mamba_head_dim=16, n_groups=1,
    chunk_size=4,
)
# Where that is not a valid config of the architecture, or leaves out what makes it one.
OVERRIDES = {
    "dbrx": dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=64,
                 attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
                 ffn_config=dict(ffn_hidden_size=6, moe_num_experts=4, moe_top_k=2)),
    "deepseek_v4": dict(mlp_layer_types=["moe", "moe"]),
    "lfm2_moe": dict(layer_types=["full_attention", "conv"]),
    "longcat_flash": dict(head_dim=4),
    "mimo_v2_flash": dict(head_dim=16, num_key_value_heads=1, rope_parameters={  # its sliding layers have twice the heads
        kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        for kind in ("full_attention", "sliding_attention")}),
    "nemotron_h": dict(num_hidden_layers=4, layers_block_type=["full_attention", "moe", "linear_attention", "moe"]),
    "phimoe": dict(router_jitter_noise=0.4),  # at its default of 0 every weight is 1
    "zaya": dict(num_experts_per_tok=1),
}
# Sums its experts' outputs in float32 whatever the model's type: float32's rounding is all that can be asked for.
FLOAT32_SUMS = {"beam", "inkling2_text", "nemotron_h"}
# Parts that are in float32 whatever the model's type.
FLOAT32_PARTS = {"inkling2_text": r"mlp\.gate$"}
# Padding in float64: its eager attention takes float64's lowest number, the mask, to float32, where it is -inf and then nan.
UNPADDED = {"granitemoe_swa"}

# A convolution over tokens follows the experts, in the last layer too: the answer depends on the positions before it.
MIXED_AFTERWARDS = {"inkling_text", "inkling2_text"}

OUTSIDE = "its experts are outside transformers' experts registry"
# What does not work, as (experts, routers): the reason of each, or None where it works. Tested to fail still.
FAILS = {
    "dbrx": (f"{OUTSIDE}: one 2-D weight for all, cut up in the forward pass",) * 2,
    "doge": (f"{OUTSIDE}: every expert is one row of an embedding (f = 1), and the routing mixes tokens",) * 2,
    "jetmoe": (f"{OUTSIDE}: two modules a block, one for each linear layer of all experts",) * 2,
    "llama4_text": (f"{OUTSIDE}: every expert runs on every token, weighted at its input",) * 2,
    "longcat_flash": (f"{OUTSIDE}: some of them are the identity and have no weight",) * 2,
    "inkling_text": (None, "the router weighs the always-on experts too, in a fourth output"),
    "zaya": (None, "the router is a network with a state that runs through the layers, not a linear map"),
}
# Works with inference="whole-model" only: averaged scores need a score of the logit alone, by softmax or sigmoid.
WHOLE_MODEL = {
    "deepseek_v4": "scores by sqrt(softplus); layers routed by a table of the token have no router to replace",
    "gemma4_text": "weighs each expert by a factor of its own",
    "phimoe": "weighs by a masked softmax an expert at a time",
}


@lru_cache
def found() -> tuple[tuple[str, ...], dict[str, str]]:
    """The model types of transformers' causal LMs whose config speaks of experts; and the ones that only wrap one of these
    as their text model, with it."""
    speaks = re.compile(r"^ +\w*(expert|moe)\w*:", re.MULTILINE)

    def of_experts(config) -> bool:
        return any(re.search("expert|moe", f.name) for f in dataclasses.fields(config))

    types, wrappers = [], {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = MODELS / model_type_to_module_name(kind)
        if not any(speaks.search(p.read_text(encoding="utf-8")) for p in folder.glob("configuration_*.py")):
            continue  # importing every config of transformers would take seconds
        config = CONFIG_MAPPING[kind]
        parts = [c for c in getattr(config, "sub_configs", {}).values() if dataclasses.is_dataclass(c)]
        text = [c.model_type for c in parts if of_experts(c) and c.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
        if text:
            wrappers[kind] = text[0]
        elif of_experts(config) or any(of_experts(c) for c in parts):
            types.append(kind)
    return tuple(sorted(types)), dict(sorted(wrappers.items()))


def build(kind: str, **overrides) -> PreTrainedModel:
    """A tiny random model of the type in float64, its weights large enough that every nonlinearity bends; ``overrides`` are of its
    config."""
    config = CONFIG_MAPPING[kind]
    names = {f.name for f in dataclasses.fields(config)} - set(config.attribute_map)
    config = config(**{k: v for k, v in SMALL.items() if k in names} | OVERRIDES.get(kind, {}) | overrides)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.5)
        for name, b in model.named_buffers():
            if name.endswith("bias"):  # the routers' corrections, which start at zero and would not be missed
                b.normal_(0, 0.2)
    for name, module in model.named_modules():
        if kind in FLOAT32_PARTS and re.search(FLOAT32_PARTS[kind], name):
            module.float()
    model.set_experts_implementation("eager")  # the other stock implementations take no float64
    return model


def batch_for(kind: str) -> dict[str, torch.Tensor]:
    return tiny_batch(3, ragged=kind not in UNPADDED)


def check_experts(kind: str, model: PreTrainedModel, folder: Path) -> None:
    """Exact Jacobians of every item and class, a fit and a prediction that leave the model alone, and files."""
    assert len(expert_layers(model)) == 2
    batch, before = batch_for(kind), model_fingerprint(model)
    implementation, rounding = model.get_experts_implementation(), 1e-5 if kind in FLOAT32_SUMS else 1e-10
    for item in single_items(batch):
        J, f = captured_jacobians(model, item)
        expected, f_expected = autograd_jacobians(model, item)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(f, f_expected, rtol=rounding, atol=rounding)
        assert (J - expected).abs().max() <= rounding * expected.abs().max()
    with torch.no_grad():
        f = option_logits(model, batch)
    la = bm.ExpertLaplace(model).fit([batch], progress=False)
    mean, cov = la.predictive_logits(batch)
    torch.testing.assert_close(mean, f, rtol=1e-5, atol=1e-6)
    assert cov.isfinite().all() and torch.linalg.eigvalsh(cov.double())[:, -1].min() > 0
    assert la.answer_only == ([] if kind in MIXED_AFTERWARDS else la.layers[-1:])
    assert model_fingerprint(model) == before and model.get_experts_implementation() == implementation
    la.save(folder)
    assert torch.equal(bm.ExpertLaplace.load(folder, model).predictive_logits(batch)[1], cov)
    la.answer_only = []  # every position computed: the same, but for the rounding of products of other shapes
    torch.testing.assert_close(la.predictive_logits(batch)[1], cov, rtol=1e-5, atol=1e-6 * float(cov.abs().max()))


def check_routers(kind: str, model: PreTrainedModel, folder: Path) -> None:
    """Every method attaches, is the deterministic router bit for bit without noise and something else with it, detaches,
    and comes back from its files."""
    batch, before = batch_for(kind), model_fingerprint(model)
    way = dict(inference="whole-model" if kind in WHOLE_MODEL else "inside", num_samples=3)
    with torch.no_grad():
        expected = option_logits(model, batch)
        for method, family in FAMILIES.items():
            hot = {"temperature": 5.0} if family.selects else {}  # few experts and tokens: little noise may select alike
            with attach_routers(model, method, **way, **hot) as routers:
                noisy = option_logits(model, batch)
                routers.noise_scale = 0.0
                assert torch.equal(option_logits(model, batch), expected), f"{method}: not the deterministic router without noise"
            assert noisy[batch["option_ids"] >= 0].isfinite().all(), f"{method}: not finite"
            assert torch.equal(noisy, expected) == (method in ("deterministic", "swag", "ensemble")), f"{method}: its noise"
        assert torch.equal(option_logits(model, batch), expected) and model_fingerprint(model) == before
    with attach_routers(model, "mfvr", **way) as routers:
        probs = routers(batch)
        routers.save(folder)
    with Routers.load(folder, model) as routers:
        assert torch.equal(routers(batch), probs)


CHECKS = {"experts": check_experts, "routers": check_routers}


def reason(kind: str, part: str) -> str | None:
    """Why the part is known to fail on the type; None where it should pass."""
    return FAILS.get(kind, (None, None))[list(CHECKS).index(part)]


def table() -> str:
    """The whole of data/architectures.md, from the lists above: a test holds each entry to what happens."""
    types, wrappers = found()
    passing = [k for k in types if k not in FAILS]
    lines = [
        "# Mixture-of-experts language models of transformers", "",
        f"Written by `python tests/architectures.py` for transformers {transformers.__version__}, which has {len(types)} such causal "
        f"LMs: {len(passing)} pass every check of `tests/test_architectures.py`, the others say why not.", "",
        "*Experts*: per-item, per-class Jacobians of every expert's second linear layer equal autograd's; fit, prediction and "
        "files work and leave the model bit for bit as it was. *Routers*: each of the "
        f"{len(FAMILIES)} methods attaches, is the model's own router bit for bit without noise, detaches, saves and loads.", "",
        "| model type | class | experts | routers | |", "| :-- | :-- | :-: | :-: | :-- |",
    ]
    for kind in types:
        experts, routers = FAILS.get(kind, (None, None))
        whole = f"routers: whole-model inference only, the rule {WHOLE_MODEL[kind]}" if kind in WHOLE_MODEL else ""
        note = experts or routers or whole
        marks = ["no" if r else "yes" for r in (experts, routers)]
        lines.append(f"| `{kind}` | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | {' | '.join(marks)} | {note} |")
    lines += ["", "The language models of these multimodal types are those above: "
              + ", ".join(f"`{k}` (`{v}`)" for k, v in wrappers.items()) + ".", "",
              "Beside them: DeepSeek-MoE-16B (`deepseek`), which transformers has no class for, is registered by `bmoe_utils/models/deepseek.py` "
              "and tested in `tests/models/test_deepseek.py`; experts that a checkpoint's own code keeps as modules of `nn.Linear` are "
              "captured by `bmoe_utils/models/unfused.py` and tested in `tests/models/test_unfused.py`."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(table(), encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)}: {len(found()[0])} architectures", file=sys.stderr)
