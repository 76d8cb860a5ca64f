"Settings as data, and what they build: optimizer, schedule, Learner"
import copy
import dataclasses
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from callbacks import DoAt
from conftest import collate, image_items, quiet, small_model
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from timm.optim import NAdamW
from timm.optim.muon import Muon
from torch import nn

from self_supervised_bt.augmentations import VIEW_RECIPES, get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.core import undisturbed
from self_supervised_bt.data import digits_dls, tensor_dls
from self_supervised_bt.layers import PoolingType, create_encoder
from self_supervised_bt.losses import AllPairs, BarlowTwinsLoss
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import RECIPES, Recipe, bt_learner, get_recipe, load_recipe
from self_supervised_bt.training import LARS, Autocast, WarmupCosine, muon, split_norm_bias, warmup_cosine
from self_supervised_bt.weights import load_encoder, save_encoder, save_model
from self_supervised_bt.zoo import load_weights

# LARS

def lars_by_the_book(params, grads, lrs, steps, mom=.9, wd=1e-6, eta=1e-3):
    "You et al. 2017 as Zbontar et al.'s code applies it, in float64 and one parameter at a time"
    ws = [p.double() for p in params]
    vs = [torch.zeros_like(w) for w in ws]
    for step in range(steps):
        for i, w in enumerate(ws):
            u = grads[step][i].double()
            if w.ndim > 1:
                u = u + wd*w
                nw, nu = math.sqrt(float((w*w).sum())), math.sqrt(float((u*u).sum()))
                if nw > 0 and nu > 0: u = u*(eta*nw/nu)
            vs[i] = mom*vs[i] + u
            ws[i] = w - lrs[step][0 if w.ndim > 1 else 1]*vs[i]
    return ws


@pytest.mark.parametrize("wd", [1e-6, .1, 0.])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_lars_is_the_published_algorithm_over_100_steps(dtype, tol, wd):
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7, 2, 3, 3), (5,), (7,), (4, 4), ()]
    params = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    params[4].zero_()                                       # weights of size 0 have no ratio
    def gradients(step):
        size = 10.**(step % 7 - 3)
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype)*size for s in shapes]
    grads = [gradients(step) for step in range(100)]
    for step in range(10, 20): grads[step][0].zero_()       # nor has a gradient of size 0
    rates = [warmup_cosine(step/100, .1) for step in range(100)]
    lrs = [(.2*8*rate, .0048*8*rate) for rate in rates]
    ps = [nn.Parameter(p.clone()) for p in params]
    opt = LARS([[p for p in ps if p.ndim > 1], [p for p in ps if p.ndim <= 1]], lr=0., wd=wd)
    for step in range(100):
        for p, d in zip(ps, grads[step]): p.grad = d.clone()
        opt.set_hyper("lr", list(lrs[step]))
        opt.step()
    for p, w in zip(ps, lars_by_the_book(params, grads, lrs, 100, wd=wd)):
        torch.testing.assert_close(p.detach().double(), w, rtol=tol, atol=tol*float(w.abs().max() + 1))


def test_lars_leaves_what_has_no_gradient_alone_and_its_state_can_be_saved():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    opt = LARS([a, b], lr=1.)
    a.grad = torch.ones(2, 2)
    opt.step()
    assert torch.equal(b, torch.ones(2, 2)) and not torch.equal(a, torch.ones(2, 2))
    again = LARS([nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())], lr=0.)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o in (opt, again):
        for p, *_ in o.all_params(): p.grad = torch.full((2, 2), .5)
        o.step()
    for (p, *_), (q, *_) in zip(opt.all_params(), again.all_params()): assert torch.equal(p, q)


# Schedule

def digits_learner(recipe, **kwargs):
    return quiet(bt_learner(digits_dls(bs=128, device="cpu"), small_model().encoder, 8, recipe=recipe, **kwargs))


@pytest.mark.parametrize("shape", [(24, 8, 3, 3), (8, 40), (40, 8)])
def test_muon_moves_all_directions_equally_far(shape):
    "Jordan et al. 2024: the update has the singular vectors of the momentum, and singular values near 1"
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape))
    before = w.detach().clone()
    spectrum = torch.logspace(0, -1, min(shape[0], w[0].numel()), dtype=torch.float64)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64).flatten(1), full_matrices=False)
    w.grad = ((u*spectrum)@v).float().view(shape)
    muon([w], lr=.1, weight_decay=0).step()
    moved = (before - w.detach()).flatten(1).double()/(.1*.2*max(shape[0], w[0].numel())**.5)
    inside = u.T@moved@v.T
    assert inside.diagonal().sub(1).abs().max() < .35
    assert (inside - inside.diagonal().diag()).abs().max() < .05   # Newton-Schulz in bfloat16


