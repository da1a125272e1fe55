"""Laplace-LoRA (arXiv 2308.13111): a Laplace posterior over the LoRA matrices of a model at its MAP weights.

Every A and B is a linear layer of its own, ``z = W a`` on every token, so it is what an expert's second layer is to
:class:`~bmoe_utils.experts.laplace.ExpertLaplace`, with all tokens routed to it: the same sums, Kronecker eigenbasis, evidence and exact
per-item Jacobians serve. ``H_W ~ G (x) A / n`` from every real token; block-diagonal over the matrices; one prior precision for all,
around zero, by the evidence; the linearised predictive. As in the paper, a factor's side wider than ``WIDE`` is held in ``rank``
eigenvectors (found by the one-pass sketch), the small side, the rank of LoRA, whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..experts import prior
from ..experts.curvature import Eigenbasis, softmax_hessian_root
from ..experts.jacobians import Routes
from ..experts.sketch import Sketch
from ..experts.sums import Gram, KronSums
from ..models.modes import frozen
from ..models.readout import option_logits, to_device
from ..precision import float64
from ..progress import track
from .averaging import GaussianLogits, forward_hooks

WIDE = 100  # the paper's threshold


def lora_linears(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """Name -> ``(A, B)`` of every linear layer that the active LoRA adapter changes, in the model's order; ``ValueError`` if none."""
    found = {}
    for name, module in model.named_modules():
        matrices = getattr(module, "lora_A", None)
        for adapter in getattr(module, "active_adapters", ()) if isinstance(matrices, nn.ModuleDict) else ():
            if adapter in matrices:
                found[f"{name}.{adapter}"] = matrices[adapter], module.lora_B[adapter]
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA matrices: this posterior sits on them, so train with add_lora")
    return found


def _recording(matrices: Mapping[str, nn.Linear], seen: dict) -> AbstractContextManager:
    """While active, a forward pass puts every matrix's input and output, ``(a, z)``, in ``seen``, z in the graph."""

    def keep(name: str):
        def hook(_, args, z):
            if not z.requires_grad:  # nothing below is in the graph: it starts here
                z.requires_grad_()
            seen[name] = args[0].detach(), z
        return hook

    return forward_hooks(matrices, keep)


def by_token(x: Tensor, tokens: tuple[int, int], name: str) -> Tensor:
    """``[B T, m]`` of what the matrix of this name reads or gives: ``[B, T, m]``, ``[B T, m]``, or with axes of 1 (latent attention's
    ``[B, 1, T, m]``). ``ValueError`` where that is not one row a token."""
    sizes = [n for n in x.shape[:-1] if n != 1]
    if sizes not in ([n for n in tokens if n != 1], [n for n in (tokens[0] * tokens[1],) if n != 1]):
        raise ValueError(f"the LoRA matrix {name!r} reads {list(x.shape)} for {tokens[0]} x {tokens[1]} tokens, not one row a token: "
                         "its posterior cannot be captured; adapt other layers (target_modules=)")
    return x.reshape(-1, x.shape[-1])


