"An encoder as the backbone of torchvision's detectors: its own maps, what is frozen, normalisation, and the metric"
import copy
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from fastai.data.transforms import Normalize
from fastai.vision.core import imagenet_stats
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

from self_supervised_bt.barlow_twins import create_barlow_twins_model
from self_supervised_bt.data import digits_images
from self_supervised_bt.detection import (
    box_ap,
    detection_backbone,
    digit_scenes,
    encoder_maps,
    find_boxes,
    stages,
    train_detector,
)
from self_supervised_bt.layers import create_encoder

root = Path(__file__).parents[1]
GREY = ([.2], [.3])


@pytest.fixture(scope="module")
def tiny():
    "A grey encoder with small maps"
    return create_encoder("timm/test_resnet", n_in=1, pretrained=False).eval()


def normalised(x, stats):
    mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in stats)
    return (x - mean)/std


def detector_of(backbone, kind=FasterRCNN, **kwargs):
    "A small detector for images of 64 pixels"
    anchors = "anchor_generator" if kind is RetinaNet else "rpn_anchor_generator"
    return kind(backbone, num_classes=2, **{anchors: backbone.anchors(4)}, **backbone.input_options(64, 64), **kwargs)


def scene(channels=1, mask=False):
    target = dict(boxes=torch.tensor([[8., 8., 30., 30.]]), labels=torch.tensor([1]))
    if mask: target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    return [torch.rand(channels, 64, 64)], [target]


def timm_maps(encoder, x, n):
    return encoder.forward_intermediates(x, indices=n, intermediates_only=True)

def sequential_maps(parts, x, keep):
    maps = []
    for i, part in enumerate(parts):
        x = part(x)
        if i in keep: maps.append(x)
    return maps

def resnet_maps(e, x, n):
    x = e.maxpool(e.relu(e.bn1(e.conv1(x))))
    return sequential_maps([e.layer1, e.layer2, e.layer3, e.layer4], x, range(4))


@pytest.mark.parametrize("arch, kwargs, reference, strides", [
    ("resnet18", {}, resnet_maps, [4, 8, 16, 32]),
    ("resnet18", dict(small_stem=True, n_in=1), resnet_maps, [1, 2, 4, 8]),
    ("resnext50_32x4d", {}, resnet_maps, [4, 8, 16, 32]),
    ("wide_resnet50_2", {}, resnet_maps, [4, 8, 16, 32]),
    ("xresnet18", dict(n_in=1), lambda e, x, n: sequential_maps(e[:8], x, (4, 5, 6, 7)), [4, 8, 16, 32]),
    ("timm/test_resnet", dict(n_in=1), timm_maps, [4, 8, 16, 32]),
    ("timm/resnet10t", dict(small_stem="no pool"), timm_maps, [2, 4, 8, 16]),
    ("timm/mobilenetv3_small_050", {}, timm_maps, [4, 8, 16, 32]),
    ("timm/convnext_atto", {}, timm_maps, [4, 8, 16, 32]),
    ("timm/regnetx_002", {}, timm_maps, [4, 8, 16, 32]),
    ("timm/test_efficientnet", dict(n_in=1), timm_maps, [4, 8, 16, 32]),
    ("timm/swin_tiny_patch4_window7_224", dict(strict_img_size=False, depths=(1, 1, 1, 1)), timm_maps, [4, 8, 16, 32]),
    ("mobilenet_v3_small", {}, lambda e, x, n: sequential_maps(e.features, x, (1, 3, 8, 12)), [4, 8, 16, 32]),
    ("shufflenet_v2_x0_5", {}, lambda e, x, n: sequential_maps(
        [e.conv1, e.maxpool, e.stage2, e.stage3, nn.Sequential(e.stage4, e.conv5)], x, (1, 2, 3, 4)), [4, 8, 16, 32]),
    ("regnet_y_400mf", {}, lambda e, x, n: sequential_maps([e.stem, *e.trunk_output], x, (1, 2, 3, 4)), [4, 8, 16, 32]),
])
def test_the_maps_are_those_of_the_encoder(arch, kwargs, reference, strides):
    encoder = create_encoder(arch, pretrained=False, pool_type="avg", **kwargs).eval()
    backbone = detection_backbone(encoder, trainable_layers=0, out_channels=16, stats=GREY)
    assert [stride for _, stride in backbone.layers.values()] == strides
    x = normalised(torch.rand(2, encoder.created_by["n_in"], 64, 96), GREY)
    with torch.no_grad():
        maps = list(backbone.train().body(x).values())
        expected = reference(encoder, x, 4)
        pyramid = backbone(x)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    for got, own in zip(maps, expected): torch.testing.assert_close(got, own, rtol=1e-6, atol=1e-6)
    assert [m.shape[1] for m in maps] == [channels for channels, _ in backbone.layers.values()]
    assert list(pyramid) == ["0", "1", "2", "3", "pool"] and {m.shape[1] for m in pyramid.values()} == {16}
    assert [64//m.shape[2] for m in maps] == strides


def test_the_encoder_is_copied_and_stays_as_it_was(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.modules()]
    tiny.train()
    random = torch.get_rng_state()
    backbone = detection_backbone(tiny, trainable_layers=4, freeze_bn=False, out_channels=8, stats=GREY)
    assert tiny.training and all(p.requires_grad for p in tiny.parameters()), "modes and gradients are the user's"
    train_detector(detector_of(backbone), *digit_scenes(digits_images()[0], n=4), steps=2, bs=4)
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.modules()]
    torch.set_rng_state(random)
    pyramid = detection_backbone(tiny, out_channels=8, stats=GREY).fpn.state_dict()
    torch.set_rng_state(random)
    again = detection_backbone(create_encoder("timm/test_resnet", n_in=1, pretrained=False), out_channels=8)
    assert pyramid.keys() == again.fpn.state_dict().keys()


