"Views: drawn per image, on what they should be, and reversible for display"
import warnings

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage, TensorImageBW, no_random
from fastai.vision.augment import Flip, RandomResizedCropGPU, Rotate
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from scipy import stats as st
from torchvision.transforms import RandomResizedCrop

from self_supervised_bt.augmentations import (
    BACKENDS, INTERPOLATIONS, VIEW_RECIPES, AffineStep, BlurStep, JitterStep, KorniaTfm, NormalizeViews, blur_sigma, check_pipelines,
    clean_pipeline, crop_boxes, displayable, get_barlow_twins_aug_pipelines, get_batch_augs, get_multi_aug_pipelines, image_batch, show_strength)

OFF = dict(rotate=False, jitter=False, bw=False, blur=False, stats=None)


def copies(n=256, c=3, size=32):
    return TensorImage(torch.rand(1, c, size, size).expand(n, -1, -1, -1).clone())


def one_transform(**kwargs):
    "A view pipeline in which one thing alone is random"
    return get_barlow_twins_aug_pipelines(32, **{**OFF, "flip_p": 0, "resize_scale": (1, 1), "resize_ratio": (1, 1), **kwargs})[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [
    dict(resize_scale=(.2, 1)), dict(flip_p=.5), dict(rotate=True, rotate_p=1), dict(jitter=True, jitter_p=1), dict(solarize_p=.5),
    dict(rotate=True, rotate_p=1, rotate_deg=0, shear_deg=20), dict(jitter=True, jitter_p=1, exact_jitter=True),
    dict(bw=True, bw_p=.5), dict(blur=True, blur_p=1, blur_s=(.1, 2.))], ids=lambda k: next(iter(k)))
def test_every_image_draws_for_itself(kwargs, backend):
    x = copies()
    v = one_transform(**kwargs, backend=backend)(x)
    different = len({tuple(im.flatten().tolist()[::97]) for im in v})
    assert different == 2 if {"flip_p", "bw", "solarize_p"} & kwargs.keys() else different > 180
    same = one_transform(**kwargs, backend=backend, same_on_batch=True)(x)
    assert (same - same[:1]).abs().max() < 1e-5


