"Files of encoders: what they hold, damaged ones, and a stranger's"
import builtins
import copy
import json
import os
import stat
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from self_supervised_bt.layers import create_encoder
from self_supervised_bt.weights import load_encoder, save_encoder

KEY = "self_supervised_bt"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "The file of a small encoder"
    torch.manual_seed(0)
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    return save_encoder(encoder, tmp_path_factory.mktemp("weights")/"encoder.safetensors")


def about_of(file):
    with safe_open(file, "pt") as f: return json.loads(f.metadata()[KEY])


def changed_file(good, path, text=None, **created_by):
    "The same weights with other text; `None` removes an argument"
    about = about_of(good)
    about["created_by"] = {k: v for k, v in {**about["created_by"], **created_by}.items() if v is not None}
    save_file(load_file(good), path, {KEY: json.dumps(about) if text is None else text})
    return path


def same(a, b, size=32):
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(): return torch.equal(a.eval()(x), b.eval()(x))


# A stranger's file

CALL = dict(arch="timm/test_resnet", n_in=3, pool_type="avg", small_stem=False)
DEEP = "["*100_000
RUNS = "x=None); open('executed', 'w').write('1'); model = timm.create_model('test_resnet') #"
MALFORMED = {
    "empty": "", "no JSON": "{created_by", "cut off": '{"created_by": {"arch": "timm/te', "a number": "1",
    "a list": "[]", "null": "null", "a text": '"resnet18"', "no keys": "{}",
    "deep": DEEP, "no input": '{"created_by": null}',
    "no created_by": '{"input": {}}', "another key": '{"created_by": null, "input": {}, "code": "1"}',
    "bytes": "\x00\x01\ufffd", "long number": "1"*5000}
MALFORMED_CALLS = {
    "a list": [], "a text": "resnet18", "true": True, "empty": {}, "no arch": {k: CALL[k] for k in CALL if k != "arch"},
    "arch is a number": dict(CALL, arch=1), "arch is a list": dict(CALL, arch=["resnet18"]),
    "arch is empty": dict(CALL, arch=""), "unknown arch": dict(CALL, arch="timm/nothing"),
    "arch with code": dict(CALL, arch="test_resnet'); open('executed', 'w') #"),
    "arch with newline": dict(CALL, arch="test_resnet\nopen('executed', 'w')"),
    "arch of the hub": dict(CALL, arch="hf-hub:somebody/model"),
    "arch of the hub with its source": dict(CALL, arch="timm/hf-hub:somebody/model"),
    "arch of a folder with its source": dict(CALL, arch="timm/local-dir:/tmp"),
    "arch of a folder": dict(CALL, arch="local-dir:/tmp"),
    "n_in is a text": dict(CALL, n_in="3"), "n_in is 0": dict(CALL, n_in=0), "n_in is true": dict(CALL, n_in=True),
    "n_in is huge": dict(CALL, n_in=10**30), "n_in is null": dict(CALL, n_in=None),
    "unknown pool": dict(CALL, pool_type="median"), "pool is a list": dict(CALL, pool_type=["avg"]),
    "unknown stem": dict(CALL, small_stem="x"), "stem is a number": dict(CALL, small_stem=1),
    "stem is null": dict(CALL, small_stem=None), "stem of no ResNet": dict(CALL, arch="timm/test_vit", small_stem=True),
    "a name with code": {**CALL, RUNS: None}, "a keyword": {**CALL, "lambda": 1}, "an empty name": {**CALL, "": 1},
    "pretrained": dict(CALL, pretrained=True), "size": dict(CALL, size=16), "classes": dict(CALL, num_classes=10),
    "a checkpoint": dict(CALL, checkpoint_path="weights.pt"),
    "a configuration": dict(CALL, pretrained_cfg={"url": "x"}),
    "an unknown option": dict(CALL, colour=1), "an option of a wrong type": dict(CALL, stem_width="wide"),
    "a huge number": dict(CALL, stem_width=10**9), "infinite": dict(CALL, drop_rate=float("inf")),
    "not a number": dict(CALL, drop_rate=float("nan")), "a long text": dict(CALL, act_layer="x"*10**5),
    "a long list": dict(CALL, channels=[64]*10**5), "a control character": dict(CALL, act_layer="relu\n"),
    "another width": dict(CALL, channels=[8, 8, 8, 8]), "a giant": dict(CALL, arch="timm/vit_gigantic_patch14_224"),
    "a giant of torchvision": dict(CALL, arch="torchvision/regnet_y_128gf"),
    "many layers": dict(CALL, arch="timm/resnet18", layers=[60_000]*4)}
MALFORMED_INPUTS = {
    "a list": [], "null": None, "another key": {"code": "1"}, "size is a text": {"size": "16"},
    "size of one": {"size": [16]},
    "size with code": {"size": ["16\nopen('executed', 'w')", 16]}, "size of 0": {"size": [0, 16]},
    "huge size": {"size": [10**6, 10**6]}, "size is a fraction": {"size": [1.5, 2]}, "stats is a number": {"stats": 1},
    "stats of one": {"stats": [[.5]]}, "no numbers": {"stats": [[], []]}, "deviation of 0": {"stats": [[.5], [0.]]},
    "stats with code": {"stats": [["a\nb"], [1.]]}, "not a number": {"stats": [[float("nan")], [1.]]},
    "two channels": {"stats": [[.5, .5], [1., 1.]]}}
TEXTS = {**{f"text: {k}": v for k, v in MALFORMED.items()},
         **{f"created_by: {k}": json.dumps(dict(created_by=v, input={})) for k, v in MALFORMED_CALLS.items()},
         **{f"input: {k}": json.dumps(dict(created_by=CALL, input=v)) for k, v in MALFORMED_INPUTS.items()}}


