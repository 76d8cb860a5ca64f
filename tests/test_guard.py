"The guard against non-finite values: messages, skipped batches, and state that is kept"
import copy
import os
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from callbacks import DoAt, DoToImages, DoToViews
from conftest import image_items, quiet, small_model
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter, get_image_files
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.data import ImageBlock
from fasttransform import Pipeline, Transform
from PIL import Image
from ranks import run_ranks
from torch import nn

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.checkpoints import plain
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.distributed import GlobalBatch
from self_supervised_bt.guard import (
    BadStep,
    NonFiniteGuard,
    batch_items,
    epoch_order,
    find_backward,
    find_forward,
    item_names,
)
from self_supervised_bt.losses import BarlowTwinsLoss, variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins

nan, inf = float("nan"), float("inf")


class Same(Transform):
    "A view that samples nothing"
    split_idx = 0
    def encodes(self, x: TensorImage): return x*self.factor
    def __init__(self, factor): self.factor = factor


def pipelines():
    ps = [Pipeline([Same(f)]) for f in (1., .5)]
    for p in ps: p.split_idx = 0
    return ps


def spoil_views(learn): learn.xb[0][3, 0, 2, 2] = nan


def spoil_images(learn):
    learn.xb = (learn.xb[0].clone(),)
    learn.xb[0][5, 0, 2:4, 2] = nan


def spoil_weights(learn): learn.model.projector[0].weight.data[0, :3] = nan


def spoil_loss(learn): learn.barlow_twins.objective = Broken(learn.barlow_twins.objective)


def spoil_gradient(learn): learn.model.encoder[2].on = True


def repair_gradient(learn): learn.model.encoder[2].on = False


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g*nan


class Switch(nn.Module):
    "Identity, until `on`: then its gradient is nan"
    on = False
    def forward(self, x): return NanGradient.apply(x) if self.on else x


def optimizer_state(opt):
    "What the optimizer remembers of each weight"
    states = (opt.opt if isinstance(opt, OptimWrapper) else opt).state
    return [dict(states.get(p, {})) for ps in opt.param_lists for p in ps]


def state_of(learn):
    return copy.deepcopy((dict(learn.model.state_dict()), optimizer_state(learn.opt) if learn.opt else []))


def assert_same(a, b):
    (model_a, opt_a), (model_b, opt_b) = a, b
    assert model_a.keys() == model_b.keys()
    assert not [k for k in model_a if not torch.equal(model_a[k], model_b[k])]
    assert [s.keys() for s in opt_a] == [s.keys() for s in opt_b]
    for x, y in zip(opt_a, opt_b):
        assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x)


class Remember(Callback):
    "The state before every step of training"
    order = -20
    def before_fit(self): self.states = []
    def before_batch(self):
        if self.training: self.states.append(state_of(self.learn))


OPTS = dict(adam=Adam, momentum=partial(SGD, mom=.9, wd=.1), torch=partial(OptimWrapper, opt=torch.optim.AdamW))
FAULTS = {  # a callback that spoils the step it is given, what the message says
    "images": (partial(DoToImages, spoil_images),
               "the images hold 2 NaN, before the model has seen them"),
    "views": (partial(DoToViews, spoil_views), "the views hold 1 NaN"),
    "weights": (partial(DoToViews, spoil_weights),
                r"the output of projector.0 \(Linear\) holds 32 NaN in 32 of 32 rows, though its input is finite: "
                r"weight of projector.0 holds 3 NaN"),
    "loss": (partial(DoToViews, spoil_loss), "the loss is"),
    "gradient": (partial(DoToViews, spoil_gradient),
                 r"its gradient is not: it is bad in "
                 r"encoder.0.weight, encoder.0.bias, encoder.1.weight, encoder.1.bias, "
                 r"which the backward pass of encoder.2 \(Switch\) made"),
}
PLACES = {"weights": "forward", "gradient": "backward"}   # of a fault, if it has another name


class Broken:
    "A loss that is nan, of embeddings that are not"
    def __init__(self, loss): self.loss = loss
    def __call__(self, *zs): return self.loss(*zs)*nan


def model_with_switch():
    model = small_model()
    model.encoder = nn.Sequential(*model.encoder[:2], Switch(), *model.encoder[2:])
    return model


