"Every finding provoked by a faulty set-up; healthy runs have none"
import random
import time

import numpy as np
import pytest
import torch
from conftest import image_items, quiet, small_model
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorImage
from fasttransform import Pipeline, Transform
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from self_supervised_bt import doctor
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, BarlowTwinsModel, create_barlow_twins_model
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.doctor import CHECKS, Finding, diagnose, positive_pairs_closer, register_check
from self_supervised_bt.evaluation import OnlineEvaluation
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.losses import VARIANTS, variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import bt_learner, get_recipe


def learner(x=None, augs=None, bs=64, width=64, encoder="timm/test_resnet", **kwargs):
    x = digits_images()[0][:256] if x is None else x
    augs = augs or get_barlow_twins_aug_pipelines(16, "digits")
    dls = tensor_dls(x, bs=bs, valid_pct=0, device="cpu")
    learn = bt_learner(dls, encoder, 16, augs, small_stem=False, hidden_size=width, projection_size=width, **kwargs)
    return quiet(learn)


def photographs(n=256, size=32):
    "Something with colours and shapes: smooth blobs, with a contrast and a mean colour per image"
    g = torch.Generator().manual_seed(0)
    blobs, contrast = torch.rand(n, 3, 4, 4, generator=g), torch.rand(n, 1, 1, 1, generator=g)
    small = blobs*contrast + torch.rand(n, 3, 1, 1, generator=g)*.5
    return nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)


def photo_learner(recipe="cifar", **kwargs):
    stats = kwargs.pop("stats", ([.5]*3, [.25]*3))
    augs = get_barlow_twins_aug_pipelines(32, recipe, stats=stats, **kwargs)
    dls = tensor_dls(photographs(), bs=64, valid_pct=0, device="cpu")
    return bt_learner(dls, "timm/test_resnet", 32, augs, small_stem=False, hidden_size=64, projection_size=64)


def trained():
    learn = learner()
    learn.fit_one_cycle(30, 1e-2)
    return learn


def the_page():
    "The few lines of the README"
    encoder = create_encoder("xresnet18", n_in=1, pretrained=False)
    model = create_barlow_twins_model(encoder, hidden_size=1024, projection_size=1024)
    dls = tensor_dls(digits_images()[0][:640], bs=256, valid_pct=0, device="cpu")
    return Learner(dls, model, cbs=[BarlowTwins(get_barlow_twins_aug_pipelines(size=28, stats=None))])


def mixed():
    dls = tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu")
    return Learner(dls, small_model(width=32), cbs=[MixedBarlowTwins(get_barlow_twins_aug_pipelines(16, "digits"))])


def low_contrast(contrast=.02):
    "The photographs, faded, with statistics of their own"
    x = .5 + contrast*(photographs() - .5)
    augs = get_barlow_twins_aug_pipelines(32, "cifar", stats=(x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist()))
    dls = tensor_dls(x, bs=64, valid_pct=0, device="cpu")
    return bt_learner(dls, "timm/test_resnet", 32, augs, small_stem=False, hidden_size=64, projection_size=64)


def large_dimension():
    def enlarge(model):
        for p in model.projector[-1].parameters(): p[0] *= 5000
    return with_weights(enlarge)


def predictor():
    encoder = create_encoder("timm/test_resnet", n_in=1, pretrained=False, size=16)
    dls = tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu")
    return Learner(dls, create_barlow_twins_model(encoder, 32, 32, predictor=True), cbs=[BarlowTwins(augs())])