def test_two_views_are_independent_draws():
    p1, p2 = get_barlow_twins_aug_pipelines(32, **{**OFF, "resize_scale": (1, 1), "resize_ratio": (1, 1)})
    x = copies(2000, 1, 8)
    flipped = [(p(x)[:, 0, 0, 0] - p(x)[:, 0, 0, 0].min() > 1e-6).float() for p in (p1, p2)]
    both = torch.stack(flipped).prod(0).mean()
    assert abs(both - .25) < .04                # independent halves meet in a quarter
    assert all(abs(f.mean() - .5) < .05 for f in flipped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crop_areas_and_ratios_follow_their_ranges(backend):
    "Crops of a coordinate ramp tell which box was cut: its area is uniform, the log of its ratio too"
    h = w = 64
    ramp = torch.stack([torch.arange(h).view(-1, 1).expand(h, w), torch.arange(w).expand(h, w), torch.zeros(h, w)]).float()/64
    p = one_transform(resize_scale=(.2, .5), resize_ratio=(3/4, 4/3), backend=backend)
    v = p(TensorImage(ramp[None].expand(4000, -1, -1, -1).clone()))
    heights = (v[:, 0].amax((1, 2)) - v[:, 0].amin((1, 2)))*64*32/31
    widths = (v[:, 1].amax((1, 2)) - v[:, 1].amin((1, 2)))*64*32/31
    area, ratio = heights*widths/64**2, (widths/heights).log()
    assert .18 < area.min() and area.max() < .55
    assert st.kstest(area.numpy(), "uniform", (.2, .3)).statistic < .06
    assert st.kstest(ratio.numpy(), "uniform", (-.2877, .5754)).statistic < .06
    assert st.kstest(area.numpy(), "uniform", (.2, .8)).statistic > .06      # the same test refuses another range


@pytest.mark.parametrize("backend", BACKENDS)
def test_blur_sigma_is_what_it_says(backend):
    "An impulse blurred with sigma 2 has a standard deviation of 2 pixels"
    impulse = torch.zeros(8, 3, 33, 33); impulse[:, :, 16, 16] = 1
    v = Pipeline(get_batch_augs(33, **{**OFF, "flip_p": 0, "resize_scale": (1, 1), "resize_ratio": (1, 1), "blur": True},
                                blur_p=1, blur_s=(2., 2.), backend=backend), split_idx=0)(TensorImage(impulse))
    profile = v[0, 0].sum(0)
    position = torch.arange(33) - 16.
    assert float((profile*position**2).sum().sqrt()) == pytest.approx(2, rel=.03)
    assert blur_sigma((6, 12), (112, 224)) == (.5, 1.)            # ints: six sigmas, in pixels of a 224-pixel image


def test_printed_as_documented():
    augs = get_barlow_twins_aug_pipelines(size=28, rotate=False, jitter=False, bw=False, blur=False, stats=None, cuda=False)
    assert str(augs) == "[Pipeline: RandomResizedCrop -> RandomHorizontalFlip, Pipeline: RandomResizedCrop -> RandomHorizontalFlip]"
    assert len(get_multi_aug_pipelines(5, 28)) == 5
    for recipe in VIEW_RECIPES:
        assert str(get_barlow_twins_aug_pipelines(28, recipe)) == str(get_barlow_twins_aug_pipelines(28, recipe, backend="kornia"))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_reproducible_under_a_seed(backend):
    p, x = get_barlow_twins_aug_pipelines(32, backend=backend)[0], copies(8)
    torch.manual_seed(5); a = p(x)
    torch.manual_seed(5); b = p(x)
    assert torch.equal(a, b) and not torch.equal(a, p(x))
    with no_random(3): a = p(x)
    with no_random(3): assert torch.equal(a, p(x))


def test_clean_pipeline_keeps_size_and_normalisation_alone():
    for p in (get_barlow_twins_aug_pipelines(16)[0], get_barlow_twins_aug_pipelines(16, backend="kornia")[0],
              Pipeline([RandomResizedCropGPU(16), Flip(), Rotate(), NormalizeViews.from_stats(*imagenet_stats, cuda=False)], split_idx=0)):
        clean, x = clean_pipeline(p), TensorImage(torch.rand(4, 3, 16, 16))
        assert torch.equal(clean(x), clean(x))
        assert torch.allclose(clean(x), NormalizeViews.from_stats(*imagenet_stats, cuda=False)(x), atol=1e-4)
        assert clean(TensorImage(torch.rand(4, 3, 20, 31))).shape == (4, 3, 16, 16)


def test_uint8_is_divided_by_255_and_types_are_kept():
    x = TensorImageBW(torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8))
    assert torch.allclose(image_batch(x), IntToFloatTensor()(x)) and type(image_batch(x)) is TensorImageBW


@pytest.mark.parametrize("make", [
    lambda p: None, lambda p: p[0], lambda p: p[:1], lambda p: [p[0], "flip"], lambda p: [*p, 3],
    lambda p: [p[0], Pipeline(p[1].fs)], lambda p: [Pipeline(q.fs, split_idx=1) for q in p]])
def test_anything_but_training_pipelines_is_refused(make):
    with pytest.raises(ValueError, match="get_barlow_twins_aug_pipelines"): check_pipelines(make(get_barlow_twins_aug_pipelines(8)))


@pytest.mark.parametrize("kwargs,word", [
    (dict(size=0), "size"), (dict(size=-3), "size"), (dict(size=(8, 8, 8)), "size"), (dict(size="28"), "size"), (dict(size=True), "size"),
    (dict(size=8, resize_scale=(1, .2)), "resize_scale"), (dict(size=8, resize_scale=(.2, 1.5)), "resize_scale"),
    (dict(size=8, resize_ratio=(2, 1)), "resize_ratio"), (dict(size=8, resize_ratio=.5), "resize_ratio"),
    (dict(size=8, flip_p=-.1), "flip_p"), (dict(size=8, blur_p=2), "blur_p"), (dict(size=8, jitter_p=float("nan")), "jitter_p"),
    (dict(size=8, jitter_s=3), "jitter_s"), (dict(size=8, jitter_s=(.4, .4, .4)), "jitter_s"), (dict(size=8, jitter_s=(.4, .4, .4, .6)), "jitter_s"),
    (dict(size=8, backend="pil"), "backend"), (dict(size=8, recipe="imagenet"), "recipe"), (dict(size=8, interpolation="nearest"), "interpolation"),
    (dict(size=8, rotate_deg=-1), "rotate_deg"), (dict(size=8, shear_deg=90), "shear_deg"), (dict(size=8, solarize_p=1.1), "solarize_p"), (dict(size=8, blur_s=(4, 1)), "blur_s"), (dict(size=8, blur_s=(0., 1.)), "blur_s")])
