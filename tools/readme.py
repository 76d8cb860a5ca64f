"README.md from nbs/index.ipynb; --check says whether the two are in step (exit 1 if not)"
import re
import sys
from pathlib import Path
from posixpath import normpath

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor

root = Path(__file__).resolve().parents[1]


def readme():
    "The index notebook as Markdown: no hidden cells, and links seen from the folder above"
    exporter = MarkdownExporter()
    hidden = RegexRemovePreprocessor(patterns=[r"#\|\s*hide", r"\s*\Z"])
    hidden.enabled = True
    exporter.register_preprocessor(hidden, enabled=True)
    text, _ = exporter.from_filename(str(root/"nbs"/"index.ipynb"))
    def from_root(m): return m[0] if "://" in m[2] or m[2].startswith("#") else m[1] + normpath("nbs/" + m[2])
    return re.sub(r"""(\]\(|src=")([^)"]+)""", from_root, text).strip() + "\n"


if __name__ == "__main__":
    target = root/"README.md"
    if "--check" in sys.argv:
        sys.exit(target.read_text() != readme() and "README.md is not what nbs/index.ipynb says: run make export")
    target.write_text(readme())
