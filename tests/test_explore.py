"Tables of representations, search and near-duplicates: rows as `encode` gives them, brute force, interrupted calls"
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import image_items, small_encoder
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Resize, ToTensor

from self_supervised_bt import explore, sources
from self_supervised_bt.cli import bt_duplicates, bt_embed, bt_similar
from self_supervised_bt.data import digits_dls, digits_images, image_files, load_images
from self_supervised_bt.datasets import known_images
from self_supervised_bt.encoder_files import restore_input
from self_supervised_bt.evaluation import encode
from self_supervised_bt.explore import embed, load_table, matrix_of, near_duplicates, save_table, similar
from self_supervised_bt.folders import unlabelled_dls
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.maps import table_h
from self_supervised_bt.sources import write_shards
from self_supervised_bt.weights import save_encoder

QUIET = dict(num_workers=0, progress=False)


def an_encoder(channels=3, size=16, seed=0):
    "A small encoder that says which images it expects"
    torch.manual_seed(seed)
    net = small_encoder(channels)
    net.clean_pipeline = restore_input(dict(size=[size, size], stats=[[.5], [.25]]))
    return net


@pytest.fixture
def net(): return an_encoder()


@pytest.fixture
def saved(tmp_path):
    "The file of an encoder"
    encoder = create_encoder("timm/test_resnet", n_in=3, pretrained=False, small_stem=False)
    encoder.clean_pipeline = restore_input(dict(size=[32, 32]))
    return save_encoder(encoder, tmp_path/"encoder.safetensors")


def equal(a, b):
    "Are two tables the same, bit for bit?"
    same = list(a) == list(b) and a.drop(columns="h").equals(b.drop(columns="h"))
    return same and np.array_equal(matrix_of(a), matrix_of(b))


def unit(h):
    h = np.asarray(h, dtype=np.float64)
    return h/np.linalg.norm(h, axis=1, keepdims=True)


def a_table(h, **columns):
    return explore.table_of("file", [f"{i}.png" for i in range(len(h))], None, np.float32(h), columns)


# Embed

@pytest.mark.parametrize("bs, num_workers, tta",
                         [(64, 0, None), (7, 2, None), (16, 0, "flip"), (9, 0, ("sizes", "flip"))])
def test_rows_are_those_of_encode(net, folder, bs, num_workers, tta):
    table = embed(net, folder, bs=bs, num_workers=num_workers, tta=tta, progress=False)
    files = image_files(folder)
    h, _ = encode(net, load_images(files, 24 if tta and "sizes" in tta else 16, progress=False), tta=tta)
    np.testing.assert_allclose(matrix_of(table), h, atol=2e-6)
    assert table.file.tolist() == [str(f) for f in files]
    assert table.label.tolist() == [f.parent.name for f in files]
    assert {row.dtype for row in table.h} == {np.dtype("float32")}
    assert table.attrs["width"] == h.shape[1] and table.attrs["size"] == [16, 16] and table.attrs["bad"] == []


def test_arrays_lists_loaders_and_dls(net, folder):
    files = image_files(folder)
    x = load_images(files, 16, progress=False)
    h = matrix_of(embed(net, folder, **QUIET))
    table = embed(net, (x, list(range(40))), **QUIET)
    np.testing.assert_allclose(matrix_of(table), h, atol=2e-6)
    assert table["index"].tolist() == table.label.tolist() == list(range(40)) and "file" not in table
    assert list(embed(net, x.numpy(), **QUIET)) == ["index", "h"]
    assert equal(embed(net, [str(f) for f in files], **QUIET), embed(net, folder, **QUIET))
    dls = unlabelled_dls(folder, 16, bs=8, labels=True, num_workers=0)
    part = embed(net, dls.valid, **QUIET)
    assert len(part) == 4 and set(part.file) < {str(f) for f in files} and part.label.isin(["dark", "light"]).all()
    whole = embed(net, dls, **QUIET)
    assert whole.file.tolist() == [*dls.train_ds.files, *dls.valid_ds.files]
    np.testing.assert_allclose(matrix_of(whole.sort_values("file")), h, atol=2e-6)


def test_loaders_of_others_give_names_in_order(net, folder):
    ds = ImageFolder(folder, Compose([Resize((16, 16)), ToTensor()]))
    table = embed(net, DataLoader(ds, 7, shuffle=True), **QUIET)
    h, y = encode(net, DataLoader(ds, 7))
    assert np.array_equal(matrix_of(table), h)
    assert table.file.tolist() == [f for f, _ in ds.samples] and table.label.tolist() == [ds.classes[i] for i in y]
    some = embed(net, DataLoader(Subset(ds, [30, 2, 5]), 2), **QUIET)
    assert some.file.tolist() == [ds.samples[i][0] for i in (30, 2, 5)]
    items = [(im.as_subclass(torch.Tensor), y) for im, y in image_items(20, size=16, channels=3)]
    plain = embed(net, DataLoader(items, 7), **QUIET)
    assert plain["index"].tolist() == list(range(20)) and plain.label.tolist() == [y for _, y in items]


def test_the_bar_does_not_cut_a_loader_short(net, folder, capsys):
    "fastprogress ends a loop at the total it was given, and a loader has its own batches"
    ds = ImageFolder(folder, Compose([Resize((16, 16)), ToTensor()]))
    assert len(embed(net, DataLoader(ds, 3), bs=64)) == len(embed(net, folder, num_workers=0)) == 40


def test_rows_of_a_part_of_the_digits_know_their_place():
    dls = digits_dls(labels=True, device="cpu")
    table = embed(an_encoder(1, 8), dls.valid, progress=False)
    x, y = digits_images()
    assert table.label.tolist() == y[table["index"].tolist()].tolist()
    h, _ = encode(an_encoder(1, 8), x[table["index"].tolist()])
    np.testing.assert_allclose(matrix_of(table), h, atol=2e-6)


