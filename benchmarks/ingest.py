"""From a folder of JPEG files to two views of every image on 2 cores: images per second, ours and lightly's DataLoader

Ours reads and decodes in two worker processes and makes the views of a whole batch at once; lightly's makes them image
by image in its two workers. Small images come from a folder or are made of noise and blocks. Photographs are always
made, 500x375 pixels; their views are crops of images kept at 1.14 times the views' size. The contenders take turns.

    python benchmarks/ingest.py                       # all of it, with made images
    python benchmarks/ingest.py /data/cifar10-train   # small images from this folder
    python benchmarks/ingest.py --only index --files 1000000
    python benchmarks/ingest.py --small 512 --photos 64 --batch 64 --files 2000 --repeats 1    # quick look
"""
import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import machine
from PIL import Image

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import image_files, read_image
from self_supervised_bt.folders import bad_images, unlabelled_dls

KEPT_SIZE = {32: 32, 256: 292}   # pixels of the views: pixels at which images are kept


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


class Ours:
    def __init__(self, folder, size, bs, workers=2, views=True):
        self.dl = unlabelled_dls(folder, KEPT_SIZE[size], bs=bs, valid_pct=0, num_workers=workers, device="cpu").train
        self.augs = get_barlow_twins_aug_pipelines(size) if views else []

    def epoch(self):
        n = 0
        for x, in self.dl:
            for aug in self.augs: aug(x)
            n += len(x)
        return n


class Lightly:
    def __init__(self, folder, size, bs):
        from lightly.data import LightlyDataset
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
        views = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
        dataset = LightlyDataset(str(folder), transform=views)
        self.dl = torch.utils.data.DataLoader(dataset, bs, shuffle=True, drop_last=True, num_workers=2)

    def epoch(self): return sum(len(views[0]) for views, *_ in self.dl)


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


def show(what, rates, against):
    for k, r in rates.items():
        ratio = statistics.median([b/a for a, b in zip(rates[against], r)])
        spread = f"({min(r):.0f}-{max(r):.0f})"
        print(f"{what:>12} | {k:32} | {statistics.median(r):8.0f} {spread} | {ratio:5.2f}", flush=True)
    print()


def ingest(folders, a):
    print("images/s from files to two views, median (slowest-fastest) | times as fast as lightly's loader")
    for size, folder in folders.items():
        runs = {"ours": Ours(folder, size, a.batch).epoch,
                "ours, files to batches alone": Ours(folder, size, a.batch, views=False).epoch,
                "ours, no workers": Ours(folder, size, a.batch, workers=0).epoch,
                "lightly, 2 workers": Lightly(folder, size, a.batch).epoch}
        show(f"views {size} px", in_turns(runs, a.repeats), "lightly, 2 workers")


# Decoders, each to the centred square resized, in one thread

def square(x):
    h, w = x.shape[:2]
    m = min(h, w)
    return x[(h-m)//2:(h-m)//2+m, (w-m)//2:(w-m)//2+m]


def torch_resize(x, s):
    x = torch.from_numpy(np.ascontiguousarray(square(x))).permute(2, 0, 1)
    if x.shape[-1] == s: return x
    return torch.nn.functional.interpolate(x[None], (s, s), mode="bilinear", antialias=True)[0]


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


def simplejpeg_read(f, s):
    import simplejpeg
    return torch_resize(simplejpeg.decode_jpeg(Path(f).read_bytes(), "RGB", min_height=s, min_width=s), s)


def opencv_read(f, s):
    import cv2
    x = square(cv2.imread(str(f)))[..., ::-1]
    return cv2.resize(x, (s, s), interpolation=cv2.INTER_AREA)


def decoders(folders, a):
    torch.set_num_threads(1)
    print("images/s decoded and resized in one thread, median (slowest-fastest) | times as fast as Pillow with draft")
    for size, keep in ((32, 32), (256, 64), (256, 292)):
        files = image_files(folders[size])[:512 if size == 32 else 64]
        every = {"read_image": read_image, "Pillow, draft": pillow(True), "Pillow": pillow(False),
                 "torchvision": torchvision_read, "simplejpeg, then torch's resize": simplejpeg_read,
                 "OpenCV": opencv_read}
        runs = {}
        for k, read in every.items():
            try: read(files[0], keep)
            except ImportError: continue   # not installed
            runs[k] = lambda read=read: len([read(f, keep) for f in files])
        show(f"to {keep} px", in_turns(runs, a.repeats), "Pillow, draft")


# Many files

def used(pids):
    "MB that processes hold: proportional set size, in which shared pages count once"
    def pss(p):
        lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))/1024
    return sum(pss(p) for p in pids if os.path.exists(f"/proc/{p}"))


def children():
    "Process ids of the workers"
    return [int(p) for task in Path("/proc/self/task").iterdir() for p in (task/"children").read_text().split()]


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
    p.add_argument("--small", type=int, default=20_000, help="images of 32 px")
    p.add_argument("--photos", type=int, default=1024, help="images of 500x375 px")
    p.add_argument("--files", type=int, default=100_000, help="tiny files to index")
    p.add_argument("--batch", type=int, default=256, help="images per batch")
    p.add_argument("--threads", type=int, default=1, help="of PyTorch in the main process, which makes our views")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    p.add_argument("--epochs", type=int, default=5, help="over the tiny files")
    p.add_argument("--only", nargs="+", choices=parts, default=parts)
    return p.parse_args()


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    print(machine("torchvision", "pillow", "lightly"), "\n")
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folders = {32: root/"small", 256: root/"photos"}
        if {"ingest", "decoders"} & set(a.only):
            make_folder(folders[32], 32, a.small, a.path)
            make_folder(folders[256], 256, a.photos, a.path)
        if "ingest" in a.only: ingest(folders, a)
        if "decoders" in a.only: decoders(folders, a)
        if "index" in a.only: many(root, a)


if __name__ == "__main__": main()
