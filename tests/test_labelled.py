"From some labels to a classifier: accuracy against scikit-learn, its file, and refusals"
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torchvision.datasets import ImageFolder

from self_supervised_bt import labelled
from self_supervised_bt.cli import bt_classify
from self_supervised_bt.evaluation import encode
from self_supervised_bt.folders import labelled_dls
from self_supervised_bt.labelled import classify, held_out_rows
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.sources import write_shards
from self_supervised_bt.weights import inference_model, load_encoder, load_model, save_encoder


@pytest.fixture
def encoder(tmp_path):
    return save_encoder(create_encoder("timm/test_resnet", n_in=3, pretrained=False), tmp_path/"encoder.safetensors")


def test_held_out_rows_are_a_fifth_of_every_class_and_no_others():
    y = torch.tensor([0]*10 + [1]*5 + [2]*2)
    train, test = held_out_rows(y, ["a", "b", "c"], seed=1)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(17))
    assert torch.bincount(y[test]).tolist() == [2, 1, 1]
    assert held_out_rows(y, ["a", "b", "c"], seed=2)[1].tolist() != test.tolist()
    with pytest.raises(ValueError, match="at least 2 images.*: d has 1"):
        held_out_rows(torch.tensor([0, 0, 1]), ["c", "d"], 0)


def test_a_linear_classifier_and_its_file(folder, encoder, tmp_path):
    r = classify(encoder, folder, tmp_path/"out", num_workers=0)
    assert (r["classes"], r["images"], r["largest_class"]) == (["dark", "light"], 40, 50.)
    assert len(r["shares"]) == 5 and f"{100*np.mean(r['shares']):.1f} ± " in r["accuracy"]
    assert json.loads((tmp_path/"out/classifier.json").read_text()) == r
    files = sorted(folder.rglob("*.png"))
    named = [p["pred_class"] for p in inference_model(r["file"], files)]
    h, y = encode(load_encoder(encoder), labelled_dls(folder, 32, valid_pct=0, num_workers=0).train)
    theirs = LogisticRegression(C=.1, max_iter=1000).fit(h.numpy(), y.numpy()).score(h.numpy(), y.numpy())
    ours = np.mean([name == f.parent.name for name, f in zip(named, files)])
    assert ours >= theirs - .1 and ours > .8
    assert load_model(r["file"]).classes == ["dark", "light"]


def test_fine_tuning_trains_the_encoder_and_leaves_the_file_alone(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "STEPS", 4)
    monkeypatch.setitem(labelled.PROTOCOLS, "finetune", {**labelled.PROTOCOLS["finetune"], "epochs": 2})
    before = encoder.read_bytes()
    r = classify(encoder, folder, tmp_path/"out", finetune=True, seeds=1, num_workers=0)
    assert encoder.read_bytes() == before and r["finetuned"] and "±" not in r["accuracy"]
    new, old = load_model(r["file"]).encoder.state_dict(), load_encoder(encoder).state_dict()
    assert any(not torch.equal(new[k], old[k]) for k in old if k.endswith("weight"))
    assert inference_model(r["file"], folder/"dark/01.png")["pred_class"] in ("dark", "light")


def test_broken_files_are_left_out(folder, encoder, tmp_path):
    (folder/"dark/00.png").write_bytes(b"no picture")
    assert classify(encoder, folder, tmp_path/"out", seeds=1, num_workers=0)["images"] == 40


def as_source(kind, folder, home):
    "The images of a folder of class folders, with their labels, as another source, and what names the labels"
    files = sorted(folder.rglob("*.png"))
    table = pd.DataFrame({"picture": [str(f) for f in files], "tone": [f.parent.name for f in files], "n": 1})
    if kind == "DataFrame": return table, dict(labels="tone", column="picture")
    if kind == "data set": return ImageFolder(folder), {}
    if kind == "shards": return (write_shards(folder, home/"shards", per_shard=11), home/"shards")[1], {}
    if kind == "Parquet": table.rename(columns=dict(picture="file", tone="label")).to_parquet(home/"t.parquet")
    else: table.to_csv(home/"t.csv", index=False)
    return (home/"t.parquet", {}) if kind == "Parquet" else (home/"t.csv", dict(labels="tone", column="picture"))


