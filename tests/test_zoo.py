"Published checkpoints: cards, models, and downloads from a server on this machine that does everything wrong"
import hashlib
import importlib.resources
import json
import os
import pickle
import re
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from conftest import same_output, serving
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as tv

from self_supervised_bt import formats, zoo
from self_supervised_bt.encoder_files import describe_input
from self_supervised_bt.evaluation import encode
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.weights import load_encoder, save_encoder
from self_supervised_bt.zoo import load_weights

root = Path(__file__).parents[1]
NAMES = zoo.list_models()


# Cards

def flops_of(encoder, size):
    "As OpenMMLab counts: multiply-adds of convolutions, and two per value that a BatchNorm gives"
    norms = []
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm2d): m.register_forward_hook(lambda m, x, out: norms.append(2*out.numel()))
    with torch.device("meta"), FlopCounterMode(display=False) as counter: encoder(torch.empty(1, 3, size, size))
    return counter.get_total_flops()//2 + sum(norms)


def network_of(card):
    parts = tuple(card.parts), str(card.projector), card.projector_bias, card.num_classes
    return card.arch, card.stem, card.size, parts


NETWORKS = {network_of(card): card.name for card in zoo.CATALOGUE.values()}   # one name for each


@pytest.mark.parametrize("name", NETWORKS.values())
def test_parameters_and_flops_are_those_of_the_model(name):
    "Counted on the meta device, where weights take no memory"
    model = zoo.get_model(name, device="meta")
    assert not model.training and all(p.is_meta for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_of(model.encoder, model.info.size)
    for card in zoo.CATALOGUE.values():
        if network_of(card) == network_of(model.info): assert (card.parameters, card.flops) == (parameters, flops)


# What the sources say: parameters of their own counts, top-1, digits of the sha256, licence
SOURCES = {
    "resnet50": (23_508_032, 73.5, "cf015f40cc", "MIT"),
    "resnet50_full": (174_535_744, 73.5, "", "MIT"),
    "resnet50_2021-03": (23_508_032, 73.3, "", "CC-BY-NC"),
    "resnet50_2021-12_full": (174_535_744, 73.5, "b3d2bfdffc", "MIT"),
    "barlowtwins_resnet50_8xb256-coslr-300e_in1k": (174_535_744, 71.8, "57307488", "Apache-2.0"),
    "resnet50_barlowtwins-pre_8xb32-linear-coslr-100e_in1k": (25_557_032, 71.8, "52fde35f", "Apache-2.0"),
    "barlowtwins_resnet50_8xb256-coslr-300e_in1k_0.x": (23_508_032, 71.66, "5ae15f89", "Apache-2.0"),
    "barlow_twins_32gpus_4node_imagenet1k_300ep_resnet50": (174_535_744, 70.75, "", "MIT"),
    "barlow_twins_32gpus_4node_imagenet1k_1000ep_resnet50": (174_535_744, 71.8, "", "MIT"),
    "lightly_resnet50_100e_in1k": (23_508_032 + 151_035_904 + 2_049_000, 62.9, "", "MIT"),
    "solo_resnet18_cifar10": (20_625_482, 92.1, "", "MIT"),
    "solo_resnet50_in1k": (67_528_744, 67.18, "", "MIT"),
    "mixbt_resnet18_cifar10": (11_957_312, 92.58, "", "MIT"),
    "mixbt_resnet18_stl10": (11_957_312, 91.02, "97e36848d24a", "MIT"),
    "mixbt_resnet50_tinyimagenet": (25_075_264, 51.84, "", "MIT"),
    "mixbt_resnet50_in1k_300e_reg0.0": (23_508_032, 71.3, "97f4aaa50cf3", "MIT"),
    "mixbt_resnet50_in1k_1000e": (23_508_032, 74.06, "", "MIT"),
    "mixbt_resnet50_in1k_1000e_linear": (25_557_032, 74.06, "", "MIT"),
    "vicreg_resnet50": (23_508_032, 73.2, "c843e7652491", "MIT")}


@pytest.mark.parametrize("name", SOURCES)
def test_cards_say_what_the_sources_say(name):
    card = zoo.model_info(name)
    parameters, top1, sha256, license = SOURCES[name]
    assert (card.parameters, card.accuracy[0]["top1"]) == (parameters, top1)
    assert card.sha256.startswith(sha256) and bool(card.sha256) == bool(sha256)
    assert card.license.startswith(license)
    if card.arch == "resnet50" and card.size == 224: assert card.flops == 4_109_364_224   # mmpretrain's metafile


def test_every_card_has_a_source_a_license_and_a_file():
    urls = [c.url for c in zoo.CATALOGUE.values() if c.url]
    assert len(NAMES) == 40 and len(urls) == len(set(urls)) == 26
    for card in zoo.CATALOGUE.values():
        assert card.source.startswith("https://") and card.license and card.facts and card.format and card.recipe
        assert card.accuracy or "accuracy" in card.facts
        assert bool(card.url) != bool(card.no_url)
        assert card.url is None or re.fullmatch(r"https://[\w./%-]+\.(pth|torch|ckpt|safetensors)", card.url), card.url
        digits = re.search(r"-([0-9a-f]{8})\.pth$", card.url or "")   # OpenMMLab's names
        assert not digits or digits[1] == card.sha256[:8]
        for a in card.accuracy: assert a.keys() <= {"data", "protocol", "top1", "top5"} and 0 < a["top1"] < 100
    mix = [n for n in NAMES if n.startswith("mixbt")]
    assert len(mix) == 22 and len([n for n in mix if n.endswith("linear")]) == 7


def test_cards_can_be_read():
    for name in NAMES:
        card = zoo.model_info(name)
        text, table = str(card), card._repr_markdown_()
        for fact in (name, card.license, card.source, card.recipe, card.arch, card.facts):
            assert fact in text and fact in table
        for word in ("None", "[]", "nan"): assert word not in text
        assert (card.url or card.no_url) in text
        assert all(line.startswith("| ") for line in table.splitlines()[4:])
    assert "top-1 / top-5 73.50 / 91.00 %" in str(zoo.model_info("resnet50"))
    assert "cf015f40cc…" in str(zoo.model_info("resnet50"))


def test_names():
    assert NAMES == sorted(NAMES)
    assert zoo.list_models("*8xb256*") == ["barlowtwins_resnet50_8xb256-coslr-300e_in1k",
                                           "barlowtwins_resnet50_8xb256-coslr-300e_in1k_0.x"]
    assert zoo.list_models("nothing*") == []
    tasks = {task: set(zoo.list_models(task=task)) for task in zoo.TASKS}
    assert set(NAMES) == set.union(*tasks.values())
    assert not tasks["encoder"] & (tasks["pretrain"] | tasks["classification"])
    assert "lightly_resnet50_100e_in1k" in tasks["pretrain"] & tasks["classification"]
    assert zoo.model_info("BarlowTwins_ResNet50_8xb256-coslr-300e_IN1k").epochs == 300
    assert zoo.model_info("q03u2xjz_3.0000_8192_1024_imagenet_resnet50.pth").name == "mixbt_resnet50_in1k_300e_reg3.0"
    assert zoo.model_info("4wpu8wmd_resnet50").accuracy[0]["top1"] == 74.06
    tasks = "'encoder', 'pretrain', 'classification'"
    with pytest.raises(ValueError, match=f"task must be one of {tasks}, got 'd'"): zoo.list_models(task="d")


@pytest.mark.parametrize("name, says", [
    ("resnet5", "did you mean resnet50"),
    ("barlowtwins_resnet50_8xb256-coslr-300e", "300e_in1k"),
    ("mixbt_resnet18_cifar", "did you mean mixbt_resnet18_cifar10"), ("vicreg", "did you mean vicreg_resnet50"),
    ("resnet50.pth", "projects publish a file called 'resnet50.pth': pass one of the names resnet50, "),
    ("", "no model called ''"), ("\x00", "no model called"), (None, "name must be a text, got None"),
    (3, "name must be a text, got 3"), ("x"*1000, "no model called")])
def test_unknown_names(name, says):
    with pytest.raises(ValueError) as e: zoo.model_info(name)
    assert says in str(e.value) and len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_another_catalogue(tmp_path):
    "And its mistakes are named"
    file = tmp_path/"ours.toml"
    shared = '[ours]\narch = "resnet18"\nparts = ["encoder"]\ndata = "digits"\nsize = 32\nmean = [0.5]\nstd = [0.5]\n' \
             'parameters = 1\nflops = 1\naccuracy = []\nrecipe = "r"\nlicense = "l"\nsource = "s"\nfacts = "f"\n' \
             'format = "x"\ntitle = "t"\n[ours.models.digits]\n'
    file.write_text(shared + 'url = "https://here/x.pth"\n')
    assert zoo.read_catalogue(file)["digits"].arch == "resnet18"
    for line, says in [('', "there must be a url"), ('url = "u"\ncolour = 1\n', "unknown colour"),
                       ('url = "u"\nsha256 = "XY"\n', "sha256 must be"),
                       ('url = "u"\nparts = ["tail"]\n', "parts must be"),
                       ('url = ', "is not a TOML file")]:
        file.write_text(shared + line)
        with pytest.raises(ValueError, match=re.escape(says)): zoo.read_catalogue(file)
    file.write_text((shared + 'url = "u"\n').replace('license = "l"\n', ""))
    with pytest.raises(ValueError, match="license"): zoo.read_catalogue(file)
    file.write_text(shared.replace("models.digits", 'models."../x"') + 'url = "u"\n')
    with pytest.raises(ValueError, match="a name has no such letters"): zoo.read_catalogue(file)


# Models

SMALL = dict(arch="resnet18", data="digits", size=32, mean=[.4, .5, .6], std=[.2, .3, .4], accuracy=[], recipe="none",
             license="MIT", source="https://localhost", facts="made here", format="test", title="a test", flops=1)


def small_card(name="small", parts=("encoder",), **kwargs):
    "A model of 11 million weights"
    parts = list(parts)
    more = dict(projector=[24, 24, 16]) if "projector" in parts else {}
    if "head" in parts: more["num_classes"] = 10
    values = dict(name=name, parts=parts, parameters=1, no_url="not published")
    return zoo.ZooCard(**{**SMALL, **values, **more, **kwargs})


@pytest.mark.parametrize("parts, width", [(["encoder"], 512), (["encoder", "projector"], 16), (["encoder", "head"], 10),
                                          (["encoder", "projector", "head"], 10)])
def test_a_model_gives_what_it_was_made_for(parts, width):
    model = zoo.build_model(small_card(parts=parts, stem=True))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, width)
        assert torch.equal(model.extract_feat(x), model.encoder(x)) and model.extract_feat(x).shape == (2, 512)
        if "head" in parts: assert torch.equal(model(x), model.head(model.extract_feat(x)))
        elif "projector" in parts: assert torch.equal(model(x), model.projector(model.extract_feat(x)))
    assert not model.training and model.info.name == "small"
    assert model.encoder.conv1.kernel_size == (3, 3) and isinstance(model.encoder.maxpool, nn.Identity)


