"""Time and memory of fitting and of predicting, as ratios to the passes through the model that neither can do without.

    floor of a fit          a forward pass and one backward pass to the experts' outputs per Fisher column
    floor of a prediction   a forward pass and C such backward passes

Neither computes experts for padding, nor a prediction in the last layer for other positions than the answer's, as the methods do not.

Everything is measured in one process, variants in turn on the same batch, so that a slow minute of the machine falls on all of
them; on the CPU in processor seconds, which leave out the waiting for other processes. A ratio is the median over batches of
(variant / floor of that batch), each the least of ``--tries``. What does not come with every batch, the sketches' restarts and the
eigenvectors at the end, is timed apart and added for a fitting set of ``--items``. Memory is the peak of allocations, the model's
weights added on both sides.

Which operations take the excess over the floor is profiled at the end.

    python tests/benchmarks/curvature_floor.py [--device cuda] [--rounds 2] [--tries 2] [--out floor.json]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import C, add_out, batches, build, in_turn, table_of, timed, traced, write

import bmoe_utils as bm
from bmoe_utils.experts import capture
from bmoe_utils.experts.capture import capturing
from bmoe_utils.experts.fitting import Fit
from bmoe_utils.experts.sketch import Sketch, next_restart
from bmoe_utils.models import experts_forward
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits, to_device

# What a whole fit's and a prediction's ratio to their floor, and their memory's, should stay below; by the name of the posterior.
TARGETS = {"fit": {"full factors": 1.15, "rank": 1.05}, "predict": {"full factors": 2.0, "rank": 1.2}}
MEMORY_TARGETS = {"fit": 1.15, "predict": 1.3}


class Outputs(capture.Tape):
    """Keeps the experts' outputs in the graph and nothing else: what the floor differentiates to."""

    def record(self, module, a, z, expert, token):
        self.slots.extend(z)


def floor(model, batch, K: int, batched: bool = False, answer_only=()) -> None:
    """A forward and ``K`` backward passes, with the same kernels as the capture and none of its bookkeeping."""
    batch = to_device(batch, model)
    names = {module: name for name, module in expert_layers(model).items()}
    tape = Outputs(batch["attention_mask"].bool(), names, frozenset(answer_only))
    experts_forward._tape = tape
    try:
        logits = option_logits(model, batch)
    finally:
        experts_forward._tape = None
    v = torch.eye(logits.shape[1], device=logits.device, dtype=logits.dtype)[:K, None].expand(K, *logits.shape)
    if batched:
        torch.autograd.grad(logits, tape.slots, v, is_grads_batched=True, materialize_grads=True)
        return
    for k in range(K):
        torch.autograd.grad(logits, tape.slots, v[k], retain_graph=k + 1 < K, materialize_grads=True)


def fit_step(la):
    """A fit's pass, one batch of it, and what it does at its end."""
    fit = Fit(la.model, la.layers, la._modules, la.options)
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


# Operations by what they do; what is in none of these is "other".
GROUPS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "_grouped_mm", "linear", "einsum"),
    "gather, copy, allocate": ("index", "index_select", "copy_", "cat", "clone", "contiguous", "zero_", "fill_", "empty", "empty_like",
                               "zeros", "new_zeros", "index_copy_", "index_copy", "_to_copy", "stack", "index_put_", "_index_put_impl_",
                               "empty_strided", "nonzero", "resize_", "constant_pad_nd"),
    "norms and sums": ("sum", "linalg_vecdot", "mul", "cumsum", "add_", "add", "any", "all", "gt", "sub", "div", "square", "clamp"),
    "sorting slots": ("sort", "argsort", "bincount", "_unique2", "unique_consecutive", "repeat_interleave"),
    "views": ("as_strided", "view", "reshape", "select", "transpose", "expand", "t", "permute", "unsqueeze", "narrow", "slice", "split",
              "detach", "alias", "to", "unbind", "squeeze", "_unsafe_view"),
}


def own_times(events: list[tuple[str, int, int]]) -> dict[str, list[float]]:
    """Milliseconds of every ``(name, start, duration in ns)`` of one thread, without those within it: name -> one a call, in order."""
    out: dict[str, list[float]] = {}
    around: list[tuple[int, list[float], int]] = []  # the calls not yet over: their end, and where their time is kept
    for name, start, duration in sorted(events, key=lambda e: (e[1], -e[2])):
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            _, calls, at = around[-1]
            calls[at] -= duration / 1e6
        calls = out.setdefault(name.removeprefix("aten::"), [])
        calls.append(duration / 1e6)
        around.append((start + duration, calls, len(calls) - 1))
    return out


