"Maps: places, clusters, thumbnails, the picture; and the page, in a browser where there is one"
import base64
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import all_digits
from PIL import Image

from self_supervised_bt import maps
from self_supervised_bt.diagnostics import PALETTE
from self_supervised_bt.maps import (
    add_map,
    classes_of,
    cluster_images,
    cluster_table,
    grid_picks,
    image_map,
    map_page,
    plot_clusters,
    table_h,
    tiles_of,
    typical_images,
    with_image_rows,
)
from self_supervised_bt.sources import image_source, write_shards


def digits_table(n=200, label=True):
    "Handwritten digits, represented by their pixels"
    x, y = all_digits()
    table = pd.DataFrame({"index": range(n), "h": list(x[:n].flatten(1).float().numpy())})
    return table.assign(label=y[:n].tolist()) if label else table


def images_of(n=200): return all_digits()[0][:n]


@pytest.fixture
def files(tmp_path):
    "A table of 40 image files in two folders, with relative paths"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        name = f"{'dark' if i % 2 else 'light'}/{i:02}.png"
        (tmp_path/name).parent.mkdir(exist_ok=True)
        pixels = np.full((30, 40, 3), 20 + 5*i, np.uint8)
        Image.fromarray(pixels).save(tmp_path/name)
        rows.append({"file": name, "label": name.split("/")[0], "h": rng.standard_normal(6).astype(np.float32)})
    return pd.DataFrame(rows)


# Tables

