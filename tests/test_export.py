"Formats out: what other tools get from an encoder, and what an export may replace"
import base64
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import string
import warnings
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision.models as tvm
import yaml
from conftest import quiet, same_output, serving
from fastai.torch_core import TensorImage
from huggingface_hub import HfApi
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from self_supervised_bt import export
from self_supervised_bt.cli import bt_export
from self_supervised_bt.encoder_files import restore_input
from self_supervised_bt.evaluation import encode
from self_supervised_bt.export import (
    FromPixels,
    Prepared,
    detectron2_name,
    detectron2_settings,
    export_encoder,
    export_timm,
    push_to_hub,
)
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.weights import load_encoder, save_encoder

KEY = "self_supervised_bt"
CALL = dict(arch="timm/test_resnet", n_in=3, pool_type="avg", small_stem=False)
RUNS = "x=None); open('executed', 'w').write('1'); model = timm.create_model('test_resnet') #"


def changed_file(good, path, text):
    "The same weights with other text"
    save_file(load_file(good), path, {KEY: text})
    return path


STEMS_AND_POOLS = [(False, "avg"), (True, "catavgmax"), ("no pool", "catavgmax"), ("keep pool", "avg")]


@pytest.mark.parametrize("arch,small_stem,pool_type", [
    *[("resnet18", *o) for o in STEMS_AND_POOLS], *[("timm/test_resnet", *o) for o in STEMS_AND_POOLS],
    ("timm/resnet10t", True, "avg"), ("timm/resnet10t", False, "catavgmax"), ("timm/test_vit", False, "avg")])
def test_exported_encoder_in_plain_timm_is_equal(tmp_path, arch, small_stem, pool_type):
    "With the exported code, without this library"
    encoder = create_encoder(arch, pretrained=False, n_in=1, pool_type=pool_type, small_stem=small_stem)
    for m in encoder.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        nn.init.uniform_(m.weight)
        nn.init.uniform_(m.bias)
        m.running_mean.uniform_(-1, 1)
    code = export_timm(encoder, tmp_path/"e.safetensors")
    assert "self_supervised_bt" not in code and (tmp_path/"e.py").read_text() == code
    scope = {}
    exec(code.replace("'e.safetensors'", repr(str(tmp_path/"e.safetensors"))), scope)
    x = torch.rand(2, 1, *([160, 160] if "vit" in arch else [48, 48]))
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](x), encoder.eval()(x), rtol=1e-4, atol=1e-5)


def test_export_raises_without_a_counterpart_in_timm(tmp_path):
    file = tmp_path/"e.safetensors"
    with pytest.raises(ValueError, match="no counterpart of xresnet18"):
        export_timm(create_encoder("xresnet18", pretrained=False), file)
    changed = create_encoder("resnet18", pretrained=False)
    changed.relu = nn.Identity()
    with pytest.raises(ValueError, match="other representations"): export_timm(changed, file)
    assert not file.exists() and not (tmp_path/"e.py").exists()


