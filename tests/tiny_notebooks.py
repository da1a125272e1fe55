"""Notebooks of a few cells, and profiles of a few settings, for the runner to run."""
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PROFILES = {"smoke": {"epochs": 1, "lr": 0.1, "seeds": [0]}, "cpu": {"epochs": 9, "lr": 0.1, "seeds": [0, 1, 2]}}
DECLARED = 'profile = "smoke"\ntask = "world"\nmodel = None\noverrides = {}'
DRAW = "import json, os, pathlib\n(pathlib.Path(os.environ['BMOE_FIGURES']) / '01_given.json').write_text(json.dumps(dict(profile=profile, task=task, model=model, overrides=overrides)))"


def notebook(project, name, *cells, declared=DECLARED):
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nb.cells = [new_markdown_cell(f"# Title of {name}\n\n**Claim.** It runs\nalone.\n\nMore."),
                new_code_cell(declared, metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
    path = project / "notebooks" / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path