def test_labels_of_several_classes():
    x = torch.rand(3, 3, 16, 16)
    table = embed(an_encoder(), (x, torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])), progress=False)
    assert table.label.tolist() == ["0;2", "", "1"]


def test_broken_and_missing_files_are_listed_and_the_rest_goes_on(net, folder, tmp_path):
    files = [str(f) for f in image_files(folder)]
    (folder/"light"/"a.png").write_bytes(b"no image")
    whole = (folder/"dark"/"01.png").read_bytes()
    (folder/"dark"/"01.png").write_bytes(whole[:len(whole)//2])
    lost = str(tmp_path/"gone"/"x.jpg")
    with pytest.warns(UserWarning, match="3 of 42 files cannot be read"):
        table = embed(net, [lost, *files, folder/"light"/"a.png"], tmp_path/"t.npz", bs=8, **QUIET)
    bad = dict(table.attrs["bad"])
    assert bad[lost] == "cannot be opened" and bad[str(folder/"light"/"a.png")] == "not an image" and len(bad) == 3
    assert table.file.tolist() == [f for f in files if f not in bad]
    listed = pd.read_csv(tmp_path/"t.bad.csv")
    assert listed.file.tolist() == [lost, str(folder/"dark"/"01.png"), str(folder/"light"/"a.png")]
    h, _ = encode(net, load_images(table.file.tolist(), 16, progress=False))
    np.testing.assert_allclose(matrix_of(table), h, atol=2e-6)
    with pytest.raises(ValueError, match="none of the images can be read.*not an image"):
        embed(net, [folder/"light"/"a.png"], **QUIET)


def test_a_table_of_paths_keeps_rows_without_a_label_and_lists_missing_files(net, folder, tmp_path):
    files = [str(f) for f in image_files(folder)][::-1]
    paths = pd.DataFrame({"picture": [*files, "gone.jpg"], "kind": (["a", "b", ""]*14)[:len(files) + 1]})
    paths.to_csv(tmp_path/"paths.csv", index=False)
    with pytest.warns(UserWarning, match="1 of 41 files cannot be read"):
        table = embed(net, tmp_path/"paths.csv", labels="kind", column="picture", **QUIET)
    assert table.file.tolist() == files and [*dict(table.attrs["bad"])] == [str(tmp_path/"gone.jpg")]
    assert table.label.fillna("").tolist() == paths.kind.tolist()[:-1]
    of_folder = embed(net, folder, **QUIET)
    np.testing.assert_array_equal(matrix_of(table), matrix_of(of_folder)[::-1])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert equal(table, embed(net, paths.assign(picture=[*files, tmp_path/"gone.jpg"]), labels="kind",
                                  column="picture", **QUIET))
    with pytest.raises(ValueError, match="column='path' is no column.*'picture', 'kind'"):
        embed(net, tmp_path/"paths.csv", column="path", **QUIET)
    with pytest.raises(ValueError, match="column='picture' is for files"):
        embed(net, torch.zeros(3, 3, 16, 16), column="picture", **QUIET)


def test_shards_and_patterns(net, folder, tmp_path):
    of_folder = embed(net, folder, **QUIET).set_index("file")
    write_shards(folder, tmp_path/"shards", per_shard=11)
    table = embed(net, tmp_path/"shards", **QUIET)
    assert len(table) == len(of_folder) and table.file.str.contains(".tar/").all()
    for row in table.itertuples():
        own = of_folder.loc[str(folder/row.file.split(".tar/")[1])]
        assert row.label == own.label
        np.testing.assert_array_equal(row.h, own.h)
    some = embed(net, f"{folder}/{{dark,light}}/*1.png", **QUIET)
    assert [f for f in of_folder.index if f.endswith("1.png")] == some.file.tolist()
    np.testing.assert_array_equal(matrix_of(some), np.stack(of_folder.loc[some.file].h))


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_headers_of_a_shard_are_read_once(with_labels, net, tmp_path, monkeypatch):
    read, own = [], sources.shard_index
    monkeypatch.setattr(sources, "shard_index", lambda *args: (read.append(1), own(*args))[1])
    with tarfile.open(tmp_path/"a.tar", "w") as tar:
        for i in range(12):
            content = io.BytesIO()
            Image.new("RGB", (16, 16), (20*i, 0, 0)).save(content, "PNG")
            sources.add_member(tar, f"{i}.png", content.getvalue())
            if with_labels and i < 8: sources.add_member(tar, f"{i}.cls", b"ab"[i % 2:i % 2 + 1])
    table = embed(net, tmp_path/"a.tar", **QUIET)
    assert len(read) == 1 and len(table) == 12 and ("label" in table) == with_labels
    if with_labels: assert table.label.fillna("").tolist() == [*"abababab", "", "", "", ""]


def test_images_are_read_a_few_batches_ahead_only(net, folder, monkeypatch):
    events, read = [], explore.ImageFiles.__getitem__
    monkeypatch.setattr(explore.ImageFiles, "__getitem__", lambda self, i: (events.append("read"), read(self, i))[1])
    net.register_forward_hook(lambda *_: events.append("encode"))
    embed(net, folder, bs=4, **QUIET)
    assert events == ["read", "encode"]*10


def test_looking_changes_nothing(net, folder):
    net.train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    embed(net, folder, **QUIET)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_whitening(net, folder, tmp_path):
    h, _ = encode(net, load_images(image_files(folder), 16, progress=False))
    table = embed(net, folder, tmp_path/"w.parquet", whiten="fit", **QUIET)
    np.testing.assert_allclose(matrix_of(table), net.whitening(h), atol=1e-4)
    again = embed(net, folder, whiten=True, **QUIET)
    np.testing.assert_allclose(matrix_of(again), matrix_of(table), atol=1e-5)
    loaded = load_table(tmp_path/"w.parquet")
    assert again.attrs["whiten"] == table.attrs["whiten"] == loaded.attrs["whiten"] is not None
    image = Image.open(table.file[5]).copy()
    assert similar(table, image, k=1, model=net).file.item() == table.file[5]
    with pytest.raises(ValueError, match="different representations, with another whitening"):
        explore.joined([table, embed(net, folder, **QUIET)])


@pytest.mark.parametrize("kwargs, message", [
    (dict(bs=0), "bs must be a positive int"), (dict(out="t.txt"), "ends in .parquet"),
    (dict(size=-1), "size must be"), (dict(tta="blur"), "tta must be"), (dict(whiten=True), "remembers no whitening"),
    (dict(labels="middle"), "labels must be"), (dict(device="cpu"), "leave device out")])
def test_bad_arguments(net, folder, kwargs, message):
    with pytest.raises(ValueError, match=message): embed(net, folder, **kwargs)


def test_bad_data(net, tmp_path):
    (tmp_path/"notes").mkdir()
    (tmp_path/"notes"/"a.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image files below"): embed(net, tmp_path/"notes")
    with pytest.raises(FileNotFoundError, match="is not a folder"): embed(net, tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="none of the 2 files is there"): embed(net, ["a/b.jpg", "c.jpg"])
    with pytest.raises(ValueError, match="empty list"): embed(net, [])
    with pytest.raises(ValueError, match="takes images of 3 channel"): embed(net, torch.rand(4, 1, 16, 16))
    with pytest.raises(ValueError, match="is for files"): embed(net, torch.rand(4, 3, 16, 16), labels=False)


# Files

@pytest.mark.parametrize("ending", explore.ENDINGS)
def test_files_give_every_bit_back(tmp_path, ending):
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    h = rng.normal(size=(50, 7)).astype(np.float32)*np.float32(10)**rng.integers(-20, 20, (50, 7)).astype(np.float32)
    names = [f"größe/{i},\"1\" \u4e2d.png" for i in range(50)]
    labels = [None, "NA", "null", "1", "a;b"]*10
    table = explore.table_of("file", names, labels, h, dict(encoder="0"*16, tta=["flip"]), [("x.png", "truncated")])
    again = load_table(save_table(table.assign(score=h[:, 0]), tmp_path/f"t{ending}"))
    assert set(again) == {"file", "label", "h", "score"}
    assert np.array_equal(matrix_of(again), h) and again.file.tolist() == names and again.attrs == table.attrs
    assert [None if pd.isna(label) else label for label in again.label] == labels
    assert np.array_equal(np.float32(again.score), h[:, 0])
    for numbers in (list(range(50)), [str(i) for i in range(50)]):   # numbers stay numbers, text stays text
        numbered = explore.table_of("index", list(range(50)), numbers, h, {})
        assert equal(load_table(save_table(numbered, tmp_path/f"n{ending}")), numbered)
    part = table[table.label.notna()]
    assert load_table(save_table(part, tmp_path/f"part{ending}")).file.tolist() == part.file.tolist()


def test_parquet_is_a_list_of_fixed_size_that_pandas_reads(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(explore, "ROWS", 16)
    h = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    file = save_table(a_table(h, encoder="e"), tmp_path/"t.parquet")
    assert pq.read_schema(file).field("h").type == pa.list_(pa.float32(), 7)
    table = pd.read_parquet(file)
    assert np.array_equal(np.stack(table.h), h) and table.attrs == {"encoder": "e", "bad": []}
    table.to_parquet(tmp_path/"pandas.parquet")   # lists of any length
    assert np.array_equal(matrix_of(load_table(tmp_path/"pandas.parquet")), h)


def test_files_that_are_no_tables(tmp_path):
    pytest.importorskip("pyarrow")
    for ending in explore.ENDINGS:
        file = tmp_path/f"t{ending}"
        with pytest.raises(FileNotFoundError, match="there is no table"): load_table(file)
        file.write_bytes(b"something else\n1\n")
        with pytest.raises(ValueError, match="cannot be read as a table"): load_table(file)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path/"t.parquet")
    with pytest.raises(ValueError, match="no column h, but a"): load_table(tmp_path/"t.parquet")
    nameless = pd.DataFrame({"h": [np.ones(2)]})
    with pytest.raises(ValueError, match="file or index"): save_table(nameless, tmp_path/"u.npz")
    with pytest.raises(ValueError, match="one width"): matrix_of(pd.DataFrame({"h": [np.ones(2), np.ones(3)]}))


def test_a_matrix_is_not_copied():
    h = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    table = a_table(h.copy())
    assert np.shares_memory(matrix_of(table), table.h[0])
    shuffled = table.sample(frac=1, random_state=0)
    assert np.array_equal(matrix_of(shuffled), h[shuffled.index]) and np.array_equal(matrix_of(table.iloc[3:9]), h[3:9])
    mixed = table.assign(h=[*table.h[:19], h[19].astype(np.float64)])
    assert np.array_equal(matrix_of(mixed), h) and matrix_of(mixed).dtype == np.float32
    h.flags.writeable = False
    for rows in (list(h), list(h[:, 1:3]), list(h[::-1]), list(h[::2]), [h[0], *h[:19]], list(np.asfortranarray(h)),
                 [h[0]], [h[0].copy()], [row.tolist() for row in h], [torch.from_numpy(row.copy()) for row in h]):
        found = matrix_of(pd.DataFrame({"h": pd.Series(rows, dtype=object)}))
        assert np.array_equal(found, np.array([np.asarray(row) for row in rows])) and found.dtype == np.float32
    assert np.shares_memory(matrix_of(a_table(h)), h)


def calls_of(f):
    "How often Python calls a function, of its own or of C, while `f` runs"
    count = 0
    def see(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")
    sys.setprofile(see)
    try: f()
    finally: sys.setprofile(None)
    return count


@pytest.mark.parametrize("query", [7, "7.png", "p/19999.png", np.ones(4, np.float32)])
def test_a_query_has_no_loop_over_the_rows(query):
    table = a_table(np.random.default_rng(0).normal(size=(20_000, 4)))
    table["file"] = "p/" + table["file"]
    assert calls_of(lambda: similar(table, query)) < 10_000


def test_groups_and_maps_have_no_loop_over_the_rows():
    h = np.random.default_rng(0).normal(size=(6000, 4)).astype(np.float32)
    h[1::2] = h[::2]
    table = a_table(h)
    few, many = (calls_of(lambda: near_duplicates(part, .9999)) for part in (table.iloc[:3000], table))
    assert many - few < 2*3000   # a call for each pair of tiles, not several per row
    assert calls_of(lambda: table_h(table)) < 500
    assert calls_of(lambda: explore.table_of("file", [f"{i}.png" for i in range(6000)], None, h, {})) < 3000


# Interrupted calls, and ranks

@pytest.mark.parametrize("ending", explore.ENDINGS)
def test_an_interrupted_call_continues(net, folder, tmp_path, monkeypatch, ending):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(explore, "PART", 8)
    (folder/"dark"/"01.png").write_bytes(b"")
    out, images = tmp_path/f"t{ending}", []
    def stop(module, args): images.append(len(args[0])) or (sum(images) > 21 and interrupt())
    def interrupt(): raise KeyboardInterrupt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = embed(net, folder, bs=4, **QUIET)
        hook = net.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt): embed(net, folder, out, bs=4, **QUIET)
        assert not out.exists() and len(list((tmp_path/f".t{ending}.parts").glob("*.npz"))) == 2
        hook.remove()
        with pytest.raises(ValueError, match="holds parts of a table of another encoder"):
            embed(an_encoder(seed=1), folder, out, bs=4, **QUIET)
        images.clear()
        net.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
        table = embed(net, folder, out, bs=4, **QUIET)
        assert sum(images) == 24 and equal(table, whole) and table.attrs == whole.attrs
        assert [f.name for f in tmp_path.glob(".*")] == [] and (tmp_path/"t.bad.csv").exists()
        images.clear()
        assert equal(embed(net, folder, out, bs=4, **QUIET), whole) and images == []   # it is there
        with pytest.raises(ValueError, match="exists, and is a table of another encoder"):
            embed(an_encoder(seed=1), folder, out, **QUIET)
        with pytest.raises(ValueError, match="exists, and is a table with tta \\[\\], and now"):
            embed(net, folder, out, tta="flip", **QUIET)
        with pytest.raises(ValueError, match="exists, and is a table of other images"):
            embed(net, folder/"light", out, **QUIET)


KILLED = """
import os, signal, sys
from self_supervised_bt import explore
from self_supervised_bt.cli import bt_embed

encoder, folder, home = sys.argv[1:]
explore.PART = 8
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def after(f, n):
    calls = []
    def wrapped(*args, **kwargs):
        out = f(*args, **kwargs)
        calls.append(1)
        if len(calls) == n: kill()
        return out
    return wrapped
def half(file, *args):
    with open(file, "wb") as f: f.write(b"PK or PAR1, and no more")
    kill()
def in_a_part():
    own, calls = explore.write_arrays, []
    explore.write_arrays = lambda *args: (calls.append(1), (half if len(calls) == 3 else own)(*args))[1]
def between_parts(): explore.Parts.write = after(explore.Parts.write, 2)
def in_the_table(): explore.WRITERS[".parquet"] = half
def before_parts_are_removed():
    own = explore.shutil.rmtree
    def rmtree(*args, **kwargs): kill() if os.path.exists(out) else own(*args, **kwargs)
    explore.shutil.rmtree = rmtree

for moment in (between_parts, in_a_part, in_the_table, before_parts_are_removed):
    pid = os.fork()
    if not pid:
        out = f"{home}/{moment.__name__}.parquet"
        moment()
        bt_embed(encoder, folder, out=out, bs=4, workers=0)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), moment
"""

def test_a_command_that_was_killed_continues_and_gives_the_same_table(saved, folder, tmp_path, monkeypatch, capsys):
    "One process imports everything and forks one that is killed with SIGKILL for each moment"
    pytest.importorskip("pyarrow")
    if not hasattr(os, "fork"): pytest.skip("no os.fork")
    (folder/"dark"/"01.png").write_bytes(b"")
    monkeypatch.setattr(explore, "PART", 8)
    whole, images, encode_batch = tmp_path/"whole.parquet", [], explore.RowEncoder.__call__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bt_embed(str(saved), str(folder), out=str(whole), bs=4, workers=0)
        home = tmp_path/"killed"
        home.mkdir()
        subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, saved, folder, home], check=True, timeout=400)
        count = lambda self, b: (images.append(len(b)), encode_batch(self, b))[1]  # noqa: E731
        monkeypatch.setattr(explore.RowEncoder, "__call__", count)
        for name, left in dict(between_parts=24, in_a_part=24, in_the_table=0, before_parts_are_removed=0).items():
            images.clear()
            out = home/f"{name}.parquet"
            assert out.exists() == (name == "before_parts_are_removed")
            bt_embed(str(saved), str(folder), out=str(out), bs=4, workers=0)
            assert "39 images, " in capsys.readouterr().out and sum(images) == left, name
            assert equal(load_table(out), load_table(whole)) and load_table(out).attrs == load_table(whole).attrs
            assert out.read_bytes() == whole.read_bytes() and out.with_suffix(".bad.csv").exists()
    assert [f.name for f in home.glob(".*") if f.is_dir()] == []