HEALTHY = {
    "low contrast, statistics of its own": low_contrast,
    "a dimension 5,000 times larger": large_dimension,
    "a predictor": predictor,
    "kornia's views": lambda: learner(augs=augs(backend="kornia")),
    "PyTorch's loaders": lambda: plain_learner(torch_dls(*labelled(), shuffle=True)),
    "adam with a decay of 1e-6": lambda: with_settings(opt="adam", wd=1e-6),
    "lars": lambda: with_settings(opt="lars", lr=.2, lr_bias=.0048, wd=1e-6),
    "kNN that rises": lambda: falling(.7, .8, .9, .88, .91, .9),
    "digits": learner,
    "digits, trained": trained,
    "photographs": photo_learner,
    "the paper's views": lambda: photo_learner("paper"),
    "the default views": lambda: photo_learner("default"),
    "the README's lines": the_page,
    "mixed": mixed,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_findings(name):
    found = diagnose(HEALTHY[name]())
    assert found.ok, found
    assert "No problem found" in repr(found)
    assert {"batch", "loss", "views", "embedding", "step"} == set(found.facts)


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
    model = BarlowTwinsModel(nn.Sequential(model.encoder, Overflows()), model.projector)
    dls = tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu")
    return Learner(dls, model, cbs=[BarlowTwins(augs())])


def noise_learner(bs):
    "Views that share nothing; in large batches, where chance does not look like agreement"
    class Noise(Transform):
        split_idx = 0
        def encodes(self, x: TensorImage): return TensorImage(torch.rand(len(x), 1, 16, 16))
    noise = [Pipeline([Noise()], split_idx=0) for _ in range(2)]
    return learner(x=digits_images()[0], augs=noise, bs=bs)


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
    learn = noise_learner(bs=1024)
    learn.fit(1, 1e-3)
    learn.recorder.losses = [1.]*200
    return learn


def no_augmentation():
    return augs(resize_scale=(1., 1.), resize_ratio=(1., 1.), rotate=False, jitter=False, blur=False)


def wrong_channels():
    encoder = create_encoder("timm/test_resnet", n_in=3, pretrained=False)
    return learner(x=torch.rand(256, 3, 8, 8)*300, encoder=encoder)


class Detached(nn.Module):
    "A module whose output has no gradient"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x): return self.inner(x).detach()


class Skipped(nn.Module):
    "A projector that is computed, and has no part in the gradient"
    def __init__(self, projector):
        super().__init__()
        self.projector = projector
    def forward(self, h): return self.projector(h).detach() + h[:, :64]


def with_model(change, recipe="default", **changes):
    "A Learner whose model is changed first"
    learn = learner(recipe=get_recipe(recipe, **changes))
    change(learn.model)
    return learn


def detach(part, wrapper=Detached):
    def change(model): setattr(model, part, wrapper(getattr(model, part)))
    return change


def detach_half(model):
    model.encoder.get_submodule("layer2")[0] = Detached(model.encoder.get_submodule("layer2")[0])


def freeze(part):
    def change(model): getattr(model, part).requires_grad_(False)
    return change


def with_splitter(part): return learner(splitter=lambda model: [*getattr(model, part).parameters()])


def other_model():
    "A model that came after the optimizer"
    learn = learner()
    learn.create_opt()
    learn.model = learner().model
    return learn


def with_settings(**changes):
    "A Learner by a recipe"
    return learner(recipe=get_recipe("default", scale_lr=False, **changes))


def two_callbacks():
    learn = learner()
    learn.add_cb(MixedBarlowTwins(augs()))
    return learn


def mixed_with_predictor():
    learn = mixed()
    learn.model.predictor = nn.Linear(32, 32)
    return learn


def labelled(n=640, by_class=True):
    "Digits in [0,1] with labels, class by class"
    x, y = (t[:n] for t in digits_images())
    order = y.argsort(stable=True) if by_class else torch.arange(n)
    return x[order].float()/255, y[order]


def plain_learner(dls, **kwargs): return Learner(dls, small_model(), cbs=[BarlowTwins(augs())], **kwargs)


def torch_dls(*tensors, bs=64, **kwargs):
    def loader(): return DataLoader(TensorDataset(*tensors), batch_size=bs, drop_last=True, **kwargs)
    return DataLoaders(loader(), loader(), device="cpu")


def not_shuffled(kind):
    x, y = labelled()
    if kind == "torch": return plain_learner(torch_dls(x, y))
    if kind == "images alone": return plain_learner(torch_dls(x))
    items = [(TensorImage(i), int(c)) for i, c in zip(x, y)]
    return plain_learner(DataLoaders.from_dsets(items, items, bs=64, shuffle=False, num_workers=0, device="cpu"))


def stream_by_class():
    "Nothing says the order of a stream, but its labels do"
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(*labelled()))
    return plain_learner(DataLoaders(DataLoader(Stream(), batch_size=32), DataLoader(Stream(), batch_size=32)))


def partly_black():
    x = digits_images()[0][:256].clone()
    x[::3] = 0
    return x


def with_history(callback, **columns):
    "A Learner after a fit with these columns"
    learn = learner(cbs=[callback])
    learn.recorder.metric_names = ["epoch", "train_loss", *columns, "time"]
    n = len(next(iter(columns.values())))
    learn.recorder.values = [[60 - 5*i, *(values[i] for values in columns.values())] for i in range(n)]
    return learn


def falling(*accuracies):
    return with_history(OnlineEvaluation(labelled(500), probe=False), knn_accuracy=accuracies)


