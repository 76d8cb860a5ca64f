"Several ranks train as one: losses, gradients, weights, bytes, and what happens when a rank is killed"
import importlib
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from callbacks import DoAt, DoToImages, DoToViews, KillAfter, Killed, RaiseAt
from conftest import quiet, small_model
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, defaults
from fastai.optimizer import SGD
from fastai.test_utils import synth_learner
from fastai.torch_core import TensorImage, set_seed
from fasttransform import Pipeline, Transform
from ranks import run_ranks
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.checkpoints import Checkpoints, checkpoints_in
from self_supervised_bt.data import digits_dls, digits_images, tensor_dls
from self_supervised_bt.distributed import (
    EXCHANGES,
    GlobalBatch,
    GlobalLoss,
    cheaper_exchange,
    end_with_launcher,
    exchange_bytes,
    explaining_lost_rank,
    gather_embeddings,
    on_rank0,
    over_ranks,
    seed_ranks,
    setup_ranks,
    synced_batchnorm,
)
from self_supervised_bt.guard import NonFiniteGuard
from self_supervised_bt.losses import AllPairs, BarlowTwinsLoss, variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins, MixedBarlowTwinsLoss
from self_supervised_bt.recipes import bt_learner

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_available(), reason="processes are forked")
pytest.importorskip("accelerate")
ROWS = {2: (7, 5), 3: (5, 4, 3)}   # of every rank: an uneven last batch


def net(dtype):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return create_barlow_twins_model(encoder, 12, 16).to(dtype)


def views(dtype, n=12, count=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=g)
    noise = [torch.randn(x.shape, dtype=torch.float64, generator=g) for _ in range(count)]
    return [(x + .3*o).to(dtype) for o in noise]


def covariances(z1, z2):
    "A user's own loss"
    return (z1.T @ z2/len(z1) - z1.mean(0)[:, None]*z2.mean(0)).square().sum()


