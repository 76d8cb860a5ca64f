"""CIFAR-10 on a CPU: accuracy after 440 seconds of training on 10,000 images without labels, and what each setting adds

    python benchmarks/cifar.py path/to/cifar10-train                  # the recipe, one seed: 9 minutes on 2 cores
    python benchmarks/cifar.py path/to/cifar10-train --seeds 0 1 2 --try "recipe, SimCLR"   # with a spread
    python benchmarks/cifar.py cifar10-train --choose --cpu --seconds 190 --seeds 0 1 2 --try all --csv tried.csv

Trains on the first 1,000 images per class by file name, without labels. The settings were chosen, with `--choose`, on
the last 500 per class, most of them one at a time against the recipe as it was `before` its last five changes; without
it, the figures are measured on the 500 per class before those, on which nothing was chosen. kNN is a weighted vote of
the 20 nearest of the 10,000 (temperature 0.1). Every training takes the same seconds: the schedule follows the clock,
or with `--cpu` the seconds that one core has computed, so that other work on the machine does not count. "whitened" is
kNN at 40 pixels after whitening by the training images, "averaged" the mean over each image and its mirror image at 32
and 40 pixels: rows of their own, no single views.
"""
import argparse
import time
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from _common import class_folders, machine
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException, TrainEvalCallback
from fastai.torch_core import set_seed
from torch._inductor.utils import fresh_cache

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.layers import fit_whitening
from self_supervised_bt.recipes import bt_learner, get_recipe
from self_supervised_bt.training import Autocast, MatmulConvs

LARGER = 40   # pixels of the second evaluation
AVERAGED = ("flip", 32, LARGER)
EXTRAS = dict(bf16=True, channels_last=True, matmul=True, compiled=False, sizes=None, ema=None)   # that no recipe has


class ByTheClock(Callback):
    "Progress of the fit, which schedules follow, as a share of `seconds`; then the fit ends"
    order = TrainEvalCallback.order + 1
    def __init__(self, seconds, clock): self.seconds, self.clock = seconds, clock
    def before_fit(self): self.start = self.clock()
    def elapsed(self): return self.clock() - self.start
    def before_batch(self): self.learn.pct_train = min(1, self.elapsed()/self.seconds)
    def after_batch(self):
        if self.elapsed() >= self.seconds: raise CancelFitException


class SizesInTurn(Callback):
    "Views of other sizes: `stages` are pairs (share of the fit until which, pipelines)"
    order = ByTheClock.order + 1
    def __init__(self, stages): self.stages = stages
    def before_batch(self):
        self.learn.barlow_twins.augs = next(a for end, a in self.stages if self.pct_train <= end)


class WeightAverage(Callback):
    "Exponential moving average of the encoder's weights from a share `start` of the fit on"
    def __init__(self, decay, start=.5): self.decay, self.start, self.average = decay, start, None
    def after_batch(self):
        if self.pct_train < self.start: return
        weights = list(self.model.encoder.parameters())
        if self.average is None: self.average = [w.detach().clone() for w in weights]
        else: torch._foreach_lerp_(self.average, [w.detach() for w in weights], 1 - self.decay)
    def after_fit(self):
        if self.average is None: return
        with torch.no_grad():
            for w, average in zip(self.model.encoder.parameters(), self.average): w.copy_(average)


def learner(x, seed, bf16, channels_last, matmul, compiled, sizes, ema, **changes):
    "The recipe with `changes`, on images `x`"
    set_seed(seed)
    recipe = get_recipe("cifar", **changes)
    cbs = [Autocast()]*bf16 + [ChannelsLast()]*channels_last
    def views(size): return get_multi_aug_pipelines(recipe.nviews, size, **recipe.views)
    if sizes: cbs.append(SizesInTurn([(end, views(size)) for end, size in sizes]))
    if ema: cbs.append(WeightAverage(ema))
    dls = tensor_dls(x, bs=recipe.bs, valid_pct=0, device="cpu")
    learn = bt_learner(dls, recipe=recipe, cbs=cbs)
    if not matmul: learn.remove_cb(MatmulConvs)
    if compiled: learn.model.compile()
    return learn


def fit(learn, seconds, clock):
    "Epochs, and seconds of training"
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(100000, cbs=ByTheClock(seconds, clock))
    return learn.train_iter/len(learn.dls.train), time.perf_counter() - start


