"""Baselines that average a model's answers: over dropout masks, over several settings of its weights, over Gaussian logits.

All are callables ``batch -> probs [B, C]`` (float64), the mean of softmaxes ``[S, B, C]``, for :func:`predictions.predict`; their signal
``answer_information`` is the mutual information between answer and draw. Same batch, same answer: the random numbers are a function
of ``seed`` alone. No call and no fit changes the model, not by a bit.

    MC dropout           arXiv 1506.02142: trained with dropout, and predicting with it
    ensembles            arXiv 1612.01474: the members' weights; of one run's last checkpoints, or of runs that differ in their seed
    SWAG                 arXiv 1902.02476: Gaussian of the weights along the tail of training, at a constant learning rate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..experts.curvature import sample_answers
from ..joint.information import entropy
from ..models.experts_forward import IMPLEMENTATION
from ..models.layers import bare, expert_layers, unwrap
from ..models.readout import option_logits
from ..models.training import adapted_weights, answer_nll
from ..models.unfused import second_layer
from ..precision import Masters, float64
from ..progress import track
from ..routers.maths import SwagMoments, swag_sample


class Averaged:
    """The base of the predictors: what differs is :meth:`draws`."""

    _information: Tensor | None = None

    def draws(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Probabilities ``[S, B, C]``, float64."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        draws = self.draws(batch)
        mean = draws.mean(0)
        self._information = (entropy(mean) - entropy(draws).mean(0)).clamp(min=0)  # below zero is rounding
        return mean

    def signals(self) -> dict[str, Tensor]:
        """Of the last batch: ``answer_information [B]`` in nats, ``H(mean) - mean H``."""
        return {} if self._information is None else {"answer_information": self._information}


class GaussianLogits(Averaged):
    """Draws of softmaxes of Gaussian logits: what a linearised posterior predicts with."""

    num_samples, seed = 1000, 0

    def predictive_logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean ``[B, C]`` (-inf: no such option) and covariance ``[B, C, C]``."""
        raise NotImplementedError

    def draws(self, batch):
        return sample_answers(*self.predictive_logits(batch), self.num_samples, torch.Generator().manual_seed(self.seed))


