"""Tar shards beside a folder of the same JPEG files: images per second to batches, and seconds until the first one

All read the same bytes, decode them with `read_image` in two worker processes and make the same batches: a folder, this
library's shards, and the library webdataset on these shards. The contenders take turns. "Not in memory" means that the
system was asked to drop the files from its cache before every epoch. Then: seconds to list many tiny files.

    python benchmarks/shards.py
    python benchmarks/shards.py /data/cifar10-train                 # also its images, 32 px
    python benchmarks/shards.py --photos 128 --files 2000 --repeats 1    # quick look
"""
import argparse
import io
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import machine
from ingest import make_folder
from PIL import Image

from self_supervised_bt.data import read_image
from self_supervised_bt.folders import unlabelled_dls
from self_supervised_bt.sources import Content, image_source, write_shards


def forget(paths):
    "Ask the system to drop files from its cache"
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def ours(items, size, bs):
    dl = unlabelled_dls(items, size, bs=bs, valid_pct=0, num_workers=2, device="cpu").train
    return lambda: sum(len(x) for x, in dl)


def in_tensor(sample, size):
    name, content = sample
    return read_image(Content(name, content), size)


def webdataset(paths, size, bs):
    import webdataset as wds
    def epoch():
        random.seed(0)
        ds = wds.WebDataset(paths, shardshuffle=100, empty_check=False).shuffle(4096).to_tuple("__key__", "jpg")
        ds = ds.map(lambda o: in_tensor(o, size)).batched(bs, partial=False, collation_fn=torch.stack)
        return sum(len(x) for x in wds.WebLoader(ds, batch_size=None, num_workers=2))
    return epoch


def timed(run, paths, cold):
    if cold: forget(paths)
    start = time.perf_counter()
    n = run()
    return n/(time.perf_counter() - start)


def rows_of(runs, files, cold, repeats):
    "Rates of each, taken in turns after a warm-up"
    rates = {k: [] for k in runs}
    for turn in range(repeats + 1):
        for k, run in runs.items():
            r = timed(run, files[k], cold)
            if turn: rates[k].append(r)
    return rates


def compare(root, name, size, a):
    folder, shards = root/name, root/f"{name} shards"
    start = time.perf_counter()
    tars = [str(f) for f in write_shards(folder, shards, per_shard=a.per_shard)]
    print(f"{name}: {len(tars)} shards written in {time.perf_counter() - start:.1f} s")
    files = sorted(folder.rglob("*.jpg"))
    runs = {"folder": ours(folder, size, a.batch), "shards": ours(tars, size, a.batch)}
    places = {"folder": files, "shards": tars}
    try:
        runs["webdataset, the same"], places["webdataset, the same"] = webdataset(tars, size, a.batch), tars
    except ImportError: print("webdataset is not installed")
    for cold in (False, True):
        for k, r in rows_of(runs, places, cold, a.repeats).items():
            what = f"{name}, {'not ' if cold else ''}in memory"
            print(f"{what:>28} | {k:20} | {statistics.median(r):7.0f} ({min(r):.0f}-{max(r):.0f})", flush=True)
    print()


def listing(root, a):
    "Seconds until all images of a folder, or of shards, are known"
    one = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(one, "jpeg")
    for i in range(a.files):
        f = root/"many"/f"{i//1000:04}"/f"{i:07}.jpg"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(one.getvalue())
    tars = write_shards(root/"many", root/"many shards", per_shard=5000)
    for what, items in (("folder", root/"many"), (f"{len(tars)} shards", root/"many shards")):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            n = len(image_source(items).files)
            seconds.append(time.perf_counter() - start)
        print(f"{n:,} tiny files listed in a {what:12} | {statistics.median(seconds):6.2f} s", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", nargs="?", help="folder of small JPEG images, e.g. CIFAR-10's; left out if not given")
    p.add_argument("--photos", type=int, default=2048, help="images of 500x375 px, made of noise and blocks")
    p.add_argument("--small", type=int, default=10_000, help="images of 32 px")
    p.add_argument("--files", type=int, default=100_000, help="tiny files to list")
    p.add_argument("--per-shard", type=int, default=256)
    p.add_argument("--batch", type=int, default=64, help="images per batch")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    a = p.parse_args()
    torch.set_num_threads(1)
    print(machine("pillow", "webdataset"), "\nimages/s from files to batches, median (slowest-fastest)")
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        make_folder(home/"photographs", 256, a.photos, None)
        compare(home, "photographs", 292, a)
        if a.path:
            make_folder(home/"small", 32, a.small, a.path)
            compare(home, "small", 32, a)
        listing(home, a)


if __name__ == "__main__": main()
