"""How much slower Bayesian routers make a model: measured on a random one, and counted for the papers' models.

    python tests/benchmarks/router_latency.py [--widths 512 768] [--repetitions 3] [--device cuda --dtype bfloat16] [--out FILE]

Every repetition times the plain model and then the same model with routers attached, way after way, so that a slow minute of
the machine hits both. Two figures for each:

    latency   median over the repetitions of (attached / plain) - 1, end to end, with its quartiles
    routers   the time the routers' own code takes within an attached pass, over the rest of that pass: numerator and
              denominator are of the same moment, so it is the steadier one where others use the machine (CPU only;
              the plain router's time is not charged, cache effects on the rest of the model are not seen)

One thread by default; its CPU time is measured then, which leaves out waiting for a core. About a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import add_out, write

from bmoe_utils.models.embedded import build_model, tiny_config
from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers import costs
from bmoe_utils.routers.attach import Routers, attach_routers

S = "S"  # stands for --samples
# label, method, samples (None: sample-free), options
WAYS = (
    ("deterministic", "deterministic", S, {}),
    ("temperature", "temperature", S, {}),
    ("VTSR", "vtsr", S, {}),
    ("MFVR", "mfvr", S, {}),
    ("MFVR, sample-free", "mfvr", None, {}),
    ("FCVR", "fcvr", S, {}),
    ("FCVR, sample-free", "fcvr", None, {}),
    ("Laplace, rank 64", "laplace", S, {"curvature_rank": 64}),
    ("Laplace, rank 64, sample-free", "laplace", None, {"curvature_rank": 64}),
    ("Laplace, full rank", "laplace", S, {}),
    ("SWAG", "swag", S, {}),
    ("SWAG, sample-free", "swag", None, {}),
    ("ensemble", "ensemble", S, {}),
    ("MC dropout, mask per sample", "mcdropout", S, {"mask": "sample"}),
    ("MC dropout, mask per token", "mcdropout", S, {}),
)


def make_batch(batch: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(2, vocabulary, shape, generator=generator).to(device)  # noqa: E731
    return {"input_ids": draw(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long, device=device),
            "option_ids": draw(batch, 4)}


def attach(model: torch.nn.Module, method: str, samples: int | None, options: dict) -> Routers:
    """Attached, and with the buffers that a fit would leave: they decide what SWAG and Laplace cost."""
    routers = attach_routers(model, method, num_samples=samples, **{k: v for k, v in options.items() if k != "curvature_rank"})
    generator = torch.Generator().manual_seed(0)
    for family in routers.families:
        draw = lambda *shape, like=family.weight: torch.randn(shape, generator=generator).to(like)  # noqa: E731
        if method == "laplace":
            rank = min(options.get("curvature_rank", family.width), family.width)
            family.basis_a = torch.linalg.qr(draw(family.width, rank))[0]
            family.basis_g = torch.linalg.qr(draw(family.num_experts, family.num_experts))[0]
            family.alpha, family.gamma = 100 * draw(rank).abs(), draw(family.num_experts).abs()
        elif method == "swag":
            family.variance = 1e-4 * draw(*family.mean.shape).abs()
            family.low_rank = 1e-2 * draw(family.options["rank"], *family.mean.shape)
    return routers


class Clock:
    """Seconds of a call. On CUDA wall-clock time between synchronisations; on one thread its CPU time; else wall-clock time."""

    def __init__(self, device: str, threads: int):
        self.cuda = device.startswith("cuda")
        self.now = time.process_time if threads == 1 and not self.cuda else time.perf_counter

    def __call__(self, run) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        start = self.now()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return self.now() - start


def one_pass(clock: Clock, model: torch.nn.Module, batch: dict, routers: Routers | None = None) -> tuple[float, float]:
    """Seconds of one forward pass, and of them those in the routers' own code (0 without ``routers``)."""
    inside = 0.0

    def timed(run, sign: int):
        def wrapper(*args, **kwargs):
            nonlocal inside
            start = clock.now()
            try:
                return run(*args, **kwargs)
            finally:
                inside += sign * (clock.now() - start)

        return wrapper

    attached = [] if routers is None else [m.forward.__self__ for m in routers._modules]
    originals = [a.original for a in attached]
    try:
        for a in attached:
            a.original = timed(a.original, -1)
        if routers is not None:
            routers._route = timed(routers._route, 1)
        with torch.no_grad():
            total = clock(lambda: option_logits(model, batch))
    finally:
        for a, original in zip(attached, originals, strict=True):
            a.original = original
        if routers is not None:
            del routers._route
    return total, inside


