"""Does the backend of the views cost accuracy? Equal training with each, several seeds, on photographs in class folders

    python benchmarks/backends.py path/to/cifar10-train     # 10,000 images; --only fused kornia: 14 minutes on 2 cores

Trains on the first images of every class, by file name, and tests on the last, which are not trained on. A seed sets
weights, order and views; all contenders get the same seeds. Backends take turns, seed by seed.
"""
import argparse
import statistics
import time

from _common import class_folders, machine
from fastai.torch_core import set_seed

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, k_shot_accuracy, knn_accuracy
from self_supervised_bt.recipes import bt_learner

CONTENDERS = {"fused": {}, "kornia": dict(backend="kornia"), "fused, exact jitter": dict(exact_jitter=True)}


def run(x, y, x_test, y_test, seed, args, **kwargs):
    "kNN top-1 (k=20) and top-1 of a classifier on 100 labels per class, %, on held-out images; seconds of training"
    set_seed(seed)
    augs = get_barlow_twins_aug_pipelines(32, "cifar", **kwargs)
    learn = bt_learner(tensor_dls(x, bs=256), "timm/resnet10t", 32, augs, small_stem=False,
                       hidden_size=512, projection_size=512)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 5e-3)
    seconds = time.perf_counter() - start
    h = encode(learn, x)[0]
    h_test = encode(learn, x_test)[0]
    knn = knn_accuracy(h_test, y_test, h, y, k=20)
    linear = float(k_shot_accuracy(h, y, h_test, y_test, 100, 3).mean())
    return 100*knn, 100*linear, seconds


def mean_and_sd(values):
    if len(values) == 1: return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with a folder of images for each class")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--per-class", type=int, default=1000, help="images per class to train on")
    p.add_argument("--held-out", type=int, default=200, help="images per class to test on")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    args = p.parse_args()
    data = class_folders(args.path, args.per_class, args.held_out)
    print(machine("torchvision", "kornia", "fastai", "timm"))
    print(f"{len(data[0]):,} images, {args.epochs} epochs, recipe 'cifar', timm/resnet10t, D=512; "
          f"tested on {len(data[2]):,} held-out images\n")
    print(f"{'':22} {'seed':>4} {'kNN':>6} {'100 labels':>11} {'seconds':>8}", flush=True)
    results = {name: [] for name in args.only}
    for seed in range(args.seeds):
        for name in args.only:
            results[name].append(run(*data, seed, args, **CONTENDERS[name]))
            knn, linear, seconds = results[name][-1]
            print(f"{name:22} {seed:4} {knn:6.1f} {linear:11.1f} {seconds:8.0f}", flush=True)
    print(f"\n{'mean ± sd over seeds':22} {'kNN':>13} {'100 labels':>13} {'seconds':>8}")
    for name, rows in results.items():
        knn, linear, seconds = zip(*rows)
        print(f"{name:22} {mean_and_sd(knn):>13} {mean_and_sd(linear):>13} {statistics.median(seconds):8.0f}")


if __name__ == "__main__": main()
