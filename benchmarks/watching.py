"""The cost of Diagnostics and OnlineEvaluation, as a share of the training time

    python benchmarks/watching.py                 # resnet10t, 32 px, batches of 256, D=1024: 3 minutes on 2 cores

Times the callbacks inside a fit, event by event, and the whole fit; on a GPU it waits for the device at both ends.
As a check, fits with and without the callbacks alternate.
"""
import argparse
import time

import torch
from _common import machine, median_and_range, wait
from fastai.torch_core import set_seed

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.evaluation import OnlineEvaluation
from self_supervised_bt.recipes import bt_learner


def timed(cls):
    "The callback, adding up the time it takes"
    class Timed(cls):
        spent = 0.
        def __call__(self, event):
            start = time.perf_counter()
            super().__call__(event)
            self.spent += time.perf_counter() - start
    Timed.__name__ = cls.__name__
    return Timed


def fit(a, cbs, device):
    "Seconds of a fit"
    set_seed(0)
    x = torch.randint(0, 256, (a.images, 3, 32, 32), dtype=torch.uint8)
    dls = tensor_dls(x, bs=a.bs, valid_pct=0, device=device)
    augs = get_barlow_twins_aug_pipelines(32, "cifar")
    learn = bt_learner(dls, "timm/resnet10t", 32, augs, small_stem=False, hidden_size=a.width, projection_size=a.width,
                       cbs=cbs)
    learn.model.to(device)
    wait(device)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs, 1e-3)
    wait(device)
    return time.perf_counter() - start


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = dict(images=4096, bs=256, width=1024, epochs=2, turns=5, subset=400)
    for name, value in defaults.items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cpu")
    return p.parse_args()


def labelled_images(n):
    "Noise, with labels"
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(n) % 10


def main():
    a = arguments()
    device, steps = torch.device(a.device), a.epochs*(a.images//a.bs)
    labelled = labelled_images(a.subset)
    print(machine("fastai", "timm"))
    print(f"{a.images:,} images of 32 px, batches of {a.bs}, resnet10t, D={a.width}, {a.epochs} epochs per fit, "
          f"{a.turns} turns; online evaluation of {a.subset} images every epoch\n")
    shares, ratios = {"Diagnostics()": [], "OnlineEvaluation(...)": []}, []
    fit(a, [], device)
    for _ in range(a.turns):
        plain = fit(a, [], device)
        cbs = [timed(Diagnostics)(), timed(OnlineEvaluation)(labelled)]
        total = fit(a, cbs, device)
        ratios.append(total/plain)
        spent = [cbs[0].spent, sum(cbs[1].seconds)]
        for name, s in zip(shares, spent): shares[name].append(s/(total - sum(spent)))
        print(f"  {plain/steps*1000:6.0f} ms per step; Diagnostics {1000*spent[0]/steps:.2f} ms per step, "
              f"online evaluation {1000*spent[1]/a.epochs:.0f} ms per epoch", flush=True)
    print(f"\n{'':24} {'share of the time without it':>30}")
    for name, s in shares.items(): print(f"{name:24} {median_and_range(s, '.2%'):>30}")
    print(f"{'fits with both/without':24} {median_and_range(ratios, '.3f'):>30}")


if __name__ == "__main__": main()