def test_muon_leaves_biases_and_norms_to_nadamw():
    torch.manual_seed(0)
    b = torch.nn.Parameter(torch.randn(5))
    reference = torch.nn.Parameter(b.detach().clone())
    ours = muon([b], lr=.1, weight_decay=.02)
    nadamw = NAdamW([reference], lr=.1, weight_decay=.02, betas=(.9, .99))
    for _ in range(5):
        b.grad = torch.randn(5)
        reference.grad = b.grad.clone()
        ours.step()
        nadamw.step()
    torch.testing.assert_close(b, reference, rtol=1e-4, atol=1e-5)


def test_one_cycle_schedules_the_momentum_of_matrices():
    learn = digits_learner(Recipe(opt="muon", lr=.01, wd=0., epochs=2, hidden_size=16, projection_size=16))
    seen = []
    learn.add_cb(DoAt("after_step", lambda learn: seen.append(learn.opt.opt.param_groups[0]["momentum"])))
    learn.fit_recipe()
    assert min(seen) == pytest.approx(.85, abs=.01) and max(seen) == pytest.approx(.95, abs=.01)
    assert {group["betas"] for group in learn.opt.opt.param_groups} == {(.9, .99)}


def cosine_by_the_book(step, steps, warmup_steps, peak):
    if step < warmup_steps: return peak*step/warmup_steps
    q = .5*(1 + math.cos(math.pi*(step - warmup_steps)/(steps - warmup_steps)))
    return peak*q + peak*.001*(1 - q)


def wsd_by_the_book(step, steps, warmup_steps, peak):
    if step < warmup_steps: return peak*step/warmup_steps
    first_that_falls = steps*4//5
    return peak if step < first_that_falls else peak*(steps - step)/(steps - first_that_falls)


@pytest.mark.parametrize("schedule, by_the_book", [("cosine", cosine_by_the_book), ("wsd", wsd_by_the_book)])
def test_schedule_values_are_the_formulas(schedule, by_the_book):
    seen = []
    def keep_rates(learn): seen.append([h["lr"] for h in learn.opt.hypers])
    recipe = get_recipe("paper", epochs=20, warmup=3, projection_size=16, hidden_size=16, schedule=schedule)
    learn = digits_learner(recipe, cbs=DoAt("after_step", keep_rates, order=70))
    learn.fit_recipe()
    n = len(learn.dls.train)
    expected = [[by_the_book(s, 20*n, 3*n, lr*128/256) for lr in (.2, .0048)] for s in range(20*n)]
    seen, expected = torch.tensor(seen, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-15)
    assert [h["wd"] for h in learn.opt.hypers] == [1e-6, 0]


def test_the_cosine_follows_the_progress_of_the_fit():
    "A callback may measure it by the clock instead of steps; fastai's own schedules follow it, too"
    seen = []
    def halfway(learn): learn.pct_train = .5
    def keep_rate(learn): seen.append(learn.opt.hypers[-1]["lr"])
    recipe = get_recipe("paper", epochs=1000, warmup=0, projection_size=16, hidden_size=16)
    cbs = [DoAt("before_batch", halfway, order=-9), DoAt("after_step", keep_rate, order=70)]
    digits_learner(recipe, cbs=cbs).fit_recipe(epochs=1)
    assert seen == pytest.approx([.0048*128/256*(1 + .001)/2]*len(seen))


def test_a_warm_up_longer_than_the_fit_is_refused(make_learner):
    with pytest.raises(ValueError, match="warmup=5"): make_learner().fit(3, cbs=WarmupCosine([1e-3], 5))
    with pytest.raises(ValueError, match="warmup"): WarmupCosine([1e-3], -1)


# Recipes

def test_the_papers_numbers():
    "Zbontar et al. 2021, section 3 and the authors' code"
    r = RECIPES["paper"]
    assert (r.opt, r.lr, r.lr_bias, r.wd, r.wd_bias) == ("lars", .2, .0048, 1e-6, 0)
    assert (r.schedule, r.warmup, r.epochs, r.bs, r.lmb) == ("cosine", 10, 1000, 2048, .0051)
    assert (r.hidden_size, r.projection_size, r.nlayers, r.bias) == (8192, 8192, 3, False)
    assert (r.size, r.views["recipe"]) == (224, "paper")
    assert r.peak_lrs() == pytest.approx([1.6, .0384])
    with torch.device("meta"):
        encoder = create_encoder(r.arch, pretrained=False, pool_type=r.pool_type, small_stem=r.small_stem,
                                 **r.arch_args)
        model = create_barlow_twins_model(encoder, r.hidden_size, r.projection_size, True, r.nlayers, r.bias)
    assert sum(p.numel() for p in model.parameters()) == 174_535_744
    assert [len(g) for g in split_norm_bias(model)] == [53 + 3, 2*53 + 4]


@pytest.mark.parametrize("name, lmb, lmb_reg, size", [
    ("mixed-cifar10", 1/128, 4, 32), ("mixed-cifar100", 1/128, 4, 32), ("mixed-stl10", 1/128, 2, 64),
    ("mixed-tinyimagenet", 1/1024, 4, 64)])
