"What does importing cost? Each line is a fresh Python process, lines taken in turns, median of 5"
import statistics
import subprocess
import sys

from _common import machine

LINES = ["import fastai.vision.all", "import self_supervised_bt", "import self_supervised_bt.barlow_twins", "import self_supervised_bt.all"]
CODE = "import warnings; warnings.simplefilter('ignore')\nimport time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"

print(machine("fastai", "kornia"))
seconds = {line: [] for line in LINES}
for i in range(6):
    for line in LINES:
        done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
        if i: seconds[line].append(float(done.stdout))     # the first round fills the disk cache
base = statistics.median(seconds[LINES[0]])
for line, ts in seconds.items():
    print(f"{line:40} {statistics.median(ts):6.2f} s ({min(ts):.2f}-{max(ts):.2f})   {statistics.median(ts)/base:5.2f} x fastai.vision.all")
