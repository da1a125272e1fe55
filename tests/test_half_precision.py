"""Every public predictor beside a bf16 and an fp16 model: what it returns is float32 at least and
a distribution, and near what it returns beside a float32 model with the same weights. On the CPU
fp16 runs wherever bf16 does (torch 2.13): nothing is left out.

The reference is float32 and not float64 since the routers' random numbers are: other numbers would
be other draws. float32 itself is held to float64 in test_precision.py.
"""

from functools import cache, partial

import pytest
import torch
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.baselines.averaging import (
    GaussianLogits,
    MCDropout,
    WeightEnsemble,
    expert_dropout,
    fit_swag,
    lora_dropout,
    swag_states,
)
from bmoe_utils.baselines.last_layer import LastLayerLaplace
from bmoe_utils.baselines.lora_laplace import LoraLaplace
from bmoe_utils.baselines.lora_posteriors import fit_blob, mean_field_states, tfb_directions, tfb_states
from bmoe_utils.experts import exact
from bmoe_utils.experts.curvature import probit_probabilities
from bmoe_utils.experts.weight_samples import sampled_logits
from bmoe_utils.joint.posterior import JointPosterior
from bmoe_utils.models.training import adapted_weights, add_lora, fine_tune
from bmoe_utils.precision import Masters
from bmoe_utils.routers.attach import Routers
from bmoe_utils.routers.families import FAMILIES
from bmoe_utils.routers.stability import perturbed
from bmoe_utils.scores.metrics import fit_temperature, softmax
from bmoe_utils.study.blocks import block_kernels

HALF = [torch.bfloat16, torch.float16]
# How far answers may be off: the forward pass, which stays in the model's dtype, rounds to 8 or 11
# bits. Measured of the plain model .0038 and .0005; what only averages answers or changes weights
# a little is no worse.
OWN = {torch.bfloat16: 0.01, torch.float16: 0.00125}
# The mean of 1000 draws, twice: by rounding the eigenvectors of two covariances may be turned,
# which draws anew. Five standard errors of the widest law there is, one of standard deviation 1/2;
# what is drawn from is compared without draws, by the probit link.
DRAWN = 5 * 0.5 * (2 / 1000) ** 0.5
TRAIN, TEST = [tiny_batch(6, seed=s) for s in range(2)], [tiny_batch(6, seed=s) for s in (9, 10)]
LINKS = ("mc", "probit", "map")
STRUCTURES = [
    dict(),
    dict(rank=3),
    dict(hessian_structure="ekfac"),
    dict(hessian_structure="diag"),
    dict(hessian_structure="full"),
]
GAUSSIAN = ("laplace", "mfvr", "fcvr", "swag")
QUIET = dict(progress=False)


@cache
def model_in(dtype, lora=False):
    """Weights that both half precisions hold exactly, in a model that computes in ``dtype``; peft
    keeps LoRA's in float32."""
    model = tiny_model(scale=0.2, dtype=torch.float32)
    if lora:
        model = add_lora(model, rank=2, dropout=0.2)
        generator = torch.Generator().manual_seed(1)
        for p in adapted_weights(model).values():
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    for name, p in model.named_parameters():
        p.data = p.data if "lora_" in name else p.data.bfloat16().half().to(dtype)
    return model.eval()


class Kept:
    """A predictor that keeps what it said, so that the test sees it before it is made an array of
    float64."""

    def __init__(self, predictor):
        self.predictor, self.said = predictor, []
        if hasattr(predictor, "signals"):
            self.signals = predictor.signals

    def __call__(self, batch):
        self.said.append(self.predictor(batch))
        return self.said[-1]


def answers(predictor):
    kept = Kept(predictor)
    predictions = bm.predict(kept, TEST, **QUIET)
    for probs in kept.said:
        assert probs.dtype in (torch.float32, torch.float64), probs.dtype
        assert (probs.double().sum(1) - 1).abs().max() < 1e-6
    return predictions.probs


