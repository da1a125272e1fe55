"""The maths of the posterior against dense references in float64."""

import pytest
import torch
from routed import dense_jacobians, slots, summed

from bmoe_utils.experts import curvature

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


def posterior_covariance(H, J, precision):
    """``J (H + lambda I)^-1 J^T`` densely. ``H [E, P, P]``, ``J [E, B, K, P]`` -> ``[E, B, K, K]``."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype)
    return torch.stack([j @ torch.linalg.inv(h + lam * eye) @ j.mT for h, j, lam in zip(H, J, precision)])


def kronecker(sums, rank):
    """``H_e = G_e (x) A_e / n_e`` densely, each factor cut to its ``rank`` leading eigenpairs."""
    def cut(M):
        values, vectors = torch.linalg.eigh(M)
        return M if rank is None else (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    factors = zip(sums.A.matrix(), sums.G.matrix(), sums.n.tolist())
    return torch.stack([torch.kron(cut(G), cut(A)) / max(n, 1) for A, G, n in factors])


@pytest.mark.parametrize("structure, rank", [("kron", None), ("kron", 2), ("diag", None), ("full", None)])
def test_predictive_covariance_equals_the_dense_inverse_of_the_structure(structure, rank):
    batches = [slots(seed=1), slots(seed=2)]
    posterior = summed(batches, hessian_structure=structure, rank=rank).finish()
    if structure == "kron":
        H = kronecker(summed(batches), rank)
    else:
        J = torch.cat([dense_jacobians(*b).flatten(3) for b in batches], 1)  # [E, 12, K, P]
        H = torch.einsum("enkP,enkQ->ePQ", J, J)  # the columns g already carry Lambda's root
        H = H if structure == "full" else torch.diag_embed(torch.diagonal(H, dim1=-2, dim2=-1))
    test = slots(seed=3)
    precision = torch.tensor([[0.5, 1.0, 2.0, 3.0], [4.0, 0.1, 0.2, 9.0]], dtype=torch.float64)
    J = dense_jacobians(*test).flatten(3)
    expected = torch.stack([posterior_covariance(H, J, row) for row in precision])
    torch.testing.assert_close(posterior.covariance(*test, precision), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.covariance(*test, precision[1]), expected[1], rtol=1e-9, atol=1e-9)
    logdet = torch.logdet(H + precision[0, :, None, None] * torch.eye(12, dtype=torch.float64)) - 12 * precision[0].log()
    torch.testing.assert_close(curvature.log_det_ratio(posterior.spectra(), precision[0]), logdet, rtol=1e-9, atol=1e-9)
    for e in range(4):
        torch.testing.assert_close(curvature.log_det_ratio(posterior.spectrum(e), precision[0, e]), logdet[e], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [dict(), dict(rank=2), dict(hessian_structure="diag"), dict(hessian_structure="full")])
def test_an_expert_without_tokens_keeps_its_prior(options):
    posterior = summed([slots(seed=1)], **options).finish()
    assert curvature.log_det_ratio(posterior.spectrum(2), torch.tensor(0.5)) == 0
    test = slots(seed=3, empty=0)  # now expert 2 is reached
    got = posterior.covariance(*test, torch.full((4,), 0.5, dtype=torch.float64))
    J = dense_jacobians(*test).flatten(3)[2]
    torch.testing.assert_close(got[2], J @ J.mT / 0.5)


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
