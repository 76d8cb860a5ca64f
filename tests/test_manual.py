"The manual: notebooks as pages, links, the API reference, and a small site that Sphinx builds without a warning"
import json
import re
import subprocess
from pathlib import Path

import manual
import manual_api
import manual_llms
import pytest
from fastcore.docments import docments

from self_supervised_bt import all as everything
from self_supervised_bt import cli

root = Path(__file__).parents[1]


def code(source): return dict(cell_type="code", metadata={}, source=source, outputs=[], execution_count=None)
def prose(source): return dict(cell_type="markdown", metadata={}, source=source)
def notebook(*cells):
    return dict(cells=[c | dict(id=f"c{i}") for i, c in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)


# Notebooks

def test_directives_are_applied_and_do_not_show():
    cells = [prose("# Title\n\n> A line."), code("#| default_exp losses"), code("#| hide\nimport os"),
             code("#| export\nimport torch"), code("#| exporti\nLIMIT = 3\ndef f(x):\n    y = 1\nclass A: pass"),
             code("#| eval: false\nslow()"), code("1 + 1"), code(" ")]
    shown = manual.shown_notebook(notebook(*cells), "nbs/13_losses.ipynb", "how-it-works/losses.ipynb", {}, "About.")
    texts = [c["source"] for c in shown["cells"]]
    assert texts == ["# Title\n\n> A line.", "About.", "import torch", "LIMIT = 3\ndef f(x):\n    y = 1\nclass A: pass",
                     "slow()", "1 + 1"]
    folded = [c for c in shown["cells"] if "tags" in c["metadata"]]
    assert [c["metadata"]["mystnb"]["code_prompt_show"] for c in folded] == ["Source: imports", "Source: LIMIT, f, A"]
    assert cells[4]["source"].startswith("#| exporti"), "the notebook itself is as it was"


def test_no_notebook_shows_a_directive_or_a_hidden_cell():
    made = manual.pages()
    for source, page in made.items():
        if not page.endswith(".ipynb"): continue
        shown = manual.shown_notebook(json.loads((root/source).read_text()), source, page, made)
        text = "\n".join(c["source"] for c in shown["cells"])
        assert not re.search(r"^\s*#\|", text, re.M), source
        assert "IProgress not found" not in text, f"{source} shows a hidden cell"
        title, summary = manual.title_and_summary(shown)
        assert title and summary.endswith((".", "?")), f"{source}: a title, and a line below it"


def test_figures_have_a_text():
    lesson = notebook(prose("# A"), prose("## The `c` matrix"), code("plot()"))
    shown = manual.shown_notebook(lesson, "nbs/a.ipynb", "a.ipynb", {})
    assert shown["cells"][-1]["metadata"]["mystnb"]["image"]["alt"] == "Figure of the section: The c matrix"


# Links

MADE = {"nbs/33_doctor.ipynb": "how-it-works/doctor.ipynb", "docs/benchmarks.md": "benchmarks.md",
        "nbs/60_tutorial_digits.ipynb": "tutorials/digits.ipynb"}

@pytest.mark.parametrize("text,expected", [
    ("see [it](33_doctor.ipynb)", "see [it](../how-it-works/doctor.ipynb)"),
    ("[`a[0]` b](33_doctor.ipynb#checks), [c](60_tutorial_digits.ipynb)",
     "[`a[0]` b](../how-it-works/doctor.ipynb#checks), [c](digits.ipynb)"),
    ("[speed](../docs/benchmarks.md#the-views)", "[speed](../benchmarks.md#the-views)"),
    ("[here](#part) [there](https://arxiv.org/abs/1)", "[here](#part) [there](https://arxiv.org/abs/1)"),
    ("```python\nx[0](33_doctor.ipynb)\n```\n[it](33_doctor.ipynb)",
     "```python\nx[0](33_doctor.ipynb)\n```\n[it](../how-it-works/doctor.ipynb)"),
    ("![a picture](33_doctor.ipynb)", "![a picture](33_doctor.ipynb)"),
    ("the [licence](../LICENSE)", "the licence")])
def test_links_lead_to_pages(text, expected, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert manual.with_links(text, "nbs/61_x.ipynb", "tutorials/x.ipynb", MADE) == expected


def test_files_that_are_no_pages_are_linked_where_the_repository_is_known(monkeypatch):
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "me/it")
    text = manual.with_links("[licence](../LICENSE)", "nbs/a.ipynb", "a.ipynb", {})
    assert text == "[licence](https://github.com/me/it/blob/main/LICENSE)"


def test_a_link_to_nothing_is_an_error():
    with pytest.raises(ValueError, match="docs/a.md links to b.md, which does not exist"):
        manual.with_links("[b](b.md)", "docs/a.md", "a.md", {})


def test_every_notebook_and_how_to_page_has_one_place():
    made = manual.pages()
    assert len(set(made.values())) == len(made) - 1, "README.md and index.ipynb are one page, all others two"
    assert made["nbs/33_doctor.ipynb"] == "how-it-works/doctor.ipynb" and made["docs/benchmarks.md"] == "benchmarks.md"
    assert made["nbs/70_experiment_loss.ipynb"] == "experiments/loss.ipynb"
    assert {f"docs/howto/{f.name}" for f in (root/"docs/howto").iterdir()} <= set(made)
    texts = manual.section_pages()
    for f in (root/"docs/howto").iterdir(): assert f"<{manual.howto_page(f)}>" in texts["howto/index.md"], f.name


def test_the_glossary_has_every_word():
    rows = (root/"CONTRIBUTING.md").read_text().split("## Glossary")[1].count("\n| ") - 1
    page = manual.glossary_page()
    assert page.count("\n  ") == rows > 20 and "\nview\n  one augmented copy" in page


def test_broken_links_are_found(tmp_path):
    (tmp_path/"sub").mkdir()
    (tmp_path/"index.html").write_text(
        '<h1 id="a">A</h1><a href="sub/b.html#there">b</a><a href="https://x.org/no">x</a>'
        '<a href="#a">a</a><img src="no.png"><a href="#b">b</a>')
    (tmp_path/"sub/b.html").write_text('<p id="here"></p><a href="../index.html#a">back</a><a href="c.html">c</a>')
    assert manual.broken_links(tmp_path) == ["index.html: #b", "index.html: no.png", "index.html: sub/b.html#there",
                                             "sub/b.html: c.html"]


# The API reference

@pytest.mark.parametrize("name", everything.MODULES)
def test_every_public_name_has_its_place(name):
    page = manual_api.module_page(name, "../how-it-works/x.ipynb")
    found = re.findall(r"^`{3,}\{py:(?:function|class|data)\} (\w+)", page, re.M)
    assert found == manual_api.module(name).__all__ and f"{{py:module}} self_supervised_bt.{name}" in page


def test_a_table_says_what_the_source_says():
    from self_supervised_bt.layers import create_encoder
    table = manual_api.parameter_table(create_encoder)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    comments = docments(create_encoder, args_kwargs=True)
    assert [row[0].strip("| `") for row in rows] == [name for name in comments if name != "return"]
    assert r"| `small_stem` | `bool\|str\|None` | `False` | for ResNets: " in table
    assert r"| **returns** | `Module` |  | (B,n\_in,H,W) to representations (B,F);" in table


def test_signatures_and_defaults():
    from self_supervised_bt.losses import BarlowTwinsLoss
    from self_supervised_bt.recipes import Recipe
    def f(a, *args, b=1e-3, c=None, d=BarlowTwinsLoss, e=object(), **kwargs): pass
    assert manual_api.signature_text(f) == "(a, *args, b=0.001, c=None, d=BarlowTwinsLoss, e=..., **kwargs)"
    assert manual_api.signature_text(lambda a, *, b: None) == "(a, *, b)"
    assert "arch_args={}" in manual_api.signature_text(Recipe) and "| `lmb` |" in manual_api.parameter_table(Recipe)


def test_methods_of_fastai_and_names_typed_with_their_module():
    page = manual_api.module_page("recipes", "x")
    assert "{py:method} Learner.fit_recipe(epochs=None, cbs=None, **kwargs)" in page
    assert "{py:method} Learner" not in manual_api.module_page("fitting", "x"), "fit itself is fastai's"
    page = manual_api.module_page("zoo", "x", "then `zoo.get_model(name)` and zoo.CATALOGUE, zoo.no_such_name")
    assert "## Typed as `zoo.NAME`" in page and "{py:function} get_model(" in page and "CATALOGUE" not in page


@pytest.mark.parametrize("name", cli.__all__)
def test_every_option_of_a_command_is_on_its_page(name):
    text = manual_api.command_text(name)
    for action in manual_api.parser_of(getattr(cli, name))._actions:
        shown = [*action.option_strings, action.dest.upper()][0]
        hidden = action.dest in ("help", "pdb", "xtra")
        assert hidden or re.search(rf"^\| `{shown}[ `]", text, re.M), shown
    assert text.startswith(f"({name})=\n## `{name}`\n")


# Text for language models

def test_pages_as_plain_markdown():
    text = manual_llms.plain_markdown(
        "# A\n\n```{toctree}\n:hidden:\n\nb\n```\n\n- {doc}`B <b>`: it\n\n[c](../x/c.ipynb#d) [w](https://a.org/b.md)\n"
        "\n````{py:class} C(x)\n\nIt\n\n::::{container} parameters\n| a |\n::::\n````\n")
    assert text == ("# A\n\n- [B](b.html.md): it\n\n[c](../x/c.html.md#d) [w](https://a.org/b.md)\n\n"
                    "### `C(x)`\n\nIt\n\n| a |\n")
    output = dict(output_type="stream", text=["3\n"])
    picture = dict(output_type="display_data", data={"image/png": "x", "text/plain": "<Figure>"})
    cell = code("1 + 2") | dict(outputs=[output, picture])
    text = manual_llms.notebook_text(notebook(prose("# T"), cell))
    assert text == "# T\n\n```python\n1 + 2\n```\n\n```text\n3\n```\n"


def test_the_list_of_pages():
    texts = {"index": "# it\n\n> What it is.", "howto/a": "# Do `a`\n\nThus.", "api/index": "# API\n\nx"}
    text = manual_llms.contents(texts)
    assert text == "# it\n\n> What it is.\n\n## How to\n\n- [Do a](howto/a.html.md): Thus.\n"


# Sphinx: the whole site is built by `make docs` and its workflow, here a small one

@pytest.fixture
def small_site(tmp_path):
    pytest.importorskip("sphinx", reason="the docs extra is not installed: make docs builds the manual")
    pytest.importorskip("myst_nb", reason="the docs extra is not installed: make docs builds the manual")
    import base64
    png = base64.b64encode((root/"nbs/images/cross_correlation.png").read_bytes()).decode()
    figure = code("plot()") | dict(outputs=[dict(output_type="display_data", metadata={}, data={"image/png": png})])
    text = "# Lesson\n\nUse `barlow_twins_loss`, `learn.fit_recipe()` and `bt_export RUN`, not `loss`."
    lesson = notebook(prose(text),
                      code("#| hide\nsecret = 1"), code("#| export\ndef shown(): pass"), prose("## Part"), figure)
    texts = {"index.md": f"# Start\n\n{manual.toctree(['lesson', 'api/losses', 'api/recipes', 'api/commands'])}\n",
             "lesson.ipynb": json.dumps(manual.shown_notebook(lesson, "nbs/a.ipynb", "lesson.ipynb", {})),
             "api/losses.md": manual_api.module_page("losses", "../lesson.ipynb"),
             "api/recipes.md": manual_api.module_page("recipes", "../lesson.ipynb"),
             "api/commands.md": manual_api.commands_page("../lesson.ipynb")}
    manual.write_source(tmp_path/"source", texts)
    done = subprocess.run(manual.sphinx_command(tmp_path/"source", tmp_path/"html"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path/"html"


def test_a_small_site(small_site):
    page = (small_site/"lesson.html").read_text()
    names = re.findall(r'<a class="reference internal" href="(api/[^"]+)"[^>]*><code[^>]*>(.*?)</code>', page)
    links = {re.sub("<[^>]+>", "", text): link for link, text in names}
    assert links == {"barlow_twins_loss": "api/losses.html#self_supervised_bt.losses.barlow_twins_loss",
                     "learn.fit_recipe()": "api/recipes.html#self_supervised_bt.recipes.Learner.fit_recipe",
                     "bt_export RUN": "api/commands.html#bt-export"}
    assert "#|" not in page and "secret" not in page and "Source: shown" in page
    assert 'alt="Figure of the section: Part"' in page
    assert manual.broken_links(small_site) == []