def formula(z1, z2, lmb=5e-3):
    "Zbontar et al. 2021, eq. 1 and 2"
    a, b = ((z - z.mean(0))/(z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = a.T @ b/len(a)
    on = (c.diagonal() - 1).square().sum()
    return on + lmb*(c.square().sum() - c.diagonal().square().sum())


def of_variant(*names, exchange=None):
    "What the library is given, what one rank with all rows computes, views"
    return lambda: GlobalLoss(variant_loss(*names), exchange), lambda: variant_loss(*names), 2


CASES = {  # name: what the library is given, what one rank with all rows computes, views
    "gather": (lambda: GlobalLoss(BarlowTwinsLoss(), "gather"), lambda: formula, 2),
    "sum": (lambda: GlobalLoss(BarlowTwinsLoss(), "sum"), lambda: formula, 2),
    "invariance only": (lambda: GlobalLoss(BarlowTwinsLoss(0., scale=2.), "gather"),
                        lambda: BarlowTwinsLoss(0., scale=2.), 2),
    "redundancy only": of_variant("redundancy only", exchange="sum"),
    "stop-gradient, gather": of_variant("stop-gradient", exchange="gather"),
    "stop-gradient, sum": of_variant("stop-gradient", exchange="sum"),
    "feature": of_variant("feature normalisation"),
    "cross-entropy": of_variant("cross-entropy"),
    "hsic": of_variant("hsic"),
    "own": (lambda: GlobalLoss(covariances), lambda: covariances, 2),
    "three views": (lambda: over_ranks(AllPairs(BarlowTwinsLoss())), lambda: AllPairs(BarlowTwinsLoss()), 3),
    "mixed": (lambda: GlobalLoss(MixedBarlowTwinsLoss()), lambda: MixedBarlowTwinsLoss(), 3),
}


def step(model, loss, vs, rest=()):
    "Loss, gradients, and the buffers after a step's passes: two views at once, a third apart, as the callbacks do"
    zs = model(torch.cat(vs[:2])).chunk(2)
    value = loss(*zs, *(model(v) for v in vs[2:]), *rest)
    value.backward()
    inner = getattr(model, "module", model)
    grads = torch.cat([p.grad.flatten() for p in inner.parameters()])
    buffers = torch.cat([b.flatten().double() for b in inner.buffers()])
    return value.item(), grads.numpy(), buffers.numpy()


def share(rank, sizes): return slice(sum(sizes[:rank]), sum(sizes[:rank+1]))


def mixture(sizes):
    "Permutation and weights, sampled by each rank for its own rows"
    perms = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    return perms, [torch.tensor(.2 + .1*i) for i in range(len(sizes))]


def every_case(rank, world):
    sizes, seen = ROWS[world], {}
    for dtype in (torch.float64, torch.float32):
        for name, (loss, _, count) in CASES.items():
            model = net(dtype)
            perms, weights = mixture(sizes)
            with synced_batchnorm(model):
                ddp = DistributedDataParallel(model, broadcast_buffers=False)
                own = [v[share(rank, sizes)] for v in views(dtype, count=count)]
                rest = (perms[rank], weights[rank]) if name == "mixed" else ()
                seen[name, dtype] = step(ddp, loss(), own, rest)
    return seen


@pytest.mark.parametrize("world", ROWS)
def test_loss_and_every_gradient_equal_those_of_one_rank(world):
    sizes, seen = ROWS[world], run_ranks(partial(every_case, world=world), world)
    for (name, dtype) in seen[0]:
        _, reference, count = CASES[name]
        perms, weights = mixture(sizes)
        perm = torch.cat([p + share(i, sizes).start for i, p in enumerate(perms)])
        rest = (perm, torch.cat([w.expand(n) for w, n in zip(weights, sizes)])) if name == "mixed" else ()
        loss, grad, buffers = step(net(dtype), reference(), views(dtype, count=count), rest)
        tol = 1e-6 if dtype == torch.float64 else 1e-5
        for got in seen:
            value, g, b = got[name, dtype]
            assert abs(value - loss) <= tol*abs(loss), (name, dtype)
            assert abs(g - grad).max() <= tol*abs(grad).max(), (name, dtype, abs(g - grad).max()/abs(grad).max())
            np.testing.assert_allclose(b, buffers, rtol=1e-4, atol=1e-5)
        assert len({got[name, dtype][0] for got in seen}) == 1, f"{name}: the ranks do not agree to the last digit"


def compare_part(given, rank, **kwargs):
    "Relative error of the loss, largest error of the gradient, largest gradient"
    rows = slice(rank*8, rank*8 + 8)
    own = given[:, rows].detach().requires_grad_()
    loss = GlobalLoss(BarlowTwinsLoss(), **kwargs)(*own)
    loss.backward()
    whole = given.detach().requires_grad_()
    expected = BarlowTwinsLoss()(*whole)
    expected.backward()
    assert loss.dtype == expected.dtype and own.grad.dtype == whole.grad.dtype
    error = (own.grad/2 - whole.grad[:, rows]).abs().max()
    return (abs(loss - expected)/expected).item(), error.item(), whole.grad.abs().max().item()


def odd_inputs(rank):
    z = torch.randn(2, 16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[..., 0] = 3.   # a constant dimension
    strided = z.transpose(1, 2).contiguous().transpose(1, 2)
    out = {}
    for name, given in {"far from 0": z.float() + 1000, "half": z.bfloat16(), "strided": strided}.items():
        for exchange in EXCHANGES:
            for even in (False, True):
                out[name, exchange, even] = compare_part(given, rank, exchange=exchange, even=even)
    one = z[:, :1] if rank == 0 else z[:, 1:]   # a single row
    out["one row"] = abs(GlobalLoss(BarlowTwinsLoss())(*one) - BarlowTwinsLoss()(*z)).item(), 0., 1.
    return out


def test_odd_inputs():
    for seen in run_ranks(odd_inputs):
        for name, (loss, grad, size) in seen.items():
            tol = {"far from 0": 2e-4, "half": 1e-2}.get(name[0], 1e-9)
            assert loss < tol and grad < tol*size, (name, loss, grad, size)


def a_queue(rank):
    queued, alone, losses = GlobalLoss(variant_loss(queue=8)), variant_loss(queue=8), []
    for i in range(3):
        z = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        z.requires_grad_()
        losses.append((queued(*z[:, rank*3:rank*3+3]).item(), alone(*z).item()))
    return losses


def test_a_queue_holds_the_global_batch():
    for losses in run_ranks(a_queue):
        for got, expected in losses: assert abs(got - expected) < 1e-9


def bad_rows(rank):
    z, said = torch.randn(2, 4, 3), []
    if rank == 1: z[1, 2, 0] = torch.nan
    for loss in (BarlowTwinsLoss(), variant_loss("hsic")):
        for exchange in EXCHANGES if loss.divisible else (None,):
            with pytest.raises(FloatingPointError) as e: GlobalLoss(loss, exchange)(*z)
            said.append(str(e.value))
    with pytest.raises(ValueError, match=r"different widths, \[3, 4\]"):
        GlobalLoss(BarlowTwinsLoss())(*torch.randn(2, 4, 3+rank))
    with pytest.raises(TypeError, match="only embeddings"): GlobalLoss(lambda a, b, c: a.sum())(*z, 3)
    return said


def test_bad_input_is_refused_by_all_ranks():
    other, own = run_ranks(bad_rows)
    assert all("embeddings of rank 0 are finite" in s for s in other[:2])
    assert all("z2 has 1 nan" in s for s in own)
    for kwargs in ({"exchange": "scatter"}, {"exchange": "sum", "objective": variant_loss("hsic")}):
        with pytest.raises(ValueError, match="exchange"): GlobalLoss(**{"objective": BarlowTwinsLoss(), **kwargs})


def test_alone_nothing_changes():
    z = torch.randn(2, 8, 4)
    loss = GlobalLoss(BarlowTwinsLoss())
    assert loss(*z) == BarlowTwinsLoss()(*z) and loss.lmb == 5e-3 and loss.terms.invariance > 0
    assert setup_ranks() == 1
    loss.lmb = .1
    assert loss.objective.lmb == .1 and not hasattr(GlobalLoss(covariances), "lmb")
    assert on_rank0(lambda a, b: a + b, 1, b=2) == 3


# fits

class Rolled(Transform):
    "A view that samples nothing"
    split_idx, order = 0, 0
    def __init__(self, by): self.by = by
    def encodes(self, x: TensorImage): return x.roll(self.by, -1)


def still_views(): return [Pipeline([Rolled(i)], split_idx=0) for i in (0, 1)]


def digits_items(n, n_valid):
    "`n` images for training, and the next `n_valid` for validation"
    x = digits_images()[0][:n+n_valid].float()/255
    items = [(TensorImage(im),) for im in x]
    return items[:n], items[n:]


def fit_learner(cb=None, n=48, bs=8, n_valid=22, opt_func=SGD, **kwargs):
    options = dict(bs=bs, val_bs=bs, shuffle=False, device="cpu", num_workers=0)
    dls = DataLoaders.from_dsets(*digits_items(n, n_valid), **options)
    torch.manual_seed(0)
    cb = cb or BarlowTwins(still_views(), terms=True)
    return quiet(Learner(dls, small_model(hidden=16), cbs=[cb], opt_func=opt_func, **kwargs))


def assert_restored(learn, objective=None):
    "Nothing of a distributed fit is left"
    views = learn.barlow_twins
    assert not views.joined and learn.global_batch.restore is None
    assert not any("forward" in vars(m) for m in learn.model.modules())
    if objective is None: assert isinstance(views.objective, BarlowTwinsLoss)
    else: assert views.objective is objective


def weights(learn): return torch.cat([t.detach().flatten().double() for t in learn.model.state_dict().values()]).numpy()


def fit_still(rank, exchange):
    learn = fit_learner()
    learn.barlow_twins.exchange = exchange
    loss_func, objective = learn.loss_func, learn.barlow_twins.objective
    kinds = [type(m) for m in learn.model.modules()]
    with learn.distrib_ctx(): learn.fit(2, 1e-2)
    assert_restored(learn, objective)
    assert learn.loss_func is loss_func and [type(m) for m in learn.model.modules()] == kinds
    return weights(learn), np.array(learn.recorder.values)


@pytest.mark.parametrize("world,exchange", [(2, "gather"), (3, "sum")])
def test_a_fit_equals_that_of_one_rank(world, exchange):
    "48 images in order, in parts of 8: batch k of one rank are the k-th batches of all"
    seen = run_ranks(partial(fit_still, exchange=exchange), world)
    learn = fit_learner(bs=8*world)
    order = torch.arange(48).view(world, -1).split(8, 1)
    learn.dls.train.get_idxs = lambda: torch.cat([o.flatten() for o in order]).tolist()
    learn.dls.valid.get_idxs = lambda: _shards(22, world, 8)
    learn.dls.train.create_batches = partial(_of_sizes, learn.dls.train, [o.numel() for o in order])
    valid = -(-22//world)
    sizes = [world*min(8, valid-i) for i in range(0, valid, 8)]
    learn.dls.valid.create_batches = partial(_of_sizes, learn.dls.valid, sizes)
    learn.fit(2, 1e-2)
    for w, values in seen:
        np.testing.assert_array_equal(w, seen[0][0])
        np.testing.assert_allclose(w, weights(learn), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values, seen[0][1], rtol=1e-6)
        # losses of training and validation, and the terms
        np.testing.assert_allclose(values, np.array(learn.recorder.values), rtol=1e-4)


def _shards(n, world, bs):
    "fastai's DistributedDL: padded from the front, cut in contiguous parts, batch by batch"
    own = -(-n//world)
    parts = (torch.arange(own*world) % n).view(world, own)
    return torch.cat([c.flatten() for c in parts.split(bs, 1)]).tolist()


def _of_sizes(dl, sizes, samps):
    samps = iter(list(samps))
    for n in sizes: yield dl.create_batch([dl.create_item(next(samps)) for _ in range(n)])


class Watches(BarlowTwins):
    "Keeps a random number sampled after the views of every step"
    def train_on(self, x):
        super().train_on(x)
        self.seen = [*getattr(self, "seen", []), float(torch.rand(()))]


def fifty_steps(rank):
    runs = {"views": (Watches(get_multi_aug_pipelines(2, 8)), {}),
            "mixed": (MixedBarlowTwins(get_multi_aug_pipelines(2, 8)), {}),
            "own batchnorm": (MixedBarlowTwins(get_multi_aug_pipelines(2, 8)), {"sync_bn": False}),
            "three views": (BarlowTwins(get_multi_aug_pipelines(3, 8), terms=True), {})}
    out = {}
    for name, (cb, kwargs) in runs.items():
        # 51 and 51 images: batches of 8 and one of 3; 9 and 9 of validation: the last batch of one image
        learn = fit_learner(cb, n=101, n_valid=17)
        set_seed(7)
        with learn.distrib_ctx(**kwargs): learn.fit(10 if name == "views" else 2, 1e-2)
        values = [float(v) for v in learn.recorder.values[-1]]
        out[name] = weights(learn), getattr(cb, "seen", None), learn.train_iter, values
    return out


def test_weights_are_equal_after_50_steps():
    a, b = run_ranks(fifty_steps)
    for name in a:
        np.testing.assert_array_equal(a[name][0], b[name][0], err_msg=name)
        assert np.isfinite(a[name][0]).all() and a[name][3] == b[name][3] and np.isfinite(a[name][3]).all()
    assert a["views"][2] >= 50 and len(a["three views"][3]) == 6
    views_a, views_b = a["views"][1], b["views"][1]
    assert len(views_a) == len(views_b)
    assert not set(views_a[:40]) & set(views_b[:40]), "the ranks sample the same views"


def convolved(rank):
    torch.set_num_threads(2)   # which a child may ask for, as accelerate does for it
    layers = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(64, 512))
    net(torch.rand(64, 3, 32, 32)).square().mean().backward()
    return net[0].weight.shape


def test_processes_can_be_forked_after_work_on_several_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(3): whole = convolved(0)
        assert run_ranks(convolved, timeout=20) == [whole]*2 and torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)


def fit_digits(seed, cbs, bs=64):
    "Weights after two distributed epochs"
    set_seed(seed)
    learn = bt_learner(digits_dls(bs=bs, device="cpu"), "timm/test_resnet", 8, small_stem=False,
                       hidden_size=16, projection_size=16, cbs=cbs)
    with learn.no_logging(), learn.distrib_ctx(): learn.fit(2, 1e-2)
    return [p.detach().numpy().copy() for p in learn.model.parameters()]


def killed_and_resumed(rank, folder, at):
    "Weights of a whole run, and of one that was killed after step `at` and resumed by Learners from other seeds"
    whole = fit_digits(0, [])
    with pytest.raises(Killed): fit_digits(0, [Checkpoints(folder, every=2), KillAfter(at)])
    names = [f.name for f in checkpoints_in(folder)]
    return whole, fit_digits(1 + rank, [Checkpoints(folder, every=2, resume=True)]), names


@pytest.mark.parametrize("at", [5, 15])
def test_a_run_of_several_ranks_resumes_to_the_last_bit(tmp_path, at):
    for whole, again, names in run_ranks(partial(killed_and_resumed, folder=tmp_path, at=at)):
        assert names[0] == f"step-{at - at % 2 if at < 12 else 14:010d}.pt"
        for a, b in zip(whole, again): np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".trial*"))


def failed_and_replaced(rank, folder, resume):
    "Weights of a whole run, and of one in the folder of another that failed before its first step"
    whole = fit_digits(0, [])
    with pytest.raises(Killed): fit_digits(0, [Checkpoints(folder), RaiseAt("before_batch", Killed("early"))], bs=32)
    names = [f.name for f in checkpoints_in(folder)]
    return whole, fit_digits(0, [Checkpoints(folder, resume=resume)]), names


@pytest.mark.parametrize("resume", [False, True])
def test_all_ranks_replace_a_run_that_has_not_trained_a_step(tmp_path, resume):
    for whole, again, names in run_ranks(partial(failed_and_replaced, folder=tmp_path, resume=resume)):
        assert names == ["step-0000000000.pt"]
        for a, b in zip(whole, again): np.testing.assert_array_equal(a, b)


def signal_rank1(number):
    "A function of a Learner that sends a signal to rank 1 alone"
    def send(learn):
        if dist.get_rank() == 1: os.kill(os.getpid(), number)
    return send


def asked_to_stop(rank, folder):
    try: fit_digits(0, [Checkpoints(folder), DoAt("after_batch", signal_rank1(signal.SIGTERM), 3)])
    except SystemExit as e:
        code = e.code
        names = [f.name for f in checkpoints_in(folder)]   # written before any rank ends
    return code, names, fit_digits(0, []), fit_digits(0, [Checkpoints(folder, resume=True)])


def test_a_signal_to_one_rank_saves_and_ends_all_ranks(tmp_path):
    for code, names, whole, again in run_ranks(partial(asked_to_stop, folder=tmp_path)):
        assert code == 75 and names[0] == "step-0000000010.pt"
        for a, b in zip(whole, again): np.testing.assert_array_equal(a, b)


def deterministic(rank):
    set_seed(rank)   # only the seed of rank 0 counts
    seed_ranks()
    return torch.rand(1).item(), np.random.rand()


def test_random_numbers_differ_and_repeat():
    one, two = run_ranks(deterministic, 3), run_ranks(deterministic, 3)
    assert one == two and len({t for t, _ in one}) == len({n for _, n in one}) == 3


def a_search(rank):
    learn = fit_learner(BarlowTwins(get_multi_aug_pipelines(2, 8)))
    with learn.distrib_ctx():
        learn.fit(1, 1e-2)
        before, momenta = weights(learn), str(learn.opt.state_dict()["state"])
        learn.lr_find(num_it=6, show_plot=False)
        assert (weights(learn) == before).all() and str(learn.opt.state_dict()["state"]) == momenta
        learn.fit(1, 1e-2)
    return weights(learn)


def test_lr_find_restores_weights_and_optimizer():
    one, two = run_ranks(a_search, timeout=20)
    np.testing.assert_array_equal(one, two)


def parts_of_tensors(rank):
    from fastai.distributed import DistributedDL
    x = torch.arange(90, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    dls, seen = tensor_dls(x, bs=8, valid_pct=0, device="cpu"), {}
    for drop_last in (True, False):
        dls.train.drop_last = drop_last
        dl = DistributedDL(dls.train)
        batches = [b[0][:, 0, 0, 0].tolist() for b in dl]
        assert len(batches) == len(dl)
        seen[drop_last] = batches
    return seen


def test_tensors_are_divided():
    a, b = run_ranks(parts_of_tensors)
    assert [len(o) for o in a[False]] == [8]*5 + [5] == [len(o) for o in b[False]] and len(a[True]) == 5
    assert sorted(sum(a[False] + b[False], [])) == list(range(90))


class Stream(IterableDataset):
    "What a reader of shards is: every rank's own part, without indices"
    def __len__(self): return 20
    def __iter__(self):
        x = digits_images()[0][dist.get_rank()::dist.get_world_size()].float()/255
        for im in x[:20]: yield (im,)


def on_a_stream(rank):
    learn = fit_learner()
    train, valid = (DataLoader(Stream(), batch_size=8) for _ in range(2))
    learn.dls = DataLoaders(train, valid, device="cpu")
    with learn.distrib_ctx(): learn.fit(2, 1e-2)
    return weights(learn), list(learn.recorder.values[-1])


def test_what_a_launcher_left_out_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT not set"): setup_ranks()


def under_slurm(rank):
    "SLURM's names alone, and a store of rank 0's own"
    port = int(os.environ["MASTER_PORT"]) + 1
    dist.barrier()
    dist.destroy_process_group()
    elastic = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *elastic): os.environ.pop(name)
    os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS="2", SLURM_LOCALID=str(rank), MASTER_PORT=str(port))
    return setup_ranks(timeout=20), dist.get_rank(), os.environ["WORLD_SIZE"], on_rank0(lambda: "written")