def test_a_random_model_leaves_the_random_state():
    before = torch.get_rng_state()
    zoo.get_model("mixbt_resnet18_cifar10")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bias, numbers", [(False, 0), (True, 24 + 24 + 16), ("last", 16)])
def test_projectors_have_the_biases_of_their_source(bias, numbers):
    projector = zoo.build_model(small_card(parts=["encoder", "projector"], projector_bias=bias), "meta").projector
    assert [type(m).__name__ for m in projector] == ["Linear", "BatchNorm1d", "ReLU"]*2 + ["Linear"]
    assert sum(m.bias.numel() for m in projector if isinstance(m, nn.Linear) and m.bias is not None) == numbers


def test_the_stems_of_the_sources():
    padded = zoo.get_model("solo_resnet18_cifar10", device="meta").encoder
    assert padded.conv1.padding == (2, 2) and padded.conv1.kernel_size == (3, 3)
    assert isinstance(zoo.get_model("mixbt_resnet18_cifar100", device="meta").encoder.maxpool, nn.Identity)
    kept = zoo.get_model("mixbt_resnet50_stl10", device="meta").encoder
    assert kept.conv1.stride == (1, 1) and isinstance(kept.maxpool, nn.MaxPool2d)


def picture(mode="RGB", size=(300, 220)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name", ["resnet50", "mixbt_resnet18_stl10", "solo_resnet18_cifar10"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_transforms_are_those_of_the_source(name, mode):
    "Compared with torchvision's first transforms, which the sources use"
    card, im = zoo.model_info(name), picture(mode)
    source = tv.Compose([tv.Resize(card.resize or card.size), tv.CenterCrop(card.size), tv.ToTensor(),
                         tv.Normalize(card.mean, card.std)])
    got = zoo.get_model(name, device="meta").transforms(im)
    assert type(got) is torch.Tensor and got.dtype == torch.float32
    torch.testing.assert_close(got, source(im.convert("RGB")), rtol=0, atol=1e-6)


def test_transforms_take_tensors_and_refuse_other_things():
    transforms = zoo.build_model(small_card(), "meta").transforms
    exact = torch.from_numpy(np.array(picture(size=(32, 32)))).permute(2, 0, 1)
    expected = (exact/255 - torch.tensor(SMALL["mean"])[:, None, None])/torch.tensor(SMALL["std"])[:, None, None]
    for x in (exact, exact/255, (exact/255).double()):
        torch.testing.assert_close(transforms(x), expected, rtol=0, atol=1e-5)
    assert transforms(exact[None].repeat(4, 1, 1, 1)).shape == (4, 3, 32, 32)
    assert transforms(exact[:1]).shape == (3, 32, 32)   # grey
    assert torch.equal(pickle.loads(pickle.dumps(transforms))(exact), transforms(exact))   # for workers of a loader
    with pytest.raises(ValueError, match=r"images must be \(C,H,W\)"): transforms(torch.rand(2, 32, 32))
    with pytest.raises(TypeError, match="got str"): transforms("picture.png")


def test_a_model_is_an_encoder_of_this_library(tmp_path):
    model = zoo.build_model(small_card(parts=["encoder", "projector"], stem=True))
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad(): expected = model.extract_feat(model.transforms(images))
    h, _ = encode(model, images)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    encoder = load_encoder(save_encoder(model, tmp_path/"e.safetensors"))
    torch.testing.assert_close(encode(encoder, images)[0], h)
    assert describe_input(encoder.clean_pipeline)["size"] == [32, 32]


def test_names_of_classes():
    names = zoo.get_model("resnet50_barlowtwins-pre_8xb32-linear-coslr-100e_in1k", device="meta").classes
    assert len(names) == 1000 and names[0] == "tench" and names[-1] == "toilet tissue"
    assert zoo.get_model("solo_resnet18_cifar10", device="meta").classes[-1] == "truck"
    assert zoo.get_model("solo_resnet18_in100", device="meta").classes is None
    assert zoo.get_model("resnet50", device="meta").classes is None   # no head


# A server that can do everything wrong

class Server:
    "Files by path, and how they are served"
    def __init__(self):
        self.files, self.asked = {}, []
        self.ranges, self.etag, self.date, self.die_after = True, True, None, None
        self.status, self.type, self.delay, self.length = 200, "application/octet-stream", 0, True
        self.ignore_if_range, self.shift, self.redirects = False, 0, {}

    def validators(self, data):
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        return {"ETag": etag if self.etag is True else self.etag, "Last-Modified": self.date}

    def answer(self, request):
        self.asked.append((request.path, request.headers.get("Range")))
        if request.path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[request.path])
            return request.end_headers()
        data = self.files.get(request.path)
        if data is None or self.status >= 400: return request.send_error(404 if data is None else self.status)
        start, validators = self.start(request, data), self.validators(data)
        if start is None: return request.send_error(416)
        request.send_response(206 if start else 200)
        if start: request.send_header("Content-Range", f"bytes {start}-{len(data)-1}/{len(data)}")
        headers = {"Content-Type": self.type, "Content-Length": str(len(data) - start) if self.length else None}
        for name, value in {**headers, **validators}.items():
            if value: request.send_header(name, value)
        request.end_headers()
        time.sleep(self.delay)
        rest = data[start:]
        request.wfile.write(rest if self.die_after is None else rest[:self.die_after])
        if self.die_after is not None: request.connection.close()

    def start(self, request, data):
        "Byte to begin with; None if there is no such byte"
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not asked or not self.ranges: return 0
        strong = [v for v in self.validators(data).values() if v and not v.startswith("W/")]   # RFC 9110, 13.1.5
        if request.headers.get("If-Range") not in strong and not self.ignore_if_range: return 0
        return int(asked[1]) + self.shift if int(asked[1]) < len(data) else None


