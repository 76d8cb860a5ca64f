"Runs: the commands of the README on small images; settings, evaluation"
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from callbacks import DoAt
from conftest import class_pictures
from fastai.callback.core import CancelEpochException
from PIL import Image
from safetensors.torch import load_file

from self_supervised_bt import runs, sources
from self_supervised_bt.checkpoints import read_checkpoint
from self_supervised_bt.core import lock_folder, unlock
from self_supervised_bt.data import PATIENCE, image_files, load_images
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.explore import embed, similar
from self_supervised_bt.export import export_timm
from self_supervised_bt.folders import labelled_dls
from self_supervised_bt.labelled import classify
from self_supervised_bt.layers import create_encoder, fit_whitening
from self_supervised_bt.runs import evaluate, pretrain, size_and_channels
from self_supervised_bt.sources import write_shards
from self_supervised_bt.weights import inference_model, load_encoder, save_encoder

root = Path(__file__).parents[1]
SMALL = dict(arch="timm/test_resnet", arch_args={}, hidden_size=16, projection_size=16, bs=16, epochs=2, num_workers=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder of images, a run on them, and its results; a fifth of the images is held out"
    home = tmp_path_factory.mktemp("trained")
    class_pictures(home/"images", side=4)
    return home, pretrain(home/"images", "cifar", home/"run", valid_pct=.2, **SMALL)


@pytest.fixture
def run(trained, tmp_path):
    "A copy of the run"
    return shutil.copytree(trained[0]/"run", tmp_path/"run")


@pytest.fixture
def unfinished(run):
    "A copy of the run as it was after the last epoch, before its results were written"
    for name in ("encoder.safetensors", "model.safetensors", "results.json"): (run/name).unlink()
    return run


def contents(folder):
    "The files of a folder, and when they were written"
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir() if f.is_file()}


def environment():
    "Environment with the commands of this Python on the path, and one thread per process"
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_commands_of_the_readme(folder):
    "bt_pretrain on a folder, killed and resumed, evaluated, exported, loaded in plain timm"
    block = next(b for b in re.findall(r"```sh\n(.*?)```", (root/"README.md").read_text(), re.S) if "kill -9" in b)
    script = block.replace("--epochs 10 --every 100", "--epochs 4 --bs 16 --every 1")
    script = script.replace("sleep 60", "while [ ! -e runs/photos/step-0000000003.pt ]; do sleep .1; done")
    script = script.replace("onnx,pt2", "pt2")   # every format has its tests in test_export.py
    assert script.count("--every 1") == 1 and script.count("while") == 1 and script.count("pt2 ") == 1
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

def test_run_resumes_from_its_folder_and_other_settings_raise(trained, run, tmp_path, capsys):
    home, results = trained
    before = contents(run)
    assert pretrain(out=run, resume=True, num_workers=0) == results
    assert "has ended after 2 epochs: nothing to resume" in capsys.readouterr().out
    assert pretrain(home/"images", "cifar", run, resume=True, valid_pct=.2, **SMALL) == results   # the same settings
    others = [(dict(recipe="digits"), "recipe='digits'"), (dict(seed=3), r"seed=3 \(was 0\)"),
              (dict(epochs=1), r"epochs=1 \(was 2\)"), (dict(valid_pct=.1), r"valid_pct=0.1 \(was 0.2\)"),
              (dict(data=class_pictures(tmp_path/"others", 44, side=4)), "data=")]
    for other, message in others:
        with pytest.raises(ValueError, match=message): pretrain(out=run, resume=True, **other)
    with pytest.raises(ValueError, match="holds a run"): pretrain(home/"images", "cifar", run, **SMALL)
    with pytest.raises(ValueError, match="data is missing"): pretrain(out=tmp_path/"none", resume=True)
    with pytest.raises(ValueError, match="no epoch"): pretrain(home/"images", out=tmp_path/"other", epoch=3)
    assert contents(run) == before and not (tmp_path/"other").exists()


def test_a_resumed_run_continues_its_clock(trained, unfinished):
    home, results = trained
    again = pretrain(out=unfinished, resume=True, num_workers=0)
    assert again["seconds"] >= .8*results["seconds"] > 0 and again["steps"] == results["steps"]
    for name in ("encoder.safetensors", "history.csv"):
        assert (unfinished/name).read_bytes() == (home/"run"/name).read_bytes()


def test_a_moved_folder_resumes_and_changed_images_do_not(trained, unfinished, tmp_path):
    moved = shutil.copytree(trained[0]/"images", tmp_path/"moved/pictures")
    settings = json.loads((unfinished/"run.json").read_text())
    (unfinished/"run.json").write_text(json.dumps({**settings, "data": str(tmp_path/"gone")}))
    with pytest.raises(ValueError, match="no longer there: if it was moved, pass its new place"):
        pretrain(out=unfinished, resume=True)
    picture = moved/"dark/01.png"
    pixels = picture.read_bytes()
    picture.write_bytes(pixels + b" ")
    with pytest.raises(ValueError, match="does not hold the images of the run"):
        pretrain(moved, out=unfinished, resume=True, num_workers=0)
    picture.write_bytes(pixels)
    assert pretrain(moved, out=unfinished, resume=True, num_workers=0)["data"] == str(moved)
    assert json.loads((unfinished/"run.json").read_text())["data"] == str(moved)