def test_export_of_a_strangers_file_runs_nothing(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed_file(good, tmp_path/"evil.safetensors", json.dumps(dict(created_by={**CALL, RUNS: 1}, input={})))
    with pytest.raises(SystemExit) as e: bt_export(run="evil.safetensors")
    assert str(e.value).startswith("bt_export: evil.safetensors does not describe") and "\n" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["evil.safetensors"]


@pytest.mark.parametrize("change", [{RUNS: 1}, dict(stem_width="1\n"), dict(n_in="3"), dict(pool_type="'avg'"),
                                    dict(arch="test_resnet.');open('executed','w')#"), dict(checkpoint_path="w.pt")])
def test_code_of_an_export_holds_checked_literals_only(tmp_path, monkeypatch, change):
    "Also where the description did not come from a file, as from a run.json"
    monkeypatch.chdir(tmp_path)
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    encoder.created_by.update(change)
    with pytest.raises(ValueError): export_timm(encoder, tmp_path/"e.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_size_in_a_file_takes_no_memory(good, tmp_path, monkeypatch):
    "4,096 x 4,096 pixels would make the test run of an export gigabytes large"
    changed = changed_file(good, tmp_path/"e.safetensors", json.dumps(dict(created_by=CALL, input=dict(size=[4096]*2))))
    encoder = load_encoder(changed)
    sizes = []
    encoder.conv1.register_forward_pre_hook(lambda m, x: sizes.append(x[0].shape[-1]))
    export_timm(encoder, tmp_path/"timm.safetensors")
    assert sizes and max(sizes) <= 512


def test_a_vit_that_pools_its_own_way_is_exported(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = create_encoder("timm/test_vit", pretrained=False, img_size=32)
    code = export_timm(encoder, tmp_path/"e.safetensors")
    assert "global_pool='token'" in code and "img_size=32" in code
    again = load_encoder(save_encoder(encoder, tmp_path/"own.safetensors"))
    assert same_output(again, encoder)


def test_an_export_onto_its_own_source_is_refused(good, tmp_path):
    file = tmp_path/"encoder.safetensors"
    file.write_bytes(good.read_bytes())
    with pytest.raises(SystemExit, match="bt_export: .*another kind of file"): bt_export(run=str(file), out=str(file))
    assert file.read_bytes() == good.read_bytes() and os.listdir(tmp_path) == ["encoder.safetensors"]


def test_an_export_replaces_no_file_of_the_user(good, tmp_path):
    encoder, code = load_encoder(good), tmp_path/"train.py"
    code.write_text("print('mine')\n")
    with pytest.raises(FileExistsError, match="train.py exists"): export_timm(encoder, tmp_path/"train.safetensors")
    for name in ("model.py", "model", "model.pt"):
        with pytest.raises(ValueError, match="must end in .safetensors"): export_timm(encoder, tmp_path/name)
    assert code.read_text() == "print('mine')\n" and os.listdir(tmp_path) == ["train.py"]


def test_an_export_replaces_an_earlier_one_but_only_by_a_complete_one(good, tmp_path):
    encoder, file = load_encoder(good), tmp_path/"e.safetensors"
    export_timm(encoder, file)
    before = file.read_bytes()
    encoder.maxpool = nn.Identity()    # no longer what create_encoder built
    with pytest.raises(ValueError, match="other representations"): export_timm(encoder, file)
    assert file.read_bytes() == before and len(os.listdir(tmp_path)) == 2
    torch.manual_seed(1)
    other = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    export_timm(other, file)
    assert file.read_bytes() != before


def test_files_of_an_export_have_the_mode_of_the_umask_and_leave_nothing_beside(good, tmp_path):
    umask = os.umask(0o022)
    try: export_timm(load_encoder(good), tmp_path/"timm.safetensors")
    finally: os.umask(umask)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert modes == {"timm.safetensors": 0o644, "timm.py": 0o644}


# Formats of other tools: one ResNet, and one small network whose graph is exported quickly

STATS = [[.5, .4, .3], [.2, .25, .3]]


def lively(encoder):
    "The encoder with statistics and weights of its norms that are not those of a new network"
    for m in encoder.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.uniform_(m.bias, -.5, .5)
        m.running_mean.uniform_(-.5, .5)
        m.running_var.uniform_(.5, 1.5)
    return encoder


def encoder_for(arch, size=(32, 48), stats=STATS, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = lively(create_encoder(arch, pretrained=False, **kwargs))
    encoder.clean_pipeline = restore_input({"size": list(size), "stats": stats})
    return encoder.eval()


def normalised(x, stats=STATS):
    mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in stats)
    return (x - mean)/std


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*float(b.abs().max()))


def tiny_encoder(channels=3, size=(32, 48), stats=STATS):
    "An encoder of one's own: its graph is made in a moment"
    layers = [nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)]
    encoder = lively(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    encoder.clean_pipeline = restore_input({"size": list(size), "stats": stats})
    return encoder.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A small encoder, and the folder of its exports"
    torch.manual_seed(0)
    encoder = encoder_for("timm/test_resnet", (64, 96), pool_type="catavgmax")
    folder = tmp_path_factory.mktemp("small")/"exports"
    return encoder, folder, export_encoder(encoder, folder, "timm, code", license="MIT")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    "A tiny encoder, and the folder of its graphs"
    torch.manual_seed(0)
    encoder = tiny_encoder()
    folder = tmp_path_factory.mktemp("graphs")/"exports"
    return encoder, folder, export_encoder(encoder, folder, ["onnx", "onnx-uint8", "pt2"])


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    "A ResNet-18 with torchvision's layers, and the folder of its exports"
    torch.manual_seed(0)
    encoder = encoder_for("resnet18", pool_type="avg")
    folder = tmp_path_factory.mktemp("resnet")/"exports"
    table = export_encoder(encoder, folder, ["torchvision", "detectron2", "mmdetection", "torchvision-detection"])
    return encoder, folder, table


@pytest.mark.parametrize("exports,n,tools", [("small", 5, {"timm"}), ("graphs", 3, {"onnxruntime", "torch.export"})])
def test_table_and_record_tell_of_every_file(request, exports, n, tools):
    _, folder, table = request.getfixturevalue(exports)
    files = {f.name for f in folder.iterdir()}
    assert files == {*table["file"], "export.json"} and len(table) == n
    record = json.loads((folder/"export.json").read_text())
    assert record["files"].keys() == set(table["file"]) and record["formats"].keys() == set(table["format"])
    for name, about in record["files"].items():
        content = (folder/name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (about["bytes"], about["sha256"])
    assert (table["largest difference"] <= 1e-5).all()
    assert set(table["opened by"].str.split().str[0]) == tools


def test_timm_opens_the_folder_with_the_input_of_the_encoder(small):
    encoder, folder, _ = small
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(model(x), encoder(x))
    told = timm.data.resolve_model_data_config(model)
    assert (told["input_size"], told["mean"], told["std"]) == ((3, 64, 96), *STATS)
    assert (told["crop_pct"], told["crop_mode"], told["interpolation"]) == (1., "center", "bilinear")
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
    assert classifier(x).shape == (2, 10)
    assert torch.equal(classifier.conv1[0].weight, encoder.conv1[0].weight)


def test_transforms_of_timm_are_the_clean_pipeline_of_the_encoder(small):
    encoder, folder, _ = small
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    theirs = transform(Image.fromarray(pixels))
    ours = encoder.clean_pipeline(TensorImage(torch.from_numpy(pixels).permute(2, 0, 1)[None]/255))[0]
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < .02   # PIL rounds to 1/255 after resizing


@pytest.mark.parametrize("file", ["encoder.onnx", "encoder_uint8.onnx"])
def test_onnxruntime_gives_the_same_for_several_batches_and_sizes(graphs, file):
    encoder, folder, _ = graphs
    alone = onnxruntime.InferenceSession((folder/file).read_bytes())   # no second file is needed
    for n, size in ((1, (32, 48)), (3, (32, 48)), (5, (32, 48)), (2, (64, 40)), (1, (96, 160))):
        pixels = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
        x = normalised(pixels/255)
        with torch.no_grad(): expected = encoder(x)
        h, = alone.run(["h"], {"x": (pixels if "uint8" in file else x).numpy()})
        close(torch.from_numpy(h), expected)
    assert alone.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert alone.get_inputs()[0].type == ("tensor(uint8)" if "uint8" in file else "tensor(float)")


def test_onnx_says_its_opset_and_what_the_files_of_save_encoder_say(graphs, tmp_path):
    encoder, folder, table = graphs
    model = onnx.load(folder/"encoder.onnx")
    onnx.checker.check_model(model, full_check=True)
    opset = next(o.version for o in model.opset_import if not o.domain)
    assert table.set_index("file").loc["encoder.onnx", "about"].startswith(f"opset {opset};")
    with safe_open(save_encoder(encoder, tmp_path/"e.safetensors"), "pt") as f: expected = f.metadata()[KEY]
    assert {p.key: p.value for p in model.metadata_props} == {KEY: expected}
    read = {KEY: ""}
    torch.export.load(folder/"encoder.pt2", extra_files=read)
    assert read[KEY] == expected


def test_exported_program_takes_other_batches_and_sizes(graphs):
    encoder, folder, _ = graphs
    model = torch.export.load(folder/"encoder.pt2").module()
    for shape in ((1, 3, 32, 48), (5, 3, 32, 48), (2, 3, 40, 72), (3, 3, 96, 160)):
        x = torch.rand(shape)
        with torch.no_grad(): close(model(x), encoder(x))


def test_files_hold_no_folder_of_this_machine(small, graphs, resnet):
    places = {str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(small[1].parent), str(Path.home())}
    places -= {"/"}
    for folder in (small[1], graphs[1], resnet[1]):
        for file in folder.iterdir():
            contents = [file.read_bytes()]
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as z: contents += [z.read(name) for name in z.namelist()]
            assert [p for p in places for content in contents if p.encode() in content] == [], file.name


def test_weights_load_strictly_into_torchvision(resnet):
    encoder, folder, _ = resnet
    model = tvm.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(folder/"encoder_torchvision.pth", weights_only=True), strict=True)
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad(): close(model.eval()(x), encoder(x))


class ConvNorm(nn.Conv2d):
    "A convolution that holds its norm, as in detectron2"
    def __init__(self, ni, nf, kernel, stride=1):
        super().__init__(ni, nf, kernel, stride, kernel//2, bias=False)
        self.norm = nn.BatchNorm2d(nf)
    def forward(self, x): return self.norm(super().forward(x))


class Block(nn.Module):
    "A residual block with detectron2's names; the stride is in the 3x3 convolution"
    def __init__(self, ni, nf, width, stride, bottleneck):
        super().__init__()
        if bottleneck: convs = [ConvNorm(ni, width, 1), ConvNorm(width, width, 3, stride), ConvNorm(width, nf, 1)]
        else: convs = [ConvNorm(ni, nf, 3, stride), ConvNorm(nf, nf, 3)]
        if ni != nf: self.shortcut = ConvNorm(ni, nf, 1, stride)
        for i, conv in enumerate(convs, start=1): setattr(self, f"conv{i}", conv)
        self.n = len(convs)
    def forward(self, x):
        out = x
        for i in range(1, self.n + 1):
            out = getattr(self, f"conv{i}")(out)
            if i < self.n: out = out.relu()
        return (out + (self.shortcut(x) if hasattr(self, "shortcut") else x)).relu()


class Detectron2ResNet(nn.Module):
    "The layout of detectron2's ResNet: stem, res2 ... res5"
    def __init__(self, blocks, bottleneck):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, 64, 7, 2)
        ni = 64
        for s, n in enumerate(blocks):
            width = 64*2**s
            nf = width*(4 if bottleneck else 1)
            strides = [2 if s and not b else 1 for b in range(n)]
            setattr(self, f"res{s + 2}", nn.Sequential(*[Block(ni if not b else nf, nf, width, strides[b], bottleneck)
                                                         for b in range(n)]))
            ni = nf
    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        maps = []
        for s in (2, 3, 4, 5):
            x = getattr(self, f"res{s}")(x)
            maps.append(x)
        return maps


def test_detectron2_finds_all_weights_and_computes_the_same(resnet):
    encoder, folder, _ = resnet
    content = torch.load(folder/"encoder_detectron2.pth", weights_only=True)
    assert content.keys() == {"model", "__author__", "matching_heuristics"} and content["matching_heuristics"] is True
    model = Detectron2ResNet([2, 2, 2, 2], False)
    model.load_state_dict(content["model"], strict=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        close(model.eval()(x)[-1].mean((2, 3)), encoder(x))
    settings = yaml.safe_load((folder/"encoder_detectron2.yaml").read_text())
    resnets = dict(DEPTH=18, STRIDE_IN_1X1=False, NUM_GROUPS=1, WIDTH_PER_GROUP=64, RES2_OUT_CHANNELS=64)
    pixels = dict(PIXEL_MEAN=[127.5, 102., 76.5], PIXEL_STD=[51., 63.75, 76.5])
    assert settings["MODEL"] == dict(WEIGHTS="encoder_detectron2.pth", RESNETS=resnets, **pixels)
    assert settings["INPUT"] == dict(FORMAT="RGB")


def test_names_of_detectron2_for_resnet50():
    with torch.device("meta"): theirs, ours = Detectron2ResNet([3, 4, 6, 3], True), tvm.resnet50()
    shapes = {k: t.shape for k, t in theirs.state_dict().items()}
    renamed = {detectron2_name(k): t.shape for k, t in ours.state_dict().items() if not k.startswith("fc.")}
    assert renamed == shapes and len(shapes) == 318
    known = {"stem.conv1.weight", "stem.conv1.norm.running_mean", "res2.0.shortcut.norm.weight",
             "res2.0.shortcut.weight", "res4.5.conv3.norm.num_batches_tracked", "res5.2.conv2.weight"}
    assert known <= renamed.keys()


@pytest.mark.parametrize("name,expected", {
    "resnet34": (34, 1, 64, 64), "resnet50": (50, 1, 64, 256), "resnet152": (152, 1, 64, 256),
    "resnext50_32x4d": (50, 32, 4, 256), "wide_resnet50_2": (50, 1, 128, 256)}.items())
def test_settings_for_detectron2_of_other_resnets(name, expected):
    text = detectron2_settings(SimpleNamespace(mean=[.5]*3, std=[.2]*3), name, "f.pth")
    told = yaml.safe_load(text)["MODEL"]["RESNETS"]
    assert (told["DEPTH"], told["NUM_GROUPS"], told["WIDTH_PER_GROUP"], told["RES2_OUT_CHANNELS"]) == expected
    assert told["STRIDE_IN_1X1"] is False


def test_mmdetection_finds_all_weights_and_computes_the_same(resnet):
    encoder, folder, _ = resnet
    scope = {}
    exec((folder/"encoder_mmdetection.py").read_text(), scope)
    backbone = scope["model"]["backbone"]
    assert (backbone["type"], backbone["depth"], backbone["style"]) == ("ResNet", 18, "pytorch")
    pixels = dict(mean=[127.5, 102., 76.5], std=[51., 63.75, 76.5])
    assert scope["model"]["data_preprocessor"] == dict(**pixels, bgr_to_rgb=True)
    assert scope["model"]["neck"]["in_channels"] == [64, 128, 256, 512]
    init = backbone["init_cfg"]
    content = torch.load(folder/init["checkpoint"], weights_only=True)
    prefix = init["prefix"]
    assert content["meta"] == {} and all(k.startswith(prefix) for k in content["state_dict"])
    model = tvm.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict({k[len(prefix):]: t for k, t in content["state_dict"].items()}, strict=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): close(model.eval()(x), encoder(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_weights_load_strictly_into_a_detector_of_torchvision(resnet, norm):
    encoder, folder, _ = resnet
    file = folder/"encoder_torchvision_detection.pth"
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)
    backbone.body.load_state_dict(torch.load(file, weights_only=True), strict=True)
    scope = {}
    exec(file.with_suffix(".py").read_text(), scope)
    model = scope["detector"](3, norm, file=str(file), min_size=64, max_size=64).eval()
    assert (model.transform.image_mean, model.transform.image_std) == tuple(STATS) and model.transform.min_size == (64,)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for body in (backbone.eval().body, model.backbone.body): close(body(x)["3"].mean((2, 3)), encoder(x))
        assert model([x[0]])[0].keys() == {"boxes", "labels", "scores"}
        seen = model.transform([x[0]])[0].tensors
    close(seen[:, :, :64, :64], normalised(x))


def test_a_detector_on_a_small_stem_and_grey_images(tmp_path):
    encoder = encoder_for("resnet18", stats=[[.5], [.2]], n_in=1, small_stem=True)
    table = export_encoder(encoder, tmp_path, "torchvision-detection")
    scope = {}
    exec((tmp_path/table["file"][1]).read_text(), scope)
    for layers, trained in ((5, True), (3, False)):
        model = scope["detector"](2, trainable_layers=layers, file=str(tmp_path/table["file"][0]), min_size=32)
        conv = model.backbone.body.conv1
        assert (conv.kernel_size, conv.stride, conv.weight.requires_grad) == ((3, 3), (1, 1), trained)
        assert model.transform.image_mean == [.5]
    with torch.no_grad(): model.eval()([torch.rand(1, 32, 32)])


@pytest.mark.parametrize("arch,pool,stem", [("resnet18", "catavgmax", "padding 2"), ("resnet18", "max", "no pool"),
                                            ("timm/resnet18", "catavgmax", True)])
def test_code_for_torchvision_says_stem_and_pooling(tmp_path, arch, pool, stem):
    encoder = encoder_for(arch, pool_type=pool, small_stem=stem, n_in=1, stats=STATS)
    table = export_encoder(encoder, tmp_path, "torchvision")
    code = (tmp_path/"encoder_torchvision.py").read_text()
    assert "self_supervised_bt" not in code and "timm" not in code and "1 channel" in table["about"][0]
    assert "(x - torch.tensor([0.4])" in code   # one number for the one channel
    scope = {}
    exec(code.replace("'encoder_torchvision.pth'", repr(str(tmp_path/"encoder_torchvision.pth"))), scope)
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad(): close(scope["model"](x), encoder(x))


# What cannot be exported, and what to use instead

REFUSED = {
    ("resnet18", "timm"): (dict(pool_type="catavgmax"), "maxima.*export it as code"),
    ("timm/resnet18", "timm"): (dict(small_stem=True), "stem.*export it as code or torchvision"),
    ("xresnet18", "timm"): ({}, "no counterpart of xresnet18.*onnx"),
    ("xresnet18", "torchvision"): ({}, "torchvision reads ResNets.*onnx or pt2"),
    ("timm/test_vit", "torchvision-detection"): (dict(img_size=32), "torchvision reads ResNets.*onnx or pt2"),
    ("resnet18", "detectron2"): (dict(small_stem=True), "stem 3x3, stride 1, no max-pool: .*torchvision-detection"),
    ("timm/resnet18", "mmdetection"): (dict(n_in=1), "RGB images.*1 channel"),
    ("resnext50_32x4d", "mmdetection"): ({}, "no resnext50_32x4d"),
    ("timm/test_resnet", "detectron2"): ({}, "detectron2 reads ResNets")}


@pytest.mark.parametrize("arch,name", REFUSED)
def test_what_a_format_cannot_hold_is_refused_with_what_to_use(tmp_path, arch, name):
    options, words = REFUSED[arch, name]
    with pytest.raises(ValueError, match=words): export_encoder(encoder_for(arch, **options), tmp_path/"a/b", name)
    assert os.listdir(tmp_path) == []


def test_a_classifier_is_no_encoder(tmp_path):
    with pytest.raises(ValueError, match="encoder.fc = torch.nn.Identity"):
        export_encoder(tvm.resnet18(), tmp_path/"e", "torchvision")
    plain = lively(tvm.resnet18())
    plain.fc = nn.Identity()
    export_encoder(plain, tmp_path/"e", "torchvision,detectron2")   # also if create_encoder did not build it
    assert "encoder_detectron2.yaml" in os.listdir(tmp_path/"e")


@pytest.fixture(scope="module")
def silu(resnet):
    "An encoder with a layer that is not in its weights"
    encoder = copy.deepcopy(resnet[0])
    encoder.layer2[0].relu = nn.SiLU()
    return encoder


TRUNKS = ["timm", "code", "torchvision", "detectron2", "mmdetection", "torchvision-detection"]


@pytest.mark.parametrize("name", TRUNKS)
def test_an_encoder_that_was_changed_is_noticed(silu, tmp_path, name):
    with pytest.raises(ValueError, match="gives other representations than this encoder"):
        export_encoder(silu, tmp_path/"e", name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", TRUNKS)
def test_a_file_with_other_weights_is_noticed(resnet, tmp_path, monkeypatch, name):
    right = Prepared.tensors.fget
    wrong = property(lambda p: {k: t*1.01 if k == "layer1.0.bn1.weight" else t for k, t in right(p).items()})
    monkeypatch.setattr(Prepared, "tensors", wrong)
    with pytest.raises(ValueError, match="gives other representations"): export_encoder(resnet[0], tmp_path/"e", name)
    assert os.listdir(tmp_path) == []


def test_another_input_in_the_graph_is_noticed(tmp_path, monkeypatch):
    forward = FromPixels.forward
    monkeypatch.setattr(FromPixels, "forward", lambda self, x: forward(self, x.flip(1)))
    with pytest.raises(ValueError, match="cannot export the graph.*gives other representations"):
        export_encoder(tiny_encoder(), tmp_path/"e", "onnx-uint8")
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    encoder = encoder_for("timm/test_resnet", pool_type="avg")
    encoder.bn1.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"): export_encoder(encoder, tmp_path/"e", "timm")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("formats,words", [
    ("", "must be one of"), ([], "formats is empty"), ("tim", "must be one of 'timm'"), ([None], "must be one of"),
    ("onnx;timm", "must be one of")])
def test_formats_are_names_of_formats(tmp_path, formats, words):
    with pytest.raises(ValueError, match=words): export_encoder(nn.Identity(), tmp_path/"e", formats)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_tool_that_is_not_installed_is_said_before_anything_is_written(good, tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))
    words = rf"onnx needs {missing}: pip install self_supervised_bt\[export\]"
    with pytest.raises(ImportError, match=words): export_encoder(load_encoder(good), tmp_path/"e", "timm,onnx")
    with pytest.raises(SystemExit, match="bt_export: .*" + words):
        bt_export(run=str(good), format="onnx", out=str(tmp_path/"e"))
    assert os.listdir(tmp_path) == []


# The model stays as it is, whatever state it is in

def test_the_model_and_the_random_state_stay_as_they_are(tmp_path):
    encoder = encoder_for("timm/test_resnet", pool_type="avg").train()
    encoder.bn1.eval()
    modes, before = [m.training for m in encoder.modules()], copy.deepcopy(encoder.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2), np.random.rand()   # noqa: NPY002
    torch.manual_seed(3)
    export_encoder(encoder, tmp_path, "timm,code")
    assert torch.equal(torch.rand(2), expected[0])
    assert [m.training for m in encoder.modules()] == modes and all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), before.values(), strict=True))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad(): close(model(x), encoder.eval()(x))


