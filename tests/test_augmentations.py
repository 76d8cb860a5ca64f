"Views: parameters per image, distributions of the recipes, denormalisation for display"
import warnings

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorImage, no_random
from fastai.vision.augment import Flip, RandomResizedCropGPU, Rotate
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from scipy import stats as st

from self_supervised_bt.augmentations import (
    BACKENDS,
    VIEW_RECIPES,
    KorniaTfm,
    blur_sigma,
    check_pipelines,
    clean_pipeline,
    displayable,
    get_barlow_twins_aug_pipelines,
    get_batch_augs,
    get_multi_aug_pipelines,
    in_kornia,
    show_strength,
)
from self_supervised_bt.fused import NormalizeViews, Step

OFF = dict(rotate=False, jitter=False, bw=False, blur=False, stats=None)
UNCUT = dict(flip_p=0, resize_scale=(1, 1), resize_ratio=(1, 1))


def copies(n=256, c=3, size=32):
    return TensorImage(torch.rand(1, c, size, size).expand(n, -1, -1, -1).clone())


def one_transform(**kwargs):
    "A view pipeline in which only one transform is random"
    return get_barlow_twins_aug_pipelines(32, **{**OFF, **UNCUT, **kwargs})[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [
    dict(resize_scale=(.2, 1)), dict(flip_p=.5), dict(rotate=True, rotate_p=1), dict(jitter=True, jitter_p=1),
    dict(solarize_p=.5),
    dict(rotate=True, rotate_p=1, rotate_deg=0, shear_deg=20), dict(jitter=True, jitter_p=1, exact_jitter=True),
    dict(bw=True, bw_p=.5), dict(blur=True, blur_p=1, blur_s=(.1, 2.))], ids=lambda k: next(iter(k)))
def test_every_image_has_its_own_parameters(kwargs, backend):
    x = copies()
    v = one_transform(**kwargs, backend=backend)(x)
    different = len({tuple(im.flatten().tolist()[::97]) for im in v})
    on_or_off = {"flip_p", "bw", "solarize_p"} & kwargs.keys()
    assert different == 2 if on_or_off else different > 180
    same = one_transform(**kwargs, backend=backend, same_on_batch=True)(x)
    assert (same - same[:1]).abs().max() < 1e-5