@pytest.mark.parametrize("kind", ["DataFrame", "csv", "Parquet", "shards", "data set"])
def test_labels_of_any_source_give_the_same_classifier(kind, folder, encoder, tmp_path):
    data, names = as_source(kind, folder, tmp_path)
    theirs = classify(encoder, folder, tmp_path/"folder", seeds=2, num_workers=0)
    ours = classify(encoder, data, tmp_path/"out", seeds=2, num_workers=0, **names)
    same = ("classes", "images", "largest_class") + (() if kind == "shards" else ("shares",))   # their order differs
    assert [ours[k] for k in same] == [theirs[k] for k in same] and ours["classes"] == ["dark", "light"]
    picture = inference_model(ours["file"], folder/"dark/01.png")
    assert picture["pred_class"] == "dark"
    assert json.loads((tmp_path/"out/classifier.json").read_text())["data"] in (str(data), f"<{type(data).__name__}>")


def test_a_data_set_by_its_name(encoder, tmp_path):
    r = classify(encoder, "digits", tmp_path/"out", seeds=1)
    assert (r["classes"], r["data"]) == ([str(i) for i in range(10)], "digits") and r["shares"][0] > .5


@pytest.mark.parametrize("kind, words", [
    ("one folder", "sort them into at least two folders.* table with a column label, shards with a .cls"),
    ("table", "none of them is called label, class.*choose one with labels='name'"),
    ("column", "labels='tone' is no column"), ("shards", "sort them into at least two folders"),
    ("data set", "hold no label: let them be .image, class index.")])
def test_a_source_without_labels_says_what_to_do(kind, words, folder, encoder, tmp_path):
    files = sorted((folder/"dark").glob("*.png"))
    if kind in ("table", "column"): pd.DataFrame(dict(file=map(str, files), id=range(20))).to_csv(tmp_path/"t.csv")
    data = {"table": tmp_path/"t.csv", "column": tmp_path/"t.csv", "one folder": folder/"dark"}.get(kind)
    if kind == "shards": data = (write_shards(folder/"dark", tmp_path/"shards"), tmp_path/"shards")[1]
    if kind == "data set":
        data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=words):
        classify(encoder, data, tmp_path/"out", num_workers=0, **({"labels": "tone"} if kind == "column" else {}))
    assert not (tmp_path/"out").exists()


def test_sixteen_bits_mean_what_they_meant_in_training(folder, encoder, tmp_path, monkeypatch):
    seen = []
    own = labelled.labelled_dls
    monkeypatch.setattr(labelled, "labelled_dls", lambda *a, **kw: (seen.append(kw["value_range"]), own(*a, **kw))[1])
    net = load_encoder(encoder)
    net.value_range = (0, 4095)
    file = save_encoder(net, tmp_path/"ranged.safetensors")
    classify(file, folder, tmp_path/"out", seeds=1, num_workers=0)
    assert [list(v) for v in seen] == [[0, 4095]]


def test_the_command(folder, encoder, tmp_path, capsys):
    bt_classify(str(encoder), str(folder), out=str(tmp_path/"out"), seeds=2, workers=0)
    out = capsys.readouterr().out
    table, names = as_source("csv", folder, tmp_path)
    bt_classify(str(encoder), str(table), out=str(tmp_path/"table"), seeds=2, workers=0, **names)
    assert capsys.readouterr().out == out.replace(str(tmp_path/"out"), str(tmp_path/"table"))
    with pytest.raises(SystemExit, match="^bt_classify: .*choose one with --labels 'name'"):
        bt_classify(str(encoder), str(table), out=str(tmp_path/"one"), workers=0, column="picture")
    assert "40 images in 2 classes: dark, light" in out and "over 2 samples" in out and "inference_model" in out
    with pytest.raises(SystemExit, match="^bt_classify: .*at least two folders"):
        bt_classify(str(encoder), str(folder/"dark"), out=str(tmp_path/"one"), workers=0)
    with pytest.raises(SystemExit, match="^bt_classify: --seeds must"): bt_classify(str(encoder), str(folder), seeds=0)
    assert not (tmp_path/"one").exists()
