"The commands: what they print and write, errors in one line, signals"
import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import commands
from PIL import Image

from self_supervised_bt import cli, runs
from self_supervised_bt.cli import (
    bt_demo,
    bt_diagnose,
    bt_embed,
    bt_evaluate,
    bt_pretrain,
    one_line_errors,
    resume_command,
)
from self_supervised_bt.datasets import DATA_NAMES
from self_supervised_bt.recipes import RECIPES
from self_supervised_bt.runs import run_dls, short_run
from self_supervised_bt.trackers import TRACKERS
from self_supervised_bt.weights import load_encoder

ROWS = ["raw pixels", "untrained encoder", "trained encoder"]


def test_bt_demo_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(epochs=2)
    out = capsys.readouterr().out
    assert "1,297 to train on without labels, 500 held out" in out and "trained encoder" in out
    table = pd.read_csv(tmp_path/"runs/digits/table.csv", index_col=0)
    assert list(table.index) == [*ROWS, "trained encoder, whitened"] and table.shape[1] == 4
    assert {f.name for f in (tmp_path/"runs/digits").iterdir()} == {
        "cross_correlation.png", "encoder.safetensors", "history.csv", "loss.png", "model.safetensors",
        "neighbours.png", "report",
        "results.json", "table.csv", "views.png"}
    assert "<h2>Diagnosis</h2>" in (tmp_path/"runs/digits/report/report.html").read_text()
    assert load_encoder(tmp_path/"runs/digits/encoder.safetensors").created_by["arch"] == "timm/test_resnet"
    with pytest.raises(SystemExit, match="^bt_demo: no image files below .*, which is the folder of a run"):
        bt_demo(data="runs/digits")   # none of its own files is an image