def test_duckdb_reads_the_table(net, folder, tmp_path):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    pytest.importorskip("pyarrow")
    table = embed(net, folder, tmp_path/"t.parquet", **QUIET)
    near = table.h[3]/np.linalg.norm(table.h[3])
    rows = duckdb.execute("select file, label, array_cosine_similarity(h::float[8], ?::float[8]) as s "
                          f"from '{tmp_path}/t.parquet' order by s desc limit 4", [near.tolist()]).fetchall()
    assert rows[0][:2] == (table.file[3], table.label[3]) and rows[0][2] == pytest.approx(1, abs=1e-5)
    assert [row[0] for row in rows[1:]] == similar(table, 3, 3).file.tolist()


def test_an_interrupted_loader_continues(net, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "PART", 8)
    dl = DataLoader(ImageFolder(folder, Compose([Resize((16, 16)), ToTensor()])), 3)
    whole, images = embed(net, dl, **QUIET), []
    def stop(module, args):
        images.append(len(args[0]))
        if sum(images) == 24: raise KeyboardInterrupt
    hook = net.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): embed(net, dl, tmp_path/"t.npz", **QUIET)
    hook.remove()
    assert equal(embed(net, dl, tmp_path/"t.npz", **QUIET), whole)


def test_each_rank_writes_a_shard(net, folder, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    whole = embed(net, folder, bs=4, **QUIET)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 2):
        monkeypatch.setenv("RANK", str(rank))
        embed(net, folder, tmp_path/"t.parquet", bs=4, **QUIET)
    with pytest.raises(FileNotFoundError, match="1 of the 3 shards.*t-00001-of-00003.parquet"):
        load_table(tmp_path/"t.parquet")
    monkeypatch.setenv("RANK", "1")
    assert len(embed(net, folder, tmp_path/"t.parquet", bs=4, **QUIET)) == 13
    table = load_table(tmp_path/"t.parquet")
    np.testing.assert_allclose(matrix_of(table), matrix_of(whole), atol=2e-6)
    assert table.drop(columns="h").equals(whole.drop(columns="h"))
    shards = [pd.read_parquet(f) for f in sorted(tmp_path.glob("t-*.parquet"))]
    assert [f for shard in shards for f in shard.file] == table.file.tolist()
    (tmp_path/"t-00000-of-00002.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="by 2 and by 3 ranks"): load_table(tmp_path/"t.parquet")
    monkeypatch.setenv("WORLD_SIZE", "64")
    with pytest.raises(ValueError, match="40 images, which 64 ranks cannot share"): embed(net, folder, tmp_path/"u.npz")


# Search

@pytest.fixture
def table(net, folder): return embed(net, folder, **QUIET)


def expected(table, h, k, without=()):
    "File and similarity by brute force in float64"
    s = (unit(matrix_of(table)) @ unit(h[None])[0])
    s[list(without)] = -2
    order = np.argsort(-s, kind="stable")[:k]
    return table.file.iloc[order].tolist(), s[order]


def test_a_query_by_file_row_image_and_vector(net, table):
    h, file = matrix_of(table), table.file[7]
    files, s = expected(table, h[7], 6, [7])
    for query in (7, np.int64(7), file, "/".join(file.split("/")[-2:]), os.path.relpath(file)):
        found = similar(table, query, k=6)
        assert found.file.tolist() == files and table.file[found.index].tolist() == files
        np.testing.assert_allclose(found.similarity, s, atol=1e-6)
    files, s = expected(table, h[7], 6)
    picture = Image.open(file).copy()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for query in (h[7], torch.from_numpy(h[7]), h[7].tolist(), table.iloc[7]):
        assert similar(table, query, k=6).file.tolist() == files
    copy = f"{file}.png"
    picture.save(copy)
    for query in (picture, np.array(picture), pixels, copy):
        found = similar(table, query, k=6, model=net)
        np.testing.assert_allclose(found.similarity, s, atol=1e-5)


def test_several_queries(table):
    h = matrix_of(table)
    for queries in ([3, table.file[9]], np.array([3, 9]), [table.file[3], 9]):
        found = similar(table, queries, k=4)
        assert found["query"].tolist() == [table.file[3]]*4 + [table.file[9]]*4
        assert found.file.tolist() == expected(table, h[3], 4, [3])[0] + expected(table, h[9], 4, [9])[0]
    found = similar(table, table.iloc[[3, 9]], k=4)
    assert found.file.tolist() == expected(table, h[3], 4)[0] + expected(table, h[9], 4)[0]
    assert found.equals(similar(table, h[[3, 9]], k=4))
    assert len(similar(table, [0], k=39)) == 39 and len(similar(table, h[0], k=40)) == 40


def test_a_row_never_finds_itself_even_among_copies():
    h = np.ones((6, 4), np.float32)
    for row in range(6): assert sorted(similar(a_table(h), row, k=5).index) == [i for i in range(6) if i != row]


def test_a_file_is_found_by_its_path_the_end_of_it_or_a_link(table, tmp_path):
    files = table.file.tolist()
    for text in (table, table.assign(file=table.file.astype(object))):
        assert similar(text, files[7]).attrs["query"][0][:2] == [files[7], 7]
        assert similar(text, "/".join(files[7].split("/")[-2:])).attrs["query"][0][:2] == [files[7], 7]
        (tmp_path/"link").unlink(missing_ok=True)
        (tmp_path/"link").symlink_to(os.path.dirname(files[7]))
        assert similar(text, tmp_path/"link"/os.path.basename(files[7])).attrs["query"][0][1] == 7
    doubled = table.assign(file=["a/1.png", "b/1.png", *files[2:]])
    with pytest.raises(ValueError, match="is the end of 2 files: a/1.png, b/1.png"): similar(doubled, "1.png")
    wide = a_table(np.eye(5, 4))
    with pytest.raises(FileNotFoundError, match="did you mean 3.png"): similar(wide, "3.pngg")


@pytest.mark.parametrize("query, kwargs, error, message", [
    (40, {}, ValueError, "query=40 is no row"), (-1, {}, ValueError, "query=-1 is no row"),
    (0, dict(k=40), ValueError, "k must be in 1..39, the other rows"), (0, dict(k=0), ValueError, "k must be in 1..39"),
    (0, dict(k=2.5), ValueError, "k must be in"), (np.ones(3), {}, ValueError, "query is 3 wide and the table 8"),
    ("nowhere/00.pngg", {}, FileNotFoundError, "no file of the table and none on the disk"),
    (True, {}, TypeError, "query must be a file"), (None, {}, TypeError, "query must be a file"),
    ([], {}, ValueError, "query is empty"), (0, dict(search="best"), ValueError, "search must be one of"),
    (__file__, {}, ValueError, "pass the encoder")])
def test_bad_queries(table, query, kwargs, error, message):
    with pytest.raises(error, match=message): similar(table, query, **kwargs)


def test_a_query_that_is_no_image(net, table):
    with pytest.raises(ValueError, match="cannot be read as an image"): similar(table, __file__, model=net)
    with pytest.raises(ValueError, match="must be an image"): similar(table, torch.rand(2, 3, 16, 16)[None], model=net)


def test_a_table_of_another_encoder(net, table, folder):
    image = Image.open(table.file[0]).copy()
    with pytest.raises(ValueError, match="different representations, of another encoder"):
        similar(table, image, model=an_encoder(seed=1))
    with pytest.raises(ValueError, match="different representations, of another encoder"):
        similar(table, embed(an_encoder(seed=1), folder, **QUIET).head(2))
    with pytest.raises(ValueError, match="different representations, with tta"):
        explore.joined([table, embed(net, folder, tta="flip", **QUIET)])
    with pytest.raises(ValueError, match="made of this table|make it of this table"):
        pytest.importorskip("faiss")
        similar(table, 0, search=explore.search_index(table.head(10), "flat"))
    sized = embed(net, folder, size=24, **QUIET)
    assert similar(sized, image, k=1, model=net).similarity.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", explore.KINDS)
def test_faiss_agrees_with_exact_search(kind):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    h = (rng.normal(size=(40, 1, 24)) + .5*rng.normal(size=(40, 50, 24))).reshape(-1, 24).astype(np.float32)
    s, idx = explore.nearest(h[::7], h, 10, "exact")
    s2, idx2 = explore.nearest(h[::7], h, 10, kind)
    recall = np.mean([len(set(a) & set(b))/10 for a, b in zip(idx, idx2)])
    assert recall == 1 if kind == "flat" else recall > .95
    np.testing.assert_allclose(s2[idx == idx2], s[idx == idx2], atol=1e-5)
    index = explore.SearchIndex(h, kind)
    found = similar(a_table(h), 5, k=10, search=index)
    assert len(set(found.index) & set(similar(a_table(h), 5, k=10).index)) >= 9 and 5 not in found.index


def test_faiss_is_taken_for_many_queries_on_many_rows(monkeypatch):
    pytest.importorskip("faiss")
    assert explore.search_to_use("auto", 1, 10**7) == "exact" == explore.search_to_use("auto", 10**5, 10**5)
    assert explore.search_to_use("auto", 10**6, 10**6) == "ivf"
    monkeypatch.setattr(explore, "need", lambda package: (_ for _ in ()).throw(ImportError("no faiss")))
    with pytest.warns(UserWarning, match="pip install faiss-cpu"):
        assert explore.search_to_use("auto", 10**6, 10**6) == "exact"


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ImportError, match=r"pip install .self_supervised_bt\[explore\]"):
        explore.need("no_such_package")


