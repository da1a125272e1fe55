"""Sweeps: the chosen chapters for every combination of tasks, models and settings, each combination a *cell*.

Every cell has its own folder, runs alone, and is skipped when a sweep that was cut short is given again and neither its
settings nor the code changed. Finished artefacts are shared by all cells, so a sweep over single seeds fills the cache from
which one run over all of them then draws its tables. The scores of all finished cells end up in one ``results.csv``.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bmoe_utils.study import output, source
from bmoe_utils.study.run import places, runner
from bmoe_utils.study.run.engine import exposed, spread
from bmoe_utils.study.tables import csv_text

TABLE, COLUMNS = "results.csv", "task,model,"          # how every table of a sweep begins
MOST = 10_000                                          # cells of one sweep


def cells(profile: str, tasks: Sequence[str], models: Sequence[str | None], vary: dict[str, list], overrides: dict, folder: Path) -> list[runner.Plan]:
    """One plan for every combination of tasks, models and the values of ``vary`` (setting -> values), beside common ``overrides``."""
    if (number := math.prod(map(len, (tasks, models, *vary.values())))) > MOST:
        raise runner.UsageError(f"{number} cells are more than the {MOST} that one sweep takes: divide it")
    plans, names = [], []
    for task, model, *values in itertools.product(tasks, models, *vary.values()):
        given = dict(zip(vary, values, strict=True))
        plan = runner.Plan.make(profile, task, model, overrides | given, out=folder / "cell")
        name = "-".join([runner.Plan.make(profile, task, model).folder.name,
                         *(f"{key}_{runner.slug(json.dumps(value))}" for key, value in given.items())])
        names.append(runner.shortened(name, of=plan.parameters(), most=150))
        plans.append(plan)
    keys = [output.fingerprint(plan.parameters()) for plan in plans]
    if len(set(keys)) < len(keys):
        raise runner.UsageError("two cells of this sweep are the same: a value is given twice")
    # in small letters: a file system may take "A" and "a" for one
    often = Counter(name.lower() for name in names)
    named = [f"{name}-{key[:8]}" if often[name.lower()] > 1 else name for name, key in zip(names, keys, strict=True)]
    return [dataclasses.replace(plan, folder=folder / name, figures=folder / name / "figures") for plan, name in zip(plans, named, strict=True)]


def key_of(plan: runner.Plan, chosen: Sequence[runner.Chapter]) -> str:
    """What a finished cell stands for: its parameters, its chapters and the code."""
    code = source.code_version(source.closure(source.modules()))
    return output.fingerprint({"parameters": plan.parameters(), "code": code, "chapters": {c.path.name: output.fingerprint(c.path) for c in chosen}})


def finished(plan: runner.Plan, key: str) -> bool:
    """Whether the cell's folder holds the whole result of this key."""
    try:
        return json.loads((plan.folder / "cell.json").read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_cell(plan: runner.Plan, chosen: Sequence[runner.Chapter], key: str, *, html: bool = True) -> int:
    """The chapters of one cell, one after the other; its status as :func:`runner.run` gives it."""
    (plan.folder / "cell.json").unlink(missing_ok=True)
    status = runner.run(plan, chosen, html=html, name=plan.folder.name)
    if status == 0:
        output.atomic_write(plan.folder / "cell.json", json.dumps({"key": key, **plan.parameters()}, indent=1) + "\n")
    return status


def run_described(plan: dict, chosen: list[dict], key: str, html: bool) -> int:
    """:func:`run_cell` of a plan and chapters as their ``described()`` gives them."""
    return run_cell(runner.Plan(**plan), [runner.Chapter(**chapter) for chapter in chosen], key, html=html)


def scores(plans: Sequence[runner.Plan]) -> list[dict]:
    """The scores of every method in every finished cell: a row for each chapter that keeps them (``NN_numbers.json``), method and seed,
    beside the cell's task, model and settings."""
    rows = []
    for plan in plans:
        cell = {"task": runner.slug(plan.task), "model": plan.model or "of the profile"}
        cell |= {key: value if isinstance(value, (str, int, float)) else json.dumps(value) for key, value in plan.overrides.items() if key != "seeds"}
        for path in sorted(plan.figures.glob("[0-9][0-9]_numbers.json")):
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                rows += [cell | {"chapter": path.name[:2], "method": method, "seed": seed} | numbers
                         for method, by_seed in said["methods"].items() for seed, numbers in zip(said["seeds"], by_seed, strict=True)]
            except (KeyError, TypeError, AttributeError, ValueError):
                continue                              # a chapter whose numbers are of another form
    return rows


def check_places(plans: Sequence[runner.Plan], folder: Path):
    """A :class:`runner.UsageError` where a cell, or the table beside the cells, would take the place of something else."""
    places.refuse_sources(places.located(folder, "out"), "--out")
    for plan in plans:
        runner.check_places(plan)
    try:
        with open(folder / TABLE, encoding="utf-8") as file:
            ours = file.readline().startswith(COLUMNS)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise runner.UsageError(f"{folder / TABLE} is no sweep's: choose another folder with --out")


def run(plans: Sequence[runner.Plan], chosen: Sequence[runner.Chapter], *, jobs: int, scheduler: str | None = None, html: bool = True) -> int:
    """All cells that are not finished yet; the failures are listed at the end. 0 when none is left, 1 otherwise, 130 when interrupted."""
    folder = plans[0].folder.parent
    check_places(plans, folder)
    begin, keys, said = time.monotonic(), [key_of(plan, chosen) for plan in plans], {}
    for i, (plan, key) in enumerate(zip(plans, keys, strict=True)):
        if not plan.fresh and finished(plan, key):
            said[i] = "finished before"
    left = [i for i in range(len(plans)) if i not in said]
    runner.say(f"{len(plans)} cells, {len(said)} finished before; {jobs} at a time" + (f" on {scheduler}" if scheduler else ""))
    if scheduler and exposed(scheduler):
        runner.say(f"warning: {scheduler} is without TLS: whoever reaches it can run code as you. Start scheduler and workers with certificates, "
                   "and give tls://...")
    status = 0
    try:
        if left:
            calls = [(plans[i].described(), [chapter.described() for chapter in chosen], keys[i]) for i in left]
            with spread(run_described, calls, jobs=min(jobs, len(left)), scheduler=scheduler, html=html) as results:
                for position, result in results:
                    i = left[position]
                    said[i] = {0: "ok", 1: "FAILED"}.get(result, f"FAILED, {result}")
                    runner.say(f"[{len(said)}/{len(plans)}] {plans[i].folder.name}: {said[i]}")
    except KeyboardInterrupt:
        status = 130
    runner.say("")
    for i, plan in enumerate(plans):
        runner.say(f"  {plan.folder.name}: {said.get(i, 'not run')}")
    if rows := scores([plan for i, plan in enumerate(plans) if said.get(i) in ("ok", "finished before")]):
        import pandas as pd
        table = folder / TABLE
        output.atomic_write(table, csv_text(pd.DataFrame(rows), index=False))
        runner.say(f"  every method's scores, by cell and seed: {runner.short(table)}")
    failed = [i for i in range(len(plans)) if said.get(i) not in ("ok", "finished before")]
    runner.say(f"  {len(plans) - len(failed)} of {len(plans)} cells are finished, {time.monotonic() - begin:.0f} seconds; results in {runner.short(folder)}/")
    if failed:
        runner.say("The same command runs the others again.")
    return status or int(bool(failed))
