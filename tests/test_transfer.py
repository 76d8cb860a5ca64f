"One encoder on many data sets: scores by hand, resumed tables, files of others, and names wherever data are asked for"
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_encoder
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from test_datasets import dtd, flowers102, idx_file, text, voc  # noqa: F401  (a fixture)
from torch import nn

from self_supervised_bt import runs, transfer
from self_supervised_bt.cli import bt_diagnose, bt_evaluate, bt_pretrain, bt_transfer
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.datasets import CARDS, VOC, read_part
from self_supervised_bt.encoder_files import restore_input
from self_supervised_bt.evaluation import encode, knn_accuracy, linear_probe
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import get_recipe
from self_supervised_bt.transfer import encoder_identity, mean_ap, mean_class_accuracy, transfer_table
from self_supervised_bt.weights import save_encoder


def noisy(root, seed=0):
    "Gives the images below a folder noise, so that they are not all alike"
    rng = np.random.default_rng(seed)
    for f in sorted([*root.rglob("*.jpg")]):
        a = np.asarray(Image.open(f)).astype(int) + rng.integers(-60, 60, (20, 24, 3))
        Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(f, quality=95)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    "A folder with two small data sets that count as whole"
    root = tmp_path/"sets"
    for name, layout in (("dtd", dtd), ("flowers102", flowers102)):
        train, test = layout(root, monkeypatch)
        monkeypatch.setitem(CARDS, name, replace(CARDS[name], train=len(train), test=len(test)))
    noisy(root)
    return root


@pytest.fixture
def one_C(monkeypatch):
    "A fixed regularisation: a few images are too few to choose it"
    monkeypatch.setattr(transfer, "linear_probe", lambda *args: linear_probe(*args, Cs=(1.,)))


def table(model, root, names=("dtd", "flowers102"), **kwargs):
    return transfer_table(model, list(names), root, size=16, num_workers=0, **kwargs)


def by_hand(model, images):
    "Representations of files, each read by Pillow: the centred square, resized"
    def pixels(f):
        im = Image.open(f).convert("RGB")
        left = (im.width - im.height)//2
        im = im.crop((left, 0, left + im.height, im.height)).resize((16, 16), Image.BILINEAR)
        return torch.from_numpy(np.array(im)).permute(2, 0, 1)/255
    with torch.no_grad(): return model.eval()(torch.stack([pixels(f) for f in images.files]))


def test_scores_are_those_of_a_probe_by_hand(sets, one_C):
    model = small_encoder(3)
    got = table(model, sets)
    for name in got.index:
        train, test = (read_part(name, part, sets) for part in ("train", "test"))
        h, h_test = by_hand(model, train), by_hand(model, test)
        theirs, _ = encode(model, transfer.train_test_dls(name, 16, root=sets, num_workers=0).valid, 16)
        assert (theirs - h_test).abs().max() < .02
        p = linear_probe(h, train.y, h_test, test.y, Cs=(1.,))
        predicted = p.classifier(h_test).argmax(1)
        score = balanced_accuracy_score(test.y, predicted) if name == "flowers102" else p.top1
        assert got.linear[name] == pytest.approx(100*score, abs=.01)
        assert got.kNN[name] == pytest.approx(100*knn_accuracy(h_test, test.y, h, train.y, k=len(h)), abs=.01)
    assert got.metric.tolist() == ["top-1", "mean per class"] and got["train images"].tolist() == [12, 4]


def test_labels_that_are_not_scored(voc, monkeypatch, one_C):  # noqa: F811
    torch.manual_seed(3)
    model = small_encoder(3)
    got = transfer_table(model, ["voc2007"], voc, size=8, num_workers=0, complete=False)
    train, test = (read_part("voc2007", part, voc, complete=False) for part in ("train", "test"))
    dls = transfer.train_test_dls("voc2007", 8, root=voc, complete=False, num_workers=0)
    (h, _), (h_test, _) = encode(model, dls.train, 8), encode(model, dls.valid, 8)
    scores = linear_probe(h, train.y, h_test, test.y, Cs=(1.,)).classifier(h_test).detach()
    aps = []
    for c in (0, 14):
        rows = ~test.ignored[:, c]
        aps.append(average_precision_score(test.y[rows, c], scores[rows, c]))
    assert got.linear["voc2007"] == pytest.approx(100*np.mean(aps), abs=.01)
    assert got.metric["voc2007"] == "mAP" and got.classes["voc2007"] == len(VOC) and "kNN" not in got
    y = test.y.clone()
    y[~test.ignored] = 0                               # no label left that is scored but one
    y[1, 5] = 1
    assert mean_ap(scores, y, test.ignored) == pytest.approx(average_precision_score(y[:, 5], scores[:, 5]))


