"Checkpoints: runs that are killed or stopped, full disks, damaged files"
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import fastai
import numpy as np
import pytest
import torch
from callbacks import DoAt, DoToViews, KillAfter, Killed, RaiseAt
from conftest import image_items, quiet, same, small_encoder, small_model, weights
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, Metric
from fastai.metrics import AccumMetric
from fastai.torch_core import TensorImage, set_seed
from fastcore.foundation import L
from fasttransform import Transform
from safetensors.torch import save_file
from torch import nn

from self_supervised_bt import checkpoints
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.checkpoints import (
    FORMAT,
    Checkpoints,
    checkpoints_in,
    data_identity,
    plain,
    read_checkpoint,
    write_checkpoint,
)
from self_supervised_bt.data import digits_dls, digits_images, tensor_dls
from self_supervised_bt.evaluation import OnlineEvaluation
from self_supervised_bt.fitting import Column, add_columns
from self_supervised_bt.folders import unlabelled_dls
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


def test_killed_6_times_resumed_6_times():
    "At every step of writing a checkpoint, and as often at a random time; in child processes, see killed_run.py"
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, root/"tests/killed_run.py", "--times", "6"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "6 of 6 runs" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


# A resumed run equals a whole one bit for bit

@pytest.mark.parametrize("at", [7, 8, 9])
@pytest.mark.parametrize("opt", ["fastai", "lars", "adam", "adamw", "sgd", "muon"])
def test_every_optimizer_resumes(tmp_path, opt, at):
    wd = 0. if opt == "fastai" else 1e-3
    schedule = {"lars": "cosine", "adamw": "wsd"}.get(opt, "one cycle")
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
    if kind == "torch, workers": return torch_loader(num_workers=2, multiprocessing_context="fork")
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


# A run that failed before its first step

REPLACED = "has not trained a step: a new one replaces it"


def failed(folder, bs=256, **kwargs):
    "Leaves the checkpoint before the first step"
    set_seed(0)
    learn = small_learner(bs, cbs=[Checkpoints(folder), RaiseAt("before_batch", Killed("early"))], **kwargs)
    with pytest.raises(Killed): learn.fit(2, 1e-2)
    assert [f.name for f in folder.iterdir()] == ["step-0000000000.pt"] and learn.checkpoints.folder_lock is None


@pytest.mark.parametrize("before", [dict(bs=128), dict(bs=256, projection_size=32)])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_has_not_trained_a_step_is_replaced(tmp_path, capsys, before, resume):
    failed(tmp_path, **before)
    first = read_checkpoint(tmp_path/"step-0000000000.pt")["run"]
    assert same(weights(run(tmp_path, resume=resume, keep=9)), weights(run()))
    assert capsys.readouterr().out.count(REPLACED) == 1
    assert read_checkpoint(tmp_path/"step-0000000000.pt")["run"] != first
    with pytest.raises(ValueError, match="holds a run up to step-0000000012"): run(tmp_path)


