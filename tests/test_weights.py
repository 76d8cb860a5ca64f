"Files of encoders: what they hold, damaged ones, and a stranger's"
import builtins
import copy
import json
import os
import stat
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same_output
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet50_Weights

from self_supervised_bt import zoo
from self_supervised_bt.barlow_twins import BarlowTwinsModel, create_barlow_twins_model
from self_supervised_bt.classifiers import classifier_learner
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.encoder_files import restore_input
from self_supervised_bt.evaluation import encode
from self_supervised_bt.folders import labelled_dls
from self_supervised_bt.layers import create_encoder, fit_whitening
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.weights import inference_model, load_encoder, load_model, save_encoder, save_model

KEY = "self_supervised_bt"


def about_of(file):
    with safe_open(file, "pt") as f: return json.loads(f.metadata()[KEY])


def changed_file(good, path, text=None, **created_by):
    "The same weights with other text; `None` removes an argument"
    about = about_of(good)
    about["created_by"] = {k: v for k, v in {**about["created_by"], **created_by}.items() if v is not None}
    save_file(load_file(good), path, {KEY: json.dumps(about) if text is None else text})
    return path


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
        with pytest.raises(ValueError, match="safetensors file|is empty|no checkpoint") as e:
            load_encoder(tmp_path/name)
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
    assert same_output(load_encoder(file), encoder)
    again = create_encoder("timm/test_resnet", pretrained=False)
    load_encoder(file, torch.compile(again, backend="eager"))
    assert same_output(again, encoder)
    part = copy.deepcopy(encoder)
    part.layer1 = torch.compile(part.layer1, backend="eager")
    assert same_output(load_encoder(save_encoder(part, tmp_path/"part.safetensors")), encoder)
    save_file({f"_orig_mod.{k}": v for k, v in load_file(file).items()}, tmp_path/"older.safetensors",
              {KEY: json.dumps(about_of(file))})
    assert same_output(load_encoder(tmp_path/"older.safetensors"), encoder)


def test_group_norm_as_an_argument_is_saved_and_read_with_encoder(tmp_path):
    make = partial(create_encoder, "torchvision/resnet18", pretrained=False, norm_layer=partial(nn.GroupNorm, 8))
    encoder = make()
    with pytest.warns(UserWarning, match="norm_layer cannot be saved.*encoder="):
        file = save_encoder(encoder, tmp_path/"e.safetensors")
    with pytest.raises(ValueError, match="encoder="): load_encoder(file)
    assert same_output(load_encoder(file, make()), encoder)


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


# Models: encoder, projector, predictor, head

def model_with(tmp_path, name="m.safetensors", **kwargs):
    "A model of three networks, and its file"
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    encoder.clean_pipeline = restore_input(dict(size=[32, 32], stats=[[.5]*3, [.25]*3]))
    model = create_barlow_twins_model(encoder, 24, 16, size=32, **kwargs).eval()
    return model, save_model(model, tmp_path/name)


@pytest.mark.parametrize("kwargs", [dict(), dict(predictor=True), dict(bn=False, bias=False), dict(nlayers=1),
                                    dict(nlayers=2, bias="last")])
def test_a_model_comes_back_with_all_its_networks(tmp_path, kwargs):
    model, file = model_with(tmp_path, **kwargs)
    again = load_model(file)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(again(x, paired=True), model(x, paired=True))
    assert not again.training and repr(again.projector) == repr(model.projector)
    assert torch.allclose(again.encoder.clean_pipeline(x), (x - .5)/.25, atol=1e-6)
    with torch.no_grad(): assert torch.equal(load_encoder(file)(x), model.encoder(x))


def test_loading_a_model_leaves_the_random_state(tmp_path):
    file = model_with(tmp_path)[1]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(file)
    assert torch.equal(torch.rand(3), expected)


def test_a_projector_of_the_users_own_is_filled_if_it_is_given(tmp_path):
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    def projector(): return nn.Sequential(nn.Linear(96, 8), nn.GELU(), nn.Linear(8, 4))
    own = projector()
    file = save_model(BarlowTwinsModel(encoder, own), tmp_path/"m.safetensors")
    with pytest.raises(ValueError, match="projector in .* was not built by create_mlp_module.*pass projector="):
        load_model(file)
    again = load_model(file, projector=projector())
    assert torch.equal(again.projector[2].weight, own[2].weight)
    with pytest.raises(ValueError, match="head was given, but"): load_model(file, projector=own, head=own)


PARTS = dict(projector=dict(hidden_size=24, projection_size=16, nlayers=3, bn=True, bias=True))
MALFORMED_PARTS = {
    "a list": [], "another part": dict(PARTS, code="1"), "no bias": {"projector": {"hidden_size": 1}},
    "a code": {"projector": dict(PARTS["projector"], bn="x")}, "a number": {"projector": 1},
    "bias is a number": {"projector": dict(PARTS["projector"], bias=1)},
    "bias is a text": {"projector": dict(PARTS["projector"], bias="first")},
    "a giant": {"projector": dict(PARTS["projector"], hidden_size=2**40)},
    "many layers": {"projector": dict(PARTS["projector"], nlayers=10**9)},
    "another width": {"projector": dict(PARTS["projector"], hidden_size=25)},
    "more layers": {"projector": dict(PARTS["projector"], nlayers=4)},
    "no projector": {}, "classes are numbers": dict(PARTS, head=[1, 2]),
    "a head that is not there": dict(PARTS, head=["a"])}


