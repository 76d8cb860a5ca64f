"""From JPEG files to two normalised views of every image on a CPU: images per second, ours and other loaders

Every contender reads with two worker processes that stay ahead. Ours decodes there, and the main process makes the
views of a whole batch; the others make their views image by image in the workers: lightly's data set and BYOL transform
on PIL images, albumentations on what OpenCV decodes, torchvision's v2 transforms on bytes that torchvision decodes. The
last two crop the full photograph and have the recipe of ours, which crops images kept at 1.14 times the views' size.
The contenders take turns: each starts its workers, gives a few batches, is timed for some seconds and stops before the
next one starts.

    python benchmarks/ingest.py                       # all of it, with made images
    python benchmarks/ingest.py /data/cifar10-train   # small images from this folder
    python benchmarks/ingest.py --only ingest --sizes 224
    python benchmarks/ingest.py --only index --files 1000000
    python benchmarks/ingest.py --small 512 --photos 64 --files 2000 --repeats 1 --seconds 1    # quick look
"""
import argparse
import gc
import io
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from _common import machine
from fastai.vision.core import imagenet_stats
from PIL import Image

from self_supervised_bt.augmentations import blur_sigma, get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.data import image_files, read_image, read_pixels
from self_supervised_bt.folders import bad_images, unlabelled_dls

KEPT_SIZE = {32: 32, 224: 256}   # pixels of the views: pixels at which images are kept
BATCH = {32: 256, 224: 64}       # pixels of the views: images per batch
AGAIN = {32: 10**6, 224: 10**5}  # files are gone through again and again, until there are so many
WARM_UP = 5                      # batches before the clock starts: more than two workers work ahead


