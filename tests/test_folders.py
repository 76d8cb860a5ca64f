"Folders of images with broken files"
import csv
import functools
import io
import pickle
import random
import warnings
from pathlib import Path

import fastai.vision.learner  # noqa: F401 (how fastai shows results on images)
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from callbacks import DoToImages, DoToViews, RaiseAt
from conftest import quiet, small_encoder, small_model
from fastai.distributed import DistributedDL
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.augment import Flip
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.classifiers import classifier_learner
from self_supervised_bt.data import BadImage, image_files, load_images, read_image, tensor_dls
from self_supervised_bt.folders import (
    bad_images,
    check_images,
    class_folders,
    files_and_labels,
    labelled_dls,
    labelled_files,
    size_and_channels,
    unlabelled_dls,
)
from self_supervised_bt.sources import FileNames


def saved(im, kind):
    "An image as the bytes of a file"
    file = io.BytesIO()
    im.save(file, kind)
    return file.getvalue()


@functools.cache
def broken_contents():
    "Eight kinds of broken files"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    return {"empty file": b"",
            "not an image": b"just text",
            "not an image, html": b"<html>not found</html>",
            "truncated": saved(noise, "jpeg")[:-300],
            "truncated, png": saved(noise, "png")[:-300],
            "too many pixels": saved(Image.new("1", (14000, 14000)), "png"),
            "unknown range": saved(Image.new("F", (9, 9)), "tiff"),
            "cannot be opened": None}


def spoil(root, files):
    "Replace some files by broken ones"
    contents = broken_contents()
    for f, data in zip(files, contents.values(), strict=True):
        f.unlink()
        if data is None: f.symlink_to(root/"nowhere")
        else: f.write_bytes(data)
    return {str(f): reason.split(",")[0] for f, reason in zip(files, contents)}


@pytest.fixture
def wild(tmp_path):
    "160 images in nested folders, each with its number as grey level; 8 are broken"
    files = [tmp_path/"wild"/"ab"[i % 2]/"deep"/f"{i:03}.png" for i in range(160)]
    for i, f in enumerate(files):
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 12), i).save(f)
    broken = spoil(tmp_path, [files[i] for i in (0, 17, 18, 60, 61, 62, 100, 159)])
    return tmp_path/"wild", broken


def levels(x): return (x[:, 0, 0, 0]*255).round().long().tolist()


