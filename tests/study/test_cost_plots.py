"""What the cost chapter's figures draw is what they were given; the benchmarks' own arithmetic, and their files."""

import json
import math

import pytest
import torch

from bmoe_utils.study.plots import METHODS, Style, cost_plots

A, B = Style("A", "red", "o"), Style("B", "blue", "s")


@pytest.fixture
def benchmarks(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "benchmarks"))


def test_ratios_ranges_and_targets(ax):
    cost_plots.against_floor({"fit": ([(A, 1.1, 1.0, 1.3), (B, None, None, None)], 1.05), "predict": [(A, 20.0, None, None)]}, ax, log=True)
    assert [c.lines[0].get_xdata()[0] for c in ax.containers] == [1.1, 20.0]
    assert ax.containers[0][2][0].get_segments()[0][:, 0].tolist() == pytest.approx([1.0, 1.3])
    assert [1.05, 1.05] in [segment[:, 0].tolist() for c in ax.collections for segment in c.get_segments()]  # the target
    assert [t.get_text() for t in ax.texts] == ["1.10", "20"] and ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["A", "Target", "Floor"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["fit", "predict"]


def test_excess_stacks_both_ways_and_marks_the_sum(ax):
    cost_plots.excess({"fit": {"products": 0.10, "other": 0.05, "sorting slots": -0.02}}, ax)
    widths = [p.get_width() for p in ax.patches if p.get_width()]
    assert sorted(widths) == pytest.approx([-2, 5, 10])
    assert [p.get_x() for p in ax.patches if p.get_width() == pytest.approx(5)] == pytest.approx([10])
    assert ax.lines[0].get_xdata()[0] == pytest.approx(13)


def test_slopes_stand_in_the_figure(ax):
    cost_plots.scaling([1, 10, 100], {"full": (A, [1, 10, 100], 1.0)}, ax, xlabel="tokens")
    assert ax.get_legend().get_texts()[0].get_text() == "full: slope 1.00" and ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "10", "100"]


def test_errors_against_times(ax):
    cost_plots.error_against_time({"kron": (A, 1.5, 0.2)}, ax, ladder={"low rank": (B, [1.1, 1.2], [0.4, 0.3], ["4", "8"])},
                                  reference=("none", 0.7))
    ladder, point, line = ax.lines
    assert ladder.get_xdata().tolist() == [1.1, 1.2] and point.get_ydata()[0] == 0.2 and line.get_ydata()[0] == 0.7
    assert [t.get_text() for t in ax.texts] == ["4", "8"]


def test_paired_bars(ax):
    cost_plots.paired_bars(["a", "b"], {"sketch": ("red", [1.0, 2.0]), "svd": ("blue", [3.0, 4.0])}, ax)
    assert [p.get_height() for p in ax.patches] == [1.0, 2.0, 3.0, 4.0] and [t.get_text() for t in ax.texts] == ["1.00", "2.00", "3.00", "4.00"]


def test_close_colours_differ_in_their_marker():
    looks = list(cost_plots.LIBRARIES.values())
    assert len({(s.colour, s.marker) for s in looks}) == len({s.marker for s in looks}) == len(looks)
    assert all(s.colour != METHODS["temperature"].colour for s in looks)


# ---- the benchmarks -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("separate", [False, True])
def test_a_floor_is_its_backward_passes_to_every_layer(benchmarks, monkeypatch, separate):
    import curvature_floor
    import peers
    from test_unfused import unfused
    from tiny import tiny_batch, tiny_model

    from bmoe_utils.experts.capture import capturing
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda f, zs, *rest, **how: calls.append([tuple(z.shape) for z in zs]) or grad(f, zs, *rest, **how))
    batch = tiny_batch(3, length=6, ragged=False)
    model = unfused(tiny_model(), "sorted", peers.NAMES["down"]) if separate else tiny_model()
    with capturing(model):
        run = peers.floor_of(model) if separate else lambda b, K: curvature_floor.floor(model, b, K)
        run(batch, 3)
    assert len(calls) == 3
    for shapes in calls:  # 3 items x 6 tokens x top 2, in each of two layers
        assert {s[-1] for s in shapes} == {16} and sum(s[0] for s in shapes) == 2 * 36 and (separate or len(shapes) == 2)