def test_bad_recipe(kwargs, word):
    with pytest.raises(ValueError, match=word): get_barlow_twins_aug_pipelines(**kwargs)


@pytest.mark.parametrize("x,error", [
    (torch.rand(3, 8, 8), ValueError), (torch.rand(2, 3, 0, 8), ValueError), ("image", ValueError), (torch.ones(2, 3, 8, 8).long(), TypeError)])
def test_bad_images(x, error):
    with pytest.raises(error, match="images must"): image_batch(x)


@pytest.mark.parametrize("spoil,words", [
    (lambda x: x*255, "divide by 255"), (lambda x: x - .5, "-0.5"), (lambda x: x.index_put_(tuple(torch.tensor([[1], [0], [2], [3]])), torch.tensor(float("nan"))),
                                                                     "1 nan or infinite pixels in 1 of 4 images, the first at place 1")])
def test_pixels_outside_their_range_are_refused_in_the_first_batch(spoil, words):
    p, x = get_barlow_twins_aug_pipelines(8)[0], torch.rand(4, 3, 8, 8)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    with pytest.raises(ValueError, match=words): p(TensorImage(spoil(x.clone())))
    with pytest.raises(ValueError, match=words): p(TensorImage(spoil(x.clone())))     # and again: nothing was switched off by the first
    assert p(TensorImage(x)).shape == (4, 3, 8, 8)


def test_stats_that_do_not_fit():
    with pytest.raises(ValueError, match="5"): get_barlow_twins_aug_pipelines(8, jitter=False, bw=False)[0](TensorImage(torch.rand(2, 5, 8, 8)))


# ---- what is drawn -------------------------------------------------------------------------------------------------

def p_value(sample, lo, hi): return st.kstest(np.asarray(sample, float), "uniform", (lo, hi - lo)).pvalue


@pytest.mark.parametrize("shape,scale,ratio", [((32, 32), (.08, 1.), (3/4, 4/3)), ((96, 60), (.2, 1.), (3/4, 4/3)), ((40, 41), (.9, 1.), (.5, 2.))])
def test_crop_boxes_are_torchvisions(shape, scale, ratio):
    "The same distribution of every side and place, and of area and ratio, as torchvision's own draws"
    torch.manual_seed(0)
    ours = crop_boxes(6000, shape, scale, ratio).double().numpy()
    image = torch.empty(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(6000)], float)
    def features(b): return [b[:, 0], b[:, 1], b[:, 2], b[:, 3], b[:, 2]*b[:, 3], b[:, 3]/b[:, 2]]
    assert all(st.ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(features(ours), features(theirs)))
    wrong = crop_boxes(6000, shape, (.8*scale[0] + .2, 1.), ratio).double().numpy()       # the same test refuses another range
    assert min(st.ks_2samp(a, b).pvalue for a, b in zip(features(wrong), features(theirs))) < 1e-6
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= shape[0]).all() and (ours[:, 1] + ours[:, 3] <= shape[1]).all()


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (50, 60)])
def test_the_crop_that_never_fits_is_torchvisions(shape):
    scale, ratio = ((.9, 1.), (3/4, 4/3)) if shape != (50, 60) else ((1., 1.), (.5, .55))
    theirs = {tuple(RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), list(ratio))) for _ in range(50)}
    assert {tuple(b) for b in crop_boxes(50, shape, scale, ratio).tolist()} == theirs and len(theirs) == 1


