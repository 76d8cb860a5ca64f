"Encoders of all sources, projectors, and `encoder_width` without side effects"
import copy
import re
import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tvm
from conftest import small_encoder
from safetensors.torch import save_file
from torch import nn

from self_supervised_bt import layers
from self_supervised_bt.barlow_twins import create_barlow_twins_model
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.layers import (
    PoolingType,
    check_levels,
    create_encoder,
    create_mlp_module,
    encoder_channels,
    encoder_width,
    fit_whitening,
    init_from_patches,
    is_resnet,
    mean_and_covariance,
    row_parts,
    set_channels,
    stage_names,
    usable_whitening,
    weight_sums,
    with_levels,
)
from self_supervised_bt.losses import barlow_twins_loss
from self_supervised_bt.recipes import bt_learner

VIT = dict(img_size=32, patch_size=8)
SWIN = dict(img_size=64, window_size=4)
FASTAI = ["xresnet18", "xresnet18_deep", "xse_resnet18", "xresnext18"]
TORCHVISION = [
    "resnet18", "resnext50_32x4d", "alexnet", "vgg11_bn", "densenet121", "squeezenet1_1", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0", "googlenet",
    "convnext_tiny", "swin_t"]
TIMM = [
    "timm/resnet18", "resnet10t", "tf_efficientnet_b0", "convnext_atto", "convnextv2_atto", "mobilenetv3_small_050",
    "ghostnet_050", "repvgg_a0"]
TRANSFORMERS = [("vit_tiny_patch16_224", VIT), ("deit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)]
ARCHS = [(arch, {}) for arch in FASTAI + TORCHVISION + TIMM] + TRANSFORMERS


@pytest.mark.parametrize("n_in", [1, 3])
@pytest.mark.parametrize("arch,kwargs", ARCHS, ids=lambda a: a if isinstance(a, str) else "")
def test_every_architecture_trains_with_a_projector(arch, kwargs, n_in):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = create_encoder(arch, pretrained=False, n_in=n_in, **kwargs)
    assert encoder_channels(encoder) == n_in
    model = create_barlow_twins_model(encoder, hidden_size=16, projection_size=8)
    size = kwargs.get("img_size", 64)
    x = torch.rand(4, n_in, size, size)
    assert encoder(x).shape == (4, encoder_width(encoder))
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in encoder.modules())
    opt = torch.optim.SGD(model.parameters(), 1e-2)
    z = model(torch.cat([x, x.flip(-1)]))
    before = [p.detach().clone() for p in encoder.parameters()]
    barlow_twins_loss(*z.chunk(2)).backward()
    opt.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, encoder.parameters()))


@pytest.mark.parametrize("pool,factor", [(PoolingType.Avg, 1), (PoolingType.Max, 1), ("catavgmax", 2)])
@pytest.mark.parametrize("arch", ["xresnet18", "resnet18", "densenet121", "timm/resnet18"])
def test_width_of_pooling(arch, pool, factor):
    encoder = create_encoder(arch, pretrained=False, pool_type=pool)
    assert encoder_width(encoder) == factor*(1024 if arch == "densenet121" else 512)


def test_pooling_values():
    x = torch.rand(2, 3, 64, 64)
    encoder = create_encoder("resnet18", pretrained=False, pool_type=PoolingType.CatAvgMax).eval()
    maps = []
    encoder.layer4.register_forward_hook(lambda m, i, o: maps.append(o))
    h = encoder(x)
    assert torch.allclose(h, torch.cat([maps[0].amax((2, 3)), maps[0].mean((2, 3))], dim=1), atol=1e-5)


