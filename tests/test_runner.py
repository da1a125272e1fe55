"""The runner on tiny notebooks: what is injected, what a failure says, where results go, what is resumed."""
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from tiny_notebooks import DRAW, PROFILES, notebook

from bmoe_utils import runner
from bmoe_utils.__main__ import main

@pytest.fixture(autouse=True)
def study(project, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)


def reproduce(*options):
    return main(["reproduce", "--jobs", "1", *options])


# ---------------------------------------------------------------- requests that name something unknown
@pytest.mark.parametrize("options, says", [
    (["--profile", "huge"], "unknown profile 'huge'; there are: smoke, cpu"),
    (["--profile", "cpu", "-p", "epoch=3"], "unknown parameter 'epoch'; profile cpu has: epochs, lr, seeds"),
    (["--profile", "cpu", "-p", "epochs"], "write key=value"),
    (["--profile", "cpu", "-p", "epochs=three"], "profile cpu has 9 there"),
    (["--profile", "cpu", "--only", "07"], "unknown chapter '07'; there are: 01_one"),
    (["--profile", "cpu", "--task", "./nowhere"], "--task './nowhere': no such file or folder"),
    (["--profile", "cpu", "--model", "/nowhere/model"], "--model '/nowhere/model': no such file or folder"),
])
def test_unknown_names_list_the_valid_ones(project, capsys, options, says):
    notebook(project, "01_one")
    assert reproduce(*options) == 2
    assert says in capsys.readouterr().err and not (project / "data").exists()


def test_no_notebooks_is_an_error(project, capsys):
    assert reproduce("--profile", "cpu") == 2 and "no notebooks" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        reproduce("--help")
    assert end.value.code == 0 and "--only 04" in capsys.readouterr().out


def test_list_and_profiles(project, capsys):
    notebook(project, "02_two"), notebook(project, "01_one")
    assert main(["list"]) == 0 == main(["profiles"])
    out = capsys.readouterr().out
    assert out.startswith("01  Title of 01_one\n    Claim. It runs alone.\n02  Title of 02_two\n") and "cpu\n    epochs = 9\n" in out


@pytest.mark.parametrize("request_", [["list"], ["profiles"], ["reproduce", "--profile", "cpu", "--dry-run"]])
def test_the_command_line_answers_without_torch(root, request_):
    code = f"import sys\nfrom bmoe_utils.__main__ import main\nassert main({request_}) == 0\nprint('torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "BMOE_ROOT"}
    said = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == "False", said.stderr


def test_values_are_json_or_text(monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: {"cpu": {"a": 1.0, "b": [1], "c": "x", "d": None}})
    given = ["a=2.5", "b=[1,2]", "c=kron", "d=a=b"]
    assert runner.overrides_of("cpu", given) == {"a": 2.5, "b": [1, 2], "c": "kron", "d": "a=b"}


# ---------------------------------------------------------------- where results go
def test_only_the_committed_run_writes_the_committed_figures(project):
    place = lambda *a, **k: runner.Plan.make(*a, **k).figures.relative_to(project).as_posix()
    (project / "my questions").mkdir()
    assert place("cpu") == place("cpu", "world") == "figures"
    assert place("smoke") == "data/runs/smoke/figures"
    assert place("cpu", "openbookqa") == "data/runs/cpu-openbookqa/figures"
    assert place("cpu", str(project / "my questions")) == "data/runs/cpu-my_questions/figures"
    assert place("cpu", model="org/granite-3b") == "data/runs/cpu-granite-3b/figures"
    assert place("cpu", overrides={"epochs": 2}).startswith("data/runs/cpu-set")
    assert place("cpu", out=project / "elsewhere") == "elsewhere/figures"


