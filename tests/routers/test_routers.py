"""Attached routers on tiny models of six architectures: the model's own rule, exact limits, a model left as it was."""

import json

import pytest
import torch
from tiny import ARCHITECTURES, single_items, tiny_batch, tiny_model

from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers import maths
from bmoe_utils.routers.attach import INFERENCE, Routers, attach_routers, find_routers
from bmoe_utils.routers.families import FAMILIES

# Latent attention, grouped selection, sigmoid scores, a correction bias: what the other five do not have.
DEEPSEEK = dict(num_local_experts=8, moe_intermediate_size=6, n_shared_experts=1, n_group=4, topk_group=2, num_key_value_heads=2,
                first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                intermediate_size=12)
ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)  # float32 inside transformers even in a float64 model: see test_laplace
GAUSSIAN = ("laplace", "mfvr", "fcvr", "swag")
# Every method, and those options that are another way of computing it.
VARIANTS = [*((m, {}) for m in FAMILIES), ("mcdropout", {"mask": "sample"}), ("fcvr", {"rank": 2})]
GAUSSIAN_VARIANTS = [v for v in VARIANTS if v[0] in GAUSSIAN]


def moe(architecture="qwen2_moe", **overrides):
    if architecture != "deepseek_v3":
        return tiny_model(architecture, **overrides)
    ARCHITECTURES.setdefault("deepseek_v3", DEEPSEEK)
    try:
        model = tiny_model("deepseek_v3", **overrides)
    finally:
        del ARCHITECTURES["deepseek_v3"]  # other tests run over this table
    for router in find_routers(model).values():
        router.e_score_correction_bias.copy_(0.2 * torch.randn(8))
    return model


@pytest.fixture(params=[*ARCHITECTURES, "deepseek_v3"])
def architecture(request):
    return request.param


def wide(batch, by=5):
    return {k: torch.nn.functional.pad(v, (by, 0)) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}


def stir(routers, seed=0, scale=0.3):
    """Parameters and buffers as some training might leave them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in routers.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
        for family in routers.families:
            for name in ("mean", "variance", "low_rank"):
                if name in family._buffers:
                    setattr(family, name, scale * torch.randn(getattr(family, name).shape, generator=g, dtype=family.dtype).abs())
    return routers


# ---- the model's own rule -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identity_copy_is_the_routers_rule(architecture, dtype):
    model = moe(architecture, dtype=dtype)
    with attach_routers(model, "deterministic") as routers:
        rule, module, family = routers.rules[1], routers._modules[1], routers.families[1]
        hidden = torch.randn(200, 16).to(dtype)
        routers.detach()
        outputs = module(hidden)
        got = rule.pack(*rule(outputs[rule.order[0]].to(family.dtype)))
    assert [o.dtype for o in got] == [o.dtype for o in outputs]
    for ours, theirs in zip(got, outputs, strict=True):
        if dtype is torch.bfloat16 and architecture == "gpt_oss":  # it ranks bfloat16 logits, which tie
            assert (ours == theirs).double().mean() > 0.95
        else:
            assert torch.equal(ours, theirs)
    assert rule.link == ("sigmoid" if architecture == "deepseek_v3" else "softmax")
    assert rule.normalised == (architecture not in ("qwen2_moe", "olmoe"))


@pytest.mark.parametrize("method, variant", VARIANTS)
def test_without_variance_every_router_is_the_deterministic_one_bit_for_bit(architecture, method, variant):
    model, batch = moe(architecture), tiny_batch()
    with torch.no_grad():
        expected = option_logits(model, batch)
        ways = [dict(inference=i, num_samples=7) for i in INFERENCE] + [dict(num_samples=None)] * (method in GAUSSIAN)
        for way in ways:
            with attach_routers(model, method, **way, **variant) as routers:
                fresh = option_logits(model, batch)
                routers.noise_scale = 0.0
                assert torch.equal(option_logits(model, batch), expected)
                # the noise is there and not forgotten: an unfitted router that has variance moves the answer
                if method not in ("deterministic", "swag", "ensemble"):
                    assert not torch.equal(fresh, expected)
                else:
                    assert torch.equal(fresh, expected)
    for options in {"mcdropout": [dict(dropout=0.0)], "temperature": [dict(temperature=0.0)]}.get(method, []):
        with attach_routers(model, method, **options | variant), torch.no_grad():
            assert torch.equal(option_logits(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_variance_low_precision_loses_nothing_more(architecture, dtype):
    model, batch = moe(architecture, dtype=dtype), tiny_batch()
    with torch.no_grad():
        expected = option_logits(model, batch)
        for method in ("mcdropout", "laplace", "fcvr", "vtsr"):
            with attach_routers(model, method, num_samples=5) as routers:
                assert all(p.dtype == torch.float32 for p in routers.parameters())
                routers.noise_scale = 0.0
                assert torch.equal(option_logits(model, batch), expected)


def by_hand(architecture, scores, k, choose=None):
    """``scores [N, E]`` -> sorted weights of the top-K, written out from the architectures' papers."""
    if architecture == "deepseek_v3":
        choice = scores + choose
        groups = choice.view(len(scores), 4, 2).sum(-1).topk(2).indices
        allowed = torch.zeros(len(scores), 4).scatter(1, groups, 1.0).repeat_interleave(2, 1).bool()
        weights = scores.gather(1, choice.masked_fill(~allowed, -torch.inf).topk(k).indices)
        return (2.5 * weights / weights.sum(1, keepdim=True)).sort(1).values
    weights = scores.topk(k).values
    return (weights if architecture in ("qwen2_moe", "olmoe") else weights / weights.sum(1, keepdim=True)).sort(1).values