# Near-duplicates

def groups_of(found, by="file"): return {frozenset(g) for g in found.groupby("group")[by].apply(list)}


def brute_groups(h, at):
    "Connected groups by repeated products, float64"
    near = unit(h) @ unit(h).T >= at
    for _ in range(int(np.ceil(np.log2(len(h)))) + 1): near = (near.astype(int) @ near.astype(int)) > 0
    return {frozenset(np.flatnonzero(row)) for row in near if row.sum() > 1}


@pytest.mark.parametrize("at", [.5, .9, .99])
def test_groups_equal_connected_pairs(at):
    h = np.random.default_rng(0).normal(size=(300, 6))
    found = near_duplicates(a_table(h), at)
    assert {frozenset(int(f.split(".")[0]) for f in g) for g in groups_of(found)} == brute_groups(h, at)
    s = unit(h) @ unit(h).T - 2*np.eye(300)
    np.testing.assert_allclose(found.similarity, s.max(1)[found.index], atol=1e-6)
    assert found.group.tolist() == sorted(found.group) and found.groupby("group").size().min() > 1


def test_groups_do_not_depend_on_order_scale_or_tiles(monkeypatch):
    h = np.random.default_rng(0).normal(size=(300, 4))
    table = a_table(h)
    found = groups_of(near_duplicates(table, .99))
    assert groups_of(near_duplicates(table.sample(frac=1, random_state=0), .99)) == found
    assert groups_of(near_duplicates(a_table(7*h), .99)) == found
    h = np.float32(h)
    assert np.array_equal(explore.linked(h, .99, chunk=7), explore.linked(h, .99))
    monkeypatch.setattr(explore, "MANY_ROWS", 10)   # by the nearest alone, as for many rows
    assert sum(map(len, groups_of(near_duplicates(table, .99, "exact")))) == sum(map(len, found))


