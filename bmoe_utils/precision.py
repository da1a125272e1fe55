"""In which floating-point numbers the study computes beside a model of any precision.

The model's own forward stays in its dtype. What is made of its logits, activations and gradients
does not: bf16 has 8 bits, so that the probabilities of its softmax sum to 1 within .004, and a sum
of a few hundred of them stops growing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Devices without float64: what needs it is computed on the CPU, after the move (they could not
# cast).
WITHOUT_FLOAT64 = ("mps",)


def at_least_float32(x: Tensor) -> Tensor:
    """A bf16 or fp16 tensor in float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def float64(x: Tensor) -> Tensor:
    """In float64, on the same device or, if that has none (Apple's MPS), on the CPU."""
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """On the device, unless ``x`` is float64 and the device has none: then as it is."""
    stays = x.dtype == torch.float64 and torch.device(device).type in WITHOUT_FLOAT64
    return x if stays else x.to(device)


class Masters(dict[str, nn.Parameter]):
    """What an optimiser steps in the place of ``weights``, by name: those of half precision in
    float32.

    Most steps are too small for a bf16 weight to take, and AdamW's epsilon is 0 in fp16, so that a
    weight without a gradient becomes not a number. Weights of float32 and float64 are their own
    masters.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]):
        wide = {k: at_least_float32(w.detach()) for k, w in weights.items()}
        super().__init__(
            {
                k: w if m.dtype == w.dtype else nn.Parameter(m)
                for (k, w), m in zip(weights.items(), wide.values(), strict=True)
            }
        )
        self.rounded = [(w, self[k]) for k, w in weights.items() if self[k] is not w]

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float = 1.0) -> None:
        """One step of the masters' optimizer on the weights' gradients, clipped to a norm."""
        self.take_gradients()
        nn.utils.clip_grad_norm_(self.values(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.write()

    def take_gradients(self) -> None:
        """Moves the weights' gradients to their masters; before a step."""
        for weight, master in self.rounded:
            if weight.grad is not None:
                master.grad, weight.grad = at_least_float32(weight.grad), None

    @torch.no_grad()
    def write(self) -> None:
        """Gives the weights their masters' values, rounded; after a step."""
        for weight, master in self.rounded:
            weight.copy_(master)
