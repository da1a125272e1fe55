"""What a run leaves to be read: an index page over its executed chapters, figures and tables, and `results.json`.

Both are made from the files of the run alone: nothing is computed here, and what a run did not make is not shown.
"""
from __future__ import annotations

import csv
import html
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from bmoe_utils.study.output import atomic_write
from bmoe_utils.study.run.matrix import reported

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ border-top: 1px solid #ccc; padding-top: 1.2rem; margin-top: 2.5rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1.2rem; }}
figure {{ margin: 0; }} img {{ max-width: 100%; border: 1px solid #eee; }} figcaption {{ color: #555; font-size: .85rem; }}
table {{ border-collapse: collapse; font-size: .85rem; }} th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; }}
th:first-child, td:first-child {{ text-align: left; }} .wide {{ overflow-x: auto; }} .note {{ color: #555; }}
</style></head><body>
{body}
</body></html>
"""


def results(figures: Path) -> dict:
    """Chapter number -> file name without it -> content of every JSON and CSV file in ``figures``
    (a CSV as a list of rows, all text).

    A damaged one is left out, and a line to stderr names it.
    """
    found: dict[str, dict] = {}
    for path in sorted([*figures.glob("[0-9][0-9]_*.json"), *figures.glob("[0-9][0-9]_*.csv")]):
        chapter, _, name = path.name.partition("_")
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
            else:
                with path.open(newline="", encoding="utf-8") as file:
                    content = list(csv.DictReader(file))
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            print(f"{path} is left out: it cannot be read ({error}); run chapter {chapter} again",
                  file=sys.stderr, flush=True)
            continue
        found.setdefault(chapter, {})[name] = content
    return found


def table(rows: Iterable[dict]) -> str:
    """Rows of text as an HTML table; the first column is the row's name."""
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape('' if v is None else str(v))}</td>" for v in row.values()) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def link(target: str, text: str) -> str:
    return f'<a href="{html.escape(target, quote=True)}">{html.escape(text)}</a>'


def _chapter(chapter, folder: Path, figures: Path, content: dict) -> str:
    page = f"{chapter.path.stem}.html"
    parts = [f"<h2>{link(page, chapter.title) if (folder / page).exists() else html.escape(chapter.title)}</h2>", f"<p>{html.escape(chapter.claim)}</p>"]
    pictures = sorted(figures.glob(f"{chapter.number}_*.png"))
    if pictures:
        parts.append('<div class="figures">')
        for picture in pictures:
            numbers = figures / f"{picture.stem}.json"
            beside = f" ({link(f'figures/{numbers.name}', 'numbers')})" if numbers.exists() else ""
            name = picture.stem[3:].replace("_", " ")
            parts.append(f'<figure><a href="figures/{picture.name}"><img src="figures/{picture.name}" alt="{html.escape(name)}" loading="lazy"></a>'
                         f"<figcaption>{html.escape(name)}{beside}</figcaption></figure>")
        parts.append("</div>")
    for file, rows in content.items():
        name, _, kind = file.rpartition(".")
        if kind == "csv":
            files = [f"{chapter.number}_{name}{suffix}" for suffix in (".csv", ".tex")]
            offered = ", ".join(link(f"figures/{file}", file) for file in files if (figures / file).exists())
            body = table(rows) if len(rows) <= 60 else ""            # longer ones are data, to be read by programs
            parts.append(f"<h3>{html.escape(name.replace('_', ' '))}</h3><p class=\"note\">{offered}</p>{body}")
    return "\n".join(parts)


def build(folder: Path, figures: Path, chapters, summary: dict) -> Path:
    """Writes ``folder/index.html``, ``folder/results.json`` and, where ``figures`` lie elsewhere, a copy of them; returns the index.

    ``chapters``: all of the study (:func:`runner.chapters`); ``summary``: the run's.
    """
    shown, content = folder / "figures", results(figures)
    if figures.resolve() != shown.resolve():           # copied over an earlier run's; nothing else there is touched, nor shown
        shown.mkdir(parents=True, exist_ok=True)
        for path in figures.glob("[0-9][0-9]_*.*"):
            if path.is_file():
                shutil.copy2(path, shown / path.name)
    titles = {c.number: c.title for c in chapters}
    everything = {"run": summary, "chapters": {number: {"title": titles.get(number), "results": named} for number, named in content.items()}}
    atomic_write(folder / "results.json", json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    about = f"profile {summary['profile']}, task {summary['task']}, model {summary['model'] or 'of the profile'}"
    body = ["<h1>Bayesian mixture-of-experts language models</h1>", f'<p class="note">{html.escape(about)}. Every number and what it rests on: '
            f"{link('results.json', 'results.json')}.</p>", "<ol>"]
    body += [f"<li>{link(f'{c.path.stem}.html', c.title.partition('. ')[2] or c.title)}</li>" for c in chapters if (folder / f"{c.path.stem}.html").exists()]
    body += ["</ol>", *([f"<h2>Reported and reproduced</h2>{table(rows)}"] if (rows := reported()) else [])]
    body += [_chapter(c, folder, figures, content.get(c.number, {})) for c in chapters if c.number in content or (folder / f"{c.path.stem}.html").exists()]
    return atomic_write(folder / "index.html", PAGE.format(title="Bayesian MoE study", body="\n".join(body)))
