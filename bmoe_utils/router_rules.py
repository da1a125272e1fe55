"""Each architecture's own routing rule, kept: finding the routers of a model, and applying their rule to any logits.

A router maps hidden states to logits, top-K weights and top-K indices under its architecture's rule. A shallow copy of it
whose weight is the identity applies exactly that rule to any logits, so a Bayesian router only produces logits.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import routing
from .capture import expert_layers, unwrap


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> router of every MoE layer, in the model's order: beside its experts, the module with a weight ``[E, d]``.

    ``ValueError`` where there is none.
    """
    inner, found = unwrap(model), {}
    for name, experts in expert_layers(model).items():
        parent = name.rpartition(".")[0]
        near = {f"{parent}.{child}": m for child, m in inner.get_submodule(parent).named_children() if m is not experts}
        shaped = {n: m for n, m in near.items() if getattr(m, "weight", None) is not None and m.weight.dim() == 2
                  and m.weight.shape[0] == experts.num_experts}
        if len(shaped) != 1:
            raise ValueError(f"layer {parent!r} has {len(shaped)} modules that look like a router with one weight [E, d], not one")
        found |= shaped
    return found


class Rule:
    """The router's own top-K rule as a function of logits ``[N, E]``, checked against the router when it is made.

    ``link``: what it makes of logits (``softmax``, ``sigmoid``, or None for something else). ``normalised``: the K weights of
    a token have a fixed sum. ``order``: where logits, weights and indices stand among the router's outputs.
    """

    def __init__(self, name: str, router: nn.Module, forward):
        self.num_experts, width = router.weight.shape
        self.dtype = torch.float64 if router.weight.dtype == torch.float64 else torch.float32
        self._copy = self._identity(router, router.weight)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(16, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            probe = probe * (2 / (probe @ router.weight.double().cpu().mT).std().clamp(min=1e-6))  # logits of std 2
            outputs = forward(probe.to(router.weight.device, router.weight.dtype))
            self.order = self._roles(name, outputs)
            self.dtypes = [o.dtype for o in outputs]
            logits, weights, indices = (outputs[i] for i in self.order)
            again = self(logits.to(self.dtype))
            # In half precision a few logits tie, and where the copy breaks a tie otherwise the weights are the same.
            if not ((again[2] == indices).double().mean() > 0.9 and torch.allclose(again[1], weights, rtol=1e-2, atol=1e-6)):
                raise ValueError(f"router {name!r} ({type(router).__name__}) is more than a rule on its logits; it cannot be replaced")
            self.total, self.normalised = float(weights.sum(-1).double().mean()), False
            sums = weights.double().sum(-1)
            self.normalised = bool((sums - self.total).abs().max() < 1e-2 * self.total)
            self.link = self._find_link(logits.double(), weights.double(), indices)
        # The rule with K = E: the weight it would give every expert.
        keys = [k for k, v in vars(self._copy).items() if k in ("top_k", "topk", "num_experts_per_tok") and v == indices.shape[1]]
        self._all = None
        if len(keys) == 1:
            self._all = copy.copy(self._copy)
            setattr(self._all, keys[0], self.num_experts)

    def _identity(self, router: nn.Module, weight: Tensor) -> nn.Module:
        clone = copy.copy(router)
        clone.__dict__.pop("forward", None)  # an override belongs to the original
        clone._parameters = dict(router._parameters)  # copy.copy shares this dict with the original
        clone._parameters["weight"] = nn.Parameter(torch.eye(self.num_experts, dtype=self.dtype, device=weight.device), False)
        if clone._parameters.get("bias") is not None:  # the logits have it in them
            clone._parameters["bias"] = nn.Parameter(torch.zeros(self.num_experts, dtype=self.dtype, device=weight.device), False)
        for key in ("hidden_dim", "hidden_size", "input_size"):
            if getattr(clone, key, None) == weight.shape[1]:
                setattr(clone, key, self.num_experts)
        return clone

    def _roles(self, name: str, outputs) -> tuple[int, int, int]:
        if isinstance(outputs, tuple) and len(outputs) == 3:
            indices = [i for i, o in enumerate(outputs) if not o.is_floating_point()]
            logits = [i for i, o in enumerate(outputs) if o.is_floating_point() and o.shape[-1] == self.num_experts]
            if len(indices) == 1 and logits:  # with K = E both are wide, and the logits come first
                return logits[0], 3 - logits[0] - indices[0], indices[0]
        raise ValueError(f"router {name!r} does not give logits, top-K weights and top-K indices")

    def _find_link(self, logits: Tensor, weights: Tensor, indices: Tensor) -> str | None:
        if indices.shape[1] == 1 and self.normalised:
            return "softmax"  # weights are constant and any increasing score chooses alike
        for link in ("softmax", "sigmoid"):
            ratio = weights / routing.log_scores(logits, link).exp().gather(1, indices)
            spread = ratio.max(-1).values / ratio.min(-1).values if indices.shape[1] > 1 else ratio.max() / ratio.min()
            if (spread < 1.05).all():
                return link
        return None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``logits [N, E]`` -> logits, weights ``[N, K]``, indices ``[N, K]``, in the types the router itself gives."""
        outputs = type(self._copy).forward(self._copy, logits)  # not __call__: the copy shares the router's hooks
        return tuple(outputs[i].to(self.dtypes[i]) for i in self.order)

    def select(self, outputs: tuple[Tensor, ...], logits: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses the experts by ``noisy`` logits and weighs them as the rule weighs them at ``logits``, where the router itself
        gave ``outputs``."""
        _, own_weights, own = (outputs[i] for i in self.order)
        indices = self(noisy)[2]
        outputs = type(self._all).forward(self._all, logits)
        everyone = torch.zeros_like(logits).scatter(1, outputs[self.order[2]], outputs[self.order[1]].to(logits.dtype))
        weights = everyone.gather(1, indices)
        if self.normalised:
            weights = weights * (self.total / weights.sum(-1, keepdim=True))
        # Where the draw is the router's own choice it is the router's own result, order and last bit.
        same = (indices.sort(-1).values == own.sort(-1).values).all(-1, keepdim=True)
        logits = logits.to(self.dtypes[self.order[0]])
        return logits, torch.where(same, own_weights, weights.to(own_weights.dtype)), torch.where(same, own, indices)

    def pack(self, logits: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """In the router's own order."""
        return tuple(x for _, x in sorted(zip(self.order, (logits, weights, indices), strict=True), key=lambda p: p[0]))
