"""The pure maths against dense references in float64."""

import itertools

import pytest
import torch

from bmoe_utils import curvature


def slots(S=40, d=3, f=4, K=3, experts=4, items=6, seed=0, empty=2):
    """Random routed slots; expert ``empty`` gets none."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, experts - 1, (S,), generator=g).sort().values
    expert = torch.where(expert >= empty, expert + 1, expert)
    return dict(a=torch.randn(S, f, generator=g, dtype=torch.float64),
                g=torch.randn(K, S, d, generator=g, dtype=torch.float64), expert=expert,
                item=torch.randint(0, items, (S,), generator=g), counts=torch.bincount(expert, minlength=experts))


def dense_jacobians(s, items=6):
    """``[E, items, K, d, f]`` by an explicit loop over slots."""
    K, S, d = s["g"].shape
    J = torch.zeros(len(s["counts"]), items, K, d, s["a"].shape[1], dtype=torch.float64)
    for t, k in itertools.product(range(S), range(K)):
        J[s["expert"][t], s["item"][t], k] += torch.outer(s["g"][k, t], s["a"][t])
    return J


LOGITS = torch.tensor([[0.3, -1.0, 2.0, 0.1], [9.0, -30.0, 1.0, -torch.inf], [0.0, 0.0, -torch.inf, -torch.inf],
                       [300.0, 0.0, -5.0, 1.0]], dtype=torch.float64)


def test_softmax_hessian_root_is_exact_with_one_column_less_than_options():
    S = curvature.softmax_hessian_root(LOGITS)
    p = LOGITS.softmax(-1)
    assert S.shape == (4, 4, 3)
    torch.testing.assert_close(S @ S.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], rtol=0, atol=1e-15)
    assert (S[LOGITS.isinf()] == 0).all()


def test_mc_fisher_is_unbiased_and_the_empirical_one_is_not():
    n = 200_000
    logits = LOGITS[:1].expand(n, -1)
    v = curvature.fisher_columns(logits, "mc", None, torch.Generator().manual_seed(0))[0]
    p = LOGITS[0].softmax(-1)
    exact = torch.diag(p) - torch.outer(p, p)
    # entries are bounded by 1, so their mean over n draws has a standard error below 1/sqrt(n)
    torch.testing.assert_close(v.T @ v / n, exact, rtol=0, atol=4 / n**0.5)
    v = curvature.fisher_columns(logits, "empirical", torch.full((n,), 2), None)[0]
    assert (v.T @ v / n - exact).abs().max() > 0.05


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_item_jacobians_equal_the_loop_over_slots(chunk, monkeypatch):
    monkeypatch.setattr(curvature, "CHUNK_ELEMENTS", chunk)
    s = slots()
    J = torch.zeros(4, 6, 3, 3, 4, dtype=torch.float64)
    for e, items, block in curvature.item_jacobians(s["a"], s["g"], s["item"], s["counts"]):
        assert (J[e, items] == 0).all()  # a pair comes once
        J[e, items] = block
    torch.testing.assert_close(J, dense_jacobians(s))


def test_factors_stay_with_their_expert_when_one_has_no_token():
    s = slots()
    A, G = curvature.gram_by_expert(s["a"], s["counts"]), curvature.gram_by_expert(s["g"], s["counts"])
    for e in range(4):
        mine = s["expert"] == e
        torch.testing.assert_close(A[e], s["a"][mine].T @ s["a"][mine])
        torch.testing.assert_close(G[e], sum(g[mine].T @ g[mine] for g in s["g"]))
    assert (A[2] == 0).all() and (G[2] == 0).all()


def test_reduce_takes_one_sample_per_item_and_expert():
    s = slots()
    a, g, counts = curvature.reduce_by_item(s["a"], s["g"], s["expert"], s["item"], 4, 6)
    row = 0
    for e, n in itertools.product(range(4), range(6)):
        mine = (s["expert"] == e) & (s["item"] == n)
        if mine.any():
            torch.testing.assert_close(a[row], s["a"][mine].mean(0))
            torch.testing.assert_close(g[:, row], s["g"][:, mine].sum(1))
            row += 1
    assert row == len(a) == counts.sum()
    assert counts.tolist() == [len(s["item"][s["expert"] == e].unique()) for e in range(4)]


def posterior_covariance(H, J, precision):
    """``J (H + lambda I)^-1 J^T`` densely. ``H [E, P, P]``, ``J [E, B, K, P]`` -> ``[E, B, K, K]``."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype)
    return torch.stack([j @ torch.linalg.inv(h + lam * eye) @ j.mT for h, j, lam in zip(H, J, precision)])


def accumulate(kind, **extra):
    E, d, f = 4, 3, 4
    zeros = lambda *size: torch.zeros(*size, dtype=torch.float64)
    sums = {"kron": lambda: curvature.KronSums(zeros(E, f, f), zeros(E, d, d), torch.zeros(E, dtype=torch.long), **extra),
            "diag": lambda: curvature.DiagSum(zeros(E, d, f)),
            "full": lambda: curvature.DenseRows([[] for _ in range(E)], zeros(0, d * f))}[kind]()
    for seed in (1, 2):
        s = slots(seed=seed)
        sums.update(s["a"], s["g"], s["expert"], s["item"], s["counts"], 6)
    J = torch.cat([dense_jacobians(slots(seed=seed)).flatten(3) for seed in (1, 2)], 1)  # [E, 12, K, P]
    return sums, torch.einsum("enkP,enkQ->ePQ", J, J)  # here the columns g already carry Lambda's root


