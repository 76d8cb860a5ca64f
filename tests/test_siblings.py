"SimCLR, BYOL, W-MSE and VICReg compared with their formulas and a peer, over ranks, in a Learner, resumed, in recipes"
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from callbacks import DoAt, KillAfter, Killed
from conftest import quiet, same, small_encoder, small_model, weights
from fastai.callback import schedule  # noqa: F401  lr_find
from fastai.callback.core import Callback
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from ranks import run_ranks
from test_losses import distance, value_and_gradients
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.checkpoints import Checkpoints
from self_supervised_bt.data import digits_dls, digits_images, tensor_dls
from self_supervised_bt.diagnostics import Diagnostics, losses_to_expect
from self_supervised_bt.distributed import over_ranks, synced_batchnorm
from self_supervised_bt.doctor import diagnose
from self_supervised_bt.evaluation import encode
from self_supervised_bt.export import recipe_facts
from self_supervised_bt.guard import NonFiniteGuard
from self_supervised_bt.losses import AllPairs, barlow_twins_loss
from self_supervised_bt.recipes import Recipe, bt_learner, get_recipe, load_recipe
from self_supervised_bt.reports import FIGURES, measure
from self_supervised_bt.runs import pretrain
from self_supervised_bt.siblings import (
    BYOL,
    SIBLINGS,
    WMSE,
    BYOLLoss,
    NTXentLoss,
    SimCLR,
    VICReg,
    VICRegLoss,
    WMSELoss,
    create_byol_model,
    momentum_at,
    partition,
)
from self_supervised_bt.training import Autocast
from self_supervised_bt.weights import load_encoder, save_model

NAMES = tuple(SIBLINGS)


# References, in float64 and as written in the papers

def nt_xent(z1, z2, tau=.1):
    "Chen et al. 2020, eq. 1"
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    n, s = len(z1), z @ z.T/tau
    terms = [-s[i, (i + n) % (2*n)] + torch.logsumexp(torch.cat([s[i, :i], s[i, i+1:]]), 0) for i in range(2*n)]
    return sum(terms)/(2*n)


def w_mse(z1, z2, size=None, iterations=1):
    "Ermolov et al. 2021, eq. 4 to 6, without eps: the cosines of rows times the transposed inverse Cholesky factor"
    def whitened(v):
        v = v.double() - v.double().mean(0)
        return v @ torch.linalg.inv(torch.linalg.cholesky(v.T @ v/(len(v) - 1))).T
    parts = [rows for i in range(iterations) for rows in partition(len(z1), size or 2*z1.shape[1], i)]
    return torch.cat([2 - 2*F.cosine_similarity(whitened(z1[rows]), whitened(z2[rows])) for rows in parts]).mean()


def vicreg(z1, z2, weights=(25., 25., 1.)):
    "Bardes et al. 2022, algorithm 1, with the scale of the authors' code"
    z1, z2 = z1.double(), z2.double()
    covs = [z.T.cov() for z in (z1, z2)]
    variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (z1, z2))/2
    covariance = sum((c.square().sum() - c.diagonal().square().sum())/len(c) for c in covs)
    return sum(w*t for w, t in zip(weights, ((z1 - z2).square().mean(), variance, covariance)))


def byol(q1, q2, t1, t2):
    "Grill et al. 2020, eq. 2, both ways"
    q1, q2, t1, t2 = (F.normalize(z.double(), dim=1) for z in (q1, q2, t1.detach(), t2.detach()))
    return (q1 - t2).square().sum(1).mean() + (q2 - t1).square().sum(1).mean()


LOSSES = {
    "simclr": (NTXentLoss(), nt_xent, 2), "simclr, .5": (NTXentLoss(.5), lambda *zs: nt_xent(*zs, .5), 2),
    "wmse": (WMSELoss(eps=0.), w_mse, 2), "wmse, 3 x": (WMSELoss(24, 3, 0.), lambda *zs: w_mse(*zs, 24, 3), 2),
    "vicreg": (VICRegLoss(), vicreg, 2), "vicreg, own": (VICRegLoss(1, 2, 3), lambda *zs: vicreg(*zs, (1, 2, 3)), 2),
    "byol": (BYOLLoss(), byol, 4)}