def test_one_process_at_a_time_trains_into_a_folder(trained, tmp_path):
    out = tmp_path/"run"
    out.mkdir()
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "f.write('process 7 of tea'); f.flush(); print(flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", hold, out/".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="in use by process 7 of tea, which trains there"):
            pretrain(trained[0]/"images", "cifar", out, **SMALL)
        other.communicate()
    assert [f.name for f in out.iterdir()] == [".lock"]
    with runs.run_lock(out): assert f"process {os.getpid()}" in (out/".lock").read_text()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["results.json", "history.csv", "encoder.safetensors", "model.safetensors", "best.pt",
                                  "run.json"])
def test_files_of_others_are_not_overwritten(trained, tmp_path, name):
    (tmp_path/name).write_text('{"mine": 1}')
    for resume in (False, True):
        with pytest.raises(ValueError, match=name): pretrain(trained[0]/"images", out=tmp_path, resume=resume, **SMALL)
    assert (tmp_path/name).read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 1


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(trained, run):
    for f in run.glob("*.pt"): f.unlink()
    before = contents(run)
    with pytest.raises(ValueError, match="which a new run would overwrite"):
        pretrain(trained[0]/"images", "cifar", run, **SMALL)
    assert contents(run) == before


# A run that failed before its first training step

START = ["run.json", "step-0000000000.pt", "trained_on.npy"]
REPLACED = "has not trained a step: a new one replaces it"


@pytest.fixture
def failed(trained, tmp_path):
    "A folder of a run that failed at its first batch"
    with pytest.raises(ValueError, match="batch of one image"):
        pretrain(trained[0]/"images", "cifar", tmp_path/"failed", valid_pct=.2, **SMALL | dict(bs=1))
    assert sorted(contents(tmp_path/"failed")) == START
    return tmp_path/"failed"


@pytest.mark.parametrize("resume", [False, True])
def test_a_corrected_run_replaces_it_and_is_protected_then(trained, failed, capsys, resume):
    home, results = trained
    if resume:   # what was given is not the whole of a run
        with pytest.raises(ValueError, match=r"bs=16 \(was 1\).*give data and all other settings: it has not trained"):
            pretrain(out=failed, resume=True, bs=16)
    args = dict(valid_pct=.2, resume=resume, **SMALL)
    assert pretrain(home/"images", "cifar", failed, **args)["train_loss"] == results["train_loss"]
    assert (failed/"encoder.safetensors").read_bytes() == (home/"run/encoder.safetensors").read_bytes()
    assert capsys.readouterr().out.count(REPLACED) == 1
    before = contents(failed)
    with pytest.raises(ValueError, match="holds a run"):
        pretrain(home/"images", "cifar", failed, **args | dict(bs=32))
    assert contents(failed) == before


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_command_starts_or_resumes_it(trained, tmp_path, monkeypatch, capsys, resume):
    home, results = trained
    def end(learn): raise RuntimeError("ended here")
    again = partial(pretrain, home/"images", "cifar", tmp_path/"run", valid_pct=.2, resume=resume, **SMALL)
    with monkeypatch.context() as m:
        do_at(m, "before_batch", end)
        with pytest.raises(RuntimeError, match="ended here"): again()
    assert again()["train_loss"] == results["train_loss"]
    assert (tmp_path/"run/encoder.safetensors").read_bytes() == (home/"run/encoder.safetensors").read_bytes()
    assert (REPLACED in capsys.readouterr().out) == (not resume)


def test_it_may_get_other_images(trained, failed, tmp_path, capsys):
    more = class_pictures(tmp_path/"more", 60, side=4)
    settings = json.loads((failed/"run.json").read_text())
    (failed/"run.json").write_text(json.dumps({**settings, "recipe": {**settings["recipe"], "bs": 16}}))
    assert pretrain(more, out=failed, resume=True, num_workers=0)["images"] == 48
    assert REPLACED in capsys.readouterr().out
    assert json.loads((failed/"run.json").read_text())["images"] == 60


def test_it_only_resumes_where_the_weights_that_it_starts_from_are_gone(trained, run, tmp_path, monkeypatch):
    home, out = trained[0], tmp_path/"more"
    def end(learn): raise RuntimeError("ended here")
    with monkeypatch.context() as m:
        do_at(m, "before_batch", end)
        with pytest.raises(RuntimeError, match="ended here"):
            pretrain(home/"images", weights=run, out=out, valid_pct=.2, epochs=1, bs=16, num_workers=0)
    shutil.rmtree(run)
    before = contents(out)
    with pytest.raises(ValueError, match="does not hold the images of the run"):
        pretrain(class_pictures(tmp_path/"others", 60, side=4), out=out, resume=True)
    assert contents(out) == before and pretrain(out=out, resume=True, num_workers=0)["epochs"] == 1


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_it_is_not_replaced_while_another_process_trains_there(trained, failed):
    lock, before = lock_folder(failed), contents(failed)
    with pytest.raises(ValueError, match="holds a run up to step-0000000000.pt"):
        pretrain(trained[0]/"images", "cifar", failed, valid_pct=.2, **SMALL)
    assert contents(failed) == before
    unlock(lock)


# Damaged files

def damaged(file, how):
    "A file that cannot be read, or holds something else"
    file.unlink()
    if how == "folder": file.mkdir()
    elif how == "pipe": os.mkfifo(file)
    elif how == "link to itself": file.symlink_to(file)
    else: file.write_bytes(how)


BROKEN_JSON = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"recipe": {}}', "folder", "pipe", "link to itself"]


