"""Runs the chapters headless, several at a time where there are cores: `python -m bmoe_utils reproduce --profile cpu`.

Each notebook is executed by papermill with its `parameters` cell overridden; executed copies and HTML go to
data/runs/<run>/, figures to figures/ for the committed run (profile cpu, embedded world, nothing overridden) and to
data/runs/<run>/figures for every other. The committed run also leaves its chapters as Markdown,
in notebooks/rendered/.
"""
from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bmoe_utils.study.output import atomic_write, fingerprint, peak_memory_mb, project_root
from bmoe_utils.study.run import rendered, site
from bmoe_utils.study.run.engine import UsageError, package_path, spread
from bmoe_utils.study.run.places import alone, located, refuse_sources, same, short, shown

PARAMETERS = ("profile", "task", "model", "overrides")         # what every notebook's `parameters` cell declares
HEARTBEAT_S = 30
# The type of a profile's value -> the types that may be given in its place.
KINDS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), list: (list,), dict: (dict,), type(None): (type(None),)}
ALSO = {"device_map": {dict}, "chat_template_kwargs": {dict}, "lora_targets": {list, str}}     # as transformers and peft take them
# Side by side, these chapters begin first, in this order: the one whose models all others rest on, beside it the one that has work to
# do before these are there, then the long ones, each beside others that rest on other artefacts. Short ones fill what is left.
EARLY = ("01", "13", "08", "02", "11", "07", "06", "03", "04", "09", "12")
KERNEL_STARTS = 3                                      # tries, where a kernel dies before it has run anything


def profiles() -> dict[str, dict]:
    """Profile name -> settings, as the study defines them."""
    from bmoe_utils.study.profiles import PROFILES
    return PROFILES


# ---------------------------------------------------------------------------------------------- chapters
@dataclass(frozen=True)
class Chapter:
    """A notebook `NN_name.ipynb`; its first cell is `# title` followed by the claim it tests."""
    path: Path
    title: str
    claim: str

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    @property
    def number(self) -> str:
        return self.path.name[:2]

    def described(self) -> dict:
        """As JSON values, of which `Chapter(**values)` makes it again in another process."""
        return {"path": str(self.path), "title": self.title, "claim": self.claim}


