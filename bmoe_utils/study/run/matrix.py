"""The papers' own experiments as a plan: models x question sets x methods x seeds, what each cell should cost, and what the
papers report beside what runs of this study found.

Every cell is one run of chapter 11 with one method and one seed (:mod:`bmoe_utils.study.run.sweep`): it runs alone and resumes.
"""
from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe_utils.study.output import project_root
from bmoe_utils.study.run.engine import UsageError

MODELS = {"ibm-granite/granite-3.1-3b-a800m-instruct": "granite-3.x-3b-a800m", "Qwen/Qwen1.5-MoE-A2.7B": "Qwen1.5-MoE-A2.7B",
          "deepseek-ai/deepseek-moe-16b-base": "deepseek-moe-16b"}
# Set -> options an item has and prompt tokens it takes on average (question, lettered options, "Answer:"; by the papers' tokenizers
# some 1.3 a word). For the estimate alone; a run measures its own.
TASKS = {"openbookqa": (4, 60), "arc_challenge": (4, 80), "sciq": (4, 60), "medmcqa": (4, 90)}
CHAPTER = "11"
# One H200, by its data sheet: dense bfloat16 FLOP/s and bytes/s of its memory.
PEAK_FLOPS, BANDWIDTH = 989e12, 4.8e12


@dataclass(frozen=True)
class Cell:
    model: str
    task: str
    method: str
    seed: int


def cells(settings: Mapping, models=tuple(MODELS), tasks=tuple(TASKS)) -> list[Cell]:
    """The matrix of a profile's ``methods`` and ``seeds``, model by model."""
    return [Cell(*cell) for cell in itertools.product(models, tasks, settings["methods"], settings["seeds"])]


def passes(method: str, settings: Mapping, options: int) -> float:
    """Forward passes of one item that a cell takes, a backward pass to the activations counted as one, weights' gradients as another.

    Counted beside MAP fine-tuning, which the cells of a model, set and seed share; it is the cost of ``map`` itself.
    """
    s, train, test, val = settings, settings["train_size"], settings["router_items"], settings["router_validation"]
    tuning, laplace = 3 * s["epochs"] * train, train * options  # forward and C - 1 backwards
    routers = 2 * s["router_epochs"] * train + s["router_epochs"] * s["validation_passes"] * val
    match method:
        case "map":
            return tuning + test
        case "temperature":
            return val + test
        case "ensemble":
            return (s["members"] - 1) * tuning + s["members"] * test
        case "mc_dropout" | "expert_dropout" | "blob":
            return tuning + s["router_passes"] * test
        case "checkpoint_ensemble":
            return tuning + s["members"] * test
        case "swag":
            return tuning + s["router_passes"] * test
        case "tfb":
            return 20 * val + s["router_passes"] * test
        case "last_layer_laplace":
            return train + test
        case "laplace_kron" | "laplace_lora":
            return laplace + test * (1 + options)
        case "joint" | "joint_tuned":
            grid = s["validation_passes"] * val * (1 + options) * len(s["router_precisions"]) * (method == "joint_tuned")
            return laplace + train * options + grid + s["router_passes"] * test * (1 + options)
        case "router_laplace":
            return train * options + s["router_passes"] * test
        case _:
            return routers + s["router_passes"] * test


@dataclass(frozen=True)
class Estimate:
    seconds: float
    gib: float


def estimate(cell: Cell, settings: Mapping, rates: Mapping[str, float] | None = None) -> Estimate:
    """Seconds and GiB of one cell. ``rates``: model -> seconds that a token's pass was measured to take (:func:`measured_rates`);
    without one, the larger of what the arithmetic and what reading every weight once a batch take on an H200 by its data sheet."""
    # not above: it brings torch, and the command line answers at once
    from bmoe_utils.routers.costs import Shape, model_flops, model_parameters
    shape = Shape.of(MODELS[cell.model])
    options, tokens = TASKS[cell.task]
    weights = 2 * model_parameters(shape)
    if rates and cell.model in rates:
        seconds = rates[cell.model] * tokens
    else:
        seconds = max(tokens * model_flops(shape, context=tokens) / PEAK_FLOPS, weights / BANDWIDTH / max(1, settings["router_batch"]))
    posterior = 4 * shape.moe_layers * shape.experts * 64 * (shape.width + shape.expert_width) if cell.method in ("laplace_kron", "joint", "joint_tuned") else 0
    # inputs, outputs and gradients of the experts' slots and the residual stream of one batch, in bfloat16 and float32
    batch = settings["router_batch"] * tokens * shape.layers * (8 * shape.width + shape.top_k * 3 * (shape.width + shape.expert_width)) * 3
    return Estimate(passes(cell.method, settings, options) * seconds, (weights + posterior + batch) / 2**30)