def test_a_table_is_checked():
    table = digits_table(8)
    h = table_h(table)
    assert h.dtype == torch.float32 and torch.allclose(h.norm(dim=1), torch.ones(8))
    for bad, words in [(table.drop(columns="h"), "column h"), (table.drop(columns="index"), "file, key or index"),
                       (table.iloc[:0], "no rows"), (table.to_dict(), "got a dict"),
                       (table.assign(h=1.), "must be a vector"), (table.assign(h=[["a"]]*8), "must hold numbers"),
                       (table.assign(h=[np.ones(3)]*7 + [np.ones(4)]), "7 of width 3, 1 of width 4")]:
        with pytest.raises(ValueError, match=words): table_h(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named_by_its_row(value):
    table = digits_table(8)
    table.at[5, "h"] = np.full(64, value, np.float32)
    with pytest.raises(ValueError, match=r"in 1 of 8 rows \(5\)"): cluster_images(table, 2)
    with pytest.raises(ValueError, match="in 1 of 8 rows"): image_map(table, images=images_of(8))


def test_lists_from_a_database_are_representations_too():
    table = digits_table(6)
    lists = table.assign(h=[row.tolist() for row in table["h"]])
    assert torch.equal(table_h(table), table_h(lists))


# Places

@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_one_seed_gives_one_map(method):
    table = digits_table(60)
    first = add_map(table, method, seed=3)
    assert first[["map_x", "map_y"]].equals(add_map(table, method, seed=3)[["map_x", "map_y"]])
    assert first["label"].equals(table["label"]) and "map_x" not in table


def test_places_that_are_there_are_used():
    table = digits_table(20).assign(map_x=range(20), map_y=0.)
    assert add_map(table) is table
    assert not add_map(table, "pca")["map_x"].equals(table["map_x"])
    with pytest.raises(ValueError, match="need a method"): add_map(table, perplexity=5)
    with pytest.raises(ValueError, match="NaN or infinite numbers in map_x"): add_map(table.assign(map_x=np.nan))


@pytest.mark.parametrize("method, options, words", [
    ("som", {}, "'pca', 'tsne', 'umap', got 'som'"), ("tsne", {"perplexity": 20}, "perplexity must be less than .* 20"),
    ("tsne", {"perplexity": -1}, "perplexity must be a finite number > 0"), ("pca", {"perplexity": 5}, "is for tsne"),
    ("tsne", {"n_neighbors": 5}, "is for umap"), ("umap", {"n_neighbors": 30}, "n_neighbors must be less than")])
def test_methods_and_options_that_cannot_be(method, options, words):
    with pytest.raises(ValueError, match=words): add_map(digits_table(20), method, **options)


def test_too_little_for_a_map():
    with pytest.raises(ValueError, match="at least 5"): add_map(digits_table(4))


# Clusters

def test_clusters_are_those_that_are_there():
    torch.manual_seed(0)
    centres = torch.eye(4)[:3]
    y = torch.tensor([0]*10 + [1]*30 + [2]*20)
    h = (centres[y] + .05*torch.randn(60, 4))*torch.rand(60, 1).add(.1)   # lengths do not count
    table = cluster_images(pd.DataFrame({"index": range(60), "h": list(h.numpy())}), 3)
    assert table["cluster"].tolist() == [{0: 2, 1: 0, 2: 1}[int(c)] for c in y]   # numbered by size
    unit = torch.nn.functional.normalize(h, dim=1).double()
    for c in range(3):
        rows = (y == c).nonzero().flatten()
        mean = unit[rows].mean(0)
        expected = 1 - unit[rows] @ mean/mean.norm()
        assert np.allclose(table["distance"].to_numpy()[rows], expected, atol=1e-6)
    again = cluster_images(table.drop(columns=["cluster", "distance"]), 3)
    assert again["cluster"].equals(table["cluster"])


def test_typical_images_are_nearest_and_distinct():
    torch.manual_seed(0)
    h = torch.eye(8)[0] + .2*torch.randn(40, 8)
    table = cluster_images(pd.DataFrame({"index": range(40), "h": list(h.numpy())}), 1)
    nearest = table.sort_values("distance")["index"].tolist()
    assert typical_images(table, 5)["index"].tolist() == nearest[:5]
    copies = pd.concat([table, *[table[table["index"] == nearest[0]]]*9])
    assert typical_images(copies, 5)["index"].tolist() == nearest[:5]
    same = cluster_images(pd.DataFrame({"index": range(6), "h": [np.ones(3)]*6}), 1)
    assert len(typical_images(same, 4)) == 1, "copies are no other images"


def test_a_cluster_is_described():
    table = cluster_images(digits_table(), 10)
    about = cluster_table(table)
    assert about["images"].sum() == 200 and about["images"].is_monotonic_decreasing
    for c, part in table.groupby("cluster"):
        assert about.loc[c, "label share"] == f"{100*part['label'].value_counts(normalize=True).iloc[0]:.0f} %"
        assert about.loc[c, "typical"] == part.loc[part["distance"].idxmin(), "index"]
    assert "label" not in cluster_table(table.drop(columns="label"))


def test_clusters_that_cannot_be():
    with pytest.raises(ValueError, match="at most the number of rows, 3, got 4"): cluster_images(digits_table(3), 4)
    same = pd.DataFrame({"index": range(9), "h": [np.ones(3)]*9})
    with pytest.warns(UserWarning, match="1 clusters have images, 2 were asked for"): found = cluster_images(same, 2)
    assert found["cluster"].tolist() == [0]*9
    with pytest.raises(ValueError, match="positive int"): cluster_images(digits_table(9), 0)
    with pytest.raises(ValueError, match="make them with cluster_images"): typical_images(digits_table(9))


# Thumbnails

def test_images_are_found_by_index():
    x = images_of(30)
    part = with_image_rows(digits_table(30), x).iloc[[7, 3]]
    tiles, missing = tiles_of(part, x)
    assert missing == {} and torch.equal(tiles, x[[7, 3]].expand(-1, 3, -1, -1))
    as_float, _ = tiles_of(part, x.float().numpy()/255)
    assert torch.equal(as_float, tiles)
    large, _ = tiles_of(part, torch.nn.functional.interpolate(x, size=(100, 140)), size=64)
    assert large.shape == (2, 3, 64, 64)


def test_images_of_a_table_of_files_are_row_by_row(files):
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(-1, 1, 4, 4)
    tiles, _ = tiles_of(with_image_rows(files, x).iloc[[9, 2]], x)
    assert tiles[:, 0, 0, 0].tolist() == [9, 2]
    with pytest.raises(ValueError, match="one per row of the table, 40, got 3"): with_image_rows(files, x[:3])


@pytest.mark.parametrize("images, words", [
    (torch.rand(30, 5, 4, 4), "1 or 3 channels"), (torch.rand(4, 4), "array .N,C,H,W., got .4, 4."),
    ([1], "got a list"), (torch.rand(9, 1, 4, 4), "0 to 29, got 9 images")])
def test_images_that_do_not_fit(images, words):
    with pytest.raises(ValueError, match=words): image_map(digits_table(30), images=images)


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match="undo the normalisation"):
        image_map(digits_table(30), images=torch.randn(30, 3, 4, 4))


