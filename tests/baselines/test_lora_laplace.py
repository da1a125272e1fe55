"""Laplace-LoRA against autograd's Jacobians and the dense GGN over every LoRA matrix, in float64."""

import pytest
import torch
from architectures import FAILS, batch_for, build, found
from test_baselines import lora_model, state_of
from tiny import single_items, tiny_batch, tiny_model

from bmoe_utils.baselines import lora_laplace
from bmoe_utils.baselines.lora_laplace import LoraLaplace, lora_linears
from bmoe_utils.experts.curvature import Eigenbasis
from bmoe_utils.models import training as train
from bmoe_utils.models.readout import option_logits

ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)  # norms are taken in float32 inside transformers


def jacobians(la, batch):
    """Reference: per matrix ``[B, C, P]`` and the logits, by plain autograd, item by item without padding."""
    weights, out, logits = [m.weight for m in la.matrices.values()], [], []
    for w in weights:
        w.requires_grad_()
    for item in single_items(batch):
        f = option_logits(la.model, item)[0]
        logits.append(f.detach())
        rows = [torch.autograd.grad(x, weights, retain_graph=True, materialize_grads=True) if x.isfinite()
                else [torch.zeros_like(w) for w in weights] for x in f]
        out.append([torch.stack([row[i].flatten() for row in rows]) for i in range(len(weights))])
    return [torch.stack([item[i] for item in out]) for i in range(len(weights))], torch.stack(logits)


def one_token(seed=1):
    """One item of one token: A (x) G is then the dense GGN."""
    return tiny_batch(1, length=1, seed=seed, ragged=False)


def compared(model, batch):
    """Of every matrix the Jacobians as captured and by autograd, ``[B, C, P]`` each."""
    la, before = LoraLaplace(model), state_of(model)
    f, layers, routes = la.captured(batch, lambda f: torch.eye(f.shape[1], dtype=f.dtype)[:, None].expand(f.shape[1], *f.shape))
    assert state_of(model) == before
    reference, logits = jacobians(la, batch)
    torch.testing.assert_close(f, logits, **ACROSS_SHAPES)
    for (a, g), J in zip(layers, reference, strict=True):
        ours = torch.zeros(*f.shape, g.shape[2], a.shape[1], dtype=f.dtype)
        for t, item in enumerate(routes.item):
            ours[item] += g[:, t, :, None] * a[t]
        yield ours.flatten(2).double(), J.double()


def test_captured_jacobians_equal_autograd_for_every_matrix():
    pairs = list(compared(lora_model(), tiny_batch()))
    assert len(pairs) == 2 * 3 * 2  # layers, projections, A and B
    for ours, J in pairs:
        assert J.abs().max() > 1e-4
        torch.testing.assert_close(ours, J, **ACROSS_SHAPES)


@pytest.mark.parametrize("kind", [k for k in found()[0] if FAILS.get(k, (None,))[0] is None])
def test_of_every_architecture_the_jacobians_are_exact_or_refused(kind):
    """Latent attention reads ``[B, 1, T, m]``; one architecture a token of the past alone, which is no row a token."""
    model = train.add_lora(build(kind), rank=2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = (p.normal_(0, 0.3) if "lora_B" in name else p).double()
    if kind == "zaya":
        with pytest.raises(ValueError, match="not one row a token: its posterior cannot be captured; adapt other layers"):
            list(compared(model, batch_for(kind)))
        return
    largest = 0.0
    for ours, J in compared(model, batch_for(kind)):
        largest = max(largest, float(J.abs().max()))
        # some architectures compute parts in float32 whatever the model's type
        torch.testing.assert_close(ours, J, rtol=1e-4, atol=1e-4 * max(float(J.abs().max()), 1e-3))
    assert largest > 1e-4


def test_one_token_equals_the_dense_posterior():
    model, fit, test = lora_model(), one_token(), tiny_batch(4, seed=2)
    la = LoraLaplace(model, prior_precision=0.4).fit([fit], progress=False)
    J, f = jacobians(la, fit)
    J_test, _ = jacobians(la, test)
    p = f.softmax(-1)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    cov, evidence = 0.0, f.log_softmax(-1).gather(1, fit["labels"][:, None]).sum()
    for j, k, m in zip(J, J_test, la.matrices.values(), strict=True):
        H = torch.einsum("ncP,ncd,ndQ->PQ", j, Lambda, j)
        precision = H + 0.4 * torch.eye(len(H), dtype=H.dtype)
        cov = cov + k @ torch.linalg.solve(precision, k.flatten(0, 1).mT).mT.view_as(k).mT
        evidence = evidence - 0.2 * m.weight.detach().square().sum() - torch.logdet(precision / 0.4) / 2
    assert max(p.eigenvalues.max() for p in la.posteriors) > 0.04  # beside a prior of 0.4 the curvature is felt
    torch.testing.assert_close(la.predictive_logits(test)[1], cov, **ACROSS_SHAPES)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, **ACROSS_SHAPES)