def scores(learn, data, chosen, probe):
    "Name to percent; fewer of them while settings are chosen, and those of a linear probe if `probe`"
    x, y, x_test, y_test = data
    def knn(h, h_test): return 100*knn_accuracy(h_test, y_test, h, y, k=20)
    def linear(h, h_test): return 100*linear_probe(h, y, h_test, y_test).top1
    def encoded(size=None, tta=None): return [encode(learn, part, size, tta=tta)[0] for part in (x, x_test)]
    def whitened(h, h_test):
        whitening = fit_whitening(h)
        return whitening(h), whitening(h_test)
    larger = encoded(LARGER)
    found = {"kNN": knn(*encoded()), f"at {LARGER} px": knn(*larger), "whitened": knn(*whitened(*larger))}
    if probe: found["linear"] = linear(*larger)
    if not chosen: return found
    averaged = encoded(tta=AVERAGED)
    found["averaged"] = knn(*averaged)
    found["averaged, whitened"] = knn(*whitened(*averaged))
    if probe: found["averaged, linear"] = linear(*averaged)
    return found


def run(data, seed, seconds, clock, chosen, probe, settings):
    "Epochs, seconds of training, compilation included, and the scores in percent"
    x = data[0]
    fit(learner(x[:6*256], seed, **{**settings, "compiled": False}), 3, clock)   # warm up
    with fresh_cache():   # compilation counts
        learn = learner(x, seed, **settings)
        epochs, took = fit(learn, seconds, clock)
    return epochs, took, scores(learn, data, chosen, probe)


NARROWER = dict(arch_args=dict(channels=[32, 64, 128, 256], stem_width=16))
BEFORE = dict(NARROWER, schedule="one cycle", lr=.04, patch_init=False, matmul=False)   # others were compared with it
CHANGES = {   # name to what differs from `BEFORE`
    "before": {},
    "float32": dict(bf16=False),
    "not channels last": dict(channels_last=False),
    "Adam": dict(opt="fastai", lr=.005, lr_bias=None),
    "AdamW": dict(opt="adamw", lr=.005, lr_bias=None, wd=.01),
    "LARS": dict(opt="lars", lr=1., lr_bias=.05, wd=1e-6),
    "Muon, learning rate 0.02": dict(lr=.02),
    "Muon, learning rate 0.08": dict(lr=.08),
    "half a cosine instead of one cycle": dict(schedule="cosine"),
    "constant, then linear to 0": dict(schedule="wsd"),
    "first kernels from patches": dict(patch_init=True),
    "small maps by matrix products": dict(matmul=True),
    "λ 0.005": dict(lmb=.005),
    "λ 0.08": dict(lmb=.08),
    "projector 256, λ 0.04": dict(hidden_size=256, projection_size=256, lmb=.04),
    "projector 256 of 2 layers, λ 0.04": dict(hidden_size=256, projection_size=256, lmb=.04, nlayers=2),
    "projector 512, 128 of 2 layers, λ 0.08": dict(projection_size=128, nlayers=2, lmb=.08),
    "projector 1024, λ 0.01": dict(hidden_size=1024, projection_size=1024, lmb=.01),
    "projector of 2 layers": dict(nlayers=2),
    "batch 128": dict(bs=128),
    "batch 512": dict(bs=512),
    "views of 32 px": dict(size=32),
    "views of 16, then 24 px": dict(sizes=[(.5, 16), (1, 24)]),
    "views of 16, 20, 24 px": dict(sizes=[(.33, 16), (.67, 20), (1, 24)]),
    "crops above 35 %": dict(views=dict(recipe="cifar", resize_scale=[.35, 1.])),
    "weaker jitter": dict(views=dict(recipe="cifar", jitter_s=[.3, .3, .2, .08])),
    "two views": dict(nviews=2),
    "three views": dict(nviews=3),
    "eight views, batch 128": dict(nviews=8, bs=128, scale_lr=False),
    "weights averaged": dict(ema=.998),
    "average pool": dict(pool_type="avg"),
    "half again as wide": dict(arch_args=dict(channels=[48, 96, 192, 384], stem_width=24)),
    "two blocks per stage": dict(arch_args=dict(channels=[32, 64, 128, 256], stem_width=16, layers=[2, 2, 2, 2])),
    "full width": dict(arch_args=dict(channels=[64, 128, 256, 512], stem_width=32)),
    "with the stem's pool": dict(small_stem=False),
    "Mixed Barlow Twins": dict(lmb_reg=4.),
    "Mixed, two views": dict(lmb_reg=4., nviews=2),
    "SimCLR": dict(method="simclr"),
    "SimCLR, two views": dict(method="simclr", nviews=2),
    "BYOL, two views": dict(method="byol", nviews=2),
    "W-MSE, two views": dict(method="wmse", nviews=2),
    "VICReg, two views": dict(method="vicreg", nviews=2),
    "compiled": dict(compiled=True),   # with --cpu its compiler's seconds, those of other processes, do not count
}
TRIED = {name: {**BEFORE, **changes} for name, changes in CHANGES.items()}
TRIED |= {"recipe, narrower": NARROWER, "recipe, SimCLR": dict(method="simclr"),
          "recipe, narrower, SimCLR": dict(NARROWER, method="simclr"),
          "recipe, half a cosine": dict(schedule="cosine"), "recipe, one cycle": dict(schedule="one cycle"),
          "recipe, learning rate 0.03": dict(lr=.03, lr_bias=.005),
          "recipe, learning rate 0.08": dict(lr=.08, lr_bias=.013)}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with one folder of images per class")
    p.add_argument("--seconds", type=float, default=440, help="of training")
    p.add_argument("--cpu", action="store_true", help="count seconds that one core computes")
    p.add_argument("--choose", action="store_true", help="test on the images for choosing settings")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--try", nargs="+", choices=[*TRIED, "all"], default=[], dest="tried", help="which to run as well")
    p.add_argument("--no-linear", action="store_true", help="leave out the linear probe")
    p.add_argument("--csv", type=Path, help="file to add every run to; those that it holds are not run again")
    return p.parse_args()


