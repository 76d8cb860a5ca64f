"Mixed Barlow Twins compared with its formula with all matrices, and its callback"
import matplotlib.pyplot as plt
import pytest
import torch
from callbacks import DoAt, record_calls
from conftest import quiet, small_model
from fastai.callback import schedule  # noqa: F401  fit_one_cycle, lr_find
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from test_losses import distance, standardised, textbook, value_and_gradients
from torch import nn
from torch.autograd import gradcheck

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import create_barlow_twins_model
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.losses import FORMS, barlow_twins_loss
from self_supervised_bt.mixed import MixedBarlowTwins, MixedBarlowTwinsLoss, check_mixing_weight, mix_views


def formula(z1, z2, zm, perm, a, lmb=5e-3, lmb_reg=4., script=False):
    "Bandara et al. 2023: loss and regulariser with their D x D matrices; `script`: as in the authors' ImageNet script"
    bt = textbook(z1, z2, lmb)
    z1, z2, zm, n = standardised(z1), standardised(z2), standardised(zm), len(z1)
    a = a.double().view(-1, 1) if isinstance(a, torch.Tensor) else a
    c_ma, c_mb = zm.T @ z1/n, zm.T @ z2/n
    target_a = (a*z1).T @ z1/n + ((1 - a)*z2[perm]).T @ z1/n
    target_b = (a*(z2 if script else z1)).T @ z2/n + ((1 - a)*z2[perm]).T @ z2/n
    return bt + (.5 if script else 1)*lmb_reg*lmb*((c_ma - target_a).square().sum() + (c_mb - target_b).square().sum())


def three(n, d, dtype=torch.float32):
    z1 = torch.randn(n, d, dtype=dtype)
    return z1, z1 + .5*torch.randn(n, d, dtype=dtype), .6*z1 + .4*torch.randn(n, d, dtype=dtype)


@pytest.mark.parametrize("target", ["paper", "script"])
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("n,d", [(2, 3), (7, 5), (32, 200), (64, 64), (300, 20), (260, 300)])
@pytest.mark.parametrize("a", [0., .3, 1., "per sample"])
def test_value_and_gradients_equal_the_formula(n, d, form, target, a):
    zs, perm = three(n, d), torch.randperm(n)
    if a == "per sample": a = torch.rand(n)
    ours = value_and_gradients(lambda *z: MixedBarlowTwinsLoss(.01, 3., target, form=form)(*z, perm, a), *zs)
    reference = value_and_gradients(lambda *z: formula(*z, perm, a, .01, 3., target == "script"), *zs)
    assert distance(ours[:1], reference[:1]) < 1e-5
    if n > 2: assert distance(ours[1:], reference[1:]) < 1e-4


