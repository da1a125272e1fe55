"""The last-layer Laplace against laplace-torch, and against the dense GGN over the head's rows where items differ in their words."""

import pytest
import torch
from tiny import VOCAB, tiny_batch, tiny_model
from torch import nn

from bmoe_utils.baselines.last_layer import LastLayerLaplace
from bmoe_utils.models import readout
from bmoe_utils.models.files import model_fingerprint

REASON = "laplace-torch is a test's reference only; install it without its dependencies (torchvision breaks transformers)"
# A tiny float64 model takes its norms in float32: two passes over other shapes agree to this.
ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)


def letters(seed, items=12, options=3):
    """Items that all have the same option tokens, none missing."""
    batch = tiny_batch(items, options=options, seed=seed)
    return batch | {"option_ids": torch.arange(5, 5 + options).expand(items, -1).contiguous()}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_letters_equal_laplace_torch(structure):
    laplace = pytest.importorskip("laplace", reason=REASON)
    backend = laplace.curvature.AsdlGGN  # the default one makes the full GGN from float32 products
    model, fit, test = tiny_model(), letters(1), letters(2, items=5)
    ours = LastLayerLaplace(model, hessian_structure=structure, prior_precision=0.7).fit([fit], progress=False)
    phi, labels = ours.features(fit)[1], fit["labels"]
    head = nn.Linear(phi.shape[1], 3, bias=False).double()
    head.weight.data = model.get_output_embeddings().weight.data[5:8].clone()
    reference = laplace.Laplace(nn.Sequential(nn.Identity(), head), "classification", subset_of_weights="last_layer",
                                hessian_structure=structure, prior_precision=0.7, last_layer_name="1", backend=backend)
    reference.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(phi, labels), batch_size=len(phi)))
    mean, cov = ours.predictive_logits(test)
    f, variance = reference._glm_predictive_distribution(ours.features(test)[1])
    torch.testing.assert_close(mean, f)
    torch.testing.assert_close(cov, variance)
    for lam in (0.01, 0.7, 30.0):
        theirs = reference.log_marginal_likelihood(prior_precision=torch.tensor(lam, dtype=torch.float64))
        torch.testing.assert_close(ours.log_marginal_likelihood(lam), theirs.squeeze())


def dense(model, fit, test, lam, structure):
    """By autograd over every row of the head: the blocks' full GGN, its evidence and predictive covariance."""
    head = model.get_output_embeddings().weight

    def jacobian(batch):
        rows = [torch.autograd.grad(x, head, retain_graph=True)[0].flatten() if x.isfinite() else torch.zeros(head.numel()).to(x)
                for f in [readout.option_logits(model, batch)] for x in f.flatten()]
        return torch.stack(rows).view(*batch["option_ids"].shape, -1)

    J, f = jacobian(fit), readout.option_logits(model, fit).detach()
    p = f.softmax(-1)
    H = torch.einsum("ncP,ncd,ndQ->PQ", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
    H = torch.diag(H.diagonal()) if structure == "diag" else H
    precision = H + lam * torch.eye(len(H), dtype=H.dtype)
    rows = fit["option_ids"][fit["option_ids"] >= 0].unique()  # the weights whose evidence it is; the others' terms cancel
    W = head.detach()[rows]
    evidence = (f.log_softmax(-1).gather(1, fit["labels"][:, None]).sum() - lam / 2 * W.square().sum()
                - (torch.logdet(precision) - len(H) * torch.tensor(lam, dtype=H.dtype).log()) / 2)
    J = jacobian(test)
    return evidence, J @ torch.linalg.solve(precision, J.flatten(0, 1).mT).mT.view_as(J).mT


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe"])
def test_words_that_differ_by_item_equal_the_dense_posterior_over_all_rows(structure, architecture):
    """Ragged items, options missing, test words that no fitting item had; Granite divides its logits by a constant of its own."""
    scaled = {"logits_scaling": 3.0} if architecture == "granitemoe" else {}
    model, fit, test = tiny_model(architecture, **scaled), tiny_batch(8, seed=1), tiny_batch(5, seed=2)
    seen = fit["option_ids"].unique()
    assert not torch.isin(test["option_ids"][test["option_ids"] >= 0], seen).all() and (test["option_ids"] < 0).any()
    la = LastLayerLaplace(model, hessian_structure=structure, prior_precision=0.3).fit([fit], progress=False)
    evidence, cov = dense(model, fit, test, 0.3, structure)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, **ACROSS_SHAPES)
    mean, ours = la.predictive_logits(test)
    torch.testing.assert_close(mean, readout.option_logits(model, test))
    torch.testing.assert_close(ours, cov, **ACROSS_SHAPES)
    if architecture == "granitemoe":
        assert torch.equal(la.features(test)[2][0], torch.full((4,), 1 / 3, dtype=torch.float64))


def test_kron_is_the_dense_posterior_for_one_item():
    model, test = tiny_model(), tiny_batch(5, seed=2)
    fit = {k: v[:1] for k, v in tiny_batch(8, seed=1).items()}
    la = LastLayerLaplace(model, prior_precision=0.3).fit([fit], progress=False)
    evidence, cov = dense(model, fit, test, 0.3, "full")
    torch.testing.assert_close(la.predictive_logits(test)[1], cov, **ACROSS_SHAPES)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, **ACROSS_SHAPES)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_batches_make_no_difference_and_the_model_none_either(structure):
    model, whole, test = tiny_model(), tiny_batch(8, seed=1, ragged=False), tiny_batch(5, seed=2)
    halves = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
    before = model_fingerprint(model)
    one, two = (LastLayerLaplace(model, hessian_structure=structure).fit(x, progress=False) for x in ([whole], halves))
    torch.testing.assert_close(one.predictive_logits(test)[1], two.predictive_logits(test)[1], **ACROSS_SHAPES)
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood(), **ACROSS_SHAPES)
    p = two(test)
    assert (p[test["option_ids"] < 0] == 0).all() and torch.equal(p, two(test))
    assert model_fingerprint(model) == before and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_tuned_prior_is_the_evidence_optimum():
    la = LastLayerLaplace(tiny_model()).fit([tiny_batch(8, seed=1)], progress=False)
    best = la.optimize_prior_precision()
    at = la.log_marginal_likelihood()
    assert all(at > la.log_marginal_likelihood(best * x) for x in (0.5, 0.9, 1.1, 2.0))


def test_a_wrapped_head_is_read_through(monkeypatch):
    """A head that something has wrapped gives the whole vocabulary's logits: same features, same posterior."""
    model, batch = tiny_model(), tiny_batch()
    plain = LastLayerLaplace(model).features(batch)
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    for ours, theirs in zip(LastLayerLaplace(model).features(batch), plain, strict=True):
        torch.testing.assert_close(ours, theirs, **ACROSS_SHAPES)
    assert VOCAB == model.lm_head.out_features


def test_errors_name_what_is_wrong():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match="'kfac' is not one of"):
        LastLayerLaplace(model, hessian_structure="kfac")
    la = LastLayerLaplace(model)
    with pytest.raises(RuntimeError, match="not fitted yet"):
        la(batch)
    with pytest.raises(ValueError, match="no batch"):
        la.fit([], progress=False)
    with pytest.raises(ValueError, match="batch 1 has items without a label"):
        la.fit([batch, batch | {"labels": torch.full_like(batch["labels"], -1)}], progress=False)
    assert la.tokens is None
