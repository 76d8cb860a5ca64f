"`MultiView` with fastai, tested through `BarlowTwins`, and a Learner without a loss"
import copy
import warnings
from contextlib import suppress
from functools import cache

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from callbacks import DoAt, DoToViews, RaiseAt, RecordBatches, record_calls
from conftest import collate, image_items, quiet, same, small_model, weights
from fastai.callback import schedule  # noqa: F401  fit_one_cycle, lr_find
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize, Normalize
from fastai.learner import CastToTensor, Learner, load_learner
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from torch import nn

from self_supervised_bt.augmentations import BACKENDS, get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.core import rng_states
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.evaluation import encode
from self_supervised_bt.fused import NormalizeViews
from self_supervised_bt.losses import BarlowTwinsLoss, barlow_twins_loss
from self_supervised_bt.multiview import in_one_batch, no_loss
from self_supervised_bt.recipes import bt_learner

AUGS = dict(size=8, stats=None)


# 1. The callback runs just before `CastToTensor`

def test_callback_gets_typed_batches_before_they_are_cast(make_learner):
    assert BarlowTwins.order == CastToTensor.order - 1
    spy = RecordBatches()
    learn = make_learner(stats=imagenet_stats, cbs=[spy])
    seen = []
    def note_type(x):
        seen.append(type(x))
        return x
    learn.barlow_twins.augs[0] = Pipeline([note_type, *learn.barlow_twins.augs[0].fs], split_idx=0)
    learn.fit(1)
    assert all(issubclass(t, TensorImage) for t in seen) and seen
    assert type(spy.inputs[0]) is torch.Tensor
    assert spy.inputs[0].min() < -.5             # black, normalised: Normalize was not skipped


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_tensors_are_normalised(make_learner, backend):
    "Typed transforms are applied to plain tensors as well"
    images = torch.utils.data.TensorDataset(torch.rand(32, 1, 8, 8))
    dls = DataLoaders(*(torch.utils.data.DataLoader(images, batch_size=16) for _ in range(2)))
    spy = RecordBatches()
    learn = make_learner(dls=dls, stats=imagenet_stats, cbs=[spy], backend=backend)
    learn.fit(1)
    assert spy.inputs[0].min() < -.5


# 2. Unlabelled batches train

@pytest.mark.parametrize("labels", [True, False])
def test_unlabelled_images_train_and_the_recorder_counts_images(make_learner, make_dls, labels):
    spy = RecordBatches()
    learn = make_learner(make_dls(labels=labels, n_valid=20), cbs=[spy])
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1)
    assert not torch.equal(before["encoder.0.weight"], learn.model.state_dict()["encoder.0.weight"])
    assert learn.recorder.loss.count == 20          # validation images, not views
    assert [len(x) for x in spy.inputs] == [32, 32, 32, 32, 8]
    assert [len(y[0]) for y in spy.targets] == [16, 16, 16, 16, 4]


def test_loss_is_that_of_the_two_halves_of_the_batch(make_learner):
    z, losses = [], []
    keep_loss = DoAt("after_loss", lambda learn: losses.append(float(learn.loss)))
    keep_z = DoAt("after_pred", lambda learn: z.append(learn.pred.detach().clone()))
    make_learner(cbs=[keep_loss, keep_z], lmb=.02).fit(1)
    for pred, loss in zip(z, losses, strict=True):
        assert loss == pytest.approx(float(barlow_twins_loss(*pred.chunk(2), lmb=.02)), rel=1e-5)


def set_pixels(step, value):
    "A callback that sets the pixels of one view in one training step"
    return DoToViews(lambda learn: learn.xb[0][3].fill_(value), step)