def test_rows_of_broken_files_are_left_out_of_the_labels_too(voc, one_C):  # noqa: F811
    (voc/"VOCdevkit/VOC2007/JPEGImages/test1.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 3 images have no row"):
        got = transfer_table(small_encoder(3), ["voc2007"], voc, size=8, num_workers=0, complete=False)
    assert got["test images"]["voc2007"] == 2


def test_an_interrupted_table_is_completed(sets, tmp_path, monkeypatch, one_C):
    model, out, calls = small_encoder(3), tmp_path/"out", []
    whole = table(model, sets)
    scores = transfer.transfer_scores
    def counted(model, dls, *args):
        calls.append(len(dls.train.dataset))
        if len(calls) == 2: raise KeyboardInterrupt
        return scores(model, dls, *args)
    monkeypatch.setattr(transfer, "transfer_scores", counted)
    with pytest.raises(KeyboardInterrupt): table(model, sets, out=out)
    assert [f.name for f in out.iterdir()] == ["dtd.json"]
    again = table(model, sets, out=out)
    assert again.equals(whole) and calls == [12, 4, 4]
    assert table(model, sets, out=out).equals(whole) and len(calls) == 3
    assert table(model, sets, names=["flowers102"], out=out).equals(whole.loc[["flowers102"]])


def test_files_of_others_are_refused(sets, tmp_path, one_C):
    model, out = small_encoder(3), tmp_path/"out"
    table(model, sets, ["dtd"], out=out)
    with pytest.raises(ValueError, match=r"for k 20, and now it is 3"): table(model, sets, ["dtd"], out=out, k=3)
    with pytest.raises(ValueError, match="scores for size 16, and now it is 20"):
        transfer_table(model, ["dtd"], sets, out, size=20, num_workers=0)
    with pytest.raises(ValueError, match="scores for another encoder"): table(small_encoder(3), sets, ["dtd"], out=out)
    file = sets/"dtd/dtd/labels/test1.txt"
    lines = file.read_text().splitlines()
    text(file, *reversed(lines))
    with pytest.raises(ValueError, match="scores for images"): table(model, sets, ["dtd"], out=out)
    text(file, *lines)
    table(model, sets, ["dtd"], out=out)
    content = json.loads((out/"dtd.json").read_text())
    for damaged in (content | {"scores": None}, {}, [], 7):
        (out/"dtd.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="dtd.json is damaged"): table(model, sets, ["dtd"], out=out)
    (out/"dtd.json").write_text("{")
    with pytest.raises(ValueError, match="dtd.json is damaged"): table(model, sets, ["dtd"], out=out)


def test_the_mean_of_the_classes_accuracies_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0]*40 + [3]*8 + [7]*2)           # unequal classes, some numbers without one
    predicted = torch.where(torch.rand(50, generator=g) < .5, y, torch.tensor(3))
    assert mean_class_accuracy(predicted, y) == pytest.approx(balanced_accuracy_score(y, predicted))
    assert abs(mean_class_accuracy(predicted, y) - float((predicted == y).float().mean())) > .05


def test_identity_of_an_encoder_is_its_weights():
    a, b = small_encoder(3), small_encoder(3)
    assert encoder_identity(a) != encoder_identity(b)
    b.load_state_dict(a.state_dict())
    assert encoder_identity(a) == encoder_identity(b) == encoder_identity(nn.DataParallel(b))
    b[1].running_mean[0] += 1e-6
    assert encoder_identity(a) != encoder_identity(b)


def test_published_figures_stand_only_beside_the_same_images(monkeypatch):
    row = {"train images": 5011, "test images": 4952, "metric": "mAP", "linear": 80.}
    assert transfer.with_published("voc2007", row)["published"] == 86.2
    assert "published" not in transfer.with_published("voc2007", row | {"test images": 4951})
    assert all("published" not in transfer.with_published(name, row) for name in ("dtd", "x"))
    got = transfer.as_table({"voc2007": row, "mine": row})
    assert got.published.tolist() == [86.2, ""] and "Zbontar" in got.by["voc2007"]