def test_slurm_numbers_are_read():
    assert run_ranks(under_slurm) == [(2, 0, "2", "written"), (2, 1, "2", None)]


def test_a_stream_is_not_divided_again():
    one, two = run_ranks(on_a_stream, timeout=20)
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1] == two[1] and np.isfinite(one[1]).all()


def refused(rank):
    learn = fit_learner()
    views = learn.barlow_twins
    with pytest.raises(RuntimeError, match="gradients are not averaged"): learn.fit(1)
    assert_restored(learn)
    learn.validate()   # each for itself, as nothing is divided
    views.exchange = "none"
    learn.fit(1)
    views.exchange = "some"
    with pytest.raises(ValueError, match="exchange must be one of"), learn.distrib_ctx(): learn.fit(1)
    views.exchange, views.objective = "sum", variant_loss("hsic")
    with pytest.raises(ValueError, match="exchange='sum' needs"), learn.distrib_ctx(): learn.fit(1)
    views.exchange, views.objective = None, BarlowTwinsLoss()
    learn.model.encoder[1].__class__ = type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: x})
    with pytest.raises(TypeError, match="Own has a forward pass of its own"), learn.distrib_ctx(): learn.fit(1)
    learn.model.encoder[1].__class__ = nn.BatchNorm2d
    assert_restored(learn)
    learn.add_cb(RaiseAt("after_step", ZeroDivisionError("failed")))
    with pytest.raises(ZeroDivisionError), learn.distrib_ctx(): learn.fit(1)
    assert_restored(learn)


