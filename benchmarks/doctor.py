"""The diagnosis on trial: which sick set-ups it names, and which healthy ones it leaves alone

    python benchmarks/doctor.py                         # digits, and images made on the spot
    python benchmarks/doctor.py path/to/cifar10-train   # photographs, too: a folder with one folder per class

Every sick set-up (those of tests/test_doctor.py, and two real runs) has one fault that a fit does not report, or
reports late. It counts as named if the finding that fits is among those of `diagnose`. A healthy set-up counts as clean
if there is no finding. All are small: widths of 32 to 256.
"""
import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from _common import class_folders, machine

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
import test_doctor as cases  # noqa: E402
from conftest import small_model  # noqa: E402
from fastai.data.core import DataLoaders  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.optimizer import SGD, OptimWrapper  # noqa: E402
from fastai.torch_core import TensorImage, set_seed  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler  # noqa: E402

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_multi_aug_pipelines  # noqa: E402
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model  # noqa: E402
from self_supervised_bt.data import digits_images, tensor_dls  # noqa: E402
from self_supervised_bt.diagnostics import Diagnostics  # noqa: E402
from self_supervised_bt.doctor import diagnose  # noqa: E402
from self_supervised_bt.evaluation import OnlineEvaluation  # noqa: E402
from self_supervised_bt.layers import create_encoder  # noqa: E402
from self_supervised_bt.losses import VARIANTS, variant_loss  # noqa: E402
from self_supervised_bt.mixed import MixedBarlowTwins  # noqa: E402
from self_supervised_bt.recipes import bt_learner, get_recipe  # noqa: E402
from self_supervised_bt.training import Autocast  # noqa: E402

# images

def digits(n=640): return digits_images()[0][:n]


def textures(n=320, size=32):
    "Waves with a direction, a wavelength and two colours per image"
    g = torch.Generator().manual_seed(1)
    angle, phase, frequency = torch.rand(3, n, 1, 1, generator=g)*6.28
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = (.5 + .5*torch.sin((1 + frequency)*6.28/size*(x*angle.cos() + y*angle.sin()) + phase))[:, None]
    one, two = torch.rand(2, n, 3, 1, 1, generator=g)
    return wave*one + (1 - wave)*two


def statistics(x): return x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist()


# Learners

def of(x=None, recipe="digits", size=16, y=None, bs=64, width=64, arch="timm/test_resnet", views=None, dls=None,
       settings=None, fit=0, **kwargs):
    "A small Learner by a recipe, perhaps after some epochs"
    x = digits() if x is None else x
    dls = dls or tensor_dls(x, y, bs=bs, valid_pct=0, device="cpu")
    channels = dls.train.one_batch()[0].shape[1] if hasattr(dls.train, "one_batch") else x.shape[1]
    if isinstance(arch, str): arch = create_encoder(arch, n_in=channels, pretrained=False, size=size)
    learn = bt_learner(dls, arch, size, views, get_recipe(recipe, epochs=20, **(settings or {})),
                       hidden_size=width, projection_size=width, **kwargs)
    cases.quiet(learn)
    if fit: learn.fit_recipe(fit)
    return learn


def photos(x=None, recipe="cifar", size=32, width=128, **kwargs):
    return of(cases.photographs(320) if x is None else x, recipe, size, width=width, **kwargs)


def views(size=16, recipe="digits", **kwargs): return get_barlow_twins_aug_pipelines(size, recipe, **kwargs)


def plain(callback=None, model=None, dls=None, **kwargs):
    "A Learner without a recipe"
    dls = dls or tensor_dls(digits(), bs=64, valid_pct=0, device="cpu")
    return Learner(dls, model or small_model(), cbs=[callback or BarlowTwins(views())], **kwargs)


def low_contrast(contrast):
    x = .5 + contrast*(cases.photographs(320) - .5)
    return photos(x, views=views(32, "cifar", stats=statistics(x)))


def large_dimension(times=5000.):
    learn = of()
    with torch.no_grad():
        for p in learn.model.projector[-1].parameters(): p[0] *= times
    return learn


def with_labels(**kwargs):
    x, y = digits_images()
    return of(x[:640], y=y[:640], **kwargs)


def torch_loaders(workers=0, sampler=False):
    x, y = digits_images()
    x = x[:640].float()/255
    chosen = dict(sampler=WeightedRandomSampler(torch.rand(640) + .5, 640)) if sampler else dict(shuffle=True)
    loader = DataLoader(TensorDataset(x, y[:640]), 64, drop_last=True, num_workers=workers, **chosen)
    return plain(dls=DataLoaders(loader, loader))