def test_averaged_and_whitened_rows_are_rows_of_their_own(sets, tmp_path, one_C):
    model, out = small_encoder(3), tmp_path/"out"
    plain = table(model, sets, ["dtd"], out=out)
    with pytest.raises(ValueError, match="for tta None, and now it is 'flip'"):
        table(model, sets, ["dtd"], out=out, tta="flip")
    table(model, sets, ["dtd"], out=tmp_path/"flipped", tta="flip")
    with pytest.raises(ValueError, match="dtd: whiten=True, and the encoder remembers no whitening"):
        table(model, sets, ["dtd"], whiten=True)
    for seed in (0, 1):                                # two whitenings are not taken for one another
        torch.manual_seed(seed)
        model.whitening = None
        encode(model, torch.rand(30, 3, 16, 16), 16, whiten="fit")
        if seed:
            with pytest.raises(ValueError, match="for whiten '"):
                table(model, sets, ["dtd"], out=tmp_path/"white", whiten=True)
        else: table(model, sets, ["dtd"], out=tmp_path/"white", whiten=True)
    assert table(model, sets, ["dtd"], out=out).equals(plain)
    row = {"train images": 5011, "test images": 4952, "metric": "mAP", "linear": 80.}
    assert "published" not in transfer.as_table({"voc2007": row}, published=False)