def fails_to_load():
    class Fails(TensorDataset):
        def __getitem__(self, i): raise IndexError("no such row")
    dls = [DataLoader(Fails(*labelled()), batch_size=64, shuffle=True) for _ in range(2)]
    return plain_learner(DataLoaders(*dls))


# set-up -> the finding that fits, and how it is made
FAULTY = {
    "same crop for all images": ("same crop for all images", lambda: learner(augs=augs(same_on_batch=True))),
    "identical views": ("identical views", lambda: learner(augs=no_augmentation())),
    "crops of nearly the whole image": (
        "augmentation too weak", lambda: photo_learner(resize_scale=(.95, 1.), jitter=False, bw=False, flip_p=0.)),
    "views of noise": ("augmentation too strong", lambda: noise_learner(bs=512)),
    "no statistics": ("not normalised", lambda: photo_learner(stats=None)),
    "statistics of images that are normalised": (
        "normalised twice", lambda: photo_learner(stats=([.5]*3, [.06]*3))),
    "grey images": ("blank images", lambda: learner(x=torch.full((256, 1, 8, 8), 128, dtype=torch.uint8))),
    "black images": ("blank images", lambda: learner(x=torch.zeros(256, 1, 8, 8, dtype=torch.uint8))),
    "every third image black": ("blank images", lambda: learner(x=partly_black())),
    "images of one colour each": ("blank images", lambda: learner(x=torch.rand(256, 3, 1, 1).expand(-1, -1, 8, 8))),
    "one image": ("repeated images", lambda: learner(x=digits_images()[0][:1].repeat(256, 1, 1, 1))),
    "eight images repeated": ("repeated images", lambda: learner(x=digits_images()[0][:8].repeat(40, 1, 1, 1))),
    "class by class, fastai": ("not shuffled", lambda: not_shuffled("fastai")),
    "class by class, PyTorch": ("not shuffled", lambda: not_shuffled("torch")),
    "not shuffled, without labels": ("not shuffled", lambda: not_shuffled("images alone")),
    "class by class, a stream": ("not shuffled", stream_by_class),
    "8 images, 1024 dimensions": ("batch too small", lambda: learner(bs=8, width=1024)),
    "lmb=0": ("no redundancy term", lambda: learner(lmb=0.)),
    "lmb=1e-9": ("no redundancy term", lambda: learner(lmb=1e-9)),
    "Learner with lr=100": ("learning rate too high", lambda: learner(lr=100.)),
    "Learner with lr=1e-9": ("learning rate too low", lambda: learner(lr=1e-9)),
    "recipe with lr=500": ("learning rate too high", lambda: with_settings(lr=500.)),
    "recipe with lr=500, sgd": ("learning rate too high", lambda: with_settings(lr=500., opt="sgd")),
    "recipe with lr=5e4, lars": ("learning rate too high", lambda: with_settings(lr=5e4, opt="lars")),
    "recipe with lr=1e-9": ("learning rate too low", lambda: with_settings(lr=1e-9)),
    "recipe with wd=100, adamw": ("weight decay too high", lambda: with_settings(wd=100., opt="adamw")),
    "recipe with wd=100, adam": ("weight decay too high", lambda: with_settings(wd=100., opt="adam")),
    "recipe with wd=100, sgd": ("weight decay too high", lambda: with_settings(wd=100., opt="sgd", lr=1e-2)),
    "recipe with wd=100, lars": ("weight decay too high", lambda: with_settings(wd=100., opt="lars", lr=.2)),
    "Learner with wd=100": ("weight decay too high", lambda: learner(wd=100.)),
    "embedding constant": ("collapse", lambda: with_weights(constant)),
    "embedding of rank one": ("dimensional collapse", lambda: with_weights(low_rank)),
    "a third of the dimensions constant": ("dead dimensions", lambda: with_weights(dead)),
    "nothing learned": ("nothing learned", never_learns),
    "kNN falls": ("accuracy falls", lambda: falling(.81, .92, .84, .71, .66, .6)),
    "rank falls": ("rank falls", lambda: with_history(Diagnostics(), effective_rank_z=(30., 12., 4., 2.5))),
    "encoder frozen": ("frozen encoder", frozen),
    "projector frozen": ("frozen projector", lambda: with_model(freeze("projector"))),
    "encoder detached in the model": ("no gradient", lambda: with_model(detach("encoder"))),
    "half of the encoder detached": ("no gradient", lambda: with_model(detach_half)),
    "projector detached in the model": ("no gradient", lambda: with_model(detach("projector", Skipped))),
    "model detached": ("no gradient", lambda: with_model(detach("projector"))),
    "splitter without the encoder": ("not in the optimizer", lambda: with_splitter("projector")),
    "splitter without the projector": ("not in the optimizer", lambda: with_splitter("encoder")),
    "optimizer of another model": ("not in the optimizer", other_model),
    "two callbacks that make views": ("refused", two_callbacks),
    "mixed, with a predictor": ("refused", mixed_with_predictor),
    "a last batch of one image": ("refused", lambda: plain_learner(DataLoaders(
        DataLoader(TensorDataset(labelled()[0][:65]), 64, shuffle=True), DataLoader(TensorDataset(labelled()[0]))))),
    "loader too slow": ("loader too slow", slow_dls),
    "other channels": ("error", wrong_channels),
    "files that cannot be loaded": ("error", fails_to_load),
}
WITH_OTHERS = ("error", "collapse", "blank images", "augmentation too strong", "nothing learned", "repeated images",
               "learning rate too high", "weight decay too high")


