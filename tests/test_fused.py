"The fused views: parameters per image, distributions and pixels compared with torchvision"
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.core import imagenet_stats
from scipy import stats as st
from torchvision.transforms import RandomResizedCrop

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines, get_batch_augs
from self_supervised_bt.fused import (
    INTERPOLATIONS,
    AffineStep,
    BlurStep,
    JitterStep,
    NormalizeViews,
    crop_boxes,
    image_batch,
)

OFF = dict(rotate=False, jitter=False, bw=False, blur=False, stats=None)


def seeded_view(tfm, x, seed=1):
    torch.manual_seed(seed)
    return tfm(x, split_idx=0)


# ---- images ----------------------------------------------------------------------------------------------------------

def test_uint8_is_divided_by_255_and_types_are_kept():
    x = TensorImageBW(torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8))
    assert torch.allclose(image_batch(x), IntToFloatTensor()(x)) and type(image_batch(x)) is TensorImageBW


@pytest.mark.parametrize("x,error", [
    (torch.rand(3, 8, 8), ValueError), (torch.rand(2, 3, 0, 8), ValueError), ("image", ValueError),
    (torch.ones(2, 3, 8, 8).long(), TypeError)])
def test_invalid_images_raise(x, error):
    with pytest.raises(error, match="images must"): image_batch(x)


def with_nan(x):
    x[1, 0, 2, 3] = float("nan")
    return x


@pytest.mark.parametrize("spoil,words", [
    (lambda x: x*255, "divide by 255"),
    (lambda x: x - .5, "-0.5"),
    (with_nan, "1 NaN or infinite pixels in 1 of 4 images, the first at index 1")])
def test_pixels_out_of_range_raise_in_the_first_batch(spoil, words):
    p = get_barlow_twins_aug_pipelines(8)[0]
    x = torch.rand(4, 3, 8, 8)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    for _ in range(2):      # the check stays on after an error
        with pytest.raises(ValueError, match=words): p(TensorImage(spoil(x.clone())))
    assert p(TensorImage(x)).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("c", [1, 3])
def test_normalisation(c):
    x = TensorImage(torch.rand(4, c, 8, 8))
    norm = NormalizeViews.from_stats(*imagenet_stats, cuda=False)
    mean, std = (torch.tensor(s) for s in imagenet_stats)
    rgb = (x - mean.view(1, 3, 1, 1))/std.view(1, 3, 1, 1)
    expected = rgb if c == 3 else (x - mean.mean())/std.mean()
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_stats_of_another_number_of_channels_raise():
    p = get_barlow_twins_aug_pipelines(8, jitter=False, bw=False)[0]
    with pytest.raises(ValueError, match="5"): p(TensorImage(torch.rand(2, 5, 8, 8)))


# ---- sampled parameters ----------------------------------------------------------------------------------------------

def p_value(sample, lo, hi): return st.kstest(np.asarray(sample, float), "uniform", (lo, hi - lo)).pvalue


def assert_uniform(sample, lo, hi):
    assert p_value(sample, lo, hi) > 1e-3
    assert p_value(sample, lo, hi + .03*(hi - lo)) < 1e-3      # the same test rejects a slightly wider range


@pytest.mark.parametrize("shape,scale,ratio", [
    ((32, 32), (.08, 1.), (3/4, 4/3)), ((96, 60), (.2, 1.), (3/4, 4/3)), ((40, 41), (.9, 1.), (.5, 2.))])
