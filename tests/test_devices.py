"""A model whose layers are on two devices, on a machine that has one: the second is pretended."""

import pytest
import torch
from devices import FAR, Far, TwoDevices
from tiny import tiny_batch, tiny_model
from torch import Tensor
from torch.utils._pytree import tree_map_only

import bmoe_utils as bm
from bmoe_utils.experts.fitting import factor_bytes
from bmoe_utils.models.layers import expert_layers


def split(model):
    """The model with its last layer on the other device, between hooks that move what comes and goes, as accelerate's."""
    layer = model.model.layers[-1]
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = p.detach().as_subclass(Far)
    move = lambda to: lambda x: tree_map_only(Tensor, lambda t: t.to(to), x)  # noqa: E731
    layer.register_forward_pre_hook(lambda _, args, kwargs: (move(FAR)(args), move(FAR)(kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, out: move("cpu")(out))
    return model


def test_the_pretence_fails_where_devices_meet():
    with TwoDevices() as devices:
        near = torch.ones(2, 2)
        far = near.to(FAR)
        assert far.device == FAR and near.device.type == "cpu" and (far @ far).device == FAR and far.sum().device == FAR
        assert torch.zeros_like(far).device == FAR and far.new_zeros(3).device == FAR and torch.zeros(2, device=FAR).device == FAR
        assert far[torch.tensor([0])].device == FAR and (far * torch.tensor(2.0)).device == FAR
        for wrong in (lambda: far @ near, lambda: near + far, lambda: near[far.long()], lambda: torch.cat([far, near]),
                      lambda: near.index_add_(0, far[0].long(), near)):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
    assert devices.moves == 1


@pytest.mark.filterwarnings("ignore:.*reached the end of the range")
@pytest.mark.parametrize("options", [dict(), dict(fisher="mc", token_setting="active"), dict(token_setting="reduce", rank=0.9),
                                     dict(hessian_structure="ekfac", rank=2), dict(hessian_structure="diag"), dict(hessian_structure="full")])
def test_every_layers_factors_live_on_its_device_and_the_posterior_is_the_same(options, tmp_path):
    batches, test = [tiny_batch(4, seed=s) for s in range(2)], tiny_batch(3, seed=9)
    centre = tiny_model(seed=1)
    whole = bm.ExpertLaplace(tiny_model(), prior_mean=centre, **options).fit(batches, progress=False)
    expected, tuned = whole.predictive_logits(test), whole.optimize_prior_precision()
    model, full = split(tiny_model()), options.get("hessian_structure") == "full"
    need = factor_bytes(whole.options, whole.shapes[0], torch.zeros(0, dtype=torch.float64))
    with TwoDevices() as devices:
        assert [m.down_proj.device.type for m in expert_layers(model).values()] == ["cpu", "cuda"]
        for kept in ({}, {"offload": tmp_path} if full else {"memory_budget": need}):
            la = bm.ExpertLaplace(model, prior_mean=centre, **options).fit(batches, progress=False, **kept)
            assert {t.device for t in la.posteriors[0].tensors().values()} == {torch.device("cpu")}
            assert {t.device for t in la.posteriors[1].tensors().values()} == {torch.device("cpu") if kept else FAR}
            for got, one in zip(la.predictive_logits(test), expected, strict=True):
                assert got.device.type == "cpu"
                torch.testing.assert_close(got, one, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(la.log_marginal_likelihood(), whole.log_marginal_likelihood(1.0), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(la.optimize_prior_precision(), tuned, rtol=1e-6, atol=0)
        la.optimize_prior_precision("val_nll", val_loader=[test], link_approx="probit", progress=False)
        assert la.captured_energy.device.type == la(test).device.type == "cpu"
    assert devices.moves
