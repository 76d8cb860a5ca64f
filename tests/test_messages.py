"Wrong arguments, kind by kind, to functions of all modules: the error names the argument, what came and what to do"
import signal

import numpy as np
import pytest
import torch
from conftest import small_encoder, small_model
from fastcore.basics import first

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_batch_augs, show_strength
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.checkpoints import Checkpoints
from self_supervised_bt.classifiers import classifier_learner, fit_protocol, semi_supervised
from self_supervised_bt.data import hold_out, image_files, load_images, tensor_dls
from self_supervised_bt.doctor import diagnose
from self_supervised_bt.evaluation import (
    effective_rank,
    encode,
    encode_views,
    knn_accuracy,
    label_table,
    neighbours,
    positive_pair_accuracy,
    unlabelled_table,
)
from self_supervised_bt.folders import bad_images, check_images, labelled_dls, unlabelled_dls
from self_supervised_bt.losses import BarlowTwinsLoss, variant_loss
from self_supervised_bt.multiview import MultiView
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.reports import report
from self_supervised_bt.training import LARS, WarmupCosine
from self_supervised_bt.weights import inference_model, save_encoder

X = torch.rand(8, 1, 8, 8)
H, Y = torch.rand(8, 4), torch.arange(8) % 2
WRONG = [None, 3, "photos", [1, 2], len]


def named(argument, value, advice, call):
    "Does the call raise `ValueError` with all three?"
    with pytest.raises(ValueError, match=rf"^{argument} must be .*got .*{type(value).__name__}.*{advice}"): call(value)


@pytest.mark.parametrize("value", WRONG)
def test_what_is_no_learner(value, tmp_path):
    for call in (diagnose, lambda o: report(o, tmp_path/"report"), lambda o: encode_views(o, X)):
        named("learn", value, r"bt_learner\(dls\)", call)
    assert not (tmp_path/"report").exists()
    named("learn", value, r"classifier_learner\(model, dls\)", fit_protocol)


@pytest.mark.parametrize("value", [*WRONG, X])
def test_what_is_no_dls(value):
    encoder = small_encoder()
    named("dls", value, r"unlabelled_dls.*tensor_dls", bt_learner)
    for call in (lambda o: classifier_learner(encoder, o), lambda o: semi_supervised(encoder, o)):
        named("dls", value, "labelled_dls", call)


@pytest.mark.parametrize("value", [None, 3, [1, 2], len, torch.nn.Linear])
def test_what_is_no_model(value, tmp_path):
    dls = tensor_dls(X, Y, bs=4, device="cpu")
    for call in (lambda o: encode(o, X), lambda o: classifier_learner(o, dls),
                 lambda o: save_encoder(o, tmp_path/"encoder.safetensors")):
        named("model", value, "load_encoder", call)
    assert list(tmp_path.iterdir()) == []
    named("encoder", value, "create_encoder", create_barlow_twins_model)
    named("model", value, "classifier_learner", lambda o: inference_model(o, "cat.jpg"))


@pytest.mark.parametrize("value", [None, 3, [1., 2.], "h", H.numpy()])
def test_what_is_no_matrix(value):
    for call in (neighbours, effective_rank, lambda o: knn_accuracy(o, Y), lambda o: positive_pair_accuracy(o, H)):
        with pytest.raises(ValueError, match=rf"h1? must be .*got {type(value).__name__}: encode.*as_tensor\(h1?\)"):
            call(value)


@pytest.mark.parametrize("value", [None, [H, H], "h", H])
def test_what_is_no_dict(value):
    for call in (unlabelled_table, lambda o: label_table(o, Y, Y)): named("reps", value, "write reps=", call)
    with pytest.raises(ValueError, match="reps must be a dict of .*got an empty one"): unlabelled_table({})


@pytest.mark.parametrize("name, value", [
    ("flip_p", "often"), ("blur_p", [.5]), ("jitter_s", "strong"), ("jitter_s", [.1, .1, "a", .1]), ("rotate_deg", "a"),
    ("resize_scale", ["a", 1]), ("resize_scale", [None, 1])])