@pytest.fixture
def server():
    server = Server()
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self): server.answer(self)
    with serving(Handler) as (http, server.address):
        http.handle_error = lambda *_: None   # of clients that leave in the middle, as some tests do
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A new cache, and no mirror"
    monkeypatch.setenv("SELF_SUPERVISED_BT_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("SELF_SUPERVISED_BT_MIRROR", raising=False)
    return tmp_path/"cache"


@pytest.fixture
def add_card():
    "Cards of this test in the catalogue"
    added = []
    def add(card):
        assert card.name not in zoo.CATALOGUE
        zoo.CATALOGUE[card.name] = card
        added.append(card.name)
        return card
    yield add
    for name in added: del zoo.CATALOGUE[name]


def content(n=3_000_000, seed=0): return np.random.default_rng(seed).bytes(n)
def sha(data): return hashlib.sha256(data).hexdigest()
def left(folder): return sorted(f.name for f in folder.glob("*") if f.suffix != ".lock")
def get(wanted, **kwargs): return zoo.fetch(wanted, progress=False, **kwargs)


def wanted(server, data=None, name="model", path="/models/resnet50.pth", **kwargs):
    if data is not None: server.files[path] = data
    return zoo.Wanted(name, server.address + path, **kwargs)


@pytest.mark.parametrize("length", [True, False], ids=["Content-Length", "no length"])
@pytest.mark.parametrize("known", [0, 8, 64])
def test_a_download_and_its_record(server, cache, known, length):
    data, server.length = content(), length
    file = wanted(server, data, sha256=sha(data)[:known])
    path = get(file)
    assert path.read_bytes() == data and path.name == f"model-{sha(data)[:8]}.pth"
    assert left(cache) == [path.name, "model.json"]
    record = json.loads((cache/"model.json").read_text())
    assert (record["sha256"], record["url"]) == (sha(data), file.url)
    assert get(file) == path and len(server.asked) == 1   # the second time from the cache
    assert get(file, refresh=True) == path and len(server.asked) == 2


def test_a_progress_bar_counts_megabytes(server, cache, monkeypatch):
    seen = []
    def bar(chunks, total, leave):
        seen.append(total)
        return chunks
    monkeypatch.setattr(zoo, "progress_bar", bar)
    data, server.die_after = content(), 1_500_000
    with pytest.raises(ConnectionError): zoo.fetch(wanted(server, data))
    server.die_after = None
    assert zoo.fetch(wanted(server)).read_bytes() == data and seen == [3, 2]   # of 2**20 bytes, the rest is two


def test_two_projects_publish_one_file_name(server, cache, add_card):
    "And so do two addresses without a name"
    a, b = content(seed=1), content(seed=2)
    one, two = wanted(server, a, "barlow", "/a/resnet50.pth"), wanted(server, b, "vicreg", "/b/resnet50.pth")
    assert get(one).read_bytes() == a and get(two).read_bytes() == b and get(one).read_bytes() == a
    one, two = zoo.wanted_url(f"{server.address}/a/resnet50.pth"), zoo.wanted_url(f"{server.address}/b/resnet50.pth")
    assert get(one).read_bytes() == a and get(two).read_bytes() == b and get(one).read_bytes() == a
    assert len(left(cache)) == 8


# Downloads that break off

DATE = "Sat, 01 Jan 2022 00:00:00 GMT"


@pytest.mark.parametrize("etag, date", [(True, None), (None, DATE), ('W/"weak"', DATE)], ids=["ETag", "date", "weak"])
def test_a_download_is_continued(server, cache, etag, date):
    data, server.die_after, server.etag, server.date = content(), 1_234_567, etag, date
    file = wanted(server, data, sha256=sha(data))
    with pytest.raises(ConnectionError, match=r"The same call continues from there, 1\.2 MB are kept"): get(file)
    assert left(cache) == ["model.part", "model.part.json"]
    with pytest.raises(ConnectionError, match="2.5 MB are kept"): get(file)
    server.die_after = None
    assert get(file).read_bytes() == data
    assert [r for _, r in server.asked] == [None, "bytes=1234567-", "bytes=2469134-"]
    assert left(cache) == [f"model-{sha(data)[:8]}.pth", "model.json"]


def test_a_server_without_ranges_starts_again(server, cache):
    data, server.die_after, server.ranges = content(), 1_000_000, False
    file = wanted(server, data, sha256=sha(data))
    with pytest.raises(ConnectionError): get(file)
    server.die_after = None
    assert get(file).read_bytes() == data


def test_without_a_validator_nothing_is_kept(server, cache):
    data, server.die_after, server.etag = content(), 1_000_000, None
    file = wanted(server, data)
    with pytest.raises(ConnectionError) as e: get(file)
    assert "continues" not in str(e.value) and left(cache) == []
    server.die_after = None
    assert get(file).read_bytes() == data and [r for _, r in server.asked] == [None, None]


@pytest.mark.parametrize("ignore_if_range", [False, True], ids=["whole file", "rest of the new file"])
@pytest.mark.parametrize("size", [3_000_000, 3_500_000, 500_000], ids=["same size", "longer", "shorter"])
def test_a_file_that_changed_in_between_is_not_glued_together(server, cache, ignore_if_range, size):
    old, new, server.ignore_if_range = content(seed=1), content(size, seed=2), ignore_if_range
    server.die_after = 1_000_000
    file = wanted(server, old)
    with pytest.raises(ConnectionError): get(file)
    server.die_after, server.files["/models/resnet50.pth"] = None, new
    assert get(file).read_bytes() == new
    assert left(cache) == [f"model-{sha(new)[:8]}.pth", "model.json"]


@pytest.mark.parametrize("shift", [-5, 5])
def test_a_server_that_continues_at_another_place(server, cache, shift):
    data, server.die_after, server.shift = content(), 1_000_000, shift
    file = wanted(server, data)
    with pytest.raises(ConnectionError): get(file)
    server.die_after = None
    assert get(file).read_bytes() == data


def test_a_part_of_another_address_is_not_continued(server, cache):
    a, b = content(seed=1), content(seed=2)
    server.die_after, server.etag, server.date = 1_000_000, None, DATE   # both files have one date
    with pytest.raises(ConnectionError): get(wanted(server, a, path="/a.pth"))
    server.die_after = None
    assert get(wanted(server, b, path="/b.pth")).read_bytes() == b


def test_an_interrupt_leaves_a_part_that_is_continued(server, cache, monkeypatch):
    data, file = content(), None
    file = wanted(server, data)
    def interrupted(chunks, *args):
        yield next(chunks)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(zoo, "_with_bar", interrupted)
        with pytest.raises(KeyboardInterrupt): get(file)
    assert get(file).read_bytes() == data and server.asked[-1][1] == f"bytes={2**20}-"


# Wrong files

def test_a_wrong_hash_is_refused_and_removed(server, cache):
    data = content()
    for expected in ("0"*64, "00000000", sha(data)[:8] + "0"):
        with pytest.raises(ValueError) as e: get(wanted(server, data, sha256=expected))
        assert sha(data) in str(e.value) and expected in str(e.value) and "refused and removed" in str(e.value)
        assert left(cache) == []
    right = get(wanted(server, data))
    server.files["/models/resnet50.pth"] = content(seed=9)   # the source changes the file
    with pytest.raises(ValueError): get(wanted(server, sha256=sha(data)), refresh=True)
    assert get(wanted(server, sha256=sha(data))) == right    # the old one is as it was
    new = get(wanted(server), refresh=True)
    assert new.read_bytes() == content(seed=9) and left(cache) == [new.name, "model.json"]   # without the old one


@pytest.mark.parametrize("text, type, says", [
    (b"<!DOCTYPE html><html>log in</html>", "text/html; charset=utf-8", "answered with a web page"),
    (b"\n <html><body>404</body>", "application/octet-stream", "is a web page"),
    (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "application/xml", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "text/plain", "pointer to a file of Git LFS")])
def test_a_page_is_named_and_nothing_is_kept(server, cache, text, type, says):
    server.type = type
    with pytest.raises(ValueError, match=says): get(wanted(server, text))
    assert left(cache) == []


@pytest.mark.parametrize("status, says", [(404, "moved or removed"), (403, "status 403"), (410, "moved or removed"),
                                          (500, "try again later"), (503, "try again later"), (416, "416")])
def test_refusals_of_a_server(server, cache, status, says):
    file = wanted(server, content())
    server.status = status
    with pytest.raises(ConnectionError, match=says) as e: get(file)
    for help in (file.url, str(cache/"model.pth"), "SELF_SUPERVISED_BT_MIRROR", "pass its path"):
        assert help in str(e.value)
    assert left(cache) == [] and "\n" not in str(e.value)


def test_a_refusal_in_the_middle_keeps_the_part(server, cache):
    data, server.die_after = content(), 1_000_000
    file = wanted(server, data)
    with pytest.raises(ConnectionError): get(file)
    server.status, server.die_after = 503, None
    with pytest.raises(ConnectionError, match="1.0 MB are kept"): get(file)
    server.status = 200
    assert get(file).read_bytes() == data and server.asked[-1][1] == "bytes=1000000-"


def test_far_too_large_a_file(server, cache):
    for server.length in (True, False):
        with pytest.raises(ValueError, match="3 MB, expected were about 0.1|larger than 1 MB"):
            get(wanted(server, content(), size_mb=.1))
        assert left(cache) == []
    assert get(wanted(server, content(), size_mb=2.9)).is_file()


def test_a_full_disk_is_said_before(server, cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), dict(free=10**6)))
    with pytest.raises(OSError, match="needs 3 MB in .*, where 1 MB are free"): get(wanted(server, content()))


