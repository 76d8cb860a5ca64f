"""The manual: a site made from the notebooks and the pages in docs/, with Sphinx and myst-nb

    python tools/manual.py          # docs/_build/html; warnings and broken links are errors
    python tools/manual.py --source # docs/_build/source alone: the pages as Sphinx reads them

Nothing is run: the notebooks are shown with their stored outputs. `pages` says which file becomes which page; links
between files of the repository become links between pages. A page that is added in nbs/ or docs/ is found by its name.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, normpath, relpath
from urllib.parse import unquote

root = Path(__file__).resolve().parents[1]
CHAPTERS = {"0": "Ground", "1": "Method", "2": "Training", "3": "Evaluation and diagnosis", "4": "Weights and search",
            "5": "Running", "9": "Everything at once"}
HOWTO = {"1": "Train", "2": "Evaluate", "3": "Use", "4": "Weights in and out", "5": "Images from anywhere"}
PARTS = ["tutorials/index", "howto/index", "how-it-works/index", "api/index", "benchmarks", "experiments/index",
         "glossary", "changelog", "contributing"]


# Which file becomes which page

def notebook_page(name):
    "The page of a notebook: 33_doctor -> how-it-works/doctor, 60_tutorial_digits -> tutorials/digits"
    if name == "index": return "index"
    number, title = name.split("_", 1)
    folder = {"6": "tutorials", "7": "experiments"}.get(number[0], "how-it-works")
    return f"{folder}/{title.removeprefix('tutorial_').removeprefix('experiment_')}"


def notebooks(): return sorted((root/"nbs").glob("[0-9]*.ipynb"))
def howto_files(): return sorted((root/"docs/howto").glob("[0-9]*.md"))
def howto_page(file): return file.stem.split("_", 1)[1]


def pages():
    "What Sphinx reads by the file it is made from: {\"nbs/33_doctor.ipynb\": \"how-it-works/doctor.ipynb\"}"
    made = {f"nbs/{f.name}": f"{notebook_page(f.stem)}.ipynb" for f in notebooks()}
    made |= {f"docs/{f.name}": f.name for f in sorted((root/"docs").glob("*.md"))}
    made |= {f"docs/howto/{f.name}": f"howto/{howto_page(f)}.md" for f in howto_files()}
    start = {"README.md": "index.md", "nbs/index.ipynb": "index.md", "docs/howto": "howto/index.md"}
    return made | start | {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def repository():
    "Address of the repository's files where a workflow says it, for links to files that are no pages"
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}/blob/main" if server and name else None


def with_links(text, source, page, made):
    "Markdown of the file `source` as the page `page`: links to other files lead to their pages"
    def link(m):
        label, target = m[1], m[2]
        if "://" in target or target.startswith(("#", "mailto:", "images/")): return m[0]
        path, _, anchor = target.partition("#")
        path = normpath(f"{dirname(source)}/{path}" if dirname(source) else path)
        anchor = f"#{anchor}" if anchor else ""
        if path in made: return f"[{label}]({relpath(made[path], dirname(page) or '.')}{anchor})"
        if not (root/path).exists(): raise ValueError(f"{source} links to {target}, which does not exist")
        return f"[{label}]({repository()}/{path})" if repository() else label
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)", link, part) for part in parts[::2]]
    pictures = relpath("images", dirname(page) or ".")
    return "".join(parts).replace("](images/", f"]({pictures}/")


# Notebooks

def directives(source):
    "nbdev's directives in a cell, without their marks: `#| eval: false` -> \"eval: false\""
    return [line.strip().removeprefix("#|").strip() for line in source.splitlines() if re.match(r"\s*#\|", line)]


def without_directives(source):
    return "\n".join(line for line in source.splitlines() if not re.match(r"\s*#\|", line)).strip("\n")


def defined(source):
    "What a cell defines, for the line that unfolds its source"
    names = re.findall(r"^(?:def|class) (\w+)|^([A-Za-z_]\w*)(?::\w+)? ?=(?!=)", source, re.M)
    names = list(dict.fromkeys(a or b for a, b in names))
    if not names: return "imports" if re.search(r"^(from|import) ", source, re.M) else "source"
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def shown_cell(cell, heading):
    "A code cell as the page shows it, or None: directives applied, library code folded, figures with a text"
    marks = directives(cell["source"])
    if any(mark == "hide" or mark.startswith("default_exp") for mark in marks): return None
    source = without_directives(cell["source"])
    if not source.strip(): return None
    metadata = {"mystnb": {"image": {"alt": f"Figure of the section: {heading}"}}}
    if any(mark.startswith("export") for mark in marks):
        label = f"Source: {defined(source)}"
        metadata["mystnb"] |= {"code_prompt_show": label, "code_prompt_hide": label}
        metadata["tags"] = ["hide-input"]
    return {**cell, "source": source, "metadata": metadata}


def shown_notebook(notebook, source, page, made, about=""):
    "A notebook as its page: no hidden cells, no directives, links to pages; `about` follows the title"
    cells, heading = [], ""
    for cell in notebook["cells"]:
        cell = {**cell, "source": "".join(cell["source"])}
        if cell["cell_type"] == "markdown":
            titles = re.findall(r"^#+ (.*)$", cell["source"], re.M)
            heading = titles[-1].replace("`", "") if titles else heading
            cell["source"] = with_links(without_directives(cell["source"]), source, page, made)
        else: cell = shown_cell(cell, heading)
        if cell: cells.append(cell)
        if len(cells) == 1 and about:
            cells.append({"id": "about", "cell_type": "markdown", "metadata": {}, "source": about})
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}   # some notebooks do not say it
    return {**notebook, "metadata": notebook["metadata"] | language, "cells": cells}


def title_and_summary(notebook):
    "The title of a notebook, and the line below it"
    text = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    summary = re.search(r"^> (.*?)(?=\n\n|\Z)", text, re.M | re.S)
    return re.search(r"^# (.*)$", text, re.M)[1], re.sub(r"\n>? ?", " ", summary[1]) if summary else ""


# Pages that list others

def toctree(entries, caption=""):
    "The list of pages that the navigation is made from"
    options = [":hidden:"] + ([f":caption: {caption}"] if caption else [])
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def page_list(listed):
    "A list of (page, title, summary) with links"
    def line(page, title, summary):
        return f"- {{doc}}`{title.replace('`', '')} <{page}>`{': ' + summary if summary else ''}"
    return "\n".join(line(*row) for row in listed)


def first_lines(path):
    "Title of a Markdown page, and its first paragraph"
    text = path.read_text()
    return re.search(r"^# (.*)$", text, re.M)[1], re.search(r"^# .*\n+(.*)$", text, re.M)[1]


def grouped(listed, groups):
    "[(number, page, title, summary)] under the headings of their chapters, each with its list of pages"
    text = []
    for chapter, caption in groups.items():
        own = [(page, title, summary) for number, page, title, summary in listed if number[0] == chapter]
        if own: text += [f"## {caption}", page_list(own), toctree([page for page, *_ in own], caption)]
    return "\n\n".join(text)


def listed_notebooks(folder):
    "Number, page within its folder, title and summary of the notebooks of one part of the site"
    for f in notebooks():
        page = notebook_page(f.stem)
        if page.startswith(f"{folder}/"):
            yield (f.stem, page.split("/")[1], *title_and_summary(json.loads(f.read_text())))


def list_page(title, about, folder):
    "The first page of a part whose notebooks are not divided into chapters"
    listed = [(page, *rest) for _, page, *rest in listed_notebooks(folder)]
    return f"# {title}\n\n{about}\n\n{page_list(listed)}\n\n{toctree([page for page, *_ in listed])}\n"


def section_pages():
    "The first pages of tutorials, how-to pages, how it works and experiments"
    howto = [(f.stem, howto_page(f), *first_lines(f)) for f in howto_files()]
    modules = list(listed_notebooks("how-it-works"))
    how = ("The library is these notebooks: each explains one module, shows it on examples, and holds its source, "
           "folded. Each uses only those above it.")
    return {
        "tutorials/index.md":
            list_page("Tutorials", "Whole runs from images to results, with the outputs they had.", "tutorials"),
        "experiments/index.md":
            list_page("Experiments", "What was compared, with settings, spread and cost.", "experiments"),
        "howto/index.md":
            "# How to\n\nOne page per job: the shortest command, the shortest script, what to watch.\n\n"
            f"{grouped(howto, HOWTO)}\n",
        "how-it-works/index.md": f"# How it works\n\n{how}\n\n{grouped(modules, CHAPTERS)}\n"}


def glossary_page():
    "The glossary of CONTRIBUTING.md, each word with an address of its own"
    table = (root/"CONTRIBUTING.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in re.findall(r"^\| .* \|$", table, re.M)[1:]]
    items = "\n\n".join(f"{word}\n  {meaning.strip()}" for word, meaning in rows)
    return f"# Glossary\n\nOne word for each thing, everywhere in code and text.\n\n```{{glossary}}\n{items}\n```\n"


def contributing_page(text):
    "CONTRIBUTING.md without its glossary, which is a page"
    before, glossary = text.split("## Glossary")
    after = glossary.split("\n## ", 1)
    return before + "The words: [glossary](glossary.md).\n" + (f"\n## {after[1]}" if len(after) > 1 else "")


def start_page(readme):
    "The README with the parts of the site"
    cards = [("Tutorials", "tutorials/index", "Whole runs, from images to results"),
             ("How to", "howto/index", "One page per job: command and script"),
             ("How it works", "how-it-works/index", "The notebooks the library is made of"),
             ("API", "api/index", "Every public name, and the commands")]
    grid = "\n".join(f":::{{grid-item-card}} {title}\n:link: {page}\n:link-type: doc\n{text}\n:::"
                     for title, page, text in cards)
    head, rest = readme.split("\n![", 1)
    return f"{head}\n::::{{grid}} 2 2 4 4\n:gutter: 2\n\n{grid}\n::::\n\n![{rest}\n{toctree(PARTS)}\n"


def modules_by_chapter():
    "The notebooks' chapters with their modules: {\"1\": [(\"fused\", \"how-it-works/fused\"), ...]}"
    from house import default_exp
    found = {}
    for f in notebooks():
        name = default_exp(f)
        if name and name not in ("all", "cli"): found.setdefault(f.stem[0], []).append((name, notebook_page(f.stem)))
    return found


def api_pages(text):
    "The API reference: one page per module, one for the commands, and the first page; `text` is what pages show"
    import manual_api as api
    made, parts = {}, []
    for chapter, found in modules_by_chapter().items():
        rows = []
        for name, page in found:
            made[f"api/{name}.md"] = api.module_page(name, f"../{page}.ipynb", text)
            public = ", ".join(f"`{n}`" for n in api.module(name).__all__)
            rows.append((name, name, f"{api.module(name).__doc__ or ''} {public}".strip()))
        parts += [f"## {CHAPTERS[chapter]}", page_list(rows), toctree([n for n, *_ in rows], CHAPTERS[chapter])]
    made["api/commands.md"] = api.commands_page("../how-it-works/cli.ipynb")
    commands = ", ".join(f"`{n}`" for n in api.module("cli").__all__)
    first = ["# API reference", "Signatures, parameters and results of every public name, by module.",
             f"## Commands\n\n[The console commands](commands.md): {commands}.", toctree(["commands"], "Commands")]
    made["api/index.md"] = "\n\n".join([*first, *parts]) + "\n"
    return made


# The source that Sphinx reads

def markdown_pages(made):
    "The pages that are written by hand, and those that list others"
    texts = section_pages() | {"glossary.md": glossary_page()}
    for source, page in made.items():
        if source.endswith(".md") and source != "README.md":
            texts[page] = with_links((root/source).read_text(), source, page, made)
    texts["contributing.md"] = contributing_page(texts["contributing.md"])
    from readme import readme
    start = readme().replace("(nbs/images/", "(images/").replace('src="nbs/images/', 'src="images/')
    return texts | {"index.md": with_links(start_page(start), "README.md", "index.md", made)}


def all_pages():
    "Every page of the manual as text: {\"howto/resume.md\": ..., \"tutorials/digits.ipynb\": ...}"
    made = pages()
    texts = markdown_pages(made)
    read = {source: json.loads((root/source).read_text()) for source, page in made.items() if page.endswith(".ipynb")}
    shown = [text for page, text in texts.items() if page == "index.md" or page.startswith("howto/")]
    shown += ["".join(cell["source"]) for source, nb in read.items() if made[source].startswith("tutorials/")
              for cell in nb["cells"]]
    texts |= api_pages("\n".join(shown))
    for source, notebook in read.items():
        page = made[source]
        api = page.replace("how-it-works/", "api/").replace(".ipynb", ".md").replace("cli.md", "commands.md")
        about = f"Signatures: [API reference](../{api})." if api in texts else ""
        texts[page] = json.dumps(shown_notebook(notebook, source, page, made, about), ensure_ascii=False)
    return texts


def write_source(folder, texts):
    "The pages and their pictures as files"
    for name, text in texts.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    shutil.copytree(root/"nbs/images", folder/"images")


# Links of the site

class Links(HTMLParser):
    "Addresses and anchors of one page"
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = set(), {"", "top"}
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.links |= {attrs[k] for k in ("href", "src") if attrs.get(k)}


def broken_links(site):
    "Links of the built pages to a file or anchor of the site that is not there: ['page: link']"
    files = [f for f in sorted(site.rglob("*.html")) if "_static" not in f.relative_to(site).parts]
    read = {f.relative_to(site).as_posix(): Links(f.read_text()) for f in files}
    broken = []
    for page, content in read.items():
        for link in sorted(content.links):
            if re.match(r"\w+:|//", link): continue
            path, _, anchor = unquote(link).partition("#")
            path = normpath(f"{dirname(page)}/{path.split('?')[0]}").lstrip("/") if path else page
            no_anchor = path in read and anchor not in read[path].anchors
            if no_anchor or not (site/path).exists(): broken.append(f"{page}: {link}")
    return broken


def sphinx_command(source, site):
    "Sphinx with every warning as an error"
    return [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-c", str(root/"docs"),
            "-d", str(site.parent/"doctrees"), str(source), str(site)]


def main(options):
    from manual_llms import write_texts
    build = root/"docs/_build"
    shutil.rmtree(build/"source", ignore_errors=True)
    texts = all_pages()
    write_source(build/"source", texts)
    if "--source" in options: return
    site = build/"html"
    if subprocess.run(sphinx_command(build/"source", site)).returncode:
        raise SystemExit("The manual has warnings: see above")
    write_texts(site, texts)
    broken = broken_links(site)
    if broken: raise SystemExit("Broken links:\n" + "\n".join(broken))
    print(f"{len(texts)} pages without a warning or broken link: open {(site/'index.html').relative_to(root)}")


if __name__ == "__main__": main(sys.argv[1:])