def test_unsupported_pooling_warns_and_uses_the_architectures_own():
    for arch in ("vit_tiny_patch16_224", "vit_b_16"):
        with pytest.warns(UserWarning, match="its own pooling"): create_encoder(arch, pretrained=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        create_encoder("vit_tiny_patch16_224", pretrained=False, pool_type=PoolingType.Avg)


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18", "xresnet18", "resnet10t"])
def test_small_stem(arch):
    encoder = create_encoder(arch, pretrained=False, n_in=1, small_stem=True)
    seen = []
    first = encoder[4] if isinstance(encoder, nn.Sequential) else encoder.layer1
    first.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape[-2:]))
    encoder(torch.rand(2, 1, 32, 32))
    assert seen == [(32, 32)]
    assert is_resnet(create_encoder(arch, pretrained=False))


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18"])
def test_padding_by_2_is_another_network_with_the_same_names(arch):
    "solo-learn's stem for CIFAR: names and shapes of the weights do not tell it from the usual one"
    usual = create_encoder(arch, pretrained=False, pool_type="avg", small_stem=True).eval()
    padded = create_encoder(arch, pretrained=False, pool_type="avg", small_stem="padding 2").eval()
    padded.load_state_dict(usual.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(padded(x), usual(x), rtol=1e-2)
    usual.conv1.padding = (2, 2)
    assert torch.equal(padded(x), usual(x))
    assert padded.created_by["small_stem"] == "padding 2"


def test_convnext_is_not_a_resnet():
    assert not is_resnet(create_encoder("convnext_atto", pretrained=False, pool_type="avg"))


@pytest.mark.parametrize("arch", ["resnet18", "xresnet18", "resnet10t"])
@pytest.mark.parametrize("small_stem", [False, True, "no pool", "keep pool"])
def test_created_by_rebuilds_the_architecture(arch, small_stem):
    encoder = create_encoder(arch, pretrained=False, n_in=1, pool_type="max", small_stem=small_stem)
    again = create_encoder(**encoder.created_by, pretrained=False)
    again.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(again.eval()(x), encoder.eval()(x))


def test_pretrained_weights_from_a_local_file(tmp_path):
    "timm loads the given file, and one channel gets the sum of the RGB filters"
    source = timm.create_model("test_resnet", num_classes=0)
    save_file(source.state_dict(), tmp_path/"w.safetensors")
    overlay = dict(file=str(tmp_path/"w.safetensors"), num_classes=0)
    encoder = create_encoder("timm/test_resnet", pretrained=True, pool_type="avg", pretrained_cfg_overlay=overlay)
    name, weight = next(iter(source.named_parameters()))
    assert torch.equal(encoder.get_parameter(name), weight)
    grey = create_encoder("timm/test_resnet", n_in=1, pool_type="avg", pretrained_cfg_overlay=overlay)
    assert torch.allclose(grey.get_parameter(name), weight.sum(1, keepdim=True), atol=1e-6)


def test_pretrained_torchvision_weights_from_the_cache(tmp_path, monkeypatch):
    source = tvm.resnet18(weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path/"hub/checkpoints"/tvm.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    cached.parent.mkdir(parents=True)
    torch.save(source.state_dict(), cached)
    assert torch.equal(create_encoder("resnet18").layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    grey = create_encoder("resnet18", n_in=1)
    assert torch.allclose(grey.conv1.weight, source.conv1.weight.sum(1, keepdim=True), atol=1e-6)


def test_missing_pretrained_weights_warn():
    with pytest.warns(UserWarning, match="no pretrained weights for xresnet18"): create_encoder("xresnet18")


def test_encoder_width_has_no_side_effects():
    encoder = create_encoder("resnet18", pretrained=False).train()
    encoder.layer1.eval()
    state = copy.deepcopy(encoder.state_dict())
    modes = [m.training for m in encoder.modules()]
    create_barlow_twins_model(encoder, 8, 8)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    encoder_width(encoder)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert [m.training for m in encoder.modules()] == modes
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_encoder_width_uses_device_and_dtype_of_the_weights(dtype):
    encoder = nn.Sequential(nn.Conv2d(2, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
    assert encoder_width(encoder) == 5
    assert encoder_width(nn.Sequential(nn.Flatten(), nn.Linear(784, 7))) == 7       # takes 28x28 grey images only
    assert encoder_width(encoder.to("meta")) == 5


def test_set_channels_replaces_the_first_convolution():
    first = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=True)
    net = nn.Sequential(nn.Sequential(first), nn.Conv2d(4, 4, 1))
    rgb = net[0][0].weight.clone()
    assert set_channels(net, 1, pretrained=True)[0][0].weight.shape == (4, 1, 3, 3)
    assert torch.allclose(net[0][0].weight, rgb.sum(1, keepdim=True)) and net[0][0].stride == (2, 2)


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_mlp(bn, bias, nlayers):
    mlp = create_mlp_module(10, 20, 5, bn=bn, nlayers=nlayers, bias=bias)
    linears = [m for m in mlp if isinstance(m, nn.Linear)]
    assert len(linears) == nlayers and all((m.bias is not None) == bias for m in linears)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in mlp) == (nlayers - 1)*bn
    assert isinstance(mlp[-1], nn.Linear) and mlp(torch.rand(4, 10)).shape == (4, 5)


@pytest.mark.parametrize("kwargs,words", [
    (dict(arch="resnt50"), "did you mean"), (dict(arch="resnt50"), "resnet50"), (dict(arch="qqqqqqqq"), "list_models"),
    (dict(arch="fastai/resnet50"), "unknown architecture 'resnet50'"),
    (dict(arch="resnet18", n_in=0), "n_in must be"), (dict(arch="resnet18", n_in=1.5), "n_in must be"),
    (dict(arch="resnet18", pool_type="median"), "PoolingType.Avg, PoolingType.Max, PoolingType.CatAvgMax"),
    (dict(arch="vgg11", small_stem=True), "ResNets"), (dict(arch="xresnet18", small_stem="padding 2"), "one conv"),
    (dict(arch="resnet10t", small_stem="padding 2"), "one conv")])
def test_invalid_arguments_raise(kwargs, words):
    with torch.device("meta"), pytest.raises(ValueError) as e: create_encoder(**{"pretrained": False, **kwargs})
    assert words in str(e.value)


def test_modules_that_are_no_encoders_raise():
    with pytest.raises(ValueError, match="nn.Flatten"): create_barlow_twins_model(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="all probe images"): create_barlow_twins_model(nn.Linear(7, 7))
    with pytest.raises(ValueError, match="projection_size"): create_mlp_module(4, 4, 0)


# An option is used or refused

def test_architecture_as_a_function_builds_that_architecture():
    def parameters(arch, **kwargs):
        return sum(p.numel() for p in create_encoder(arch, pretrained=False, **kwargs).parameters())
    from fastai.vision.models.xresnet import xresnet18
    for function, name in ((tvm.resnet34, "torchvision/resnet34"), (timm.models.resnet10t, "timm/resnet10t"),
                           (xresnet18, "fastai/xresnet18")):
        with torch.device("meta"):
            encoder = create_encoder(function, pretrained=False)
            assert encoder.created_by["arch"] == name
            assert sum(p.numel() for p in encoder.parameters()) == parameters(name)
    narrow = dict(channels=[8, 8, 8, 8], stem_width=8)
    encoder = create_encoder(partial(timm.models.resnet10t, **narrow), pretrained=False)
    assert {k: encoder.created_by[k] for k in narrow} == narrow and encoder_width(encoder) == 16


class Own(nn.Module): pass


@pytest.mark.parametrize("arch", [18, None, ["resnet18"], Own, Own(), tvm.ResNet, lambda: nn.Linear(2, 2),
                                  partial(tvm.resnet18, None)], ids=lambda a: type(a).__name__)
def test_what_is_no_architecture_is_refused_with_what_to_pass(arch):
    with pytest.raises(TypeError, match="arch must be the name of an architecture, or its function"):
        create_encoder(arch, pretrained=False)


@pytest.mark.parametrize("option,words", [
    (dict(global_pool="max"), "pool_type"), (dict(in_chans=1), "n_in"), (dict(num_classes=10), "classifier"),
    (dict(c_in=1), "n_in"), (dict(weights=None), "pretrained"), (dict(features_only=True), "list of maps")])
def test_an_option_that_would_be_overridden_is_refused(option, words):
    for arch in ("timm/resnet10t", "torchvision/resnet18", "fastai/xresnet18"):
        with pytest.raises(ValueError, match=words): create_encoder(arch, pretrained=False, **option)


def test_options_of_the_classifier_are_refused():
    with pytest.raises(ValueError, match="classifier"): create_encoder("mobilenet_v2", pretrained=False, dropout=.5)
    with pytest.raises(ValueError, match="classifier"): create_encoder("xresnet18", pretrained=False, p=.5)
    with pytest.raises(ValueError, match="auxiliary"): create_encoder("googlenet", pretrained=False, aux_logits=True)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    "Puts a model of torchvision in the place of its download"
    def put(arch, **kwargs):
        source = tvm.get_model(arch, weights=None, **kwargs)
        url = tvm.get_model_weights(arch).DEFAULT.url
        file = tmp_path/"hub/checkpoints"/url.rsplit("/", 1)[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(source.state_dict(), file)
        return source
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.HASH_REGEX", re.compile("(no hash)"))
    return put


def test_a_small_stem_says_that_it_replaces_pretrained_weights(cached):
    source = cached("resnet18")
    with pytest.warns(UserWarning, match="'no pool' keeps it"): create_encoder("resnet18", small_stem=True)
    encoder = create_encoder("resnet18", small_stem=None, size=32)
    assert encoder.created_by["small_stem"] == "no pool" and torch.equal(encoder.conv1.weight, source.conv1.weight)


def test_pretrained_with_auxiliary_heads(cached):
    "And the rescaling of the images that belongs to the weights is kept when the encoder is built again"
    source = cached("googlenet", init_weights=False)
    encoder = create_encoder("googlenet", pool_type="avg").eval()
    assert encoder.aux1 is None and encoder.transform_input
    assert torch.equal(encoder.conv1.conv.weight, source.conv1.conv.weight)
    again = create_encoder(**encoder.created_by, pretrained=False)
    again.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.eval()(x), encoder(x))


# What the architecture computes before its classifier

def test_convnext_keeps_its_final_norm():
    "Of averages and maxima each, with torchvision's representation as the averages"
    source = tvm.convnext_tiny().eval()
    encoder = create_encoder("torchvision/convnext_tiny", pretrained=False).eval()
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("classifier.2")}
    encoder.load_state_dict(weights)
    nn.init.uniform_(encoder.classifier[1].weight)
    source.classifier[0].weight = encoder.classifier[1].weight
    source.classifier[2] = nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): h = encoder(x)
    assert h.shape == (2, 2*768) and torch.allclose(h[:, 768:], source(x), atol=1e-5)


def test_maxvit_keeps_its_final_norm():
    with torch.device("meta"): encoder = create_encoder("torchvision/maxvit_t", pretrained=False)
    assert encoder.get_parameter("classifier.2.weight").shape == (512,)


# The size of the images

def test_an_encoder_without_pooling_is_measured_at_the_size_of_the_views():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten())
    assert encoder_width(encoder, 16) == 4*16*16
    assert create_barlow_twins_model(encoder, 8, 8, size=16).projector[0].in_features == 4*16*16
    learn = bt_learner(tensor_dls(torch.rand(8, 3, 16, 16), bs=4, device="cpu"), encoder, 16, hidden_size=8,
                       projection_size=8)
    assert learn.model(torch.rand(2, 3, 16, 16)).shape == (2, 8)