def test_a_fit_whose_gradients_are_not_averaged_is_refused(): run_ranks(refused)


def without_the_callback(rank):
    learn = fit_learner()
    learn.remove_cb(GlobalBatch)
    with pytest.raises(RuntimeError, match=r"with 2 ranks the loss.*learn.add_cb\(GlobalBatch\(\)\)"): learn.fit(1)
    with pytest.raises(RuntimeError, match="with 2 ranks the loss"), learn.distrib_ctx(): learn.fit(1)
    learn.add_cb(GlobalBatch())
    with learn.distrib_ctx(): learn.fit(1)
    assert_restored(learn)


def test_a_learner_without_the_callback_is_refused(): run_ranks(without_the_callback)


def reloaded(rank):
    assert defaults.callbacks.count(GlobalBatch) == 1
    old = fit_learner()
    module = importlib.reload(sys.modules[GlobalBatch.__module__])
    assert [cb for cb in defaults.callbacks if cb.__name__ == "GlobalBatch"] == [module.GlobalBatch]
    out = []
    for learn in (old, fit_learner()):
        with learn.distrib_ctx(): learn.fit(1, 1e-2)
        out.append(weights(learn))
    np.testing.assert_array_equal(*out)
    return out


def test_a_reload_replaces_the_callback():
    a, b = run_ranks(reloaded)
    np.testing.assert_array_equal(a, b)


