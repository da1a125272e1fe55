"""On Apple's MPS, which has no float64: every fit and every prediction, with a model on a
pretended one, against the same on the CPU."""

from functools import partial

import pytest
import torch
from devices import Far, WithoutFloat64
from test_half_precision import GAUSSIAN, LINKS, STRUCTURES
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.baselines import averaging, lora_posteriors
from bmoe_utils.baselines.last_layer import STRUCTURES as LAST_LAYER
from bmoe_utils.baselines.last_layer import LastLayerLaplace
from bmoe_utils.baselines.lora_laplace import LoraLaplace
from bmoe_utils.experts import capture, exact, weight_samples
from bmoe_utils.joint.posterior import JointPosterior
from bmoe_utils.models.training import add_lora
from bmoe_utils.routers import stability
from bmoe_utils.routers.families import FAMILIES

TRAIN, TEST = [tiny_batch(6, seed=s) for s in range(2)], [tiny_batch(4, seed=9)]
TEST[0]["p_star"] = torch.full(
    (4, 4), 0.25, dtype=torch.float64
)  # as the embedded world's batches have it
QUIET = dict(progress=False)


@pytest.fixture(autouse=True)
def pretence(monkeypatch):
    """What the mode does not see: random numbers are the CPU's."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())


def model_on(far, lora=False):
    model = tiny_model(scale=0.2, dtype=torch.float32)
    if lora:
        model = add_lora(model, rank=2, dropout=0.1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    for module in model.modules() if far else ():
        for store in (module._parameters, module._buffers):
            store.update(
                {
                    k: v.detach().as_subclass(Far).requires_grad_(v.requires_grad)
                    for k, v in store.items()
                    if v is not None
                }
            )
    return model.eval()


def same(compute, lora=False, rtol=1e-3, atol=1e-4):
    """``compute(model)`` gives numbers, the same from a model on either device."""
    expected = compute(model_on(False, lora))
    model = model_on(True, lora)
    with WithoutFloat64():
        got = compute(model)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=rtol, atol=atol
        )


def test_the_pretence_fails_at_a_float64_on_the_device():
    with WithoutFloat64():
        far = torch.ones(2, 2).to("mps")
        assert far.device.type == "mps" and far.cpu().double().dtype == torch.float64
        assert torch.ones(2, dtype=torch.float64).to("mps", torch.float32).device.type == "mps"
        for wrong in (
            far.double,
            lambda: far.to(torch.float64),
            lambda: far.to("cpu", torch.float64),
            lambda: far.sum(dtype=torch.float64),
            lambda: torch.ones(2, dtype=torch.float64).to("mps"),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: far.new_zeros(2, dtype=torch.float64),
            lambda: torch.zeros_like(far, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="MPS"):
                wrong()


@pytest.mark.filterwarnings("ignore:.*reached the end of the range")
@pytest.mark.parametrize("options", [*STRUCTURES, dict(rank=0.9, fisher="mc")])
def test_expert_laplace(options, tmp_path):
    def compute(model):
        la = bm.ExpertLaplace(model, **options).fit(TRAIN, **QUIET)
        device = next(model.parameters()).device
        assert {
            t.device for p in la.posteriors for k, t in p.tensors().items() if k != "captured"
        } == {device}
        folder = tmp_path / device.type
        la.save(folder)
        la = bm.ExpertLaplace.load(folder, model)
        said = [
            bm.predict(partial(la, link_approx=link), TEST, **QUIET).probs
            for link in ("probit", "map")
        ]
        assert len(bm.predict(la, TEST, **QUIET)) == 4
        evidence = [la.log_marginal_likelihood(1.0), la.captured_energy.nan_to_num(0)]
        if not options:
            evidence.append(la.optimize_prior_precision(granularity="global").log())
            for link in ("probit", "mc"):
                best = la.optimize_prior_precision(
                    "val_nll", val_loader=TEST, link_approx=link, **QUIET
                )
                assert best.isfinite().all()
        return said + evidence

    same(compute)


@pytest.mark.parametrize("method", list(FAMILIES))
def test_routers(method):
    options = {"swag": {"rank": 2}, "ensemble": {"members": 2}}.get(method, {})

    def compute(model):
        with bm.attach_routers(
            model, method, inference="whole-model", num_samples=2, **options
        ) as routers:
            said = [bm.predict(routers, TEST, **QUIET).probs, *routers.signals().values()]
            fixed = {"prior_grid": (1.0,)} if method == "laplace" else {}
            history = routers.fit(TRAIN, TEST, epochs=1, **fixed, **QUIET).fitted["history"]
            assert all(
                t.device == next(model.parameters()).device
                for t in routers.families.state_dict().values()
            )
            routers.inference = "inside"
            if method in GAUSSIAN:
                routers.num_samples = None
            return (
                said
                + [row["val_nll"] for row in history]
                + ([bm.predict(routers, TEST, **QUIET).probs] if method != "mcdropout" else [])
            )

    same(compute, rtol=1e-2)


def test_both_posteriors():
    def compute(model):
        la = bm.ExpertLaplace(model).fit(TRAIN[:1], **QUIET)
        with bm.attach_routers(model, "laplace", inference="whole-model", num_samples=2) as routers:
            joint = JointPosterior(la, routers)
            assert joint.validation_nll(TEST, [1.0], [1.0, 2.0], **QUIET).isfinite().all()
            return [
                bm.predict(partial(joint, link_approx=link), TEST, **QUIET).probs for link in LINKS
            ]

    same(compute)


BASELINES = {
    "mc dropout": (
        True,
        lambda m: averaging.MCDropout(m, partial(averaging.expert_dropout, m, 0.0), 2),
    ),
    **{
        f"last layer, {s}": (
            False,
            lambda m, s=s: LastLayerLaplace(m, hessian_structure=s).fit(TRAIN, **QUIET),
        )
        for s in LAST_LAYER
    },
    "lora laplace": (True, lambda m: LoraLaplace(m).fit(TRAIN, **QUIET)),
    "swag": (
        True,
        lambda m: averaging.WeightEnsemble(
            m,
            averaging.swag_states(
                averaging.fit_swag(m, TRAIN, epochs=2, lr=1e-4, rank=2, per_epoch=1, **QUIET),
                2,
                scale=0.0,
            ),
        ),
    ),
    "blob": (
        True,
        lambda m: averaging.WeightEnsemble(
            m,
            lora_posteriors.mean_field_states(
                *lora_posteriors.fit_blob(m, TRAIN, epochs=1, lr=1e-4, init=1e-3, **QUIET), 2
            ),
        ),
    ),
    "tfb": (
        True,
        lambda m: averaging.WeightEnsemble(
            m, lora_posteriors.tfb_states(m, 0.1, lora_posteriors.tfb_directions(m, 2))
        ),
    ),
}


@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines(name):
    lora, make = BASELINES[name]

    def compute(model):
        predictor = make(model)
        said = [bm.predict(predictor, TEST, **QUIET).probs]
        if isinstance(predictor, averaging.GaussianLogits):
            mean, cov = predictor.predictive_logits(TEST[0])
            assert predictor.optimize_prior_precision().isfinite()
            said = [cov.cpu(), mean.cpu(), predictor.log_marginal_likelihood(1.0)]
        return said

    same(compute, lora)


def test_references_and_stability():
    def compute(model):
        la = bm.ExpertLaplace(model, prior_precision=1e3).fit(TRAIN[:1], **QUIET)
        pairs = [
            *exact.joint_predictive(la, TRAIN[:1], TEST, **QUIET),
            *exact.prior_predictive(la, TEST, **QUIET),
        ]
        assert all(cov.device == mean.device for mean, cov in pairs)
        return [
            *(cov.cpu() for _, cov in pairs),
            weight_samples.sampled_logits(la, TEST, 1, **QUIET),
            stability.routing_margins(model, TEST),
            stability.routing_stability(model, TEST, 0.1),
            *capture.routed_tokens(model, TEST),
        ]

    same(compute)
