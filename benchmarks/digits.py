"How good is the encoder of the demo? The same job with five seeds (split, weights, views), mean ± standard deviation over seeds"
import io
import statistics
from contextlib import redirect_stdout

import pandas as pd

from _common import machine
from self_supervised_bt.cli import digits_job, train_and_compare

SEEDS = range(5)

print(machine("fastai", "timm", "kornia", "scikit-learn"))
tables, seconds = [], []
for seed in SEEDS:
    with redirect_stdout(io.StringIO()): run = train_and_compare(digits_job(), seed)    # a line an epoch is of no use here
    tables.append(run.table.map(lambda cell: float(cell.split(" ± ")[0])))
    seconds.append(run.seconds)
both = pd.concat(tables, keys=SEEDS).groupby(level=1, sort=False)
print((both.mean().map("{:.1f}".format) + " ± " + both.std().map("{:.1f}".format)).to_string())
print(f"training: {statistics.median(seconds):.0f} s ({min(seconds):.0f}-{max(seconds):.0f})")
