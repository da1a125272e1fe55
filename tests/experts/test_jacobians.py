"""Per-item Jacobians and their inner products: every form against the loop over slots, in float64."""

import pytest
import torch
from routed import dense_jacobians, slots
from torch.utils._python_dispatch import TorchDispatchMode

from bmoe_utils.experts import jacobians
from bmoe_utils.experts.jacobians import Routes, inner_products, item_jacobians, project


@pytest.fixture(params=[1, 300, 10**9])
def chunk(request, monkeypatch):
    monkeypatch.setitem(jacobians.CHUNK_ELEMENTS, "cpu", request.param)
    return request.param


def test_item_jacobians_equal_the_loop_over_slots(chunk):
    a, g, routes = slots()
    J = torch.zeros(4, 6, 3, 3, 4, dtype=torch.float64)
    for e, items, block in item_jacobians(a, g, routes):
        assert (J[e, items] == 0).all()  # a pair comes once
        J[e, items] = block
    torch.testing.assert_close(J, dense_jacobians(a, g, routes))


@pytest.mark.parametrize("form", [None, "jacobian", "gram"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("small", [0, 10**9])  # weights copied for every pair, or an expert at a time
def test_inner_products_agree_in_every_form(form, weighted, small, chunk, monkeypatch):
    monkeypatch.setattr(jacobians, "SMALL_WEIGHT", small)
    a, g, routes = slots(S=60, d=5, f=4, seed=3)
    weight = torch.rand(4, 5, 4, dtype=torch.float64) if weighted else None
    J = dense_jacobians(a, g, routes)
    expected = torch.einsum("enkij,enlij->enkl", J if weight is None else J * weight[:, None, None], J)
    torch.testing.assert_close(inner_products(a, g, routes, weight, form), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["jacobian", "gram"])
@pytest.mark.parametrize("small", [0, 10**9])
def test_several_weights_give_what_each_gives_alone_to_the_last_bit(form, small, chunk, monkeypatch):
    monkeypatch.setattr(jacobians, "SMALL_WEIGHT", small)
    a, g, routes = slots(S=60, d=5, f=4, seed=3)
    weights = torch.rand(3, 4, 5, 4, dtype=torch.float64)
    together = inner_products(a, g, routes, weights, form)
    assert together.shape == (3, 4, 6, 3, 3)
    assert torch.equal(together, torch.stack([inner_products(a, g, routes, w, form) for w in weights]))
    assert inner_products(a, g, routes, weights[:1], form).shape == (1, 4, 6, 3, 3)


def test_slots_without_gradient_and_experts_without_slots_change_nothing():
    a, g, routes = slots()
    g[:, ::3] = 0
    expected = torch.einsum("enkij,enlij->enkl", *[dense_jacobians(a, g, routes)] * 2)
    torch.testing.assert_close(inner_products(*jacobians.drop_inactive(a, g, routes)), expected)
    assert (expected[2] == 0).all()
    nothing = jacobians.drop_inactive(a, 0 * g, routes)
    assert len(nothing[0]) == 0 and (inner_products(*nothing) == 0).all() and not list(item_jacobians(*nothing))
    assert nothing[2].sum_pairs(nothing[0]).shape == (0, 4)


def test_projection_uses_each_experts_own_basis():
    a, g, routes = slots()
    basis = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(project(g[0], basis, routes), torch.einsum("sd,sdr->sr", g[0], basis[routes.expert]))


def test_the_cheaper_form_is_taken_and_no_jacobian_is_formed_where_tokens_are_few():
    """Items of a few tokens in a wide layer: without weights, and with weights and one token, nothing of d x f per item and
    class appears; with many tokens the Jacobian is the cheaper one. The forms' numbers agree either way."""
    d, f, K, items = 48, 40, 4, 6

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.shapes.append(tuple(out.shape))
            return out

    def forms_jacobian(S, weighted):
        a, g, routes = slots(S=S, d=d, f=f, K=K, items=items)
        weight = torch.rand(4, d, f, dtype=torch.float64) if weighted else None
        watch = Largest()
        watch.shapes = []
        with watch:
            out = inner_products(a, g, routes, weight)
        torch.testing.assert_close(out, inner_products(a, g, routes, weight, "jacobian"))
        return any(shape[-2:] == (d, f) and len(shape) == 4 for shape in watch.shapes)

    assert not forms_jacobian(60, False) and not forms_jacobian(4, True)
    assert forms_jacobian(4000, False) and forms_jacobian(400, True)


def test_pairs_come_once_with_their_slots_in_chunks_that_fit(chunk):
    a, g, routes = slots(S=200, items=9, seed=5)
    for by_expert in (False, True):
        seen = []
        for c in routes.chunks(lambda t: 10 * t, by_expert):
            assert len(c.expert) == 1 or 10 * c.index.shape[1] * len(c.expert) <= chunk
            assert not by_expert or (c.expert == c.only).all()
            for e, n, index, real in zip(c.expert, c.item, c.index, c.real):
                assert ((routes.expert[index[real]] == e) & (routes.item[index[real]] == n)).all()
                seen += index[real].tolist()
        assert sorted(seen) == list(range(200))


def test_sums_over_pairs():
    a, _, routes = slots()
    pairs = routes.by_pair
    expected = [a[(routes.expert == e) & (routes.item == n)].sum(0) for e, n in zip(pairs.expert, pairs.item)]
    torch.testing.assert_close(routes.sum_pairs(a), torch.stack(expected))
    assert pairs.counts.sum() == len(expected) == len({(int(e), int(n)) for e, n in zip(routes.expert, routes.item)})
    assert isinstance(pairs, Routes) and pairs.counts[2] == 0
