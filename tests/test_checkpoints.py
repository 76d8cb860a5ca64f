"Runs that are killed, stopped, out of disk or fed with poison, and what becomes of them"
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import fastai
import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import AccumMetric
from fastai.torch_core import set_seed
from fasttransform import Transform
from safetensors.torch import save_file

from conftest import image_items, small_model
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.data import digits_images, digits_dls, tensor_dls
from self_supervised_bt.losses import variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import Recipe, bt_learner
from self_supervised_bt.checkpoints import Checkpoints, checkpoints_in, pack, read_checkpoint, unpack, write_checkpoint

AUGS = dict(size=8, recipe="digits")
root = Path(__file__).parents[1]


class PowerCut(Callback):
    order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.learn.train_iter == self.at: raise RuntimeError("no power")


def bits(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def taken_up(make, fit, folder, at, **kwargs):
    "Weights of a whole run, and of one that died after batch `at` and was taken up by a Learner from another seed"
    set_seed(0)
    whole = make([])
    fit(whole)
    set_seed(0)
    with pytest.raises(RuntimeError, match="no power"): fit(make([Checkpoints(folder, **kwargs), PowerCut(at)]))
    set_seed(1)
    torch.rand(7)
    again = make([Checkpoints(folder, resume=True, **kwargs)])
    fit(again)
    return whole, again


def test_killed_20_times_taken_up_20_times():
    "In processes of their own; see killed_run.py"
    done = subprocess.run([sys.executable, root/"tests/killed_run.py"], env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "20 of 20 runs" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


# What decides the bits

@pytest.mark.parametrize("at", [7, 8, 9])
@pytest.mark.parametrize("opt", ["fastai", "lars", "adam", "adamw", "sgd"])
def test_every_optimizer_goes_on(tmp_path, opt, at):
    recipe = Recipe(opt=opt, lr=1e-2, wd=1e-3*(opt != "fastai"), epochs=3, schedule="cosine" if opt == "lars" else "one cycle", hidden_size=16, projection_size=16)
    x, _ = digits_images()
    def make(cbs):
        learn = bt_learner(tensor_dls(x[:256], bs=64, valid_pct=0, device="cpu"), small_model().encoder, 8, recipe=recipe, cbs=[ChannelsLast(), *cbs])
        learn.logger = lambda *_: None
        return learn
    whole, again = taken_up(make, lambda learn: learn.fit_recipe(), tmp_path, at, every=2)
    assert same(bits(whole), bits(again))
    assert torch.equal(torch.stack(whole.recorder.losses), torch.stack(again.recorder.losses)) and whole.recorder.lrs == again.recorder.lrs
    assert whole.recorder.hps == again.recorder.hps and list(whole.recorder.values) == list(again.recorder.values)


def noisy(x): return (x + torch.randn(())*.1).clamp(0, 1)


def loaders(kind):
    "Loaders that shuffle, and some that draw for every item, in this process or in two others"
    items = image_items(96, labels=False)
    if kind == "torch": return [torch.utils.data.DataLoader(items, 16, shuffle=True, drop_last=True) for _ in range(2)]
    if kind == "torch, generator of its own":
        return [torch.utils.data.DataLoader(items, 16, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(int(torch.randint(99, ())))) for _ in range(2)]
    draws = Transform(noisy) if "draws" in kind else None
    return [TfmdDL(items, bs=16, shuffle=True, drop_last=True, num_workers=2*("workers" in kind), after_item=draws) for _ in range(2)]


@pytest.mark.parametrize("kind", ["fastai", "fastai, draws", "fastai, workers", "fastai, workers, draws", "torch", "torch, generator of its own"])
def test_every_loader_goes_on_in_the_middle_of_an_epoch(tmp_path, kind):
    def make(cbs):
        learn = Learner(DataLoaders(*loaders(kind), device="cpu"), small_model(), cbs=[BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS)), *cbs])
        learn.logger = lambda *_: None
        return learn
    whole, again = taken_up(make, lambda learn: learn.fit(2, 1e-2), tmp_path, 4, every=4)
    assert same(bits(whole), bits(again))


