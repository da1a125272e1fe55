"""Laplace posterior over every expert's second linear layer (Bayesian Mixture of Experts, arXiv 2511.08968).

    q(W) = N(W_MAP, (H + Lambda)^-1),   block-diagonal over (layer, expert),  Lambda = lambda_{l,e} I

post-hoc: the model is not touched, not by a bit. The verbs follow laplace-torch: fit, log_marginal_likelihood,
optimize_prior_precision, predictive_logits, and calling it for probabilities.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.layers import down_weight, expert_layers, select_layers
from ..precision import float64
from ..progress import track
from . import curvature, files, prior
from .capture import capturing
from .columns import captured_columns, read_out, routes_of
from .fitting import Fit
from .parallel import Ranks
from .validation import ValidationNLL

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup

CHOICES = {
    "hessian_structure": ("kron", "ekfac", "diag", "full"),
    "fisher": ("exact", "mc", "empirical"),
    "token_setting": ("expand", "reduce", "active"),
    "link_approx": ("mc", "probit", "map"),
    "method": ("marglik", "val_nll"),
    "granularity": ("global", "layer", "expert"),
}

def _check(**chosen: str) -> None:
    for option, value in chosen.items():
        if value not in CHOICES[option]:
            raise ValueError(f"{option}={value!r} is not one of {', '.join(map(repr, CHOICES[option]))}")


def _every_class(logits: Tensor) -> Tensor:
    """The cotangents ``[C, B, C]`` of every item's every class."""
    B, C = logits.shape
    return torch.eye(C, dtype=logits.dtype, device=logits.device)[:, None, :].expand(C, B, C)