@contextmanager
def forward_hooks(modules: Mapping[str, nn.Module], hook: Callable[[str], Callable]) -> Iterator[None]:
    """While active, every module has the forward hook that ``hook(name)`` gives."""
    handles = [m.register_forward_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- the model's state ----------------------------------------------------------------------------------------------
@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode as before on leaving."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def weights_set(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, the named parameters hold the values of ``state``; afterwards their own again, bit for bit, whatever was
    done to them meanwhile."""
    own = dict(model.named_parameters())
    before = {k: own[k].detach().clone() for k in state if k in own}
    try:
        set_weights(model, state)
        yield
    finally:
        set_weights(model, before)


@torch.no_grad()
def set_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives the named parameters the values of ``state``, for good. ``ValueError``, before any is touched, on an unknown name or
    another shape."""
    own = dict(model.named_parameters())
    if wrong := [k for k, v in state.items() if k not in own or own[k].shape != v.shape]:
        raise ValueError(f"the model has no parameter {wrong[0]!r} of shape {tuple(state[wrong[0]].shape)}: these are the weights of "
                         "another model")
    for k, v in state.items():
        own[k].copy_(v)


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Train mode, with gradients for these parameters alone; modes and ``requires_grad`` as before on leaving, gradients gone."""
    chosen = {id(p) for p in parameters}
    before, modes = {p: p.requires_grad for p in model.parameters()}, {m: m.training for m in model.modules()}
    try:
        for p in before:
            p.requires_grad_(id(p) in chosen)
        model.train()
        with torch.enable_grad():
            yield
    finally:
        for p, needs in before.items():
            p.requires_grad_(needs)
            p.grad = None
        for m, mode in modes.items():
            m.training = mode


# ---- MC dropout -----------------------------------------------------------------------------------------------------
@contextmanager
def lora_dropout(model: nn.Module) -> Iterator[None]:
    """While active, peft's dropout on the inputs of the LoRA matrices drops, whatever the model's mode. ``ValueError`` without."""
    found = [m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in name.split(".")]
    if not found:
        raise ValueError("the model has no LoRA dropout: train it with add_lora(..., dropout=p), p > 0")
    modes = [m.training for m in found]
    try:
        for m in found:
            m.training = True
        yield
    finally:
        for m, mode in zip(found, modes, strict=True):
            m.training = mode


@contextmanager
def expert_dropout(model: nn.Module, p: float) -> Iterator[None]:
    """While active, in any mode, every routed expert's second linear layer has dropout on its input ``a``.

    So that layer, where the expert posterior sits, loses random columns, in each (token, expert) slot others. For training too.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout={p} is not in [0, 1)")
    drop = lambda a: nn.functional.dropout(a, p, training=True)  # noqa: E731
    inner, layers = unwrap(model), expert_layers(model).values()
    fused = [bare(m) for m in layers if not isinstance(m, nn.ModuleList)]
    gated = [m for m in fused if m.has_gate]
    with ExitStack() as stack:
        for experts in layers:
            for expert in experts if isinstance(experts, nn.ModuleList) else ():
                stack.callback(second_layer(expert).register_forward_pre_hook(lambda _, args: (drop(args[0]), *args[1:])).remove)
        if fused:  # the one implementation of the experts that is sure to compute a by these methods
            stack.callback(inner.set_experts_implementation, inner.get_experts_implementation())
            inner.set_experts_implementation(IMPLEMENTATION)
        for m in fused:
            if not m.has_gate:
                stack.callback(m.act_fn.register_forward_hook(lambda _, args, a: drop(a)).remove)
        for m in gated:
            gate = m._apply_gate
            m._apply_gate = lambda x, gate=gate: drop(gate(x))  # an instance attribute in front of the class's method
            stack.callback(delattr, m, "_apply_gate")
        yield


class MCDropout(Averaged):
    """``passes`` passes with dropout on. ``dropping()``: a context in which the model drops, such as
    ``partial(expert_dropout, model, 0.1)``; the rest of the model is in eval mode."""

    def __init__(self, model: nn.Module, dropping: Callable[[], AbstractContextManager], passes: int = 10, seed: int = 0):
        if passes < 1:
            raise ValueError(f"passes={passes} must be at least 1")
        self.model, self.dropping, self.passes, self.seed = model, dropping, passes, seed

    def draws(self, batch):
        with evaluating(self.model), self.dropping(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            logits = [option_logits(self.model, batch) for _ in range(self.passes)]
            return torch.stack([float64(f).softmax(-1) for f in logits])


# ---- several settings of the weights --------------------------------------------------------------------------------
class WeightEnsemble(Averaged):
    """The mean over ``states``, each the values of some of the model's parameters by name: an ensemble's members, a posterior's
    samples. One model holds them in turn."""

    def __init__(self, model: nn.Module, states: Sequence[Mapping[str, Tensor]]):
        if not states:
            raise ValueError("an ensemble needs at least one member")
        self.model, self.states = model, list(states)

    def draws(self, batch):
        with evaluating(self.model):
            out = []
            for state in self.states:
                with weights_set(self.model, state):
                    out.append(float64(option_logits(self.model, batch)).softmax(-1))
        return torch.stack(out)


# ---- SWAG -----------------------------------------------------------------------------------------------------------
def fit_swag(model: nn.Module, loader: Iterable[Mapping[str, Tensor]], *, epochs: int, lr: float, rank: int = 20, per_epoch: int = 4,
             seed: int = 0, progress: bool = True) -> dict[str, SwagMoments]:
    """Moments of the fine-tuned weights (:func:`adapted_weights`) along ``epochs`` more at the constant rate ``lr``, from where the model
    stands, of ``per_epoch`` points an epoch. AdamW, as the fine-tuning before it; ``loader`` must be re-iterable."""
    if epochs < 1 or per_epoch < 1 or rank < 2 or epochs * per_epoch < 2:
        raise ValueError(f"SWAG needs rank >= 2 and at least two points, not epochs={epochs}, per_epoch={per_epoch}, rank={rank}")
    weights = adapted_weights(model)
    masters = Masters(weights)
    moments = {k: SwagMoments.like(v.detach(), rank) for k, v in weights.items()}
    with weights_set(model, {k: v.detach() for k, v in weights.items()}), training_only(model, weights.values()), torch.random.fork_rng():
        set_seed(seed)
        optimizer = torch.optim.AdamW(masters.values(), lr=lr, weight_decay=0.0)
        every = max(1, len(loader) // per_epoch)
        for _ in track(range(epochs), "SWAG (epochs)", progress):
            for step, batch in enumerate(loader, 1):
                answer_nll(option_logits(model, batch), batch["labels"]).backward()
                masters.step(optimizer)
                if step % every == 0:
                    for k, v in masters.items():
                        moments[k].update(v.detach().clone())
    return moments


def swag_states(moments: Mapping[str, SwagMoments], num_samples: int, *, scale: float = 0.5, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples of ``N(mean, scale (diag(variance) + D D^T / (K - 1)))`` over all the weights together, one low-rank draw for all."""
    names = list(moments)
    flat = lambda tensors, axes: torch.cat([t.flatten(axes) for t in tensors], axes)  # noqa: E731
    mean, variance = (flat([getattr(moments[k], part) for k in names], 0) for part in ("mean", "variance"))
    low_rank = flat([moments[k].matrix() for k in names], 1)
    drawn = swag_sample(mean, variance, low_rank, num_samples, scale=scale, generator=torch.Generator(mean.device).manual_seed(seed))
    shapes = [moments[k].mean.shape for k in names]
    return [{k: x.view(s) for k, s, x in zip(names, shapes, row.split([s.numel() for s in shapes]), strict=True)} for row in drawn]