@pytest.mark.parametrize("method, variant", [v for v in VARIANTS if not FAMILIES[v[0]].selects and v[0] != "deterministic"])
def test_inside_averages_the_scores_of_all_samples_and_selects_once(architecture, method, variant):
    model = moe(architecture)
    hidden = torch.randn(50, 16, dtype=torch.float64)
    with attach_routers(model, method, num_samples=9, **variant) as routers, torch.no_grad():
        stir(routers)
        family, module = routers.families[0], routers._modules[0]
        logits, weights, _ = module(hidden)
        routers._generators.clear()
        centre, deviations = family.offsets(hidden, family.count_samples(9), routers._generator(hidden.device))
        assert len(deviations) == (5 if method == "ensemble" else 9)
        routers.detach()
        samples = module(hidden)[0] + centre + deviations
        scores = (samples.sigmoid() if architecture == "deepseek_v3" else samples.softmax(-1)).mean(0)
        expected = by_hand(architecture, scores, 2, getattr(module, "e_score_correction_bias", None))
        torch.testing.assert_close(weights.sort(1).values, expected.to(weights), rtol=2e-5, atol=1e-6)
        assert not torch.allclose(weights, module(hidden)[1], atol=1e-3)


@pytest.mark.parametrize("method, variant", GAUSSIAN_VARIANTS)
def test_the_sample_free_router_is_the_limit_of_many_samples(method, variant):
    model, hidden = moe(), torch.randn(40, 16, dtype=torch.float64)
    weights = {}
    for samples in (None, 20_000):
        with attach_routers(model, method, num_samples=samples, **variant) as routers, torch.no_grad():
            stir(routers, scale=0.1)
            routers.noise_scale = 0.15 if method == "laplace" else 1.0
            logits = routers._modules[0](hidden)[0]
            weights[samples] = logits.softmax(-1)
    error = 0.5 * (weights[None] - weights[20_000]).abs().sum(1)
    assert error.mean() < 0.01 and error.max() < 0.05


@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe", "deepseek_v3"])
def test_temperature_draws_without_replacement_and_weighs_by_the_rule(architecture):
    model, T, n = moe(architecture), 0.7, 20_000
    if architecture == "deepseek_v3":
        T = 3.0
    hidden = torch.randn(1, 16, dtype=torch.float64).expand(n, 16)
    with attach_routers(model, "temperature", temperature=T) as routers, torch.no_grad():
        router = routers._modules[0]
        logits, weights, indices = router(hidden)
        drawn = torch.bincount(indices.flatten(), minlength=logits.shape[1]) / n
        if architecture == "deepseek_v3":  # groups: the law is the rule's own; no expert twice, no more than two groups
            assert (indices[:, 0] != indices[:, 1]).all() and (drawn > 0).sum() > 2
            scores = logits.sigmoid().gather(1, indices)
            expected = 2.5 * scores / scores.sum(1, keepdim=True)
        else:
            exact = maths.inclusion_probabilities(logits[0], 2, T)
            assert (drawn - exact).abs().max() < 5 * 0.5 / n**0.5
            scores = logits.softmax(-1).gather(1, indices)
            expected = scores if architecture == "qwen2_moe" else scores / scores.sum(1, keepdim=True)
        torch.testing.assert_close(weights, expected.to(weights), rtol=1e-5, atol=1e-6)


