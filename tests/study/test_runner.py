"""The runner on tiny notebooks: what is injected, what a failure says, where results go, what is resumed."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from tiny_notebooks import DRAW, PROFILES, notebook

from bmoe_utils.__main__ import main
from bmoe_utils.study.run import places, runner, sweep


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


DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize("options, says", [
    (["-p", "epochs=NaN"], "NaN is no value of a setting"), (["-p", "lr=1e999"], "numbers are finite"), (["-p", "epochs=-1"], "not negative"),
    (["-p", f"epochs={LONG}"], "(5002 characters)"), (["-p", f"epochs={LONG[:400]}"], "below 2**63"), (["-p", f"epochs={DEEP}"], "nested too deeply"),
    (["-p", 'epochs={"a": {"b": 1}}'], "profile cpu has 9 there"), (["-p", "epochs=[1]"], "profile cpu has 9 there"),
    (["-p", "epochs=true"], "profile cpu has 9 there"), (["-p", "epochs=2.5"], "profile cpu has 9 there"), (["-p", "epochs=null"], "profile cpu has 9 there"),
    (["-p", "seeds=[[0]]"], "a list of values of that kind"), (["-p", "seeds=[]"], "at least one"), (["-p", "seeds=[NaN]"], "NaN is no value"),
    (["-p", "seeds=[0,0]"], "each given once"), (["--seeds", "0", "0"], "each given once"), (["--seeds", "4294967296"], "below 2**32"),
    (["--seeds", "1", "-p", "seeds=[2]"], "given twice"), (["-p", "epochs=1", "epochs=2"], "given twice"),
    (["-p", "name=\udcff"], "no Unicode text"), (["-p", "parts={}"], "at least one"),
    (["--only", "²"], "unknown chapter '²'"), (["--only", ""], "unknown chapter ''"), (["--only", LONG], "(5002 characters)"),
    (["--task", ""], "--task: give a name"), (["--model", " "], "--model: give a name"), (["--task", "a" * 300 + ".csv"], "name too long"),
    (["--model", "~nobody_here/m"], "home directory"), (["--task", "./lo\0op"], "null byte"), (["--task", "\udcff"], "no Unicode text"),
])
def test_what_cannot_be_meant_is_said_in_one_line(project, capsys, monkeypatch, options, says):
    monkeypatch.setattr(runner, "profiles", lambda: {"cpu": PROFILES["cpu"] | {"name": "x", "parts": {"a": 1}}})
    notebook(project, "01_one")
    assert reproduce("--profile", "cpu", "--dry-run", *options) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 400 and not (project / "data").exists()


@pytest.mark.parametrize("options", [["--jobs", "²"], ["--jobs", "0"], ["--jobs", LONG], ["--seeds", "²"], ["--seeds", LONG]])
def test_what_is_no_number_is_said_in_one_line(project, capsys, options):
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "--profile", "cpu", *options])
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()[-1]) < 200


def test_what_can_be_meant_is_taken(monkeypatch):
    known = {"cpu": {"size": 9, "map": None, "device_map": None, "regimes": {"a": {}}}, "gpu": {"size": None, "map": 1.0, "device_map": "auto", "regimes": {}}}
    monkeypatch.setattr(runner, "profiles", lambda: known)
    given = ["size=null", "map=3", 'device_map={"": 0}', 'regimes={"b": {"size": 2}}']        # of a kind that another profile has
    assert runner.overrides_of("cpu", given) == {"size": None, "map": 3, "device_map": {"": 0}, "regimes": {"b": {"size": 2}}}
    for regimes in ('{"b": {"size": "x"}}', '{"b": {"sise": 2}}', '{"b": 2}'):
        with pytest.raises(runner.UsageError, match="regimes"):
            runner.overrides_of("cpu", [f"regimes={regimes}"])
    chapters = [runner.Chapter(f"{number}_name.ipynb", "", "") for number in ("04", "40")]
    assert [c.number for name in ("4", "04", "004") for c in runner.select(chapters, [name])] == ["04"] * 3


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


@pytest.fixture
def used(project):
    """A project with files of the user's and the study's; gives what it holds."""
    notebook(project, "01_one", DRAW)
    for folder in ("figures", "tests", ".git", "bmoe_utils", "data/cache", "mine", "mine/figures", "pictures/figures", "linked"):
        (project / folder).mkdir(parents=True)
    for file in ("figures/01_given.json", "mine/01_one.ipynb", "pictures/figures/01_given.json", "file", "sweep.csv", "mine/results.csv"):
        (project / file).write_text("mine")
    (project / "link").symlink_to(project / "notebooks")
    (project / "linked/figures").symlink_to(project / "figures")
    return lambda: {path.relative_to(project): path.read_bytes() if path.is_file() else None for path in project.rglob("*")}


@pytest.mark.parametrize("out, says", [
    (".", "holds the study itself"), ("..", "holds the study itself"), ("/", "holds the study itself"),
    *((place, "place of the study's own") for place in ("notebooks", "figures", "figures/new", "tests/x", ".git", "bmoe_utils", "data", "data/cache/x",
                                                        "data/runs", "link", "link/x", "mine/../notebooks", "linked")),
    ("mine", "holds files that are no run's (01_one.ipynb)"), ("pictures", "holds files that are no run's (figures)"),
    ("file", "is a file"), ("", "name a folder"), ("x" * 300, "name too long"), ("~nobody_here", "home directory"),
])
def test_places_that_a_run_must_not_take(project, used, capsys, monkeypatch, out, says):
    """Asked without running: were a refusal missing, the test itself would write there."""
    monkeypatch.chdir(project)
    assert reproduce("--profile", "smoke", "--dry-run", "--out", out) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    if says.startswith(("holds the study", "place")) and out != "linked":
        with pytest.raises(runner.UsageError, match=says):
            sweep.check_places([], Path(out))


@pytest.mark.parametrize("out", ["notebooks", ".", "figures", "mine", "linked"])
@pytest.mark.parametrize("command", [["reproduce", "--jobs", "1"], ["sweep", "--jobs", "1"]])
def test_a_run_takes_the_place_of_nothing(project, used, monkeypatch, out, command):
    if command[0] == "sweep" and out == "linked":
        pytest.skip("its cells are folders of their own")
    monkeypatch.chdir(project)
    before = used()
    assert main([*command, "--profile", "smoke", "--no-html", "--out", out]) == 2
    assert used() == before


def test_case_does_not_make_another_place(project, used, monkeypatch):
    """As on macOS, where `Notebooks` is `notebooks`: told by the file system, not by the letters."""
    monkeypatch.setattr(Path, "samefile", lambda one, other: str(one).lower() == str(other).lower())
    with pytest.raises(runner.UsageError, match="place of the study's own files"):
        runner.check_places(runner.Plan.make("smoke", out=project / "Notebooks" / "x"))


def test_a_run_of_something_else_is_not_mixed_with(project, capsys, monkeypatch):
    notebook(project, "01_one", DRAW)
    for name in ("a/questions", "b/questions"):       # which have one name, and so one folder
        (project / name).mkdir(parents=True)
    run = ["--profile", "smoke", "--no-html", "--task"]
    assert reproduce(*run, str(project / "a/questions")) == 0 == reproduce(*run, str(project / "a/questions"))
    before = (project / "data/runs/smoke-questions/summary.json").read_text()
    assert reproduce(*run, str(project / "b/questions")) == 2
    assert "holds another run (task '" in capsys.readouterr().err
    assert (project / "data/runs/smoke-questions/summary.json").read_text() == before
    with places.alone(project / "data/runs/smoke-questions"):
        assert reproduce(*run, str(project / "a/questions")) == 2
    assert "another run is writing to" in capsys.readouterr().err


@pytest.mark.parametrize("error, says", [(OSError(errno.ENOSPC, "No space left on device"), "data/runs/smoke: No space left on device\n"),
                                         (PermissionError(errno.EACCES, "Permission denied", "x"), "error: x: Permission denied\n")])
def test_a_disk_that_takes_nothing_is_said_in_one_line(project, capsys, monkeypatch, error, says):
    notebook(project, "01_one", DRAW)

    def full(*_):
        raise error
    monkeypatch.setattr(runner, "atomic_write", full)
    assert reproduce("--profile", "smoke") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith(says) and said.count("\n") == 1
    monkeypatch.undo()
    monkeypatch.setenv("BMOE_ROOT", str(project))
    (project / "file").touch()
    assert reproduce("--profile", "smoke", "--out", str(project / "file" / "below")) == 1
    assert "Not a directory" in capsys.readouterr().err


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
    assert "FAILED 01_one.ipynb, cell 3:\n    | import os\n    | os._exit(1)\n    the kernel died" in out and "02_two: ok" in out
    assert "its parameters cell does not declare model, overrides" in out and (project / "data/runs/smoke/figures/01_given.json").exists()


STORE = "from bmoe_utils.study.output import Store, project_root\nlog = project_root() / 'built'\n" \
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
from bmoe_utils.study.output import Store, project_root
started = project_root() / "started"
def build(path):
    (path / "half").write_text("x")
    print("step 3 of 9", flush=True)
    first = not started.exists()
    started.touch()
    time.sleep(60 * first)
Store().folder("model", {}, build)""")
    code = "import sys; from bmoe_utils.study.run import runner; from bmoe_utils.__main__ import main; " \
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


