"""The pages and results.json of a run, and the matrix of the papers' experiments: from the run's files, nothing invented."""
import csv
import io
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from tiny_notebooks import PROFILES, notebook

from bmoe_utils.__main__ import main
from bmoe_utils.routers import costs
from bmoe_utils.study.output import latex, save_result
from bmoe_utils.study.profiles import PROFILES as REAL
from bmoe_utils.study.run import matrix, runner, site
from bmoe_utils.study.tables import csv_text, harmless

SAVE = """
import matplotlib.pyplot as plt, pandas as pd
from bmoe_utils.study.output import save_figure, save_result
fig, ax = plt.subplots(figsize=(1, 1)); ax.plot([0, 1])
save_figure(fig, "01", "a_line", {"slope": 1 / 3})
save_result("01", "table", pd.DataFrame({"NLL ↓": ["1.2 ± .1"]}, index=pd.Index(["A & B"], name="method")))
save_result("01", "numbers", {"provenance": {"profile": profile}, "seeds": [0]})
"""


@pytest.fixture
def ran(project, root, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)
    (project / "data").mkdir()
    (project / "data" / "reported.json").write_text((root / "data" / "reported.json").read_text())
    notebook(project, "01_one", SAVE)
    assert main(["reproduce", "--profile", "smoke", "--jobs", "1"]) == 0
    return project / "data" / "runs" / "smoke"


def test_the_index_links_what_is_there(ran):
    page = (ran / "index.html").read_text()
    for target in ("01_one.html", "figures/01_a_line.png", "figures/01_a_line.json", "figures/01_table.csv", "figures/01_table.tex", "results.json"):
        assert f'"{target}"' in page and (ran / target).is_file(), target
    assert "<td>A &amp; B</td><td>1.2 ± .1</td>" in page and "not run" in page


def test_results_hold_every_number_and_its_provenance(ran):
    content = json.loads((ran / "results.json").read_text())
    assert content["run"]["profile"] == "smoke" and content["run"]["chapters"][0]["status"] == "ok"
    (one,) = content["chapters"].values()
    assert one["results"] == {"a_line.json": {"slope": 0.333333}, "table.csv": [{"method": "A & B", "NLL ↓": "1.2 ± .1"}],
                              "numbers.json": {"provenance": {"profile": "smoke"}, "seeds": [0]}}


@pytest.mark.parametrize("name, content", [("02_cut.json", b'{"nll": 0.'), ("02_nested.json", b"[" * 100_000), ("02_bytes.json", b"\xff\xfe{}"),
                                           ("02_bytes.csv", b"a,b\n\xff,1\n")])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, capsys, name, content):
    (tmp_path / "01_table.json").write_text('{"nll": 0.5}')
    (tmp_path / name).write_bytes(content)
    assert site.results(tmp_path) == {"01": {"table.json": {"nll": 0.5}}}
    said = capsys.readouterr().err
    assert said.startswith(str(tmp_path / name)) and said.endswith("run chapter 02 again\n") and said.count("\n") == 1


def test_the_committed_figures_are_copied_not_moved(project, ran):
    elsewhere = project / "elsewhere"
    (ran / "figures").rename(elsewhere)
    summary = runner.summary_of(runner.Plan.make("smoke"))
    site.build(ran, elsewhere, runner.chapters(), summary)
    assert (ran / "figures" / "01_a_line.png").is_file() and (elsewhere / "01_a_line.png").is_file()
    # what lies there beside the copies stays, and is not shown
    for foreign in ("mine.txt", "01_mine.png"):
        (ran / "figures" / foreign).write_text("mine")
    site.build(ran, elsewhere, runner.chapters(), summary)
    assert (ran / "figures" / "mine.txt").read_text() == "mine" == (ran / "figures" / "01_mine.png").read_text()
    assert "mine" not in (ran / "index.html").read_text()


def test_latex_compiles_by_eye():
    text = latex(pd.DataFrame({"ECE ↓": ["0.1 ± .0"], "x_y": [0.5]}, index=pd.Index(["A & B"], name="method")))
    assert r"method & ECE $\downarrow$ & x\_y" in text and r"A \& B & 0.1 $\pm$ .0 & 0.5" in text
    plt.close("all")


# ---------------------------------------------------------------- the matrix
def test_dry_run_names_every_cell_and_runs_none(project, capsys, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: REAL)
    notebook(project, "11_all")
    assert main(["reproduce", "--profile", "paper", "--dry-run"]) == 0
    out = capsys.readouterr().out
    number = len(matrix.MODELS) * len(matrix.TASKS) * len(REAL["paper"]["methods"]) * len(REAL["paper"]["seeds"])
    assert f"{number} cells" in out and not (project / "data" / "runs").exists()
    for name in (*matrix.MODELS, *matrix.TASKS, *REAL["paper"]["methods"]):
        assert name in out