def embeddings(n=50, d=8, count=4, dtype=torch.float32):
    base = torch.randn(n, d, dtype=dtype)
    return [.5*base + .2*torch.randn(n, d, dtype=dtype) + .1 for _ in range(count)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n,d", [(50, 8), (9, 4), (24, 11)])
def test_value_and_gradients_equal_the_formula(name, n, d):
    loss, formula, count = LOSSES[name]
    zs = embeddings(n, d, count)
    targets = zs[2:]   # BYOL's have no gradient
    ours = value_and_gradients(lambda *z: loss(*z, *targets), *zs[:2])
    reference = value_and_gradients(lambda *z: formula(*z, *targets), *zs[:2])
    assert distance(ours[:1], reference[:1]) < 1e-5
    assert distance(ours[1:], reference[1:]) < 2e-4


@pytest.mark.parametrize("name", LOSSES)
def test_float32_under_autocast(name):
    loss, _, count = LOSSES[name]
    zs = [z.bfloat16() for z in embeddings(count=count)]
    with torch.autocast("cpu", torch.bfloat16): ours = loss(*zs)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(loss(*(z.float() for z in zs))), rel=1e-6)
    assert loss(*(z.double() for z in zs)).dtype == torch.float64


def test_equals_lightly():
    """NT-Xent and VICReg equal lightly's; its BYOL loss is the negative cosine of one direction

    Of W-MSE it has no loss that is compared here: its whitening keeps running averages.
    """
    lightly = pytest.importorskip("lightly.loss", reason="peer of the benchmarks extra")
    q1, q2, t1, t2 = embeddings()
    for tau in (.1, .5):
        assert float(NTXentLoss(tau)(q1, q2)) == pytest.approx(float(lightly.NTXentLoss(tau)(q1, q2)), rel=1e-5)
    assert float(VICRegLoss()(q1, q2)) == pytest.approx(float(lightly.VICRegLoss()(q1, q2)), rel=1e-5)
    cosine = lightly.NegativeCosineSimilarity()
    both = float(cosine(q1, t2) + cosine(q2, t1))
    assert float(BYOLLoss()(q1, q2, t1, t2)) == pytest.approx(4 + 2*both, rel=1e-4)


@pytest.mark.parametrize("name", ["simclr", "vicreg", "wmse"])
def test_three_views_are_all_pairs(name):
    cb = SIBLINGS[name](get_multi_aug_pipelines(3, 8, stats=None))
    z1, z2, z3 = embeddings(count=3)
    pairs = [LOSSES[name][0](a, b) for a, b in ((z1, z2), (z1, z3), (z2, z3))]
    if name == "wmse": cb.objective = AllPairs(WMSELoss(eps=0.))
    assert float(cb.objective(z1, z2, z3)) == pytest.approx(float(sum(pairs)/3), rel=1e-5)


def test_no_gradient_reaches_byols_target():
    zs = [z.requires_grad_() for z in embeddings()]
    BYOLLoss()(*zs).backward()
    assert zs[0].grad.any() and zs[1].grad.any() and zs[2].grad is None and zs[3].grad is None


def test_byol_of_three_views_is_the_mean_of_ordered_pairs():
    q, t = embeddings(count=3), embeddings(count=3)
    pairs = [(2 - 2*F.cosine_similarity(q[i], t[j])).mean() for i in range(3) for j in range(3) if i != j]
    assert float(BYOLLoss()(*q, *t)) == pytest.approx(2*float(sum(pairs))/6, rel=1e-5)


@pytest.mark.parametrize("name", ["simclr", "vicreg", "byol", "wmse"])
@pytest.mark.parametrize("kind", ["constant", "zeros", "one dimension"])
def test_degenerate_embeddings_have_a_finite_loss_and_gradient(name, kind):
    loss = dict(simclr=NTXentLoss(), vicreg=VICRegLoss(), byol=BYOLLoss(), wmse=WMSELoss())[name]
    zs = embeddings(count=4 if name == "byol" else 2)
    for z in zs:
        if kind == "constant": z[:] = 3.
        if kind == "zeros": z[:] = 0.
        if kind == "one dimension": z[:, 0] = 1.
    targets = zs[2:]
    values = value_and_gradients(lambda *z: loss(*z, *targets), *zs[:2])
    assert all(torch.as_tensor(v).isfinite().all() for v in values)


@pytest.mark.parametrize("loss", [NTXentLoss(), VICRegLoss(), WMSELoss()])
def test_random_embeddings_have_the_expected_loss(loss):
    a, b = torch.randn(2, 512, 64)
    independent, identical = loss.expected(512, 64)
    assert float(loss(a, b)) == pytest.approx(independent, rel=.03)
    assert float(loss(a, a)) == pytest.approx(identical, rel=.15, abs=.01)


def test_non_finite_embeddings_are_named():
    for name, (loss, _, count) in LOSSES.items():
        zs = embeddings(count=count)
        zs[0][3, 2] = torch.nan
        with pytest.raises(FloatingPointError, match="z1 has 1 nan"): loss(*zs)


