"""Time and memory of fitting and of predicting, as ratios to the passes through the model that neither can do without.

    floor of a fit          a forward pass and one backward pass to the experts' outputs per Fisher column
    floor of a prediction   a forward pass and C such backward passes

Everything is measured in one process, variants in turn on the same batch, so that a slow minute of the machine falls on all of
them; on the CPU in processor seconds, which leave out the waiting for other processes. A ratio is the median over batches of
(variant / floor of that batch). What does not come with every batch, the sketches' restarts and the eigenvectors at the end, is
timed apart and added for a fitting set of ``--items``. Memory is the peak of allocations, the model's weights added on both sides.

    python tests/benchmarks/curvature_floor.py [--device cuda] [--rounds 5] [--out floor.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig, set_seed

import bmoe_utils as bm
from bmoe_utils import capture
from bmoe_utils.capture import capturing, expert_layers
from bmoe_utils.fitting import Fit
from bmoe_utils.models import option_logits, to_device
from bmoe_utils.sketch import Sketch, next_restart

C = 4  # answer options


def build(args) -> torch.nn.Module:
    """``qwen2_moe`` with its shared expert of four times an expert's width, as in Qwen1.5-MoE; ``olmoe`` has none."""
    common = dict(vocab_size=1000, hidden_size=args.d, num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8,
                  num_experts_per_tok=args.top_k, tie_word_embeddings=False, max_position_embeddings=512, pad_token_id=0,
                  bos_token_id=None, eos_token_id=1)
    if args.architecture == "olmoe":
        config = OlmoeConfig(**common, num_experts=args.experts, intermediate_size=args.f)
    else:
        config = Qwen2MoeConfig(**common, num_experts=args.experts, moe_intermediate_size=args.f,
                                shared_expert_intermediate_size=4 * args.f)
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval().to(args.device)


def batches(args) -> list[dict]:
    """Left-padded items of 64 to 128 tokens."""
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(args.rounds):
        length = torch.randint(64, 129, (args.batch,), generator=g)
        mask = (torch.arange(int(length.max())) >= int(length.max()) - length[:, None]).long()
        out.append({"input_ids": torch.randint(2, 1000, mask.shape, generator=g) * mask, "attention_mask": mask,
                    "option_ids": torch.arange(10, 10 + C).expand(args.batch, C),
                    "labels": torch.randint(0, C, (args.batch,), generator=g)})
    return out


class Outputs(capture.Tape):
    """Keeps the experts' outputs in the graph and nothing else: what the floor differentiates to."""

    def record(self, module, a, z, expert, token):
        self.slots.append(z)


def floor(model, batch, K: int, batched: bool = False) -> None:
    """A forward and ``K`` backward passes, with the same kernels as the capture and none of its bookkeeping."""
    batch = to_device(batch, model)
    tape = Outputs(batch["attention_mask"].bool(), {module: name for name, module in expert_layers(model).items()})
    capture._tape = tape
    try:
        logits = option_logits(model, batch)
    finally:
        capture._tape = None
    v = torch.eye(C, device=logits.device, dtype=logits.dtype)[:K, None].expand(K, *logits.shape)
    if batched:
        torch.autograd.grad(logits, tape.slots, v, is_grads_batched=True, materialize_grads=True)
        return
    for k in range(K):
        torch.autograd.grad(logits, tape.slots, v[k], retain_graph=k + 1 < K, materialize_grads=True)


def fit_step(la, what: str = "factors"):
    """A fit's pass, one batch of it, and what it does at its end."""
    fit = Fit(la.model, la.layers, la._modules, la.options)
    if what == "moments":
        fit.posteriors, fit.stage = list(la.posteriors), 1
    fit.begin()
    return fit, lambda batch: fit.add(0, batch), lambda: [s.finish() for s in fit.sums]


def restarts(fit, batches: int) -> list[tuple[Sketch, int]]:
    """Every sketch of the fit and how often it restarts in so many batches like the one it has seen; none may while it is timed."""
    out = []
    for sums in fit.sums:
        for sketch in (sums.A, sums.G):
            if isinstance(sketch, Sketch):
                per_batch, columns = float(sketch.progress[0]), sketch.U.shape[2]
                due, times = float(sketch.progress[1]), 0
                for batch in range(1, batches + 1):
                    if batch * per_batch >= due:
                        times, due = times + 1, next_restart(batch * per_batch, columns)
                sketch.progress[1] = float("inf")
                out.append((sketch, times))
    return out


def restart(sketch: Sketch) -> None:
    sketch.progress[1] = 0
    sketch.close()
    sketch.progress[1] = float("inf")


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, run) -> float:
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


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