def make(make_dls, guard, cbs=(), n=64, opt="adam", loss=None, **kwargs):
    torch.manual_seed(0)
    bt = kwargs.pop("bt", None) or BarlowTwins(pipelines(), loss=loss or BarlowTwinsLoss())
    dls = kwargs.pop("dls", None) or make_dls(n, False, shuffle=False, drop_last=True, **kwargs)
    cbs = [bt, guard, *cbs] if guard else [bt, *cbs]
    return quiet(Learner(dls, model_with_switch(), cbs=cbs, opt_func=OPTS[opt], lr=1e-2))


# Messages, and state that is kept

@pytest.mark.parametrize("opt", OPTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_and_nothing_moves(make_dls, fault, opt):
    spoil, says = FAULTS[fault]
    guard, seen = NonFiniteGuard(), Remember()
    learn = make(make_dls, guard, [spoil(2), seen], opt=opt)
    own = learn.loss_func
    with pytest.raises(FloatingPointError, match=says) as e: learn.fit(1)
    assert "step 2 (batch 2 of epoch 0)" in str(e.value) and "are as they were before it" in str(e.value)
    assert guard.last.where == PLACES.get(fault, fault) and guard.last.step == 2
    before = seen.states[2]
    if fault == "weights":   # the fault itself is still there
        w = learn.model.projector[0].weight.data
        assert w[0, :3].isnan().all()
        w[0, :3] = before[0]["projector.0.weight"][0, :3]
    assert_same(before, state_of(learn))
    assert learn.loss_func is own and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert learn.barlow_twins.images is None and not guard.kept_buffers
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()) == 0


@pytest.mark.parametrize("fault", ["images", "gradient"])
def test_the_very_first_step(make_dls, fault):
    guard, seen = NonFiniteGuard(), Remember()
    learn = make(make_dls, guard, [FAULTS[fault][0](0), seen], loss=BarlowTwinsLoss(check_finite=False))
    with pytest.raises(FloatingPointError, match="step 0"): learn.fit(1)
    assert_same(seen.states[0], state_of(learn))


def test_a_module_that_makes_nan_from_finite_numbers(make_dls):
    class Log(nn.Module):
        def forward(self, x):
            negative = x.flatten(1).sum(1)*0 - 1
            return torch.where(torch.arange(len(x)) == 4, negative, 1.).log().view(-1, 1, 1, 1) + x
    learn = make(make_dls, NonFiniteGuard())
    learn.model.encoder[2] = Log()
    says = r"output of encoder.2 \(Log\) holds .* in 1 of 32 rows.* Image: image 4 \(row 4\)"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)


def test_the_message_names_the_cause_in_the_loss(make_dls):
    def enlarge(learn): learn.model.projector[-1].weight.data.mul_(1e25)
    learn = make(make_dls, NonFiniteGuard(), [DoToViews(enlarge, 1)], loss=variant_loss("no normalisation"))
    with pytest.raises(FloatingPointError, match="too large to square"): learn.fit(1)
    assert learn.non_finite_guard.last.where == "loss"


def test_huge_gradients_are_finite():
    "Their norm overflows, they do not"
    dls = tensor_dls(torch.rand(8, 1, 2, 2), torch.zeros(8).long(), bs=4, valid_pct=.5, device="cpu")
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
                    loss_func=lambda z, y: z.sum()*1e30, cbs=NonFiniteGuard(), lr=0., opt_func=SGD)
    quiet(learn).fit(1)


# What is neither loss nor gradient

def test_a_buffer_that_turns_bad_is_named_and_restored(make_dls):
    "Huge activations have an infinite variance, and BatchNorm's output is finite"
    def enlarge(learn): learn.model.encoder[0].weight.data.mul_(1e25)
    guard, seen = NonFiniteGuard(), Remember()
    learn = make(make_dls, guard, [DoToViews(enlarge, 2), seen], loss=lambda *zs: sum(z.tanh().sum() for z in zs)*0)
    says = r"the loss is finite, but encoder.1.running_var holds \d inf, one of 1 such buffers"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)
    assert guard.last.where == "forward" and guard.last.module == "encoder.1" and guard.last.step == 2
    assert torch.equal(learn.model.encoder[1].running_var, seen.states[2][0]["encoder.1.running_var"])


