"Runs: the commands of the README on small images; settings, evaluation, export"
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.folders import labelled_dls
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.runs import evaluate, pretrain, size_and_channels
from self_supervised_bt.weights import export_timm, load_encoder, save_encoder

root = Path(__file__).parents[1]
SMALL = dict(arch="timm/test_resnet", arch_args={}, hidden_size=16, projection_size=16, bs=16, epochs=2, num_workers=0)


def environment():
    "Environment with the commands of this Python on the path, and one thread per process"
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_commands_of_the_readme(folder):
    "bt_pretrain on a folder, killed and resumed, evaluated, exported, loaded in plain timm"
    block = next(b for b in re.findall(r"```sh\n(.*?)```", (root/"README.md").read_text(), re.S) if "kill -9" in b)
    script = block.replace("--epochs 10 --every 100", "--epochs 4 --bs 16 --every 1")
    script = script.replace("sleep 60", "while [ ! -e runs/photos/step-0000000003.pt ]; do sleep .1; done")
    assert script.count("--every 1") == 1 and script.count("while") == 1
    script = f"({script.strip()})".replace("wait $!", "wait $! || true")
    os.symlink(folder, folder.parent/"photos")
    command = ["bash", "-e", "-c", script]
    done = subprocess.run(command, cwd=folder.parent, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = folder.parent/"runs/photos"
    results = json.loads((run/"results.json").read_text())
    assert results["steps"] == 4*2 and results["recipe"]["epochs"] == 4 and len(pd.read_csv(run/"history.csv")) == 4
    rows = json.loads((run/"evaluation.json").read_text())["rows"]
    assert {"kNN (k=20)", "linear"} <= rows["photos" if "photos" in rows else "pictures"].keys()
    assert "Saved in runs/photos" in done.stdout and "timm.create_model('resnet10t'" in done.stdout


# Settings

def test_run_resumes_from_its_folder_and_other_settings_raise(folder, tmp_path):
    other_images = shutil.copytree(folder, tmp_path/"other_images", ignore=shutil.ignore_patterns("01.png"))
    first = pretrain(folder, "cifar", tmp_path/"run", valid_pct=.2, **SMALL)
    again = pretrain(out=tmp_path/"run", resume=True, num_workers=0)
    assert first == again
    pretrain(folder, "cifar", tmp_path/"run", resume=True, valid_pct=.2, **SMALL)       # the same settings, given again
    others = [(dict(recipe="digits"), "recipe='digits'"), (dict(seed=3), r"seed=3 \(was 0\)"),
              (dict(epochs=9), r"epochs=9 \(was 2\)"), (dict(valid_pct=.1), r"valid_pct=0.1 \(was 0.2\)"),
              (dict(data=other_images), "data=")]
    for other, message in others:
        with pytest.raises(ValueError, match=message): pretrain(out=tmp_path/"run", resume=True, **other)
    with pytest.raises(ValueError, match="holds a run"): pretrain(folder, "cifar", tmp_path/"run", **SMALL)
    with pytest.raises(ValueError, match="data is missing"): pretrain(out=tmp_path/"none", resume=True)
    with pytest.raises(ValueError, match="no epoch"): pretrain(folder, out=tmp_path/"other", epoch=3)


def test_broken_files_are_listed(folder, tmp_path):
    contents = b"", b"no picture", (folder/"dark/01.png").read_bytes()[:90]
    for i, content in enumerate(contents): (folder/f"dark/00{i}.png").write_bytes(content)
    results = pretrain(folder, "cifar", tmp_path/"run", **SMALL)
    assert results["skipped"] == 3
    assert sorted(pd.read_csv(tmp_path/"run/skipped.csv").reason) == ["empty file", "not an image", "truncated"]


def test_size_and_channels_are_read_from_the_images(folder):
    grey = folder/"grey"
    grey.mkdir()
    for i in range(3): Image.fromarray(np.full((20 + i, 40), 99, np.uint8)).save(grey/f"{i}.png")
    (grey/"0bad.png").write_bytes(b"x")
    assert size_and_channels(sorted(grey.iterdir())) == (21, 1)
    assert size_and_channels(sorted((folder/"dark").iterdir())) == (32, 3)
    with pytest.raises(ValueError, match="none of the 1 files"): size_and_channels([grey/"0bad.png"])


def test_two_ranks_train_one_run(folder, tmp_path):
    pytest.importorskip("accelerate")
    command = (f"torchrun --nproc-per-node 2 --no-python bt_pretrain {folder} --out run --arch timm/test_resnet "
               "--width 16 --bs 16 --epochs 2 --workers 0 --valid-pct 0.2")
    done = subprocess.run(command.split(), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    results = json.loads((tmp_path/"run/results.json").read_text())
    assert results["recipe"]["bs"] == 16 and results["steps"] == 4 and done.stdout.count("Saved in run/") == 1
    assert load_encoder(tmp_path/"run/encoder.safetensors").created_by["arch"] == "timm/test_resnet"


# Evaluation

def test_evaluate_equals_its_parts(folder, tmp_path):
    pretrain(folder, "cifar", tmp_path/"run", **SMALL)
    table = evaluate(tmp_path/"run", folder, ("knn", "linear", "semi-supervised", "transfer"), num_workers=0)
    encoder = load_encoder(tmp_path/"run/encoder.safetensors")
    dls = labelled_dls(folder, 32, num_workers=0)
    h, y = encode(encoder, dls.train.new(shuffle=False, drop_last=False))
    h_test, y_test = encode(encoder, dls.valid)
    row = table.loc["pictures"]
    assert (row["images"], row["test images"], row["classes"]) == (32, 8, 2)
    assert row["kNN (k=20)"] == round(100*float(knn_accuracy(h_test, y_test, h, y, k=20)), 1)
    assert row["linear"] == round(100*float(linear_probe(h, y, h_test, y_test).top1), 1)
    assert {"1 % of the labels", "10 % of the labels"} <= set(table.columns)


def test_evaluate_with_a_folder_of_test_images(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"test")
    for i in range(260): shutil.copy(folder/"light/00.png", tmp_path/f"test/light/copy{i}.png")   # more than a batch
    dls = labelled_dls(folder, 32, test=tmp_path/"test", num_workers=0)
    assert (len(dls.train.dataset), len(dls.valid.dataset)) == (40, 300)
    assert sum(len(b[0]) for b in dls.valid) == 300
    shutil.move(tmp_path/"test/dark", tmp_path/"test/black")
    with pytest.raises(ValueError, match="must be the same"):
        labelled_dls(folder, 32, test=tmp_path/"test", num_workers=0)
    file = save_encoder(create_encoder("timm/test_resnet", pretrained=False), tmp_path/"e")
    with pytest.raises(ValueError, match="one data set"): evaluate(file, [folder, folder], test=folder)
    with pytest.raises(ValueError, match="protocol must be one of"): evaluate(tmp_path, folder, ("kmeans",))


# Export

@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet10t", "timm/test_resnet", "timm/test_vit"])
@pytest.mark.parametrize("small_stem", [False, True, "no pool", "keep pool"])
@pytest.mark.parametrize("pool_type", ["avg", "catavgmax"])
def test_exported_encoder_in_plain_timm_is_equal(tmp_path, arch, small_stem, pool_type):
    "With the exported code, without this library"
    if "vit" in arch and (small_stem or pool_type != "avg"): pytest.skip("a ViT has no stem, and pools its own way")
    encoder = create_encoder(arch, pretrained=False, n_in=1, pool_type=pool_type, small_stem=small_stem)
    for m in encoder.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        nn.init.uniform_(m.weight)
        nn.init.uniform_(m.bias)
        m.running_mean.uniform_(-1, 1)
    code = export_timm(encoder, tmp_path/"e.safetensors")
    assert "self_supervised_bt" not in code and (tmp_path/"e.py").read_text() == code
    scope = {}
    exec(code.replace("'e.safetensors'", repr(str(tmp_path/"e.safetensors"))), scope)
    x = torch.rand(2, 1, *([160, 160] if "vit" in arch else [48, 48]))
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](x), encoder.eval()(x), rtol=1e-4, atol=1e-5)


def test_export_raises_without_a_counterpart_in_timm(tmp_path):
    file = tmp_path/"e.safetensors"
    with pytest.raises(ValueError, match="no counterpart of xresnet18"):
        export_timm(create_encoder("xresnet18", pretrained=False), file)
    changed = create_encoder("resnet18", pretrained=False)
    changed.relu = nn.Identity()
    with pytest.raises(ValueError, match="other representations"): export_timm(changed, file)
    assert not file.exists() and not (tmp_path/"e.py").exists()