def test_terms_are_means_over_the_training_batches(make_dls):
    augs, terms, sizes = get_barlow_twins_aug_pipelines(**AUGS), [], []
    learn = quiet(Learner(make_dls(n=40, drop_last=False), small_model(), cbs=BarlowTwins(augs, terms=True)))
    def keep(learn):
        if not learn.training: return
        terms.append(learn.barlow_twins.objective.terms)
        sizes.append(len(learn.yb[0]))
    learn.add_cb(DoAt("after_loss", keep))
    learn.fit(2)
    names = ["invariance", "redundancy", "diagonal_mean", "off_diagonal_rms"]
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", *names, "time"]
    assert sizes == [16, 16, 8]*2
    for epoch in range(2):
        mine = slice(3*epoch, 3*epoch + 3)
        for name, value in zip(names, learn.recorder.values[epoch][2:]):
            expected = sum(float(getattr(t, name))*s for t, s in zip(terms[mine], sizes[mine]))/40
            assert value == pytest.approx(expected, rel=1e-5)
    assert not learn.metrics and not learn.barlow_twins.columns


def test_terms_with_train_metrics(make_dls):
    learn = Learner(make_dls(), small_model(), cbs=BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), terms=True))
    learn.recorder.train_metrics = True
    quiet(learn).fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert row["valid_loss"] == pytest.approx(row["valid_invariance"] + 5e-3*row["valid_redundancy"], rel=1e-4)
    assert row["train_invariance"] != row["valid_invariance"]


def test_terms_of_validate_and_of_a_fit_without_validation(make_dls):
    augs = get_barlow_twins_aug_pipelines(**AUGS)
    learn = Learner(make_dls(n_valid=16), small_model(), cbs=BarlowTwins(augs, terms=True))
    loss, invariance, redundancy, *_ = learn.validate()
    assert loss == pytest.approx(invariance + 5e-3*redundancy, rel=1e-4)
    alone = Learner(make_dls(n_valid=0), small_model(), cbs=BarlowTwins(augs, terms=True))
    quiet(alone).fit(1)
    assert alone.recorder.values[0][-4] > 1


def test_terms_need_no_forward_pass_of_clean_images(make_learner, make_dls):
    calls = []
    model = small_model()
    calls = record_calls(model)
    learn = Learner(make_dls(), model, cbs=BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), terms=True))
    quiet(learn).fit(1)
    assert [len(z) for _, z in calls] == [32, 32, 32, 32, 8]


@pytest.mark.parametrize("loss", [None, lambda a, b: (a - b).square().mean()], ids=["ours", "another"])
def test_nan_raises_before_the_weights_change(make_dls, loss):
    bt = BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), loss=loss)
    learn = Learner(make_dls(), small_model(), cbs=[bt, set_pixels(1, float("nan"))])
    own = learn.loss_func
    with pytest.raises(FloatingPointError, match="z1 has 256 nan and 0 inf, in 16 of 16 rows"):   # BatchNorm spreads it
        learn.fit(1)
    assert learn.loss_func is own and all(p.isfinite().all() for p in learn.model.parameters())


def test_lr_find_stops_at_a_non_finite_loss(make_learner, tmp_path):
    learn = make_learner(cbs=[set_pixels(12, float("inf"))])
    learn.path = tmp_path
    learn.lr_find(num_it=20, show_plot=False)
    assert len(learn.recorder.losses) == 12 and all(p.isfinite().all() for p in learn.model.parameters())


def test_nan_raises_although_the_loss_does_not_check(make_dls):
    "The callback checks every loss once per step"
    augs = get_barlow_twins_aug_pipelines(**AUGS)
    loss = BarlowTwinsLoss(check_finite=False)
    learn = Learner(make_dls(), small_model(), cbs=[BarlowTwins(augs, loss=loss), set_pixels(1, float("nan"))])
    with pytest.raises(FloatingPointError, match="z1 has 256 nan and 0 inf, in 16 of 16 rows"): learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    learn.remove_cbs(DoToViews)
    learn.model = small_model()
    learn.fit(1)


# 3. The loss is restored

EVENTS = ["before_batch", "after_pred", "after_loss", "before_epoch", "after_epoch", "before_validate"]

