"The order of the package: one list of modules, imports that point down, few public names, short cells and lines"
import ast
import builtins
import re
import sys
from pathlib import Path

import house
import pytest

from self_supervised_bt import all as everything

root = Path(__file__).parents[1]
trees = house.modules(root)
MODULES = [*everything.MODULES, "cli"]

GENERIC = """
apply batch check clean close column columns copy create data encoder export find fit fresh get hook image images labels
layer load log loss make map mean merge mix model name names open pack parse path pictures plot predict print read reset
restore rows run sample save score set settings setup show size sort split state std step steps sum swap term terms test
text train tune update validate values view views warn weights write
""".split()

# What fastai's classes get by assignment: a registry that outlives a reload, and where signature and comments are read.
ALLOWED_ASSIGNMENTS = ["Learner._fit_contexts", "Learner._in_fit", "Learner.__init__.__wrapped__"]


def test_one_list_says_what_the_modules_are():
    exported = [house.default_exp(notebook) for notebook in house.notebooks(root)]
    in_order = [module for module in exported if module]
    assert in_order == [*MODULES, "all"], "MODULES in 99_all.ipynb must name the notebooks that export, in their order"
    assert set(trees) == set(MODULES), "the package holds a module that no notebook exports"


def test_the_readme_describes_every_module():
    table = (root/"README.md").read_text().split("| module |")[1].split("\n\n")[0]
    assert re.findall(r"^\| \[`(\w+)`\]", table, re.M) == MODULES


def test_the_map_of_the_rooms_names_every_notebook():
    rooms = (root/"CONTRIBUTING.md").read_text().split("## The rooms")[1].split("## Glossary")[0]
    assert set(re.findall(r"`(\d\d_\w+|index)`", rooms)) == {notebook.stem for notebook in house.notebooks(root)}


def test_imports_point_to_lower_rooms_by_name():
    for name, imported, names in house.import_edges(trees):
        assert imported in MODULES[:MODULES.index(name)], f"{name} imports {imported}, which comes later"
        assert "*" not in names, f"{name} has a star import"


def test_no_private_name_is_imported_from_another_module():
    edges = house.import_edges(trees)
    assert [(a, b, n) for a, b, names in edges for n in names if n.startswith("_")] == []


def test_the_ground_stands_on_torch_alone():
    stdlib = set(sys.stdlib_module_names)
    assert house.top_packages(trees["core"]) - stdlib <= {"torch", "numpy"}
    assert house.top_packages(trees["losses"]) - stdlib == {"torch"}
    assert {imported for name, imported, _ in house.import_edges(trees) if name == "losses"} <= {"core"}


def test_few_names_are_public():
    names = everything.__all__
    assert len(set(names)) == len(names), "two modules give one name to different things"
    assert len(names) < 100, f"{len(names)} names are public: `#| exporti` what no user types"


def test_public_names_are_specific_and_hide_nothing():
    import fastai.vision.all as fastai
    assert set(everything.__all__) & set(dir(fastai)) == set()
    assert set(everything.__all__) & {*GENERIC, *dir(builtins), *everything.MODULES} == set()
    assert [name for name in everything.__all__ if name.startswith("_")] == []


@pytest.mark.parametrize("name", MODULES)
def test_other_peoples_classes_are_patched_once(name):
    "An assignment like `Learner.fit = f` wraps its own wrapper when it runs again; fastcore's `@patch` does not"
    assert [p for p in house.assigned_patches(trees[name]) if p not in ALLOWED_ASSIGNMENTS] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_class_gets_its_methods_in_its_own_notebook(name):
    imported = {n for module, _, names in house.import_edges(trees) if module == name for n in names}
    assert [p for p in house.decorated_patches(trees[name]) if p.split(".")[0] in imported] == []


@pytest.mark.parametrize("notebook", house.notebooks(root), ids=lambda f: f.stem)
def test_exported_cells_are_short(notebook):
    long = [(len(lines), lines[0]) for lines in house.exported_cells(notebook) if len(lines) > 40]
    assert long == [], "an exported cell has at most 40 lines"


def test_no_line_is_over_120_columns():
    assert {place: n for place, n in house.long_lines(root).items() if n} == {}


def test_the_checks_can_fail():
    import ast
    patches = ast.parse("from fastai.learner import Learner\nLearner.fit = f\nLearner.a, b = 1, 2\n"
                        "setattr(Learner, 'fit', f)\nclass Mine: pass\nMine.fit = f\n")
    assert house.assigned_patches(patches) == ["Learner.fit", "Learner.a", "setattr(Learner, ...)"]
    methods = ast.parse("from .other import Theirs\nclass Mine: pass\n@patch\ndef f(self:Theirs): pass\n"
                        "@patch(as_prop=True)\ndef g(self:Mine): pass\n@patch_to(Learner)\ndef h(self): pass\n")
    assert house.decorated_patches(methods) == ["Theirs.f", "Learner.h"]
    assert house.import_edges({"mine": methods}) == [("mine", "other", ["Theirs"])]


BENCHMARKS = {f.stem: ast.parse(f.read_text()) for f in sorted((root/"benchmarks").glob("*.py"))}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_find_what_they_take_from_each_other(name):
    for node in ast.walk(BENCHMARKS[name]):
        if not isinstance(node, ast.ImportFrom) or node.module not in BENCHMARKS: continue
        source = BENCHMARKS[node.module].body
        there = {n.name for n in source if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        there |= {t.id for n in source if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assert {alias.name for alias in node.names} <= there, node.module