def test_all_sets_are_looked_for_before_any_work(sets, monkeypatch):
    monkeypatch.setattr(transfer, "transfer_scores", lambda *args: pytest.fail("worked"))
    for names, words in ((["dtd", "food101"], "'food101' is not below"), (["dtd", "foods"], "did you mean 'food101'"),
                         ([], "sets is empty"), ("dtd,,", "name must be that of a data set, got ''")):
        with pytest.raises((OSError, ValueError), match=words): transfer_table(small_encoder(3), names, sets, size=16)
    with pytest.raises(ValueError, match="k must be"): transfer_table(small_encoder(3), "dtd", sets, size=16, k=0)
    with pytest.raises(ValueError, match="size is missing"): transfer_table(small_encoder(3), "dtd", sets)
    with pytest.raises(ValueError, match="size must be"): transfer_table(small_encoder(3), "dtd", sets, size=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_those_of_the_encoder(sets, one_C, channels):
    torch.manual_seed(0)
    got = transfer_table(small_encoder(channels), ["digits", "dtd"], sets, size=16, num_workers=0)
    assert got["test images"].tolist() == [500, 6] and got.linear["digits"] > 15


def test_own_dls_with_one_label_several_and_none(one_C):
    x, y = torch.rand(60, 3, 8, 8), torch.arange(60) % 2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    mine, several = (tensor_dls(x, labels, bs=16, valid_pct=.3, device="cpu") for labels in (y, F.one_hot(y).float()))
    def by_hand(*size):
        h, labels, h_test, test_labels = *encode(model, mine.train, *size), *encode(model, mine.valid, *size)
        return round(100*linear_probe(h, labels, h_test, test_labels, Cs=(1.,)).top1, 2)
    got = transfer_table(model, {"mine": mine, "several": several})
    assert got.linear["mine"] == by_hand() and got.metric.tolist() == ["top-1", "mAP"]
    assert "published" not in got and got.kNN["several"] == ""
    assert transfer_table(model, {"mine": mine}, size=(8, 12)).linear["mine"] == by_hand((8, 12))
    empty = tensor_dls(x[:5], y[:5], bs=2, valid_pct=0, device="cpu")
    with pytest.raises(ValueError, match="empty one: data holds no images"): transfer_table(model, {"empty one": empty})
    with pytest.raises(ValueError, match="none: the labels of the training images is None"):
        transfer_table(model, {"none": tensor_dls(x, bs=16, valid_pct=.3, device="cpu")})


# Names wherever data are asked for

SMALL = dict(arch="timm/test_resnet", width=16, bs=4, epochs=1, workers=0, size=16, valid_pct=.2)


def test_a_run_on_a_data_set_by_name(sets, tmp_path, capsys):
    out = tmp_path/"run"
    with pytest.raises(SystemExit, match=f"bt_pretrain: data set 'dtd' is not below {tmp_path}.* pass --download"):
        bt_pretrain("dtd", out=str(out), root=str(tmp_path), **SMALL)
    with pytest.raises(SystemExit, match="bt_pretrain: --root .* is for data sets by name, and data '"):
        bt_pretrain(str(sets), out=str(out), root=str(sets), **SMALL)
    with pytest.raises(SystemExit, match="bt_pretrain: data 'dtds' is no folder here, .* 'dtd'"):
        bt_pretrain("dtds", out=str(out), **SMALL)
    assert not out.exists()
    bt_pretrain("dtd", out=str(out), root=str(sets), **SMALL)
    about = json.loads((out/"run.json").read_text())
    assert (about["data"], about["root"], about["images"]) == ("dtd", str(sets), 12)
    sets.rename(tmp_path/"moved")
    again = runs.pretrain("dtd", out=out, resume=True, root=tmp_path/"moved", num_workers=0)
    assert again["state"] == "ended" and "nothing to resume" in capsys.readouterr().out


def test_commands_that_evaluate_by_name(sets, tmp_path, capsys, one_C, monkeypatch):
    monkeypatch.setattr(runs, "linear_probe", lambda *args: linear_probe(*args, Cs=(1.,)))
    run = tmp_path/"run"
    encoder = create_encoder("timm/test_resnet", pretrained=False, small_stem=False)
    encoder.clean_pipeline = restore_input(dict(size=[16, 16]))
    run.mkdir()
    save_encoder(encoder, run/"encoder.safetensors")
    (run/"run.json").write_text(json.dumps(dict(data="dtd")))
    bt_transfer(str(run), root=str(sets), workers=0)
    out = capsys.readouterr().out
    assert "dtd            top-1" in out and f"Saved in {run}/transfer/" in out
    assert {f.name for f in (run/"transfer").iterdir()} == {"dtd.json", "flowers102.json"}
    bt_evaluate(str(run), "dtd", root=str(sets), workers=0, k=3)
    evaluation = json.loads((run/"evaluation.json").read_text())["rows"]["dtd"]
    assert (evaluation["images"], evaluation["test images"], evaluation["classes"]) == (12, 6, 3)
    assert evaluation["seen in training"] == "not known"
    with pytest.raises(SystemExit, match="bt_evaluate: --test .* is for folders, 'dtd' has published test images"):
        bt_evaluate(str(run), "dtd", test=str(tmp_path), root=str(sets))
    with pytest.raises(SystemExit, match="bt_transfer: --root .* holds none of the known data sets: .* --download"):
        bt_transfer(str(run), root=str(tmp_path))
    with pytest.raises(SystemExit, match="bt_transfer: --sets must be that of a data set, got 'pets': did you mean"):
        bt_transfer(str(run), sets="pets", root=str(sets))
    bt_transfer()
    assert "places365" in capsys.readouterr().out


def test_the_command_as_it_is_typed(tmp_path):
    (tmp_path/"bt_transfer").write_text("from self_supervised_bt.cli import bt_transfer\nbt_transfer()\n")
    done = subprocess.run([sys.executable, tmp_path/"bt_transfer", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "positional arguments:\n  run " in done.stdout and "--run" not in done.stdout


def test_a_named_set_in_memory_and_its_diagnosis(sets, tmp_path, capsys):
    dls = runs.run_dls("dtd", get_recipe("cifar", bs=4, size=12), 0, labels=True, in_memory=True, root=sets)
    assert dls.train_ds.x.shape == (12, 3, 16, 16) and list(dls.vocab) == ["anemone", "banded", "cat house"]
    dls = runs.run_dls("dtd", get_recipe("cifar", bs=4, size=12), .25, num_workers=0, root=sets)
    assert len(dls.train_ds) == 9 and len(dls.one_batch()) == 1
    with pytest.raises(SystemExit, match="bt_diagnose: --bs 512 is larger than"):
        bt_diagnose("dtd", root=str(sets), bs=512)
    run = runs.short_run("dtd", root=sets)
    assert run.about == "12 training images of dtd in 3 classes" and run.recipe.name == "cifar"


def test_whether_test_images_were_seen(tmp_path, monkeypatch):
    "A run on a data set by its name never sees its test images; of other runs it is not known, nor of all digits"
    for split, n in (("train", 4), ("t10k", 2)):
        idx_file(tmp_path/f"MNIST/raw/{split}-images-idx3-ubyte", np.zeros((n, 28, 28), dtype=np.uint8))
        idx_file(tmp_path/f"MNIST/raw/{split}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
    monkeypatch.setitem(CARDS, "mnist", replace(CARDS["mnist"], train=4, test=2))
    def seen(name, trained_on):
        (tmp_path/"run.json").write_text(json.dumps(dict(data=trained_on)))
        return runs.named_evaluation(name, tmp_path, 8, 1, None, 0, tmp_path, False)[1]
    assert [seen("mnist", "mnist"), seen("mnist", "/photos"), seen("digits", "digits")] == [0, "not known", "not known"]
    (tmp_path/"run.json").unlink()
    assert runs.named_evaluation("mnist", tmp_path/"file.pt", 8, 1, None, 0, tmp_path, False)[1] == "not known"