def trained_names(backbone, **changes):
    "Names of what changes in two training steps at a rate at which everything that can change does"
    detector = detector_of(backbone, box_batch_size_per_image=16, rpn_pre_nms_top_n_train=50)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    train_detector(detector, *digit_scenes(digits_images()[0], n=8), steps=3, bs=4, lr=1e-2)
    return {k.removeprefix("body.encoder.") for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}


def test_a_frozen_encoder_stays_bit_for_bit(tiny):
    backbone = detection_backbone(tiny, trainable_layers=0, out_channels=8, stats=GREY)
    changed = trained_names(backbone)
    assert changed and {k.split(".")[0] for k in changed} == {"fpn"}
    assert not any(p.requires_grad for p in backbone.body.parameters())
    backbone.train()
    assert not any(m.training for m in backbone.body.encoder.modules()) and backbone.fpn.training
    other = copy.deepcopy(backbone).train()
    assert not any(m.training for m in other.body.encoder.modules()), "a copy is frozen as well"
    other.body.encoder.conv1[0].weight.data.zero_()
    x = normalised(torch.rand(1, 1, 64, 64), GREY)
    assert not torch.equal(other(x)["0"], backbone(x)["0"]), "a copy runs its own encoder"


def test_frozen_layers_count_from_the_first(tiny):
    changed = trained_names(detection_backbone(tiny, trainable_layers=2, freeze_bn=False, out_channels=8, stats=GREY))
    assert {k.split(".")[0] for k in changed} == {"fpn", "layer3", "layer4"}
    assert {"layer3.0.bn1.running_mean", "layer3.0.bn1.weight", "layer4.0.conv1.weight"} <= changed
    changed = trained_names(detection_backbone(tiny, trainable_layers=2, out_channels=8, stats=GREY))
    assert {k.split(".")[0] for k in changed} == {"fpn", "layer3", "layer4"}
    norms = tuple(k for k, m in tiny.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(k.startswith(norms) for k in changed), "BatchNorm is frozen by default"
    changed = trained_names(detection_backbone(tiny, trainable_layers=4, freeze_bn=False, out_channels=8, stats=GREY))
    assert {"conv1.0.weight", "bn1.running_var", "layer1.0.conv1.weight"} <= changed


def test_dropout_of_a_frozen_part_is_off():
    encoder = create_encoder("timm/convnext_atto", pretrained=False, drop_path_rate=.9)
    x = normalised(torch.rand(4, 3, 64, 64), GREY)
    def random(trainable):
        body = detection_backbone(encoder, trainable_layers=trainable, out_channels=8, stats=GREY).train().body
        return [not torch.equal(a, b) for a, b in zip(body(x).values(), body(x).values())]
    assert random(0) == [False]*4 and random(1) == [False]*3 + [True] and random(4)[1:] == [True]*3


def test_no_parameter_is_left_without_a_gradient():
    "What comes after the last map does not run: DistributedDataParallel would wait for its gradients"
    for arch, options in (("timm/mobilenetv3_small_050", {}), ("timm/test_resnet", dict(layers=["layer1", "layer2"]))):
        encoder = create_encoder(arch, pretrained=False)
        n = len(options.get("layers", range(4)))
        backbone = detection_backbone(encoder, trainable_layers=n, freeze_bn=False, stats=GREY, **options)
        x = normalised(torch.rand(1, 3, 64, 64), GREY)
        ran = []
        for name in ("global_pool", "layer3" if options else "act2"):
            backbone.body.encoder.get_submodule(name).register_forward_pre_hook(lambda m, args: ran.append(m))
        sum(m.sum() for m in backbone(x).values()).backward()
        trained = {k for k, p in backbone.named_parameters() if p.requires_grad}
        assert {k for k, p in backbone.named_parameters() if p.grad is not None} == trained
        assert 0 < len(trained) < len(list(backbone.parameters())) and not ran


def test_extra_maps_and_anchors(tiny):
    x = normalised(torch.rand(1, 1, 128, 128), GREY)
    for extra, names in ((None, []), ("pool", ["pool"]), ("p6p7", ["p6", "p7"])):
        backbone = detection_backbone(tiny, ["layer3", "layer2"], out_channels=8, extra=extra, stats=GREY)
        maps = backbone(x)
        assert list(maps) == ["0", "1", *names] and list(backbone.layers) == ["layer2", "layer3"]
        assert [128//m.shape[2] for m in maps.values()] == backbone.strides == [8, 16, 32, 64][:len(maps)]
        assert backbone.anchors(4, (1.,)).sizes == tuple((4*s,) for s in backbone.strides)
    default = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 2).rpn.anchor_generator
    own = detection_backbone(create_encoder("resnet18", pretrained=False)).anchors()
    assert own.sizes == default.sizes and own.aspect_ratios == default.aspect_ratios


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, RetinaNet])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_detectors_of_torchvision_train_and_predict(kind, channels):
    encoder = create_encoder("timm/test_resnet", n_in=channels, pretrained=False)
    stats = GREY if channels == 1 else ([.4, .5, .6], [.2, .3, .4])
    extra = "p6p7" if kind is RetinaNet else "pool"
    detector = detector_of(detection_backbone(encoder, out_channels=8, extra=extra, stats=stats), kind)
    losses = detector(*scene(channels, mask=kind is MaskRCNN))
    assert len(losses) == {FasterRCNN: 4, MaskRCNN: 5, RetinaNet: 2}[kind]
    assert all(loss.isfinite() for loss in losses.values())
    found = detector.eval()(scene(channels)[0])
    assert {"boxes", "labels", "scores"} <= found[0].keys()
    assert len(detector.transform.image_mean) == channels


