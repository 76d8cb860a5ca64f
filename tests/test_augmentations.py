"Views: drawn per image, on what they should be, and reversible for display"
import warnings

import kornia.augmentation as K
import pytest
import torch
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.augment import Flip, RandomResizedCropGPU, Rotate
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from scipy import stats as st

from self_supervised_bt.augmentations import (
    KorniaTfm, NormalizeViews, blur_sigma, check_pipelines, clean_pipeline, displayable, get_barlow_twins_aug_pipelines,
    get_batch_augs, get_multi_aug_pipelines, image_batch)

OFF = dict(rotate=False, jitter=False, bw=False, blur=False, stats=None)


def copies(n=256, c=3, size=32):
    return TensorImage(torch.rand(1, c, size, size).expand(n, -1, -1, -1).clone())


def one_transform(**kwargs):
    "A view pipeline in which one thing alone is random"
    return get_barlow_twins_aug_pipelines(32, **{**OFF, "flip_p": 0, "resize_scale": (1, 1), "resize_ratio": (1, 1), **kwargs})[0]


@pytest.mark.parametrize("kwargs", [
    dict(resize_scale=(.2, 1)), dict(flip_p=.5), dict(rotate=True, rotate_p=1), dict(jitter=True, jitter_p=1),
    dict(bw=True, bw_p=.5), dict(blur=True, blur_p=1, blur_s=(.1, 2.))], ids=lambda k: next(iter(k)))
def test_every_image_draws_for_itself(kwargs):
    x = copies()
    v = one_transform(**kwargs)(x)
    different = len({tuple(im.flatten().tolist()[::97]) for im in v})
    assert different == 2 if {"flip_p", "bw"} & kwargs.keys() else different > 180
    same = one_transform(**kwargs, same_on_batch=True)(x)
    assert (same - same[:1]).abs().max() < 1e-5


def test_two_views_are_independent_draws():
    p1, p2 = get_barlow_twins_aug_pipelines(32, **{**OFF, "resize_scale": (1, 1), "resize_ratio": (1, 1)})
    x = copies(2000, 1, 8)
    flipped = [(p(x)[:, 0, 0, 0] - p(x)[:, 0, 0, 0].min() > 1e-6).float() for p in (p1, p2)]
    both = torch.stack(flipped).prod(0).mean()
    assert abs(both - .25) < .04                # independent halves meet in a quarter
    assert all(abs(f.mean() - .5) < .05 for f in flipped)


def test_crop_areas_and_ratios_follow_their_ranges():
    "Crops of a coordinate ramp tell which box was cut: its area is uniform, the log of its ratio too"
    h = w = 64
    ramp = torch.stack([torch.arange(h).view(-1, 1).expand(h, w), torch.arange(w).expand(h, w), torch.zeros(h, w)]).float()/64
    p = one_transform(resize_scale=(.2, .5), resize_ratio=(3/4, 4/3))
    v = p(TensorImage(ramp[None].expand(4000, -1, -1, -1).clone()))
    heights = (v[:, 0].amax((1, 2)) - v[:, 0].amin((1, 2)))*64*32/31
    widths = (v[:, 1].amax((1, 2)) - v[:, 1].amin((1, 2)))*64*32/31
    area, ratio = heights*widths/64**2, (widths/heights).log()
    assert .18 < area.min() and area.max() < .55
    assert st.kstest(area.numpy(), "uniform", (.2, .3)).statistic < .06
    assert st.kstest(ratio.numpy(), "uniform", (-.2877, .5754)).statistic < .06
    assert st.kstest(area.numpy(), "uniform", (.2, .8)).statistic > .06      # the same test refuses another range


def test_blur_sigma_is_what_it_says():
    "An impulse blurred with sigma 2 has a standard deviation of 2 pixels"
    impulse = torch.zeros(8, 3, 33, 33); impulse[:, :, 16, 16] = 1
    v = Pipeline(get_batch_augs(33, **{**OFF, "flip_p": 0, "resize_scale": (1, 1), "resize_ratio": (1, 1), "blur": True},
                                blur_p=1, blur_s=(2., 2.)), split_idx=0)(TensorImage(impulse))
    profile = v[0, 0].sum(0)
    position = torch.arange(33) - 16.
    assert float((profile*position**2).sum().sqrt()) == pytest.approx(2, rel=.03)
    assert blur_sigma((6, 12), (112, 224)) == (.5, 1.)            # ints: six sigmas, in pixels of a 224-pixel image


def test_printed_as_documented():
    augs = get_barlow_twins_aug_pipelines(size=28, rotate=False, jitter=False, bw=False, blur=False, stats=None, cuda=False)
    assert str(augs) == "[Pipeline: RandomResizedCrop -> RandomHorizontalFlip, Pipeline: RandomResizedCrop -> RandomHorizontalFlip]"
    assert len(get_multi_aug_pipelines(5, 28)) == 5


