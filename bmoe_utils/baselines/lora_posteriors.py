"""Gaussian posteriors over the LoRA matrices that are sampled: BLoB, trained as one, and TFB, made of a trained adapter.

With ``Delta W = s B A``, ``A [r, d_in]``, ``B [d_out, r]``:

    BLoB  (arXiv 2406.11675)   q(A_ij) = N(M_ij, (G_ij^2)^2), prior N(0, sigma_p^2), B deterministic; M, G and B by the ELBO
    TFB   (arXiv 2412.05723)   B = U diag(d) V^T; noise of std sigma / d_i on row i of V^T A, so that Delta W has s sigma U E, E ~ N(0, I)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from ..models.readout import option_logits
from ..models.training import adapted_weights, answer_nll
from ..precision import at_least_float32, float64
from ..progress import track
from .averaging import forward_hooks, training_only, weights_set
from .lora_laplace import lora_linears

TINY = torch.finfo(torch.float64).tiny


def _named_A(model: nn.Module) -> dict[str, nn.Linear]:
    """Parameter name -> module of every LoRA matrix A."""
    by_module = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return {by_module[id(A)]: A for A, _ in lora_linears(model).values()}


# ---- BLoB -----------------------------------------------------------------------------------------------------------
def kl_to_prior(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """``KL(N(mean, std^2) || N(0, prior_std^2))`` in nats, summed over elements."""
    ratio = (std / prior_std).square()
    return 0.5 * (ratio + (at_least_float32(mean) / prior_std).square() - 1 - ratio.log()).sum()


def kl_shares(batches: int) -> Tensor:
    """The KL's share of every mini-batch of an epoch, ``2^i / (2^M - 1)``, i = 0..M-1: they sum to 1, and the data have had their
    say when most of it comes. float64 ``[M]``."""
    powers = torch.arange(batches, dtype=torch.float64) - batches
    return powers.exp2() / (1 - torch.tensor(-batches, dtype=torch.float64).exp2())


def flipout(matrices: Mapping[str, nn.Linear], std: Mapping[str, Tensor]) -> AbstractContextManager:
    """While active, every A has noise of ``std [r, d_in]`` through flipout (arXiv 1803.04386): one draw E a pass, and for every item
    ``(E (x * s)) * t`` with signs ``s [d_in]``, ``t [r]`` of its own, which is a draw of the same law for each."""

    def noisy(name: str):
        def hook(_, args, out):
            x = args[0]  # [B, T, d_in], in latent attention [B, 1, T, d_in]
            each = len(x), *(1 for _ in x.shape[1:-1])
            signs = lambda width: (torch.randint(0, 2, (*each, width), device=x.device) * 2 - 1).to(x.dtype)  # noqa: E731
            noise = std[name] * torch.randn_like(std[name])
            return out + nn.functional.linear(x * signs(x.shape[-1]), noise.to(x.dtype)) * signs(out.shape[-1])
        return hook

    return forward_hooks(matrices, noisy)


def fit_blob(model: nn.Module, loader: Iterable[Mapping[str, Tensor]], *, epochs: int, lr: float, prior_std: float = 0.2,
             init: float = 0.05, kl_weight: float = 1.0, reweight: bool = True, seed: int = 0,
             progress: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained LoRA weights (A's are the means M) and the std of every A, ``G^2``, both by parameter name; G starts uniform in
    ``[init / sqrt(2), init]``. The model is left as it was.

    Loss of a mini-batch: mean NLL of its items + ``kl_weight * share * KL / b``, b its size, ``share`` by :func:`kl_shares` or (without
    ``reweight``) 1 / M. ``kl_weight=1`` is the ELBO. One AdamW for all three, with fine-tuning's schedule; ``loader`` re-iterable.
    """
    if not (prior_std > 0 and init > 0 and kl_weight >= 0 and epochs >= 1):
        raise ValueError("BLoB needs prior_std > 0, init > 0, kl_weight >= 0 and epochs >= 1, not "
                         f"{prior_std}, {init}, {kl_weight}, {epochs}")
    matrices, weights = _named_A(model), adapted_weights(model)
    with weights_set(model, {k: v.detach() for k, v in weights.items()}), training_only(model, weights.values()), torch.random.fork_rng():
        set_seed(seed)
        wide = {k: at_least_float32(torch.empty_like(A.weight)) for k, A in matrices.items()}
        G = {k: nn.Parameter(init * w.uniform_(0.5**0.5, 1)) for k, w in wide.items()}
        trained = [*weights.values(), *G.values()]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        steps = epochs * len(loader)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
        shares = kl_shares(len(loader)) if reweight else torch.full((len(loader),), 1 / len(loader))
        for _ in track(range(epochs), "BLoB (epochs)", progress):
            for share, batch in zip(shares.tolist(), loader, strict=True):
                std = {k: g.square() for k, g in G.items()}
                with flipout(matrices, std):
                    nll = answer_nll(option_logits(model, batch), batch["labels"])
                kl = sum(kl_to_prior(A.weight, std[k], prior_std) for k, A in matrices.items())
                (nll + kl_weight * share * kl / len(batch["labels"])).backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return ({k: v.detach().clone() for k, v in weights.items()}, {k: g.detach().square() for k, g in G.items()})