@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=lambda e: type(e).__name__)
def test_loss_is_restored_after_an_error(make_learner, event, error):
    own = nn.CrossEntropyLoss()
    learn = make_learner(loss_func=own)
    with suppress(KeyboardInterrupt, RuntimeError): learn.fit(1, cbs=RaiseAt(event, error))
    assert learn.loss_func is own
    assert learn.barlow_twins.views is None
    learn.fit(1)
    assert learn.loss_func is own and len(learn.recorder.losses) == 3


def test_loss_is_restored_after_a_callback_for_one_fit(make_dls):
    own = nn.CrossEntropyLoss()
    learn = Learner(make_dls(), small_model(), loss_func=own)
    learn.logger = print
    bt = BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS))
    with suppress(KeyboardInterrupt): learn.fit(1, cbs=[bt, RaiseAt("after_pred", KeyboardInterrupt())])
    assert learn.loss_func is own


@cache
def digits48(): return image_items(48)   # once: a Learner that is exported needs functions with names
def digit_image(i): return digits48()[i][0].clone()
def digit_label(i): return digits48()[i][1]


@pytest.mark.parametrize("precision", ["to_fp32", "to_fp16", "to_bf16"])
@pytest.mark.parametrize("data", ["labelled", "unlabelled", "tensors"])
def test_fit_lr_find_fit_export_load(make_learner, tmp_path, precision, data):
    own = nn.CrossEntropyLoss()
    tfms = [[digit_image], [digit_label, Categorize()]][:2 if data == "labelled" else 1]
    if data == "tensors": dls = tensor_dls(digits_images()[0][:48], bs=16, device="cpu")
    else:
        datasets = Datasets(range(48), tfms, splits=(range(40), range(40, 48)))
        dls = datasets.dataloaders(bs=16, device="cpu", num_workers=0)
    learn = getattr(make_learner(dls, loss_func=own, path=tmp_path, stats=imagenet_stats), precision)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(1)
        learn.lr_find(num_it=8, show_plot=False)
        assert learn.loss_func is own
        learn.fit_one_cycle(1, 1e-3)
        learn.export()
        assert learn.loss_func is own
        z, _ = learn.get_preds()
        again = load_learner(tmp_path/"export.pkl")
        assert torch.allclose(again.get_preds(dl=dls.valid)[0], z, atol=1e-4)
        assert torch.allclose(encode(again, dls.valid)[0], encode(learn, dls.valid)[0], atol=1e-4)
    assert type(again.loss_func) is nn.CrossEntropyLoss
    if data == "labelled":
        with pytest.raises(ValueError, match="cannot be decoded"): learn.predict(3)


# 4. No loss_func and no metric are needed

def test_no_loss_func_is_needed_without_labels(make_dls):
    dls = make_dls(labels=False)
    learn = Learner(dls, small_model(), cbs=[BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS))])
    assert learn.loss_func is no_loss
    Learner(dls, small_model(), cbs=BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS)))
    with pytest.raises(AssertionError, match="pass a loss function"): Learner(dls, small_model())
    own = nn.MSELoss()
    assert Learner(dls, small_model(), own, cbs=[BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS))]).loss_func is own
    with pytest.raises(ValueError, match="no loss of its own"): no_loss(None)


# 5. Prediction

@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_predictions_are_one_row_per_image_in_order(make_learner, make_dls, labels, when):
    learn = make_learner(make_dls(labels=labels, n_valid=21), stats=imagenet_stats, loss_func=F.cross_entropy)
    if when == "after": learn.fit(1)
    x = torch.stack([o[0] for o in learn.dls.valid_ds])
    normalised = NormalizeViews.from_stats(*imagenet_stats, cuda=False)(TensorImage(x)).as_subclass(torch.Tensor)
    with torch.no_grad(): expected = learn.model.eval()(normalised)
    z, y = learn.get_preds()
    assert torch.allclose(z, expected, atol=1e-5)
    assert y is None or y.tolist() == [o[1] for o in learn.dls.valid_ds]
    inputs, z, _ = learn.get_preds(with_input=True)
    assert torch.allclose(inputs.as_subclass(torch.Tensor), x.as_subclass(torch.Tensor)) and len(z) == 21