def test_crop_boxes_have_torchvisions_distribution(shape, scale, ratio):
    "Side lengths, positions, area and ratio are distributed as torchvision's own samples"
    torch.manual_seed(0)
    ours = crop_boxes(6000, shape, scale, ratio).double().numpy()
    image = torch.empty(3, *shape)
    theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(6000)]
    def features(b): return [b[:, 0], b[:, 1], b[:, 2], b[:, 3], b[:, 2]*b[:, 3], b[:, 3]/b[:, 2]]
    def p_values(boxes):
        pairs = zip(features(boxes), features(np.array(theirs, float)))
        return [st.ks_2samp(a, b).pvalue for a, b in pairs]
    assert all(p > 1e-3 for p in p_values(ours))
    wrong = crop_boxes(6000, shape, (.8*scale[0] + .2, 1.), ratio).double().numpy()
    assert min(p_values(wrong)) < 1e-6                       # the same test rejects another range
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all() and (ours[:, 1] + ours[:, 3] <= shape[1]).all()


@pytest.mark.parametrize("shape,scale,ratio", [
    ((10, 200), (.9, 1.), (3/4, 4/3)), ((200, 10), (.9, 1.), (3/4, 4/3)), ((50, 60), (1., 1.), (.5, .55))])
def test_fallback_crop_equals_torchvisions(shape, scale, ratio):
    image = torch.empty(3, *shape)
    theirs = {tuple(RandomResizedCrop.get_params(image, list(scale), list(ratio))) for _ in range(50)}
    assert {tuple(b) for b in crop_boxes(50, shape, scale, ratio).tolist()} == theirs and len(theirs) == 1


def test_jitter_factors_and_orders():
    torch.manual_seed(0)
    d = JitterStep((.4, .3, .2, .1)).sample(6000, (8, 8))
    ranges = (.6, 1.4), (.7, 1.3), (.8, 1.2), (-.1, .1)
    for factor, (lo, hi) in zip(d["factors"].T, ranges): assert_uniform(factor, lo, hi)
    orders = np.unique(d["order"].numpy(), axis=0, return_counts=True)[1]
    assert len(orders) == 24 and st.chisquare(orders).pvalue > 1e-3
    preferred = np.r_[orders[:12]*1.2, orders[12:]*.8]                    # the same test rejects preferred orders
    assert st.chisquare(preferred*6000/preferred.sum()).pvalue < 1e-6
    assert abs(np.corrcoef(d["factors"].numpy().T) - np.eye(4)).max() < .05    # independent of each other


@pytest.mark.parametrize("step,name,lo,hi", [
    (AffineStep(30, 10), "angle", -30, 30), (AffineStep(30, 10), "shear", -10, 10),
    (BlurStep((.1, 2.), (32, 32)), "sigma", .1, 2.)])
def test_angles_and_sigmas_are_uniform(step, name, lo, hi):
    torch.manual_seed(0)
    assert_uniform(step.sample(6000, (32, 32))[name], lo, hi)


def test_probability_of_every_step():
    torch.manual_seed(0)
    p = dict(rotate_p=.3, jitter_p=.8, bw_p=.2, blur_p=.1, solarize_p=.45)
    tfm = get_batch_augs(8, flip_p=.6, **p)[0]
    sampled = tfm.sample(8000, (8, 8))
    on = [sampled[tfm.crop]["flip"], *(sampled[s]["on"] for s in tfm.steps)]
    for count, share in zip((int(o.sum()) for o in on), (.6, *p.values())):
        assert st.binomtest(count, 8000, share).pvalue > 1e-3
        assert st.binomtest(count, 8000, share + .05).pvalue < 1e-6
    together = torch.stack(on).double()
    assert (torch.corrcoef(together) - torch.eye(6)).abs().max() < .05    # independent of each other


def test_describe_gives_the_sampled_parameters():
    every_p = dict(rotate_p=1, jitter_p=1, bw_p=1, blur_p=1, solarize_p=1)
    tfm, = get_batch_augs(16, flip_p=1, stats=None, **every_p)
    with pytest.raises(ValueError, match="make a view first"): tfm.describe(0)
    tfm(TensorImage(torch.rand(3, 3, 20, 20)), split_idx=0)
    lines = tfm.describe(1).splitlines()
    assert len(lines) == 7
    assert "flipped" in lines[0] and "°" in lines[1] and "hue" in lines[2] + lines[3]
    assert lines[4] == "grey" and "blur" in lines[5] and lines[6] == "solarised"
    top, left, h, w = tfm.sampled[tfm.crop]["box"][1].tolist()
    assert lines[0].startswith(f"{h}x{w} at ({top},{left})")


