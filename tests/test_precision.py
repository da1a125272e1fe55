"""What float32 and bf16 models lose against float64 ones with the same weights."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_batch, tiny_model

import bmoe_utils as bm

BATCHES, TEST = [tiny_batch(8, seed=s) for s in range(4)], tiny_batch(6, seed=9)
OPTIONS = [dict(), dict(rank=3), dict(hessian_structure="ekfac"), dict(hessian_structure="diag")]


def rounded_model(architecture, seed, dtype):
    """Weights that bf16 holds exactly, in a model that computes in ``dtype``."""
    model = tiny_model(architecture, seed=seed, scale=0.2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model.to(dtype)


def results(model, options):
    la = bm.ExpertLaplace(model, **options).fit(BATCHES, progress=False)
    trace = torch.stack([p.spectra().double().sum(1) for p in la.posteriors])
    return trace, la.predictive_logits(TEST)[1].double(), la.log_marginal_likelihood()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("options", OPTIONS)
def test_error_of_lower_precision(architecture, options):
    """Relative errors of the traces, the predictive covariance and the evidence. Measured at most, over five architectures, two
    seeds and these structures: 6e-7, 7e-7 and 5e-8 in float32; .057, .019 and .003 in bf16, whose own rounding is .004, the largest
    where a router's near tie falls the other way (2 of 584 tokens moved to another expert)."""
    reference = results(rounded_model(architecture, 0, torch.float64), options)
    for dtype, bounds in ((torch.float32, (5e-6, 5e-6, 5e-7)), (torch.bfloat16, (0.08, 0.03, 0.005))):
        got = results(rounded_model(architecture, 0, dtype), options)
        for mine, exact, bound in zip(got, reference, bounds):
            assert (mine - exact).norm() < bound * exact.norm(), dtype


@pytest.mark.parametrize("options", [dict(), dict(rank=3), dict(hessian_structure="ekfac"), dict(hessian_structure="diag")])
def test_a_long_sum_of_a_bf16_model_does_not_stall(options):
    """100 times the same batch is 100 times its curvature, to float32's rounding. A sum kept in bf16 stops growing when a term
    falls below 1/256 of it, here 20% short."""
    model, batch = rounded_model("qwen2_moe", 0, torch.bfloat16), BATCHES[0]
    one, many = (bm.ExpertLaplace(model, **options).fit([batch] * n, progress=False) for n in (1, 100))
    for p, q in zip(one.posteriors, many.posteriors):
        assert q.eigenvalues.dtype == torch.float32
        # a sketch of one batch has not restarted yet and misses a little more
        rtol = 1e-4 if "rank" not in options else 0.2
        torch.testing.assert_close(q.spectra().sum(1), 100 * p.spectra().sum(1), rtol=rtol, atol=1e-4)
