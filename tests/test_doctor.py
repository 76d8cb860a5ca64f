"Every finding provoked by a set-up that is broken on purpose; healthy runs come out clean"
import random
import time

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from fasttransform import Pipeline, Transform
from torch import nn

from conftest import image_items, small_model
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, BarlowTwinsModel, create_barlow_twins_model
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.doctor import CHECKS, positive_pairs_closer, diagnose, first_nonfinite
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.losses import variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins


def learner(x=None, augs=None, bs=64, width=64, encoder="timm/test_resnet", **kwargs):
    x = digits_images()[0][:256] if x is None else x
    learn = bt_learner(tensor_dls(x, bs=bs, valid_pct=0, device="cpu"), encoder, 16, augs or get_barlow_twins_aug_pipelines(16, "digits"),
                       small_stem=False, hidden_size=width, projection_size=width, **kwargs)
    learn.logger = lambda *_: None
    return learn


def photographs(n=256, size=32):
    "Something with colours and shapes: smooth noise with bright blobs, the same look within an image"
    g = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, 4, 4, generator=g)*torch.rand(n, 1, 1, 1, generator=g) + torch.rand(n, 3, 1, 1, generator=g)*.5
    return nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)


def photo_learner(recipe="cifar", **kwargs):
    stats = kwargs.pop("stats", ([.5]*3, [.25]*3))
    return bt_learner(tensor_dls(photographs(), bs=64, valid_pct=0, device="cpu"), "timm/test_resnet", 32,
                      get_barlow_twins_aug_pipelines(32, recipe, stats=stats, **kwargs), small_stem=False, hidden_size=64, projection_size=64)


def trained():
    learn = learner()
    learn.fit_one_cycle(30, 1e-2)
    return learn


def the_page():
    "The few lines of the README"
    model = create_barlow_twins_model(create_encoder("xresnet18", n_in=1, pretrained=False), hidden_size=1024, projection_size=1024)
    return Learner(tensor_dls(digits_images()[0][:640], bs=256, valid_pct=0, device="cpu"), model, cbs=[BarlowTwins(get_barlow_twins_aug_pipelines(size=28, stats=None))])


def mixed():
    dls = tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu")
    return Learner(dls, small_model(width=32), cbs=[MixedBarlowTwins(get_barlow_twins_aug_pipelines(16, "digits"))])


@pytest.mark.parametrize("make", [learner, trained, photo_learner, lambda: photo_learner("paper"), lambda: photo_learner("default"), the_page, mixed],
                         ids=["digits", "digits, trained", "photographs", "the paper's views", "the default views", "the README's lines", "mixed"])
def test_a_healthy_run_is_clean(make):
    found = diagnose(make())
    assert found.ok, found
    assert "Nothing wrong was seen" in repr(found) and {"batch", "loss", "views", "embedding", "step"} == set(found.facts)


def augs(**kwargs): return get_barlow_twins_aug_pipelines(16, "digits", **kwargs)


def with_weights(change, **kwargs):
    learn = learner(**kwargs)
    with torch.no_grad(): change(learn.model)
    return learn


def low_rank(model):
    last = model.projector[-1]
    last.weight.copy_(torch.outer(torch.randn(len(last.weight)), torch.randn(last.in_features)))
    last.bias.zero_()


def constant(model):
    model.projector[-1].weight.zero_()
    model.projector[-1].bias.fill_(1.)


def dead(model):
    model.projector[-1].weight[:20] = 0


def nan_weight(model): model.encoder.get_submodule("layer2")[0].conv1.weight[0, 0] = float("nan")


def frozen():
    learn = learner()
    learn.model.encoder.requires_grad_(False)
    return learn


class Overflows(nn.Module):
    def forward(self, h): return h*1e38*1e38


def overflow():
    model = learner().model
    return Learner(tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu"), BarlowTwinsModel(nn.Sequential(model.encoder, Overflows()), model.projector),
                   cbs=[BarlowTwins(augs())])


def noise_pipelines():
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x: TensorImage): return TensorImage(torch.rand(len(x), 1, 16, 16))
    return [Pipeline([Noise()], split_idx=0) for _ in range(2)]


def nan_pixels():
    x = digits_images()[0][:256].float()/255
    x[:, :, 2, 2] = float("nan")
    return x


def slow_dls():
    class Slow:
        def __init__(self): self.items = image_items(64, labels=False)
        def __len__(self): return 64
        def __getitem__(self, i):
            time.sleep(.02)
            return self.items[i]
    dls = DataLoaders.from_dsets(Slow(), Slow(), bs=16, device="cpu", num_workers=0)
    return Learner(dls, small_model(), cbs=[BarlowTwins(get_multi_aug_pipelines(2, 8, stats=None))])


def never_learns():
    learn = learner(augs=noise_pipelines())
    learn.fit(1, 1e-3)
    learn.recorder.losses = [1.]*200
    return learn


