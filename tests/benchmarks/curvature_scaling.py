"""How the curvature's own cost grows, beside the passes through the model: time and memory of one layer against tokens, experts,
rank and width, with log-log slopes; and the low-rank sketch against an incremental SVD in time and in the trace that it misses.

    python tests/benchmarks/curvature_scaling.py [--device cuda] [--repeats 3] [--out scaling.json]
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from common import add_out, timed, write
from torch import Tensor

from bmoe_utils.experts.jacobians import Routes
from bmoe_utils.experts.sketch import Sketch
from bmoe_utils.experts.sums import KronSums, first_sums

BASE = {"tokens": 800, "experts": 16, "rank": 64, "width": 512}
AXES = {"tokens": (200, 400, 800, 1600), "experts": (8, 16, 32, 64), "rank": (16, 32, 64, 128), "width": (128, 256, 512, 1024)}
ITEMS, TOP_K, C = 8, 4, 4


def layer(size: dict, device: str) -> tuple[Tensor, list[Tensor], Routes]:
    """``a, g, routes`` of one batch: random slots whose energies fall like 1/i; an expert's width is 11/16 of the model's."""
    g = torch.Generator(device).manual_seed(0)
    d, f, S = size["width"], size["width"] * 11 // 16, size["tokens"] * TOP_K
    falling = lambda rows, m: torch.randn(rows, m, device=device, generator=g) / torch.arange(1, m + 1, device=device).sqrt()  # noqa: E731
    expert = torch.randint(0, size["experts"], (S,), device=device, generator=g).sort().values
    item = torch.randint(0, ITEMS, (S,), device=device, generator=g)
    return falling(S, f), [falling(S, d) for _ in range(C)], Routes(item, torch.bincount(expert, minlength=size["experts"]), ITEMS)


def sums_of(size: dict, rank: int | None, a: Tensor, columns: list[Tensor]) -> KronSums:
    options = {"hessian_structure": "kron", "token_setting": "expand", "rank": rank, "seed": 0}
    return first_sums(options, (size["experts"], columns[0].shape[1], a.shape[1]), a)


def add(sums: KronSums, a: Tensor, columns: list[Tensor], routes: Routes) -> None:
    """One batch of an exact Fisher."""
    sums.open(a, torch.linalg.vecdot(a, a), routes)
    for g in columns[: C - 1]:
        sums.column(g, torch.linalg.vecdot(g, g))
    sums.close()


def costs(size: dict, device: str, repeats: int) -> dict:
    a, columns, routes = layer(size, device)
    row = dict(size)
    for name, rank in (("low rank", size["rank"]), ("full", None)):
        sums = sums_of(size, rank, a, columns)
        add(sums, a, columns, routes)
        if rank is not None:
            for sketch in (sums.A, sums.G):
                sketch.progress[1] = math.inf  # restarts come with the data seen, not with a batch
        row[f"fit, {name}, s"] = statistics.median(timed(device, lambda: add(sums, a, columns, routes)) for _ in range(repeats))
        row[f"fit, {name}, bytes"] = sum(t.numel() * t.element_size() for t in sums.state().values())
        posterior, precision = sums.finish(), torch.ones(size["experts"])
        row[f"predict, {name}, s"] = statistics.median(
            timed(device, lambda: posterior.covariance(a, columns, routes, precision)) for _ in range(repeats))
        row[f"posterior, {name}, bytes"] = sum(t.numel() * t.element_size() for t in posterior.tensors().values())
    return row


def slope(x: list[float], y: list[float]) -> float:
    """Least squares of ``log y`` on ``log x``."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def against_svd(device: str, batches: int = 20, rows: int = 200, width: int = 512, rank: int = 64) -> dict:
    """One expert's factor, ``batches`` of ``rows`` samples whose energies fall like ``i^-decay`` in a random basis."""
    out = {}
    for decay in (0.5, 1.0, 2.0):
        g = torch.Generator().manual_seed(0)
        mix = torch.linalg.qr(torch.randn(width, width, generator=g)).Q * torch.arange(1, width + 1) ** (-decay / 2)
        data = [(torch.randn(rows, width, generator=g) @ mix.mT).to(device) for _ in range(batches)]
        values = torch.linalg.eigvalsh(sum(x.double().mT @ x.double() for x in data))
        sketch = Sketch(1, width, rank, 0, data[0][:0])
        routes, kept = Routes(torch.zeros(rows, dtype=torch.long), torch.tensor([rows]), 1), []

        def by_sketch():
            for x in data:
                sketch.add(x, routes)
                sketch.close()
            kept.append(sketch.eigen()[0].double().sum())

        def by_svd():
            B = data[0][:0].mT
            for x in data:
                U, s, _ = torch.linalg.svd(torch.cat([B, x.mT], 1), full_matrices=False)
                B = (U * s)[:, :rank]
            kept.append(B.double().square().sum())

        seconds = [timed(device, run) for run in (by_sketch, by_svd)]
        best = values[:-rank].sum()
        missed = [float((values.sum() - k) / best) for k in kept]
        out[f"decay {decay}"] = dict(zip(("sketch, s", "svd, s", "sketch, missed / best", "svd, missed / best"), (*seconds, *missed)))
    return out


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser, "curvature_scaling")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {"base": BASE, "axes": {}, "slopes": {}}
    for axis, values in AXES.items():
        rows = result["axes"][axis] = [costs(BASE | {axis: value}, args.device, args.repeats) for value in values]
        measured = [key for key in rows[0] if key not in BASE]
        result["slopes"][axis] = {key: slope(list(values), [row[key] for row in rows]) for key in measured}
    width = max(map(len, measured))
    print(f"{'log-log slope against':{width}}  " + "  ".join(f"{axis:>8}" for axis in AXES))
    for key in measured:
        print(f"{key:{width}}  " + "  ".join(f"{result['slopes'][axis][key]:8.2f}" for axis in AXES))
    result["against an incremental SVD"] = against_svd(args.device)
    for name, row in result["against an incremental SVD"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    write(args.out, "curvature_scaling", result, device=args.device, argv=argv)
    return result


if __name__ == "__main__":
    main()
