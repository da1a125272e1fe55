"""The experts' Laplace posterior on tiny models of five architectures, against autograd and dense references."""

import pytest
import torch
from tiny import ARCHITECTURES, autograd_jacobians, captured_jacobians, dense_ggn, single_items, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import bmoe_utils as bm
from bmoe_utils.experts.capture import capturing
from bmoe_utils.experts.columns import routes_of
from bmoe_utils.experts.exact import joint_predictive, prior_predictive
from bmoe_utils.experts.jacobians import item_jacobians
from bmoe_utils.models import experts_forward
from bmoe_utils.models.layers import down_weight, expert_layers
from bmoe_utils.models.readout import option_logits

# Layer norms and router probabilities are taken in float32 inside transformers even in a float64 model. Where two
# forward passes see different shapes (batch, padding) those roundings differ, and 1e-5 is what is left of the agreement.
ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request):
    return request.param


def fitted(model, batches, **options):
    return bm.ExpertLaplace(model, **options).fit(batches, progress=False)


def test_jacobians_per_item_and_class_equal_autograd(architecture):
    model = tiny_model(architecture)
    for item in single_items(tiny_batch()):  # the same shapes on both sides: agreement to float64's rounding
        J, f = captured_jacobians(model, item)
        J_ref, f_ref = autograd_jacobians(model, item)
        assert J_ref.abs().max() > 1e-3
        torch.testing.assert_close(f, f_ref, rtol=1e-10, atol=1e-10)
        assert (J - J_ref).abs().max() <= 1e-10 * J_ref.abs().max()


def test_jacobians_of_a_padded_batch_equal_those_of_its_items_alone(architecture):
    model, batch = tiny_model(architecture), tiny_batch()
    torch.testing.assert_close(captured_jacobians(model, batch)[0], autograd_jacobians(model, batch)[0], **ACROSS_SHAPES)