def test_predictions_have_no_softmax_from_the_learners_own_loss(make_learner):
    from fastai.losses import CrossEntropyLossFlat
    z = make_learner(loss_func=CrossEntropyLossFlat()).get_preds()[0]
    assert (z < 0).any()


def test_validate_gives_the_loss_of_views_and_metrics_of_clean_images(make_learner):
    rows = []
    def metric(pred, y):
        rows.append(pred.clone())
        return pred.new_tensor(float(len(pred) == len(y)))
    learn = make_learner(stats=imagenet_stats, metrics=metric)
    loss, same_length = learn.validate()
    assert loss > 1 and same_length == 1
    assert torch.allclose(torch.cat(rows), learn.get_preds()[0], atol=1e-5)
    learn.fit(1)
    assert learn.recorder.values[-1][2] == 1


def test_training_metrics_get_one_row_per_image(make_learner):
    def rows(pred, y): return pred.new_tensor(float(len(pred) == len(y)))
    learn = make_learner(metrics=rows)
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert learn.recorder.values[-1][1] == 1


@pytest.mark.parametrize("labels", [True, False])
def test_unsupported_predictions_raise(make_learner, make_dls, labels):
    learn = make_learner(make_dls(labels=labels), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="with_loss"): learn.get_preds(with_loss=True)
    with pytest.raises(ValueError, match="cannot be decoded into labels"): learn.get_preds(with_decoded=True)
    assert isinstance(learn.loss_func, nn.CrossEntropyLoss)
    assert len(learn.get_preds()[0]) == 20


# 6. The encoder is evaluated on images as in training

def test_encoder_keeps_its_normalisation(make_learner, make_dls):
    learn = make_learner(stats=imagenet_stats, size=12)
    learn.fit(1)
    x = TensorImage(torch.stack([o[0] for o in learn.dls.valid_ds]))
    with torch.no_grad(): expected = learn.model.encoder.eval()(learn.barlow_twins.clean(x).as_subclass(torch.Tensor))
    assert learn.barlow_twins.clean(x).shape == (20, 1, 12, 12)
    for model in (learn, learn.model, learn.model.encoder, copy.deepcopy(learn.model.encoder)):
        assert torch.allclose(encode(model, learn.dls.valid)[0], expected, atol=1e-5)


# 8. Numbers in float32: in test_losses.py. 9. Views are per sample: in test_augmentations.py

# 10. Devices follow the batch

def test_statistics_follow_the_batch_for_any_value_of_cuda():
    "`meta` is used in place of a GPU: statistics on the CPU move to the device of the batch, for any `cuda=`"
    for cuda in (True, False, None):
        norm = get_barlow_twins_aug_pipelines(8, cuda=cuda)[0].fs[0].norm
        assert norm.mean.device.type == "cpu"
        for device in ("meta", "cpu"):
            x = TensorImage(torch.rand(2, 3, 8, 8, device=device))
            assert norm(x).device.type == norm.decode(norm(x)).device.type == device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(make_dls):
    dls = make_dls(labels=False)
    dls.cuda()
    learn = bt_learner(dls, "resnet18", hidden_size=32, projection_size=32).to_fp16()
    learn.fit(1)
    assert learn.barlow_twins.sample_views()[0].is_cuda and encode(learn, dls.valid)[0].isfinite().all()


# 11. Batches of one image, empty loaders