def test_a_benchmark_writes_its_conditions_and_targets(benchmarks, tmp_path, capsys):
    import curvature_floor
    import targets
    out = tmp_path / "floor.json"
    tiny = "--d 32 --f 24 --experts 4 --layers 2 --top-k 2 --rank 4 --rounds 1 --batch 2 --architecture olmoe --threads 1 --no-profile"
    curvature_floor.main([*tiny.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["command"].startswith("python tests/benchmarks/curvature_floor.py --d 32") and str(tmp_path) not in out.read_text()
    assert {"device", "cores", "threads"} <= set(report["machine"]) and report["versions"]["torch"] == torch.__version__
    rows = report["architectures"]["olmoe"]["rows"]
    assert sum("target" in row for row in rows.values()) == 6 and all(math.isfinite(row["seconds_per_batch"]) for row in rows.values())
    listed = targets.rows_of(report)
    assert len(listed) == 10 and all(measured > 0 for _, measured, _ in listed)
    whole = next(m for what, m, _ in listed if what == "olmoe: fit, exact, rank 4, time")
    assert whole == rows["fit, exact, rank 4"]["ratio_of_a_whole_fit"] >= rows["fit, exact, rank 4"]["ratio"]


def test_an_operations_own_time_leaves_out_those_within_it(benchmarks):
    from curvature_floor import own_times
    events = [("aten::b", 50, 20), ("aten::a", 0, 100), ("aten::b", 10, 30), ("c", 12, 5), ("aten::a", 100, 7)]
    assert own_times([(name, start * 10**6, length * 10**6) for name, start, length in events]) == {"a": [50, 7], "b": [25, 20], "c": [5]}


def test_a_batch_counts_its_least_try_and_slow_rows_are_tried_once(benchmarks, monkeypatch):
    import common
    seconds = {"short": iter([3.0, 1.0, 5.0, 2.0]), "slow": iter([9.0, 8.0])}
    monkeypatch.setattr(common, "timed", lambda device, run: next(seconds[run()]))
    assert common.in_turn("cpu", {name: lambda batch, name=name: name for name in seconds}, [{}, {}], 2, slow=6.0) == {"short": [1.0, 2.0], "slow": [9.0, 8.0]}


def test_frobenius_distances_are_those_of_the_dense_matrices(benchmarks):
    from accuracy_and_time import frobenius
    from tiny import tiny_batch, tiny_model

    import bmoe_utils as bm
    model, batches = tiny_model(), [tiny_batch(6, seed=s) for s in range(3)]
    dense = bm.ExpertLaplace(model, hessian_structure="full").fit(batches, progress=False)
    distance = {}
    for structure in ("kron", "ekfac", "diag"):
        la = bm.ExpertLaplace(model, hessian_structure=structure).fit(batches, progress=False)
        gap = whole = 0.0
        for p, blocks in zip(la.posteriors, dense.posteriors, strict=True):
            for e, (h, V) in enumerate(zip(blocks.values, blocks.vectors, strict=True)):
                U = torch.eye(len(V), dtype=torch.float64) if p.basis_a is None else torch.kron(p.basis_g[e], p.basis_a[e])
                gap += float(((U * p.eigenvalues[e].flatten()) @ U.mT - (V * h) @ V.mT).square().sum())
                whole += float(h.square().sum())
        distance[structure] = frobenius(la, dense)
        assert distance[structure] == pytest.approx((gap / whole) ** 0.5, rel=1e-9)
    assert distance["ekfac"] <= distance["kron"]


def test_the_large_shapes_run_small_and_refuse_without_a_gpu(benchmarks, capsys, monkeypatch):
    import gpu_shapes
    report = gpu_shapes.main(["--tiny"])
    for name in gpu_shapes.MODELS:
        row = report["models"][name]
        assert row["experts"] == 16 and row["fit_seconds"] > 0 and row["peak_gb"] is None and 0 < row["captured_energy"] <= 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="CUDA"):
        gpu_shapes.main([])


def test_the_committed_figures_say_what_they_hold_under(root):
    folder = root / "data" / "bench"
    for path in folder.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        assert report["benchmark"] == path.stem and f"tests/benchmarks/{path.stem}.py" in report["command"]
        assert all(report[k] for k in ("date", "machine", "clock", "versions"))