def test_a_vit_of_the_wrong_size_is_built_for_the_views_or_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in (16, 32, (32, 48)):
            encoder = create_encoder("test_vit3", pretrained=False, size=size)
            height, width = (size, size) if isinstance(size, int) else size
            assert encoder(torch.rand(2, 3, height, width)).shape == (2, 96) and encoder.created_by["img_size"] == size
    with pytest.raises(ValueError, match="does not take images of 30x30 pixels.*another size") as e:
        create_encoder("test_vit3", pretrained=False, size=30)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(ValueError, match="does not take images of 8x8 pixels"):
        create_encoder("torchvision/alexnet", pretrained=False, size=8)


@pytest.mark.parametrize("arch,kwargs", [("timm/test_resnet", {}), ("xresnet18", {}), ("shufflenet_v2_x0_5", {})])
def test_a_last_map_of_one_pixel_is_not_pooled_twice(arch, kwargs):
    make = partial(create_encoder, arch, pretrained=False, **kwargs)
    torch.manual_seed(0)
    encoder = make(size=16)
    assert encoder.created_by["pool_type"] == "avg" and 2*encoder_width(encoder) == encoder_width(make(size=96))
    torch.manual_seed(0)
    assert all(map(torch.equal, encoder.parameters(), make(pool_type="avg").parameters()))   # the seed means the same
    with pytest.warns(UserWarning, match="holds every number twice"): make(size=16, pool_type="catavgmax")