class ExpertLaplace:
    """Laplace posterior on the routed experts' down projections of a transformers MoE language model.

    Args:
        model: any MoE causal LM with fused experts, at its MAP weights (peft-wrapped or not).
        hessian_structure: ``kron`` (Kronecker factors), ``ekfac`` (their eigenbases with the exact second moments of per-item
            Jacobians in them; a second pass over the data), ``diag`` (exact diagonal) or ``full`` (dense block per expert;
            memory ``items x (C-1) x d f`` per expert: small models only).
        fisher: ``exact`` (the GGN, C-1 backward passes), ``mc`` (labels drawn from the model, one pass, unbiased) or
            ``empirical`` (observed labels, one pass; biased, it shrinks as items are memorised).
        token_setting: ``expand`` (a sample per routed token), ``reduce`` (per item and expert) or ``active`` (per routed token
            that can reach the answer: in the last layer the answering token alone); of ``kron`` and ``ekfac``, the others use
            exact per-item Jacobians.
        rank: hold each Kronecker factor in this many leading eigenvectors, found by a one-pass sketch (:mod:`bmoe_utils.experts.sketch`;
            memory ``E (d + f) rank`` a layer); as a fraction, in as many as hold this share of its trace. The rest keeps the
            prior; :attr:`captured_energy` says how much the bases hold.
        layers: ``None`` / ``"all"``, or MoE layer indices or names.
        prior_precision: 0-d, one per layer ``[L]``, or one per expert ``[L, E]``.
        prior_mean: ``0.0``, or the model (or mapping of layer name to ``[E, d, f]``) whose weights the prior is centred
            on, such as the pretrained one.
        seed: of the labels drawn for ``mc``, of the sketch of ``rank`` and of the samples of the ``mc`` link.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        hessian_structure: str = "kron",
        fisher: str = "exact",
        token_setting: str = "expand",
        rank: int | float | None = None,
        layers=None,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | nn.Module | Mapping[str, Tensor] = 0.0,
        seed: int = 0,
    ):
        _check(hessian_structure=hessian_structure, fisher=fisher, token_setting=token_setting)
        if hessian_structure not in ("kron", "ekfac") and (token_setting != "expand" or rank is not None):
            raise ValueError(f"token_setting and rank belong to 'kron' and 'ekfac'; {hessian_structure!r} is exact per item")
        modules = expert_layers(model)
        self.model = model
        self.layers = select_layers(list(modules), layers)
        self._modules = [modules[name] for name in self.layers]
        shapes = [tuple(down_weight(m).shape) for m in self._modules]
        width = min(min(s[1:]) for s in shapes)
        if isinstance(rank, float) and not 0 < rank < 1:
            raise ValueError(f"rank={rank} is no share of the energy: give a whole number of eigenvectors, or a fraction below 1")
        if isinstance(rank, int) and not 1 <= rank <= width:
            raise ValueError(f"rank={rank} must lie between 1 and the smallest factor width, {width}")
        self.options = {"hessian_structure": hessian_structure, "fisher": fisher, "token_setting": token_setting,
                        "rank": rank, "seed": seed}
        self.shapes = shapes
        self.num_experts = torch.tensor([s[0] for s in shapes])
        self.prior_precision = prior_precision
        self._prior_mean = prior_mean
        self._distance = self._squared_distance(prior_mean)
        self.posteriors: list[curvature.Eigenbasis | curvature.DenseBlocks] | None = None
        self.log_likelihood: float | None = None
        self.num_items = 0
        self.tokens_per_expert: Tensor | None = None  # [L, E] routed real tokens of the fitting set
        self.answer_only: list[str] = []  # layers of whose positions the fit saw the answer's alone to have a gradient

    # ---- prior ------------------------------------------------------------------------------------------------------
    @property
    def prior_precision(self) -> Tensor:
        """float64, as given: 0-d, ``[L]`` or ``[L, E]``."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self._prior_precision = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        self.prior_precision_by_expert()

    def prior_precision_by_expert(self, value: float | Tensor | None = None) -> Tensor:
        """The precision (or ``value``) of every expert, ``[L, E]`` float64 on the CPU, differentiable in ``value``.

        Layers with fewer experts than the widest ignore the rest. ``ValueError`` on another shape or a value <= 0.
        """
        value = self._prior_precision if value is None else torch.as_tensor(value).double().cpu()
        L, E = len(self.layers), int(self.num_experts.max())
        if value.shape not in ((), (L,), (L, E)):
            raise ValueError(f"prior_precision has shape {tuple(value.shape)}; it must be a number, one per layer ({L},) "
                             f"or one per expert ({L}, {E})")
        if not (value.isfinite() & (value > 0)).all():
            raise ValueError("prior_precision must be positive and finite")
        return value.reshape(-1, 1).expand(L, E) if value.dim() < 2 else value

    def _squared_distance(self, prior_mean) -> Tensor:
        """``||W_MAP - W_0||^2`` per expert, ``[L, E]`` float64 (0 where a layer has fewer experts)."""
        if isinstance(prior_mean, nn.Module):
            prior_mean = {name: down_weight(m) for name, m in expert_layers(prior_mean).items()}
        elif not isinstance(prior_mean, Mapping):
            prior_mean = dict.fromkeys(self.layers, float(prior_mean))
        out = torch.zeros(len(self.layers), int(self.num_experts.max()), dtype=torch.float64)
        for row, name, module in zip(out, self.layers, self._modules, strict=True):
            W = down_weight(module).detach()
            if name not in prior_mean:
                raise ValueError(f"prior_mean has no weight for layer {name!r}")
            W0 = prior_mean[name]
            if isinstance(W0, Tensor) and W0.shape != W.shape:
                raise ValueError(f"prior_mean of {name!r} has shape {tuple(W0.shape)}, the layer {tuple(W.shape)}")
            for e in range(len(W)):  # expert by expert: a float64 copy of a whole layer could be gigabytes
                w0 = float64(W0[e].detach().to(W.device)) if isinstance(W0, Tensor) else W0
                row[e] = (float64(W[e]) - w0).square().sum()
        return out

    # ---- fitting ----------------------------------------------------------------------------------------------------
    def captured(self, batch: Mapping[str, Tensor], cotangents=None) -> tuple[Tensor, list]:
        """One forward and one backward per cotangent, inside ``capture.capturing(model)``.

        ``cotangents(logits) -> [K, B, C]``, by default one per class. Returns the class logits ``[B, C]`` (detached) and per layer
        ``(Slots, K gradients [S, d])``, at least float32 (:func:`columns.captured_columns`).
        """
        logits, layers = read_out(self.model, self.layers, batch, self.answer_only)
        v = (cotangents or _every_class)(logits.detach())
        return logits.detach(), captured_columns(logits, layers, v)

    def fit(self, loader: Iterable[Mapping[str, Tensor]], *, checkpoint: str | Path | None = None, every: int = 50,
            memory_budget: int | None = None, offload: str | Path | None = None, group: ProcessGroup | str | None = None,
            progress: bool = True) -> ExpertLaplace:
        """Accumulates the curvature over the fitting set, summed over items. Leaves the model bit for bit as it was.

        ``checkpoint``: a folder in which the sums are kept every ``every`` batches; a fit that was cut short, called again with the
        same folder, model, options and data in the same order, goes on from there and ends in the same bits. It is removed at the
        end. ``memory_budget``: bytes that running sums may take at once; layers are then fitted in groups, one pass over the data
        each (two for ``ekfac``), and finished posteriors rest in host memory. ``offload``: a folder where they rest instead (best
        with a ``memory_budget``, since all layers of a group finish together); predictions then read a layer at a time, and what
        is there goes with the posterior. Only :meth:`save` needs memory for all of it.

        ``group``: the processes that fit one posterior together, ``"world"`` or a ``torch.distributed`` process group, each called with
        the same model and its own shard of the data as ``loader``, which may be empty. All end with the same posterior, that of one
        process on all the data: to rounding, but for sketches (``rank``) that have restarted, which are merged. None: this process
        alone, also where several run, since only the caller knows whether they share a posterior or have one each. Shards must not
        repeat items: ``make_loader(items[rank::size], ...)``, or ``accelerate``'s ``prepare`` with ``even_batches=False``; torch's
        ``DistributedSampler`` pads with repeats, which would count twice (a warning says so).

        Warns of experts whose inputs or gradients are so small that float32 loses their squares. Until it has finished, the previous
        posterior (if any) stays in place, on every rank. ``ValueError`` for an empty loader,
        unlabelled items with ``fisher="empirical"``, a non-finite activation, logit or gradient (naming batch and layer), a
        ``checkpoint`` that is damaged or another fit's, which is left alone, or ranks given the same data; ``OSError`` where a
        checkpoint cannot be written, the one before it being intact; ``RuntimeError`` where another rank failed (saying how) or is gone.
        """
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 batch")
        fit = Fit(self.model, self.layers, self._modules, self.options, memory_budget, offload, Ranks(group))
        fit.run(loader, checkpoint=checkpoint, every=every, progress=progress)
        self.posteriors = fit.posteriors
        self._distance = self._squared_distance(self._prior_mean)  # of the weights as they are now
        self.tokens_per_expert, self.num_items = fit.tokens, fit.items
        self.answer_only = fit.answer_only
        self.log_likelihood = fit.log_likelihood if fit.labelled else None
        share = self.options["rank"]
        if isinstance(share, float) and (missed := (self.captured_energy < share).sum()):
            warnings.warn(f"rank={share}: {int(missed)} factors hold less than that share of their trace in all that their sketches "
                          "have (see captured_energy); give a whole number of eigenvectors to have larger ones", stacklevel=2)
        return self

    @property
    def captured_energy(self) -> Tensor:
        """The share of the traces of ``A_e`` and ``G_e`` that the posterior's bases hold, ``[L, E, 2]`` float64: 1 without ``rank``,
        not a number for an expert (or a missing one) without samples."""
        out = torch.full((*self._distance.shape, 2), torch.nan, dtype=torch.float64)
        for row, posterior, experts in zip(out, self._fitted(), self.num_experts.tolist(), strict=True):
            captured = getattr(posterior, "captured", None)
            row[:experts] = 1.0 if captured is None else captured.cpu()
        return out

    def _fitted(self) -> list:
        if self.posteriors is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first")
        return self.posteriors

    # ---- evidence ---------------------------------------------------------------------------------------------------
    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace evidence ``log p(D | lambda)``, nats over the fitting set. 0-d float64, differentiable in the precision.

        ``log p(D|W_MAP) - 1/2 lambda ||W_MAP - W_0||^2 + 1/2 P log lambda - 1/2 log det(H + lambda I)``
        summed over experts, with the answer likelihood ``softmax`` over the item's options.
        """
        precision = self.prior_precision_by_expert(prior_precision)
        penalty = prior.evidence_penalty([p.spectra() for p in self._fitted()], self._distance)(precision).sum()
        if self.log_likelihood is None:
            raise ValueError("the evidence needs labels, and some items of the fitting set had none")
        return self.log_likelihood - penalty

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        granularity: str = "layer",
        *,
        val_loader: Iterable | None = None,
        link_approx: str = "mc",
        memory_budget: int = 2**31,
        progress: bool = True,
    ) -> Tensor:
        """Sets (and returns) the prior precision that is best under ``method``, one per ``granularity``.

        ``marglik``: gradient ascent on the evidence in ``log lambda``, started from the best point of a grid; needs no
        data. An expert that the fitting set never reached takes its layer's optimum. ``val_nll``: the grid point of least NLL on
        ``val_loader``, by coordinate descent from the best global one when there are several; one pass over the data, which tabulates
        each precision's part of the predictive covariance: ``25 x precisions x items x C^2`` numbers, of which ``memory_budget`` bytes
        stay in memory and the rest goes to temporary files (in ``TMPDIR``). Warns where the optimum is the grid's end.
        """
        _check(method=method, granularity=granularity, link_approx=link_approx)
        L, E = self._distance.shape
        group = prior.groups(granularity, L, E)
        if method == "marglik":
            spectra = [p.spectra() for p in self._fitted()]
            best = prior.best_by_evidence(spectra, self._distance, group, self.prior_precision_by_expert())
        else:
            if val_loader is None:
                raise ValueError("method='val_nll' needs val_loader, a loader over held-out labelled items")
            nll = self._validation_nll(group, val_loader, link_approx, progress, memory_budget)
            best = prior.COARSE[nll.minimise(progress=progress)]
        at_end = (best <= prior.GRID[0]) | (best >= prior.GRID[-1])
        if at_end.any():
            warnings.warn(f"{int(at_end.sum())} of {best.numel()} prior precisions reached the end of the range "
                          f"{prior.GRID[0]:g} to {prior.GRID[-1]:g}: {method} has no optimum inside it there (weights that equal the "
                          "prior mean, for instance, make the evidence grow with the precision for ever)", stacklevel=2)
        self.prior_precision = best.view({"global": (), "layer": (L,), "expert": (L, E)}[granularity])
        return self.prior_precision

    def validation_curve(self, loader: Iterable, *, link_approx: str = "mc", progress: bool = True) -> tuple[Tensor, Tensor]:
        """A global prior precision's grid ``[P]`` and the NLL on ``loader`` (nats per item) at each of its points ``[P]``."""
        _check(link_approx=link_approx)
        nll = self._validation_nll(prior.groups("global", *self._distance.shape), loader, link_approx, progress)
        return prior.COARSE.clone(), torch.tensor(nll.common(), dtype=torch.float64)

    def _validation_nll(self, group: Tensor, loader: Iterable, link_approx: str, progress: bool,
                        memory_budget: int = 2**31) -> ValidationNLL:
        """The NLL on ``loader`` under precisions from ``prior.COARSE``, one a group; one pass over the data."""
        nll = ValidationNLL(group, link_approx, self.options["seed"], memory_budget)
        grid = prior.COARSE[:, None, None].expand(-1, *group.shape)
        for mean, captured, y in self._jacobians(loader, "expert Laplace: validation", progress):
            nll.add(mean, y, self._covariances(captured, grid, len(mean)))
        return nll.ready()

    # ---- prediction -------------------------------------------------------------------------------------------------
    def _jacobians(self, loader: Iterable, title: str, progress: bool):
        with capturing(self.model):
            for batch in track(loader, title, progress):
                yield *self.captured(batch), batch["labels"]

    def _covariances(self, captured: list, precision: Tensor, num_items: int) -> Iterator[Tensor]:
        """Per layer, every expert's part of the predictive covariance, ``[E, B, C, C]``, for ``precision [L, E]``; with several,
        ``[Q, L, E]``, each ``[Q, E, B, C, C]``."""
        for layer, (posterior, (slots, g)) in enumerate(zip(self._fitted(), captured, strict=True)):
            yield posterior.covariance(slots.a, g, routes_of(slots, num_items), precision[..., layer, : len(slots.counts)])

    def predictive_logits(self, batch: Mapping[str, Tensor], prior_precision=None, captured: tuple[Tensor, list] | None = None) -> tuple[Tensor, Tensor]:
        """Linearised (GLM) predictive of the class logits: mean ``[B, C]`` (-inf: no such option), covariance
        ``[B, C, C] = sum over experts <J_c, Sigma J_c'>``, exact in the Jacobian. C backward passes; none with what :meth:`captured`
        gave for this batch, to this posterior or to another one over the same layers of the same model."""
        self._fitted()
        if captured is None:
            with capturing(self.model):
                captured = self.captured(batch)
        mean, captured = captured
        parts = self._covariances(captured, self.prior_precision_by_expert(prior_precision).detach(), len(mean))
        cov = torch.stack([p.sum(0).to(mean.device) for p in parts]).sum(0)
        return mean, (cov + cov.mT) / 2

    def _link(self, mean: Tensor, cov: Tensor, link_approx: str, num_samples: int) -> Tensor:
        match link_approx:
            case "map":
                return mean.softmax(-1)
            case "probit":
                return curvature.probit_probabilities(mean, cov)
            case "mc":
                generator = torch.Generator().manual_seed(self.options["seed"])
                return curvature.sample_probabilities(mean, cov, num_samples, generator)

    def __call__(self, batch: Mapping[str, Tensor], link_approx: str = "mc", num_samples: int = 1000,
                 captured: tuple[Tensor, list] | None = None) -> Tensor:
        """Probabilities ``[B, C]`` of the options: ``mc`` (softmax averaged over logit samples), ``probit`` (closed form)
        or ``map`` (the model's own, no posterior). ``captured``: as in :meth:`predictive_logits`."""
        _check(link_approx=link_approx)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        return self._link(*self.predictive_logits(batch, captured=captured), link_approx, num_samples)

    # ---- files ------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Writes ``posterior.safetensors`` and ``manifest.json`` into a new or an empty folder, or
        in place of a posterior saved there.

        Whole or not at all: whenever it is cut short, the folder loads as the posterior before or
        as this one, also in a process that reads meanwhile. Other files in the folder stay. A
        posterior that takes another one's place is called ``posterior-<hash>.safetensors``; the manifest's
        ``file`` says which file it is. ``ValueError`` where the folder holds anything but a
        posterior, ``OSError`` where it cannot be written; what is there is then as it was.
        """
        self._fitted()
        files.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, **expected) -> ExpertLaplace:
        """Reads a saved posterior back onto the model it was fitted on.

        ``expected``: options the caller relies on, such as ``hessian_structure="kron"``. ``ValueError`` if the files are
        missing, damaged, of another format or of something else (routers), if the model's weights
        are others, or if an option differs.
        """
        return files.load(cls, folder, model, expected)