def test_the_published_small_data_settings(name, lmb, lmb_reg, size):
    "Bandara et al. 2023, table of checkpoints and scripts"
    r = RECIPES[name]
    assert (r.lmb, r.lmb_reg, r.size) == (lmb, lmb_reg, size)
    assert (r.projection_size, r.bs, r.schedule) == (1024, 256, "cosine")
    x = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)
    learn = bt_learner(tensor_dls(x, bs=32, device="cpu"), recipe=r)
    assert type(learn.barlow_twins) is MixedBarlowTwins and learn.barlow_twins.objective.lmb_reg == lmb_reg
    assert learn.model.encoder(torch.rand(2, 3, size, size)).shape == (2, 512)
    learn.create_opt()
    assert type(learn.opt.opt) is torch.optim.Adam and [h["wd"] for h in learn.opt.hypers] == [1e-6, 1e-6]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_plain_data_and_can_be_saved(name, tmp_path):
    r = RECIPES[name]
    settings = dataclasses.asdict(r)
    assert load_recipe(r.save(tmp_path/"recipe.json")) == r and json.loads(json.dumps(settings)) == settings
    assert r.views.get("recipe", "default") in VIEW_RECIPES and str(r).startswith("name ")
    get_barlow_twins_aug_pipelines(r.size or 32, **r.views)


@pytest.mark.parametrize("opt, kind", [
    ("lars", LARS), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD),
    ("muon", Muon)])
@pytest.mark.parametrize("schedule", ["cosine", "one cycle", "wsd"])
def test_every_optimizer_and_schedule_trains(opt, kind, schedule):
    recipe = Recipe(opt=opt, lr=1e-2, lr_bias=1e-3, wd=1e-4, epochs=2, schedule=schedule, hidden_size=16,
                    projection_size=16)
    learn = digits_learner(recipe)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit_recipe()
    assert isinstance(getattr(learn.opt, "opt", learn.opt), kind)
    assert all(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()) if a.ndim > 1)
    assert [h["wd"] for h in learn.opt.hypers] == [1e-4, 0]


def test_what_is_given_wins_over_the_recipe():
    recipe = get_recipe("digits", opt="fastai", lr_bias=None, name="digits")
    learn = bt_learner(digits_dls(bs=64, device="cpu"), recipe=recipe, projection_size=32, lmb=.01, opt_func=LARS)
    assert learn.model.projector[-1].out_features == 32 and learn.barlow_twins.lmb == .01 and learn.opt_func is LARS
    r = learn.recipe
    assert (r.projection_size, r.lmb, r.bs, r.name) == (32, .01, 64, "digits, changed")


def test_the_default_recipe_is_the_plain_learner():
    "fastai's own optimizer, one group, as without recipes"
    dls = digits_dls(bs=64, device="cpu")
    weights = []
    def by_recipe(encoder): return bt_learner(dls, encoder, 8, hidden_size=16, projection_size=16)
    def by_hand(encoder):
        model = create_barlow_twins_model(encoder, 16, 16, nlayers=3)
        return Learner(dls, model, cbs=BarlowTwins(get_barlow_twins_aug_pipelines(8)))
    for make in (by_recipe, by_hand):
        learn = make(small_model().encoder)
        set_seed(0)
        for m in learn.model.modules():
            if hasattr(m, "reset_parameters"): m.reset_parameters()
        for dl in dls.loaders: dl.rng.seed(0)
        quiet(learn).fit(1, 1e-3)
        weights.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


@pytest.mark.parametrize("bad, message", [
    (dict(opt="rms"), "opt must be one of"), (dict(schedule="step"), "schedule must be one of"),
    (dict(bs=0), "bs must be a positive int"), (dict(lr=-1.), "lr must be a finite number"),
    (dict(lmb=float("nan")), "lmb must be"), (dict(epochs=5, warmup=5), "do not fit"),
    (dict(pool_type="median"), "pool_type must be"), (dict(lambd=1), "no lambd"), (dict(lr_bias=1e-4), "set opt"),
    (dict(wd_bias=.1), "set opt"), (dict(opt="lars", wd_bias=.1), "LARS decays no biases"),
    (dict(warmup=1), "warmup=1 has no effect"), (dict(lr=0), "lr must be a finite number > 0"),
    (dict(lr=float("nan")), "lr must be"), (dict(lmb=1e30), "lmb must be"), (dict(lmb="a"), "lmb must be"),
    (dict(lr=True), "lr must be"), (dict(size=0), "size must be"), (dict(size=(16,)), "size must be"),
    (dict(size="16"), "size must be"), (dict(bias="no"), "bias must be"), (dict(small_stem="big"), "small_stem must"),
    (dict(arch=5), "arch must be text"), (dict(arch_args=[3]), "arch_args must be"), (dict(epochs="a"), "epochs must"),
    (dict(views=dict(jiter=1)), "no jiter"), (dict(views=dict(size=8)), "recipe's own size"),
    (dict(nviews=1), "nviews=1 is no pair"), (dict(nviews=3, lmb_reg=4.), "mixes two views"),
    (dict(nviews=2.5), "nviews must be"),
    (dict(views=dict(xtra_tfms=[nn.ReLU()])), "views must be plain data")])
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message): get_recipe("default", **bad)