def test_a_mask_of_infinities_is_no_fault(make_dls):
    learn = make(make_dls, NonFiniteGuard())
    learn.model.encoder.register_buffer("mask", torch.tensor([0., -inf]))
    learn.fit(1)


@pytest.mark.parametrize("step, on_bad", [(1, "stop"), (1, "skip"), (3, "stop")])
def test_weights_that_the_optimizer_spoilt_are_named(make_dls, step, on_bad):
    "Also after the last step of an epoch, and where bad steps are skipped"
    guard = NonFiniteGuard(on_bad)
    learn = make(make_dls, guard, [DoAt("before_step", lambda learn: learn.opt.set_hyper("lr", inf), step)])
    says = f"step {step} .batch {step} of epoch 0.: loss and gradient were finite, the optimizer's step was not: " \
           "encoder.0.weight holds .*one of .*Weights and optimizer are lost"
    with pytest.raises(FloatingPointError, match=says): learn.fit(2)
    assert guard.last.where == "optimizer" and not guard.skipped


@pytest.mark.parametrize("opt, name", [("adam", "sqr_avg"), ("torch", "exp_avg_sq")])
def test_averages_of_the_optimizer_that_overflow_are_named(make_dls, opt, name):
    def enlarge(learn): learn.model.projector[0].weight.grad.fill_(1e30)
    learn = make(make_dls, NonFiniteGuard(), [DoAt("before_step", enlarge, 1)], opt=opt)
    says = f"optimizer's step was not: {name} of projector.0.weight holds .* inf, one of 1 such"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)


def test_skipped_batches_are_in_the_state_of_a_run():
    guard, again = NonFiniteGuard("skip"), NonFiniteGuard("skip")
    guard.in_row, guard.skipped = 2, [BadStep(3, 0, 3, "images", None, "why", ["a.png"], [0])]
    again.load_state_dict(plain(guard.state_dict()))
    assert (again.in_row, again.skipped) == (2, guard.skipped) and str(again.skipped[0]) == str(guard.skipped[0])


# Skipping

def without_the_second_batch(make_dls, **kwargs):
    "A Learner on the same images, less those of batch 1"
    kept = [o for i, o in enumerate(image_items(64, False)) if not 16 <= i < 32]
    options = dict(bs=16, device="cpu", num_workers=0, shuffle=False, drop_last=True)
    return make(make_dls, None, dls=DataLoaders.from_dsets(kept, kept[:20], **options), **kwargs)


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("opt", ["adam", "momentum", "torch"])
@pytest.mark.parametrize("fault", ["images", "loss", "gradient"])
def test_skipping_equals_training_without_the_batch(make_dls, fault, opt, check_finite):
    def repair(learn):
        repair_gradient(learn)
        if isinstance(learn.barlow_twins.objective, Broken):
            learn.barlow_twins.objective = learn.barlow_twins.objective.loss
    guard = NonFiniteGuard("skip")
    loss = partial(BarlowTwinsLoss, check_finite=check_finite)
    learn = make(make_dls, guard, [FAULTS[fault][0](1), DoToViews(repair, 2)], opt=opt, loss=loss())
    with pytest.warns(UserWarning, match="1 bad batches made no step"): learn.fit(1)
    assert [(b.step, b.where) for b in guard.skipped] == [(1, PLACES.get(fault, fault))]
    plain = without_the_second_batch(make_dls, opt=opt, loss=loss())
    plain.fit(1)
    assert_same(state_of(plain), state_of(learn))
    train_loss = learn.recorder.values[0][0]
    assert all(l.isfinite() for l in learn.recorder.losses) and train_loss == train_loss


def test_too_many_in_a_row(make_dls):
    guard = NonFiniteGuard("skip", max_in_row=2)
    loss = BarlowTwinsLoss(check_finite=False)
    learn = make(make_dls, guard, [DoToViews(spoil_views, {0, 2, 3})], n=96, loss=loss)
    with pytest.warns(UserWarning, match="3 bad"): learn.fit(1)
    learn = make(make_dls, guard, [DoToViews(spoil_views, {1, 2, 3})], n=96, loss=loss)
    says = "step 3 .*Bad batches in a row: 3, more than max_in_row=2"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)
    assert [b.step for b in guard.skipped] == [1, 2]