@pytest.mark.parametrize("arch", ["pvt_v2_b0", "test_vit"])
def test_overlapping_patches_leave_no_rest(arch):
    "Pyramid ViTs cut 7 x 7 pixels at every fourth: any size will do; 14 x 14 side by side would lose the edge"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if arch == "pvt_v2_b0":
            assert create_encoder(arch, pretrained=False, size=64)(torch.rand(2, 3, 64, 64)).ndim == 2
        else:
            with pytest.raises(ValueError, match="no multiple of it"): create_encoder(arch, pretrained=False, size=40)


def spread_rows(n=600, width=12, seed=3):
    "Correlated rows far from zero, one dimension constant and one the copy of another"
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, width, generator=g) @ torch.randn(width, width, generator=g) + 30
    h[:, 3], h[:, 5] = 7., h[:, 4]
    return h


def whitened_by_numpy(h, other, floor):
    "ZCA in float64, written down from its definition"
    a = h.double().numpy()
    mean = a.mean(0)
    values, vectors = np.linalg.eigh((a - mean).T @ (a - mean)/len(a))
    values = np.maximum(values, floor*values.mean())
    return (other.double().numpy() - mean) @ vectors @ np.diag(values**-.5) @ vectors.T


@pytest.mark.parametrize("n", [600, 5], ids=["more rows than dimensions", "fewer"])
@pytest.mark.parametrize("floor", [.01, .3])
def test_whitening_equals_its_formula_in_float64(n, floor):
    h, other = spread_rows(n), spread_rows(40, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whitening = fit_whitening(h, floor)
    for rows in (h, other):
        expected = whitened_by_numpy(h, rows, floor)
        np.testing.assert_allclose(whitening(rows).numpy(), expected, rtol=1e-3, atol=1e-4*np.abs(expected).max())
    assert (whitening.rows, whitening.floor, whitening(h).dtype) == (n, floor, torch.float32)


def test_whitened_variances_are_one_down_to_the_floor_exactly():
    values = torch.tensor([8., 2., 1., .05, 1e-5, 0.])
    signs = torch.tensor([[(-1.)**(i >> j & 1) for j in range(6)] for i in range(64)])   # orthogonal, variance one
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    h = signs*values.sqrt() @ rotation.T
    floor = .01*values.mean()
    white = fit_whitening(h)(h) @ rotation
    assert torch.allclose(white.square().mean(0), values/values.clamp(min=floor), rtol=1e-4, atol=1e-6)


def test_the_covariance_is_summed_over_parts(monkeypatch):
    h = spread_rows()
    mean, covariance = mean_and_covariance(h)
    monkeypatch.setattr(layers, "row_parts", lambda h: h.split(7))
    for a, b in zip(mean_and_covariance(h), (mean, covariance)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(covariance, torch.cov(h.double().T, correction=0))
    inplace, whitening = h.clone(), fit_whitening(h)
    expected = whitening(h)
    assert whitening(inplace, out=inplace) is inplace and torch.equal(inplace, expected)
    assert row_parts.__name__ == "row_parts" and max(len(p) for p in row_parts(torch.empty(70_000, 1024))) == 2**14


def test_what_cannot_be_whitened_is_refused():
    h = spread_rows()
    bad = h.clone()
    bad[3, 2], bad[9, 1] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 row.s. that are not finite"): fit_whitening(bad)
    with pytest.raises(ValueError, match="floor must be"): fit_whitening(h, 0.)
    with pytest.raises(ValueError, match="1 row, which has no variance"): fit_whitening(h[:1])
    with pytest.raises(ValueError, match="same numbers in all rows"): fit_whitening(torch.full((50, 4), 3.3))
    with pytest.raises(ValueError, match=r"h must be representations \(N,F\)"): fit_whitening(h[0])
    with pytest.raises(ValueError, match=r"representations \(N,12\), .* got \(600, 3\)"): fit_whitening(h)(h[:, :3])
    with pytest.warns(UserWarning, match="12 dimensions is fitted on 5 images"): fit_whitening(h[:5])
    white = fit_whitening(h)(bad)
    assert white.isfinite().all(1).nonzero()[:, 0].tolist() == [i for i in range(600) if i not in (3, 9)]


@pytest.mark.parametrize("arch", ["resnet18", "xresnet18", "timm/test_resnet", "timm/test_convnext"])
def test_levels_are_the_pooled_maps_of_the_last_stages(arch):
    encoder = create_encoder(arch, pretrained=False, n_in=1, pool_type="avg").eval()
    x, names, kept = torch.rand(2, 1, 64, 64), stage_names(encoder), {}
    hooks = [encoder.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: kept.update({n: out.clone()}))
             for n in names]
    with torch.no_grad(): h = encoder(x)
    for hook in hooks: hook.remove()
    with torch.no_grad(): got = with_levels(encoder, x, 3)
    parts = [kept[n].mean((2, 3)) for n in names[-3:-1]] + [h]
    expected = torch.cat([p/p.square().sum(1, keepdim=True).sqrt() for p in parts], 1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got @ got.T/3, sum(p @ p.T for p in expected.split([p.shape[1] for p in parts], 1))/3)
    assert not any(m._forward_hooks for m in encoder.modules())


def test_levels_that_an_encoder_does_not_have_are_refused():
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    for levels in (0, 2., True):
        with pytest.raises(ValueError, match="levels must be a positive int"): check_levels(encoder, levels)
    with pytest.raises(ValueError, match="levels=5 needs .* timm/test_resnet has 4 stages"): check_levels(encoder, 5)
    with pytest.raises(ValueError, match="Sequential does not say"): check_levels(small_encoder(), 2)
    vit = create_encoder("timm/test_vit3", pretrained=False, size=32).eval()
    with pytest.raises(ValueError, match=r"levels needs maps \(B,C,H,W\), and blocks.7 gives"):
        with_levels(vit, torch.rand(1, 3, 32, 32), 2)
    assert not any(m._forward_hooks for m in vit.modules())


def test_maps_with_channels_last_are_refused():
    swin = create_encoder("timm/swin_tiny_patch4_window7_224", pretrained=False, depths=(1, 1, 1, 1),
                          embed_dim=12, num_heads=(1, 1, 1, 1), **SWIN).eval()
    with pytest.raises(ValueError, match="levels needs maps"): with_levels(swin, torch.rand(1, 3, 64, 64), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whitening_belongs_to_the_weights_in_any_precision(dtype):
    encoder = small_encoder(3).train()
    encoder(torch.rand(64, 3, 9, 9))   # moves the statistics off 0 and 1
    encoder.whitening = fit_whitening(spread_rows(), weights=weight_sums(encoder))
    assert usable_whitening(encoder) is usable_whitening(encoder.to(dtype)) is encoder.whitening
    encoder.float()(torch.rand(64, 3, 9, 9) + .1)   # one step: only BatchNorm's statistics changed
    assert usable_whitening(encoder) is None


# first kernels from patches

def first_conv(encoder): return next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))


