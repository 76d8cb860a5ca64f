"""Kill -9 small runs at many moments, take each up again, and compare the final weights with those of a run that was left alone.

    python tests/killed_run.py --times 20 --seed 0     # prints a line for each, and exits with 1 if any differs

One process imports everything and forks a child for each run, as a training process takes seconds to start. A part of the
kills strikes inside the writing of a checkpoint, at each of its steps; the others after a random time.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
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
from self_supervised_bt.checkpoints import Checkpoints

if ProgressCallback in defaults.callbacks: defaults.callbacks.remove(ProgressCallback)
EPOCHS, EVERY = 4, 3
IN_WRITE = ("before the file", "half of the file", "before fsync", "before the rename", "after the rename", "while old ones are removed")


def learner(seed, folder=None, resume=False):
    "Random views, dropout, momentum, moments and a validation set: much that could go astray"
    set_seed(seed)
    x, _ = digits_images()
    encoder = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(.1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dls = tensor_dls(x[:700], bs=64, valid_pct=.1, device="cpu")
    recipe = Recipe(opt="adamw", lr=1e-2, wd=1e-2, epochs=EPOCHS, schedule="cosine", warmup=1, hidden_size=32, projection_size=32, views=dict(recipe="digits"))
    learn = bt_learner(dls, encoder, 16, recipe=recipe, terms=True, cbs=[Checkpoints(folder, every=EVERY, monitor="valid_loss", resume=resume)] if folder else [])
    learn.logger = lambda *_: None
    return learn


def train(seed, folder, out=None, goes_on=False, die=None):
    "In a child: a run, from the beginning or taken up, that may have to die inside its fourth checkpoint"
    torch.set_num_threads(1)
    if die: be_killed_at(die)
    learn = learner(seed, folder, goes_on)
    learn.fit_recipe()
    if out:
        losses = torch.stack([l.detach() for l in learn.recorder.losses])
        torch.save([learn.model.state_dict(), losses, torch.tensor([list(v) for v in learn.recorder.values])], out)


def be_killed_at(moment):
    calls = {"n": 0}
    def kill(): os.kill(os.getpid(), signal.SIGKILL)
    def fourth():
        calls["n"] += 1
        return calls["n"] == 4
    if moment in ("before the file", "half of the file"):
        save = torch.save
        def broken_save(state, path):
            if not fourth(): return save(state, path)
            if moment == "half of the file":
                save(state, path)
                os.truncate(path, os.path.getsize(path)//2)
            kill()
        torch.save = broken_save
    elif moment == "while old ones are removed":
        Path.unlink = lambda self, *a, **k: kill() if self.name.startswith("step-") else os.unlink(self)
    else:
        name = {"before fsync": "_flush", "before the rename": "replace", "after the rename": "replace"}[moment]
        where = core if name == "_flush" else os
        whole = getattr(where, name)
        def broken(*args):
            hit = (name == "replace" or str(args[0]).endswith(".part")) and fourth()
            if hit and moment != "after the rename": kill()
            whole(*args)
            if hit: kill()
        setattr(where, name, broken)


def child(*args, after=None, **kwargs):
    "Fork a run; kill it after a time if asked to; its exit status, below 0 the signal"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train(*args, **kwargs)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    rng, same = random.Random(a.seed), 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        start = time.perf_counter()
        assert child(0, None, tmp/"whole.pt") == 0
        seconds = time.perf_counter() - start
        whole = torch.load(tmp/"whole.pt")
        for i in range(a.times):
            moment = IN_WRITE[i//2 % len(IN_WRITE)] if i % 2 == 0 else None
            folder = tmp/str(i)
            code = child(0, folder, die=moment) if moment else child(0, folder, after=rng.uniform(.05, 1.2)*seconds)
            parts, files = len(list(folder.glob("*.part"))), sorted(f.name for f in folder.glob("step-*.pt"))
            for f in folder.glob("step-*.pt"): checkpoints.read_checkpoint(f)   # what has its name is whole
            assert child(100 + i if files else 0, folder, tmp/"again.pt", goes_on=True) == 0   # another seed: nothing of it may be left
            again = torch.load(tmp/"again.pt")
            ok = all(torch.equal(whole[0][k], again[0][k]) for k in whole[0]) and torch.equal(whole[1], again[1]) and torch.equal(whole[2], again[2])
            same += ok
            print(f"{i + 1:3} {'same bits' if ok else 'DIFFERENT':10} killed {moment or 'at random':28} exit {code:3}, "
                  f"{files[-1] if files else 'before it began'}{', a half-written file' if parts else ''}", flush=True)
    print(f"{same} of {a.times} runs ended with the same bits: weights, losses and the Recorder's table")
    sys.exit(same != a.times)


if __name__ == "__main__": main()
