"""Checkpoints in the layouts the hub has them in, tiny: every weight in its place, and each MoE block against a computation on the
original tensors; and what load_model says and does about devices, revisions, quantisation and files that are not there."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model, write_checkpoint
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

import bmoe_utils as bm
from bmoe_utils.models import checkpoints, loading
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits

E, K, D, F = 4, 2, 16, 8  # experts, experts per token, hidden width, expert width
COMMON = {"vocab_size": 300, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
          "num_experts_per_tok": K, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 0,
          "eos_token_id": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
          "transformers_version": "4.40.0", "use_cache": True}
# As in the hub's config.json of the models named, made small.
CONFIGS = {
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1, "intermediate_size": 24,
        "max_window_layers": 21, "moe_intermediate_size": F, "norm_topk_prob": False, "num_experts": E,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 12, "sliding_window": 32, "use_sliding_window": False},
    "ibm-granite/granite-3.1-3b-a800m-instruct": {
        "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_bias": False,
        "attention_multiplier": 0.2, "embedding_multiplier": 12.0, "intermediate_size": F, "logits_scaling": 6.0, "num_local_experts": E,
        "output_router_logits": False, "residual_multiplier": 0.22, "rope_scaling": None, "router_aux_loss_coef": 0.001},
    "allenai/OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
        "intermediate_size": F, "norm_topk_prob": False, "num_experts": E, "router_aux_loss_coef": 0.01, "rope_scaling": None},
    "Qwen/Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 8, "intermediate_size": 24, "max_window_layers": 2, "mlp_only_layers": [], "moe_intermediate_size": F,
        "norm_topk_prob": True, "num_experts": E, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False},
    "mistralai/Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": F, "num_local_experts": E,
        "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None},
    "openai/gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": K,
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 32, "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": E, "rope_scaling": None, "sliding_window": 32, "swiglu_limit": 7.0, "torch_dtype": "bfloat16",
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                           "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}},
    "deepseek-ai/DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 1, "hidden_size": 256,
        "intermediate_size": 128, "kv_lora_rank": 128, "moe_intermediate_size": 128, "moe_layer_freq": 1, "n_group": 2,
        "n_routed_experts": E, "n_shared_experts": 1, "norm_topk_prob": True, "q_lora_rank": 128, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 128, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 2,
        "topk_method": "noaux_tc", "v_head_dim": 64, "torch_dtype": "bfloat16",
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                "weight_block_size": [128, 128]}},
}
NAMES = list(CONFIGS)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


class Draws:
    """Random tensors, as the checkpoint stores them (``stored``) and as the numbers they are (``meant``, float64)."""

    def __init__(self):
        self.generator, self.stored, self.meant = torch.Generator().manual_seed(0), {}, {}

    def plain(self, name, *shape, scale=0.5, shift=0.0):
        x = shift + scale * torch.randn(*shape, generator=self.generator)
        self.stored[name], self.meant[name] = x, x.double()

    def mxfp4(self, name, *shape):
        """``name_blocks``: two 4-bit floats a byte, the low one first, 32 to a block; ``name_scales``: a power of two a block."""
        codes = torch.randint(16, shape, generator=self.generator).unflatten(-1, (-1, 32))
        scales = torch.randint(124, 127, codes.shape[:-1], generator=self.generator)
        self.stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        self.stored[f"{name}_scales"] = scales.to(torch.uint8)
        self.meant[name] = (FP4[codes] * 2.0 ** (scales - 127)[..., None]).flatten(-2)

    def fp8(self, name, rows, columns):
        """8-bit floats and, under ``name_scale_inv``, a factor for every 128 x 128 of them."""
        x = torch.randn(rows, columns, generator=self.generator).to(torch.float8_e4m3fn)
        scale = 0.02 + 0.1 * torch.rand(rows // 128, columns // 128, generator=self.generator)
        self.stored[name], self.stored[f"{name}_scale_inv"] = x, scale
        self.meant[name] = x.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)


def moe_tensors(model, draws, block):
    """One MoE block's tensors under the hub's names, and which of the loaded ones they are together: name -> tensor."""
    m = draws.meant
    stack = lambda pattern: torch.stack([m[pattern.format(e)] for e in range(E)])  # noqa: E731
    if model == "ibm-granite/granite-3.1-3b-a800m-instruct":
        draws.plain(f"{block}.input_linear.weight", E, 2 * F, D)
        draws.plain(f"{block}.output_linear.weight", E, D, F)
        draws.plain(f"{block}.router.layer.weight", E, D)
        return {f"{block}.experts.gate_up_proj": m[f"{block}.input_linear.weight"],
                f"{block}.experts.down_proj": m[f"{block}.output_linear.weight"],
                f"{block}.router.weight": m[f"{block}.router.layer.weight"]}
    if model == "openai/gpt-oss-20b":
        draws.mxfp4(f"{block}.experts.gate_up_proj", E, 64, 32)
        draws.mxfp4(f"{block}.experts.down_proj", E, 32, 32)
        for name, *shape in (("experts.gate_up_proj_bias", E, 64), ("experts.down_proj_bias", E, 32), ("router.weight", E, 32),
                             ("router.bias", E)):
            draws.plain(f"{block}.{name}", *shape)
        return {k: v.mT if k.endswith("_proj") else v for k, v in m.items() if k.startswith(block)}
    gate, down, up = ("w1", "w2", "w3") if "Mixtral" in model else ("gate_proj", "down_proj", "up_proj")
    d, f, draw = (256, 128, draws.fp8) if "DeepSeek" in model else (D, F, draws.plain)
    for e in range(E):
        for part, shape in ((gate, (f, d)), (up, (f, d)), (down, (d, f))):
            draw(f"{block}.experts.{e}.{part}.weight", *shape)
    draws.plain(f"{block}.gate.weight", E, d, scale=0.5 if d == D else 0.1)
    ours = block.replace("block_sparse_moe", "mlp")
    return {f"{ours}.experts.gate_up_proj": torch.cat([stack(f"{block}.experts.{{}}.{p}.weight") for p in (gate, up)], 1),
            f"{ours}.experts.down_proj": stack(f"{block}.experts.{{}}.{down}.weight"),
            f"{ours}.gate.weight": m[f"{block}.gate.weight"]}


def hub_checkpoint(model, folder):
    """Writes it; returns the draws and every weight of the loaded model as it should be, by its name there."""
    config = COMMON | CONFIGS[model]
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    shapes = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain)).state_dict()
    block = "block_sparse_moe" if model.split("/")[0] in ("ibm-granite", "mistralai") else "mlp"
    draws, expected = Draws(), {}
    for i in range(config.get("first_k_dense_replace", 0), 2):
        expected |= moe_tensors(model, draws, f"model.layers.{i}.{block}")
    for name, like in shapes.items():  # the rest has the same names on the hub
        if name in expected:
            assert expected[name].shape == like.shape
        elif config.get("quantization_config", {}).get("quant_method") == "fp8" and name.endswith("proj.weight"):
            draws.fp8(name, *like.shape)
        else:
            draws.plain(name, *like.shape, scale=0.1 if config["hidden_size"] > 100 else 0.5, shift=float("norm" in name))
        expected.setdefault(name, draws.meant.get(name))
    write_checkpoint(folder, config, draws.stored)
    return draws, expected


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    draws, expected = hub_checkpoint(request.param, folder)
    return request.param, folder, draws, expected, bm.load_model(folder, dtype=torch.float32)[0]


def test_every_weight_is_in_its_place(loaded):
    name, _, _, expected, model = loaded
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key].float()), key


def by_hand(name, w, block, x):
    """The MoE block's output ``[N, d]`` for inputs ``x [N, d]``, from the original tensors alone."""
    config = COMMON | CONFIGS[name]
    out = torch.zeros_like(x)
    if name == "openai/gpt-oss-20b":
        logits = x @ w[f"{block}.router.weight"].T + w[f"{block}.router.bias"]
        for n, row in enumerate(logits):
            top = row.topk(K)
            for e, weight in zip(top.indices.tolist(), top.values.softmax(0)):
                h = w[f"{block}.experts.gate_up_proj"][e] @ x[n] + w[f"{block}.experts.gate_up_proj_bias"][e]
                gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
                a = (up + 1) * gate * (1.702 * gate).sigmoid()
                out[n] += weight * (w[f"{block}.experts.down_proj"][e] @ a + w[f"{block}.experts.down_proj_bias"][e])
        return out

    def ffn(x, name, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = (w[f"{name}.{p}.weight"] for p in names)
        return down @ (silu(gate @ x) * (up @ x))

    for n, u in enumerate(x):
        if config["model_type"] == "granitemoe":
            top = (w[f"{block}.router.layer.weight"] @ u).topk(K)
            for e, weight in zip(top.indices.tolist(), top.values.softmax(0)):
                h = w[f"{block}.input_linear.weight"][e] @ u
                out[n] += weight * (w[f"{block}.output_linear.weight"][e] @ (silu(h[:F]) * h[F:]))
            continue
        logits = w[f"{block}.gate.weight"] @ u
        if config["model_type"] == "deepseek_v3":
            scores, bias = logits.sigmoid(), w[f"{block}.gate.e_score_correction_bias"]
            chosen = (scores + bias).topk(K).indices  # both of two groups are allowed
            weights = 2.5 * scores[chosen] / scores[chosen].sum()
            out[n] += ffn(u, f"{block}.shared_experts")
        else:
            weights, chosen = logits.softmax(0).topk(K)
            if config["model_type"] == "mixtral" or config["norm_topk_prob"]:
                weights = weights / weights.sum()
        if config["model_type"] == "qwen2_moe":
            out[n] += (w[f"{block}.shared_expert_gate.weight"] @ u).sigmoid() * ffn(u, f"{block}.shared_expert")
        names = ("w1", "w3", "w2") if config["model_type"] == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e, weight in zip(chosen.tolist(), weights):
            out[n] += weight * ffn(u, f"{block}.experts.{e}", names)
    return out


def test_every_moe_block_computes_what_its_original_tensors_say(loaded):
    name, _, draws, _, model = loaded
    for path in expert_layers(model):
        block, seen = path.rpartition(".")[0], []
        with model.get_submodule(block).register_forward_hook(lambda _, x, y: seen.append((x[0], y))), torch.no_grad():
            option_logits(model, tiny_batch(2, length=5))
        x, y = (t[0] if isinstance(t, tuple) else t for t in seen[0])
        original = block.replace("mlp", "block_sparse_moe") if "Mixtral" in name else block
        expected = by_hand(name, draws.meant, original, x.double().flatten(0, 1))
        assert expected.abs().max() > 0.1
        # float32 against float64: sums of a few hundred products
        assert (y.double().flatten(0, 1) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_logits_are_those_of_the_weights_put_in_by_hand(loaded):
    name, _, _, expected, model = loaded
    plain = {k: v for k, v in (COMMON | CONFIGS[name]).items() if k != "quantization_config"}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.float32).eval()
    other.load_state_dict({k: v.float() for k, v in expected.items()})
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(option_logits(model, batch), option_logits(other, batch))


def test_what_is_saved_has_the_original_names_and_loads_again(loaded, tmp_path):
    name, folder, draws, expected, model = loaded
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    if "quantization_config" not in CONFIGS[name]:  # those are saved unpacked
        assert saved.keys() == draws.stored.keys() and all(torch.equal(v, draws.stored[k]) for k, v in saved.items())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    again = bm.load_model(tmp_path)[0].state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(v, expected[k].float()) for k, v in again.items())