def picture(rng, width, height):
    "Blocks of several sizes and some noise: a JPEG with about as many bytes per pixel as a photograph"
    total = rng.normal(0, 6, (height, width, 3))
    for blocks, weight in ((4, .5), (16, .25), (64, .25)):
        small = rng.integers(0, 256, (max(1, blocks*height//width), blocks, 3), dtype=np.uint8)
        total += weight*np.asarray(Image.fromarray(small).resize((width, height)), float)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def make_folder(root, size, n, given):
    "A folder of n JPEG files in ten subfolders: copies of given small images, or of 64 made ones"
    rng = np.random.default_rng(0)
    names = [root/str(i % 10)/f"{i:06}.jpg" for i in range(n)]
    for folder in {f.parent for f in names}: folder.mkdir(parents=True)
    if size == 32 and given:
        files = image_files(given)
        for i, f in enumerate(names): shutil.copy(files[i*len(files)//n], f)
        return
    shape = (500, 375) if size > 32 else (32, 32)
    different = []
    for _ in range(min(n, 64)):
        buffer = io.BytesIO()
        picture(rng, *shape).save(buffer, "jpeg", quality=90)
        different.append(buffer.getvalue())
    for i, f in enumerate(names): f.write_bytes(different[i % len(different)])


# Contenders: each takes files and the size of the views, and yields the number of images in a batch

def both_views(size):
    "What the callback does with a batch"
    return BarlowTwins(get_barlow_twins_aug_pipelines(size)).make_views


def ours(files, size, workers=2, views=True):
    files = list(files)*(AGAIN[size]//len(files))
    dl = unlabelled_dls(files, KEPT_SIZE[size], bs=BATCH[size], valid_pct=0, num_workers=workers, device="cpu").train
    make_views = both_views(size)
    with dl.giving_bytes():   # as in a fit
        for x, in dl:
            if views: make_views(x)
            yield len(x)


class Pairs(torch.utils.data.Dataset):
    "Two views of each file"
    def __init__(self, files, size, read, pair):
        self.files, self.n, self.read, self.pair = [str(f) for f in files], AGAIN[size], read, pair

    def __len__(self): return self.n
    def __getitem__(self, i): return self.pair(self.read(self.files[i % len(self.files)]))


def in_workers(dataset, size):
    batches = iter(torch.utils.data.DataLoader(dataset, BATCH[size], shuffle=True, drop_last=True, num_workers=2))
    try:
        for _ in batches: yield BATCH[size]
    finally: batches._shutdown_workers()


def lightly(files, size):
    from lightly.data import LightlyDataset
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    pair = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    dataset = LightlyDataset(str(files[0].parent.parent), transform=pair)
    return in_workers(torch.utils.data.ConcatDataset([dataset]*(AGAIN[size]//len(dataset))), size)


def albumentations(files, size):
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2
    cv2.setNumThreads(0)   # in the workers, too, which are forked from here
    one = A.Compose([
        A.RandomResizedCrop((size, size), (.2, 1.)), A.HorizontalFlip(),
        A.Rotate(30, border_mode=cv2.BORDER_REFLECT_101, p=.3),
        A.ColorJitter((.52, 1.48), (.52, 1.48), (.52, 1.48), (-.12, .12), p=.3), A.ToGray(p=.3),
        A.GaussianBlur(0, blur_sigma((4, 32), (size, size)), p=.3), A.Normalize(*imagenet_stats), ToTensorV2()])
    def read(file): return cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)
    def pair(x): return one(image=x)["image"], one(image=x)["image"]
    return in_workers(Pairs(files, size, read, pair), size)


def kernel(sigma): return 2*int(-(-3*sigma//1)) + 1


def torchvision(files, size):
    from torchvision.io import decode_image
    from torchvision.transforms import v2
    sigma = blur_sigma((4, 32), (size, size))
    one = v2.Compose([
        v2.RandomResizedCrop(size, (.2, 1.)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomRotation(30, v2.InterpolationMode.BILINEAR)], .3),
        v2.RandomApply([v2.ColorJitter(.48, .48, .48, .12)], .3), v2.RandomGrayscale(.3),
        v2.RandomApply([v2.GaussianBlur(kernel(sigma[1]), sigma)], .3),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet_stats)])
    return in_workers(Pairs(files, size, partial(decode_image, mode="RGB"), lambda x: (one(x), one(x))), size)


CONTENDERS = {
    "ours": ours,
    "ours, files to batches alone": partial(ours, views=False),
    "ours, no workers": partial(ours, workers=0),
    "torchvision v2, bytes": torchvision,
    "albumentations, OpenCV": albumentations,
    "lightly": lightly,
}


def children():
    "Process ids of the workers"
    return [int(p) for task in Path("/proc/self/task").iterdir() for p in (task/"children").read_text().split()]


def processor_seconds(pids):
    "That processes have used so far"
    def ticks(pid): return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return sum(map(ticks, pids))/os.sysconf("SC_CLK_TCK")


def timed(batches, seconds):
    "Images per second while the loader stays ahead; milliseconds per image of processor time, main process and workers"
    for _ in range(WARM_UP): next(batches)
    workers, n = children(), 0
    used = processor_seconds(["self"]), processor_seconds(workers)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds: n += next(batches)
    rate = n/(time.perf_counter() - start)
    used = processor_seconds(["self"]) - used[0], processor_seconds(workers) - used[1]
    batches.close()
    gc.collect()   # ends the workers
    return rate, *(1e3*u/n for u in used)


def rate(run):
    start = time.perf_counter()
    n = run()
    return n/(time.perf_counter() - start)


def in_turns(runs, repeats):
    "Rates of each, taken in turns after a warm-up"
    rates = {k: [] for k in runs}
    for turn in range(repeats + 1):
        for k, run in runs.items():
            r = rate(run)
            if turn: rates[k].append(r)
    return rates


def row(what, name, rates, against, after=""):
    ratio = statistics.median([b/a for a, b in zip(against, rates)])
    spread = f"({min(rates):.0f}-{max(rates):.0f})"
    print(f"{what:>12} | {name:32} | {statistics.median(rates):8.0f} {spread:>13} | {ratio:5.2f}{after}", flush=True)


def ingest(folders, a):
    print("images/s from files to two views, two workers: median (slowest-fastest) | times as fast as "
          f"{a.loaders[-1]} | ms of processor time per image: main process + workers")
    for size in a.sizes:
        files = image_files(folders[size])
        results = {k: [] for k in a.loaders}
        for _ in range(a.repeats):
            for k in a.loaders: results[k].append(timed(CONTENDERS[k](files, size), a.seconds))
        rates = {k: [r for r, *_ in v] for k, v in results.items()}
        for k, v in results.items():
            main, workers = (statistics.median(ms) for ms in list(zip(*v))[1:])
            row(f"{size} px", k, rates[k], rates[a.loaders[-1]], f" | {main:.2f} + {workers:.2f}")
        parts(files, size)


# Where the time goes

def ms(f, items, turns=5):
    "Milliseconds per item, median of turns"
    def turn():
        start = time.perf_counter()
        for item in items: f(item)
        return 1e3*(time.perf_counter() - start)/len(items)
    turn()
    return statistics.median(turn() for _ in range(turns))


def parts(files, size):
    "Milliseconds per image of each part by itself, and a floor"
    threads, kept, bs = torch.get_num_threads(), KEPT_SIZE[size], BATCH[size]
    torch.set_num_threads(1)
    files = [str(f) for f in files[:4*bs]]
    contents = [Path(f).read_bytes() for f in files]
    batch = torch.empty(bs, kept, kept, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for i in range(bs): batch[i] = read_pixels(files[i % len(files)], kept, 3, None)
    height, width, *_ = simplejpeg.decode_jpeg_header(contents[0])
    room = np.empty(3*height*width, dtype=np.uint8)
    def put(file): batch[0] = read_pixels(file, kept, 3, None)
    reading = ms(lambda f: Path(f).read_bytes(), files)
    decoding = ms(lambda b: simplejpeg.decode_jpeg(b, buffer=room), contents)
    whole = ms(put, files)
    make_views = both_views(size)
    one = ms(make_views, [batch]*4)/bs
    torch.set_num_threads(threads)
    several = ms(make_views, [batch]*4)/bs
    out = torch.empty(bs, 2, 3, size, size)
    copying = ms(out.copy_, [out.clone()]*4)/bs/2   # reads as much as it writes
    cores = os.cpu_count()
    floor = (reading + decoding)/cores + copying
    print(f"{'':12} | ms per image on one core: file {reading:.3f}, decoded {decoding:.2f}, with header, resize and "
          f"batch {whole:.2f}; both views {one:.2f}, {several:.2f} with {threads} threads")
    print(f"{'':12} | floor: file and decoder alone on {cores} cores, and the bytes of views at the rate of a copy: "
          f"{floor:.2f} ms, {1e3/floor:.0f} images/s\n", flush=True)


# Decoders, each to the centred square resized, in one thread

def square(x):
    h, w = x.shape[:2]
    m = min(h, w)
    return x[(h-m)//2:(h-m)//2+m, (w-m)//2:(w-m)//2+m]


def torch_resize(x, s):
    x = torch.from_numpy(square(x))[None].permute(0, 3, 1, 2)
    if x.shape[-1] == s: return x[0]
    return torch.nn.functional.interpolate(x, (s, s), mode="bilinear", antialias=True)[0]


def pillow(draft):
    def read(f, s):
        with Image.open(f) as im:
            if draft: im.draft("RGB", (s, s))
            (w, h), m = im.size, min(im.size)
            box = (w-m)/2, (h-m)/2, (w+m)/2, (h+m)/2
            return np.asarray(im.convert("RGB").resize((s, s), Image.Resampling.BILINEAR, box))
    return read


def torchvision_read(f, s):
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    return torch_resize(decode_jpeg(read_file(str(f)), ImageReadMode.RGB).permute(1, 2, 0).numpy(), s)


def simplejpeg_read(f, s, scaled):
    smallest = s if scaled else 0   # of the scales 1/8, 2/8, ... 7/8, 1
    return torch_resize(simplejpeg.decode_jpeg(Path(f).read_bytes(), min_height=smallest, min_width=smallest), s)


def opencv_read(f, s):
    import cv2
    x = square(cv2.imread(str(f)))[..., ::-1]
    return cv2.resize(x, (s, s), interpolation=cv2.INTER_AREA)


def decoders(folders, a):
    torch.set_num_threads(1)
    print("images/s decoded and resized in one thread, median (slowest-fastest) | times as fast as Pillow with draft")
    for size, keep in ((32, 32), (224, 64), (224, 256)):
        if size not in a.sizes: continue
        files = image_files(folders[size])[:512 if size == 32 else 64]
        every = {"read_image": read_image, "Pillow, draft": pillow(True), "Pillow": pillow(False),
                 "torchvision, torch's resize": torchvision_read,
                 "simplejpeg, torch's resize": partial(simplejpeg_read, scaled=False),
                 "simplejpeg scaled, torch's resize": partial(simplejpeg_read, scaled=True), "OpenCV": opencv_read}
        runs = {}
        for k, read in every.items():
            try: read(files[0], keep)
            except ImportError: continue   # not installed
            runs[k] = lambda read=read: len([read(f, keep) for f in files])
        rates = in_turns(runs, a.repeats)
        for k in rates: row(f"to {keep} px", k, rates[k], rates["Pillow, draft"])
        print()


# Many files

def used(pids):
    "MB that processes hold: proportional set size, in which shared pages count once"
    def pss(p):
        lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))/1024
    return sum(pss(p) for p in pids if os.path.exists(f"/proc/{p}"))


def make_many(folder, n):
    "A folder of n tiny files, one in a thousand of them empty"
    for i in range(0, n, 1000): (folder/f"{i//1000:04}").mkdir(parents=True)
    one = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(one, "jpeg")
    for i in range(n):
        f = folder/f"{i//1000:04}"/f"an_image_with_a_name_of_common_length_{i:07}.jpg"
        f.write_bytes(one.getvalue() if i % 1000 else b"")


def print_memory(dls):
    "MB of the workers early and late in an epoch, and of all processes"
    for n, _ in enumerate(dls.train):
        if n == 4: print(f" {used(children()):.0f}", end="", flush=True)
        if n == len(dls.train) - 6:
            workers = children()
            print(f"-{used(workers):.0f} ({used([os.getpid(), *workers]):.0f})", end="", flush=True)


def many(root, a):
    "Seconds to list, megabytes over epochs"
    folder = root/"many"
    make_many(folder, a.files)
    for names in ("in one block", "as Python text"):
        start = time.perf_counter()
        dls = unlabelled_dls(folder, 8, bs=a.batch, num_workers=2, device="cpu")
        seconds = time.perf_counter() - start
        if names == "as Python text": dls.train_ds.files = list(dls.train_ds.files)
        else: print(f"{a.files:,} tiny files: listed, split and ready in {seconds:.2f} s")
        print(f"names {names}; MB of the two workers early-late in every epoch (and of all processes):", end="")
        for _ in range(a.epochs): print_memory(dls)
        print(f"\n{len(bad_images(dls)):,} empty files found", flush=True)


def arguments():
    parts = ["ingest", "decoders", "index"]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", nargs="?", help="folder of small JPEG images, e.g. CIFAR-10's; made if not given")
    p.add_argument("--sizes", type=int, nargs="+", choices=list(BATCH), default=list(BATCH), help="of views")
    p.add_argument("--small", type=int, default=20_000, help="images of 32 px")
    p.add_argument("--photos", type=int, default=1024, help="images of 500x375 px")
    p.add_argument("--files", type=int, default=100_000, help="tiny files to index")
    p.add_argument("--batch", type=int, default=256, help="tiny files per batch")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch in the main process")
    p.add_argument("--loaders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="ratios to the last")
    p.add_argument("--seconds", type=float, default=3, help="that a turn of a loader is timed")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    p.add_argument("--epochs", type=int, default=5, help="over the tiny files")
    p.add_argument("--only", nargs="+", choices=parts, default=parts)
    return p.parse_args()


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    print(machine("torchvision", "pillow", "simplejpeg", "lightly", "albumentations", "opencv-python-headless"), "\n")
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folders = {32: root/"small", 224: root/"photos"}
        if {"ingest", "decoders"} & set(a.only):
            for size in a.sizes: make_folder(folders[size], size, {32: a.small, 224: a.photos}[size], a.path)
        if "ingest" in a.only: ingest(folders, a)
        if "decoders" in a.only: decoders(folders, a)
        if "index" in a.only: many(root, a)


if __name__ == "__main__": main()