def test_files_are_read_and_missing_ones_counted(files, tmp_path):
    (tmp_path/files["file"][3]).unlink()
    (tmp_path/files["file"][4]).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"2 of 40 files could not be read \(1 not found, 1 not an image\)"):
        tiles, missing = tiles_of(files, root=tmp_path)
    assert tiles.shape == (40, 3, 30, 30) and missing == {3: "not found", 4: "not an image"}
    assert tiles[[0, 3, 4, 39], 0, 0, 0].tolist() == [20, maps.GREY, maps.GREY, 20 + 5*39]


def test_many_files_are_read_by_several_processes(tmp_path):
    for i in range(1030): Image.new("L", (8, 8), i % 251).save(tmp_path/f"{i}.png")
    table = pd.DataFrame({"file": [str(tmp_path/f"{i}.png") for i in range(1031)], "h": [np.ones(2)]*1031})
    with pytest.warns(UserWarning, match="1 of 1,031 files"): tiles, missing = tiles_of(table)
    assert missing == {1030: "not found"} and tiles[:1030, 0, 0, 0].tolist() == [i % 251 for i in range(1030)]


def test_relative_paths_of_another_folder(files):
    with pytest.warns(UserWarning, match="root= says in which folder relative paths start"): tiles_of(files)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no files that can be read"):
        warnings.simplefilter("ignore")
        image_map(files)
    with pytest.raises(ValueError, match="no files that can be read"): image_map(digits_table(9))


# Colours and the picture