WRAPPED = {
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "float16": lambda m: m.half(),
    "float64": lambda m: m.double(),
    "compiled in part": lambda m: setattr(m, "layer1", torch.compile(m.layer1, backend="eager")) or m}


@pytest.mark.parametrize("state", WRAPPED)
def test_wrapped_and_converted_encoders_are_exported_as_plain_ones(tmp_path, state):
    encoder = encoder_for("timm/test_resnet", pool_type="avg")
    plain = copy.deepcopy(encoder)
    if "float" in state: plain = WRAPPED[state](plain).float()
    export_encoder(WRAPPED[state](encoder), tmp_path, "timm,code")
    x = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), plain(x))
    weights = load_file(tmp_path/"encoder_timm.safetensors")
    assert weights.keys() == plain.state_dict().keys()
    assert {t.dtype for t in weights.values()} == {torch.float32, torch.int64}


def test_weights_in_channels_last_are_written_contiguous(resnet, tmp_path):
    encoder = copy.deepcopy(resnet[0]).to(memory_format=torch.channels_last)
    export_encoder(nn.DataParallel(encoder), tmp_path, "torchvision")
    weights = torch.load(tmp_path/"encoder_torchvision.pth", weights_only=True)
    assert all(t.is_contiguous() for t in weights.values()) and weights.keys() == encoder.state_dict().keys()