def test_many_identical_images_are_one_group():
    h = np.concatenate([np.ones((60, 5)), np.random.default_rng(0).normal(size=(60, 5)) - 3])
    assert frozenset(f"{i}.png" for i in range(60)) in groups_of(near_duplicates(a_table(h)))


def clustered(rng, n, dims, width=24):
    "Images of an encoder, more or less: clusters on a curved surface of few dimensions"
    rows = rng.normal(size=(8, dims))[rng.integers(0, 8, n)] + .7*rng.normal(size=(n, dims))*rng.gamma(4, .25, (n, 1))
    return np.tanh(rows @ rng.normal(size=(dims, width))/dims**.5) + 1


@pytest.mark.parametrize("dims", [4, 12])
@pytest.mark.parametrize("share", [0, .02, .3])
def test_the_threshold_finds_copies_and_little_else(dims, share):
    rng = np.random.default_rng(dims)
    h = clustered(rng, 1500, dims)
    copies = h[:int(share*1500)] + 2e-3*rng.normal(size=(int(share*1500), 24))
    found = near_duplicates(a_table(np.concatenate([h, copies])))
    pairs = {frozenset((f"{i}.png", f"{1500 + i}.png")) for i in range(len(copies))}
    right = len(groups_of(found) & pairs)
    assert right >= .97*len(pairs)
    assert found.group.nunique() - right <= max(6, .1*len(pairs))
    assert f"Threshold {found.attrs['threshold']:.6g}" in found.attrs["why"] or "No threshold" in found.attrs["why"]


