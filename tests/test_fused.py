"The fused views: parameters per image, distributions and pixels compared with torchvision"
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline
from scipy import stats as st
from torchvision.transforms import RandomResizedCrop

from self_supervised_bt import fused
from self_supervised_bt.augmentations import (
    VIEW_RECIPES,
    fused_views,
    get_barlow_twins_aug_pipelines,
    get_batch_augs,
    get_multi_aug_pipelines,
    sampled_by,
    views_of,
)
from self_supervised_bt.fused import (
    INTERPOLATIONS,
    AffineStep,
    BlurStep,
    CropStep,
    FusedViews,
    GreyStep,
    JitterStep,
    NormalizeViews,
    SolarizeStep,
    Step,
    crop_boxes,
    image_batch,
    in_threads,
    stay_bytes,
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


# ---- floats, to the bit ----------------------------------------------------------------------------------------------

def step_by_step(tfm, x, sampled):
    "A view of floats as the plain sequence of its steps on a whole batch: no parts, no other view, nothing in place"
    v = tfm.crop.apply(x, **tfm.crop.prepare(x, **sampled[tfm.crop]))
    for step in tfm.steps:
        params = dict(sampled[step])
        on = params.pop("on", torch.ones(len(x), dtype=torch.bool))
        if not on.any(): continue
        some = v[on]
        v[on] = step.apply(some, **step.prepare(some, **{k: t[on] for k, t in params.items()}))
    if tfm.norm: tfm.norm.normalise_(v)
    return v


@pytest.mark.parametrize("n,shape,size", [
    (9, (32, 32), 32), (300, (32, 32), 32), (20, (32, 40), 20), (9, (128, 128), 96), (4, (160, 160), 140)])
@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_views_of_floats_are_the_sequence_of_their_steps_to_the_bit(recipe, n, shape, size):
    "Both views of one call, in one part and in several; and each image by itself"
    x = F.interpolate(torch.rand(n, 3, 9, 9), size=shape, mode="bicubic").clamp(0, 1)
    p = get_multi_aug_pipelines(2, size, recipe)
    views, sampled = views_of(p, TensorImage(x))
    for v, s, aug in zip(views, sampled, p):
        tfm = fused_views(aug)
        assert torch.equal(v, step_by_step(tfm, x, s))
        for i in range(0, n, max(n//8, 1)):
            alone = step_by_step(tfm, x[i:i+1], {step: {k: t[i:i+1] for k, t in d.items()} for step, d in s.items()})
            # small crops of a batch in which one shrinks are products with weights, alone they are sampled: rounding
            assert torch.equal(v[i:i+1], alone) if size != 20 else torch.allclose(v[i:i+1], alone, atol=1e-5)


# ---- bytes -----------------------------------------------------------------------------------------------------------

def photographs(n, shape, channels=3, memory_format=torch.contiguous_format):
    "Smooth images as bytes"
    x = F.interpolate(torch.rand(n, channels, 9, 9), size=shape, mode="bicubic").clamp(0, 1)
    return (x*255).round().byte().contiguous(memory_format=memory_format)


ONLY = dict(rotate=False, jitter=False, bw=False, blur=False)
BYTES = {   # settings, and the largest and mean difference of a pixel in [0,1]; a byte is rounded by at most .002
    "crop": (ONLY, .0045, .0012),
    "bicubic": (dict(ONLY, interpolation="bicubic"), .012, .0016),   # its weights are larger than 1 in sum
    "rotation and shear": (dict(ONLY, rotate=True, rotate_p=1, shear_deg=10), .0045, .0012),
    "jitter": (dict(ONLY, jitter=True, jitter_p=1, jitter_s=.3), .01, .0016),
    "grey": (dict(ONLY, bw=True, bw_p=1), .0045, .0008),
    "blur": (dict(ONLY, blur=True, blur_p=1, blur_s=(1., 3.)), .0045, .0008),
    "default": ({}, .012, .0015),
    "jitter after another": (dict(rotate_p=.5, jitter_p=.5, bw_p=.5, blur_p=.5, jitter_s=.3), .01, .0015),
}


@pytest.mark.parametrize("shape,size", [((128, 100), (96, 70)), ((150, 160), 140), ((60, 50), 100)])
@pytest.mark.parametrize("case", BYTES)
def test_views_of_bytes_are_those_of_floats_up_to_rounding(case, shape, size):
    settings, largest, mean = BYTES[case]
    torch.manual_seed(0)
    tfm, = get_batch_augs(size, **{"stats": None, **settings})
    x = photographs(24, shape, memory_format=torch.channels_last)
    assert stay_bytes(x, [tfm])
    v = seeded_view(tfm, x)
    of_bytes = tfm.sampled
    difference = (v - seeded_view(tfm, TensorImage(x.float()/255))).abs()
    assert difference.max() < largest and difference.mean() < mean and v.dtype == torch.float32
    for step, params in tfm.sampled.items():
        for name, t in params.items(): assert torch.equal(t, of_bytes[step][name])


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_recipes_make_views_of_bytes(recipe):
    "All views in one call, which are those of floats up to rounding; a pixel may pass the threshold of solarisation"
    x = photographs(16, (90, 90))
    p = get_multi_aug_pipelines(2, 80, recipe, **({} if recipe == "digits" else dict(interpolation="bilinear")))
    torch.manual_seed(1)
    views, sampled = views_of(p, x)
    torch.manual_seed(1)
    for v, s, aug in zip(views, sampled, p):
        floats = aug(TensorImage(x.float()/255))
        assert (v - floats).abs().median() < .02 and (v - floats).abs().mean() < .03
        for step, params in sampled_by(aug).items(): assert torch.equal(s[step].get("on", v), params.get("on", v))


def test_views_of_bytes_equal_torchvisions():
    "torchvision's own crops of bytes are equal but for the last bit, wherever they lie"
    torch.manual_seed(0)
    tfm, = get_batch_augs(96, **ONLY, stats=None)
    x = photographs(40, (128, 150))
    v = (seeded_view(tfm, x)*255).round()
    for i, ours in enumerate(v):
        d = {k: t[i] for k, t in tfm.sampled[tfm.crop].items()}
        theirs = TF.resized_crop(x[i], *d["box"].tolist(), [96, 96], antialias=True)
        difference = (ours - (theirs.flip(-1) if d["flip"] else theirs)).abs()
        assert difference.max() <= 1 and difference.mean() < .02


@pytest.mark.parametrize("stats", [None, imagenet_stats])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_bytes_of_any_number_of_channels(channels, stats):
    stats = stats and ([.4]*channels, [.2]*channels)
    tfm, = get_batch_augs(80, stats=stats, jitter=channels in (1, 3), bw=channels in (1, 3), blur_p=1)
    x = photographs(6, (90, 70), channels)
    v = seeded_view(tfm, x)
    assert v.shape == (6, channels, 80, 80)
    assert (v - seeded_view(tfm, TensorImage(x.float()/255))).abs().max() < .1


@pytest.mark.parametrize("shape,size", [((32, 32), 24), ((100, 90), 96)])
def test_bytes_of_any_layout_give_the_same_views_and_stay_as_they_are(shape, size):
    tfm, = get_batch_augs(size)
    x = photographs(20, shape)
    before, v = x.clone(), seeded_view(tfm, x)
    layouts = (x.to(memory_format=torch.channels_last), torch.stack([x, x], 1)[:, 1],
               torch.cat([x, x], 3)[..., :shape[1]], TensorImageBW(x))
    for other in layouts: assert torch.equal(seeded_view(tfm, other), v)
    assert torch.equal(x, before) and type(seeded_view(tfm, TensorImageBW(x))) is TensorImageBW
    one = photographs(1, shape).expand(20, -1, -1, -1)
    assert torch.equal(seeded_view(tfm, one), seeded_view(tfm, one.contiguous()))


def test_one_set_of_parameters_for_a_batch_of_bytes():
    tfm, = get_batch_augs(80, same_on_batch=True)
    v = seeded_view(tfm, photographs(1, (90, 90)).expand(8, -1, -1, -1))
    assert torch.equal(v, v[:1].expand_as(v))


class Inverted(Step):
    "A step of one's own"
    def apply(self, v): return 1 - v


def test_steps_that_are_not_for_bytes_get_floats():
    x = photographs(6, (90, 90))
    for steps in ([Inverted()], [JitterStep(exact=True)]):
        tfm = FusedViews(CropStep((80, 80)), steps)
        assert torch.equal(seeded_view(tfm, x), seeded_view(tfm, TensorImage(x.float()/255)))


def test_steps_in_another_order():
    "A grey image is one channel for some steps, and three for the next"
    steps = [GreyStep(), AffineStep(20), JitterStep(), BlurStep((.5, 2.), (80, 80)), SolarizeStep(), GreyStep()]
    x = photographs(6, (90, 90))
    tfm = FusedViews(CropStep((80, 80)), steps)
    difference = (seeded_view(tfm, x) - seeded_view(tfm, TensorImage(x.float()/255))).abs()
    assert (difference > .01).double().mean() < .03


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape,size", [((32, 32), 32), ((128, 128), 96), ((160, 160), 140)])
@pytest.mark.parametrize("recipe", VIEW_RECIPES)
def test_all_views_in_one_call_are_those_of_each_pipeline(recipe, shape, size, dtype):
    "Also with pipelines of different steps, and with one pipeline for two views"
    x = photographs(16, shape)
    x = x if dtype == torch.uint8 else TensorImage(x.float()/255)
    p = get_multi_aug_pipelines(2, size, recipe)
    p = [p[0], p[1], p[0]]
    torch.manual_seed(2)
    views, sampled = views_of(p, x)
    torch.manual_seed(2)
    for v, s, aug in zip(views, sampled, p):
        alone = aug(x)
        assert torch.allclose(v, alone, atol=1e-5) and type(v) is type(alone) is TensorImage
        for step, params in sampled_by(aug).items():
            for name, t in params.items(): assert torch.equal(s[step][name], t)


def test_views_with_further_transforms_or_of_different_sizes():
    x = photographs(6, (90, 90))
    p = [Pipeline(get_batch_augs(80, xtra_tfms=[lambda v: v + torch.rand(1)]), split_idx=0),
         Pipeline(get_batch_augs(80, backend="kornia"), split_idx=0), Pipeline(get_batch_augs(20), split_idx=0)]
    torch.manual_seed(3)
    views, sampled = views_of(p, x)
    torch.manual_seed(3)
    first = p[0](x)
    assert torch.equal(views[0], first) and [s is None for s in sampled] == [False, True, False]
    assert [v.shape[-1] for v in views] == [80, 80, 20] and all(v.is_floating_point() for v in views)
    several = [p[2], Pipeline(get_batch_augs(80), split_idx=0)]
    assert [v.shape[-1] for v in views_of(several, x)[0]] == [20, 80]


@pytest.mark.parametrize("shape,size", [((32, 32), 32), ((128, 128), 96), ((256, 256), 224)])
def test_threads_change_nothing(shape, size):
    "Neither the views, nor the number of threads of PyTorch in this thread and in later ones"
    p, x = get_barlow_twins_aug_pipelines(size), photographs(9, shape)
    n, found = torch.get_num_threads(), []
    try:
        for k in (1, 2, 3):
            torch.set_num_threads(k)
            torch.manual_seed(4)
            found.append(torch.cat(views_of(p, x)[0]))
            with ThreadPoolExecutor(1) as later: assert later.submit(torch.get_num_threads).result() == k
            assert torch.get_num_threads() == k
    finally: torch.set_num_threads(n)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_error_in_a_thread_is_raised():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError): in_threads(lambda i: 1/i, [2, 1, 0])
        assert in_threads(lambda i: i + torch.get_num_threads(), [1, 2, 3]) == [2, 3, 4]
    finally: torch.set_num_threads(n)


def test_without_torchscript_the_views_are_the_same(monkeypatch):
    tfm, x = get_batch_augs(80)[0], photographs(12, (90, 90))
    v = seeded_view(tfm, x)
    def gone(f): raise RuntimeError("TorchScript is gone")
    monkeypatch.setattr(torch.jit, "script", gone)
    monkeypatch.setattr(fused, "_native", {})
    assert torch.equal(seeded_view(tfm, x), v)


def test_the_memory_of_views_is_used_again_when_they_are_gone():
    x = torch.empty(1, dtype=torch.uint8)
    shape = (2, 3, 500, 500)
    first = fused.new_views(shape, x)
    half = first[:1].fill_(1)
    at = first.data_ptr()
    del first
    second = fused.new_views(shape, x).fill_(2)
    assert second.data_ptr() != at and (half == 1).all()     # a part of it is still in use
    del half
    assert fused.new_views(shape, x).data_ptr() == at
    assert fused.new_views((3, *shape[1:]), x).shape[0] == 3 and (second == 2).all()


def test_views_of_bytes_under_autocast_and_without_gradients():
    tfm, x = get_batch_augs(80)[0], photographs(8, (90, 90))
    v = seeded_view(tfm, x)
    with torch.autocast("cpu", torch.bfloat16): w = seeded_view(tfm, x)
    assert torch.equal(v, w) and w.dtype == torch.float32 and not w.requires_grad