def test_a_run_of_another_model_that_has_not_trained_a_step_is_replaced(tmp_path, capsys):
    "Without a recipe, which would tell"
    def fit(make_encoder, cbs):
        set_seed(0)
        model = create_barlow_twins_model(make_encoder(), 16, 16)
        learn = Learner(digits_dls(bs=256, device="cpu"), model, cbs=[BarlowTwins(pipelines()), *cbs])
        quiet(learn).fit(1, 1e-2)
        return learn
    def other(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(Killed): fit(other, [Checkpoints(tmp_path), RaiseAt("before_batch", Killed("early"))])
    again = fit(small_encoder, [Checkpoints(tmp_path, resume=True)])
    assert same(weights(again), weights(fit(small_encoder, []))) and REPLACED in capsys.readouterr().out


def test_the_same_run_resumes_from_before_its_first_step(tmp_path, capsys):
    failed(tmp_path)
    set_seed(1)
    again = small_learner(cbs=[Checkpoints(tmp_path, resume=True)])
    again.fit(2, 1e-2)
    assert same(weights(again), weights(run())) and REPLACED not in capsys.readouterr().out


def test_a_learner_without_the_weights_of_the_start_resumes_or_says_what_differs(tmp_path):
    failed(tmp_path, bs=128)
    learn = small_learner(cbs=[Checkpoints(tmp_path, resume=True)])
    learn.checkpoints.can_start = False
    with pytest.raises(ValueError, match=r"batches=6 \(was 12\)"): learn.fit(2, 1e-2)


@pytest.mark.parametrize("contents", [b"mine", b""])
def test_a_file_of_others_is_not_replaced(tmp_path, contents):
    (tmp_path/"step-0000000000.pt").write_bytes(contents)
    with pytest.raises(ValueError, match="holds a run up to step-0000000000"): run(tmp_path)
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* can be read"): run(tmp_path, resume=True)
    assert (tmp_path/"step-0000000000.pt").read_bytes() == contents


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
def test_a_run_that_trains_its_first_epoch_is_not_replaced(tmp_path):
    def other(learn):
        with pytest.raises(ValueError, match="holds a run up to step-0000000000"): run(tmp_path)
        seen.append(learn.train_iter)
    seen = []
    run(tmp_path, cbs=[DoAt("before_batch", other, step=2)])
    assert seen == [2] and names(tmp_path) == [f"step-{step:010d}.pt" for step in (12, 6, 0)]


@pytest.mark.parametrize("bad, message", [
    (dict(every=0), "every must be"), (dict(keep=0), "keep must be"),
    (dict(monitor="accuracy", mode="max"), "no column of the Recorder"),
    (dict(mode="max"), "without monitor"), (dict(monitor="valid_loss", mode="lower"), "mode must be one of"),
    (dict(monitor="invariance"), "monitor='invariance' needs a direction: pass mode='max' if a larger value")])
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


# What is beside the model

def tiny(cbs=(), metrics=None, n=96, dls=None, **kwargs):
    "A Learner of three steps per epoch"
    set_seed(0)
    dls = dls or tensor_dls(digits_images()[0][:n], bs=24, valid_pct=.2, device="cpu")
    cbs = [BarlowTwins(pipelines(), **kwargs), *cbs]
    return quiet(Learner(dls, small_model(), cbs=cbs, metrics=metrics))


def end_of_epoch(n):
    "Ends the fit with `Killed` after the `n`th epoch and its checkpoint"
    def end(learn):
        if learn.epoch == n: raise Killed(f"after epoch {n}")
    return DoAt("after_epoch", end, order=2000)


def killed(learn, epochs=4):
    with pytest.raises(Killed): learn.fit(epochs, 1e-2)


class ByEpoch(Metric):
    "Given values, one per epoch"
    name, value = "value", None
    def __init__(self, values): self.values = values
    def reset(self): pass
    def accumulate(self, learn): self.value = self.values[learn.epoch]


def test_gradients_that_wait_at_the_end_of_an_epoch_resume(tmp_path):
    "Three batches of 24 per epoch, and a step after every two"
    def make(*cbs): return tiny([GradientAccumulation(48), *cbs])
    whole = make()
    whole.fit(3, 1e-2)
    killed(make(Checkpoints(tmp_path), end_of_epoch(0)), 3)
    assert read_checkpoint(checkpoints_in(tmp_path)[0])["gradients"]
    again = make(Checkpoints(tmp_path, resume=True))
    again.fit(3, 1e-2)
    assert same(weights(whole), weights(again))


def watched(folder, *cbs):
    "A Learner with what fastai has to watch a column that is best in epoch 1"
    args = dict(monitor="value", comp=np.less)
    save, reduce = SaveModelCallback(fname="best", **args), ReduceLROnPlateau(patience=3, **args)
    learn = tiny([save, reduce, EarlyStoppingCallback(patience=5, **args), CSVLogger(), *cbs],
                 ByEpoch([1., .1, .9, .8, .7, .6, .5]))
    learn.path = folder
    folder.mkdir(exist_ok=True)
    return learn


def seen_by(learn):
    "What fastai's callbacks remember and wrote, without the times"
    rows = [line.rsplit(",", 1)[0] for line in (learn.path/"history.csv").read_text().splitlines()]
    rates = [h["lr"] for h in learn.opt.hypers]
    return learn.save_model.best, learn.early_stopping.wait, learn.reduce_lr_on_plateau.wait, rates, rows


def test_the_best_value_of_fastai_callbacks_resumes(tmp_path, capsys):
    "The file of the best epoch is not overwritten by a worse one, and the table keeps its rows"
    whole = watched(tmp_path/"whole")
    whole.fit(6, 1e-2)
    killed(watched(tmp_path/"run", Checkpoints(tmp_path/"run"), end_of_epoch(2)), 6)
    best = torch.load(tmp_path/"run/models/best.pth")
    again = watched(tmp_path/"run", Checkpoints(tmp_path/"run", resume=True))
    again.fit(6, 1e-2)
    assert same(best, torch.load(tmp_path/"run/models/best.pth"))
    assert seen_by(whole) == seen_by(again) and same(weights(whole), weights(again))
    assert len(seen_by(again)[-1]) == 7 and seen_by(again)[0] == .1


def test_a_callback_without_its_state_is_named(tmp_path):
    killed(tiny([GradientAccumulation(48), Checkpoints(tmp_path), end_of_epoch(0)]))
    learn = tiny([Checkpoints(tmp_path, resume=True), TrackerCallback()])
    with pytest.warns(UserWarning) as seen: learn.fit(4, 1e-2)
    said = " ".join(str(w.message) for w in seen)
    assert "had the callback gradient_accumulation, this Learner has not" in said
    assert "had no callback tracker: its state begins now" in said


class Counting(Callback):
    "Measures once per epoch, in a column, and counts its epochs"
    def __init__(self, first=1): self.epochs = 0
    def before_fit(self):
        self.column = Column("at_step_1")
        add_columns(self.learn, [self.column])
    def before_train(self): self.column.value = None
    def after_batch(self):
        if self.training and self.iter == 0: self.column.value = float(self.loss)
    def after_epoch(self): self.epochs += 1
    def state_dict(self): return dict(epochs=self.epochs)
    def load_state_dict(self, state): self.epochs = state["epochs"]


def test_the_online_evaluation_of_a_resumed_run_knows_what_was_before_training(tmp_path):
    x, y = digits_images()
    def make(cbs): return tiny([OnlineEvaluation((x[:80].float()/255, y[:80]), every=2, k=5), *cbs])
    whole, again = whole_and_resumed(make, lambda learn: learn.fit(4, 1e-2), tmp_path, 8, every=1)
    for name in ("before", "epochs_measured"):
        assert getattr(whole.online_evaluation, name) == getattr(again.online_evaluation, name), name
    assert whole.online_evaluation.epochs_measured == [0, 2, 3]
    for a, b in zip(whole.recorder.values, again.recorder.values): assert list(map(float, a)) == list(map(float, b))


class CountingItems(list):
    "A data set that counts the items it gave in training"
    given = 0
    def __getitem__(self, i):
        self.given += 1
        return super().__getitem__(i)
    def state_dict(self): return dict(given=self.given)
    def load_state_dict(self, state): self.given = state["given"]


def test_columns_callbacks_and_data_sets_keep_what_they_measured_before_the_kill(tmp_path):
    def make(*cbs):
        set_seed(0)
        dls = DataLoaders.from_dsets(CountingItems(image_items(64, False)), image_items(16, False), bs=16,
                                     device="cpu", num_workers=0)
        return tiny([Counting(), *cbs], dls=dls)
    whole = make()
    whole.fit(3, 1e-2)
    with pytest.raises(Killed): make(Checkpoints(tmp_path, every=1), KillAfter(7)).fit(3, 1e-2)
    again = make(Checkpoints(tmp_path, every=1, resume=True))
    again.fit(3, 1e-2)
    assert list(map(list, whole.recorder.values)) == list(map(list, again.recorder.values))
    assert again.counting.epochs == 3 and again.dls.train.dataset.given >= 3*64


def test_the_time_before_the_kill_counts(tmp_path):
    killed(tiny([Checkpoints(tmp_path), DoAt("after_epoch", lambda _: time.sleep(.2)), end_of_epoch(1)]))
    learn = tiny([Checkpoints(tmp_path, resume=True)])
    learn.fit(4, 1e-2)
    before, total = learn.checkpoints.seconds_before, learn.checkpoints.seconds
    assert .4 < before < total == learn.checkpoints.seconds
    learn = tiny([Checkpoints(tmp_path, resume=True)])
    learn.fit(4, 1e-2)   # a complete run is only loaded
    assert 0 < total - learn.checkpoints.seconds_before < .2


class ToFloat(torch.nn.Module):
    def forward(self, x): return x.float()   # fastai's Recorder takes no loss of 64 bits


def test_64_bit_weights_resume(tmp_path):
    def to_double(learn): learn.xb = (learn.xb[0].double(),)
    def make(*cbs):
        learn = tiny([DoToViews(to_double), *cbs])
        learn.model.double().projector.append(ToFloat())
        return learn
    whole = make()
    whole.fit(2, 1e-2)
    with pytest.raises(Killed): make(Checkpoints(tmp_path, every=2), KillAfter(5)).fit(2, 1e-2)
    again = make(Checkpoints(tmp_path, every=2, resume=True))
    again.fit(2, 1e-2)
    assert same(weights(whole), weights(again)) and weights(again)["projector.0.weight"].dtype == torch.float64


# The data

def train_on(folder, run, *cbs, resume=False):
    dls = unlabelled_dls(folder, 8, bs=16, num_workers=0, device="cpu")
    set_seed(0)
    learn = quiet(Learner(dls, small_model(3), cbs=[BarlowTwins(pipelines()), Checkpoints(run, resume=resume), *cbs]))
    learn.fit(2, 1e-2)
    return learn


def test_a_moved_folder_resumes_and_changed_images_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(Killed): train_on(folder, tmp_path/"run", end_of_epoch(0))
    moved = tmp_path/"elsewhere"/"photos"
    moved.parent.mkdir()
    folder.rename(moved)
    file = sorted(moved.glob("*/*.png"))[5]
    contents = file.read_bytes()
    file.write_bytes(contents + b"\0")
    with pytest.raises(ValueError, match="as before, but their names, sizes or contents differ"):
        train_on(moved, tmp_path/"run", resume=True)
    file.write_bytes(contents)
    renamed = file.rename(file.with_name("00a.png"))
    with pytest.raises(ValueError, match="images are not those of the run to resume"):
        train_on(moved, tmp_path/"run", resume=True)
    renamed.rename(file)
    monkeypatch.chdir(moved.parent)
    assert train_on("./photos/../photos", tmp_path/"run", resume=True).train_iter == 4


def test_other_images_of_equal_number_are_refused(tmp_path):
    killed(tiny([Checkpoints(tmp_path), end_of_epoch(0)]))
    other = tensor_dls(digits_images()[0][96:192], bs=24, valid_pct=.2, device="cpu")
    with pytest.raises(ValueError, match=r"the training images are not .* \(77 as before, but"):
        tiny([Checkpoints(tmp_path, resume=True)], dls=other).fit(4, 1e-2)


def test_the_identity_of_data_sets(folder, tmp_path):
    class Listed(list): pass
    def listed(root):
        ds = Listed(range(40))
        ds.items = L(sorted(root.glob("*/*.png")))
        return ds
    before = data_identity(listed(folder))
    assert before == data_identity(listed(folder.rename(tmp_path/"moved")))
    ds = listed(tmp_path/"moved")
    ds.items[3].write_bytes(b"")
    assert before not in (None, data_identity(ds))
    ds.items = [torch.zeros(1)]
    assert data_identity(ds) is data_identity([1, 2]) is data_identity(None) is None


# The best

def test_the_best_is_that_of_the_direction(tmp_path):
    values = [.5, .9, .1, .7]
    for mode, best in (("max", .9), ("min", .1)):
        learn = tiny([Checkpoints(tmp_path/mode, monitor="value", mode=mode)], ByEpoch(values))
        learn.fit(4, 1e-2)
        state = learn.checkpoints.load_best()
        assert state["best"] == best and state["epoch"] == 1 + values.index(best)
    learn = tiny([Checkpoints(tmp_path/"max", monitor="value", mode="min", resume=True)], ByEpoch(values))
    with pytest.raises(ValueError, match="keeps the best value: pass monitor='value', mode='max'"): learn.fit(4, 1e-2)


def test_killed_between_the_files_the_best_is_not_lost(tmp_path, monkeypatch):
    def make(*cbs, **kwargs):
        return tiny([Checkpoints(tmp_path/"run", monitor="value", mode="max", **kwargs), *cbs], ByEpoch([1, 3, 2, 2]))
    wrote = []
    def write_two(state, path):
        wrote.append(path.name)
        if wrote[-2:] == ["best.pt", "step-0000000006.pt"]: raise Killed("between the two files of epoch 1")
        return write_checkpoint(state, path)
    monkeypatch.setattr(checkpoints, "write_checkpoint", write_two)
    killed(make())
    monkeypatch.undo()
    make(resume=True).fit(4, 1e-2)
    best = read_checkpoint(tmp_path/"run/best.pt")
    assert (best["best"], best["epoch"]) == (3, 2)
    (tmp_path/"run/best.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="best.pt is not a checkpoint.*; the best is searched for from here on"):
        make(resume=True).fit(4, 1e-2)


def test_a_validation_loss_without_validation_is_refused(tmp_path):
    dls = tensor_dls(digits_images()[0][:96], bs=24, valid_pct=0, device="cpu")
    with pytest.raises(ValueError, match="monitor='valid_loss' needs validation images"):
        tiny([Checkpoints(tmp_path, monitor="valid_loss")], dls=dls).fit(1)


# The folder, once more

def test_the_only_checkpoint_is_not_removed_for_a_damaged_one(tmp_path):
    killed(tiny([Checkpoints(tmp_path, keep=1), end_of_epoch(0)]))
    (tmp_path/"step-0000000099.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step-0000000099.pt is not a checkpoint.*going back"):
        killed(tiny([Checkpoints(tmp_path, keep=1, resume=True), end_of_epoch(1)]))
    assert names(tmp_path) == ["step-0000000099.pt", "step-0000000006.pt"]
    assert read_checkpoint(tmp_path/"step-0000000006.pt")["epoch"] == 2


def test_what_is_no_checkpoint_neither_stops_nor_goes(tmp_path):
    killed(tiny([Checkpoints(tmp_path, keep=1), end_of_epoch(0)]))
    (tmp_path/"step-0000000077.pt").mkdir()
    os.mkfifo(tmp_path/"step-0000000078.pt")
    (tmp_path/"step-0000000079.pt").symlink_to(tmp_path/"gone")
    (tmp_path/"step-final.pt").write_bytes(b"mine")
    for name in ("step-0000000077.pt", "step-0000000078.pt"):
        with pytest.raises(ValueError, match=f"{name} is no file"): read_checkpoint(tmp_path/name)
    learn = tiny([Checkpoints(tmp_path, keep=1, resume=True)])
    learn.fit(4, 1e-2)
    assert names(tmp_path) == ["step-0000000012.pt"] and (tmp_path/"step-final.pt").read_bytes() == b"mine"
    assert (tmp_path/"step-0000000077.pt").is_dir() and (tmp_path/"step-0000000079.pt").is_symlink()


def test_a_checkpoint_that_cannot_be_read_does_not_stop_the_look_at_older_ones(tmp_path, monkeypatch):
    killed(tiny([Checkpoints(tmp_path), end_of_epoch(1)]))
    own, newest = torch.load, names(tmp_path)[0]
    def load(file, **kwargs):
        if Path(file).name == newest: raise PermissionError("not yours")
        return own(file, **kwargs)
    monkeypatch.setattr(torch, "load", load)
    learn = tiny([Checkpoints(tmp_path, resume=True)])
    with pytest.warns(UserWarning, match="cannot be read .PermissionError.*going back to the one before"):
        learn.fit(4, 1e-2)


def test_checkpoints_of_two_runs_are_refused(tmp_path):
    for name in ("a", "b"): killed(tiny([Checkpoints(tmp_path/name), end_of_epoch(0)]))
    (tmp_path/"b/step-0000000003.pt").rename(tmp_path/"a/step-0000000006.pt")
    with pytest.raises(ValueError, match="holds checkpoints of 2 runs, step-0000000006.pt and step-0000000003.pt"):
        tiny([Checkpoints(tmp_path/"a", resume=True)]).fit(4, 1e-2)


def test_a_search_leaves_no_empty_folder(tmp_path):
    kill = KillAfter(3)
    learn = tiny([kill])
    learn.path = tmp_path
    with learn.no_bar(), pytest.raises(Killed): learn.lr_find(num_it=6, show_plot=False)
    learn.remove_cb(kill)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path/"models").mkdir()   # the user's own
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert list((tmp_path/"models").iterdir()) == []


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
    assert "1 warnings True" in out and "['step-0000000006.pt', 'step-0000000000.pt'] 1" in out, out
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


def test_ctrl_c_saves_and_interrupts(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    cb = DoAt("after_pred", lambda learn: os.kill(os.getpid(), signal.SIGINT), step=4)
    with pytest.raises(KeyboardInterrupt, match="SIGINT: checkpoint saved in .* continue with resume=True"):
        tiny([Checkpoints(tmp_path), cb]).fit(4, 1e-2)
    assert names(tmp_path)[0] == "step-0000000005.pt" and signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    steps = []
    def interrupt(learn):
        steps.append(learn.train_iter)
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        steps.append("not reached")
    with pytest.raises(KeyboardInterrupt): tiny([Checkpoints(tmp_path), DoAt("after_pred", interrupt)]).fit(4, 1e-2)
    assert steps == [0]


def test_a_signal_while_the_first_checkpoint_is_written(tmp_path, monkeypatch):
    def write_slowly(state, path):
        os.kill(os.getpid(), signal.SIGTERM)
        return write_checkpoint(state, path)
    monkeypatch.setattr(checkpoints, "write_checkpoint", write_slowly)
    learn = tiny([Checkpoints(tmp_path)])
    with pytest.raises(SystemExit) as e: learn.fit(4, 1e-2)
    assert e.value.code == 75 and names(tmp_path) == ["step-0000000000.pt"] and learn.train_iter == 0


def test_a_signal_after_the_last_checkpoint_is_not_swallowed(tmp_path):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append("SIGUSR1"))
    cb = DoAt("after_fit", lambda learn: os.kill(os.getpid(), signal.SIGUSR1), order=2000)
    try: tiny([Checkpoints(tmp_path), cb]).fit(1, 1e-2)
    finally: signal.signal(signal.SIGUSR1, before)
    assert got == ["SIGUSR1"]


@pytest.mark.parametrize("kind", ["fastai, workers", "torch, workers"])
def test_a_signal_to_the_workers_as_well_saves(tmp_path, kind, quick_end):
    "As schedulers send it: to all processes of the group"
    def group(learn):
        workers = active_children()
        assert len(workers) == 2
        for process in workers: os.kill(process.pid, signal.SIGTERM)
        time.sleep(.1)
        os.kill(os.getpid(), signal.SIGTERM)
    dls = DataLoaders(loader(kind), loader("fastai"), device="cpu")
    learn = tiny([Checkpoints(tmp_path), DoAt("after_pred", group, step=1)], dls=dls)
    with pytest.raises(SystemExit) as e: learn.fit(2, 1e-2)
    assert e.value.code == 75 and names(tmp_path)[0] == "step-0000000002.pt"
    assert not {"wif", "worker_init_fn"} & {k for k, v in vars(learn.dls.train).items() if v}


def test_nonfinite_weights_are_not_saved(tmp_path):
    def spoil(learn):
        if learn.epoch == 1: learn.model.projector[0].weight.data[0, 0] = float("nan")
    cb = DoAt("after_epoch", spoil, order=900)
    with pytest.raises(FloatingPointError, match="projector.0.weight"): run(tmp_path, 3, cbs=[cb])
    assert names(tmp_path) == ["step-0000000006.pt", "step-0000000000.pt"]


def test_a_nonfinite_optimizer_is_not_saved(tmp_path):
    def spoil(learn): learn.opt.state[learn.model.projector[0].weight]["sqr_avg"][0, 0] = float("inf")
    cb = DoAt("after_epoch", spoil, order=900)
    with pytest.raises(FloatingPointError, match="1 tensors of the optimizer are not finite, sqr_avg of weight 4"):
        tiny([Checkpoints(tmp_path), cb]).fit(2, 1e-2)
    assert names(tmp_path) == ["step-0000000000.pt"]


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
    else:
        file.write_bytes({"cut": good[:-100], "empty": b"", "flipped bit": flip_a_bit(good),
                          "zeros": good[:len(good)//2] + bytes(512) + good[len(good)//2 + 512:]}[how])
        return
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()   # as an attacker can
    with file.open("ab") as f: f.write(f"\nrun {good[-88:-72].decode()} sha256 {checksum}\n".encode())


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


def test_a_damaged_byte_anywhere_is_found(tmp_path):
    state = {"w": torch.randn(3000), "list": [1., None, "text"]}
    file = write_checkpoint(state, tmp_path/"a.pt")
    good = file.read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:] for i in range(0, len(good), 61)]
    damaged += [good[:i] + b"\1"*64 + good[i + 64:] for i in range(0, len(good), 640)]
    damaged += [good[:i] for i in range(0, len(good), 640)] + [good + b"\n", good[:-96] + good[-95:]]
    for contents in damaged:
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=re.escape(f"{file} ")) as e: read_checkpoint(file)
        assert "\n" not in str(e.value) and e.value.__context__ is None


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
