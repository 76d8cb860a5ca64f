"From an encoder to a classifier: protocols against PyTorch, and everything a fastai Learner does"
import math
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import image_items, quiet, same, small_model, weights
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import load_learner
from fastai.vision.augment import Flip
from fastai.vision.data import ImageDataLoaders
from torch import nn

from self_supervised_bt.classifiers import (
    PROTOCOLS,
    Classifier,
    classifier_learner,
    cosine_by_epoch,
    dataset_rows,
    fit_protocol,
    parameter_groups,
    reinitialised,
    semi_supervised,
    subset_dl,
)
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.evaluation import encode, linear_probe, sample_labels
from self_supervised_bt.folders import unlabelled_dls
from self_supervised_bt.layers import create_encoder


@pytest.fixture
def labelled():
    x, y = digits_images()
    return tensor_dls(x[:200].float()/255, y[:200], bs=32, valid_pct=.3, device="cpu")


@pytest.fixture
def learner(make_learner):
    "One that knows its normalisation"
    learn = make_learner(stats=([.3], [.35]))
    learn.fit(1, 1e-3)
    return learn


def test_images_are_normalised_once_and_inside(learner, labelled):
    learn = classifier_learner(learner, labelled)
    x = labelled.train_ds.x[:5]
    model = learn.model.eval()
    encoder = learner.model.encoder.eval()
    with torch.no_grad(): assert torch.allclose(model(x), model.head(encoder((x - .3)/.35)), atol=1e-5)
    normalise = Normalize.from_stats([.3], [.35], cuda=False)
    dls = DataLoaders.from_dsets(image_items(32), image_items(32), bs=8, device="cpu", num_workers=0,
                                 after_batch=[normalise])
    with pytest.raises(ValueError, match="would do it again"): classifier_learner(learner, dls, n_out=10)


def test_the_pretrained_encoder_is_copied(learner, labelled):
    before = weights(learner)
    quiet(classifier_learner(learner, labelled)).fine_tune(1, 1e-2)
    assert same(before, weights(learner))


@pytest.mark.parametrize("arch", ["xresnet18", "resnet18", "timm/resnet10t", "timm/test_vit"])
def test_groups_hold_every_weight_once(arch):
    encoder = create_encoder(arch, pretrained=False)
    model = Classifier(encoder, nn.Linear(3, 4), None)
    groups = parameter_groups(model)
    assert len(groups) == 3
    assert sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups[2]} == {id(p) for p in model.head.parameters()}
    sizes = [sum(p.numel() for p in g) for g in groups]
    assert sizes[0] < sizes[1] or arch == "timm/test_vit"   # the cut is at half of the weights: late layers are large


def test_freezing_trains_the_head_alone_until_unfrozen(learner, labelled):
    learn = quiet(classifier_learner(learner, labelled, train_bn=False))
    def moved(old): return {k.split(".")[0] for k, v in learn.model.state_dict().items() if not torch.equal(v, old[k])}
    before = weights(learn)
    learn.fit(1, 1e-2)
    assert moved(before) == {"head"} and not learn.model.encoder.training
    learn.unfreeze()
    before = weights(learn)
    learn.fit(1, slice(1e-4, 1e-2))
    assert moved(before) == {"head", "encoder"}
    hypers = learn.opt.hypers
    assert len(hypers) == len(parameter_groups(learn.model))
    assert hypers[0]["lr"] < hypers[-1]["lr"]


def test_frozen_is_frozen(learner, labelled):
    "No weight and no running statistic of a frozen encoder moves, after an earlier fit of all layers either"
    learn = quiet(classifier_learner(learner, labelled, wd=.5))
    def moved(old): return {k.split(".")[0] for k, v in learn.model.state_dict().items() if not torch.equal(v, old[k])}
    for _ in range(2):
        before = weights(learn)
        learn.fit(2, 1e-2)
        assert moved(before) == {"head"}
        learn.unfreeze()
        learn.fit(1, 1e-2)
        learn.freeze()
    learn.freeze_to(1)                           # the early layers alone
    late = {id(w) for w in parameter_groups(learn.model)[1]}
    early = {k: p.detach().clone() for k, p in learn.model.encoder.named_parameters() if id(p) not in late}
    learn.fit(1, 1e-2)
    assert len(early) and all(torch.equal(early[k], p) for k, p in learn.model.encoder.named_parameters() if k in early)
    thawed = quiet(classifier_learner(learner, labelled, train_bn=True))
    thawed.fit(1, 1e-2)
    assert not torch.equal(thawed.model.encoder[1].running_mean, learner.model.encoder[1].running_mean)


