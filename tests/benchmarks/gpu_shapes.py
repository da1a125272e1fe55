"""The papers' models at their real shapes on one GPU: a fit of every expert and predictions, in time and in memory.

Random bf16 weights, built on the device from the published configurations (``bmoe_utils.routers.costs.SHAPES``); 1,000 items of 64 to 128
tokens, the exact Fisher (C - 1 = 3 columns), rank 64, all layers; then 500 items predicted. Beside each stands

    the measured floor      forward + 3 (prediction: 4) backward passes to the experts' outputs over as many items
    the floor by bytes      every weight that the passes use read once a pass and batch, at the bandwidth measured by a copy
    the floor by FLOPs      their matrix products, at the rate measured on one large product

Options are single tokens, so of the vocabulary's head four rows are read, as in the study. Without CUDA it says so and stops;
``--tiny`` runs every line on small shapes on the CPU and writes nothing unless ``--out`` is given.

    python tests/benchmarks/gpu_shapes.py [--model Qwen1.5-MoE-A2.7B] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from common import FOLDER, C, batches, synchronise, timed, write
from curvature_floor import floor
from transformers import AutoConfig, AutoModelForCausalLM

import bmoe_utils as bm
from bmoe_utils.experts.capture import capturing
from bmoe_utils.models import deepseek
from bmoe_utils.routers import costs

MODELS = ("Qwen1.5-MoE-A2.7B", "deepseek-moe-16b")
# Seconds and bytes; of the second model no target was set.
TARGETS = {"Qwen1.5-MoE-A2.7B": {"fit_seconds": 20.0, "peak_gb": 38.0, "predict_seconds": 10.0}}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 48,
        "intermediate_size": 96, "vocab_size": 1000}
TINY_EXPERTS = {"qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 96},
                "deepseek": {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3}}


def config_of(name: str, tiny: bool) -> dict:
    shape = dict(costs.SHAPES[name])
    return shape | TINY | TINY_EXPERTS[shape["model_type"]] if tiny else shape


def build(shape: dict, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Random weights of the scale that training starts from, drawn on the device: a float32 copy on the host would be 57 GB."""
    deepseek.register()
    kind, fields = shape["model_type"], {k: v for k, v in shape.items() if k != "model_type"}
    config = AutoConfig.for_model(kind, **fields, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_bytes(model: torch.nn.Module) -> int:
    """Of the weights that a pass uses: all but the embedding's and the head's, of which a few rows are read."""
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in ends)


def bandwidth(device: str, megabytes: int) -> float:
    """Bytes a second that a copy reads; it writes as many."""
    x = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / statistics.median(timed(device, lambda: y.copy_(x)) for _ in range(10))


def rate(device: str, size: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large product."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    a @ b
    return 2 * size**3 / statistics.median(timed(device, lambda: a @ b) for _ in range(10))


def peak_of(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else None


def reset(device: str) -> None:
    synchronise(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def measure(name: str, args, device: str) -> dict:
    dtype = getattr(torch, args.dtype)
    shape = config_of(name, args.tiny)
    model = build(shape, device, dtype)
    vocabulary = shape["vocab_size"]
    fit_on = batches(-(-args.items // args.batch), args.batch, vocabulary=vocabulary)
    test = batches(-(-args.predict // args.batch), args.batch, vocabulary=vocabulary, seed=1)
    tokens = {k: sum(int(b["attention_mask"].sum()) for b in data) for k, data in (("fit", fit_on), ("predict", test))}
    slots = {k: sum(b["attention_mask"].numel() for b in data) for k, data in (("fit", fit_on), ("predict", test))}
    row = {"parameters": sum(p.numel() for p in model.parameters()), "weights_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
           "layers": costs.Shape.of(shape).moe_layers, "experts": costs.Shape.of(shape).moe_layers * costs.Shape.of(shape).experts,
           "fit_items": len(fit_on) * args.batch, "predict_items": len(test) * args.batch, "fit_tokens": tokens["fit"], "predict_tokens": tokens["predict"]}

    def floors(data, K, answer_only=()):
        with capturing(model):
            for batch in data:
                floor(model, batch, K, answer_only=answer_only)

    la = bm.ExpertLaplace(model, fisher="exact", rank=args.rank)
    floors(fit_on[:1], 1)  # kernels are chosen and compiled at their first call
    bm.ExpertLaplace(model, fisher="exact", rank=args.rank).fit(fit_on[:1], progress=False)
    reset(device)
    row["fit_floor_seconds"] = timed(device, lambda: floors(fit_on, C - 1))
    row["fit_floor_peak_gb"] = peak_of(device)
    reset(device)
    row["fit_seconds"] = timed(device, lambda: la.fit(fit_on, progress=False))
    row["peak_gb"] = peak_of(device)
    la.predictive_logits(test[0])
    reset(device)
    row["predict_floor_seconds"] = timed(device, lambda: floors(test, C, la.answer_only))
    row["predict_floor_peak_gb"] = peak_of(device)
    reset(device)
    row["predict_seconds"] = timed(device, lambda: [la.predictive_logits(batch) for batch in test])
    row["predict_peak_gb"] = peak_of(device)
    row["captured_energy"] = float(la.captured_energy.nanmean())
    row["posterior_gb"] = sum(t.numel() * t.element_size() for p in la.posteriors for t in p.tensors().values()) / 1e9
    row |= {"fit_ratio": row["fit_seconds"] / row["fit_floor_seconds"], "predict_ratio": row["predict_seconds"] / row["predict_floor_seconds"]}

    bytes_a_second, flops_a_second = bandwidth(device, 16 if args.tiny else 4096), rate(device, 256 if args.tiny else 8192, dtype)
    forward, weights = costs.model_flops(shape), read_bytes(model)
    # A backward to the experts' outputs has a product with every weight but the first layer's experts': as many as a forward, nearly.
    for what, data, passes in (("fit", fit_on, C), ("predict", test, C + 1)):
        row[f"{what}_bytes_floor_seconds"] = len(data) * passes * weights / bytes_a_second
        row[f"{what}_flops_floor_seconds"] = slots[what] * passes * forward / flops_a_second
    row |= {"bytes_per_second": bytes_a_second, "flops_per_second": flops_a_second}
    return row | ({} if args.tiny else {"targets": TARGETS.get(name, {})})


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: does every line run?")
    for name, default in (("items", 1000), ("predict", 500), ("batch", 20), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="where the figures go (data/bench/gpu_shapes.json; with --tiny nowhere)")
    args = parser.parse_args(argv)
    if args.tiny:
        device, args.items, args.predict, args.batch, args.rank = "cpu", 8, 8, 4, 8
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("error: these shapes need a CUDA device (about 40 GB), and torch finds none; --tiny tries the code on the CPU")
    else:
        device = "cuda"
    report = {"settings": {k: v for k, v in vars(args).items() if k != "out"}, "models": {}}
    for name in args.model:
        row = report["models"][name] = measure(name, args, device)
        print(f"\n{name}")
        for key, value in row.items():
            print(f"  {key:28} {value:.4g}" if isinstance(value, float) else f"  {key:28} {value}")
        if device == "cuda":
            torch.cuda.empty_cache()
    out = args.out or (None if args.tiny else FOLDER / "gpu_shapes.json")
    if out:
        write(out, "gpu_shapes", report, device=device, argv=argv)
    return report


if __name__ == "__main__":
    main()
