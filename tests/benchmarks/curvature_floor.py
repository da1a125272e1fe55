"""Time and memory of fitting and of predicting, as ratios to the passes through the model that neither can do without.

    floor of a fit          a forward pass and one backward pass to the experts' outputs per Fisher column
    floor of a prediction   a forward pass and C such backward passes

Everything is measured in one process, variants in turn on the same batch, so that a slow minute of the machine falls on all of
them; a ratio is the median over batches of (variant / floor of that batch). What a fit does once at its end, the factors'
eigenvectors, is timed apart and added for a fitting set of ``--items``.

    python tests/benchmarks/curvature_floor.py [--device cuda] [--rounds 7] [--out floor.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig, set_seed

import bmoe_utils as bm
from bmoe_utils import capture, curvature
from bmoe_utils.capture import capturing, expert_layers
from bmoe_utils.fitting import Fit
from bmoe_utils.models import option_logits, to_device

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
    """One batch of a fit's pass, and a function for the work at the pass's end."""
    fit = Fit(la.model, la.layers, la._modules, la.options)
    if what == "moments":
        fit.posteriors = [p for p in la.posteriors]
        fit.stage = 1
    fit._begin()
    return (lambda batch: fit._batch(0, batch, *fit.stages[fit.stage])), (lambda: [s.finish() for s in fit.sums])


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, run) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def peak_bytes(device: str, run) -> int:
    """The most memory allocated during ``run`` beyond what was before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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
    posterior = lambda **options: bm.ExpertLaplace(model, **options)  # noqa: E731
    ranked = {"rank": args.rank}
    fitted, finish = {}, {}
    rows: dict[str, tuple[str | None, object]] = {}  # name -> (its floor, batch -> None)
    for fisher, K in (("mc", 1), ("exact", C - 1)):
        rows[f"floor of a fit, {fisher}"] = None, lambda batch, K=K: floor(model, batch, K)
        for name, options in (("full factors", {}), (f"rank {args.rank}", ranked)):
            la = posterior(fisher=fisher, **options)
            step, end = fit_step(la)
            rows[f"fit, {fisher}, {name}"] = f"floor of a fit, {fisher}", step
            finish[f"fit, {fisher}, {name}"] = end
            if fisher == "exact":
                la.posteriors = None
                fitted[name] = la, end
    rows["floor of a fit, exact, one batched backward"] = "floor of a fit, exact", lambda batch: floor(model, batch, C - 1, True)
    rows["floor of a prediction"] = None, lambda batch: floor(model, batch, C)

    with capturing(model):
        for name, (la, end) in fitted.items():  # a posterior of one batch is enough to predict with
            rows[f"fit, exact, {name}"][1](data[0])
            la.posteriors = end()
            rows[f"predict, {name}"] = "floor of a prediction", lambda batch, la=la: predict(la, batch)
        for name, options in (("full factors", {}), (f"rank {args.rank}", ranked)):
            la = posterior(hessian_structure="ekfac", **options)
            la.posteriors = fitted[name][0].posteriors
            rows[f"second pass of ekfac, exact, {name}"] = "floor of a fit, exact", fit_step(la, "moments")[0]
        times = {name: [] for name in rows}
        for batch in [data[0], *data]:  # the first round warms up
            for name, (_, run) in rows.items():
                times[name].append(timed(args.device, lambda: run(batch)))
        ends = {name: timed(args.device, end) for name, end in finish.items()}
        peaks = {name: peak_bytes(args.device, lambda: run(data[0])) for name, (_, run) in rows.items()}

    table = {}
    for name, (against, _) in rows.items():
        own = times[name][1:]
        row = table[name] = {"seconds_per_batch": statistics.median(own), "peak_mb": peaks[name] / 2**20}
        if against:
            ratios = sorted(x / y for x, y in zip(own, times[against][1:], strict=True))
            row |= {"ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]],
                    "ratio_of_minima": min(own) / min(times[against][1:]),
                    "memory_ratio": (peaks[name] + parameters) / (peaks[against] + parameters)}
        if name in ends:
            steps = args.items / args.batch
            row["seconds_at_the_end"] = ends[name]
            row["ratio_with_end"] = row["ratio"] + ends[name] / (steps * statistics.median(times[against][1:]))
    return table


def predict(la, batch) -> None:
    """:meth:`ExpertLaplace.predictive_logits` inside ``capturing``, whose entry is not a batch's cost."""
    mean, captured = la.captured(batch)
    la._covariances(captured, la.prior_precision_by_expert(), len(mean))


def show(table: dict) -> None:
    width = max(map(len, table))
    print(f"{'':{width}}  s/batch   ratio  (range)          of minima  with end  peak MB  memory")
    for name, row in table.items():
        line = f"{name:{width}}  {row['seconds_per_batch']:7.3f}"
        if "ratio" in row:
            lo, hi = row["ratio_range"]
            end = f"{row['ratio_with_end']:8.3f}" if "ratio_with_end" in row else " " * 8
            line += f"  {row['ratio']:6.3f}  ({lo:.3f} - {hi:.3f})  {row['ratio_of_minima']:9.3f}  {end}"
        else:
            line += " " * 47
        line += f"  {row['peak_mb']:7.0f}" + (f"  {row['memory_ratio']:6.2f}" if "memory_ratio" in row else "")
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 512), ("f", 352), ("experts", 16), ("layers", 4), ("top-k", 4), ("rank", 64), ("batch", 8),
                          ("rounds", 7), ("items", 1000), ("threads", 1)):
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
