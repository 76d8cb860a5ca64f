"""The order of the package in numbers: names, imports, long lines and cells, patches, what a training step crosses.

    python tools/house.py          # of this repository
    python tools/house.py FOLDER   # of another checkout of it
"""
import ast
import json
import sys
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path

PACKAGE = "self_supervised_bt"
COLUMNS = 120


def modules(root):
    "The modules of the package as {name: syntax tree}, without those that only collect"
    files = sorted((root/PACKAGE).glob("*.py"))
    return {f.stem: ast.parse(f.read_text()) for f in files if f.stem not in ("__init__", "_modidx", "all")}


def ours(node):
    "The module of this package that an import statement names, or None"
    if not isinstance(node, ast.ImportFrom): return None
    if node.level: return node.module
    package, _, name = (node.module or "").partition(".")
    return name if package == PACKAGE else None


def import_edges(trees):
    "Imports between modules of the package: (module, imported module, names)"
    return [(name, ours(node), [a.name for a in node.names])
            for name, tree in trees.items() for node in ast.walk(tree) if ours(node)]


def top_packages(tree):
    "Packages from outside that a module imports, at any place"
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [a.name for node in imports if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom) and not ours(node)]
    return {name.split(".")[0] for name in names}


def _imported_from_outside(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not ours(node)):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return names


def _targets(node):
    "The targets of an assignment, those inside a tuple one by one"
    if isinstance(node, (ast.Tuple, ast.List)): return [t for item in node.elts for t in _targets(item)]
    return [node]


def assigned_patches(tree):
    "Assignments to an attribute of something imported from outside, as `Learner.fit = f`: ['Learner.fit']"
    foreign, found = _imported_from_outside(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign): targets = [t for target in node.targets for t in _targets(target)]
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)): targets = [node.target]
        else: continue
        attributes = [t for t in targets if isinstance(t, ast.Attribute)]
        found += [ast.unparse(t) for t in attributes if ast.unparse(t.value).split(".")[0] in foreign]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    return found + [f"setattr({ast.unparse(c.args[0])}, ...)" for c in calls if ast.unparse(c.args[0]) in foreign]


def decorated_patches(tree):
    "Methods given to a class that the module does not define, by fastcore's `@patch`: ['Learner.fit_recipe']"
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef): continue
        decorators = [ast.unparse(d) for d in node.decorator_list]
        to = [d.removeprefix("patch_to(").rstrip(")").split(",")[0] for d in decorators if d.startswith("patch_to(")]
        if any(d == "patch" or d.startswith("patch(") for d in decorators):
            to = ast.unparse(node.args.args[0].annotation).split("|")
        found += [f"{cls.strip()}.{node.name}" for cls in to if cls.strip() not in defined]
    return found


def code_cells(notebook):
    "The source of each code cell of a notebook, as lists of lines"
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]).splitlines() for cell in cells if cell["cell_type"] == "code"]


def default_exp(notebook):
    "The module that a notebook exports to, or None"
    lines = [line.split() for cell in code_cells(notebook) for line in cell if line.startswith("#|")]
    return next((words[-1] for words in lines if "default_exp" in words[0] or "default_exp" in words[1:2]), None)


def exported_cells(notebook):
    "The code cells that go into the library, without the line that says so"
    cells = code_cells(notebook)
    return [lines[1:] for lines in cells if lines and lines[0].replace(" ", "").startswith("#|export")]


def notebooks(root): return sorted((root/"nbs").glob("*.ipynb"))


def longest_cell(root):
    "(lines, notebook, first line) of the longest exported cell"
    return max((len(lines), nb.name, lines[0]) for nb in notebooks(root) for lines in exported_cells(nb) if lines)


def long_lines(root):
    "Lines over 120 columns, but for the list of names that nbdev writes: {place: how many}"
    def count(lines): return sum(len(line) > COLUMNS and not line.startswith("__all__ = ") for line in lines)
    files = {name: sorted((root/name).glob("*.py")) for name in (PACKAGE, "tests", "benchmarks", "tools")}
    files[PACKAGE] = [f for f in files[PACKAGE] if f.name != "_modidx.py"]
    found = {name: sum(count(f.read_text().splitlines()) for f in fs) for name, fs in files.items()}
    return {**found, "nbs": sum(count(lines) for nb in notebooks(root) for lines in code_cells(nb))}


