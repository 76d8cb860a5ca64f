"""CIFAR-10 on one GPU: kNN top-1 of a ResNet-18 after some minutes of training without labels

    python benchmarks/cifar_gpu.py path/to/cifar10-train --seeds 0 1 2              # ten minutes per seed
    python benchmarks/cifar_gpu.py path/to/cifar10-train --minutes 60 --test path/to/cifar10-test

Trains on all images of the class folders but the last 500 of each class by file name, and measures on those; with
`--test` it trains on all, and measures on the folder given there. kNN is a weighted vote of the 200 nearest training
images (temperature 0.1) by the encoder of the last epoch, single views of 32 pixels. Lightly's table of benchmarks has
84.2 % for Barlow Twins with a ResNet-18, 200 epochs and 376 minutes on a V100, and Bandara et al. 2023 have 90.5 % for
Barlow Twins and 92.6 % for Mixed Barlow Twins after 2,000 epochs. `--device cpu --images 20 --arch timm/test_resnet`
tries the script.
"""
import argparse
import statistics
import time
from pathlib import Path

import torch
from _common import class_folders, machine
from cifar import fit
from fastai.callback.channelslast import ChannelsLast
from fastai.torch_core import set_seed

from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.recipes import bt_learner, get_recipe
from self_supervised_bt.training import Autocast


def recipe(a):
    "Settings of a run: those of `\"cifar\"` at the size of the published tables"
    r = get_recipe("cifar", name="cifar-gpu", arch=a.arch, small_stem=True, pool_type="avg", size=32, bs=a.bs,
                   hidden_size=a.width, projection_size=a.width, lmb=10.24/a.width)
    return r.changed(lmb_reg=a.lmb_reg) if a.lmb_reg else r


def learner(x, seed, a):
    set_seed(seed)
    dls = tensor_dls(x, bs=a.bs, valid_pct=0, device=a.device)
    learn = bt_learner(dls, recipe=recipe(a), cbs=[Autocast(), ChannelsLast()])
    if a.compile: learn.model.compile()
    return learn


def clock():
    "Seconds, read when the device has done its work"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def run(data, seed, a):
    "Epochs, seconds, kNN and linear top-1 in percent"
    x, y, x_test, y_test = data
    if a.compile: fit(learner(x[:2*a.bs], seed, a), 1, clock)   # compiled code is kept, its time is printed by itself
    learn = learner(x, seed, a)
    epochs, took = fit(learn, 60*a.minutes, clock)
    h, h_test = encode(learn, x)[0], encode(learn, x_test)[0]
    knn = knn_accuracy(h_test, y_test, h, y, k=min(200, len(h)))
    return epochs, took, 100*knn, 100*linear_probe(h, y, h_test, y_test).top1


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with one folder of training images per class")
    p.add_argument("--test", help="folder with one folder of test images per class")
    p.add_argument("--minutes", type=float, default=10, help="of training, per seed")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--images", type=int, default=5000, help="training images per class")
    p.add_argument("--arch", default="resnet18")
    p.add_argument("--width", type=int, default=1024, help="of the projector")
    p.add_argument("--lmb-reg", type=float, help="weight of the regulariser of Mixed Barlow Twins")
    p.add_argument("--bs", type=int, default=512, help="images per batch")
    p.add_argument("--compile", action="store_true", help="compile the model; pays in long runs")
    p.add_argument("--device", default="cuda")
    return p.parse_args()


def images(a):
    "Training and test images and labels"
    if a.test is None: return class_folders(a.path, min(a.images, 4500), min(500, a.images))
    train, test = class_folders(a.path, a.images, 1), class_folders(a.test, 1, 1000)
    return *train[:2], *test[2:]


def main():
    a = arguments()
    data = images(a)
    print(machine("fastai", "timm"))
    if a.device == "cuda": print(torch.cuda.get_device_name())
    print(f"{len(data[0]):,} images to train on, {len(data[2]):,} of {Path(a.test or a.path).name} to test with\n")
    print(recipe(a), "\n")
    rows = []
    for seed in a.seeds:
        epochs, took, knn, linear = run(data, seed, a)
        rows.append((knn, linear))
        when = f"{epochs:.1f} epochs, {took/60:.1f} minutes"
        print(f"seed {seed}: {when}, kNN {knn:.1f}, linear {linear:.1f}", flush=True)
    if len(rows) < 2: return
    columns = zip(("kNN", "linear"), zip(*rows))
    spread = [f"{name} {statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for name, c in columns]
    print("mean ± sd over seeds: " + ", ".join(spread))


if __name__ == "__main__": main()