def test_experts_serve_only_what_an_answer_depends_on(architecture, monkeypatch):
    """Padding goes through no expert. In the last layer, once the fit has met no gradient elsewhere, only the answers' positions do,
    and the predictive is what it was."""
    model, batch, rows = tiny_model(architecture), tiny_batch(), []
    grouped = experts_forward._grouped_linear
    monkeypatch.setattr(experts_forward, "_grouped_linear", lambda x, weight, counts: rows.append(len(x)) or grouped(x, weight, counts))
    k = model.config.num_experts_per_tok
    real, answers = int(batch["attention_mask"].sum()) * k, len(batch["labels"]) * k
    assert real < batch["attention_mask"].numel() * k

    la = fitted(model, [batch])
    assert rows == [real] * 4  # two layers of two linears: the curvature's input factor is over all real tokens
    assert la.answer_only == la.layers[-1:]
    rows.clear()
    mean, cov = la.predictive_logits(batch)
    assert rows == [real] * 2 + [answers] * 2
    la.answer_only, rows[:] = [], []
    for got, expected in zip((mean, cov), la.predictive_logits(batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert rows == [real] * 4


def test_a_fit_that_sees_no_gradient_or_no_other_position_leaves_none_out():
    """Of one option the answer is certain and has no gradient; of one token there is no other position. Neither says that the answer
    depends on nothing else."""
    model, batch = tiny_model(), tiny_batch()
    certain = batch | {"option_ids": batch["option_ids"][:, :1], "labels": torch.zeros_like(batch["labels"])}
    assert fitted(model, [certain], fisher="empirical").answer_only == []
    assert fitted(model, [tiny_batch(length=1, ragged=False)]).answer_only == []
    assert fitted(model, [certain, batch], fisher="empirical").answer_only == ["model.layers.1.mlp.experts"]


def test_capture_forward_equals_the_stock_one_in_float32(architecture):
    model, batch = tiny_model(architecture, dtype=torch.float32), tiny_batch()
    stock = option_logits(model, batch)
    with capturing(model):
        torch.testing.assert_close(option_logits(model, batch), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prior_precision", [0.3, torch.rand(2, 4, dtype=torch.float64) + 0.1])
def test_full_predictive_and_evidence_equal_the_dense_ones(architecture, prior_precision):
    model, batch, test = tiny_model(architecture), tiny_batch(8, seed=1), tiny_batch(4, seed=2)
    J, logits = autograd_jacobians(model, batch)
    H = dense_ggn(J, logits)
    P = H.shape[-1]
    lam = torch.as_tensor(prior_precision, dtype=torch.float64).expand(2, 4)
    precision = H + lam[:, :, None, None] * torch.eye(P, dtype=torch.float64)
    la = fitted(model, [batch], hessian_structure="full", prior_precision=prior_precision)

    J_test, mean = autograd_jacobians(model, test)
    expected = torch.einsum("ncleP,lePQ,ndleQ->ncd", J_test, torch.linalg.inv(precision), J_test)
    got_mean, got = la.predictive_logits(test)
    torch.testing.assert_close(got_mean, mean, **ACROSS_SHAPES)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    W = torch.stack([down_weight(m).detach().flatten(1) for m in expert_layers(model).values()])
    log_likelihood = logits.log_softmax(-1).gather(1, batch["labels"][:, None]).sum()
    evidence = log_likelihood + (0.5 * (-lam * W.square().sum(-1) + P * lam.log() - torch.logdet(precision))).sum()
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, rtol=1e-6, atol=1e-5)
    # its gradient in every precision, by autograd and by hand
    x = lam.clone().requires_grad_()
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(x), x)
    trace = torch.diagonal(torch.linalg.inv(precision), dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(slope, 0.5 * (P / lam - W.square().sum(-1) - trace), rtol=1e-5, atol=1e-4)


def test_active_is_exact_in_the_last_layer_for_one_item(architecture):
    """In the last layer only the answering token has a gradient, so a single item's curvature there is a Kronecker product
    of that token's, however long the item; counting the silent tokens as samples (expand) spoils it."""
    model, batch, test = tiny_model(architecture), tiny_batch(1, length=6, ragged=False), tiny_batch(4, seed=2)
    kron, expand, full = (fitted(model, [batch], layers=[-1], prior_precision=0.2, **o) for o in
                          (dict(token_setting="active"), dict(token_setting="expand"), dict(hessian_structure="full")))
    exact = full.predictive_logits(test)[1]
    torch.testing.assert_close(kron.predictive_logits(test)[1], exact, rtol=1e-8, atol=1e-9)
    assert (expand.predictive_logits(test)[1] - exact).norm() > 1e-5 * exact.norm()


@pytest.mark.parametrize("token_setting", ["expand", "reduce", "active"])
def test_kron_is_exact_for_one_item_of_one_token(architecture, token_setting):
    """One token per expert and one item: H = (S^T g)(S^T g)^T x a a^T is a Kronecker product."""
    model, batch = tiny_model(architecture), tiny_batch(1, length=1, ragged=False)
    test = tiny_batch(4, seed=2)
    kron = fitted(model, [batch], token_setting=token_setting, prior_precision=0.2)
    full = fitted(model, [batch], hessian_structure="full", prior_precision=0.2)
    torch.testing.assert_close(kron.log_marginal_likelihood(), full.log_marginal_likelihood(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kron.predictive_logits(test)[1], full.predictive_logits(test)[1], rtol=1e-8, atol=1e-9)


def test_diag_is_the_diagonal_of_the_dense_ggn(architecture):
    model, batch = tiny_model(architecture), tiny_batch(8, seed=1)
    H = dense_ggn(*autograd_jacobians(model, batch))
    la = fitted(model, [batch], hessian_structure="diag")
    got = torch.stack([p.eigenvalues.flatten(1) for p in la.posteriors])
    torch.testing.assert_close(got, torch.diagonal(H, dim1=-2, dim2=-1), rtol=1e-4, atol=1e-6 * float(H.abs().max()))


def test_trace_of_kron_is_near_the_exact_trace_at_every_length(architecture):
    """tr(A x G / n) / tr(GGN) is 1 where inputs and gradients are uncorrelated, whatever the length. Undivided by the
    tokens (or divided by the items) it would be off by a factor that grows with the length, 6 per expert at 12 tokens.
    Measured on these five models: 0.94 to 1.23 at lengths 1 to 12."""
    model = tiny_model(architecture, scale=0.2)  # mild weights: heavy tails correlate inputs and gradients
    for length in (1, 2, 12):
        batch = tiny_batch(200, length=length, ragged=False, seed=3)
        kron, full = (fitted(model, [batch], hessian_structure=h) for h in ("kron", "full"))
        trace = [sum(float(p.spectrum(e).sum()) for p in la.posteriors for e in range(4)) for la in (kron, full)]
        assert 0.8 < trace[0] / trace[1] < 1.3, (length, trace)


def independent_factors(model, batch):
    """``A [L, E, f, f]`` and counts from forward hooks on the stock modules, item by item without padding."""
    layers = expert_layers(model)
    A = [torch.zeros(m.num_experts, *[down_weight(m).shape[-1]] * 2, dtype=torch.float64) for m in layers.values()]
    n = torch.zeros(len(layers), 4, dtype=torch.long)

    def hook(layer):
        def record(module, args, kwargs=None):
            hidden, index = args[0], args[1]
            for x, chosen in zip(hidden.detach(), index):
                for e in chosen.tolist():
                    w = module.gate_up_proj[e].detach()
                    h = x @ (w if module.is_transposed else w.T)
                    h = h + module.gate_up_proj_bias[e].detach() if module.has_bias else h
                    a = module._apply_gate(h[None])[0]
                    A[layer][e] += torch.outer(a, a)
                    n[layer, e] += 1
        return record

    handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(layers.values())]
    with torch.no_grad():
        for item in single_items(batch):
            option_logits(model, item)
    for handle in handles:
        handle.remove()
    return torch.stack(A), n


def test_every_routed_expert_has_its_factor_and_padding_none(architecture):
    """Against activations recomputed from the stock modules without any padding; identical pads would route alike and
    double a factor. Fails if a routed expert's factor is missing or sits with another expert."""
    model, batch = tiny_model(architecture), tiny_batch(6, length=9)
    assert (batch["attention_mask"] == 0).any()
    A, n = independent_factors(model, batch)
    exact = dense_ggn(*autograd_jacobians(model, batch))
    la = fitted(model, [batch])
    assert (la.tokens_per_expert == n).all() and (n > 0).any()
    for layer, posterior in enumerate(la.posteriors):
        for e in range(4):
            u = posterior.basis_a[e]
            alpha_gamma = posterior.eigenvalues[e]  # [d, f] = gamma_i alpha_j / n
            if exact[layer, e].trace() == 0:  # no token, or in the last layer none at an answer's position
                assert (alpha_gamma == 0).all()
                continue
            assert alpha_gamma.max() > 0, f"expert {e} of layer {layer} was routed to but has no curvature"
            # the eigenvalues' profile along A, scaled by tr(A), gives A back whatever the scale of G
            alpha = alpha_gamma.sum(0) / alpha_gamma.sum() * A[layer, e].trace()
            torch.testing.assert_close((u * alpha) @ u.T, A[layer, e], **ACROSS_SHAPES)


@pytest.mark.parametrize("options", [dict(hessian_structure=s) for s in ("kron", "ekfac", "diag", "full")]
                         + [dict(rank=3), dict(hessian_structure="ekfac", rank=0.9)])
def test_experts_without_tokens(options):
    """One token in all: most experts get nothing. The fit stands, they keep the prior, and reaching them later works."""
    model, batch, test = tiny_model(), tiny_batch(1, length=1, ragged=False), tiny_batch(4, seed=2)
    la = fitted(model, [batch], prior_precision=0.5, **options)
    idle = la.tokens_per_expert == 0
    assert idle.sum() == 4  # 2 layers x (4 experts - top 2)
    J, _ = autograd_jacobians(model, test)
    with capturing(model):
        _, captured = la.captured(test)
    parts = list(la._covariances(captured, la.prior_precision_by_expert(), 4))
    prior_only = torch.einsum("ncleP,ndleP->lencd", J, J) / 0.5
    for layer, e in idle.nonzero().tolist():
        torch.testing.assert_close(parts[layer][e], prior_only[layer, e], **ACROSS_SHAPES)


@pytest.mark.parametrize("options", [dict(), dict(token_setting="reduce"), dict(token_setting="active"),
                                     dict(hessian_structure="diag"), dict(hessian_structure="full"),
                                     dict(hessian_structure="ekfac"), dict(fisher="empirical"), dict(fisher="mc")])
def test_results_do_not_depend_on_batch_size_or_padding(options, architecture):
    model, batch, test = tiny_model(architecture), tiny_batch(7, seed=4), tiny_batch(4, seed=5)
    wide = {k: torch.nn.functional.pad(v, (5, 0)) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    pairs = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 7, 2)]
    reference = fitted(model, [batch], **options)
    for batches in (list(single_items(batch)), [wide], pairs):
        la = fitted(model, batches, **options)
        assert la.num_items == 7
        torch.testing.assert_close(la.log_marginal_likelihood(), reference.log_marginal_likelihood(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(la.predictive_logits(test)[1], reference.predictive_logits(test)[1], rtol=1e-3, atol=1e-4)


def test_items_with_fewer_options_read_the_same_alone_and_in_company():
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch])
    mean, cov = la.predictive_logits(batch)
    assert mean[1, 3] == -torch.inf and (cov[1, 3] == 0).all() and (cov[1, :, 3] == 0).all()
    alone = {k: v[1:2] for k, v in batch.items()} | {"option_ids": batch["option_ids"][1:2, :3]}
    mean1, cov1 = la.predictive_logits(alone)
    torch.testing.assert_close(mean1[0], mean[1, :3], **ACROSS_SHAPES)
    torch.testing.assert_close(cov1[0], cov[1, :3, :3], rtol=1e-4, atol=1e-5)
    for link in ("mc", "probit", "map"):
        p = la(batch, link_approx=link)
        assert p[1, 3] == 0
        torch.testing.assert_close(p.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(la(batch, link_approx="map"), option_logits(model, batch).softmax(-1), **ACROSS_SHAPES)


def test_layers_can_be_chosen(architecture):
    model, batch, test = tiny_model(architecture), tiny_batch(6), tiny_batch(4, seed=2)
    both = fitted(model, [batch])
    parts = [fitted(model, [batch], layers=[i]) for i in (0, -1)]
    total = sum(la.predictive_logits(test)[1] for la in parts)
    torch.testing.assert_close(total, both.predictive_logits(test)[1], rtol=1e-8, atol=1e-10)
    assert parts[0].layers + parts[1].layers == both.layers


def test_joint_predictive_is_the_dense_posterior_over_all_experts_at_once(architecture):
    """Against the inverse of the dense GGN over every expert of every layer, not block-diagonal."""
    model, batch, test = tiny_model(architecture), tiny_batch(5, seed=1), tiny_batch(4, seed=2)
    (J, logits), (J_test, _) = autograd_jacobians(model, batch), autograd_jacobians(model, test)
    p = logits.softmax(-1)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    J, J_test = J.flatten(2), J_test.flatten(2)
    lam = torch.tensor([[0.5], [2.0]], dtype=torch.float64).expand(2, 4)
    prior = lam[:, :, None].expand(2, 4, J.shape[-1] // 8).flatten()
    H = torch.einsum("ncP,ncd,ndQ->PQ", J, Lambda, J) + torch.diag(prior)
    expected = J_test @ torch.linalg.inv(H) @ J_test.mT
    la = bm.ExpertLaplace(model, prior_precision=lam)
    got = torch.cat([cov for _, cov in joint_predictive(la, list(single_items(batch)), [test], progress=False)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    alone = torch.cat([cov for _, cov in prior_predictive(la, [test], progress=False)])
    torch.testing.assert_close(alone, (J_test / prior) @ J_test.mT, **ACROSS_SHAPES)


# ---- the model is a guest -------------------------------------------------------------------------------------------
def snapshot(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()], model.get_experts_implementation(),
            [p.grad for p in model.parameters()], [sorted(vars(m)) for m in model.modules()])


def assert_same(before, after):
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("failing", [None, "forward", "gradient"])
def test_model_is_unchanged_bit_for_bit_also_after_a_failure(architecture, failing, monkeypatch):
    model, batch = tiny_model(architecture), tiny_batch()
    model.train()
    model.get_input_embeddings().eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    la = bm.ExpertLaplace(model)
    if failing is None:
        la.fit([batch], progress=False).predictive_logits(batch)
        la(batch)
    else:
        calls = {"n": 0}
        target, name = {"forward": (experts_forward, "_grouped_linear"), "gradient": (torch.autograd, "grad")}[failing]
        original = getattr(target, name)

        def breaks(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == 8:
                raise MemoryError("no room")
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, breaks)
        with pytest.raises(MemoryError):
            la.fit([batch] * 4, progress=False)
        monkeypatch.undo()
        assert la.posteriors is None and experts_forward._tape is None
    assert_same(before, snapshot(model))


def test_a_failed_refit_keeps_the_previous_posterior():
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch])
    before = la.posteriors
    broken = batch | {"labels": torch.full((5,), -1)}
    la.options["fisher"] = "empirical"
    with pytest.raises(ValueError, match="label"):
        la.fit([batch, broken], progress=False)
    assert la.posteriors is before


def test_no_weight_gradient_and_no_vocabulary_logits(architecture):
    """During fit and predict no parameter is in the graph, and no operation gives a tensor as wide as the vocabulary."""
    model, batch = tiny_model(architecture), tiny_batch()
    vocab, seen = model.config.vocab_size, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and vocab in t.shape[-1:]:
                    seen.append(str(op))
            assert not any(p.requires_grad for p in model.parameters())
            return out

    la = bm.ExpertLaplace(model)
    with capturing(model), Watch():
        la.fit([batch], progress=False)
        la.predictive_logits(batch)
    assert not seen
