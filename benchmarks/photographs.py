"""Which recipe for which photographs, and how many minutes a run takes on this machine

    python benchmarks/photographs.py                       # crops of the two sample images of scikit-learn
    python benchmarks/photographs.py path/to/photos        # a folder of your own
    python benchmarks/photographs.py --images 5000 20000 --threads 1

For images of several sizes and numbers it prints what the rule of `defaults` chooses on a CPU, the images per second of
the training steps with views (the median of `--steps`, after a first one), and the minutes of a whole run and of a
short one, which `bt_demo` is. Processor time of the steps is printed beside, which other work on the machine does not
change.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import machine
from commands import photographs
from fastai.callback.core import Callback, CancelFitException

from self_supervised_bt.data import image_files, load_images, tensor_dls
from self_supervised_bt.defaults import chosen_recipe
from self_supervised_bt.folders import kept_size
from self_supervised_bt.recipes import bt_learner


class Steps(Callback):
    "Wall and processor seconds of some training steps; the first starts everything and does not count"
    def __init__(self, n): self.n, self.at = n, []
    def after_batch(self):
        self.at.append((time.perf_counter(), time.process_time()))
        if len(self.at) > self.n: raise CancelFitException
    def seconds(self): return [statistics.median(b[i] - a[i] for a, b in zip(self.at, self.at[1:])) for i in (0, 1)]


def measured(files, recipe, side, steps):
    "Wall and processor seconds of a training step"
    images = load_images(files[:200], kept_size(recipe.size, side), progress=False)
    x = images[torch.arange((steps + 1)*recipe.bs) % len(images)]
    timer = Steps(steps)
    learn = bt_learner(tensor_dls(x, bs=recipe.bs, valid_pct=0, device="cpu"), recipe=recipe, cbs=timer)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return timer.seconds()


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", help="of photographs")
    p.add_argument("--images", type=int, nargs="+", default=[500, 5000, 50_000])
    p.add_argument("--sides", type=int, nargs="+", default=[32, 96, 360], help="shorter sides of the images, pixels")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, help="of PyTorch")
    return p.parse_args()


def main():
    a = arguments()
    if a.threads: torch.set_num_threads(a.threads)
    print(f"{machine('fastai')}, {torch.get_num_threads()} threads")
    print(f"{'side':>5} {'images':>7} {'recipe':>8} {'views':>6} {'batch':>6} {'epochs':>7} {'images/s':>9} "
          f"{'processor s/step':>17} {'minutes':>8} {'short':>6}")
    with tempfile.TemporaryDirectory() as tmp:
        if not a.folder: photographs(Path(tmp))
        files = image_files(a.folder or tmp)
        for side in a.sides:
            seconds = {}
            for n in a.images:
                (r, _), (s, _) = (chosen_recipe(n, side, short=short) for short in (False, True))
                if r.bs not in seconds: seconds[r.bs] = measured(files, r, side, a.steps)
                wall, processor = seconds[r.bs]
                minutes, short = (n//r.bs*recipe.epochs*wall/60 for recipe in (r, s))
                print(f"{side:5} {n:7,} {r.name:>8} {r.size:6} {r.bs:6} {r.epochs:7} {r.bs/wall:9.0f} "
                      f"{processor:17.2f} {minutes:8.1f} {short:6.1f}", flush=True)


if __name__ == "__main__": main()