def measured_rates(path: Path | None = None) -> dict[str, float]:
    """Model -> seconds that a token's pass took in the GPU benchmark's floor, where that was run (data/bench/gpu_shapes.json)."""
    try:
        content = json.loads((path or project_root() / "data" / "bench" / "gpu_shapes.json").read_text(encoding="utf-8"))
        measured = dict(content["models"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    from bmoe_utils.routers.costs import model_flops
    rates = {}
    for model, name in MODELS.items():
        try:
            row = measured[name]
            token_passes = row["fit_flops_floor_seconds"] * row["flops_per_second"] / model_flops(name)
            rates[model] = row["fit_floor_seconds"] / token_passes
        except (LookupError, TypeError, ZeroDivisionError):
            continue                                  # not measured, or by another version
    return rates


def lines(settings: Mapping) -> Iterator[str]:
    """The plan in words: a line a model, set and method, its seeds together."""
    if settings["train_size"] is None:
        raise UsageError("the plan's cost depends on the number of fine-tuning questions: give -p train_size=N")
    rates, seeds = measured_rates(), settings["seeds"]
    plan = [cell for cell in cells(settings) if cell.seed == seeds[0]]
    yield (f"{len(plan) * len(seeds)} cells: {len(MODELS)} models x {len(TASKS)} sets x {len(settings['methods'])} methods x {len(seeds)} seeds; "
           "each is one run of chapter " + CHAPTER)
    yield (f"times by the rates measured in data/bench/gpu_shapes.json for {', '.join(rates)}; else an H200's data sheet" if rates else
           "no rate of a GPU has been measured (tests/benchmarks/gpu_shapes.py): times are the least that an H200's data sheet allows, "
           "a run takes several times that")
    total = 0.0
    for (model, task), group in itertools.groupby(plan, lambda cell: (cell.model, cell.task)):
        yield f"{model}, {task}"
        for cell in group:
            e = estimate(cell, settings, rates)
            total += e.seconds * len(seeds)
            yield f"    {cell.method:20} {len(seeds)} x {e.seconds:7.1f} s {e.gib:7.1f} GiB"
    yield f"in all {total / 3600:.1f} GPU hours"


# ---- reported and reproduced ----------------------------------------------------------------------------------------
def found(root: Path | None = None) -> dict[tuple, list[float]]:
    """(model, task, method, metric) -> the values of every seed that runs under data/runs have, from their 11_numbers.json."""
    values: dict[tuple, dict] = {}
    for path in sorted((root or project_root() / "data" / "runs").rglob(f"{CHAPTER}_numbers.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            for method, by_seed in run["methods"].items():
                for seed, scores in zip(run["seeds"], by_seed, strict=True):
                    for metric, value in scores.items():
                        values.setdefault((run["model"], run["task"], method, metric), {})[seed] = value
        except (ValueError, KeyError, TypeError, AttributeError):
            continue                                  # another version's file says nothing here
    return {key: list(by_seed.values()) for key, by_seed in values.items()}


def reported(root: Path | None = None) -> list[dict]:
    """What the papers report (data/reported.json), each beside the mean over the seeds that were run here, or "not run"."""
    path = project_root() / "data" / "reported.json"
    if not path.exists():
        return []
    here, rows = found(root), []
    for row in json.loads(path.read_text(encoding="utf-8")):
        values = here.get((row["model"], row["task"], row["method"], row["metric"]))
        said = f"{sum(values) / len(values):.3f} ({len(values)} seeds)" if values else "not run"
        rows.append({"model": row["model"], "set": row["task"], "method": row["method"], "metric": row["metric"],
                     "reported": f"{row['reported']:.3f}", "paper": f"arXiv {row['paper']}", "reproduced": said})
    return rows
