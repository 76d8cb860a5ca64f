"""Does BatchNorm over both views learn better than each view by itself? At equal epochs, and at equal seconds

    python benchmarks/separate_bn.py                                     # the digits, 5 seeds
    python benchmarks/separate_bn.py path/to/cifar10-train --epochs 20   # class folders, as for benchmarks/cifar.py
    python benchmarks/separate_bn.py cifar.npz --epochs 20               # arrays x (N,C,H,W) uint8, y, x_test, y_test

Trains without labels by the recipe "digits" or "cifar". The test images are not trained on: of the digits 500 that the
seed chooses, of class folders the last 500 of every class by file name. A seed sets weights, order and views, and both
ways get the same seeds. Where a way takes more seconds for its epochs, "equal seconds" gives it fewer, by the ratio of
the times of a step measured in turn. kNN is the weighted vote of the 20 nearest training images, linear a logistic
regression.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from _common import class_folders, machine
from fastai.torch_core import set_seed

from self_supervised_bt.data import digits_images, hold_out, tensor_dls
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.recipes import bt_learner, get_recipe

WAYS = {"joint": False, "separate": True}
SCORES = "kNN", "linear"


def images(path, seed, per_class=1000):
    "x, y, x_test, y_test"
    if path is None: return hold_out(*digits_images(), 500, seed)
    if Path(path).is_dir(): return class_folders(path, per_class, 500)
    arrays = np.load(path)
    return [torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")]


def learner(x, seed, recipe, separate):
    set_seed(seed)
    return bt_learner(tensor_dls(x, bs=recipe.bs, valid_pct=0), recipe=recipe, separate_bn=separate)


def seconds_of(learn, epochs):
    "Seconds that it trains"
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(epochs)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def step_seconds(x, recipe):
    "Seconds of a step, by way: the least of several epochs of six steps, in turn"
    learners = {way: learner(x[:6*recipe.bs], 0, recipe, separate) for way, separate in WAYS.items()}
    times = {way: [] for way in WAYS}
    for _ in range(4):
        for way, learn in learners.items(): times[way].append(seconds_of(learn, 1)/6)
    return {way: min(t) for way, t in times.items()}


def run(data, seed, recipe, separate, epochs):
    "Seconds of training, and the scores in percent"
    x, y, x_test, y_test = data
    learn = learner(x, seed, recipe, separate)
    seconds = seconds_of(learn, epochs)
    h, h_test = encode(learn, x)[0], encode(learn, x_test)[0]
    return seconds, 100*knn_accuracy(h_test, y_test, h, y, k=20), 100*linear_probe(h, y, h_test, y_test).top1


def spread(values):
    "Mean ± standard deviation"
    sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{sd}"


def difference(a, b):
    "Mean difference of pairs and its standard error"
    pairs = [v - w for v, w in zip(a, b)]
    error = f" (standard error {statistics.stdev(pairs)/len(pairs)**.5:.2f})" if len(pairs) > 1 else ""
    return f"{statistics.mean(pairs):+.2f}{error}"


def compare(title, epochs, data_of, recipe, seeds, done):
    "All seeds with each way, for the epochs of each; what is `done` already is not run again"
    print(f"\n{title}\n{'':10} {'seed':>4} {'epochs':>6} {'seconds':>8} {'kNN':>7} {'linear':>7}", flush=True)
    rows = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way, separate in WAYS.items():
            key = way, seed, epochs[way]
            if key not in done: done[key] = run(data_of(seed), seed, recipe, separate, epochs[way])
            seconds, *scores = done[key]
            rows[way].append(scores)
            print(f"{way:10} {seed:4} {epochs[way]:6} {seconds:8.1f} {scores[0]:7.2f} {scores[1]:7.2f}", flush=True)
    for i, score in enumerate(SCORES):
        of = {way: [row[i] for row in rows[way]] for way in WAYS}
        print(f"{score}: " + ", ".join(f"{way} {spread(of[way])}" for way in WAYS)
              + f"; separate - joint {difference(of['separate'], of['joint'])}", flush=True)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", nargs="?", help="folder with one folder of images per class, or an .npz file")
    p.add_argument("--epochs", type=int, help="of the faster way; those of the recipe if not given")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--per-class", type=int, default=1000, help="images of class folders to train on")
    p.add_argument("--equal-epochs", action="store_true", help="leave the comparison at equal seconds out")
    return p.parse_args()


def main():
    a = arguments()
    recipe = get_recipe("cifar" if a.path else "digits")
    fixed = images(a.path, 0, a.per_class) if a.path else None
    def data_of(seed): return fixed or images(None, seed)
    x, _, x_test, _ = data_of(0)
    print(machine("fastai", "timm"))
    print(f"{a.path or 'digits'}: {len(x):,} images to train on, {len(x_test):,} to test with; recipe {recipe.name}")
    steps = step_seconds(x, recipe)
    print("seconds of a step: " + ", ".join(f"{way} {t:.4f}" for way, t in steps.items()))
    most, done = a.epochs or recipe.epochs, {}
    compare("equal epochs", dict.fromkeys(WAYS, most), data_of, recipe, a.seeds, done)
    if a.equal_epochs: return
    fewer = {way: max(1, round(most*min(steps.values())/t)) for way, t in steps.items()}
    if len(set(fewer.values())) == 1: print("\nequal seconds: the same epochs, as the ways take the same time")
    else: compare("equal seconds", fewer, data_of, recipe, a.seeds, done)


if __name__ == "__main__": main()