@pytest.mark.parametrize("how", BROKEN_JSON, ids=lambda how: how if isinstance(how, str) else repr(how[:20]))
def test_damaged_settings_say_what_to_do(run, how):
    damaged(run/"run.json", how)
    with pytest.raises(ValueError, match="run.json is damaged or was edited.*restore the file") as e:
        pretrain(out=run, resume=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [dict(seed="0"), dict(recipe=7), dict(bad="x"), dict(recipe=dict(bs="x")),
                                    dict(recipe=dict(lmb="x")), dict(recipe=dict(nothing=1)), dict(half=None)])
def test_settings_of_the_wrong_type_say_what_to_do(run, change):
    settings = json.loads((run/"run.json").read_text())
    (run/"run.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match="run.json is damaged or was edited"): pretrain(out=run, resume=True)


@pytest.mark.parametrize("change", [dict(half=True), dict(bad="raise"), dict(seed=1), dict(valid_pct=.3)])
def test_edited_settings_are_noticed(unfinished, change):
    settings = json.loads((unfinished/"run.json").read_text())
    (unfinished/"run.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match="edited|images of the run|images"):
        pretrain(out=unfinished, resume=True, num_workers=0)
    assert not (unfinished/"results.json").exists()


@pytest.mark.parametrize("name", ["results.json", "history.csv"])
def test_a_damaged_result_is_written_again(trained, run, name):
    before = (run/name).read_bytes()
    damaged(run/"results.json", b"")
    damaged(run/name, b"\0")
    results = pretrain(out=run, resume=True, num_workers=0)
    assert results == {**trained[1], "seconds": results["seconds"]}
    if name == "history.csv": assert (run/name).read_bytes() == before


# What is written, and when

def do_at(monkeypatch, event, do):
    "Call `do(learn)` at an event of every run"
    make = runs.run_learner
    def with_callback(*args):
        learn = make(*args)
        learn.add_cb(DoAt(event, do))
        return learn
    monkeypatch.setattr(runs, "run_learner", with_callback)


def test_results_are_written_after_every_epoch(trained, tmp_path, monkeypatch):
    def end(learn):
        if learn.epoch == 1: raise RuntimeError("ended here")
    do_at(monkeypatch, "before_epoch", end)
    with pytest.raises(RuntimeError, match="ended here"):
        pretrain(trained[0]/"images", "cifar", tmp_path/"run", **SMALL)
    results = json.loads((tmp_path/"run/results.json").read_text())
    assert (results["state"], results["epochs"]) == ("running", 1) and results["seconds"] > 0
    assert len(pd.read_csv(tmp_path/"run/history.csv")) == 1 and trained[1]["state"] == "ended"
    with pytest.warns(UserWarning, match="has not ended: its encoder is that of epoch 1 of 2"):
        table = evaluate(tmp_path/"run", trained[0]/"images", num_workers=0)
    assert table["linear"].iloc[0] >= 0


def test_results_lost_on_a_full_disk_name_the_file_and_can_be_written_later(trained, unfinished, monkeypatch):
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(OSError, match="history.csv .*No space left.*once there is room, continue with resume=True"):
            pretrain(out=unfinished, resume=True, num_workers=0)
    assert pretrain(out=unfinished, resume=True, num_workers=0)["steps"] == trained[1]["steps"]


def test_training_continues_when_the_disk_is_full_for_a_moment(trained, run, monkeypatch):
    def full(*args): raise OSError("history.csv could not be written")
    monkeypatch.setattr(runs, "write_results", full)
    monkeypatch.setattr(runs, "run_results", lambda *args: {})
    files = runs.RunFiles(run, {})
    with pytest.warns(UserWarning, match="history.csv could not be written. Training continues"): files.after_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # it is said once
        files.after_epoch()


def test_a_stopped_worker_is_continued(trained, tmp_path, monkeypatch):
    "Otherwise it would be waited for without end, at its next batch or when the process ends"
    stopped = []
    def stop_workers(learn):
        if stopped: return
        stopped.extend(p.pid for p in multiprocessing.active_children())
        for pid in stopped: os.kill(pid, signal.SIGSTOP)
    do_at(monkeypatch, "before_batch", stop_workers)
    monkeypatch.setattr("self_supervised_bt.data.PATIENCE", 4)
    with pytest.warns(UserWarning, match="no batch for 2 seconds: worker processes that were stopped are continued"):
        results = pretrain(trained[0]/"images", "cifar", tmp_path/"run", valid_pct=.2, **{**SMALL, "num_workers": 1})
    assert results["train_loss"] == trained[1]["train_loss"] and stopped


def test_a_disk_that_does_not_answer_ends_the_loop(trained, monkeypatch, quick_end):
    monkeypatch.setattr("self_supervised_bt.data.PATIENCE", 1)
    dl = labelled_dls(trained[0]/"images", 16, num_workers=1).train
    monkeypatch.setattr(type(dl.dataset), "read", lambda *args: time.sleep(60))
    with pytest.raises(RuntimeError, match="no batch for 1 seconds: does the disk.*With num_workers=0"): list(dl)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_batch_and_copies_of_a_loader_have_no_limit_that_pytorch_refuses(trained, workers):
    dls = labelled_dls(trained[0]/"images", 16, num_workers=workers)
    for dl in (dls.train, dls.train.new(num_workers=0), dls.train.new(num_workers=1)):
        assert dl.fake_l.timeout == (PATIENCE if dl.fake_l.num_workers else 0)
        assert len(dl.one_batch()) == 2
        assert dl.fake_l.timeout == (PATIENCE if dl.fake_l.num_workers else 0)


def test_an_epoch_that_was_ended_early_has_its_own_columns(trained, tmp_path, monkeypatch, capsys):
    "Its values are not taken for those of other columns, and its training loss is not the best validation loss"
    def end(learn):
        if learn.epoch == 1: raise CancelEpochException()
    do_at(monkeypatch, "before_validate", end)
    monkeypatch.setattr(runs, "unlabelled_scores", lambda learn: {})
    pretrain(trained[0]/"images", "cifar", tmp_path/"run", valid_pct=.2, **{**SMALL, "epochs": 3})
    table = pd.read_csv(tmp_path/"run/history.csv")
    assert len(table) == 3 and table["valid_loss"].isna().tolist() == [False, True, False]
    assert read_checkpoint(tmp_path/"run/best.pt")["best"] == table["valid_loss"].min()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("    2/3"))
    assert row[10:21].strip() and row[22:33].strip() == ""


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
    "It replaces one that failed before its first step"
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="batch of one image"):
        pretrain(folder, "cifar", tmp_path/"run", **SMALL | dict(bs=1))
    command = (f"torchrun --nproc-per-node 2 --no-python bt_pretrain {folder} --out run --resume "
               "--arch timm/test_resnet --width 16 --bs 16 --epochs 2 --workers 0 --valid-pct 0.2")
    done = subprocess.run(command.split(), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    results = json.loads((tmp_path/"run/results.json").read_text())
    assert results["recipe"]["bs"] == 16 and results["steps"] == 4 and done.stdout.count("Saved in run/") == 1
    assert done.stdout.count(REPLACED) == 1
    assert load_encoder(tmp_path/"run/encoder.safetensors").created_by["arch"] == "timm/test_resnet"


# Evaluation

def test_evaluate_equals_its_parts(run, trained):
    folder = trained[0]/"images"
    table = evaluate(run, folder, ("knn", "linear", "semi-supervised", "transfer"), num_workers=0)
    encoder = load_encoder(run/"encoder.safetensors")
    dls = labelled_dls(folder, 24, num_workers=0)
    h, y = encode(encoder, dls.train.new(shuffle=False, drop_last=False))
    h_test, y_test = encode(encoder, dls.valid)
    row = table.loc["images"]
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


def test_images_seen_in_training_are_counted(trained, run, tmp_path, monkeypatch):
    "Wherever they lie and whatever they are called; unseen ones are preferred where there are enough"
    images = shutil.copytree(trained[0]/"images", tmp_path/"copy")
    for i, f in enumerate(sorted(images.glob("*/*.png"))): f.rename(f.with_name(f"renamed{i}.png"))
    row = evaluate(run, images, ("knn",), num_workers=0).iloc[0]
    seen = runs.seen_in_training(run, sorted(images.glob("*/*.png")))
    assert seen.sum() == 32 and len(seen) == 40
    assert row["test images"] == 8 and 4 <= row["seen in training"] <= 8
    monkeypatch.setattr(runs, "ENOUGH", 8)
    row = evaluate(run, images, ("knn",), num_workers=0).iloc[0]
    assert (row["test images"], row["seen in training"]) == (8, 0)
    class_pictures(tmp_path/"test", 44, side=4)
    for f in (tmp_path/"test").glob("*/4*.png"): f.write_bytes(f.read_bytes() + b" ")   # four others
    row = evaluate(run, images, ("knn",), tmp_path/"test", num_workers=0).iloc[0]
    assert (row["test images"], row["seen in training"]) == (44, 32)
    (run/"trained_on.npy").write_bytes(b"x")
    with pytest.warns(UserWarning, match="trained_on.npy cannot be read"):
        row = evaluate(run, images, ("knn",), tmp_path/"test", num_workers=0).iloc[0]
    assert row["seen in training"] == "not known"


def test_two_folders_of_one_name_give_two_rows(trained, run, tmp_path):
    for name in "AB": class_pictures(tmp_path/name/"train", side=4)
    table = evaluate(run, [tmp_path/"A/train", tmp_path/"B/train", trained[0]/"images"], ("knn",), num_workers=0)
    assert list(table.index) == ["A/train", "B/train", "images"]
    runs.save_evaluation(run, table, ("knn",))
    assert list(json.loads((run/"evaluation.json").read_text())["rows"]) == list(table.index)
    assert runs.names_of(["x", "x"]) == ["x (1)", "x (2)"] or len(set(runs.names_of(["x", "x"]))) == 2


def test_rows_after_post_processing_stand_below_those_of_a_single_view(run, trained):
    folder = trained[0]/"images"
    plain = evaluate(run, [folder, folder], ("knn", "linear"), num_workers=0)
    table = evaluate(run, [folder, folder], ("knn", "linear"), num_workers=0, processed=True)
    names = list(plain.index)
    assert list(table.index) == names + [f"{name}, {way}" for way in runs.PROCESSED for name in names]
    assert table.loc[names].equals(plain) and set(table["test images"]) == {8}
    encoder, dls = load_encoder(run/"encoder.safetensors"), labelled_dls(folder, 24, num_workers=0)
    (h, y), (h_test, y_test) = (encode(encoder, dl, tta="flip") for dl in (dls.train.new(shuffle=False), dls.valid))
    for way, whitening in (("flips averaged", lambda h: h), ("both", fit_whitening(h))):
        knn = knn_accuracy(whitening(h_test), y_test, whitening(h), y, k=20)
        assert table.loc[f"{names[0]}, {way}", "kNN (k=20)"] == round(100*float(knn), 1)
    table.loc[names[0], "transfer"] = 50.
    runs.save_evaluation(run, table, ("knn", "linear", "transfer"))
    results = runs.run_facts(run)["results"]
    assert [row["data"] for row in results] == list(table.index) and ["transfer" in row for row in results[:3]] == \
        [True, False, False]


def test_few_labels_are_sampled_several_times(run, trained):
    table = evaluate(run, trained[0]/"images", ("semi-supervised",), num_workers=0)
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", table["10 % of the labels"].iloc[0])


# Export


@pytest.mark.parametrize("change", [dict(arch="hf-hub:somebody/model"), dict(arch="timm/hf-hub:somebody/model"),
                                    dict(arch_args={"pretrained_cfg": {"url": "http://x"}}),
                                    dict(arch_args={"x=None); open('executed', 'w') #": 1}),
                                    dict(arch="local-dir:/tmp")])
def test_nothing_is_fetched_or_run_because_the_settings_of_a_run_say_so(unfinished, monkeypatch, change):
    for call in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(call, lambda *a, **k: pytest.fail("reached for the network"))
    settings = json.loads((unfinished/"run.json").read_text())
    settings["recipe"].update(change)
    (unfinished/"run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="run.json is damaged or was edited, or .*give the same arch again") as e:
        pretrain(out=unfinished, resume=True, num_workers=0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("at", [.001, .3, .9])
def test_a_damaged_encoder_is_noticed_and_written_again(trained, run, at):
    "One bit of the weights would change every representation without a word"
    file = run/"encoder.safetensors"
    content = file.read_bytes()
    i = int(at*len(content))
    file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1:])
    for use in (load_encoder, lambda f: export_timm(load_encoder(f), run/"timm.safetensors")):
        with pytest.raises(ValueError, match="damaged|not a safetensors|cannot be read|does not"): use(file)
    if at < .01: return   # no longer known as a file of this library: it is not overwritten
    results = pretrain(out=run, resume=True, num_workers=0)
    assert results["steps"] == trained[1]["steps"] and load_encoder(file)


def test_weights_of_other_projects_are_evaluated_as_they_are(trained, tmp_path):
    "Here those of facebookresearch/barlowtwins; whether images were seen in their training is not known"
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    model = {f"module.backbone.{k}": t for k, t in encoder.state_dict().items()}
    projector = torch.nn.Sequential(torch.nn.Linear(512, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
                                    torch.nn.Linear(8, 8, bias=False))
    model |= {f"module.projector.{k}": t for k, t in projector.state_dict().items()}
    torch.save(dict(epoch=1, model=model, optimizer={}), tmp_path/"checkpoint.pth")
    table = evaluate(tmp_path/"checkpoint.pth", trained[0]/"images", ("knn",), num_workers=0)
    assert table["seen in training"].item() == "not known" and 0 <= table["kNN (k=20)"].item() <= 100


# Runs that continue from weights

@pytest.mark.parametrize("weights", ["https://127.0.0.1/w.pth", "barlowtwins_resnet50_8xb256-coslr-300e_in1k"])
def test_no_weights_are_fetched_because_the_settings_of_a_run_say_so(unfinished, monkeypatch, weights):
    "Before its first checkpoint a run that resumes starts from its weights again"
    for call in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(call, lambda *a, **k: pytest.fail("reached for the network"))
    for checkpoint in unfinished.glob("step-*.pt"): checkpoint.unlink()
    settings = json.loads((unfinished/"run.json").read_text())
    settings["recipe"].update(weights=weights, patch_init=False)
    (unfinished/"run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="nothing is fetched because a file says so: give the same weights again"):
        pretrain(out=unfinished, resume=True, num_workers=0)


def model_tensors(folder, part):
    "Weights of a part of a run's model"
    return {k: t for k, t in load_file(folder/"model.safetensors").items() if k.startswith(f"{part}.")}


def test_a_run_continues_from_another_and_resumes_when_that_is_gone(trained, run, tmp_path, capsys):
    home, _ = trained
    more = tmp_path/"more"
    results = pretrain(home/"images", weights=run, out=more, valid_pct=.2, epochs=2, bs=16, num_workers=0)
    assert f"Continues from {run} (" in capsys.readouterr().out
    assert results["recipe"]["weights"] == str(run) and results["recipe"]["projection_size"] == 16
    final = (more/"encoder.safetensors").read_bytes()
    shutil.rmtree(run)
    for name in ("encoder.safetensors", "model.safetensors", "results.json"): (more/name).unlink()
    for checkpoint in sorted(more.glob("step-*.pt"))[1:]: checkpoint.unlink()   # back to the end of the first epoch
    assert pretrain(out=more, resume=True, num_workers=0)["steps"] == results["steps"]
    assert (more/"encoder.safetensors").read_bytes() == final


def test_a_run_starts_from_exactly_the_weights_it_was_given(trained, run, tmp_path, monkeypatch):
    "Encoder and projector before the first step, normalised as they were"
    class Stop(Exception): pass
    def stop(learn):
        parts = model_tensors(run, "encoder") | model_tensors(run, "projector")
        now = learn.model.state_dict()
        assert now.keys() == parts.keys() and all(torch.equal(now[k], t) for k, t in parts.items())
        raise Stop
    monkeypatch.setattr(runs, "fit_run", stop)
    with pytest.raises(Stop):
        pretrain(trained[0]/"images", weights=run, out=tmp_path/"more", valid_pct=.2, bs=16, num_workers=0)


@pytest.mark.parametrize("change,message", [
    (dict(arch="resnet18"), "arch='resnet18' would have no effect"),
    (dict(pretrained=True), "exclude each other"), (dict(weights="nowhere.pth"), "nowhere.pth")])
def test_settings_that_contradict_the_weights_are_refused_before_anything_is_written(trained, run, tmp_path, change,
                                                                                     message):
    args = {"weights": run, "out": tmp_path/"more", "num_workers": 0, **change}
    with pytest.raises((ValueError, OSError), match=message): pretrain(trained[0]/"images", **args)
    assert not (tmp_path/"more").exists()


def test_another_width_starts_a_new_projector_which_is_said_before_training(trained, run, tmp_path):
    with pytest.warns(UserWarning, match=r"another projector than .*projection_size=8 \(there 16\).*as in a new run"):
        pretrain(trained[0]/"images", weights=run, out=tmp_path/"more", valid_pct=.2, epochs=1, bs=16, num_workers=0,
                 projection_size=8)
    assert model_tensors(tmp_path/"more", "projector")["projector.6.weight"].shape == (8, 16)


def test_a_damaged_model_is_noticed_and_written_again(trained, run):
    file = run/"model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"): load_encoder(file)
    pretrain(out=run, resume=True, num_workers=0)
    assert file.read_bytes() == content


def test_pretrained_weights_of_torchvision_are_one_argument_away(trained, tmp_path, monkeypatch):
    "The download itself is replaced by weights made here"
    torch.manual_seed(1)
    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **kwargs: published)
    class Stop(Exception): pass
    def stop(learn):
        weights = learn.model.encoder.state_dict()
        assert all(torch.equal(weights[k], published[k]) for k in weights) and learn.recipe.pretrained
        raise Stop
    monkeypatch.setattr(runs, "fit_run", stop)
    with pytest.raises(Stop):
        pretrain(trained[0]/"images", pretrained=True, arch="resnet18", pool_type="avg", out=tmp_path/"run", size=64,
                 valid_pct=.2, bs=16, num_workers=0)


def test_the_model_card_of_a_published_model_says_where_it_comes_from(monkeypatch, tmp_path):
    "Weights that have been downloaded are replaced by random ones here"
    encoder = create_encoder("resnet18", pretrained=False, pool_type="avg", small_stem=False)
    monkeypatch.setattr(runs, "load_encoder", lambda name: encoder)
    out, table = runs.export_formats("mixbt_resnet18_cifar10", "timm", tmp_path/"out")
    card = (out/"README.md").read_text()
    assert "92.58" in card and "CIFAR-10" in card and "licence at the source | MIT" in card and len(table) == 3


# More epochs, runs that have not ended

def test_an_ended_run_gets_more_epochs_on_the_longer_schedule(trained, run, tmp_path, monkeypatch, capsys):
    "Like a run of that many epochs from there on; and it resumes with nothing but its folder"
    home, results = trained
    seen = []
    do_at(monkeypatch, "before_step", lambda learn: seen.append(learn.opt.hypers[0]["lr"]))
    pretrain(home/"images", "cifar", tmp_path/"whole", valid_pct=.2, **{**SMALL, "epochs": 4})
    whole, seen[:] = list(seen), []
    longer = pretrain(out=run, resume=True, epochs=4, num_workers=0)
    assert "2 epochs become 4: the rest follows the schedule of 4 epochs" in capsys.readouterr().out
    assert seen == whole[2*2:] and longer["epochs"] == 4 and longer["steps"] == 2*results["steps"]
    assert len(pd.read_csv(run/"history.csv")) == 4
    assert json.loads((run/"run.json").read_text())["recipe"]["epochs"] == 4
    assert "nothing to resume. For a longer run give more epochs" not in capsys.readouterr().out
    assert pretrain(out=run, resume=True, epochs=4, num_workers=0) == longer


def test_a_run_killed_while_it_gets_more_epochs_resumes(trained, run, tmp_path, monkeypatch):
    again = shutil.copytree(run, tmp_path/"again")
    whole = pretrain(out=again, resume=True, epochs=4, num_workers=0)
    with monkeypatch.context() as m:
        def end(learn): raise RuntimeError("killed")
        do_at(m, "before_epoch", end)
        with pytest.raises(RuntimeError, match="killed"): pretrain(out=run, resume=True, epochs=4, num_workers=0)
    assert pretrain(out=run, resume=True, num_workers=0)["train_loss"] == whole["train_loss"]
    assert (run/"encoder.safetensors").read_bytes() == (again/"encoder.safetensors").read_bytes()


@pytest.fixture
def stopped(trained, tmp_path, monkeypatch):
    "A run that was stopped by an exception after its first epoch"
    with monkeypatch.context() as m:
        def end(learn):
            if learn.epoch == 1: raise RuntimeError("ended here")
        do_at(m, "before_epoch", end)
        with pytest.raises(RuntimeError, match="ended here"):
            pretrain(trained[0]/"images", "cifar", tmp_path/"stopped", valid_pct=.2, **SMALL)
    return tmp_path/"stopped"


def test_a_stopped_run_is_exported_and_its_encoder_is_that_of_the_checkpoint(trained, stopped):
    with pytest.warns(UserWarning, match="epoch 1 of 2"): file, _ = runs.export_run(stopped)
    state = read_checkpoint(sorted(stopped.glob("step-*.pt"))[-1])["model"]
    encoder = load_encoder(stopped/"encoder-so-far.safetensors")
    for name, t in encoder.state_dict().items(): assert torch.equal(t, state[f"encoder.{name}"]), name
    whole = load_encoder(trained[0]/"run/encoder.safetensors")
    assert file.exists() and encoder.clean_pipeline.fs[0].size == whole.clean_pipeline.fs[0].size
    assert pretrain(out=stopped, resume=True, num_workers=0)["train_loss"] == trained[1]["train_loss"]


def test_a_report_of_a_run_that_has_not_ended_changes_nothing(stopped, trained):
    before = contents(stopped)
    page = runs.report_run(stopped, num_workers=0)
    assert contents(stopped) == before and page == stopped/"report/report.html"
    text = page.read_text()
    assert "Barlow Twins: stopped, epoch 1 of 2" in text and "Terms of the loss" in text
    assert "No figure: train" not in text and "No figure: the model" not in text
    assert "<h2>Training</h2>" in text and "train loss" in text
    with pytest.raises(ValueError, match="no folder of a run"): runs.report_run(stopped/"nothing")


def test_knn_is_measured_during_a_run(trained, tmp_path, capsys):
    images = trained[0]/"images"
    results = pretrain(images, "cifar", tmp_path/"run", labelled=images, eval_every=1, **SMALL)
    history = pd.read_csv(tmp_path/"run/history.csv")
    assert history["knn_accuracy"].between(.3, 1).all() and len(history) == 2 and results["state"] == "ended"
    assert "kNN top-1" in capsys.readouterr().out
    assert json.loads((tmp_path/"run/run.json").read_text())["labelled"] == str(trained[0]/"images")
    with pytest.raises(ValueError, match="labelled='.*dark' cannot be measured: .* at least two folders"):
        pretrain(trained[0]/"images", "cifar", tmp_path/"one", labelled=trained[0]/"images/dark", **SMALL)


def test_labels_of_any_source_are_measured_during_a_run(trained, tmp_path):
    images = trained[0]/"images"
    files = sorted(map(str, images.rglob("*.png")))
    table = pd.DataFrame(dict(picture=files, kind=["dark" if "dark" in f else "light" for f in files], n=1))
    table.to_csv(tmp_path/"t.csv", index=False)
    s, dls = runs.read_settings(trained[0]/"run/run.json"), runs.dls_of_run(trained[0]/"run", 0)
    of_folder = runs.labelled_images(images, s, dls)
    for data in (tmp_path/"t.csv", table):
        x, y = runs.labelled_images(data, {**s, "column": "picture", "eval_labels": "kind"}, dls)
        assert torch.equal(x, of_folder[0]) and torch.equal(y, of_folder[1])
        with pytest.raises(ValueError, match="labelled='.*' cannot be measured: .*choose one with labels='name'"):
            runs.labelled_images(data, {**s, "column": "picture"}, dls)
    args = dict(labelled=table.rename(columns=dict(picture="file")), eval_every=1, eval_labels="kind")
    pretrain(images, "cifar", tmp_path/"run", **args, **SMALL)
    assert pd.read_csv(tmp_path/"run/history.csv")["knn_accuracy"].between(.3, 1).all()
    saved = json.loads((tmp_path/"run/run.json").read_text())
    assert (saved["labelled"], saved["eval_labels"]) == ("<DataFrame>", "kind")
    with pytest.raises(ValueError, match="labelled of this run is an object, <DataFrame>: pass it again"):
        pretrain(out=tmp_path/"run", resume=True, epochs=3, num_workers=0)
    pretrain(out=tmp_path/"run", resume=True, epochs=3, num_workers=0, **args)
    assert len(pd.read_csv(tmp_path/"run/history.csv")["knn_accuracy"].dropna()) == 3


def test_labelled_images_that_cannot_be_read_are_left_out_with_their_labels(trained, tmp_path):
    copy = shutil.copytree(trained[0]/"images", tmp_path/"images")
    broken = sorted(copy.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    s, dls = runs.read_settings(trained[0]/"run/run.json"), runs.dls_of_run(trained[0]/"run", 0)
    x, y = runs.labelled_images(trained[0]/"images", s, dls)
    with pytest.warns(UserWarning, match="1 of .* files cannot be read as images"):
        x_left, y_left = runs.labelled_images(copy, s, dls)
    kept = [i for i in range(len(x)) if i != 3]
    assert torch.equal(x_left, x[kept]) and torch.equal(y_left, y[kept])


def test_the_recipe_is_chosen_by_the_images(trained, tmp_path, capsys):
    large = tmp_path/"large"
    large.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12): Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(large/f"{i}.png")
    pretrain(large, out=tmp_path/"run", epochs=1, num_workers=0, hidden_size=16, projection_size=16)
    out = capsys.readouterr().out
    assert f"12 images of {large}, the shorter side 90 pixels, read at 85x85; 1 held out" in out
    assert "laptop, for photographs on a CPU: timm/resnet10t, 2 views of 64x64 pixels" in out
    assert "1 epoch of batches of 5, barlow twins, muon" in out and "CPU, " in out
    saved = json.loads((tmp_path/"run/run.json").read_text())
    assert (saved["base_recipe"], saved["reason"]) == ("laptop", "photographs on a CPU")
    assert runs.recipe_for("digits", .05)[0].name == "digits"


def test_views_that_are_no_squares_are_made_measured_and_exported_as_they_were_trained(tmp_path, capsys):
    images, rng = tmp_path/"images", np.random.default_rng(0)
    for i in range(40):   # the class is at the left and right edge, which no square has
        f = images/("dark" if i % 2 else "light")/f"{i:02}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (48, 80, 3))
        pixels[:, :16] = pixels[:, -16:] = 20 if i % 2 else 230
        Image.fromarray(pixels.astype(np.uint8)).save(f)
    pretrain(images, "cifar", tmp_path/"run", size=(24, 40), **{**SMALL, "epochs": 1})
    assert "read at 29x48" in (said := capsys.readouterr().out) and "views of 24x40 pixels" in said
    pretrain(out=tmp_path/"run", resume=True, epochs=2, size=(24, 40), num_workers=0)
    assert json.loads((tmp_path/"run/run.json").read_text())["recipe"]["size"] == [24, 40]
    encoder, files = load_encoder(tmp_path/"run/encoder.safetensors"), image_files(images)
    assert runs.seen_size(encoder) == (24, 40)
    x = load_images(files, (24, 40), progress=False)
    table = embed(encoder, images, num_workers=0, progress=False)
    np.testing.assert_allclose(np.stack(table.h), encode(encoder, x)[0], atol=1e-5)
    assert table.attrs["read"] == [24, 40] and similar(table, files[3], 1, encoder).similarity.iloc[0] <= 1
    found = similar(table, Image.open(files[3]), 1, encoder)
    assert found.file.iloc[0] == str(files[3]) and found.similarity.iloc[0] > .999
    assert evaluate(tmp_path/"run", images, ("knn",), num_workers=0, k=3)["kNN (k=3)"].iloc[0] > 90
    r = classify(tmp_path/"run", images, seeds=1, num_workers=0)
    assert r["shares"][0] > .9 and inference_model(r["file"], files[0])["pred_class"] == "dark"
    net, _ = runs.export_run(tmp_path/"run")
    assert net.exists()
    with pytest.warns(UserWarning, match="views of 24x40 pixels, .* squares: 'digits' is evaluated at 40x40"):
        evaluate(tmp_path/"run", "digits", ("knn",), num_workers=0)


def test_images_are_kept_in_the_aspect_of_the_views():
    assert [runs.kept_size(24, side) for side in (24, 28, 32, 99)] == [24, 28, 32, 32]
    assert [runs.kept_size((24, 32), side) for side in (20, 32, 40, 99)] == [(24, 32), (24, 32), (30, 40), (32, 43)]
    assert runs.kept_size((24, 24), 28) == (28, 28) and runs.kept_size(None, 28) == 28


def as_shards_or_table(kind, images, home):
    "A folder of images as another source"
    if kind == "folder": return images
    if kind == "shards": return (write_shards(images, home/"shards", per_shard=20), home/"shards")[1]
    pd.DataFrame(dict(picture=sorted(map(str, images.rglob("*.png"))), n=1)).to_csv(home/"t.csv", index=False)
    return home/"t.csv"


@pytest.mark.parametrize("kind", ["folder", "shards", "table"])
def test_the_images_of_a_run_are_listed_once(kind, trained, tmp_path, monkeypatch):
    data = as_shards_or_table(kind, trained[0]/"images", tmp_path)
    name = dict(folder="image_names", shards="shard_index", table="read_table")[kind]
    listed, own = [], getattr(sources, name)
    monkeypatch.setattr(sources, name, lambda path, *args: (listed.append(path), own(path, *args))[1])
    monkeypatch.setattr(runs, "train_run", lambda *args: {})
    monkeypatch.setattr(runs, "diagnose", lambda *args: None)
    column, once = dict(column="picture") if kind == "table" else {}, 2 if kind == "shards" else 1
    small = {k: v for k, v in SMALL.items() if k != "bs"}
    pretrain(data, out=tmp_path/"run", **small, **column)                # the recipe is chosen by the images
    assert len(listed) == once, "by pretrain"
    pretrain(data, "cifar", out=tmp_path/"named", **SMALL, **column)     # it is named
    pretrain(out=tmp_path/"run", resume=True, num_workers=0)             # the settings are known
    assert len(listed) == 3*once
    runs.diagnose_run(data, **{k: v for k, v in small.items() if k not in ("num_workers", "epochs")}, **column)
    assert len(listed) == 4*once, "by diagnose_run"
    runs.dls_of_run(tmp_path/"run", 0)
    assert len(listed) == 5*once


def test_what_is_wrong_with_settings_is_said_before_images_are_listed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "image_names", lambda path: pytest.fail("listed"))
    with pytest.raises(ValueError, match="epochs"): pretrain(trained[0]/"images", out=tmp_path/"run", epochs=0)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        pretrain(trained[0]/"images", out=tmp_path/"run", weights=tmp_path/"nowhere.pth")


def test_lines_of_a_run_fit_into_80_columns(trained, tmp_path, capsys):
    pretrain(trained[0]/"images", "cifar", tmp_path/"run", labelled=trained[0]/"images", **SMALL)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["epoch"])
    assert len(lines[start].split()) >= 6 and all(len(line) <= 80 for line in lines[start - 2:])
    assert re.search(r"^About .* to the end, [\d,]+ images/s$", "\n".join(lines), re.M)


def test_the_position_is_one_line_of_at_most_80_columns(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs.ProgressLogger, "__init__", lambda self: setattr(self, "live", True))
    pretrain(trained[0]/"images", "cifar", tmp_path/"run", **SMALL)
    positions = [p for p in capsys.readouterr().out.replace("\n", "\r").split("\r") if "batches" in p and "━" in p]
    assert len(positions) == 4 and {len(p) for p in positions} == {79} and "images/s" in positions[-1]