def test_bt_demo_on_a_folder_with_and_without_labels(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(data=str(folder), epochs=1)
    out = capsys.readouterr().out
    assert "in 2 class folders" in out and "per class" in out
    assert (tmp_path/"runs/pictures/encoder.safetensors").exists()
    bt_demo(data=str(folder), epochs=1, no_labels=True, out="plain")
    out = capsys.readouterr().out
    assert "without labels" in out and "positive pairs found" in out and (tmp_path/"plain/loss.png").exists()


def test_settings_depend_on_the_images(folder):
    def images(run):
        dls = run_dls(run.images, run.recipe, run.n_test/run.n, in_memory=True)
        train, held_out = dls.train_ds.x, dls.valid_ds.x
        assert len(held_out) == run.n_test
        return (len(train) + len(held_out), *train.shape[1:])
    assert images(short_run()) == (1797, 1, 8, 8)
    run = short_run(folder)
    assert (run.recipe.name, run.recipe.size, run.n_test, run.recipe.bs) == ("cifar", 24, 8, 16)
    assert images(run) == (40, 3, 32, 32) and short_run(folder, recipe="laptop").recipe.size == 64


def test_short_run_does_not_overwrite_checkpoints(folder, tmp_path):
    (tmp_path/"step-0000000001.pt").touch()
    with pytest.raises(SystemExit, match="bt_demo: .*choose another folder"):
        bt_demo(data=str(folder), out=str(tmp_path))


@pytest.mark.parametrize("name,words", [("nowhere", "not a folder"), ("empty", "no image files"),
                                        ("few", "at least 20"), ("broken", "can be read")])
def test_invalid_folders_give_one_line_of_error(folder, name, words):
    for made in ("empty", "few", "broken"): (folder/made).mkdir()
    (folder/"few/a.png").write_bytes((folder/"dark/01.png").read_bytes())
    for i in range(30): (folder/f"broken/{i}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as e: bt_demo(data=str(folder/name))
    assert str(e.value).startswith("bt_demo: ") and words in str(e.value)


def test_a_demo_overwrites_only_a_demo_of_the_same_images(folder, tmp_path):
    out = tmp_path/"out"
    out.mkdir()
    (out/"results.json").write_text(json.dumps(dict(kind="demo", data=str(folder))))
    run = short_run(folder)
    assert runs.short_run_folder(run, out) == out
    for results in (dict(kind="pretrain", data=str(folder)), dict(kind="demo", data="/other/pictures"), 7):
        (out/"results.json").write_text(json.dumps(results))
        with pytest.raises(SystemExit, match="^bt_demo: .*results.json.* overwritten"):
            bt_demo(data=str(folder), out=str(out))
    (out/"results.json").rename(out/"views.png")
    with pytest.raises(SystemExit, match="^bt_demo: .*views.png.* overwritten"):
        bt_demo(data=str(folder), out=str(out))


# Options and signals

SMALL = dict(arch="timm/test_resnet", width=16, bs=16, epochs=2, workers=0)


@pytest.mark.parametrize("option, value", [("size", -1), ("bs", 0), ("epochs", -1), ("width", 0), ("workers", -1),
                                           ("lr", -1.), ("lmb", float("nan")), ("valid_pct", 2.), ("every", 0),
                                           ("keep", -1), ("bad", "x"), ("recipe", "nope")])
def test_an_option_out_of_range_is_named_as_it_is_typed(folder, tmp_path, option, value):
    with pytest.raises(SystemExit) as e: bt_pretrain(str(folder), out=str(tmp_path/"run"), **{**SMALL, option: value})
    assert str(e.value).startswith(f"bt_pretrain: --{option.replace('_', '-')} must be") and "\n" not in str(e.value)


def test_other_commands_name_options_too(folder, tmp_path):
    with pytest.raises(SystemExit, match="^bt_diagnose: --width must"): bt_diagnose(data=str(folder), width=-1)
    with pytest.raises(SystemExit, match="^bt_demo: --epochs must"): bt_demo(data=str(folder), epochs=-1)
    with pytest.raises(SystemExit, match="^bt_evaluate: --k must"): bt_evaluate(str(tmp_path), str(folder), k=0)
    with pytest.raises(SystemExit, match="^bt_evaluate: --protocol must"):
        bt_evaluate(str(tmp_path), str(folder), protocol="x")
    (tmp_path/"step-0000000001.pt").touch()
    with pytest.raises(SystemExit, match="^bt_pretrain: .* resume it with --resume, or choose"):
        bt_pretrain(str(folder), out=str(tmp_path), **SMALL)


STATUS = dict(SIGINT=130, SIGTERM=143, SIGUSR1=75)


@pytest.mark.parametrize("name", STATUS)
def test_a_signal_before_training_ends_with_one_line(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(runs, "run_dls", lambda *args, **kwargs: os.kill(os.getpid(), getattr(signal, name)))
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as e: bt_pretrain(str(folder), out=str(tmp_path/"run"), **SMALL)
    said = f"bt_pretrain: stopped by {name}: there is no checkpoint yet, start the same command again"
    assert e.value.code == STATUS[name] and capsys.readouterr().err.strip() == said
    assert signal.getsignal(getattr(signal, name)) is before and not (tmp_path/"run").exists()


@pytest.mark.parametrize("name", STATUS)
def test_a_signal_while_results_are_written(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(runs, "save_encoder", lambda *args: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(SystemExit) as e: bt_pretrain(str(folder), out=str(tmp_path/"a run"), **{**SMALL, "epochs": 1})
    command = f"bt_pretrain --out '{tmp_path}/a run' --resume --workers 0"
    assert e.value.code == STATUS[name]
    said = f"stopped by {name}: the checkpoints are complete, continue with {command}"
    assert said in capsys.readouterr().err and resume_command(tmp_path/"a run", workers=0) == command


def test_sigterm_to_the_process_group_saves_and_says_how_to_resume(folder, tmp_path):
    "As schedulers send it: to the worker processes as well"
    bt = Path(sys.executable).with_name("bt_pretrain")
    options = "--arch timm/test_resnet --width 16 --bs 8 --epochs 1000 --workers 1 --out run".split()
    with subprocess.Popen([bt, folder, *options], cwd=tmp_path, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (tmp_path/"run/history.csv").exists() and process.poll() is None: time.sleep(.1)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143 and err == ""
    assert out.splitlines()[-1].endswith("continue with bt_pretrain --out run --resume --workers 1")
    assert json.loads((tmp_path/"run/results.json").read_text())["state"] == "running"


def test_a_warning_is_one_line_and_names_options():
    def said(): return warnings.formatwarning("many files: pass bs=8,\n or pool_type='avg'", UserWarning, "file.py", 7)
    @one_line_errors
    def command(bs:int=0): return said()
    assert command() == "Warning: many files: pass --bs 8, or pool_type='avg'\n" and "file.py:7" in said()


def test_a_size_is_a_number_or_height_and_width(folder, tmp_path, capsys):
    assert [cli.as_size(o) for o in ("96", "96x128", 96, None)] == [96, (96, 128), 96, None]
    for text in ("96x", "0x3", "x", "1.5", "96x128x3", "-4"):
        with pytest.raises(SystemExit, match="--size must be a positive int, or height and width as 96x128, got"):
            bt_pretrain(str(folder), out=str(tmp_path/"run"), size=text)
    small = dict(epochs=1, bs=16, arch="timm/test_resnet", width=16, workers=0)
    bt_pretrain(str(folder), "cifar", str(tmp_path/"run"), size="16x24", **small)
    assert "views of 16x24 pixels" in capsys.readouterr().out


def test_another_architecture_pools_as_its_map_allows(folder, tmp_path, capsys):
    "And no warning advises an option that the shell has not"
    out = tmp_path/"run"
    bt_pretrain(str(folder), out=str(out), **{**SMALL, "arch": "timm/resnet10t", "size": 16, "epochs": 1})
    assert "Warning" not in capsys.readouterr().err
    assert json.loads((out/"run.json").read_text())["recipe"]["pool_type"] is None


def test_bt_diagnose_lists_problems_and_exits_with_1(folder, capsys):
    bt_diagnose(data=str(folder), bs=8, width=16)
    out = capsys.readouterr().out
    assert "40 images" in out and "No problem found" in out
    with pytest.raises(SystemExit) as e: bt_diagnose(bs=16, width=512)
    assert e.value.code == 1 and "! batch too small" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="bt_diagnose: .*not a folder"): bt_diagnose(data="nowhere")


def test_bt_diagnose_checks_what_bt_pretrain_runs(folder, tmp_path, capsys):
    for i in range(20): (folder/f"light/more{i}.png").write_bytes((folder/"light/00.png").read_bytes())
    with pytest.raises(SystemExit): bt_diagnose(data=str(folder))   # equal images
    said = capsys.readouterr().out
    bt_pretrain(str(folder), out=str(tmp_path/"run"), epochs=1, workers=0)
    recipe = json.loads((tmp_path/"run/run.json").read_text())["recipe"]
    assert f"{recipe['name']}, for small images on a CPU: {recipe['arch']}, {recipe['nviews']} views of 24x24" in said
    assert f"batches of {recipe['bs']}, " in said and recipe["bs"] == 28


@pytest.mark.parametrize("option, value", [
    ("bs", 0), ("bs", -1), ("size", 0), ("epochs", 0), ("epochs", -3), ("width", 0), ("lr", 0.), ("lr", float("nan")),
    ("lmb", 1e30), ("lmb", float("nan")), ("workers", -1), ("recipe", "nope")])
def test_values_that_cannot_be_are_named_as_typed(tmp_path, option, value):
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(SystemExit, match=rf"^bt_pretrain: {name} must be .*got {re.escape(repr(value))}"):
        bt_pretrain(str(tmp_path), out=str(tmp_path/"out"), **{option: value})
    assert not (tmp_path/"out").exists()


# The words of the shell

PYTHON = re.compile(r"\b[A-Za-z_][\w.]*\((?!s\))[^)]*\)|\w=|`|<class|Traceback|"
                    r"\b(?:True|False|None|Errno|DataFrame|Learner|dls)\b")
SHORT = "--arch timm/test_resnet --bs 16 --workers 0"
WRONG = [   # a line, and what its message names
    ("bt_embed run pictures --out t.parquet --tta flop", "--tta must be of .*e.g. --tta flip, or --tta flip,24,32"),
    ("bt_embed run pictures --out t.parquet --size 12 --workers 0", "with size 24x24, .* 12x12: .* another --out"),
    ("bt_embed run pictures/dark --out t.parquet --workers 0", "a table of other images"),
    ("bt_embed run pictures --out x.csv --whiten", "^bt_embed: --whiten, and the encoder remembers no whitening"),
    ("bt_embed run pictures --out x.csv --labels x", "--labels must be one of 'outermost', 'innermost', got 'x'"),
    ("bt_embed run pictures --out x.csv --device abacus", "--device must be .*got 'abacus'"),
    ("bt_embed run pictures --out x.txt", "--out must end in .parquet, .csv, .npz, got 'x.txt'"),
    ("bt_embed run pictures --out x.csv --root data", "--root 'data' is for data sets by name, and data 'pictures'"),
    ("bt_embed run cifar10 --out x.csv --root data", "not below data, .* --download"),
    ("bt_embed resnet51 pictures", "did you mean resnet50, .* bt_export without a run lists all names"),
    ("bt_embed run text.txt", "name of a data set that bt_transfer lists"),
    ("bt_similar t.parquet flat.png", "e.g. --model 'runs/photos'"),
    ("bt_similar t.parquet flat.png --model nothing/here", "nothing/here does not exist"),
    ("bt_similar t.parquet 0 --k 99", "--k must be in 1..39"),
    ("bt_similar t.parquet 0 --out x.y", "--out must end in"),
    ("bt_similar t.parquet pictures/dark/00.png --out pictures/dark/00.png", "--out must be another file"),
    ("bt_similar none.parquet 0", "make it with bt_embed, with --out 'none.parquet'"),
    ("bt_duplicates t.parquet --out t.parquet", "--out must end in .csv"),
    ("bt_duplicates t.parquet --groups 0", "--groups must"), ("bt_duplicates t.parquet --chance 2", "--chance must"),
    ("bt_map t.parquet --seed -1", "--seed must be an int >= 0"),
    ("bt_map t.parquet --limit 4", "--limit must be at least 5"),
    ("bt_map t.parquet --colour x", "--colour must be a column"), ("bt_map t.parquet --out folder.html", "is a folder"),
    ("bt_transfer run --sets cifar", "--sets must be that of a data set"),
    ("bt_transfer run --root data", "--download"),
    ("bt_classify run pictures --out text.txt", "--out must be a folder, and text.txt is a file"),
    ("bt_classify run paths.csv", "choose one with --labels 'name'"),
    ("bt_classify data pictures", "data holds no run"),
    ("bt_evaluate run pictures,paths.csv --test pictures", "--test is for one data set"),
    ("bt_export run --format timm --out x", "a stem for small images, .* or train with a recipe"),
    ("bt_report data", "holds no checkpoints"), ("bt_experiment x", "name must be one of 'table5'"),
    ("bt_experiment table5 --scale paper", "--scale 'paper' is for photographs: pass their folder as --data"),
    ("bt_demo --data pictures --download", "--download is for data sets by name, and --data 'pictures' is none"),
    ("bt_demo --recipe paper", "use smaller ones, or another --recipe"),
    ("bt_diagnose --data cifar10 --root data", "--download"),
    (f"bt_pretrain pictures --out x1 {SHORT} --arch nothing", "fastai, torchvision or timm, e.g. resnet18"),
    (f"bt_pretrain pictures --out x2 {SHORT} --bs 1", "use another --bs"),
    (f"bt_pretrain pictures --out x3 {SHORT} --method simclr --lmb 1", "leave --lmb out, or leave --method out"),
    (f"bt_pretrain pictures --out x4 {SHORT} --eval flat", "^bt_pretrain: --eval 'flat' cannot be measured"),
    ("bt_pretrain --out run --resume --size 16x20 --width 8 --half",
     r"--half, --size 16x20 \(was 24\), --width 8 \(was 16\)\. Leave"),
    ("bt_pretrain pictures/dark --out run --resume", "data 'pictures/dark' does not hold the images")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with images, a run, a table of it, and odd files"
    place = tmp_path_factory.mktemp("place")
    for name, mean in (("pictures/dark", 60), ("pictures/light", 190), ("flat", 120)):
        (place/name).mkdir(parents=True)
        rng = np.random.default_rng(mean)
        for i in range(20):
            x = rng.normal(mean, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).save(place/name/f"{i:02}.png")
    (place/"flat/00.png").rename(place/"flat.png")
    for name in ("data", "folder.html"): (place/name).mkdir()
    (place/"text.txt").write_text("a text")
    rows = [f"pictures/{name}/{i:02}.png,{name}" for name in ("dark", "light") for i in range(20)]
    (place/"paths.csv").write_text("\n".join(["path,species", *rows]))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(place)
        bt_pretrain("pictures", "cifar", "run", **{**SMALL, "epochs": 1, "size": "24"})
        bt_embed("run", "pictures", "t.parquet", workers=0)
    return place


def said_by(line, capsys):
    "What a line prints to stderr, warnings with it"
    name, *words = line.split()
    command = getattr(cli, name)
    by_place = [k for k, typed in command.options.items() if k == typed]
    args = vars(cli.parser_of(inspect.unwrap(command), by_place, "").parse_args(words))
    with pytest.raises(SystemExit) as e: command(**{k: args[k] for k in command.options})
    return capsys.readouterr().err + str(e.value)


@pytest.mark.parametrize("line, words", WRONG, ids=[line for line, _ in WRONG])
def test_messages_name_what_was_typed_and_no_python(place, monkeypatch, capsys, line, words):
    monkeypatch.chdir(place)
    before = {f: f.stat().st_size for f in place.rglob("*") if f.is_file()}
    said = said_by(line, capsys)
    assert re.search(words, said), said
    assert not PYTHON.search(said), said
    assert str(place) not in said and "\n" not in said.removesuffix("\n"), said
    now = {f: f.stat().st_size for f in place.rglob("*") if f.is_file()}
    assert {f: now.get(f) for f in before} == before                          # nothing is lost
    assert set(now) == set(before) or line.startswith("bt_pretrain pictures")   # which may begin a run

def strings(node):
    "All text of a module as messages have it, with what is put into them as X"
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str): yield n.value
        if isinstance(n, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "'X'" if v.conversion == ord("r") else "X"
                          for v in n.values)


def test_advice_in_python_that_is_translated_is_given_somewhere():
    files = [f for f in Path(cli.__file__).parent.glob("*.py") if f.name not in ("cli.py", "_modidx.py")]
    text = [s for f in files for s in strings(ast.parse(f.read_text()))]
    text += ["size=(16, 20), must be one of True, 'x' (was None), 5 (was (5, 7))",   # with values, or put together
             "another stem, small_stem=True, which", "pass images= or root=, or thumbnails=False for points",
             ": fit it on training images, encode(model, images, whiten='fit')"]
    missing = [pattern for pattern in cli.SHELL_WORDS if not any(re.search(pattern, s) for s in text)]
    assert missing == []


# The terminal

COMMANDS = [name for name in cli.__all__ if name.startswith("bt_")]


def as_typed(tmp_path, *line, **kwargs):
    "A command in a process of its own, as a console script starts it; the last line says whether PyTorch was loaded"
    (tmp_path/"scripts").mkdir(exist_ok=True)
    script = tmp_path/"scripts"/line[0]
    script.write_text(f"import atexit, sys\nfrom self_supervised_bt.cli import {line[0]}\n"
                      f"atexit.register(lambda: print('torch' in sys.modules))\n{line[0]}()\n")
    env = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *line[1:]], text=True, capture_output=True, env=env, **kwargs)
    *out, loaded = done.stdout.splitlines() or [""]
    return done.returncode, out, done.stderr, loaded == "True"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_pytorch_and_has_defaults_and_examples_in_80_columns(tmp_path, name):
    status, out, err, torch_loaded = as_typed(tmp_path, name, "--help")
    assert (status, err, torch_loaded) == (0, "", False)
    assert max(map(len, out)) <= 80 and out[0].startswith(f"usage: {name}")
    examples = out[out.index("examples:") + 1:]
    assert any(line.startswith(f"  {name}") for line in examples)
    for k, p in inspect.signature(getattr(cli, name)).parameters.items():
        shown = p.default not in (p.empty, None) and p.default is not False   # a flag that is not given is off
        if shown: assert f"(default:{p.default})" in "".join(out).replace(" ", ""), k


@pytest.mark.parametrize("line, said", [
    ("bt_pretrain photos", "photos is not a folder"), ("bt_pretrain", "data is missing"),
    ("bt_pretrain . --bs 0", "--bs must be a positive int, got 0"),
    ("bt_pretrain . --recipe x", "--recipe must be one of"),
    ("bt_demo --data a/b", "a/b is not a folder"), ("bt_diagnose --width -1", "--width must be a positive int"),
    ("bt_evaluate runs/x .", "runs/x does not exist"), ("bt_export runs/x", "runs/x does not exist"),
    ("bt_pretrain . --tracker x", "--tracker must be one of"), ("bt_pretrain . --eval no/labels", "no/labels is not a"),
    ("bt_evaluate . . --protocol knn,x", "--protocol must be one of"), ("bt_report runs/x", "runs/x does not exist"),
    ("bt_runs nowhere", "nowhere is not a folder"), ("bt_export . --license mit", "add --format timm")])
def test_what_cannot_be_is_one_line_without_pytorch_and_leaves_nothing(tmp_path, line, said):
    (tmp_path/"empty").mkdir()
    status, out, err, torch_loaded = as_typed(tmp_path, *line.split(), cwd=tmp_path/"empty")
    assert (status, torch_loaded, out) == (1, False, []) and list((tmp_path/"empty").iterdir()) == []
    assert err.startswith(f"{line.split()[0]}: ") and said in err and err.count("\n") == 1


def test_an_option_of_the_wrong_type_needs_no_pytorch(tmp_path):
    status, _, err, torch_loaded = as_typed(tmp_path, "bt_pretrain", ".", "--bs", "many")
    assert status == 2 and not torch_loaded and "argument --bs: invalid int value: 'many'" in err


def test_commands_leave_nothing_but_their_results(folder, tmp_path):
    home = tmp_path/"home"
    home.mkdir()
    train = "--arch timm/test_resnet --width 16 --bs 16 --epochs 1 --workers 0".split()
    status, out, _, _ = as_typed(tmp_path, "bt_pretrain", str(folder), *train, cwd=home)
    assert status == 0 and out[0] == "bt_pretrain: loading PyTorch ..."
    assert [line for line in out[6:] if len(line) > 80 and str(folder) not in line] == []
    with commands(tmp_path/"bin") as programs:
        for line in (["bt_evaluate", "runs/pretrain", str(folder), "--workers", "0"], ["bt_export", "runs/pretrain"],
                     ["bt_report", "runs/pretrain", "--workers", "0"], ["bt_runs"],
                     ["bt_diagnose", "--data", str(folder)], ["bt_transfer"], ["bt_experiment"]):
            done = subprocess.run([programs/line[0], *line[1:]], cwd=home, capture_output=True, text=True)
            found_problems = line[0] == "bt_diagnose" and done.returncode == 1
            assert (done.returncode == 0 or found_problems) and "Traceback" not in done.stderr, (line, done)
            assert [f.name for f in home.iterdir()] == ["runs"], line
            assert [f.name for f in (home/"runs").iterdir()] == ["pretrain"], line


def test_ctrl_c_in_a_demo_says_that_nothing_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run_learner", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as e: bt_demo(epochs=1)
    assert e.value.code == 130 and list(tmp_path.iterdir()) == []
    assert "stopped by SIGINT: a short run has no checkpoints and nothing was saved" in capsys.readouterr().err


def test_names_that_are_checked_at_once_are_those_of_the_library():
    assert cli.RECIPE_NAMES == tuple(RECIPES) and cli.DATA_SETS == DATA_NAMES
    assert cli.CHOICES["protocol"] == runs.EVALUATIONS and cli.CHOICES["tracker"] == TRACKERS
    assert not cli.leads_nowhere("cifar", cli.DATA_SETS)   # the library says: did you mean 'cifar10'?
    assert not cli.leads_nowhere("shards/{000..009}.tar", cli.DATA_SETS) and cli.leads_nowhere("a/b", cli.DATA_SETS)
