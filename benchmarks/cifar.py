"""CIFAR-10 on a CPU: how good an encoder do 10,000 images without labels and 460 seconds of training give? And what helped?

    python benchmarks/cifar.py path/to/cifar10-train                  # the settings, one seed: 9 minutes on 2 cores
    python benchmarks/cifar.py path/to/cifar10-train --seeds 3        # with a spread
    python benchmarks/cifar.py path/to/cifar10-train --seconds 150 --without all    # each setting taken back, at equal seconds

Trains on the first 1,000 images of every class by file name, their labels unseen; tests on the last 500 of every class by a
weighted vote of the 20 nearest of the 10,000 (temperature 0.1), and once more with all images resized to 40 pixels first; the
linear probe is on those. The number of epochs is what fits into the seconds, from the
time of some steps; that time is not counted, nor is the evaluation. A setting that makes steps dearer so gets fewer of them.
"""
import argparse
import statistics
import time

from _common import class_folders, machine
from fastai.callback.channelslast import ChannelsLast
from fastai.torch_core import set_seed
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.training import Autocast

SETTINGS = dict(arch="timm/resnet10t", small_stem="no pool", channels=(32, 64, 128, 256), stem_width=16, size=24, width=512, lmb=.02, lr=5e-3, bs=256,
                bf16=True, channels_last=True)
LOOK = 40    # pixels at which the encoder is asked a second time
TAKEN_BACK = {  # what differs from SETTINGS
    "bfloat16": dict(bf16=False), "channels last": dict(channels_last=False), "lmb=0.02 (0.005)": dict(lmb=5e-3), "views of 24 px (32)": dict(size=32),
    "dropping the pool": dict(small_stem=False), "narrow layers": dict(channels=(64, 128, 256, 512), stem_width=32)}


def learner(x, seed, arch, small_stem, channels, stem_width, size, width, lmb, lr, bs, bf16, channels_last):
    set_seed(seed)
    encoder = create_encoder(arch, pretrained=False, small_stem=small_stem, channels=channels, stem_width=stem_width)
    cbs = [Autocast()]*bf16 + [ChannelsLast()]*channels_last
    return bt_learner(tensor_dls(x, bs=bs, valid_pct=0, device="cpu"), encoder, size, get_barlow_twins_aug_pipelines(size, "cifar"),
                      lmb=lmb, hidden_size=width, projection_size=width, cbs=cbs)


def fit(learn, epochs, lr):
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return time.perf_counter() - start


def run(data, seed, seconds, **settings):
    "Epochs that fit, seconds of training, and percent: kNN before training, kNN, kNN on larger images, linear probe on them"
    x, y, x_test, y_test = data
    probe = learner(x[:settings["bs"]*6], seed, **settings)
    fit(probe, 1, 1e-3)                                              # threads and memory are there
    step = min(fit(probe, 1, 1e-3) for _ in range(2))/6
    epochs = max(1, int(seconds/(step*(len(x)//settings["bs"]))))
    learn = learner(x, seed, **settings)
    reps = lambda size=None: (encode(learn, x_test, size)[0], y_test, encode(learn, x, size)[0], y)
    before = 100*knn_accuracy(*reps(), k=20)
    took = fit(learn, epochs, settings["lr"])
    h_test, _, h, _ = larger = reps(LOOK)
    return epochs, took, before, 100*knn_accuracy(*reps(), k=20), 100*knn_accuracy(*larger, k=20), 100*linear_probe(h, y, h_test, y_test).top1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", help="folder with a folder of images for each class")
    p.add_argument("--seconds", type=float, default=440, help="of training that the epochs should fit into")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--without", nargs="+", choices=[*TAKEN_BACK, "all"], default=[], help="settings to take back, one at a time")
    a = p.parse_args()
    data = class_folders(a.path, 1000, 500)
    weights = sum(w.numel() for w in learner(data[0][:600], 0, **SETTINGS).model.encoder.parameters())
    print(machine("fastai", "timm"))
    print(f"{len(data[0]):,} images to train on, {len(data[2]):,} to test with; encoder of {weights/1e6:.1f} M weights; {a.seconds:.0f} s of training")
    print(SETTINGS, "\n", flush=True)
    print(f"{'':32} {'seed':>4} {'epochs':>6} {'seconds':>8} {'kNN before':>11} {'kNN':>6} {f'at {LOOK} px':>9} {'linear':>7}", flush=True)
    wanted = {"all settings": {}, **{f"without {n}": TAKEN_BACK[n] for n in (TAKEN_BACK if "all" in a.without else a.without)}}
    for name, change in wanted.items():
        rows = []
        for seed in range(a.seeds):
            rows.append(run(data, seed, a.seconds, **{**SETTINGS, **change}))
            print(f"{name:32} {seed:4} {rows[-1][0]:6} {rows[-1][1]:8.0f} {rows[-1][2]:11.1f} {rows[-1][3]:6.1f} {rows[-1][4]:9.1f} {rows[-1][5]:7.1f}", flush=True)
        if a.seeds > 1:
            print(f"{'mean ± sd over seeds':32} " + ", ".join(f"{what} {statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for what, c in
                  zip(("kNN", f"at {LOOK} px", "linear"), list(zip(*rows))[3:])), flush=True)


if __name__ == "__main__": main()
