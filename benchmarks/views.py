"""Views per second: ours with both backends, kornia, torchvision image by image, lightly in a DataLoader

All make the default recipe (crop, flip, rotation, jitter, grey, blur, normalisation) with parameters per image;
lightly's transform is its own, of the same kind, on PIL images in two workers. The contenders take turns in one
process; a time is the median over the turns, with the fastest and slowest turn.

    python benchmarks/views.py                       # the grid; kornia: minutes per turn at 224 pixels and batch 1024
    python benchmarks/views.py --size 32 --batch 256
    python benchmarks/views.py --device cuda
"""
import argparse
import statistics
import time

import torch
from _common import machine

from self_supervised_bt.augmentations import blur_sigma, get_barlow_twins_aug_pipelines
from self_supervised_bt.fused import image_batch

SOURCE = {32: 32, 96: 128, 224: 256}   # pixels of the images that views of this size are made of
CONTENDERS = ["fused", "ours, kornia", "kornia", "torchvision", "lightly, 2 workers"]


def ours(backend, size): return get_barlow_twins_aug_pipelines(size, backend=backend)[0]


def in_kornia(size):
    import kornia.augmentation as K
    from fastai.vision.core import imagenet_stats
    lo, hi = blur_sigma((4, 32), (size, size))
    mean, std = (torch.tensor(s) for s in imagenet_stats)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), (.2, 1.), cropping_mode="resample"), K.RandomHorizontalFlip(),
        K.RandomAffine(30, padding_mode="reflection", p=.3), K.ColorJitter(.48, .48, .48, .12, p=.3),
        K.RandomGrayscale(p=.3), K.RandomGaussianBlur((kernel(hi), kernel(hi)), (lo, hi), p=.3), K.Normalize(mean, std))


def kernel(sigma): return 2*int(-(-3*sigma//1)) + 1


def in_torchvision(size):
    from fastai.vision.core import imagenet_stats
    from torchvision.transforms import v2
    sigma = blur_sigma((4, 32), (size, size))
    one = v2.Compose([
        v2.RandomResizedCrop(size, (.2, 1.)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomRotation(30, v2.InterpolationMode.BILINEAR)], .3),
        v2.RandomApply([v2.ColorJitter(.48, .48, .48, .12)], .3), v2.RandomGrayscale(.3),
        v2.RandomApply([v2.GaussianBlur(kernel(sigma[1]), sigma)], .3), v2.Normalize(*imagenet_stats)])
    return lambda x: torch.stack([one(im) for im in x])


class PILImages(torch.utils.data.Dataset):
    "Uint8 images as PIL images, over and over, through lightly's transform: two views per item"
    def __init__(self, x, size):
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        from PIL import Image
        self.images = [Image.fromarray(im.permute(1, 2, 0).numpy()) for im in x]
        self.transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))

    def __len__(self): return 10**9
    def __getitem__(self, i): return self.transform(self.images[i % len(self.images)])


class InWorkers:
    "Batches of lightly's two views, from two workers that work ahead"
    def __init__(self, x, size):
        images = PILImages((x*255).byte().cpu(), size)
        self.batches = iter(torch.utils.data.DataLoader(images, len(x), num_workers=2))
        self.device = x.device
        for _ in range(3): next(self.batches)

    def __call__(self, x): return [v.to(self.device) for v in next(self.batches)]
    def stop(self): self.batches._shutdown_workers()


def synchronise(x):
    if x.device.type == "cuda": torch.cuda.synchronize()


def timed(make, x, calls):
    make(x)   # what the others left in the caches is not counted
    synchronise(x)
    start = time.perf_counter()
    for _ in range(calls): v = make(x)
    synchronise(x)
    views = 2 if isinstance(v, list) else 1
    return (time.perf_counter() - start)/calls/views   # seconds per view of the batch


def copy_rate(device):
    "Bytes per second, read and written, of a copy that allocates no memory"
    a = torch.rand(2**24, device=device)
    b = torch.empty_like(a)
    rates = []
    for _ in range(15):
        synchronise(a)
        start = time.perf_counter()
        b.copy_(a)
        synchronise(a)
        rates.append(2*4*len(a)/(time.perf_counter() - start))
    return statistics.median(rates)


class Clock:
    "Seconds by name, of functions that are wrapped by `timing`"
    def __init__(self, x): self.x, self.seconds = x, {}

    def timing(self, name, f):
        def run(*args, **kwargs):
            synchronise(self.x)
            start = time.perf_counter()
            out = f(*args, **kwargs)
            synchronise(self.x)
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
            return out
        return run