@pytest.mark.parametrize("name", MALFORMED_PARTS)
def test_a_malformed_description_of_a_model_is_one_line(tmp_path, name):
    "And nothing of it is built that the weights in the file would not fill"
    file = model_with(tmp_path)[1]
    about = about_of(file)
    about["parts"] = MALFORMED_PARTS[name]
    save_file(load_file(file), tmp_path/"bad.safetensors", {KEY: json.dumps(about)})
    with pytest.raises(ValueError) as e: load_model(tmp_path/"bad.safetensors")
    assert len(str(e.value).splitlines()) == 1 and "bad.safetensors" in str(e.value) and len(str(e.value)) < 700


def test_weights_that_belong_to_no_part_are_refused(tmp_path):
    file = model_with(tmp_path)[1]
    about = about_of(file)
    about["parts"] = {}
    save_file(load_file(file), tmp_path/"bad.safetensors", {KEY: json.dumps(about)})
    with pytest.raises(ValueError, match="projector.* belongs to no part"): load_encoder(tmp_path/"bad.safetensors")


def test_a_changed_weight_of_any_part_is_noticed(tmp_path):
    model, file = model_with(tmp_path)
    tensors = load_file(file)
    for name in ("encoder.bn1.weight", "projector.0.bias"):
        with safe_open(file, "pt") as f: save_file({**tensors, name: tensors[name] + 1}, tmp_path/"b", f.metadata())
        with pytest.raises(ValueError, match="damaged"): load_encoder(tmp_path/"b")


def test_what_is_no_model_says_which_function_to_use(good, tmp_path):
    encoder = load_encoder(good)
    with pytest.raises(ValueError, match="use save_encoder"): save_model(encoder, tmp_path/"m.safetensors")
    with pytest.raises(ValueError, match="holds an encoder alone: use load_encoder"): load_model(good)


# Classification

@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    "A trained classifier of dark and light pictures, its file, and the folder of pictures"
    home = tmp_path_factory.mktemp("classifier")
    rng = np.random.default_rng(0)
    for i in range(32):
        file = home/"pictures"/("dark" if i % 2 else "light")/f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 100, (20, 24, 3)) + (0 if i % 2 else 150)).astype(np.uint8)).save(file)
    torch.manual_seed(0)
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    encoder.clean_pipeline = restore_input(dict(size=[16, 16], stats=[[.5]*3, [.25]*3]))
    learn = classifier_learner(encoder, labelled_dls(home/"pictures", 20, valid_pct=.25, num_workers=0))
    learn.logger = lambda *_: None
    learn.fit(5, 3e-2)
    return learn, save_model(learn, home/"c.safetensors"), home/"pictures"


def test_a_classifier_names_the_class_of_a_file(classifier):
    learn, kept, pictures = classifier
    for model in (learn, kept, str(kept), load_model(kept)):
        for name in ("dark/01.png", "light/00.png"):
            result = inference_model(model, pictures/name)
            assert result["pred_class"] == name.split("/")[0] == learn.dls.vocab[result["pred_label"]]
            assert result["pred_score"] == pytest.approx(result["pred_scores"].max())
            assert result["pred_scores"].sum() == pytest.approx(1) and result["pred_scores"].shape == (2,)


def test_a_file_a_picture_an_array_and_a_tensor_give_the_same(classifier):
    learn, _, pictures = classifier
    file = pictures/"dark/01.png"
    picture = Image.open(file)
    pixels = np.array(picture)
    scores = [inference_model(learn, image)["pred_scores"] for image in (file, picture, pixels)]
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])
    square = torch.from_numpy(pixels[:, 2:22]).permute(2, 0, 1)
    with torch.no_grad(): expected = learn.model.eval()(square[None]).softmax(1)[0].numpy()
    for image in (square, square/255.): assert np.allclose(inference_model(learn, image)["pred_scores"], expected)
    assert np.allclose(scores[0], expected, atol=.02)   # resized once as bytes


def test_images_of_a_list_keep_their_order_and_the_model_its_mode(classifier):
    learn, _, pictures = classifier
    learn.model.train()
    files = [pictures/"dark/01.png", pictures/"light/00.png", pictures/"dark/03.png"]
    several = inference_model(learn, files)
    assert [r["pred_class"] for r in several] == ["dark", "light", "dark"] and learn.model.training
    assert np.array_equal(several[1]["pred_scores"], inference_model(learn, files[1])["pred_scores"])


