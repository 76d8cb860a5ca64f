"The README: its Python blocks run as they stand, one after the other, in one namespace"
import re
from pathlib import Path

import numpy as np
import pytest
from callbacks import EndEarly
from fastai.learner import Learner, defaults
from PIL import Image

root = Path(__file__).parents[1]
blocks = re.findall(r"```python\n(.*?)```", (root/"README.md").read_text(), re.S)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "300 small pictures in a folder `photos` of the working directory"
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path/"photos").mkdir()
    for i in range(300): Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(f"photos/{i:03}.png")
    return tmp_path


def test_the_python_blocks_run_in_order(photos, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "callbacks", [*defaults.callbacks, EndEarly])
    names = {}
    for block in blocks: exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 5
    assert len(names["h"]) == len(names["y"] if names["y"] is not None else names["dls"].valid_ds) or names["y"] is None
    assert isinstance(names["classifier"], Learner) and names["classifier"].dls.c == 10
    assert {"encoder.safetensors", "runs"} <= {f.name for f in photos.iterdir()}
    assert (photos/"runs/mine/report.html").exists() and list((photos/"runs/notebook").glob("step-*.pt"))


def test_the_page_says_what_was_not_measured():
    text = (root/"README.md").read_text()
    assert "No figure here was measured on a GPU" in text[:2000]


def test_the_pictures_of_the_page_exist():
    text = (root/"README.md").read_text()
    pictures = re.findall(r'\]\((nbs/images/[^)]+)\)|src="([^"]+)"', text)
    assert len(pictures) >= 3
    for a, b in pictures: assert (root/(a or b)).exists()
