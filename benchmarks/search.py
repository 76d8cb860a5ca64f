"""A table of a million rows: written, read and searched, exactly and with FAISS: seconds, peak memory, recall

    python benchmarks/search.py                            # 1,000,000 x 512
    python benchmarks/search.py --rows 100000 --queries 1000

The rows are clusters on a surface of 24 dimensions with some noise, as representations are, so that indices have
something to find. They are made and written 16,384 at a time, as `embed` writes its parts; "write" is without the
making. Every step runs in its own process. "Peak" is the highest resident memory of that process, with the rows that it
holds. Recall@10 is the share of the exact ten nearest that an index finds.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import machine

STEPS = ("write", "read", "pandas", "exact", "flat", "ivf", "hnsw")


def part(i, n, width):
    "The rows from `i` on"
    from self_supervised_bt.explore import table_of
    basis = np.random.default_rng(0).normal(size=(24, width)).astype(np.float32)
    rng = np.random.default_rng(1 + i)
    centres = np.random.default_rng(0).normal(size=(2000, 24)).astype(np.float32)
    rows = centres[rng.integers(0, 2000, n)] + .5*rng.normal(size=(n, 24)).astype(np.float32)
    h = np.maximum(rows @ basis/5 + .1*rng.normal(size=(n, width)).astype(np.float32), 0)
    files, labels = [f"photos/{j:08}.jpg" for j in range(i, i + n)], [f"class {j % 100}" for j in range(n)]
    return table_of("file", files, labels, h, {})


def write(a, file):
    from self_supervised_bt.explore import ROWS, write_tables
    made = 0.
    def parts():
        nonlocal made
        for i in range(0, a.rows, ROWS):
            start = time.perf_counter()
            table = part(i, min(ROWS, a.rows - i), a.width)
            made += time.perf_counter() - start
            yield table
    start = time.perf_counter()
    write_tables(file, parts(), dict(encoder="none", width=a.width))
    return dict(seconds=time.perf_counter() - start - made, megabytes=os.path.getsize(file)/2**20)


def read(a, file):
    from self_supervised_bt.explore import load_table, matrix_of
    start = time.perf_counter()
    table = load_table(file)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    matrix_of(table)
    return dict(seconds=seconds, matrix=time.perf_counter() - start)


def pandas(a, file):
    import pandas as pd
    start = time.perf_counter()
    pd.read_parquet(file)
    return dict(seconds=time.perf_counter() - start)


def search(a, file, kind):
    from self_supervised_bt.explore import load_table, matrix_of, nearest, search_index, similar
    table = load_table(file)
    h = matrix_of(table)
    rows = np.linspace(0, a.rows - 1, a.queries).astype(int)
    start = time.perf_counter()
    index = kind if kind == "exact" else search_index(table, kind)
    build = time.perf_counter() - start
    nearest(h[rows[:8]], h, 10, index)                             # warm up threads and libraries
    start = time.perf_counter()
    _, idx = nearest(h[rows], h, 10, index)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    similar(table, int(rows[1]), search=index)
    return dict(build=build, seconds=seconds, one=time.perf_counter() - start, found=idx.tolist())


def step(name, a, file):
    "The results of one step, with the peak memory of its process"
    results = dict(write=write, read=read, pandas=pandas)[name](a, file) if name in STEPS[:3] else search(a, file, name)
    return {**results, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20}


def run_alone(name, file):
    command = [sys.executable, __file__, *sys.argv[1:], "--step", name, "--file", str(file)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode: sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(rows=1_000_000, width=512, queries=2000).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--skip", nargs="*", default=[], choices=STEPS)
    p.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    p.add_argument("--file", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.step: return print(json.dumps(step(a.step, a, Path(a.file))))
    import torch
    print(machine("pyarrow", "pandas", "faiss-cpu"))
    print(f"{a.rows:,} x {a.width}, {4*a.rows*a.width/2**30:.2f} GiB of float32; {torch.get_num_threads()} thread(s)\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"table.parquet"
        written = run_alone("write", file)
        print(f"{'':28}{'seconds':>9}{'peak, GiB':>11}")
        label = f"write, {written['megabytes']:,.0f} MB"
        print(f"{label:28}{written['seconds']:9.1f}{written['peak']:11.2f}", flush=True)
        for name, label in (("read", "load_table"), ("pandas", "pandas.read_parquet")):
            if name in a.skip: continue
            r = run_alone(name, file)
            print(f"{label:28}{r['seconds']:9.1f}{r['peak']:11.2f}", flush=True)
        many = f"{a.queries:,} queries, s"
        print(f"\n{'':10}{'build, s':>10}{many:>20}{'one query, s':>14}{'recall@10':>11}{'peak, GiB':>11}")
        exact = None
        for name in STEPS[3:]:
            if name in a.skip: continue
            r = run_alone(name, file)
            exact = exact or r["found"]
            recall = np.mean([len(set(x) & set(y))/10 for x, y in zip(exact, r["found"])])
            times = f"{r['build']:10.1f}{r['seconds']:20.2f}{r['one']:14.2f}"
            print(f"{name:10}{times}{recall:11.1%}{r['peak']:11.2f}", flush=True)


if __name__ == "__main__": main()
