"What every benchmark prints first"
import importlib.metadata
import os
import platform
import warnings

warnings.filterwarnings("ignore")


def machine(*packages):
    "One line: processor, cores, Python and the versions that matter"
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", *packages))
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