def directions_by_svd(x, h, w):
    "Principal directions of patches, cut one by one, in float64 by NumPy's singular values"
    x = x.double().numpy()
    rows, columns = range(0, x.shape[2] - h + 1, h), range(0, x.shape[3] - w + 1, w)
    patches = np.stack([image[:, i:i+h, j:j+w].ravel() for image in x for i in rows for j in columns])
    return np.linalg.svd(patches - patches.mean(0), full_matrices=False)[2]


@pytest.mark.parametrize("kernel, channels, filters", [(3, 3, 12), (3, 3, 64), ((2, 3), 1, 4), (5, 2, 50), (4, 2, 7)])
def test_first_kernels_are_the_principal_directions(kernel, channels, filters):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, filters, kernel, bias=False)
    before = conv.weight.detach().flatten(1).clone()
    x = torch.randn(20, channels, 21, 17)*torch.rand(channels, 1, 1) + 5
    init_from_patches(nn.Sequential(nn.ReLU(), conv), x)
    kernels = conv.weight.detach().flatten(1)
    expected = torch.tensor(directions_by_svd(x, *conv.kernel_size)).float()
    n, d = min(filters, len(expected)), len(expected)
    length = before.norm(dim=1).mean()
    cosines = torch.linalg.vecdot(kernels[:n], expected[:n])/length
    torch.testing.assert_close(cosines.abs(), torch.ones(n), rtol=0, atol=1e-4)
    torch.testing.assert_close(kernels[d:2*d], -kernels[:d][:len(kernels[d:2*d])])
    assert torch.equal(kernels[2*d:], before[2*d:])