def test_images_inside_shards_are_shown(files, tmp_path):
    shards = write_shards([str(tmp_path/f) for f in files.file], tmp_path/"shards", per_shard=15)
    inside = [str(member) for member in image_source(tmp_path/"shards").files]
    table = files.set_index("file").loc[[name.split(".tar/")[1] for name in inside]].reset_index()
    theirs, _ = tiles_of(table, root=tmp_path)
    tiles, missing = tiles_of(table.assign(file=inside))
    assert torch.equal(tiles, theirs) and missing == {}
    relative = [os.path.relpath(name, tmp_path) for name in inside]
    assert torch.equal(tiles_of(table.assign(file=relative), root=tmp_path)[0], theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = map_page(table.assign(file=inside), tmp_path/"map.html")
    assert data_of(page)["missing"] == [] and data_of(page)["tile"] == tiles.shape[-1]
    shards[1].unlink()
    with pytest.warns(UserWarning, match="not found"): tiles, missing = tiles_of(table.assign(file=inside))
    gone = [i for i, name in enumerate(inside) if name.startswith(str(shards[1]))]
    assert list(missing) == gone and len(gone) == 15


def test_classes_have_an_order_and_gaps():
    codes, names = classes_of(pd.Series([10, 9, None, 10]))
    assert names == ["9", "10"] and codes.tolist() == [1, 0, -1, 1]
    assert classes_of(pd.Series(["k 10", "k 2", "a"]))[1] == ["a", "k 2", "k 10"]
    codes, names = classes_of(pd.Series(["b", 1, "a", float("nan")], dtype=object))
    assert sorted(names) == ["1", "a", "b"] and codes[3] == -1
    with pytest.raises(ValueError, match="pd.cut"): classes_of(pd.Series(np.arange(2000.), name="loss"))


def test_colours_that_cannot_be():
    table = digits_table(9)
    with pytest.raises(ValueError, match="pass clusters=10"): image_map(table, colour="cluster", images=images_of(9))
    with pytest.raises(ValueError, match="column of classes"): image_map(table, colour="h", images=images_of(9))


def test_one_image_per_cell_the_nearest_to_its_centre():
    rng = np.random.default_rng(0)
    xy = rng.random((300, 2))*[2, 1] + 5
    picks, cells = grid_picks(xy, 10)
    side = np.ptp(xy[:, 0])/10
    at = (xy - xy.min(0))/side
    expected = {}
    for i, (x, y) in enumerate(at):
        cell = min(int(x), 9), min(int(y), int(np.ceil(np.ptp(xy[:, 1])/side)) - 1)
        d = (x - cell[0] - .5)**2 + (y - cell[1] - .5)**2
        if cell not in expected or d < expected[cell][0]: expected[cell] = d, i
    assert {(*map(int, c), int(p)) for c, p in zip(cells, picks)} == {(*c, i) for c, (_, i) in expected.items()}
    picks, cells = grid_picks(np.zeros((5, 2)), 4)   # all at one place
    assert len(picks) == 1 and cells.tolist() == [[0, 0]]


def test_the_picture_shows_images_where_they_belong():
    "Corners of a square: the image above is drawn above"
    table = pd.DataFrame({"index": range(4), "h": list(np.eye(4)), "map_x": [0, 1, 0, 1], "map_y": [0, 0, 1, 1]})
    x = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, 1, 16, 16)
    picture = np.asarray(image_map(table, images=x, cells=2).images[0].get_array())
    h, w = picture.shape[:2]
    middles = picture[[h//4, h//4, 3*h//4, 3*h//4], [w//4, 3*w//4, w//4, 3*w//4], 0]
    assert middles.tolist() == [30, 40, 10, 20]


def test_the_picture_has_frames_and_a_legend_of_classes():
    ax = image_map(digits_table(), images=images_of(), cells=8)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [str(i) for i in range(10)]
    colours = {tuple(c[:3]) for c in np.asarray(ax.images[0].get_array()).reshape(-1, 4)}
    blue = tuple(int(PALETTE[0][i:i+2], 16) for i in (1, 3, 5))
    assert blue in colours
    plain = image_map(digits_table(label=False), images=images_of(), cells=8)
    assert plain.get_legend() is None


def test_points_and_axes_of_the_user():
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    assert image_map(digits_table(), clusters=4, thumbnails=False, ax=ax) is ax
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2", "3"]
    assert sum(len(c.get_offsets()) for c in ax.collections) == 200


def test_large_tables_are_sampled_always_the_same():
    points = [image_map(digits_table(label=False), thumbnails=False, limit=50).collections[0].get_offsets()
              for _ in range(2)]
    assert len(points[0]) == 50 and np.array_equal(*points)


def test_the_typical_images_are_drawn():
    table = cluster_images(digits_table(), 6)
    ax = plot_clusters(table, images_of(), n=5)
    words = [t.get_text() for t in ax.get_yticklabels()]
    assert len(words) == 6 and words[0].startswith(f"cluster 0: {(table['cluster'] == 0).sum()} images")
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape[1]/5 == pytest.approx(picture.shape[0]/6)


# The page as text

def data_of(page):
    "The data that a page holds"
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)[1])


def array(text, kind): return np.frombuffer(base64.b64decode(text), kind)


def test_the_page_holds_places_neighbours_and_names(files, tmp_path):
    table = files.assign(map_x=np.arange(40.), map_y=np.arange(40.)[::-1]/2)
    data = data_of(map_page(table, tmp_path/"new"/"map.html", root=tmp_path, k=3))
    assert data["names"][:2] == ["light/00.png", "dark/01.png"]
    xy = array(data["xy"], "<u2").reshape(40, 2)
    assert xy[0].tolist() == [0, 16384] and xy[39].tolist() == [65535, 49151]   # y goes down
    assert data["extent"] == [1, .5]
    h = np.stack(table["h"]).astype(float)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    cosine = h @ h.T - 9*np.eye(40)
    order = np.argsort(-cosine, axis=1)[:, :3]
    assert array(data["neighbours"], "<u4").reshape(40, 3).tolist() == order.tolist()
    percent = array(data["similarity"], "i1").reshape(40, 3)
    assert np.abs(percent - 100*np.take_along_axis(cosine, order, 1)).max() <= .51
    assert data["groups"][0]["names"] == ["dark", "light"]
    assert array(data["groups"][0]["codes"], "<i2").tolist() == [1, 0]*20


