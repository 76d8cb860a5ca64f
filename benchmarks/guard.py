"""What the guard against nan costs: its share of a training step

    python benchmarks/guard.py                          # resnet10t, 32 px, batches of 256, D=1024: two minutes on 2 cores
    python benchmarks/guard.py --device cuda --bs 1024

Times what the callback does inside a fit, event by event (on a GPU that is the host's time alone: the device is not waited for).
As a check on that, whole fits with and without it take turns; there the device is waited for at both ends. --later takes the CPU for
an accelerator: weights and optimizer are copied in each step.
"""
import argparse
import statistics
import time
from collections import Counter

import torch
from _common import machine
from fastai.torch_core import set_seed
from self_supervised_bt import barlow_twins, guard
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.recipes import bt_learner


def wait(device):
    if device.type == "cuda": torch.cuda.synchronize()


class Timed(guard.NonFiniteGuard):
    "The callback, adding up the time it takes, event by event"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spent = Counter()
    def __call__(self, event):
        start = time.perf_counter()
        super().__call__(event)
        self.spent[event] += time.perf_counter() - start


def fit(a, cbs, device):
    "Seconds of a fit, and the most memory it took (GPU)"
    set_seed(0)
    x = torch.randint(0, 256, (a.images, 3, a.size, a.size), dtype=torch.uint8)
    learn = bt_learner(tensor_dls(x, bs=a.bs, valid_pct=0, device=device), a.arch, a.size, get_barlow_twins_aug_pipelines(a.size, "cifar"), small_stem=False,
                       hidden_size=a.width, projection_size=a.width, cbs=cbs)
    learn.model.to(device)
    wait(device)
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs, 1e-3)
    wait(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()/2**20 if device.type == "cuda" else 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(images=2048, bs=256, size=32, width=1024, epochs=2, turns=5).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--arch", default="timm/resnet10t")
    p.add_argument("--device", default="cpu")
    p.add_argument("--later", action="store_true", help="take the CPU for an accelerator")
    a = p.parse_args()
    device, steps = torch.device(a.device), a.epochs*(a.images//a.bs)
    if a.later: guard.at_once = barlow_twins.at_once = lambda loss: False
    print(machine("fastai", "timm"))
    print(f"{a.images:,} images of {a.size} px, batches of {a.bs}, {a.arch}, D={a.width}, {a.epochs} epochs a fit, {a.turns} turns"
          f"{', the CPU taken for an accelerator' if a.later else ''}\n")
    shares, ratios, events = [], [], Counter()
    fit(a, [], device)
    for _ in range(a.turns):
        (plain, low), cb = fit(a, [], device), Timed()
        with_it, high = fit(a, [cb], device)
        spent = sum(cb.spent.values())
        shares.append(spent/(with_it - spent))
        ratios.append(with_it/plain)
        events.update(cb.spent)
        memory = f"; memory {low:,.0f} -> {high:,.0f} MiB" if high else ""
        print(f"  {1000*plain/steps:6.1f} ms a step without, the guard {1000*spent/steps:.2f} ms{memory}", flush=True)
    print("\nms a step by event: " + ", ".join(f"{e} {1000*s/steps/a.turns:.3f}" for e, s in events.most_common(6)))
    print(f"{'share of the time without it':30} {f'{statistics.median(shares):.2%} ({min(shares):.2%}-{max(shares):.2%})':>24}")
    print(f"{'fits with / without':30} {f'{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})':>24}")


if __name__ == "__main__": main()
