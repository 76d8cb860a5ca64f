"A notebook is edited while it runs: exported cells run again, modules are reloaded, and every Learner still trains"
import gc
import importlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import house
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, defaults
from fastai.metrics import accuracy
from torch import nn

import self_supervised_bt

PACKAGE = Path(self_supervised_bt.__file__).parent
ROOT = PACKAGE.parent


def exporting_notebooks():
    "(module, notebook) in room order"
    pairs = [(house.default_exp(notebook), notebook) for notebook in house.notebooks(ROOT)]
    return [(module, notebook) for module, notebook in pairs if module]


def loaders():
    items = [(torch.rand(1, 8, 8), i % 4) for i in range(16)]
    return DataLoaders.from_dsets(items, items, bs=8, device="cpu", num_workers=0)


def encoder(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain_learner():
    "A classifier, which has nothing of this library"
    return Learner(loaders(), nn.Sequential(encoder(), nn.Linear(8, 4)), nn.CrossEntropyLoss(), metrics=accuracy)


def barlow_learner(names):
    "A Learner with `BarlowTwins` and columns for its terms, made of the functions in the namespace `names`"
    model = names["create_barlow_twins_model"](encoder(), 16, 16)
    augs = names["get_barlow_twins_aug_pipelines"](8, "digits")
    return Learner(loaders(), model, nn.CrossEntropyLoss(), cbs=[names["BarlowTwins"](augs, terms=True)])


def modules_namespace():
    "The functions above from the modules as they are now"
    names = {}
    for name in ("augmentations", "barlow_twins"): names.update(vars(sys.modules[f"self_supervised_bt.{name}"]))
    return names


def check_fit(learn):
    "Train: weights move, the Recorder has the columns it should, and the Learner is as it was before"
    loss, metrics = learn.loss_func, list(learn.metrics)
    rows = []
    learn.logger = rows.append
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    columns = list(learn.recorder.metric_names)
    terms = {"invariance", "redundancy"} if hasattr(learn, "barlow_twins") else set()
    assert {"invariance", "redundancy"} & set(columns) == terms and len(columns) == len(set(columns)), columns
    assert len(rows[-1]) == len(columns), rows
    assert learn.loss_func is loss, f"the Learner's loss is {learn.loss_func}"
    assert list(learn.metrics) == metrics, f"the Learner's metrics are {learn.metrics}"


def cells():
    "Every exported cell of all notebooks twice in one namespace, as in one kernel"
    kernel = types.ModuleType("kernel")
    sys.modules["kernel"] = kernel
    importlib.import_module("self_supervised_bt.all")
    learners = [plain_learner(), barlow_learner(modules_namespace())]
    for _ in range(2):
        for module, notebook in exporting_notebooks():
            if module == "all": continue   # makes `__all__` of modules, defines nothing
            for i, lines in enumerate(house.exported_cells(notebook)):
                exec(compile("\n".join(lines), f"{notebook.name}, exported cell {i}", "exec"), vars(kernel))
        learners += [plain_learner(), barlow_learner(vars(kernel))]
        for learn in learners: check_fit(learn)


def modules():
    "Every module reloaded twice, in order"
    order = [importlib.import_module(f"self_supervised_bt.{name}") for name, _ in exporting_notebooks()]
    learners = [plain_learner(), barlow_learner(modules_namespace())]
    for learn in learners: check_fit(learn)
    for _ in range(2):
        for module in order: importlib.reload(module)
        learners += [plain_learner(), barlow_learner(modules_namespace())]
        for learn in learners: check_fit(learn)


def autoreload():
    "`%autoreload 2`, and source files edited between two cells"
    for name in ("fastai.vision.all", "kornia", "sklearn.linear_model", "timm", "torchvision"):
        importlib.import_module(name)
    gc.freeze()   # other libraries hold no object of this one: autoreload, which searches for those, passes theirs over
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "autoreload")
    shell.run_line_magic("autoreload", "2")

    def run(code): shell.run_cell(code).raise_error()

    run("from test_reload import barlow_learner, check_fit, plain_learner")
    run("from self_supervised_bt.all import *")
    run("learners = [plain_learner(), barlow_learner(globals())]")
    run("for learn in learners: check_fit(learn)")
    every = [name for name, _ in exporting_notebooks() if f"self_supervised_bt.{name}" in sys.modules]
    for i, edited in enumerate([["barlow_twins"], every, ["losses", "barlow_twins"]]):
        line = f"if True: edits = {i}"   # after an edit outside of functions the whole module runs again
        for name in edited: edit(PACKAGE/f"{name}.py", line)
        run("learners += [plain_learner(), barlow_learner(globals())]")
        assert all(sys.modules[f"self_supervised_bt.{name}"].edits == i for name in edited)
        run("for learn in learners: check_fit(learn)")


def edit(file, line):
    "Add a line at the end of a file, saved at a later second than before"
    seconds = file.stat().st_mtime + 2
    file.write_text(f"{file.read_text()}\n{line}\n")
    os.utime(file, (seconds, seconds))


@pytest.fixture
def kernel(tmp_path):
    "Run a function of this file in a process of its own, with a copy of notebooks and package that it may edit"
    for folder in (PACKAGE, ROOT/"nbs"):
        shutil.copytree(folder, tmp_path/folder.name, ignore=shutil.ignore_patterns("__pycache__", "images", "runs"))
    paths = [tmp_path, Path(house.__file__).parent, Path(__file__).parent]
    env = dict(PYTHONPATH=os.pathsep.join(map(str, paths)), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    def run(name):
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return run


def test_exported_cells_run_again(kernel): kernel("cells")


def test_modules_are_reloaded(kernel): kernel("modules")


def test_files_are_edited_under_autoreload(kernel):
    pytest.importorskip("IPython")
    kernel("autoreload")


if __name__ == "__main__":
    if ProgressCallback in defaults.callbacks: defaults.callbacks.remove(ProgressCallback)
    {"cells": cells, "modules": modules, "autoreload": autoreload}[sys.argv[1]]()
