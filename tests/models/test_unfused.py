"""Experts that are modules of nn.Linear in a ModuleList: the same posterior as on the fused model with the same weights."""

import pytest
import torch
from tiny import single_items, tiny_batch, tiny_model
from torch import nn

import bmoe_utils as bm
from bmoe_utils.experts.capture import capturing, recording
from bmoe_utils.experts.columns import backward_passes
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.layers import down_weight, expert_layers, num_experts
from bmoe_utils.models.readout import option_logits
from bmoe_utils.models.unfused import gathered_rows, is_unfused

ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)  # float32 inside transformers even in a float64 model: see test_laplace


class Expert(nn.Module):
    """A gated network under the names of Llama's or of Mixtral's original code."""

    def __init__(self, gate_up, down, names):
        super().__init__()
        self.names = names
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(*weight.mT.shape, bias=False, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, linear)

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Block(nn.Module):
    """A block around the fused one's router, in the ways such code gathers its tokens."""

    def __init__(self, fused, way, names):
        super().__init__()
        self.gate, self.way = fused.gate, way
        self.shared = [getattr(fused, n, None) for n in ("shared_expert", "shared_expert_gate")]  # a list: not modules of this one
        experts = fused.experts
        self.experts = nn.ModuleList(Expert(g, d, names) for g, d in zip(experts.gate_up_proj, experts.down_proj, strict=True))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(x)
        out = torch.zeros_like(x)
        if self.way == "loop":  # an expert at a time, as Mixtral's first code has it: with a leading dimension of 1
            for e, expert in enumerate(self.experts):
                token, k = (index == e).nonzero(as_tuple=True)
                y = expert(x[None, token].reshape(1, -1, x.shape[-1])) * weights[token, k, None]
                out.index_add_(0, token, y[0].to(out.dtype))
        else:  # all slots sorted by expert and handed out in pieces, latest token first
            order = index.flatten().flip(0).argsort(stable=True)
            slots = (index.numel() - 1 - order)
            counts = torch.bincount(index.flatten(), minlength=len(self.experts)).tolist()
            pieces = [e(p) for e, p in zip(self.experts, x[slots // index.shape[1]].split(counts), strict=True) if len(p)]
            y = torch.cat(pieces) * weights.flatten()[slots, None]
            out = out.index_add(0, slots // index.shape[1], y.to(out.dtype))
        if self.shared[0] is not None:
            out = out + self.shared[1](x).sigmoid() * self.shared[0](x)
        return out.reshape(hidden_states.shape)


def unfused(model, way, names=None):
    names = names or (("w1", "w3", "w2") if way == "loop" else ("gate_proj", "up_proj", "down_proj"))
    for layer in model.model.layers:
        layer.mlp = Block(layer.mlp, way, names)
    return model


WAYS = [("qwen2_moe", "sorted"), ("olmoe", "loop"), ("mixtral", "loop")]


@pytest.fixture(params=WAYS, ids="-".join)
def twins(request):
    architecture, way = request.param
    return tiny_model(architecture), unfused(tiny_model(architecture), way)


def test_the_same_layers_are_found(twins):
    fused, separate = (expert_layers(m) for m in twins)
    assert list(fused) == list(separate) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for a, b in zip(fused.values(), separate.values(), strict=True):
        assert isinstance(b, nn.ModuleList) and num_experts(a) == num_experts(b) == 4
        assert torch.equal(down_weight(a), down_weight(b))


def test_what_is_captured_is_the_same_slot_by_slot(twins):
    for item in single_items(tiny_batch()):
        tapes = []
        for model in twins:
            with capturing(model), recording(model, list(expert_layers(model)), item["attention_mask"]) as tape:
                f = option_logits(model, item)
            (gradients,) = backward_passes(f, tape.slots, torch.ones_like(f)[None])
            tapes.append([(s, g[s.rows]) for s, g in zip(tape.slots, gradients, strict=True)])
        for (s, g), (t, h) in zip(*tapes, strict=True):
            assert s.name == t.name and torch.equal(s.counts, t.counts) and torch.equal(s.expert, t.expert)
            for e in range(4):  # the order within an expert is the block's own, so the rows are sorted by a sum over each
                a, b = (torch.cat([x.a, y], 1)[x.expert == e] for x, y in ((s, g), (t, h)))
                a, b = (rows[(rows @ torch.arange(1.0, rows.shape[1] + 1).double()).argsort()] for rows in (a, b))
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("twins, options", [
    *[(way, {}) for way in WAYS],
    *[(WAYS[0], o) for o in (dict(token_setting="reduce"), dict(token_setting="active"), dict(fisher="empirical"),
                             dict(hessian_structure="diag"), dict(hessian_structure="full"))]], indirect=["twins"], ids=str)
def test_the_posterior_is_the_same(twins, options):
    batches, test = [tiny_batch(4, seed=1), tiny_batch(3, seed=2)], tiny_batch(3, seed=3)
    before = model_fingerprint(twins[1])
    flags = {n: p.requires_grad for n, p in twins[1].named_parameters()}
    fused, separate = (bm.ExpertLaplace(m, **options).fit(batches, progress=False) for m in twins)
    assert torch.equal(fused.tokens_per_expert, separate.tokens_per_expert)
    for p, q in zip(fused.posteriors, separate.posteriors, strict=True):
        for e in range(4):
            a, b = p.spectrum(e).flatten().sort().values, q.spectrum(e).flatten().sort().values
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max() + 1e-12))
    for a, b in zip(fused.predictive_logits(test), separate.predictive_logits(test), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.log_marginal_likelihood(), separate.log_marginal_likelihood(), **ACROSS_SHAPES)
    assert model_fingerprint(twins[1]) == before and flags == {n: p.requires_grad for n, p in twins[1].named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twins[1].modules())


def test_padding_never_counts(twins):
    batch = tiny_batch()
    wide = {k: nn.functional.pad(v, (5, 0)) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    a, b = (bm.ExpertLaplace(twins[1]).fit([x], progress=False) for x in (batch, wide))
    assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
    torch.testing.assert_close(a.predictive_logits(batch)[1], b.predictive_logits(batch)[1], **ACROSS_SHAPES)


def test_files_and_routers(twins, tmp_path):
    batch, (fused, separate) = tiny_batch(), twins
    la = bm.ExpertLaplace(separate).fit([batch], progress=False)
    la.save(tmp_path / "posterior")
    again = bm.ExpertLaplace.load(tmp_path / "posterior", separate)
    assert torch.equal(again.predictive_logits(batch)[1], la.predictive_logits(batch)[1])
    for m in twins:  # a model saved whole is a prior mean of the other
        bm.ExpertLaplace(separate, prior_mean=m)
    with bm.attach_routers(fused, "mfvr", num_samples=3) as a, bm.attach_routers(separate, "mfvr", num_samples=3) as b:
        torch.testing.assert_close(a(batch), b(batch), **ACROSS_SHAPES)


def test_a_router_that_is_a_bare_layer_is_refused():
    model = unfused(tiny_model("mixtral"), "loop")
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(16, 4, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not give logits, top-K weights and top-K indices"):
        bm.attach_routers(model, "mfvr")


def test_an_input_that_is_no_gather_is_refused():
    model = unfused(tiny_model("mixtral"), "loop")
    expert = model.model.layers[1].mlp.experts[2]
    expert.register_forward_pre_hook(lambda _, args: (args[0] * 2,), prepend=True)
    with pytest.raises(RuntimeError, match="expert 2 of 'model.layers.1.mlp.experts' is not given tokens' hidden states"):
        bm.ExpertLaplace(model).fit([tiny_batch(8)], progress=False)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gather_is_read_off_the_graph(dtype):
    source = torch.randn(3, 700, 16).to(dtype).requires_grad_()
    hidden = source * 1
    for n in (1, 2, 900):  # in bfloat16 a number above 256 would be rounded
        rows = torch.randperm(2100)[:n]
        assert torch.equal(gathered_rows(hidden.reshape(-1, 16)[rows], hidden), rows)
    flat = hidden.reshape(-1, 16)
    assert gathered_rows(flat[[3, 3]], hidden) is None  # no two slots of an expert are one token's
    assert gathered_rows(flat[[1, 2]] + flat[[2, 3]], hidden) is None
    assert gathered_rows(2 * flat[[1, 2]], hidden) is None
    assert gathered_rows(torch.randn(2, 16).to(dtype).requires_grad_() * 1, hidden) is None
    with pytest.raises(ValueError, match="cannot be told apart"):
        gathered_rows(hidden.reshape(-1, 2)[:4], hidden.reshape(-1, 2))


def test_what_counts_as_a_list_of_experts():
    good = nn.ModuleList([Expert(torch.zeros(4, 3), torch.zeros(3, 2), ("w1", "w3", "w2"))])
    assert is_unfused("model.layers.0.block_sparse_moe.experts", good)
    assert not is_unfused("model.layers.0.mlps", good) and not is_unfused("model.layers.0.mlp.shared_experts", good)
    assert not is_unfused("a.experts", nn.ModuleList([*good, nn.Identity()])) and not is_unfused("a.experts", nn.ModuleList())