def peak_bytes(device: str, run) -> int:
    """The most memory allocated during ``run`` beyond what was before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(args) -> dict:
    torch.set_num_threads(args.threads)
    model, data = build(args), batches(args)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    low = f"rank {args.rank}"
    variants = {"full factors": {}, low: {"rank": args.rank}}
    rows: dict[str, tuple[str | None, object]] = {}  # name -> (its floor, batch -> None)
    fits, fitted = {}, {}
    with capturing(model):
        for fisher, K in (("mc", 1), ("exact", C - 1)):
            rows[f"floor of a fit, {fisher}"] = None, lambda batch, K=K: floor(model, batch, K)
            for name, options in variants.items():
                la = bm.ExpertLaplace(model, fisher=fisher, **options)
                fit, step, end = fits[f"fit, {fisher}, {name}"] = fit_step(la)
                step(data[0])
                fitted[name] = la
                la.posteriors = end()  # of one batch, enough to predict with
                rows[f"fit, {fisher}, {name}"] = f"floor of a fit, {fisher}", step
        rows["floor of a fit, exact, one batched backward"] = "floor of a fit, exact", lambda batch: floor(model, batch, C - 1, True)
        rows["floor of a prediction"] = None, lambda batch: floor(model, batch, C)
        for name, la in fitted.items():
            rows[f"predict, {name}"] = "floor of a prediction", lambda batch, la=la: predict(la, batch)
            ekfac = bm.ExpertLaplace(model, hessian_structure="ekfac", **variants[name])
            ekfac.posteriors = la.posteriors
            rows[f"second pass of ekfac, exact, {name}"] = "floor of a fit, exact", fit_step(ekfac, "moments")[1]

        steps = args.items // args.batch
        due = {name: restarts(fit, steps) for name, (fit, _, _) in fits.items()}
        times = {name: [] for name in rows}
        peaks = {name: peak_bytes(args.device, lambda: run(data[0])) for name, (_, run) in rows.items()}  # and warmed up
        for batch in data:
            for name, (_, run) in rows.items():
                times[name].append(timed(args.device, lambda: run(batch)))
        rest = {name: timed(args.device, end) for name, (_, _, end) in fits.items()}
        for name, sketches in due.items():
            rest[name] += sum(n * timed(args.device, lambda: restart(sketch)) for sketch, n in sketches)

    table = {}
    for name, (against, _) in rows.items():
        row = table[name] = {"seconds_per_batch": statistics.median(times[name]), "peak_mb": peaks[name] / 2**20}
        if against:
            ratios = sorted(x / y for x, y in zip(times[name], times[against], strict=True))
            row |= {"ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]],
                    "ratio_of_minima": min(times[name]) / min(times[against]),
                    "memory_ratio": (peaks[name] + parameters) / (peaks[against] + parameters)}
        if name in rest:
            row["seconds_beside_the_batches"] = rest[name]
            row["ratio_of_a_whole_fit"] = row["ratio"] + rest[name] / (steps * statistics.median(times[against]))
    return table


def predict(la, batch) -> None:
    """:meth:`ExpertLaplace.predictive_logits` inside ``capturing``, whose entry is not a batch's cost."""
    mean, captured = la.captured(batch)
    la._covariances(captured, la.prior_precision_by_expert(), len(mean))


def show(table: dict) -> None:
    width = max(map(len, table))
    print(f"{'':{width}}  s/batch   ratio  (range)          of minima  whole fit  peak MB  memory")
    for name, row in table.items():
        line = f"{name:{width}}  {row['seconds_per_batch']:7.3f}"
        if "ratio" in row:
            lo, hi = row["ratio_range"]
            end = f"{row['ratio_of_a_whole_fit']:9.3f}" if "ratio_of_a_whole_fit" in row else " " * 9
            line += f"  {row['ratio']:6.3f}  ({lo:.3f} - {hi:.3f})  {row['ratio_of_minima']:9.3f}  {end}"
        else:
            line += " " * 48
        line += f"  {row['peak_mb']:7.0f}" + (f"  {row['memory_ratio']:6.2f}" if "memory_ratio" in row else "")
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 512), ("f", 352), ("experts", 16), ("layers", 4), ("top-k", 4), ("rank", 64), ("batch", 8),
                          ("rounds", 5), ("items", 1000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--architecture", choices=["qwen2_moe", "olmoe"], default="qwen2_moe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    table = measure(args)
    show(table)
    if args.out:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        settings |= {"device_name": device, "torch": torch.__version__, "command": "python tests/benchmarks/curvature_floor.py"}
        args.out.write_text(json.dumps({"settings": settings, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
