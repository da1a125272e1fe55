"""Experts kept as modules of their own, a ``ModuleList`` of small networks of ``nn.Linear`` a layer: the same capture, by hooks.

transformers 5 fuses the experts of its own models; a checkpoint's code, or an older one's, may not. Nothing says which tokens
such a block sends to which expert, so that is read off the graph: an expert's input is a gather of the block's, and the
gradient of a gather names its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

SECOND_LAYERS = ("down_proj", "w2", "fc2")


def second_layer(expert: nn.Module) -> nn.Module | None:
    """An expert's second linear layer, plain or under LoRA, by the names it goes by; None if there is none."""
    found = [getattr(expert, name) for name in SECOND_LAYERS if hasattr(expert, name)]
    return next((m for m in found if isinstance(getattr(m, "base_layer", m), nn.Linear)), None)


def is_unfused(name: str, module: nn.Module) -> bool:
    """Whether the module is a layer's list of routed experts."""
    leaf = name.rpartition(".")[2]
    return (isinstance(module, nn.ModuleList) and "expert" in leaf and "shared" not in leaf and len(module) > 0
            and all(second_layer(expert) is not None for expert in module))


def gathered_rows(x: Tensor, source: Tensor) -> Tensor | None:
    """Which row of ``source [..., d]`` (flattened to rows) each row of ``x [n, d]`` is, ``[n]``, by the graph between them.

    None where ``x`` is anything but distinct rows of it. The cotangent of row i spells i + 1 in binary over the channels, so
    that the gradient is exact in every dtype.
    """
    n, d = x.shape
    bits = torch.arange(n.bit_length(), device=x.device)
    if len(bits) > d:
        raise ValueError(f"{n} rows of width {d} cannot be told apart")
    numbers = torch.arange(1, n + 1, device=x.device)
    digits = (numbers[:, None] >> bits) & 1  # [n, bits]
    cotangent = nn.functional.pad(digits.to(x.dtype), (0, d - len(bits)))
    (grad,) = torch.autograd.grad(x, source, cotangent, retain_graph=True, materialize_grads=True)
    grad = grad.reshape(-1, grad.shape[-1])
    spelt = (grad[:, : len(bits)].long() << bits).sum(1)  # [N]: i + 1 at row i's source, 0 elsewhere
    rows = spelt.nonzero().squeeze(1)
    exact = ((grad == 0) | (grad == 1)).all() and not grad[:, len(bits):].any()
    if not exact or len(rows) != n or (spelt[rows].sort().values != numbers).any():
        return None
    return rows[spelt[rows].argsort()]


@contextmanager
def watching(name: str, block: nn.Module, experts: nn.ModuleList, record: Callable) -> Iterator[None]:
    """While active, a forward pass of ``block``, which holds ``experts``, ends in ``record(a [S, f], z, expert [S], token [S])``,
    sorted by expert: the second layers' inputs, their outputs (one tensor ``[..., d]`` an expert, in the graph), and where
    each slot comes from. ``RuntimeError`` if an expert's input is not a gather of the block's."""
    source: list[Tensor] = []
    inputs, seen = {}, {}

    def enter(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if not hidden.requires_grad:  # nothing below this layer is in the graph: it starts here
            hidden = hidden.detach().requires_grad_()
        source[:] = [hidden]
        inputs.clear(), seen.clear()
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def leave(*_):
        ran = [e for e in sorted(seen) if seen[e][0].numel()]
        parts = []
        for e in ran:
            a, z = seen[e]
            x = inputs[e]
            token = gathered_rows(x.reshape(-1, x.shape[-1]), source[0]) if a.shape[:-1] == x.shape[:-1] else None
            if token is None:
                raise RuntimeError(f"expert {e} of {name!r} is not given tokens' hidden states as they are: no capture")
            parts.append((a.reshape(-1, a.shape[-1]), torch.full_like(token, e), token))
        if parts:
            a, expert, token = map(torch.cat, zip(*parts, strict=True))
            record(a, tuple(seen[e][1] for e in ran), expert, token)

    with ExitStack() as stack:
        stack.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
        for e, expert in enumerate(experts):
            stack.enter_context(expert.register_forward_pre_hook(lambda _, args, e=e: inputs.update({e: args[0]})))
            stack.enter_context(second_layer(expert).register_forward_hook(
                lambda _, args, output, e=e: seen.update({e: (args[0], output)})))
        stack.enter_context(block.register_forward_hook(leave))
        yield