def test_jitter_factors_and_orders():
    torch.manual_seed(0)
    d = JitterStep((.4, .3, .2, .1)).draw(6000, (8, 8))
    for k, (lo, hi) in enumerate(((.6, 1.4), (.7, 1.3), (.8, 1.2), (-.1, .1))):
        assert p_value(d["factors"][:, k], lo, hi) > 1e-3 and p_value(d["factors"][:, k], lo, hi + .03*(hi - lo)) < 1e-3
    orders = np.unique(d["order"].numpy(), axis=0, return_counts=True)[1]
    assert len(orders) == 24 and st.chisquare(orders).pvalue > 1e-3
    assert st.chisquare(np.r_[orders[:12]*1.2, orders[12:]*.8]*6000/np.r_[orders[:12]*1.2, orders[12:]*.8].sum()).pvalue < 1e-6   # an order preferred
    assert abs(np.corrcoef(d["factors"].numpy().T) - np.eye(4)).max() < .05                                 # independent of each other


@pytest.mark.parametrize("step,name,lo,hi", [(AffineStep(30, 10), "angle", -30, 30), (AffineStep(30, 10), "shear", -10, 10), (BlurStep((.1, 2.), (32, 32)), "sigma", .1, 2.)])
def test_angles_and_sigmas_are_uniform(step, name, lo, hi):
    torch.manual_seed(0)
    drawn = step.draw(6000, (32, 32))[name]
    assert p_value(drawn, lo, hi) > 1e-3 and p_value(drawn, lo, hi + .03*(hi - lo)) < 1e-3


def test_every_step_comes_as_often_as_it_should():
    torch.manual_seed(0)
    p = dict(rotate_p=.3, jitter_p=.8, bw_p=.2, blur_p=.1, solarize_p=.45)
    tfm = get_batch_augs(8, flip_p=.6, **p)[0]
    drawn = tfm.draw(8000, (8, 8))
    counts = [drawn[tfm.crop]["flip"].sum(), *(drawn[s]["on"].sum() for s in tfm.steps)]
    for count, share in zip(counts, (.6, *p.values())):
        assert st.binomtest(int(count), 8000, share).pvalue > 1e-3 and st.binomtest(int(count), 8000, share + .05).pvalue < 1e-6
    together = torch.stack([drawn[tfm.crop]["flip"], *(drawn[s]["on"] for s in tfm.steps)]).double()
    assert (torch.corrcoef(together) - torch.eye(6)).abs().max() < .05                  # one says nothing about another


def test_recipes_are_the_papers():
    "Section A of Barlow Twins, after BYOL: what differs between the two views, and what does not"
    a, b = (p.fs[0] for p in get_barlow_twins_aug_pipelines(224, "paper"))
    assert [s.name for s in b.steps] == ["ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize"] and [s.name for s in a.steps] == [s.name for s in b.steps][:3]
    assert [s.p for s in a.steps] == [.8, .2, 1.] and [s.p for s in b.steps] == [.8, .2, .1, .2]
    for v in (a, b):
        assert v.crop.scale == (.08, 1.) and v.crop.flip_p == .5 and v.crop.interpolation == "bicubic" and v.crop.size == (224, 224)
        assert v.steps[0].strengths == (.4, .4, .2, .1) and v.steps[2].sigma == (.1, 2.)
    assert get_barlow_twins_aug_pipelines(28, "digits")[0].fs[0].crop.flip_p == 0
    assert [p.fs[0].steps[2].p for p in get_multi_aug_pipelines(4, 64, "paper")] == [1., .1, 1., .1]
    assert get_barlow_twins_aug_pipelines(32, "paper", blur_p=.5)[1].fs[0].steps[2].p == .5      # own arguments come on top


# ---- what is done with it ------------------------------------------------------------------------------------------

