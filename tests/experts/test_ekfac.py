"""EKFAC against the dense GGN of the same items and columns, in float64."""

import pytest
import torch
from routed import slots, summed
from tiny import ARCHITECTURES, tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.experts.sums import SquareSums


def fitted(model, batches, **options):
    return bm.ExpertLaplace(model, **options).fit(batches, progress=False)


def dense(posterior, e):
    """``H_e [P, P]`` of a posterior of any structure."""
    if hasattr(posterior, "vectors"):
        return (posterior.vectors[e] * posterior.values[e]) @ posterior.vectors[e].T
    U = torch.kron(posterior.basis_g[e], posterior.basis_a[e])
    return (U * posterior.eigenvalues[e].flatten()) @ U.T


@pytest.mark.parametrize("options", [dict(), dict(token_setting="reduce"), dict(token_setting="active"), dict(fisher="mc"),
                                     dict(fisher="empirical"), dict(rank=2), dict(rank=0.8),
                                     dict(rank=4, token_setting="reduce", fisher="mc")])
def test_never_further_from_the_dense_ggn_than_kron(options):
    """In Frobenius norm, every expert of every layer of five architectures; and nearer by far as a rule. Both differ from the GGN
    in the same basis, in which EKFAC has its exact diagonal."""
    nearer = []
    for seed, architecture in enumerate(ARCHITECTURES):
        model, batches = tiny_model(architecture, seed=seed), [tiny_batch(6, seed=2 * seed + s) for s in range(2)]
        ekfac, kron = (fitted(model, batches, hessian_structure=h, **options) for h in ("ekfac", "kron"))
        full = fitted(model, batches, hessian_structure="full", fisher=options.get("fisher", "exact"))
        for one, other, exact in zip(ekfac.posteriors, kron.posteriors, full.posteriors):
            assert torch.equal(one.basis_a, other.basis_a) and torch.equal(one.basis_g, other.basis_g)
            for e in range(4):
                H = dense(exact, e)
                U = torch.kron(one.basis_g[e], one.basis_a[e])
                torch.testing.assert_close(one.spectrum(e), torch.einsum("pi,pq,qi->i", U, H, U), rtol=1e-9, atol=1e-9)
                distance = [float((H - dense(p, e)).norm()) for p in (one, other)]
                assert distance[0] <= distance[1] + 1e-13 * float(H.norm()), (architecture, e, distance)
                nearer.append(distance[0] < 0.95 * distance[1])
    assert sum(nearer) > len(nearer) / 2


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_exact_where_the_basis_is(architecture, rank):
    """One item of one token: its curvature is diagonal in the factors' eigenbasis (three columns: rank 3 holds all of it)."""
    model, batch, test = tiny_model(architecture), tiny_batch(1, length=1, ragged=False), tiny_batch(4, seed=2)
    ekfac, full = (fitted(model, [batch], hessian_structure=h, prior_precision=0.2, rank=r)
                   for h, r in (("ekfac", rank), ("full", None)))
    torch.testing.assert_close(ekfac.log_marginal_likelihood(), full.log_marginal_likelihood(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ekfac.predictive_logits(test)[1], full.predictive_logits(test)[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("repeats", [1, 5])
def test_the_trace_is_the_exact_one_also_with_repeated_tokens(repeats):
    """A rotation keeps a trace. Moments per token instead of per item lose the terms between an item's tokens, which shows where
    tokens repeat: there they would be a fraction 1/repeats of the exact trace."""
    model, batch = tiny_model(), tiny_batch(8, length=4, ragged=False)
    batch = batch | {k: batch[k].repeat_interleave(repeats, 1) for k in ("input_ids", "attention_mask")}
    ekfac, diag = (fitted(model, [batch], hessian_structure=h) for h in ("ekfac", "diag"))
    for one, other in zip(ekfac.posteriors, diag.posteriors):
        torch.testing.assert_close(one.spectra().sum(1), other.spectra().sum(1), rtol=1e-9, atol=1e-9)


def test_moments_are_those_of_items_not_of_tokens():
    a, g, routes = slots(S=60, items=3)
    basis = summed([(a, g, routes)], rank=2).finish()
    moments = SquareSums(torch.zeros(4, 2, 2, dtype=torch.float64), basis)
    moments.open(a, a.square().sum(1), routes)
    for column in g:
        moments.column(column, column.square().sum(1))
    moments.close()
    expected = torch.zeros(4, 2, 2, dtype=torch.float64)
    for e in range(4):
        for n in range(3):
            mine = (routes.expert == e) & (routes.item == n)
            J = torch.einsum("ksi,sj->kij", g[:, mine] @ basis.basis_g[e], a[mine] @ basis.basis_a[e])
            expected[e] += J.square().sum(0)
    torch.testing.assert_close(moments.H, expected)


def test_mc_draws_the_same_labels_in_both_passes():
    """So that its moments are the diagonal of one and the same Monte-Carlo GGN, whose basis the first pass found."""
    model, batches = tiny_model(), [tiny_batch(6, seed=s) for s in range(3)]
    ekfac, diag = (fitted(model, batches, hessian_structure=h, fisher="mc", seed=5) for h in ("ekfac", "diag"))
    for one, other in zip(ekfac.posteriors, diag.posteriors):
        torch.testing.assert_close(one.spectra().sum(1), other.spectra().sum(1), rtol=1e-9, atol=1e-9)


def test_a_loader_that_cannot_be_gone_through_twice_is_refused_beforehand():
    model, batch = tiny_model(), tiny_batch()
    taken = []

    def once():
        taken.append(1)
        yield batch

    with pytest.raises(ValueError, match="goes through the data 2 times"):
        fitted(model, once(), hessian_structure="ekfac")
    assert not taken

    class Shrinking(list):
        def __iter__(self):
            yield from [self.pop() for _ in range(len(self) // 2)]

    with pytest.raises(ValueError, match="items the first time and"):
        fitted(model, Shrinking([batch] * 4), hessian_structure="ekfac")