def known_rows(file):
    "What a file of earlier runs holds: a table, perhaps empty"
    return pd.read_csv(file) if file and file.exists() else pd.DataFrame(columns=["settings", "seed"])


def rows_of(a, data, changes):
    "One row per setting and seed, those of `a.csv` first"
    clock = time.process_time if a.cpu else time.perf_counter
    rows = known_rows(a.csv).to_dict("records")
    done = {(row["settings"], row["seed"]) for row in rows}
    for seed, name in product(a.seeds, changes):
        if (name, seed) in done: continue
        settings = {**EXTRAS, **changes[name]}
        epochs, took, found = run(data, seed, a.seconds, clock, not a.choose, not a.no_linear, settings)
        rows.append({"settings": name, "seed": seed, "epochs": round(epochs, 1)}
                    | {k: round(v, 2) for k, v in found.items()})
        text = ", ".join(f"{k} {v:.1f}" for k, v in found.items())
        print(f"{name:26} seed {seed} {epochs:5.1f} epochs {took:4.0f} s: {text}", flush=True)
        if a.csv: pd.DataFrame(rows[-1:]).to_csv(a.csv, mode="a", header=not a.csv.exists(), index=False)
    return [row for row in rows if row["settings"] in changes and row["seed"] in a.seeds]


def summary(rows):
    "Mean and standard deviation over seeds, one row per setting"
    table = pd.DataFrame(rows).drop(columns="seed").groupby("settings", sort=False)
    return table.mean().map("{:.1f}".format) + " ± " + table.std().map("{:.1f}".format)


def main():
    a = arguments()
    if a.cpu: torch.set_num_threads(1)
    data = class_folders(a.path, 1000, 500, spare=0 if a.choose else 500)
    print(machine("fastai", "timm"))
    print(f"{len(data[0]):,} images to train on, {len(data[2]):,} to test with"
          f"{', on which the settings were chosen' if a.choose else ''}; {a.seconds:.0f} s of training"
          f"{' as one core computes them' if a.cpu else ''}")
    tried = TRIED if "all" in a.tried else {name: TRIED[name] for name in a.tried}
    rows = rows_of(a, data, {"recipe": {}, **tried})
    if len(a.seeds) > 1: print("\nmean ± sd over seeds\n" + summary(rows).to_string())


if __name__ == "__main__": main()
