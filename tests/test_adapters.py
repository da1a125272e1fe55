"""MAP models with LoRA, on the attention, on the experts, merged or not: the posterior sits on the weights that the model uses."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_unfused import unfused
from tiny import autograd_jacobians, captured_jacobians, single_items, tiny_batch, tiny_model, write_checkpoint

import bmoe_utils as bm
from bmoe_utils.artefacts import model_fingerprint
from bmoe_utils.capture import down_weight, expert_layers
from bmoe_utils.models import option_logits

ATTENTION = dict(target_modules=["q_proj", "v_proj"])
SECOND = dict(target_modules=[], target_parameters=["mlp.experts.down_proj"])
BOTH = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
# Layer norms and router probabilities are float32 inside a float64 model, and merged weights round otherwise: see test_laplace.
FLOAT32_INSIDE = dict(rtol=1e-5, atol=1e-6)


def lora(model, **targets):
    """peft's LoRA with a nonzero B, so that ignoring it would show."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **targets)
    return get_peft_model(model, config).double().eval()


@pytest.fixture(params=[("qwen2_moe", ATTENTION), ("qwen2_moe", SECOND), ("mixtral", BOTH), ("gpt_oss", BOTH), ("separate", None)],
                ids=["attention", "second-layer", "all", "transposed", "separate"])
def case(request):
    """A maker of the adapted model, and whether its second layers are adapted."""
    architecture, targets = request.param
    if architecture == "separate":
        names = ("gate", "fc1", "fc2")  # names of its own: peft takes Mixtral's for fused weights
        return lambda: lora(unfused(tiny_model("mixtral"), "loop", names), target_modules=["fc1", "fc2"]), True
    return lambda: lora(tiny_model(architecture), **targets), targets is not ATTENTION


def plain(model):
    """The same weights in a model without peft."""
    return model.merge_and_unload().requires_grad_(True).eval()


def test_the_second_layers_weight_is_the_one_the_model_uses(case):
    make, adapted = case
    model, merged, base = make(), plain(make()), make()
    names = list(expert_layers(merged))
    assert names == list(expert_layers(model)) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    with base.disable_adapter():
        for name in names:
            used, pretrained = down_weight(expert_layers(model)[name]), down_weight(expert_layers(base)[name])
            torch.testing.assert_close(used, down_weight(expert_layers(merged)[name]), rtol=1e-12, atol=1e-12)
            assert ((used - pretrained).abs().max() > 1e-2) == adapted
    model.merge_adapter()  # in place, still wrapped
    for name in names:
        in_place, expected = (down_weight(expert_layers(m)[name]) for m in (model, merged))
        torch.testing.assert_close(in_place, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_posterior_is_that_of_the_merged_model(case, in_place, tmp_path):
    make, _ = case
    model, merged = make(), plain(make())
    if in_place:
        model.merge_adapter()
    fit, test = [tiny_batch(4, seed=1), tiny_batch(3, seed=2)], tiny_batch(3, seed=3)
    flags, before = {n: p.requires_grad for n, p in model.named_parameters()}, model_fingerprint(model)
    with torch.no_grad():
        torch.testing.assert_close(option_logits(model, test), option_logits(merged, test), **FLOAT32_INSIDE)
    for structure in ("kron", "full"):
        a, b = (bm.ExpertLaplace(m, hessian_structure=structure).fit(fit, progress=False) for m in (model, merged))
        assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
        # the evidence holds ||W||^2, so it is only the same if it is the same W
        torch.testing.assert_close(a.log_marginal_likelihood(), b.log_marginal_likelihood(), **FLOAT32_INSIDE)
        for x, y in zip(a.predictive_logits(test), b.predictive_logits(test), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y[y.isfinite()].abs().max()))
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()} and model_fingerprint(model) == before
    a.save(tmp_path / "posterior")
    again = bm.ExpertLaplace.load(tmp_path / "posterior", model)
    assert torch.equal(again.predictive_logits(test)[1], a.predictive_logits(test)[1])


def test_the_jacobians_are_those_of_the_weights_the_model_uses(case):
    """Against autograd in the merged model's weights, so through neither peft nor the capture."""
    make, _ = case
    model, merged = make(), plain(make())
    item = next(single_items(tiny_batch()))
    J, f = captured_jacobians(model, item)
    expected, f_expected = autograd_jacobians(merged, item)
    torch.testing.assert_close(f, f_expected, **FLOAT32_INSIDE)
    assert (J - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_pretrained_weights_as_the_priors_mean(case):
    """||W_MAP - W_0||^2 is the adapter's own part."""
    make, adapted = case
    model, pretrained = make(), make()
    pretrained = pretrained.unload()
    la = bm.ExpertLaplace(model, prior_mean=pretrained)
    assert (la._distance > 0).all() if adapted else (la._distance == 0).all()
    merged = plain(make())
    for row, name in zip(la._distance, la.layers, strict=True):
        delta = down_weight(expert_layers(merged)[name]) - down_weight(expert_layers(pretrained)[name])
        torch.testing.assert_close(row, delta.square().sum((1, 2)), rtol=1e-9, atol=1e-12)


def test_routers_attach_to_an_adapted_model(case):
    make, _ = case
    model, merged, batch = make(), plain(make()), tiny_batch()
    with torch.no_grad():
        before = option_logits(model, batch)
        with bm.attach_routers(model, "fcvr", num_samples=3) as routers:
            ours = routers(batch)
            routers.noise_scale = 0.0
            assert torch.equal(option_logits(model, batch), before)
        with bm.attach_routers(merged, "fcvr", num_samples=3) as routers:
            torch.testing.assert_close(ours, routers(batch), **FLOAT32_INSIDE)


def test_an_adapters_folder_loads_as_its_base_with_it_merged_in(tmp_path):
    base = tiny_model(dtype=torch.float32)
    write_checkpoint(tmp_path / "base", {}, {"x": torch.zeros(1)}, shards=1)  # for its tokenizer
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    base.save_pretrained(tmp_path / "base")
    model, _ = bm.load_model(tmp_path / "base")
    adapted = lora(model, **BOTH).float()
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded, tokenizer = bm.load_model(tmp_path / "adapter")
    assert not isinstance(loaded, PeftModel) and tokenizer.padding_side == "left" and not loaded.training
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(v, merged[k]) for k, v in loaded.state_dict().items()) and merged.keys() == loaded.state_dict().keys()