def test_a_recipe_of_four_views_trains_on_all_pairs():
    x = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    recipe = Recipe(nviews=4, arch="timm/test_resnet", pool_type=None, size=16, hidden_size=16, projection_size=16)
    learn = quiet(bt_learner(tensor_dls(x, bs=16, valid_pct=0, device="cpu"), recipe=recipe))
    learn.fit(1)
    bt = learn.barlow_twins
    assert len(bt.augs) == 4 and isinstance(bt.objective, AllPairs) and learn.recipe.nviews == 4
    two = bt_learner(tensor_dls(x, bs=16, device="cpu"), recipe=recipe, aug_pipelines=bt.augs[:2])
    assert len(two.barlow_twins.augs) == two.recipe.nviews == 2   # what is given wins
    assert recipe.changed(lmb_reg=4.).nviews == 2


def test_bad_files_and_missing_recipes(tmp_path, make_learner):
    (tmp_path/"r.json").write_text("{")
    with pytest.raises(ValueError, match="is not a recipe"): load_recipe(tmp_path/"r.json")
    (tmp_path/"r.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a recipe"): load_recipe(tmp_path/"r.json")
    dls = digits_dls(bs=64, device="cpu")
    with pytest.raises(ValueError, match="recipe must be one of"): bt_learner(dls, recipe="papers")
    with pytest.raises(ValueError, match="no recipe"): make_learner().fit_recipe()
    def loss(z1, z2): return (z1 - z2).square().sum()
    with pytest.raises(ValueError, match="leave loss out"):
        bt_learner(dls, small_model().encoder, recipe="mixed-cifar10", loss=loss)


# bt_learner

@pytest.mark.parametrize("labels", [True, False])
def test_bt_learner_reads_channels_and_size_off_the_images(make_dls, labels):
    learn = bt_learner(make_dls(labels=labels, channels=3), "resnet18", hidden_size=16, projection_size=8)
    assert learn.model.encoder.conv1.in_channels == 3 and learn.model.encoder.conv1.stride == (1, 1)
    assert learn.barlow_twins.clean.fs[0].size == (8, 8)
    assert learn.model.projector[-1].out_features == 8
    learn.logger = print
    learn.fit(1)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert bt_learner(make_dls(labels=labels, channels=3), encoder, size=16).model.encoder is encoder


def test_bt_learner_takes_pytorchs_loaders():
    dl = torch.utils.data.DataLoader(image_items(32), batch_size=16, collate_fn=collate)
    dls = DataLoaders(dl, dl)
    learn = bt_learner(dls, small_model().encoder, loss_func=nn.MSELoss())
    assert learn.barlow_twins.clean.fs[0].size == (8, 8)


def test_a_regnet_is_built_for_small_images():
    "torchvision's RegNets cannot be built on the meta device"
    dls = tensor_dls(torch.rand(8, 3, 32, 32), bs=4, device="cpu")
    learn = bt_learner(dls, "torchvision/regnet_y_400mf", hidden_size=8, projection_size=8)
    assert learn.model.projector[0].in_features == 2*440


# An option is used or refused, and the record says what was built

def small_dls(bs=16, shape=(3, 16, 16), device="cpu"): return tensor_dls(torch.rand(32, *shape), bs=bs, device=device)

def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

SMALL = dict(hidden_size=8, projection_size=8)

def n_weights(learn): return sum(p.numel() for p in learn.model.parameters())


@pytest.mark.parametrize("arch", [torchvision.models.resnet34, partial(torchvision.models.resnet34)])
def test_an_architecture_given_as_a_function_is_built(arch):
    learn = bt_learner(small_dls(), arch, **SMALL)
    assert learn.recipe.arch == "torchvision/resnet34"
    assert n_weights(learn) == n_weights(bt_learner(small_dls(), "resnet34", **SMALL))


def test_arguments_in_a_partial_are_recorded():
    learn = bt_learner(small_dls(), partial(timm.models.resnet18, stem_width=16), **SMALL)
    assert learn.recipe.arch_args == {"stem_width": 16}
    assert n_weights(bt_learner(small_dls(), recipe=learn.recipe)) == n_weights(learn)


@pytest.mark.parametrize("arch", [34, ["resnet18"], nn.Linear, tiny, 0, [], False])
def test_an_architecture_that_is_none_is_refused_by_name(arch):
    with pytest.raises(TypeError, match="arch must be"): bt_learner(small_dls(), arch)


@pytest.mark.parametrize("given", [dict(pool_type="avg"), dict(small_stem=True), dict(pretrained=True)])
def test_arguments_for_an_encoder_that_is_built_already_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}.*no effect"): bt_learner(small_dls(), tiny(), **given)


def test_channels_other_than_the_images_are_refused():
    with pytest.raises(ValueError, match="n_in=1"): bt_learner(small_dls(), "resnet18", n_in=1)