def learner(make_learner, stats):
    learn = make_learner(size=32, stats=stats, model=create_barlow_twins_model(
        create_encoder("timm/test_resnet", n_in=1, pretrained=False), 16, 16))
    return learn


def test_normalisation_comes_from_the_encoder(make_learner, tiny):
    learn = learner(make_learner, ([.3], [.4]))
    expected = dict(image_mean=[pytest.approx(.3)], image_std=[pytest.approx(.4)], min_size=64, max_size=96)
    assert detection_backbone(learn).input_options(64, 96) == expected
    learn.fit(1)
    for model in (learn.model, learn.model.encoder): assert detection_backbone(model).input_options(64, 96) == expected
    grey = learner(make_learner, imagenet_stats)   # grey images get means over the channels, as in NormalizeViews
    options = detection_backbone(grey).input_options()
    assert options["image_mean"] == [pytest.approx((.485 + .456 + .406)/3)]
    assert options["image_std"] == [pytest.approx((.229 + .224 + .225)/3)]
    assert options["min_size"] == 800 and options["max_size"] == 1333
    none = detection_backbone(learner(make_learner, None))
    assert (none.image_mean, none.image_std) == ([0.], [1.]), "images that are not normalised"
    unknown = detection_backbone(tiny)
    with pytest.raises(ValueError, match="does not say how its images are normalised"): unknown.input_options()
    given = detection_backbone(create_encoder("resnet18", pretrained=False), stats=imagenet_stats)
    assert given.image_mean == pytest.approx([.485, .456, .406])
    assert detection_backbone(learn, stats=([.3], [.4])).image_mean == [pytest.approx(.3)]
    with pytest.raises(ValueError, match="leave stats out"): detection_backbone(learn, stats=([.5], [.4]))