def test_dry_run_of_the_rest_lists_chapters(project, capsys, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)
    notebook(project, "01_one")
    assert main(["reproduce", "--profile", "cpu", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("01_one\n") and not (project / "figures").exists()


def test_estimates_scale_as_the_work_does():
    settings = REAL["paper"]
    cell = lambda method, model="Qwen/Qwen1.5-MoE-A2.7B": matrix.Cell(model, "openbookqa", method, 0)
    rates = dict.fromkeys(matrix.MODELS, 1e-5)
    options, tokens = matrix.TASKS["openbookqa"]
    per_item = tokens * 1e-5
    assert matrix.estimate(cell("laplace_kron"), settings, rates).seconds == pytest.approx(
        per_item * (settings["train_size"] * options + settings["router_items"] * (1 + options)))
    assert matrix.estimate(cell("ensemble"), settings, rates).seconds > matrix.estimate(cell("map"), settings, rates).seconds
    # the floor: no faster than reading every weight once a batch, nor than the arithmetic
    weights = 2 * costs.model_parameters(costs.SHAPES["Qwen1.5-MoE-A2.7B"])
    floor = matrix.estimate(cell("temperature"), settings).seconds
    items = matrix.passes("temperature", settings, options)
    assert floor >= items * weights / matrix.BANDWIDTH / settings["router_batch"]
    assert floor >= items * tokens * costs.model_flops(costs.SHAPES["Qwen1.5-MoE-A2.7B"], context=tokens) / matrix.PEAK_FLOPS
    assert matrix.estimate(cell("laplace_kron"), settings).gib > weights / 2**30


def test_a_measured_rate_is_that_of_a_token_and_pass(tmp_path):
    name = "Qwen1.5-MoE-A2.7B"
    tokens, passes, peak = 1000, 4, 5e14
    row = {"fit_floor_seconds": 2.0, "fit_flops_floor_seconds": tokens * passes * costs.model_flops(name) / peak, "flops_per_second": peak}
    (tmp_path / "gpu.json").write_text(json.dumps({"models": {name: row}}))
    assert matrix.measured_rates(tmp_path / "gpu.json") == {"Qwen/Qwen1.5-MoE-A2.7B": pytest.approx(2.0 / (tokens * passes))}
    assert matrix.measured_rates(tmp_path / "none.json") == {}
    for damaged in ("[]", "{}", '{"models": 1}', '{"models": {"%s": {}}}' % name, '{"models": {"%s": 3}}' % name, "{"):
        (tmp_path / "bad.json").write_text(damaged)
        assert matrix.measured_rates(tmp_path / "bad.json") == {}


def test_a_plan_without_a_number_of_questions_has_no_cost(project, capsys, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: REAL)
    notebook(project, "11_all")
    assert main(["reproduce", "--profile", "paper", "--dry-run", "-p", "train_size=null"]) == 2
    assert "give -p train_size=N" in capsys.readouterr().err
    assert main(["reproduce", "--profile", "paper", "--dry-run", "-p", "router_batch=0"]) == 0


def test_a_damaged_file_of_reports_costs_no_run(project, capsys, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)
    monkeypatch.setattr(runner, "_execute", lambda *_: None)
    (project / "data").mkdir()
    (project / "data" / "reported.json").write_text("{")
    notebook(project, "01_one")
    assert main(["reproduce", "--profile", "smoke", "--jobs", "1"]) == 0
    assert "no index page, JSONDecodeError" in capsys.readouterr().out


def test_reported_beside_what_was_run(project, root):
    folder = project / "data" / "runs"
    (project / "data").mkdir()
    assert matrix.reported() == []
    (project / "data" / "reported.json").write_text((root / "data" / "reported.json").read_text())
    assert {row["reproduced"] for row in matrix.reported()} == {"not run"}
    for seed, value in ((0, 0.02), (1, 0.04)):
        run = folder / f"sweep-{seed}" / "figures"
        run.mkdir(parents=True)
        (run / "11_numbers.json").write_text(json.dumps({"model": "Qwen/Qwen1.5-MoE-A2.7B", "task": "openbookqa", "seeds": [seed],
                                                         "methods": {"router_mfvr": [{"ece": value}]}}))
    (folder / "old" / "figures").mkdir(parents=True)
    (folder / "old" / "figures" / "11_numbers.json").write_text("[]")
    said = {row["reproduced"] for row in matrix.reported() if (row["model"], row["method"]) == ("Qwen/Qwen1.5-MoE-A2.7B", "router_mfvr")}
    assert said == {"0.030 (2 seeds)"}


# ---------------------------------------------------------------- tables for spreadsheet programs
@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "+cmd", "-x", "\t=1", "\r=1", "\n=1", "＝1", "-1+cmd|' /C calc'!A0", "-1+2", "+A1", "--1", "-=1"])
def test_text_that_is_a_formula_gets_an_apostrophe(text):
    frame = pd.DataFrame({text: [text, "plain"]}, index=pd.Index([text, "b"], name=text))
    read = list(csv.reader(io.StringIO(csv_text(frame, index=True), newline="")))
    assert read == [[f"'{text}"] * 2, [f"'{text}"] * 2, ["b", "plain"]]


@pytest.mark.parametrize("text", ["-0.5", "+3", "-inf", "+nan", "-3e-04", "-.5", "-0.012 ± .003", "-0.5 [-0.7, -0.1]*", "-", "", "a=b", "A & B, \"c\""])
def test_numbers_and_other_text_stay_as_they_are(text):
    assert harmless(text) == text


def test_numbers_of_every_kind_are_written_as_before():
    frame = pd.DataFrame({"f": [-1 / 3, float("-inf"), float("nan")], "i": [-1, 0, 2], "t": ["a,b", 'q"', "l\nm"], "o": [None, -2.0, "x"]})
    assert csv_text(frame, index=False) == frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def test_no_committed_table_has_a_formula(root):
    tables = [*root.glob("figures/*.csv"), *root.glob("data/sweeps/*.csv")]
    cells = [cell for path in tables for row in csv.reader(path.open(newline="", encoding="utf-8")) for cell in row]
    assert len(cells) > 1000 and [cell for cell in cells if harmless(cell) != cell] == []


def test_what_a_chapter_saves_is_harmless(project, monkeypatch):
    monkeypatch.setenv("BMOE_FIGURES", str(project / "figures"))
    path = save_result("01", "table", pd.DataFrame({"answer": ["=HYPERLINK(1)"], "gain": [-0.25]}))
    assert path.read_text() == "answer,gain\n'=HYPERLINK(1),-0.25\n"
