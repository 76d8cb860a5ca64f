"Checkpoints: runs that are killed or stopped, full disks, damaged files"
import os
import pickle
import signal
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import fastai
import numpy as np
import pytest
import torch
from callbacks import DoAt, KillAfter, Killed
from conftest import image_items, quiet, same, small_model, weights
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import AccumMetric
from fastai.torch_core import TensorImage, set_seed
from fastcore.foundation import L
from fasttransform import Transform
from safetensors.torch import save_file

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.checkpoints import FORMAT, Checkpoints, checkpoints_in, plain, read_checkpoint, write_checkpoint
from self_supervised_bt.data import digits_dls, digits_images, tensor_dls
from self_supervised_bt.layers import PoolingType
from self_supervised_bt.losses import variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import Recipe, bt_learner

root = Path(__file__).parents[1]


def pipelines(): return get_barlow_twins_aug_pipelines(size=8, recipe="digits")


def whole_and_resumed(make, fit, folder, at, **kwargs):
    "A Learner after a whole run, and one with another seed that resumed a run that was killed after step `at`"
    set_seed(0)
    whole = make([])
    fit(whole)
    set_seed(0)
    killed = make([Checkpoints(folder, **kwargs), KillAfter(at)])
    with pytest.raises(Killed): fit(killed)
    set_seed(1)
    torch.rand(7)
    resumed = make([Checkpoints(folder, resume=True, **kwargs)])
    fit(resumed)
    return whole, resumed


def test_killed_20_times_resumed_20_times():
    "In child processes; see killed_run.py"
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, root/"tests/killed_run.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "20 of 20 runs" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


# A resumed run equals a whole one bit for bit

@pytest.mark.parametrize("at", [7, 8, 9])
@pytest.mark.parametrize("opt", ["fastai", "lars", "adam", "adamw", "sgd"])
def test_every_optimizer_resumes(tmp_path, opt, at):
    wd = 0. if opt == "fastai" else 1e-3
    schedule = "cosine" if opt == "lars" else "one cycle"
    recipe = Recipe(opt=opt, lr=1e-2, wd=wd, epochs=3, schedule=schedule, hidden_size=16, projection_size=16)
    x, _ = digits_images()
    def make(cbs):
        dls = tensor_dls(x[:256], bs=64, valid_pct=0, device="cpu")
        return quiet(bt_learner(dls, small_model().encoder, 8, recipe=recipe, cbs=[ChannelsLast(), *cbs]))
    whole, resumed = whole_and_resumed(make, lambda learn: learn.fit_recipe(), tmp_path, at, every=2)
    a, b = whole.recorder, resumed.recorder
    assert same(weights(whole), weights(resumed))
    assert torch.equal(torch.stack(a.losses), torch.stack(b.losses)) and a.lrs == b.lrs
    assert a.hps == b.hps and list(a.values) == list(b.values)


def noisy(x): return (x + torch.randn(())*.1).clamp(0, 1)


def loader(kind):
    "A loader that shuffles; some sample noise for every item, in this process or in two workers"
    items = image_items(96, labels=False)
    torch_loader = partial(torch.utils.data.DataLoader, items, 16, shuffle=True, drop_last=True)
    if kind == "torch": return torch_loader()
    if kind == "torch, own generator":
        return torch_loader(generator=torch.Generator().manual_seed(int(torch.randint(99, ()))))
    noise = Transform(noisy) if "noise" in kind else None
    return TfmdDL(items, bs=16, shuffle=True, drop_last=True, num_workers=2*("workers" in kind), after_item=noise)


@pytest.mark.parametrize("kind", ["fastai", "fastai, noise", "fastai, workers", "fastai, workers, noise", "torch",
                                  "torch, own generator"])
def test_every_loader_resumes_in_the_middle_of_an_epoch(tmp_path, kind):
    def make(cbs):
        dls = DataLoaders(loader(kind), loader(kind), device="cpu")
        return quiet(Learner(dls, small_model(), cbs=[BarlowTwins(pipelines()), *cbs]))
    whole, resumed = whole_and_resumed(make, lambda learn: learn.fit(2, 1e-2), tmp_path, 4, every=4)
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("what", ["mixed", "queue", "accumulation", "metric"])
def test_state_of_callbacks_resumes(tmp_path, what):
    def make(cbs):
        bt = BarlowTwins(pipelines(), loss=variant_loss(queue=40) if what == "queue" else None)
        if what == "mixed": bt = MixedBarlowTwins(pipelines())
        if what == "accumulation": cbs = [*cbs, GradientAccumulation(64)]
        metrics = [AccumMetric(lambda p, t: p.std(), flatten=False)] if what == "metric" else []
        dls = tensor_dls(digits_images()[0][:200], bs=32, device="cpu")
        return quiet(Learner(dls, small_model(), cbs=[bt, *cbs], metrics=metrics))
    every = 1 if what == "accumulation" else 3
    whole, resumed = whole_and_resumed(make, lambda learn: learn.fit(3, 1e-2), tmp_path, 8, every=every)
    assert same(weights(whole), weights(resumed)) and list(whole.recorder.values) == list(resumed.recorder.values)


