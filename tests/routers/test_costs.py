"""Counted costs against torch's own counter and against real modules; the benchmark runs, whatever it measures."""

import json
import math

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bmoe_utils.routers import costs
from bmoe_utils.routers.attach import attach_routers
from bmoe_utils.routers.families import FAMILIES


def counted(run) -> int:
    """FLOPs of the matrix products in ``run()``, less those of the rotary embedding's table (positions times frequencies)."""
    with torch.no_grad(), FlopCounterMode(display=False, depth=4) as counter:
        run()
    tables = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(tables)


# ---- the model ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture, overrides", [
    ("qwen2_moe", {}), ("qwen2_moe", dict(mlp_only_layers=[0], intermediate_size=24, num_key_value_heads=1, num_experts_per_tok=3)),
    ("granitemoe", dict(num_key_value_heads=1)), ("granitemoe", dict(tie_word_embeddings=True)), ("olmoe", {}), ("mixtral", {}),
])
def test_a_models_count_is_torchs(architecture, overrides):
    model = tiny_model(architecture, **overrides)
    model.set_attn_implementation("eager")  # plain products: fused attention on the CPU is not counted
    ids, tokens = torch.randint(2, 50, (3, 7)), 21
    for head, run in [(False, lambda: model.model(ids)), (True, lambda: model(ids))]:
        assert counted(run) == tokens * costs.model_flops(model.config, context=7, head=head)
    assert costs.model_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_the_published_shapes_have_the_published_sizes():
    """Total parameters as the model cards give them, in billions; and what a config's other field names say of one model."""
    for name, billions in [("granite-3.x-3b-a800m", 3.3), ("Qwen1.5-MoE-A2.7B", 14.3), ("deepseek-moe-16b", 16.4)]:
        assert costs.model_parameters(name) / 1e9 == pytest.approx(billions, abs=0.05)
    as_qwen = costs.SHAPES["deepseek-moe-16b"] | {"model_type": "qwen2_moe", "num_experts": 64, "mlp_only_layers": [0],
                                                  "shared_expert_intermediate_size": 2816}
    gates = 2 * 2048 * 27  # Qwen's gate of the shared experts
    assert costs.model_flops(as_qwen) - gates == costs.model_flops("deepseek-moe-16b")
    with pytest.raises(ValueError, match="'llama' cannot be counted"):
        costs.model_flops({"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 4})
    with pytest.raises(ValueError, match="not one of granite"):
        costs.model_flops("gpt-5")


# ---- the routers ----------------------------------------------------------------------------------------------------
CASES = [
    ("deterministic", 7, {}), ("temperature", 7, {}), ("vtsr", 7, {}), ("vtsr", 7, dict(trunk=3, temperature_prior=(1.0, 0.5))),
    ("mfvr", 7, {}), ("mfvr", None, {}), ("fcvr", 7, {}), ("fcvr", 8, dict(trunk=5)), ("fcvr", None, {}), ("fcvr", 7, dict(rank=2)),
    ("fcvr", None, dict(rank=2)), ("laplace", 7, {}), ("laplace", None, {}), ("laplace", 7, dict(curvature_rank=3)),
    ("swag", 7, dict(rank=4)), ("swag", None, dict(rank=4)), ("ensemble", 7, dict(members=3)), ("mcdropout", 7, {}),
    ("mcdropout", 400, dict(mask="sample", dropout=0.3)),
]


@pytest.mark.parametrize("method, samples, options", CASES)
def test_a_routers_count_is_that_of_the_attached_one(method, samples, options):
    """What one more token costs, so that what a pass does once is out; the plain router's own product is taken off."""
    cost = costs.router_cost(method, 16, 4, samples=samples, **options)
    family_options = {k: v for k, v in options.items() if k != "curvature_rank"}
    with attach_routers(tiny_model("granitemoe"), method, layers=[0], num_samples=samples, **family_options) as routers:
        family, router = routers.families[0], routers._modules[0]
        if method == "laplace":
            rank = options.get("curvature_rank", 16)
            family.alpha, family.basis_a = torch.ones(rank).double(), torch.linalg.qr(torch.randn(16, 16).double())[0][:, :rank]
        if method == "swag":
            family.low_rank = torch.randn(4, 4, 16).double()
        assert cost.parameters == sum(p.numel() for p in routers.parameters())
        assert cost.stored == sum(t.numel() for t in family.state_dict().values())

        def run(tokens):
            routers._generators.clear()
            router(torch.randn(tokens, 16, dtype=torch.float64))

        more = counted(lambda: run(96)) - counted(lambda: run(32))
    got, dropout, tolerance = more / 64 - 2 * 16 * 4, 0.0, 0.0
    if method == "mcdropout":
        p, drawn = family.options["dropout"], samples * 16
        if family.options["mask"] == "token":
            dropout = 2 * p * drawn * 4  # an embedding bag's products, which the counter does not see
        else:
            tolerance = 2 * 4 * 5 * math.sqrt(drawn * p * (1 - p))  # its number of dropped inputs is a draw
    assert got == pytest.approx(cost.flops - dropout, rel=0, abs=tolerance + 1e-9)


def test_bad_counts_are_named():
    for arguments, message in [(dict(method="mcmc"), "'mfvr'"), (dict(method="mfvr", rank=3), "no option 'rank'"),
                               (dict(method="vtsr", samples=None), "no sample-free")]:
        with pytest.raises(ValueError, match=message):
            costs.router_cost(d=16, E=4, **arguments)
    for layers in (0, 28):
        with pytest.raises(ValueError, match=f"layers={layers}: the model has 27 layers with experts"):
            costs.added_share("deepseek-moe-16b", "mfvr", layers=layers)
        with pytest.raises(ValueError, match="27 layers with experts"):
            costs.trunk_under(0.01, "mfvr", "deepseek-moe-16b", layers=layers)


# ---- shares ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", list(costs.SHAPES))
@pytest.mark.parametrize("method, how", [("mfvr", {}), ("fcvr", {}), ("fcvr", {"samples": None}), ("fcvr", {"rank": 4}), ("vtsr", {})])
def test_the_widest_trunk_is_under_the_share_and_one_more_unit_is_not(model, method, how):
    for layers in (None, 5):
        widest = costs.trunk_under(0.01, method, model, layers=layers, **how)
        share = lambda t: costs.added_share(model, method, layers=layers, trunk=t, **how)["flops"]  # noqa: E731, B023
        assert share(widest) < 0.01 <= share(widest + 1)
    assert costs.trunk_under(1e-6, method, model, **how) is None


def test_what_a_trunk_of_a_quarter_of_the_width_costs():
    """The reports' "all variational routers under 1%" is no statement about every layer: see :func:`costs.cost_table`."""
    on_all = {(r["model"], r["method"]): r["flops_all"] for r in costs.cost_table()}
    assert min(on_all[m, w] for m in costs.SHAPES for w in ("MFVR", "FCVR", "VTSR")) > 1
    assert on_all["granite-3.x-3b-a800m", "FCVR"] == pytest.approx(3.7, abs=0.05)
    with pytest.raises(ValueError, match="no trunk"):
        costs.trunk_under(0.01, "swag", "deepseek-moe-16b")


def test_the_tables_rows_are_the_shares():
    rows = costs.cost_table(subset=40)
    assert len(rows) == len(costs.SHAPES) * len(costs.WAYS) and all(r["subset"] == r["layers"] for r in rows)
    row = next(r for r in costs.cost_table() if (r["model"], r["method"]) == ("Qwen1.5-MoE-A2.7B", "SWAG, sample-free"))
    share = costs.added_share("Qwen1.5-MoE-A2.7B", "swag", samples=None, layers=10)
    assert {k: row[f"{k}_subset"] for k in share} == {k: 100 * v for k, v in share.items()} and row["subset"] == 10
    assert set(FAMILIES) - {"deterministic"} == {way[1] for way in costs.WAYS}


# ---- the benchmark --------------------------------------------------------------------------------------------------
def test_the_latency_benchmark_runs_and_writes_its_numbers(root, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(root / "tests" / "benchmarks"))
    import router_latency
    out = tmp_path / "folder" / "latency.json"
    tiny = "--widths 16 --repetitions 2 --samples 3 --batch 2 --length 5 --layers 2 --experts 4 --top-k 2 --expert-width 8 --heads 2"
    router_latency.main([*tiny.split(), "--threads", str(torch.get_num_threads()), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["samples"] == 3 and report["device"] == "cpu" and report["dtype"] == "float32"
    rows = {r["method"]: r for r in report["latency"]}
    assert {w[1] for w in router_latency.WAYS} == set(FAMILIES) and set(rows) == {w[0] for w in router_latency.WAYS}
    for row in rows.values():
        assert row["width"] == 16 and row["plain_ms"] > 0 and row["repetitions"] == 2
        assert row["quartiles"][0] <= row["latency"] <= row["quartiles"][1] and math.isfinite(row["routers"])
    assert len(report["cost"]) == len(costs.SHAPES) * len(costs.WAYS) and report["trunks_under_1%"]["deepseek-moe-16b"]["vtsr"] > 1
    printed = capsys.readouterr().out
    assert all(label in printed for label in [*rows, *costs.SHAPES])