def test_graphs_of_a_compiled_encoder_in_half_precision(tmp_path):
    encoder = tiny_encoder().to(torch.bfloat16)
    plain = copy.deepcopy(encoder).float()
    export_encoder(torch.compile(encoder, backend="eager"), tmp_path, "pt2")
    x = torch.rand(3, 3, 40, 56)
    with torch.no_grad(): close(torch.export.load(tmp_path/"encoder.pt2").module()(x), plain(x))


def test_a_vit_keeps_its_size_but_not_its_batch(tmp_path):
    encoder = encoder_for("timm/vit_tiny_patch16_224", (32, 32), img_size=32, embed_dim=24, depth=1, num_heads=2)
    table = export_encoder(encoder, tmp_path, "timm,code,pt2,onnx").set_index("format")
    assert table.loc["onnx", "about"].endswith("any number of images of 32x32 pixels")
    session = onnxruntime.InferenceSession(tmp_path/"encoder.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    x = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(x)
        close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
        close(torch.export.load(tmp_path/"encoder.pt2").module()(x), expected)
        close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), expected)


def test_grey_images_get_the_average_of_statistics_for_rgb(tmp_path):
    encoder = encoder_for("timm/test_resnet", n_in=1)
    export_encoder(encoder, tmp_path, "timm,onnx-uint8")
    told = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert told["input_size"] == (1, 32, 48)
    assert told["mean"] == pytest.approx([.4]) and told["std"] == pytest.approx([.25])
    session = onnxruntime.InferenceSession(tmp_path/"encoder_uint8.onnx")
    for size in ((32, 48), (64, 80)):   # at the first the last map has one pixel
        pixels = torch.randint(0, 256, (3, 1, *size), dtype=torch.uint8)
        with torch.no_grad(): expected = encoder(normalised(pixels/255, [[.4], [.25]]))
        close(torch.from_numpy(session.run(None, {"x": pixels.numpy()})[0]), expected)


