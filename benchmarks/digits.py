"Accuracy of the demo's encoder: five seeds (of split, weights, views), mean ± standard deviation over seeds"
import io
from contextlib import redirect_stdout

import pandas as pd
from _common import machine, median_and_range

from self_supervised_bt.runs import short_run, train_and_compare

SEEDS = range(5)

print(machine("fastai", "timm", "kornia", "scikit-learn"))
tables, seconds = [], []
for seed in SEEDS:
    with redirect_stdout(io.StringIO()):   # without the lines of the epochs
        compared = train_and_compare(short_run("digits"), seed)
    tables.append(compared.table.map(lambda cell: float(cell.split(" ± ")[0])))
    seconds.append(compared.seconds)
by_row = pd.concat(tables, keys=SEEDS).groupby(level=1, sort=False)
print((by_row.mean().map("{:.1f}".format) + " ± " + by_row.std().map("{:.1f}".format)).to_string())
print(f"training: {median_and_range(seconds, '.0f')} s")