def test_an_exported_learner_loads_without_this_library():
    learn = synth_learner()
    assert learn.global_batch.joins_ranks
    pickled = pickle.dumps(learn.global_batch)
    assert b"self_supervised_bt" not in pickled and type(pickle.loads(pickled)) is Callback


# a loss that is not finite

def spoil_images_of_rank1(learn):
    if dist.get_rank() == 0: return
    learn.xb = (learn.xb[0].clone(),)
    learn.xb[0][2, 0, 1, 1] = torch.nan


def guarded(rank, sync_bn):
    learn = fit_learner()
    guard = NonFiniteGuard()
    learn.add_cbs([guard, DoToImages(spoil_images_of_rank1, 1)])
    with pytest.raises(FloatingPointError, match="step 1"), learn.distrib_ctx(sync_bn=sync_bn): learn.fit(1, 1e-2)
    assert_restored(learn)
    return guard.last.where, weights(learn)


@pytest.mark.parametrize("sync_bn", [True, False])
def test_the_guard_stops_all_ranks(sync_bn):
    "Nothing is run again that would wait for other ranks"
    (where_a, a), (where_b, b) = run_ranks(partial(guarded, sync_bn=sync_bn), timeout=20)
    assert (where_a, where_b) == ("elsewhere", "images")   # rank 0 blames rank 1's image, not its own BatchNorm or loss
    if sync_bn: np.testing.assert_array_equal(a, b)
    assert np.isfinite(a).all() and np.isfinite(b).all()