def test_lmb_beside_a_loss_is_refused_and_a_loss_is_recorded():
    with pytest.raises(ValueError, match="lmb=0.5 would have no effect"):
        bt_learner(small_dls(), tiny(), lmb=.5, loss=BarlowTwinsLoss())
    learn = bt_learner(small_dls(), "timm/test_resnet", recipe="cifar", loss=BarlowTwinsLoss(.1), **SMALL)
    assert learn.recipe.lmb is None and learn.barlow_twins.lmb == .1
    with pytest.raises(ValueError, match="pass the loss"): bt_learner(small_dls(), recipe=learn.recipe)


def test_lmb_of_a_loss_without_lmb_cannot_be_set():
    learn = bt_learner(small_dls(), tiny(), loss=lambda z1, z2: (z1 - z2).square().sum())
    with pytest.raises(ValueError, match="lmb=0.1"): learn.barlow_twins.lmb = .1


def test_a_short_fit_leaves_the_recipe():
    learn = quiet(bt_learner(small_dls(), tiny(), recipe=get_recipe("default", epochs=3, **SMALL)))
    before = learn.recipe
    learn.fit_recipe(1)
    assert learn.recipe == before and len(learn.recorder.values) == 1
    learn.fit_recipe(np.int64(2))
    assert learn.recipe == before and len(learn.recorder.values) == 2


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_a_fit_of_no_epochs_is_refused(epochs):
    learn = bt_learner(small_dls(), tiny(), **SMALL)
    with pytest.raises(ValueError, match="epochs must be a positive int"): learn.fit_recipe(epochs)


@pytest.mark.parametrize("name, value", [("wd", .1), ("lr", .1), ("lr_max", .1)])
def test_rates_and_decay_beside_a_recipe_are_refused(name, value):
    learn = bt_learner(small_dls(), tiny(), **SMALL)
    with pytest.raises(ValueError, match=f"{name} is the recipe's"): learn.fit_recipe(1, **{name: value})


def test_another_architecture_leaves_the_recipes_arguments_and_the_record_builds_it_again():
    learn = bt_learner(small_dls(), "resnet18", recipe="cifar", **SMALL)
    assert (learn.recipe.arch, learn.recipe.arch_args, learn.recipe.small_stem) == ("resnet18", {}, None)
    assert n_weights(bt_learner(small_dls(), recipe=learn.recipe)) == n_weights(learn)
    same = bt_learner(small_dls(), "timm/resnet10t", recipe="cifar", **SMALL)
    assert same.recipe.arch_args == RECIPES["cifar"].arch_args
    assert n_weights(same) == n_weights(bt_learner(small_dls(), recipe="cifar", **SMALL))


def test_what_is_no_plain_data_is_recorded_as_own_and_asked_for():
    augs = get_barlow_twins_aug_pipelines(8)
    adam = get_recipe("cifar", opt="fastai", lr_bias=None)
    recipe = bt_learner(small_dls(), tiny(), aug_pipelines=augs, opt_func=LARS, recipe=adam, **SMALL).recipe
    assert (recipe.arch, recipe.views, recipe.opt, recipe.size) == ("own", "own", "own", 8)
    assert recipe.arch_args == {} and recipe.wd is None
    given = dict(opt_func=LARS, aug_pipelines=augs, arch=tiny())
    assert bt_learner(small_dls(), recipe=recipe, **given).recipe == recipe
    for name, asked in (("opt_func", "opt_func"), ("aug_pipelines", "aug_pipelines"), ("arch", "encoder")):
        with pytest.raises(ValueError, match=asked):
            bt_learner(small_dls(), recipe=recipe, **{k: v for k, v in given.items() if k != name})


@pytest.mark.parametrize("size, recorded", [((16, 24), (16, 24)), ([16, 16], 16), (np.int64(16), 16), (None, None)])
def test_the_size_of_the_views_is_recorded(size, recorded):
    learn = bt_learner(small_dls(shape=(3, 24, 24)), tiny(), size, **SMALL)
    assert learn.recipe.size == recorded
    assert bt_learner(small_dls(shape=(3, 24, 24)), tiny(), recipe=learn.recipe).barlow_twins.clean.fs[0].size == (
        learn.barlow_twins.clean.fs[0].size)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="size must be a positive int, .* got 0"): bt_learner(small_dls(), tiny(), 0)
    with pytest.raises(ValueError, match="size=16, but aug_pipelines make views of 8x8"):
        bt_learner(small_dls(), tiny(), 16, get_barlow_twins_aug_pipelines(8))


def test_the_stem_is_chosen_by_the_size_of_the_pipelines_views():
    "Of images of 96 pixels and views of 32"
    dls = small_dls(shape=(3, 96, 96))
    learn = bt_learner(dls, "resnet18", aug_pipelines=get_barlow_twins_aug_pipelines(32), **SMALL)
    assert learn.model.encoder.conv1.stride == (1, 1) and learn.recipe.size == 32


