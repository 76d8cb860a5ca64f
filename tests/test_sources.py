"Tables of paths, patterns, tar shards and data sets of other libraries: what they hold, and in which order"
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from callbacks import DoToImages, KillAfter, Killed
from conftest import quiet, small_model
from fastai.learner import Learner
from fastai.torch_core import set_seed
from PIL import Image

from self_supervised_bt import folders
from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.checkpoints import Checkpoints
from self_supervised_bt.cli import bt_diagnose, bt_evaluate, bt_pretrain
from self_supervised_bt.data import BadImage, image_files, load_images, read_image
from self_supervised_bt.folders import bad_images, check_images, labelled_dls, unlabelled_dls
from self_supervised_bt.runs import evaluate, pretrain, seen_in_training
from self_supervised_bt.sources import expand_braces, image_source, is_pattern, mixed_order, named_image, write_shards
from self_supervised_bt.weights import load_encoder, save_encoder

SMALL = dict(arch="timm/test_resnet", arch_args={}, hidden_size=16, projection_size=16, bs=16, epochs=2, num_workers=0)
N = 96


def number_image(i, size=8):
    "A picture whose colour is its number"
    return Image.new("RGB", (size, size), (i % 256, i//256, 77))


def numbers(x): return ((x[:, 0, 0, 0] + 256*x[:, 1, 0, 0])*255).round().long().tolist()


@pytest.fixture
def numbered(tmp_path):
    "96 images in three class folders, each with its number as colour"
    for i in range(N):
        f = tmp_path/"numbered"/"abc"[i % 3]/f"{i:03}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        number_image(i).save(f)
    return tmp_path/"numbered"


@pytest.fixture
def shards(numbered, tmp_path):
    "The same images in five shards: 20, 20, 20, 20 and 16"
    write_shards(numbered, tmp_path/"shards", per_shard=20)
    return tmp_path/"shards"


def said_by(f, *args, **kwargs):
    "What a call returned, and what its warnings said"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = f(*args, **kwargs)
    return out, [str(w.message) for w in said if "one colour" not in str(w.message)]


def dls_of(items, **kwargs):
    return unlabelled_dls(items, 8, **{**dict(bs=8, valid_pct=0, num_workers=0, device="cpu"), **kwargs})


def tar_of(path, members):
    "A tar of {name: bytes}"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(i):
    file = io.BytesIO()
    number_image(i).save(file, "png")
    return file.getvalue()


# Patterns

@pytest.mark.parametrize("pattern,names", [
    ("a", ["a"]), ("{0..3}", list("0123")), ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
    ("{008..011}", ["008", "009", "010", "011"]), ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]), ("{2..0}", list("210")),
    ("{0..9..4}", list("048")), ("x{,y}", ["x", "xy"]), ("{1..2}/{a,b}", ["1/a", "1/b", "2/a", "2/b"])])
def test_braces_are_expanded_as_in_bash(pattern, names):
    assert expand_braces(pattern) == names
    if shutil.which("bash"): assert os.popen(f"bash -c 'echo {pattern}'").read().split() == names


@pytest.mark.parametrize("pattern", ["{}", "a{x}b", "{1..}", "{0..99999999}", "{0..9999}{0..9999}"])
def test_braces_that_stand_for_nothing_or_too_much_are_refused(pattern):
    with pytest.raises(ValueError, match="stands for"): expand_braces(pattern)