@pytest.mark.parametrize("what", ["mixed", "queue", "accumulation", "metric"])
def test_what_callbacks_remember_goes_on(tmp_path, what):
    def make(cbs):
        bt = (MixedBarlowTwins(get_barlow_twins_aug_pipelines(**AUGS)) if what == "mixed" else
              BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), loss=variant_loss(queue=40) if what == "queue" else None))
        metrics = [AccumMetric(lambda p, t: p.std(), flatten=False)] if what == "metric" else []
        learn = Learner(tensor_dls(digits_images()[0][:200], bs=32, device="cpu"), small_model(), cbs=[bt, *cbs] + [GradientAccumulation(64)]*(what == "accumulation"), metrics=metrics)
        learn.logger = lambda *_: None
        return learn
    whole, again = taken_up(make, lambda learn: learn.fit(3, 1e-2), tmp_path, 8, every=3 if what != "accumulation" else 1)
    assert same(bits(whole), bits(again)) and list(whole.recorder.values) == list(again.recorder.values)


def test_writing_changes_nothing(tmp_path, make_dls):
    runs = []
    for cbs in ([], [Checkpoints(tmp_path, every=1)]):
        set_seed(0)
        learn = bt_learner(digits_dls(bs=256, device="cpu"), small_model().encoder, 8, hidden_size=16, projection_size=16, cbs=cbs)
        learn.logger = lambda *_: None
        learn.fit(2, 1e-2)
        runs.append(bits(learn))
    assert same(*runs)


# The folder

def run(folder=None, epochs=2, cbs=(), resume=None, **kwargs):
    set_seed(0)
    learn = bt_learner(digits_dls(bs=256, device="cpu"), small_model().encoder, 8, hidden_size=16, projection_size=16,
                       cbs=[*([Checkpoints(folder, **kwargs)] if folder else []), *cbs])
    learn.logger = lambda *_: None
    learn.fit(epochs, 1e-2, **({} if resume is None else dict(resume=resume)))
    return learn


def test_the_last_and_the_best_are_kept(tmp_path):
    learn = run(tmp_path, 4, keep=2, every=2, monitor="valid_loss")
    assert [f.name for f in checkpoints_in(tmp_path)] == ["step-0000000024.safetensors", "step-0000000022.safetensors"]
    losses = [v[1] for v in learn.recorder.values]
    best = learn.checkpoints.load_best()
    assert best["best"] == pytest.approx(min(losses)) and best["epoch"] == 1 + losses.index(min(losses))
    assert same(bits(learn), best["model"])
    assert read_checkpoint(checkpoints_in(tmp_path)[0])["versions"]["fastai"] == fastai.__version__


def test_a_run_that_is_complete_is_only_loaded(tmp_path):
    learn = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert same(bits(learn), bits(again)) and len(again.recorder.losses) == 12


def test_resume_begins_where_there_is_nothing_yet(tmp_path):
    assert same(bits(run(tmp_path, resume=True)), bits(run()))


def test_a_folder_with_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds a run up to step-0000000012"): run(tmp_path)
    with pytest.raises(ValueError, match=r"n_epoch=3 \(was 2\)"): run(tmp_path, 3, resume=True)
    set_seed(0)
    learn = bt_learner(digits_dls(bs=256, device="cpu"), small_model().encoder, 8, hidden_size=16, projection_size=32, cbs=Checkpoints(tmp_path, resume=True))
    with pytest.raises(ValueError, match=r"projection_size=32 \(was 16\)"): learn.fit(2)


@pytest.mark.parametrize("bad, message", [(dict(every=0), "every must be"), (dict(keep=0), "keep must be"), (dict(monitor="accuracy"), "no column of the Recorder")])
def test_bad_arguments(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message): run(tmp_path, **bad)


def test_resume_without_checkpoints_is_refused(make_learner):
    with pytest.raises(ValueError, match="add Checkpoints"): make_learner().fit(1, resume=True)


def test_searching_and_predicting_write_nothing(tmp_path):
    learn = bt_learner(digits_dls(bs=64, device="cpu"), small_model().encoder, 8, hidden_size=16, projection_size=16, cbs=Checkpoints(tmp_path/"run"))
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False); learn.get_preds()
    assert not (tmp_path/"run").exists()


# Faults