def measure(width: int, repetitions: int, samples: int, *, batch: tuple[int, int], clock: Clock, device: str, dtype: torch.dtype,
            **shape) -> list[dict]:
    """A row for every way, on a random model of this width."""
    vocabulary = 512
    model = build_model(tiny_config("qwen2_moe", vocabulary, width=width, **shape), 0).to(device, dtype).eval()
    inputs = make_batch(*batch, vocabulary, device)
    seen: dict[str, list] = {label: [] for label, *_ in WAYS}
    plain_ms = []
    one_pass(clock, model, inputs)
    for repetition in range(repetitions):
        for label, method, S_or_none, options in WAYS:
            plain, _ = one_pass(clock, model, inputs)
            with attach(model, method, samples if S_or_none == S else None, options) as routers:
                if repetition == 0 or clock.cuda:
                    one_pass(clock, model, inputs, routers)
                total, inside = one_pass(clock, model, inputs, routers)
            seen[label].append((total / plain - 1, inside / (total - inside)))
            plain_ms.append(1e3 * plain)
    rows = []
    for label, pairs in seen.items():
        ratios = sorted(r for r, _ in pairs)
        quarter = (len(ratios) - 1) // 4
        rows.append({"method": label, "width": width, "plain_ms": statistics.median(plain_ms), "repetitions": repetitions,
                     "latency": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                     "routers": None if clock.cuda else statistics.median(share for _, share in pairs)})
    return rows


def show(report: dict) -> str:
    """The report as text."""
    tokens, setting = " x ".join(map(str, report["batch"])), ", ".join(report[k] for k in ("device", "dtype"))
    lines = [f"{tokens} tokens, S = {report['samples']}, {setting}, {report['threads']} thread(s)"]
    for width in dict.fromkeys(r["width"] for r in report["latency"]):
        rows = [r for r in report["latency"] if r["width"] == width]
        lines += ["", f"width {width}: the plain model takes {rows[0]['plain_ms']:.0f} ms",
                  f"{'':32}{'latency':>9}{'quartiles':>18}{'routers':>10}"]
        for r in rows:
            low, high = r["quartiles"]
            own = "" if r["routers"] is None else f"{100 * r['routers']:+9.1f}%"
            lines.append(f"{r['method']:32}{100 * r['latency']:+8.1f}%{100 * low:+9.1f}%{100 * high:+7.1f}% {own}")
    columns = [f"{quantity}_{where}" for where in ("all", "subset") for quantity in ("flops", "parameters", "stored")]
    for model in dict.fromkeys(r["model"] for r in report["cost"]):
        rows = [r for r in report["cost"] if r["model"] == model]
        lines += ["", f"{model}: added, percent of the model, by count",
                  f"{'':32}{'on all %d MoE layers' % rows[0]['layers']:^27}{'on %d of them' % rows[0]['subset']:^27}",
                  f"{'':32}" + f"{'FLOPs':>9}{'trained':>9}{'stored':>9}" * 2]
        lines += [f"{r['method']:32}" + "".join(f"{r[c]:9.2f}" for c in columns) for r in rows]
        trunks = ", ".join(f"{method} {width}" for method, width in report["trunks_under_1%"][model].items())
        lines.append(f"widest trunk under 1% of the FLOPs on all layers: {trunks}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[768])
    parser.add_argument("--repetitions", type=int, default=3, help="at the first width; half as many, rounded up, at others")
    parser.add_argument("--samples", type=int, default=35)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    add_out(parser, "router_latency")
    for name, default in [("batch", 16), ("length", 48), ("layers", 4), ("experts", 16), ("top-k", 4), ("heads", 8)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--expert-width", type=int, default=None, help="11/16 of the width, a multiple of 8, unless given")
    o = parser.parse_args(argv)
    torch.set_num_threads(o.threads)
    clock = Clock(o.device, o.threads)
    trunks = {model: {m: costs.trunk_under(0.01, m, model) for m in ("mfvr", "fcvr", "vtsr")} for model in costs.SHAPES}
    report = {"device": o.device, "dtype": o.dtype, "threads": o.threads, "batch": [o.batch, o.length],
              "samples": o.samples, "latency": [], "cost": costs.cost_table(), "trunks_under_1%": trunks}
    for i, width in enumerate(o.widths):
        report["latency"] += measure(
            width, o.repetitions if i == 0 else -(-o.repetitions // 2), o.samples, batch=(o.batch, o.length), clock=clock,
            device=o.device, dtype=getattr(torch, o.dtype), layers=o.layers, experts=o.experts, top_k=o.top_k, heads=o.heads,
            expert_width=o.expert_width or max(8, 11 * width // 128 * 8))
    write(o.out, "router_latency", report, device=o.device, argv=argv)
    print(show(report))
    return report


if __name__ == "__main__":
    main()