def test_a_disk_that_becomes_full(server, cache):
    "As if: this process may not write more than 1 MB to a file"
    import resource
    data, limits = content(), resource.getrlimit(resource.RLIMIT_FSIZE)
    file = wanted(server, data)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written to .*another folder.* The same call continues") as e:
            get(file)
        assert not isinstance(e.value, ConnectionError)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert get(file).read_bytes() == data and server.asked[-1][1]


def test_redirects(server, cache):
    data = content()
    server.files["/real/resnet50.pth"] = data
    server.redirects["/link.pth"] = f"{server.address}/real/resnet50.pth"
    assert get(wanted(server, path="/link.pth")).read_bytes() == data
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/x.pth", "data:text/plain,x"):
        server.redirects["/link.pth"] = place
        with pytest.raises((ValueError, ConnectionError), match="not followed|not allowed"):
            get(wanted(server, name="other", path="/link.pth"))
        assert not list(cache.glob("other*.pth"))
    request = zoo.urllib.request.Request("https://a/x.pth")
    with pytest.raises(ValueError, match="only https addresses"):
        zoo._OnlyHttp().redirect_request(request, None, 302, "", {}, "http://a/x.pth")


def test_a_download_is_continued_behind_a_redirect(server, cache):
    data, server.die_after = content(), 1_000_000
    server.files["/real.pth"], server.redirects["/link.pth"] = data, f"{server.address}/real.pth"
    file = wanted(server, path="/link.pth")
    with pytest.raises(ConnectionError): get(file)
    server.die_after = None
    assert get(file).read_bytes() == data and server.asked[-1] == ("/real.pth", "bytes=1000000-")


