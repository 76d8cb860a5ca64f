"Checkpoint files of other projects: recognised, loaded strictly, reported; hostile and broken ones refused"
import collections
import copy
import gzip
import importlib
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import layouts
import pytest
import torch
import torchvision
from layouts import LAYOUTS, importable
from safetensors.torch import save_file
from torch import nn

from self_supervised_bt import formats
from self_supervised_bt.barlow_twins import create_barlow_twins_model
from self_supervised_bt.export import export_timm
from self_supervised_bt.formats import SOURCES, open_checkpoint, read_weights
from self_supervised_bt.layers import STEMS, create_encoder
from self_supervised_bt.weights import load_encoder, save_encoder


def same(a, b): return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def read(made, **kwargs):
    "The networks, without the warning about images of unknown normalisation"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="size and normalisation of the images")
        if made.call.get("arch") == "timm/resnet18":
            warnings.filterwarnings("ignore", message="names do not tell whether averages or maxima")
        return read_weights(made.path, **({"source": made.source} if made.source else {}), **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_of_a_layout_equal_those_of_its_source(layout, tmp_path):
    "Strictly loaded: representations, embeddings and logits as of the networks that were saved"
    made = LAYOUTS[layout](tmp_path)
    state = torch.get_rng_state()
    loaded = read(made)
    assert torch.equal(torch.get_rng_state(), state), "reading a file must not use random numbers"
    assert made.format in loaded.format and made.call.items() <= loaded.encoder.created_by.items()
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        h = made.encoder(x)
        assert same(loaded.encoder(x), h) and not loaded.encoder.training
        for part, given in (("projector", h), ("head", h), ("predictor", torch.rand(2, 16))):
            theirs, ours = getattr(made, part), getattr(loaded, part)
            assert (theirs is None) == (ours is None)
            if theirs is not None: assert same(ours(given), theirs(given)) and not ours.training
    weights = loaded.report[loaded.report.part != "run"]
    assert weights["keys"].sum() == made.keys, str(loaded)
    assert weights[weights.use == "ignored"]["keys"].sum() == made.ignored, str(loaded)
    assert loaded.classes == made.classes
    sized, normalised = (list(loaded.encoder.clean_pipeline.fs) + [None, None])[:2]
    assert (sized.size if sized else None) == (made.size and (made.size, made.size))
    if made.stats: assert same(torch.stack([normalised.mean[0, 0], normalised.std[0, 0]]).flatten(),
                               torch.tensor(made.stats))


# Hostile and broken files

def touch(path): Path(path).write_text("executed")


class Runs:
    "A pickle of it calls a function when it is opened"
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


class Builds:
    "The same through __setstate__ of a class of someone else"
    def __init__(self, cls, state): self.cls, self.state = cls, state
    def __reduce__(self): return self.cls, (), self.state


WEIGHTS = {"conv1.weight": torch.ones(2, 2)}
NUMBERS = {"w": torch.arange(5.)}


def hostile(function, *args, old=False, wrap=lambda o: {"epoch": o, "state_dict": WEIGHTS}):
    "A checkpoint beside whose weights a function is called"
    def write(path, witness):
        call = [str(a).replace("WITNESS", str(witness)) for a in args]
        torch.save(wrap(Runs(function, *call)), path, _use_new_zipfile_serialization=not old)
    return write


def replaced(path, program):
    "A checkpoint whose pickled part is `program`"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as old: records = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items(): new.writestr(name, program if name.endswith("data.pkl") else data)


def program(start, argument=None):
    "A checkpoint whose pickled part calls what `start` names, perhaps with an argument"
    def write(path, witness):
        args = b")" if argument is None else string(argument.replace("WITNESS", str(witness)).encode()) + b"\x85"
        replaced(path, b"\x80\x02" + start + args + b"R.")
    return write


def string(text): return b"X" + len(text).to_bytes(4, "little") + text


def evil_module(path, witness):
    "A class of a module that runs something when it is imported"
    folder = path.parent/"importable"
    folder.mkdir()
    (folder/"evil_module.py").write_text(f"open({str(witness)!r}, 'w').close()\nclass Settings: pass\n")
    torch.save(WEIGHTS, path)
    replaced(path, b"\x80\x02}q\x00" + string(b"args") + b"cevil_module\nSettings\n)\x81s.")


def plain_pickle(path, witness): path.write_bytes(pickle.dumps(Runs(os.system, f"touch {witness}"), protocol=2))


def whole_model(path, witness): torch.save(nn.Sequential(nn.Linear(2, 2)), path)


def torchscript(path, witness):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)


