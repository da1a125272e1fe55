"""Fine-tuning under a prior: no prior is the plain fine-tuning, a prior is a mode of its own objective, and names are checked."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from bmoe_utils.models import training
from bmoe_utils.models.readout import option_logits
from bmoe_utils.study import penalised


def trained(function, **options):
    model = tiny_model(dtype=torch.float32, scale=0.1)
    function(model, [tiny_batch(seed=1), tiny_batch(seed=2)], epochs=3, lr=1e-2, progress=False, **options)
    return model


def test_without_a_prior_it_is_plain_fine_tuning():
    """To rounding: the loss is summed in another order, and Adam divides by gradients' size."""
    plain, mine = (trained(f).state_dict() for f in (training.fine_tune, penalised.fine_tune))
    for name, value in plain.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=2e-4)


def test_it_ends_in_a_mode_of_its_objective():
    """A head alone is convex: at the end the gradient of the log-posterior is (nearly) zero, that of the likelihood is not."""
    model, batch, lam = tiny_model(scale=0.3), tiny_batch(items=6), 0.5
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    before = {n: p.clone() for n, p in model.named_parameters()}
    penalised.fine_tune(model, [batch], epochs=250, lr=5e-2, precision={"lm_head.weight": lam}, progress=False)
    head = model.lm_head.weight
    likelihood, = torch.autograd.grad(penalised.smoothed_nll(option_logits(model, batch), batch["labels"]) * len(batch["labels"]), head)
    head = head.detach()
    assert float((likelihood + lam * head).norm()) < 1e-2 * float(likelihood.norm()) and float(likelihood.norm()) > 0.1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "lm_head.weight") and not model.training


def test_norms_are_held_at_one():
    model = tiny_model(dtype=torch.float32)
    penalised.fine_tune(model, [tiny_batch()], epochs=120, lr=8e-2, precision={"model.norm.weight": 1e6, "lm_head.weight": 1e6}, progress=False)
    assert (model.model.norm.weight - 1).abs().max() < 0.05 and model.lm_head.weight.abs().max() < 0.05


def test_smoothed_labels_leave_missing_options_out():
    logits = torch.tensor([[2.0, 0.5, -torch.inf], [0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = penalised.smoothed_nll(logits, torch.tensor([0, 2]), 0.3)
    target = torch.tensor([[0.85, 0.15], [0.1, 0.1]], dtype=torch.float64)
    first = -(target[0] * logits[0, :2].log_softmax(0)).sum()
    second = -(torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64) * logits[1].log_softmax(0)).sum()
    torch.testing.assert_close(loss, (first + second) / 2)
    grad, = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all() and grad[0, 2] == 0


def test_unknown_parameters_are_named():
    with pytest.raises(ValueError, match="no parameter tail.weight"):
        penalised.fine_tune(tiny_model(), [tiny_batch()], epochs=1, lr=1e-3, precision={"tail.weight": 1.0}, progress=False)
