"""Laplace posterior over every expert's second linear layer (Bayesian Mixture of Experts, arXiv 2511.08968).

    q(W) = N(W_MAP, (H + Lambda)^-1),   block-diagonal over (layer, expert),  Lambda = lambda_{l,e} I

post-hoc: the model is not touched, not by a bit. The verbs follow laplace-torch: fit, log_marginal_likelihood,
optimize_prior_precision, predictive_logits, and calling it for probabilities.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import curvature, prior
from .artefacts import model_fingerprint
from .capture import capturing, down_weight, expert_layers, recording, select_layers
from .files import replace_folder
from .models import option_logits, to_device
from .progress import track

CHOICES = {
    "hessian_structure": ("kron", "diag", "full"),
    "fisher": ("exact", "mc", "empirical"),
    "token_setting": ("expand", "reduce", "active"),
    "link_approx": ("mc", "probit", "map"),
    "method": ("marglik", "val_nll"),
    "granularity": ("global", "layer", "expert"),
}
FORMAT = 1


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
        hessian_structure: ``kron`` (Kronecker factors), ``diag`` (exact diagonal) or ``full`` (dense block per expert;
            memory ``items x (C-1) x d f`` per expert: small models only).
        fisher: ``exact`` (the GGN, C-1 backward passes), ``mc`` (labels drawn from the model, one pass, unbiased) or
            ``empirical`` (observed labels, one pass; biased, it shrinks as items are memorised).
        token_setting: ``expand`` (a sample per routed token), ``reduce`` (per item and expert) or ``active`` (per routed token
            that can reach the answer: in the last layer the answering token alone); of ``kron`` only, the others use exact
            per-item Jacobians.
        rank: keep this many leading eigenvectors of each Kronecker factor; the rest keeps the prior.
        layers: ``None`` / ``"all"``, or MoE layer indices or names.
        prior_precision: 0-d, one per layer ``[L]``, or one per expert ``[L, E]``.
        prior_mean: ``0.0``, or the model (or mapping of layer name to ``[E, d, f]``) whose weights the prior is centred
            on, such as the pretrained one.
        seed: of the labels drawn for ``mc`` and of the samples of the ``mc`` link.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        hessian_structure: str = "kron",
        fisher: str = "exact",
        token_setting: str = "expand",
        rank: int | None = None,
        layers=None,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | nn.Module | Mapping[str, Tensor] = 0.0,
        seed: int = 0,
    ):
        _check(hessian_structure=hessian_structure, fisher=fisher, token_setting=token_setting)
        if hessian_structure != "kron" and (token_setting != "expand" or rank is not None):
            raise ValueError(f"token_setting and rank belong to 'kron'; {hessian_structure!r} is exact per item")
        modules = expert_layers(model)
        self.model = model
        self.layers = select_layers(list(modules), layers)
        self._modules = [modules[name] for name in self.layers]
        shapes = [tuple(down_weight(m).shape) for m in self._modules]
        if rank is not None and not 1 <= rank <= min(min(s[1:]) for s in shapes):
            raise ValueError(f"rank={rank} must lie between 1 and the smallest factor width, "
                             f"{min(min(s[1:]) for s in shapes)}")
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
                w0 = W0[e].detach().to(W.device).double() if isinstance(W0, Tensor) else W0
                row[e] = (W[e].double() - w0).square().sum()
        return out

    # ---- fitting ----------------------------------------------------------------------------------------------------
    def _accumulator(self, shape: tuple[int, int, int], like: Tensor):
        E, d, f = shape
        dtype = torch.promote_types(like.dtype, torch.float32)  # a sum over a whole set needs more than bf16's 8 bits
        zeros = lambda *size: torch.zeros(*size, dtype=dtype, device=like.device)  # noqa: E731
        match self.options["hessian_structure"]:
            case "kron":
                counts = torch.zeros(E, dtype=torch.long, device=like.device)
                return curvature.KronSums(zeros(E, f, f), zeros(E, d, d), counts, self.options["token_setting"],
                                          self.options["rank"])
            case "diag":
                return curvature.DiagSum(zeros(E, d, f))
            case "full":
                return curvature.DenseRows([[] for _ in range(E)], zeros(0, d * f))

    def captured(self, batch: Mapping[str, Tensor], columns=None) -> tuple[Tensor, list]:
        """One forward and one backward per cotangent, inside ``capture.capturing(model)``.

        ``columns(logits) -> [K, B, C]`` gives the cotangents, by default one per class. Returns the class logits
        ``[B, C]`` (detached) and per layer ``(Slots, g [K, S, d])``, at least float32.
        """
        batch = to_device(batch, self.model)
        with recording(self.model, self.layers, batch["attention_mask"]) as tape:
            logits = option_logits(self.model, batch)
        v = (columns or _every_class)(logits.detach()).to(logits.dtype)
        grads = [tape.gradients(logits, v[k], keep_graph=k + 1 < len(v)) for k in range(len(v))]
        by_name = {}
        for i, slots in enumerate(tape.slots):
            g = torch.stack([of_column[i] for of_column in grads])
            dtype = torch.promote_types(g.dtype, torch.float32)
            slots.a = slots.a.to(dtype)
            by_name[slots.name] = slots, g.to(dtype)
        return logits.detach(), [by_name[name] for name in self.layers]

    def fit(self, loader: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> ExpertLaplace:
        """Accumulates the curvature over the fitting set, summed over items. Leaves the model bit for bit as it was.

        Until it has finished, the previous posterior (if any) stays in place. Raises ``ValueError`` for an empty loader,
        unlabelled items with ``fisher="empirical"``, or a non-finite logit or gradient (naming layer and batch).
        """
        fisher = self.options["fisher"]
        generator = torch.Generator().manual_seed(self.options["seed"])
        sums = [self._accumulator(s, down_weight(m)) for s, m in zip(self.shapes, self._modules, strict=True)]
        tokens = torch.zeros_like(self._distance, dtype=torch.long)
        log_likelihood, items, labelled = 0.0, 0, True
        with capturing(self.model):
            for number, batch in enumerate(track(loader, "expert Laplace: curvature", progress)):
                labels = batch["labels"]
                labelled &= bool((labels >= 0).all())
                if fisher == "empirical" and not labelled:
                    raise ValueError(f"batch {number} has unlabelled items; fisher='empirical' needs every label")
                logits, captured = self.captured(
                    batch, lambda f: curvature.fisher_columns(f, fisher, labels.to(f.device), generator)
                )
                if logits.isnan().any() or (logits.logsumexp(-1) == torch.inf).any():
                    raise ValueError(f"batch {number}: a class logit is not finite")
                for layer, (slots, g) in enumerate(captured):
                    if not (g.isfinite().all() and slots.a.isfinite().all()):
                        raise ValueError(f"batch {number}, layer {slots.name!r}: a non-finite activation or gradient")
                    sums[layer].update(slots.a, g, slots.expert, slots.item, slots.counts, len(labels))
                    tokens[layer, : len(slots.counts)] += slots.counts.cpu()
                items += len(labels)
                if labelled:
                    picked = logits.double().log_softmax(-1).gather(1, labels.to(logits.device)[:, None])
                    log_likelihood += float(picked.sum())
        if not items:
            raise ValueError("the loader gave no batch: there is nothing to fit on (a generator can be used only once)")
        self.posteriors = [s.finish() for s in sums]
        self._distance = self._squared_distance(self._prior_mean)  # of the weights as they are now
        self.tokens_per_expert, self.num_items = tokens, items
        self.log_likelihood = log_likelihood if labelled else None
        return self

    def _fitted(self) -> list:
        if self.posteriors is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first")
        return self.posteriors

    # ---- evidence ---------------------------------------------------------------------------------------------------
    def _penalty(self, precision: Tensor) -> Tensor:
        """What the evidence loses by a prior of ``precision [L, E]``, per expert, ``[L, E]``:

        ``1/2 lambda ||W_MAP - W_0||^2 + 1/2 log det(H + lambda I) - 1/2 P log lambda``.
        """
        rows = []
        for layer, posterior in enumerate(self._fitted()):
            experts = range(int(self.num_experts[layer]))
            ratios = [curvature.log_det_ratio(posterior.spectrum(e).cpu(), precision[layer, e]) for e in experts]
            rows.append(nn.functional.pad(torch.stack(ratios), (0, precision.shape[1] - len(ratios))))
        return 0.5 * (precision * self._distance + torch.stack(rows))

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace evidence ``log p(D | lambda)``, nats over the fitting set. 0-d float64, differentiable in the precision.

        ``log p(D|W_MAP) - 1/2 lambda ||W_MAP - W_0||^2 + 1/2 P log lambda - 1/2 log det(H + lambda I)``
        summed over experts, with the answer likelihood ``softmax`` over the item's options.
        """
        precision = self.prior_precision_by_expert(prior_precision)
        penalty = self._penalty(precision).sum()
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
        progress: bool = True,
    ) -> Tensor:
        """Sets (and returns) the prior precision that is best under ``method``, one per ``granularity``.

        ``marglik``: gradient ascent on the evidence in ``log lambda``, started from the best point of a grid; needs no
        data. An expert that the fitting set never reached takes its layer's optimum. ``val_nll``: the grid point of least NLL on ``val_loader``, by coordinate descent from the best global
        one when there are several; one pass over the data. Warns where the optimum is the grid's end.
        """
        _check(method=method, granularity=granularity, link_approx=link_approx)
        L, E = self._distance.shape
        group = prior.groups(granularity, L, E)
        if method == "marglik":
            best = self._best_by_evidence(group, self.prior_precision_by_expert())
        else:
            if val_loader is None:
                raise ValueError("method='val_nll' needs val_loader, a loader over held-out labelled items")
            nll = self._validation_nll(group, val_loader, link_approx, progress)
            best = prior.COARSE[prior.minimise_nll(nll, int(group.max()) + 1)]
        at_end = (best <= prior.GRID[0]) | (best >= prior.GRID[-1])
        if at_end.any():
            warnings.warn(f"{int(at_end.sum())} of {best.numel()} prior precisions reached the end of the range "
                          f"{prior.GRID[0]:g} to {prior.GRID[-1]:g}: {method} has no optimum inside it there (weights that equal the "
                          "prior mean, for instance, make the evidence grow with the precision for ever)", stacklevel=2)
        self.prior_precision = best.view({"global": (), "layer": (L,), "expert": (L, E)}[granularity])
        return self.prior_precision

    def _best_by_evidence(self, group: Tensor, current: Tensor) -> Tensor:
        """The precision of largest evidence of every group. Where the data give no curvature at all, the evidence would only
        shrink ``lambda ||W||^2``, to no prior: such an expert takes its layer's optimum, such a layer keeps ``current``."""
        reached = torch.zeros(group.shape, dtype=torch.bool)
        for layer, posterior in enumerate(self._fitted()):
            for e in range(int(self.num_experts[layer])):
                reached[layer, e] = bool((posterior.spectrum(e) > 0).any())
        n = int(group.max()) + 1
        informed = torch.zeros(n, dtype=torch.long).index_add(0, group.flatten(), reached.flatten().long()) > 0
        best = prior.maximise_evidence(self._penalty, group, current)
        if informed.all():
            return best
        by_layer = prior.groups("layer", *group.shape)
        fallback = current if torch.equal(group, by_layer) else self._best_by_evidence(by_layer, current)[by_layer]
        return torch.where(informed, best, torch.zeros(n, dtype=torch.float64).scatter(0, group.flatten(), fallback.flatten()))

    def validation_curve(self, loader: Iterable, *, link_approx: str = "mc", progress: bool = True) -> tuple[Tensor, Tensor]:
        """A global prior precision's grid ``[P]`` and the NLL on ``loader`` (nats per item) at each of its points ``[P]``."""
        _check(link_approx=link_approx)
        nll = self._validation_nll(prior.groups("global", *self._distance.shape), loader, link_approx, progress)
        points = range(len(prior.COARSE))
        return prior.COARSE.clone(), torch.tensor([nll(torch.tensor([i])) for i in points], dtype=torch.float64)

    def _validation_nll(self, group: Tensor, loader: Iterable, link_approx: str, progress: bool):
        """The NLL on ``loader`` as a function of each group's index into ``prior.COARSE``; one pass over the data.

        The predictive covariance is a sum over groups, so every group's part is tabulated at every grid point.
        """
        n = int(group.max()) + 1
        means, tables, labels = [], [], []
        for mean, captured, y in self._jacobians(loader, "expert Laplace: validation", progress):
            rows = []
            for lam in prior.COARSE:
                total = mean.new_zeros(n, *mean.shape, mean.shape[-1])
                for layer, cov in enumerate(self._covariances(captured, lam.expand(group.shape), len(mean))):
                    total.index_add_(0, group[layer, : len(cov)].to(cov.device), cov)
                rows.append(total)
            means.append(mean)
            tables.append(torch.stack(rows))  # [grid, n, B, C, C]
            labels.append(y)
        labels = torch.cat(labels)
        if not (labels >= 0).all():
            raise ValueError("method='val_nll' needs a label on every validation item")
        width = max(m.shape[1] for m in means)
        mean = torch.cat([nn.functional.pad(m, (0, width - m.shape[1]), value=-torch.inf) for m in means])
        table = torch.cat([nn.functional.pad(t, (0, width - t.shape[-1]) * 2) for t in tables], 2)
        labels = labels.to(mean.device)

        def nll(choice: Tensor) -> float:
            cov = table[choice, torch.arange(n)].sum(0)
            return float(-self._link(mean, cov, link_approx, 100).gather(1, labels[:, None]).log().mean())

        return nll

    # ---- prediction -------------------------------------------------------------------------------------------------
    def _jacobians(self, loader: Iterable, title: str, progress: bool):
        with capturing(self.model):
            for batch in track(loader, title, progress):
                yield *self.captured(batch), batch["labels"]

    def _covariances(self, captured: list, precision: Tensor, num_items: int) -> list[Tensor]:
        """Per layer, every expert's part of the predictive covariance, ``[E, B, C, C]``."""
        return [
            posterior.covariance(s.a, g, s.item, s.counts, lam[: len(s.counts)].to(s.a.device), num_items)
            for posterior, (s, g), lam in zip(self._fitted(), captured, precision, strict=True)
        ]

    def predictive_logits(self, batch: Mapping[str, Tensor], prior_precision=None) -> tuple[Tensor, Tensor]:
        """Linearised (GLM) predictive of the class logits: mean ``[B, C]`` (-inf: no such option), covariance
        ``[B, C, C] = sum over experts <J_c, Sigma J_c'>``, exact in the Jacobian. C backward passes."""
        self._fitted()
        with capturing(self.model):
            mean, captured = self.captured(batch)
        parts = self._covariances(captured, self.prior_precision_by_expert(prior_precision).detach(), len(mean))
        return mean, torch.stack([p.sum(0).to(mean.device) for p in parts]).sum(0)

    def _link(self, mean: Tensor, cov: Tensor, link_approx: str, num_samples: int) -> Tensor:
        match link_approx:
            case "map":
                return mean.softmax(-1)
            case "probit":
                return curvature.probit_probabilities(mean, cov)
            case "mc":
                generator = torch.Generator().manual_seed(self.options["seed"])
                return curvature.sample_probabilities(mean, cov, num_samples, generator)

    def __call__(self, batch: Mapping[str, Tensor], link_approx: str = "mc", num_samples: int = 1000) -> Tensor:
        """Probabilities ``[B, C]`` of the options: ``mc`` (softmax averaged over logit samples), ``probit`` (closed form)
        or ``map`` (the model's own, no posterior)."""
        _check(link_approx=link_approx)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        return self._link(*self.predictive_logits(batch), link_approx, num_samples)

    # ---- files ------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Writes ``posterior.safetensors`` and ``manifest.json``; written beside and moved, so never half there."""
        tensors = {f"{i}.{k}": v.cpu() for i, p in enumerate(self._fitted()) for k, v in p.tensors().items()}
        tensors |= {"prior_precision": self._prior_precision, "distance": self._distance, "tokens": self.tokens_per_expert}
        with replace_folder(folder) as temporary:
            save_file(tensors, temporary / "posterior.safetensors")
            manifest = {
                "format": FORMAT,
                "options": self.options,
                "layers": self.layers,
                "shapes": self.shapes,
                "num_items": self.num_items,
                "log_likelihood": self.log_likelihood,
                "model": model_fingerprint(self.model),
            }
            manifest["checksum"] = _checksum(temporary / "posterior.safetensors", manifest)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, **expected) -> ExpertLaplace:
        """Reads a saved posterior back onto the model it was fitted on.

        ``expected``: options the caller relies on, such as ``hessian_structure="kron"``. ``ValueError`` if the files are
        missing, damaged or of another format, if the model's weights are others, or if an option differs.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no readable posterior (manifest.json: {error})") from None
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{folder}: format {manifest.get('format')!r}, this version reads {FORMAT}; fit it again")
        for option, value in expected.items():
            if option not in manifest["options"]:
                raise ValueError(f"{option!r} is no option of a posterior; there are {', '.join(manifest['options'])}")
            if manifest["options"][option] != value:
                raise ValueError(f"{folder} was fitted with {option}={manifest['options'][option]!r}, not {value!r}")
        path = folder / "posterior.safetensors"
        if not path.exists() or _checksum(path, manifest) != manifest.get("checksum"):
            raise ValueError(f"{folder} is cut short or changed since it was written; fit it again")
        if model_fingerprint(model) != manifest["model"]:
            raise ValueError(f"{folder} was fitted on a model with other weights; load that model, or fit again")
        la = cls(model, layers=manifest["layers"], **manifest["options"])
        if [list(s) for s in la.shapes] != manifest["shapes"]:
            raise ValueError(f"{folder}: layer shapes {manifest['shapes']} do not fit the model's {la.shapes}")
        tensors = load_file(path)
        la.prior_precision = tensors.pop("prior_precision")
        la._distance, la.tokens_per_expert = tensors.pop("distance"), tensors.pop("tokens")
        la.num_items, la.log_likelihood = manifest["num_items"], manifest["log_likelihood"]
        kind = curvature.DenseBlocks if la.options["hessian_structure"] == "full" else curvature.Eigenbasis
        la.posteriors = []
        for i, module in enumerate(la._modules):
            named = {k.split(".", 1)[1]: v.to(down_weight(module).device) for k, v in tensors.items() if k.startswith(f"{i}.")}
            la.posteriors.append(kind.from_tensors(named))
        return la


def _checksum(path: Path, manifest: Mapping) -> str:
    """Over the tensors' file and the rest of the manifest: either changed by hand, or cut short, no longer fits."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())
    return digest.hexdigest()