def test_probe_and_classifier_see_one_size(make_learner, labelled):
    "The size of the encoder's training, whatever that of the dls"
    learn = make_learner(size=12)
    x, y = labelled.train_ds.x[:5], labelled.train_ds.y[:5]
    seen = []
    learn.model.encoder[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    encode(learn, (x, y))
    clas = classifier_learner(learn, labelled, head=nn.Linear(8, 10))
    clas.model(x)
    classifier_learner(learn, labelled, head=nn.Linear(8, 10), size=10).model(x)
    assert seen == [12, 12, 10]
    with torch.no_grad(): assert torch.allclose(clas.model.eval()(x), clas.model.head(encode(learn, x)[0]), atol=1e-6)
    assert torch.allclose(encode(clas, x)[0], encode(learn, x)[0])


def torch_dls(n=60, **kwargs):
    x, y = digits_images()
    ds = torch.utils.data.TensorDataset(x[:n].float()/255, y[:n] % 3)
    return DataLoaders(torch.utils.data.DataLoader(ds, 16, shuffle=True, **kwargs),
                       torch.utils.data.DataLoader(ds, 16, **kwargs))


def test_pytorch_loaders(learner):
    dls = torch_dls()
    learn = quiet(classifier_learner(learner, dls, n_out=3))
    fit_protocol(learn, "linear", epochs=1)
    assert len(learn.validate()) == 2
    table = semi_supervised(learner, torch_dls(drop_last=True), labels=(4,), methods=("linear", "finetune"), epochs=1,
                            samples=2)
    assert table.images.iloc[0] == 12 and all("±" in table[m].iloc[0] for m in ("linear", "finetune"))
    with pytest.raises(ValueError, match="n_out="): classifier_learner(learner, dls)


@pytest.mark.parametrize("mixed", [MixUp, CutMix])
def test_mixed_images_with_class_indices(learner, mixed):
    for loss_func in (None, nn.CrossEntropyLoss()):
        learn = quiet(classifier_learner(learner, torch_dls(32), n_out=3, loss_func=loss_func))
        learn.fit(1, 1e-2, cbs=mixed())
        assert math.isfinite(learn.recorder.losses[-1])


def test_a_classifier_in_float64(labelled):
    learn = quiet(classifier_learner(small_model().encoder.double(), labelled))
    learn.fit(1, 1e-2)
    assert learn.model.head.weight.dtype == torch.float64


def test_rows_of_broken_files_are_not_counted(folder):
    "`encode` gives no row for them: the sampled rows must still be those images of the dataset"
    for f in sorted(folder.rglob("*.png"))[:10:2]: f.write_bytes(b"no image")
    dls = unlabelled_dls(folder, 8, bs=8, valid_pct=0, labels=True, num_workers=0, n_in=1, device="cpu")
    with pytest.warns(UserWarning, match="5 of 40"): h, y = encode(small_model().encoder, dls.train)
    rows = dataset_rows(dls.train, len(h))
    assert torch.equal(dls.train_ds.y[rows], y) and not dls.train_ds.codes[rows].any()


def test_semi_supervised_learning_with_all_labels(learner, labelled):
    table = semi_supervised(learner, labelled, labels=(1, 1.), methods=("linear",), samples=2)
    assert table.images.tolist()[1] == len(labelled.train_ds)
    assert "±" in table.linear.iloc[0] and "±" not in table.linear.iloc[1]
    assert table.columns.name == "% (mean ± std of 2 samples)"


def test_everything_a_vision_learner_does(learner, folder, tmp_path):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=0, bs=8, num_workers=0, device="cpu", item_tfms=[])
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    learn = quiet(classifier_learner(encoder, dls))
    learn.fine_tune(12, 1e-2)
    file = sorted(folder.rglob("*.png"))[0]
    label, _, probabilities = learn.predict(file)
    assert label in ("dark", "light")
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4)
    assert learn.validate()[1] > .8
    learn.show_results()
    plt.close("all")
    learn.export(tmp_path/"c.pkl")
    assert load_learner(tmp_path/"c.pkl").predict(file)[0] == label


