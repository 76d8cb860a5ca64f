"""Linear probe: seconds and accuracy against scikit-learn's logistic regression on the same rows, with the same regularisation

    python benchmarks/probe.py                  # 20,000 x 512, ten classes: two minutes on 2 cores
"""
import argparse
import statistics
import time

import torch
from _common import machine
from sklearn.linear_model import LogisticRegression

from self_supervised_bt.evaluation import linear_probe


def rows(n, width, classes, g):
    "Overlapping classes, with directions of very different size"
    y = torch.randint(0, classes, (n,), generator=g)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    return (centres[y] + 8*torch.randn(n, width, generator=g))*torch.logspace(0, -2, width) + 1, y


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(train=20_000, test=10_000, width=512, classes=10, turns=3).items(): p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    g = torch.Generator().manual_seed(0)
    (h, y), (h_val, y_val) = rows(a.train, a.width, a.classes, g), rows(a.test, a.width, a.classes, g)
    x, x_val = ((t - h.mean(0))/h.std(0, correction=0) for t in (h, h_val))
    print(machine("scikit-learn"))
    print(f"{a.train:,} x {a.width} to learn from, {a.test:,} to test with, {a.classes} classes; medians of {a.turns} turns (fastest-slowest)\n")
    chosen = linear_probe(h, y, h_val, y_val)
    def sklearn(): return LogisticRegression(C=chosen.C, max_iter=2000).fit(x.numpy(), y.numpy()).score(x_val.numpy(), y_val.numpy())
    contenders = {"ours, C given": lambda: linear_probe(h, y, h_val, y_val, Cs=(chosen.C,)).top1, "scikit-learn, C given": sklearn,
                  f"ours, C chosen of {len(chosen.tried)}": lambda: linear_probe(h, y, h_val, y_val).top1}
    seen = {name: [] for name in contenders}
    for _ in range(a.turns):
        for name, run in contenders.items():
            start = time.perf_counter()
            score = run()
            seen[name].append((time.perf_counter() - start, score))
    for name, turns in seen.items():
        s = [t for t, _ in turns]
        print(f"{name:24} {f'{statistics.median(s):.2f} ({min(s):.2f}-{max(s):.2f})':>20} s   top-1 {100*turns[0][1]:.2f} %")
    print(f"\nC = {chosen.C:.2g}, chosen on a tenth of the training rows")


if __name__ == "__main__": main()