def test_first_kernels_alone_change_and_are_the_same_again():
    torch.manual_seed(0)
    encoder, x = create_encoder("timm/resnet10t", pretrained=False), torch.rand(4, 3, 24, 24)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert init_from_patches(encoder, x) is encoder
    changed = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["conv1.0.weight"] and encoder.conv1[0].weight.requires_grad
    kernels = encoder.conv1[0].weight.detach().clone()
    init_from_patches(encoder, x)
    torch.testing.assert_close(encoder.conv1[0].weight.detach(), kernels)


def test_images_without_detail_give_finite_kernels():
    conv = init_from_patches(nn.Conv2d(3, 40, 3), torch.ones(1, 3, 3, 3))
    assert conv.weight.isfinite().all()


@pytest.mark.parametrize("encoder, shape, message", [
    (nn.Linear(2, 2), (2, 3, 8, 8), "no convolution"), (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 8, 8), "2 groups"),
    (nn.Conv2d(3, 4, 3), (2, 1, 8, 8), r"\(B,3,H,W\).*got \(2, 1, 8, 8\)"), (nn.Conv2d(3, 4, 3), (3, 8, 8), "got"),
    (nn.Conv2d(3, 4, (3, 9)), (2, 3, 8, 8), "3x9")])
def test_images_that_give_no_patches_are_refused(encoder, shape, message):
    with pytest.raises(ValueError, match=message): init_from_patches(encoder, torch.rand(shape))


def test_patches_that_are_not_finite_are_refused():
    x = torch.rand(2, 3, 8, 8)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"): init_from_patches(nn.Conv2d(3, 4, 3), x)