def test_embeddings_of_a_skipped_batch_leave_the_queue(make_dls):
    cbs = [FAULTS["gradient"][0](1), DoToViews(repair_gradient, 2)]
    learn = make(make_dls, NonFiniteGuard("skip"), cbs, loss=variant_loss(queue=16))
    with pytest.warns(UserWarning): learn.fit(1)
    plain = without_the_second_batch(make_dls, loss=variant_loss(queue=16))
    plain.fit(1)
    assert_same(state_of(plain), state_of(learn))


# Names

@pytest.mark.parametrize("workers", [0, 2])
def test_the_file_is_named(folder, workers):
    block = DataBlock(blocks=(ImageBlock,), get_items=get_image_files, splitter=RandomSplitter(.2, seed=0))
    dls = block.dataloaders(folder, bs=8, num_workers=workers, device="cpu")
    target = dls.train_ds.items[11]
    pixels = dls.train_ds[11][0]
    wanted = torch.as_tensor(np.array(pixels)).permute(2, 0, 1).float()/255
    def spoil(learn):
        x = learn.xb[0]
        hit = (x - wanted).abs().flatten(1).max(1).values < 1e-5
        if hit.any(): learn.xb = (TensorImage(torch.where(hit.view(-1, 1, 1, 1), nan, x)),)
    torch.manual_seed(0)
    views = BarlowTwins(get_multi_aug_pipelines(2, 16, stats=None))
    cbs = [views, NonFiniteGuard(), DoToImages(spoil, range(9))]
    learn = quiet(Learner(dls, small_model(3), cbs=cbs))
    for _ in range(2):   # two orders
        with pytest.raises(FloatingPointError, match="the images hold") as e: learn.fit(1)
        last = learn.non_finite_guard.last
        assert [last.items[i] for i in last.rows] == [str(target)]
        assert f"Image: {target} (row {last.rows[0]})" in str(e.value)


def test_names_are_those_of_the_batch(folder):
    files = get_image_files(folder)
    block = DataBlock(blocks=(ImageBlock,), get_items=get_image_files, splitter=RandomSplitter(.2, seed=0))
    dls, seen = block.dataloaders(folder, bs=8, device="cpu", num_workers=0), []
    pixels_of = {str(f): torch.as_tensor(np.array(Image.open(f))).permute(2, 0, 1).float()/255 for f in files}
    def check(learn):
        if learn.iter == 1: learn.dls.train.one_batch()   # another order begins in between
        names = batch_items(learn, learn.non_finite_guard.sequence)
        named = torch.stack([pixels_of[n] for n in names])
        seen.append(torch.allclose(named, torch.Tensor(learn.xb[0])))
    views = BarlowTwins(get_multi_aug_pipelines(2, 16, stats=None))
    cbs = [views, NonFiniteGuard(), DoToImages(check, range(9))]
    learn = quiet(Learner(dls, small_model(3), cbs=cbs))
    learn.fit(2)
    assert seen == [True]*8


def test_names_by_kind_of_dataset():
    pd = pytest.importorskip("pandas")
    class Named(list):
        def names(self, idxs): return [f"shard/{i}" for i in idxs]
    class Table(list): items = pd.DataFrame(dict(f=["a", "b", "c"]), index=[7, 8, 9])
    class Tensors(list): items = [torch.zeros(1)]*3
    assert item_names(Named("abc"), [2, 0]) == ["shard/2", "shard/0"]
    assert item_names(Table("abc"), [1]) == ["row 8"]
    assert item_names(Tensors("abc"), [1]) == ["image 1"]
    assert item_names(list("abc"), [2]) == ["image 2"]


def test_no_names_where_the_order_is_unknown(make_dls):
    items = [o[0] for o in image_items(32)]
    from torch.utils.data import DataLoader as TorchDL
    dl = TorchDL([(i,) for i in items], batch_size=8)
    assert epoch_order(dl) is None
    learn = make(make_dls, NonFiniteGuard())
    learn.dl = learn.dls.train
    b = learn.dl.one_batch()
    learn.xb, learn.iter = b[:1], 0
    assert batch_items(learn) == [f"image {i}" for i in range(16)]
    learn.iter = 5
    assert batch_items(learn) == []   # no such batch in this order
    learn.dl.skipped, learn.iter = 3, 4   # a resumed epoch: the order was cut in front
    assert batch_items(learn) == [f"image {i}" for i in range(16, 32)]
    learn.xb = (b[0][:7],)
    assert batch_items(learn) == []