def test_xtra_tfms_are_appended():
    extra = KorniaTfm(K.RandomErasing(p=1.))
    assert Pipeline(get_batch_augs(28, **OFF, xtra_tfms=[extra])).fs[-1] is extra


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("b,h,w", [(1, 28, 28), (3, 17, 31), (7, 64, 40)])
def test_channels_odd_sizes_and_short_batches(channels, b, h, w):
    stats = imagenet_stats if channels in (1, 3) else None
    for size in (24, (16, 28)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            v = get_barlow_twins_aug_pipelines(size, stats=stats)[0](TensorImage(torch.rand(b, channels, h, w)))
        assert v.shape == (b, channels, *((size, size) if isinstance(size, int) else size)) and v.isfinite().all()


def test_other_channels_step_aside_and_say_so():
    x = TensorImage(torch.rand(4, 5, 8, 8))
    with pytest.warns(UserWarning, match="5 channels"): v = KorniaTfm(K.ColorJitter(.5), colour=True)(x, split_idx=0)
    assert torch.equal(v, x)


def test_grey_is_jittered_like_grey_rgb():
    "A one-channel image gets what the same image as RGB gets"
    x = torch.rand(16, 1, 8, 8)
    jitter = KorniaTfm(K.ColorJitter(.5, .5, .5, .1), colour=True)
    torch.manual_seed(3); grey = jitter(TensorImage(x), split_idx=0)
    torch.manual_seed(3); rgb = jitter(TensorImage(x.expand(-1, 3, -1, -1)), split_idx=0)
    assert torch.allclose(grey, rgb[:, :1], atol=1e-6) and (grey - x).abs().max() > .05


@pytest.mark.parametrize("c", [1, 3])
def test_normalisation_and_back(c):
    x = TensorImage(torch.rand(4, c, 8, 8))
    norm = NormalizeViews.from_stats(*imagenet_stats, cuda=False)
    mean, std = (torch.tensor(s) for s in imagenet_stats)
    expected = (x - mean.view(1, 3, 1, 1))/std.view(1, 3, 1, 1) if c == 3 else (x - mean.mean())/std.mean()
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert torch.allclose(displayable(Pipeline([norm], split_idx=0), norm(x)), x, atol=1e-6)


def test_reproducible_under_a_seed():
    p, x = get_barlow_twins_aug_pipelines(32)[0], copies(8)
    torch.manual_seed(5); a = p(x)
    torch.manual_seed(5); b = p(x)
    assert torch.equal(a, b) and not torch.equal(a, p(x))


def test_clean_pipeline_keeps_size_and_normalisation_alone():
    for p in (get_barlow_twins_aug_pipelines(16)[0],
              Pipeline([RandomResizedCropGPU(16), Flip(), Rotate(), NormalizeViews.from_stats(*imagenet_stats, cuda=False)], split_idx=0)):
        clean, x = clean_pipeline(p), TensorImage(torch.rand(4, 3, 16, 16))
        assert torch.equal(clean(x), clean(x))
        assert torch.allclose(clean(x), NormalizeViews.from_stats(*imagenet_stats, cuda=False)(x), atol=1e-4)
        assert clean(TensorImage(torch.rand(4, 3, 20, 31))).shape == (4, 3, 16, 16)


def test_uint8_is_divided_by_255_and_types_are_kept():
    x = TensorImageBW(torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8))
    assert torch.allclose(image_batch(x), IntToFloatTensor()(x)) and type(image_batch(x)) is TensorImageBW


@pytest.mark.parametrize("make", [
    lambda p: None, lambda p: p[0], lambda p: p[:1], lambda p: p + p[:1], lambda p: [p[0], "flip"],
    lambda p: [p[0], Pipeline(p[1].fs)], lambda p: [Pipeline(q.fs, split_idx=1) for q in p]])
def test_anything_but_two_training_pipelines_is_refused(make):
    with pytest.raises(ValueError, match="get_barlow_twins_aug_pipelines"): check_pipelines(make(get_barlow_twins_aug_pipelines(8)))


@pytest.mark.parametrize("kwargs,word", [
    (dict(size=0), "size"), (dict(size=-3), "size"), (dict(size=(8, 8, 8)), "size"), (dict(size="28"), "size"), (dict(size=True), "size"),
    (dict(size=8, resize_scale=(1, .2)), "resize_scale"), (dict(size=8, resize_scale=(.2, 1.5)), "resize_scale"),
    (dict(size=8, resize_ratio=(2, 1)), "resize_ratio"), (dict(size=8, resize_ratio=.5), "resize_ratio"),
    (dict(size=8, flip_p=-.1), "flip_p"), (dict(size=8, blur_p=2), "blur_p"), (dict(size=8, jitter_p=float("nan")), "jitter_p"),
    (dict(size=8, jitter_s=3), "jitter_s"), (dict(size=8, blur_s=(4, 1)), "blur_s"), (dict(size=8, blur_s=(0., 1.)), "blur_s")])
def test_bad_recipe(kwargs, word):
    with pytest.raises(ValueError, match=word): get_barlow_twins_aug_pipelines(**kwargs)


@pytest.mark.parametrize("x,error", [
    (torch.rand(3, 8, 8), ValueError), (torch.rand(2, 3, 0, 8), ValueError), ("image", ValueError), (torch.ones(2, 3, 8, 8).long(), TypeError)])
def test_bad_images(x, error):
    with pytest.raises(error, match="images must"): image_batch(x)


def test_stats_that_do_not_fit():
    with pytest.raises(ValueError, match="5"): get_barlow_twins_aug_pipelines(8, jitter=False, bw=False)[0](TensorImage(torch.rand(2, 5, 8, 8)))