def test_expected_distances_fit_images_without_copies():
    "Also with a third of the images doubled, whose own nearest distances say nothing of the others"
    rng = np.random.default_rng(0)
    h = clustered(rng, 2000, 8)
    for rows in (h, np.concatenate([h, h[:700]])):
        d = explore.NearestDistances(explore.other_rows(np.float32(rows), explore.LATE, "exact")[0])
        alone = explore.NearestDistances(explore.other_rows(np.float32(h), explore.LATE, "exact")[0])
        for q in (.1, .5, .9):
            r = np.quantile(alone.first, q)
            assert d.expected(r)/len(rows) == pytest.approx(q, abs=.12)


def test_thresholds_that_are_given(table):
    for threshold in (0, -1, 1.01, "high", float("nan"), True):
        with pytest.raises(ValueError, match="threshold must be a cosine similarity"): near_duplicates(table, threshold)
    for chance in (0, 1, -.1):
        with pytest.raises(ValueError, match="chance must be above 0"): near_duplicates(table, chance=chance)
    with pytest.raises(ValueError, match="2 are needed"): near_duplicates(table.head(1), .9)
    with pytest.raises(ValueError, match="40 are needed to choose a threshold"): near_duplicates(table.head(39))
    assert "as given" in near_duplicates(table, .9).attrs["why"]
    none = near_duplicates(a_table(np.eye(50)), .9)
    assert len(none) == 0 and list(none) == ["group", "file", "similarity"]
    assert len(near_duplicates(a_table(np.array([[1, 0], [1, 0.]])), 1)) == 2
    for n in (2, 3, 5): assert near_duplicates(a_table(np.ones((n, 3))), .9).group.tolist() == [0]*n