def test_saving_changes_nothing(tmp_path):
    runs = []
    for cbs in ([], [Checkpoints(tmp_path, every=1)]):
        set_seed(0)
        learn = small_learner(cbs=cbs)
        learn.fit(2, 1e-2)
        runs.append(weights(learn))
    assert same(*runs)


# The folder

def small_learner(bs=256, projection_size=16, cbs=()):
    return quiet(bt_learner(digits_dls(bs=bs, device="cpu"), small_model().encoder, 8, hidden_size=16,
                            projection_size=projection_size, cbs=list(cbs)))


def run(folder=None, epochs=2, cbs=(), **kwargs):
    set_seed(0)
    checkpoints = [Checkpoints(folder, **kwargs)] if folder else []
    learn = small_learner(cbs=[*checkpoints, *cbs])
    learn.fit(epochs, 1e-2)
    return learn


def names(folder): return [f.name for f in checkpoints_in(folder)]


def test_the_last_and_the_best_are_kept(tmp_path):
    learn = run(tmp_path, 4, keep=2, every=2, monitor="valid_loss")
    assert names(tmp_path) == ["step-0000000024.pt", "step-0000000022.pt"]
    losses = [v[1] for v in learn.recorder.values]
    best = learn.checkpoints.load_best()
    assert best["best"] == pytest.approx(min(losses)) and best["epoch"] == 1 + losses.index(min(losses))
    assert same(weights(learn), best["model"])
    assert read_checkpoint(checkpoints_in(tmp_path)[0])["versions"]["fastai"] == fastai.__version__


def test_a_run_that_is_complete_is_only_loaded(tmp_path):
    learn = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert same(weights(learn), weights(again)) and len(again.recorder.losses) == 12


def test_resume_starts_a_run_where_there_is_none(tmp_path):
    assert same(weights(run(tmp_path, resume=True)), weights(run()))


def test_a_later_fit_of_the_same_learner_resumes(tmp_path):
    set_seed(0)
    kill = KillAfter(7)
    learn = small_learner(cbs=[Checkpoints(tmp_path), kill])
    with pytest.raises(Killed): learn.fit(2, 1e-2)
    learn.remove_cb(kill)
    learn.checkpoints.resume = True
    learn.fit(2, 1e-2)
    assert same(weights(learn), weights(run()))


def test_callbacks_of_one_fit_resume(tmp_path):
    set_seed(0)
    learn = small_learner()
    with pytest.raises(Killed): learn.fit(2, 1e-2, cbs=[Checkpoints(tmp_path), KillAfter(7)])
    before = signal.getsignal(signal.SIGTERM)
    checkpoints = Checkpoints(tmp_path, resume=True)
    learn = small_learner()
    learn.fit(2, 1e-2, cbs=checkpoints)
    assert same(weights(learn), weights(run()))
    assert signal.getsignal(signal.SIGTERM) is before and not checkpoints.in_fit and checkpoints not in learn.cbs


def test_a_folder_with_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds a run up to step-0000000012"): run(tmp_path)
    with pytest.raises(ValueError, match=r"n_epoch=3 \(was 2\)"): run(tmp_path, 3, resume=True)
    set_seed(0)
    learn = small_learner(projection_size=32, cbs=[Checkpoints(tmp_path, resume=True)])
    with pytest.raises(ValueError, match=r"projection_size=32 \(was 16\)"): learn.fit(2)


@pytest.mark.parametrize("bad, message", [
    (dict(every=0), "every must be"), (dict(keep=0), "keep must be"),
    (dict(monitor="accuracy"), "no column of the Recorder")])
def test_bad_arguments(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message): run(tmp_path, **bad)


def test_searching_and_predicting_write_nothing(tmp_path):
    learn = small_learner(bs=64, cbs=[Checkpoints(tmp_path/"run")])
    with learn.no_bar():
        learn.lr_find(num_it=20, show_plot=False)
        learn.get_preds()
    assert not (tmp_path/"run").exists()


