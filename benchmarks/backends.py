"""Does the backend of the views cost accuracy? Equal training with each, several seeds, on photographs in class folders

    python benchmarks/backends.py path/to/cifar10-train                          # 10,000 images; with --only fused kornia 14 minutes on 2 cores

Trains on the first images of every class, by file name, and tests on the last, which no training sees. A seed sets
weights, order and views; all contenders get the same seeds. Backends take turns, seed by seed.
"""
import argparse
import statistics
import time

from _common import class_folders, machine
from fastai.torch_core import set_seed
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, k_shot_accuracy, knn_accuracy

CONTENDERS = {"fused": {}, "kornia": dict(backend="kornia"), "fused, exact jitter": dict(exact_jitter=True)}


def run(x, y, x_test, y_test, seed, args, **kwargs):
    "Percent of held-out images named rightly by 20 neighbours, and by a classifier on 100 labels a class; seconds of training"
    set_seed(seed)
    augs = get_barlow_twins_aug_pipelines(32, "cifar", **kwargs)
    learn = bt_learner(tensor_dls(x, bs=256), "timm/resnet10t", 32, augs, small_stem=False, hidden_size=512, projection_size=512)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 5e-3)
    seconds = time.perf_counter() - start
    h, h_test = encode(learn, x)[0], encode(learn, x_test)[0]
    return 100*knn_accuracy(h_test, y_test, h, y, k=20), 100*float(k_shot_accuracy(h, y, h_test, y_test, 100, 3).mean()), seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with a folder of images for each class")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--per-class", type=int, default=1000, help="images of a class to train on")
    p.add_argument("--held-out", type=int, default=200, help="images of a class to test with")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    args = p.parse_args()
    data = class_folders(args.path, args.per_class, args.held_out)
    print(machine("torchvision", "kornia", "fastai", "timm"))
    print(f"{len(data[0]):,} images, {args.epochs} epochs, recipe 'cifar', timm/resnet10t, D=512; tested on {len(data[2]):,} held-out images\n")
    print(f"{'':22} {'seed':>4} {'kNN':>6} {'100 labels':>11} {'seconds':>8}", flush=True)
    results = {name: [] for name in args.only}
    for seed in range(args.seeds):
        for name in args.only:
            results[name].append(run(*data, seed, args, **CONTENDERS[name]))
            knn, linear, seconds = results[name][-1]
            print(f"{name:22} {seed:4} {knn:6.1f} {linear:11.1f} {seconds:8.0f}", flush=True)
    print(f"\n{'mean ± sd over seeds':22} {'kNN':>13} {'100 labels':>13} {'seconds':>8}")
    for name, rows in results.items():
        cells = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" if len(c) > 1 else f"{c[0]:.1f}" for c in list(zip(*rows))[:2]]
        print(f"{name:22} {cells[0]:>13} {cells[1]:>13} {statistics.median(r[2] for r in rows):8.0f}")


if __name__ == "__main__": main()