def test_an_encoder_of_ones_own_has_no_counterpart_in_timm(tmp_path):
    with pytest.raises(ValueError, match="no counterpart"): export_encoder(tiny_encoder(), tmp_path/"n", "timm")
    for size in (0, (0, 8), (1, 2, 3), "32", -4, 1.5, True):
        with pytest.raises(ValueError, match="size must be"):
            export_encoder(tiny_encoder(), tmp_path/"n", "onnx", size=size)
    assert os.listdir(tmp_path) == []


# All or nothing

def snapshot(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_exports_are_replaced_together_and_others_are_kept(good, tmp_path):
    export_encoder(load_encoder(good), tmp_path, "timm,code")
    first = snapshot(tmp_path)
    torch.manual_seed(5)
    other = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    export_encoder(other, tmp_path, "timm")
    second = snapshot(tmp_path)
    assert second.keys() == first.keys() and second["model.safetensors"] != first["model.safetensors"]
    assert second["encoder_timm.safetensors"] == first["encoder_timm.safetensors"]
    assert json.loads(second["export.json"])["formats"].keys() == {"timm", "code"}
    export_encoder(other, tmp_path, "code")


def test_a_later_format_that_fails_leaves_everything_as_it_was(good, tmp_path):
    export_encoder(load_encoder(good), tmp_path, "timm")
    before = snapshot(tmp_path)
    torch.manual_seed(5)
    other = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    with pytest.raises(ValueError, match="detectron2 reads"): export_encoder(other, tmp_path, "timm,code,detectron2")
    assert snapshot(tmp_path) == before


def test_a_move_that_fails_brings_the_earlier_files_back(good, tmp_path, monkeypatch):
    export_encoder(load_encoder(good), tmp_path, "timm")
    before = snapshot(tmp_path)
    torch.manual_seed(5)
    other = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    replace = os.replace
    def full(a, b):
        if Path(b) == tmp_path/"README.md" and "before" not in str(a): raise OSError(28, "No space left on device")
        replace(a, b)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"): export_encoder(other, tmp_path, "code,timm")
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md", "export.json"])
def test_files_of_others_and_changed_ones_are_not_replaced(good, tmp_path, file):
    encoder = load_encoder(good)
    (tmp_path/"theirs").mkdir()
    (tmp_path/"theirs"/file).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{file} exists and is no"): export_encoder(encoder, tmp_path/"theirs")
    assert snapshot(tmp_path/"theirs") == {file: b"mine"}
    export_encoder(encoder, tmp_path/"ours")
    with open(tmp_path/"ours"/file, "a") as f: f.write(" ")
    before = snapshot(tmp_path/"ours")
    if file == "export.json":   # white space after JSON
        export_encoder(encoder, tmp_path/"ours")
        return
    with pytest.raises(FileExistsError, match=f"{file} was changed"): export_encoder(encoder, tmp_path/"ours")
    assert snapshot(tmp_path/"ours") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}, "formats": {}}', "["*100_000,
                                  '{"files": {}, "formats": []}'])
