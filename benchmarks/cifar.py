"""CIFAR-10 on a CPU: accuracy after 440 seconds of training on 10,000 images without labels, and what each setting adds

    python benchmarks/cifar.py path/to/cifar10-train                  # the settings, one seed: 9 minutes on 2 cores
    python benchmarks/cifar.py path/to/cifar10-train --seeds 3        # with a spread
    python benchmarks/cifar.py path/to/cifar10-train --choose --seconds 100 --without all    # each setting left out

Trains on the first 1,000 images per class by file name, without labels. The settings were chosen, with `--choose`, on
the last 500 per class; without it, the figures are measured on the 500 per class before those, on which nothing was
chosen. kNN is a weighted vote of the 20 nearest of the 10,000 (temperature 0.1), also with all images resized to 40
pixels; the linear probe uses those. Every training takes the same seconds: the schedule follows the clock.
"""
import argparse
import statistics
import time

from _common import class_folders, machine
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import combined_cos
from fastai.torch_core import set_seed

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.training import Autocast

SETTINGS = dict(arch="timm/resnet10t", small_stem="no pool", channels=(32, 64, 128, 256), stem_width=16,
                size=24, width=512, lmb=.02, lr=5e-3, bs=256, bf16=True, channels_last=True)
LARGER = 40   # pixels of the second evaluation
WITHOUT = {   # what differs from SETTINGS
    "bfloat16": dict(bf16=False),
    "channels last": dict(channels_last=False),
    "lmb=0.02 (0.005)": dict(lmb=5e-3),
    "views of 24 px (32)": dict(size=32),
    "dropping the pool": dict(small_stem=False),
    "narrow layers": dict(channels=(64, 128, 256, 512), stem_width=32)}
SCORES = ("kNN before", "kNN", f"at {LARGER} px", "linear")


def learner(x, seed, arch, small_stem, channels, stem_width, size, width, lmb, lr, bs, bf16, channels_last):
    set_seed(seed)
    encoder = create_encoder(arch, pretrained=False, small_stem=small_stem, channels=channels, stem_width=stem_width)
    augs = get_barlow_twins_aug_pipelines(size, "cifar")
    cbs = [Autocast()]*bf16 + [ChannelsLast()]*channels_last
    dls = tensor_dls(x, bs=bs, valid_pct=0, device="cpu")
    return bt_learner(dls, encoder, size, augs, lmb=lmb, hidden_size=width, projection_size=width, cbs=cbs)


class OneCycleBySeconds(Callback):
    "The schedule of `fit_one_cycle` over `seconds` of training; then the fit ends"
    def __init__(self, seconds, lr):
        self.seconds = seconds
        self.schedules = dict(lr=combined_cos(.25, lr/25, lr, lr/1e5), mom=combined_cos(.25, .95, .85, .95))
    def before_fit(self): self.start = time.perf_counter()
    def elapsed(self): return time.perf_counter() - self.start
    def before_batch(self):
        position = min(1, self.elapsed()/self.seconds)
        for name, schedule in self.schedules.items(): self.opt.set_hyper(name, schedule(position))
    def after_batch(self):
        if self.elapsed() >= self.seconds: raise CancelFitException


def fit(learn, seconds, lr):
    "Epochs and seconds of training"
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(100000, lr, cbs=OneCycleBySeconds(seconds, lr))
    return learn.train_iter/len(learn.dls.train), time.perf_counter() - start


def run(data, seed, seconds, **settings):
    "Epochs, seconds of training, and the scores in percent"
    x, y, x_test, y_test = data
    fit(learner(x[:6*settings["bs"]], seed, **settings), 3, 1e-3)   # warm up
    learn = learner(x, seed, **settings)
    def knn(size=None):
        return 100*knn_accuracy(encode(learn, x_test, size)[0], y_test, encode(learn, x, size)[0], y, k=20)
    before = knn()
    epochs, took = fit(learn, seconds, settings["lr"])
    h, h_test = encode(learn, x, LARGER)[0], encode(learn, x_test, LARGER)[0]
    return epochs, took, before, knn(), knn(LARGER), 100*linear_probe(h, y, h_test, y_test).top1


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with one folder of images per class")
    p.add_argument("--seconds", type=float, default=440, help="of training")
    p.add_argument("--choose", action="store_true", help="test on the images for choosing settings")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--without", nargs="+", choices=[*WITHOUT, "all"], default=[], help="settings to leave out in turn")
    return p.parse_args()


def main():
    a = arguments()
    data = class_folders(a.path, 1000, 500, spare=0 if a.choose else 500)
    weights = sum(w.numel() for w in learner(data[0][:600], 0, **SETTINGS).model.encoder.parameters())
    print(machine("fastai", "timm"))
    print(f"{len(data[0]):,} images to train on, {len(data[2]):,} to test with"
          f"{', on which the settings were chosen' if a.choose else ''}; "
          f"encoder of {weights/1e6:.1f} M weights; {a.seconds:.0f} s of training")
    print(SETTINGS, "\n")
    columns = " ".join(f"{score:>11}" for score in SCORES)
    print(f"{'':32} {'seed':>4} {'epochs':>6} {'seconds':>8} {columns}", flush=True)
    without = WITHOUT if "all" in a.without else a.without
    changes = {"all settings": {}, **{f"without {name}": WITHOUT[name] for name in without}}
    for name, change in changes.items():
        rows = []
        for seed in range(a.seeds):
            epochs, took, *scores = run(data, seed, a.seconds, **{**SETTINGS, **change})
            rows.append(scores)
            print(f"{name:32} {seed:4} {epochs:6.1f} {took:8.0f} {' '.join(f'{s:11.1f}' for s in scores)}", flush=True)
        if a.seeds > 1:
            columns = dict(zip(SCORES, zip(*rows)))
            del columns["kNN before"]
            spread = [f"{k} {statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for k, c in columns.items()]
            print(f"{'mean ± sd over seeds':32} {', '.join(spread)}", flush=True)


if __name__ == "__main__": main()