# bytes

def received():
    "Bytes this process's TCP connections have received, as the kernel counts them"
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try: s = socket.socket(fileno=int(fd))
        except OSError: continue   # a file
        try: total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 128)[0]
        except (OSError, struct.error): pass   # a socket of another kind
        finally: s.detach()
    return total


def count_bytes(rank, cases):
    out = []
    for n, d, exchange, dtype in cases:
        z = torch.randn(2, n//dist.get_world_size(), d).to(dtype).requires_grad_()
        dist.barrier()
        before = received()
        GlobalLoss(BarlowTwinsLoss(), exchange)(*z).backward()
        out.append(received() - before)
        dist.barrier()
    return out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts bytes by connection")
@pytest.mark.parametrize("world", [2, 3])
def test_bytes_exchanged_are_those_of_the_arithmetic(world):
    sizes, dtypes = ((120, 256), (600, 256)), (torch.float32, torch.bfloat16)
    cases = [(*size, e, t) for size, e, t in itertools.product(sizes, (*EXCHANGES, None), dtypes)]
    counted = np.mean(run_ranks(partial(count_bytes, cases=cases), world), 0)
    for (n, d, exchange, dtype), seen in zip(cases, counted):
        size = dtype.itemsize
        expected = exchange_bytes(n, d, world, exchange or cheaper_exchange(n, d, size), size)
        assert abs(seen - expected) < .04*expected + 2500, (n, d, exchange, dtype, seen, expected)


def test_the_cheaper_exchange_is():
    cases = itertools.product((64, 1000, 1024, 4096, 20000), (128, 1024, 8192), (2, 4, 8), (2, 3, 64))
    for n, d, size, world in cases:
        gather, summed = (exchange_bytes(n, d, world, e, size) for e in EXCHANGES)
        if abs(gather - summed) < .3*gather: continue   # the O(D) of the statistics
        assert cheaper_exchange(n, d, size) == ("gather" if gather < summed else "sum"), (n, d, size, world)


# ranks that are lost

def lost_in_batch_3(rank, signal):
    "What this rank says when rank 1 is sent a signal"
    torch.set_num_threads(1)
    learn = fit_learner(BarlowTwins(get_multi_aug_pipelines(2, 8)), n=96)
    learn.add_cb(DoToViews(signal_rank1(signal), 3))
    start = time.time()
    try:
        with learn.distrib_ctx(): learn.fit(1)
    except RuntimeError as e:
        return type(e).__name__, str(e), time.time() - start


SIGNALS = [(2, signal.SIGKILL, 10), (3, signal.SIGKILL, 10), (2, signal.SIGSTOP, 15)]


@pytest.mark.parametrize("world,kind,limit", SIGNALS)
def test_a_lost_rank_ends_the_others(world, kind, limit):
    said = run_ranks(partial(lost_in_batch_3, signal=int(kind)), world, timeout=3, check=False)
    assert "ended without an answer" in str(said[1])
    for o in said[:1] + said[2:]:
        name, message, seconds = o
        says = r"rank \d of \d lost contact with another rank.*in batch \d of epoch 0"
        assert name == "RankLost" and re.search(says, message, re.S), o
        assert seconds < limit


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    "A rank whose parent is gone gets SIGTERM, on which `Checkpoints` saves and ends the run"
    ended = tmp_path/"ended"
    def rank():
        signal.signal(signal.SIGTERM, lambda *_: ended.write_text("SIGTERM"))
        end_with_launcher(every=.05)
        for _ in range(200):
            time.sleep(.05)
            if ended.exists(): os._exit(0)
        os._exit(1)
    def launcher():
        if os.fork() == 0: rank()
        time.sleep(60)
    process = multiprocessing.get_context("fork").Process(target=launcher)
    process.start()
    time.sleep(.5)
    assert not ended.exists(), "the launcher is alive"
    process.kill()
    process.join()
    for _ in range(100):
        if ended.exists(): break
        time.sleep(.05)
    assert ended.read_text() == "SIGTERM"


def test_embeddings_of_one_rank_need_no_process_group():
    z = torch.randn(4, 3, requires_grad=True)
    gathered, = gather_embeddings(z)
    assert gathered is z


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape") as e, explaining_lost_rank(): raise RuntimeError("shape mismatch")
    assert type(e.value) is RuntimeError


SCRIPT = """
import os, time
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn
from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.data import digits_dls
dist.init_process_group("gloo")
def make_learner():
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = create_barlow_twins_model(nn.Sequential(*layers), 16, 16)
    return Learner(digits_dls(bs=64, device="cpu"), model, cbs=BarlowTwins(get_multi_aug_pipelines(2, 8)))
said = open(f"said{dist.get_rank()}.txt", "w")
def try_to_fit(learn):
    try: learn.fit(1)
    except RuntimeError as e: print("refused:", " ".join(str(e).split()), file=said, flush=True)
early = make_learner()
try_to_fit(early)
from self_supervised_bt.distributed import setup_ranks
setup_ranks()
try_to_fit(early)
learn = make_learner()
def kill_rank1(self):
    if self.iter == 3 and dist.get_rank() == 1:
        print("killed", time.time(), file=said, flush=True)
        os.kill(os.getpid(), 9)
with learn.no_bar(), learn.distrib_ctx(): learn.fit(1)
print("weights", sum(p.double().sum().item() for p in learn.model.parameters()), file=said, flush=True)
with learn.no_bar(), learn.distrib_ctx(): learn.fit(1, cbs=Callback(before_batch=kill_rank1))
"""


def test_torchrun(tmp_path):
    "Fits are refused without the module and for Learners made before its import; all ranks end when one is killed"
    (tmp_path/"train.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    ended, said = time.time(), [(tmp_path/f"said{i}.txt").read_text() for i in (0, 1)]
    for o in said:
        refused = re.findall(r"^refused: .*with 2 ranks the loss", o, re.M)
        assert len(refused) == 2, (said, done.stderr[-3000:])
    weights = [re.search(r"^weights (.*)$", o, re.M)[1] for o in said]
    assert weights[0] == weights[1]
    killed = float(re.search(r"^killed (.*)$", said[1], re.M)[1])
    assert done.returncode != 0 and ended - killed < 20, done.stderr[-3000:]