@pytest.mark.parametrize("name", FAULTY)
def test_every_sick_set_up_is_named(name):
    finding, make = FAULTY[name]
    found = diagnose(make())
    assert finding in found, found
    assert all(f.advice for f in found.findings) and "! " + finding in repr(found)
    if finding not in WITH_OTHERS: assert {f.name for f in found.findings} == {finding}, found


@pytest.mark.parametrize("make,words", [
    (lambda: with_weights(nan_weight), "the weights encoder.layer2.0.conv1.weight are not finite"),
    (lambda: learner(x=nan_pixels()), "64 of 64 images have pixels that are not finite"),
    (overflow, r"the first module with a non-finite output of finite inputs is encoder.1 \(Overflows\)")],
    ids=["weights", "images", "module"])
def test_what_is_not_finite_is_named(make, words):
    import re
    found = diagnose(make())
    assert not found.ok and re.search(words, repr(found)), found


def test_a_step_that_makes_the_weights_infinite_is_named():
    found = diagnose(learner(), lr=1e30)
    assert not found.ok and "after a step at learning rate 1e+30" in repr(found), found


def test_every_check_has_a_finding_here():
    import inspect
    import re
    names = {n for c in CHECKS for n in re.findall(r'Finding\("([^"]+)"', inspect.getsource(c))}
    assert names | {"frozen encoder", "frozen projector"} == {f for f, _ in FAULTY.values()} | {"non-finite", "no data"}


def test_no_data():
    learn = learner()
    learn.dls.train.bs = 1000
    assert "no data" in diagnose(learn)


def test_a_check_of_ones_own_replaces_that_of_the_same_name(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", [*CHECKS])
    def check_of(size):
        def check_image_count(s):
            if len(s.x) < size: yield Finding("few images", f"{len(s.x)} images", "use more")
        return check_image_count
    for size in (1000, 32): register_check(check_of(size))
    assert len(doctor.CHECKS) == len(CHECKS) + 1
    assert diagnose(learner()).ok


def test_nothing_is_changed():
    learn = trained()
    def state():
        numpy = torch.tensor(np.random.get_state()[1].astype(np.int64))
        random_states = torch.get_rng_state(), numpy, torch.tensor(random.getstate()[1])
        weights = [v.clone() for v in learn.model.state_dict().values()]
        return [*weights, *random_states, torch.tensor([*learn.recorder.losses])]
    def modes(): return [m.training for m in learn.model.modules()]
    before, opt, modes_before = state(), learn.opt, modes()
    diagnose(learn, lr=1.)
    assert all(torch.equal(a, b) for a, b in zip(before, state()))
    assert learn.opt is opt and modes() == modes_before
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_training_continues_as_without_a_diagnosis():
    from fastai.torch_core import set_seed
    weights = []
    for first in (False, True):
        set_seed(1)
        learn = learner()
        if first: diagnose(learn)
        learn.fit(1, 1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)


def test_thumbnails_of_positive_pairs_are_closer():
    x, other = torch.rand(2, 800, 3, 16, 16)
    assert positive_pairs_closer(x, x) == 1.
    assert abs(positive_pairs_closer(x, other) - .5) < .06
    assert positive_pairs_closer(x, torch.zeros_like(x)) == .5   # equal distances say nothing


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("baseline", "invariance only", "stop-gradient")])
def test_a_variant_of_the_loss_is_not_measured_by_barlow_twins_yardstick(name):
    found = diagnose(learner(loss=variant_loss(name)))
    assert found.ok, found
    assert "there is no value to compare it with" in found.facts["loss"] and "identical" not in found.facts["loss"]


