"""Each architecture's own routing rule, kept: finding the routers of a model, and applying their rule to any logits.

A router maps hidden states to logits, top-K weights and top-K indices under its architecture's rule. A shallow copy of it
whose linear map hands on what it is given applies exactly that rule to any logits, so a Bayesian router only produces
logits. The map is the router's own weight (the copy's is then the identity) or a linear layer inside it, perhaps behind a
norm (the copy's then gives the logits whatever comes in).
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn

from ..models import offload
from ..models.layers import expert_layers, num_experts, unwrap
from . import maths


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> router of every MoE layer, in the model's order: beside its experts, the module with a linear map ``[E, d]``.

    A router that was offloaded is put on its device for good: a Bayesian one reads its weight. ``ValueError`` where there is none.
    """
    inner, found = unwrap(model), {}
    for name, experts in expert_layers(model).items():
        parent = name.rpartition(".")[0]
        near = {f"{parent}.{child}": m for child, m in inner.get_submodule(parent).named_children() if m is not experts}
        shaped = {n: m for n, m in near.items() if (linear := linear_map(m)) is not None
                  and linear.weight.dim() == 2 and linear.weight.shape[0] == num_experts(experts)}
        if len(shaped) > 1:  # a plain layer may happen to be as wide, a router has a rule besides its weight
            shaped = {n: m for n, m in shaped.items() if type(m) is not nn.Linear}
        if len(shaped) != 1:
            raise ValueError(f"layer {parent!r} has {len(shaped)} modules that look like a router with one weight [E, d], not one")
        found |= shaped
    for router in found.values():
        offload.keep(router)
    return found


def linear_map(router: nn.Module) -> nn.Module | None:
    """Where a router's weight is: in the router itself, or in the one ``nn.Linear`` right inside it. None without one."""
    if getattr(router, "weight", None) is not None:
        return router
    inside = [m for m in router.children() if isinstance(m, nn.Linear)]
    return inside[0] if len(inside) == 1 else None


