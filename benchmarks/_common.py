"What several benchmarks share"
import importlib.metadata
import os
import platform
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


def machine(*packages):
    "One line: processor, cores, Python and the versions that matter"
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def class_folders(path, per_class, held_out):
    "uint8 images of 32 px and labels to train on, the first of every class by file name, and to test with, the last"
    import torch
    from self_supervised_bt.data import load_images
    parts = {True: ([], []), False: ([], [])}
    for label, folder in enumerate(sorted(p for p in Path(path).iterdir() if p.is_dir())):
        files = sorted(folder.iterdir())
        for train, some in ((True, files[:per_class]), (False, files[-held_out:])):
            parts[train][0].extend(some)
            parts[train][1].extend([label]*len(some))
    return [t for files, y in parts.values() for t in (load_images(files, 32, progress=False), torch.tensor(y))]
