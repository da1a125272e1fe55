"""Blocks of a MoE language model's weights, and the kernels of their per-item Jacobians. Small models only: plain autograd, an item at
a time, through whatever the model does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.layers import bare, expert_layers, unwrap
from ..models.modes import frozen
from ..models.readout import option_logits
from ..precision import at_least_float32
from ..progress import track
from ..routers.rules import find_routers
from .reach import Kernels, contrasts

# Blocks in the order of figures. The first is what ExpertLaplace has a posterior over.
BLOCKS = ("experts: down", "experts: gate, up", "routers", "shared experts", "attention", "embeddings", "head", "norms")


def weight_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Block -> names of its parameters; every parameter is in one. A head that is tied to the embeddings is part of them."""
    inner = unwrap(model)
    experts, routers = {bare(m) for m in expert_layers(model).values()}, set(find_routers(model).values())
    special = {id(p): "routers" for m in routers for p in m.parameters()}
    for m in experts:
        special |= {id(p): BLOCKS[0] if name.rpartition(".")[2].startswith(("down_proj", "w2")) or "down_proj" in name else BLOCKS[1]
                    for name, p in m.named_parameters()}
    if (head := inner.get_output_embeddings()) is not None:
        special |= {id(p): "head" for p in head.parameters()}
    special |= {id(p): "embeddings" for p in inner.get_input_embeddings().parameters()}
    out: dict[str, list[str]] = {}
    for name, p in inner.named_parameters():
        block = special.get(id(p)) or ("norms" if "norm" in name else "attention" if "attn" in name else "shared experts" if "shared" in name else None)
        if block is None:
            raise ValueError(f"the parameter {name} belongs to no block: {', '.join(BLOCKS)}")
        out.setdefault(block, []).append(name)
    return {b: out[b] for b in BLOCKS if b in out}


def untied(model: nn.Module) -> nn.Module:
    """The same function with a head of its own, in place: so that what it does as an embedding and as a head can be told apart."""
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    if head.weight is inner.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        inner.config.tie_word_embeddings = False
    return model


def block_kernels(model: nn.Module, fit_loader: Iterable[Mapping[str, Tensor]], loader: Iterable[Mapping[str, Tensor]], *,
                  blocks: Mapping[str, list[str]] | None = None, progress: bool = True) -> Kernels:
    """The :class:`~bmoe_utils.study.reach.Kernels` of a fitting set and of the items of ``loader``, exact, by autograd.

    ``blocks``: name -> names of parameters, by default :func:`weight_blocks`; the prior's centre is 1 for the norms' scales, 0 for all
    else. Holds a number for every weight and every contrast of every item (the embeddings of tokens that do not occur left out):
    small models only. The model is left as it was.
    """
    blocks = dict(blocks or weight_blocks(model))
    parameters = dict(unwrap(model).named_parameters())
    fitted, looked_at = (list(_single_items(x)) for x in (fit_loader, loader))
    items = fitted + looked_at
    used = _used_rows(unwrap(model), items)
    flat = lambda names, values: torch.cat([(x[used[n]] if n in used else x).flatten() for n, x in zip(names, values)])  # noqa: E731
    C, R = max(x["option_ids"].shape[1] for x in items), sum(int((x["option_ids"] >= 0).sum()) - 1 for x in items)
    weights = {b: [parameters[n].detach() - (1.0 if b == "norms" else 0.0) for n in names] for b, names in blocks.items()}
    J = {b: at_least_float32(w[0].new_empty(0)).new_empty(R, len(flat(blocks[b], w)), device="cpu")
         for b, w in weights.items()}
    logits, row = [], 0
    with frozen(model):
        every = [parameters[n].requires_grad_() for names in blocks.values() for n in names]
        for item in track(items, "Jacobians of all weights", progress):
            f = option_logits(model, item)[0]
            own = f.detach().cpu()
            logits.append(nn.functional.pad(own.double(), (0, C - len(f)), value=-torch.inf))
            m, finite = int(own.isfinite().sum()), f.masked_fill(f.isinf(), 0.0)
            for v in contrasts(own.isfinite()[None])[0, : m - 1].to(f):
                grads = iter(torch.autograd.grad(finite, every, v, retain_graph=True, materialize_grads=True))
                for b, names in blocks.items():
                    J[b][row] = flat(names, [next(grads) for _ in names])
                row += 1
    logits = torch.stack(logits)
    # where the rows go among those of items that all have C options: the others' are zero
    place = (torch.arange(C - 1) < logits.isfinite().sum(1)[:, None] - 1).flatten().nonzero().squeeze(1)
    n, N = len(fitted) * (C - 1), len(fitted)
    mine = (place < n).sum()
    out = {key: {} for key in ("fit", "cross", "own", "fit_slope", "own_slope", "distance", "size")}
    for b, w in weights.items():
        rows = J.pop(b)
        K = torch.zeros(len(items) * (C - 1), n, dtype=torch.float64)
        K[place[:, None], place[:mine]] = (rows @ rows[:mine].mT).double()
        slope = (rows @ flat(blocks[b], w).to(rows)).double()
        slope = K.new_zeros(len(K)).index_put((place,), slope)
        own = rows.new_zeros(len(looked_at) * (C - 1), rows.shape[1]).index_copy(0, place[mine:] - n, rows[mine:]).view(len(looked_at), C - 1, -1)
        out["fit"][b], out["cross"][b], out["own"][b] = K[:n], K[n:], (own @ own.mT).double()
        out["fit_slope"][b], out["own_slope"][b] = slope[:n], slope[n:]
        out["distance"][b] = float(sum(x.cpu().double().square().sum() for x in w))
        out["size"][b] = sum(x.numel() for x in w)
    return Kernels(**out, fit_logits=logits[:N], fit_labels=torch.cat([x["labels"] for x in fitted]), logits=logits[N:])


def _single_items(loader: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The items one by one, without their padding."""
    for batch in loader:
        for i, mask in enumerate(batch["attention_mask"].bool()):
            one = {k: batch[k][i : i + 1] for k in ("input_ids", "attention_mask", "option_ids", "labels")}
            yield one | {k: one[k][:, mask] for k in ("input_ids", "attention_mask")}


def _used_rows(inner: nn.Module, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of the embeddings and of the head that any item has to do with: all others' Jacobians are zero."""
    read = torch.cat([x["input_ids"].flatten() for x in items]).unique()
    said = torch.cat([x["option_ids"][x["option_ids"] >= 0] for x in items]).unique()
    embeddings, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    names = {id(p): name for name, p in inner.named_parameters()}
    if head is embeddings:
        return {names[id(head)]: torch.cat([read, said]).unique()}
    return {names[id(embeddings)]: read, names[id(head)]: said}