class _Given(nn.Module):
    """In the place of a linear layer: gives what it was told, whatever comes in."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.weight = linear.weight  # routers look at its dtype
        self.output = None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output


class Rule:
    """The router's own top-K rule as a function of logits ``[N, E]``, checked against the router when it is made.

    ``linear``: the module with its weight. ``link``: what it makes of logits (``softmax``, ``sigmoid``, or None for something
    else). ``normalised``: the K weights of a token have a fixed sum. ``order``: where logits (or the probabilities made of
    them), weights and indices stand among the router's outputs.
    """

    def __init__(self, model: nn.Module, name: str, router: nn.Module, forward):
        self.linear = linear_map(router)
        self._inside = [n for n, m in router.named_children() if m is self.linear]
        self._block = unwrap(model).get_submodule(name.rpartition(".")[0])
        # Some routers are handed a tensor of their block's, such as a correction bias, by the name it has there.
        parameters = list(inspect.signature(type(router).forward).parameters.values())[2:]
        self._handed = [p.name for p in parameters if isinstance(getattr(self._block, p.name, None), Tensor)]
        for p in parameters:
            if p.name not in self._handed and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD:
                raise ValueError(f"router {name!r} routes by {p.name} too, not by its logits alone; it cannot be replaced")
        weight = self.linear.weight
        self.num_experts, width = weight.shape
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._copy = self._handing_on(router)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(16, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            spread = (probe @ weight.cpu().double().mT).std().clamp(min=1e-6)
            probe = probe * (2 / spread)  # logits of std 2
            probe = probe.to(weight.device, weight.dtype)
            self.order = self._roles(name, forward(self._shaped(probe), **self._extra()))
            outputs, _, logits = self.run(forward, self._shaped(probe), **self._extra())
            outputs = [o.reshape(16, -1) for o in outputs]
            self.dtypes = [o.dtype for o in outputs]
            weights, indices = (outputs[i] for i in self.order[1:])
            again = self(logits)
            # In half precision a few logits tie, and where the copy breaks a tie otherwise the weights are the same.
            same = (again[2] == indices).cpu().double().mean()
            if not (same > 0.9 and torch.allclose(again[1], weights, rtol=1e-2, atol=1e-6)):
                raise ValueError(f"router {name!r} ({type(router).__name__}) is more than a rule on its logits; it cannot be replaced")
            self.total, self.normalised = float(weights.sum(-1).cpu().double().mean()), False
            weights = weights.cpu().double()
            sums = weights.sum(-1)
            self.normalised = bool((sums - self.total).abs().max() < 1e-2 * self.total)
            self.link = self._find_link(logits.cpu().double(), weights, indices.cpu())
        self._all = self._widened(indices.shape[1])

    def _handing_on(self, router: nn.Module) -> nn.Module:
        """The copy whose linear map gives the logits themselves."""
        clone, weight = copy.copy(router), self.linear.weight
        clone.__dict__.pop("forward", None)  # an override belongs to the original
        clone._parameters, clone._modules = dict(router._parameters), dict(router._modules)  # copy.copy shares these dicts
        if self._inside:
            clone._modules[self._inside[0]] = _Given(self.linear)
            return clone
        clone._parameters["weight"] = nn.Parameter(torch.eye(self.num_experts, dtype=self.dtype, device=weight.device), False)
        if clone._parameters.get("bias") is not None:  # the logits have it in them
            clone._parameters["bias"] = nn.Parameter(torch.zeros(self.num_experts, dtype=self.dtype, device=weight.device), False)
        for key in ("hidden_dim", "hidden_size", "input_size"):
            if getattr(clone, key, None) == weight.shape[1]:
                setattr(clone, key, self.num_experts)
        return clone

    def _widened(self, k: int) -> nn.Module | None:
        """The rule with K = E, the weight it would give every expert; None where no one number of it is K."""
        keys, clone = ("top_k", "topk", "num_experts_per_tok", "top_k_experts"), copy.copy(self._copy)
        clone.config = copy.copy(getattr(clone, "config", None))  # of the model: some routers read K there
        for holder in (clone, clone.config):
            found = [key for key, value in getattr(holder, "__dict__", {}).items() if key in keys and value == k]
            if len(found) == 1:
                setattr(holder, found[0], self.num_experts)
                return clone
        return None

    def _extra(self) -> dict[str, Tensor]:
        return {name: offload.values(self._block, name) for name in self._handed}

    def _shaped(self, hidden: Tensor) -> Tensor:
        """``[N, d]`` as the router takes it: one with its weight inside may insist on ``[B, T, d]``."""
        return hidden[None] if self._inside else hidden

    def run(self, forward, hidden: Tensor, *args, **kwargs) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The router's outputs, and its linear map's input ``[N, d]`` and output ``[N, E]``, the latter in this rule's dtype."""
        if not self._inside:
            outputs = forward(hidden, *args, **kwargs)
            logits = outputs[self.order[0]]
            return outputs, hidden.reshape(len(logits), -1), logits.to(self.dtype)
        seen = []
        with self.linear.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))):
            outputs = forward(hidden, *args, **kwargs)
        (u, logits), = seen
        return outputs, u.reshape(-1, u.shape[-1]), logits.reshape(-1, logits.shape[-1]).to(self.dtype)

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
            ratio = weights / maths.log_scores(logits, link).exp().gather(1, indices)
            spread = ratio.max(-1).values / ratio.min(-1).values if indices.shape[1] > 1 else ratio.max() / ratio.min()
            if (spread < 1.05).all():
                return link
        return None

    def _outputs(self, rule: nn.Module, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits, weights, indices of ``rule``, a copy of the router. Not through ``__call__``: it shares the router's hooks."""
        hidden = logits
        if self._inside:
            given = rule._modules[self._inside[0]]
            given.output, hidden = logits, logits.new_zeros(len(logits), self.linear.weight.shape[1])
        outputs = type(rule).forward(rule, self._shaped(hidden), **self._extra())
        if self._inside:
            given.output = None  # and the graph behind it
        return tuple(outputs[i].reshape(len(logits), -1) for i in self.order)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``logits [N, E]`` -> logits, weights ``[N, K]``, indices ``[N, K]``, in the types the router itself gives."""
        return tuple(o.to(self.dtypes[i]) for i, o in zip(self.order, self._outputs(self._copy, logits), strict=True))

    def select(self, outputs: tuple[Tensor, ...], logits: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses the experts by ``noisy`` logits and weighs them as the rule weighs them at ``logits``, where the router itself
        gave ``outputs``."""
        shown, own_weights, own = (outputs[i].reshape(len(logits), -1) for i in self.order)
        indices = self(noisy)[2]
        _, weights, all_indices = self._outputs(self._all, logits)
        everyone = torch.zeros_like(logits).scatter(1, all_indices, weights.to(logits.dtype))
        weights = everyone.gather(1, indices)
        if self.normalised:  # to the sum of K, not of E
            weights = weights * (self.total / weights.sum(-1, keepdim=True))
        # Where the draw is the router's own choice it is the router's own result, order and last bit.
        same = (indices.sort(-1).values == own.sort(-1).values).all(-1, keepdim=True)
        return shown, torch.where(same, own_weights, weights.to(own_weights.dtype)), torch.where(same, own, indices)

    def pack(self, logits: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """In the router's own order."""
        return tuple(x for _, x in sorted(zip(self.order, (logits, weights, indices), strict=True), key=lambda p: p[0]))