# Nothing else changes

def test_a_clean_fit_is_the_same_with_and_without(make_dls):
    finals, samples = [], []
    for guard in (None, NonFiniteGuard("skip"), NonFiniteGuard()):
        set_seed(0)
        model = small_model()
        model.projector = nn.Sequential(model.projector[0], nn.Dropout(.3), *model.projector[1:])
        bt = BarlowTwins(get_multi_aug_pipelines(2, 8, stats=None), loss=BarlowTwinsLoss(check_finite=False))
        learn = quiet(Learner(make_dls(64), model, cbs=[bt, guard] if guard else [bt], opt_func=Adam))
        learn.fit(2, 1e-2)
        finals.append((state_of(learn), [float(l) for l in learn.recorder.losses]))
        samples.append((float(torch.rand(())), random.random(), np.random.rand()))
    for other, losses in finals[1:]:
        assert_same(finals[0][0], other)
        assert losses == finals[0][1]
    assert samples[0] == samples[1] == samples[2]


def test_the_search_changes_nothing():
    torch.manual_seed(0)
    layers = nn.BatchNorm1d(4), nn.Dropout(.5), nn.ReLU(inplace=True), Switch()
    model = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2)).train()
    model[0].eval()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(8, 3)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert find_forward(model, (x,)) is None
    assert find_backward(model, (x,), lambda z: z.sum()) is None
    model[4].on = True
    assert find_backward(model, (x,), lambda z: z.sum()).name == "4"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_finite_step_reads_two_numbers(make_dls, monkeypatch):
    "One number is read after the loss and one after the backward pass, however many gradients there are"
    reads = []
    class Watched(NonFiniteGuard):
        def __call__(self, event):
            with pytest.MonkeyPatch.context() as m:
                for name in ("item", "cpu", "numpy", "tolist", "__float__", "__bool__", "__int__", "nonzero"):
                    read = getattr(torch.Tensor, name)
                    m.setattr(torch.Tensor, name, lambda t, *a, r=read, **k: reads.append(event) or r(t, *a, **k))
                super().__call__(event)
    make(make_dls, Watched(), n_valid=0).fit(1)
    in_steps = [event for event in reads if event not in ("before_fit", "after_train")]
    assert in_steps == ["after_loss", "after_backward"]*4 and reads.count("after_train") == 1


def test_without_the_guard_the_loss_raises(make_dls):
    loss = BarlowTwinsLoss(check_finite=False)
    learn = make(make_dls, NonFiniteGuard("skip"), [DoToViews(spoil_views, 1)], loss=loss)
    with pytest.warns(UserWarning, match="1 bad"): learn.fit(1)
    learn.remove_cbs(NonFiniteGuard)
    with pytest.raises(FloatingPointError, match="the loss is nan: z1"): learn.fit(1)


# Beside other callbacks

def test_lr_find_ends_without_an_error(make_dls, tmp_path):
    learn = make(make_dls, NonFiniteGuard(), [DoToViews(spoil_views, 12)])
    learn.path = tmp_path
    learn.lr_find(num_it=20, show_plot=False)
    assert len(learn.recorder.losses) == 12
    learn.remove_cbs(DoToViews)
    learn.add_cb(DoToViews(spoil_views, 1))
    with pytest.raises(FloatingPointError, match="the views hold"): learn.fit(1)   # the guard checks again


def test_a_plain_learner():
    dls = tensor_dls(torch.rand(32, 1, 4, 4), torch.zeros(32).long(), bs=8, valid_pct=0, device="cpu")
    def spoil_targets(learn): learn.yb = (torch.full((8,), nan),)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    def loss(z, y): return (z[:, 0] - y).square().mean()
    cbs = [NonFiniteGuard(), DoAt("before_batch", spoil_targets, 2)]
    learn = quiet(Learner(dls, net, loss_func=loss, cbs=cbs))
    with pytest.raises(FloatingPointError, match="step 2 .* the targets hold 8 NaN"): learn.fit(1)
    assert all_finite_weights(net)