def test_pretrained_first_weights_are_kept_on_small_images(monkeypatch):
    saved = torchvision.models.resnet18().state_dict()
    build = torchvision.models.get_model
    def pretrained(arch, weights=None, **kwargs):
        model = build(arch, weights=None, **kwargs)
        if weights: model.load_state_dict(saved)
        return model
    monkeypatch.setattr(torchvision.models, "get_model", pretrained)
    learn = bt_learner(small_dls(), "resnet18", pretrained=True, **SMALL)
    assert learn.recipe.pretrained and torch.equal(learn.model.encoder.conv1.weight, saved["conv1.weight"])
    with pytest.warns(UserWarning, match="replaces the pretrained first convolution"):
        bt_learner(small_dls(), "resnet18", pretrained=True, small_stem=True, **SMALL)


# Optimizers

def test_an_optimizer_beside_a_recipe_with_one_is_refused():
    recipe = get_recipe("paper", size=16, **SMALL)
    with pytest.raises(ValueError, match="opt_func and opt='lars'"):
        bt_learner(small_dls(), tiny(), recipe=recipe, opt_func=LARS)
    with pytest.raises(ValueError, match="lr=0.5 of the Learner"): bt_learner(small_dls(), tiny(), lr=.5).fit_recipe()
    with pytest.raises(ValueError, match="wd_bn_bias has no effect"):
        bt_learner(small_dls(), tiny(), recipe=recipe, wd_bn_bias=True)


@pytest.mark.parametrize("opt, given, decay", [
    ("fastai", {}, [.01]), ("fastai", dict(wd=.5), [.5]), ("adam", {}, [0, 0]), ("lars", dict(wd=.5), [.5, 0])])
def test_the_decay_that_is_recorded_is_the_optimizers(opt, given, decay):
    recipe = get_recipe("default", opt=opt, epochs=1, **SMALL)
    learn = quiet(bt_learner(small_dls(), tiny(), recipe=recipe, **given))
    learn.fit_recipe()
    assert [h["wd"] for h in learn.opt.hypers] == decay and learn.recipe.wd == decay[0]


def test_decay_of_biases_by_fastais_optimizer_is_recorded():
    assert bt_learner(small_dls(), tiny(), wd_bn_bias=True).recipe.wd_bias == .01
    recipe = get_recipe("default", wd=.1, wd_bias=.1, **SMALL)
    assert bt_learner(small_dls(), tiny(), recipe=recipe).wd_bn_bias


def encoder_and_projector(model): return [list(model.encoder.parameters()), list(model.projector.parameters())]

def encoder_and_projector_by_kind(model): return split_norm_bias(model.encoder) + split_norm_bias(model.projector)


def test_rates_and_decay_go_by_kind_of_parameters_not_by_number_of_the_group():
    "Encoder and projector as two groups: the projector got the biases' decay and rate"
    recipe = get_recipe("default", opt="adam", lr_bias=1e-4, wd=.1, epochs=1, scale_lr=False, **SMALL)
    def learner(splitter): return quiet(bt_learner(small_dls(), tiny(), recipe=recipe, splitter=splitter))
    with pytest.raises(ValueError, match="splitter"): learner(encoder_and_projector).fit_recipe()
    learn = learner(encoder_and_projector_by_kind)
    learn.fit_recipe()
    assert [h["wd"] for h in learn.opt.hypers] == [.1, 0, .1, 0]
    rates = [h["lr"] for h in learn.opt.hypers]
    assert rates[:2] == rates[2:] and rates[0] == pytest.approx(10*rates[1])


@pytest.mark.parametrize("opt", ["fastai", "lars"])
def test_a_splitter_goes_with_one_rate_for_all(opt):
    recipe = get_recipe("default", opt=opt, wd=.1, epochs=1, **SMALL)
    learn = quiet(bt_learner(small_dls(), tiny(), recipe=recipe, splitter=encoder_and_projector))
    learn.fit_recipe()
    assert [h["wd"] for h in learn.opt.hypers] == [.1, .1] and len({h["lr"] for h in learn.opt.hypers}) == 1


@pytest.mark.parametrize("name", ["default", "paper", "small-gpu"])
def test_a_learner_of_a_recipe_can_be_pickled(name):
    learn = bt_learner(small_dls(), tiny(), recipe=get_recipe(name, size=16, epochs=1, **SMALL), cbs=Autocast())
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    again = pickle.loads(pickle.dumps(learn))
    with again.no_bar(), again.no_logging(): again.fit_recipe()
    assert [h["wd"] for h in again.opt.hypers] == [h["wd"] for h in learn.opt.hypers]


# Nothing is shared

def test_a_recipe_shares_nothing_with_another():
    before = json.dumps(dataclasses.asdict(RECIPES["mixed-stl10"]))
    get_recipe("mixed-stl10").views["stats"][0][0] = 9
    get_recipe("mixed-stl10").views["jitter"] = False
    get_recipe("mixed-stl10").arch_args["stem_width"] = 8
    assert json.dumps(dataclasses.asdict(RECIPES["mixed-stl10"])) == before
    views = dict(stats=[[.5], [.5]])
    recipe = Recipe(views=views)
    views["stats"][0][0] = 9
    assert recipe.views == dict(stats=[[.5], [.5]])