def test_a_record_that_is_none_is_refused(good, tmp_path, text):
    (tmp_path/"export.json").write_text(text)
    with pytest.raises(FileExistsError, match="no record of an export"): export_encoder(load_encoder(good), tmp_path)
    assert os.listdir(tmp_path) == ["export.json"]


def test_a_file_in_place_of_the_folder_is_refused(good, tmp_path):
    (tmp_path/"e").write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder"): export_encoder(load_encoder(good), tmp_path/"e")
    assert (tmp_path/"e").read_text() == "mine"


# The model card

EVIL = "x\n---\nlicense: mit\n# `" + "</td><script>alert(1)</script> | [a](http://b) ![i](j) **b** www.c.d ${X} {arch}"


def test_a_model_card_holds_no_markup_of_strangers(good, tmp_path):
    facts = dict(training={"method": "Barlow Twins", "recipe": EVIL, EVIL: 1.5, "nested": {"a": [EVIL]}, "none": None},
                 results=[{"data": EVIL, "kNN": 57.2}, {"data": "b", EVIL: EVIL}])
    export_encoder(load_encoder(good), tmp_path, license="MIT", facts=facts)
    card = (tmp_path/"README.md").read_text()
    _, head, body = card.split("---\n", 2)
    tags = ["image-feature-extraction", "timm", "self-supervised-learning", "barlow-twins"]
    assert yaml.safe_load(head) == dict(library_name="timm", pipeline_tag=tags[0], license="mit", tags=tags)
    assert "\n---\n" not in body and "license: mit" not in body
    text = re.sub(r"\\[" + re.escape(string.punctuation) + "]", "", body)     # what is left is markup
    assert not {c for c in ("<", "![", "www.") if c in text}
    assert text.count("](") == 1 and text.count("**") == 1
    assert text.count("```") == 2 and text.count("`") == 12 and "57.2" in body
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in tables] == [3]*7 + [4]*4
    assert text.count("\n## ") == 5 and text.count("\n# ") == 0


@pytest.mark.parametrize("license", ["", "mit\ntags: x", "mit: x", "{x}", "a b", "'", "x"*50, 3, "mit #", "é"])
def test_a_licence_is_an_identifier(good, tmp_path, license):
    with pytest.raises(ValueError, match="license must be"):
        export_encoder(load_encoder(good), tmp_path/"e", "timm", license=license)
    assert os.listdir(tmp_path) == []