def by_group(calls: dict[str, list[float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, times in calls.items():
        group = next((g for g, names in GROUPS.items() if name in names), "other")
        group = "autograd's own" if "autograd::" in name or "Backward" in name else group
        out[group] = out.get(group, 0.0) + sum(times)
    return out


def excess_of(rows: dict, passes: list[dict[str, list[tuple]]]) -> dict:
    """What each variant spends beyond its floor, by group of operations, in shares of the floor. The profiler's clock is the wall's,
    so of every single call the least of several ``passes`` (name -> events) counts, floor and variant in turn: what other processes
    took falls out. Its own time, about the same a call, weighs on many small ones."""
    least: dict[str, dict[str, list[float]]] = {}
    for events in passes:
        for name in rows:
            calls = own_times(events[name])
            before = least.setdefault(name, calls)
            for op, values in calls.items():
                if len(before.get(op, ())) == len(values):
                    before[op] = [min(pair) for pair in zip(before[op], values)]
    out = {}
    for name, (against, _) in rows.items():
        if against:
            base, mine = by_group(least[against]), by_group(least[name])
            excess = {g: (mine.get(g, 0.0) - base.get(g, 0.0)) / sum(base.values()) for g in base | mine}
            out[name] = dict(sorted(excess.items(), key=lambda pair: -abs(pair[1])))
    return out


def targets(name: str) -> dict:
    """What the ratios of a row should stay below: ``target`` and, where there is one, ``memory_target``."""
    what, posterior = name.split(",")[0], "full factors" if name.endswith("full factors") else "rank"
    if what not in TARGETS:
        return {}
    memory = what == "predict" or posterior == "rank"
    return {"target": TARGETS[what][posterior]} | ({"memory_target": MEMORY_TARGETS[what]} if memory else {})


def measure(args, architecture: str) -> dict:
    shape = {k: getattr(args, k) for k in ("d", "f", "experts", "layers", "top_k", "dtype", "device")}
    model, data = build(architecture, **shape), batches(args.rounds, args.batch)
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
                fitted[name] = la, end
                rows[f"fit, {fisher}, {name}"] = f"floor of a fit, {fisher}", step
        rows["floor of a fit, exact, one batched backward"] = "floor of a fit, exact", lambda batch: floor(model, batch, C - 1, True)
        answer_only = fit.answer_only
        rows["floor of a prediction"] = None, lambda batch: floor(model, batch, C, answer_only=answer_only)
        for name, (la, end) in fitted.items():
            la.posteriors, la.answer_only = end(), answer_only  # of one batch, enough to predict with
            rows[f"predict, {name}"] = "floor of a prediction", lambda batch, la=la: predict(la, batch)

        steps = args.items // args.batch
        due = {name: restarts(fit, steps) for name, (fit, _, _) in fits.items()}
        trace = lambda: {name: traced(args.device, lambda: run(data[0])) for name, (_, run) in rows.items()}  # noqa: E731
        first = trace()  # and warmed up
        times = in_turn(args.device, {name: run for name, (_, run) in rows.items()}, data, args.tries)
        targeted = {n: row for n, row in rows.items() if row[0] is None or targets(n)}
        excess = excess_of(targeted, [{n: operations for n, (_, operations) in t.items()} for t in (first, trace())]) if args.profile else {}
        rest = {name: timed(args.device, end) for name, (_, _, end) in fits.items()}
        for name, sketches in due.items():
            rest[name] += sum(n * timed(args.device, lambda: restart(sketch)) for sketch, n in sketches)

    peaks = {name: peak for name, (peak, _) in first.items()}
    table = table_of({name: against for name, (against, _) in rows.items()}, times, peaks, parameters)
    for name, row in table.items():
        if name in rest:
            row["seconds_beside_the_batches"] = rest[name]
            row["ratio_of_a_whole_fit"] = row["ratio"] + rest[name] / (steps * statistics.median(times[row["floor"]]))
        row |= targets(name) | ({"excess": excess[name]} if name in excess else {})
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": table}


def predict(la, batch) -> None:
    """:meth:`ExpertLaplace.predictive_logits` inside ``capturing``, whose entry is not a batch's cost."""
    mean, captured = la.captured(batch)
    la._covariances(captured, la.prior_precision_by_expert(), len(mean))


def show(table: dict) -> None:
    width = max(map(len, table))
    print(f"{'':{width}}  s/batch   ratio  (range)          whole fit  peak MB  memory")
    for name, row in table.items():
        line = f"{name:{width}}  {row['seconds_per_batch']:7.3f}"
        if "ratio" in row:
            lo, hi = row["ratio_range"]
            end = f"{row['ratio_of_a_whole_fit']:9.3f}" if "ratio_of_a_whole_fit" in row else " " * 9
            line += f"  {row['ratio']:6.3f}  ({lo:.3f} - {hi:.3f})  {end}"
        else:
            line += " " * 37
        line += f"  {row['peak_mb']:7.0f}" + (f"  {row['memory_ratio']:6.2f}" if "memory_ratio" in row else "")
        print(line)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 512), ("f", 352), ("experts", 16), ("layers", 4), ("top-k", 4), ("rank", 64), ("batch", 8),
                          ("rounds", 2), ("tries", 2), ("items", 1000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--architecture", choices=["qwen2_moe", "olmoe"], nargs="+", default=["qwen2_moe", "olmoe"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="also say which operations take the excess")
    add_out(parser, "curvature_floor")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    report = {"settings": settings, "architectures": {}}
    for architecture in args.architecture:
        report["architectures"][architecture] = measure(args, architecture)
        print(f"\n{architecture}")
        show(report["architectures"][architecture]["rows"])
    write(args.out, "curvature_floor", report, device=args.device, argv=argv)
    return report


if __name__ == "__main__":
    main()
