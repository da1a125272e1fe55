"""The rows of the main table: every method by its key, its answers to the same questions, and ablations of the experts' posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..scores.predictions import Predictions
from .comparison import NAMES as BASELINES
from .comparison import ON_LORA
from .study import Study

# Method -> that of `attach_routers` and its options; all of them over whole passes.
ROUTERS = {
    "router_temperature": ("temperature", {}),
    "router_random": ("temperature", {"temperature": 1000.0}),  # a control: experts drawn, whatever the router says
    "router_vtsr_kl": ("vtsr", {"temperature_prior": [1.0, 0.5]}),
    "router_mfvr": ("mfvr", {}),
    "router_mfvr_wide": ("mfvr", {}),
    "router_fcvr": ("fcvr", {}),
    "router_swag": ("swag", {}),
    "router_ensemble": ("ensemble", {}),
    "router_mcdropout": ("mcdropout", {}),
    "router_laplace": ("laplace", {}),
}
WIDTHS = (1.0, 3.0, 10.0)  # prior standard deviations of the logits, for validation to choose from
JOINT = {"joint": "independent", "joint_tuned": "joint"}  # how the two priors were tuned
KNOWN = ("map", "temperature", *BASELINES, "laplace_kron", *ROUTERS, *JOINT)


def rows_of(study: Study) -> list[str]:
    """Those of ``study.methods`` that its regime has. ``ValueError`` on an unknown one."""
    if unknown := [m for m in study.methods if m not in KNOWN]:
        raise ValueError(f"unknown method {unknown[0]!r}; there are: {', '.join(KNOWN)}")
    return [m for m in study.methods if m not in ON_LORA or study.method == "lora"]


def width_by_validation(study: Study, seed: int) -> float:
    """The prior width of the mean-field routers with the least validation NLL over whole passes; of the untrained priors, since
    training hardly moves them (chapter 6)."""
    said = [study.router_predictions(seed, "mfvr", "validation", inference="whole-model", num_samples=study.validation_passes,
                                     prior_std=width, fitted=False) for width in WIDTHS]
    return min(zip(WIDTHS, said, strict=True), key=lambda pair: pair[1].summary()["nll"])[0]


def answers(study: Study, seed: int, method: str, split: str = "test", *, size: int | None = None) -> Predictions:
    """A method's answers to the first ``router_items`` questions of a split, by the seed's model fine-tuned on ``size`` items (by
    default ``train_size``). Whatever is chosen is chosen on the validation split."""
    if size is not None and size != study.train_size:
        study = study.sized(size)
    n = study.router_items
    match method:
        case "map":
            return study.map_predictions(seed, split).head(n)
        case "temperature":
            return study.temperature_predictions(seed, split)[0].head(n)
        case "laplace_kron":
            return study.laplace_predictions(seed, split, items=n)
        case method if method in JOINT:
            return study.joint_predictions(seed, split, tune=JOINT[method])
        case method if method in BASELINES:
            return study.baseline_predictions(seed, method, split, items=n)
        case method if method in ROUTERS:
            name, options = ROUTERS[method]
            if method == "router_mfvr_wide":
                options = {"prior_std": width_by_validation(study, seed)}
            return study.router_predictions(seed, name, split, inference="whole-model", **options)
    raise ValueError(f"unknown method {method!r}; there are: {', '.join(KNOWN)}")


def table_of(study: Study, split: str = "test", methods: Sequence[str] | None = None) -> dict[str, list[Predictions]]:
    """Method -> its answers for every seed."""
    return {method: [answers(study, seed, method, split) for seed in study.seeds] for method in methods or rows_of(study)}


# ---- ablations ------------------------------------------------------------------------------------------------------
def busiest(counts: torch.Tensor, share: float) -> torch.Tensor:
    """Which experts ``[L, E]`` are the busiest ``share`` of their layer (at least one), by routed tokens ``counts [L, E]``."""
    number = max(1, round(share * counts.shape[1]))
    chosen = torch.zeros_like(counts, dtype=torch.bool)
    return chosen.scatter_(1, counts.argsort(dim=1, descending=True, stable=True)[:, :number], True)


def confined_predictions(study: Study, seed: int, share: float, *, most_used: bool = True, split: str = "test") -> Predictions:
    """The experts' posterior with the prior's precision tuned for all and then only the busiest (or the idlest) ``share`` of every layer's
    experts uncertain: the others' precision is so high that they carry none."""
    def predictor():
        la = study.tuned_laplace(seed)
        counts = la.tokens_per_expert if most_used else -la.tokens_per_expert
        precision = la.prior_precision_by_expert().clone()
        la.prior_precision = torch.where(busiest(counts, share), precision, 1e12)
        return lambda batch: la(batch, num_samples=study.mc_samples)

    config: Mapping = {"map": study.map_folder(seed).name, "prior_mean": study.prior_mean, "share": share, "most_used": most_used,
                       "samples": study.mc_samples}
    return study.predictions("confined", split, config, predictor, items=study.router_items)