# ---- the families' laws ---------------------------------------------------------------------------------------------
def sampled_logits(routers, u, n=40_000):
    centre, deviations = routers.families[0].offsets(u, n, torch.Generator().manual_seed(0))
    return centre + deviations


@pytest.mark.parametrize("method, variant", GAUSSIAN_VARIANTS)
def test_moments_are_those_of_the_samples(method, variant):
    with attach_routers(moe(), method, **variant) as routers, torch.no_grad():
        stir(routers)
        u = torch.randn(3, 16, dtype=torch.float64)
        centre, root = routers.families[0].moments(u)
        cov = torch.diag_embed(root.square()) if root.dim() == 2 else root @ root.mT
        samples = sampled_logits(routers, u)
        for i in range(3):
            largest = torch.diagonal(cov[i]).max()
            assert (samples[:, i].mean(0) - centre[i]).abs().max() < 5 * (largest / 40_000) ** 0.5
            assert (torch.cov(samples[:, i].mT) - cov[i]).abs().max() < 0.04 * largest


@pytest.mark.parametrize("mask", ["token", "sample"])
def test_dropout_has_its_mean_and_variance_and_masks_of_its_own_or_shared(mask):
    with attach_routers(moe(), "mcdropout", dropout=0.2, mask=mask) as routers, torch.no_grad():
        stir(routers)
        family, u = routers.families[0], torch.randn(1, 16, dtype=torch.float64).expand(2, 16)
        samples, W = sampled_logits(routers, u), family.weight + family.delta
        expected = 0.25 * u[0].square() @ W.square().mT  # p / (1 - p) sum_j W_j^2 u_j^2
        torch.testing.assert_close(samples[:, 0].var(0), expected, rtol=0.05, atol=0)
        torch.testing.assert_close(samples[:, 0].mean(0), u[0] @ family.delta.mT, rtol=0, atol=5 * float(expected.max() / 40_000) ** 0.5)
        correlation = torch.corrcoef(samples[:, :, 0].mT)[0, 1]
        assert correlation.abs() < 0.03 if mask == "token" else correlation > 1 - 1e-9


@pytest.mark.parametrize("mask", ["token", "sample"])
def test_dropout_is_the_product_with_the_masked_input(mask):
    with attach_routers(moe(), "mcdropout", dropout=0.3, mask=mask) as routers, torch.no_grad():
        stir(routers)
        family, u, S = routers.families[0], torch.randn(6, 16, dtype=torch.float64), 5
        draw = lambda trials: maths.bernoulli_positions(trials, 0.3, u, generator)  # noqa: E731
        generator = torch.Generator().manual_seed(3)
        if mask == "token":
            dropped = torch.stack([torch.zeros(96).index_fill(0, draw(96), 1).view(6, 16) for _ in range(S)])
        else:
            dropped = torch.zeros(S * 16).index_fill(0, draw(S * 16), 1).view(S, 1, 16)
        expected = (u * (1 - dropped.double()) / 0.7) @ (family.weight + family.delta).mT - u @ family.weight.mT
        centre, deviations = family.offsets(u, S, torch.Generator().manual_seed(3))
        torch.testing.assert_close(centre + deviations, expected, rtol=1e-12, atol=1e-12)


