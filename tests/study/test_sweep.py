"""Chapters side by side and sweeps, on tiny notebooks: order, what is shared, failures, dying workers, what is resumed."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_calls
from tiny_notebooks import DRAW, PROFILES, notebook

from bmoe_utils.__main__ import main
from bmoe_utils.study.run import engine, runner, sweep

BEGUN = "import os, pathlib, time\nplace = pathlib.Path(os.environ['BMOE_ROOT'])\n"
# a chapter that ends only when the other has begun as well
MEET = BEGUN + """
(place / "begun-{me}").touch()
limit = time.monotonic() + 60
while not (place / "begun-{other}").exists():
    assert time.monotonic() < limit, "the other never began"
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def study(project, monkeypatch):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)


def reproduce(*options):
    return main(["reproduce", "--profile", "smoke", "--no-html", *options])


def rows(project, folder="data/runs/smoke"):
    return {row["chapter"]: row["status"] for row in json.loads((project / folder / "summary.json").read_text())["chapters"]}


def test_two_chapters_run_at_once(project, capsys):
    notebook(project, "01_one", MEET.format(me=1, other=2))
    notebook(project, "02_two", MEET.format(me=2, other=1))
    assert reproduce("--jobs", "2") == 0
    assert rows(project) == {"01_one": "ok", "02_two": "ok"} and "2 chapters at a time" in capsys.readouterr().out


def test_long_chapters_begin_early():
    chapters = [runner.Chapter(Path(f"{n:02d}_name.ipynb"), "", "") for n in (1, 5, 7, 8, 13, 99)]
    assert [chapters[i].number for i in runner.order_of(chapters)] == ["01", "13", "08", "07", "05", "99"]


def test_a_failure_stops_what_has_not_begun(project, capsys):
    notebook(project, "01_one", MEET.format(me=1, other=2), "raise ValueError('no posterior here')")
    notebook(project, "02_two", MEET.format(me=2, other=1), "time.sleep(60)")
    notebook(project, "03_three", DRAW)
    assert reproduce("--jobs", "2") == 1
    out = capsys.readouterr().out
    assert "FAILED 01_one.ipynb, cell 4" in out and "ValueError: no posterior here" in out
    assert rows(project) == {"01_one": "FAILED", "02_two": "not run", "03_three": "not run"}


def test_keep_going_survives_a_dead_kernel(project, capsys):
    notebook(project, "01_one", "import os\nos._exit(1)")
    notebook(project, "02_two", DRAW)
    assert reproduce("--jobs", "2", "--keep-going") == 1
    assert rows(project) == {"01_one": "FAILED", "02_two": "ok"} and "Dead" in capsys.readouterr().out