# ---- views -----------------------------------------------------------------------------------------------------------

def affine_by_torchvision(im, angle, shear):
    h, w = im.shape[-2:]
    mirrored = torch.tensor(np.pad(im.numpy(), ((0, 0), (h, h), (w, w)), mode="symmetric"))
    whole = TF.affine(mirrored, float(angle), [0, 0], 1., [float(shear), 0.], TF.InterpolationMode.BILINEAR)
    return whole[:, h:2*h, w:2*w]


def jitter_by_torchvision(im, factors, order):
    ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for k in order.tolist(): im = ops[k](im, float(factors[k]))
    return im


STEPS = {
    "RandomAffine": lambda step, im, d: affine_by_torchvision(im, d["angle"], d["shear"]),
    "ColorJitter": lambda step, im, d: jitter_by_torchvision(im, d["factors"], d["order"]),
    "RandomGrayscale": lambda step, im, d: TF.rgb_to_grayscale(im, 3),
    "RandomGaussianBlur": lambda step, im, d: TF.gaussian_blur(im, 2*step.radius + 1, float(d["sigma"])),
    "RandomSolarize": lambda step, im, d: TF.solarize(im, .5),
}


def by_torchvision(tfm, x, i):
    "View of image `i` by torchvision's functions with the sampled parameters"
    def sampled(step): return {k: t[i] for k, t in tfm.sampled[step].items()}
    d, kind = sampled(tfm.crop), TF.InterpolationMode(tfm.crop.interpolation)
    im = TF.resized_crop(x[i].double(), *d["box"].tolist(), tfm.crop.size, kind, antialias=True)
    im = (im.flip(-1) if d["flip"] else im).clamp(0, 1)
    for step in tfm.steps:
        d = sampled(step)
        if d.get("on", True): im = STEPS[step.name](step, im, d)
    return TF.normalize(im, *imagenet_stats)


def errors(tfm, x):
    "Absolute difference of every pixel from torchvision's view"
    v = tfm(TensorImage(x), split_idx=0)
    return torch.stack([(ours - by_torchvision(tfm, x, i)).abs() for i, ours in enumerate(v)])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("n,shape,size", [
    (50, (32, 32), 32), (40, (32, 40), 20), (50, (100, 90), (72, 80)), (8, (90, 100), 24), (6, (150, 150), 140)])
def test_views_equal_torchvisions(n, shape, size, interpolation):
    "Every step, parameters per image, sizes that shrink and enlarge, images handled together and one by one"
    torch.manual_seed(0)
    tfm, = get_batch_augs(size, interpolation=interpolation, exact_jitter=True, shear_deg=10,
                          rotate_p=.6, jitter_p=.7, blur_p=.6, blur_s=(.1, 2.))
    error = errors(tfm, F.interpolate(torch.rand(n, 3, 9, 9), size=shape, mode="bicubic").clamp(0, 1))
    error = error*.2      # undo the normalisation, roughly
    assert error.mean() < 1e-5 and error.max() < 5e-4


def test_solarised_views_equal_torchvisions_except_at_the_threshold():
    torch.manual_seed(0)
    tfm, = get_batch_augs(32, exact_jitter=True, solarize_p=.5)
    error = errors(tfm, torch.rand(64, 3, 32, 32))
    assert (error > 1e-3).double().mean() < 1e-3 and error.median() < 1e-5


def fused_and_exact(x, strengths):
    "Both jitters with the same parameters"
    fused, exact = JitterStep(strengths), JitterStep(strengths, exact=True)
    d = fused.sample(len(x), x.shape[-2:])
    return fused.apply(x.clone(), **fused.prepare(x, **d)), exact.apply(x, **d)