@pytest.mark.parametrize("name", TEXTS)
def test_malformed_metadata_is_one_line(good, tmp_path, monkeypatch, name):
    "And nothing is run, downloaded, or built for real"
    monkeypatch.chdir(tmp_path)
    for call in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(call, lambda *a, **k: pytest.fail("reached for the network"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read a pickle"))
    monkeypatch.setattr(builtins, "exec", lambda *a: pytest.fail("ran code"))
    file = changed_file(good, tmp_path/"e.safetensors", TEXTS[name])
    with pytest.raises(ValueError) as e: load_encoder(file)
    assert len(str(e.value).splitlines()) == 1 and str(file) in str(e.value) and len(str(e.value)) < 700
    assert not (tmp_path/"executed").exists()


@pytest.mark.parametrize("weights,words", [
    ({}, "missing"), ({"fc.weight": torch.ones(2)}, "not part of it"),
    ({"conv1.0.weight": torch.ones(2)}, "instead of"),
    ({"bn1.weight": torch.ones(32, dtype=torch.int64)}, "has type")])
def test_weights_that_do_not_fit_are_one_line(good, tmp_path, weights, words):
    tensors = {**load_file(good), **weights} if weights else {"bn1.weight": load_file(good)["bn1.weight"]}
    with safe_open(good, "pt") as f: save_file(tensors, tmp_path/"e.safetensors", f.metadata())
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    for given in (None, encoder):
        with pytest.raises(ValueError, match=words) as e: load_encoder(tmp_path/"e.safetensors", given)
        assert len(str(e.value).splitlines()) == 1


def test_a_damaged_file_is_one_line(good, tmp_path):
    content = good.read_bytes()
    contents = dict(empty=b"", cut=content[:-100], header=b"\xff"*8 + content[8:], zero=bytes(900))
    for name, damaged in contents.items():
        (tmp_path/name).write_bytes(damaged)
        with pytest.raises(ValueError, match="not a safetensors file") as e: load_encoder(tmp_path/name)
        assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("arch", ["torchvision/regnet_y_400mf", "timm/test_vit3"])
def test_shapes_are_known_without_memory(arch):
    "Also of architectures that read values while they are built, as RegNets do"
    from self_supervised_bt.encoder_files import shapes_without_memory
    call = dict(arch=arch, n_in=1, pool_type="avg", small_stem=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = create_encoder(pretrained=False, **call)
    shapes = {k: tuple(t.shape) for k, t in encoder.state_dict().items()}
    assert shapes_without_memory(call, shapes) == shapes


def test_loading_leaves_the_random_state(good):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_encoder(good)
    assert torch.equal(torch.rand(3), expected)


# Encoders that are not plain

def test_file_of_a_compiled_encoder_loads(tmp_path):
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    file = save_encoder(torch.compile(encoder, backend="eager"), tmp_path/"e.safetensors")
    assert load_file(file).keys() == encoder.state_dict().keys()
    assert same(load_encoder(file), encoder)
    again = create_encoder("timm/test_resnet", pretrained=False)
    load_encoder(file, torch.compile(again, backend="eager"))
    assert same(again, encoder)
    part = copy.deepcopy(encoder)
    part.layer1 = torch.compile(part.layer1, backend="eager")
    assert same(load_encoder(save_encoder(part, tmp_path/"part.safetensors")), encoder)
    save_file({f"_orig_mod.{k}": v for k, v in load_file(file).items()}, tmp_path/"older.safetensors",
              {KEY: json.dumps(about_of(file))})
    assert same(load_encoder(tmp_path/"older.safetensors"), encoder)


def test_group_norm_as_an_argument_is_saved_and_read_with_encoder(tmp_path):
    make = partial(create_encoder, "torchvision/resnet18", pretrained=False, norm_layer=partial(nn.GroupNorm, 8))
    encoder = make()
    with pytest.warns(UserWarning, match="norm_layer cannot be saved.*encoder="):
        file = save_encoder(encoder, tmp_path/"e.safetensors")
    with pytest.raises(ValueError, match="encoder="): load_encoder(file)
    assert same(load_encoder(file, make()), encoder)


# What is written where

def test_files_have_the_mode_of_the_umask_and_leave_nothing_beside(good, tmp_path):
    umask = os.umask(0o022)
    try: save_encoder(load_encoder(good), tmp_path/"e.safetensors")
    finally: os.umask(umask)
    assert {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {"e.safetensors": 0o644}


def test_save_encoder_replaces_no_other_kind_of_file(good, tmp_path):
    encoder = load_encoder(good)
    save_file({"a": torch.ones(1)}, tmp_path/"theirs.safetensors")
    (tmp_path/"train.py").write_text("print('mine')\n")
    for name in ("theirs.safetensors", "train.py"):
        before = (tmp_path/name).read_bytes()
        with pytest.raises(FileExistsError, match="another kind of file"): save_encoder(encoder, tmp_path/name)
        assert (tmp_path/name).read_bytes() == before
    (tmp_path/"empty").touch()
    for _ in range(2): assert save_encoder(encoder, tmp_path/"empty") == Path(tmp_path/"empty")


def test_an_encoder_gives_the_same_bytes_each_time(tmp_path):
    "safetensors writes several keys of metadata in any order"
    encoder = create_encoder("timm/test_resnet", pretrained=False)
    files = [save_encoder(encoder, tmp_path/f"{i}.safetensors").read_bytes() for i in range(8)]
    assert len(set(files)) == 1
