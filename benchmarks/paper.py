"""The paper recipe's training step: images per second against the bare network, and peak memory by batch size

    python benchmarks/paper.py                         # on a GPU: resnet50, 224 px, bfloat16, batches of 64 to 512
    python benchmarks/paper.py --batches 256 512 1024 --turns 9
    python benchmarks/paper.py --device cpu --arch timm/test_resnet --size 64 --width 256 --batches 16 --steps 3

Ours is Learner.fit by the recipe: views of uint8 images on the device, network, loss, LARS with its schedule. The bare
network is forward, backward and the same LARS on views that are made beforehand, with the mean square of z as loss.
Peak memory is what PyTorch allocated in a turn, images included, on a GPU only. The first batch that does not fit ends
the list.
"""
import argparse
import gc
import statistics
import time

import torch
from _common import machine, median_and_range

from self_supervised_bt.data import tensor_dls
from self_supervised_bt.recipes import bt_learner, get_recipe
from self_supervised_bt.training import LARS, Autocast, split_norm_bias


def learner(a, batch):
    torch.manual_seed(0)
    changes = dict(arch=a.arch, size=a.size, hidden_size=a.width, projection_size=a.width)
    given = {k: v for k, v in changes.items() if v}
    recipe = get_recipe("paper", bs=batch, epochs=1, warmup=.5, **given)
    side = round(recipe.size*4/3)
    x = torch.randint(0, 256, (batch*a.steps, 3, side, side), dtype=torch.uint8)
    return bt_learner(tensor_dls(x, bs=batch, valid_pct=0, device=a.device), recipe=recipe, cbs=[Autocast()])


class Ours:
    def __init__(self, a, batch): self.learn = learner(a, batch)
    def run(self):
        "An epoch of `steps` batches"
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit_recipe()


class Bare:
    def __init__(self, a, batch):
        learn = learner(a, batch)
        self.steps, self.device = a.steps, torch.device(a.device)
        self.model = learn.model.to(a.device).train()
        self.opt = LARS(split_norm_bias(self.model), lr=[.1, .01], wd=1e-6)
        self.views = torch.rand(2*batch, 3, learn.recipe.size, learn.recipe.size, device=a.device)
    def run(self):
        for _ in range(self.steps):
            with torch.autocast(self.device.type, torch.bfloat16): z = self.model(self.views)
            z.float().square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()


def turn(contender, a, batch):
    "Images per second, and the peak memory in GB"
    cuda = a.device != "cpu"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    contender.run()
    if cuda: torch.cuda.synchronize()
    rate = batch*a.steps/(time.perf_counter() - start)
    return rate, torch.cuda.max_memory_allocated()/1e9 if cuda else float("nan")


def measure(kind, a, batch):
    "Rates and peak memory of one contender, alone in memory"
    contender = kind(a, batch)
    turn(contender, a, batch)
    rates, peaks = zip(*(turn(contender, a, batch) for _ in range(a.turns)))
    del contender
    gc.collect()
    if a.device != "cpu": torch.cuda.empty_cache()
    return rates, max(peaks)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    p.add_argument("--steps", type=int, default=10, help="per turn")
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--device", default="cuda")
    p.add_argument("--arch", help="instead of the recipe's resnet50")
    p.add_argument("--size", type=int, help="of the views, instead of 224")
    p.add_argument("--width", type=int, help="of projector and embedding, instead of 8192")
    return p.parse_args()


def shown(rates): return median_and_range(rates, ".0f")


def main():
    a = arguments()
    cuda = a.device != "cpu"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: --device cpu with small settings tries the script")
    print(machine("fastai", "timm") + (f", {torch.cuda.get_device_name()}" if cuda else ""))
    print(f"{a.turns} turns of {a.steps} steps: median (slowest-fastest) images per second\n")
    print(f"{'batch':>6} {'ours':>20} {'bare network':>20} {'ratio':>6} {'peak, GB':>9} {'bare, GB':>9}")
    for batch in a.batches:
        try:
            ours, peak = measure(Ours, a, batch)
            bare, bare_peak = measure(Bare, a, batch)
        except torch.OutOfMemoryError:
            print(f"{batch:6} does not fit")
            break
        ratio = statistics.median(ours)/statistics.median(bare)
        print(f"{batch:6} {shown(ours):>20} {shown(bare):>20} {ratio:6.3f} {peak:9.1f} {bare_peak:9.1f}", flush=True)


if __name__ == "__main__": main()