def test_the_variance_of_the_samples_is_unbiased():
    """Mean over seeds of ``mc_logit_variance`` from 3 samples against the Gaussian's own; of an ensemble, its members' variance."""
    model, batch = moe(), tiny_batch()
    with attach_routers(model, "mfvr", layers=[0], num_samples=3) as routers:
        stir(routers)
        drawn, exact = [], None
        for seed in range(400):
            routers.seed = seed
            routers(batch)
            drawn.append(routers.signals()["mc_logit_variance_mean"])
            exact = routers.signals()["logit_variance_mean"]
        drawn = torch.stack(drawn)
        assert ((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / 400**0.5).all()
        assert (drawn.std(0) / 400**0.5 < 0.05 * exact).all()  # near enough to tell S from S - 1: a third
    with attach_routers(model, "ensemble", layers=[0], members=3) as routers:
        stir(routers)
        family, u = routers.families[0], torch.randn(4, 16, dtype=torch.float64)
        routers._real = torch.ones(1, 4, dtype=torch.bool)
        routers._modules[0](u)
        expected = torch.einsum("nd,sed->sne", u, family.delta.detach()).var(0).sum(-1)
        torch.testing.assert_close(routers._records[0]["mc_logit_variance"], expected)


# ---- padding and signals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inference", INFERENCE)
@pytest.mark.parametrize("method, variant", VARIANTS)
def test_padding_changes_nothing(method, variant, inference):
    model, batch = moe(), tiny_batch()
    with attach_routers(model, method, num_samples=3, inference=inference, **variant) as routers:
        stir(routers)
        results = []
        for b in (batch, wide(batch)):
            results.append((routers(b), routers.signals()))
        (p, s), (p2, s2) = results
        torch.testing.assert_close(p, p2, **ACROSS_SHAPES)
        assert s.keys() == s2.keys() and all(torch.allclose(s[k], s2[k], **ACROSS_SHAPES) for k in s)


@pytest.mark.parametrize("method", ["deterministic", "laplace", "mfvr", "fcvr"])
def test_items_alone_and_in_company_are_the_same_without_sampling(method, architecture):
    model, batch = moe(architecture), tiny_batch()
    with attach_routers(model, method, num_samples=3 if method == "deterministic" else None) as routers:
        stir(routers, scale=0.05)
        p, s = routers(batch), routers.signals()
        for i, item in enumerate(single_items(batch)):
            torch.testing.assert_close(routers(item)[0], p[i], rtol=1e-4, atol=1e-5)
            for name, value in routers.signals().items():
                torch.testing.assert_close(value[0], s[name][i], rtol=1e-4, atol=1e-5)


def test_signals_by_hand():
    model, batch = moe(), tiny_batch()
    inputs, logits = [], []
    hooks = [m.register_forward_hook(lambda m, a, o: [inputs.append(a[0]), logits.append(o[0])] and None) for m in find_routers(model).values()]
    with torch.no_grad():
        option_logits(model, batch)
    for h in hooks:
        h.remove()
    real = batch["attention_mask"].bool()

    def both(per_layer):
        value = torch.stack([x.view(5, 7) for x in per_layer]).mean(0)
        return value[:, -1], torch.stack([row[keep].mean() for row, keep in zip(value, real, strict=True)])

    def check(routers, name, per_layer, **tolerance):
        routers(batch)
        for key, expected in zip((f"{name}_last", f"{name}_mean"), both(per_layer), strict=True):
            torch.testing.assert_close(routers.signals()[key], expected, **tolerance)

    with attach_routers(model, "deterministic") as routers:
        check(routers, "gate_entropy", [torch.distributions.Categorical(logits=x).entropy() for x in logits])
        assert set(routers.signals()) == {"gate_entropy_last", "gate_entropy_mean"}
    with attach_routers(model, "laplace", prior_precision=1e6) as routers:  # the prior: |u|^2 / lambda for each of 4 experts
        check(routers, "logit_variance", [4e-6 * x.square().sum(-1) for x in inputs], rtol=1e-2, atol=0)
    with attach_routers(model, "laplace", prior_precision=1e6, num_samples=3000) as routers:
        check(routers, "mc_logit_variance", [4e-6 * x.square().sum(-1) for x in inputs], rtol=0.1, atol=0)
    with attach_routers(model, "temperature", temperature=0.3) as routers:
        check(routers, "temperature", [torch.full((35,), 0.3, dtype=torch.float64)] * 2)
    with attach_routers(model, "vtsr", temperature=1.7) as routers:
        check(routers, "temperature", [torch.full((35,), 1.7, dtype=torch.float64)] * 2)
    with attach_routers(model, "mfvr") as routers, pytest.raises(RuntimeError, match="no signals yet"):
        routers.signals()


def test_whole_model_inference_averages_passes_that_differ_and_repeats_itself():
    model, batch = moe(), tiny_batch()
    with attach_routers(model, "fcvr", inference="whole-model", num_samples=4) as routers, torch.no_grad():
        stir(routers)
        passes = []
        for s in range(4):
            routers._pass = s
            passes.append(option_logits(model, batch).softmax(-1))
        routers._pass = 0
        assert not torch.allclose(passes[0], passes[1], atol=1e-3)
        torch.testing.assert_close(routers(batch), torch.stack(passes).mean(0))
        assert torch.equal(routers(batch), routers(batch))
    with attach_routers(model, "ensemble", inference="whole-model", members=3) as routers, torch.no_grad():
        stir(routers)
        singles = []
        for m in range(3):  # each member alone is the model with that member's weights in it
            changed = moe()
            for module, family in zip(find_routers(changed).values(), routers.families, strict=True):
                module.weight.add_(family.delta[m])
            singles.append(option_logits(changed, batch).softmax(-1))
        torch.testing.assert_close(routers(batch), torch.stack(singles).mean(0), **ACROSS_SHAPES)


# ---- layers, wrappers -----------------------------------------------------------------------------------------------
def test_layers_can_be_chosen():
    model, names = moe(), list(find_routers(moe()))
    for layers, expected in [("all", names), ("last:1", names[1:]), ([0], names[:1]), ([names[1]], names[1:]), ([-1, 0], names)]:
        with attach_routers(model, "mfvr", layers=layers) as routers:
            assert routers.layers == expected and len(routers.families) == len(expected)
            assert [("forward" in vars(m)) for m in find_routers(model).values()] == [n in expected for n in names]


def test_a_peft_model_is_seen_with_its_mask_and_left_alone():
    from bmoe_utils.models.training import add_lora
    batch = tiny_batch()
    model = add_lora(moe()).double().eval()
    with attach_routers(model, "mfvr", num_samples=None) as routers:
        p, s = routers(batch), routers.signals()
        torch.testing.assert_close(routers(wide(batch)), p, **ACROSS_SHAPES)
        torch.testing.assert_close(routers.signals()["gate_entropy_mean"], s["gate_entropy_mean"], **ACROSS_SHAPES)
    with attach_routers(moe(), "mfvr", num_samples=None) as routers:
        torch.testing.assert_close(routers(batch), p, **ACROSS_SHAPES)


# ---- the model is a guest -------------------------------------------------------------------------------------------
def snapshot(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()], [p.grad for p in model.parameters()],
            [sorted(vars(m)) for m in model.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m._parameters)) for m in model.modules()])