def chapters(folder: Path | None = None) -> list[Chapter]:
    """The numbered notebooks, in reading order."""
    found = []
    for path in sorted((folder or project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = "".join(cells[0]["source"]).strip()
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            text = ""                                 # unreadable: still listed, and running it will say what is wrong
        heading, _, rest = text.partition("\n")
        paragraph = " ".join(rest.strip().split("\n\n")[0].split())
        found.append(Chapter(path, heading.lstrip("# ").strip() or path.stem, paragraph.replace("**", "")))
    return found


def select(all_chapters: list[Chapter], only: list[str] | None) -> list[Chapter]:
    """The chapters named by number (4, 04) or by file name, in reading order."""
    if not all_chapters:
        raise UsageError(f"no notebooks NN_*.ipynb in {project_root() / 'notebooks'}")
    if not only:
        return all_chapters
    chosen = set()
    for name in only:
        stem = name.removesuffix(".ipynb").rpartition("/")[2]
        number = stem.lstrip("0").rjust(2, "0") if stem.isascii() and stem.isdecimal() else None
        match = [c for c in all_chapters if stem == c.path.stem or number == c.number]
        if not match:
            raise UsageError(f"unknown chapter {shown(name)}; there are: {', '.join(c.path.stem for c in all_chapters)}")
        chosen.update(match)
    return [c for c in all_chapters if c in chosen]


# ---------------------------------------------------------------------------------------------- what to run
def settings_of(profile: str) -> dict:
    """The settings of a profile, or a UsageError that lists the profiles."""
    known = profiles()
    if profile not in known:
        raise UsageError(f"unknown profile {shown(profile)}; there are: {', '.join(known)}")
    return known[profile]


def overrides_of(profile: str, pairs: list[str], seeds: list[int] | None = None) -> dict:
    """`key=value` pairs as a dict; values are JSON where they parse, else strings; unknown keys are an error."""
    settings, overrides = settings_of(profile), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"-p {shown(pair)}: write key=value")
        if key in overrides:
            raise UsageError(f"parameter {key!r} is given twice")
        overrides[key] = value_of(text)
    if seeds is not None:
        if "seeds" in overrides:
            raise UsageError("parameter 'seeds' is given twice: by -p and by --seeds")
        overrides["seeds"] = seeds
    for key, value in overrides.items():
        if key not in settings:
            raise UsageError(f"unknown parameter {shown(key)}; profile {profile} has: {', '.join(sorted(settings))}")
        check_setting(f"parameter {key}", key, value, profile)
    return overrides


def value_of(text: str):
    """JSON where the text is JSON, else the text itself."""
    def refused(constant):
        raise UsageError(f"{constant} is no value of a setting: a finite number is needed")
    try:
        return json.loads(text, parse_constant=refused)
    except RecursionError:
        raise UsageError(f"{shown(text)} is nested too deeply") from None
    except ValueError:                                # also: a number of thousands of digits
        return text


def check_setting(where: str, key: str, value, profile: str):
    """A :class:`UsageError` where ``value`` is of no kind that the setting has in any profile, or cannot be meant."""
    known = [settings[key] for settings in profiles().values() if key in settings]
    default = settings_of(profile)[key]

    def refuse(why: str):
        raise UsageError(f"{where}={shown(value)}: {why} (profile {profile} has {shown(default)} there)")
    kinds = {kind for other in known for kind in KINDS.get(type(other), ())} | ALSO.get(key, set())
    if not kinds - {type(None)}:                      # off in every profile: what it takes is the chapters' to say
        kinds |= {str, int, float, bool}
    if type(value) not in kinds:
        refuse("give a value of that kind")
    if key == "regimes":
        for regime, settings in value.items():
            if not isinstance(settings, dict):
                refuse(f"{shown(regime)} must hold settings, {{key: value}}")
            for inner, given in settings.items():
                if inner not in settings_of(profile):
                    refuse(f"{shown(inner)} is no setting")
                check_setting(f"{where}[{shown(regime)}].{inner}", inner, given, profile)
    elements = {kind for other in known if isinstance(other, list) for item in other for kind in KINDS.get(type(item), ())}
    if isinstance(value, list) and elements and not all(type(item) in elements for item in value):
        refuse("give a list of values of that kind")
    if isinstance(value, (list, dict)) and not value and default:
        refuse("give at least one")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (int, float)) and not 0 <= item < 2**63:
            refuse("numbers are finite, not negative and below 2**63")
        if isinstance(item, str) and not _writable(item):
            refuse("this is no Unicode text")
    if key == "seeds" and (len(set(value)) < len(value) or max(value) >= 2**32):
        refuse("seeds are below 2**32, each given once")


def _writable(text: str) -> bool:
    """Whether a file can hold it: not so a lone surrogate, which also stands for bytes that the locale's encoding lacks."""
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


def _place(value: str | None, what: str) -> str | None:
    """A path made absolute, since notebooks run in their own folder; a plain name as it is."""
    if value is None or value == "world":
        return value
    if not value.strip():
        raise UsageError(f"--{what}: give a name or a path")
    if not _writable(value):
        raise UsageError(f"--{what} {shown(value)}: no Unicode text; a path beyond ASCII needs a UTF-8 locale (LC_ALL=C.UTF-8)")
    path = located(value, what)
    if path.exists():
        return str(path)
    if value.startswith((".", "/", "~", os.sep)) or re.search(r"\.(jsonl|json|parquet|csv)$", value):
        raise UsageError(f"--{what} {shown(value)}: no such file or folder")
    return value


