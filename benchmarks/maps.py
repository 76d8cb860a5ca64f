"""Maps: seconds of each method, megabytes of the page, milliseconds per frame in a browser

    python benchmarks/maps.py                        # 1,000 and 5,000 images
    python benchmarks/maps.py 20000 --methods pca    # one number of images, some of the methods

Representations are 512 wide, of 50 groups; images are square parts of the two photographs that scikit-learn ships, 64
pixels and more. UMAP needs umap-learn (its first use, when it compiles itself, is not counted), and the frames
playwright and Chromium, which has no graphics card here: the median of 20 frames, each shifted a little.
"""
import argparse
import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _common import machine
from sklearn.datasets import load_sample_images

from self_supervised_bt.maps import add_map, cluster_images, map_page

FRAMES = """mode => {
  setMode(mode);
  const times = [];
  for (let i = 0; i < 20; i++) {
    const start = performance.now();
    view.x += .0005;
    draw();
    ctx.getImageData(0, 0, 1, 1);   // waits until all is drawn
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b)[10]; }"""


def photographs(n, seed=0):
    "Square parts of photographs, (n,3,64,64) uint8"
    rng = np.random.default_rng(seed)
    photos, parts = load_sample_images().images, np.empty((n, 64, 64, 3), np.uint8)
    for i in range(n):
        side = int(rng.integers(64, 257))//64*64
        photo = photos[rng.integers(2)]
        y, x = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        parts[i] = photo[y:y+side:side//64, x:x+side:side//64]
    return torch.from_numpy(parts).permute(0, 3, 1, 2)


def table_of(n, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 50, n)
    h = rng.standard_normal((50, 512))[group] + 1.5*rng.standard_normal((n, 512))
    return pd.DataFrame({"index": range(n), "label": group, "h": list(h.astype(np.float32))})


def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def frames(page):
    "Milliseconds per frame with images and with points, or `None` without a browser"
    if importlib.util.find_spec("playwright") is None: return None
    from playwright.sync_api import sync_playwright
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None: return None
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 800})
        opened.goto(Path(page).absolute().as_uri())
        opened.wait_for_timeout(2000)
        times = [opened.evaluate(FRAMES, mode) for mode in ("images", "points")]
        browser.close()
    return times


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("images", nargs="*", type=int, default=[1000, 5000])
parser.add_argument("--methods", default="pca,tsne,umap")
if __name__ == "__main__":
    a = parser.parse_args()
    print(machine("scikit-learn"), f"{torch.get_num_threads()} threads")
    methods = a.methods.split(",")
    if "umap" in methods:
        try: add_map(table_of(100), "umap")
        except ImportError: methods.remove("umap")
    for n in a.images:
        table, x = table_of(n), photographs(n)
        with tempfile.TemporaryDirectory() as d:
            page = Path(d)/"map.html"
            took = seconds(lambda: map_page(add_map(table, "pca"), page, images=x, limit=None))
            print(f"\n{n:,} images: page of {page.stat().st_size/1e6:.1f} MB, written in {took:.1f} s (with PCA)")
            times = frames(page)
        if times: print(f"  frames        images {times[0]:.0f} ms, points {times[1]:.0f} ms")
        else: print("  frames        not measured: no browser")
        print(f"  20 clusters   {seconds(cluster_images, table, 20):.1f} s")
        for method in methods: print(f"  {method:13} {seconds(add_map, table, method):.1f} s")