def test_the_encoder_gets_what_it_was_trained_on(make_learner):
    "The tensor in front of the encoder is the one that the clean pipeline makes"
    learn = learner(make_learner, ([.3], [.4]))
    detector = detector_of(detection_backbone(learn)).eval()
    seen = []
    detector.backbone.body.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    image = torch.rand(1, 64, 64)
    detector([image])
    torch.testing.assert_close(seen[0], (image[None] - .3)/.4)


def test_wrong_normalisation_is_noticed(tiny):
    detector = detector_of(detection_backbone(tiny, out_channels=8, stats=GREY)).eval()
    image = torch.rand(1, 64, 64)
    image[0, 0, 0], image[0, 0, 1] = 0, 1
    detector([image])
    for wrong in (normalised(image[None], GREY)[0], image*255):
        with pytest.raises(ValueError, match="in .0,1. that are not normalised"): detector([wrong])
    backbone = detection_backbone(tiny, out_channels=8, stats=GREY)
    imagenet = FasterRCNN(backbone, 2, rpn_anchor_generator=backbone.anchors(), image_mean=[.485], image_std=[.229],
                          min_size=64, max_size=64).eval()
    with pytest.raises(ValueError, match="input_options"): imagenet([image])
    raw = FasterRCNN(backbone, 2, rpn_anchor_generator=backbone.anchors(), image_mean=[0.], image_std=[1.],
                     min_size=64, max_size=64).eval()
    with pytest.warns(UserWarning, match="probably not normalised"): raw([image])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector([image])