def test_fused_jitter_equals_exact_jitter_without_clamping():
    torch.manual_seed(0)
    fused, exact = fused_and_exact(torch.rand(200, 3, 10, 10)*.3 + .35, (.3, .3, .3, 0))
    assert torch.allclose(fused, exact, atol=1e-5)


def test_error_of_the_fused_jitter():
    "The stated bounds: mean distance over views of a smooth image, strengths of the paper"
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(300, 3, 4, 4), size=16, mode="bilinear")
    fused, exact = fused_and_exact(x, (.4, .4, .2, .1))
    distance = (fused - exact).abs().flatten(1).mean(1)
    moved = (x - exact).abs().flatten(1).mean(1)
    assert distance.mean() < .03 and distance.mean() < .25*moved.mean()


@pytest.mark.parametrize("size", [16, 80])
def test_one_channel_equals_grey_rgb(size):
    tfm, x = get_batch_augs(size, jitter_p=.8, jitter_s=.3, stats=None)[0], torch.rand(12, 1, 20, 20)*.4 + .3
    grey = seeded_view(tfm, TensorImage(x))
    rgb = seeded_view(tfm, TensorImage(x.expand(-1, 3, -1, -1)))
    assert grey.shape == (12, 1, size, size)
    assert (grey - rgb[:, :1]).abs().max() < 1e-3        # torchvision's grey weights add up to .9999


@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, size):
    tfm, x = get_batch_augs(size)[0], torch.rand(6, 3, 20, 24)
    reference = seeded_view(tfm, TensorImage(x.to(dtype).float()))
    v = seeded_view(tfm, x.to(dtype).as_subclass(TensorImage))
    atol = 1e-4 if dtype == torch.float64 else 3*torch.finfo(dtype).eps
    assert v.dtype == dtype and torch.allclose(v.float(), reference, atol=atol)


@pytest.mark.parametrize("shape,size", [((700, 3, 12, 12), 40), ((3, 3, 80, 80), 70)])
def test_input_is_not_changed_and_may_have_any_memory_layout(shape, size):
    tfm, x = get_batch_augs(size)[0], torch.rand(shape)
    before = x.clone()
    v = seeded_view(tfm, TensorImage(x))
    channels_last = seeded_view(tfm, TensorImage(x.to(memory_format=torch.channels_last)))
    strided = seeded_view(tfm, TensorImage(torch.stack([x, x], 1)[:, 1]))
    assert torch.equal(x, before)
    assert torch.allclose(v, channels_last, atol=1e-5) and torch.allclose(v, strided, atol=1e-5)
    decoded = tfm.decode(v)
    assert (v - decoded).abs().max() > .1 and -1e-3 < decoded.min() and decoded.max() < 1 + 1e-3


def test_views_of_plain_tensors_and_bytes():
    "fastai's typed transforms would skip these silently"
    p, x = get_barlow_twins_aug_pipelines(8)[0], torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    def view(images):
        torch.manual_seed(1)
        return p(images)
    v = view(TensorImage(x.float()/255))
    assert torch.equal(view(x), v)
    assert torch.equal(view(x.float()/255), v) and isinstance(v, TensorImage)
    images, labels = p((x, torch.arange(4)))
    assert images.shape == (4, 3, 8, 8) and torch.equal(labels, torch.arange(4))


def test_views_are_float32_under_autocast():
    tfm, x = get_batch_augs(16)[0], TensorImage(torch.rand(8, 3, 20, 20))
    v = seeded_view(tfm, x)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(seeded_view(tfm, x), v)


def test_colour_steps_skip_other_numbers_of_channels_and_warn_once():
    p = get_barlow_twins_aug_pipelines(8, stats=None, jitter_p=1, bw_p=1)[0]
    x = TensorImage(torch.rand(4, 5, 8, 8))
    with pytest.warns(UserWarning, match="5 channels") as caught: p(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p(x)
    assert len(caught) == 1