@pytest.mark.parametrize("kind, rank", [("kron", None), ("kron", 2), ("diag", None), ("full", None)])
def test_predictive_covariance_equals_the_dense_inverse_of_the_structure(kind, rank):
    sums, H = accumulate(kind, **({"rank": rank} if rank else {}))
    if kind == "kron":
        def cut(M):
            values, vectors = torch.linalg.eigh(M)
            return M if rank is None else (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        H = torch.stack([torch.kron(cut(g), cut(a)) / max(n, 1) for a, g, n in zip(sums.A, sums.G, sums.n)])
    elif kind == "diag":
        H = torch.diag_embed(torch.diagonal(H, dim1=-2, dim2=-1))
    posterior = sums.finish()
    s = slots(seed=3)
    precision = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = posterior_covariance(H, dense_jacobians(s).flatten(3), precision)
    got = posterior.covariance(s["a"], s["g"], s["item"], s["counts"], precision, 6)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    eye = torch.eye(12, dtype=torch.float64)
    for e in range(4):
        ratio = torch.logdet(H[e] + precision[e] * eye) - 12 * precision[e].log()
        torch.testing.assert_close(curvature.log_det_ratio(posterior.spectrum(e), precision[e]), ratio, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_keeps_its_prior():
    for kind in ("kron", "diag", "full"):
        posterior = accumulate(kind)[0].finish()
        assert curvature.log_det_ratio(posterior.spectrum(2), torch.tensor(0.5)) == 0
        s = slots(seed=3, empty=0)  # now expert 2 is reached
        got = posterior.covariance(s["a"], s["g"], s["item"], s["counts"], torch.full((4,), 0.5, dtype=torch.float64), 6)
        J = dense_jacobians(s).flatten(3)[2]
        torch.testing.assert_close(got[2], J @ J.mT / 0.5)


@pytest.mark.parametrize("tokens_per_item", [1, 10])
def test_kron_has_the_trace_of_the_exact_ggn_where_inputs_and_gradients_are_independent(tokens_per_item):
    """E tr(A x G / n) = E tr(GGN) then, for any number of tokens an item. With 20,000 slots of independent normals the
    two traces differ by sampling alone, below 2% (the largest seen over seeds is 1.2%); a missing division by the tokens
    would be a factor in the thousands, one by the items a factor of 10."""
    S = 20_000
    s = slots(S=S, items=S // tokens_per_item, seed=9)
    rest = [s[k] for k in ("a", "g", "expert", "item", "counts")]
    zeros = lambda *size: torch.zeros(*size, dtype=torch.float64)
    kron = curvature.KronSums(zeros(4, 4, 4), zeros(4, 3, 3), torch.zeros(4, dtype=torch.long))
    diag = curvature.DiagSum(zeros(4, 3, 4))
    for sums in (kron, diag):
        sums.update(*rest, S // tokens_per_item)
    for e in (0, 1, 3):
        assert abs(float(kron.finish().spectrum(e).sum() / diag.H[e].sum()) - 1) < 0.02


def test_diagonal_keeps_the_terms_between_tokens_of_an_item():
    """Repeating a token in its item quadruples the exact diagonal; a per-token diagonal would double it."""
    s = slots(S=1, items=1)
    one, two = (curvature.DiagSum(torch.zeros(4, 3, 4, dtype=torch.float64)) for _ in range(2))
    one.update(*(s[k] for k in ("a", "g", "expert", "item", "counts")), 1)
    two.update(s["a"].repeat(2, 1), s["g"].repeat(1, 2, 1), s["expert"].repeat(2), s["item"].repeat(2), 2 * s["counts"], 1)
    torch.testing.assert_close(two.H, 4 * one.H)


def test_mc_link_matches_quadrature_for_two_options():
    mean = torch.tensor([[1.0, -0.5, -torch.inf]], dtype=torch.float64)
    root = torch.tensor([[1.0, 0.0, 0], [0.4, 1.5, 0], [0, 0, 0]], dtype=torch.float64)
    cov = (root @ root.T)[None]
    mu, var = 1.5, float(cov[0, 0, 0] + cov[0, 1, 1] - 2 * cov[0, 0, 1])
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-x**2 / 2) / (2 * torch.pi) ** 0.5
    expected = float((torch.sigmoid(mu + var**0.5 * x) * density).sum() * (x[1] - x[0]))
    n = 400_000
    p = curvature.sample_probabilities(mean, cov, n, torch.Generator().manual_seed(0))[0]
    assert abs(float(p[0]) - expected) < 4 * 0.5 / n**0.5  # a probability's standard deviation is at most 1/2
    assert p[2] == 0 and abs(float(p.sum()) - 1) < 1e-12
    probit = curvature.probit_probabilities(mean, cov)[0]
    assert abs(float(probit[0]) - expected) < 0.02  # the approximation's own known error


def test_probit_does_not_depend_on_a_shift_of_the_logits():
    g = torch.Generator().manual_seed(0)
    mean, root = torch.randn(5, 4, generator=g), torch.randn(5, 4, 4, generator=g)
    cov, shift = root @ root.mT, torch.randn(5, 4, generator=g)
    # adding one common random number with covariance `shift` to all logits changes no difference between them
    moved = cov + shift[:, :, None] + shift[:, None, :]
    torch.testing.assert_close(curvature.probit_probabilities(mean + 3, moved), curvature.probit_probabilities(mean, cov))
    torch.testing.assert_close(curvature.probit_probabilities(mean, 0 * cov), mean.softmax(-1))
