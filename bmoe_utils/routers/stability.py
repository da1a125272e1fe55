"""How stable routing is: which experts are chosen, and how much of the choice survives noise on what the router reads.

Protocol of arXiv 2509.23830: Gaussian noise of standard deviation ``gamma`` times the mean norm of what it is added to, on the token
embeddings or on every router's input; the Jaccard overlap of the top-K sets with and without it, per layer, over real tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.layers import unwrap
from ..models.readout import option_logits, to_device
from ..precision import at_least_float32
from .attach import Routers
from .maths import jaccard
from .rules import find_routers, linear_map

PLACES = ("embedding", "router")


@contextmanager
def _hooked(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_noise(x: Tensor, real: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """``x [B, T, d]`` or ``[B T, d]`` with noise of std ``gamma * mean norm`` on the real tokens, ``real [B, T]``."""
    rows = real.flatten().to(x.device)
    flat = x.reshape(len(rows), -1)
    kept = at_least_float32(flat[rows])
    noise = torch.randn(kept.shape, generator=generator, dtype=torch.float32).to(kept)
    noisy = kept + gamma * kept.norm(dim=-1).mean() * noise
    return flat.index_put((rows.nonzero().squeeze(1),), noisy.to(x.dtype)).view_as(x)


@contextmanager
def perturbed(model: nn.Module, real: Tensor, gamma: float, where: str, seed: int = 0) -> Iterator[None]:
    """While active, noise is added to the token embeddings (``embedding``) or to what every router, and it alone, reads (``router``).

    ``real [B, T]``: the attention mask of the batch that goes through. ``gamma``: see above; a function of ``seed``.
    """
    if where not in PLACES:
        raise ValueError(f"where={where!r} is not one of {', '.join(map(repr, PLACES))}")
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be at least 0")
    generator, real = torch.Generator().manual_seed(seed), real.bool()
    if where == "embedding":
        embedding = unwrap(model).get_input_embeddings()
        handles = [embedding.register_forward_hook(lambda m, args, out: _with_noise(out, real, gamma, generator))]
    else:
        handles = [m.register_forward_pre_hook(lambda m, args: (_with_noise(args[0], real, gamma, generator), *args[1:]))
                   for m in find_routers(model).values()]
    with _hooked(handles):
        yield


@torch.no_grad()
def chosen_experts(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Router name -> the experts it chooses for every real token of the batch, ``[n, K]``, attached Bayesian routers included."""
    batch, found = to_device(batch, model), {}
    real = batch["attention_mask"].bool().flatten()

    def keep(name: str):
        def hook(module, args, outputs):
            indices = next(o for o in outputs if not o.is_floating_point()).flatten(0, -2)
            found[name] = indices[real.to(indices.device)].cpu()
        return hook

    with _hooked([m.register_forward_hook(keep(name)) for name, m in find_routers(model).items()]):
        option_logits(model, batch)
    return found


@torch.no_grad()
def router_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Router name -> what it reads of every real token of the batch, ``u [n, d]``."""
    batch, found = to_device(batch, model), {}
    real = batch["attention_mask"].bool().flatten()

    def keep(name: str):
        def hook(module, args):
            found[name] = args[0].reshape(len(real), -1)[real.to(args[0].device)]
        return hook

    with _hooked([m.register_forward_pre_hook(keep(name)) for name, m in find_routers(model).items()]):
        option_logits(model, batch)
    return found


def routing_stability(model: nn.Module, loader: Iterable[Mapping[str, Tensor]], gamma: float, where: str = "embedding", *,
                      routers: Routers | None = None, fresh: bool = True, seed: int = 0) -> Tensor:
    """Mean Jaccard overlap per layer, float64 ``[L]``, of the experts chosen with and without noise; over all real tokens.

    ``routers``: those attached to the model, if any. ``fresh``: the noisy pass draws its own random numbers, as another query would, and
    ``gamma = 0`` shows what sampling alone does; else both draw the same. The model is put in eval mode for the time.
    """
    totals, tokens, modes = None, 0, {m: m.training for m in model.modules()}
    model.eval()
    try:
        for number, batch in enumerate(loader):
            sets = []
            for noisy in (False, True):
                if routers is not None:
                    routers.stream(number * 2 + 1 + (noisy and fresh))
                with perturbed(model, batch["attention_mask"], gamma if noisy else 0.0, where, seed * 100_003 + number):
                    sets.append(chosen_experts(model, batch))
            overlap = torch.stack([jaccard(sets[0][name], sets[1][name]).sum() for name in sets[0]])
            totals = overlap if totals is None else totals + overlap
            tokens += int(batch["attention_mask"].sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
        if routers is not None:
            routers.stream(0)
    if totals is None:
        raise ValueError("the loader is empty")
    return totals / tokens


@torch.no_grad()
def routing_margins(model: nn.Module, loader: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """How far the last chosen expert's logit lies above the best one left out, ``[L, n]`` over the real tokens.

    In units of the standard deviation of the token's logits. Routers that correct or group their choice are read by their logits alone.
    """
    margins: dict[str, list[Tensor]] = {}

    def keep(name: str, real: Tensor):
        def hook(module, args, outputs):
            k = next(o for o in outputs if not o.is_floating_point()).shape[-1]
            # with K = E both floating outputs are as wide: then nothing is left out, and there is no margin
            logits = next(o for o in outputs if o.is_floating_point() and o.shape[-1] == len(linear_map(module).weight)).flatten(0, -2)
            logits = logits[real.to(logits.device)].cpu().double()
            top = logits.topk(k + 1, dim=-1).values
            margins.setdefault(name, []).append((top[:, -2] - top[:, -1]) / logits.std(-1))
        return hook

    for batch in loader:
        batch = to_device(batch, model)
        real = batch["attention_mask"].bool().flatten()
        with _hooked([m.register_forward_hook(keep(name, real)) for name, m in find_routers(model).items()]):
            option_logits(model, batch)
    return torch.stack([torch.cat(parts) for parts in margins.values()])
