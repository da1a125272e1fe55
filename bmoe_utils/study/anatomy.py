"""Why the experts' posterior helps in one place and not in another: chapter 13's measurements, and the check a user can make beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..experts.curvature import sample_probabilities
from ..experts.exact import prior_predictive
from ..experts.laplace import ExpertLaplace
from ..experts.weight_samples import sampled_logits
from ..models.layers import unwrap
from ..models.readout import option_logits
from ..precision import float64
from ..scores import metrics
from ..scores.predictions import predict
from . import penalised, reach, study
from .blocks import BLOCKS, block_kernels, untied, weight_blocks
from .reach import Kernels

EXPERTS = BLOCKS[0]
TEST = 600  # test questions at most, of the models taken apart: differences between methods are paired, and large


# ---- a check without labels -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reach:
    """By item ``[N]``: the ``lead`` of the top option (logits), its standard deviation under the ``posterior`` and under the ``prior``."""

    lead: np.ndarray
    posterior: np.ndarray
    prior: np.ndarray

    def summary(self) -> dict[str, float]:
        """Medians over items; ``within``, ``prior_within``: the share of items whose lead is below two standard deviations;
        ``temperature``, ``prior_temperature``: the temperature that the posterior (or the prior alone, the most it can come to) amounts
        to, ``sqrt(1 + pi/8 variance of the lead)`` by the probit approximation."""
        out = {name: float(np.median(value)) for name, value in asdict(self).items()}
        for prefix, deviation in (("", self.posterior), ("prior_", self.prior)):
            out[f"{prefix}within"] = float(np.mean(self.lead < 2 * deviation))
            out[f"{prefix}temperature"] = float(np.median(np.sqrt(1 + np.pi / 8 * deviation**2)))
        return out


def expert_reach(la: ExpertLaplace, loader: Iterable[Mapping[str, Tensor]]) -> Reach:
    """How far a fitted posterior with its prior precision set can move the answers to the items of ``loader``. No labels needed; two
    passes with C backward passes each."""
    batches = list(loader)
    rows = []
    for batch, (mean, prior) in zip(batches, prior_predictive(la, batches, progress=False), strict=True):
        mean, cov = la.predictive_logits(batch)
        lead, posterior = reach.leads(mean.cpu(), cov.cpu())
        rows.append(torch.stack([lead, posterior, reach.leads(mean.cpu(), prior.cpu())[1]]))
    return Reach(*torch.cat(rows, 1).numpy())


# ---- the models looked at -------------------------------------------------------------------------------------------
def regimes(of: study.Study) -> dict[str, study.Study]:
    """The models that the chapter takes apart, each trained on the first ``dense_fit`` questions of the seed's fine-tuning set:
    ``pretrained`` and ``scratch``, the same network without pretraining, at the learning rate of pretraining; on a user's own questions, for which there is no text to
    pretrain on, ``scratch`` alone, and with a user's own checkpoint ``own``, as it is. Evaluated on at most ``TEST`` questions."""
    if not of.embedded:
        return {"own": of}
    n, size = len(of.train_items(of.seeds[0], of.dense_fit)), min(of.test_size or TEST, TEST)
    make = lambda **other: study.Study(of.profile, task=of.task_name, store=of.store, overrides=of.settings | {"train_size": n, "curves": False, "test_size": size} | other)  # noqa: E731
    scratch = {"scratch": make(pretrain_steps=0, lr=of.pretrain_lr if of.pretrain_steps else of.lr)}
    return ({"pretrained": make()} if of.pretrain_steps else {}) | scratch


def kernels(of: study.Study, seed: int) -> Kernels:
    """:func:`blocks.block_kernels` of the seed's MAP model, on its fine-tuning set and on the first ``dense_items`` test questions; the head
    counted apart from the embeddings it is tied to."""
    config = {"map": of.map_folder(seed).name, "items": of.dense_items, "data": of.data_key}

    def compute() -> dict:
        found = block_kernels(untied(of.map_model(seed)), of.loader(of.train_items(seed)), of.loader(of.task["test"].subset(of.dense_items)))
        named = {f"{key}/{b}": value for key in _BY_BLOCK for b, value in getattr(found, key).items()}
        return named | {key: getattr(found, key) for key in _WHOLE}

    tensors = {k: torch.as_tensor(v) for k, v in of.store.arrays("kernels", config, _as_tensors(compute)).items()}
    names = [b for b in BLOCKS if f"fit/{b}" in tensors]
    by_block = {key: {b: tensors[f"{key}/{b}"] for b in names} for key in _BY_BLOCK}
    by_block |= {key: {b: kind(value) for b, value in by_block[key].items()} for key, kind in (("distance", float), ("size", int))}
    return Kernels(**by_block, **{key: tensors[key] for key in _WHOLE})


_BY_BLOCK = ("fit", "cross", "own", "fit_slope", "own_slope", "distance", "size")
_WHOLE = ("fit_logits", "fit_labels", "logits")


def _as_tensors(compute):
    """Plain numbers among the values of ``compute()``, too, as tensors."""
    return lambda: {k: v.contiguous() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for k, v in compute().items()}


