"""Labels drawn from the model for the Monte-Carlo Fisher, each by its item alone.

What is drawn for an item is a function of the seed, of its tokens and options and of the model's probabilities: not of the batch, the
order, the pass or the process it comes in. So every pass over the data draws the same, and shards draw what one process would. Items
with the same tokens and options share their draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def item_marks(batch: Mapping[str, Tensor], seed: int = 0) -> list[int]:
    """A number below 2^63 for every item, from its real tokens and its options: equal where these (and the ``seed``) are."""
    salt, marks = str(seed).encode()[:16], []
    for ids, mask, options in zip(*(batch[k].cpu() for k in ("input_ids", "attention_mask", "option_ids")), strict=True):
        content = f"{ids[mask.bool()].tolist()}{options[options >= 0].tolist()}"
        marks.append(int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8, salt=salt).digest()) >> 1)
    return marks


def drawn_labels(logits: Tensor, batch: Mapping[str, Tensor], seed: int) -> Tensor:
    """``[B]`` on the CPU: ``y ~ softmax(logits [B, C])``, by inverting its distribution function at each item's own number in [0, 1)."""
    uniform = torch.tensor([(mark >> 10) * 2.0**-53 for mark in item_marks(batch, seed)], dtype=torch.float64)
    upto = logits.detach().cpu().double().softmax(-1).cumsum(-1)
    return (upto / upto[:, -1:] <= uniform[:, None]).sum(1)