def test_the_linear_protocol_equals_pytorch(learner):
    "The same steps with torch.optim.SGD and CosineAnnealingLR on the frozen encoder's outputs"
    x, y = digits_images()
    dls = tensor_dls(x[:96].float()/255, y[:96], bs=32, valid_pct=0, device="cpu")
    dls.train.shuffle = False
    learn = quiet(classifier_learner(learner, dls))
    nn.init.normal_(learn.model.head.weight, std=.01, generator=torch.Generator().manual_seed(0))
    head = deepcopy(learn.model.head).requires_grad_(True)
    fit_protocol(learn, "linear", epochs=5, wd=1e-2)
    opt = torch.optim.SGD(head.parameters(), .3*32/256, momentum=.9, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
    ds = dls.train.dataset
    h = encode(learner, (ds.x, ds.y))[0]
    for _ in range(5):
        for idx in torch.arange(96).split(32):
            loss = F.cross_entropy(head(h[idx]), ds.y[idx])
            opt.zero_grad()
            loss.backward()
            opt.step()
        plan.step()
    assert torch.allclose(learn.model.head.weight, head.weight, atol=1e-5)
    assert torch.allclose(learn.model.head.bias, head.bias, atol=1e-5)


def test_the_papers_settings():
    assert PROTOCOLS["linear"] == dict(epochs=100, lr_encoder=0., lr_head=.3, wd=1e-6)
    assert PROTOCOLS["finetune"] == dict(epochs=20, lr_encoder=.002, lr_head=.5, wd=0.)


def test_a_protocol_changes_nothing_else_of_the_learner(learner, labelled):
    learn = quiet(classifier_learner(learner, labelled))
    before = learn.opt_func, learn.train_bn, learn.wd_bn_bias
    fit_protocol(learn, "finetune", epochs=1)
    assert (learn.opt_func, learn.train_bn, learn.wd_bn_bias) == before and learn.opt is None
    fit_protocol(learn, "finetune", epochs=1, lr_encoder=.1)
    learn.fit_one_cycle(1, 1e-3)


def test_a_subset_is_the_subset_in_another_order(labelled):
    def sums(images): return images.flatten(1).sum(1).tolist()
    idx = torch.tensor([3, 17, 40, 41, 99])
    subset = subset_dl(labelled.train, idx)
    seen = [tuple(sums(b[0])) for _ in range(4) for b in subset]
    assert len(subset) == 1 and len(set(seen)) > 1
    expected = sorted(sums(labelled.train_ds.x[idx]))
    assert all(sorted(s) == pytest.approx(expected, abs=1e-3) for s in seen)
    assert sum(len(b[0]) for b in subset_dl(labelled.train, torch.arange(70))) == 64      # whole batches


def test_augmentation_is_for_training_alone():
    x = torch.rand(40, 1, 8, 8)
    dls = tensor_dls(x, torch.arange(40) % 2, bs=20, valid_pct=.5, device="cpu", batch_tfms=[Flip(p=1.)])
    assert torch.allclose(dls.valid.one_batch()[0].as_subclass(torch.Tensor), dls.valid_ds.x, atol=1e-5)
    flipped = dls.train.one_batch()[0].as_subclass(torch.Tensor).flip(-1)
    assert all(((f - dls.train_ds.x).abs() < 1e-5).flatten(1).all(1).any() for f in flipped)
    h = encode(small_model().encoder, dls.train)[0]
    assert len(h) == 20
    assert torch.equal(dls.train_ds.x, dls.train_ds[torch.arange(20)][0].as_subclass(torch.Tensor))


def test_semi_supervised_table(learner, labelled):
    table = semi_supervised(learner, labelled, labels=(3, .5), epochs=2, samples=1)
    assert list(table.columns) == ["images", "linear", "finetune", "scratch"]
    assert list(table.index) == ["3 per class", "50 %"]
    assert table.images.iloc[0] == 30
    h, y = encode(learner, labelled.train)
    idx = sample_labels(y, 3)
    probe = linear_probe(h[idx], y[idx], *encode(learner, labelled.valid))
    assert float(table.linear.iloc[0]) == pytest.approx(100*probe.top1, abs=.051)


def test_reinitialised_has_new_weights_and_the_same_input(learner):
    for encoder in (learner.model.encoder, create_encoder("timm/test_resnet", n_in=1, pretrained=False)):
        new = reinitialised(encoder)
        assert [n for n, _ in new.named_parameters()] == [n for n, _ in encoder.named_parameters()]
        weights = [(a, b) for a, b in zip(new.parameters(), encoder.parameters()) if a.ndim > 1]
        assert all(not torch.equal(a, b) for a, b in weights)
    assert reinitialised(learner.model.encoder).clean_pipeline is learner.model.encoder.clean_pipeline


def test_several_labels_per_image_get_their_loss_and_metric(learner):
    x, y = digits_images()
    several = torch.stack([y % 2, (y > 4).long()], 1).float()
    dls = tensor_dls(x[:100], several[:100], bs=20, valid_pct=.4, device="cpu")
    learn = quiet(classifier_learner(learner, dls))
    learn.fit(1, 1e-2)
    assert learn.metrics[0].name == "average_precision_score" and learn.model.head.out_features == 2


def test_a_failing_fit_loses_no_encoder(learner, labelled):
    before = weights(learner)
    def fail(*_): raise RuntimeError("failed")
    learn = quiet(classifier_learner(learner, labelled, loss_func=fail))
    with pytest.raises(RuntimeError): learn.fit(1)
    assert same(before, weights(learner))


def test_bad_input(learner, labelled):
    no_labels = tensor_dls(digits_images()[0][:50], bs=8, device="cpu")
    learn = classifier_learner(learner, labelled)
    with pytest.raises(ValueError, match="how many classes"): classifier_learner(learner, no_labels)
    with pytest.raises(ValueError, match="'svm'"): semi_supervised(learner, labelled, methods=("svm",))
    with pytest.raises(ValueError, match="smaller n"): semi_supervised(learner, labelled, labels=(500,))
    with pytest.raises(ValueError, match="protocol must be"): fit_protocol(learn, "svm")
    with pytest.raises(ValueError, match="no lr:"): fit_protocol(learn, "linear", lr=3)


def test_the_cosine_steps_once_an_epoch():
    f = cosine_by_epoch([.3, .1], 4)
    rates = [f(step/40)[0] for step in range(40)]
    assert np.allclose(rates, np.repeat([.3*(1 + math.cos(math.pi*e/4))/2 for e in range(4)], 10))
