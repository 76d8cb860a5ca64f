"""How long until a command says its first words, and until it has trained its first batch?

    python benchmarks/commands.py                # all commands
    python benchmarks/commands.py pretrain runs  # those whose line holds one of these words
    python benchmarks/commands.py --words        # to the first words only, the better of two times

Each command runs in a new process, as in a terminal of 80 columns, and is ended after its first batch; commands that
train nothing run to their end. The photographs are 240 crops of the two sample images of
scikit-learn, 480 x 360 pixels.
"""
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import machine
from PIL import Image

COMMANDS = ["bt_pretrain --help", "bt_pretrain photos --bs many", "bt_pretrain photos --bs 0", "bt_pretrain nowhere",
            "bt_demo", "bt_demo --data photos", "bt_diagnose", "bt_diagnose --data photos",
            "bt_pretrain photos --workers 0 --out runs/new", "bt_evaluate runs/done photos --workers 0",
            "bt_export runs/done", "bt_classify runs/done photos --workers 0", "bt_transfer", "bt_experiment",
            "bt_runs runs", "bt_report runs/done"]
BATCH = re.compile(rb"\d+/\d+ batches")   # of the line that shows the position


def photographs(folder, n=240):
    "Crops of two photographs, in a folder for each"
    from sklearn.datasets import load_sample_image
    rng = np.random.default_rng(0)
    for i in range(n):
        name = ("china.jpg", "flower.jpg")[i % 2]
        image = load_sample_image(name)
        y, x = rng.integers(0, image.shape[0] - 360), rng.integers(0, image.shape[1] - 480)
        file = folder/Path(name).stem/f"{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[y:y + 360, x:x + 480]).save(file, quality=90)


def start(line, home):
    "A command as in a terminal: the process and the terminal's other end"
    name, *options = line.split()
    script = home/f"{name}.py"
    script.write_text(f"from self_supervised_bt.cli import {name}\n{name}()\n")
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen([sys.executable, script, *options], cwd=home, env=env, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    return process, ours


def read(terminal):
    "What is there to read, nothing at the end"
    if not select.select([terminal], [], [], 600)[0]: return b""
    try: return os.read(terminal, 65536)
    except OSError: return b""


def timed(line, home, words_only=False):
    "Seconds to the first words, to the first batch or `None`, and to the end or `None`"
    began = time.perf_counter()
    process, terminal = start(line, home)
    said, words, batch = b"", None, None
    while batch is None and not (words_only and words) and (new := read(terminal)):
        said += new
        now = time.perf_counter() - began
        if words is None and said.strip(): words = now
        if BATCH.search(said): batch = now
    end = time.perf_counter() - began
    if process.poll() is None and (batch or words_only): os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(terminal)
    return words, batch, None if batch or words_only else end


def made_run(home):
    "A folder of photographs, and a small run on them"
    photographs(home/"photos")
    code = ("from self_supervised_bt.runs import pretrain; pretrain('photos', 'cifar', 'runs/done', epochs=1, size=32, "
            "arch='timm/test_resnet', pool_type=None, arch_args={}, bs=64, hidden_size=32, projection_size=32, "
            "num_workers=0)")
    subprocess.run([sys.executable, "-c", code], cwd=home, check=True, capture_output=True)


def stand_in(home):
    "A folder of photographs, and one that looks like a run to what is checked before PyTorch is loaded"
    photographs(home/"photos", 4)
    (home/"runs/done").mkdir(parents=True)
    (home/"runs/done/results.json").write_text("{}")


def main():
    from self_supervised_bt import cli
    words_only = "--words" in sys.argv
    chosen = [a for a in sys.argv[1:] if a != "--words"] or [""]
    wanted = [c for c in COMMANDS if hasattr(cli, c.split()[0]) and any(word in c for word in chosen)]
    print(machine("fastai"))
    print(f"{'seconds to':48} {'first words':>11} {'first batch':>11} {'end':>6}")
    def text(t): return "" if t is None else f"{t:.1f}"
    with tempfile.TemporaryDirectory() as tmp:
        home = Path(tmp)
        if words_only: stand_in(home)
        else: made_run(home)
        timed("bt_transfer", home, words_only)   # fills the disk cache
        for line in wanted:
            if words_only: words, batch, end = min((timed(line, home, True) for _ in range(2)), key=lambda t: t[0])
            else: words, batch, end = timed(line, home)
            print(f"{line:48} {text(words):>11} {text(batch):>11} {text(end):>6}", flush=True)


if __name__ == "__main__": main()
