"Is the loss the peer's loss? Relative difference in value and gradient, and forward + backward time side by side"
import statistics

import torch
from lightly.loss import BarlowTwinsLoss

from _common import machine, spread, times
from self_supervised_bt.losses import barlow_twins_loss

torch.manual_seed(0)
peer = BarlowTwinsLoss(lambda_param=5e-3)


def step(loss, z1, z2):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    value.backward()
    return value.detach(), z1.grad


print(machine("lightly"))
print(f"{'N':>5} {'D':>5} | {'value, rel.':>11} {'grad, rel.':>11} | {'ours':>26} {'lightly':>26} {'lightly/ours':>12}")
for n, d in ((64, 128), (256, 512), (256, 2048), (1024, 1024)):
    z1, z2 = torch.randn(2, n, d)
    (a, ga), (b, gb) = step(barlow_twins_loss, z1, z2), step(peer, z1, z2)
    ours, theirs = times(lambda: step(barlow_twins_loss, z1, z2), lambda: step(peer, z1, z2))
    print(f"{n:5} {d:5} | {abs(a-b)/b:11.1e} {(ga-gb).norm()/gb.norm():11.1e} | {spread(ours):>26} {spread(theirs):>26} "
          f"{statistics.median(theirs)/statistics.median(ours):12.2f}")