def bomb(path, witness):
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(30_000_000))


def twice(path, witness):
    torch.save(WEIGHTS, path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(f"{path.stem}/data.pkl", b"\x80\x02.")


def expanded(path, witness):
    "A tensor of 10^12 numbers, all of them one"
    torch.save({"conv1.weight": torch.ones(1).expand(10**6, 10**6)}, path)


HOSTILE = {
    "os.system": (hostile(os.system, "touch WITNESS"), "posix.system, which could run code"),
    "os.system, old format": (hostile(os.system, "touch WITNESS", old=True), "posix.system, which could run code"),
    "os.system among weights": (hostile(os.system, "touch WITNESS", wrap=lambda o: {"conv1.weight": o}), "could run"),
    "subprocess": (hostile(subprocess.check_call, "touch", "WITNESS"), "subprocess.check_call, which could run code"),
    "eval": (hostile(eval, "open('WITNESS', 'w')"), "builtins.eval, which could run code"),
    "exec": (hostile(exec, "open('WITNESS', 'w')"), "could run code"),
    "eval of Python 2": (program(b"c__builtin__\neval\n", "open('WITNESS', 'w')"), "eval, which could run code"),
    "open": (hostile(open, "WITNESS", "w"), "could run code"),
    "__import__": (hostile(__import__, "evil_module"), "could run code"),
    "runpy": (hostile(runpy.run_path, "WITNESS"), "runpy.run_path, which could run code"),
    "shutil.rmtree": (hostile(shutil.rmtree, "WITNESS"), "shutil.rmtree, which could run code"),
    "importlib": (hostile(importlib.import_module, "evil_module"), "could run code"),
    "numpy's runstring": (program(b"cnumpy.testing._private.utils\nrunstring\n", "open('WITNESS', 'w')"),
                          "could run code"),
    "torch.hub.load": (hostile(torch.hub.load, "someone/evil", "model"), "torch.hub.load, which could run code"),
    "getattr of os": (program(b"cbuiltins\ngetattr\ncos\nsystem\n" + string(b"__call__") + b"\x86R", "touch WITNESS"),
                      "os.system, which could run code"),
    "nt.system": (program(b"cnt\nsystem\n", "touch WITNESS"), "could run code"),
    "a later protocol": (lambda p, w: torch.save({"a": Runs(touch, w)}, p, pickle_protocol=4), "STACK_GLOBAL"),
    "an instance by INST": (program(b"(ios\nsystem\n"), "INST"),
    "a class that must not be imported": (evil_module, "no weights"),
    "a pickle of Python": (plain_pickle, "would run what it says"),
    "a whole model": (whole_model, "whole pickled model"),
    "TorchScript": (torchscript, "torch.jit.load"),
    "an archive that fills the memory": (bomb, "unpack to"),
    "a record twice": (twice, "twice"),
    "a tensor that fills the memory": (expanded, "more than there are in the file")}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_run_nothing(name, tmp_path, monkeypatch):
    write, words = HOSTILE[name]
    path, witness = tmp_path/"model.pth", tmp_path/"witness"
    write(path, witness)
    monkeypatch.syspath_prepend(tmp_path/"importable")
    assert not witness.exists()
    with pytest.raises(ValueError) as e: read_weights(path)
    assert words in str(e.value) and str(path) in str(e.value) and "weights_only" not in str(e.value)
    assert not witness.exists() and "evil_module" not in sys.modules
    everything = "".join(traceback.format_exception(e.value))
    assert "weights_only=False" not in everything, "PyTorch's advice to switch its protection off"


def cut(n, save=torch.save):
    def write(path):
        save({"conv1.weight": torch.rand(64, 64)}, path)
        path.write_bytes(path.read_bytes()[:n])
    return write


def old(o, path): torch.save(o, path, _use_new_zipfile_serialization=False)
def text(content): return lambda path: path.write_bytes(content)
def saved(o): return lambda path: torch.save(o, path)


def archive(name):
    def write(path):
        with zipfile.ZipFile(path, "w") as f: f.writestr(name, "x")
    return write


LOOP = {"trunk": {}}
LOOP["trunk"]["again"] = LOOP
BROKEN = {
    "empty": (text(b""), "empty"),
    "page of an error": (text(b"\n<!DOCTYPE html><html>404</html>"), "a page of HTML"),
    "page with a byte order mark": (text(b"\xef\xbb\xbf<html>"), "a page of HTML"),
    "pointer of Git LFS": (text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x"*100)), "gzip"),
    "text": (text(b"epoch,loss\n1,2\n"), "epoch,loss"),
    "JSON": (text(b'{"message": "Not Found"}'), "a text that begins"),
    "zstd": (text(b"\x28\xb5\x2f\xfd" + bytes(50)), "zstd"), "HDF5": (text(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "picture": (text(b"\x89PNG\r\n\x1a\n"), "PNG"), "ONNX": (text(b"\x08\x08\x12\x07pytorch"), "ONNX"),
    "zeros": (text(bytes(1000)), "no checkpoint"),
    "noise": (text(bytes(range(255, 0, -1))), "no checkpoint"),
    "half a download": (cut(9000), "the beginning of a checkpoint"), "a few bytes": (cut(5), "the beginning"),
    "half a download, old format": (cut(9000, old), "get it again"), "its first bytes": (cut(12, old), "get it again"),
    "half of safetensors": (cut(9000, save_file), "a damaged safetensors"),
    "beginning of safetensors": (cut(40, save_file), "the beginning of a safetensors"),
    "zip of pictures": (archive("a.png"), "zip archive"), "NumPy": (archive("a.npy"), "arrays of NumPy"),
    "torch.export": (archive("m/archive_format"), "torch.export"),
    "zip without tensors": (archive("a/data.pkl"), "get it again"),
    "a number": (saved(3), "a int instead"), "a list": (saved([torch.ones(2)]), "a list instead"),
    "no weights": (saved({"epoch": 1, "args": "x"}), "'epoch', 'args'"),
    "one tensor": (saved(torch.ones(3)), "no ResNet"),
    "no dict in it": (saved({"state_dict": [1]}), "no weights that are known"),
    "an optimizer": (saved({"optimizer": {"state": {0: {"mu": torch.ones(1)}}}}), "no weights that are known"),
    "head alone": (saved({"fc.weight": torch.ones(3, 5), "fc.bias": torch.ones(3)}), "no encoder"),
    "head of mmpretrain alone": (saved({"state_dict": {"head.fc.weight": torch.ones(3, 5)}}), "no encoder"),
    "projector alone": (saved({"projector.0.weight": torch.ones(3, 5)}), "no encoder"),
    "no ResNet": (saved({"blocks.0.attn.qkv.weight": torch.ones(3, 5)}), "blocks.0.attn.qkv.weight (3, 5)"),
    "a tensor on no device": (saved({"conv1.weight": torch.ones(3, 5, device="meta")}), "without numbers"),
    "sparse": (saved({"conv1.weight": torch.eye(3).to_sparse()}), "sparse"),
    "a number as the head": (saved({"conv1.weight": torch.ones(1), "fc.weight": torch.tensor(1.)}), "no ResNet"),
    "xresnet of no shape": (saved({"0.0.weight": torch.ones(1), "4.0.convpath.0.0.weight": torch.ones(1)}), "xresnets"),
    "xresnet with a name": (saved({"a.convpath.0": torch.ones(1)}), "xresnets"),
    "a long name": (saved({"."*1000: torch.ones(1)}), "a name of 1,000 characters"),
    "a dict in itself": (lambda path: torch.save({"model": LOOP}, path), "no weights that are known"),
    "one name twice": (saved({"module.conv1.weight": torch.ones(1), "conv1.weight": torch.ones(1)}), "twice")}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_for_what_they_are(name, tmp_path):
    write, words = BROKEN[name]
    write(tmp_path/"resnet50.pth")
    with pytest.raises(ValueError) as e: read_weights(tmp_path/"resnet50.pth")
    assert words in str(e.value) and "resnet50.pth" in str(e.value) and "weights_only" not in str(e.value)


def test_a_stand_in_for_getattr_gets_no_attribute(tmp_path):
    "mmengine's logs hold it: its result is as inert as any other"
    path = tmp_path/"log.pth"
    replaced(path, b"\x80\x02}" + string(b"log") + b"cbuiltins\ngetattr\ncbuiltins\ndict\n" + string(b"fromkeys") +
             b"\x86Rs.")
    log = open_checkpoint(path)["log"]
    assert type(log).__name__ == "getattr" and type(log) is not type(getattr) and not callable(log)


def test_classes_that_were_allowed_elsewhere_are_not_made(tmp_path):
    "A class that someone added to PyTorch's list is not run either, and the list is as before"
    made = []
    class Loud:
        def __init__(self): pass
        def __setstate__(self, state): made.append(state)
    with importable(**{"loud.Loud": Loud}):
        loud = Loud()
        loud.volume = 11
        torch.save({"state_dict": NUMBERS, "loud": loud}, tmp_path/"w.pth")
        with torch.serialization.safe_globals([Loud]):
            before = torch.serialization.get_safe_globals()
            opened = open_checkpoint(tmp_path/"w.pth")
            assert set(torch.serialization.get_safe_globals()) == set(before)
    assert made == [] and type(opened["loud"]) is not Loud and opened["loud"].state == {"volume": 11}
    assert torch.equal(opened["state_dict"]["w"], NUMBERS["w"])


def test_a_large_file_is_mapped_and_networks_keep_nothing_of_it(tmp_path):
    made = layouts.plain(tmp_path)
    opened, loaded, content = open_checkpoint(made.path), read(made), made.path.read_bytes()
    with open(made.path, "r+b") as f: f.write(bytes(len(content)))
    assert opened["layer4.1.conv2.weight"].abs().max() == 0, "it should not have been read yet"
    made.path.write_bytes(content)
    assert torch.equal(loaded.encoder.layer4[1].conv2.weight, made.encoder.layer4[1].conv2.weight)


def test_a_compressed_file_is_unpacked_instead(tmp_path):
    torch.save(NUMBERS, tmp_path/"stored.pth")
    with zipfile.ZipFile(tmp_path/"stored.pth") as f: records = {i.filename: f.read(i) for i in f.infolist()}
    with zipfile.ZipFile(tmp_path/"w.pth", "w", zipfile.ZIP_DEFLATED) as f:
        for name, data in records.items(): f.writestr(name, data)
    assert torch.equal(open_checkpoint(tmp_path/"w.pth")["w"], NUMBERS["w"])



@pytest.mark.parametrize("base", [dict, list, collections.OrderedDict])
@pytest.mark.parametrize("checks", [True, False], ids=["checked by PyTorch", "not checked, as in PyTorch 2.5"])
def test_classes_that_are_dicts_or_lists_open_as_plain_ones(base, checks, tmp_path, monkeypatch):
    unpickler = torch._weights_only_unpickler.Unpickler
    if not checks: monkeypatch.setattr(unpickler, "_check_set_item_target", lambda *args: None, raising=False)
    class Settings(base): pass
    content = Settings({"a": 1}) if issubclass(base, dict) else Settings([1, 2])
    with importable(**{"someones.settings.Settings": Settings}): torch.save({"settings": content}, tmp_path/"w.pth")
    opened = open_checkpoint(tmp_path/"w.pth")["settings"]
    assert opened == ({"a": 1} if issubclass(base, dict) else [1, 2]) and type(opened) is not Settings


# Which network it is

@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
                                  "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"])
def test_architecture_from_names_and_shapes(arch):
    with torch.device("meta"): weights = torchvision.models.get_model(arch, weights=None).state_dict()
    assert formats._resnet_name(weights) == arch


@pytest.mark.parametrize("change", ["wider", "another depth", "no layer4"])
def test_other_resnets_are_not_guessed(change, tmp_path):
    block = torchvision.models.resnet.BasicBlock
    depths = [2, 2, 2, 1] if change == "another depth" else [2, 2, 2, 2]
    net = torchvision.models.ResNet(block, depths)
    if change == "wider": net.layer1[0].conv1 = nn.Conv2d(64, 96, 3, bias=False)
    weights = {k: v for k, v in net.state_dict().items() if not (change == "no layer4" and k.startswith("layer4"))}
    torch.save(weights, tmp_path/"w.pth")
    with pytest.raises(ValueError, match="encoder="): read_weights(tmp_path/"w.pth")


def test_grey_images(tmp_path):
    net = copy.deepcopy(layouts.trunk())
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    torch.save({"state_dict": layouts.under("backbone.", net), "author": "MMSelfSup"}, tmp_path/"w.pth")
    with pytest.warns(UserWarning, match="size and normalisation"): loaded = read_weights(tmp_path/"w.pth")
    x = torch.rand(2, 1, 40, 40)
    with torch.no_grad(): assert same(loaded.encoder(x), net.eval()(x))


@pytest.mark.parametrize("source", ["solo-learn/cifar10", "mix-bt/stl10", None])
def test_a_3x3_convolution_needs_a_source(source, tmp_path):
    "Its padding, and whether a max-pool follows, are not among names and shapes"
    net = layouts.trunk(18, (2, False))
    torch.save(net.state_dict(), tmp_path/"w.pth")
    if source is None:
        with pytest.raises(ValueError, match="source=.*solo-learn/cifar10.*small_stem=True"):
            read_weights(tmp_path/"w.pth")
    else:
        encoder = read_weights(tmp_path/"w.pth", source=source).encoder
        assert encoder.created_by["small_stem"] == {"s": "padding 2", "m": "keep pool"}[source[0]]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        if source == "solo-learn/cifar10": assert same(encoder(x), net(x))


def test_solo_learn_without_its_settings_asks_for_them(tmp_path):
    made = layouts.solo(tmp_path)
    (tmp_path/"args.json").unlink()
    with pytest.raises(ValueError, match="args.json"): read_weights(made.path)
    (tmp_path/"args.json").write_text("no JSON")
    with pytest.raises(ValueError, match="args.json"): read_weights(made.path)


@pytest.mark.parametrize("layout,source,words", [
    ("mix-bt cifar", "mix-bt/stl10", "no max-pool follows"), ("mix-bt cifar", "solo-learn/cifar10", "leave source="),
    ("solo-learn cifar10", "solo-learn/cifar100", "leave source= out"), ("mmselfsup 0.x", "vicreg/imagenet", "leave"),
    ("lightly", "facebookresearch/imagenet", "leave source= out"), ("torchvision", "mix-bt/cifar10", "7x7"),
    ("torchvision", "imagenet", "source must be one of facebookresearch/imagenet"),
    ("torchvision", 3, "source must be one of")])
def test_a_source_that_contradicts_the_file_is_refused(layout, source, words, tmp_path):
    path = LAYOUTS[layout](tmp_path).path
    with pytest.raises(ValueError, match=words): read_weights(path, source=source)


def test_linear_evaluations_of_mix_bt_and_the_authors_look_the_same(tmp_path):
    made = layouts.authors_linear(tmp_path)
    for source in ("mix-bt/imagenet", "facebookresearch/imagenet"):
        assert read_weights(made.path, source=source).classes == made.classes


def test_every_source_is_complete():
    for name, source in SOURCES.items():
        assert source.size in (32, 64, 96, 224) and len(source.mean) == len(source.std) == 3, name
        assert source.stem in STEMS and source.imagenet == (name.endswith("/imagenet"))


def test_names_do_not_tell_whose_backbone_it_is(tmp_path):
    "Those of VICReg and Barlow Twins are the same"
    made = layouts.authors_backbone(tmp_path)
    with pytest.warns(UserWarning, match="facebookresearch/imagenet"): loaded = read_weights(made.path)
    assert "VICReg" in str(loaded) and "facebookresearch/barlowtwins" in str(loaded)
    assert set(loaded.report[loaded.report.use == "unknown"].part) == {"origin", "input"}
    assert list(loaded.encoder.clean_pipeline.fs) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = read_weights(made.path, source="vicreg/imagenet")
    assert "vicreg" in named.format and "unknown" not in str(named)


# Strictness

def changed(made, change):
    "The file with its weights changed"
    content = torch.load(made.path, weights_only=True)
    change(content)
    torch.save(content, made.path)
    return made.path


NAN = float("nan")
CHANGES = {
    "a weight is missing": (lambda w: w.pop("layer2.1.bn1.bias"), "layer2.1.bn1.bias is missing"),
    "a counter is missing": (lambda w: w.pop("bn1.num_batches_tracked"), "bn1.num_batches_tracked is missing"),
    "a weight too many": (lambda w: w.update({"layer1.0.se.weight": torch.ones(2)}), "layer1.0.se.weight is not part"),
    "another shape": (lambda w: w.update({"bn1.bias": torch.ones(2)}), "bn1.bias is"),
    "NaN": (lambda w: w["layer3.0.conv1.weight"][0, 0].fill_(NAN), "layer3.0.conv1.weight holds NaN"),
    "infinite": (lambda w: w["bn1.running_var"].fill_(float("inf")), "bn1.running_var holds NaN or infinite"),
    "integers": (lambda w: w.update({"bn1.bias": torch.ones(64, dtype=torch.int8)}), "torch.int8"),
    "a head for another width": (lambda w: w.update({"fc.weight": torch.ones(5, 99)}), "width 99"),
    "a number for conv1": (lambda w: w.update({"conv1.weight": torch.tensor(1.)}), "no ResNet"),
    "a number for a convolution": (lambda w: w.update({"layer1.0.conv1.weight": torch.tensor(1.)}), "no ResNet"),
    "a number for a norm": (lambda w: w.update({"bn1.running_mean": torch.tensor(1.)}), "bn1.running_mean is ()"),
    "no tensor among them": (lambda w: w.update({"bn1.bias": 3}), "bn1.bias is missing")}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_loaded_by_halves(change, tmp_path):
    function, words = CHANGES[change]
    path = changed(layouts.plain(tmp_path), function)
    own = copy.deepcopy(layouts.trunk())
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match=re.escape(words)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_weights(path)
    if change in ("a weight too many", "a head for another width"): return   # the given network needs neither
    words = "." if "a number" in change else words
    with pytest.raises(ValueError, match=words if words == "." else re.escape(words)): read_weights(path, encoder=own)
    assert all(torch.equal(t, before[name]) for name, t in own.state_dict().items())


def test_a_projector_for_another_encoder_is_refused(tmp_path):
    def wider(content): content["model"]["module.projector.0.weight"] = torch.ones(48, 2048)
    path = changed(layouts.authors_full(tmp_path), wider)
    words = "projector takes representations of width 2048, and those of the encoder have 512"
    with pytest.raises(ValueError, match=words): read_weights(path)


def test_a_projector_whose_layers_do_not_fit_is_refused(tmp_path):
    def broken(content): content["model"]["module.projector.3.weight"] = torch.ones(48, 50)
    path = changed(layouts.authors_full(tmp_path), broken)
    with pytest.raises(ValueError, match="48 outputs before one of 50 inputs"): read_weights(path)


def test_a_projector_of_other_layers_is_ignored_with_the_reason(tmp_path):
    def other(content): content["model"]["module.projector.2.weight"] = torch.ones(2, 2, 2)
    loaded = read_weights(changed(layouts.authors_full(tmp_path), other))
    assert loaded.projector is None
    assert "no chain of linear layers" in loaded.report[loaded.report.part == "projector"].why.item()


def test_parts_that_nobody_knows_are_reported(tmp_path):
    def more(content): content["model"]["module.decoder.weight"] = torch.ones(2)
    loaded = read_weights(changed(layouts.authors_full(tmp_path), more))
    row = loaded.report[loaded.report.part == "decoder"].iloc[0]
    assert (row["keys"], row["use"]) == (1, "ignored")


def test_half_precision_becomes_float32(tmp_path):
    made = layouts.plain(tmp_path)
    weights = layouts.trunk().state_dict()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, made.path)
    loaded = read(made)
    assert loaded.encoder.conv1.weight.dtype == torch.float32 and "from torch.float16" in str(loaded)
    assert torch.equal(loaded.encoder.conv1.weight, layouts.trunk().conv1.weight.half().float())


# encoder=

def test_an_encoder_of_ones_own_is_filled_from_any_layout(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save({"net": 1, "state_dict": {f"module.student.net.{k}": v for k, v in net.state_dict().items()} |
                                        {"module.student.head.weight": torch.ones(2, 4)}}, tmp_path/"w.pth")
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.warns(UserWarning, match="normalisation"): loaded = read_weights(tmp_path/"w.pth", encoder=own)
    assert loaded.encoder is own and torch.equal(own[0].weight, net[0].weight) and not own.training
    weights = loaded.report[loaded.report.part != "run"]
    assert weights["keys"].sum() == 8 and weights[weights.use == "used"]["keys"].sum() == 7


def test_a_whole_classifier_can_be_given(tmp_path):
    made, own = layouts.mm_linear(tmp_path), torchvision.models.resnet18(num_classes=3)
    renamed = changed(made, lambda c: c.update(state_dict={k.replace("head.fc", "fc").removeprefix("backbone."): v
                                                           for k, v in c["state_dict"].items()}))
    with pytest.warns(UserWarning, match="normalisation"): read_weights(renamed, encoder=own)
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad(): assert same(own(x), made.head(made.encoder(x)))


def test_a_projector_that_does_not_fit_the_given_encoder_is_ignored(tmp_path):
    own = create_encoder("resnet18", pretrained=False, pool_type="catavgmax")
    loaded = read_weights(layouts.authors_full(tmp_path).path, encoder=own)
    assert loaded.encoder is own and loaded.projector is None and "width 512" in str(loaded)


def test_a_given_encoder_of_other_names_is_refused(tmp_path):
    made, own = layouts.plain(tmp_path), nn.ModuleDict({"stem": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no weights of the network given"): read_weights(made.path, encoder=own)
    wrong = create_encoder("resnet34", pretrained=False)
    with pytest.raises(ValueError, match="is missing"): read_weights(made.path, encoder=wrong)


def test_a_given_encoder_stays_as_it_is_if_another_part_is_damaged(tmp_path):
    def broken(content): content["model"]["module.projector.3.weight"] = torch.ones(48, 50)
    path, own = changed(layouts.authors_full(tmp_path), broken), copy.deepcopy(layouts.trunk(18))
    nn.init.ones_(own.conv1.weight)
    with pytest.raises(ValueError, match="48 outputs"): read_weights(path, encoder=own)
    assert own.conv1.weight.min() == own.conv1.weight.max() == 1 and not hasattr(own, "clean_pipeline")


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18"])
def test_learn_save_of_this_library_needs_the_encoder_where_names_do_not_tell_the_order(arch, tmp_path):
    "torchvision's ResNets here have maxima first, timm's averages, under the same names"
    theirs = create_encoder(arch, pretrained=False, pool_type="catavgmax").eval()
    model, path = create_barlow_twins_model(theirs, 16, 8).eval(), tmp_path/"learner.pth"
    torch.save({"model": model.state_dict(), "opt": {}}, path)
    with pytest.warns(UserWarning, match="whether averages or maxima come first"): guess = read_weights(path)
    own = create_encoder(arch, pretrained=False, pool_type="catavgmax")
    with pytest.warns(UserWarning, match="normalisation"): told = read_weights(path, encoder=own)
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        assert same(told.projector(told.encoder(x)), model(x))
        assert same(guess.projector(guess.encoder(x)), model(x)) == (arch != "resnet18")


# Files and folders

def test_files_of_this_library(tmp_path):
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    save_encoder(encoder, tmp_path/"e.safetensors")
    loaded = read_weights(tmp_path/"e.safetensors")
    assert loaded.format == "self_supervised_bt" and loaded.projector is None
    assert loaded.report["keys"].sum() == len(encoder.state_dict())
    with pytest.raises(ValueError, match="leave source= out"):
        read_weights(tmp_path/"e.safetensors", source="timm/imagenet")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"): read_weights(tmp_path/"nothing")
    with pytest.raises(ValueError, match="a folder"): read_weights(tmp_path)


CONFIGS = {"[]": "", '{"architecture": 3}': "",
           '{"architecture": "resnet18", "pretrained_cfg": 3, "model_args": []}': "",
           '{"architecture": "hf-hub:evil/model"}': "config.json", '{"architecture": "resnet34"}': "is missing",
           '{"architecture": "resnet18", "pretrained_cfg": {"mean": 1, "std": 2, "input_size": 3}}': "in config.json",
           '{"architecture": "resnet18", "model_args": {"checkpoint_path": "x"}}': "checkpoint_path"}


@pytest.mark.parametrize("config", CONFIGS)
def test_config_json_is_checked(config, tmp_path):
    made = layouts.hugging_face(tmp_path)
    (tmp_path/"config.json").write_text(config)
    if CONFIGS[config]:
        with pytest.raises(ValueError, match=CONFIGS[config]): read(made)
    else: assert same(read(made).encoder.conv1.weight, made.encoder.conv1.weight)


@pytest.mark.parametrize("pools", [{"global_pool": "max"}, {"model_args": {"global_pool": "max"}},
                                   {"model_args": {"global_pool": "max"}, "global_pool": "avg"}])
def test_the_pooling_is_what_timm_builds(pools, tmp_path):
    made = layouts.hugging_face(tmp_path)
    (tmp_path/"config.json").write_text(json.dumps({"architecture": "resnet18", **pools}))
    assert read(made).encoder.created_by["pool_type"] == "max"


def test_solo_learns_stem_survives_files_and_export(tmp_path):
    made = layouts.solo(tmp_path)
    encoder = read_weights(made.path).encoder
    again = load_encoder(save_encoder(encoder, tmp_path/"e.safetensors"))
    code, scope = export_timm(encoder, tmp_path/"timm.safetensors"), {}
    exec(code.replace("'timm.safetensors'", repr(str(tmp_path/"timm.safetensors"))), scope)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for network in (again, scope["model"]): assert same(network(x), made.encoder(x))
    assert again.created_by["small_stem"] == "padding 2" and len(again.clean_pipeline.fs) == 2


def test_moving_averages_beside_the_weights_are_named(tmp_path):
    "timm's training script keeps both; the weights are taken, and the report says what to do for the others"
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    weights = encoder.state_dict()
    averages = {k: t + 1 for k, t in weights.items()}
    torch.save({"state_dict": weights, "state_dict_ema": averages, "epoch": 3}, tmp_path/"checkpoint.pth.tar")
    with pytest.warns(UserWarning, match="normalisation"): loaded = read_weights(tmp_path/"checkpoint.pth.tar")
    assert torch.equal(loaded.encoder.conv1.weight, weights["conv1.weight"])
    row = loaded.report.set_index("part").loc["state_dict_ema"]
    assert row["use"] == "ignored" and row["keys"] == 120 and "moving averages" in row["why"]
    assert loaded.report.set_index("part").loc["run", "why"] == "no weights: epoch"
