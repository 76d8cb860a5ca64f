"""Loss over several ranks: is it the global batch's, are its gradients, and what does a step cost, against lightly

    python benchmarks/distributed.py                           # two ranks, a thread each: a minute on 2 cores
    python benchmarks/distributed.py --ranks 3 --images 255

Ranks of one machine exchange over loopback: the seconds say how the work is divided, not how a network does.
"""
import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from _common import machine, median_and_range
from lightly.loss import BarlowTwinsLoss as Lightly

from self_supervised_bt.distributed import EXCHANGES, GlobalLoss, exchange_bytes, synced_batchnorm
from self_supervised_bt.losses import BarlowTwinsLoss

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from ranks import run_ranks


def in_place(z1, z2):
    "The sum of the matrices in place, as in the original script, of embeddings standardised over all ranks"
    bn = torch.nn.BatchNorm1d(z1.shape[1], affine=False)
    with synced_batchnorm(bn): c = bn(z1).T @ bn(z2)/(len(z1)*dist.get_world_size())
    dist.all_reduce(c)
    diag = c.diagonal()
    return (diag - 1).square().sum() + 5e-3*(c.square().sum() - diag.square().sum())


def contenders():
    "Losses for embeddings of a part of the batch, each standardised or not as it wants them"
    return {"gather": GlobalLoss(BarlowTwinsLoss(), "gather"),
            "sum": GlobalLoss(BarlowTwinsLoss(), "sum"),
            "lightly, gather_distributed": Lightly(lambda_param=5e-3, gather_distributed=True),
            "all_reduce in place": in_place,
            "no exchange (another loss)": BarlowTwinsLoss()}


def embeddings(n, d):
    z, noise = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return z, z + .5*noise


def work(rank, n, d, turns):
    "Loss, own gradient as averaging leaves it, and seconds of each turn, by contender"
    world = dist.get_world_size()
    own = slice(n*rank//world, n*(rank+1)//world)
    out = {}
    for name, loss in contenders().items():
        z1, z2 = (z[own].clone().requires_grad_() for z in embeddings(n, d))
        times = []
        for _ in range(turns):
            z1.grad = z2.grad = None
            dist.barrier()
            start = time.perf_counter()
            value = loss(z1, z2)
            value.backward()
            times.append(time.perf_counter() - start)
        out[name] = value.item(), z1.grad.numpy()/world, times
    return out


def row(name, a, d, seen, whole, whole_grad):
    "One line of the table"
    values, grads, times = zip(*(o[name] for o in seen))
    grad = torch.cat([torch.from_numpy(g) for g in grads])
    factor = ((grad*whole_grad).sum()/whole_grad.square().sum()).item()
    error = abs(sum(values)/len(values) - whole)/whole
    slowest = [max(t)*1000 for t in zip(*times)]
    sent = f"{exchange_bytes(a.images, d, a.ranks, name)/1e6:6.1f} MB" if name in EXCHANGES else " "*9
    return (f"D={d:5} {name:28} loss off by {error:7.1e}, gradients {factor:5.3f} of the batch's, {sent} "
            f"{median_and_range(slowest, '.1f'):>24} ms")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(ranks=2, images=512, turns=7).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--widths", type=int, nargs="+", default=[128, 1024, 4096])
    a = p.parse_args()
    torch.set_num_threads(1)
    print(machine("lightly"))
    print(f"{a.images} images on {a.ranks} ranks of one thread; medians of {a.turns} turns (fastest-slowest), "
          "of the slowest rank\n")
    for d in a.widths:
        z1, z2 = (z.requires_grad_() for z in embeddings(a.images, d))
        whole = BarlowTwinsLoss()(z1, z2)
        whole.backward()
        seen = run_ranks(partial(work, n=a.images, d=d, turns=a.turns), a.ranks)
        for name in contenders(): print(row(name, a, d, seen, whole.item(), z1.grad))
        print()


if __name__ == "__main__": main()