def test_a_smaller_chance_finds_less():
    h = clustered(np.random.default_rng(0), 800, 6)
    rows = a_table(np.concatenate([h, h[:80]*(1 + .03*np.random.default_rng(1).normal(size=(80, 24)))]))
    found = [near_duplicates(rows, chance=chance) for chance in (.2, .05, .01)]
    assert set(found[0].file) >= set(found[1].file) >= set(found[2].file) and len(found[0]) > len(found[2])
    assert "at most 1 % by chance" in found[2].attrs["why"]


def test_the_first_of_each_group_is_kept_by_its_index(table, net, folder):
    for i in range(4): Image.open(table.file[i]).save(folder/"light"/f"copy{i}.png")
    both = embed(net, folder, **QUIET)
    found = near_duplicates(both, .99999)
    kept = both.drop(found.index[found.duplicated("group")])
    assert len(both) - len(kept) >= 4 and set(kept.label) == {"dark", "light"}


# Pictures

def test_pictures(table):
    found = similar(table, [table.file[0], table.file[1]], k=3)
    axes = explore.plot_similar(found)
    assert [ax.get_title() for ax in axes] == [t for i in (0, 3) for t in
                                               ("query", *(f"{s:.3f}" for s in found.similarity[i:i + 3]))]
    pixels = load_images([table.file[0]], 64, progress=False)[0].permute(1, 2, 0)
    assert np.array_equal(axes[0].images[0].get_array(), pixels)
    assert len(explore.plot_similar(similar(table, 0, k=2))) == 3
    groups = near_duplicates(table, .5)
    assert len(explore.plot_groups(groups, n=2, most=3)) <= 6
    os.remove(table.file[groups.index[0]])
    explore.plot_groups(groups, n=1)   # a grey picture in its place
    with pytest.raises(ValueError, match="no groups"): explore.plot_groups(near_duplicates(a_table(np.eye(50)), .9))


def test_pictures_of_images_in_shards(net, folder, tmp_path):
    write_shards(folder, tmp_path/"shards", per_shard=11)
    table = embed(net, tmp_path/"shards", **QUIET)
    found = similar(table, table.file[3], k=2)
    axes = explore.plot_similar(found)
    inside = [table.file[3], *found.file]
    for ax, name in zip(axes, inside, strict=True):
        theirs = explore.thumbnail(str(folder/name.split(".tar/")[1]))
        assert np.array_equal(ax.images[0].get_array(), theirs) and theirs.std() > 0
    other = similar(table.drop(index=3), table.file[3], 1, net)   # of a shard, and not in the table
    assert other.file.iloc[0] == found.file.iloc[0]