class LoraLaplace(GaussianLogits):
    """Args: ``rank``: see the module. ``prior_precision``: of every weight. ``num_samples``, ``seed``: of the logits drawn when it is
    called (and of the sketch). The verbs are those of :class:`~bmoe_utils.experts.laplace.ExpertLaplace`.
    """

    def __init__(self, model: nn.Module, *, rank: int = 10, prior_precision: float = 1.0, num_samples: int = 1000, seed: int = 0):
        if rank < 1 or num_samples < 1:
            raise ValueError(f"rank={rank} and num_samples={num_samples} must be at least 1")
        self.model, self.rank, self.num_samples, self.seed = model, rank, num_samples, seed
        self.matrices = {f"{name}.{side}": m for name, pair in lora_linears(model).items() for side, m in zip("AB", pair, strict=True)}
        self.prior_precision = torch.as_tensor(float(prior_precision), dtype=torch.float64)
        self.posteriors: list[Eigenbasis] | None = None

    def captured(self, batch: Mapping[str, Tensor], columns) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Routes]:
        """Class logits ``f [B, C]``, and per matrix the inputs ``a [S, m]`` of the real tokens with ``g [K, S, o] = d <v_k, f> / d z``,
        ``v = columns(f) [K, B, C]``, at least float32; and where the tokens belong."""
        batch, seen = to_device(batch, self.model), {}
        mask = batch["attention_mask"].bool()
        with frozen(self.model):
            with _recording(self.matrices, seen):
                f = option_logits(self.model, batch)
            if missing := self.matrices.keys() - seen.keys():
                raise RuntimeError(f"the LoRA matrix {min(missing)!r} did not run in the forward pass; it cannot be captured")
            v, outputs = columns(f.detach()), [seen[name][1] for name in self.matrices]
            grads = [torch.autograd.grad(f, outputs, v_k.to(f.dtype), retain_graph=k + 1 < len(v), materialize_grads=True)
                     for k, v_k in enumerate(v)]
        fine = torch.promote_types(f.dtype, torch.float32)
        layers = []
        for i, name in enumerate(self.matrices):
            real = mask.flatten().to(outputs[i].device)
            rows = lambda x, name=name: by_token(x, mask.shape, name)[real]  # noqa: E731
            layers.append((rows(seen[name][0]).to(fine), torch.stack([rows(g[i]) for g in grads]).to(fine)))
        item = mask.nonzero()[:, 0]
        return f.detach(), layers, Routes(item, torch.tensor([len(item)], device=item.device), len(mask))

    def _sums(self, weight: Tensor) -> KronSums:
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        factor = lambda width: Gram(1, width, like) if width <= WIDE else Sketch(1, width, self.rank, self.seed, like)  # noqa: E731
        return KronSums(factor(weight.shape[1]), factor(weight.shape[0]), torch.zeros(1, dtype=torch.long, device=weight.device))

    def fit(self, loader: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> LoraLaplace:
        """Sums the factors over the fitting set. ``ValueError`` for an empty loader, an item without a label, or a value that is not
        finite; the previous posterior then stays."""
        sums, likelihood, number = [self._sums(m.weight) for m in self.matrices.values()], 0.0, -1
        for number, batch in enumerate(track(loader, "Laplace-LoRA", progress)):
            if (batch["labels"] < 0).any():
                raise ValueError(f"batch {number} has items without a label")
            f, layers, routes = self.captured(batch, lambda f: softmax_hessian_root(f).permute(2, 0, 1))
            for name, one, (a, g) in zip(self.matrices, sums, layers, strict=True):
                if not (a.isfinite().all() and g.isfinite().all()):
                    raise ValueError(f"batch {number}, {name!r}: an activation or a gradient is not finite")
                one.open(a, a.square().sum(1), routes)
                for column in g:
                    one.column(column, column.square().sum(1))
                one.close()
            picked = f.cpu().double().log_softmax(-1).gather(1, batch["labels"].cpu()[:, None])
            likelihood += float(picked.sum())
        if number < 0:
            raise ValueError("the loader gave no batch: there is nothing to fit on")
        self.posteriors, self.log_likelihood = [_eigenbasis(one) for one in sums], likelihood
        return self

    def _fitted(self) -> list[Eigenbasis]:
        if self.posteriors is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first")
        return self.posteriors

    def _evidence_terms(self) -> tuple[list[Tensor], Tensor]:
        """The curvature's eigenvalues, ``[1, R]`` a matrix, and every ``||W||^2``, ``[matrices, 1]``."""
        distance = [float64(m.weight.detach()).square().sum().cpu() for m in self.matrices.values()]
        return [p.spectra() for p in self._fitted()], torch.stack(distance)[:, None]

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace evidence, nats over the fitting set, 0-d float64: as that of :class:`ExpertLaplace`, the prior's mean being zero."""
        precision = self.prior_precision if prior_precision is None else torch.as_tensor(prior_precision, dtype=torch.float64)
        penalty = prior.evidence_penalty(*self._evidence_terms())
        return self.log_likelihood - penalty(precision.expand(len(self.matrices), 1)).sum()

    def optimize_prior_precision(self) -> Tensor:
        """Sets (and returns) the one prior precision of largest evidence."""
        number = len(self.matrices)
        best = prior.best_by_evidence(*self._evidence_terms(), prior.groups("global", number, 1), self.prior_precision.expand(number, 1))
        self.prior_precision = best.squeeze()
        return self.prior_precision

    def predictive_logits(self, batch):
        """Linearised: mean ``[B, C]``, covariance ``[B, C, C] = sum over matrices <J_c, Sigma J_c'>``, exact in the Jacobian."""
        posteriors = self._fitted()
        every = lambda f: torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, None].expand(-1, *f.shape)  # noqa: E731
        f, layers, routes = self.captured(batch, every)
        parts = [p.covariance(a, g, routes, self.prior_precision.view(1)).squeeze(0) for p, (a, g) in zip(posteriors, layers, strict=True)]
        cov = torch.stack([p.to(f.device) for p in parts]).sum(0)
        return f, (cov + cov.mT) / 2


def _eigenbasis(sums: KronSums) -> Eigenbasis:
    """``sums.finish()`` where one factor may be sketched and the other not."""
    (alpha, basis_a, _), (gamma, basis_g, _) = sums.A.eigen(), sums.G.eigen()
    return Eigenbasis(gamma[:, :, None] * alpha[:, None] / sums.n.clamp(min=1)[:, None, None], basis_a, basis_g)