def test_two_views_are_independent():
    pipelines = get_barlow_twins_aug_pipelines(32, **{**OFF, **UNCUT, "flip_p": .5})
    x = copies(2000, 1, 8)
    flipped = [(p(x)[:, 0, 0, 0] - p(x)[:, 0, 0, 0].min() > 1e-6).float() for p in pipelines]
    both = torch.stack(flipped).prod(0).mean()
    assert abs(both - .25) < .04                # independent: probability .5*.5
    assert all(abs(f.mean() - .5) < .05 for f in flipped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distributions_of_crop_areas_and_ratios(backend):
    "The box of a crop is read from a coordinate ramp: area and log of the ratio are uniform"
    position = torch.arange(64.).expand(64, 64)/64
    ramp = torch.stack([position.T, position, torch.zeros(64, 64)])
    p = one_transform(resize_scale=(.2, .5), resize_ratio=(3/4, 4/3), backend=backend)
    v = p(TensorImage(ramp[None].expand(4000, -1, -1, -1).clone()))
    heights = (v[:, 0].amax((1, 2)) - v[:, 0].amin((1, 2)))*64*32/31
    widths = (v[:, 1].amax((1, 2)) - v[:, 1].amin((1, 2)))*64*32/31
    area, ratio = heights*widths/64**2, (widths/heights).log()
    assert .18 < area.min() and area.max() < .55
    assert st.kstest(area.numpy(), "uniform", (.2, .3)).statistic < .06
    assert st.kstest(ratio.numpy(), "uniform", (-.2877, .5754)).statistic < .06
    assert st.kstest(area.numpy(), "uniform", (.2, .8)).statistic > .06      # the same test rejects another range


@pytest.mark.parametrize("backend", BACKENDS)
def test_blur_has_the_given_sigma(backend):
    "An impulse blurred with sigma 2 has a standard deviation of 2 pixels"
    impulse = torch.zeros(8, 3, 33, 33)
    impulse[:, :, 16, 16] = 1
    kwargs = {**OFF, **UNCUT, "blur": True, "blur_p": 1, "blur_s": (2., 2.), "backend": backend}
    v = Pipeline(get_batch_augs(33, **kwargs), split_idx=0)(TensorImage(impulse))
    profile = v[0, 0].sum(0)
    position = torch.arange(33) - 16.
    assert float((profile*position**2).sum().sqrt()) == pytest.approx(2, rel=.03)
    assert blur_sigma((6, 12), (112, 224)) == (.5, 1.)            # ints: six sigmas, in pixels of a 224-pixel image


def test_printed_pipelines():
    augs = get_barlow_twins_aug_pipelines(size=28, **OFF, cuda=False)
    view = "Pipeline: RandomResizedCrop -> RandomHorizontalFlip"
    assert str(augs) == f"[{view}, {view}]"
    assert len(get_multi_aug_pipelines(5, 28)) == 5
    for recipe in VIEW_RECIPES:
        in_kornia = get_barlow_twins_aug_pipelines(28, recipe, backend="kornia")
        assert str(get_barlow_twins_aug_pipelines(28, recipe)) == str(in_kornia)


def test_xtra_tfms_are_appended():
    extra = KorniaTfm(K.RandomErasing(p=1.))
    assert Pipeline(get_batch_augs(28, **OFF, xtra_tfms=[extra])).fs[-1] is extra


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("b,h,w", [(1, 28, 28), (3, 17, 31), (7, 64, 40), (2, 90, 71)])
def test_channels_odd_sizes_and_short_batches(channels, b, h, w, backend):
    stats = imagenet_stats if channels in (1, 3) else None
    for size in (24, (16, 28), (70, 66)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kwargs = dict(stats=stats, blur_p=1, rotate_p=1, jitter_p=1, backend=backend)
            v = get_barlow_twins_aug_pipelines(size, **kwargs)[0](TensorImage(torch.rand(b, channels, h, w)))
        pair = (size, size) if isinstance(size, int) else size
        assert v.shape == (b, channels, *pair) and v.isfinite().all()


def test_colour_transforms_skip_other_numbers_of_channels_with_a_warning():
    x = TensorImage(torch.rand(4, 5, 8, 8))
    with pytest.warns(UserWarning, match="5 channels"): v = KorniaTfm(K.ColorJitter(.5), colour=True)(x, split_idx=0)
    assert torch.equal(v, x)


def test_one_channel_is_jittered_as_grey_rgb():
    "A one-channel image and the same image as RGB give the same result"
    x = torch.rand(16, 1, 8, 8)
    jitter = KorniaTfm(K.ColorJitter(.5, .5, .5, .1), colour=True)
    torch.manual_seed(3)
    grey = jitter(TensorImage(x), split_idx=0)
    torch.manual_seed(3)
    rgb = jitter(TensorImage(x.expand(-1, 3, -1, -1)), split_idx=0)
    assert torch.allclose(grey, rgb[:, :1], atol=1e-6) and (grey - x).abs().max() > .05


@pytest.mark.parametrize("c", [1, 3])
def test_displayable_undoes_the_normalisation(c):
    x = TensorImage(torch.rand(4, c, 8, 8))
    norm = NormalizeViews.from_stats(*imagenet_stats, cuda=False)
    assert torch.allclose(displayable(Pipeline([norm], split_idx=0), norm(x)), x, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reproducible_under_a_seed(backend):
    p, x = get_barlow_twins_aug_pipelines(32, backend=backend)[0], copies(8)
    torch.manual_seed(5)
    a = p(x)
    torch.manual_seed(5)
    b = p(x)
    assert torch.equal(a, b) and not torch.equal(a, p(x))
    with no_random(3): a = p(x)
    with no_random(3): assert torch.equal(a, p(x))


def test_clean_pipeline_keeps_only_size_and_normalisation():
    norm = NormalizeViews.from_stats(*imagenet_stats, cuda=False)
    x = TensorImage(torch.rand(4, 3, 16, 16))
    for p in (get_barlow_twins_aug_pipelines(16)[0], get_barlow_twins_aug_pipelines(16, backend="kornia")[0],
              Pipeline([RandomResizedCropGPU(16), Flip(), Rotate(), norm], split_idx=0)):
        clean = clean_pipeline(p)
        assert torch.equal(clean(x), clean(x))
        assert torch.allclose(clean(x), norm(x), atol=1e-4)
        assert clean(TensorImage(torch.rand(4, 3, 20, 31))).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_outside_training_equal_the_clean_pipeline(backend):
    tfms = get_batch_augs(16, backend=backend)
    clean = clean_pipeline(Pipeline(tfms, split_idx=0))
    x = TensorImage(torch.rand(4, 3, 20, 31))
    assert torch.equal(Pipeline(tfms, split_idx=1)(x), clean(x))
    assert [type(t).__name__ for t in clean.fs if t.split_idx != 0] == ["CentreResize", "NormalizeViews"]


def test_step_without_a_kornia_augmentation_raises():
    with pytest.raises(TypeError, match="kornia.*Step"): in_kornia(Step(), False)


@pytest.mark.parametrize("make", [
    lambda p: None, lambda p: p[0], lambda p: p[:1], lambda p: [p[0], "flip"], lambda p: [*p, 3],
    lambda p: [p[0], Pipeline(p[1].fs)], lambda p: [Pipeline(q.fs, split_idx=1) for q in p]])
def test_check_pipelines_raises_unless_two_training_pipelines(make):
    pipelines = make(get_barlow_twins_aug_pipelines(8))
    with pytest.raises(ValueError, match="get_barlow_twins_aug_pipelines"): check_pipelines(pipelines)


@pytest.mark.parametrize("kwargs,word", [
    *((dict(size=size), "size") for size in (0, -3, (8, 8, 8), "28", True)),
    (dict(resize_scale=(1, .2)), "resize_scale"), (dict(resize_scale=(.2, 1.5)), "resize_scale"),
    (dict(resize_ratio=(2, 1)), "resize_ratio"), (dict(resize_ratio=.5), "resize_ratio"),
    (dict(flip_p=-.1), "flip_p"), (dict(blur_p=2), "blur_p"), (dict(jitter_p=float("nan")), "jitter_p"),
    (dict(solarize_p=1.1), "solarize_p"),
    *((dict(jitter_s=s), "jitter_s") for s in (3, (.4, .4, .4), (.4, .4, .4, .6))),
    (dict(backend="pil"), "backend"), (dict(recipe="imagenet"), "recipe"),
    (dict(interpolation="nearest"), "interpolation"),
    (dict(rotate_deg=-1), "rotate_deg"), (dict(shear_deg=90), "shear_deg"),
    (dict(blur_s=(4, 1)), "blur_s"), (dict(blur_s=(0., 1.)), "blur_s")])
def test_invalid_arguments_raise(kwargs, word):
    with pytest.raises(ValueError, match=word): get_barlow_twins_aug_pipelines(**{"size": 8, **kwargs})


def test_recipe_of_the_paper():
    "Section A of Barlow Twins, as in BYOL: the two views and their differences"
    a, b = (p.fs[0] for p in get_barlow_twins_aug_pipelines(224, "paper"))
    names = ["ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize"]
    assert [s.name for s in a.steps] == names[:3] and [s.name for s in b.steps] == names
    assert [s.p for s in a.steps] == [.8, .2, 1.] and [s.p for s in b.steps] == [.8, .2, .1, .2]
    for v in (a, b):
        assert v.crop.size == (224, 224) and v.crop.scale == (.08, 1.)
        assert v.crop.flip_p == .5 and v.crop.interpolation == "bicubic"
        assert v.steps[0].strengths == (.4, .4, .2, .1) and v.steps[2].sigma == (.1, 2.)
    assert get_barlow_twins_aug_pipelines(28, "digits")[0].fs[0].crop.flip_p == 0
    assert [p.fs[0].steps[2].p for p in get_multi_aug_pipelines(4, 64, "paper")] == [1., .1, 1., .1]
    view2 = get_barlow_twins_aug_pipelines(32, "paper", blur_p=.5)[1].fs[0]
    assert view2.steps[2].p == .5      # own arguments override the recipe


@pytest.mark.parametrize("name,values", [
    ("jitter_s", [.2, 1.]), ("blur_s", [(1., 1.)]), ("resize_scale", [(.1, .1), (.5, .5)]), ("rotate_deg", [10, 90]),
    ("solarize_p", [1.])])
def test_show_strength_has_a_row_per_value(name, values):
    axes = show_strength(torch.rand(3, 20, 20), name, values, n=3)
    assert len(axes) == 4*len(values) and all(ax.images for ax in axes)
    assert all(str(v) in ax.texts[0].get_text() for v, ax in zip(values, axes[1::4]))
    axes[0].figure.canvas.draw()
    left = [ax.get_position().x0 for ax in axes[:4]]
    assert np.diff(left) == pytest.approx([left[1] - left[0]]*3, abs=.01), "a long label moves the columns apart"


def test_show_strength_raises_for_unknown_arguments():
    with pytest.raises(ValueError, match="name must be one of"): show_strength(torch.rand(3, 20, 20), "brightness", [1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clean_pipeline_takes_plain_tensors(backend):
    x = torch.rand(4, 3, 20, 20)
    pipeline = get_barlow_twins_aug_pipelines(16, backend=backend)[0]
    clean = clean_pipeline(pipeline)
    assert torch.equal(clean(x), clean(TensorImage(x))) and clean(x).shape == (4, 3, 16, 16)
    assert clean(x).min() < -.5   # normalised
    images, labels = clean((x, torch.arange(4)))
    assert torch.equal(images, clean(x)) and torch.equal(labels, torch.arange(4))
    own = clean_pipeline(Pipeline([Normalize.from_stats(*imagenet_stats, cuda=False)], split_idx=0))
    assert torch.equal(own(x), own(TensorImage(x))) and own(x).min() < -.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 4, 3, 20, 20)])
def test_one_image_or_five_dimensions_raise(backend, shape):
    "Typed steps would leave them untouched"
    pipeline = get_barlow_twins_aug_pipelines(16, backend=backend)[0]
    for make in (pipeline, clean_pipeline(pipeline)):
        for kind in (torch.Tensor, TensorImage):
            with pytest.raises(ValueError, match="images must be a tensor .B,C,H,W."):
                make(torch.rand(shape).as_subclass(kind))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_plain_tensors_is_that_of_images(backend):
    pipeline, x = get_barlow_twins_aug_pipelines(16, backend=backend)[0], torch.rand(4, 3, 20, 20)
    views = []
    for images in (x, TensorImage(x)):
        torch.manual_seed(0)
        views.append(pipeline(images))
    assert torch.equal(*views) and type(views[0]) is TensorImage


def test_numpy_integers_mean_what_pythons_mean():
    sizes = {get_barlow_twins_aug_pipelines(16, blur_s=s)[0].fs[0].steps[-1].sigma
             for s in ((4, 32), tuple(np.array([4, 32])), (np.int64(4), 32))}
    assert len(sizes) == 1
    assert get_barlow_twins_aug_pipelines(np.int64(16))[0].fs[0].crop.size == (16, 16)
    for size in (16., "16", True, 0, (16,), (8, -1), None):
        with pytest.raises(ValueError, match="size must be"): get_barlow_twins_aug_pipelines(size)


@pytest.mark.parametrize("options", [
    dict(rotate=False, shear_deg=8), dict(jitter=False, jitter_p=.8), dict(bw=False, bw_p=.1),
    dict(blur=False, blur_s=(.1, 2.)), dict(recipe="cifar", blur_p=.5)], ids=str)
def test_settings_of_a_step_that_is_switched_off_raise(options):
    with pytest.raises(ValueError, match="has no effect with"): get_barlow_twins_aug_pipelines(16, **options)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_any_step_of_a_recipe_can_be_switched_off(recipe):
    "The recipe's own settings of that step go with it; those given beside it are refused"
    x = torch.rand(4, 3, 20, 20)
    for step in ("rotate", "jitter", "bw", "blur"):
        assert get_barlow_twins_aug_pipelines(16, recipe, **{step: False})[0](x).shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="blur_p"): get_barlow_twins_aug_pipelines(16, recipe, blur=False, blur_p=.7)
