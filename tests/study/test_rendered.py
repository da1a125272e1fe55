"""Executed chapters as Markdown: what a reader of a code host is shown, and that the committed
files are those of the notebooks."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_notebooks import MACHINE
from tiny_notebooks import PROFILES, notebook

from bmoe_utils.__main__ import main
from bmoe_utils.study.run import rendered, runner

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "notebooks" / rendered.FOLDER).glob("*.md"))
NONE = pytest.mark.skip(reason="notebooks/rendered holds nothing: a run of all chapters fills it")
PICTURES = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def told(*outputs, source="x"):
    """The Markdown of a chapter of one code cell, after its first two lines."""
    return rendered.markdown(
        new_notebook(cells=[new_code_cell(source, outputs=list(outputs))]), "01_one.ipynb", {}
    ).split("\n\n", 1)[1]


def stdout(text, name="stdout"):
    return new_output("stream", name=name, text=text)


# ---------------------------------------------------------------- cells
def test_a_chapter_reads_from_title_to_picture(tmp_path):
    for folder in ("figures", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "figures/01_two_words.png").write_bytes(b"a picture")
    (tmp_path / "figures/02_two_words.png").write_bytes(b"another chapter's")
    png = [base64.b64encode(content).decode() for content in (b"a picture", b"another chapter's")]
    nb = new_notebook(
        cells=[
            new_markdown_cell("# 1. Title\n\n**Claim.**"),
            new_code_cell('profile = "smoke"', metadata={"tags": ["parameters"]}),
            new_code_cell(
                '# Parameters\nprofile = "cpu"\nmodel = None\n',
                metadata={"tags": ["injected-parameters"]},
            ),
            new_code_cell(
                "# NBVAL_CHECK_OUTPUT\nshow()",
                outputs=[
                    new_output("display_data", {"image/png": data, "text/plain": "<Image>"})
                    for data in png
                ],
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "run/01_one.ipynb")
    target = tmp_path / "notebooks/rendered/01_one.md"
    assert rendered.render(tmp_path / "run/01_one.ipynb", tmp_path / "figures", target) == target
    text = target.read_text(encoding="utf-8")
    first, rest = text.split("\n", 1)
    assert rendered.source_hash(nb) in first and first.startswith("<!--") and first.endswith("-->")
    assert rest == (
        "\n# 1. Title\n\n*[01_one.ipynb](../01_one.ipynb) as the committed run left it; "
        "long code is folded.*\n\n**Claim.**\n\n"
        'Parameters: `profile = "cpu"`, `model = None`\n\n```python\nshow()\n```\n\n'
        "![two words](../../figures/01_two_words.png)\n\n*(a picture that is not kept)*\n"
    )
    assert [path.name for path in target.parent.iterdir()] == ["01_one.md"]


def test_the_source_is_that_of_the_notebook_whatever_it_was_given():
    cells = [
        new_markdown_cell("# T"),
        new_code_cell("a = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("print(a)"),
    ]
    own = rendered.source_hash(new_notebook(cells=cells))
    ran = [
        *cells[:2],
        new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("print(a)", outputs=[stdout("2\n")], execution_count=3),
    ]
    assert rendered.source_hash(new_notebook(cells=ran)) == own
    assert (
        rendered.source_hash(new_notebook(cells=[*cells, new_code_cell("")]))
        != own
        != rendered.source_hash(new_notebook(cells=[*cells[:2], new_markdown_cell("print(a)")]))
    )


def test_long_code_is_folded():
    assert told(source="a\n" * 8) == "```python\n" + "a\n" * 8 + "```\n"
    assert (
        told(source="a\n" * 9)
        == "<details><summary>code (9 lines)</summary>\n\n```python\n"
        + "a\n" * 9
        + "```\n\n</details>\n"
    )
    assert "code (1 line)" in told(source="a" * 801) and not rendered.code("# NBVAL_CHECK_OUTPUT\n")
    assert told(source="'''\n```\n'''") == "````python\n'''\n```\n'''\n````\n"


@pytest.mark.parametrize(
    "text, prose",
    [
        (
            "[a](02_b.ipynb), [b](../data/x.md), [c](https://d.org), [e](#f), ![g](h.png)",
            "[a](../02_b.ipynb), [b](../../data/x.md), [c](https://d.org), [e](#f), ![g](../h.png)",
        ),
        ("`[a](b)` and `$x`, ```\n[a](b) $x$\n```", "`[a](b)` and `$x`, ```\n[a](b) $x$\n```"),
        (r"of $\Sigma_x\,$ and $a$", r"of $`\Sigma_x\,`$ and $`a`$"),
        ("so\n\n$$a\\,b_1$$\n\nwith $c$", "so\n\n```math\na\\,b_1\n```\n\nwith $`c`$"),
        ("in $$a$$ line", "in\n\n```math\na\n```\n\nline"),
    ],
)
def test_prose_is_kept_but_for_links_and_formulas(text, prose):
    assert rendered.prose(text) == prose


# ---------------------------------------------------------------- outputs
def test_printed_text_is_what_a_terminal_would_show():
    bar = [stdout(f"\rfine-tuning:  {n}%|█▍   | 1/3 [00:30<02:54, 17.09it/s]") for n in (15, 29)]
    text = told(
        *bar,
        stdout("\r              "),
        stdout("\r"),
        stdout("  a = 1\n\n"),
        stdout("UserWarning: no\n", "stderr"),
        stdout("\x1b[1mb\x1b[0m\r\nc  \n"),
    )
    assert text == "```python\nx\n```\n\n```\n  a = 1\n\nb\nc\n```\n"
    assert told(stdout("\r100%|███| 3/3\n"), stdout("waiting\n", "stderr")) == "```python\nx\n```\n"


def test_results_that_say_nothing_are_left_out():
    of = lambda text: told(new_output("execute_result", {"text/plain": text}))
    assert (
        of("PosixPath('/x/figures/11_ranks.png')")
        == of("<Figure at 0x7f00>")
        == of("None")
        == told()
    )
    assert of("{'a': 1}").endswith("```\n{'a': 1}\n```\n")
    assert told(
        stdout("a"), new_output("error", ename="E", evalue="why", traceback=["/x/y.py"])
    ).endswith("```\na\n```\n\n```\nE: why\n```\n")


def test_tables():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"NLL ↓": [1.5, -0.25], "said": ["a|b", "<c>"]},
        index=pd.Index(["p*", "MAP"], name="method"),
    )
    assert (
        rendered.table(frame.to_html())
        == "| method | NLL ↓ | said |\n| :-- | --: | :-- |\n"
        "| p\\* | 1.50 | a\\|b |\n| MAP | -0.25 | &lt;c> |"
    )
    assert (
        rendered.table(frame.reset_index(drop=True)[["NLL ↓"]]._repr_html_())
        == "| NLL ↓ |\n| --: |\n| 1.50 |\n| -0.25 |"
    )
    index = pd.MultiIndex.from_tuples(
        [("53%", "MAP"), ("53%", "SWAG"), ("44%", "MAP")], names=["promise", "method"]
    )
    columns = pd.MultiIndex.from_product([["near", "far"], ["NLL"]], names=["split", None])
    deep = pd.DataFrame([["1 ± 2", "3/3"]] * 3, index=index, columns=columns)
    assert rendered.table(deep.to_html()).splitlines() == [
        "| promise | method | near NLL | far NLL |",
        "| :-- | :-- | --: | --: |",
        "| 53% | MAP | 1 ± 2 | 3/3 |",
        "|  | SWAG | 1 ± 2 | 3/3 |",
        "| 44% | MAP | 1 ± 2 | 3/3 |",
    ]
    assert rendered.table(
        pd.DataFrame({"a": [0.5]}, index=["x"]).rename_axis(columns="split").to_html()
    ).startswith("| split | a |\n")
    assert rendered.table("<p>none</p>") == rendered.table("") == ""
    shown = told(
        new_output("execute_result", {"text/html": frame.to_html(), "text/plain": "as text"})
    )
    assert "| method |" in shown and "as text" not in shown


# ---------------------------------------------------------------- runs
SHOWN = """import base64, os, pathlib
from IPython.display import Image, display
dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
(pathlib.Path(os.environ["BMOE_FIGURES"]) / "01_dot.png").write_bytes(base64.b64decode(dot))
display(Image(base64.b64decode(dot)))"""


def test_the_committed_run_renders_what_ended_well(project, monkeypatch, capsys):
    monkeypatch.setattr(runner, "profiles", lambda: PROFILES)
    own = notebook(project, "01_one", SHOWN)
    notebook(project, "02_two", "1 / 0")
    folder = project / "notebooks" / rendered.FOLDER
    run = ["reproduce", "--jobs", "1", "--no-html", "--keep-going", "--profile"]
    assert (
        main([*run, "smoke", "--only", "1"])
        == 0
        == main([*run, "cpu", "--only", "1", "--out", str(project / "elsewhere")])
        and not folder.exists()
    )
    assert main([*run, "cpu"]) == 1
    assert [path.name for path in folder.iterdir()] == ["01_one.md"]
    text = (folder / "01_one.md").read_text(encoding="utf-8")
    assert (
        "![dot](../../figures/01_dot.png)" in text
        and rendered.source_hash(rendered.read(own)) in text
        and 'Parameters: `profile = "cpu"`' in text
    )
    assert [chapter.path.stem for chapter in runner.chapters()] == ["01_one", "02_two"]

    # from what a run left, without running: the same; and one that cannot be written costs a line
    (folder / "01_one.md").unlink()
    (made,) = rendered.render_all(
        project / "data/runs/cpu", project / "figures", project / "notebooks", ["01_one"]
    )
    assert made.read_text(encoding="utf-8") == text
    made.unlink(), folder.rmdir(), folder.write_text("in the way")
    assert (
        main([*run, "cpu", "--only", "1"]) == 0
        and "01_one: not rendered, " in capsys.readouterr().out
    )


# ---------------------------------------------------------------- the committed files
@pytest.mark.skipif(not COMMITTED, reason=NONE.kwargs["reason"])
def test_every_chapter_is_rendered():
    assert [path.name for path in COMMITTED] == [
        f"{chapter.path.stem}.md" for chapter in runner.chapters(ROOT / "notebooks")
    ]


@pytest.mark.parametrize(
    "path", COMMITTED or [pytest.param(None, marks=NONE, id="none")], ids=lambda path: path.stem
)
def test_a_rendered_chapter_is_that_of_its_notebook_and_shows_its_figures(path):
    text = path.read_text(encoding="utf-8")
    assert (
        rendered.source_hash(rendered.read(path.parents[1] / f"{path.stem}.ipynb"))
        in text.partition("\n")[0]
    ), "the notebook was changed after the run that this was made from: make reproduce"
    links = [(path.parent / link).resolve() for link in PICTURES.findall(text)]
    assert set(links) == set((ROOT / "figures").glob(f"{path.name[:2]}_*.png")), (
        "its pictures are those of the chapter in figures/"
    )
    assert (
        not MACHINE.search(text)
        and "\r" not in text
        and text.count("<details>") == text.count("</details>")
    )