# Over ranks

def net(byol):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = create_byol_model(encoder, 8, 4) if byol else small_model(width=4)
    return model.double()


def ranked_views(n=26):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=g)
    return [x + .3*torch.randn(x.shape, dtype=torch.float64, generator=g) for _ in range(2)]


MADE = dict(simclr=NTXentLoss, vicreg=VICRegLoss, wmse=lambda: WMSELoss(8, 2), byol=BYOLLoss)
PARTS = (slice(0, 14), slice(14, 26))   # of the ranks, uneven


def step_of(model, name, loss, views):
    extra = [True] if name == "byol" else []
    z = model(torch.cat(views), *extra)
    value = loss(*z.chunk(4 if name == "byol" else 2))
    value.backward()
    inner = getattr(model, "module", model)
    return float(value), torch.cat([p.grad.flatten() for p in inner.parameters() if p.grad is not None]).numpy()


def each_method(rank):
    out = {}
    torch.manual_seed(10 + rank)   # ranks have different random states, and need not agree on them
    for name, make in MADE.items():
        model = net(name == "byol")
        torch.manual_seed(10 + rank)
        with synced_batchnorm(model):
            ddp = DistributedDataParallel(model, broadcast_buffers=False)
            out[name] = step_of(ddp, name, over_ranks(make()), [v[PARTS[rank]] for v in ranked_views()])
    return out


@pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_available(), reason="processes are forked")
def test_two_ranks_equal_one_with_the_global_batch():
    pytest.importorskip("accelerate")
    ranks = run_ranks(each_method)
    for name, make in MADE.items():
        value, gradient = step_of(net(name == "byol"), name, make(), ranked_views())
        for rank in ranks:
            assert rank[name][0] == pytest.approx(value, rel=1e-9), name
            assert rank[name][1] == pytest.approx(gradient, rel=1e-6, abs=1e-9), name


# In a Learner

def learner(name, make_dls, cbs=(), views=2, model=None, width=4, dls=None, opt_func=SGD, **kwargs):
    cb = SIBLINGS[name](get_multi_aug_pipelines(views, 8, stats=None), **kwargs)
    if model is None and name == "byol": model = create_byol_model(small_encoder(), 8, width)
    if model is None: model = small_model(width=width)
    lr = .002 if name == "vicreg" else .05
    return quiet(Learner(dls or make_dls(), model, lr=lr, opt_func=opt_func, cbs=[cb, *cbs]))


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_shows_the_terms_moves_all_weights_and_restores_the_loss(name, views, make_dls, tmp_path):
    learn = learner(name, make_dls, views=views, terms=True, separate_bn=views == 3)
    own, before = learn.loss_func, weights(learn)
    learn.fit(1)
    terms = getattr(learn, name).objective.term_names
    assert [*learn.recorder.metric_names[3:-1]] == [*terms]
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])
    assert not any(torch.equal(before[k], v) for k, v in learn.model.state_dict().items() if k.endswith("0.weight"))
    assert learn.loss_func is own
    z, y = learn.get_preds(ds_idx=1)
    assert z.shape == (20, 4) and len(y) == 20
    learn.model.eval()
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): assert torch.allclose(z, learn.model.projector(learn.model.encoder(x)), atol=1e-5)
    assert torch.allclose(encode(learn, x)[0], learn.model.encoder(x), atol=1e-5)


@pytest.mark.parametrize("name", ["byol", "wmse"])
def test_fit_search_fit_export_load_fit(name, tmp_path):
    x = nn.functional.interpolate(digits_images()[0][:48].float()/255, size=8)
    def make_dls(): return tensor_dls(x, bs=16, device="cpu")
    learn = learner(name, make_dls, cbs=[Autocast()])
    learn.path = tmp_path
    learn.fit(1)
    before = weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.lr_find(num_it=4, show_plot=False, suggest_funcs=())
    assert same(before, weights(learn)), "a search moved the model, or the target of BYOL"
    learn.fit(1)
    after = weights(learn)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = quiet(load_learner(tmp_path/"export.pkl"))
    assert same(after, weights(loaded))
    loaded.dls = make_dls()
    loaded.fit(1)
    getattr(loaded, name).show(n=2)


@pytest.mark.parametrize("name", ["byol", "wmse"])
def test_a_killed_run_resumes_to_the_last_bit(name, make_dls, tmp_path):
    def fit(folder, cbs=()):
        set_seed(0)
        learn = learner(name, make_dls, [Checkpoints(folder, every=2, resume=True), *cbs], dls=make_dls(64, bs=16))
        learn.fit(2)
        return learn
    whole = fit(tmp_path/"whole")
    with pytest.raises(Killed): fit(tmp_path/"killed", [KillAfter(6)])
    assert same(weights(whole), weights(fit(tmp_path/"killed")))


