"""Reading out the options' logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..precision import at_least_float32, moved
from .experts_forward import serve_experts
from .layers import unwrap


def to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of the model's first parameter that is on one (where a sharded model takes its input)."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    return {k: moved(v, device) for k, v in batch.items()}


@contextmanager
def _reading_out(head: nn.Linear, option_ids: Tensor) -> Iterator[None]:
    """While active, ``head`` gives the last position's logits of ``option_ids [B, C]`` alone, as ``[B, 1, C]``.

    So the model's own forward still does whatever it does to its logits (scaling, soft-capping), but on C numbers
    per item and not on the vocabulary.
    """

    def forward(hidden: Tensor) -> Tensor:
        last = hidden[:, -1]  # [B, d]; the batch is padded on the left
        rows = head.weight[option_ids]  # [B, C, d]
        logits = torch.einsum("bcd,bd->bc", rows, last)
        return (logits if head.bias is None else logits + head.bias[option_ids])[:, None]

    head.forward = forward  # an instance attribute in front of the class's method
    try:
        yield
    finally:
        del head.forward


def option_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The class logits ``f [B, C]``: the LM logits of each item's option tokens at the last position.

    ``batch``: ``input_ids [B, T]``, ``attention_mask [B, T]`` (left-padded), ``option_ids [B, C]`` (-1: no such option,
    whose logit is -inf). In the graph if gradients are on. Letters are the case where every item has the same ids.
    The model's own numbers, at least float32: so is then all that is made of them.
    ``ValueError`` on a right-padded batch or an item without options.
    """
    batch = to_device(batch, serve_experts(model))
    mask, option_ids = batch["attention_mask"], batch["option_ids"]
    if not mask[:, -1].all():
        raise ValueError("the batch must be padded on the left: the last position is the one that answers")
    missing = option_ids < 0
    if missing.all(1).any():
        raise ValueError("an item has no option at all")
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        # Counted from the first real token, so that padding moves nothing even where positions are absolute.
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    head = unwrap(model).get_output_embeddings()
    ids = option_ids.clamp(min=0)
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if plain:
        with _reading_out(head, ids.to(head.weight.device)):
            logits = model(**inputs).logits[:, -1]
    else:  # a head that something else has wrapped (LoRA on it, offloading): all of the last position's logits
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].gather(1, ids)
    return at_least_float32(logits).masked_fill(missing.to(logits.device), -torch.inf)