# ---- measurements ---------------------------------------------------------------------------------------------------
def scores(logits: Tensor, labels: np.ndarray, cov: Tensor | None = None, *, samples: int = 1000) -> dict[str, float]:
    """``metrics.summary`` of ``softmax(logits)``, or of its average over ``N(logits, cov)``."""
    generator = torch.Generator().manual_seed(0)
    probs = logits.double().softmax(-1) if cov is None else sample_probabilities(logits.double(), cov, samples, generator)
    return metrics.summary(probs, labels)


def labels(of: study.Study, items: int) -> np.ndarray:
    """The right answers to the first test questions."""
    return np.array([item["answer"] for item in of.task["test"].subset(items)])


def mode_curves(of: study.Study, seed: int, blocks: Sequence[str], precisions: Sequence[float]) -> list[dict]:
    """At every precision (shared by the blocks' weights): the evidence at the weights as they are trained and at the linearised model's own
    mode; of both, the distance from the prior's centre, and the test scores of the linearised predictive about them."""
    config = {"map": of.map_folder(seed).name, "items": of.dense_items, "data": of.data_key, "blocks": list(blocks), "precisions": list(precisions)}

    def compute() -> list[dict]:
        K, blocks_, right = kernels(of, seed), list(blocks), labels(of, of.dense_items)
        ll = float(K.fit_logits.log_softmax(-1).gather(1, K.fit_labels[:, None]).sum())
        distance, root, rows = sum(K.distance[b] for b in blocks_), K.root(), []
        h = reach.spectrum(K, blocks_, root)
        for value in precisions:
            precision = dict.fromkeys(blocks_, value)
            mode = reach.linear_mode(K, precision)
            there = K.root(logits=mode.fit_logits)
            moved, lam = sum(mode.distance.values()), torch.tensor([value], dtype=torch.float64)
            rows.append({
                "precision": value, "distance": distance, "distance_at_mode": moved, "log_likelihood": ll, "log_likelihood_at_mode": mode.log_likelihood,
                "evidence": float(reach.log_evidence(ll, h, distance, lam)),
                "evidence_at_mode": float(reach.log_evidence(mode.log_likelihood, reach.spectrum(K, blocks_, there), moved, lam)),
                "test": scores(K.logits, right, reach.covariance(K, precision, root)[0]),
                "test_at_mode": scores(mode.logits, right, reach.covariance(K, precision, there)[0]),
            })  # fmt: skip
        return rows

    return of.store.json("mode", config, compute)


def variant(of: study.Study, seed: int, *, epochs: int | None = None, smoothing: float = 0.0, precision: Mapping[str, float] | None = None) -> dict:
    """A MAP model trained in another way and what the experts' posterior (Kronecker, one precision by evidence) makes of it: summaries of
    ``train`` and ``map``, ``temperature`` (fitted on validation) and ``laplace`` on the test set, the ``precision``, and its :class:`Reach`.

    ``epochs``: fewer. ``smoothing``: of the labels. ``precision``: block -> of the prior under which it is trained.
    """
    config = {"map": of.map_folder(seed).name, "epochs": epochs, "smoothing": smoothing, "precision": dict(precision or {}), "items": of.dense_items,
              "samples": of.mc_samples, "data": of.data_key}

    def compute() -> dict:
        if smoothing or precision:
            model = of.base()[0]
            held = {name: lam for b, lam in (precision or {}).items() for name in weight_blocks(model).get(b, ())}
            penalised.fine_tune(model, of.loader(of.train_items(seed), batch_size=of.batch_size, shuffle=True, seed=seed), smoothing=smoothing,
                                epochs=epochs or of.epochs, lr=of.lr, precision=held, seed=seed)
        else:
            model = of.map_model(seed, epochs=epochs)
        return measure(of, model, seed)

    return of.store.json("variant", config, compute)