def mean_field_states(state: Mapping[str, Tensor], std: Mapping[str, Tensor], num_samples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples of the weights: ``state`` with Gaussian noise of ``std`` on those that have one."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    noise = lambda s: s * torch.randn(s.shape, generator=generator, dtype=torch.float32).to(s)  # noqa: E731
    return [{k: v + noise(std[k]) if k in std else v for k, v in state.items()} for _ in range(num_samples)]


# ---- TFB ------------------------------------------------------------------------------------------------------------
def tfb_directions(model: nn.Module, num_samples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """What ``num_samples`` draws at sigma = 1 add to every A: ``V diag(1/d) E``, ``E [r, d_in]`` standard normal. Where B is singular
    (``d_i = 0`` to rounding; the zeros of an untrained B) row i gets no noise: none reaches the weights."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    names, inverses = list(_named_A(model)), []
    for A, B in lora_linears(model).values():
        _, d, Vh = torch.linalg.svd(float64(B.weight.detach()), full_matrices=False)
        real = d > max(B.weight.shape) * torch.finfo(B.weight.dtype).eps * d.max().clamp(min=TINY)
        like = at_least_float32(A.weight.detach())
        inverses.append((Vh.mT * torch.where(real, 1 / d, 0.0), like))

    def drawn(V: Tensor, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (V @ noise[: V.shape[1]].to(V.device)).to(like.dtype).to(like.device)

    return [{name: drawn(*pair) for name, pair in zip(names, inverses, strict=True)}
            for _ in range(num_samples)]


def tfb_states(model: nn.Module, sigma: float, directions: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples at ``sigma``: every A with ``sigma`` times what :func:`tfb_directions` drew."""
    A = {k: at_least_float32(m.weight.detach()) for k, m in _named_A(model).items()}
    return [{k: A[k] + sigma * v for k, v in one.items()} for one in directions]


def largest_within(change: Callable[[float], float], tolerance: float, *, start: float = 0.01, steps: int = 8,
                   widest: float = 1e4) -> float:
    """The largest x whose ``change(x)`` is within ``tolerance``, for a change that grows with x: doubled or halved from ``start`` until
    bracketed, then ``steps`` bisections, in the logarithm. What is returned has been tried and is within; it lies below the largest
    by a factor ``2^(2^-steps)`` at most. ``ValueError`` where even ``start / widest`` is too much."""
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be positive")
    low = start
    if change(low) <= tolerance:
        while low < start * widest and change(2 * low) <= tolerance:
            low *= 2
        if low >= start * widest:  # nothing ever changes: as wide as we look
            return low
    else:
        while low > start / widest:
            low /= 2
            if change(low) <= tolerance:
                break
        else:
            raise ValueError(f"even a noise of {low:g} changes the performance by more than {tolerance:g}")
    high = 2 * low
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if change(middle) <= tolerance else (low, middle)
    return low
