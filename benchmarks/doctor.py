"""The diagnosis on trial: which sick set-ups are named, and which healthy ones are left alone

    python benchmarks/doctor.py                      # digits, and textures and blobs made on the spot
    python benchmarks/doctor.py path/to/cifar10-train   # photographs, too: a folder with one folder per class

Every sick set-up has one fault that a fit does not report, or reports late. It counts as named if the finding that fits
is among those of `diagnose`. A healthy set-up counts as clean if there is no finding. All are built at small widths.
"""
import argparse
import copy
import time
import warnings

import torch
from _common import class_folders, machine
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, defaults
from fastai.optimizer import SGD, Adam
from fastai.torch_core import TensorImage, set_seed
from fasttransform import Pipeline, Transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, BarlowTwinsModel, create_barlow_twins_model
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.doctor import diagnose
from self_supervised_bt.evaluation import OnlineEvaluation
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.losses import variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import bt_learner, get_recipe
from self_supervised_bt.training import LARS, Autocast

warnings.filterwarnings("ignore")
if ProgressCallback in defaults.callbacks: defaults.callbacks.remove(ProgressCallback)


# images

def blobs(n=320, size=32):
    "Like photographs: smooth shapes, with a contrast and a mean colour per image"
    g = torch.Generator().manual_seed(0)
    small, contrast = torch.rand(n, 3, 4, 4, generator=g), torch.rand(n, 1, 1, 1, generator=g)
    small = small*contrast + torch.rand(n, 3, 1, 1, generator=g)*.5
    return nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)


def textures(n=320, size=32):
    "Waves of a direction, a wavelength and two colours per image"
    g = torch.Generator().manual_seed(1)
    angle, phase = (torch.rand(n, 1, 1, generator=g)*2*torch.pi for _ in range(2))
    frequency = 2*torch.pi*(1 + 5*torch.rand(n, 1, 1, generator=g))/size
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = (.5 + .5*torch.sin(frequency*(x*angle.cos() + y*angle.sin()) + phase))[:, None]
    one, two = torch.rand(2, n, 3, 1, 1, generator=g)
    return wave*one + (1 - wave)*two


def faded(contrast):
    "The blobs at a low contrast, and their statistics"
    x = .5 + contrast*(blobs() - .5)
    return x, (x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist())


def digits(n=640): return digits_images()[0][:n]


def both(n=640): return tuple(t[:n] for t in digits_images())


# Learners

def tiny(channels=1, size=16, arch="timm/test_resnet", **kwargs):
    return create_encoder(arch, n_in=channels, pretrained=False, size=size, **{"small_stem": False, "pool_type": "avg", **kwargs})


def of(x, recipe="digits", size=16, y=None, bs=64, width=64, arch="timm/test_resnet", augs=None, **kwargs):
    "A small Learner on images"
    dls = kwargs.pop("dls", None) or tensor_dls(x, y, bs=bs, valid_pct=0, device="cpu")
    encoder = arch if isinstance(arch, nn.Module) else tiny(x.shape[1], size, arch)
    changes = {k: kwargs.pop(k) for k in ("lr", "opt", "wd", "lr_bias", "schedule", "lmb_reg") if k in kwargs}
    recipe = get_recipe(recipe, **changes)
    return bt_learner(dls, encoder, size, augs, recipe, hidden_size=width, projection_size=width, **kwargs)


def photos(x=None, recipe="cifar", size=32, **kwargs):
    return of(blobs() if x is None else x, recipe, size, **kwargs)


def plain(model=None, augs=None, dls=None, **kwargs):
    "A Learner without a recipe, as in the README"
    dls = dls or tensor_dls(digits(), bs=64, valid_pct=0, device="cpu")
    model = model or create_barlow_twins_model(tiny(), 64, 64)
    return Learner(dls, model, cbs=[BarlowTwins(augs or views())], **kwargs)


def views(**kwargs): return get_barlow_twins_aug_pipelines(16, "digits", **kwargs)


def torch_dls(x, *y, bs=64, **kwargs):
    def dl(): return DataLoader(TensorDataset(x, *y), batch_size=bs, drop_last=True, **kwargs)
    return DataLoaders(dl(), dl())


def fitted(learn, epochs=8, lr=None, **kwargs):
    with learn.no_logging():
        if lr is None and hasattr(learn, "recipe"): learn.fit_recipe(epochs)
        else: learn.fit_one_cycle(epochs, lr or 1e-3)
    return learn