def weak(): return photo_learner(resize_scale=(.95, 1.), jitter=False, bw=False, flip_p=0.)
def twice(): return photo_learner(stats=([.5]*3, [.06]*3))


SICK = {
    "drawn alike": lambda: learner(augs=augs(same_on_batch=True)),
    "identical views": lambda: learner(augs=augs(resize_scale=(1., 1.), resize_ratio=(1., 1.), rotate=False, jitter=False, blur=False)),
    "views too weak": weak,
    "views too strong": lambda: learner(augs=noise_pipelines()),
    "not normalised": lambda: photo_learner(stats=None),
    "normalised twice": twice,
    "blank images": lambda: learner(x=torch.full((256, 1, 8, 8), 128, dtype=torch.uint8)),
    "batch too small": lambda: learner(bs=8, width=1024),
    "learning rate too high": lambda: learner(lr=100.),
    "learning rate too low": lambda: learner(lr=1e-9),
    "collapse": lambda: with_weights(constant),
    "dimensional collapse": lambda: with_weights(low_rank),
    "dead dimensions": lambda: with_weights(dead),
    "nothing learned": never_learns,
    "frozen": frozen,
    "loader too slow": slow_dls,
    "error": lambda: learner(x=torch.rand(256, 3, 8, 8)*300, encoder=create_encoder("timm/test_resnet", n_in=3, pretrained=False)),
}


@pytest.mark.parametrize("name", SICK)
def test_every_finding_is_provoked(name):
    found = diagnose(SICK[name]())
    assert name in found, found
    assert all(f.advice for f in found.findings) and "! " + name in repr(found)
    if name not in ("error", "collapse", "blank images", "views too strong", "nothing learned"): assert len(found.findings) == 1, found     # and nothing else


@pytest.mark.parametrize("make,words", [
    (lambda: with_weights(nan_weight), "the weights encoder.layer2.0.conv1.weight are not finite"),
    (lambda: learner(x=nan_pixels()), "images have pixels that are not finite|nan"),
    (overflow, r"the first module that makes nan or infinity out of finite numbers is encoder.1 \(Overflows\)"),
    (lambda: learner(lr=1e30), "at learning rate 1e\\+30")],
    ids=["weights", "images", "module", "step"])
def test_what_is_not_finite_is_named(make, words):
    import re
    found = diagnose(make())
    assert not found.ok and re.search(words, repr(found)), found


def test_every_check_has_a_finding_here():
    import inspect, re
    names = {n for c in CHECKS for n in re.findall(r'Finding\("([^"]+)"', inspect.getsource(c))}
    assert names == {*SICK, "non-finite", "no data"}


def test_no_data():
    learn = learner()
    learn.dls.train.bs = 1000
    assert "no data" in diagnose(learn)


def test_nothing_is_changed():
    learn = trained()
    def state(): return [*(v.clone() for v in learn.model.state_dict().values()), torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)),
                         torch.tensor(random.getstate()[1]), torch.tensor([o for o in learn.recorder.losses])]
    before, opt, modes = state(), learn.opt, [m.training for m in learn.model.modules()]
    diagnose(learn, lr=1.)
    assert all(torch.equal(a, b) for a, b in zip(before, state())) and learn.opt is opt and modes == [m.training for m in learn.model.modules()]
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_training_goes_on_as_if_nobody_had_looked():
    from fastai.torch_core import set_seed
    weights = []
    for look in (False, True):
        set_seed(1)
        learn = learner()
        if look: diagnose(learn)
        learn.fit(1, 1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)


def test_thumbnails_tell_twins_from_strangers():
    x = torch.rand(80, 3, 16, 16)
    assert positive_pairs_closer(x, x) == 1. and abs(positive_pairs_closer(x, torch.rand(80, 3, 16, 16)) - .5) < .06
    assert positive_pairs_closer(x, torch.zeros(80, 3, 16, 16)) == .5            # no difference is no knowledge


def test_the_first_module_is_named_and_the_watch_ends():
    model = nn.Sequential(nn.Linear(2, 2), Overflows(), nn.Linear(2, 2))
    found, end = first_nonfinite(model)
    model(torch.ones(3, 2)); end()
    assert found == ["1"] and not any(m._forward_hooks for m in model.modules())


def test_a_loss_without_lambda_and_three_views():
    assert "what is normal for it is not known" in diagnose(learner(loss=lambda a, b: (a - b).square().sum())).facts["loss"]
    three = get_multi_aug_pipelines(3, 16, "digits")
    assert diagnose(learner(augs=three)).ok and "3 views" in diagnose(learner(augs=three)).facts["batch"]
    assert diagnose(learner(loss=variant_loss("hsic"))).ok


def test_bad_input(make_dls):
    with pytest.raises(ValueError, match="no BarlowTwins callback"): diagnose(Learner(make_dls(), small_model(), loss_func=lambda *_: 0))
    with pytest.raises(ValueError, match="batches"): diagnose(learner(), batches=1)