def test_what_is_no_number_in_a_view(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*got .*{str(value)[-4:-1]}"):
        get_barlow_twins_aug_pipelines(8, **{name: value})


def test_other_numbers():
    with pytest.raises(ValueError, match="temperature must be .*got 'hot'"): knn_accuracy(H, Y, k=2, temperature="hot")
    with pytest.raises(ValueError, match="valid_pct must be .*got 'few'"): tensor_dls(X, bs=4, valid_pct="few")
    with pytest.raises(ValueError, match="n_test must .*got few"): hold_out(X, n_test="few")
    for images in ([1, 2], X.numpy(), X[0]):
        with pytest.raises(ValueError, match="x must be a tensor of images.*as_tensor.*load_images"): hold_out(images)


IMAGES = [None, 3, X, X.numpy(), [1, 2], [None], [X[0]], [X[0].numpy()]]


@pytest.mark.parametrize("value", IMAGES)
def test_what_stands_for_no_images(value):
    "A tensor would be taken for a list of files that are all broken"
    for call in (lambda o: unlabelled_dls(o, 8), lambda o: labelled_dls(o, 8), check_images):
        named("images", value, "tensor_dls", call)


@pytest.mark.parametrize("value", [None, 3, "photos", X])
def test_what_is_no_list_of_files(value):
    "A name would be taken for a list of letters"
    named("files", value, "image_files", lambda o: load_images(o, 8, progress=False))
    if not isinstance(value, str): named("path", value, "folder", image_files)
    with pytest.raises(TypeError, match=f"dls must come from unlabelled_dls, got a {type(value).__name__}"):
        bad_images(value)


def test_files_may_come_from_a_generator(folder):
    files = sorted(folder.rglob("*.png"))[:3]
    assert torch.equal(load_images((f for f in files), 8, progress=False), load_images(files, 8, progress=False))


@pytest.mark.parametrize("bs", [0, -1, 2.5, "many", None])
def test_what_is_no_batch_size(folder, bs):
    for call in (lambda: tensor_dls(X, bs=bs), lambda: unlabelled_dls(folder, 8, bs=bs)):
        with pytest.raises(ValueError, match="bs must be a positive int, got"): call()


def test_no_images():
    with pytest.raises(ValueError, match=r"x holds no images, got \(0, 1, 8, 8\)"): tensor_dls(X[:0], bs=4)


def test_what_is_no_option():
    "The names that there are stand beside it"
    with pytest.raises(TypeError, match="variant_loss has no argument foo: it has lmb, .*queue, scale, .*check_finite"):
        variant_loss("hsic", foo=3)
    with pytest.raises(TypeError, match="get_batch_augs has no argument foo: it has rotate, .*backend$"):
        get_barlow_twins_aug_pipelines(8, foo=3)
    assert variant_loss("hsic", lmb=.1, eps=1e-4).eps == 1e-4


@pytest.mark.parametrize("backend", ["fused", "kornia"])
@pytest.mark.parametrize("stats", [3, "imagenet", ([.5],), ("a", "b"), ([.5], None), ([.5], [0.]), ([.5]*3, [.5]*2),
                                   ([float("nan")], [.5])])
def test_what_are_no_statistics(stats, backend):
    with pytest.raises(ValueError, match=r"stats must be a pair .*, got .*: e.g. stats=imagenet_stats"):
        get_batch_augs(8, stats=stats, backend=backend)


@pytest.mark.parametrize("stats", [(.5, .5), ([.5]*3, [.5]*3), (torch.zeros(3), np.ones(3)), ([.5]*4, .5)])
def test_statistics_of_any_kind_of_numbers(stats): assert get_batch_augs(8, stats=stats)[0].norm is not None


def test_what_is_no_image_to_show():
    for value in (None, 3, "cat.jpg", X, X[0].numpy()):
        with pytest.raises(ValueError, match=r"x must be a tensor \(C,H,W\), got .*load_images"):
            show_strength(value, "jitter_s", [.1])
    with pytest.raises(ValueError, match=r"values must be a list, got a float: write \[0.1\]"):
        show_strength(X[0], "jitter_s", .1)
    with pytest.raises(ValueError, match="n must be a positive int, got 0"): show_strength(X[0], "jitter_s", [.1], n=0)


@pytest.mark.parametrize("value, got", [(None, "None"), ("hsic", "'hsic'"), (BarlowTwinsLoss, "the class Barlow")])
def test_what_is_no_loss(value, got):
    augs = get_barlow_twins_aug_pipelines(8)
    with pytest.raises(TypeError, match=f"objective must be a function of .*, got {got}.*variant_loss"):
        MultiView(augs, value)
    if value is None: return   # a loss of its own
    with pytest.raises(TypeError, match=f"loss must be a function of .*, got {got}"): BarlowTwins(augs, loss=value)


def test_what_is_no_learning_rate():
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    for make in (lambda lr: LARS(weights, lr), lambda lr: WarmupCosine(lr, 1)):
        for lr in (-1, "fast", None, [.1, -1], float("nan")):
            with pytest.raises(ValueError, match="lr must be a finite number .*, got"): make(lr)
        with pytest.raises(ValueError, match=r"lr must be a number, or a list .*, got \[\]"): make([])
        for lr in ([.1], np.array([.1]), np.float64(.1)): make(lr)
    LARS(weights, slice(.1))
    for other in (dict(mom=2), dict(mom="a"), dict(wd=-1), dict(eta=None)):
        with pytest.raises(ValueError, match=f"{first(other)} must be a finite number"): LARS(weights, .1, **other)


@pytest.mark.parametrize("signals, got", [("SIGTERM", "'SIGTERM'"), (3, "3"), (None, "None"),
                                          (("SIGTERM", "foo"), "'foo'"), (("SIGKILL",), "'SIGKILL'"), ((15,), "15")])
def test_what_are_no_signals(signals, got):
    "The letters of a name were names of no signal, and nothing was caught"
    with pytest.raises(ValueError, match=f"signals must be a tuple of names .*, got {got}: .*SIGUSR1.*for none"):
        Checkpoints("run", signals=signals)
    assert Checkpoints("run", signals=[signal.SIGTERM, "SIGINT"]).signals == ("SIGTERM", "SIGINT")
    for path in (None, 3): named("path", path, "folder of this run", Checkpoints)


def test_right_ones_are_taken():
    assert len(hold_out(X, n_test=2)[2]) == 2
    assert bt_learner(tensor_dls(X, bs=4, device="cpu"), small_model().encoder, 8).barlow_twins