@pytest.mark.parametrize("settings", [
    dict(size=(16, 24)), dict(lr=np.float32(.5), bs=np.int64(8)), dict(views=dict(resize_scale=(.2, 1.))),
    dict(pool_type=PoolingType.Avg), dict(views=dict(stats=(np.array([.5]), np.array([.5]))))])
def test_settings_of_any_spelling_are_saved_as_plain_data(tmp_path, settings):
    recipe = get_recipe("default", **settings)
    assert load_recipe(recipe.save(tmp_path/"r.json")) == recipe


def test_the_authors_recipes_pass_each_view_by_itself():
    assert {name for name, r in RECIPES.items() if r.separate_bn} == {"paper", *(n for n in RECIPES if "mixed" in n)}
    assert bt_learner(small_dls(), tiny(), separate_bn=True).barlow_twins.separate_bn


def test_a_loader_that_does_not_say_its_batch_size_has_that_of_its_first_batch():
    "Its learning rate was 256 times too small"
    class TwoBatches(torch.utils.data.Sampler):
        def __iter__(self): return iter([range(12), range(12, 24)])
        def __len__(self): return 2
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(24, 3, 16, 16)),
                                     batch_sampler=TwoBatches())
    learn = quiet(bt_learner(DataLoaders(dl, dl), tiny(), recipe=get_recipe("default", epochs=1, **SMALL)))
    learn.fit_recipe()
    assert learn.recipe.bs == 12


# Weights to continue from