def test_a_search_that_fails_does_not_switch_checkpoints_off(tmp_path):
    kill = KillAfter(3)
    learn = small_learner(bs=64, cbs=[Checkpoints(tmp_path), kill])
    with learn.no_bar(), pytest.raises(Killed): learn.lr_find(num_it=20, show_plot=False)
    learn.remove_cb(kill)
    learn.fit(1)
    assert len(names(tmp_path)) == 2


# Faults

FULL_DISK = """
import resource, signal, sys, warnings
sys.path[:0] = ["tests"]
import torch
from callbacks import DoAt
from test_checkpoints import run, weights, same, names, checkpoints_in, read_checkpoint
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill_disk(learn):
    if learn.epoch == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
whole, learners = weights(run(epochs=3)), []
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    try: run(sys.argv[1], epochs=3, cbs=[DoAt("before_epoch", fill_disk), DoAt("before_fit", learners.append)])
    except OSError as e: print("OSError", e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
n = len([w for w in seen if "could not be written" in str(w.message)])
print(n, "warnings", same(whole, weights(learners[0])))
print(names(sys.argv[1]), read_checkpoint(checkpoints_in(sys.argv[1])[0])["epoch"])
learners[0].checkpoints.save(0, epoch=3)
last = read_checkpoint(checkpoints_in(sys.argv[1])[0])
print("saved later:", last["epoch"], same(whole, last["model"]))
"""


def test_a_full_disk(tmp_path):
    "A real limit on the size of files, in a child: training continues, older checkpoints stay, the end is an error"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path/"run"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)})
    out = done.stdout
    assert "OSError" in out and "its last checkpoint is missing" in out, out + done.stderr[-2000:]
    assert "The Learner holds the weights" in out and "learn.checkpoints.save(0, epoch=3)" in out, out
    assert "2 warnings True" in out and "['step-0000000006.pt', 'step-0000000000.pt'] 1" in out, out
    assert "saved later: 3 True" in out, out + done.stderr[-2000:]
    assert not list((tmp_path/"run").glob(".*"))


def test_a_folder_that_cannot_be_written_is_noticed_at_once(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError, match="choose another folder"): run(tmp_path/"file"/"run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("where", ["in training", "in validation"])
def test_a_signal_saves_and_ends_the_run(tmp_path, name, where):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    def ask_to_stop(learn):
        now = learn.epoch == 1 and learn.iter == int(learn.training)
        if now and learn.training == (where == "in training"): os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as e: run(tmp_path, 3, cbs=[DoAt("after_pred", ask_to_stop)])
    assert e.value.code == 75 and signal.getsignal(number) is before
    done = read_checkpoint(checkpoints_in(tmp_path)[0])["done"]
    assert done == (2 if where == "in training" else 6)
    assert same(weights(run(tmp_path, 3, resume=True)), weights(run(epochs=3)))


def test_nonfinite_weights_are_not_saved(tmp_path):
    def spoil(learn):
        if learn.epoch == 1: learn.model.projector[0].weight.data[0, 0] = float("nan")
    cb = DoAt("after_epoch", spoil, order=900)
    with pytest.raises(FloatingPointError, match="projector.0.weight"): run(tmp_path, 3, cbs=[cb])
    assert names(tmp_path) == ["step-0000000006.pt", "step-0000000000.pt"]


# Files

class Attack:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f"touch {self.file}",)


def write_archive(file, data_pickle):
    "A zip archive as `torch.save` writes it, with any pickle in it"
    with zipfile.ZipFile(file, "w") as f:
        for name, contents in {"data.pkl": data_pickle, "byteorder": b"little", "version": b"3\n"}.items():
            f.writestr(f"archive/{name}", contents)


NESTED = b"\x80\x02" + b"]"*100_000 + b"a"*99_999 + b"."   # opcodes of a list in a list in a list...


def flip_a_bit(contents):
    middle = len(contents)//2
    return contents[:middle] + bytes([contents[middle] ^ 4]) + contents[middle + 1:]


