"""Linear probe: seconds and accuracy against scikit-learn, with the same rows and the same regularisation

    python benchmarks/probe.py                  # 20,000 x 512, ten classes: two minutes on 2 cores
"""
import argparse
import time

import torch
from _common import machine, median_and_range
from sklearn.linear_model import LogisticRegression

from self_supervised_bt.evaluation import linear_probe


def rows(n, width, classes, g):
    "Overlapping classes, with directions of very different size"
    y = torch.randint(0, classes, (n,), generator=g)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    return (centres[y] + 8*torch.randn(n, width, generator=g))*torch.logspace(0, -2, width) + 1, y


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(train=20_000, test=10_000, width=512, classes=10, turns=3)
    for name, value in sizes.items(): p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    g = torch.Generator().manual_seed(0)
    h, y = rows(a.train, a.width, a.classes, g)
    h_val, y_val = rows(a.test, a.width, a.classes, g)
    x, x_val = (((t - h.mean(0))/h.std(0, correction=0)).numpy() for t in (h, h_val))
    print(machine("scikit-learn"))
    print(f"{a.train:,} x {a.width} to learn from, {a.test:,} to test with, {a.classes} classes; "
          f"medians of {a.turns} turns (fastest-slowest)\n")
    chosen = linear_probe(h, y, h_val, y_val)
    def ours(**kwargs): return linear_probe(h, y, h_val, y_val, **kwargs).top1
    def sklearn(): return LogisticRegression(C=chosen.C, max_iter=2000).fit(x, y.numpy()).score(x_val, y_val.numpy())
    contenders = {"ours, C given": lambda: ours(Cs=(chosen.C,)),
                  "scikit-learn, C given": sklearn,
                  f"ours, C chosen of {len(chosen.tried)}": ours}
    seen = {name: [] for name in contenders}
    for _ in range(a.turns):
        for name, run in contenders.items():
            start = time.perf_counter()
            score = run()
            seen[name].append((time.perf_counter() - start, score))
    for name, turns in seen.items():
        s = [seconds for seconds, _ in turns]
        spread = median_and_range(s, ".2f")
        print(f"{name:24} {spread:>20} s   top-1 {100*turns[0][1]:.2f} %")
    print(f"\nC = {chosen.C:.2g}, chosen on a tenth of the training rows")


if __name__ == "__main__": main()