def test_the_posterior_sits_on_every_loaded_layout(loaded):
    *_, model = loaded
    batch = tiny_batch(4)
    la = bm.ExpertLaplace(model).fit([batch], progress=False)
    assert all(float(p.spectrum(e).sum()) > 0 for p in la.posteriors[:1] for e in range(E) if la.tokens_per_expert[0, e])
    assert la.predictive_logits(batch)[1].isfinite().all()


# ---- quantised ------------------------------------------------------------------------------------------------------
def test_experts_that_no_gradient_passes_are_refused(tmp_path, monkeypatch):
    hub_checkpoint("allenai/OLMoE-1B-7B-0924", tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def packing(*args, **kwargs):
        model, read = load(*args, **kwargs)
        model.is_quantized = True
        for module in expert_layers(model).values():
            module.down_proj = torch.nn.Parameter(module.down_proj.to(torch.int8), False)
        return model, read

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", packing)
    with pytest.raises(ValueError, match=r"experts as torch.int8, which no gradient passes.*dequantize=True"):
        bm.load_model(tmp_path)

    def replacing(*args, **kwargs):
        model, read = load(*args, **kwargs)
        model.is_quantized = True
        for layer in model.model.layers:
            layer.mlp.experts = torch.nn.Identity()
        return model, read

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", replacing)
    with pytest.raises(ValueError, match="modules of the quantisation's own"):
        bm.load_model(tmp_path)


def test_the_callers_quantisation_is_handed_on(tmp_path, monkeypatch):
    hub_checkpoint("allenai/OLMoE-1B-7B-0924", tmp_path)
    load, seen = AutoModelForCausalLM.from_pretrained, []

    def noting(*args, quantization_config=None, **kwargs):
        seen.append(quantization_config)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    config = BitsAndBytesConfig(load_in_8bit=True)
    bm.load_model(tmp_path, quantization_config=config)
    bm.load_model(tmp_path)
    assert seen == [config, None]


def test_a_packed_checkpoints_own_settings_are_kept_and_only_the_unpacking_added():
    """On a CPU transformers unpacks them anyway; on a GPU it does because of this."""
    for name, config in CONFIGS.items():
        if packed := config.get("quantization_config"):
            asked = loading.UNPACKING[packed["quant_method"]](dequantize=True)
            merged = AutoHfQuantizer.merge_quantization_configs(dict(packed), asked)
            assert merged.dequantize and merged.quant_method == packed["quant_method"], name
            assert getattr(merged, "modules_to_not_convert", None) == packed.get("modules_to_not_convert")


# ---- devices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["qwen2_moe", "minimax_m2", "afmoe"])
def test_an_offloaded_model_gives_what_a_whole_one_does(architecture, tmp_path):
    """Layer 0 is on disk between its passes. minimax_m2 and afmoe hand their router a buffer and a parameter of the block."""
    from architectures import build
    whole = tiny_model(dtype=torch.float32) if architecture == "qwen2_moe" else build(architecture).float()
    write_checkpoint(tmp_path / "model", {}, {}, shards=0)  # for its tokenizer
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    whole.save_pretrained(tmp_path / "model")
    parts = {n: "cpu" for n, _ in whole.named_children()} | {f"model.{n}": "cpu" for n, _ in whole.model.named_children()}
    places = {k: v for k, v in parts.items() if k not in ("model", "model.layers")}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model, _ = bm.load_model(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert [m.down_proj.is_meta for m in expert_layers(model).values()] == [True, False]
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    batch, results = tiny_batch(3), []
    for m in (whole, model):
        with torch.no_grad():
            f = option_logits(m, batch)
        la = bm.ExpertLaplace(m).fit([batch], progress=False)
        cov = la.predictive_logits(batch)[1]
        la.save(tmp_path / "posterior")
        assert torch.equal(bm.ExpertLaplace.load(tmp_path / "posterior", m).predictive_logits(batch)[1], cov)
        with bm.attach_routers(m, "mfvr", num_samples=3) as routers:
            results.append((f, cov, la.log_marginal_likelihood(), routers(batch)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert model_fingerprint(model) == model_fingerprint(whole)
    assert expert_layers(model)["model.layers.0.mlp.experts"].down_proj.is_meta


def test_what_does_not_fit_is_offloaded_by_itself(tmp_path):
    folder = tmp_path / "olmoe"
    hub_checkpoint("allenai/OLMoE-1B-7B-0924", folder)
    batch = tiny_batch()
    whole, _ = bm.load_model(folder, device_map="auto")
    part, _ = bm.load_model(folder, device_map="auto", max_memory={"cpu": 50_000}, offload_folder=tmp_path / "off")
    assert not any(p.is_meta for p in whole.parameters()) and any(p.is_meta for p in part.parameters())
    with torch.no_grad():
        torch.testing.assert_close(option_logits(part, batch), option_logits(whole, batch), rtol=1e-4, atol=1e-5)


# ---- files ----------------------------------------------------------------------------------------------------------
def one_line(error):
    assert "\n" not in str(error.value)
    return True


@pytest.fixture
def checkpoint(tmp_path):
    hub_checkpoint("allenai/OLMoE-1B-7B-0924", tmp_path / "olmoe")
    return tmp_path / "olmoe"


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """A message is worth most before the work: loading would fail these tests."""
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, **k: pytest.fail("loading began"))


@pytest.mark.parametrize("file, said", [("config.json", "config.json"),
                                        ("model-00002-of-00002.safetensors", "model-00002-of-00002"),
                                        ("model.safetensors.index.json", "no model.safetensors")])
def test_a_folder_that_is_not_whole_is_named_before_it_is_loaded(checkpoint, file, said, nothing_is_loaded):
    (checkpoint / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a whole checkpoint.*{said}") as error:
        bm.load_model(checkpoint)
    assert one_line(error)


def test_a_folder_without_a_tokenizer(checkpoint, nothing_is_loaded):
    for name in checkpoints.TOKENIZERS:
        (checkpoint / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        bm.load_model(checkpoint)


def test_a_folder_has_no_revisions(checkpoint, nothing_is_loaded):
    with pytest.raises(ValueError, match="revision='v1'.*is a folder"):
        bm.load_model(checkpoint, revision="v1")


def test_no_network_and_no_cache_says_how_to_get_it(tmp_path, monkeypatch, nothing_is_loaded):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download Qwen/Qwen1.5-MoE-A2.7B \(huggingface-cli download") as error:
        bm.load_model("Qwen/Qwen1.5-MoE-A2.7B")
    assert one_line(error)
    with pytest.raises(FileNotFoundError, match="hf download a/b --revision v1"):
        bm.load_model("a/b", revision="v1")
    with pytest.raises(FileNotFoundError, match="neither a folder nor the name of a model"):
        bm.load_model(tmp_path / "no" / "such" / "folder")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_hubs_cache_serves_offline_and_the_commit_is_recorded(checkpoint, tmp_path, monkeypatch):
    repo = tmp_path / "cache" / "models--some--olmoe"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots").mkdir()
    checkpoint.rename(repo / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for revision in (None, "main", COMMIT):
        model, _ = bm.load_model("some/olmoe", revision=revision)
        assert model.config._commit_hash == COMMIT and COMMIT not in model.config.to_json_string()
    (repo / "snapshots" / COMMIT / "model-00001-of-00002.safetensors").unlink()  # a download cut short
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loading began"))
    with pytest.raises(FileNotFoundError, match="has not model-00001-of-00002.safetensors.*hf download some/olmoe"):
        bm.load_model("some/olmoe")


def test_code_of_the_checkpoint_is_not_run_unless_asked_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}))
    (checkpoint / "code.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        bm.load_model(checkpoint)
