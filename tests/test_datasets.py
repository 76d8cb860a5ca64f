"Data sets by name: torchvision's layouts made with a few images, downloads from a server of our own, what is missing"
import functools
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import serving
from PIL import Image
from scipy.io import savemat

from self_supervised_bt import datasets
from self_supervised_bt.datasets import (
    CARDS,
    PARTS,
    READERS,
    TINY_IMAGENET,
    VOC,
    data_as_text,
    data_card,
    files_and_targets,
    known_dls,
    known_images,
    named_data,
    read_part,
    train_test_dls,
)
from self_supervised_bt.evaluation import encode
from self_supervised_bt.recipes import RECIPES

CLASSES = ["anemone", "banded", "cat house"]   # sorted; the level of grey of an image says its class


def md5(data): return hashlib.md5(data).hexdigest()


def level(label): return 20 + 60*label


def picture(file, label, size=(24, 20)):
    "A file of one colour"
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level(label),)*3).save(file)


def text(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


# Layouts: each writes a few files and returns the labels that are expected, in any order

def dtd(root, monkeypatch):
    for k, split in enumerate(("train", "val", "test")):
        names = [f"{c}/{c}_{i}{k}.jpg" for c in CLASSES for i in range(2)]
        text(root/f"dtd/dtd/labels/{split}1.txt", *names)
        for name in names: picture(root/"dtd/dtd/images"/name, CLASSES.index(name.split("/")[0]))
    return [0, 1, 2]*4, [0, 1, 2]*2


def flowers102(root, monkeypatch):
    from torchvision.datasets import Flowers102
    home = root/"flowers-102"
    labels = [2, 1, 3, 1, 2, 3, 3]                     # from 1 on
    for i, c in enumerate(labels): picture(home/f"jpg/image_{i + 1:05d}.jpg", c - 1)
    savemat(home/"imagelabels.mat", dict(labels=labels))
    savemat(home/"setid.mat", dict(trnid=[1, 4], valid=[5, 7], tstid=[2, 3, 6]))
    sums = {k: (f, md5((home/f).read_bytes())) for k, (f, _) in Flowers102._file_dict.items() if f.endswith("mat")}
    monkeypatch.setattr(Flowers102, "_file_dict", sums)     # the narrowest place: MD5 sums of the two label files
    return [1, 0, 1, 2], [0, 2, 2]


def fgvcaircraft(root, monkeypatch):
    home = root/"fgvc-aircraft-2013b/data"
    text(home/"variants.txt", *CLASSES)
    for split, labels in (("trainval", [2, 0, 1]), ("test", [1, 2])):
        text(home/f"images_variant_{split}.txt", *(f"{split}{i} {CLASSES[c]}" for i, c in enumerate(labels)))
        for i, c in enumerate(labels): picture(home/f"images/{split}{i}.jpg", c)
    return [2, 0, 1], [1, 2]


def oxfordpets(root, monkeypatch):
    home = root/"oxford-iiit-pet"
    for split, labels in (("trainval", [2, 0, 1]), ("test", [1, 2, 0])):
        text(home/f"annotations/{split}.txt", *(f"{'ABC'[c]}_x_{split}{i} {c + 1} 1 1" for i, c in enumerate(labels)))
        for i, c in enumerate(labels): picture(home/f"images/{'ABC'[c]}_x_{split}{i}.jpg", c)
    # the name of a class is what stands before the last underscore: Abyssinian_12 is of "Abyssinian"
    return [2, 0, 1], [1, 2, 0]


def food101(root, monkeypatch):
    home = root/"food-101"
    for split in ("train", "test"):
        lists = {c: [f"{c}/{split}{i}" for i in range(2)] for c in CLASSES}
        text(home/f"meta/{split}.json", json.dumps(lists))
        for c, names in lists.items():
            for name in names: picture(home/f"images/{name}.jpg", CLASSES.index(c))
    return [0, 1, 2]*2, [0, 1, 2]*2


def stanfordcars(root, monkeypatch):
    home = root/"stanford_cars"
    (home/"devkit").mkdir(parents=True)
    savemat(home/"devkit/cars_meta.mat", dict(class_names=np.array(CLASSES, dtype=object)))
    for split, labels, file in (("train", [2, 0, 1], "devkit/cars_train_annos.mat"),
                                ("test", [1, 2], "cars_test_annos_withlabels.mat")):
        rows = np.array([(c + 1, f"{i}.jpg") for i, c in enumerate(labels)], dtype=[("class", "O"), ("fname", "O")])
        savemat(home/file, dict(annotations=rows))
        for i, c in enumerate(labels): picture(home/f"cars_{split}/{i}.jpg", c)
    return [2, 0, 1], [1, 2]


def gtsrb(root, monkeypatch):
    home = root/"gtsrb"
    for c in (0, 2):                                   # a class without images does not move the others
        for i in range(2): picture(home/f"GTSRB/Training/{c:05d}/{i}.ppm", c)
    text(home/"GT-final_test.csv", "Filename;Width;ClassId", "0.ppm;5;2", "1.ppm;5;0")
    for i, c in enumerate((2, 0)): picture(home/f"GTSRB/Final_Test/Images/{i}.ppm", c)
    return [0, 0, 2, 2], [2, 0]


def imagenet(root, monkeypatch):
    for split, n in (("train", 3), ("val", 1)):
        for c, name in enumerate(("n01", "n02")):
            for i in range(n): picture(root/f"imagenet/{split}/{name}/{i}.JPEG", c)
    return [0, 1]*3, [0, 1]


def caltech101(root, monkeypatch):
    home = root/"caltech101/101_ObjectCategories"
    (home/"BACKGROUND_Google").mkdir(parents=True)
    for c, name in enumerate(CLASSES):
        for i in range(31 + c): picture(home/f"{name}/image_{i + 1:04d}.jpg", c)
    return [0, 1, 2]*30, [0, 1, 1, 2, 2, 2]


def sun397(root, monkeypatch):
    home = root/"SUN397"
    names = ["/a/abbey", "/b/bank/indoor", "/b/bank/outdoor"]
    text(home/"ClassName.txt", *names)
    for part, n in (("Training", 2), ("Testing", 1)):
        lines = [f"{name}/sun_{part}{i}.jpg" for i in range(n) for name in reversed(names)]
        text(home/f"{part}_01.txt", *lines)
        for line in lines: picture(home/line[1:], names.index(line.rpartition("/")[0]))
    picture(home/"a/abbey/sun_unused.jpg", 1)          # many images are in neither list
    return [0, 1, 2]*2, [0, 1, 2]


def places365(root, monkeypatch):
    from torchvision.datasets import Places365
    home = root/"places365"
    text(home/"categories_places365.txt", "/a/airfield 0", "/b/bank 1")
    text(home/"places365_train_standard.txt", "/a/airfield/1.jpg 0", "/b/bank/1.jpg 1")
    text(home/"places365_val.txt", "v1.jpg 1")
    picture(home/"data_256_standard/a/airfield/1.jpg", 0)
    picture(home/"data_256_standard/b/bank/1.jpg", 1)
    picture(home/"val_256/v1.jpg", 1)
    def summed(f): return f, md5((home/f).read_bytes())
    lists = {"train-standard": summed("places365_train_standard.txt"), "val": summed("places365_val.txt")}
    monkeypatch.setattr(Places365, "_CATEGORIES_META", summed("categories_places365.txt"))   # the MD5 sums of the
    monkeypatch.setattr(Places365, "_FILE_LIST_META", lists)                                 # lists, nothing else
    return [0, 1], [1]


def inat2018(root, monkeypatch):
    home = root/"inaturalist"
    for c, kind in enumerate(("Aves/0", "Aves/1", "Plantae/2")):
        for i in range(3): picture(home/f"2018/{kind}/{i}.jpg", c)
    def about(split, rows):
        images = [dict(id=10 + i, file_name=f"train_val2018/{f}") for i, (f, _) in enumerate(rows)]
        labels = [dict(image_id=10 + i, category_id=c) for i, (_, c) in reversed(list(enumerate(rows)))]
        content = dict(images=images, annotations=labels, categories=[{}]*3)
        (home/f"{split}2018.json").write_text(json.dumps(content))
    about("train", [("Plantae/2/0.jpg", 2), ("Aves/0/1.jpg", 0), ("Aves/1/1.jpg", 1)])
    about("val", [("Aves/1/2.jpg", 1), ("Plantae/2/1.jpg", 2)])
    return [2, 0, 1], [1, 2]


LAYOUTS = dict(dtd=dtd, flowers102=flowers102, fgvcaircraft=fgvcaircraft, oxfordpets=oxfordpets, food101=food101,
               stanfordcars=stanfordcars, gtsrb=gtsrb, imagenet=imagenet, caltech101=caltech101, sun397=sun397,
               places365=places365, inat2018=inat2018)


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_and_labels_of_each_layout(tmp_path, monkeypatch, name):
    expected = dict(zip(("train", "test"), LAYOUTS[name](tmp_path, monkeypatch)))
    vocabs = []
    for part, labels in expected.items():
        images = read_part(name, part, tmp_path, complete=False)
        assert sorted(images.y.tolist()) == sorted(labels) and images.y.dtype == torch.int64
        x, y = known_images(name, part, tmp_path, size=8, complete=False)
        assert (x[:, :, 4, 4].float().mean(1) - torch.tensor([level(c) for c in y.tolist()])).abs().max() <= 2
        assert x.shape == (len(labels), 3, 8, 8)
        vocabs.append(images.vocab)
    assert vocabs[0] == vocabs[1] or name == "gtsrb"
    unlabelled = read_part(name, "unlabelled", tmp_path, complete=False)
    assert unlabelled.y is None and unlabelled.n == len(expected["train"])


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "imagenet"])
def test_a_half_extracted_archive_is_named(tmp_path, monkeypatch, name):
    LAYOUTS[name](tmp_path, monkeypatch)
    images = read_part(name, "test", tmp_path, complete=False)
    images.files[0].unlink()
    if name == "caltech101": images.files[0].with_name("notes.txt").touch()   # its files are counted, not listed
    with pytest.raises(FileNotFoundError, match=f"'{name}' below .*(half extracted: .*{images.files[0].name}|damaged)"):
        read_part(name, "test", tmp_path, complete=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fewer_images_than_published_are_refused(tmp_path, monkeypatch, name):
    LAYOUTS[name](tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"to test on, and {CARDS[name].test:,} were published"):
        read_part(name, "test", tmp_path)


@pytest.mark.parametrize("name", [n for n in CARDS if n != "digits"])
def test_a_missing_set_is_named_before_torchvision_makes_folders(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"data set '{name}' is not below .*To get it: "):
        read_part(name, "train", tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError): read_part(name, "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [n for n in CARDS if n != "digits"])
def test_an_empty_folder_of_the_right_name_is_named(tmp_path, name):
    (tmp_path/CARDS[name].folder).mkdir(parents=True)
    with pytest.raises((FileNotFoundError, ValueError), match=f"'{name}' below .*(incomplete or damaged|published)"):
        read_part(name, "train", tmp_path)


def test_what_torchvision_says_of_a_download_is_kept(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*original URL is broken.*by hand"):
        read_part("stanfordcars", "train", tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*archives from image-net.org"):
        read_part("imagenet", "train", tmp_path, download=True)


def test_validation_images_of_imagenet_that_are_not_sorted(tmp_path, monkeypatch):
    imagenet(tmp_path, monkeypatch)
    for f in (tmp_path/"imagenet/val").glob("*/*"): f.rename(tmp_path/"imagenet/val"/f"{f.parent.name}.JPEG")
    for d in (tmp_path/"imagenet/val").glob("n*"):
        if d.is_dir(): d.rmdir()
    with pytest.raises(FileNotFoundError, match="class folder"): read_part("imagenet", "test", tmp_path)


# VOC

@pytest.fixture
def voc(tmp_path):
    "Four images: the marks of classes 0 and 14 are given, of the others -1"
    home = tmp_path/"VOCdevkit/VOC2007"
    marks = dict(trainval=[(1, -1), (-1, 1), (1, 0), (1, 1)], test=[(1, 0), (-1, 1), (0, -1)])
    for split, rows in marks.items():
        names = [f"{split}{i}" for i in range(len(rows))]
        text(home/f"ImageSets/Main/{split}.txt", *names)
        for c, kind in enumerate(VOC):
            of = {0: 0, 14: 1}.get(c)
            lines = [f"{n} {-1 if of is None else r[of]:2d}" for n, r in zip(names, rows)]
            text(home/f"ImageSets/Main/{kind}_{split}.txt", *reversed(lines))
        for i, n in enumerate(names): picture(home/f"JPEGImages/{n}.jpg", i % 3)
    return tmp_path


def test_several_labels_per_image_and_difficult_ones(voc):
    train, test = (read_part("voc2007", part, voc, complete=False) for part in ("train", "test"))
    assert train.y[:, [0, 14]].tolist() == [[1, 0], [0, 1], [1, 1], [1, 1]] and train.y.sum() == 6
    assert test.y[:, [0, 14]].tolist() == [[1, 1], [0, 1], [1, 0]]
    assert test.ignored.nonzero().tolist() == [[0, 14], [2, 0]]      # where only difficult objects are
    assert test.vocab == sorted(VOC) == VOC and len(VOC) == 20
    dls = train_test_dls("voc2007", 8, root=voc, complete=False, num_workers=0, device="cpu")
    assert torch.equal(dls.valid.ignored, test.ignored) and dls.valid.one_batch()[1].shape == (3, 20)


def test_a_missing_file_of_labels(voc):
    (voc/"VOCdevkit/VOC2007/ImageSets/Main/sofa_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete or damaged.*sofa_test.txt"):
        read_part("voc2007", "test", voc, complete=False)


def test_a_file_that_cannot_be_read_has_no_row(voc):
    (voc/"VOCdevkit/VOC2007/JPEGImages/test1.jpg").write_bytes(b"no picture")
    dls = train_test_dls("voc2007", 8, root=voc, complete=False, num_workers=0, device="cpu")
    with pytest.warns(UserWarning, match="1 of 3 images have no row"):
        h, y = encode(torch.nn.Flatten(), dls.valid)
    assert len(h) == 2 and torch.equal(y, dls.valid.dataset.y[[0, 2]])


# Images in memory

def idx_file(file, a):
    "MNIST's format"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack(f">I{a.ndim}I", 0x0800 + a.ndim, *a.shape) + a.tobytes())


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist(tmp_path, name, folder):
    rng = np.random.default_rng(0)
    for split, n in (("train", 5), ("t10k", 3)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8)
        idx_file(tmp_path/folder/f"raw/{split}-images-idx3-ubyte", x)
        idx_file(tmp_path/folder/f"raw/{split}-labels-idx1-ubyte", y)
    images, labels = known_images(name, "test", tmp_path, complete=False)
    assert (images[:, 0].numpy() == x).all() and labels.tolist() == [0, 1, 2]
    colour, _ = known_images(name, "test", tmp_path, n_in=3, complete=False)
    assert (colour == images).all() and colour.shape[1] == 3
    dls = known_dls(name, 2, tmp_path, labels=True, complete=False, valid_pct=0, device="cpu")
    assert len(dls.train_ds) == 5 and dls.c == 10


@pytest.fixture
def served(tmp_path, monkeypatch):
    "A folder that a web server on this machine serves, and its address"
    (tmp_path/"www").mkdir()
    monkeypatch.setenv("no_proxy", "*")
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    folder = tmp_path/"www"
    with serving(functools.partial(Quiet, directory=folder)) as (_, address): yield folder, f"{address}/"


def archive(folder, files):
    with tarfile.open(folder, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, served, monkeypatch, name):
    import torchvision.datasets as sets
    www, address = served
    kind, label = (sets.CIFAR10, "labels") if name == "cifar10" else (sets.CIFAR100, "fine_labels")
    batches, rng = [b[0] for b in kind.train_list], np.random.default_rng(0)
    rows = {b: rng.integers(0, 256, (12, 3072), dtype=np.uint8) for b in [*batches, kind.test_list[0][0]]}
    files = {b: pickle.dumps({"data": r, label: [int(v) % 10 for v in r[:, 0]]}) for b, r in rows.items()}
    meta = pickle.dumps({kind.meta["key"]: [str(i) for i in range(10)]})
    packed = {**files, kind.meta["filename"]: meta}
    archive(www/kind.filename, {f"{kind.base_folder}/{b}": data for b, data in packed.items()})
    served_here = dict(url=address + kind.filename, tgz_md5=md5((www/kind.filename).read_bytes()),
                       train_list=[[b, md5(files[b])] for b in batches],
                       test_list=[[b, md5(files[b])] for b in files if b not in batches],
                       meta={**kind.meta, "md5": md5(meta)})
    for name_of_attribute, value in served_here.items(): monkeypatch.setattr(kind, name_of_attribute, value)
    for part, names in (("train", batches), ("unlabelled", batches), ("test", [kind.test_list[0][0]])):
        x, y = known_images(name, part, tmp_path/"data", download=True, complete=False)
        expected = np.concatenate([rows[b] for b in names])
        assert x.dtype == torch.uint8 and x.is_contiguous()
        assert (x.flatten(1).numpy() == expected).all()      # a row is red, green, blue
        assert y is None if part == "unlabelled" else (y.numpy() == expected[:, 0] % 10).all()
    dls = known_dls(name, 8, tmp_path/"data", labels=True, complete=False, device="cpu")
    unlabelled = known_dls(name, 8, tmp_path/"data", complete=False, device="cpu")
    assert dls.c == 10 and len(unlabelled.one_batch()) == 1


def test_stl10(tmp_path, monkeypatch):
    from torchvision.datasets import STL10
    home, rng = tmp_path/STL10.base_folder, np.random.default_rng(0)
    home.mkdir()
    sizes = dict(train=4, test=3, unlabeled=6)
    x = {k: rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8) for k, n in sizes.items()}
    for k, a in x.items(): (home/f"{k}_X.bin").write_bytes(a.transpose(0, 1, 3, 2).tobytes())   # column by column
    for k in ("train", "test"): (home/f"{k}_y.bin").write_bytes(bytes(range(1, len(x[k]) + 1)))   # classes count from 1
    for part in ("train_list", "test_list"):
        sums = [[f, md5((home/f).read_bytes())] for f, _ in getattr(STL10, part)]
        monkeypatch.setattr(STL10, part, sums)
    train, y = known_images("stl10", "train", tmp_path, complete=False)
    assert (train.numpy() == x["train"]).all() and y.tolist() == [0, 1, 2, 3] and train.is_contiguous()
    every, none = known_images("stl10", "unlabelled", tmp_path, complete=False)
    assert (every.numpy() == np.concatenate([x["train"], x["unlabeled"]])).all() and none is None
    assert (known_images("stl10", "test", tmp_path, complete=False)[0].numpy() == x["test"]).all()
    assert len(known_dls("stl10", 4, tmp_path, complete=False, device="cpu", valid_pct=.2).train_ds) == 8


def test_tiny_imagenet(tmp_path, served, monkeypatch):
    www, address = served
    classes = ["n03", "n01", "n02"]
    with zipfile.ZipFile(www/"tiny-imagenet-200.zip", "w") as z:
        def add(name, data): z.writestr(f"tiny-imagenet-200/{name}", data)
        def picture(level, mode="RGB"):
            b = io.BytesIO()
            Image.new(mode, (64, 64), level if mode == "L" else (level,)*3).save(b, "jpeg")
            return b.getvalue()
        add("wnids.txt", "\n".join(classes))
        for k, c in enumerate(classes):
            for i, mode in enumerate(("RGB", "L")):   # some of its files are grey
                add(f"train/{c}/images/{c}_{i}.JPEG", picture(80*k + 10*i, mode))
            add(f"train/{c}/{c}_boxes.txt", "")
            add(f"val/images/val_{k}.JPEG", picture(80*k + 5))
        add("val/val_annotations.txt", "".join(f"val_{k}.JPEG\t{c}\t0\t0\t62\t62\n" for k, c in enumerate(classes)))
        add("test/images/test_0.JPEG", picture(0))
    monkeypatch.setitem(TINY_IMAGENET, "url", address + "tiny-imagenet-200.zip")
    with pytest.raises(FileNotFoundError, match="File not found or corrupted"):   # the MD5 sum is checked
        known_images("tinyimagenet", "train", tmp_path/"wrong", download=True)
    monkeypatch.setitem(TINY_IMAGENET, "md5", md5((www/"tiny-imagenet-200.zip").read_bytes()))
    x, y = known_images("tinyimagenet", "train", tmp_path/"data", download=True, complete=False)
    assert x.shape == (6, 3, 64, 64) and y.tolist() == [0, 0, 1, 1, 2, 2]
    assert x[:, 0, 0, 0].tolist() == [80, 90, 160, 170, 0, 10]
    x, y = known_images("tinyimagenet", "test", tmp_path/"data", complete=False)
    assert y.tolist() == [2, 0, 1] and x[:, 0, 0, 0].tolist() == [5, 85, 165]


# Names, parts and sizes

def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [named_data(d) for d in ("digits", "cifar10", "./digits", Path("digits"), "photos", ["a.png"])] == [
        "digits", "cifar10", None, None, None, None]
    (tmp_path/"cifar10").mkdir()
    with pytest.raises(ValueError, match="of a folder here: pass './cifar10'"): named_data("cifar10")
    as_text = [data_as_text(d) for d in (Path("cifar10"), "./cifar10", "digits", tmp_path/"cifar10")]
    assert [named_data(t) for t in as_text] == [None, None, "digits", None] and Path(as_text[0]).is_dir()


def test_every_card_has_a_reader_and_a_published_recipe_that_exists():
    assert CARDS.keys() == READERS.keys()
    assert {c.recipe for c in CARDS.values()} - {None} <= RECIPES.keys()
    assert all(c.metric in datasets.METRICS and c.source.startswith("http") for c in CARDS.values())
    sizes = {name: RECIPES[CARDS[name].recipe].size for name in ("cifar10", "cifar100", "tinyimagenet")}
    assert sizes == {name: CARDS[name].size for name in sizes}


@pytest.mark.parametrize("typed, meant", [("cifar-10", "cifar10"), ("CIFAR10", "cifar10"), ("pets", "oxfordpets"),
                                          ("Stanford_Cars", "stanfordcars"), ("iNat-2018", "inat2018"),
                                          ("food", "food101"), ("caltech-101", "caltech101"), ("minst", "mnist")])
def test_an_unknown_name_is_answered_with_close_ones(typed, meant):
    with pytest.raises(ValueError, match=f"got '{typed}': did you mean .*'{meant}'"): data_card(typed)
    with pytest.raises(ValueError, match=f"data='{typed}' is no folder here, .*'{meant}'"): named_data(typed)


@pytest.mark.parametrize("typed", ["photos", "runs/mnists", "train", "/data/cifar-10", ""])
def test_what_is_like_no_name_is_a_folder(typed):
    assert named_data(typed) is None


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"got 'photos': There are digits, cifar10, .* places365$"): data_card("photos")


def test_a_folder_that_is_like_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cifar-10").mkdir()
    assert named_data("cifar-10") is None


def test_parts_and_sizes_that_do_not_exist(tmp_path, monkeypatch):
    dtd(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="part must be one of 'train', .* got 'val': of 'dtd' these are train and val"):
        known_images("dtd", "val", tmp_path, size=8)
    with pytest.raises(ValueError, match="size is missing"): known_dls("dtd", root=tmp_path)
    with pytest.raises(ValueError, match="size=8 does not fit 'cifar10'"): known_dls("cifar10", root=tmp_path, size=8)
    for size, n_in, words in ((0, 3, "size must be"), (8, 2, "n_in must be")):
        with pytest.raises(ValueError, match=words): known_images("dtd", root=tmp_path, size=size, n_in=n_in)
        with pytest.raises(ValueError, match=words): known_dls("dtd", root=tmp_path, size=size, n_in=n_in)
    with pytest.raises(TypeError): known_dls("dtd", root=tmp_path, size=8, complete=False, splits=3)
    assert len(PARTS) == 3


def test_the_published_number_of_images_is_enough(tmp_path, monkeypatch):
    dtd(tmp_path, monkeypatch)
    monkeypatch.setitem(CARDS, "dtd", replace(CARDS["dtd"], train=12, test=6))
    assert known_images("dtd", "test", tmp_path, size=8)[0].shape == (6, 3, 8, 8)
    assert len(known_dls("dtd", 4, tmp_path, size=8, valid_pct=0, num_workers=0, device="cpu").train_ds) == 12


def test_the_centre_of_photographs_is_that_of_torchvision(tmp_path, monkeypatch):
    from torchvision.transforms import v2
    dtd(tmp_path, monkeypatch)
    file = tmp_path/"dtd/dtd/images/banded/banded_02.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((4, 4, 1), dtype=np.uint8))).save(file, quality=95)
    dls = train_test_dls("dtd", 256, root=tmp_path, complete=False, crop=224, num_workers=0, device="cpu")
    row = [str(f) for f in dls.valid.dataset.files].index(str(file))
    ours = dls.valid.one_batch()[0][row]*255
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(Image.open(file)).float()
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() < 1.5


def test_a_class_of_torchvision_that_keeps_its_files_in_another_way():
    with pytest.raises(AttributeError, match="object of torchvision .* not known here"): files_and_targets(object())


def test_parts_that_name_other_classes(tmp_path, monkeypatch):
    dtd(tmp_path, monkeypatch)
    names = [n for n in (tmp_path/"dtd/dtd/labels/test1.txt").read_text().splitlines() if "anemone" not in n]
    text(tmp_path/"dtd/dtd/labels/test1.txt", *names)
    with pytest.raises(ValueError, match="'dtd' names other classes in its test images"):
        train_test_dls("dtd", 8, root=tmp_path, complete=False)
    (tmp_path/"dtd/dtd/labels/val1.txt").write_text("banded/banded_01.jpg\n")
    with pytest.raises(FileNotFoundError, match="do not name the same classes"):
        read_part("dtd", "train", tmp_path, complete=False)