def parts(x, size, turns):
    "Milliseconds of the fused view, step by step"
    tfm = ours("fused", size).fs[0]
    clock = Clock(x)
    tfm.sample = clock.timing("sample", tfm.sample)
    tfm.crop.apply = clock.timing("crop", tfm.crop.apply)
    tfm.prepare_steps = clock.timing("prepare", tfm.prepare_steps)
    for step in tfm.steps:
        name = step.name.removeprefix("Random").removeprefix("Color").removeprefix("Gaussian").lower()
        step.apply = clock.timing(name, step.apply)
    tfm.norm.normalise_ = clock.timing("normalise", tfm.norm.normalise_)
    make_views = clock.timing("all", tfm.make_views)
    for k in range(turns + 1):
        if k == 1: clock.seconds.clear()   # the first turn is for warming up
        make_views(x)
    seconds = clock.seconds
    whole = seconds.pop("all")
    seconds["rest: index, new memory"] = whole - sum(seconds.values())
    return ", ".join(f"{name} {1e3*s/turns:.3g}" for name, s in seconds.items())


def measure(x, size, args):
    "Seconds per view of every contender, turn by turn; and the fused view step by step"
    plain = x.as_subclass(torch.Tensor)
    makers = {"fused": ours("fused", size), "ours, kornia": ours("kornia", size),
              "kornia": in_kornia(size).to(args.device), "torchvision": in_torchvision(size)}
    makers = {k: v for k, v in makers.items() if k in args.only}
    inputs = {k: x if k in ("fused", "ours, kornia") else plain for k in makers}
    seconds = {k: [] for k in makers}
    with torch.no_grad():
        for name, make in makers.items(): timed(make, inputs[name], 2)
        for _ in range(args.repeats):
            for name, make in makers.items():
                time.sleep(.01)
                seconds[name].append(timed(make, inputs[name], args.calls))
    steps = parts(plain, size, args.repeats) if "fused" in makers else ""
    if "lightly, 2 workers" in args.only:   # after the turns: its workers would run during those of the others
        make = InWorkers(plain, size)
        seconds["lightly, 2 workers"] = [timed(make, plain, 2) for _ in range(args.repeats)]
        make.stop()
    return seconds, steps


def in_ms(seconds):
    if not seconds: return ""
    return f"{1e3*statistics.median(seconds):.3g} ({1e3*min(seconds):.3g}-{1e3*max(seconds):.3g})"


def cell(size, n, args, rate):
    "One row of the table: views of one size, of batches of n images"
    g = torch.Generator().manual_seed(0)
    x = image_batch(torch.rand(n, 3, SOURCE[size], SOURCE[size], generator=g).to(args.device))
    seconds, steps = measure(x, size, args)
    print(f"{size:4} {n:5} | " + " | ".join(f"{in_ms(seconds.get(k)):>20}" for k in args.only), flush=True)
    if "fused" not in seconds: return
    fused = statistics.median(seconds["fused"])
    others = {k: s for k, s in seconds.items() if k != "fused"}
    ratios = {k: statistics.median(a/b for a, b in zip(s, seconds["fused"])) for k, s in others.items()}
    times = ", ".join(f"{k} {r:.1f}" for k, r in ratios.items())
    floor = 4*(x.numel() + 3*n*size**2)/rate
    print(f"{'':10} | {n/fused:.0f} views/s; times as fast as {times}; "
          f"{fused/floor:.1f} x the floor of {1e3*floor:.3g} ms")
    print(f"{'':10} | ms: {steps}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list(SOURCE)
    p.add_argument("--size", type=int, nargs="+", default=sizes, choices=sizes, help="of the views, pixels")
    p.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="images")
    p.add_argument("--repeats", type=int, default=7, help="turns of every contender")
    p.add_argument("--calls", type=int, default=2, help="views in a turn")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="contenders")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    rate = copy_rate(args.device)
    device = "" if args.device == "cpu" else f", {args.device}"
    print(machine("torchvision", "kornia", "lightly") + device)
    print(f"milliseconds for one view of the batch, float32; {args.repeats} turns of {args.calls}: "
          "median (fastest-slowest)")
    print(f"floor = the bytes of images and views at the rate of a copy, {rate/1e9:.1f} GB/s\n")
    print("size batch | " + " | ".join(f"{k:>20}" for k in args.only), flush=True)
    for size in args.size:
        for n in args.batch: cell(size, n, args, rate)


if __name__ == "__main__": main()