def test_training_batch_of_one_raises_before_training(make_learner, make_dls):
    items = image_items(33)
    for bs, drop_last, ok in ((1, False, False), (16, False, False), (16, True, True)):
        dls = DataLoaders(torch.utils.data.DataLoader(items, batch_size=bs, drop_last=drop_last, collate_fn=collate),
                          torch.utils.data.DataLoader(items, batch_size=16, collate_fn=collate))
        learn = make_learner(dls)
        before = learn.model.encoder[0].weight.clone()
        if ok:
            learn.fit(1)
            continue
        with pytest.raises(ValueError, match="drop_last=True"): learn.fit(1)
        assert torch.equal(before, learn.model.encoder[0].weight)


def test_a_sampler_shorter_than_its_data_trains(make_learner):
    items = image_items(33)   # of which 32 are sampled, in two batches
    def loader(**kwargs): return torch.utils.data.DataLoader(items, collate_fn=collate, **kwargs)
    sampler = torch.utils.data.SubsetRandomSampler(range(32))
    for how in (dict(batch_size=16, sampler=sampler),
                dict(batch_sampler=torch.utils.data.BatchSampler(sampler, 16, False))):
        learn = make_learner(DataLoaders(loader(**how), loader(batch_size=16)))
        learn.fit(1)
        assert len(learn.recorder.losses) == 2
    too_long = torch.utils.data.BatchSampler(range(33), 16, False)
    with pytest.raises(ValueError, match="a batch of one image .33 images, bs=16"):
        make_learner(DataLoaders(loader(batch_sampler=too_long), loader(batch_size=16))).fit(1)


def test_validation_batch_of_one_is_left_out_with_a_warning(make_learner, make_dls):
    learn = make_learner(make_dls(n_valid=17))
    with pytest.warns(UserWarning, match="left out of the loss"): learn.fit(1)
    assert learn.recorder.loss.count == 16
    assert len(learn.get_preds()[0]) == 17


def test_empty_training_loader_raises(make_learner, make_dls):
    with pytest.raises(ValueError, match="gives no batch: 10 image"): make_learner(make_dls(n=10, n_valid=4)).fit(1)


# Other parts of fastai

def test_works_with_fastais_callbacks(make_learner, tmp_path):
    learn = make_learner(path=tmp_path)
    learn.fit_one_cycle(2, 1e-3, cbs=[SaveModelCallback(), CSVLogger(), GradientAccumulation(32)])
    learn.fit(1, cbs=ShortEpochCallback(.5))
    assert len(learn.recorder.losses) == 2
    assert (tmp_path/"models/model.pth").exists() and (tmp_path/"history.csv").exists()


def test_gradient_accumulation(make_dls):
    "With two accumulated batches, plain SGD takes a step along the mean of their gradients"
    from fastai.optimizer import SGD
    def learner(**kwargs):
        torch.manual_seed(0)
        model = small_model()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = 0.
        augs = get_barlow_twins_aug_pipelines(8, flip_p=0, rotate=False, jitter=False, bw=False, blur=False, stats=None,
                                              resize_scale=(1, 1), resize_ratio=(1, 1))
        dls = make_dls(n=32, shuffle=False)
        learn = Learner(dls, model, cbs=[BarlowTwins(augs, lmb=1.)], opt_func=SGD, lr=1e-2, wd=0., **kwargs)
        learn.logger = print
        return learn
    learn = learner()
    grads, halves = [], (learn.dls.train_ds[:16], learn.dls.train_ds[16:])
    batches = [TensorImage(torch.stack([o[0] for o in half])) for half in halves]
    for x in batches:
        model = copy.deepcopy(learn.model).train()
        barlow_twins_loss(*model(torch.cat([x, x]).as_subclass(torch.Tensor)).chunk(2), lmb=1.).backward()
        grads.append(model.encoder[0].weight.grad)
    before = learn.model.encoder[0].weight.detach().clone()
    learn.dls.train.create_batches = lambda samps: ((b, torch.zeros(16)) for b in batches)
    learn.fit(1, 1e-2, cbs=GradientAccumulation(32))
    moved = (before - learn.model.encoder[0].weight.detach())/1e-2
    assert torch.allclose(moved, sum(grads)/2, rtol=2e-2, atol=1e-3*moved.abs().max())