@pytest.mark.parametrize("url", ["ftp://somewhere/x.pth", "file:///etc/passwd", "s3://bucket/x.pth", "http:///x.pth",
                                 "HTTPS//://x", "javascript://x"])
def test_only_http_is_downloaded(url, cache):
    with pytest.raises(ValueError, match="only http:// and https:// addresses are downloaded"): load_weights(url)


def test_no_network(cache):
    with pytest.raises(ConnectionError) as e: get(zoo.Wanted("model", "http://127.0.0.1:9/resnet50.pth"))
    for help in ("could not be reached", "http://127.0.0.1:9/resnet50.pth", str(cache/"model.pth"), "MIRROR"):
        assert help in str(e.value)
    assert left(cache) == []


# The cache

def test_a_changed_file_is_noticed_at_every_load(server, cache):
    data = content()
    file = wanted(server, data)
    path = get(file)
    stat = path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))   # one bit, same size and time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="changed since it was downloaded. Pass refresh=True"): get(file)
    assert get(file, refresh=True).read_bytes() == data
    path.unlink()
    assert get(file).read_bytes() == data


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"file": 1, "sha256": 2}', '{"file": "x"}', "\x00"])
def test_a_damaged_record_means_a_new_download(server, cache, text):
    data = content()
    file = wanted(server, data)
    get(file)
    (cache/"model.json").write_text(text)
    assert get(file).read_bytes() == data and len(server.asked) == 2