def all_finite_weights(net): return all(p.isfinite().all() for p in net.parameters())


def test_validation_is_watched_too(make_dls):
    def spoil(learn):
        if not learn.training and learn.iter == 1: learn.xb[0][3] = nan
    learn = make(make_dls, NonFiniteGuard(), [DoToViews(spoil)], n_valid=48)
    says = "validation after step 4 .batch 1 of epoch 0.: the views hold"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)
    learn = make(make_dls, NonFiniteGuard("skip"), [DoToViews(spoil)], n_valid=48)
    with pytest.warns(UserWarning, match="1 bad"): learn.fit(1)
    assert learn.recorder.loss.count == 32
    learn.get_preds()


@pytest.mark.parametrize("step", [0, 1])
def test_gradient_accumulation(make_dls, step):
    "A bad gradient spoils its group: no step with it, and weights that stay finite"
    cbs = [FAULTS["gradient"][0](step), DoToViews(repair_gradient, step + 1),
           GradientAccumulation(32), GradientClip(1.)]
    learn = make(make_dls, NonFiniteGuard("skip"), cbs, opt="momentum", loss=BarlowTwinsLoss(check_finite=False))
    with pytest.warns(UserWarning): learn.fit(1)
    assert all_finite_weights(learn.model)
    remembered = [t for s in optimizer_state(learn.opt) for t in s.values() if isinstance(t, torch.Tensor)]
    assert remembered and all(t.isfinite().all() for t in remembered)


def test_accumulated_gradients_are_kept_at_a_bad_loss(make_dls):
    "Its batch adds nothing to them"
    seen = []
    def look(learn): seen.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
    cbs = [FAULTS["views"][0](1), DoToViews(look, {1, 2}), GradientAccumulation(64)]
    learn = make(make_dls, NonFiniteGuard("skip"), cbs, opt="momentum", loss=BarlowTwinsLoss(check_finite=False))
    with pytest.warns(UserWarning, match="1 bad"): learn.fit(1)
    assert torch.equal(*seen) and seen[0].any()


class CpuScaling(MixedPrecision):
    "fastai's mixed precision with a scaler for the CPU"
    name = "mixed_precision"
    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler("cpu", **self.kwargs)


def test_a_gradient_that_overflows_under_a_scaler_is_no_fault(make_dls):
    "An infinite gradient of a scaled loss is no fault"
    guard, skipped = NonFiniteGuard(), []
    def count(learn): skipped.append(learn.mixed_precision.skipped)
    cbs = [CpuScaling(init_scale=2.**124), DoAt("after_step", count, order=20)]
    learn = make(make_dls, guard, cbs, n=96, opt="momentum", loss=BarlowTwinsLoss(check_finite=False))
    learn.fit(1)
    assert any(skipped) and not all(skipped)
    assert guard.last is None and all_finite_weights(learn.model)


def test_a_loss_scale_that_keeps_falling_raises(make_dls):
    guard = NonFiniteGuard(min_scale=1.)
    cbs = [CpuScaling(init_scale=8.), DoToViews(spoil_gradient, 0)]
    learn = make(make_dls, guard, cbs, n=96, loss=BarlowTwinsLoss(check_finite=False))
    says = "scale of the gradients fell to .* still not finite in encoder.0.weight"
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)


def test_a_bad_loss_under_a_scaler(make_dls):
    guard, seen = NonFiniteGuard(), Remember()
    cbs = [CpuScaling(init_scale=8.), DoToViews(spoil_views, 2), seen]
    learn = make(make_dls, guard, cbs, loss=BarlowTwinsLoss(check_finite=False))
    with pytest.raises(FloatingPointError, match="step 2 .*the views hold"): learn.fit(1)
    assert_same(seen.states[2], state_of(learn))
    assert not torch.is_autocast_enabled("cpu")


def test_bad_arguments():
    with pytest.raises(ValueError, match="on_bad"): NonFiniteGuard("ignore")
    with pytest.raises(ValueError, match="max_in_row"): NonFiniteGuard(max_in_row=-1)


def test_columns_stay_numbers(make_dls):
    learn = make(make_dls, NonFiniteGuard("skip"), [DoToViews(spoil_views, 1)])
    learn.barlow_twins.terms = True
    with pytest.warns(UserWarning, match="1 bad"): learn.fit(1)
    assert all(v == v for v in learn.recorder.values[0])