def lines_of_code(root):
    "(lines that hold code, all lines) of the package"
    files = [f for f in (root/PACKAGE).glob("*.py") if f.name != "_modidx.py"]
    lines = [line.strip() for f in files for line in f.read_text().splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines), len(lines)


def syntax_nodes(trees):
    "Nodes of the syntax trees outside imports: the amount of code, however it is broken into lines"
    def count(node):
        if isinstance(node, (ast.Import, ast.ImportFrom)): return 0
        return 1 + sum(count(child) for child in ast.iter_child_nodes(node))
    return sum(count(tree) for tree in trees.values())


class StepProfile:
    "Counts the functions below a folder that are called until an optimizer has stepped once"
    def __init__(self, folder, last):
        self.folder, self.last = str(folder), last
        self.calls = Counter()
    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == "return" and code is self.last: sys.setprofile(None)
        if event != "call" or not code.co_filename.startswith(self.folder): return
        if code.co_name not in ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>"):
            self.calls[Path(code.co_filename).name, code.co_qualname] += 1
    def __enter__(self):
        sys.setprofile(self)
        return self
    def __exit__(self, *args): sys.setprofile(None)


def walk(root):
    "Functions of the package that one training step crosses, from `dls` to `opt.step`"
    import torch
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import Optimizer
    from fastai.torch_core import TensorImage
    from torch import nn
    augmentations, barlow_twins = (import_module(f"{PACKAGE}.{name}") for name in ("augmentations", "barlow_twins"))

    images = [(TensorImage(torch.rand(3, 32, 32)),) for _ in range(8)]
    dls = DataLoaders.from_dsets(images, images, bs=8, device="cpu", num_workers=0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = barlow_twins.create_barlow_twins_model(encoder, 16, 16)
    augs = augmentations.get_barlow_twins_aug_pipelines(32)
    learn = Learner(dls, model, cbs=[barlow_twins.BarlowTwins(augs)])
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda *_: None
    with StepProfile(root/PACKAGE, Optimizer.step.__code__) as profile: learn.fit(1)
    return profile.calls


def table(root):
    "What the sources say, as (what, value) rows"
    trees = modules(root)
    edges = import_edges(trees)
    private = [f"{a} from {b}: {n}" for a, b, names in edges for n in names if n.startswith("_")]
    assigned = [f"{name}: {patch}" for name, tree in trees.items() for patch in assigned_patches(tree)]
    decorated = [f"{name}: {patch}" for name, tree in trees.items() for patch in decorated_patches(tree)]
    long = [f"{place} {n}" for place, n in long_lines(root).items()]
    size, notebook, first = longest_cell(root)
    code, total = lines_of_code(root)
    return [("modules", len(trees)),
            ("imports between them", len({(a, b) for a, b, _ in edges})),
            ("private names imported", counted(private)),
            (f"lines over {COLUMNS} columns", f"{sum(long_lines(root).values())}  {', '.join(long)}"),
            ("longest exported cell", f"{size} lines, {notebook}: {first[:60]}"),
            ("classes of others, assigned to", counted(assigned)),
            ("classes of other modules, @patch", counted(decorated)),
            ("lines of code (all lines)", f"{code} ({total})"),
            ("syntax nodes outside imports", syntax_nodes(trees))]


def counted(names): return f"{len(names)}  {', '.join(names)}"


def crossing(calls):
    "The functions of a step, one line per file"
    files = sorted({file for file, _ in calls})
    yield f"a step crosses {len(files)} files, {len(calls)} functions, {calls.total()} calls"
    for file in files:
        inside = {name: n for (f, name), n in calls.items() if f == file}
        names = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in inside.items())
        yield f"  {file:<22}{len(inside):>3} functions, {sum(inside.values()):>3} calls: {names}"


def main(root):
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(root))
    everything = import_module(f"{PACKAGE}.all")
    if Path(everything.__file__).parent != root/PACKAGE: sys.exit(f"{everything.__file__} was imported, not {root}")
    rows = [("names in all", len(set(everything.__all__))), *table(root)]
    for what, value in rows: print(f"{what:<34}{value}")
    print(*crossing(walk(root)), sep="\n")


if __name__ == "__main__": main(Path(sys.argv[1]).resolve() if sys.argv[1:] else Path(__file__).resolve().parents[1])