def test_the_sheets_hold_the_images(files, tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "SHEET", 128)   # 4 x 4 thumbnails in a sheet
    data = data_of(map_page(files, tmp_path/"map.html", root=tmp_path))
    assert (data["tile"], data["across"], len(data["sheets"])) == (30, 4, 3)
    kind, text = data["sheets"][1].split(",")
    assert kind == "data:image/jpeg;base64"
    import io
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    middles = sheet[15::30, 15::30, 0].flatten()
    assert np.abs(middles - (20 + 5*np.arange(16, 32))).max() <= 2


def test_small_thumbnails_lose_nothing(tmp_path):
    import io
    data = data_of(map_page(digits_table(20), tmp_path/"map.html", images=images_of(20)))
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sheets"][0].split(",")[1]))))
    assert data["tile"] == 8 and np.array_equal(sheet[:8, 24:32, 0], images_of(20)[3, 0].numpy())


def test_thumbnails_are_smaller_where_there_are_many():
    assert [maps.tile_size(n) for n in (5000, 5001, 10001)] == [64, 48, 32] and maps.tile_size(10**6, 100) == 100


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>.png"


def hostile_table(n=40):
    "Names, labels and a column that would be code if they were not text"
    names = [f"{i}-{HOSTILE}" for i in range(n)]
    return digits_table(n).drop(columns="index").assign(file=names, label=[f"<b>{i % 3}</b>" for i in range(n)])


def test_no_text_becomes_code(tmp_path):
    page = map_page(hostile_table(), tmp_path/"map.html", images=images_of(40), title="<i>A & B</i>")
    text = page.read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "<b>" not in text and "<i>A" not in text
    assert text.count("<script") == 2 and "<title>&lt;i&gt;A &amp; B&lt;/i&gt;</title>" in text
    assert len(data_of(page)["names"]) == 40


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text = map_page(digits_table(20), tmp_path/"map.html", images=images_of(20)).read_text()
    assert "default-src 'none'" in text and not re.search(r"https?:|@import|url\(|src=(?!data)\"", text)


def test_the_page_says_what_is_sampled_and_missing(files, tmp_path):
    text = map_page(digits_table(), tmp_path/"map.html", limit=60).read_text()
    assert "60 of 200 images, sampled at random, placed by PCA" in text and "No thumbnails" in text
    (tmp_path/files["file"][0]).unlink()
    with pytest.warns(UserWarning, match="1 of 40 files"): page = map_page(files, tmp_path/"b.html", root=tmp_path)
    assert "1 whose files could not be read are grey" in page.read_text() and data_of(page)["missing"] == [0]


def test_names_without_the_folder_that_all_share():
    def names(*files): return maps.shown_names(pd.DataFrame({"file": files}))
    assert names("/home/me/a/1.png", "/home/me/b/2.png") == ["a/1.png", "b/2.png"]
    assert names("a/1.png", "b/2.png") == ["a/1.png", "b/2.png"] and names("1.png") == ["1.png"]
    assert names("/a/1.png", "/a/1.png") == ["1.png", "1.png"] and names("/data/x.png", "/db/y.png")[0] == "data/x.png"


def test_a_page_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="k must be a positive int"): map_page(digits_table(9), tmp_path/"m.html", k=0)
    with pytest.raises(ValueError, match="at least 5"): map_page(digits_table(1), tmp_path/"m.html")
    with pytest.raises(ValueError, match="DataFrame"): map_page([1], tmp_path/"m.html")
    assert not (tmp_path/"m.html").exists()


