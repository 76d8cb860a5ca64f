"""Kill small runs at many moments with SIGKILL, resume each, and compare the weights with those of an unbroken run.

    python tests/killed_run.py --times 20 --seed 0     # one line per run; exits with 1 if any differs

One process imports everything and forks a child per run, as a training process takes seconds to start. Half of the
kills happen inside the writing of a checkpoint, at each of its steps in turn; the others after a random time.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import defaults
from fastai.torch_core import set_seed
from torch import nn

from self_supervised_bt import checkpoints, core
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.recipes import Recipe, bt_learner

if ProgressCallback in defaults.callbacks: defaults.callbacks.remove(ProgressCallback)
EPOCHS, EVERY = 4, 3
RECIPE = Recipe(opt="adamw", lr=1e-2, wd=1e-2, epochs=EPOCHS, schedule="cosine", warmup=1, hidden_size=32,
                projection_size=32, views=dict(recipe="digits"))
WRITE_STEPS = ("before the file", "half of the file", "before fsync", "before the rename", "after the rename",
               "while old ones are removed")


def learner(seed, folder=None, resume=False):
    "Random views, dropout, momentum, moments and a validation set: much state that must be restored"
    set_seed(seed)
    x, _ = digits_images()
    convolution = [nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(.1)]
    encoder = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dls = tensor_dls(x[:700], bs=64, valid_pct=.1, device="cpu")
    cbs = [checkpoints.Checkpoints(folder, every=EVERY, monitor="valid_loss", resume=resume)] if folder else []
    learn = bt_learner(dls, encoder, 16, recipe=RECIPE, terms=True, cbs=cbs)
    learn.logger = lambda *_: None
    return learn


def train(seed, folder=None, out=None, resume=False, kill_at=None):
    "In a child: a run, new or resumed, that may be killed inside its fourth checkpoint"
    torch.set_num_threads(1)
    if kill_at: be_killed(kill_at)
    learn = learner(seed, folder, resume)
    learn.fit_recipe()
    if not out: return
    losses = torch.stack([loss.detach() for loss in learn.recorder.losses])
    values = torch.tensor([list(row) for row in learn.recorder.values])
    torch.save(dict(learn.model.state_dict(), losses=losses, values=values), out)


def kill(): os.kill(os.getpid(), signal.SIGKILL)


def be_killed(moment):
    "Make the writing of the fourth checkpoint kill this process at one of `WRITE_STEPS`"
    writes = 0
    save, flush, replace, unlink = torch.save, core._flush, os.replace, Path.unlink

    def new_save(state, path):
        nonlocal writes
        writes += 1
        if writes == 4 and moment == "before the file": kill()
        save(state, path)
        if writes == 4 and moment == "half of the file":
            os.truncate(path, os.path.getsize(path)//2)
            kill()

    def new_flush(path):
        if writes == 4 and moment == "before fsync": kill()
        flush(path)

    def new_replace(part, path):
        if writes == 4 and moment == "before the rename": kill()
        replace(part, path)
        if writes == 4 and moment == "after the rename": kill()

    def new_unlink(path, *args, **kwargs):
        if path.name.startswith("step-") and moment == WRITE_STEPS[-1]: kill()
        unlink(path, *args, **kwargs)

    torch.save, core._flush, os.replace, Path.unlink = new_save, new_flush, new_replace, new_unlink


def child(*args, after=None, **kwargs):
    "Fork a run, kill it after a time if asked to; its exit status, below 0 the signal"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train(*args, **kwargs)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def killed_and_resumed(i, folder, whole, seconds, rng):
    "Is the run, killed once and resumed, equal to the whole one? Prints a line"
    moment = WRITE_STEPS[i//2 % len(WRITE_STEPS)] if i % 2 == 0 else None
    code = child(0, folder, kill_at=moment, after=None if moment else rng.uniform(.05, 1.2)*seconds)
    parts = list(folder.glob(".*.unfinished"))
    files = sorted(folder.glob("step-*.pt"))
    for f in files: checkpoints.read_checkpoint(f)   # a file that has its name is complete
    seed = 100 + i if files else 0                   # nothing of another seed may be left after resuming
    out = folder.with_suffix(".pt")
    assert child(seed, folder, out, resume=True) == 0
    left = list(folder.glob(".*"))
    again = torch.load(out)
    same = not left and whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    last = files[-1].name if files else "before its first checkpoint"
    print(f"{i + 1:3} {'same bits' if same else 'DIFFERENT':10} killed {moment or 'at random':28} exit {code:3}, "
          f"{last}{', a half-written file' if parts else ''}", flush=True)
    return same


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    rng = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        start = time.perf_counter()
        assert child(0, out=tmp/"whole.pt") == 0
        seconds = time.perf_counter() - start
        whole = torch.load(tmp/"whole.pt")
        same = sum(killed_and_resumed(i, tmp/str(i), whole, seconds, rng) for i in range(a.times))
    print(f"{same} of {a.times} runs ended with the same bits: weights, losses and the Recorder's table")
    sys.exit(same != a.times)


if __name__ == "__main__": main()