def slug(value: str) -> str:
    """A name or path as part of a folder's name; of a long one its beginning and a fingerprint of the whole."""
    name = Path(value).stem if os.path.isfile(value) else Path(value).name
    return shortened(re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.") or "run", of=value, most=60)


def shortened(name: str, *, of, most: int) -> str:
    """``name``, or its beginning and some of the fingerprint of what it stands for: file systems take names of 255 bytes."""
    return name if len(name) <= most else f"{name[:most - 9]}-{fingerprint(of)[:8]}"


@dataclass
class Plan:
    """One run: what is injected and where its results go."""
    profile: str
    task: str
    model: str | None
    overrides: dict
    folder: Path
    figures: Path
    fresh: str | None = None                          # the id of a run that computes everything anew

    @classmethod
    def make(cls, profile: str, task: str | None = None, model: str | None = None, overrides: dict | None = None,
             out: str | Path | None = None, fresh: bool = False) -> Plan:
        task, model, overrides = _place(task, "task") or "world", _place(model, "model"), overrides or {}
        parts = [profile] + [slug(task)] * (task != "world") + ([slug(model)] if model else [])
        name = "-".join(parts + (["set" + fingerprint(overrides)[:6]] if overrides else []))
        if out is not None and not str(out).strip():
            raise UsageError("--out: name a folder")
        folder = located(out, "out") if out else project_root() / "data" / "runs" / name
        committed = name == "cpu" and not out
        return cls(profile, task, model, overrides, folder, project_root() / "figures" if committed else folder / "figures",
                   f"{int(time.time())}-{uuid.uuid4().hex[:6]}" if fresh else None)

    def __post_init__(self):
        self.folder, self.figures = Path(self.folder), Path(self.figures)
        self.environment = dict(                      # of the kernels
            BMOE_ROOT=str(project_root()), BMOE_FIGURES=str(self.figures), BMOE_BATCH="1", PYTHONPATH=package_path(),
            BMOE_FRESH=self.fresh,
            # sets of text in the same order in every run: the number that the committed figures were made with
            PYTHONHASHSEED=os.environ.get("PYTHONHASHSEED", "6640"),
            JUPYTER_PREFER_ENV_PATH="1",              # `python3` is this environment's kernel, not one in the home folder
            PYDEVD_DISABLE_FILE_VALIDATION="1", TOKENIZERS_PARALLELISM=os.environ.get("TOKENIZERS_PARALLELISM", "false"))

    @property
    def embedded(self) -> bool:
        """Whether the model is the study's own small one."""
        from bmoe_utils.study.profiles import MODELS
        return (self.model or MODELS.get(self.profile)) is None

    def parameters(self) -> dict:
        return {name: getattr(self, name) for name in PARAMETERS}

    def described(self) -> dict:
        """As JSON values, of which `Plan(**values)` makes it again in another process."""
        return {**self.parameters(), "folder": str(self.folder), "figures": str(self.figures), "fresh": self.fresh}


# ---------------------------------------------------------------------------------------------- where a run may write
def check_places(plan: Plan):
    """A :class:`UsageError` unless the plan's folder is one that a run may fill: not the study's own, holding nothing, or an
    earlier run of the same plan. Nothing is written."""
    folder = located(plan.folder, "out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: choose a folder")
    refuse_sources(folder, "--out")
    if not same(plan.figures, project_root() / "figures") or plan.parameters() != Plan.make("cpu").parameters():
        refuse_sources(located(plan.figures, "out"), "--out: its figures' folder")
    if before := summary_of(plan):
        was, now = ({name: said[name] for name in PARAMETERS} for said in (before, json.loads(json.dumps(plan.parameters()))))
        if was != now:
            differ = ", ".join(f"{name} {shown(was[name])}" for name in PARAMETERS if was[name] != now[name])
            raise UsageError(f"{folder} holds another run ({differ}): choose another folder with --out, or remove that one")
    elif not any(same(one, project_root() / "data" / "runs") for one in folder.parents):
        # a run that could write nothing has left these two
        left = [one for one in folder.glob("*") if one.name != ".lock" and not (one.name == "figures" and one.is_dir() and not any(one.iterdir()))]
        if left:
            raise UsageError(f"--out {folder} holds files that are no run's ({min(one.name for one in left)}): choose a new folder, or an empty one")


# ---------------------------------------------------------------------------------------------- running
@contextmanager
def _environment(**values):
    """Set environment variables (the kernels inherit them), and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class _Progress:
    """Where a running notebook is: papermill reports cells here, and the kernel's stdout is written here."""

    def __init__(self, label: str, every: float):
        self.label, self.every, self.cell, self.cells, self.line = label, every, 0, 0, ""
        self.start, self._end = time.monotonic(), threading.Event()

    def write(self, text: str):
        lines = [part.strip() for part in re.split(r"[\r\n]", text) if part.strip()]
        self.line = lines[-1][:100] if lines else self.line

    def flush(self):
        pass

    def __enter__(self):
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._end.set()

    def _beat(self):
        while not self._end.wait(self.every):
            say(f"  {self.label} .. {time.monotonic() - self.start:.0f} s, cell {self.cell} of {self.cells}" + (f": {self.line}" if self.line else ""))


def say(text: str):
    print(text, flush=True)


def _make_private(kernel, folder: str):
    """Have a kernel's manager speak to it through sockets in ``folder``, which is this user's alone, where the system has such;
    else, and by Jupyter's default, it has ports on which every user may knock, though without the key of its messages."""
    kernel.connection_file = os.path.join(folder, "kernel.json")
    if os.name == "posix" and len(os.fsencode(folder)) < 80:         # a socket's path has room for some hundred bytes
        kernel.transport = "ipc"


def _execute(chapter: Chapter, executed: Path, parameters: dict, progress: _Progress, bar: bool):
    """papermill, which tells `progress` the cell it is in; the kernel's own messages go to a log beside the executed copy."""
    import papermill
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class Told(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_):
            ours = [cell for cell in nb_man.nb.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
            progress.cells, started = len(ours), nb_man.cell_start

            def cell_start(cell, *args, **options):
                progress.cell += any(cell is own for own in ours)
                started(cell, *args, **options)
            nb_man.cell_start = cell_start
            client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=None, stdout_file=progress, stderr_file=progress)
            with (TemporaryDirectory(prefix="bmoe-", ignore_cleanup_errors=True) as folder,
                  executed.with_suffix(".log").open("w") as stream):
                _make_private(client.create_kernel_manager(), folder)
                client.execute(stderr=stream)

    papermill_engines.register("bmoe", Told)
    for left in reversed(range(KERNEL_STARTS)):
        try:
            papermill.execute_notebook(chapter.path, executed, parameters=parameters, engine_name="bmoe", kernel_name="python3",
                                       cwd=chapter.path.parent, progress_bar=bar)
            return
        except RuntimeError as error:                 # where kernels have ports, two that start together may be given the same
            if not left or "before replying to kernel_info" not in str(error):
                raise


def _check_parameters(chapter: Chapter):
    """papermill only warns of an unknown parameter, and then the chapter would quietly run with its own values."""
    import papermill
    missing = set(PARAMETERS) - set(papermill.inspect_notebook(str(chapter.path)))
    if missing:
        raise ValueError(f"its parameters cell does not declare {', '.join(sorted(missing))}")


def _explain(chapter: Chapter, executed: Path, error: Exception, reached: int) -> str:
    """Notebook, cell, the cell's first lines, error. ``reached``: the cell that papermill began last, 0 before the first."""
    from papermill.exceptions import PapermillExecutionError
    lines = [f"FAILED {chapter.path.name}"]
    if isinstance(error, PapermillExecutionError):
        cells = json.loads(chapter.path.read_text(encoding="utf-8"))["cells"]      # counted as in the notebook: nothing injected
        number = next((i for i, cell in enumerate(cells, 1) if "".join(cell["source"]) == error.source), error.cell_index)
        source = error.source.strip().splitlines()
        lines[0] += f", cell {number} (In [{error.exec_count}] of the executed copy):"
        lines += _first(source) + [f"    {error.ename}: {error.evalue}"]
        executed.with_suffix(".log").unlink(missing_ok=True)                       # the copy holds the whole traceback
    elif type(error).__name__ == "DeadKernelError" and reached:      # of a library that papermill brings
        cells = json.loads(chapter.path.read_text(encoding="utf-8"))["cells"]
        lines[0] += f", cell {reached}:"
        lines += _first("".join(cells[reached - 1]["source"]).strip().splitlines())
        lines += ["    the kernel died, as for want of memory or by a crash in compiled code (DeadKernelError)"]
    else:
        lines += [f"    {type(error).__name__}: {error}"]
    kept = {"executed copy": executed, "kernel's log": executed.with_suffix(".log")}
    lines += [f"    {what}: {short(path)}" for what, path in kept.items() if path.exists() and path.stat().st_size]
    return "\n".join(lines)


def _first(source: list[str]) -> list[str]:
    return [f"    | {line}" for line in source[:6]] + ["    | ..."] * (len(source) > 6)


def to_html(executed: Path) -> Path:
    """The executed notebook as a page beside it, code included."""
    from nbconvert import HTMLExporter
    body, _ = HTMLExporter().from_filename(str(executed))
    return atomic_write(executed.with_suffix(".html"), body)


def run_chapter(plan: Plan, chapter: Chapter, label: str, *, html: bool = True, bar: bool = False) -> dict:
    """Execute one chapter and give its row of the summary; ``status``: ok, FAILED or interrupted."""
    executed = plan.folder / chapter.path.name
    for suffix in (".ipynb", ".html", ".log"):                             # or an earlier run's copy would pass for this one's
        executed.with_suffix(suffix).unlink(missing_ok=True)
    say(f"{label}: {chapter.title}")
    start, wall, status, error_said = time.monotonic(), time.time(), "ok", None
    progress = _Progress(label, 1e9 if bar else HEARTBEAT_S)
    with _environment(**plan.environment):
        try:
            _check_parameters(chapter)
            with progress:
                _execute(chapter, executed, plan.parameters(), progress, bar)
        except KeyboardInterrupt:
            status = "interrupted"
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)        # or it reports, at exit, the task that was cut short
        except Exception as error:                    # whatever it is, it belongs to this chapter and is reported as such
            status, error_said = "FAILED", _explain(chapter, executed, error, progress.cell)
    log = executed.with_suffix(".log")
    if log.exists() and (status != "FAILED" or not log.stat().st_size):
        log.unlink()                                  # worth keeping only where it may explain a failure
    if html and executed.exists() and status != "interrupted":
        try:
            to_html(executed)
        except Exception as error:                    # a page less is no reason to lose the run
            say(f"{label}: no HTML, {type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    drawn = [p.name for p in sorted(plan.figures.glob(f"{chapter.number}_*.png")) if p.stat().st_mtime >= wall - 1]
    return _row(chapter, status, seconds=round(seconds, 1), peak_memory_mb=peak_memory_mb(children=True), figures=drawn, error=error_said)


def run_described(plan: dict, chapter: dict, label: str, html: bool) -> dict:
    """:func:`run_chapter` of a plan and a chapter as :meth:`Plan.described` and :meth:`Chapter.described` give them."""
    return run_chapter(Plan(**plan), Chapter(**chapter), label, html=html)


def _row(chapter: Chapter, status: str, **known) -> dict:
    return {"chapter": chapter.path.stem, "status": status, "seconds": None, "peak_memory_mb": None, "figures": [], "error": None} | known


def _say_outcome(label: str, row: dict):
    if row["error"]:
        say(row["error"])
    took = "" if row["seconds"] is None else f", {row['seconds']:.1f} s"
    say(f"{label}: {row['status']}{took}" + (f", figures: {', '.join(row['figures'])}" if row["figures"] else ""))


def _one_by_one(plan: Plan, chosen: list[Chapter], labels: list[str], tell: Callable, *, html: bool, keep_going: bool):
    for position, (chapter, label) in enumerate(zip(chosen, labels, strict=True)):
        row = run_chapter(plan, chapter, label, html=html, bar=sys.stderr.isatty())
        tell(position, row)
        _say_outcome(label, row)
        if row["status"] == "interrupted" or (row["status"] != "ok" and not keep_going):
            break


def order_of(chosen: list[Chapter]) -> list[int]:
    """The positions of the chapters in the order to begin them in, side by side: ``EARLY`` ones first, then as in the book."""
    return sorted(range(len(chosen)), key=lambda i: (EARLY.index(chosen[i].number) if chosen[i].number in EARLY else len(EARLY), i))


def _side_by_side(plan: Plan, chosen: list[Chapter], labels: list[str], tell: Callable, *, html: bool, keep_going: bool, jobs: int):
    """Chapters in ``jobs`` processes; what several need is computed by the first that asks (the store's locks)."""
    left = set(range(len(chosen)))
    order = order_of(chosen)
    try:
        calls = [(plan.described(), chosen[i].described(), labels[i]) for i in order]
        with spread(run_described, calls, jobs=jobs, html=html) as results:
            for begun, result in results:
                position = order[begun]
                if isinstance(result, Exception):     # not the chapter's own error, which is in its row: its worker's
                    result = _row(chosen[position], "FAILED", error=f"FAILED {chosen[position].path.name}: {result}")
                left.discard(position)
                tell(position, result)
                _say_outcome(labels[position], result)
                if result["status"] != "ok" and not keep_going:
                    break
    except KeyboardInterrupt:
        for position in left:
            tell(position, _row(chosen[position], "interrupted"))


def run(plan: Plan, chosen: list[Chapter], *, html: bool = True, keep_going: bool = False, jobs: int = 1, name: str | None = None) -> int:
    """Execute the chapters, ``jobs`` at a time, and sum up; 0 when all passed, 1 when one failed, 130 when interrupted.

    ``name``: said before every chapter, where several runs write to one terminal. A :class:`UsageError` says why a run may not
    write where the plan says, an ``OSError`` that it cannot.
    """
    check_places(plan)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.figures.mkdir(parents=True, exist_ok=True)
        with alone(plan.folder):
            return _run(plan, chosen, html=html, keep_going=keep_going, jobs=jobs, name=name)
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(plan.folder)) from error      # of a full disk Python does not say which


