"""What the benchmarks share: one clock, one measure of memory, one model to measure on, one form of file.

A benchmark writes ``data/bench/NAME.json``: its figures and the conditions they hold under (command, date, machine, clock, versions).
Whatever is compared was measured in the same process, variants in turn, and is given as a ratio to the matching floor of that run.
A row with a ``target`` (``memory_target``) says what its ratio (memory ratio) should stay below; ``targets.py`` collects these.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "bench"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig, set_seed

from bmoe_utils.study.output import atomic_write

PACKAGES = ("torch", "transformers", "numpy")
C = 4  # answer options


# ---- files ----------------------------------------------------------------------------------------------------------
def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", help=f"where the figures go (data/bench/{name}.json)")


def machine(device: str) -> dict:
    """The hardware the figures are of, and how many threads they took."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    out = {"device": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count(),
           "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        out |= {"device": card.name, "device_memory_gb": round(card.total_memory / 2**30)}
    return out


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions(*more: str) -> dict:
    """Of the packages a benchmark rests on; None: not installed."""
    out = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = None
    return out


def clock_of(device: str) -> str:
    if device.startswith("cuda"):
        return "wall-clock time between synchronisations"
    return "processor time of the process, one thread: waiting for other processes on the machine is left out, their use of its caches is not"


def write(out: Path, name: str, figures: dict, *, device: str = "cpu", argv: list[str] | None = None, packages: tuple[str, ...] = ()) -> None:
    """``figures`` and the conditions of the run to ``out``; ``argv``: the command's arguments (of this process by default)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--out" in argv:
        at = argv.index("--out")
        del argv[at : at + 2]
    head = {"benchmark": name, "command": shlex.join(["python", f"tests/benchmarks/{name}.py", *argv]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(device), "clock": clock_of(device),
            "versions": versions(*packages)}
    atomic_write(out, json.dumps(head | rounded(figures), indent=1, ensure_ascii=False) + "\n")


def rounded(value):
    """Floats to four significant digits: no measurement here is repeatable to more."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- time and memory ------------------------------------------------------------------------------------------------
def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, run) -> float:
    """Seconds that ``run()`` takes; on the CPU those of the processor (:func:`clock_of`)."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def in_turn(device: str, rows: dict[str, object], data: list[dict], tries: int, slow: float = math.inf) -> dict[str, list[float]]:
    """Seconds of every row on every batch: the least of ``tries``, rows in turn within each, so that a slow minute of the machine falls
    on all of them and none keeps it. A row that takes ``slow`` seconds or more is tried once."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for batch in data:
        taken: dict[str, list[float]] = {name: [] for name in rows}
        for attempt in range(tries):
            for name, run in rows.items():
                if attempt == 0 or taken[name][0] < slow:
                    taken[name].append(timed(device, lambda: run(batch)))
        for name, seconds in taken.items():
            times[name].append(min(seconds))
    return times


def table_of(floors: dict[str, str | None], times: dict[str, list[float]], peaks: dict[str, int], parameters: int) -> dict[str, dict]:
    """A row per name: the median of its ``times`` (a value a batch) and its peak; with a floor, ratios to that in the same batch, and of
    the memory held with all ``parameters`` (bytes)."""
    rows = {}
    for name, against in floors.items():
        row = rows[name] = {"seconds_per_batch": statistics.median(times[name]), "peak_mb": peaks[name] / 2**20}
        if against:
            ratios = sorted(x / y for x, y in zip(times[name], times[against], strict=True))
            row |= {"floor": against, "ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]],
                    "memory_ratio": (peaks[name] + parameters) / (peaks[against] + parameters)}
    return rows


@contextmanager
def silent():
    """The profiler writes to the standard error whatever its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def traced(device: str, run) -> tuple[int, list[tuple[str, int, int]]]:
    """The most memory allocated during ``run`` beyond what was before, and its operations: name, start and duration in nanoseconds."""
    on_gpu = device.startswith("cuda")
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=not on_gpu) as profile:
        run()
    live = peak = 0
    operations = []
    for event in profile.profiler.kineto_results.events():  # not profile.events(), whose tree takes as long as the run
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
        else:
            operations.append((event.name(), event.start_ns(), event.duration_ns()))
    return (torch.cuda.max_memory_allocated() - before if on_gpu else peak), operations


# ---- what is measured on --------------------------------------------------------------------------------------------
def build(architecture: str, *, d: int, f: int, experts: int, layers: int, top_k: int, dtype: str = "float32", device: str = "cpu"):
    """A random model. ``qwen2_moe`` with its shared expert of four times an expert's width, as in Qwen1.5-MoE; ``olmoe`` has none."""
    common = dict(vocab_size=1000, hidden_size=d, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
                  num_experts_per_tok=top_k, tie_word_embeddings=False, max_position_embeddings=512, pad_token_id=0,
                  bos_token_id=None, eos_token_id=1)
    if architecture == "olmoe":
        config = OlmoeConfig(**common, num_experts=experts, intermediate_size=f)
    else:
        config = Qwen2MoeConfig(**common, num_experts=experts, moe_intermediate_size=f, shared_expert_intermediate_size=4 * f)
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().to(device)


def batches(number: int, size: int, *, vocabulary: int = 1000, seed: int = 0, shortest: int = 64, longest: int = 128) -> list[dict]:
    """Left-padded items of 64 to 128 tokens."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(number):
        length = torch.randint(shortest, longest + 1, (size,), generator=g)
        mask = (torch.arange(int(length.max())) >= int(length.max()) - length[:, None]).long()
        out.append({"input_ids": torch.randint(2, vocabulary, mask.shape, generator=g) * mask, "attention_mask": mask,
                    "option_ids": torch.arange(10, 10 + C).expand(size, C),
                    "labels": torch.randint(0, C, (size,), generator=g)})
    return out
