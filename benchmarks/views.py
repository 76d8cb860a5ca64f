"""Views per second, from bytes to normalised floats: ours, kornia, torchvision, albumentations, lightly

All make the default recipe (crop, flip, rotation, jitter, grey, blur, normalisation) with parameters per image;
lightly's transform is its own, of the same kind, on PIL images. The contenders of this process take turns; those with
two workers, which work ahead, run after them, one after the other, and end before the next begins. A time is the median
over the turns, with the fastest and slowest turn.

    python benchmarks/views.py                       # the grid; kornia: minutes per turn at 224 pixels and batch 1024
    python benchmarks/views.py --size 32 --batch 256
    python benchmarks/views.py --device cuda
"""
import argparse
import statistics
import time
from unittest.mock import patch

import torch
from _common import machine

from self_supervised_bt import fused
from self_supervised_bt.augmentations import blur_sigma, get_barlow_twins_aug_pipelines, views_of

SOURCE = {32: 32, 96: 128, 224: 256}   # pixels of the images that views of this size are made of
HERE = ["fused", "fused, both views", "fused, of floats", "ours, kornia", "kornia", "torchvision", "albumentations"]
IN_WORKERS = ["albumentations, 2 workers", "torchvision, 2 workers", "lightly, 2 workers"]


def ours(size, backend="fused"): return get_barlow_twins_aug_pipelines(size, backend=backend)
def kernel(sigma): return 2*int(-(-3*sigma//1)) + 1


def in_kornia(size, device):
    import kornia.augmentation as K
    from fastai.vision.core import imagenet_stats
    lo, hi = blur_sigma((4, 32), (size, size))
    mean, std = (torch.tensor(s) for s in imagenet_stats)
    tfm = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), (.2, 1.), cropping_mode="resample"), K.RandomHorizontalFlip(),
        K.RandomAffine(30, padding_mode="reflection", p=.3), K.ColorJitter(.48, .48, .48, .12, p=.3),
        K.RandomGrayscale(p=.3), K.RandomGaussianBlur((kernel(hi), kernel(hi)), (lo, hi), p=.3), K.Normalize(mean, std))
    tfm = tfm.to(device)
    return lambda x: tfm(x.float()/255)


def in_torchvision(size):
    "Of one image of bytes (3,H,W)"
    from fastai.vision.core import imagenet_stats
    from torchvision.transforms import v2
    sigma = blur_sigma((4, 32), (size, size))
    return v2.Compose([
        v2.RandomResizedCrop(size, (.2, 1.)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomRotation(30, v2.InterpolationMode.BILINEAR)], .3),
        v2.RandomApply([v2.ColorJitter(.48, .48, .48, .12)], .3), v2.RandomGrayscale(.3),
        v2.RandomApply([v2.GaussianBlur(kernel(sigma[1]), sigma)], .3),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet_stats)])


def in_albumentations(size):
    "Of one image of bytes (H,W,3), a NumPy array"
    import albumentations as A
    import cv2
    lo, hi = blur_sigma((4, 32), (size, size))
    factor = (1 - .48, 1 + .48)
    tfm = A.Compose([
        A.RandomResizedCrop((size, size), scale=(.2, 1.)), A.HorizontalFlip(p=.5),
        A.Rotate(limit=30, border_mode=cv2.BORDER_REFLECT_101, p=.3),
        A.ColorJitter(factor, factor, factor, (-.12, .12), p=.3), A.ToGray(p=.3),
        A.GaussianBlur(blur_limit=(kernel(hi), kernel(hi)), sigma_limit=(lo, hi), p=.3), A.Normalize(), A.ToTensorV2()])
    return lambda im: tfm(image=im)["image"]


def in_lightly(size):
    "Two views of one PIL image"
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    return BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))


class Images(torch.utils.data.Dataset):
    "The views of images by `tfm`, over and over"
    def __init__(self, images, tfm): self.images, self.tfm = images, tfm
    def __len__(self): return 10**9
    def __getitem__(self, i): return self.tfm(self.images[i % len(self.images)])


class InWorkers:
    "Batches of views from two workers that work ahead"
    def __init__(self, images, tfm, device):
        def one_thread(i):
            if "albumentations" in str(tfm): __import__("cv2").setNumThreads(0)
        loader = torch.utils.data.DataLoader(Images(images, tfm), len(images), num_workers=2, worker_init_fn=one_thread)
        self.batches, self.device = iter(loader), device
        for _ in range(5): next(self.batches)   # more than the workers can have ready

    def __call__(self, x):
        b = next(self.batches)
        return [v.to(self.device) for v in b] if isinstance(b, list) else b.to(self.device)

    def stop(self): self.batches._shutdown_workers()


def start_workers(name, x, size):
    if name.startswith("torchvision"): return InWorkers(list(x.cpu()), in_torchvision(size), x.device)
    arrays = [im.permute(1, 2, 0).contiguous().numpy() for im in x.cpu()]
    if name.startswith("albumentations"): return InWorkers(arrays, in_albumentations(size), x.device)
    from PIL import Image
    return InWorkers([Image.fromarray(im) for im in arrays], in_lightly(size), x.device)


def synchronise(x):
    if x.device.type == "cuda": torch.cuda.synchronize()


def timed(make, x, calls, views=1, warm=1):
    "Seconds per call; per view where a batch holds two"
    for _ in range(warm): make(x)   # what the others left in the caches is not counted
    synchronise(x)
    start = time.perf_counter()
    for _ in range(calls): make(x)
    synchronise(x)
    return (time.perf_counter() - start)/calls/views


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


