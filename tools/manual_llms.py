"""The manual as plain Markdown for language models, beside the pages: llms.txt lists them, llms-full.txt holds them

As nbdev's sites have it: `PAGE.html.md` is the text of PAGE.html, https://llmstxt.org describes llms.txt.
"""
import json
import re

FULL = ("index", "howto/", "tutorials/", "api/", "glossary")
PARTS = {"howto": "How to", "tutorials": "Tutorials", "api": "API reference", "how-it-works": "How it works",
         "experiments": "Experiments", "": "More"}


def output_text(output):
    "An output as text; figures and tables in HTML have their text form, pictures alone have none"
    data = output.get("data", {})
    text = data.get("text/markdown") or data.get("text/plain") or output.get("text") or ""
    text = "".join(text)
    if "image/png" in data: return ""
    return text if "text/markdown" in data or not text else f"```text\n{text.rstrip()}\n```"


def notebook_text(notebook):
    "A notebook as Markdown: prose, code and outputs"
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [output_text(o) for o in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain_markdown(text):
    "MyST as plain Markdown: objects become headings, what is for the site alone goes"
    text = re.sub(r"^```\{toctree\}\n.*?^```\n?", "", text, flags=re.M | re.S)
    text = re.sub(r"^::::\{grid\}.*?^::::\n", "", text, flags=re.M | re.S)
    text = re.sub(r"^```\{py:module\}.*\n```\n", "", text, flags=re.M)
    if "{py:" in text:
        text = re.sub(r"^`{3,}$\n?", "", text, flags=re.M)
        text = re.sub(r"^`{3,}\{py:\w+\} (.*)$", r"### `\1`", text, flags=re.M)
    text = re.sub(r"^```\{glossary\}\n|^:::+.*\n|^:::+$|^\(\w+\)=\n", "", text, flags=re.M)
    text = re.sub(r"\]\((?!\w+:)([^)#\s]+)\.(?:md|ipynb)(#[^)]*)?\)", r"](\1.html.md\2)", text)
    text = re.sub(r"\{doc\}`([^`<]*) <([^`>]*)>`", r"[\1](\2.html.md)", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page_text(name, text):
    return plain_markdown(notebook_text(json.loads(text)) if name.endswith(".ipynb") else text)


def title_and_line(text):
    "The title of a page and the first line of its text"
    lines = [line.removeprefix("> ") for line in text.splitlines() if line.strip()]
    title = lines[0].lstrip("# ").replace("`", "")
    first = next((line for line in lines[1:] if not line.startswith(("#", "|", "`", "-", "!"))), "")
    return title, first


def contents(texts):
    "llms.txt: what this is, and every page with a line about it"
    start = texts["index"]
    title, summary = title_and_line(start)
    parts = [f"# {title}", f"> {summary}"]
    for folder, heading in PARTS.items():
        own = {name: text for name, text in texts.items() if name.rpartition("/")[0] == folder and name != "index"}
        rows = [f"- [{title_and_line(text)[0]}]({name}.html.md): {title_and_line(text)[1]}"
                for name, text in own.items() if not name.endswith("/index")]
        if rows: parts += [f"## {heading}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def write_texts(site, pages):
    "A Markdown file beside each page of the site, llms.txt and llms-full.txt"
    texts = {name.rpartition(".")[0]: page_text(name, text) for name, text in pages.items()}
    for name, text in texts.items(): (site/f"{name}.html.md").write_text(text)
    (site/"llms.txt").write_text(contents(texts))
    full = [text for name, text in texts.items() if name.startswith(FULL) and not name.endswith("/index")]
    (site/"llms-full.txt").write_text("\n\n".join(full))