def test_a_record_points_to_no_other_folder(server, cache, tmp_path):
    data, other = content(), tmp_path/"other.pth"
    other.write_bytes(data)
    file = wanted(server, data)
    get(file)
    about = dict(url=file.url, file=f"../{other.name}", sha256=sha(data))
    (cache/"model.json").write_text(json.dumps(about))
    assert get(file).parent == cache and other.is_file()


def test_a_catalogue_with_a_new_hash_refuses_the_old_file(server, cache):
    get(wanted(server, content()))
    with pytest.raises(ValueError, match="is another file"): get(wanted(server, sha256="0"*64))


def test_a_file_put_there_by_hand(server, cache):
    data = content()
    file = wanted(server, sha256=sha(data)[:8])
    with pytest.raises(ConnectionError) as e: get(file)
    place = Path(re.search(r"put it at (\S+\.pth)", str(e.value))[1])
    place.write_bytes(content(seed=5))
    with pytest.raises(ValueError, match="Remove it, and put the right file there"): get(file)
    place.write_bytes(data)
    assert get(file).name == f"model-{sha(data)[:8]}.pth" and not place.exists()
    nowhere = zoo.Wanted("nowhere", why="removed")
    with pytest.raises(FileNotFoundError, match=r"nowhere has no address \(removed\)"): get(nowhere)
    (cache/"nowhere.pth").write_bytes(data)
    assert get(nowhere).read_bytes() == data


def test_one_process_downloads_and_the_others_wait(server, cache):
    data, server.delay, results = content(), .5, []
    file = wanted(server, data)
    def work():
        with warnings.catch_warnings(record=True): results.append(get(file).read_bytes() == data)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert results == [True]*3 and len(server.asked) == 1


def test_a_lock_is_given_back(server, cache):
    server.status = 500
    with pytest.raises(ConnectionError): get(wanted(server, content()))
    from filelock import FileLock
    with FileLock(cache/"model.lock", timeout=0): pass


def test_a_cache_that_cannot_be_written_to(server, tmp_path, monkeypatch):
    data, place = content(), tmp_path/"a file"
    place.write_text("")
    file = wanted(server, data)
    for folder in (place, place/"deeper", Path("/proc/nothing")):
        monkeypatch.setenv("SELF_SUPERVISED_BT_CACHE", str(folder))
        with pytest.raises(OSError, match="cannot be written to .* choose another folder, \\$SELF_SUPERVISED_BT_CACHE"):
            get(file)
    assert server.asked == []


@contextmanager
def without_the_right_to_write(folder):
    "As another user if this one is root, who may write everywhere"
    folder.chmod(0o555)
    if root_user := os.geteuid() == 0: os.seteuid(65534)
    try: yield
    finally:
        if root_user: os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="rights as on Unix")
