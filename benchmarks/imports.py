"What does importing cost? Each line runs in a new Python process, lines in turn, median of 5"
import statistics
import subprocess
import sys

from _common import machine

LINES = ["import fastai.vision.all", "import self_supervised_bt", "import self_supervised_bt.losses",
         "import self_supervised_bt.barlow_twins", "import self_supervised_bt.all"]
CODE = """import warnings; warnings.simplefilter('ignore')
import time
start = time.perf_counter()
{}
print(time.perf_counter() - start)"""

print(machine("fastai", "kornia"))
seconds = {line: [] for line in LINES}
for i in range(6):
    for line in LINES:
        done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
        if i: seconds[line].append(float(done.stdout))     # the first round fills the disk cache
base = statistics.median(seconds[LINES[0]])
for line, ts in seconds.items():
    median = statistics.median(ts)
    print(f"{line:40} {median:6.2f} s ({min(ts):.2f}-{max(ts):.2f})   {median/base:5.2f} x fastai.vision.all")