def by_torchvision(tfm, x, i):
    "What torchvision's functions make of image `i` with the numbers that were drawn"
    def drawn(step): return {k: t[i] for k, t in tfm.drawn[step].items()}
    d, im = drawn(tfm.crop), x[i].double()
    im = TF.resized_crop(im, *d["box"].tolist(), tfm.crop.size, TF.InterpolationMode(tfm.crop.interpolation), antialias=True)
    im = (im.flip(-1) if d["flip"] else im).clamp(0, 1)
    for step in tfm.steps:
        d = drawn(step)
        if not d.get("on", True): continue
        if step.name == "RandomAffine":
            h, w = im.shape[-2:]
            mirrored = torch.tensor(np.pad(im.numpy(), ((0, 0), (h, h), (w, w)), mode="symmetric"))
            im = TF.affine(mirrored, float(d["angle"]), [0, 0], 1., [float(d["shear"]), 0.], TF.InterpolationMode.BILINEAR)[:, h:2*h, w:2*w]
        elif step.name == "ColorJitter":
            for k in d["order"].tolist():
                im = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[k](im, float(d["factors"][k]))
        elif step.name == "RandomGrayscale": im = TF.rgb_to_grayscale(im, 3)
        elif step.name == "RandomGaussianBlur": im = TF.gaussian_blur(im, 2*step.radius + 1, float(d["sigma"]))
        elif step.name == "RandomSolarize": im = TF.solarize(im, .5)
    return TF.normalize(im, *imagenet_stats)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("n,shape,size", [(50, (32, 32), 32), (40, (32, 40), 20), (50, (100, 90), (72, 80)), (8, (90, 100), 24), (6, (150, 150), 140)])
def test_views_are_torchvisions_pixel_by_pixel(n, shape, size, interpolation):
    "Every step on, in every image its own draw, sizes that shrink and enlarge, images handled together and one by one"
    torch.manual_seed(0)
    tfm, = get_batch_augs(size, interpolation=interpolation, exact_jitter=True, shear_deg=10, rotate_p=.6, jitter_p=.7, blur_p=.6, blur_s=(.1, 2.))
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 9, 9), size=shape, mode="bicubic").clamp(0, 1)
    v = tfm(TensorImage(x), split_idx=0)
    error = torch.stack([(ours - by_torchvision(tfm, x, i)).abs()*.2 for i, ours in enumerate(v)])    # .2: undo the normalisation, roughly
    assert error.mean() < 1e-5 and error.max() < 5e-4


def test_solarised_views_are_torchvisions_but_at_the_threshold():
    torch.manual_seed(0)
    tfm, = get_batch_augs(32, exact_jitter=True, solarize_p=.5)
    x = torch.rand(64, 3, 32, 32)
    v = tfm(TensorImage(x), split_idx=0)
    error = torch.stack([(ours - by_torchvision(tfm, x, i)).abs() for i, ours in enumerate(v)])
    assert (error > 1e-3).double().mean() < 1e-3 and error.median() < 1e-5


def test_the_fused_jitter_is_the_exact_one_where_nothing_is_cut_off():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 10, 10)*.3 + .35
    fused, exact = JitterStep((.3, .3, .3, 0)), JitterStep((.3, .3, .3, 0), exact=True)
    d = fused.draw(200, (10, 10))
    assert torch.allclose(fused.apply(x.clone(), **fused.prepare(x, **d)), exact.apply(x, **d), atol=1e-5)


def test_the_fused_jitter_stays_near_the_exact_one():
    "The bounds that are stated: mean distance over views of a smooth image, strengths of the paper"
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(300, 3, 4, 4), size=16, mode="bilinear")
    fused, exact = JitterStep((.4, .4, .2, .1)), JitterStep((.4, .4, .2, .1), exact=True)
    d = fused.draw(300, (16, 16))
    distance = (fused.apply(x.clone(), **fused.prepare(x, **d)) - exact.apply(x, **d)).abs().flatten(1).mean(1)
    moved = (x - exact.apply(x, **d)).abs().flatten(1).mean(1)
    assert distance.mean() < .03 and distance.mean() < .25*moved.mean()


@pytest.mark.parametrize("size", [16, 80])
def test_one_channel_gets_what_grey_rgb_gets(size):
    tfm, x = get_batch_augs(size, jitter_p=.8, jitter_s=.3, stats=None)[0], torch.rand(12, 1, 20, 20)*.4 + .3
    torch.manual_seed(3); grey = tfm(TensorImage(x), split_idx=0)
    torch.manual_seed(3); rgb = tfm(TensorImage(x.expand(-1, 3, -1, -1)), split_idx=0)
    assert grey.shape == (12, 1, size, size) and (grey - rgb[:, :1]).abs().max() < 1e-3     # torchvision's grey weights add up to .9999


