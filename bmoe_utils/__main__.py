"""The command line: `python -m bmoe_utils reproduce --profile cpu`; the work is done in `bmoe_utils.study.run.runner`."""
from __future__ import annotations

import argparse
import json
import os
import re
import sys

from bmoe_utils.study.run import engine, matrix, places, runner, sweep
from bmoe_utils.study.run.worker import speak_any_language

EXAMPLES = """examples:
  python -m bmoe_utils reproduce --profile cpu                    every chapter, as committed
  python -m bmoe_utils reproduce --profile cpu --only 04          one chapter alone
  python -m bmoe_utils reproduce --profile cpu --task FOLDER      your own questions: train and test, parquet or jsonl
  python -m bmoe_utils reproduce --profile gpu --task openbookqa --model PATH_OR_HUB_ID
  python -m bmoe_utils reproduce --profile smoke -p epochs=3      another value for one setting of the profile
  python -m bmoe_utils reproduce --profile paper --dry-run        the papers' whole matrix, with its estimated cost
  python -m bmoe_utils sweep --help                               many runs at once, over GPUs and machines
  python -m bmoe_utils profiles                                   every profile's settings
Finished artefacts are kept in data/cache: an interrupted run resumes when the same command is given again."""


SWEEPS = """examples:
  python -m bmoe_utils sweep --profile cpu --only 07 --seeds 0 1 2                     a run for each seed
  python -m bmoe_utils sweep --profile gpu --task openbookqa arc_challenge --model A B     every pair, one run a GPU
  python -m bmoe_utils sweep --profile cpu --only 04 --vary lr=[1e-4,3e-4] epochs=[10,20]
Given again, the same command runs what is not finished. Artefacts are shared: after a sweep over seeds,
`reproduce` with all of them draws its tables from what is there."""