def test_learners_of_normalising_dls(make_learner, make_dls):
    "Views without statistics, from images that the loader has normalised"
    dls = make_dls(after_batch=[Normalize.from_stats([.3], [.4], cuda=False)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn = learner(lambda **kw: make_learner(dls, **kw), None)
        assert detection_backbone(learn).image_mean == [pytest.approx(.3)]
        twice = learner(lambda **kw: make_learner(dls, **kw), ([.3], [.4]))
        with pytest.raises(ValueError, match="normalised twice"): detection_backbone(twice)


def test_wrong_arguments_are_named(tiny, make_learner):
    def refuses(error, match, *args, **kwargs):
        with pytest.raises(error, match=match): detection_backbone(*args, **kwargs)
    refuses(TypeError, "use create_encoder\\('resnet18'\\)", "resnet18")
    refuses(TypeError, "must be an encoder", None)
    refuses(TypeError, "pass its .encoder", SimpleNamespace(encoder=tiny))
    backbone = detection_backbone(tiny, out_channels=8, stats=GREY)
    for done in (backbone, detector_of(backbone), resnet_fpn_backbone(backbone_name="resnet18", weights=None)):
        refuses(ValueError, "backbone already|pass the encoder itself", done)
    refuses(ValueError, "did you mean \\['layer", tiny, layers=["layer1", "layr2"])
    refuses(ValueError, "no module with a map", tiny, layers=["fc"])
    refuses(ValueError, "different strides", tiny, layers=["layer1", "maxpool"])
    refuses(ValueError, "different strides", tiny, layers=["layer1", "layer1"])
    refuses(ValueError, "different strides", tiny, layers=[])
    refuses(TypeError, "list of names", tiny, layers="layer1")
    refuses(TypeError, "list of names", tiny, layers=[1, 2])
    for n in (-1, 5, True, 2.): refuses(ValueError, "trainable_layers must be 0 to 4", tiny, trainable_layers=n)
    refuses(ValueError, "trainable_layers must be 0 to 2", tiny, layers=["layer1", "layer2"],
            trainable_layers=3)
    refuses(ValueError, "out_channels", tiny, out_channels=0)
    refuses(ValueError, "extra must be one of", tiny, extra="p6")
    for stats in (.5, ([.5],), ([.5], [0.]), "imagenet"): refuses(ValueError, "stats", tiny, stats=stats)
    refuses(ValueError, "3 channels, the images 2", create_encoder("timm/test_resnet", n_in=2, pretrained=False),
            stats=imagenet_stats)
    with pytest.raises(ValueError, match="images of 1 channels, got 3"): backbone(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="one tensor"): backbone([torch.rand(1, 64, 64)])
    with pytest.raises(ValueError, match="min_size"): backbone.input_options(0)
    with pytest.raises(ValueError, match="scale"): backbone.anchors(0)


def test_encoders_without_such_maps_are_refused():
    vit = create_encoder("timm/vit_tiny_patch16_224", pretrained=False, pool_type="avg", depth=2, dynamic_img_size=True)
    with pytest.raises(ValueError, match="maps of several strides.*use a CNN"): detection_backbone(vit)
    fixed = create_encoder("timm/vit_tiny_patch16_224", pretrained=False, pool_type="avg", depth=2)
    with pytest.raises(ValueError, match="images of all sizes: use a CNN"): detection_backbone(fixed)
    with pytest.raises(ValueError, match="several strides"):   # maps of 15 of 64 pixels: boxes would be shifted
        detection_backbone(create_encoder("alexnet", pretrained=False))
    one = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="several strides"): detection_backbone(one)


def test_own_networks_and_maps_that_are_overwritten():
    def block(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1), nn.ReLU())
    own = nn.Sequential(block(1, 4), block(4, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), block(8, 16),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    maps = encoder_maps(own)
    assert stages(own, maps) == ["0", "3", "4"] and "2" not in maps, "2 is overwritten by 3"
    backbone = detection_backbone(own, trainable_layers=1, out_channels=8)
    x = torch.rand(1, 1, 64, 64)
    for got, n in zip(backbone.body(x).values(), (1, 4, 5)): torch.testing.assert_close(got, own[:n](x))
    with pytest.raises(ValueError, match="'2' is no module"): detection_backbone(own, layers=["0", "2"])
    act = nn.ReLU()
    shared = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), act, nn.Conv2d(4, 8, 3, 2, 1), act, nn.AdaptiveAvgPool2d(1))
    assert list(encoder_maps(shared)) == ["0", "2"], "1 runs twice: which of its maps would it be?"
    nested = nn.Sequential(own, nn.Linear(16, 2))
    assert stages(nested, encoder_maps(nested)) == ["0.0", "0.3", "0.4"]


def ap_by_hand(found, targets, threshold):
    "Average precision of one class as COCO defines it: interpolated at 101 recalls"
    rows = sorted(((s, i, b) for i, f in enumerate(found) for s, b in zip(f["scores"].tolist(), f["boxes"])),
                  key=lambda r: -r[0])
    free = [torch.ones(len(t["boxes"]), dtype=torch.bool) for t in targets]
    hits = []
    for _, i, box in rows:
        overlaps = box_iou(box[None], targets[i]["boxes"])[0]*free[i]
        hit = len(overlaps) > 0 and overlaps.max() >= threshold
        if hit: free[i][overlaps.argmax()] = False
        hits.append(float(hit))
    hits = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    recall, precision = hits/sum(map(len, free)), hits/torch.arange(1, len(hits) + 1)
    recalls = torch.linspace(0, 1, 101).double()
    return sum(max(precision[recall >= r - 1e-9].tolist(), default=0.) for r in recalls)*100/101