def variants(of: study.Study, seed: int) -> dict[str, dict]:
    """:func:`variant` of the model as trained and trained otherwise: for a quarter of the epochs, with smoothed labels, under the prior that
    the evidence chose for the experts (and once more, under the one it then chooses), and under the one it chooses for all weights."""
    K = kernels(of, seed)
    whole = reach.best_precision(reach.spectrum(K, K.blocks, K.root()), sum(K.distance.values()))
    out = {"as trained": variant(of, seed), "a quarter of the epochs": variant(of, seed, epochs=max(1, of.epochs // 4)),
           "smoothed labels (0.1)": variant(of, seed, smoothing=0.1)}
    for name, last in (("under the experts' prior", "as trained"), ("... and once more", "under the experts' prior")):
        out[name] = variant(of, seed, precision={EXPERTS: out[last]["precision"]})
    out["under a prior on all weights"] = variant(of, seed, precision=dict.fromkeys(K.blocks, whole))
    return out


def measure(of: study.Study, model: nn.Module, seed: int) -> dict:
    """The numbers of :func:`variant` for a model at hand."""
    load = lambda split, n=None: of.loader(of.task[split].subset(n))  # noqa: E731
    train, validation, test = predict(model, of.loader(of.train_items(seed))), predict(model, load("validation")), predict(model, load("test"))
    temperature = metrics.fit_temperature(validation.logits, validation.labels)
    la = ExpertLaplace(model, seed=seed).fit(of.loader(of.train_items(seed)))
    la.optimize_prior_precision("marglik", "global")
    said = predict(lambda batch: la(batch, num_samples=of.mc_samples), load("test"))
    return {"train": train.summary(), "map": test.summary(), "temperature": metrics.summary(metrics.softmax(test.logits, temperature), test.labels),
            "fitted_temperature": temperature, "laplace": said.summary(), "precision": float(la.prior_precision),
            "reach": expert_reach(la, load("test", of.dense_items)).summary()}


def recovered(row: Mapping) -> float:
    """Of what temperature scaling takes off MAP's NLL, the share that the posterior takes off (NaN where that is nothing)."""
    possible = row["map"]["nll"] - row["temperature"]["nll"]
    return (row["map"]["nll"] - row["laplace"]["nll"]) / possible if possible > 0 else float("nan")


def linear_predictive(la: ExpertLaplace, loader: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """``la.predictive_logits`` of all items: ``[N, C]``, ``[N, C, C]``."""
    parts = [la.predictive_logits(batch) for batch in loader]
    width = max(m.shape[1] for m, _ in parts)
    return (torch.cat([nn.functional.pad(m, (0, width - m.shape[1]), value=-torch.inf) for m, _ in parts]),
            torch.cat([nn.functional.pad(c, (0, width - c.shape[1]) * 2) for _, c in parts]))


def under_the_prior(kernels: Kernels, blocks: Sequence[str], precision: float) -> Tensor:
    """Log-probabilities ``[N, C]`` of the fitting set averaged over the linearised prior about the weights as trained: what the answers
    would be had the data not been seen."""
    N, k, _ = kernels.fit_contrasts.shape
    own = sum(kernels.fit[b].view(N, k, N, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1) for b in blocks) / precision
    cov = kernels.fit_contrasts.mT @ own @ kernels.fit_contrasts
    return sample_probabilities(kernels.fit_logits, cov, 1000, torch.Generator().manual_seed(0)).log()


# ---- nonlinearity ---------------------------------------------------------------------------------------------------
def linear_and_sampled(of: study.Study, seed: int, precisions: Sequence[float], num_samples: int = 30) -> list[dict]:
    """At every (global) precision: the median deviation of the lead and the test scores, linearised and with weights drawn from the
    same posterior over the experts (``sampled_mean``: the median of the lead's mean); and MAP's scores on the same questions."""
    config = {"map": of.map_folder(seed).name, "items": of.dense_items, "data": of.data_key, "precisions": list(precisions), "samples": num_samples}

    def compute() -> list[dict]:
        la = of.laplace(seed)
        items, right, rows = list(of.loader(of.task["test"].subset(of.dense_items))), labels(of, of.dense_items), []
        for value in precisions:
            la.prior_precision = value
            mean, cov = linear_predictive(la, items)
            drawn = sampled_logits(la, items, num_samples, seed=seed)
            top = mean.topk(2, dim=1).indices.expand(num_samples, -1, -1)
            lead = drawn.gather(2, top[..., :1]) - drawn.gather(2, top[..., 1:])
            rows.append({"precision": value, "linear": float(reach.leads(mean, cov)[1].median()), "sampled": float(lead.std(0).median()),
                         "sampled_mean": float(lead.mean(0).median()), "map_test": scores(mean, right), "linear_test": scores(mean, right, cov), "sampled_test": metrics.summary(drawn.softmax(-1).mean(0), right)})
        return rows

    return of.store.json("samples", config, compute)


def final_norm_bound(model: nn.Module, loader: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The largest lead ``B [N]`` that each item's top two options could have, and the length ``||h|| [N]`` of the state before the final norm.

    Behind an RMS norm with scale ``s`` an answer is ``f_c = sqrt(d) <s * w_c, h> / ||h||``. So a lead is ``B cos(theta)``, ``B = sqrt(d) ||s *
    (w_a - w_b)||``, for the angle between ``h`` and that direction, and its derivative in ``h`` is of length ``B sin(theta) / ||h||``: at the
    bound no change of ``h`` changes it. ``ValueError`` if the model ends in something else.
    """
    inner = unwrap(model)
    norm, head = getattr(inner.base_model, "norm", None), inner.get_output_embeddings()
    if "RMSNorm" not in type(norm).__name__ or type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"{type(inner).__name__} does not end in an RMS norm and a linear head without bias")
    scale, weight, bounds, states = float64(norm.weight.detach()), float64(head.weight.detach()), [], []
    hook = norm.register_forward_pre_hook(lambda _, args: states.append(float64(args[0][:, -1].detach()).norm(dim=1)))
    try:
        with torch.no_grad():
            for batch in loader:
                top = option_logits(model, batch).topk(2, dim=1).indices
                a, b = batch["option_ids"].to(top.device).gather(1, top).T.to(weight.device)
                bounds.append((scale * (weight[a] - weight[b])).norm(dim=1) * weight.shape[1] ** 0.5)
    finally:
        hook.remove()
    return torch.cat(bounds).cpu(), torch.cat(states).cpu()