PARTS = {"_floats": "floats*", "channels_last": "layout*",   # once for all views of a batch
         "_crop_by_grid": "crop", "_crop_by_weights": "crop", "_resize": "crop", "_affine": "affine",
         "_jitter": "jitter", "_grey": "grey", "_blur_by_matrices": "blur", "_blur_in_strips": "blur"}


def parts(x, size, turns):
    "Milliseconds of the fused view in one thread, step by step, without TorchScript, which hides the steps"
    tfm = ours(size)[0].fs[0]
    seconds = {}

    def timing(name, f):
        def run(*args, **kwargs):
            synchronise(x)
            start = time.perf_counter()
            out = f(*args, **kwargs)
            synchronise(x)
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
            return out
        return run
    tfm.sample = timing("sample", tfm.sample)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.multiple(fused, native=lambda f: f, **{f: timing(name, getattr(fused, f)) for f, name in PARTS.items()}):
        make = timing("all", lambda: fused.make_views([tfm], x))
        make()
        seconds.clear()   # the first turn is for warming up
        for _ in range(turns): make()
    torch.set_num_threads(threads)
    whole = seconds.pop("all")
    seconds["rest: parameters, normalisation"] = whole - sum(seconds.values())
    return ", ".join(f"{name} {1e3*s/turns:.3g}" for name, s in seconds.items())


def makers(x, size, only):
    "The contenders of this process: name -> (function, its input)"
    both, floats = ours(size), fused.image_batch(x)
    torchvision, albumentations = in_torchvision(size), in_albumentations(size) if "albumentations" in only else None
    arrays = [im.permute(1, 2, 0).contiguous().numpy() for im in x.cpu()]
    found = {
        "fused": (both[0], x), "fused, both views": (lambda x: views_of(both, x)[0], x),
        "fused, of floats": (both[0], floats),
        "ours, kornia": (ours(size, "kornia")[0], x), "kornia": (in_kornia(size, x.device), x),
        "torchvision": (lambda x: torch.stack([torchvision(im) for im in x]), x),
        "albumentations": (lambda x: torch.stack([albumentations(im) for im in arrays]).to(x.device), x)}
    return {k: v for k, v in found.items() if k in only}


def measure(x, size, args):
    "Seconds of every contender, turn by turn; and the fused view step by step"
    here = makers(x, size, args.only)
    seconds = {k: [] for k in here}
    with torch.no_grad():
        for make, given in here.values(): timed(make, given, 2)
        for _ in range(args.repeats):
            for name, (make, given) in here.items():
                time.sleep(.01)
                seconds[name].append(timed(make, given, args.calls))
    steps = parts(x, size, args.repeats) if "fused" in here else ""
    for name in [k for k in IN_WORKERS if k in args.only]:
        make = start_workers(name, x, size)
        views = 2 if name.startswith("lightly") else 1
        seconds[name] = [timed(make, x, args.worker_calls, views, 0) for _ in range(args.repeats)]
        make.stop()
    return seconds, steps


def in_ms(seconds):
    if not seconds: return ""
    return f"{1e3*statistics.median(seconds):.3g} ({1e3*min(seconds):.3g}-{1e3*max(seconds):.3g})"


def shared(one, both):
    "What both views of a batch take together, and what follows for the part that they share, turn by turn"
    times = statistics.median(b/a for a, b in zip(one, both))
    ms = 1e3*statistics.median(2*a - b for a, b in zip(one, both))
    return (f"both views take {times:.2f} times as long as one: {ms:.2g} ms are shared, {1e2*(2 - times):.0f} %; "
            "for 1.80 times it would have to be 20 %")


def cell(size, n, args, rate):
    "The lines of views of one size, of batches of n images"
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, SOURCE[size]//2, SOURCE[size]//2, generator=g), SOURCE[size])
    x = (x*255).byte().to(args.device)
    seconds, steps = measure(x, size, args)
    middle = {k: statistics.median(s) for k, s in seconds.items()}
    print(f"{size} of {SOURCE[size]} pixels, {n} images", flush=True)
    for k, s in seconds.items():
        ratio = f"{middle[k]/middle['fused']:6.2f}" if "fused" in middle else ""
        print(f"    {k:26} {in_ms(s):>22} {ratio}", flush=True)
    if "fused" not in middle: return
    floor = (x.numel() + 4*3*n*size**2)/rate
    print(f"    {n/middle['fused']:.0f} views/s; {middle['fused']/floor:.1f} x the floor of {1e3*floor:.3g} ms")
    if "fused, both views" in middle: print(f"    {shared(seconds['fused'], seconds['fused, both views'])}")
    print(f"    in one thread, ms: {steps} (* once for both views)\n", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list(SOURCE)
    contenders = HERE + IN_WORKERS
    p.add_argument("--size", type=int, nargs="+", default=sizes, choices=sizes, help="of the views, pixels")
    p.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="images")
    p.add_argument("--repeats", type=int, default=7, help="turns of every contender")
    p.add_argument("--calls", type=int, default=2, help="batches in a turn")
    p.add_argument("--worker-calls", type=int, default=4, help="batches in a turn of contenders with workers")
    p.add_argument("--only", nargs="+", choices=contenders, default=contenders, help="contenders")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    rate = copy_rate(args.device)
    device = "" if args.device == "cpu" else f", {args.device}"
    print(machine("torchvision", "kornia", "albumentations", "opencv-python-headless", "lightly") + device)
    print(f"milliseconds for one view of the batch (both views: for the two), from bytes to normalised float32; "
          f"{args.repeats} turns of {args.calls}: median (fastest-slowest), and times as long as fused")
    print(f"floor = the bytes of images and views at the rate of a copy, {rate/1e9:.1f} GB/s\n")
    for size in args.size:
        for n in args.batch: cell(size, n, args, rate)


if __name__ == "__main__": main()