def test_the_metric_agrees_with_its_definition():
    _, targets = digit_scenes(*digits_images(), 20, seed=3)
    generator = torch.Generator().manual_seed(0)
    found = []
    for t in targets:
        boxes = t["boxes"].repeat(2, 1)
        boxes = boxes + 2.5*torch.randn(boxes.shape, generator=generator)
        keep = (boxes[:, 2] > boxes[:, 0] + 1) & (boxes[:, 3] > boxes[:, 1] + 1)
        scores = torch.rand(len(boxes), generator=generator)
        found.append(dict(boxes=boxes[keep], labels=t["labels"].repeat(2)[keep], scores=scores[keep]))
    got = box_ap(found, targets, agnostic=True)
    at = {t: float(ap_by_hand(found, targets, t/100)) for t in range(50, 100, 5)}
    assert 20 < at[50] < 95 and at[75] < at[50]
    assert got["AP50"] == pytest.approx(at[50], abs=.01) and got["AP75"] == pytest.approx(at[75], abs=.01)
    assert got["AP"] == pytest.approx(sum(at.values())/10, abs=.01)
    wrong = [dict(f, labels=f["labels"] % 10 + 1) for f in found]
    assert box_ap(wrong, targets)["AP50"] < 5 < box_ap(wrong, targets, agnostic=True)["AP50"]


def test_the_metric_at_its_ends(capsys):
    _, targets = digit_scenes(*digits_images(), 5)
    perfect = [dict(t, scores=torch.ones(len(t["labels"]))) for t in targets]
    assert box_ap(perfect, targets) == dict(AP=100., AP50=100., AP75=100.)
    nothing = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))]*5
    assert box_ap(nothing, targets) == dict(AP=0., AP50=0., AP75=0.)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="same images, got 4 and 5"): box_ap(perfect[:4], targets)
    with pytest.raises(ValueError, match="no boxes"): box_ap(nothing, nothing)


def test_scenes():
    x, y = digits_images()
    images, targets = digit_scenes(x, y, 30, noise=0.)
    assert images.shape == (30, 1, 64, 64) and images.min() == 0 and images.max() <= 1
    assert {len(t["labels"]) for t in targets} == {1, 2, 3}
    for image, t in zip(images, targets):
        assert (t["labels"] >= 1).all() and (t["labels"] <= 10).all() and len(t["boxes"]) == len(t["labels"])
        rest = image[0].clone()
        for box in t["boxes"]:
            x0, y0, x1, y1 = box.int().tolist()
            inside = image[0, y0:y1, x0:x1] > .25
            assert inside.any(0)[[0, -1]].all() and inside.any(1)[[0, -1]].all(), "boxes are tight"
            rest[y0:y1, x0:x1] = 0
        assert (rest > .25).sum() == 0, "every digit has its box"
        overlaps = box_iou(t["boxes"], t["boxes"]) - torch.eye(len(t["boxes"]))
        assert overlaps.max() == 0
    again, other = digit_scenes(x, y, 30, seed=0)[0], digit_scenes(x, y, 30, seed=1)[0]
    assert torch.equal(again, digit_scenes(x, y, 30)[0]) and not torch.equal(again, other)
    assert again.min() >= 0 and again.max() <= 1
    with pytest.raises(ValueError, match="n must be"): digit_scenes(x, y, 0)
    with pytest.raises(ValueError, match="32 or more"): digit_scenes(x, y, 1, size=20)


def test_a_detector_learns(tiny):
    images, targets = digit_scenes(digits_images()[0], n=4, noise=.02)
    assert all((t["labels"] == 1).all() for t in targets)
    backbone = detection_backbone(tiny, ["layer1", "layer2"], 32, trainable_layers=2, extra=None, stats=GREY)
    detector = detector_of(backbone, box_batch_size_per_image=16, rpn_pre_nms_top_n_train=50)
    losses = train_detector(detector, images, targets, steps=30, bs=4)
    assert len(losses) == 30 and sum(losses[-5:]) < .6*sum(losses[:5])
    detector.train()
    assert len(find_boxes(detector, images, bs=3)) == 4 and detector.training
    with pytest.raises(ValueError, match="one target per image"): train_detector(detector, images, targets[:2])
    with pytest.raises(ValueError, match="steps"): train_detector(detector, images, targets, steps=0)


# Table 4 of Zbontar et al. 2021
VOC = {"Supervised": (53.5, 81.3, 58.8), "MoCo-v2": (57.4, 82.5, 64.0), "SwAV": (56.1, 82.6, 62.7),
       "SimSiam": (57, 82.4, 63.7), "Barlow Twins": (56.8, 82.6, 63.4)}