# show()

def test_show_before_and_after_fit(make_learner):
    learn = make_learner(stats=imagenet_stats)
    for _ in range(2):
        axes = learn.barlow_twins.show(n=3)
        assert len(axes) == 6 and axes[0].get_title() == "view 1" and axes[1].get_title() == "view 2"
        shown = axes[0].get_images()[0]
        assert shown.get_clim() == (0, 1) and 0 <= shown.get_array().min() and shown.get_array().max() <= 1
        learn.fit(1)
    assert len(learn.barlow_twins.show(n=100)) == 32        # there are 16 images in a batch
    with pytest.raises(ValueError, match="n must be"): learn.barlow_twins.show(n=0)


def test_show_plots_the_views_of_the_current_batch(make_learner):
    learn = make_learner()
    b = learn.dls.one_batch()
    learn._split(b)
    learn("before_batch")
    shown = learn.barlow_twins.show(n=2)[0].get_images()[0].get_array()
    assert torch.allclose(torch.as_tensor(shown), learn.xb[0][0, 0], atol=1e-6)


def loaders(kind):
    "Digits in a random order, by fastai's or PyTorch's loaders"
    if kind == "fastai":
        return DataLoaders.from_dsets(image_items(32), image_items(16), bs=16, device="cpu", num_workers=0)
    generator = torch.Generator().manual_seed(0) if kind == "PyTorch, own generator" else None
    made = [torch.utils.data.DataLoader(image_items(32), batch_size=16, shuffle=True, collate_fn=collate,
                                        generator=generator) for _ in range(2)]
    return DataLoaders(*made)


@pytest.mark.parametrize("kind", ["fastai", "PyTorch", "PyTorch, own generator"])
def test_looking_leaves_training_as_it_was(make_learner, kind):
    "Between two fits, and in the middle of an epoch: the loader's order, and every random state"
    def trained(look):
        set_seed(0)
        learn = make_learner(loaders(kind), small_model(), metrics=[])
        def show(learn):
            if not look: return
            before = rng_states()
            learn.barlow_twins.show(2, original=True)
            learn.barlow_twins.sample_views()
            after = rng_states()
            assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
            assert torch.equal(before["numpy"][1], after["numpy"][1])
            plt.close("all")
        show(learn)
        learn.fit(1, cbs=DoAt("after_batch", show, order=99))
        show(learn)
        learn.fit(1)
        return weights(learn)
    assert same(trained(False), trained(True))


def test_the_text_below_a_view_is_its_own(make_learner):
    "With one pipeline for both views, and although the pipeline has made another view since"
    learn = make_learner()
    pipeline = learn.barlow_twins.augs[0]
    learn.barlow_twins.augs = [pipeline, pipeline]
    learn._split(learn.dls.one_batch())
    learn("before_batch")
    expected = [[pipeline.fs[0].describe(i, sampled) for sampled in learn.barlow_twins.sampled] for i in range(3)]
    pipeline(learn.barlow_twins.images)
    texts = [ax.texts[0].get_text() for ax in learn.barlow_twins.show(3, sampled=True)]
    assert texts == sum(expected, []) and texts[::2] != texts[1::2]


def test_show_with_kornias_backend(make_learner):
    learn = make_learner(backend="kornia")
    assert len(learn.barlow_twins.show(2, original=True)) == 6
    with pytest.raises(ValueError, match="only backend='fused' keeps"): learn.barlow_twins.show(2, sampled=True)


def test_lmb_set_on_a_loss_without_it_raises(make_dls):
    bt = BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), loss=lambda a, b: (a - b).square().sum())
    with pytest.raises(ValueError, match="lmb=0.1 would have no effect"): bt.lmb = .1
    assert bt.lmb is None


