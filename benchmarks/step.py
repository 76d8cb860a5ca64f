"""Images per second of whole training steps: ours through Learner.fit, lightly's recipe, and the bare network

One network for all (timm resnet18 at 32 pixels, projector 2048-2048-2048) and one optimizer, torch's Adam; more lines
for ours with fastai's Adam, a Learner's default, and with `MatmulConvs`, which `bt_learner` adds. The floor is forward,
backward and optimizer step on given views, with the mean square of z as loss. Contenders take turns.

    python benchmarks/step.py                  # three minutes on 2 cores
    python benchmarks/step.py --only ours      # one
    python benchmarks/step.py --device cuda
"""
import argparse
import statistics
import time
from functools import partial

import torch
from _common import machine
from fastai.callback.training import ShortEpochCallback
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from PIL import Image
from views import Images, in_lightly

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.training import MatmulConvs


def network(device):
    torch.manual_seed(0)
    encoder = create_encoder("timm/resnet18", pretrained=False, pool_type="avg")
    return create_barlow_twins_model(encoder, 2048, 2048).to(device)


class Floor:
    "The bare network: views are given, and the loss costs nothing"
    def __init__(self, x, batch, device):
        self.model, self.batch = network(device), batch
        self.opt = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.views = torch.rand(2*batch, 3, 32, 32, device=device)

    def step(self, views, loss):
        self.opt.zero_grad()
        loss(self.model(views)).backward()
        self.opt.step()

    def start(self): self.run(1)

    def run(self, steps):
        for _ in range(steps): self.step(self.views, lambda z: z.square().mean())
        return steps*self.batch


class InFastai:
    "Learner.fit, an epoch of `steps` batches from images in memory"
    def __init__(self, x, batch, device, opt=partial(OptimWrapper, opt=torch.optim.Adam), cbs=(), **kwargs):
        dls = tensor_dls(x, bs=batch, valid_pct=0, device=device)
        cb = BarlowTwins(get_barlow_twins_aug_pipelines(32, **kwargs))
        self.learn = Learner(dls, network(device), opt_func=opt, lr=1e-3, cbs=[cb, *cbs])
        self.batch = batch

    def fit(self, *cbs):
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, cbs=cbs)

    def start(self): self.fit(ShortEpochCallback(0))   # one step

    def run(self, steps):
        self.fit()
        return len(self.learn.dls.train)*self.batch


class InLightly(Floor):
    "The usual loop around lightly's loss, its transform in two workers that prefetch; they stop between turns"
    def __init__(self, x, batch, device):
        from lightly.loss import BarlowTwinsLoss
        super().__init__(x, batch, device)
        self.loss = BarlowTwinsLoss()
        self.data = Images([Image.fromarray(im.permute(1, 2, 0).numpy()) for im in x], in_lightly(32))
        self.device = device

    def start(self):
        self.batches = iter(torch.utils.data.DataLoader(self.data, self.batch, num_workers=2))
        for _ in range(2): self.one()

    def one(self):
        views = torch.cat([v.to(self.device) for v in next(self.batches)])
        self.step(views, lambda z: self.loss(*z.chunk(2)))

    def run(self, steps):
        for _ in range(steps): self.one()
        return steps*self.batch

    def stop(self): self.batches._shutdown_workers()


FLOOR = "bare network"
CONTENDERS = {
    FLOOR: Floor, "ours": InFastai, "ours, MatmulConvs": partial(InFastai, cbs=[MatmulConvs()]),
    "ours, kornia backend": partial(InFastai, backend="kornia"),
    "ours, fastai's Adam": partial(InFastai, opt=Adam), "lightly, 2 workers": InLightly}


def turn(contender, steps, device):
    "Images per second"
    contender.start()   # a step or two that are not timed
    if device != "cpu": torch.cuda.synchronize()
    start = time.perf_counter()
    images = contender.run(steps)
    if device != "cpu": torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if hasattr(contender, "stop"): contender.stop()
    return images/seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--steps", type=int, default=6, help="in a turn")
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="beside the bare network")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    x = torch.randint(0, 256, (args.batch*args.steps, 3, 32, 32), dtype=torch.uint8)
    setting = (x, args.batch, args.device)
    contenders = {name: make(*setting) for name, make in CONTENDERS.items() if name in (FLOOR, *args.only)}
    rates = {name: [] for name in contenders}
    for _ in range(args.turns):
        for name, c in contenders.items(): rates[name].append(turn(c, args.steps, args.device))
    report(args, rates)


def report(args, rates):
    "Images per second, and the share of the bare network's"
    device = f", {args.device}" if args.device != "cpu" else ""
    print(machine("fastai", "timm", "lightly") + device)
    print(f"timm resnet18, 32 px, batch {args.batch}, projector 2048-2048-2048; "
          f"{args.turns} turns of {args.steps} steps: median (slowest-fastest)\n")
    print(f"{'':22}{'images/s':>18}   of the bare network's, turn by turn")
    for name, r in rates.items():
        share = statistics.median(a/b for a, b in zip(r, rates[FLOOR]))
        speed = f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})"
        print(f"{name:22}{speed:>18}   {share:.3f}")


if __name__ == "__main__": main()