def test_batches_without_a_loader(make_dls):
    "fastai predicts on lists of batches, too"
    learn = make(make_dls, NonFiniteGuard())
    assert len(learn.get_preds(dl=[learn.dls.train.one_batch()], reorder=False)[0]) == 16


# Several ranks

def one_rank(rank, on_bad, exchange):
    items = image_items(128, False)[rank*64:(rank + 1)*64]
    options = dict(bs=16, device="cpu", num_workers=0, shuffle=False, drop_last=True)
    dls = DataLoaders.from_dsets(items, items[:16], **options)
    guard = NonFiniteGuard(on_bad)
    cbs = [BarlowTwins(pipelines(), loss=BarlowTwinsLoss(check_finite=False)), guard]
    cbs[0].exchange = exchange   # if "none" a loss for each part: a bad image in one rank leaves the others finite
    if rank: cbs.append(DoToImages(spoil_images, 1))
    if exchange is None: cbs.append(GlobalBatch())   # statistics and loss of both ranks: all are NaN
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(small_model())
    learn = quiet(Learner(dls, model, cbs=cbs, opt_func=OPTS["momentum"], lr=1e-2))
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: learn.fit(1)
        except FloatingPointError as e: said = str(e)
    weights = [p.detach().numpy() for p in learn.model.parameters()]
    return dict(said=said, last=guard.last, skipped=len(guard.skipped), weights=weights)


@pytest.mark.parametrize("on_bad, exchange", [("stop", "none"), ("skip", "none"), ("skip", None)])
@pytest.mark.skipif(not torch.distributed.is_available() or not hasattr(os, "fork"), reason="processes are forked")
def test_ranks_agree(on_bad, exchange):
    "And the one whose image is bad is named in both"
    a, b = run_ranks(partial(one_rank, on_bad=on_bad, exchange=exchange))
    assert (a["last"].where, b["last"].where) == ("elsewhere", "images")
    assert "in rank 1 the images hold 2 NaN" in str(a["last"]) and "Image: image 21 (row 5)" in str(a["last"])
    assert (a["skipped"], b["skipped"]) == ((1, 1) if on_bad == "skip" else (0, 0))
    assert ("step 1" in a["said"]) == ("step 1" in b["said"]) == (on_bad == "stop")
    for p, q in zip(a["weights"], b["weights"]):
        assert np.array_equal(p, q) and np.isfinite(p).all()


def test_what_happens_between_modules_is_the_surrounding_modules():
    class Between(nn.Module):
        def __init__(self, op):
            super().__init__()
            self.first, self.op, self.second = nn.Linear(3, 4), op, nn.Linear(4, 2)
        def forward(self, x): return self.second(self.op(self.first(x)))
    x = torch.randn(8, 3)
    cases = (lambda h: h/0, "1", None), (NanGradient.apply, None, "1"), (lambda h: h, None, None)
    for op, forward, backward in cases:
        net = nn.Sequential(nn.Linear(3, 3), Between(op), nn.Linear(2, 2))
        found = find_forward(net, (x,))
        assert (found and found.name) == forward
        if forward is None:
            found = find_backward(net, (x,), lambda z: z.square().sum())
            assert (found and found.name) == backward


def test_a_module_may_spoil_the_gradient_of_its_own_weights_alone():
    class Own(nn.Linear):
        def forward(self, x): return nn.functional.linear(x, NanGradient.apply(self.weight), self.bias)
    net = nn.Sequential(nn.Linear(3, 3), Own(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert find_backward(net, (torch.randn(8, 3),), lambda z: z.square().sum()).name == "1"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["mixed", "three views"])
def test_other_objectives(make_dls, kind, fault):
    if kind == "mixed": bt = MixedBarlowTwins(pipelines())
    else: bt = BarlowTwins(get_multi_aug_pipelines(3, 8, stats=None))
    spoil, says = FAULTS[fault]
    guard, seen = NonFiniteGuard(), Remember()
    learn = make(make_dls, guard, [spoil(1), seen], bt=bt)
    with pytest.raises(FloatingPointError, match=says.replace("32", r"\d\d")): learn.fit(1)
    if fault != "weights": assert_same(seen.states[1], state_of(learn))