def test_a_licence_has_a_place_in_the_card_of_timm_only(good, tmp_path):
    with pytest.raises(ValueError, match="add 'timm' to formats"):
        export_encoder(load_encoder(good), tmp_path/"e", "code", license="mit")
    export_encoder(load_encoder(good), tmp_path/"e")
    card = (tmp_path/"e/README.md").read_text()
    assert 'license: "unknown"' in card and "Not chosen yet" in card
    assert "Not measured." in card and "Not recorded." in card and "barlow" not in card.lower()


@pytest.mark.parametrize("change", [{RUNS: 1}, dict(stem_width="1\n"), dict(n_in="3"), dict(pool_type="'avg'"),
                                    dict(arch="test_resnet.');open('executed','w')#"), dict(checkpoint_path="w.pt")])
def test_a_configuration_holds_checked_literals_only(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    encoder.created_by.update(change)
    for name in ("timm", "code", "torchvision"):
        with pytest.raises((ValueError, TypeError)): export_encoder(encoder, tmp_path/"e", name)
    assert os.listdir(tmp_path) == []


def test_a_learner_tells_how_it_was_trained(make_dls, tmp_path):
    learn = quiet(bt_learner(make_dls(channels=3), "timm/test_resnet", small_stem=False, pool_type="avg", size=8,
                             hidden_size=8, projection_size=8, pretrained=False))
    export_encoder(learn, tmp_path)
    assert "epochs" not in (tmp_path/"README.md").read_text()
    with learn.no_bar(): learn.fit(2)
    learn.model.train()
    export_encoder(learn, tmp_path)
    card = (tmp_path/"README.md").read_text()
    assert "trained without labels, by Barlow Twins (" in card and "- barlow-twins" in card.split("---")[1]
    assert "| recipe | default, changed |" in card and "| images | 48 |" in card and "| epochs | 2 |" in card
    assert learn.model.training and "3 x 8 x 8 pixels" in card


# From the command line

@pytest.fixture(scope="module")
def run(good, tmp_path_factory):
    "The folder of a run, as far as an export reads it"
    folder = tmp_path_factory.mktemp("runs")/"photos"
    folder.mkdir()
    (folder/"encoder.safetensors").write_bytes(good.read_bytes())
    recipe = dict(name="cifar", lmb=.02, bs=64, size=24, source="a paper", epochs=9)
    results = dict(data="/home/someone/secret/photos", images=1000, epochs=7, seed=3, recipe=recipe)
    (folder/"results.json").write_text(json.dumps(results))
    rows = {"birds": {"test images": 200, "kNN (k=20)": 57.2, "linear": 61.0}}
    (folder/"evaluation.json").write_text(json.dumps(dict(kind="evaluate", rows=rows)))
    return folder


def test_bt_export_prints_what_was_written_and_compared(run, capsys):
    bt_export(run=str(run), format="timm,code", license="apache-2.0")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.match(r"timm: opened by timm [\d.]+, local-dir, largest difference \de[-+]\d\d$", lines[0])
    assert [line.split(",")[0].strip() for line in lines[2:5]] == ["config.json", "model.safetensors", "README.md"]
    assert lines[5].startswith("code: opened by timm")
    assert [line.split(",")[0].strip() for line in lines[6:8]] == ["encoder_timm.safetensors", "encoder_timm.py"]
    assert max(map(len, lines[:8])) <= 80
    assert f"Saved in {run/'export'}/." in out
    card = (run/"export/README.md").read_text()
    for line in ("| recipe | cifar |", "| images of | photos |", "| images | 1,000 |", "| epochs | 7 |", "| seed | 3 |",
                 "| birds | 200 | 57.2 | 61 |", 'license: "apache-2.0"'): assert line in card
    assert "secret" not in card and "someone" not in card


def test_bt_export_says_damaged_results_and_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path/"r", ignore=shutil.ignore_patterns("export"))
    (tmp_path/"r/results.json").write_text("{")
    (tmp_path/"r/evaluation.json").write_text('{"rows": [1]}')
    with pytest.warns(UserWarning, match="results.json cannot be read"): bt_export(run=str(tmp_path/"r"), format="timm")
    assert "Not recorded." in (tmp_path/"r/export/README.md").read_text()


@pytest.mark.parametrize("options,words", [(dict(format="x"), "format must be one of"),
                                           (dict(license="mit"), "add --format timm"),
                                           (dict(format="detectron2"), "detectron2 reads ResNets")])
def test_bt_export_ends_with_one_line(run, tmp_path, options, words):
    with pytest.raises(SystemExit, match=words) as e: bt_export(run=str(run), out=str(tmp_path/"e"), **options)
    assert "\n" not in str(e.value) and os.listdir(tmp_path) == []


# Hugging Face, on this machine

class Hub(BaseHTTPRequestHandler):
    "The answers of Hugging Face to an upload; what came is kept"
    def log_message(self, *args): pass
    def answer(self):
        length = int(self.headers.get("content-length") or 0)
        body, got, here = self.rfile.read(length), self.server.got, f"http://127.0.0.1:{self.server.server_address[1]}"
        got.append((self.path, self.headers.get("authorization")))
        if self.server.refuse in self.path: return self.reply({"error": "no"}, 403)
        if self.path.endswith("/create"): return self.reply(dict(url=f"{here}/me/encoder", id="me/encoder"))
        if self.path == "/api/validate-yaml": return self.reply(dict(errors=[], warnings=[]))
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith("safetensors") else "regular" for name in names}
            return self.reply(dict(files=[dict(path=k, uploadMode=v, shouldIgnore=False) for k, v in kinds.items()]))
        if self.path.endswith("/objects/batch"):
            objects = [dict(o, actions=dict(upload=dict(href=f"{here}/put/{o['oid']}")))
                       for o in json.loads(body)["objects"]]
            return self.reply(dict(transfer="basic", objects=objects))
        if self.path.startswith("/put/"):
            self.server.files["lfs"] = body
            return self.reply({})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                content = line["value"]
                if line["key"] == "file": self.server.files[content["path"]] = base64.b64decode(content["content"])
            return self.reply(dict(commitUrl=f"{here}/me/encoder/commit/1", commitOid="1", success=True))
        self.reply({}, 404)
    def reply(self, values, status=200):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    do_GET = do_POST = do_PUT = answer


