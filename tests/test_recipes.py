"Settings as data, and what they build: optimizer, schedule, Learner"
import copy
import dataclasses
import json
import math

import pytest
import torch
from callbacks import DoAt
from conftest import collate, image_items, quiet, small_model
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn

from self_supervised_bt.augmentations import VIEW_RECIPES, get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.data import digits_dls, tensor_dls
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.mixed import MixedBarlowTwins
from self_supervised_bt.recipes import RECIPES, Recipe, bt_learner, get_recipe, load_recipe
from self_supervised_bt.training import LARS, WarmupCosine, split_norm_bias, warmup_cosine

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


def test_schedule_values_are_the_formulas():
    def by_the_book(step, steps, warmup_steps, peak):
        if step < warmup_steps: return peak*step/warmup_steps
        q = .5*(1 + math.cos(math.pi*(step - warmup_steps)/(steps - warmup_steps)))
        return peak*q + peak*.001*(1 - q)
    seen = []
    def keep_rates(learn): seen.append([h["lr"] for h in learn.opt.hypers])
    recipe = get_recipe("paper", epochs=20, warmup=3, projection_size=16, hidden_size=16)
    learn = digits_learner(recipe, cbs=DoAt("after_step", keep_rates, order=70))
    learn.fit_recipe()
    n = len(learn.dls.train)
    expected = [[by_the_book(s, 20*n, 3*n, lr*128/256) for lr in (.2, .0048)] for s in range(20*n)]
    seen, expected = torch.tensor(seen, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-15)
    assert [h["wd"] for h in learn.opt.hypers] == [1e-6, 0]


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
    ("lars", LARS), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
@pytest.mark.parametrize("schedule", ["cosine", "one cycle"])
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
    learn = bt_learner(digits_dls(bs=64, device="cpu"), recipe="digits", projection_size=32, lmb=.01, opt_func=LARS)
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
    (dict(pool_type="median"), "pool_type must be"), (dict(lambd=1), "no lambd"), (dict(wd=1e-4), "set opt")])
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message): get_recipe("default", **bad)


def test_bad_files_and_missing_recipes(tmp_path, make_learner):
    (tmp_path/"r.json").write_text("{")
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