def digits(**kwargs): return digits_dls(bs=128, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    "A Learner after ten epochs on the digits, and its file"
    set_seed(0)
    learn = quiet(bt_learner(digits(), recipe="digits", projection_size=128, hidden_size=96))
    with learn.no_bar(): learn.fit_recipe(10)
    return learn, save_model(learn, tmp_path_factory.mktemp("weights")/"model.safetensors")


def losses_of_views(learn, seed=0):
    "Losses of ten batches of views in training mode, without a step: mean and standard deviation"
    set_seed(seed)
    model, views = learn.model.train(), learn.barlow_twins
    xs = [b[0] for _, b in zip(range(10), learn.dls.train)]
    with undisturbed(model, evaluate=False), torch.no_grad():
        losses = [float(views.objective(*model(torch.cat([aug(x) for aug in views.augs])).chunk(2))) for x in xs]
    return np.mean(losses), np.std(losses)


def test_training_continues_at_the_loss_where_it_ended(pretrained):
    "Within the noise of the views; a new projector starts several times higher"
    learn, file = pretrained
    end, noise = losses_of_views(learn)
    again, _ = losses_of_views(bt_learner(digits(), weights=file), seed=1)
    assert abs(again - end) < 2*noise
    with pytest.warns(UserWarning, match="new projector, so the loss starts as in a new run"):
        jump, _ = losses_of_views(bt_learner(digits(), weights=file, projection_size=127), seed=1)
    assert jump > 1.3*end + 3*noise


def test_all_weights_and_the_normalisation_are_those_of_the_file(pretrained):
    learn, file = pretrained
    more = bt_learner(digits(), weights=file)
    assert all(torch.equal(a, b) for a, b in zip(learn.model.state_dict().values(), more.model.state_dict().values()))
    assert all(m.training for m in more.model.modules()) and all(p.requires_grad for p in more.model.parameters())
    for name in ("arch", "size", "hidden_size", "projection_size", "lmb", "lr"):
        assert getattr(more.recipe, name) == getattr(learn.recipe, name)
    assert more.recipe.weights == str(file)


@pytest.mark.parametrize("stats", [None, ([.2], [.4])])
def test_views_are_normalised_as_the_weights_were(tmp_path, stats):
    "Also where the recipe's own views would be normalised by ImageNet's statistics"
    encoder = create_encoder("timm/test_resnet", pretrained=False, n_in=1, pool_type="avg")
    source = bt_learner(digits(), encoder, aug_pipelines=get_barlow_twins_aug_pipelines(16, stats=stats), size=16)
    file = save_encoder(source, tmp_path/"e.safetensors")
    with pytest.warns(UserWarning, match="hold no projector"):
        learn = bt_learner(digits(), recipe="cifar", weights=file)
    x = torch.rand(3, 1, 24, 24)
    expected = x if stats is None else (x - .2)/.4
    assert torch.allclose(learn.barlow_twins.clean(x), expected, atol=1e-6)
    with pytest.warns(UserWarning): own = bt_learner(digits(), weights=file, size=24,
                                                     recipe=get_recipe("cifar", views=dict(stats=[[.5], [.5]])))
    assert torch.allclose(own.barlow_twins.clean(x), (x - .5)/.5, atol=1e-6)


def test_a_named_recipe_asks_for_its_widths_and_bias_is_the_files(tmp_path):
    encoder = create_encoder("timm/test_resnet", pretrained=False, n_in=1, pool_type="avg")
    model = create_barlow_twins_model(encoder, 32, 24, nlayers=2, bias="last", size=16)
    file = save_model(model, tmp_path/"m.safetensors")
    fitting = get_recipe("digits", hidden_size=32, projection_size=24, nlayers=2)
    learn = bt_learner(digits(), recipe=fitting, weights=file)
    assert torch.equal(learn.model.projector[0].weight, model.projector[0].weight) and learn.recipe.bias == "last"
    with pytest.warns(UserWarning, match="nlayers=3"):
        other = bt_learner(digits(), recipe=get_recipe("digits", hidden_size=32, projection_size=24), weights=file)
    assert len(other.model.projector) == 7 and torch.equal(other.model.encoder.conv1[0].weight, encoder.conv1[0].weight)


def test_weights_for_other_channels_are_summed_which_is_said(tmp_path):
    encoder = create_encoder("resnet18", pretrained=False, pool_type="avg")
    file = save_encoder(encoder, tmp_path/"e.safetensors")
    with pytest.warns(UserWarning, match=r"for images of 3 channel\(s\), these have 1"):
        learn = bt_learner(digits(), weights=file, size=32)
    assert torch.allclose(learn.model.encoder.conv1.weight, encoder.conv1.weight.sum(1, keepdim=True), atol=1e-6)
    with torch.no_grad(): h = learn.model.encoder.eval()(torch.rand(2, 1, 32, 32))
    again = load_encoder(save_encoder(learn, tmp_path/"grey.safetensors"))
    assert h.shape == (2, 512) and again.conv1.in_channels == 1


def test_a_network_of_the_users_own_is_filled(tmp_path):
    own = small_model().encoder
    file = save_encoder(own, tmp_path/"e.safetensors")
    other = small_model().encoder
    with pytest.warns(UserWarning, match="no projector"): learn = bt_learner(digits(), other, weights=file, size=16)
    assert learn.model.encoder is other and torch.equal(other[0].weight, own[0].weight)
    assert learn.recipe.arch == "own" and learn.recipe.weights == str(file)


def test_weights_that_are_loaded_already_are_not_shared(pretrained):
    loaded = load_weights(pretrained[1])
    before = copy.deepcopy(loaded.encoder.state_dict())
    learn = quiet(bt_learner(digits(), weights=loaded))
    learn.fit(1)
    assert all(torch.equal(before[k], t) for k, t in loaded.encoder.state_dict().items())
    assert learn.recipe.weights == "own"
    with pytest.raises(ValueError, match="pass weights again"): bt_learner(digits(), recipe=learn.recipe)


@pytest.mark.parametrize("given", [dict(arch="resnet18"), dict(pretrained=True), dict(pool_type="avg"),
                                   dict(small_stem=True)])
def test_what_the_weights_decide_is_not_taken_twice(pretrained, given):
    with pytest.raises(ValueError, match="would have no effect, the weights say"):
        bt_learner(digits(), weights=pretrained[1], **given)


def test_weights_and_pretrained_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"): Recipe(weights="x.pth", pretrained=True)


# first kernels from patches

FEW = dict(SMALL, nlayers=1, nviews=2, bs=16, size=24)

def weights_of(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def test_the_first_kernels_come_from_views_and_nothing_else_changes():
    dls, weights, after = small_dls(), [], []
    for patch_init in (False, True):
        torch.manual_seed(0)
        weights.append(weights_of(bt_learner(dls, recipe=get_recipe("cifar", patch_init=patch_init, **FEW))))
        after.append(torch.rand(1))
    assert [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])] == ["encoder.conv1.0.weight"]
    assert torch.equal(*after), "views that are sampled for the kernels change the views of the training"
    kernels = weights[1]["encoder.conv1.0.weight"].flatten(1)
    orthogonal = torch.eye(len(kernels))*kernels[0].square().sum()
    torch.testing.assert_close(kernels @ kernels.T, orthogonal, rtol=0, atol=1e-5)


def test_trained_first_kernels_stay(tmp_path):
    assert get_recipe("cifar").patch_init and not get_recipe("cifar", pretrained=True).patch_init
    for start in (dict(pretrained=True), dict(weights="file.pth")):
        with pytest.raises(ValueError, match="patch_init=True"): get_recipe("cifar", patch_init=True, **start)
    trained = bt_learner(small_dls(), recipe=get_recipe("cifar", **FEW))
    save_model(trained, tmp_path/"model.safetensors")
    again = bt_learner(small_dls(), recipe="cifar", weights=tmp_path/"model.safetensors")
    name = "encoder.conv1.0.weight"
    assert torch.equal(weights_of(again)[name], weights_of(trained)[name]) and not again.recipe.patch_init


def test_the_kernels_of_a_network_of_the_users_own_stay():
    own = tiny()
    before = own[0].weight.detach().clone()
    learn = bt_learner(small_dls(), own, recipe=get_recipe("cifar", **FEW))
    assert torch.equal(own[0].weight, before) and not learn.recipe.patch_init
