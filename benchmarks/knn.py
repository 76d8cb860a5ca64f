"""Nearest-neighbour vote: seconds and peak memory, against lightly's `knn_predict`

    python benchmarks/knn.py                    # 50,000 x 512 bank, 10,000 queries, k=200

Every contender runs in a process of its own, in turns, and labels the same rows. "Above the inputs" is the highest resident
memory while it works, less what bank and queries take. lightly takes the queries in one call, as its documentation shows, or
some at a time, as its callback gets them from a loader.
"""
import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

from _common import machine

CONTENDERS = ("ours", "lightly, one call", "lightly, 256 at a time")


def resident():
    "Bytes of memory this process holds"
    return int(open("/proc/self/statm").read().split()[1])*4096


class Peak:
    "The highest resident memory while something runs, looked at every millisecond"
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
    "Run one contender: seconds, MB above the inputs, and a number that tells whether all label alike"
    import torch
    import torch.nn.functional as F

    from self_supervised_bt.evaluation import knn_predict
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(a.classes, a.width, generator=g)
    def rows(n):
        y = torch.randint(0, a.classes, (n,), generator=g)
        return F.normalize(centres[y] + 3*torch.randn(n, a.width, generator=g), dim=1), y
    (bank, y), (h, _) = rows(a.bank), rows(a.queries)
    if name == "ours": run = lambda: knn_predict(h, bank, y, a.k, .1)
    else:
        from lightly.utils.benchmarking import knn_predict as peer
        columns, size = bank.T.contiguous(), len(h) if "one call" in name else 256
        run = lambda: torch.cat([peer(part, columns, y, a.classes, knn_k=a.k, knn_t=.1)[:, 0] for part in h.split(size)])
    knn_predict(h[:64], bank, y, a.k)                              # threads and libraries are there
    with Peak() as peak:
        start = time.perf_counter()
        labels = run()
        seconds = time.perf_counter() - start
    return dict(seconds=seconds, mb=peak.above, labels=labels[::97].tolist())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(bank=50_000, queries=10_000, width=512, k=200, classes=100, turns=5).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender: return print(json.dumps(contender(a.contender, a)))
    print(machine("lightly"))
    print(f"bank {a.bank:,} x {a.width}, {a.queries:,} queries, k={a.k}; medians of {a.turns} turns (fastest-slowest)\n", flush=True)
    seen = {name: [] for name in CONTENDERS}
    for _ in range(a.turns):
        for name in CONTENDERS:
            out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--contender", name], capture_output=True, text=True)
            if out.returncode: sys.exit(out.stderr)
            seen[name].append(json.loads(out.stdout.splitlines()[-1]))
    ours = seen["ours"]
    print(f"{'':24} {'seconds':>20} {'time, ours = 1':>15} {'MB above the inputs':>20} {'memory, ours = 1':>17}  same labels")
    for name, turns in seen.items():
        s, mb = [t["seconds"] for t in turns], statistics.median(t["mb"] for t in turns)
        ratio = statistics.median(t["seconds"]/o["seconds"] for t, o in zip(turns, ours))
        same = sum(a == b for a, b in zip(turns[0]["labels"], ours[0]["labels"]))/len(ours[0]["labels"])
        print(f"{name:24} {f'{statistics.median(s):.2f} ({min(s):.2f}-{max(s):.2f})':>20} {ratio:15.2f} {mb:20.0f} "
              f"{mb/statistics.median(t['mb'] for t in ours):17.1f}  {same:.1%}")


if __name__ == "__main__": main()
