"""Views per second: ours with both backends, kornia, torchvision image by image, lightly in a DataLoader

All make the default recipe (crop, flip, rotation, jitter, grey, blur, normalisation) with every image drawing for
itself; lightly's transform is its own, of the same kind, on PIL images in two workers. The contenders take turns in one
process; a time is the median over the turns, with the fastest and slowest turn.

    python benchmarks/views.py                       # the grid; kornia takes minutes a turn at 224 pixels and batch 1024
    python benchmarks/views.py --size 32 --batch 256
    python benchmarks/views.py --device cuda
"""
import argparse
import statistics
import time

import torch
from _common import machine
from self_supervised_bt.augmentations import blur_sigma, get_barlow_twins_aug_pipelines, image_batch

SOURCE = {32: 32, 96: 128, 224: 256}   # pixels of the images that views of this size are made of


def ours(backend, size): return get_barlow_twins_aug_pipelines(size, backend=backend)[0]


def in_kornia(size):
    import kornia.augmentation as K
    from fastai.vision.core import imagenet_stats
    lo, hi = blur_sigma((4, 32), (size, size))
    mean, std = (torch.tensor(s) for s in imagenet_stats)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), (.2, 1.), cropping_mode="resample"), K.RandomHorizontalFlip(),
        K.RandomAffine(30, padding_mode="reflection", p=.3), K.ColorJitter(.48, .48, .48, .12, p=.3), K.RandomGrayscale(p=.3),
        K.RandomGaussianBlur((kernel(hi), kernel(hi)), (lo, hi), p=.3), K.Normalize(mean, std))


def kernel(sigma): return 2*int(-(-3*sigma//1)) + 1


def in_torchvision(size):
    from fastai.vision.core import imagenet_stats
    from torchvision.transforms import v2
    sigma = blur_sigma((4, 32), (size, size))
    one = v2.Compose([
        v2.RandomResizedCrop(size, (.2, 1.)), v2.RandomHorizontalFlip(), v2.RandomApply([v2.RandomRotation(30, v2.InterpolationMode.BILINEAR)], .3),
        v2.RandomApply([v2.ColorJitter(.48, .48, .48, .12)], .3), v2.RandomGrayscale(.3),
        v2.RandomApply([v2.GaussianBlur(kernel(sigma[1]), sigma)], .3), v2.Normalize(*imagenet_stats)])
    return lambda x: torch.stack([one(im) for im in x])


class PILImages(torch.utils.data.Dataset):
    "Uint8 images as PIL images, over and over, through lightly's transform: two views an item"
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
        self.batches, self.device = iter(torch.utils.data.DataLoader(PILImages((x*255).byte().cpu(), size), len(x), num_workers=2)), x.device
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
    return (time.perf_counter() - start)/calls/(2 if isinstance(v, list) else 1)   # seconds a view of the batch


def copy_rate(device):
    "Bytes a second, read and written, of a copy that need not fetch new memory"
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


def parts(x, size, turns):
    "Milliseconds of the fused view, step by step"
    tfm = ours("fused", size).fs[0]
    clock = {}

    def add(name, seconds): clock[name] = clock.get(name, 0) + seconds
    def timing(name, f):
        def run(*args, **kwargs):
            synchronise(x)
            start = time.perf_counter()
            out = f(*args, **kwargs)
            synchronise(x)
            add(name, time.perf_counter() - start)
            return out
        return run
    tfm.draw, tfm.crop.apply = timing("draw", tfm.draw), timing("crop", tfm.crop.apply)
    tfm.ready = timing("prepare", lambda out, ready=tfm.ready: list(ready(out)))
    for step in tfm.steps: step.apply = timing(step.name.removeprefix("Random").removeprefix("Color").removeprefix("Gaussian").lower(), step.apply)
    tfm.norm.normalise_ = timing("normalise", tfm.norm.normalise_)
    for k in range(turns + 1):
        if k == 1: clock.clear()   # the first is for warming up
        start = time.perf_counter()
        tfm.views(x)
        synchronise(x)
        add("all", time.perf_counter() - start)
    whole = clock.pop("all")
    clock["rest: index, new memory"] = whole - sum(clock.values())
    return ", ".join(f"{name} {1e3*s/turns:.3g}" for name, s in clock.items())


def cell(size, n, args, rate):
    g = torch.Generator().manual_seed(0)
    x = image_batch(torch.rand(n, 3, SOURCE[size], SOURCE[size], generator=g).to(args.device))
    plain = x.as_subclass(torch.Tensor)
    makers = {"fused": ours("fused", size), "ours, kornia": ours("kornia", size), "kornia": in_kornia(size).to(args.device),
              "torchvision": in_torchvision(size), "lightly, 2 workers": None}
    makers = {k: v for k, v in makers.items() if k in args.only}
    seconds = {k: [] for k in makers}
    def given(name): return x if name in ("fused", "ours, kornia") else plain
    for name, make in makers.items():   # lightly's come after the turns: its workers would be at work in the others'
        if make is not None:
            with torch.no_grad(): timed(make, given(name), 2)
    for _ in range(args.repeats):
        for name, make in makers.items():
            if make is None: continue
            time.sleep(.01)
            with torch.no_grad(): seconds[name].append(timed(make, given(name), args.calls))
    steps = parts(plain, size, args.repeats) if "fused" in makers else ""
    if "lightly, 2 workers" in makers:
        make = InWorkers(plain, size)
        seconds["lightly, 2 workers"] = [timed(make, plain, 2) for _ in range(args.repeats)]
        make.stop()
    texts = [f"{1e3*statistics.median(s):.3g} ({1e3*min(s):.3g}-{1e3*max(s):.3g})" if (s := seconds.get(k)) else "" for k in args.only]
    print(f"{size:4} {n:5} | " + " | ".join(f"{t:>20}" for t in texts), flush=True)
    if "fused" not in seconds: return
    fused = statistics.median(seconds["fused"])
    ratios = {k: statistics.median([a/b for a, b in zip(s, seconds["fused"])]) for k, s in seconds.items() if k != "fused"}
    floor = 4*(x.numel() + 3*n*size**2)/rate
    print(f"{'':10} | {n/fused:.0f} views/s; times as fast as " + ", ".join(f"{k} {r:.1f}" for k, r in ratios.items())
          + f"; {fused/floor:.1f} x the floor of {1e3*floor:.3g} ms")
    print(f"{'':10} | ms: {steps}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["fused", "ours, kornia", "kornia", "torchvision", "lightly, 2 workers"]
    p.add_argument("--size", type=int, nargs="+", default=[32, 96, 224], choices=list(SOURCE), help="of the views, pixels")
    p.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="images")
    p.add_argument("--repeats", type=int, default=7, help="turns of every contender")
    p.add_argument("--calls", type=int, default=2, help="views in a turn")
    p.add_argument("--only", nargs="+", choices=names, default=names, help="contenders")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    rate = copy_rate(args.device)
    print(machine("torchvision", "kornia", "lightly") + (f", {args.device}" if args.device != "cpu" else ""))
    print(f"milliseconds for one view of the batch, float32; {args.repeats} turns of {args.calls}: median (fastest-slowest)")
    print(f"floor = the bytes of images and views at the rate of a copy, {rate/1e9:.1f} GB/s\n")
    print("size batch | " + " | ".join(f"{k:>20}" for k in args.only), flush=True)
    for size in args.size:
        for n in args.batch: cell(size, n, args, rate)


if __name__ == "__main__": main()