def fastai_loaders(workers):
    items = [(TensorImage(x), int(y)) for x, y in zip(digits().float()/255, digits_images()[1])]
    return plain(dls=DataLoaders.from_dsets(items, items, bs=64, num_workers=workers, device="cpu"))


def watched(fit=8):
    "A run whose kNN accuracy was measured on images that it is not trained on"
    x, y = digits_images()
    return of(x[500:], fit=fit, cbs=[OnlineEvaluation((x[:500], y[:500]), probe=False), Diagnostics()])


def wider():
    "The encoder of a run, with a projector of its own for another"
    return of(arch=of(fit=5).model.encoder, width=128)


SGD_OF_TORCH = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))
ADAMW = dict(opt="adamw", wd=.05, lr=1e-3)
MIXED = dict(lmb_reg=4.)

HEALTHY = {
    "digits": of,
    "digits, with labels": with_labels,
    "digits, 8 epochs": lambda: of(fit=8),
    "digits, all, 256 wide, 5 epochs": lambda: of(digits_images()[0], width=256, bs=128, fit=5),
    "digits, kNN and diagnostics watched": watched,
    "digits, another projector": wider,
    "digits, 32 px": lambda: of(size=32),
    "digits, default recipe": lambda: of(recipe="default"),
    "digits as floats": lambda: of(digits().float()/255),
    "digits, dark background white": lambda: of(255 - digits(), views=views(stats=([.7], [.37]))),
    **{f"digits, lr x {f:g}": partial(of, settings=dict(lr=.02*f)) for f in (.1, .3, 2)},
    **{f"digits, batches of {n}": partial(of, bs=n) for n in (16, 32, 256)},
    "digits, two batches": lambda: of(digits(130)),
    "digits, one batch": lambda: of(digits(70)),
    **{f"digits, lmb={lmb:g}": partial(of, lmb=lmb) for lmb in (1e-3, .02, .1)},
    "digits, 32 wide": lambda: of(width=32),
    "digits, kornia's views": lambda: of(views=views(backend="kornia")),
    "digits, three views": lambda: of(views=get_multi_aug_pipelines(3, 16, "digits")),
    "digits, each view by itself (separate_bn)": lambda: plain(BarlowTwins(views(), separate_bn=True)),
    "digits, predictor": lambda: plain(model=create_barlow_twins_model(small_model().encoder, 32, 32, predictor=True)),
    "digits, mixed": lambda: of(settings=MIXED),
    "digits, mixed, target of the script": lambda: plain(MixedBarlowTwins(views(), target="script")),
    "digits, a dimension 5,000 times larger": large_dimension,
    "digits, bfloat16": lambda: of(size=32, cbs=[Autocast()], fit=2),
    **{f"digits, {name}": partial(lambda name: of(loss=variant_loss(name)), name)
       for name in VARIANTS if name not in ("baseline", "invariance only")},
    "digits, cross-entropy, 5 epochs": lambda: of(loss=variant_loss("cross-entropy"), fit=5),
    "digits, queue": lambda: of(loss=variant_loss(queue=128)),
    "digits, a loss of one's own": lambda: of(loss=lambda a, b: -torch.cosine_similarity(a, b).mean()),
    "digits, PyTorch's loaders": torch_loaders,
    "digits, PyTorch's weighted sampler": lambda: torch_loaders(sampler=True),
    "digits, PyTorch's loaders, one worker": lambda: torch_loaders(1),
    "digits, fastai's loaders": lambda: fastai_loaders(0),
    "digits, fastai's loaders, one worker": lambda: fastai_loaders(1),
    "digits, SGD of fastai": lambda: plain(opt_func=partial(SGD, mom=.9), lr=.03),
    "digits, SGD of PyTorch": lambda: plain(opt_func=SGD_OF_TORCH, lr=.03, wd=1e-4),
    "digits, lars": lambda: of(settings=dict(opt="lars", lr=.2, lr_bias=.0048, wd=1e-6)),
    "digits, adamw": lambda: of(settings=ADAMW),
    "digits, adam": lambda: of(settings=dict(opt="adam", lr=1e-3, wd=1e-6)),
    "blobs, cifar": photos,
    "blobs, default": lambda: photos(recipe="default"),
    "blobs, paper, small": lambda: photos(recipe="paper"),
    "blobs, small-gpu, small": lambda: photos(recipe="small-gpu"),
    "blobs, mixed-cifar10": lambda: photos(recipe="mixed-cifar10"),
    "blobs, mixed-stl10, 64 px": lambda: photos(recipe="mixed-stl10", size=64),
    "blobs, grey": lambda: photos(cases.photographs(320).mean(1, keepdim=True),
                                  views=views(32, "cifar", stats=([.5], [.25]))),
    "blobs, grey in three channels": lambda: photos(cases.photographs(320).mean(1, keepdim=True).expand(-1, 3, -1, -1)),
    "blobs, uint8": lambda: photos((cases.photographs(320)*255).to(torch.uint8)),
    "blobs, contrast of 30 %": lambda: low_contrast(.3),
    "blobs, contrast of 10 %": lambda: low_contrast(.1),
    "blobs, contrast of 2 %": lambda: low_contrast(.02),
    "blobs, lr x 3": lambda: photos(settings=dict(lr=.015)),
    "blobs, lr / 10": lambda: photos(settings=dict(lr=5e-4)),
    "blobs, 5 epochs": lambda: photos(fit=5),
    "blobs, resnet18": lambda: photos(arch="resnet18", width=256),
    **{f"blobs, {arch}": partial(photos, arch=f"timm/{arch}") for arch in
       ("test_convnext", "test_efficientnet", "test_vit", "test_nfnet", "test_mambaout", "resnet10t")},
    "textures, cifar": lambda: photos(textures()),
    "textures, default": lambda: photos(textures(), "default"),
    "textures, 3 epochs": lambda: photos(textures(), fit=3),
}