def test_a_step_that_is_skipped_leaves_byols_target(make_dls):
    def spoil(learn): learn.model.predictor[0].weight.grad.fill_(torch.nan)
    learn = learner("byol", make_dls, [NonFiniteGuard("skip"), DoAt("after_backward", spoil, order=-100)])
    before = weights(learn)
    with pytest.warns(UserWarning, match="made no step"): learn.fit(1)
    assert same(before, weights(learn))


# BYOL's target

class Follow(Callback):
    "What the target should be, by the formula"
    order = 100
    def __init__(self, base): self.base, self.k = base, 0
    def before_train(self):
        if self.k == 0: self.target = [p.detach().clone() for p in self.online()]
    def online(self): return [*self.model.encoder.parameters(), *self.model.projector.parameters()]
    def after_step(self):
        total = self.n_epoch*self.n_iter
        tau = 1 - (1 - self.base)*(math.cos(math.pi*self.k/total) + 1)/2
        self.target = [tau*t + (1 - tau)*p.detach() for t, p in zip(self.target, self.online())]
        self.k += 1


def test_byols_target_follows_by_the_formula(make_dls):
    follow = Follow(.6)
    learn = learner("byol", make_dls, [follow], momentum=.6)
    learn.fit(3)
    ours = [*learn.model.target.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, follow.target))
    assert not torch.equal(ours[0], follow.online()[0])
    assert int(learn.model.followed) == follow.k == 3*3
    assert momentum_at(0, .996) == pytest.approx(.996) and momentum_at(1, .996) == pytest.approx(1)


def test_byols_first_fit_starts_from_weights_that_were_loaded(make_dls):
    learn, other = learner("byol", make_dls, momentum=1.), small_model(width=4)
    learn.model.encoder.load_state_dict(other.encoder.state_dict())
    start = learn.model.encoder[0].weight.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model.target["encoder"][0].weight, start)
    assert not torch.equal(learn.model.encoder[0].weight, start)


def test_the_optimizer_of_a_recipe_leaves_the_target():
    learn = bt_learner(digits_dls(bs=64), recipe=get_recipe("digits", method="byol", arch="timm/test_resnet"))
    learn.create_opt()
    trained = {id(p) for group in learn.opt.param_lists for p in group if p.requires_grad}
    assert not trained & {id(p) for p in learn.model.target.parameters()}
    assert {id(p) for p in learn.model.predictor.parameters()} <= trained


# Errors

def test_wrong_models_and_batches_are_refused(make_dls):
    with pytest.raises(ValueError, match="BYOL needs a model with a predictor and a target"):
        learner("byol", make_dls, model=small_model()).fit(1)
    with pytest.raises(ValueError, match="the model has a predictor"):
        learner("simclr", make_dls, model=create_byol_model(small_encoder(), 8, 4)).fit(1)
    with pytest.raises(ValueError, match="16 embeddings cannot be whitened in 32 dimensions: use bs=64"):
        learner("wmse", make_dls, width=32).fit(1)


def test_a_short_validation_batch_is_left_out_of_w_mse(make_dls):
    learn = learner("wmse", make_dls, width=6)   # 20 validation images: a batch of 16, and one of 4
    with pytest.warns(UserWarning, match="a validation batch of 4 image"): learn.fit(1)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])


@pytest.mark.parametrize("make,message", [
    (lambda a: SimCLR(a, temperature=0), "temperature must be a finite number > 0"),
    (lambda a: BYOL(a, momentum=1.5), "momentum must be a finite number"),
    (lambda a: WMSE(a, sub_batch=2.5), "sub_batch must be a positive int"),
    (lambda a: WMSE(a, eps=1), "eps must be"),
    (lambda a: VICReg(a, variance=-1), "variance must be a finite number"),
    (lambda a: SimCLR(a[:1]), "two or more Pipelines")])
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message): make(get_multi_aug_pipelines(2, 8, stats=None))


# Recipes

@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_method_and_is_saved(name, tmp_path):
    recipe = get_recipe("digits", method=name, hidden_size=32, epochs=1)
    assert load_recipe(recipe.save(tmp_path/"recipe.json")) == recipe
    learn = bt_learner(digits_dls(bs=128), recipe=recipe, terms=True)
    assert type(getattr(learn, name)) is SIBLINGS[name]
    assert learn.recipe.method == name and learn.recipe.lmb is None
    assert hasattr(learn.model, "target") == (name == "byol")
    assert name in recipe_facts(vars(recipe))["method"].lower().replace("-", "")


