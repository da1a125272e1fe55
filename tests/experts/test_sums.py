"""What is summed over a fitting set, against loops in float64."""

import pytest
import torch
from routed import OPTIONS, add, dense_jacobians, slots, summed

from bmoe_utils.experts import sums as summing
from bmoe_utils.experts.jacobians import Routes
from bmoe_utils.experts.sums import factor_bytes, first_sums


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_factors_stay_with_their_expert_when_one_has_no_token(block, monkeypatch):
    monkeypatch.setitem(summing.BLOCK, "cpu", block)
    a, g, routes = slots()
    kron = summed([(a, g, routes)])
    A, G = kron.A.matrix(), kron.G.matrix()
    for e in range(4):
        mine = routes.expert == e
        torch.testing.assert_close(A[e], a[mine].T @ a[mine])
        torch.testing.assert_close(G[e], sum(x[mine].T @ x[mine] for x in g))
    assert (A[2] == 0).all() and (G[2] == 0).all()
    assert torch.equal(kron.n, routes.counts)


def test_reduce_takes_one_sample_per_item_and_expert():
    a, g, routes = slots()
    kron = summed([(a, g, routes)], token_setting="reduce")
    A, G, n = torch.zeros(4, 4, 4).double(), torch.zeros(4, 3, 3).double(), torch.zeros(4, dtype=torch.long)
    for e in range(4):
        for item in range(6):
            mine = (routes.expert == e) & (routes.item == item)
            if mine.any():
                mean, total = a[mine].mean(0), g[:, mine].sum(1)
                A[e] += torch.outer(mean, mean)
                G[e] += total.T @ total
                n[e] += 1
    torch.testing.assert_close(kron.A.matrix(), A)
    torch.testing.assert_close(kron.G.matrix(), G)
    assert torch.equal(kron.n, n)


@pytest.mark.parametrize("rank", [None, 2])
def test_active_leaves_out_the_slots_without_a_gradient_in_any_column(rank):
    a, g, routes = slots()
    g[:, ::2] = 0
    g[0, 1::4] = g[-1, 3::4] = 0  # these have one in the other columns
    got = summed([(a, g, routes)], token_setting="active", rank=rank)
    chosen = torch.arange(40) % 2 == 1
    expected = summed([(a[chosen], g[:, chosen], routes.keep(chosen))], rank=rank)
    for name, tensor in got.state().items():
        if "progress" not in name:
            torch.testing.assert_close(tensor, expected.state()[name])
    all_of_a = summed([(a, g, routes)], rank=rank)
    assert torch.equal(all_of_a.n, routes.counts) and not torch.allclose(*[x.A.tensors()["M" if rank is None else "Y"]
                                                                         for x in (all_of_a, got)])


@pytest.mark.parametrize("tokens_per_item", [1, 10])
def test_kron_has_the_trace_of_the_exact_ggn_where_inputs_and_gradients_are_independent(tokens_per_item):
    """E tr(A x G / n) = E tr(GGN) then, for any number of tokens an item. With 20,000 slots of independent normals the
    two traces differ by sampling alone, below 2% (the largest seen over seeds is 1.2%); a missing division by the tokens
    would be a factor in the thousands, one by the items a factor of 10."""
    S = 20_000
    batch = slots(S=S, items=S // tokens_per_item, seed=9)
    kron, diag = (summed([batch], hessian_structure=s) for s in ("kron", "diag"))
    for e in (0, 1, 3):
        assert abs(float(kron.finish().spectrum(e).sum() / diag.H[e].sum()) - 1) < 0.02


def test_diagonal_keeps_the_terms_between_tokens_of_an_item():
    """Repeating a token in its item quadruples the exact diagonal; a per-token diagonal would double it."""
    a, g, routes = slots(S=1, items=1)
    one = summed([(a, g, routes)], hessian_structure="diag")
    twice = Routes(routes.item.repeat(2), 2 * routes.counts, 1)
    two = summed([(a.repeat(2, 1), g.repeat(1, 2, 1), twice)], hessian_structure="diag")
    torch.testing.assert_close(two.H, 4 * one.H)


def test_diagonal_is_that_of_the_exact_ggn():
    batch = slots()
    expected = dense_jacobians(*batch).square().sum((1, 2))
    torch.testing.assert_close(summed([batch], hessian_structure="diag").H, expected)


@pytest.mark.parametrize("options", [dict(), dict(rank=2), dict(rank=0.5), dict(hessian_structure="diag"),
                                     dict(hessian_structure="full")])
def test_sums_of_two_parts_merge_into_those_of_the_whole(options):
    parts = [slots(seed=1), slots(seed=2)]
    whole, first, second = (summed(x, **options) for x in (parts, parts[:1], parts[1:]))
    first.merge(second)
    for name, tensor in whole.state().items():
        torch.testing.assert_close(tensor, first.state()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(), dict(rank=2), dict(hessian_structure="diag"), dict(hessian_structure="full")])
def test_restored_sums_go_on_bit_for_bit(options):
    whole, half = summed([slots(seed=1), slots(seed=2)], **options), summed([slots(seed=1)], **options)
    again = first_sums(OPTIONS | options, (4, 3, 4), torch.zeros(0, dtype=torch.float64))
    again.restore({k: v.clone() for k, v in half.state().items()})
    add(again, *slots(seed=2))
    assert all(torch.equal(v, again.state()[k]) for k, v in whole.state().items())


def test_bf16_models_are_summed_in_float32_and_their_memory_is_known_beforehand():
    like = torch.zeros(2, dtype=torch.bfloat16)
    for options, numbers in ((dict(), 4 * (30**2 + 40**2)), (dict(rank=2), 2 * 4 * (30 + 40) * 10),
                             (dict(hessian_structure="diag"), 4 * 1200)):
        sums = first_sums(OPTIONS | options, (4, 30, 40), like)
        assert all(t.dtype in (torch.float32, torch.float64, torch.long) for t in sums.state().values())
        assert 4 * numbers <= factor_bytes(OPTIONS | options, (4, 30, 40), like) <= 4 * numbers + 8 * 60