def test_show_plots_the_image_and_the_sampled_parameters(make_learner, make_dls):
    learn = make_learner(make_dls(channels=3), stats=imagenet_stats, views=3)
    b = learn.dls.one_batch()
    learn._split(b)
    learn("before_batch")
    axes = learn.barlow_twins.show(n=2, original=True, sampled=True)
    assert [ax.get_title() for ax in axes] == ["original", "view 1", "view 2", "view 3", "", "", "", ""]
    assert torch.allclose(torch.as_tensor(axes[4].get_images()[0].get_array()), b[0][1].permute(1, 2, 0), atol=1e-6)
    for row in (0, 1):
        shown = [ax.texts[0].get_text() for ax in axes[4*row+1:4*row+4]]
        assert shown == [aug.fs[0].describe(row) for aug in learn.barlow_twins.augs]
        assert len(set(shown)) == 3
        assert not axes[4*row].texts
    figure = axes[0].figure
    figure.canvas.draw()
    texts, below = ([ax.texts[0].get_window_extent() for ax in axes[4*row+1:4*row+4]] for row in (0, 1))
    next_row = max(ax.get_window_extent().y1 for ax in axes[4:8])
    assert all(next_row < text.y0 for text in texts), "text on the next row of images"
    assert min(text.y0 for text in texts) - next_row < .35*figure.dpi, "an empty gap between rows"
    assert all(text.y0 > 0 for text in below), "text is cut off"
    with pytest.raises(ValueError, match="only backend='fused'"):
        make_learner(backend="kornia").barlow_twins.show(sampled=True)


# Bad input

def test_bad_models_pipelines_and_batches(make_learner, make_dls):
    augs = get_barlow_twins_aug_pipelines(**AUGS)
    with pytest.raises(ValueError, match="no encoder and no projector"): make_learner(model=nn.Linear(1, 1)).fit(1)
    with pytest.raises(ValueError, match="two or more Pipelines"): BarlowTwins(augs[:1])
    for lmb in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lmb"): BarlowTwins(augs, lmb=lmb)
    two = make_learner()
    two.add_cb(BarlowTwins(augs))
    with pytest.raises(ValueError, match="2 callbacks that make views, BarlowTwins and BarlowTwins"): two.fit(1)
    two_sizes = [augs[0], get_barlow_twins_aug_pipelines(12, stats=None)[0]]
    sizes = Learner(make_dls(labels=False), small_model(), cbs=BarlowTwins(two_sizes))
    with pytest.raises(ValueError, match="different shapes"): sizes.fit(1)
    bare = DataLoaders(*(torch.utils.data.DataLoader(torch.rand(32, 1, 8, 8), batch_size=16) for _ in range(2)))
    with pytest.raises(TypeError, match="bare Tensor"): make_learner(bare).fit(1)
    def items_dls(item): return DataLoaders.from_dsets([item]*32, [item]*16, bs=16, device="cpu", num_workers=0)
    words = items_dls((torch.rand(4), 1))
    with pytest.raises(ValueError, match="images must be"): make_learner(words, loss_func=nn.MSELoss()).fit(1)
    pairs = items_dls((torch.rand(1, 8, 8), torch.rand(1, 8, 8), 1))
    with pytest.raises(ValueError, match="2 inputs"): make_learner(pairs, loss_func=nn.MSELoss()).fit(1)


def test_normalisation_in_the_dls_warns(make_learner, make_dls):
    dls = make_dls(after_batch=[Normalize.from_stats(*imagenet_stats, cuda=False)], channels=3)
    learn = make_learner(dls, small_model(3))
    with pytest.warns(UserWarning, match="take Normalize out"):
        with pytest.raises(ValueError, match="-2.* to 2.*: divide by 255, or take Normalize out"): learn.fit(1)
    learn.remove_cbs(BarlowTwins)
    needs_no_unit_range = get_barlow_twins_aug_pipelines(8, jitter=False, bw=False, stats=None)
    learn.add_cb(BarlowTwins(needs_no_unit_range))
    with pytest.warns(UserWarning, match="take Normalize out"): learn.fit(1)