def test_factors_are_sums_over_the_real_tokens_of_all_batches():
    model, batches = lora_model(), [tiny_batch(3, seed=1), tiny_batch(4, seed=2)]
    la = LoraLaplace(model).fit(batches, progress=False)
    A = [0.0] * len(la.matrices)
    G, n = [0.0] * len(la.matrices), 0
    for batch in batches:
        for item in single_items(batch):
            p = option_logits(model, item).detach().softmax(-1)[0]
            root = torch.linalg.cholesky(torch.diag(p[p > 0]) - p[p > 0][:, None] * p[p > 0] + 1e-14 * torch.eye(int((p > 0).sum())))
            full = torch.zeros(len(p), root.shape[1], dtype=p.dtype)
            full[p > 0] = root
            _, layers, _ = la.captured(item, lambda f, S=full: S.mT[:, None])
            n += item["attention_mask"].sum()
            for i, (a, g) in enumerate(layers):
                A[i], G[i] = A[i] + a.mT @ a, G[i] + torch.einsum("ksi,ksj->ij", g, g)
    for posterior, a, g in zip(la.posteriors, A, G, strict=True):
        dense = torch.einsum("ij,kl->ikjl", g, a).reshape(g.numel() // len(g) * len(a), -1) / n
        U = torch.einsum("ij,kl->ikjl", posterior.basis_g[0], posterior.basis_a[0]).reshape(len(dense), -1)
        ours = U @ torch.diag(posterior.eigenvalues[0].flatten()) @ U.mT
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6 * dense.abs().max().item())


def test_the_wide_side_is_held_in_a_few_eigenvectors_and_curvature_is_not_invented(monkeypatch):
    model, fit, test = lora_model(), [tiny_batch(8, seed=1)], tiny_batch(4, seed=2)
    whole = LoraLaplace(model, prior_precision=0.1).fit(fit, progress=False)
    monkeypatch.setattr(lora_laplace, "WIDE", 4)
    low, all_of_it = (LoraLaplace(model, rank=r, prior_precision=0.1).fit(fit, progress=False) for r in (3, 16))
    for p, m in zip(low.posteriors, low.matrices.values(), strict=True):
        assert p.eigenvalues.shape[1:] == tuple(3 if w > 4 else w for w in m.weight.shape)
    torch.testing.assert_close(all_of_it.predictive_logits(test)[1], whole.predictive_logits(test)[1], **ACROSS_SHAPES)
    variance = [torch.diagonal(la.predictive_logits(test)[1], dim1=1, dim2=2) for la in (whole, low)]
    assert (variance[1] >= variance[0] - 1e-6).all() and variance[1].sum() < 0.999 * prior_variance(low, test)


def prior_variance(la, batch):
    """The sum of the variances without any curvature."""
    la = LoraLaplace(la.model, prior_precision=la.prior_precision.item())
    la.posteriors = [Eigenbasis(torch.zeros(1, *m.weight.shape, dtype=m.weight.dtype)) for m in la.matrices.values()]
    return torch.diagonal(la.predictive_logits(batch)[1], dim1=1, dim2=2).sum()


def test_the_tuned_prior_is_the_evidence_optimum_and_predictions_repeat():
    model, batch = lora_model(), tiny_batch()
    la = LoraLaplace(model).fit([batch], progress=False)
    best = la.optimize_prior_precision()
    assert all(la.log_marginal_likelihood() > la.log_marginal_likelihood(best * x) for x in (0.5, 0.9, 1.1, 2.0))
    p = la(batch)
    assert torch.equal(p, la(batch)) and (p[batch["option_ids"] < 0] == 0).all()
    assert (la.signals()["answer_information"] > 0).all()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="no LoRA matrices"):
        lora_linears(tiny_model())
    model, batch = lora_model(), tiny_batch()
    with pytest.raises(ValueError, match="rank=0"):
        LoraLaplace(model, rank=0)
    la = LoraLaplace(model)
    with pytest.raises(RuntimeError, match="not fitted yet"):
        la(batch)
    with pytest.raises(ValueError, match="no batch"):
        la.fit([], progress=False)
    with pytest.raises(ValueError, match="batch 0 has items without a label"):
        la.fit([batch | {"labels": torch.full_like(batch["labels"], -1)}], progress=False)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="did not run"), model.disable_adapter():
        la.fit([batch], progress=False)
    assert state_of(model) == before and la.posteriors is None