def test_patterns_of_folders_and_files(numbered, monkeypatch):
    monkeypatch.chdir(numbered)
    everything = sorted(str(f.relative_to(numbered)) for f in numbered.rglob("*.png"))
    for pattern in ("{a,b,c}", "*", "*/*.png", "**/*.png", "[abc]/0*.png"):
        assert sorted(image_source(pattern).files) == everything, pattern
    source, said = said_by(image_source, "{a,z}")
    assert len(source.files) == 32 and said == ["1 of the 2 names of '{a,z}' do not exist: z"]
    dls = dls_of("{a,b}", labels=True)
    assert list(dls.vocab) == ["a", "b"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a{b}", "c[1]"):
        (tmp_path/folder).mkdir()
        number_image(1).save(tmp_path/folder/"1.png")
        assert not is_pattern(folder) and list(image_source(folder).files) == [f"{folder}/1.png"]


@pytest.mark.parametrize("pattern", ["nothing/*.png", "{x,y}", "shards/{0..9}.tar"])
def test_a_pattern_without_matches_is_named(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e: image_source(pattern)
    assert repr(pattern) in str(e.value)


# Tables

def table(numbered, **columns):
    "Paths relative to the folder that holds the images' folder, and other columns"
    files = sorted(numbered.rglob("*.png"), key=lambda f: f.name)
    paths = [str(f.relative_to(numbered.parent)) for f in files]
    return pd.DataFrame({"path": paths, **{k: [v(i) for i in range(N)] for k, v in columns.items()}})


SAVERS = {".csv": pd.DataFrame.to_csv, ".tsv": partial(pd.DataFrame.to_csv, sep="\t"),
          ".parquet": pd.DataFrame.to_parquet}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_table_gives_images_and_labels(numbered, tmp_path, kind, monkeypatch):
    if kind == ".parquet": pytest.importorskip("pyarrow")
    rows = table(numbered, label=lambda i: i % 12, other=lambda i: "NA" if i % 2 else "yes")
    SAVERS[kind](rows, tmp_path/f"rows{kind}", index=False)
    monkeypatch.chdir(numbered)   # paths are relative to the table, wherever one works
    dls = dls_of(tmp_path/f"rows{kind}", labels=True, valid_pct=.25)
    assert list(dls.vocab) == [str(i) for i in range(12)]   # and not 0, 1, 10, 11, 2
    for x, y in [*dls.train, *dls.valid]: assert [i % 12 for i in numbers(x)] == y.tolist()
    other = dls_of(tmp_path/f"rows{kind}", labels="other").train
    assert list(other.vocab) == ["NA", "yes"]   # NA is a name, not a missing value
    for x, y in other: assert [(i + 1) % 2 for i in numbers(x)] == y.tolist()


def test_a_data_frame_is_a_table(numbered, monkeypatch):
    monkeypatch.chdir(numbered.parent)
    rows = table(numbered, label=lambda i: i % 3)
    assert sorted(i for x, in dls_of(rows).train for i in numbers(x)) == list(range(N))
    by_folder = dls_of(rows, labels="outermost")
    assert list(by_folder.vocab) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["file", "Path", "image_path", "FILENAME"])
def test_the_column_of_paths_is_guessed(numbered, tmp_path, name):
    table(numbered, when=lambda i: i).rename(columns={"path": name}).to_csv(tmp_path/"t.csv")
    assert len(image_source(tmp_path/"t.csv").files) == N


def test_columns_are_named_where_they_cannot_be_guessed(numbered, tmp_path):
    rows = table(numbered, kind=lambda i: i % 2).rename(columns={"path": "photo of it"})
    rows.to_csv(tmp_path/"t.csv", index=False)
    for kwargs in ({}, {"column": "img"}):
        with pytest.raises(ValueError, match="'photo of it', 'kind'"): image_source(tmp_path/"t.csv", **kwargs)
    for labels in (True, "class"):
        with pytest.raises(ValueError, match="'photo of it', 'kind'.*labels=|labels=.*'photo of it', 'kind'"):
            image_source(tmp_path/"t.csv", labels, "photo of it")
    source = image_source(tmp_path/"t.csv", "kind", "photo of it")
    assert source.y.bincount().tolist() == [48, 48]
    with pytest.raises(ValueError, match="must hold paths"): image_source(rows, column="kind")


def test_paths_that_do_not_exist_are_listed_and_the_rest_goes_on(numbered, tmp_path):
    rows = table(numbered, label=lambda i: i % 3)
    rows.loc[[3, 50], "path"] = ["numbered/a/gone.png", "elsewhere/1.png"]
    rows.loc[7, "path"] = None
    rows.to_csv(tmp_path/"t.csv", index=False)
    dls, said = said_by(dls_of, tmp_path/"t.csv", labels=True)
    assert any("1 of 96 rows" in w for w in said)
    missing = next(w for w in said if "do not exist" in w)
    assert "2 of 95 files" in missing and "gone.png" in missing and "elsewhere" in missing
    seen = {i: y for x, ys in dls.train for i, y in zip(numbers(x), ys.tolist())}
    assert set(seen) <= set(range(N)) - {3, 7, 50} and all(i % 3 == y for i, y in seen.items())
    bad = check_images(tmp_path/"t.csv").bad
    assert [os.path.basename(f) for f, _ in bad] == ["gone.png", "1.png"]
    assert {why for _, why in bad} == {"cannot be opened"}
    rows["path"] = "nowhere/" + rows["path"].astype(str)
    rows.to_csv(tmp_path/"t.csv", index=False)
    with pytest.raises(FileNotFoundError, match="none of the 95 files .*relative paths start at the folder"):
        dls_of(tmp_path/"t.csv")


def test_images_without_a_label_are_left_out(numbered, tmp_path):
    rows = table(numbered, label=lambda i: None if i % 10 == 0 else "xy"[i % 2])
    rows.to_csv(tmp_path/"t.csv", index=False)
    source, said = said_by(image_source, tmp_path/"t.csv", True)
    assert len(source.files) == len(source.y) == N - 10
    assert any("10 of 96 images" in w and "000.png" in w for w in said)
    assert len(image_source(tmp_path/"t.csv").files) == N


@pytest.mark.parametrize("content,words", [
    ("a/000.png\na/003.png\n", "no header"), ("path,label\n", "no path"), ("", "cannot be read as a table"),
    ("path,label\na/000.png,1,2,3\n\"", "cannot be read as a table"), ("path,label\na/000.png,x\n", r"1 class\(es\)")])
def test_tables_that_cannot_be_used_are_refused(numbered, content, words):
    (numbered/"t.csv").write_text(content)
    with pytest.raises(ValueError, match=words): image_source(numbered/"t.csv", True)


def test_a_table_that_is_no_text_is_refused(numbered):
    (numbered/"t.csv").write_bytes(png(1))
    with pytest.raises(ValueError, match="cannot be read as a table"): image_source(numbered/"t.csv")
    with pytest.raises(FileNotFoundError, match="is no file"): image_source(numbered/"other.csv")


# Shards

def test_shards_hold_the_images_of_the_folder(numbered, shards):
    "Bytes, names, labels, pixels and digests"
    files = {f.relative_to(numbered).as_posix(): f for f in numbered.rglob("*.png")}
    source = image_source(shards)
    assert sorted(source.files.inside) == sorted(files)
    for member in source.files:
        content = files[member.name].read_bytes()
        assert member.open().read() == content and member.size == len(content)
        assert str(member).endswith(f".tar/{member.name}")
    x = load_images(source.files, 8, progress=False)
    assert [files[f"{'abc'[i % 3]}/{i:03}.png"].name for i in numbers(x/255)] == [m.name[2:] for m in source.files]
    assert [len(tarfile.open(f).getnames()) for f in sorted(shards.glob("*.tar"))] == [20, 20, 20, 20, 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_of_shards_comes_once_per_epoch(shards, workers):
    dls = dls_of(shards, valid_pct=.25, num_workers=workers, labels=True)
    assert list(dls.vocab) == ["a", "b", "c"]
    held_out = [i for x, _ in dls.valid for i in numbers(x)]
    for _ in range(2):
        seen = [i for x, y in dls.train for i in numbers(x)]
        assert len(seen) == 72 and sorted(seen + held_out) == list(range(N))
        for x, y in dls.train: assert [i % 3 for i in numbers(x)] == y.tolist()


def order_of(dls): return [i for x, in dls.train for i in numbers(x)]


def test_the_order_depends_on_the_seed_alone(shards):
    def orders(seed, workers):
        random.seed(seed)
        dls = dls_of(shards, num_workers=workers)
        return order_of(dls), order_of(dls)
    first, second = orders(0, 0)
    assert first != second and orders(0, 2) == (first, second) and orders(1, 0)[0] != first


def test_a_small_buffer_reads_shard_after_shard(shards):
    "An image comes at most `buffer` places before its turn, and shards come in random order"
    source = image_source(shards, buffer=5)
    firsts = set()
    for seed in range(8):
        idxs = source.files.shuffled(list(range(N)), random.Random(seed))
        assert sorted(idxs) == list(range(N))
        of_shard = source.files.shard[idxs]
        assert len(set(of_shard[:16])) <= 2   # at least 16 in a shard, and 5 may come early
        firsts.add(int(of_shard[0]))
    assert len(firsts) > 2


def test_mixed_order_is_that_of_a_shuffled_buffer():
    "Reference: a buffer that is filled from a stream and gives items at random"
    def stream(items, size, rng):
        buffer = []
        for o in items:
            if len(buffer) < size: buffer.append(o)
            else:
                k = int(rng.random()*size)
                yield buffer[k]
                buffer[k] = o
        rng.shuffle(buffer)
        yield from buffer
    for n, size in ((50, 7), (5, 9), (0, 3), (30, 1)):
        assert mixed_order(list(range(n)), size, random.Random(3)) == list(stream(range(n), size, random.Random(3)))
    places = np.zeros(40)
    for seed in range(300): places += np.argsort(mixed_order(list(range(40)), 40, random.Random(seed)))
    assert abs(places/300 - 19.5).max() < 3   # a buffer that holds all is a fair shuffle


def ids_of_a_fit(items, workers, epochs=1, cbs=(), bs=8, seed=0):
    "Numbers of the images of every batch"
    batches = []
    set_seed(seed)
    is_stream = isinstance(items, torch.utils.data.IterableDataset) or type(items).__name__ == "IterableDataset"
    dls = dls_of(items, num_workers=workers, bs=bs, n=N if is_stream else None)
    see = DoToImages(lambda learn: batches.append(numbers(learn.x)))
    augs = get_multi_aug_pipelines(2, 8, stats=None, backend="fused")
    learn = quiet(Learner(dls, small_model(3), cbs=[BarlowTwins(augs), see, *cbs]))
    return learn, batches, epochs


def may_have_workers(): multiprocessing.current_process()._config["daemon"] = False   # a rank of run_ranks may not


def fitted(rank, items, workers, epochs=2, bs=8):
    may_have_workers()
    if callable(items): items = items()
    learn, batches, epochs = ids_of_a_fit(items, workers, epochs, bs=bs)
    with learn.no_bar(), learn.distrib_ctx(): learn.fit(epochs)
    return batches


def need_ranks():
    pytest.importorskip("accelerate")
    if not hasattr(os, "fork") or not torch.distributed.is_available(): pytest.skip("processes are forked")
    from ranks import run_ranks
    return run_ranks


def test_two_ranks_with_two_workers_see_every_image_once(shards):
    run_ranks = need_ranks()
    first, second = run_ranks(partial(fitted, items=shards, workers=2))
    assert len(first) == len(second) == 2*6   # 96 images, 2 ranks, 8 per batch
    for epoch in range(2):
        mine, others = (sum(b[6*epoch:6*epoch + 6], []) for b in (first, second))
        assert sorted(mine + others) == list(range(N))
    assert first[:6] != first[6:]


def test_ranks_have_equally_many_batches_whatever_the_numbers(shards):
    "80 images, 3 ranks, 7 per batch"
    run_ranks = need_ranks()
    (shards/"000004.tar").unlink()
    batches = run_ranks(partial(fitted, items=shards, workers=1, epochs=1, bs=7), 3)
    assert [[len(b) for b in rank] for rank in batches] == [[7]*3]*3   # 27 for each rank
    assert max(Counter(i for rank in batches for b in rank for i in b).values()) == 1


def killed_and_resumed(rank, items, folder, at, workers):
    "Images of a run that is killed after step `at` and resumed, and those of an uninterrupted one"
    may_have_workers()
    def run(cbs, seed=0):
        learn, batches, epochs = ids_of_a_fit(items, workers, 2, cbs, seed=seed)
        try:
            with learn.no_bar(), learn.distrib_ctx(): learn.fit(2)
        except Killed: pass
        return batches
    whole = run([])
    before = run([Checkpoints(folder, every=1), KillAfter(at)])
    after = run([Checkpoints(folder, every=1, resume=True)], 1 + rank)
    return whole, before, after


@pytest.mark.parametrize("at", [2, 9])
def test_two_ranks_resume_in_the_middle_of_an_epoch(shards, tmp_path, at):
    run_ranks = need_ranks()
    ranks = run_ranks(partial(killed_and_resumed, items=shards, folder=tmp_path/"run", at=at, workers=2))
    for whole, before, after in ranks:
        assert whole[:at] == before[:at] and whole[at:] == after   # nothing twice, nothing left out
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(sum((sum(w[epoch], []) for w, _, _ in ranks), [])) == list(range(N))


def test_a_shard_that_is_cut_off_is_named_and_the_rest_goes_on(shards):
    whole = {m.name for m in image_source(shards).files}
    path = shards/"000002.tar"
    members = tarfile.open(path).getmembers()
    path.write_bytes(path.read_bytes()[:members[7].offset_data + 5])   # in the middle of the eighth image
    source, said = said_by(image_source, shards)
    assert {m.name for m in source.files} == whole - {m.name for m in members[7:]}
    assert len(said) == 1 and f"{path} is cut off or damaged after 7 image(s)" in said[0] and "1 of 5 shards" in said[0]
    dls, _ = said_by(dls_of, shards, bs=1)
    assert len(order_of(dls)) == N - 13 and len(bad_images(dls)) == 0


def test_wherever_a_shard_is_cut_its_whole_images_are_used(tmp_path):
    "Reference: what tarfile reads of the members that end before the cut"
    whole = tar_of(tmp_path/"s/0.tar", {f"{i}.png": png(i) for i in range(4)}).read_bytes()
    members = tarfile.open(tmp_path/"s/0.tar").getmembers()
    tar_of(tmp_path/"s/1.tar", {"9.png": png(9)})
    end = members[-1].offset_data + -(-members[-1].size//512)*512
    for cut in (*range(1, end + 512, 211), end, end + 511):
        (tmp_path/"s/0.tar").write_bytes(whole[:cut])
        source, said = said_by(image_source, tmp_path/"s")
        names = [f"{i}.png" for i, m in enumerate(members) if m.offset_data + m.size <= cut]
        assert [m.name for m in source.files] == [*names, "9.png"] and "0.tar" in "".join(said), cut


def test_damage_in_the_middle_of_a_shard_is_named(tmp_path):
    path = tar_of(tmp_path/"s/0.tar", {f"{i}.png": png(i) for i in range(4)})
    content = bytearray(path.read_bytes())
    offset = tarfile.open(path).getmembers()[2].offset
    content[offset:offset + 512] = b"\xff"*512
    path.write_bytes(content)
    source, said = said_by(image_source, tmp_path/"s")
    assert len(source.files) == 2 and "is cut off or damaged after 2 image(s)" in said[0]


def test_shards_that_are_none_are_named_and_the_rest_goes_on(tmp_path):
    tar_of(tmp_path/"s/0.tar", {"1.png": png(1), "2.png": png(2), ".hidden.png": png(3), "notes.txt": b"x"})
    (tmp_path/"s/1.tar").write_bytes(b"")
    (tmp_path/"s/2.tar").write_bytes(b"just text"*200)
    (tmp_path/"s/3.tar").write_bytes(gzip.compress((tmp_path/"s/0.tar").read_bytes()))
    tar_of(tmp_path/"s/4.tar", {"a.txt": b"x"})
    source, said = said_by(image_source, f"{tmp_path}/s/{{0..6}}.tar")
    assert [m.name for m in source.files] == ["1.png", "2.png"]
    for words in ("6 of 7 shards", "1.tar is empty", "2.tar is no tar", "3.tar is compressed (gzip)", "4.tar holds no"):
        assert words in said[0]
    (tmp_path/"s/0.tar").unlink()
    with pytest.raises(ValueError, match="no images in the 4 shard"): image_source(f"{tmp_path}/s/{{1..4}}.tar")


def test_labels_of_shards(tmp_path):
    "The member .cls, a field of .json, another member; folders otherwise"
    members = {}
    for i in range(12):
        members[f"x/{i:02}.cls"] = str(i % 3).encode()
        members[f"x/{i:02}.png"] = png(i)
        members[f"x/{i:02}.json"] = json.dumps({"species": "cat" if i % 2 else "dog", "box": [1]}).encode()
        members[f"x/{i:02}.place"] = b" sea\n" if i < 6 else b"land"
    del members["x/05.cls"], members["x/05.json"]
    path = tar_of(tmp_path/"s/0.tar", members)
    def found(labels):
        source, said = said_by(image_source, path, labels)
        y = {int(m.name[2:4]): source.vocab[k] for m, k in zip(source.files, source.y)}
        return y, said
    y, said = found(True)
    assert y == {i: str(i % 3) for i in range(12) if i != 5} and "1 of 12 images" in said[0] and "05.png" in said[0]
    assert found("species")[0] == {i: "cat" if i % 2 else "dog" for i in range(12) if i != 5}
    assert found(".place")[0] == {i: "sea" if i < 6 else "land" for i in range(12)}
    with pytest.raises(ValueError, match="labels='colour' is no label"): image_source(path, "colour")
    with pytest.raises(ValueError, match="labels='box' is no label"): image_source(path, "box")   # a list is none


def test_names_in_shards_may_be_long_or_not_ascii(tmp_path):
    names = ["d"*90 + "/" + "e"*90 + f"/{i}.png" for i in range(3)] + ["ä/ö.png", "b/a photo.v2.PNG"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path/"0.tar", "w", format=form) as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
        source = image_source(tmp_path/"0.tar")
        assert [m.name for m in source.files] == names
        assert numbers(load_images(source.files, 8, progress=False)/255) == list(range(5))


def test_a_shard_that_changes_while_it_is_used_is_noticed(shards):
    dls = dls_of(shards, bs=1, num_workers=0)
    order_of(dls)
    tar_of(shards/"000001.tar", {f"{i}.png": png(i) for i in range(99)})
    seen = order_of(dls)
    report = bad_images(dls)
    assert len(report) == 20 and report.counts == {"cannot be opened": 20} and "000001.tar" in report.bad[0][0]
    assert set(seen) == {i for m in image_source(f"{shards}/{{000000,000002,000003,000004}}.tar").files
                         for i in [int(m.name[2:5])]}


def test_broken_images_in_shards_are_skipped_and_listed(tmp_path):
    members = {f"{i}.png": png(i) for i in range(20)}
    members["7.png"], members["9.png"] = png(7)[:-30], b"text"
    dls = dls_of(tar_of(tmp_path/"0.tar", members), bs=4)
    assert 7 not in order_of(dls)
    bad = {os.path.basename(f): why for f, why in bad_images(dls).bad}
    assert bad == {"7.png": "truncated", "9.png": "not an image"}
    assert len(check_images(tmp_path/"0.tar", full=True)) == 2


def test_the_name_of_an_image_in_a_shard_leads_to_it(shards, numbered, tmp_path):
    for member in image_source(shards).files:
        found = named_image(str(member))
        assert found == member and found.open().read() == member.open().read()
    file = next(numbered.rglob("*.png"))
    assert named_image(file) == str(file)
    for name in ("nothing.png", shards, shards/"000000.tar/nothing.png", shards/"000009.tar/a/00.png", "x.tar/1.png"):
        assert named_image(name) is None, name
    home = tmp_path/"x.tar"   # a folder of such a name
    shutil.copytree(shards, home)
    assert str(named_image(f"{home}/000000.tar/{member.name}" if "000000" in member.path else
                           str(member).replace(str(shards), str(home)))).startswith(str(home))
    tar_of(shards/"000000.tar", {"new.png": png(1)})   # it is read again
    assert named_image(shards/"000000.tar/new.png") is not None


def test_shards_beside_images_are_not_read_and_named(numbered, shards):
    shutil.copy(shards/"000000.tar", numbered/"old.tar")
    source, said = said_by(image_source, numbered)
    assert len(source.files) == N and "1 .tar file(s) which are not read" in said[0]
    (numbered/"x.tar").mkdir()
    with pytest.raises(ValueError, match="2 .tar files and 3 others|one kind"): image_source(f"{numbered}/*")


def test_shards_on_two_disks(shards, tmp_path):
    for k in range(5):
        home = tmp_path/f"disk{k % 2}"
        home.mkdir(exist_ok=True)
        shutil.move(shards/f"00000{k}.tar", home/f"{k}.tar")
    source, said = said_by(image_source, f"{tmp_path}/disk{{0,1}}/{{0..4}}.tar")
    assert len(source.files) == N and "5 of 10 shards" in said[0]
    assert len(said_by(image_source, f"{tmp_path}/disk*/*.tar")[0].files) == N
    assert len(image_source([str(f) for f in tmp_path.glob("disk*/*.tar")]).files) == N


def test_identity_of_shards_is_their_content_not_their_place(shards, tmp_path):
    a = dls_of(shards).train_ds
    moved = shutil.copytree(shards, tmp_path/"elsewhere")
    assert dls_of(moved).train_ds.identity() == a.identity()
    (moved/"000004.tar").unlink()
    assert dls_of(moved).train_ds.identity() != a.identity()


def test_write_shards_refuses_to_mix(numbered, shards):
    with pytest.raises(ValueError, match="choose another folder"): write_shards(numbered, shards)
    with pytest.raises(ValueError, match="per_shard"): write_shards(numbered, shards/"new", per_shard=0)


# Runs

@pytest.mark.parametrize("kind", ["shards", "table"])
def test_a_run_on_another_source_resumes_and_is_evaluated(kind, numbered, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(numbered, label=lambda i: "xyz"[i % 3]).rename(columns={"path": "photo"}).to_csv("rows.csv", index=False)
    data, column = ("shards/{000000..000004}.tar", None) if kind == "shards" else ("rows.csv", "photo")
    monkeypatch.setattr("self_supervised_bt.checkpoints.Checkpoints.is_due", lambda self: self.iter == 2)
    kill = KillAfter(3)
    real = Learner.fit
    def killed(self, *args, **kwargs):
        self.add_cb(kill)
        return real(self, *args, **kwargs)
    monkeypatch.setattr(Learner, "fit", killed)
    with pytest.raises(Killed): pretrain(data, "cifar", "run", column=column, **SMALL)
    monkeypatch.setattr(Learner, "fit", real)
    results = pretrain(out="run", resume=True, num_workers=0)
    assert results["state"] == "ended" and results["images"] == 91
    seen = seen_in_training(tmp_path/"run", image_files(numbered), 0)
    assert seen.sum() == 91   # the same images, in files
    bt_evaluate("run", data, protocol="knn", workers=0, plain=True, column=column)
    assert "seen in training" in capsys.readouterr().out
    shutil.rmtree(shards) if kind == "shards" else (tmp_path/"rows.csv").unlink()
    (tmp_path/"run/results.json").unlink()
    with pytest.raises(ValueError, match="no longer there"): pretrain(out="run", resume=True, num_workers=0)


def test_commands_take_any_source(numbered, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(numbered, label=lambda i: "xyz"[i % 3]).to_csv("rows.csv", index=False)
    try: bt_diagnose("rows.csv", batches=2)
    except SystemExit as e: assert e.code == 1   # problems were found
    assert "96 images of rows.csv" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--column 'img' is no column"):
        bt_pretrain("rows.csv", column="img", workers=0)
    with pytest.raises(SystemExit, match="stands for nothing"): bt_pretrain("shards/{}.tar", workers=0)


def test_labelled_dls_of_two_tables(numbered, tmp_path):
    rows = table(numbered, label=lambda i: "xyz"[i % 3])
    rows[:60].to_csv(tmp_path/"train.csv")
    rows[60:].to_csv(tmp_path/"test.csv")
    dls = labelled_dls(tmp_path/"train.csv", 8, test=tmp_path/"test.csv", num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (60, 36)
    for x, y in dls.valid: assert [i % 3 for i in numbers(x)] == y.tolist()
    assert torch.equal(read_image(dls.valid_ds.files[0], 8)[:, 0, 0], torch.tensor([60, 0, 77], dtype=torch.uint8))


# Data sets of other libraries

def as_datasets(images=None, **columns):
    "Images and columns as a data set of Hugging Face"
    datasets = pytest.importorskip("datasets")
    images = [number_image(i) for i in range(N)] if images is None else images
    return datasets.Dataset.from_dict({"id": list(range(len(images))), "image": images, **columns})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_data_set_of_hugging_face(workers):
    datasets = pytest.importorskip("datasets")
    ds = as_datasets(label=[i % 3 for i in range(N)]).cast_column("label", datasets.ClassLabel(names=["z", "y", "x"]))
    dls = dls_of(ds, labels=True, valid_pct=.25, num_workers=workers)
    assert list(dls.vocab) == ["z", "y", "x"]   # its own order
    seen = [(i, k) for x, y in [*dls.train, *dls.valid] for i, k in zip(numbers(x), y.tolist())]
    assert sorted(i for i, _ in seen) == list(range(N)) and all(i % 3 == k for i, k in seen)
    assert [m.name for m in image_source(ds).files][:1] == ["row 0"]
    again = dls_of(as_datasets(label=[i % 3 for i in range(N)]), valid_pct=.25).train_ds
    assert again.identity() == dls_of(ds, valid_pct=.25).train_ds.identity() != dls_of(ds).train_ds.identity()


def test_labels_of_hugging_face_that_are_missing_or_text():
    datasets = pytest.importorskip("datasets")
    ds = as_datasets(kind=["ab"[i % 2] if i % 5 else None for i in range(N)], label=[i % 3 - 1 for i in range(N)])
    source, said = said_by(image_source, ds, "kind")
    assert len(source.files) == 76 and list(source.vocab) == ["a", "b"] and "20 of 96 images" in said[0]
    source, said = said_by(image_source, ds.cast_column("label", datasets.ClassLabel(names=["c", "d"])), True)
    assert source.y.bincount().tolist() == [32, 32]   # -1 is unknown
    for labels in ("species", True):
        with pytest.raises(ValueError, match="'id', 'image'|id, image"):
            image_source(as_datasets(), labels)


def test_data_sets_of_hugging_face_that_cannot_be_used():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="no column of images, its columns are id, pixels"):
        image_source(datasets.Dataset.from_dict({"id": [1, 2], "pixels": [[1], [2]]}))
    with pytest.raises(ValueError, match="splits train, test"):
        image_source(datasets.DatasetDict(train=as_datasets(), test=as_datasets()))
    with pytest.raises(ValueError, match="column='img' is no column"): image_source(as_datasets(), column="img")
    with pytest.raises(ValueError, match="holds no images"): dls_of(as_datasets().select([]))


def test_a_broken_image_of_hugging_face_is_skipped_and_listed(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [dict(bytes=png(i), path=None) for i in range(20)]
    rows[4], rows[9] = dict(bytes=b"text", path="four.png"), None
    ds = datasets.Dataset.from_dict({"photo": rows}, features=datasets.Features(photo=datasets.Image()))
    dls = dls_of(ds, bs=1)
    assert not {4, 9} & set(order_of(dls))
    assert bad_images(dls).bad == [("row 4 (four.png)", "not an image"), ("row 9", "empty file")]


def test_files_of_hugging_face_on_a_disk(tmp_path, monkeypatch):
    "A folder of save_to_disk, and Parquet files with the images inside"
    pytest.importorskip("datasets")
    ds = as_datasets(label=["ab"[i % 2] for i in range(N)])
    ds.save_to_disk(tmp_path/"saved")
    for k in range(2): ds.select(range(48*k, 48*k + 48)).to_parquet(tmp_path/f"part-{k}.parquet")
    monkeypatch.chdir(tmp_path)
    for items in ("saved", tmp_path/"saved", "part-*.parquet"):
        dls = dls_of(items, labels=True)
        assert sorted(order_of(dls_of(items))) == list(range(N)), items
        for x, y in dls.train: assert [i % 2 for i in numbers(x)] == y.tolist()
    assert len(image_source("part-1.parquet").files) == 48
    results = pretrain("part-0.parquet", "cifar", "run", **{**SMALL, "epochs": 1})
    assert results["state"] == "ended" and results["images"] == 46


class Numbered(torch.utils.data.Dataset):
    "Items as (image, number modulo 3)"
    def __init__(self, n=N, make=number_image): self.n, self.make = n, make
    def __len__(self): return self.n
    def __getitem__(self, i): return self.make(i), i % 3


MAKERS = dict(pillow=number_image, array=lambda i: np.asarray(number_image(i)),
              tensor=lambda i: torch.from_numpy(np.array(number_image(i))).permute(2, 0, 1),
              floats=lambda i: torch.from_numpy(np.array(number_image(i))).permute(2, 0, 1)/255)


@pytest.mark.parametrize("make", MAKERS)
def test_a_data_set_of_pytorch(make):
    dls = dls_of(Numbered(make=MAKERS[make]), labels=True)
    seen = [(i, k) for x, y in dls.train for i, k in zip(numbers(x), y.tolist())]
    assert sorted(i for i, _ in seen) == list(range(N)) and all(i % 3 == k for i, k in seen)
    few = torch.utils.data.Subset(Numbered(make=MAKERS[make]), range(10, 30))
    assert sorted(order_of(dls_of(few, bs=4))) == list(range(10, 30))


def test_data_sets_of_torchvision(numbered):
    from torchvision.datasets import FakeData, ImageFolder
    source = image_source(ImageFolder(numbered), True)
    assert list(source.files) == [str(f) for f in image_files(numbered)] and list(source.vocab) == ["a", "b", "c"]
    fake = image_source(FakeData(20, (3, 16, 16), 2), True)
    assert len(fake.files) == 20 and len(fake.vocab) == 2
    assert read_image(fake.files[3], 16).shape == (3, 16, 16)


@pytest.mark.parametrize("dataset,words", [
    (Numbered(0), "no images"), (Numbered(make=lambda i: "text"), "got a str"),
    (Numbered(make=lambda i: torch.zeros(5, 8, 8)), r"\(5, 8, 8\)"),
    (Numbered(make=lambda i: np.zeros((8, 8))), "float64")])
def test_data_sets_of_pytorch_that_cannot_be_used(dataset, words):
    with pytest.raises(ValueError, match=words): image_source(dataset)


class Stream(torch.utils.data.IterableDataset):
    "96 items, read from the start"
    def __iter__(self): return iter((number_image(i), 0) for i in range(N))


def stream(kind):
    if kind == "pytorch": return Stream()
    return as_datasets().to_iterable_dataset(num_shards=3)


@pytest.mark.parametrize("kind", ["pytorch", "hugging face"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_of_a_stream_comes_once_per_epoch(kind, workers):
    random.seed(0)
    dls = dls_of(stream(kind), n=N, valid_pct=.25, num_workers=workers, buffer=20)
    held_out = [i for x, in dls.valid for i in numbers(x)]
    orders = [order_of(dls) for _ in range(2)]
    for order in orders: assert len(order) == 72 and sorted(order + held_out) == list(range(N))
    assert orders[0] != orders[1] and held_out == sorted(held_out)
    random.seed(0)
    again = dls_of(stream(kind), n=N, valid_pct=.25, num_workers=0, buffer=20)
    assert [order_of(again) for _ in range(2)] == orders   # whatever the number of workers


def test_a_stream_is_read_once_per_epoch_and_keeps_no_more_than_its_buffer():
    class Counted(Stream):
        reads = 0
        def __iter__(self):
            Counted.reads += 1
            yield from Stream.__iter__(self)
    dls = dls_of(Counted(), n=N, buffer=10)
    files, most, before = dls.train_ds.files, [], Counted.reads
    for _ in dls.train: most.append(len(files.held))
    assert Counted.reads == before + 1 and max(most) <= 10


def test_two_ranks_with_two_workers_see_every_image_of_a_stream_once():
    run_ranks = need_ranks()
    first, second = run_ranks(partial(fitted, items=partial(stream, "hugging face"), workers=2))
    assert len(first) == len(second) == 12
    for epoch in range(2):
        mine, others = (sum(b[6*epoch:6*epoch + 6], []) for b in (first, second))
        assert sorted(mine + others) == list(range(N))


def test_a_run_on_a_stream_resumes_in_the_middle_of_an_epoch(tmp_path):
    def run(cbs, seed=0):
        learn, batches, _ = ids_of_a_fit(Stream(), 0, 1, cbs, seed=seed)
        try:
            with learn.no_bar(): learn.fit(2)
        except Killed: pass
        return batches
    whole = run([])
    before, after = run([Checkpoints(tmp_path, every=1), KillAfter(5)]), run([Checkpoints(tmp_path, resume=True)], 1)
    assert whole == before + after and len(whole) == 24


def test_streams_that_cannot_be_used():
    with pytest.raises(ValueError, match="n is missing"): dls_of(Stream())
    with pytest.raises(ValueError, match="labels=True has no meaning"): dls_of(Stream(), n=N, labels=True)
    with pytest.raises(RuntimeError, match="ended after 96 images, and n=100"): order_of(dls_of(Stream(), n=100))


def test_a_broken_image_of_a_stream_leaves_a_row_out():
    class Broken(torch.utils.data.IterableDataset):
        def __iter__(self): return iter("text" if i == 7 else number_image(i) for i in range(20))
    dls = dls_of(Broken(), n=20, bs=4)
    sizes = [len(x) for x, in dls.train]
    assert sorted(sizes) == [3, 4, 4, 4, 4] and bad_images(dls).bad == [("image 7 of the stream", "damaged")]


def test_a_run_on_an_object_is_given_it_again(tmp_path):
    ds = Numbered()
    results = pretrain(ds, "cifar", tmp_path/"run", **{**SMALL, "epochs": 1})
    assert results["images"] == 91 and results["data"] == "<Numbered>"
    for name in ("results.json", "encoder.safetensors", "model.safetensors"): (tmp_path/"run"/name).unlink()
    with pytest.raises(ValueError, match="are an object, <Numbered>"): pretrain(out=tmp_path/"run", resume=True)
    assert pretrain(ds, out=tmp_path/"run", resume=True, num_workers=0)["state"] == "ended"
    with pytest.raises(ValueError, match="does not hold the images"):
        pretrain(Numbered(50), out=tmp_path/"run", resume=True, num_workers=0)


# What photographs are not

def test_sixteen_bits_mean_the_same_in_training_file_and_evaluation(numbered, tmp_path):
    "value_range is kept with the run and the encoder"
    for i in range(40):
        f = tmp_path/"medical"/"ab"[i % 2]/f"{i:02}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 4096, (12, 12)).astype(np.uint16)).save(f)
    run = tmp_path/"run"
    pretrain(tmp_path/"medical", "cifar", run, value_range=(100, 3000), **{**SMALL, "epochs": 1})
    assert json.loads((run/"run.json").read_text())["value_range"] == [100, 3000]
    encoder = load_encoder(run/"encoder.safetensors")
    assert encoder.value_range == [100, 3000]
    assert load_encoder(save_encoder(encoder, tmp_path/"again.safetensors")).value_range == [100, 3000]
    seen = []
    real = folders.unlabelled_dls
    def spy(*args, **kwargs):
        seen.append(kwargs.get("value_range"))
        return real(*args, **kwargs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(folders, "unlabelled_dls", spy)
        evaluate(run, tmp_path/"medical", ("knn",), num_workers=0)
    assert seen == [[100, 3000]]
    with pytest.raises(ValueError, match="value_range"):
        pretrain(out=run, resume=True, value_range=4095, data=tmp_path/"medical")


@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_arrays_of_many_channels(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 10_000, (12, 10, 5)).astype(np.uint16) for _ in range(24)]
    for i, a in enumerate(arrays):
        f = tmp_path/"tiles"/f"{i:02}.{kind}"
        f.parent.mkdir(exist_ok=True)
        if i % 2: a = np.moveaxis(a, -1, 0)   # channels may come first
        if kind == "npy": np.save(f, a)
        else: tifffile.imwrite(f, a, photometric="minisblack", planarconfig="separate" if i % 2 else "contig")
    assert folders.size_and_channels(image_source(tmp_path/"tiles").files) == (10, 5)
    args = dict(bs=4, valid_pct=0, num_workers=0, device="cpu")
    dls = unlabelled_dls(tmp_path/"tiles", 10, n_in=5, value_range=10_000, **args)
    dls.train.shuffle = False
    x = torch.cat([b[0] for b in dls.train])*255
    expected = np.stack([np.moveaxis(a[1:11], -1, 0)*(255/10_000) for a in arrays])
    assert np.abs(x.numpy() - expected).max() <= .5 + 1e-3
    stats = folders.image_stats(dls, num_workers=0)
    np.testing.assert_allclose(stats[0], expected.round().mean((0, 2, 3))/255, atol=1e-4)
    results = pretrain(tmp_path/"tiles", "cifar", tmp_path/"run", value_range=10_000,
                       **{**SMALL, "epochs": 1, "bs": 8})
    assert results["state"] == "ended" and load_encoder(tmp_path/"run/encoder.safetensors").created_by["n_in"] == 5
    assert len(json.loads((tmp_path/"run/run.json").read_text())["recipe"]["views"]["stats"][0]) == 5


def test_numbers_of_channels_that_differ_are_named(tmp_path):
    for i in range(6): np.save(tmp_path/f"{i}.npy", np.zeros((8, 8, 4 if i == 2 else 5), np.uint8))
    with pytest.raises(ValueError, match="4 in .*2.npy, 5 in .*0.npy"):
        folders.size_and_channels(image_source(tmp_path).files)
    dls = unlabelled_dls(tmp_path, 8, n_in=5, bs=1, valid_pct=0, num_workers=0, device="cpu")
    assert all(x.shape[1] == 5 for x, in dls.train)
    assert [(os.path.basename(f), why) for f, why in bad_images(dls).bad] == [("2.npy", "other channels")]


@pytest.mark.parametrize("dtype,value_range,reason", [
    (np.float32, None, "unknown range"), (np.int16, None, "unknown range"), (np.uint8, None, None),
    (np.uint16, None, None), (np.float32, (0, 1), None), (np.int16, 100, None)])
def test_what_a_number_means_in_an_array(tmp_path, dtype, value_range, reason):
    np.save(tmp_path/"a.npy", np.arange(16).reshape(4, 4).astype(dtype))
    if reason:
        with pytest.raises(BadImage, match=reason): read_image(tmp_path/"a.npy", 4, 1, value_range)
        return
    low, high = value_range if isinstance(value_range, tuple) else (0, value_range or np.iinfo(dtype).max)
    expected = np.clip(np.round((np.arange(16) - low)*255/(high - low)), 0, 255)
    assert read_image(tmp_path/"a.npy", 4, 1, value_range).flatten().tolist() == expected.tolist()


def test_nan_and_damage_in_arrays(tmp_path):
    np.save(tmp_path/"a.npy", np.array([[np.nan, np.inf], [-np.inf, .5]], np.float32))
    assert read_image(tmp_path/"a.npy", 2, 1, (0, 1)).flatten().tolist() == [0, 255, 0, 128]
    np.save(tmp_path/"o.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (tmp_path/"e.npy").write_bytes(b"")
    (tmp_path/"c.npy").write_bytes((tmp_path/"a.npy").read_bytes()[:-4])
    for name in "oec":
        with pytest.raises(BadImage, match=f"{name}.npy"): read_image(tmp_path/f"{name}.npy", 2, 1)


def test_statistics_of_images_are_those_of_all_pixels(numbered):
    dls = dls_of(numbered, valid_pct=.25)
    x = load_images(dls.train_ds.files, 8, progress=False).double()/255
    expected = [x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3), correction=0).tolist()]
    for workers in (0, 2):
        np.testing.assert_allclose(folders.image_stats(dls, num_workers=workers), expected, atol=1e-12)
    np.testing.assert_allclose(folders.image_stats((x*255).round().byte()), expected, atol=1e-12)
    np.testing.assert_allclose(folders.image_stats(x.float()), expected, atol=1e-6)
    assert len(folders.image_stats(dls, 5)[0]) == 3
    with pytest.raises(TypeError, match="DataLoaders of this library"): folders.image_stats("photos")


@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_photographs_of_telephones(tmp_path, kind):
    from PIL import features
    if kind == "heic": pytest.importorskip("pillow_heif").register_heif_opener()
    elif not features.check("avif"): pytest.skip("this Pillow has no AVIF")
    for i in range(4): Image.new("RGB", (32, 24), (40*i, 90, 150)).save(tmp_path/f"{i}.{kind}", quality=95)
    files = image_files(tmp_path)
    assert len(files) == 4
    x = load_images(files, 16, progress=False)
    assert np.abs(x[:, 0].float().mean((1, 2)).numpy() - 40*np.arange(4)).max() < 4


def test_heic_without_its_library_is_listed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    number_image(1).save(tmp_path/"a.png")
    (tmp_path/"b.heic").write_bytes(b"x"*100)
    report = check_images(tmp_path)
    assert [(os.path.basename(f), why) for f, why in report.bad] == [("b.heic", "no decoder")]
    with pytest.raises(BadImage, match="pillow-heif.*pip install"): read_image(tmp_path/"b.heic", 8)