def _jobs(text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{places.shown(text)} is not a number of processes, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise argparse.ArgumentTypeError(f"{places.shown(text)} is not a seed, an integer from 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m bmoe_utils", description="Bayesian mixture-of-experts language models: run the study.",
                                  epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    r = commands.add_parser("reproduce", help="run the chapters and write their figures", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    r.add_argument("--profile", required=True, metavar="NAME", help="smoke, cpu, gpu or paper; see the command `profiles`")
    r.add_argument("--only", nargs="+", metavar="NN", help="these chapters only, by number or file name")
    r.add_argument("--task", metavar="NAME_OR_FOLDER", help="default: the embedded world")
    r.add_argument("--model", metavar="NAME_OR_PATH", help="a mixture-of-experts causal language model; default: the profile's own")
    r.add_argument("-p", "--parameter", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override a setting of the profile; values are JSON or plain text")
    r.add_argument("--seeds", nargs="+", type=_seed, metavar="SEED", help="short for -p seeds=[...]")
    r.add_argument("--out", metavar="FOLDER", help="executed notebooks, HTML and figures; default: data/runs/<run>, figures of the committed run: figures")
    r.add_argument("--fresh", action="store_true", help="compute everything anew, whatever is finished")
    r.add_argument("--dry-run", action="store_true", help="only say what would run; of the profile paper, the whole matrix with its estimated cost")
    r.add_argument("--keep-going", action="store_true", help="after a failing chapter go on with the next")
    r.add_argument("--jobs", type=_jobs, metavar="N", help="chapters at a time; default: one a core (at most 4) for the embedded model, else one a GPU")
    r.add_argument("--html", action=argparse.BooleanOptionalAction, default=True, help="also write each executed notebook as HTML")
    s = commands.add_parser("sweep", help="run chapters for every combination of tasks, models and settings", epilog=SWEEPS,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    s.add_argument("--profile", required=True, metavar="NAME")
    s.add_argument("--only", nargs="+", metavar="NN", help="these chapters only, by number or file name")
    s.add_argument("--task", nargs="+", default=[None], metavar="NAME_OR_FOLDER")
    s.add_argument("--model", nargs="+", default=[None], metavar="NAME_OR_PATH")
    s.add_argument("--seeds", nargs="+", type=_seed, metavar="SEED", help="a cell for each")
    s.add_argument("--vary", action="extend", nargs="+", default=[], metavar="KEY=[V1,V2]", help="a cell for each value of a setting, a JSON list")
    s.add_argument("-p", "--parameter", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="a setting's value in every cell")
    s.add_argument("--out", metavar="FOLDER", help="a folder for each cell goes here; default: data/runs/sweep of the project")
    s.add_argument("--jobs", type=_jobs, metavar="N", help="cells at a time; default: one a core (at most 4) for the embedded model, else one a GPU")
    s.add_argument("--scheduler", metavar="ADDRESS",
                   help="of a running dask scheduler, whose workers share this folder; default: processes here, which open no port. Whoever reaches a "
                        "scheduler can run code as its user: beyond this machine take tls://HOST:PORT, its certificates in dask's configuration "
                        "(distributed.comm.tls) or the environment (DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT, ...__CLIENT__KEY)")
    s.add_argument("--html", action=argparse.BooleanOptionalAction, default=True, help="also write each executed notebook as HTML")
    commands.add_parser("list", help="the chapters and what each one tests")
    commands.add_parser("profiles", help="the profiles and their settings")
    return top


def _reproduce(options) -> int:
    overrides = runner.overrides_of(options.profile, options.parameter, options.seeds)
    plan = runner.Plan.make(options.profile, options.task, options.model, overrides, options.out, options.fresh)
    chosen = runner.select(runner.chapters(), options.only)
    runner.check_places(plan)
    if options.dry_run:
        return _say_plan(plan, chosen)
    return runner.run(plan, chosen, html=options.html, keep_going=options.keep_going, jobs=options.jobs or engine.workers_for(plan.embedded))


def _say_plan(plan: runner.Plan, chosen: list[runner.Chapter]) -> int:
    if plan.profile == "paper" and plan.task == "world":      # the world is no set of the papers: nothing more particular was asked for
        for line in matrix.lines(runner.settings_of("paper") | plan.overrides):
            runner.say(line)
        runner.say("one cell alone:  python -m bmoe_utils sweep --profile paper --only 11 --task SET --model MODEL --seeds 0 --vary 'methods=[[\"map\"]]'")
        return 0
    before = {row["chapter"]: row["seconds"] for row in runner.summary_of(plan).get("chapters", [])}
    for chapter in chosen:
        seconds = before.get(chapter.path.stem)
        runner.say(f"{chapter.path.stem}" + (f": {seconds:.0f} s the last time" if seconds else ""))
    runner.say(f"figures would go to {runner.short(plan.figures)}/, executed notebooks to {runner.short(plan.folder)}/")
    return 0


def _sweep(options) -> int:
    vary = {}
    for pair in options.vary:
        key, _, text = pair.partition("=")
        values = runner.value_of(text)
        if not isinstance(values, list) or not values:
            raise runner.UsageError(f"--vary {places.shown(pair)}: write key=[value,value], a JSON list")
        if key in vary:
            raise runner.UsageError(f"--vary {key}: varied twice")
        for value in values:
            runner.overrides_of(options.profile, [f"{key}={json.dumps(value)}"])
        vary[key] = values
    if options.seeds:
        if "seeds" in vary:
            raise runner.UsageError("seeds are varied twice: by --vary and by --seeds")
        vary["seeds"] = [[seed] for seed in options.seeds]
    overrides = runner.overrides_of(options.profile, options.parameter)
    if both := set(vary) & set(overrides):
        raise runner.UsageError(f"{', '.join(sorted(both))}: given by -p and varied as well")
    if options.out is not None and not options.out.strip():
        raise runner.UsageError("--out: name a folder")
    folder = places.located(options.out, "out") if options.out else runner.project_root() / "data" / "runs" / "sweep"
    plans = sweep.cells(options.profile, options.task, options.model, vary, overrides, folder)
    chosen = runner.select(runner.chapters(), options.only)
    return sweep.run(plans, chosen, jobs=options.jobs or engine.workers_for(all(plan.embedded for plan in plans)), scheduler=options.scheduler, html=options.html)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m bmoe_utils`; returns the exit status: 0, or 1 where something failed, 2 for a request that
    cannot be meant, 130 when interrupted. What the user can mend is said in one line."""
    speak_any_language()
    options = parser().parse_args(argv)
    try:
        if options.command == "list":
            for chapter in runner.chapters():
                runner.say(f"{chapter.number}  {chapter.title}" + (f"\n    {chapter.claim}" if chapter.claim else ""))
        elif options.command == "profiles":
            for name, settings in runner.profiles().items():
                runner.say(f"{name}\n" + "\n".join(f"    {key} = {json.dumps(value, default=str)}" for key, value in settings.items()))
        else:
            return {"reproduce": _reproduce, "sweep": _sweep}[options.command](options)
        sys.stdout.flush()                            # here, where it is known what to do if nobody reads on
    except runner.UsageError as error:
        return _fail(error, 2)
    except BrokenPipeError:                           # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:                          # a full disk, a folder that may not be written to
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, 1)
    except KeyboardInterrupt:
        print("Interrupted. Finished artefacts are kept: the same command resumes.", file=sys.stderr)
        return 130
    return 0


def _fail(why: object, status: int) -> int:
    print("error: " + " ".join(str(why).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
