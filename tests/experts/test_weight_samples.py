"""Weights drawn from the experts' posterior: the covariance is the posterior's, and the model gets its own weights back."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from bmoe_utils.experts.laplace import ExpertLaplace
from bmoe_utils.experts.weight_samples import deviations, sampled_logits
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits


def fitted(precision=1.0, **options):
    model = tiny_model()
    return ExpertLaplace(model, prior_precision=precision, **options).fit([tiny_batch()], progress=False)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"hessian_structure": "diag"}, {"hessian_structure": "ekfac"}])
def test_a_draw_is_a_root_of_the_posterior_covariance(options):
    """Linear in the noise: M M^T of every expert is (H + lambda)^-1, with H from the eigenbasis itself."""
    la = fitted(**options)
    posterior, precision = la.posteriors[0], torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    E, d, f = la.shapes[0]
    unit = torch.eye(d * f, dtype=torch.float64).view(d * f, 1, d, f).expand(-1, E, -1, -1)
    M = torch.stack([deviations(posterior, precision, z) for z in unit], -1).view(E, d * f, d * f)
    for e in range(E):
        if posterior.basis_a is None:
            H = torch.diag(posterior.eigenvalues[e].flatten())
        else:
            U = torch.einsum("di,fj->dfij", posterior.basis_g[e], posterior.basis_a[e]).reshape(d * f, -1)
            H = U @ torch.diag(posterior.eigenvalues[e].flatten()) @ U.mT
        torch.testing.assert_close(M[e] @ M[e].mT @ (H + precision[e] * torch.eye(d * f)), torch.eye(d * f, dtype=torch.float64), rtol=0, atol=1e-10)


def test_narrow_posteriors_sample_what_linearisation_says():
    """As the precision grows the model is linear over the posterior's width: the samples' covariance becomes J Sigma J^T."""
    la, batch = fitted(precision=1e8), tiny_batch()
    samples = sampled_logits(la, [batch], 300, progress=False)
    mean, cov = la.predictive_logits(batch)
    item = 0  # with all its options
    deviation = samples[:, item] - mean[item].double()
    empirical = deviation.mT @ deviation / len(deviation)
    assert float((empirical - cov[item]).norm() / cov[item].norm()) < 0.3  # 300 samples: a relative error of about 0.1
    assert samples.shape == (300, 5, 4) and (samples[:, 1, 3] == -torch.inf).all()


def test_the_model_is_left_as_it_was_also_after_an_error():
    la, batch = fitted(), tiny_batch()
    before = {k: v.clone() for k, v in la.model.state_dict().items()}
    first, second = (sampled_logits(la, [batch], 2, seed=3, progress=False) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert not torch.equal(first[0].nan_to_num(neginf=0), option_logits(la.model, batch).double().nan_to_num(neginf=0))
    with pytest.raises(KeyError):
        sampled_logits(la, [{}], 1, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in la.model.state_dict().items())


def test_what_it_cannot_sample_is_said():
    with pytest.raises(ValueError, match="Kronecker basis"):
        sampled_logits(fitted(hessian_structure="full"), [tiny_batch()], 1, progress=False)
    with pytest.raises(RuntimeError, match="not fitted"):
        sampled_logits(ExpertLaplace(tiny_model()), [tiny_batch()], 1, progress=False)


@pytest.mark.parametrize("architecture", ["gpt_oss", "granitemoe"])
def test_other_layouts_are_sampled_in_theirs(architecture):
    la = ExpertLaplace(tiny_model(architecture), prior_precision=1e12).fit([tiny_batch()], progress=False)
    samples = sampled_logits(la, [tiny_batch()], 1, progress=False)
    torch.testing.assert_close(samples[0], option_logits(la.model, tiny_batch()).detach().double(), rtol=0, atol=1e-3)
    assert not torch.equal(samples[0], option_logits(la.model, tiny_batch()).detach().double()) and len(expert_layers(la.model)) == 2
