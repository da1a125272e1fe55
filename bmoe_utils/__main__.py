"""The command line: `python -m bmoe_utils reproduce --profile cpu`; the work is done in `bmoe_utils.runner`."""
from __future__ import annotations

import argparse, json, sys

from bmoe_utils import runner

EXAMPLES = """examples:
  python -m bmoe_utils reproduce --profile cpu                    every chapter, as committed
  python -m bmoe_utils reproduce --profile cpu --only 04          one chapter alone
  python -m bmoe_utils reproduce --profile cpu --task FOLDER      your own questions: train and test, parquet or jsonl
  python -m bmoe_utils reproduce --profile gpu --task openbookqa --model PATH_OR_HUB_ID
  python -m bmoe_utils reproduce --profile smoke -p epochs=3      another value for one setting of the profile
  python -m bmoe_utils profiles                                   every profile's settings
Finished artefacts are kept in data/cache: an interrupted run resumes when the same command is given again."""


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
    r.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="short for -p seeds=[...]")
    r.add_argument("--out", metavar="FOLDER", help="executed notebooks, HTML and figures; default: data/runs/<run>, figures of the committed run: figures")
    r.add_argument("--fresh", action="store_true", help="compute everything anew, whatever is finished")
    r.add_argument("--keep-going", action="store_true", help="after a failing chapter go on with the next")
    r.add_argument("--html", action=argparse.BooleanOptionalAction, default=True, help="also write each executed notebook as HTML")
    commands.add_parser("list", help="the chapters and what each one tests")
    commands.add_parser("profiles", help="the profiles and their settings")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m bmoe_utils`; returns the exit status (2 for a request that names something unknown)."""
    options = parser().parse_args(argv)
    try:
        if options.command == "list":
            for chapter in runner.chapters():
                runner.say(f"{chapter.number}  {chapter.title}" + (f"\n    {chapter.claim}" if chapter.claim else ""))
        elif options.command == "profiles":
            for name, settings in runner.profiles().items():
                runner.say(f"{name}\n" + "\n".join(f"    {key} = {json.dumps(value, default=str)}" for key, value in settings.items()))
        else:
            overrides = runner.overrides_of(options.profile, options.parameter, options.seeds)
            plan = runner.Plan.make(options.profile, options.task, options.model, overrides, options.out)
            return runner.run(plan, runner.select(runner.chapters(), options.only), fresh=options.fresh, html=options.html, keep_going=options.keep_going)
    except runner.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
