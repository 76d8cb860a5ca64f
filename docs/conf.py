"Settings of the manual; `make docs` builds it, tools/manual.py says from what"
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tools"))
ini = ConfigParser(delimiters=["="])
ini.read(root/"settings.ini", encoding="utf-8")

project = ini["DEFAULT"]["lib_name"]
author = ini["DEFAULT"]["author"]
copyright = f"{author}, {ini['DEFAULT']['license']}"
release = ini["DEFAULT"]["version"]
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "sphinx-mathjax-offline", "manual_names"]

# Pages: the notebooks with their stored outputs, nothing runs
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = f"{project} {release}"
html_static_path = [str(root/"docs/static")]
html_css_files = ["manual.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": project},
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {page: [] for page in ("index", "benchmarks", "glossary", "changelog", "contributing")}