# ---------------------------------------------------------------- running
def test_run_injects_and_sums_up(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    (project / "questions").mkdir()
    notebook(project, "01_one", "import os\nassert os.path.basename(os.getcwd()) == 'notebooks'", DRAW)
    notebook(project, "02_two", "1 / 0")
    assert reproduce("--profile", "cpu", "--task", "questions", "-p", "epochs=2", "--seeds", "3", "4", "--only", "1", "--out", "result") == 0
    given = json.loads((project / "result/figures/01_given.json").read_text())
    assert given == {"profile": "cpu", "task": str(project / "questions"), "model": None, "overrides": {"epochs": 2, "seeds": [3, 4]}}
    assert "<html" in (project / "result/01_one.html").read_text() and nbformat.read(project / "result/01_one.ipynb", 4).cells
    (row,) = json.loads((project / "result/summary.json").read_text())["chapters"]
    assert row["chapter"] == "01_one" and row["status"] == "ok" and row["seconds"] > 0
    out = capsys.readouterr().out
    assert "[1/1] 01_one: Title of 01_one" in out and "figures and their numbers: result/figures/" in out and "total" in out
    assert "BMOE_FIGURES" not in os.environ


def test_failure_names_notebook_cell_and_error(project, capsys):
    notebook(project, "01_one", "\n".join(f"x{i} = {i}" for i in range(9)) + "\nraise ValueError('no posterior here')")
    notebook(project, "02_two", DRAW)
    assert reproduce("--profile", "smoke", "--no-html") == 1
    out = capsys.readouterr().out
    assert "FAILED 01_one.ipynb, cell " in out and "    | x0 = 0\n" in out and "    | ...\n" in out and "ValueError: no posterior here" in out
    executed = project / "data/runs/smoke/01_one.ipynb"
    assert str(executed) in out and "no posterior here" in executed.read_text() and not executed.with_suffix(".html").exists()
    assert [row["status"] for row in json.loads((executed.parent / "summary.json").read_text())["chapters"]] == ["FAILED", "not run"]
    assert "cell 3 (In [" in out                       # as counted in the notebook, where it is to be mended


def test_keep_going_runs_the_rest_and_still_fails(project, capsys):
    notebook(project, "01_one", "import os\nos._exit(1)")            # the kernel dies, as for want of memory
    notebook(project, "02_two", DRAW)
    notebook(project, "03_three", declared='profile = "smoke"\ntask = "world"')
    assert reproduce("--profile", "smoke", "--no-html", "--keep-going") == 1
    out = capsys.readouterr().out
    assert "FAILED 01_one.ipynb" in out and "Dead" in out and "02_two: ok" in out
    assert "its parameters cell does not declare model, overrides" in out and (project / "data/runs/smoke/figures/01_given.json").exists()


STORE = "from bmoe_utils.artefacts import Store, project_root\nlog = project_root() / 'built'\n" \
        "value = Store().json('answer', {}, lambda: log.open('a').write('x') and 42)\nassert value == 42"


def test_finished_artefacts_are_reused_unless_fresh(project):
    notebook(project, "01_one", STORE)
    built = lambda: len((project / "built").read_text())
    for options, expected in [([], 1), ([], 1), (["--fresh"], 2)]:
        assert reproduce("--profile", "smoke", "--no-html", *options) == 0 and built() == expected
    assert "BMOE_FRESH" not in os.environ


def test_interrupt_says_how_to_resume(project, root):
    """Ctrl-C in the middle of a build: exit 130, nothing half looks finished, and the same command completes."""
    notebook(project, "01_one", "1 + 1", """
import time
from bmoe_utils.artefacts import Store, project_root
started = project_root() / "started"
def build(path):
    (path / "half").write_text("x")
    print("step 3 of 9", flush=True)
    first = not started.exists()
    started.touch()
    time.sleep(60 * first)
Store().folder("model", {}, build)""")
    code = "import sys; from bmoe_utils import runner; from bmoe_utils.__main__ import main; " \
           f"runner.profiles = lambda: {PROFILES!r}; runner.HEARTBEAT_S = 0.2; sys.exit(main(['reproduce', '--profile', 'smoke', '--no-html', '--jobs', '1']))"
    command = [sys.executable, "-c", code]
    # a background job inherits "ignore Ctrl-C", and Python would then never be interrupted
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    limit = time.monotonic() + 60
    while not (project / "started").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(0.6)                                   # a heartbeat or two
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "01_one: interrupted" in out and "same command resumes" in out and "Traceback" not in out
    assert "cell 4 of 4: step 3 of 9" in out
    finished = lambda: [path.name for path in (project / "data" / "cache").glob("model-*")]
    assert not finished()
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished()) == 1 and not list((project / "data" / "cache").glob(".building-*"))