def write_bad(file, how, good, hit):
    "A file that is no checkpoint; `good` are the bytes of one"
    if how == "pickle": file.write_bytes(pickle.dumps(Attack(hit)))
    elif how == "old torch.save": torch.save({"model": Attack(hit)}, file, _use_new_zipfile_serialization=False)
    elif how == "torch.save with code": torch.save({"model": Attack(hit), "format": FORMAT}, file)
    elif how == "torch.save of a model": torch.save({"model": small_model(), "format": FORMAT}, file)
    elif how == "other tensors": torch.save({"a": torch.ones(2)}, file)
    elif how == "not a dict": torch.save(torch.ones(2), file)
    elif how == "safetensors": save_file({"a": torch.ones(2)}, file)
    elif how == "nested without end": write_archive(file, NESTED)
    elif how == "code in an archive": write_archive(file, pickle.dumps({"format": FORMAT, "model": Attack(hit)}, 2))
    elif how == "other zip":
        with zipfile.ZipFile(file, "w") as f: f.writestr("a", "b")
    else: file.write_bytes({"cut": good[:-100], "empty": b"", "flipped bit": flip_a_bit(good),
                            "zeros": good[:len(good)//2] + bytes(512) + good[len(good)//2 + 512:]}[how])


BAD_FILES = ("pickle", "old torch.save", "torch.save with code", "torch.save of a model", "other tensors", "not a dict",
             "nested without end", "code in an archive", "safetensors", "other zip",
             "cut", "empty", "flipped bit", "zeros")


@pytest.mark.parametrize("how", BAD_FILES)
def test_hostile_and_damaged_files_are_refused_and_the_one_before_is_used(tmp_path, how):
    whole = run(tmp_path/"run", 2, every=2)
    bad, hit = tmp_path/"run/step-0000000099.pt", tmp_path/"hit"
    write_bad(bad, how, checkpoints_in(tmp_path/"run")[0].read_bytes(), hit)
    with pytest.raises(ValueError, match=f"{bad} (is not a checkpoint|was damaged|holds no run)"): read_checkpoint(bad)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = run(tmp_path/"run", 2, resume=True)
    assert any("going back to the one before" in str(w.message) for w in seen)
    assert same(weights(whole), weights(again)) and not hit.exists()


def test_a_damaged_byte_anywhere_is_found_or_changes_nothing(tmp_path):
    state = {"w": torch.randn(3000), "list": [1., None, "text"]}
    file = write_checkpoint(state, tmp_path/"a.pt")
    good = file.read_bytes()
    for i in range(0, len(good), 61):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:])
        try: back = read_checkpoint(file)
        except ValueError as e: assert str(file) in str(e)
        else: assert torch.equal(back["w"], state["w"]) and back["list"] == state["list"]


def test_a_missing_file_is_no_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError): read_checkpoint(tmp_path/"step-0000000001.pt")


def test_only_tensors_and_plain_data_are_written(tmp_path):
    with pytest.raises(TypeError, match=r"tensors and plain data, got Attack at state\['a'\]\[1\]"):
        write_checkpoint({"a": [1, Attack("x")]}, tmp_path/"a.pt")
    assert not list(tmp_path.iterdir())
    w = torch.arange(6.)
    state = {"tied": [w, w], "view": w.view(2, 3).T, (1, "a"): {2: None}, "n": np.float64(.1), "inf": float("inf"),
             "words": np.array([2**32 - 1], dtype=np.uint32)}
    back = read_checkpoint(write_checkpoint(state, tmp_path/"a.pt"))
    assert torch.equal(back["tied"][1], w) and torch.equal(back["view"], w.view(2, 3).T) and back[(1, "a")] == {2: None}
    assert back["n"] == .1 and back["words"].tolist() == [2**32 - 1] and back["inf"] == float("inf")
    assert plain((1, [2.5, "x"], True)) == (1, [2.5, "x"], True)


def test_what_is_close_to_plain_data_is_converted(tmp_path):
    large = torch.randn(100_000)
    state = {"l": L(1, L(2.)), "bool": np.bool_(True), "pool": PoolingType.Avg,
             "part": large[:10], "bf16": torch.ones(2).bfloat16(),
             "image": TensorImage(torch.ones(1, 2, 2)), "weight": torch.nn.Parameter(torch.ones(3))}
    file = write_checkpoint(state, tmp_path/"a.pt")
    back = read_checkpoint(file)
    assert back["l"] == [1, [2.]] and back["bool"] is True and back["pool"] == "avg" and type(back["pool"]) is str
    assert {type(back[k]) for k in ("part", "bf16", "image", "weight")} == {torch.Tensor}
    assert torch.equal(back["part"], large[:10]) and file.stat().st_size < 10_000
    assert back["bf16"].dtype == torch.bfloat16 and not back["weight"].requires_grad
    for bad in (np.array(["text"]), {1, 2}, 1j, np.longdouble(1)):
        with pytest.raises(TypeError, match="plain data"): plain(bad)
