"""Loss over several processes: is it the global batch's, are its gradients, and what does a step cost, against lightly

    python benchmarks/distributed.py                                 # two processes, a thread each: a minute on 2 cores
    python benchmarks/distributed.py --processes 3 --images 255

Processes of one machine talk over loopback: the seconds say how the work is divided, not how a network does.
"""
import argparse
import statistics
import time

import torch
import torch.distributed as dist
from _common import machine
from lightly.loss import BarlowTwinsLoss as Lightly
from self_supervised_bt.distributed import GlobalLoss, exchange_bytes, run_ranks, synced_batchnorm
from self_supervised_bt.losses import BarlowTwinsLoss


def in_place(z1, z2):
    "The sum of the matrices taken in place, as the original script does, of embeddings standardised over all processes"
    bn = torch.nn.BatchNorm1d(z1.shape[1], affine=False)
    with synced_batchnorm(bn): c = bn(z1).T @ bn(z2)/(len(z1)*dist.get_world_size())
    dist.all_reduce(c)
    on = c.diagonal()
    return (on - 1).square().sum() + 5e-3*(c.square().sum() - on.square().sum())


def contenders():
    "Losses for embeddings of a part of the batch, each standardised or not as it wants them"
    lightly = Lightly(lambda_param=5e-3, gather_distributed=True)
    return {"gather": GlobalLoss(BarlowTwinsLoss(), "gather"), "sum": GlobalLoss(BarlowTwinsLoss(), "sum"), "lightly, gather_distributed": lightly, "all_reduce in place": in_place,
            "no exchange (another loss)": BarlowTwinsLoss()}


def embeddings(n, d):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return z, z + .5*torch.randn(n, d, generator=torch.Generator().manual_seed(1))


def work(rank, n, d, turns):
    own = slice(n*rank//dist.get_world_size(), n*(rank+1)//dist.get_world_size())
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
        out[name] = value.item(), z1.grad.numpy()/dist.get_world_size(), times   # as averaging leaves it
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(processes=2, images=512, turns=7).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--widths", type=int, nargs="+", default=[128, 1024, 4096])
    a = p.parse_args()
    torch.set_num_threads(1)
    print(machine("lightly"))
    print(f"{a.images} images on {a.processes} processes of one thread; medians of {a.turns} turns (fastest-slowest), of the slowest process\n")
    for d in a.widths:
        z1, z2 = (z.requires_grad_() for z in embeddings(a.images, d))
        whole = BarlowTwinsLoss()(z1, z2)
        whole.backward()
        seen = run_ranks(lambda rank: work(rank, a.images, d, a.turns), a.processes)
        for name in contenders():
            values, grads, times = zip(*(o[name] for o in seen))
            grad = torch.cat([torch.from_numpy(g) for g in grads])
            factor = ((grad*z1.grad).sum()/z1.grad.square().sum()).item()
            slowest = [max(t)*1000 for t in zip(*times)]
            sent = f"{exchange_bytes(a.images, d, a.processes, name)/1e6:6.1f} MB" if name in ("gather", "sum") else " "*9
            print(f"D={d:5} {name:28} loss off by {abs(sum(values)/len(values) - whole.item())/whole.item():7.1e}, gradients {factor:5.3f} of the batch's, {sent}"
                  f" {statistics.median(slowest):8.1f} ms ({min(slowest):.1f}-{max(slowest):.1f})")
        print()


if __name__ == "__main__": main()