COCO = {"Supervised": (38.2, 58.2, 41.2, 33.3, 54.7, 35.2), "Barlow Twins": (39.2, 59.0, 42.5, 34.3, 56.0, 36.5)}


def test_the_lesson_has_the_numbers_of_the_paper():
    cells = json.loads((root/"nbs"/"63_tutorial_detection.ipynb").read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for table in (VOC, COCO):
        for method, numbers in table.items():
            rows = [re.findall(r"\d+(?:\.\d)?(?=[* |])", row.split("|", 2)[2]) for row in text.splitlines()
                    if row.replace("*", "").startswith(f"| {method} |")]
            assert any([float(n) for n in row] == [float(n) for n in numbers] for row in rows), (method, rows)


def test_the_settings_of_detectron2():
    folder = root/"configs"/"detectron2"
    configs = {f.stem: yaml.safe_load(f.read_text()) for f in folder.glob("*.yaml")}   # without Python tags
    assert configs.keys() == {"voc_R_50_C4_24k", "coco_R_50_C4_1x"}
    voc, coco = configs["voc_R_50_C4_24k"], configs["coco_R_50_C4_1x"]
    assert voc["SOLVER"] == dict(IMS_PER_BATCH=16, BASE_LR=.1, STEPS=[18000, 22000], MAX_ITER=24000, WARMUP_FACTOR=.333,
                                 WARMUP_ITERS=1000)
    assert coco["SOLVER"] == dict(IMS_PER_BATCH=16, BASE_LR=.03, STEPS=[60000, 80000], MAX_ITER=90000)
    assert voc["DATASETS"] == dict(TRAIN=["voc_2007_trainval", "voc_2012_trainval"], TEST=["voc_2007_test"])
    assert voc["INPUT"]["MIN_SIZE_TRAIN"] == list(range(480, 801, 32))
    assert coco["INPUT"]["MIN_SIZE_TRAIN"] == list(range(640, 801, 32))
    assert (voc["MODEL"]["MASK_ON"], coco["MODEL"]["MASK_ON"]) == (False, True)
    for config in (voc, coco):
        model = config["MODEL"]
        assert model["RESNETS"] == dict(DEPTH=50, NORM="SyncBN", STRIDE_IN_1X1=False)
        assert config["INPUT"]["FORMAT"] == "RGB"
        for name, i in (("PIXEL_MEAN", 0), ("PIXEL_STD", 1)):
            assert model[name] == pytest.approx([255*s for s in imagenet_stats[i]])
        assert model["BACKBONE"]["FREEZE_AT"] == 0 and config["TEST"]["PRECISE_BN"]["ENABLED"]
        heads = re.findall(r"^class (\w+)\(Res5ROIHeads\)", (folder/"train.py").read_text(), re.M)
        assert heads == [model["ROI_HEADS"]["NAME"]]
    for f in folder.glob("*.yaml"):   # every value says where it comes from
        for line in f.read_text().splitlines():
            value = re.match(r" +\w+: (?!$)(.*)", line)
            assert not value or "#" in line or re.match(r" +(META_ARCHITECTURE|NUM_CLASSES|DEPTH|TEST)", line), line


def test_the_lesson_and_the_benchmark_train_the_same():
    "Their settings are the same text, so the figures of the one are those of the other"
    cells = json.loads((root/"nbs"/"63_tutorial_detection.ipynb").read_text())["cells"]
    lesson = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    benchmark = (root/"benchmarks"/"detection.py").read_text()
    for name in ("class Noise", "def barlow_twins_learner", "def faster_rcnn"):
        texts = [re.search(rf"^{name}\b.*\n(?: .*\n?)+", text, re.M)[0].strip() for text in (lesson, benchmark)]
        assert texts[0] == texts[1], name
    for setting in ("STATS = [.15],[.25]", "steps=150", "fit_one_cycle(40, 2e-2)"):
        assert setting in lesson, setting
    defaults = dict(re.findall(r'"--(\w+)", type=int, default=(\d+)', benchmark))
    assert defaults["epochs"] == "40" and defaults["steps"] == "150" and int(defaults["seeds"]) >= 2
