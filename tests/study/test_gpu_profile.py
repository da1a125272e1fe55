"""Every chapter under the profile of a GPU, in bfloat16, on small checkpoints of one's own: what a GPU user gets."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, Qwen2MoeConfig, set_seed

from bmoe_utils.__main__ import main
from bmoe_utils.data.tasks import learning_texts, load_task
from bmoe_utils.models.embedded import train_tokenizer

COMMON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2,
              max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
CONFIGS = {
    "qwen2_moe": lambda **size: Qwen2MoeConfig(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=32, **size),
    # latent attention, a dense first layer, groups of experts
    "deepseek_v2": lambda **size: DeepseekV2Config(
        n_routed_experts=4, moe_intermediate_size=16, n_shared_experts=1, intermediate_size=32, first_k_dense_replace=1, n_group=2,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, **size),
}  # fmt: skip
SMALL = {
    "seeds": [0], "train_size": 16, "epochs": 1, "batch_size": 8, "sizes": [8], "test_size": 12, "eval_batch": 12, "mc_samples": 8,
    "exact_fit": 6, "exact_items": 4, "dense_items": 4, "router_epochs": 1, "router_items": 12, "noise_items": 6, "members": 2,
    "router_validation": 8, "router_precisions": [0.1, 10.0], "router_passes": 2, "validation_passes": 2, "router_samples": 2,
    "gammas": [0.01, 0.05],
}  # fmt: skip


def checkpoint(folder, architecture):
    """A small random model in bfloat16 with a byte-level tokenizer, in the real layout."""
    texts, words = learning_texts("world", load_task("world")["train"], 2000)
    tokenizer = train_tokenizer([*texts, *[f" {w}" for w in words] * 100, *[f" {x}" for x in "ABCDEFGH"] * 1000], 800)
    set_seed(0)
    config = CONFIGS[architecture](vocab_size=len(tokenizer), **COMMON)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Of the second, those that between them run every method. All of it, by hand:
# CHAPTERS = {} and `pytest tests/study/test_gpu_profile.py`.
CHAPTERS = {"deepseek_v2": ["09", "11"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_every_chapter_runs_in_bfloat16(tmp_path, architecture):
    model = checkpoint(tmp_path / architecture, architecture)
    settings = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    chosen = ["--only", *CHAPTERS[architecture]] if architecture in CHAPTERS else []
    status = main(["reproduce", "--profile", "gpu", "--model", str(model), "-p", "device_map=null", *settings, *chosen, "--no-html",
                   "--keep-going", "--jobs", "1", "--out", str(tmp_path / "run")])  # fmt: skip
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["chapters"]
    assert status == 0 and {row["status"] for row in rows} == {"ok"}, [row["error"] for row in rows if row["status"] != "ok"]
    assert len(rows) == (len(chosen) - 1 if chosen else 13)