def assert_same(before, after):
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("method", list(FAMILIES))
def test_detaching_restores_the_model_bit_for_bit(architecture, method):
    model, batch = moe(architecture), tiny_batch()
    with torch.no_grad():
        expected = option_logits(model, batch)
    before, mark = snapshot(model), model_fingerprint(model)
    random_state = torch.get_rng_state()
    routers = attach_routers(model, method, num_samples=2)
    stir(routers)(batch)
    assert model_fingerprint(model) == mark  # the attachment holds its own parameters
    routers.detach()
    routers.detach()
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        assert torch.equal(option_logits(model, batch), expected)
    with pytest.raises(RuntimeError, match="detached"):
        routers(batch)


def test_the_model_is_restored_after_a_failure_too(monkeypatch):
    model, batch = moe(), tiny_batch()
    before = snapshot(model)
    with pytest.raises(MemoryError), attach_routers(model, "mfvr") as routers:
        monkeypatch.setattr(routers.families[1], "offsets", lambda *a: (_ for _ in ()).throw(MemoryError("no room")))
        routers(batch)
    assert routers._real is None and not routers._records
    assert_same(before, snapshot(model))
    calls = []
    monkeypatch.setattr(type(model), "register_forward_hook", lambda *a, **k: calls.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach_routers(model, "mfvr")
    assert calls and snapshot(model)[4] == before[4] and snapshot(model)[5] == before[5]


def test_a_forward_that_was_overridden_before_is_used_and_put_back():
    model, batch = moe(), tiny_batch()
    router = next(iter(find_routers(model).values()))
    original, seen = router.forward, []
    override = lambda hidden: (seen.append(1), original(hidden))[1]  # noqa: E731 - as accelerate's hooks do
    router.forward = override
    with attach_routers(model, "mfvr") as routers:
        routers(batch)
        assert seen
    assert router.forward is override


def test_a_second_attachment_is_refused_and_the_first_still_works():
    model, batch = moe(), tiny_batch()
    with attach_routers(model, "mfvr") as routers:
        p = routers(batch)
        with pytest.raises(ValueError, match="already"):
            attach_routers(model, "deterministic", layers=[1])
        assert torch.equal(routers(batch), p)


def test_router_logits_asked_of_the_model_are_the_attached_ones():
    model, batch = moe("mixtral"), tiny_batch()
    ask = lambda: model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True).router_logits  # noqa: E731
    with torch.no_grad():
        plain = ask()
        with attach_routers(model, "mfvr", layers=[0]):
            attached = ask()
    assert attached[0].shape == plain[0].shape and not torch.equal(attached[0], plain[0])


