"What every benchmark prints first, and how it takes times"
import importlib.metadata
import os
import platform
import statistics
import time
import warnings

warnings.filterwarnings("ignore")


def machine(*packages):
    "One line: processor, cores, Python and the versions that matter"
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def times(*fs, repeats=7):
    "Seconds of each function, taken in turns so that all see the same machine: a list of `repeats` for each"
    for f in fs: f()
    out = [[] for _ in fs]
    for _ in range(repeats):
        for o, f in zip(out, fs):
            start = time.perf_counter()
            f()
            o.append(time.perf_counter() - start)
    return out


def spread(ts, scale=1e3, unit="ms"):
    "Median, with the smallest and the largest"
    return f"{scale*statistics.median(ts):.1f} {unit} ({scale*min(ts):.1f}-{scale*max(ts):.1f})"