def changed(learn, change):
    with torch.no_grad(): change(learn.model)
    return learn


# sick set-ups: name, the finding that fits, and how it is made

class Detached(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
    def forward(self, x): return self.encoder(x).detach()


class HalfDetached(nn.Module):
    def __init__(self, stem, rest):
        super().__init__()
        self.stem, self.rest = stem, rest
    def forward(self, x): return self.rest(self.stem(x).detach())


class Unused(nn.Module):
    "A projector whose output is replaced by a part of its input"
    def __init__(self, projector):
        super().__init__()
        self.projector = projector
    def forward(self, h): return self.projector(h).detach() + h[:, :64]


class Overflows(nn.Module):
    def forward(self, h): return h*1e38*1e38


class Noise(Transform):
    split_idx = 0
    def encodes(self, x: TensorImage): return TensorImage(torch.rand(len(x), 1, 16, 16))


def frozen(part):
    learn = of(digits())
    getattr(learn.model, part).requires_grad_(False)
    return learn


def two_callbacks():
    learn = of(digits())
    learn.add_cb(MixedBarlowTwins(views()))
    return learn


def sorted_dls(loader):
    x, y = both()
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    if loader == "torch": return torch_dls(x.float()/255, y)
    items = [(TensorImage(i), int(c)) for i, c in zip(x.float()/255, y)]
    return DataLoaders.from_dsets(items, items, bs=64, shuffle=False, num_workers=0, device="cpu")


def sorted_without_indices():
    "A stream of class after class"
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            x, y = both()
            order = y.argsort(stable=True)
            return iter(zip(x[order].float()/255, y[order]))
    return DataLoaders(*[DataLoader(Stream(), batch_size=32) for _ in range(2)])


def falling_accuracy():
    "The rate of the recipe times 60 after 20 good epochs, with a projector that goes on fitting"
    x, y = digits_images()
    watch = OnlineEvaluation((x[:500], y[:500]), probe=False)
    learn = of(x[500:1140], cbs=[watch], bs=64)
    fitted(learn, 6)
    values = learn.recorder.values
    shuffle = torch.randperm(16)
    class Destroys(type(watch)): pass
    def lose(model):
        for p in model.encoder.parameters(): p.mul_(1 + 3*torch.randn_like(p))
    for _ in range(3):
        row = list(values[-1])
        changed(learn, lose)
        watch.measure()
        row[0], row[-1] = float(row[0])*.98, watch.columns[0].value
        values.append(row)
    return learn


def collapsed_rank():
    "Trained without a redundancy term, with Diagnostics"
    learn = of(digits(), lmb=0., cbs=[Diagnostics()])
    learn.recipe = learn.recipe.changed(lr=.05)
    return fitted(learn, 12)


def not_trained():
    learn = of(digits_images()[0], augs=[Pipeline([Noise()], split_idx=0) for _ in range(2)], bs=512, lr=1e-3)
    fitted(learn, 1)
    learn.recorder.losses = [1.]*200
    return learn


def slow():
    class Slow:
        items = [(TensorImage(i),) for i in digits(64).float()/255]
        def __len__(self): return 64
        def __getitem__(self, i):
            time.sleep(.02)
            return self.items[i]
    return plain(dls=DataLoaders.from_dsets(Slow(), Slow(), bs=16, device="cpu", num_workers=0))


def half(model):
    last = model.projector[-1]
    last.weight[:20], last.bias[:20] = 0, 1


def rank_one(model):
    last = model.projector[-1]
    last.weight.copy_(torch.outer(torch.randn(len(last.weight)), torch.randn(last.in_features)))
    last.bias.zero_()


def same_for_all(model):
    model.projector[-1].weight.zero_()
    model.projector[-1].bias.fill_(1.)


def nan_weight(model): model.projector[0].weight[3, 3] = float("nan")


def nan_images():
    x = digits().float()/255
    x[5:, :, 2, 2] = float("nan")
    return x


def projector_alone(model): return [list(model.projector.parameters())]


def model_replaced():
    "The optimizer of another model"
    learn = of(digits())
    learn.create_opt()
    learn.model = create_barlow_twins_model(tiny(), 64, 64)
    return learn


def with_recipe(**changes):
    learn = of(digits())
    learn.recipe = learn.recipe.changed(**changes)
    return learn


SICK = {
    "encoder detached": ("no gradient", lambda: plain(BarlowTwinsModel(Detached(tiny()), create_barlow_twins_model(tiny(), 64, 64).projector))),
}