@pytest.fixture
def hub(monkeypatch):
    "Hugging Face as `huggingface_hub` finds it"
    with serving(Hub) as (server, here):
        server.got, server.files, server.refuse = [], {}, "nothing is refused"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        init = HfApi.__init__
        monkeypatch.setattr(HfApi, "__init__", lambda self, *a, **k: init(self, *a, **{"endpoint": here, **k}))
        yield server


def test_an_export_is_published_in_one_commit(good, tmp_path, hub):
    export_encoder(load_encoder(good), tmp_path, license="mit")
    (tmp_path/"notes.txt").write_text("mine")
    assert push_to_hub(tmp_path, "me/encoder", token="hf_secret").endswith("/me/encoder/commit/1")
    expected = {"README.md": "README.md", "config.json": "config.json", "lfs": "model.safetensors"}
    assert hub.files == {k: (tmp_path/name).read_bytes() for k, name in expected.items()}
    assert sum("/commit/" in path for path, _ in hub.got) == 1
    assert {auth for path, auth in hub.got if "/me/encoder/" in path} == {"Bearer hf_secret"}


def test_a_model_is_exported_and_published(good, hub):
    push_to_hub(load_encoder(good), "me/encoder", license="mit", token="hf_secret")
    assert hub.files.keys() == {"README.md", "config.json", "lfs"}


def test_a_folder_is_published_with_a_licence_and_undamaged_only(good, tmp_path, hub):
    encoder = load_encoder(good)
    with pytest.raises(ValueError, match="no export in the format timm"): push_to_hub(tmp_path, "me/encoder")
    export_encoder(encoder, tmp_path)
    with pytest.raises(ValueError, match="names no licence"): push_to_hub(tmp_path, "me/encoder", token="hf_secret")
    with pytest.raises(ValueError, match="names no licence"): push_to_hub(encoder, "me/encoder", token="hf_secret")
    with pytest.raises(ValueError, match="change it there"): push_to_hub(tmp_path, "me/encoder", license="mit")
    card = tmp_path/"README.md"
    card.write_text(card.read_text().replace('license: "unknown"', "license: cc-by-4.0"))
    for name in ("encoder", "a/b/c", "../x", "a/b c", ""):
        with pytest.raises(ValueError, match="repo_id must be"): push_to_hub(tmp_path, name)
    assert hub.got == []
    push_to_hub(tmp_path, "me/encoder", token="hf_secret")   # the card may be edited
    (tmp_path/"model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.safetensors was changed"): push_to_hub(tmp_path, "me/encoder")


@pytest.mark.parametrize("place", ["/create", "/preupload/", "/put/", "/commit/"])
def test_a_refusal_of_the_hub_is_one_error(good, tmp_path, hub, place):
    export_encoder(load_encoder(good), tmp_path, license="mit")
    before, hub.refuse = snapshot(tmp_path), place
    with pytest.raises(OSError, match="me/encoder was not updated.*files in the folder are complete"):
        push_to_hub(tmp_path, "me/encoder", token="hf_secret")
    assert snapshot(tmp_path) == before and not any(k.endswith(".json") for k in hub.files)


def test_one_public_function_does_the_exports():
    assert set(export.__all__) == {"export_timm", "export_encoder", "push_to_hub"}


# With the whitening that an encoder remembers

@pytest.fixture(scope="module")
def whitened():
    "An encoder that remembers a whitening of its representations, averaged over the mirror image; and images"
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    x = torch.randint(0, 256, (120, 3, 40, 40), dtype=torch.uint8)
    encoder.train()(x[:64]/255)
    encoder.clean_pipeline = restore_input(dict(size=[32, 32], stats=[[.4, .5, .6], [.2, .3, .25]]))
    encode(encoder, x, size=40, tta="flip", whiten="fit")
    return encoder, x


def test_whitened_graphs_give_what_encode_gives(whitened, tmp_path):
    encoder, x = whitened
    expected = encode(encoder, x[:5], whiten=True)[0]
    table = export_encoder(encoder, tmp_path/"out", "onnx-uint8,pt2", whiten=True)
    assert table["largest difference"].max() < 1e-4
    x = x[:5]/255
    program = torch.export.load(str(tmp_path/"out/encoder.pt2")).module()
    session = onnxruntime.InferenceSession(tmp_path/"out/encoder_uint8.onnx")
    normalised = encoder.clean_pipeline.fs[-1](TensorImage(x)).as_subclass(torch.Tensor)
    got = program(normalised).detach(), torch.from_numpy(session.run(["h"], {"x": (255*x).round().byte().numpy()})[0])
    for h in got: torch.testing.assert_close(h, expected, rtol=0, atol=1e-3*float(expected.abs().max()))


@pytest.mark.parametrize("formats, kwargs, words", [
    ("timm", {}, "leave out timm"), ("onnx,code", {}, "leave out code"), ("pt2", dict(size=32), "leave size out")])
def test_what_no_graph_can_whiten_is_refused(whitened, formats, kwargs, words, tmp_path):
    encoder, x = whitened
    with pytest.raises(ValueError, match=words): export_encoder(encoder, tmp_path/"out", formats, whiten=True, **kwargs)
    other = copy.deepcopy(encoder)
    other.whitening = None
    exported = partial(export_encoder, other, tmp_path/"out", "pt2", whiten=True)
    with pytest.raises(ValueError, match="remembers no whitening"): exported()
    encode(other, x[:100], tta=("flip", "crops"), whiten="fit")
    with pytest.raises(ValueError, match="mirror image only"): exported()
    assert not (tmp_path/"out").exists()