def photographs(folder):
    "Healthy set-ups on photographs, two images of each class per batch or more"
    x = class_folders(folder, 64, 1)[0]
    def files(recipe="cifar", **kwargs): return photos(x, recipe, **kwargs)
    return {
        "photographs": files,
        "photographs, paper": partial(files, recipe="paper"),
        "photographs, small-gpu": partial(files, recipe="small-gpu"),
        "photographs, default": partial(files, recipe="default"),
        "photographs, mixed-cifar10": partial(files, recipe="mixed-cifar10"),
        "photographs, 24 px, the recipe's own encoder": lambda: bt_learner(
            tensor_dls(x, bs=128, valid_pct=0, device="cpu"), recipe="cifar"),
        "photographs, 3 epochs": partial(files, fit=3),
        "photographs, lr / 5": partial(files, settings=dict(lr=1e-3)),
        "photographs, test_vit": partial(files, arch="timm/test_vit"),
        "photographs, grey": lambda: photos(x.float().mean(1, keepdim=True)/255,
                                            views=views(32, "cifar", stats=([.48], [.24]))),
    }


# two real runs that went wrong

def shortcut():
    "A pattern that is in both views of an image: the loss falls, and what was learned of digits is lost"
    x, y = digits_images()
    first = of(x[500:], fit=8)
    g = torch.Generator().manual_seed(0)
    pattern = torch.rand(len(x) - 500, 1, 2, 2, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    mixed = (.15*x[500:] + .85*255*pattern).to(torch.uint8)
    learn = of(mixed, cbs=[OnlineEvaluation((x[:500], y[:500]), probe=False)])
    learn.model.load_state_dict(first.model.state_dict())
    learn.fit_recipe(6)
    return learn


def no_redundancy():
    return of(lmb=0., fit=10, cbs=[Diagnostics()])


REAL = {
    "a run that learns a shortcut": ("accuracy falls", shortcut),
    "a run without a redundancy term": ("rank falls", no_redundancy),
}


def findings(make):
    "What is found in a set-up"
    set_seed(0)
    found = diagnose(make())
    return found.findings


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", help="photographs, one folder per class")
    p.add_argument("--only", help="part of the names of set-ups")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    print(machine("fastai", "timm"), "\n", flush=True)
    start = time.perf_counter()
    healthy = HEALTHY | (photographs(a.folder) if a.folder else {})
    sick = cases.FAULTY | REAL
    if a.only: healthy, sick = ({k: v for k, v in d.items() if a.only in k} for d in (healthy, sick))
    print(f"{'sick set-up':44} {'named':6} findings")
    named = 0
    for name, (finding, make) in sick.items():
        found = [f.name for f in findings(make)]
        named += finding in found
        print(f"{name:44} {'yes' if finding in found else 'NO':6} {', '.join(found) or 'none'}", flush=True)
    print(f"\n{'healthy set-up':44} {'clean':6} findings")
    clean = 0
    for name, make in healthy.items():
        found = findings(make)
        clean += not found
        words = "; ".join(f"{f.name}: {f.seen}" for f in found)
        print(f"{name:44} {'NO' if found else 'yes':6} {words}", flush=True)
    print(f"\nsick: named {named} of {len(sick)}; healthy: clean {clean} of {len(healthy)}; "
          f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__": main()
