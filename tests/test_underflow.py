"""Inputs of a layer that are tiny because its weights are: the same function in another parametrisation, down to what float32 can square."""

import warnings

import pytest
import torch
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.models.layers import expert_layers

STRUCTURES = [dict(), dict(rank=2), dict(hessian_structure="ekfac"), dict(hessian_structure="diag"), dict(hessian_structure="full")]
BATCHES, TEST = [tiny_batch(8, seed=s) for s in range(3)], tiny_batch(4, seed=9)


def model(scale, dtype=torch.float32, compensated=True):
    """The first layer's inputs ``a`` are ``scale`` times what they were (a power of two), and its second weight 1 / ``scale`` times."""
    model = tiny_model(dtype=dtype, scale=0.3)
    with torch.no_grad():
        first = next(iter(expert_layers(model).values()))
        first.gate_up_proj[:, first.gate_up_proj.shape[1] // 2 :] *= scale
        first.down_proj /= scale if compensated else 1
    return model


def results(scale, dtype, options):
    """With the prior that belongs to the parametrisation: W / s has the precision s^2 lambda."""
    precision = torch.tensor([scale**2, 1.0], dtype=torch.float64)
    la = bm.ExpertLaplace(model(scale, dtype), prior_precision=precision, **options).fit(BATCHES, progress=False)
    return la.log_marginal_likelihood(), la.predictive_logits(TEST)[1]


@pytest.mark.parametrize("options", STRUCTURES)
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 2.0**-50), (torch.float64, 2.0**-80)])
def test_the_posterior_does_not_depend_on_the_parametrisation(options, dtype, scale):
    """2^-50 is 9e-16. Powers of two, so that the same is rounded: float32 loses only what falls below 1e-38, of squares near 1e-30."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence, cov = results(scale, dtype, options)
        expected, cov_expected = results(1.0, dtype, options)
    torch.testing.assert_close(evidence, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(cov, cov_expected, rtol=1e-5, atol=1e-6 * float(cov_expected.abs().max()))


@pytest.mark.parametrize("options", STRUCTURES)
@pytest.mark.parametrize("compensated", [True, False])
def test_where_squares_vanish_the_fit_says_so(options, compensated):
    name = "model.layers.0.mlp.experts"
    with pytest.warns(UserWarning, match=rf"^4 experts have .* float32 .*In '{name}' \(4\)\. Fit the model in float64"):
        la = bm.ExpertLaplace(model(2.0**-80, compensated=compensated), **options).fit(BATCHES, progress=False)
    curvature = [p.spectra().sum() for p in la.posteriors]
    assert curvature[0] == 0 < curvature[1]  # what it says


def test_tiny_gradients_and_products(tmp_path):
    """Inputs and gradients of 1e-12 each have a curvature of 1e-48. A fit that goes on from a checkpoint knows as much."""
    small = model(2.0**-40, compensated=False)
    small.lm_head.weight.data *= 2.0**-40
    seen = iter([*BATCHES[:1], KeyboardInterrupt])

    def cut_short():
        for batch in seen:
            if batch is KeyboardInterrupt:
                raise batch
            yield batch

    with pytest.raises(KeyboardInterrupt):
        bm.ExpertLaplace(small).fit(cut_short(), checkpoint=tmp_path / "c", every=1, progress=False)
    with pytest.warns(UserWarning, match=r"^4 experts have .*layers\.0\.mlp\.experts' \(4\)"):
        bm.ExpertLaplace(small).fit(BATCHES[:1], checkpoint=tmp_path / "c", progress=False)


def test_experts_without_a_gradient_or_tokens_are_no_reason_to_warn():
    """In the last layer most experts never see an answer: their curvature is 0, and not for rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la = bm.ExpertLaplace(model(1.0)).fit([tiny_batch(1, ragged=False)], progress=False)
    assert (la.posteriors[1].spectra().sum(1) == 0).any()
