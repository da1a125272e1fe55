"""Noise on what routers read, and the overlap of what they choose."""

import pytest
import torch
from test_routers import assert_same, moe, snapshot, wide
from tiny import tiny_batch

from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers.attach import attach_routers, find_routers
from bmoe_utils.routers.stability import PLACES, chosen_experts, perturbed, routing_margins, routing_stability


def test_chosen_experts_are_the_routers_own_of_real_tokens_alone():
    model, batch = moe(), tiny_batch()
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, o: seen.append(o[2])) for m in find_routers(model).values()]
    with torch.no_grad():
        option_logits(model, batch)
    for h in hooks:
        h.remove()
    real = batch["attention_mask"].bool().flatten()
    got = chosen_experts(model, batch)
    assert list(got) == list(find_routers(model))
    for ours, theirs in zip(got.values(), seen, strict=True):
        assert torch.equal(ours, theirs[real])
    for a, b in zip(chosen_experts(model, wide(batch)).values(), got.values(), strict=True):
        assert torch.equal(a, b)
    with attach_routers(model, "temperature", temperature=50.0):
        assert any((a.sort(-1).values != b.sort(-1).values).any() for a, b in zip(chosen_experts(model, batch).values(), got.values()))


@pytest.mark.parametrize("where", PLACES)
def test_the_noise_has_the_stated_size_and_place(where):
    """Std gamma times the mean norm, on real tokens alone; a noisy router does not disturb what the experts read."""
    model, batch = moe(), tiny_batch(40, length=12)
    real = batch["attention_mask"].bool().flatten()
    first = list(find_routers(model).values())[0]
    experts = [m for n, m in model.named_modules() if n.endswith("mlp.experts")][0]
    target = model.get_input_embeddings() if where == "embedding" else first
    inputs = {}

    def run(gamma):
        # the order of registration: the recording hook must see what the noise made
        with perturbed(model, batch["attention_mask"], gamma, where, seed=3):
            hooks = [experts.register_forward_pre_hook(lambda m, a: inputs.__setitem__("experts", a[0].reshape(len(real), -1)))]
            if where == "embedding":
                hooks.append(target.register_forward_hook(lambda m, a, o: inputs.__setitem__("target", o.reshape(len(real), -1))))
            else:
                hooks.append(target.register_forward_pre_hook(lambda m, a: inputs.__setitem__("target", a[0].reshape(len(real), -1))))
            with torch.no_grad():
                option_logits(model, batch)
            for h in hooks:
                h.remove()
        return dict(inputs)

    clean, noisy = run(0.0), run(0.05)
    difference = (noisy["target"] - clean["target"])
    assert not difference[~real].any()
    scale = 0.05 * clean["target"][real].norm(dim=-1).mean()
    n = difference[real].numel()
    assert abs(difference[real].std() / scale - 1) < 4 / (2 * n) ** 0.5  # four standard errors of a standard deviation
    assert torch.equal(noisy["experts"], clean["experts"]) == (where == "router")


@pytest.mark.parametrize("where", PLACES)
def test_stability_falls_with_noise_and_is_one_without(where):
    model, batches = moe(), [tiny_batch(20, seed=s) for s in range(2)]
    before = snapshot(model)
    curve = [routing_stability(model, batches, gamma, where) for gamma in (0.0, 0.01, 0.1, 10.0)]
    assert torch.equal(curve[0], torch.ones(2, dtype=torch.float64))
    means = [float(c.mean()) for c in curve]
    assert means[0] > means[1] > means[2] > means[3]
    # under overwhelming noise a router's two of four experts are a random pair: E[J] = 1/6 + 4/6 / 3 if no expert were favoured
    assert means[3] < 0.6
    assert torch.equal(routing_stability(model, batches, 0.1, where), curve[2])
    assert_same(before, snapshot(model))


def test_fresh_random_numbers_show_what_sampling_alone_does():
    model, batches = moe(), [tiny_batch(20)]
    with attach_routers(model, "mfvr", inference="whole-model") as routers:
        assert torch.equal(routing_stability(model, batches, 0.0, routers=routers, fresh=False), torch.ones(2, dtype=torch.float64))
        assert (routing_stability(model, batches, 0.0, routers=routers) < 0.95).all()
        said = routers(batches[0])
    with attach_routers(model, "mfvr", inference="whole-model") as routers:
        assert torch.equal(routers(batches[0]), said)  # the stream of predictions is back
    with attach_routers(model, "mfvr", num_samples=None) as routers:  # nothing is drawn
        assert torch.equal(routing_stability(model, batches, 0.0, routers=routers), torch.ones(2, dtype=torch.float64))


def test_margins_are_of_the_kth_logit_over_the_next(architecture="granitemoe"):
    model, batch = moe(architecture), tiny_batch()
    margins = routing_margins(model, [batch])
    real = batch["attention_mask"].bool()
    assert margins.shape == (2, int(real.sum())) and (margins >= 0).all()
    seen = []
    hook = list(find_routers(model).values())[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 16)))
    with torch.no_grad():
        option_logits(model, batch)
    hook.remove()
    logits = (seen[0] @ list(find_routers(model).values())[1].weight.T)[real.flatten()].sort(-1, descending=True).values
    torch.testing.assert_close(margins[1], ((logits[:, 1] - logits[:, 2]) / logits.std(-1)).detach(), rtol=1e-5, atol=1e-6)


def test_bad_input():
    model, batch = moe(), tiny_batch()
    with pytest.raises(ValueError, match="'embedding', 'router'"), perturbed(model, batch["attention_mask"], 0.1, "attention"):
        pass
    with pytest.raises(ValueError, match="gamma=-1"), perturbed(model, batch["attention_mask"], -1.0, "router"):
        pass
    with pytest.raises(ValueError, match="empty"):
        routing_stability(model, [], 0.1)