def test_a_model_without_a_classifier_says_what_to_use(classifier, good, tmp_path):
    picture = classifier[2]/"dark/01.png"
    for model in (load_encoder(good), good, model_with(tmp_path)[0], tmp_path/"m.safetensors"):
        with pytest.raises(ValueError, match="has no classifier.*use encode.*classifier_learner"):
            inference_model(model, picture)
    with pytest.raises(TypeError, match="an image must be a file"): inference_model(classifier[0], 3)


def test_a_model_of_the_zoo_classifies_with_its_own_transforms(classifier):
    "Random weights; resized to 256, cropped to 224 and normalised as the source evaluates"
    torch.manual_seed(0)
    model = zoo.get_model("resnet50_barlowtwins-pre_8xb32-linear-coslr-100e_in1k")
    file = classifier[2]/"dark/01.png"
    result = inference_model(model, file)
    transforms = ResNet50_Weights.IMAGENET1K_V1.transforms(resize_size=256, crop_size=224)
    with torch.no_grad(): expected = model(transforms(Image.open(file))[None]).softmax(1)[0].numpy()
    assert np.allclose(result["pred_scores"], expected, atol=1e-6)
    assert result["pred_class"] == ResNet50_Weights.IMAGENET1K_V1.meta["categories"][result["pred_label"]]


def test_a_published_model_without_a_classifier_says_what_to_use(classifier):
    model = zoo.get_model("mixbt_resnet18_cifar10")
    with pytest.raises(ValueError, match="has no classifier.*use encode"):
        inference_model(model, classifier[2]/"dark/01.png")


# The whitening that an encoder remembers

@pytest.fixture(scope="module")
def whitened():
    "A Learner whose encoder remembers a whitening, and images"
    dls = tensor_dls(digits_images()[0][:60], bs=20, device="cpu")
    learn = bt_learner(dls, "timm/test_resnet", size=16, hidden_size=16, projection_size=16)
    x = digits_images()[0][:120]
    encode(learn, x, tta="flip", levels=2, whiten="fit")
    return learn, x


@pytest.mark.parametrize("save", [save_encoder, save_model])
def test_a_whitening_is_saved_with_its_encoder(whitened, save, tmp_path):
    learn, x = whitened
    file = save(learn, tmp_path/"m.safetensors")
    encoder = load_encoder(file)
    expected = encode(learn, x[90:], whiten=True)[0]
    assert torch.equal(encode(encoder, x[90:], whiten=True)[0], expected)
    assert expected.shape[1] == encode(encoder, x[:2], levels=2)[0].shape[1]
    assert torch.equal(encode(encoder, x[:50])[0], encode(learn, x[:50])[0])     # not asked for, not used
    again = load_encoder(save_encoder(encoder, tmp_path/"again.safetensors"))
    assert torch.equal(encode(again, x[90:], whiten=True)[0], expected)
    assert about_of(file)["whitening"] == dict(rows=120, floor=.01, size=[16, 16], tta=["flip"], levels=2)
    with pytest.raises(ValueError, match="cannot be compared"): encode(encoder, x[:100], whiten="fit")


def test_a_whitening_of_other_weights_is_not_saved(whitened, tmp_path):
    encoder, x = copy.deepcopy(whitened[0].model.encoder), whitened[1]
    with torch.no_grad(): encoder.bn1.running_var += .1
    with pytest.warns(UserWarning, match="trained after its whitening was fitted, which is not saved"):
        file = save_encoder(encoder, tmp_path/"e.safetensors")
    assert "whitening" not in about_of(file)
    with pytest.raises(ValueError, match="remembers no whitening"): encode(load_encoder(file), x, whiten=True)
    encoder.whitening = fit_whitening(torch.randn(50, 9))
    with pytest.raises(ValueError, match="encoder.whitening must come from"): save_encoder(encoder, tmp_path/"f")


@pytest.mark.parametrize("change, words", [
    (dict(levels=0), "levels must be"), (dict(floor=-1), "floor must be"), (dict(rows="all"), "rows must be"),
    (dict(tta=["rotate"]), "tta must be"), (dict(tta="flip"), "list of words"), (dict(tta=[10**9]), "4096"),
    (dict(size=[1]), "two numbers"), (dict(more=1), "whitening must have"), (None, "whitening must have"),
    ("mean", "its whitening must have mean"), ("matrix", "its whitening must have mean"), ("nan", "no finite numbers"),
    ("other", "fitted on representations of other weights")])
def test_a_strangers_whitening(whitened, change, words, tmp_path):
    learn, x = whitened
    file = save_encoder(learn, tmp_path/"e.safetensors")
    about, tensors = about_of(file), load_file(file)
    del about["sha256"]
    if isinstance(change, dict): about["whitening"].update(change)
    elif change is None: about["whitening"] = None
    elif change == "mean": del tensors["whitening/mean"]
    elif change == "matrix": tensors["whitening/matrix"] = torch.eye(3)
    elif change == "nan": tensors["whitening/matrix"][0, 0] = torch.nan
    else: tensors["whitening/weights"] *= 1.1
    save_file(tensors, file, {KEY: json.dumps(about)})
    with pytest.raises(ValueError, match=words): encode(load_encoder(file), x, whiten=True)