# ---- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, variant", VARIANTS)
def test_saved_routers_come_back_the_same(tmp_path, method, variant):
    model, batch = moe(), tiny_batch()
    with attach_routers(model, method, layers="last:1", num_samples=4, seed=3, **variant) as routers:
        stir(routers)
        expected = routers(batch)
        routers.save(tmp_path / "r")
        routers.save(tmp_path / "r")  # over an existing one
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    with Routers.load(tmp_path / "r", model, method=method) as again:
        assert torch.equal(again(batch), expected) and again.layers == routers.layers


def test_loading_what_does_not_fit_is_a_clear_error(tmp_path):
    model, folder = moe(), tmp_path / "r"
    before = snapshot(model)
    with attach_routers(model, "mfvr") as routers:
        routers.save(folder)
    load = lambda m=model, **k: Routers.load(folder, m, **k)  # noqa: E731
    with pytest.raises(ValueError, match="other weights"):
        load(moe(seed=1))
    with pytest.raises(ValueError, match="method 'mfvr', not 'fcvr'"):
        load(method="fcvr")
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in [({"options": {"trunk": 2, "init_std": 0.1}}, "changed"), ({"format": 0}, "format 0")]:
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            load()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = (folder / "routers.safetensors").read_bytes()
    for content in (data[: len(data) // 2], data[:-1] + b"?"):
        (folder / "routers.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cut short"):
            load()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="no readable routers"):
        load()
    assert_same(before, snapshot(model))


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_bad_input_is_named_and_leaves_the_model_untouched():
    model = moe()
    before = snapshot(model)
    for method, options, message in [
        ("mcmc", {}, "'mfvr'"),
        ("mfvr", dict(layers=[7]), "no MoE layer 7"),
        ("mfvr", dict(layers="last:3"), "'last:n' with n from 1 to 2"),
        ("mfvr", dict(layers="last:x"), "last:n"),
        ("mfvr", dict(num_samples=0), "at least 1"),
        ("mfvr", dict(num_samples=2.5), "whole number"),
        ("mfvr", dict(inference="outside"), "'whole-model'"),
        ("mfvr", dict(dropout=0.1), "no option 'dropout'; its options: trunk, prior_std, init_std"),
        ("mfvr", dict(trunk=0), "at least one unit"),
        ("mfvr", dict(init_std=0.0), "init_std=0.0 is not positive"),
            ("fcvr", dict(prior_std=-1.0), "prior_std=-1.0 is not positive"),
        ("mcdropout", dict(dropout=1.0), "dropout=1.0"),
        ("mcdropout", dict(mask="layer"), "mask='layer' is not 'token' or 'sample'"),
        ("fcvr", dict(rank=0), "rank=0"),
        ("fcvr", dict(rank=5), "the 4 experts"),
        ("mcdropout", dict(num_samples=None), "sample-free"),
        ("mfvr", dict(num_samples=None, inference="whole-model"), "sample-free"),
        ("swag", dict(rank=1), "rank >= 2"),
        ("ensemble", dict(members=0), "at least one member"),
        ("laplace", dict(prior_precision=-1.0), "not positive"),
        ("temperature", dict(temperature=-0.1), "temperature=-0.1"),
        ("vtsr", dict(temperature=0.0), "not positive"),
        ("vtsr", dict(temperature_prior=(1.0, 0.0)), "temperature_prior"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach_routers(model, method, **options)
        assert_same(before, snapshot(model))
    from transformers import AutoModelForCausalLM, LlamaConfig
    dense = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8,
                                                         num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="no fused mixture-of-experts"):
        attach_routers(dense, "mfvr")


def test_a_router_that_is_more_than_a_rule_is_refused():
    model = moe()
    router = list(find_routers(model).values())[1]
    original = router.forward
    router.forward = lambda hidden: original(hidden.flip(-1))[:1] + original(hidden)[1:]
    with pytest.raises(ValueError, match="more than a rule"):
        attach_routers(model, "deterministic")