def in_a_row(root): return sorted(root.rglob("*.png"), key=lambda f: f.name)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_and_lists_broken_files(wild, workers):
    root, broken = wild
    dls = unlabelled_dls(root, 8, bs=16, num_workers=workers, device="cpu")
    sizes = []
    keep_size = DoToImages(lambda learn: sizes.append(len(learn.x)))
    augs = get_multi_aug_pipelines(2, 8, stats=None, backend="fused")
    learn = quiet(Learner(dls, small_model(3), cbs=[BarlowTwins(augs), keep_size]))
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(2)
    assert sizes == [16]*20
    assert not any(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    assert dict(bad_images(dls).bad) == broken and bad_images(dls).counts["truncated"] == 2
    assert all(np.isfinite(learn.recorder.losses))


@pytest.mark.parametrize("workers", [0, 2])
def test_next_readable_image_replaces_a_broken_one(wild, workers):
    root, broken = wild
    files = in_a_row(root)
    dls = unlabelled_dls(files, 8, bs=32, valid_pct=0, num_workers=workers, labels=False, device="cpu")
    dls.train.shuffle = False
    expected = list(range(160))
    replaced = {0: 1, 17: 19, 18: 19, 60: 63, 61: 63, 62: 63, 100: 101, 159: 1}   # after the last comes the first
    for i, j in replaced.items(): expected[i] = j
    for _ in range(2): assert sum((levels(x) for x, in dls.train), []) == expected
    assert dls.train_ds.names(range(160)) == [str(files[i]) for i in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_gives_no_row_where_files_are_left_out(wild, workers):
    root, broken = wild
    files = in_a_row(root)
    dls = unlabelled_dls(files, 8, bs=2, valid_pct=0, num_workers=workers, device="cpu")   # 60 and 61 fill a batch
    ds = dls.train_ds.leaving_out()
    dl = dls.train.new(dataset=ds, shuffle=False, drop_last=False)
    good = [i for i, f in enumerate(files) if str(f) not in broken]
    for _ in range(2): assert sum((levels(x) for x, in dl), []) == good
    assert ds.names(range(160)) == [str(files[i]) for i in good]
    assert dict(bad_images(dls).bad) == broken
    assert len(dls.train_ds[[60, 61]][0]) == 2      # the training loader still replaces them


def test_broken_files_are_in_the_state_of_the_dataset(wild, tmp_path):
    ds, again = (unlabelled_dls(wild[0], 8, bs=16, valid_pct=0, device="cpu").train_ds for _ in range(2))
    ds[list(range(160))]
    torch.save(ds.state_dict(), tmp_path/"state")
    again.codes[5] = 3                              # found after the checkpoint
    shared = again.codes.data_ptr()
    again.load_state_dict(torch.load(tmp_path/"state", weights_only=True))
    assert torch.equal(ds.codes, again.codes) and ds.codes.count_nonzero() == 8 and again.codes.data_ptr() == shared
    fewer = unlabelled_dls(wild[0], 8, bs=16, device="cpu").train_ds
    with pytest.raises(ValueError, match="160 files, and there are 144"): fewer.load_state_dict(ds.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_many_broken_files_are_said_at_once(folder, workers):
    for f in sorted(folder.rglob("*.png"))[:30]: f.write_bytes(b"")
    dls = unlabelled_dls(folder, 8, bs=5, valid_pct=0, num_workers=workers, device="cpu")
    with pytest.warns(UserWarning, match=r"\d\d of 40 files cannot be read so far .*png .empty file") as said:
        for _ in range(2): list(dls.train)
    assert len([w for w in said if "so far" in str(w.message)]) == 1


def test_a_folder_that_is_away_stops_the_run(wild, monkeypatch):
    monkeypatch.setattr("self_supervised_bt.data.WAITS", (.01,))
    dls = unlabelled_dls(wild[0], 8, bs=16, num_workers=2, device="cpu")
    (wild[0]/"a").rename(wild[0]/"c")
    with pytest.raises(FileNotFoundError, match="the folder of .* cannot be found"): list(dls.train)
    assert "cannot be opened" not in bad_images(dls).counts


def test_identity_is_of_names_and_sizes_not_of_places(wild, tmp_path, monkeypatch):
    def identity(items, size=8): return unlabelled_dls(items, size, bs=16, device="cpu").train_ds.identity()
    first = identity(wild[0])
    monkeypatch.chdir(wild[0].parent)
    assert identity("wild") == first and identity(wild[0], 9) != first
    wild[0].rename(tmp_path/"moved")
    assert identity(tmp_path/"moved") == first
    one = unlabelled_dls(tmp_path/"moved", 8, bs=16, device="cpu").train_ds.files[3]
    with open(one, "ab") as f: f.write(b"x")
    changed = identity(tmp_path/"moved")
    Path(one).rename(Path(one).with_name("new.png"))
    assert len({first, changed, identity(tmp_path/"moved")}) == 3


def pictures(root, names, colour=7):
    "Small images of these names"
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(root/name)


def labels_of(root, labels=True):
    "The classes of a folder, the label of each file, and what was said"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        files, y, vocab = files_and_labels(root, labels)
    return list(vocab), {Path(f).relative_to(root).as_posix(): vocab[i] for f, i in zip(files, y)}, \
        " ".join(str(w.message) for w in said)


def test_the_class_is_the_outermost_folder_as_in_torchvision(tmp_path):
    names = [f"{animal}/{year}/{i}.png" for animal in ("cat", "dog") for year in (2020, 2021) for i in range(2)]
    pictures(tmp_path, names)
    classes, labels, said = labels_of(tmp_path)
    assert classes == ImageFolder(tmp_path).classes and labels == {n: n.split("/")[0] for n in names}
    assert "classes are cat, dog" in said and "labels='innermost' would take 2020, 2021" in said
    classes, labels, said = labels_of(tmp_path, "innermost")
    assert classes == ["2020", "2021"] and labels == {n: n.split("/")[1] for n in names} and "cat, dog" in said


def test_an_image_beside_the_class_folders_is_no_class(tmp_path):
    pictures(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png", "overview.png", "zebra.png"])
    classes, labels, said = labels_of(tmp_path)
    assert classes == ImageFolder(tmp_path).classes and len(labels) == 3 and "2 image(s)" in said
    dls = unlabelled_dls(tmp_path, 8, bs=1, valid_pct=0, labels=True, num_workers=0, device="cpu")
    assert len(dls.train_ds) == 3 and dls.c == 2


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    pictures(tmp_path, [f"{part}/{c}/1.png" for part in ("train", "val") for c in "ab"])
    with pytest.raises(ValueError, match="train, val, which are parts"): files_and_labels(tmp_path, True)
    assert labels_of(tmp_path/"train")[0] == labels_of(tmp_path, "innermost")[0] == ["a", "b"]


@pytest.mark.parametrize("names", [["2019", "2020 sea", "2021-07"], ["100CANON", "101CANON"], ["20200701", "people"]])
def test_albums_are_not_taken_for_classes(tmp_path, names):
    files = [f"p/{name}/{i}.jpg" for name in names for i in range(9)]
    with pytest.warns(UserWarning, match="look like albums"): assert class_folders(files) == (files, None)
    classes = [f"p/{name}/{i}.jpg" for name in ("0", "1945a", "n02099601") for i in range(9)]
    assert list(class_folders(classes)[1]) == ["0", "1945a", "n02099601"]


def test_colour_is_looked_for_in_all_files(tmp_path):
    for i in range(240): Image.new("L", (8, 9)).save(tmp_path/f"a{i:03}.png")
    assert size_and_channels(sorted(tmp_path.iterdir())) == (8, 1)
    for i in range(3): Image.new("RGB", (8, 8)).save(tmp_path/f"b{i:03}.png")
    assert size_and_channels(sorted(tmp_path.iterdir())) == (8, 3)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path/"a.png")
    assert size_and_channels([tmp_path/"a.png", tmp_path/"a000.png"]) == (9, 1)   # 16 bits of grey


def test_one_file_is_enough_to_validate_with(tmp_path):
    pictures(tmp_path, [f"{i:02}.png" for i in range(12)])
    dls = unlabelled_dls(tmp_path, 8, bs=4, num_workers=0, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds)) == (11, 1) and len(dls.valid.one_batch()[0]) == 1


def test_a_class_without_test_images_keeps_the_numbers_of_the_others(tmp_path):
    pictures(tmp_path/"train", [f"{c}/{i}.png" for c in "abc" for i in range(3)])
    pictures(tmp_path/"test", ["a/1.png", "c/1.png"])
    dls = labelled_dls(tmp_path/"train", 8, test=tmp_path/"test", num_workers=0)
    assert list(dls.valid_ds.vocab) == ["a", "b", "c"] and dls.valid.one_batch()[1].tolist() == [0, 2]
    pictures(tmp_path/"test", ["d/1.png"])
    with pytest.raises(ValueError, match="d are not among a, b, c"):
        labelled_dls(tmp_path/"train", 8, test=tmp_path/"test", num_workers=0)


DLS = {"files": lambda root: unlabelled_dls(root, 16, bs=8, labels=True, num_workers=0, device="cpu"),
       "uint8": lambda root: tensor_dls(*tensors(root), bs=8, device="cpu", vocab=["dark", "light"]),
       "float": lambda root: tensor_dls(tensors(root)[0]/255, tensors(root)[1], bs=8, device="cpu",
                                        vocab=["dark", "light"])}


def tensors(root):
    files, y, _ = labelled_files(image_files(root))
    return load_images(files, 16, progress=False), y


@pytest.mark.parametrize("kind", DLS)
def test_fastais_predict_and_interpretation_on_our_dls(folder, tmp_path, kind):
    dls = DLS[kind](folder)
    learn = quiet(classifier_learner(small_encoder(3), dls))
    with torch.no_grad():   # bright images are light
        learn.model.encoder[0].weight.fill_(.1)
        learn.model.head.weight.copy_(torch.tensor([[-1.], [1.]]).expand(2, 8))
        learn.model.head.bias.copy_(torch.tensor([10., -10.]))
        level = learn.model.eval()(torch.full((1, 3, 16, 16), .5))
        learn.model.head.bias.sub_(level[0])
    files = {"light": next((folder/"light").iterdir()), "dark": next((folder/"dark").iterdir())}
    learn.export(tmp_path/"learner.pkl")
    again = quiet(load_learner(tmp_path/"learner.pkl", pickle_module=pickle))
    for name, file in files.items():
        x = read_image(file, 16)
        for one in (learn, again):
            for item in (file, str(file), Image.open(file), np.asarray(Image.open(file)), x, x/255):
                with one.no_bar(): label, index, scores = one.predict(item)
                assert label == name and dls.vocab[index] == name and scores[index] > .5
    with learn.no_bar():
        shown = learn.get_preds(dl=learn.dls.test_dl(list(files.values())))[0]
        assert shown.argmax(1).tolist() == [1, 0]
        learn.show_results(max_n=2)
        dls.show_batch(max_n=2)
        seen = ClassificationInterpretation.from_learner(learn)
        counts = torch.tensor(seen.confusion_matrix())
        assert counts.shape == (2, 2) and counts.diagonal().sum() == counts.sum() == len(dls.valid_ds)
        seen.plot_top_losses(2)
        worst = seen.top_losses(1, items=True)
        assert dls.vocab[int(worst[2][0].label)] in ("dark", "light")
    plt.close("all")
    with pytest.raises(ValueError, match="an image must be"): learn.predict(x[:, :5])


def test_a_broken_file_is_not_predicted_as_another(folder):
    learn = quiet(classifier_learner(small_encoder(3), DLS["files"](folder)))
    (folder/"new.png").write_bytes(b"")
    with pytest.raises(BadImage, match="new.png"): learn.predict(folder/"new.png")


def test_labels_are_those_of_the_images_used(folder):
    last = (33, 35, 37, 39)   # of their class: the next images are light
    for i in last: (folder/f"dark/{i}.png").write_bytes(b"")
    dls = unlabelled_dls(folder, 8, bs=10, valid_pct=.25, labels=True, num_workers=0, device="cpu")
    assert dls.vocab == ["dark", "light"] and dls.c == 2
    assert type(dls.train_ds.loss_func).__name__.startswith("CrossEntropy")
    for dl in dls.loaders:
        for x, y in dl:
            light = x.as_subclass(torch.Tensor).mean((1, 2, 3)) > .5
            assert (light == (y == 1)).all()
    for ds in (dls.train_ds, dls.valid_ds):
        every = list(range(len(ds)))
        assert [dls.vocab[i] for i in ds[every][1]] == [Path(f).parent.name for f in ds.names(every)]
    assert len(unlabelled_dls(folder, 8, bs=10, num_workers=0, device="cpu").one_batch()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_file_raises_with_bad_raise(wild, quick_end, workers):
    dls = unlabelled_dls(wild[0], 8, bs=16, bad="raise", num_workers=workers, device="cpu")
    with pytest.raises(BadImage) as e: list(dls.train)
    assert any(f in str(e.value) and reason in str(e.value) for f, reason in wild[1].items())
    assert len(bad_images(dls)) == 0


def test_batches(wild):
    for n_in, kind in ((3, TensorImage), (1, TensorImageBW)):
        dls = unlabelled_dls(str(wild[0]), 8, bs=16, n_in=n_in, num_workers=0, device="cpu")
        b = dls.one_batch()
        assert len(b) == 1 and type(b[0]) is kind and b[0].shape == (16, n_in, 8, 8) and b[0].dtype == torch.float32
        assert type(dls.train_ds[3][0]) is kind and dls.train_ds[3][0].dtype == torch.uint8
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (144, 16, 9, 1)
    assert sorted([*dls.train_ds.files, *dls.valid_ds.files]) == sorted(str(f) for f in wild[0].rglob("*.png"))


def test_order_depends_only_on_the_seeds(wild):
    def epochs(workers, seed=0, split=0):
        random.seed(seed)
        dls = unlabelled_dls(wild[0], 8, bs=16, seed=split, num_workers=workers, device="cpu")
        return [sum((levels(x) for x, in dls.train), []) for _ in range(2)], list(dls.valid_ds.files)
    first, valid = epochs(0)
    assert epochs(2) == (first, valid) and first[0] != first[1]
    assert epochs(0, seed=1)[0] != first and epochs(0, seed=1)[1] == valid and epochs(0, split=1)[1] != valid


def test_reading_uses_no_random_numbers(wild):
    dls = unlabelled_dls(wild[0], 8, bs=16, num_workers=0, device="cpu")
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    assert dls.train_ds.deterministic_items
    dls.train_ds[list(range(100))]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_two_ranks_divide_the_files(wild, monkeypatch):
    monkeypatch.setattr(DistributedDL, "_broadcast", lambda self, t, rank: t)   # fastai's needs a GPU
    dls = unlabelled_dls(wild[0], 8, bs=16, valid_pct=0, num_workers=2, device="cpu")
    dls.train.shuffle = dls.train.drop_last = False
    seen = []
    for rank in (0, 1):
        for x, in DistributedDL(dls.train, rank, 2):
            assert type(x) is TensorImage and x.dtype == torch.float32
            seen += levels(x)
    assert seen == sum((levels(x) for x, in dls.train), []) and len(seen) == 160 and len(bad_images(dls)) == 8


@pytest.fixture(params=[(1, 16), (3, 16), (3, 80)], ids=str)
def noisy(request, tmp_path):
    "Channels and size of 60 images, which are in a folder"
    n_in, size = request.param
    rng = np.random.default_rng(0)
    for i in range(60):
        a = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(a).save(tmp_path/f"{i:02}.jpg", quality=95)
    return n_in, size


def noisy_dls(folder, noisy, workers):
    n_in, size = noisy
    random.seed(0)
    return unlabelled_dls(folder, size, bs=4, valid_pct=.2, n_in=n_in, num_workers=workers, device="cpu")


@pytest.mark.parametrize("rank", [None, 0])
def test_batches_of_bytes_that_are_kept_stay_as_they_are(tmp_path, noisy, rank, monkeypatch):
    monkeypatch.setattr(DistributedDL, "_broadcast", lambda self, t, rank: t)   # fastai's needs a GPU
    def batches(workers):
        dl = noisy_dls(tmp_path, noisy, workers).train
        with dl.giving_bytes(): return list(dl if rank is None else DistributedDL(dl, rank, 2))
    here, kept = batches(0), batches(2)
    assert len(here) == (12 if rank is None else 6)   # more than a worker has places
    for (a,), (b,) in zip(here, kept, strict=True):
        assert a.dtype == b.dtype == torch.uint8 and type(a) is type(b) and torch.equal(a, b) and not b.is_shared()
        assert b.is_contiguous(memory_format=torch.channels_last) is (noisy == (3, 80) or noisy[0] == 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_floats_are_the_bytes_over_255_in_the_usual_order(tmp_path, noisy, workers):
    dls = noisy_dls(tmp_path, noisy, workers)
    with dls.valid.giving_bytes(): there = list(dls.valid)
    floats = list(dls.valid)
    for (a,), (b,) in zip(there, floats, strict=True):
        assert b.dtype == torch.float32 and type(a) is type(b) and b.is_contiguous() and not b.is_shared()
        assert torch.equal(a.float()/255, b)


def test_only_the_loader_itself_gives_bytes_and_only_for_a_while(folder):
    dls = unlabelled_dls(folder, 8, bs=4, num_workers=0, device="cpu")
    def dtype(dl): return dl.one_batch()[0].dtype
    for _ in range(2):
        with dls.train.giving_bytes(), dls.train.giving_bytes():
            assert dtype(dls.train) == torch.uint8
            assert dtype(dls.train.new()) == dtype(dls.test_dl(image_files(folder))) == torch.float32
        assert dtype(dls.train) == torch.float32
    augmented = unlabelled_dls(folder, 8, bs=4, num_workers=0, device="cpu", batch_tfms=[Flip()]).train
    floats = tensor_dls(torch.rand(20, 3, 8, 8), bs=4, device="cpu").train
    for dl in (augmented, floats):
        with dl.giving_bytes(): assert dtype(dl) == torch.float32


def test_views_are_made_of_bytes(folder):
    dls = unlabelled_dls(folder, 8, bs=4, num_workers=0, device="cpu")
    learn = Learner(dls, small_model(3), cbs=[BarlowTwins(get_multi_aug_pipelines(2, 8, stats=None))])
    seen = []
    def note(learn): seen.append(learn.dls.train.gives_floats is not None)
    quiet(learn).fit(1, cbs=[DoToViews(note)])
    assert True in seen and dls.train.gives_floats is None
    seen.clear()
    learn.fit(1, cbs=[DoToImages(lambda learn: note(learn) or seen.append(learn.xb[0].dtype == torch.float32))])
    assert seen[:2] == [False, True]   # a user's callback gets floats
    with pytest.raises(KeyError): learn.fit(1, cbs=[RaiseAt("after_step", KeyError("stop"))])
    assert dls.train.gives_floats is None and dls.one_batch()[0].dtype == torch.float32


def test_exported_learner_has_no_files(wild, tmp_path):
    dls = unlabelled_dls(wild[0], 8, bs=16, num_workers=0, device="cpu")
    learn = Learner(dls, small_model(3), cbs=[BarlowTwins(get_multi_aug_pipelines(2, 8, stats=None))])
    learn.export(tmp_path/"learner.pkl")
    again = load_learner(tmp_path/"learner.pkl", pickle_module=pickle)
    assert len(again.dls.train_ds) == 0 and b"deep" not in (tmp_path/"learner.pkl").read_bytes()


def test_check_images(wild, tmp_path):
    root, broken = wild
    full = check_images(root, full=True)
    assert dict(full.bad) == broken and len(full) == 8 and len(full.good) == 152 and not set(full.good) & set(broken)
    headers = check_images(root)
    assert dict(headers.bad) == {f: reason for f, reason in broken.items() if reason != "truncated"}
    assert full.counts == {"cannot be opened": 1, "empty file": 1, "not an image": 2, "too many pixels": 1,
                           "truncated": 2, "unknown range": 1}
    assert all(word in repr(full) for word in ["8 of 160 files", "2 truncated", *broken])
    full.to_csv(tmp_path/"bad.csv")
    assert list(csv.reader(open(tmp_path/"bad.csv")))[1:] == [list(row) for row in full.bad]
    many = check_images(list(root.rglob("*.png"))*8, full=True, num_workers=2)
    assert len(many) == 64 and len(many.names) == 1280 and dict(many.bad) == broken
    dls = unlabelled_dls(full.good, 8, bs=16, bad="raise", num_workers=0, device="cpu")
    for dl in dls.loaders: list(dl)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_file_names_of_any_kind():
    names = ["a.png", "", "Zürich/ß.png", "x\udcff\udc80.jpg", "long"*200]
    kept = FileNames(names)
    assert list(kept) == names and len(kept) == 5 and kept[-2] == names[3]
    some = kept.take(torch.tensor([3, 0]))
    assert list(some) == [names[3], names[0]] and some.block is kept.block
    assert list(pickle.loads(pickle.dumps(kept))) == names and len(FileNames([])) == 0


def test_invalid_arguments_raise(wild, folder, tmp_path):
    root = wild[0]
    right = dict(size=8, bs=16, device="cpu")
    wrong = [(dict(bs=145), "bs=145"), (dict(bad="ignore"), "bad must be"), (dict(valid_pct=1.), "valid_pct"),
             (dict(size=0), "size must"), (dict(n_in=4), "n_in=4, and no file"), (dict(n_in=0), "n_in must"),
             (dict(labels="inner"), "labels must be")]
    for kwargs, words in wrong:
        with pytest.raises(ValueError, match=words): unlabelled_dls(root, **{**right, **kwargs})
    with pytest.raises(ValueError, match="at least two folders"): unlabelled_dls(root/"a", 8, bs=8, labels=True)
    with pytest.raises(FileNotFoundError, match="not a folder"): unlabelled_dls(tmp_path/"nowhere", 8)
    (tmp_path/"none").mkdir()
    with pytest.raises(ValueError, match="no image files"): unlabelled_dls(tmp_path/"none", 8)
    for f in folder.rglob("*.png"): f.write_bytes(b"")
    dls = unlabelled_dls(folder, 8, bs=8, valid_pct=0, num_workers=0, device="cpu")
    with pytest.raises(BadImage, match="none of the 40 files"): dls.one_batch()