def test_settings_of_a_method():
    recipe = get_recipe("digits", method="simclr", method_args=dict(temperature=.5))
    assert bt_learner(digits_dls(bs=128), recipe=recipe).simclr.objective.temperature == .5
    assert get_recipe(recipe, method="vicreg").method_args == {}
    assert Recipe(method="vicreg").lmb is None
    assert get_recipe("mixed-cifar10", method="byol").lmb_reg is None


@pytest.mark.parametrize("change,message", [
    (dict(method="simclr", lmb=5e-3), "lmb=0.005 would have no effect"),
    (dict(method="byol", lmb_reg=4.), "lmb_reg=4.0 would have no effect"),
    (dict(method="wmse", bs=32), "cannot be whitened"),
    (dict(method="vicreg", method_args=dict(lmb=1)), "has no lmb: it has invariance, variance, covariance"),
    (dict(method="simclr", method_args=[.1]), "method_args must be a dict"),
    (dict(method_args=dict(temperature=.1)), "use lmb and lmb_reg"),
    (dict(method="simsiam"), "method must be one of")])
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message): get_recipe("digits", **change)


def test_arguments_beside_a_method_are_refused():
    recipe = get_recipe("digits", method="simclr")
    with pytest.raises(ValueError, match="lmb=0.1 would have no effect"):
        bt_learner(digits_dls(), recipe=recipe, lmb=.1)
    with pytest.raises(ValueError, match="loss and method='simclr' exclude each other"):
        bt_learner(digits_dls(), recipe=recipe, loss=barlow_twins_loss)


def test_training_continues_from_weights_of_another_method(tmp_path):
    small = dict(hidden_size=16, projection_size=8, epochs=1)
    learn = bt_learner(digits_dls(bs=128), recipe=get_recipe("digits", method="byol", **small))
    file = save_model(learn, tmp_path/"model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = bt_learner(digits_dls(bs=128), weights=file)
        other = bt_learner(digits_dls(bs=128), weights=file, recipe=get_recipe("digits", method="simclr", **small))
        plain = bt_learner(digits_dls(bs=128), weights=file, recipe=get_recipe("digits", **small))
    assert again.recipe.method == "byol" and same(weights(again), weights(learn))
    assert other.model.predictor is None and plain.model.predictor is None, "BYOL's predictor is nobody else's"
    for model in (other.model, plain.model):
        assert torch.equal(next(model.encoder.parameters()), next(learn.model.encoder.parameters()))
    assert all(p.requires_grad for p in again.model.encoder.parameters())
    assert not any(p.requires_grad for p in again.model.target.parameters())


@pytest.mark.parametrize("name", ["byol"])
def test_a_run_of_another_method_is_kept_and_resumed(name, tmp_path, folder):
    settings = dict(method=name, arch="timm/test_resnet", arch_args={}, small_stem=False, pool_type=None, size=16,
                    hidden_size=16, projection_size=8, bs=16, views=dict(recipe="digits"), epochs=1)
    pretrain(folder, "digits", tmp_path/"run", num_workers=0, **settings)
    results = pretrain(None, None, tmp_path/"run", resume=True, num_workers=0)
    assert results["recipe"]["method"] == name and results["recipe"]["lmb"] is None
    assert load_encoder(tmp_path/"run"/"encoder.safetensors") is not None


# What is wrong with a run

@pytest.mark.parametrize("name", NAMES)
def test_the_diagnosis_knows_the_scale_of_each_method(name, make_dls):
    learn = learner(name, make_dls, width=6)
    found = diagnose(learn, batches=3)
    assert "independent views give" in found.facts["loss"] and "lmb" not in str(found)
    assert "error" not in found and "refused" not in found and not any("frozen" in f.name for f in found.findings)
    assert losses_to_expect(getattr(learn, name), 16, 6)[0] > losses_to_expect(getattr(learn, name), 16, 6)[1]


def test_a_collapse_to_one_direction_is_found(make_dls):
    learn = learner("byol", make_dls, width=6)
    with torch.no_grad(): learn.model.predictor[-1].bias += 1000.
    assert "collapse" in diagnose(learn, batches=2)


def test_reports_draw_the_terms_of_each_method(make_dls):
    learn = learner("vicreg", make_dls, [Diagnostics(every=1, show=False)])
    learn.fit(1)
    run = measure(learn, torch.rand(24, 1, 8, 8), None)
    axis, facts = FIGURES["terms"][1](run)
    assert "invariance" in facts and "covariance" in facts
    assert "independent views give" in FIGURES["loss"][1](run)[1]
