"What several benchmarks share"
import importlib.metadata
import os
import platform
import statistics
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


def processor():
    "Name of the processor"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(*packages):
    "One line: processor, cores, Python and the versions that matter"
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", *packages))
    return f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def wait(device):
    "Until the device has computed everything"
    import torch
    if device.type == "cuda": torch.cuda.synchronize()


def median_and_range(values, spec):
    "Median (smallest-largest), each formatted by `spec`"
    return f"{statistics.median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def class_folders(path, per_class, held_out, spare=0):
    """uint8 images of 32 px and labels: of every class the first by file name to train with, the last to test with

    `spare` leaves so many of the last files of a class out, which are for another test.
    """
    import torch

    from self_supervised_bt.data import load_images
    train, test = ([], []), ([], [])
    folders = sorted(p for p in Path(path).iterdir() if p.is_dir())
    for label, folder in enumerate(folders):
        files = sorted(folder.iterdir())
        for (paths, labels), some in ((train, files[:per_class]), (test, files[-held_out - spare:len(files) - spare])):
            paths.extend(some)
            labels.extend([label]*len(some))
    tensors = []
    for paths, labels in (train, test): tensors += [load_images(paths, 32, progress=False), torch.tensor(labels)]
    return tensors