def test_no_room_on_the_disk(tmp_path):
    "A real limit on the size of files, in a process of its own: training goes on, older checkpoints stay, the end is an error"
    code = """
import resource, signal, sys, warnings
sys.path[:0] = ["tests"]
import torch
from fastai.callback.core import Callback
from test_resume import run, bits, same, checkpoints_in, read_checkpoint
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Full(Callback):
    def before_epoch(self):
        if self.epoch == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
whole, learners = bits(run(epochs=3)), []
class Keep(Callback):
    def before_fit(self): learners.append(self.learn)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    try: run(sys.argv[1], epochs=3, cbs=[Full(), Keep()])
    except OSError as e: print("OSError", e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(len([w for w in seen if "could not be written" in str(w.message)]), "warnings", same(whole, bits(learners[0])))
print([f.name for f in checkpoints_in(sys.argv[1])], read_checkpoint(checkpoints_in(sys.argv[1])[0])["epoch"])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path/"run"], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert "OSError" in done.stdout and "its last checkpoint is missing" in done.stdout and "The Learner holds the weights" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "2 warnings True" in done.stdout and "['step-0000000006.safetensors', 'step-0000000000.safetensors'] 1" in done.stdout, done.stdout
    assert not list((tmp_path/"run").glob("*.part"))


def test_a_folder_that_cannot_be_written_is_noticed_at_once(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError, match="choose another folder"): run(tmp_path/"file"/"run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("where", ["in training", "in validation"])
def test_a_signal_ends_the_run_in_good_order(tmp_path, name, where):
    before = signal.getsignal(getattr(signal, name))
    class Scheduler(Callback):
        def after_pred(self):
            if self.epoch == 1 and self.iter == int(self.training) and self.training == (where == "in training"): os.kill(os.getpid(), getattr(signal, name))
    with pytest.raises(SystemExit) as e: run(tmp_path, 3, cbs=[Scheduler()])
    assert e.value.code == 75 and signal.getsignal(getattr(signal, name)) is before
    done = read_checkpoint(checkpoints_in(tmp_path)[0])["done"]
    assert done == (2 if where == "in training" else 6)
    assert same(bits(run(tmp_path, 3, resume=True)), bits(run(epochs=3)))


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    class Spoil(Callback):
        order = 900
        def after_epoch(self):
            if self.epoch == 1: self.model.projector[0].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="projector.0.weight"): run(tmp_path, 3, cbs=[Spoil()])
    assert [f.name for f in checkpoints_in(tmp_path)] == ["step-0000000006.safetensors", "step-0000000000.safetensors"]


class Poison:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "damaged", "other tensors", "unknown kind", "no json", "nested without end", "empty"])
def test_hostile_and_damaged_files_are_refused_and_the_one_before_is_taken(tmp_path, how):
    whole = run(tmp_path/"run", 2, every=2)
    bad, hit = tmp_path/"run"/"step-0000000099.safetensors", tmp_path/"hit"
    if how == "pickle": bad.write_bytes(pickle.dumps(Poison(hit)))
    elif how == "torch.save": torch.save({"model": Poison(hit)}, bad)
    elif how == "damaged": bad.write_bytes(checkpoints_in(tmp_path/"run")[0].read_bytes()[:-100])
    elif how == "other tensors": save_file({"a": torch.ones(2)}, bad)
    elif how == "empty": bad.write_bytes(b"")
    else: save_file({"0": torch.ones(2)}, bad, metadata={"self_supervised_bt checkpoint": {
        "no json": "{", "unknown kind": '{"call": "os.system"}', "nested without end": '{"list": ['*100_000}[how]})
    with pytest.raises(ValueError, match="not a checkpoint|no run to go on|written by something else"): read_checkpoint(bad)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = run(tmp_path/"run", 2, resume=True)
    assert any("going back to the one before" in str(w.message) for w in seen) and same(bits(whole), bits(again)) and not hit.exists()


def test_only_tensors_and_plain_data_are_written(tmp_path):
    with pytest.raises(TypeError, match="tensors and plain data, got Poison"): write_checkpoint({"a": Poison("x")}, tmp_path/"a.safetensors")
    w = torch.arange(6.)
    state = {"tied": [w, w], "view": w.view(2, 3).T, (1, "a"): {2: None}, "n": np.float64(.1), "words": np.array([2**32 - 1], dtype=np.uint32), "inf": float("inf")}
    tensors = {}
    back = read_checkpoint(write_checkpoint(state, tmp_path/"a.safetensors"))
    assert torch.equal(back["tied"][1], w) and torch.equal(back["view"], w.view(2, 3).T) and back[(1, "a")] == {2: None}
    assert back["n"] == .1 and back["words"].tolist() == [2**32 - 1] and back["inf"] == float("inf")
    assert unpack(pack((1, [2.5, "x"], True), tensors), tensors) == (1, [2.5, "x"], True)