def test_a_model_in_float64_trains_and_predicts(make_dls):
    "Views are float32, and fastai's Recorder averages float32 losses"
    augs = get_barlow_twins_aug_pipelines(8, stats=None)
    learn = quiet(Learner(make_dls(), small_model().double(), cbs=[BarlowTwins(augs)]))
    weight = learn.model.projector[0].weight
    before = weight.detach().clone()
    learn.fit(1, 1e-2)
    assert weight.dtype == torch.float64 and not torch.equal(weight, before)
    assert len(learn.get_preds()[0]) == 20 and learn.validate()[0] > 0


@pytest.mark.parametrize("own_loss", [None, F.mse_loss])
def test_a_validation_inside_a_fit_leaves_the_loss_of_the_views(make_dls, own_loss):
    "`validate` calls `after_fit`: training would go on with the Learner's own loss"
    losses = []
    def look(learn):
        learn.validate()
        losses.append(type(learn.loss_func).__name__)
    cbs = [BarlowTwins(get_barlow_twins_aug_pipelines(8, stats=None)), DoAt("after_train", look)]
    learn = quiet(Learner(make_dls(), small_model(), loss_func=own_loss, cbs=cbs))
    outside = learn.loss_func
    learn.fit(2, 1e-2)
    assert losses == ["ViewsLoss"]*2 and learn.loss_func is outside


# Batches of bytes

@pytest.fixture
def bytes_dls():
    "Loaders that give bytes, with labels"
    def make(size, n=48):
        x = F.interpolate(torch.rand(n, 1, 6, 6), size=size, mode="bilinear")
        items = torch.utils.data.TensorDataset((x*255).byte(), torch.arange(n) % 2)
        return DataLoaders(*(DataLoader(items, bs=16) for _ in range(2)))
    return make


@pytest.mark.parametrize("size", [8, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_train_and_are_evaluated_as_floats_are(make_learner, bytes_dls, size, backend):
    "Bytes come as far as the views; model, predictions, and `show` see floats"
    spy, dls = RecordBatches(), bytes_dls(size)
    learn = make_learner(dls=dls, size=size, stats=imagenet_stats, cbs=[spy], backend=backend)
    learn.fit(1)
    assert all(x.dtype == torch.float32 and len(x) == 32 for x in spy.inputs)
    batch = dls.valid.one_batch()
    learn._split(batch)
    learn("before_batch")
    assert learn.barlow_twins.images.dtype == torch.uint8
    original = learn.barlow_twins.show(2, original=True)[0].images[0].get_array()
    assert abs(original*255 - batch[0][0, 0].numpy()).max() < 1e-3
    x, views = learn.barlow_twins.sample_views()
    assert x.max() <= 1 and x.is_floating_point() and views[0].shape == (16, 1, size, size)
    preds = learn.get_preds()[0]
    floats = torch.cat([b[0] for b in dls.valid]).float()/255
    with torch.no_grad(): expected = learn.model(learn.barlow_twins.clean(floats).as_subclass(torch.Tensor))
    assert torch.allclose(preds, expected, atol=1e-5)


def test_both_views_are_one_batch_in_memory(make_learner):
    "Without a copy, and views that lie elsewhere are put together"
    learn = make_learner()
    learn._split(learn.dls.one_batch())
    learn("before_batch")
    first, second = learn.barlow_twins.views
    assert learn.xb[0].data_ptr() == first.data_ptr() and torch.equal(learn.xb[0], torch.cat([first, second]))
    for views in ([second, first], [first, first], [first, second.clone()], [first, second.double()],
                  [first[:4], second[:4]], [first[..., 1:], second[..., 1:]]):
        assert torch.equal(in_one_batch(views), torch.cat(views))
