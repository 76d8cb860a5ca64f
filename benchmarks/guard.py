"""What `NonFiniteGuard` costs: its share of a training step

    python benchmarks/guard.py          # resnet10t, 32 px, batches of 256, D=1024: two minutes on 2 cores
    python benchmarks/guard.py --device cuda --bs 1024

Times what the callback does inside a fit, event by event. On a GPU this includes the wait for the loss and the
gradients, which without it comes in fastai's Recorder: the ratio of whole fits, which take turns, is the one to read.
"""
import argparse
import time
from collections import Counter

import torch
from _common import machine, median_and_range, wait
from fastai.torch_core import set_seed

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.guard import NonFiniteGuard
from self_supervised_bt.recipes import bt_learner

DEFAULTS = dict(images=2048, bs=256, size=32, width=1024, epochs=2, turns=5)


class Timed(NonFiniteGuard):
    "The callback, adding up the time it takes, event by event"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spent = Counter()
    def __call__(self, event):
        start = time.perf_counter()
        super().__call__(event)
        self.spent[event] += time.perf_counter() - start


def fit(a, cbs, device):
    "Seconds of a fit, and the most memory it took in MiB (GPU)"
    set_seed(0)
    x = torch.randint(0, 256, (a.images, 3, a.size, a.size), dtype=torch.uint8)
    dls = tensor_dls(x, bs=a.bs, valid_pct=0, device=device)
    augs = get_barlow_twins_aug_pipelines(a.size, "cifar")
    sizes = dict(hidden_size=a.width, projection_size=a.width)
    learn = bt_learner(dls, a.arch, a.size, augs, small_stem=False, cbs=cbs, **sizes)
    learn.model.to(device)
    wait(device)
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs, 1e-3)
    wait(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated()/2**20 if device.type == "cuda" else 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--arch", default="timm/resnet10t")
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    device, steps = torch.device(a.device), a.epochs*(a.images//a.bs)
    print(machine("fastai", "timm"))
    print(f"{a.images:,} images of {a.size} px, batches of {a.bs}, {a.arch}, D={a.width}, "
          f"{a.epochs} epochs per fit, {a.turns} turns\n")
    shares, ratios, events = [], [], Counter()
    fit(a, [], device)
    for _ in range(a.turns):
        plain, low = fit(a, [], device)
        cb = Timed()
        guarded, high = fit(a, [cb], device)
        spent = sum(cb.spent.values())
        shares.append(spent/(guarded - spent))
        ratios.append(guarded/plain)
        events.update(cb.spent)
        memory = f"; memory {low:,.0f} -> {high:,.0f} MiB" if high else ""
        print(f"  {1000*plain/steps:6.1f} ms per step without, the guard {1000*spent/steps:.2f} ms{memory}", flush=True)
    per_event = ", ".join(f"{e} {1000*s/steps/a.turns:.3f}" for e, s in events.most_common(6))
    print(f"\nms per step by event: {per_event}")
    print(f"{'share of the time without it':30} {median_and_range(shares, '.2%'):>24}")
    print(f"{'fits with / without':30} {median_and_range(ratios, '.3f'):>24}")


if __name__ == "__main__": main()
