"One version, one source, a wheel that holds what it should"
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import self_supervised_bt

root = Path(__file__).parents[1]
ini = ConfigParser(delimiters=["="])
ini.read(root/"settings.ini")
cfg = ini["DEFAULT"]


def run(*args, cwd=root):
    done = subprocess.run(args, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    "The sources, to build or export elsewhere"
    for name in ("nbs", "self_supervised_bt", "tools"):
        shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root/name, tmp_path/name)
    return tmp_path


def test_the_wheel(copy):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    wheel, = (copy/"dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        meta = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entries = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    version = re.search(r"^Version: (.*)$", meta, re.M)[1]
    assert version == cfg["version"] == self_supervised_bt.__version__
    sources = {f"self_supervised_bt/{f.name}" for f in (root/"self_supervised_bt").glob("*.py")}
    assert sources == {n for n in names if n.endswith(".py")}
    assert {"self_supervised_bt/zoo.toml", "self_supervised_bt/map.html"} <= {*names}
    for need in cfg["requirements"].split(): assert f"Requires-Dist: {re.split('[<>=]', need)[0]}" in meta
    extras = {key.removesuffix("_requirements") for key in cfg if key.endswith("_requirements")}
    assert set(re.findall(r"^Provides-Extra: (.*)$", meta, re.M)) == extras >= {"dev", "bench", "mutants"}
    assert "Requires-Python: >=3.11" in meta and "bt_demo" in entries and "License" in meta
    assert any("LICENSE" in n for n in names)


def test_the_oldest_versions_are_the_lower_bounds():
    "Every bound is a version that the tests run with, and one package has one bound"
    pins = dict(l.split("==") for l in (root/"constraints-oldest.txt").read_text().split("\n") if "==" in l)
    tools = {"dev", "docs", "bench", "mutants"}   # of these extras, only what the library uses is held at its bound
    needs = [n for key in cfg if key.endswith("requirements") for n in cfg[key].split()
             if key.removesuffix("_requirements") not in tools or n.split(">=")[0] in pins]
    for name, bound in (need.split(">=") for need in needs if ">=" in need):
        assert f"{pins.get(name)}.".startswith(f"{bound}."), f"{name}>={bound}, tested with {pins.get(name)}"
    assert pins.keys() == {re.split("[<>=]", need)[0] for need in needs}


def test_the_library_is_what_the_notebooks_export(copy):
    pytest.importorskip("nbdev")
    before = {f.name: f.read_text() for f in sorted((copy/"self_supervised_bt").glob("*.py"))}
    run(str(Path(sys.executable).parent/"nbdev-export"), cwd=copy)
    after = {f.name: f.read_text() for f in sorted((copy/"self_supervised_bt").glob("*.py"))}
    assert before.keys() == after.keys()
    for name in before:
        assert before[name] == after[name], f"{name} is not what its notebook exports: run make export"


def test_notebooks_are_clean(copy):
    pytest.importorskip("nbdev")
    before = {f.name: f.read_text() for f in (copy/"nbs").glob("*.ipynb")}
    run(str(Path(sys.executable).parent/"nbdev-clean"), cwd=copy)
    for f in (copy/"nbs").glob("*.ipynb"):
        assert before[f.name] == f.read_text(), f"{f.name} is not clean: run make export"


def test_the_readme_is_what_the_index_says():
    run(sys.executable, "tools/readme.py", "--check")


def test_notebooks_hold_no_errors_no_nan_and_no_paths_of_a_machine():
    for f in (root/"nbs").glob("*.ipynb"):
        assert f.stat().st_size < 600_000, f"{f.name} is too heavy"
        for cell in json.loads(f.read_text())["cells"]:
            for out in cell.get("outputs", []):
                text = json.dumps({k: v for k, v in out.get("data", out).items() if k != "image/png"})
                assert out["output_type"] != "error" and out.get("name") != "stderr", f"{f.name}: {text[:200]}"
                assert not re.search(r"\bnan\b|/home/|/root/|/tmp/|site-packages", text), f"{f.name}: {text[:200]}"


def test_everything_public_is_documented():
    "Every exported function says what it does, and every parameter and result of it what it is"
    from fastcore.docments import docments

    from self_supervised_bt import all as everything
    assert len(set(everything.__all__)) == len(everything.__all__), "two modules give one name to different things"
    for name in everything.__all__:
        o = getattr(everything, name)
        assert o.__doc__, f"{name} has no docstring"
        if type(o).__name__ != "function" or name.startswith("plot"): continue
        silent = [k for k, v in docments(o).items() if v is None and k not in ("return", "kwargs", "pred", "yb")]
        assert not silent, f"{name} says nothing about {silent}"
