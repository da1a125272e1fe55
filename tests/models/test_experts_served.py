"""Types and widths of experts that transformers' grouped_mm does not take: whatever runs a model runs these too, as `eager` would."""

import copy
import json

import pytest
import torch
from tiny import tiny_batch, tiny_model, write_checkpoint
from transformers import AutoModelForCausalLM

import bmoe_utils as bm
from bmoe_utils.models.training import add_lora, fine_tune

# Rows of 12 bytes, of 24, and a type that grouped_mm has no kernel for.
NOT_SERVED = [(torch.bfloat16, 6), (torch.float16, 6), (torch.float32, 6), (torch.float64, 8)]
BATCH = tiny_batch(4)


def pair(dtype, width, architecture="qwen2_moe"):
    """A model as a user makes it, with transformers' default, and the same one with the experts' eager forward."""
    eager = tiny_model(architecture, dtype=dtype, scale=0.2,
                       **{"intermediate_size" if architecture == "gpt_oss" else "moe_intermediate_size": width})
    model = AutoModelForCausalLM.from_config(copy.deepcopy(eager.config), dtype=dtype, experts_implementation="grouped_mm").eval()
    model.load_state_dict(eager.state_dict())
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    return model, eager


def logits(model):
    with torch.no_grad():
        return bm.option_logits(model, BATCH)


@pytest.mark.parametrize("dtype, width", NOT_SERVED)
def test_a_model_of_the_users_own_predicts_fits_and_takes_routers(dtype, width):
    """The same bits as eager: a token has two experts, and two numbers have one sum, in whichever order."""
    ways = {
        "predict": lambda m: torch.from_numpy(bm.predict(m, [BATCH], progress=False).logits),
        "fit": lambda m: bm.ExpertLaplace(m).fit([BATCH], progress=False).posteriors[0].eigenvalues,
        "covariance": lambda m: bm.ExpertLaplace(m).fit([BATCH], progress=False).predictive_logits(BATCH)[1],
    }
    for name, way in ways.items():
        model, eager = pair(dtype, width)
        assert torch.equal(way(model), way(eager)), name
        assert torch.equal(logits(model), logits(eager)), f"after {name}"
    model, eager = pair(dtype, width)
    for method in ("deterministic", "mfvr"):
        with bm.attach_routers(model, method), bm.attach_routers(eager, method):
            assert torch.equal(logits(model), logits(eager)), method


@pytest.mark.parametrize("dtype, width, way", [
    # not all weights in float16: Adam's epsilon is 0 there, and what has no gradient becomes 0 / 0
    *((*c, way) for c in NOT_SERVED for way in ("all weights", "checkpointed", "LoRA") if c[0] != torch.float16 or way == "LoRA")])
def test_fine_tuning(dtype, width, way):
    """Checkpointing runs the experts once more in the backward pass, where nothing of ours is on the way."""
    models = pair(dtype, width)
    before = logits(models[1])
    for i, m in enumerate(models):
        if way == "checkpointed":
            getattr(m, "activation_checkpointing_enable", m.gradient_checkpointing_enable)()
        m = add_lora(m) if way == "LoRA" else m
        fine_tune(m, [BATCH], epochs=2, lr=1e-3, progress=False)
    tuned, expected = map(logits, models)
    assert not torch.equal(expected, before)
    # the gradients of eager's index_add_ round differently, and Adam divides by their size: two steps of 1e-3 at most
    torch.testing.assert_close(tuned, expected, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("dtype, width", NOT_SERVED)
def test_other_layouts(dtype, width):
    """Transposed weights, biases; eager sums a token's experts otherwise here, so equal to the type's rounding of numbers near 1."""
    model, eager = pair(dtype, width, "gpt_oss")
    torch.testing.assert_close(logits(model), logits(eager), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 6), (torch.float64, 8)])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_a_loaded_model_runs_by_itself(tmp_path, dtype, width, device_map):
    """Also by transformers' own calls, such as generate."""
    _, eager = pair(dtype, width)
    write_checkpoint(tmp_path, {}, {}, shards=0)  # for its tokenizer
    (tmp_path / "model.safetensors.index.json").unlink()
    eager.save_pretrained(tmp_path)
    model, _ = bm.load_model(tmp_path, dtype=dtype, device_map=device_map)
    ids = BATCH["input_ids"][:1]
    assert torch.equal(model(input_ids=ids).logits, eager(input_ids=ids).logits)
    assert model.generate(ids, max_new_tokens=2).shape == (1, 9)
    model.save_pretrained(tmp_path / "again")  # what it runs by is not the checkpoint's business
    assert "bmoe" not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_grouped_mm_takes_is_left_to_it(dtype):
    """A row of 16 or 32 bytes; a fit leaves the choice as it found it, and so it leaves any other choice."""
    model, eager = pair(dtype, 8)
    bm.ExpertLaplace(model).fit([BATCH], progress=False)
    logits(model)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    narrow = pair(dtype, 6)[0]
    narrow.set_experts_implementation("batched_mm")
    logits(narrow)
    assert narrow.get_experts_implementation() == {"": "batched_mm"}