@pytest.mark.parametrize("target", ["paper", "script"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_by_finite_differences(form, target):
    zs = [z.requires_grad_() for z in three(6, 4, torch.double)]
    perm, loss = torch.randperm(6), MixedBarlowTwinsLoss(.1, 2., target, form=form)
    assert gradcheck(lambda *z: loss(*z, perm, .4), zs)
    expected = float(formula(*zs, perm, .4, .1, 2., target == "script"))
    assert float(loss(*zs, perm, .4)) == pytest.approx(expected, rel=1e-12)


def test_without_the_regulariser_it_equals_barlow_twins():
    z1, z2, zm = three(16, 30)
    loss = MixedBarlowTwinsLoss(lmb_reg=0.)(z1, z2, zm, torch.randperm(16), .5)
    assert float(loss) == pytest.approx(float(barlow_twins_loss(z1, z2)), rel=1e-6)
    loss = MixedBarlowTwinsLoss(scale=.1)(z1, z2, z1, torch.arange(16), 1.)
    assert float(loss) == pytest.approx(.1*float(barlow_twins_loss(z1, z2)), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(form, dtype):
    zs, perm, loss = [z.to(dtype) for z in three(32, 80)], torch.randperm(32), MixedBarlowTwinsLoss(form=form)
    with torch.autocast("cpu", dtype): ours = value_and_gradients(lambda *z: loss(*z, perm, .3), *zs)
    exact = value_and_gradients(lambda *z: loss(*z, perm, .3), *(z.float() for z in zs))
    assert distance(ours[:1], exact[:1]) < 1e-6
    assert distance(ours[1:], [g.to(dtype).double() for g in exact[1:]]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_compiles_into_one_graph(form):
    torch._dynamo.reset()
    zs, perm = three(12, 20), torch.randperm(12)
    def run(a, b, m): return MixedBarlowTwinsLoss(form=form)(a, b, m, perm, .3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert distance(value_and_gradients(compiled, *zs), value_and_gradients(run, *zs)) < 1e-5


def test_mixing():
    v1, v2, perm = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(mix_views(v1, v2, perm, .3), .3*v1 + .7*v2[perm])
    a = torch.rand(4)
    expected = torch.stack([a[i]*v1[i] + (1 - a[i])*v2[perm[i]] for i in range(4)])
    assert torch.allclose(mix_views(v1, v2, perm, a), expected, atol=1e-6)


# The callback

@pytest.fixture
def mixed_learner(make_dls):
    def make(n=48, bs=16, model=None, cbs=(), **options):
        augs = get_barlow_twins_aug_pipelines(8, stats=None)
        cbs = [MixedBarlowTwins(augs, **options), *cbs]
        return quiet(Learner(make_dls(n=n, bs=bs), model or small_model(), cbs=cbs))
    return make


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_loss_is_that_of_the_mixture(mixed_learner, per_sample):
    seen = []
    def record(learn):
        cb = learn.barlow_twins
        seen.append((cb.views, learn.xb[0], cb.zm.detach(), cb.perm, cb.a, float(learn.loss)))
    learn = mixed_learner(cbs=[DoAt("after_loss", record, order=99)], lmb=.02, lmb_reg=2., per_sample=per_sample)
    forwards = record_calls(learn.model)
    learn.fit(1)
    pairs = list(zip(forwards[::2], forwards[1::2]))                       # the views together, then the mixture
    assert len(pairs) == len(seen) == 5
    for ((x, z), (xm, zm)), ((v1, v2), xb, kept, perm, a, loss) in zip(pairs, seen):
        assert a.shape == ((len(v1),) if per_sample else ()) and 0 <= float(a.min()) and float(a.max()) <= 1
        assert sorted(perm.tolist()) == list(range(len(v1)))
        assert torch.equal(x, xb) and torch.equal(x, torch.cat([v1, v2])) and torch.equal(zm, kept)
        assert torch.allclose(xm, mix_views(v1, v2, perm, a))
        assert loss == pytest.approx(float(formula(*z.chunk(2), zm, perm, a, .02, 2.)), rel=1e-4)
    perms = {tuple(perm.tolist()) for *_, perm, _, _ in seen if len(perm) == 16}
    weights = {float(a.sum()) for *_, a, _ in seen}
    assert len(perms) > 1 and len(weights) == 5


def test_the_regulariser_trains_the_network(mixed_learner):
    "With the regulariser only, the weights change"
    learn = mixed_learner()
    objective = learn.barlow_twins.objective
    all_terms = objective.mixed_terms_of
    def regulariser_only(*args):
        terms = all_terms(*args)
        nothing = terms.regulariser.detach()*0
        return terms._replace(invariance=nothing, redundancy=nothing)
    objective.mixed_terms_of = regulariser_only
    losses = []
    learn.add_cb(DoAt("after_loss", lambda learn: losses.append(learn.barlow_twins.objective.terms.regulariser)))
    before = learn.model.encoder[0].weight.clone()
    learn.fit(1)
    assert not torch.equal(before, learn.model.encoder[0].weight) and all(l > 0 for l in losses)


def test_prediction_validation_and_show_as_in_barlow_twins(mixed_learner, tmp_path):
    own = nn.CrossEntropyLoss()
    learn = mixed_learner(terms=True)
    learn.loss_func = own
    axes = learn.barlow_twins.show(n=2)
    titles = [ax.get_title() for ax in axes[:3]]
    assert len(axes) == 6 and titles[:2] == ["view 1", "view 2"] and "of view 1" in titles[2]
    learn.fit(1)
    assert learn.loss_func is own and learn.barlow_twins.zm is None and not learn.metrics
    names = ["invariance", "redundancy", "diagonal_mean", "off_diagonal_rms", "regulariser"]
    assert list(learn.recorder.metric_names)[3:-1] == names
    learn.path = tmp_path
    learn.lr_find(num_it=6, show_plot=False)
    assert learn.loss_func is own
    z = learn.get_preds()[0]
    x = torch.stack([im for im, _ in learn.dls.valid_ds]).as_subclass(torch.Tensor)
    with torch.no_grad(): assert torch.allclose(z, learn.model.eval()(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["to_fp32", "to_bf16"])
def test_fit_export_load_fit(tmp_path, precision):
    dls = tensor_dls(digits_images()[0][:48], bs=16, device="cpu")
    augs = get_barlow_twins_aug_pipelines(8, stats=None)
    learn = quiet(Learner(dls, small_model(), cbs=MixedBarlowTwins(augs, lmb_reg=2., terms=True), path=tmp_path))
    getattr(learn, precision)().fit(1)
    learn.export()
    again = load_learner(tmp_path/"export.pkl")
    assert isinstance(again.barlow_twins, MixedBarlowTwins) and again.barlow_twins.objective.lmb_reg == 2.
    again.dls = dls
    again.fit(1)
    assert len(again.recorder.losses) == 2


def test_bad_input(mixed_learner):
    augs, z, perm = get_barlow_twins_aug_pipelines(8, stats=None), torch.randn(6, 4), torch.randperm(6)
    loss = MixedBarlowTwinsLoss()
    weights = ((-.1, "got -0.1"), (1.5, "got 1.5"), (float("nan"), "got nan"),
               (torch.tensor([.5]*5 + [2.]), "got 2.0"), (torch.rand(5), r"shape \(5,\)"))
    for a, words in weights:
        with pytest.raises(ValueError, match=words): loss(z, z, z, perm, a)
    with pytest.raises(ValueError, match="z1 and zm must have the same shape"): loss(z, z, z[:5], perm, .5)
    with pytest.raises(TypeError, match="zm must be a floating-point tensor"): loss(z, z, z.long(), perm, .5)
    with pytest.raises(FloatingPointError, match="z1 is finite; z2 is finite; zm has 24 nan"):
        loss(z, z, z*float("nan"), perm, .5)
    with pytest.raises(ValueError, match="target must be one of 'paper', 'script', got 'code'"):
        MixedBarlowTwins(augs, target="code")
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lmb_reg must be"): MixedBarlowTwins(augs, lmb_reg=bad)
        with pytest.raises(ValueError, match="lmb must be"): MixedBarlowTwins(augs, lmb=bad)
        with pytest.raises(ValueError, match="alpha must be"): MixedBarlowTwins(augs, alpha=bad)
    with pytest.raises(ValueError, match="predictor"):
        mixed_learner(model=create_barlow_twins_model(small_model().encoder, 32, 16, predictor=True)).fit(1)
    check_mixing_weight(0, 3), check_mixing_weight(1., 3), check_mixing_weight(torch.tensor(.5), 3)


def test_default_weights():
    "λ = 0.005 and λ_reg = 4, of the loss and of the callback"
    (z1, z2, zm), perm = three(12, 5), torch.randperm(12)
    expected = pytest.approx(float(formula(z1, z2, zm, perm, .3, lmb=5e-3, lmb_reg=4.)), rel=1e-5)
    assert float(MixedBarlowTwinsLoss()(z1, z2, zm, perm, .3)) == expected
    cb = MixedBarlowTwins(get_barlow_twins_aug_pipelines(8, "digits"))
    cb.zm, cb.perm, cb.a = zm, perm, .3
    assert float(cb.loss(torch.cat([z1, z2]))) == expected


def test_scale_multiplies_the_whole_loss():
    zs, perm = three(12, 5), torch.randperm(12)
    for scale in (.5, 2., 3.):
        scaled = float(MixedBarlowTwinsLoss(scale=scale)(*zs, perm, .3))
        assert scaled == pytest.approx(scale*float(MixedBarlowTwinsLoss()(*zs, perm, .3)), rel=1e-6)


def test_error_names_the_weight_outside_the_range():
    with pytest.raises(ValueError, match="got 2.0"): check_mixing_weight(torch.tensor([0., 2.]), 2)


def test_pictures_leave_training_alone(mixed_learner):
    "In the middle of a step, after the mixture was made"
    def losses(cbs):
        set_seed(0)
        learn = mixed_learner(n=32, cbs=cbs)
        learn.fit(1)
        return torch.stack([loss.detach() for loss in learn.recorder.losses])
    def look(learn):
        shown = learn.barlow_twins.show(2)
        if learn.training: titles.append((shown[2].get_title(), f"{float(learn.barlow_twins.a):.2f} of view 1"))
        plt.close("all")
    titles = []
    assert torch.equal(losses([]), losses([DoAt("after_pred", look, order=50)]))
    assert len(titles) == 2 and all(shown == of_step for shown, of_step in titles)