def test_a_read_only_cache_can_be_read(server, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("SELF_SUPERVISED_BT_CACHE", folder)
        file = wanted(server, content())
        path = get(file)
        with without_the_right_to_write(Path(folder)):
            assert get(file) == path
            with pytest.raises(OSError, match="cannot be written to"): get(wanted(server, content(), name="other"))
            with pytest.raises(OSError, match="cannot be written to"): get(file, refresh=True)
        assert get(file) == path and len(server.asked) == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("SELF_SUPERVISED_BT_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path/"hub"/"self_supervised_bt"
    monkeypatch.setenv("SELF_SUPERVISED_BT_CACHE", "~/weights")
    assert zoo.cache_folder() == Path.home()/"weights"


# A mirror

def test_a_mirror_is_a_server_or_a_folder(server, cache, tmp_path, monkeypatch):
    data, url = content(), "https://dl.example.org/a/epoch%3D99.ckpt"
    server.files["/mirror/dl.example.org/a/epoch%3D99.ckpt"] = data
    monkeypatch.setenv("SELF_SUPERVISED_BT_MIRROR", f"{server.address}/mirror/")
    assert get(zoo.Wanted("one", url, sha256=sha(data))).read_bytes() == data
    assert json.loads((cache/"one.json").read_text())["url"] == url
    folder = tmp_path/"mirror"
    monkeypatch.setenv("SELF_SUPERVISED_BT_MIRROR", str(folder))
    with pytest.raises(ConnectionError, match="MIRROR has no .*epoch=99.ckpt"): get(zoo.Wanted("two", url))
    (folder/"dl.example.org/a").mkdir(parents=True)
    (folder/"dl.example.org/a/epoch=99.ckpt").write_bytes(data)
    assert get(zoo.Wanted("two", url, sha256=sha(data)[:8])).name == f"two-{sha(data)[:8]}.ckpt"
    with pytest.raises(ValueError, match=r"\(mirror of https://dl.example.org/a/epoch%3D99.ckpt\) is another file"):
        get(zoo.Wanted("three", url, sha256="0"*64))
    assert not list(cache.glob("three*.ckpt")) and len(server.asked) == 1


# Weights

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The encoder of a small model, and its file as the authors would publish it"
    torch.manual_seed(1)
    encoder = create_encoder("resnet18", pretrained=False, pool_type="avg").eval()
    file = tmp_path_factory.mktemp("published")/"resnet50.pth"
    torch.save(encoder.state_dict(), file)
    return encoder, file


@pytest.fixture
def online(published, server, cache, add_card):
    "The same on a server, with a card"
    encoder, file = published
    server.files["/bt/resnet50.pth"] = data = file.read_bytes()
    url = f"{server.address}/bt/resnet50.pth"
    return add_card(small_card("tiny", url=url, no_url=None, sha256=sha(data), size_mb=len(data)/1e6))


def test_weights_by_path_url_and_name(published, online, server):
    encoder, file = published
    for what in (file, str(file), online.url, "tiny", "TINY"):
        source = None if what in ("tiny", "TINY") else "facebookresearch/imagenet"
        loaded = load_weights(what, source=source, progress=False)
        assert same_output(loaded.encoder, encoder)
    assert len(server.asked) == 2   # once by URL, once by name
    loaded = load_weights("tiny")
    assert describe_input(loaded.encoder.clean_pipeline)["size"] == [32, 32]   # the card's
    row = loaded.report[loaded.report.part == "input"]
    assert row.use.item() == "used" and row.why.item().endswith("of tiny")
    own = create_encoder("resnet18", pretrained=False, pool_type="avg").eval()
    assert load_weights("tiny", encoder=own).encoder is own and same_output(own, encoder)


def test_a_file_comes_before_a_name(published, online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"tiny").mkdir()   # a folder is no file
    assert load_weights("tiny", progress=False).encoder
    (tmp_path/"tiny").rmdir()
    (tmp_path/"tiny").write_bytes(published[1].read_bytes()[:1000])
    with pytest.raises(Exception, match="tiny|archive"): load_weights("tiny")


@pytest.mark.parametrize("what, error, says", [
    ("nothing", ValueError, "no file 'nothing', and there is no model called 'nothing'"),
    ("../resnet50", FileNotFoundError, "no file ../resnet50"),
    ("weights/resnet50.pth", FileNotFoundError, "there is no file"),
    (Path("resnet50"), FileNotFoundError, "no file resnet50"),
    ("", ValueError, "pass a file, a URL or a name"), (None, ValueError, "got None"), (3, ValueError, "got 3"),
    ("resnet50_2021-03/../../x", FileNotFoundError, "there is no file"), ("x"*5000, ValueError, "no model called"),
    ("x/"*5000, FileNotFoundError, "there is no file"), ("\x00", ValueError, "no model called"),
    ("~nobody-of-this-name/x.pth", FileNotFoundError, "there is no file ~nobody"), (".", ValueError, "is a folder")])
def test_what_is_no_weights(what, error, says, cache):
    with pytest.raises(error, match=re.escape(says)): load_weights(what)
    assert not cache.exists()


def test_a_folder_is_named(tmp_path, cache):
    with pytest.raises(ValueError, match="is a folder"): load_weights(tmp_path)
    with pytest.raises(IsADirectoryError, match="pass the file in it"): zoo.get_model("resnet50", pretrained=tmp_path)


def test_a_model_with_its_weights(published, online):
    encoder, file = published
    for pretrained in (True, file, str(file), online.url):
        model = zoo.get_model("tiny", pretrained=pretrained, progress=False)
        assert same_output(model, encoder) and not model.training and model.info is online
    assert not same_output(zoo.get_model("tiny"), encoder)


def test_a_file_given_by_path_must_be_the_published_one(published, online, tmp_path):
    torch.save(create_encoder("resnet18", pretrained=False, pool_type="avg").state_dict(), tmp_path/"other.pth")
    with pytest.raises(ValueError) as e: zoo.get_model("tiny", pretrained=tmp_path/"other.pth")
    assert "is not the published file of tiny" in str(e.value) and online.sha256 in str(e.value)
    with pytest.raises(FileNotFoundError, match="there is no file"): zoo.get_model("tiny", pretrained=tmp_path/"no.pth")


def test_options_are_used_or_refused(published, online, server):
    for call in (lambda: load_weights(published[1], refresh=True), lambda: zoo.get_model("tiny", refresh=True),
                 lambda: zoo.get_model("tiny", pretrained=published[1], refresh=True)):
        with pytest.raises(ValueError, match="refresh=True has no effect, nothing is downloaded"): call()
    zoo.get_model("tiny", pretrained=True, progress=False)
    zoo.get_model("tiny", pretrained=True, refresh=True, progress=False)
    load_weights("tiny", refresh=True, progress=False)
    assert len(server.asked) == 3
    for pretrained in (None, 1, torch.nn.Identity()):
        with pytest.raises(ValueError, match="pretrained must be"): zoo.get_model("tiny", pretrained=pretrained)


def test_a_model_without_address_takes_a_path(published, add_card, cache):
    add_card(small_card("removed", no_url="the source removed the file"))
    with pytest.raises(FileNotFoundError, match="the source removed the file"):
        zoo.get_model("removed", pretrained=True)
    assert same_output(zoo.get_model("removed", pretrained=published[1]), published[0])


def test_a_card_of_another_architecture(published, add_card, cache):
    add_card(small_card("wide", arch="resnet34"))
    with pytest.raises(ValueError, match="does not hold the weights of wide"):
        zoo.get_model("wide", pretrained=published[1])


@pytest.mark.parametrize("parts", [["encoder", "projector"], ["encoder", "head"]])
def test_a_file_that_lacks_a_part(published, add_card, cache, parts):
    add_card(small_card("more", parts=parts))
    with pytest.raises(ValueError, match=f"has no {parts[1]}, which more needs"):
        zoo.get_model("more", pretrained=published[1])


@pytest.mark.parametrize("head, says", [((2048, 10), "its head takes 2048 numbers, its encoder gives 512"),
                                        ((512, 7), "its head has 7 classes, two has 10")])
def test_parts_that_do_not_fit_together(published, head, says):
    card = small_card("two", parts=["encoder", "head"])
    loaded = zoo.LoadedWeights("test", published[0], head=nn.Linear(*head))
    with pytest.raises(ValueError, match=says): zoo.check_parts(card, loaded, "file.pth")


def test_a_folder_in_timms_format(tmp_path, cache):
    made = layouts.hugging_face(tmp_path)
    loaded = load_weights(tmp_path)
    x = torch.rand(2, 3, 48, 48)
    with torch.no_grad(): torch.testing.assert_close(loaded.encoder(x), made.encoder(x))
    described = describe_input(loaded.encoder.clean_pipeline)
    save_encoder(loaded.encoder, tmp_path/"e.safetensors")
    again = load_encoder(tmp_path/"e.safetensors")
    assert describe_input(again.clean_pipeline) == described
    torch.testing.assert_close(encode(again, x)[0], encode(loaded.encoder, x)[0])


def test_a_repository_of_hugging_face(tmp_path, cache, monkeypatch):
    "Without the network: what huggingface_hub would bring lies in a folder"
    import huggingface_hub
    made, asked = layouts.hugging_face(tmp_path), []
    def download(repo, file, revision=None, force_download=False):
        asked.append((repo, file, revision, force_download))
        return str(tmp_path/file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load_weights("hf-hub:owner/name@abc")
    x = torch.rand(2, 3, 48, 48)
    with torch.no_grad(): torch.testing.assert_close(loaded.encoder(x), made.encoder(x))
    assert asked == [("owner/name", file, "abc", False) for file in ("config.json", "model.safetensors")]
    load_weights("hf-hub:owner/name", refresh=True)
    assert asked[-1] == ("owner/name", "model.safetensors", None, True)
    errors, down = huggingface_hub.errors, "could not be downloaded"
    for raised, error, says in [(OSError("no network"), ConnectionError, down),
                                (errors.LocalEntryNotFoundError("no network"), ConnectionError, down),
                                (errors.EntryNotFoundError("no such file"), ValueError, "is not in timm's format")]:
        def fails(*args, raised=raised, **kwargs): raise raised
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
        with pytest.raises(error, match=f"hf-hub:owner/name {says}"): load_weights("hf-hub:owner/name")
    for name in ("hf-hub:", "hf-hub:owner", "hf-hub:../../etc/passwd", "hf-hub:a/b/c"):
        with pytest.raises(ValueError, match="expected hf-hub:owner/name"): load_weights(name)


LAYOUTS = {
    "authors, full": (layouts.authors_full, {}), "authors, linear": (layouts.authors_linear, {}),
    "mix-bt, CIFAR": (partial(layouts.mix_small, thop=True), dict(stem=True, read_as="mix-bt/cifar100")),
    "mix-bt, STL": (partial(layouts.mix_small, pool=True), dict(stem="keep pool", read_as="mix-bt/stl10")),
    "mmpretrain": (partial(layouts.mm_pretrain, preprocessor=True), {}), "mmpretrain, linear": (layouts.mm_linear, {}),
    "mmselfsup 0.x": (layouts.mm_old_backbone, {}), "lightly": (layouts.lightly, {}), "VISSL": (layouts.vissl, {}),
    "solo-learn": (layouts.solo, dict(stem="padding 2", read_as="solo-learn/cifar10")),
    "solo-learn without args.json": (partial(layouts.solo, args=False), dict(stem="padding 2"))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_models_from_the_files_of_all_sources(name, tmp_path, add_card, cache):
    "Their outputs are those of the source's own networks"
    make, more = LAYOUTS[name]
    made = make(tmp_path)
    nets = {part: net for part in ("projector", "head") if (net := getattr(made, part)) is not None}
    widths = [m.out_features for m in made.projector if isinstance(m, nn.Linear)] if made.projector else None
    classes = made.head.out_features if made.head else None
    add_card(small_card("made", ["encoder", *nets], **{**dict(projector=widths, num_classes=classes), **more}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = zoo.get_model("made", pretrained=made.path)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        h = made.encoder.eval()(x)
        torch.testing.assert_close(model.extract_feat(x), h, rtol=1e-5, atol=1e-6)
        for part, net in nets.items():
            torch.testing.assert_close(getattr(model, part)(h), net.eval()(h), rtol=1e-5, atol=1e-6)
        top = nets.get("head", nets.get("projector", nn.Identity()))
        torch.testing.assert_close(model(x), top(h), rtol=1e-5, atol=1e-6)
    assert model.classes == made.classes
    assert describe_input(model.encoder.clean_pipeline)["stats"][0] == pytest.approx(SMALL["mean"])   # the card's


def test_a_file_of_another_project(tmp_path, add_card, cache):
    "Which the encoder alone would not tell"
    made = layouts.solo(tmp_path)
    add_card(small_card("mixed", stem="padding 2", read_as="mix-bt/cifar10"))
    with pytest.raises(ValueError, match="does not hold the weights of mixed: .*is of solo-learn"):
        zoo.get_model("mixed", pretrained=made.path)


def test_cards_and_formats_agree_on_images_and_stems():
    for card in zoo.CATALOGUE.values():
        if not card.read_as: continue
        size, mean, std, stem, *_ = formats.SOURCES[card.read_as]
        assert (card.size, card.mean, card.std, card.stem) == (size, [*mean], [*std], stem)


def test_through_torch_hub(monkeypatch, tmp_path):
    model = torch.hub.load(str(root), "barlow_twins", "mixbt_resnet18_cifar10", pretrained=False, source="local")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1024)
    encoder = torch.hub.load(str(root), "resnet50", pretrained=False, source="local")
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 2048) and not hasattr(encoder.fc, "weight")
    torch.save({**encoder.state_dict(), "fc.weight": torch.rand(1000, 2048)}, tmp_path/"resnet50.pth")
    with pytest.raises(ValueError, match="is not the published file of resnet50"):   # strict in the file as well
        torch.hub.load(str(root), "resnet50", pretrained=str(tmp_path/"resnet50.pth"), source="local")


def test_the_catalogue_is_in_the_package():
    files = importlib.resources.files("self_supervised_bt")
    assert zoo.read_catalogue(files/"zoo.toml") == {n: zoo.CATALOGUE[n] for n in zoo.CATALOGUE}
    assert re.search(r'package_data=.*"zoo.toml"', (root/"setup.py").read_text())