def test_what_fit_refuses_is_said_in_its_words():
    learn = two_callbacks()
    with pytest.raises(ValueError) as e: quiet(learn).fit(1)
    assert str(e.value).strip().splitlines()[-1].split("\t")[-1] in diagnose(two_callbacks()).findings[0].seen


def test_the_rates_are_those_of_the_recipe():
    assert "at learning rate 0.05 and 0.02;" in diagnose(learner(recipe="digits")).facts["step"]
    lars = learner(recipe=get_recipe("paper", lr=.8))   # 64 images per batch: a quarter of the rate for 256
    assert "at learning rate 0.2 and 0.0012;" in diagnose(lars).facts["step"]


def test_classes_per_batch_are_said():
    seen = diagnose(not_shuffled("torch")).findings[0].seen
    assert "in the order of the data: 1.6 class(es) per batch, of 5 in these 5 batches" in seen


def test_the_time_of_a_step_ends_when_the_device_has_done_it(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(device))
    assert doctor.seconds(torch.device("cpu")) <= doctor.seconds(torch.device("cuda")) and len(calls) == 1
    ends = []
    monkeypatch.setattr(doctor, "seconds", lambda device: ends.append(device) or time.perf_counter())
    diagnose(learner(), batches=2)
    assert len(ends) >= 2*2 + 2*2   # both ends of loading and of training, for two batches


def test_an_optimizer_given_as_an_object_stays_as_it_was():
    dls = tensor_dls(digits_images()[0][:256], bs=64, valid_pct=0, device="cpu")
    model = small_model()
    opt = OptimWrapper(model.parameters(), opt=torch.optim.SGD)
    learn = Learner(dls, model, cbs=[BarlowTwins(augs())], opt_func=opt, lr=.01)
    before = [p.clone() for p in model.parameters()]
    assert diagnose(learn).ok and learn.opt_func is opt
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_loader_of_pytorch_gives_the_same_batches_afterwards():
    learn = plain_learner(torch_dls(*labelled(), shuffle=True, generator=torch.Generator()))
    learn.dls.train.generator.manual_seed(3)
    state = learn.dls.train.generator.get_state()
    diagnose(learn)
    assert torch.equal(state, learn.dls.train.generator.get_state())


def test_a_loss_without_lambda_and_three_views():
    no_lambda = diagnose(learner(loss=lambda a, b: (a - b).square().sum()))
    assert "there is no value to compare it with" in no_lambda.facts["loss"]
    three = diagnose(learner(augs=get_multi_aug_pipelines(3, 16, "digits")))
    assert three.ok and "3 views" in three.facts["batch"]
    assert diagnose(learner(loss=variant_loss("hsic"))).ok


def test_what_the_loss_has_beside_two_views_is_named():
    three, two = get_multi_aug_pipelines(3, 16, recipe="digits"), get_barlow_twins_aug_pipelines(16, "digits")
    assert "of views 1 and 2 (" in (said := diagnose(learner(augs=three), batches=2).facts["loss"])
    assert "over all pairs)" in said and "regulariser" not in said
    mixed = diagnose(with_settings(lmb_reg=4.), batches=2).facts["loss"]
    assert "(with the regulariser " in mixed and "pairs" not in mixed
    assert "(with" not in diagnose(learner(augs=two), batches=2).facts["loss"]


def test_bad_input(make_dls):
    plain = Learner(make_dls(), small_model(), loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="no BarlowTwins callback"): diagnose(plain)
    with pytest.raises(ValueError, match="batches"): diagnose(learner(), batches=1)


def test_batches_of_bytes_are_judged_as_floats_are():
    x = (photographs()*255).byte()
    x[::2] = 51   # blank
    def run(images):
        loaders = [DataLoader(TensorDataset(images), batch_size=64, shuffle=True) for _ in range(2)]
        augs = get_barlow_twins_aug_pipelines(32, "cifar", stats=([.5]*3, [.25]*3))
        torch.manual_seed(0)
        return diagnose(bt_learner(DataLoaders(*loaders), "timm/test_resnet", 32, augs, small_stem=False,
                                   hidden_size=64, projection_size=64))
    found, floats = run(x), run(x.float()/255)
    def blank(found): return [f.seen for f in found.findings if f.name == "blank images"]
    assert blank(found) == blank(floats) != [] and found.facts["batch"] == floats.facts["batch"]