def _run(plan: Plan, chosen: list[Chapter], *, html: bool, keep_going: bool, jobs: int, name: str | None) -> int:
    begin, jobs = time.monotonic(), min(jobs, len(chosen))
    prefix = f"{name} " if name else ""
    labels = [f"{prefix}[{position}/{len(chosen)}] {chapter.path.stem}" for position, chapter in enumerate(chosen, 1)]
    say(f"profile {plan.profile}, task {plan.task}, model {plan.model or 'of the profile'}" + (f", {plan.overrides}" if plan.overrides else "")
        + (f"; {jobs} chapters at a time" if jobs > 1 else ""))
    rows = [_row(chapter, "not run") for chapter in chosen]

    def tell(position: int | None = None, row: dict | None = None):
        """The summary as it stands: a run that is killed leaves that of what it had finished, not an earlier run's."""
        if row:
            rows[position] = row
        summary.update(seconds=round(time.monotonic() - begin, 1), peak_memory_mb=max((row["peak_memory_mb"] or 0 for row in rows), default=0))
        atomic_write(plan.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    summary = plan.parameters() | {"chapters": rows, "jobs": jobs}
    tell()
    for page in ("index.html", "results.json"):       # they say what the last run came to
        (plan.folder / page).unlink(missing_ok=True)
    if jobs == 1:
        _one_by_one(plan, chosen, labels, tell, html=html, keep_going=keep_going)
    else:
        _side_by_side(plan, chosen, labels, tell, html=html, keep_going=keep_going, jobs=jobs)
    tell()
    index = None
    if html:
        try:
            index = site.build(plan.folder, plan.figures, chapters(), summary)
        except Exception as error:                    # as with a chapter's page: no reason to lose the run
            say(f"no index page, {type(error).__name__}: {error}")
    if same(plan.figures, project_root() / "figures"):                     # the committed run
        for path in (chapter.path for chapter, row in zip(chosen, rows, strict=True) if row["status"] == "ok"):
            try:
                rendered.render_all(plan.folder, plan.figures, path.parent, [path.stem])
            except Exception as error:
                say(f"{path.stem}: not rendered, {type(error).__name__}: {error}")
    _report(plan, summary, index)
    statuses = {row["status"] for row in rows}
    if "interrupted" in statuses:
        say("Interrupted. Finished artefacts are kept: the same command resumes" + (" (without --fresh, which would start over)." if plan.fresh else "."))
        return 130
    return 0 if statuses == {"ok"} else 1


def summary_of(plan: Plan) -> dict:
    """The summary the plan's last run left, or nothing."""
    try:
        said = json.loads((plan.folder / "summary.json").read_text(encoding="utf-8"))
        whole = {*PARAMETERS, "chapters"} <= said.keys() and all({"chapter", "seconds"} <= row.keys() for row in said["chapters"])
        return said if whole else {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}                                     # none, or a file of somebody else's


def _report(plan: Plan, summary: dict, index: Path | None):
    width = max(len(row["chapter"]) for row in summary["chapters"])
    say("")
    for row in summary["chapters"]:
        say(f"  {row['chapter']:{width}}  {'' if row['seconds'] is None else row['seconds']:>8}  {row['status']}")
    memory = summary["peak_memory_mb"]
    say(f"  {'total':{width}}  {summary['seconds']:>8}  seconds" + (f"; peak memory of a chapter {memory / 1024:.2f} GiB" if memory else ""))
    say(f"figures and their numbers: {short(plan.figures)}/")
    say(f"executed notebooks: {short(plan.folder)}/" + (f"; all of it as pages: {short(index)}" if index else ""))