def test_a_kernel_that_never_began_is_started_again(project, monkeypatch):
    import papermill
    notebook(project, "01_one", DRAW)
    calls, execute = [], papermill.execute_notebook

    def unlucky(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return execute(*args, **options)
    monkeypatch.setattr(papermill, "execute_notebook", unlucky)
    assert reproduce("--jobs", "1") == 0 and len(calls) == 2


def test_calls_begin_in_order_and_none_waits_at_a_busy_worker():
    calls = [(15.0,), *[(0.2,)] * 6]                  # one long call: the other worker takes all the rest meanwhile
    with engine.spread(time.sleep, calls, jobs=2) as results:
        assert [index for index, _ in results] == [1, 2, 3, 4, 5, 6, 0]


@pytest.fixture
def here(monkeypatch):
    """A process finds the functions of tiny_calls as it would those of an installed module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def test_a_dead_process_is_told_and_the_others_go_on(here):
    with engine.spread(tiny_calls.die, [(0,), (9,), (0,)], jobs=2) as results:
        said = dict(results)
    assert said[0] == said[2] == "alive" and "died with status -9 (killed, as for want of memory)" in str(said[1])


def test_what_a_call_raises_is_its_result():
    with engine.spread(json.loads, [("[1]",), ("[",)], jobs=1) as results:
        said = dict(results)
    assert said[0] == [1] and str(said[1]).startswith("JSONDecodeError: Expecting value")
    with pytest.raises(ValueError, match="only a function of a module"), engine.spread(lambda: 0, [()], jobs=1):
        pass


def test_a_run_side_by_side_opens_no_port(project):
    """Kernels are spoken to through sockets of this user's alone as well. What listens is each kernel's own pipe for what the
    processes that it forks print: it takes text, never code."""
    psutil = pytest.importorskip("psutil")             # of jupyter's dependencies
    notebook(project, "01_one", MEET.format(me=1, other=2), "time.sleep(0.5)")
    notebook(project, "02_two", MEET.format(me=2, other=1), "time.sleep(0.5)")
    seen: dict[str, set] = {}
    ended = threading.Event()

    def watch():
        own = psutil.Process()
        while not ended.wait(0.05):
            for process in [own, *own.children(recursive=True)]:
                try:
                    name = "kernel" if any("ipykernel" in part for part in process.cmdline()) else "ours"
                    seen.setdefault(name, set()).update(
                        (process.pid, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
                except psutil.Error:
                    pass                               # it has just ended
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        assert reproduce("--jobs", "2") == 0
    finally:
        ended.set()
        watching.join()
    assert not seen["ours"], seen
    assert all(len([1 for pid, _ in seen["kernel"] if pid == one]) == 1 for one, _ in seen["kernel"]), seen


def test_workers_keep_the_memory_they_have(monkeypatch):
    """dask would have glibc give back that of every larger tensor at once: many page faults, and half the speed."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with engine.spread(os.getenv, [("MALLOC_TRIM_THRESHOLD_",), ("OMP_NUM_THREADS",)], jobs=2) as results:
        assert dict(results) == {0: None, 1: str(max(1, engine.cores() // 2))}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_ends_the_kernels_too(project, root, how):
    """However the run ends: the processes that it began notice, and what an earlier run said does not stand."""
    (project / "data/runs/smoke").mkdir(parents=True)
    earlier = runner.Plan.make("smoke").parameters() | {"chapters": [{"chapter": c, "status": "ok", "seconds": 1} for c in ("01_one", "02_two")]}
    for page in ("summary.json", "results.json", "index.html"):
        (project / "data/runs/smoke" / page).write_text(json.dumps(earlier))
    notebook(project, "01_one", MEET.format(me=1, other=2), "(place / 'kernel').write_text(str(os.getpid()))\ntime.sleep(120)")
    notebook(project, "02_two", MEET.format(me=2, other=1), "time.sleep(120)")
    code = "import sys; from bmoe_utils.study.run import runner; from bmoe_utils.__main__ import main; " \
           f"runner.profiles = lambda: {PROFILES!r}\nif __name__ == '__main__': sys.exit(main(['reproduce', '--profile', 'smoke', '--no-html', '--jobs', '2']))"
    (project / "run.py").write_text(code)
    process = subprocess.Popen([sys.executable, str(project / "run.py")], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, env=os.environ | {"PYTHONPATH": str(root)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    limit = time.monotonic() + 90
    while not (project / "kernel").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(0.5)
    began = tree(process.pid)
    kernel = int((project / "kernel").read_text())
    assert {kernel, process.pid} < began
    os.killpg(process.pid, how)                       # as a terminal's Ctrl-C does: to everyone in the foreground
    out, _ = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "same command resumes" in out and "Traceback" not in out, out
    limit = time.monotonic() + 40
    while any(map(alive, began)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not [one for one in began if alive(one)]
    assert set(rows(project).values()) == {"interrupted" if how == signal.SIGINT else "not run"}
    assert not (project / "data/runs/smoke/results.json").exists() and not (project / "data/runs/smoke/index.html").exists()


def tree(pid: int) -> set[int]:
    """The process and all below it, by Linux' /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass                                      # it has just ended
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def test_a_script_without_a_main_guard_runs_once(project, root):
    """It is not imported by the processes that it begins, so that it cannot begin itself again."""
    notebook(project, "01_one", MEET.format(me=1, other=2))
    notebook(project, "02_two", MEET.format(me=2, other=1))
    (project / "script.py").write_text(
        "from bmoe_utils.study.run import runner\n"
        "with open('begun', 'a') as log:\n    log.write('x')\n"
        "status = runner.run(runner.Plan.make('smoke'), runner.chapters(), html=False, jobs=2)\n"
        "print('status', status)\n")
    said = subprocess.run([sys.executable, "script.py"], cwd=project, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(root)})
    assert said.stdout.splitlines()[-1] == "status 0" and "Traceback" not in said.stderr, said.stdout + said.stderr
    assert (project / "begun").read_text() == "x" and set(rows(project).values()) == {"ok"}


def alive(pid: int) -> bool:
    """Running; a process that has ended and that nobody has waited for does not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- sweeps
COUNT = BEGUN + "with open(place / 'ran', 'a') as log:\n    log.write(f\"{overrides['seeds'][0]} \")\n"


def test_a_sweep_runs_every_cell_once_and_resumes(project, capsys):
    notebook(project, "01_one", COUNT, "assert overrides['seeds'] != [1] or (place / 'mended').exists(), 'not yet'")
    again = ["sweep", "--profile", "smoke", "--seeds", "0", "1", "--vary", "epochs=[1,2]", "--no-html", "--jobs", "2"]
    assert main(again) == 1
    out = capsys.readouterr().out
    assert "smoke-epochs_1-seeds_0: ok" in out and "smoke-epochs_2-seeds_1: FAILED" in out and "2 of 4 cells are finished" in out
    (project / "mended").touch()
    assert main(again) == 0
    assert sorted((project / "ran").read_text().split()) == ["0", "0", "1", "1", "1", "1"]      # the finished ones were not run again
    given = json.loads((project / "data/runs/sweep/smoke-epochs_2-seeds_1/cell.json").read_text())
    assert given["overrides"] == {"epochs": 2, "seeds": [1]}


SCORES = """
import json, os, pathlib
numbers = {"seeds": overrides["seeds"], "methods": {"=map": [{"nll": overrides["epochs"] + seed / 10} for seed in overrides["seeds"]]}}
folder = pathlib.Path(os.environ["BMOE_FIGURES"])
(folder / "01_numbers.json").write_text(json.dumps(numbers))
(folder / "02_numbers.json").write_text('{"seeds": [0], "methods": {"inside": {"map": [1]}}}')
"""


def test_a_sweep_gathers_the_scores_of_its_finished_cells(project, capsys):
    notebook(project, "01_one", SCORES, "assert overrides['epochs'] != 3")
    command = ["sweep", "--profile", "smoke", "--vary", "epochs=[1,2,3]", "-p", "seeds=[0,4]", "--no-html", "--jobs", "2"]
    assert main(command) == 1
    table = project / "data/runs/sweep/results.csv"
    assert table.read_text().splitlines() == [
        "task,model,epochs,chapter,method,seed,nll", *(f"world,of the profile,{epochs},01,'=map,{seed},{epochs + seed / 10:g}" for epochs in (1, 2) for seed in (0, 4))]
    assert "results.csv" in capsys.readouterr().out
    table.write_text("name,score\nmine,1\n")         # not one of ours any more
    assert main(command) == 2 and "is no sweep's" in capsys.readouterr().err and table.read_text().startswith("name")


def test_a_changed_chapter_is_run_again(project):
    notebook(project, "01_one", COUNT)
    command = ["sweep", "--profile", "smoke", "--seeds", "7", "--no-html"]
    assert main(command) == 0 == main(command) and (project / "ran").read_text() == "7 "
    notebook(project, "01_one", COUNT, "1 + 1")
    assert main(command) == 0 and (project / "ran").read_text() == "7 7 "


def folders(vary, tasks=("world",)):
    plans = sweep.cells("smoke", tasks, [None], vary, {}, runner.project_root() / "data/runs/sweep")
    for plan in plans:
        plan.folder.mkdir(parents=True, exist_ok=True)                     # the file system takes the name
        assert plan.figures == plan.folder / "figures"
    names = [plan.folder.name for plan in plans]
    assert len({name.lower() for name in names}) == len(names)
    return names


def test_cells_have_names_of_their_own_that_can_be_read(project):
    methods = ["map", "temperature", "ensemble", "checkpoint_ensemble", "mc_dropout", "swag", "last_layer_laplace", "laplace_lora", "blob", "tfb"]
    long = folders({"methods": [methods, methods[1:], methods[:-1]]})
    assert all(name.startswith("smoke-methods_") and len(name) < 80 for name in long) and "map_temperature" in long[0]
    assert folders({"epochs": [1, 2]}) == ["smoke-epochs_1", "smoke-epochs_2"]
    many = folders({f"setting_{i}": [methods] for i in range(9)} | {"lr": [0.1, 0.2]})
    assert all(len(name) <= 150 for name in many)
    assert all(name.startswith("smoke-method_") for name in folders({"method": ["a b", "a_b", "A_b"]}))
    for place in ("a/mine", "b/mine"):
        (project / place).mkdir(parents=True)
    assert all(name.startswith("smoke-mine-") for name in folders({}, [str(project / "a/mine"), str(project / "b/mine")]))


@pytest.mark.parametrize("options, says", [
    (["--vary", "epochs=[NaN]"], "NaN is no value"), (["--vary", "epochs=[1]", "epochs=[2]"], "varied twice"), (["--vary", "epochs=" + "[" * 99_999], "too deeply"),
    (["--vary", "seeds=[[0]]", "--seeds", "1"], "varied twice"), (["--vary", "seeds=[0]"], "a value of that kind"), (["--seeds", "0", "0"], "given twice"),
    (["--vary", f"epochs={list(range(101))}", f"lr={[i / 8 for i in range(100)]}"], "10100 cells are more than"), (["--task", "world", "world"], "given twice"),
    (["--scheduler", "nonsense://here"], "no dask scheduler at nonsense://here"), (["--out", " "], "name a folder"),
    (["--vary", "epochs"], "write key=[value,value]"), (["--vary", "epoch=[1]"], "unknown parameter 'epoch'"),
    (["--vary", "epochs=[1,1]"], "a value is given twice"), (["--vary", "epochs=[1]", "-p", "epochs=2"], "varied as well"),
])
def test_what_a_sweep_cannot_mean(project, capsys, options, says):
    notebook(project, "01_one")
    assert main(["sweep", "--profile", "smoke", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (project / "data").exists()


def test_calls_on_a_scheduler(monkeypatch):
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with engine.spread(json.loads, [("[1]",), ("[",)], jobs=1, scheduler=cluster.scheduler_address) as results:
            said = dict(results)
    assert said[0] == [1] and isinstance(said[1], ValueError)


def test_an_address_without_tls_beyond_this_machine():
    open_to_all = ["tcp://10.0.0.5:8786", "node7:8786", "tcp://node7:8786", "0.0.0.0:8786", "ws://10.0.0.5:1", "tcp://[fe80::1]:1"]
    assert all(map(engine.exposed, open_to_all))
    assert not any(map(engine.exposed, ["tls://10.0.0.5:8786", "wss://node7:1", "tcp://127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786"]))


def test_cores_within_a_container(tmp_path):
    groups = tmp_path / "cgroup"
    quota = lambda: engine._quota(tmp_path, groups)
    assert quota() == float("inf")                    # no control groups
    groups.write_text("1:name=systemd:/x\n0::/own/sub\n")
    (tmp_path / "own/sub").mkdir(parents=True)
    (tmp_path / "own/sub/cpu.max").write_text("max 100000\n")
    assert quota() == float("inf")
    (tmp_path / "own/cpu.max").write_text("250000 100000\n")
    assert quota() == 2.5                             # the group above limits too
    (tmp_path / "cpu,cpuacct").mkdir()
    for what, value in (("quota", -1), ("period", 100_000)):
        (tmp_path / f"cpu,cpuacct/cpu.cfs_{what}_us").write_text(f"{value}\n")
    assert quota() == 2.5
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("50000\n")
    assert quota() == 0.5 and 1 <= engine.cores() <= os.cpu_count()


def test_workers_for_what_is_there(monkeypatch):
    monkeypatch.setattr(engine, "cores", lambda: 64)
    assert engine.workers_for(True) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert engine.workers_for(False) == 3 and engine.gpus() == ["2", "5", "7"]


def test_local_workers_share_the_gpus_out(monkeypatch, here):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with engine.spread(tiny_calls.card, [(0.5,)] * 2, jobs=2) as results:
        assert sorted(card for _, card in results) == ["2", "5"]