def test_messages_in_any_language_and_locale(project, root):
    """In the C locale the terminal's encoding is ASCII: what it lacks is escaped, and nothing ends in a UnicodeEncodeError."""
    notebook(project, "01_one", "raise ValueError('\u043d\u0435\u0442 \u2192 \u4e0d')", "1")
    code = "import sys; from bmoe_utils.study.run import runner; from bmoe_utils.__main__ import main; " \
           f"runner.profiles = lambda: {PROFILES!r}; sys.exit(main(['reproduce', '--profile', 'smoke', '--no-html', '--jobs', '1', *sys.argv[1:]]))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(root)}
    env.pop("PYTHONIOENCODING", None)
    said = [subprocess.run([sys.executable, "-c", code, *options], cwd=root, env=env, capture_output=True, timeout=100) for options in ([], ["--only", "\u2192"])]
    assert [one.returncode for one in said] == [1, 2], said
    assert b"ValueError: \\u043d\\u0435\\u0442 \\u2192 \\u4e0d" in said[0].stdout and b"Traceback" not in said[0].stderr
    assert b"error: unknown chapter" in said[1].stderr and b"Traceback" not in said[1].stderr


def test_a_reader_who_has_seen_enough(root):
    """As `... | head` is when its lines are full; here it is gone before the first."""
    said = subprocess.run(f"set -o pipefail; {sys.executable} -m bmoe_utils profiles | true", shell=True, executable="/bin/bash", cwd=root,
                          capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (1, "")