def near(mine, reference, dtype, drawn=False):
    """All items but two of the twelve, of which a token may stand where two experts tie: rounding
    then sends it to the other one."""
    error = sorted(abs(mine - reference).max(1))
    return (
        error[-3] < OWN[dtype] and error[-1] < DRAWN
        if not drawn
        else error[-1] < OWN[dtype] + DRAWN
    )


def compare(make, dtype, drawn=False):
    assert near(answers(make(dtype)), answers(make(torch.float32)), dtype, drawn)


@pytest.mark.parametrize("dtype", HALF)
def test_the_model_itself(dtype):
    mine, reference = (bm.predict(model_in(d), TEST, **QUIET) for d in (dtype, torch.float32))
    assert (
        abs(mine.probs.sum(1) - 1).max() < 1e-12
        and abs(mine.probs - reference.probs).max() < OWN[dtype]
    )
    for batch in TEST:
        logits = bm.option_logits(model_in(dtype), batch)
        assert logits.dtype == torch.float32 and torch.equal(
            logits, logits.to(dtype).float()
        )  # the model's own numbers
    cooled = [softmax(p.logits, fit_temperature(p.logits, p.labels)) for p in (mine, reference)]
    assert abs(cooled[0].sum(1) - 1).max() < 1e-12 and near(*cooled, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", STRUCTURES)
def test_expert_laplace(options, dtype, tmp_path):
    make = cache(lambda d: bm.ExpertLaplace(model_in(d), **options).fit(TRAIN, **QUIET))
    for link in LINKS:
        compare(lambda d: partial(make(d), link_approx=link), dtype, drawn=link == "mc")
    mean, cov = make(dtype).predictive_logits(TEST[0])
    assert mean.dtype == cov.dtype == torch.float32
    before = make(dtype)(TEST[0])
    make(dtype).save(tmp_path)
    assert torch.equal(bm.ExpertLaplace.load(tmp_path, model_in(dtype))(TEST[0]), before)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", list(FAMILIES))
def test_routers(method, dtype, tmp_path):
    """Attached and fitted, of both inferences, sampled and not; and from their files."""
    options = {"swag": {"rank": 2}, "ensemble": {"members": 2}, "mcdropout": {"dropout": 0.3}}.get(
        method, {}
    )
    ways = [("inside", 4), ("whole-model", 3), *([("inside", None)] if method in GAUSSIAN else [])]
    said = {}
    for d in (dtype, torch.float32):
        with bm.attach_routers(model_in(d), method, **options) as routers:
            assert all(
                t.dtype in (torch.float32, torch.int64)
                for t in routers.families.state_dict().values()
            )
            for stage in ("attached", "fitted"):
                for routers.inference, routers.num_samples in ways:
                    said[d, stage, routers.inference, routers.num_samples] = answers(routers)
                    assert all(
                        v.dtype == torch.float64 and v.isfinite().all()
                        for v in routers.signals().values()
                    )
                if stage == "attached":
                    routers.inference, routers.num_samples = ways[0]
                    fixed = (
                        {"prior_grid": (1.0,)} if method == "laplace" else {}
                    )  # the best of several is a flat choice
                    history = routers.fit(TRAIN, TEST, epochs=1, lr=1e-2, **fixed, **QUIET).fitted[
                        "history"
                    ]
                    assert all(torch.tensor([row["val_nll"]]).isfinite() for row in history)
            assert all(t.isfinite().all() for t in routers.families.state_dict().values())
            if d == dtype:
                routers.save(tmp_path)
    with Routers.load(tmp_path, model_in(dtype)) as routers:
        routers.inference, routers.num_samples = ways[-1]
        assert abs(answers(routers) - said[dtype, "fitted", *ways[-1]]).max() == 0
    for key, mine in said.items():
        _, stage, _, number = key
        if (
            method == "laplace" and stage == "fitted" and number
        ):  # eigenvectors are known up to their sign: other draws, and few
            continue
        assert near(mine, said[torch.float32, *key[1:]], dtype), key


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("link", LINKS)
def test_both_posteriors(link, dtype):
    @cache
    def make(d):
        la = bm.ExpertLaplace(model_in(d)).fit(TRAIN, **QUIET)
        return JointPosterior(
            la, bm.attach_routers(model_in(d), "laplace", inference="whole-model", num_samples=3)
        )

    try:
        compare(lambda d: partial(make(d), link_approx=link), dtype)
        if link == "mc":
            nll = [
                make(d).validation_nll(TEST, [1.0, 10.0], [1.0, 4.0], **QUIET)
                for d in (dtype, torch.float32)
            ]
            assert (nll[0] - nll[1]).abs().max() < OWN[
                dtype
            ] / 0.2  # no answer's probability is below .2 / 2 here
    finally:
        for d in (dtype, torch.float32):
            make(d).routers.detach()


def noisy(model):
    def predict(batch):
        with torch.no_grad(), perturbed(model, batch["attention_mask"], 0.1, "router"):
            return bm.option_logits(model, batch).softmax(-1)

    return predict


def swag(model):
    return WeightEnsemble(
        model,
        swag_states(fit_swag(model, TRAIN, epochs=2, lr=1e-3, rank=2, per_epoch=1, **QUIET), 3),
    )


def blob(model):
    state, std = fit_blob(model, TRAIN, epochs=1, lr=1e-3, **QUIET)
    return WeightEnsemble(model, mean_field_states(state, std, 3))


BASELINES = {
    "perturbed routers": (False, noisy),
    "weight ensemble": (
        False,
        lambda m: WeightEnsemble(
            m, [{k: v.detach().float() * s for k, v in m.named_parameters()} for s in (1, 0.9)]
        ),
    ),
    "expert dropout": (False, lambda m: MCDropout(m, partial(expert_dropout, m, 0.1), 3)),
    "last layer, kron": (False, lambda m: LastLayerLaplace(m).fit(TRAIN, **QUIET)),
    "last layer, diag": (
        False,
        lambda m: LastLayerLaplace(m, hessian_structure="diag").fit(TRAIN, **QUIET),
    ),
    "last layer, full": (
        False,
        lambda m: LastLayerLaplace(m, hessian_structure="full").fit(TRAIN, **QUIET),
    ),
    "swag of all weights": (False, swag),
    "lora dropout": (True, lambda m: MCDropout(m, partial(lora_dropout, m), 3)),
    "lora laplace": (True, lambda m: LoraLaplace(m).fit(TRAIN, **QUIET)),
    "swag of lora": (True, swag),
    "blob": (True, blob),
    "tfb": (True, lambda m: WeightEnsemble(m, tfb_states(m, 0.1, tfb_directions(m, 3)))),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", list(BASELINES))
def test_baselines(name, dtype):
    lora, make = BASELINES[name]
    mine, reference = (make(model_in(d, lora)) for d in (dtype, torch.float32))
    gaussian = isinstance(mine, GaussianLogits)
    assert near(answers(mine), answers(reference), dtype, drawn=gaussian)
    if gaussian:
        exact_in = [
            lambda batch, p=p: probit_probabilities(*p.predictive_logits(batch))
            for p in (mine, reference)
        ]
        assert near(*map(answers, exact_in), dtype)


@pytest.mark.filterwarnings("ignore:.*reached the end of the range")
@pytest.mark.parametrize("dtype", HALF)
def test_tuning_and_the_references(dtype):
    """The prior precision by validation NLL, the exact posterior, the prior's, and samples of the
    experts' weights."""
    mine, reference = ({} for _ in range(2))
    for d, out in ((dtype, mine), (torch.float32, reference)):
        la = bm.ExpertLaplace(model_in(d)).fit(TRAIN, **QUIET)
        out["nll"] = la.validation_curve(TEST, link_approx="probit", **QUIET)[1]
        assert (
            out["nll"].isfinite().all()
            and (la.optimize_prior_precision("val_nll", val_loader=TEST, **QUIET) > 0).all()
        )
        la.prior_precision = 1.0
        for name, said in (
            ("exact", exact.joint_predictive(la, TRAIN, TEST, **QUIET)),
            ("prior", exact.prior_predictive(la, TEST, **QUIET)),
        ):
            said = list(said)
            assert all(x.dtype == torch.float32 for pair in said for x in pair)
            out[name] = torch.cat([cov for _, cov in said])
        la.prior_precision = 1e3
        out["samples"] = sampled_logits(la, TEST, 2, **QUIET).softmax(-1)
    for name in (
        "nll",
        "exact",
        "prior",
    ):  # .05: ten times bf16's rounding, as in test_precision.py
        assert (mine[name] - reference[name]).norm() < 5 * OWN[dtype] * reference[name].norm(), name
    assert mine["samples"].dtype == torch.float64
    assert all(
        near(a.numpy(), b.numpy(), dtype)
        for a, b in zip(mine["samples"], reference["samples"], strict=True)
    )


@pytest.mark.parametrize("dtype", HALF)
def test_weights_move_by_less_than_their_own_rounding(dtype):
    """SWAG at a rate whose steps a half-precision weight cannot take: the moments are those of the
    float32 model's trajectory."""
    model = model_in(dtype)
    moments = fit_swag(model, TRAIN, epochs=4, lr=1e-5, rank=2, per_epoch=1, **QUIET)
    for name, weight in adapted_weights(model).items():
        mean, spread = moments[name].mean, moments[name].variance.sqrt()
        assert mean.dtype == torch.float32 and weight.dtype == dtype
        if weight.dim() > 2:  # the experts, of which all have tokens
            assert 1e-6 < spread.mean() < 1e-4 and (mean != weight).double().mean() > 0.9


@pytest.mark.parametrize("dtype", HALF)
def test_fine_tuning_moves_half_precision_weights_as_it_does_float32_ones(dtype):
    """Stepped in bf16 these weights moved by a tenth of that, in fp16 they became not a number."""

    def moved(d):
        model = tiny_model(scale=0.2, dtype=d)
        before = [p.detach().double() for p in model.parameters()]
        fine_tune(model, TRAIN, epochs=8, lr=1e-4, **QUIET)
        steps = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
        return torch.cat([step.flatten() for step in steps])

    mine, reference = moved(dtype).abs().mean(), moved(torch.float32).abs().mean()
    # what is left is the last rounding, in bf16 of steps that are still below it
    assert 0.5 * reference < mine < 1.5 * reference


def test_masters_of_float32_weights_are_the_weights_and_of_half_ones_float32():
    narrow, wide = (
        torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float16, torch.float32)
    )
    masters = Masters({"narrow": narrow, "wide": wide})
    assert masters["wide"] is wide and masters["narrow"].dtype == torch.float32
    (narrow.sum() + wide.sum()).backward()
    masters.take_gradients()
    assert narrow.grad is None and torch.equal(masters["narrow"].grad, wide.grad)
    with torch.no_grad():
        masters["narrow"] += 1.0001
    masters.write()
    assert torch.equal(narrow, torch.full((3,), 2.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", HALF)
def test_kernels_of_all_weights(dtype):
    mine, reference = (
        block_kernels(model_in(d), TRAIN[:1], TEST[:1], **QUIET) for d in (dtype, torch.float32)
    )
    for name, kernel in reference.fit.items():  # squares of gradients: twice their rounding
        assert mine.fit[name].dtype == torch.float64
        assert (mine.fit[name] - kernel).norm() < 10 * OWN[dtype] * kernel.norm(), name


def test_a_predictor_of_ones_own_that_takes_its_softmax_in_half_precision_is_told():
    def predictor(batch):
        return bm.option_logits(model_in(torch.bfloat16), batch).detach().bfloat16().softmax(-1)

    with pytest.raises(ValueError, match=r"bfloat16, whose rows do not sum to 1: take the softmax"):
        bm.predict(predictor, TEST, **QUIET)