@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, size):
    tfm, x = get_batch_augs(size)[0], torch.rand(6, 3, 20, 24)
    torch.manual_seed(1); reference = tfm(TensorImage(x.to(dtype).float()), split_idx=0)
    torch.manual_seed(1); v = tfm(x.to(dtype).as_subclass(TensorImage), split_idx=0)
    assert v.dtype == dtype and torch.allclose(v.float(), reference, atol=1e-4 if dtype == torch.float64 else 3*torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape,size", [((700, 3, 12, 12), 40), ((3, 3, 80, 80), 70)])
def test_the_source_is_left_alone_and_its_layout_does_not_matter(shape, size):
    tfm, x = get_batch_augs(size)[0], torch.rand(shape)
    before = x.clone()
    torch.manual_seed(1); v = tfm(TensorImage(x), split_idx=0)
    torch.manual_seed(1); w = tfm(TensorImage(x.to(memory_format=torch.channels_last)), split_idx=0)
    torch.manual_seed(1); u = tfm(TensorImage(torch.stack([x, x], 1)[:, 1]), split_idx=0)
    assert torch.equal(x, before) and torch.allclose(v, w, atol=1e-5) and torch.allclose(v, u, atol=1e-5)
    assert (v - tfm.decode(v)).abs().max() > .1 and -1e-3 < tfm.decode(v).min() and tfm.decode(v).max() < 1 + 1e-3


def test_views_of_plain_tensors_and_bytes():
    "What fastai's typed transforms would skip in silence"
    p, x = get_barlow_twins_aug_pipelines(8)[0], torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(1); v = p(TensorImage(x.float()/255))
    torch.manual_seed(1); assert torch.equal(p(x), v)
    torch.manual_seed(1); assert torch.equal(p(x.float()/255), v) and isinstance(v, TensorImage)
    images, labels = p((x, torch.arange(4)))
    assert images.shape == (4, 3, 8, 8) and torch.equal(labels, torch.arange(4))


def test_views_are_float32_under_autocast():
    p, x = get_barlow_twins_aug_pipelines(16)[0], TensorImage(torch.rand(8, 3, 20, 20))
    torch.manual_seed(1); v = p(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(p(x), v)


def test_colour_steps_aside_once():
    p, x = get_barlow_twins_aug_pipelines(8, stats=None, jitter_p=1, bw_p=1)[0], TensorImage(torch.rand(4, 5, 8, 8))
    with pytest.warns(UserWarning, match="5 channels") as said: p(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p(x)
    assert len(said) == 1


def test_what_was_drawn_is_told():
    tfm, = get_batch_augs(16, **{**OFF, "flip_p": 1, "rotate": True, "jitter": True, "bw": True, "blur": True}, rotate_p=1, jitter_p=1, bw_p=1, blur_p=1, solarize_p=1)
    tfm(TensorImage(torch.rand(3, 3, 20, 20)), split_idx=0)
    told = tfm.tell(1).splitlines()
    assert len(told) == 7 and "flipped" in told[0] and "°" in told[1] and "hue" in told[2] + told[3] and told[4] == "grey" and "blur" in told[5] and told[6] == "solarised"
    top, left, h, w = tfm.drawn[tfm.crop]["box"][1].tolist()
    assert told[0].startswith(f"{h}x{w} at ({top},{left})")


@pytest.mark.parametrize("name,values", [("jitter_s", [.2, 1.]), ("blur_s", [(1., 1.)]), ("resize_scale", [(.1, .1), (.5, .5)]), ("rotate_deg", [10, 90]), ("solarize_p", [1.])])
def test_a_sweep_shows_a_row_a_value(name, values):
    axes = show_strength(torch.rand(3, 20, 20), name, values, n=3)
    assert len(axes) == 4*len(values) and all(ax.images for ax in axes)
    assert all(str(v) in ax.get_title("left") for v, ax in zip(values, axes[1::4]))


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ValueError, match="name must be one of"): show_strength(torch.rand(3, 20, 20), "brightness", [1])
