"The how-to pages: their scripts run as they stand, their commands exist with these options, and most of them run too"
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from callbacks import EndEarly
from conftest import class_pictures
from fastai.learner import defaults
from PIL import Image

from self_supervised_bt import cli
from self_supervised_bt.runs import pretrain

root = Path(__file__).parents[1]
pages = sorted((root/"docs/howto").glob("*.md"))
SHORT = dict(recipe="cifar", epochs=1, bs=128, arch="resnet18", arch_args={}, pool_type=None, small_stem=False,
             nviews=2, hidden_size=32, projection_size=32, num_workers=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Folders `photos` and `labelled`, a file cat.jpg, and a run of a few seconds in `runs/photos`"
    home = tmp_path_factory.mktemp("howto")
    class_pictures(home/"photos", 320, cells=8, side=4)
    for label in ("dark", "light"):
        (home/"labelled"/label).mkdir(parents=True)
        for f in sorted((home/"photos"/label).iterdir())[:24]: shutil.copy(f, home/"labelled"/label)
    Image.open(home/"labelled/dark/01.png").save(home/"cat.jpg")
    pretrain(home/"photos", out=home/"runs/photos", **SHORT)
    return home


def copy(source, target):
    "A file of its own, but for checkpoints, which are large and only ever replaced whole: these share their bytes"
    return (os.link if source.endswith(".pt") else shutil.copy2)(source, target)


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    "A copy of that folder, as the current one"
    shutil.copytree(place, tmp_path/"here", copy_function=copy)
    monkeypatch.chdir(tmp_path/"here")


def blocks(page, language):
    "The code blocks of a page in one language"
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(page):
    "The lines of the shell blocks, as lists of words; continued lines are joined"
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def own_command(words):
    "The command of this library in a line, with its arguments: behind torchrun, too; None if there is none"
    start = next((i for i, word in enumerate(words) if re.fullmatch(r"bt_\w+", word)), None)
    return None if start is None else words[start:]


@pytest.mark.parametrize("page", pages, ids=lambda p: p.stem)
def test_a_page_has_what_a_reader_looks_for(page):
    text = page.read_text()
    assert re.match(r"# [A-Z].*\n\n[A-Z].*\.\n", text), "a title, then one sentence, which the list of pages repeats"
    assert blocks(page, "python") and "How it works: [" in text
    assert re.fullmatch(r"\d\d_\w+", page.stem)


@pytest.mark.parametrize("page", pages, ids=lambda p: p.stem)
def test_the_options_exist(page):
    from manual_api import parser_of
    for words in commands(page):
        command = own_command(words)
        assert command, f"{page.name}: {' '.join(words)} is no command of this library"
        parser_of(getattr(cli, command[0])).parse_args(command[1:])


@pytest.mark.parametrize("page", [p for p in pages if blocks(p, "python")], ids=lambda p: p.stem)
def test_the_scripts_run(page, here, monkeypatch):
    monkeypatch.setattr(defaults, "callbacks", [*defaults.callbacks, EndEarly])
    names = {}
    for block in blocks(page, "python"): exec(compile(block, page.name, "exec"), names)


# bt_pretrain runs in test_runs.py and test_distributed.py, the others that are not here in test_transfer.py and
# test_experiments.py
QUICK = {"bt_evaluate": "--workers 0".split(), "bt_diagnose": "--batches 2".split(), "bt_export": []}


def quick(words): return words[0] in QUICK


@pytest.mark.parametrize("page", [p for p in pages if any(map(quick, commands(p)))], ids=lambda p: p.stem)
def test_the_commands_run(page, here, capsys):
    for words in filter(quick, commands(page)): call(words)


def call(words):
    "A command with the arguments of a page, and then with those that make it short"
    from manual_api import parser_of
    command = getattr(cli, words[0])
    args = vars(parser_of(command).parse_args([*words[1:], *QUICK[words[0]]]))
    try: command(**{k: v for k, v in args.items() if k not in ("pdb", "xtra")})
    except SystemExit as e: assert words[0] == "bt_diagnose" and e.code == 1, e.code   # problems were found
