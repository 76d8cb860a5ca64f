"""Nearest-neighbour vote: seconds and peak memory, against lightly's `knn_predict`

    python benchmarks/knn.py                    # 50,000 x 512 bank, 10,000 queries, k=200

Each contender runs in its own process, in turns, and labels the same rows. "Above the inputs" is the highest resident
memory while it works, less what bank and queries take. lightly takes the queries in one call, as its documentation
shows, or 256 at a time, as its callback gets them from a loader.
"""
import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

from _common import machine, median_and_range

CONTENDERS = ("ours", "lightly, one call", "lightly, 256 at a time")


def resident():
    "Resident memory of this process, bytes"
    return int(open("/proc/self/statm").read().split()[1])*4096


class Peak:
    "The highest resident memory while something runs, sampled every millisecond"
    def __enter__(self):
        self.start = self.top = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.stop.wait(.001): self.top = max(self.top, resident())
    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
    @property
    def above(self): return (self.top - self.start)/2**20


def contender(name, a):
    "Run one contender: seconds, MB above the inputs, and some of its labels to compare"
    import torch
    import torch.nn.functional as F

    from self_supervised_bt.evaluation import knn_predict
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(a.classes, a.width, generator=g)
    def rows(n):
        y = torch.randint(0, a.classes, (n,), generator=g)
        return F.normalize(centres[y] + 3*torch.randn(n, a.width, generator=g), dim=1), y
    (bank, y), (h, _) = rows(a.bank), rows(a.queries)
    if name == "ours":
        def run(): return knn_predict(h, bank, y, a.k, .1)
    else:
        from lightly.utils.benchmarking import knn_predict as peer
        columns = bank.T.contiguous()
        size = len(h) if "one call" in name else 256
        def label(part): return peer(part, columns, y, a.classes, knn_k=a.k, knn_t=.1)[:, 0]
        def run(): return torch.cat([label(part) for part in h.split(size)])
    knn_predict(h[:64], bank, y, a.k)                              # warm up threads and libraries
    with Peak() as peak:
        start = time.perf_counter()
        labels = run()
        seconds = time.perf_counter() - start
    return dict(seconds=seconds, mb=peak.above, labels=labels[::97].tolist())


def run_alone(name):
    "Results of one contender, run in its own process"
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode: sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def line(name, turns, ours):
    "A line of the table, medians over turns"
    seconds = [t["seconds"] for t in turns]
    mb, our_mb = (statistics.median(t["mb"] for t in ts) for ts in (turns, ours))
    ratio = statistics.median(t["seconds"]/o["seconds"] for t, o in zip(turns, ours))
    labels, our_labels = turns[0]["labels"], ours[0]["labels"]
    same = sum(a == b for a, b in zip(labels, our_labels))/len(our_labels)
    spread = median_and_range(seconds, ".2f")
    return f"{name:24} {spread:>20} {ratio:15.2f} {mb:20.0f} {mb/our_mb:17.1f}  {same:.1%}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(bank=50_000, queries=10_000, width=512, k=200, classes=100, turns=5)
    for name, value in sizes.items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return print(json.dumps(contender(a.contender, a)))
    print(machine("lightly"))
    print(f"bank {a.bank:,} x {a.width}, {a.queries:,} queries, k={a.k}; "
          f"medians of {a.turns} turns (fastest-slowest)\n", flush=True)
    seen = {name: [] for name in CONTENDERS}
    for _ in range(a.turns):
        for name in CONTENDERS: seen[name].append(run_alone(name))
    print(f"{'':24} {'seconds':>20} {'time, ours = 1':>15} {'MB above the inputs':>20} {'memory, ours = 1':>17}"
          "  same labels")
    for name, turns in seen.items(): print(line(name, turns, seen["ours"]))


if __name__ == "__main__": main()