def test_the_suffix_says_what_is_written(tmp_path, files):
    said = maps.save_map(files, tmp_path/"map.html", "Mine", clusters=3, root=tmp_path, method="pca", limit=30)
    assert re.search(r"30 of 40 images in .*map.html \(0.\d MB\); open it in a browser", said)
    assert "cluster" in said.splitlines()[1] and "<title>Mine" in (tmp_path/"map.html").read_text()
    maps.save_map(files, tmp_path/"map.png", "Mine", root=tmp_path, method="pca", limit=None)
    with Image.open(tmp_path/"map.png") as im: assert min(im.size) > 500
    with pytest.raises(ValueError, match="out must end in .html"): maps.save_map(files, tmp_path/"map.gif", "Mine")


def test_clusters_are_those_of_the_whole_table(tmp_path):
    table = digits_table()
    page = map_page(table, tmp_path/"map.html", clusters=4, limit=50)
    whole = cluster_images(table, 4)["cluster"]
    group = data_of(page)["groups"][0]
    codes = array(group["codes"], "<i2")
    rows = [int(name.split()[1]) for name in data_of(page)["names"]]
    assert group["name"] == "cluster" and [int(group["names"][c]) for c in codes] == whole.iloc[rows].tolist()


# The command

@pytest.fixture
def stored(files, tmp_path, monkeypatch):
    "A table in a Parquet file, and a reader of it"
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import sys
    from types import SimpleNamespace
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "self_supervised_bt.explore", SimpleNamespace(load_table=pd.read_parquet))
    files.to_parquet("photos.parquet")
    return files


def test_bt_map(stored, tmp_path, capsys):
    from self_supervised_bt.cli import bt_map
    bt_map("photos.parquet")
    assert "40 of 40 images in map.html" in capsys.readouterr().out
    text = (tmp_path/"map.html").read_text()
    assert "<title>photos</title>" in text and "placed by PCA" in text
    bt_map("photos.parquet", out="map.png", method="tsne", clusters=3, limit=20, colour="label")
    out = capsys.readouterr().out
    assert "label share" in out and "20 of 40 images in map.png" in out and (tmp_path/"map.png").exists()


def test_bt_map_of_a_table_without_files_says_what_it_shows(tmp_path, monkeypatch, capsys):
    from self_supervised_bt.cli import bt_map
    from self_supervised_bt.explore import save_table
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.chdir(tmp_path)
    save_table(digits_table(60), "digits.parquet")
    for out in ("map.html", "map.png"):
        bt_map("digits.parquet", out=out)
        assert "Each image is a point, as the table names no files: in Python, images=" in capsys.readouterr().out
    assert "No thumbnails: the table names no files, map_page(..., images=) shows them" in Path("map.html").read_text()
    assert Path("map.png").stat().st_size > 1000


@pytest.mark.parametrize("options, words", [
    ({"method": "som"}, "--method must be one of 'pca', 'tsne', 'umap', got 'som'"),
    ({"colour": "kind"}, "--colour must be a column of the table, got 'kind'"),
    ({"clusters": 41}, "--clusters must be at most the number of rows, 40, got 41"),
    ({"limit": 0}, "--limit must be a positive int, got 0"), ({"table": "none.parquet"}, "none.parquet"),
    ({"limit": 4}, "--limit must be at least 5, the fewest images of a map"),
    ({"out": "map.gif"}, "--out must end in .html, .png, .svg, .pdf, got 'map.gif'")])
def test_bt_map_says_what_is_wrong_in_one_line(stored, tmp_path, options, words):
    from self_supervised_bt.cli import bt_map
    with pytest.raises(SystemExit) as e: bt_map(**{"table": "photos.parquet", **options})
    assert str(e.value).startswith("bt_map: ") and words in str(e.value) and "\n" not in str(e.value)
    assert [f.suffix for f in tmp_path.iterdir() if f.is_file()] == [".parquet"]


def test_bt_map_of_a_table_without_representations(stored):
    from self_supervised_bt.cli import bt_map
    stored.drop(columns="h").to_parquet("photos.parquet")
    with pytest.raises(SystemExit, match="^bt_map: table must have a column h of representations, got file, label"):
        bt_map("photos.parquet")