def test_pictures_of_arrays(net):
    x = torch.rand(45, 3, 16, 16)
    table = embed(net, x, progress=False)
    found = similar(table, 4, k=2)
    with pytest.raises(ValueError, match="pass images="): explore.plot_similar(found)
    axes = explore.plot_similar(found, x)
    np.testing.assert_allclose(axes[0].images[0].get_array(), 255*x[4].permute(1, 2, 0), atol=1)


def test_the_picture_of_the_threshold():
    rng = np.random.default_rng(0)
    h = clustered(rng, 500, 6)
    found = near_duplicates(a_table(np.concatenate([h, h[:50] + 1e-3])))
    ax = explore.plot_threshold(found)
    assert ax.get_xscale() == "log" and sum(found.attrs["nearest"]["found"]) == 550
    assert sum(found.attrs["nearest"]["expected"]) == pytest.approx(550, rel=.05)


# Commands

def test_the_commands(saved, folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    for i in range(6): Image.open(folder/"light"/f"{2*i:02}.png").save(folder/"light"/f"again{i}.png", compress_level=1)
    (folder/"empty.jpg").write_bytes(b"")
    bt_embed(str(saved), str(folder), out="t.parquet", tta="flip", workers=0, device="cpu")
    out = capsys.readouterr().out
    assert "46 images" in out and "t.parquet" in out and "1 file" in out and "t.bad.csv" in out
    table = load_table("t.parquet")
    assert len(table) == 46 and table.attrs["tta"] == ["flip"]
    file = table.file[5]
    bt_similar("t.parquet", file, k=3, out="similar.png")
    out = capsys.readouterr().out
    assert all(f in out for f in similar(table, file, k=3).file) and (tmp_path/"similar.png").stat().st_size > 1000
    Image.open(file).save("query.png")
    bt_similar("t.parquet", "query.png", k=1, model=str(saved))
    assert file in capsys.readouterr().out
    bt_duplicates("t.parquet", threshold=.99999)
    out = capsys.readouterr().out
    found = near_duplicates(table, .99999)
    assert found.attrs["why"] in " ".join(out.split()) and f"{found.group.nunique()} groups" in out
    written = pd.read_csv("t.duplicates.csv")
    assert written.file.tolist() == found.file.tolist() and list(written)[:3] == ["row", "group", "file"]
    pictures = {f.name for f in tmp_path.glob("t.*.png")}
    assert pictures == {"t.duplicates.groups.png", "t.duplicates.threshold.png"}


@pytest.mark.parametrize("command, message", [
    (lambda: bt_embed("nowhere.safetensors", "."), "nowhere.safetensors"),
    (lambda: bt_similar("none.parquet", "a.jpg"), "there is no table none.parquet"),
    (lambda: bt_similar("t.npz", "a.jpg"), "query 'a.jpg' is no file of the table"),
    (lambda: bt_similar("t.npz", "0", k=9), "--k must be in 1..3|k must be in 1..3"),
    (lambda: bt_duplicates("t.npz", threshold=2), "--threshold must be a cosine similarity"),
    (lambda: bt_duplicates("t.npz"), "--threshold|40 are needed"),
])
def test_errors_of_the_commands_are_one_line(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    save_table(a_table(np.eye(4)), "t.npz")
    with pytest.raises(SystemExit, match=message) as e: command()
    assert "\n" not in str(e.value)


def test_what_a_table_says_is_plain(table): assert json.loads(json.dumps(table.attrs)) == table.attrs


def test_names_that_are_not_utf8(net, folder, tmp_path):
    pytest.importorskip("pyarrow")
    odd = os.fsdecode(os.fsencode(folder) + b"/dark/gr\xfcn.png")
    Image.open(folder/"dark"/"01.png").save(odd, format="png")
    with pytest.raises(ValueError, match="1 file names are not UTF-8"):
        embed(net, folder, tmp_path/"t.parquet", **QUIET)
    for ending in (".csv", ".npz"):
        assert odd in embed(net, folder, tmp_path/f"t{ending}", **QUIET).file.tolist()


def test_a_data_set_by_name_has_the_channels_of_the_encoder(net):
    table = embed(net, "digits", bs=256, **QUIET)
    x = known_images("digits")[0].expand(-1, 3, -1, -1)
    assert list(table)[:2] == ["index", "label"] and len(table) == len(x)
    np.testing.assert_allclose(np.stack(table.h), embed(net, x, bs=256, **QUIET).h.tolist(), atol=1e-6)
    with pytest.raises(ValueError, match="root='data' is for data sets by name"):
        embed(net, "data", root="data", **QUIET)
    with pytest.raises(ValueError, match="root='data' is for files"): embed(net, x[:4], root="data", **QUIET)


def test_values_mean_what_they_meant_in_training(net, tmp_path):
    "12 bits in files of 16: as the encoder remembers it, also where no pixel is bright enough to guess it"
    rng = np.random.default_rng(0)
    for i in range(4): Image.fromarray(rng.integers(0, 300, (24, 24)).astype(np.uint16)).save(tmp_path/f"{i}.png")
    given = embed(net, tmp_path, value_range=4095, **QUIET)
    net.value_range = 4095
    try:
        table = embed(net, tmp_path, **QUIET)
        assert equal(table, given) and similar(table, table.file[1], 1, net).similarity.iloc[0] <= 1
        other = tmp_path/"other"
        other.mkdir()
        (other/"1.png").write_bytes((tmp_path/"1.png").read_bytes())
        assert similar(table, other/"1.png", 1, net).similarity.iloc[0] > .99999
    finally: del net.value_range


def test_a_device_that_is_not_there_is_named(saved):
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one of this machine, .* got '{device}'"):
            embed(saved, torch.rand(2, 3, 24, 24), device=device, **QUIET)
