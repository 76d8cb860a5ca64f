"The report: whole, self-contained, and there even when a part of it fails"
import re
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import quiet, same, small_encoder, small_model, weights
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from self_supervised_bt import reports
from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.core import rng_states
from self_supervised_bt.data import digits_images, tensor_dls
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.evaluation import OnlineEvaluation
from self_supervised_bt.folders import unlabelled_dls
from self_supervised_bt.recipes import bt_learner, get_recipe
from self_supervised_bt.reports import (
    FIGURES,
    class_names,
    random_images,
    report,
    run_summary,
    table_verdict,
    versus,
)


def words_of(text):
    "The page without its figures: their base64 may spell any short word"
    return re.sub(r'src="data:[^"]*"', "", text)


@pytest.fixture
def trained(make_learner, make_dls):
    learn = make_learner(make_dls(n=96, bs=32), cbs=[Diagnostics()], stats=([.3], [.35]))
    learn.fit(3, 1e-3)
    return learn


def test_the_page_holds_everything(trained, tmp_path):
    x, y = digits_images()
    table = pd.DataFrame({"a<b": ["41.5 ± 0.2"]}, index=["mine & yours"])
    page = report(trained, tmp_path/"new"/"folder", (x[:100], y[:100]), {"My <results>": table}, title="A & B")
    text = page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    assert {f.stem for f in page.parent.glob("*.png")} == set(FIGURES)
    assert text.count('<img src="data:image/png;base64,') == len(FIGURES) and "No figure" not in text
    for escaped in ("<title>A &amp; B", "My &lt;results&gt;", "mine &amp; yours", "41.5 ± 0.2"): assert escaped in text
    names = ("closer to the other view", "kNN", "positive pairs found", "invariance", "effective rank", "torch")
    for name in names: assert name in words_of(text)
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_without_labels_and_untrained(make_learner, make_dls, tmp_path):
    text = report(make_learner(make_dls(n=64, labels=False, bs=32)), tmp_path).read_text()
    assert "has not been trained" in text and "Diagnostics()" in text and "kNN" not in words_of(text)
    assert text.count("<img ") == len(FIGURES) - 2


def test_a_part_that_fails_costs_the_others_nothing(trained, tmp_path, monkeypatch):
    def fails(*_, **__): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(reports, "map_2d", fails)
    monkeypatch.setattr(reports, "diagnose", fails)
    text = report(trained, tmp_path).read_text()
    assert text.count("<img ") == len(FIGURES) - 1 and text.count("out of &lt;memory&gt;") == 2


def test_looking_changes_nothing(trained, tmp_path):
    before, random = weights(trained), rng_states()
    report(trained, tmp_path)
    assert same(before, weights(trained))
    after = rng_states()
    assert random["python"] == after["python"] and torch.equal(random["torch"], after["torch"])
    assert torch.equal(random["numpy"][1], after["numpy"][1])


def test_images_of_all_classes_of_a_sorted_set():
    "The first images of a folder are those of its first classes: they are sampled instead, images with their labels"
    y = torch.arange(2000)//200
    x = y.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)/10
    for data in ((x, y), tensor_dls(x, y, bs=64, valid_pct=0, device="cpu").train,
                 DataLoader(TensorDataset(x, y), 64), DataLoader(TensorDataset(x, y), 64, shuffle=True)):
        images, labels, how = random_images(data, 1000)
        assert len(images) == 1000 and len(labels.unique()) == 10 and how == "sampled at random from 2,000"
        assert torch.equal((10*images[:, 0, 0, 0]).round().long(), labels.long())
    assert len(random_images(torch.rand(5, 1, 4, 4), 3)[0]) == 3 and random_images(x[:5])[2] == "all there are"


def test_neighbours_are_shown_of_all_classes(trained, monkeypatch):
    "Queries of the picture are sampled too"
    x, y = digits_images()
    order = y[:400].argsort(stable=True)
    run = reports.measure(trained, x[order], y[order])
    shown = {}
    monkeypatch.setattr(reports, "plot_neighbours", lambda queries, images: shown.setdefault("queries", queries))
    reports._neighbours(run)
    rows = [int((run.x == query).flatten(1).all(1).nonzero()[0]) for query in shown["queries"]]
    assert len({int(run.y[row]) for row in rows}) >= 3


def test_broken_files_are_left_out(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = (255*torch.rand(8, 8, 3, generator=rng)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path/f"{i:02}.png")
    for i in range(0, 40, 4): (tmp_path/f"{i:02}.png").write_bytes(b"no image")
    x, _, _ = random_images(unlabelled_dls(tmp_path, 8, bs=8, valid_pct=0, num_workers=0).train)
    assert len(x) == 30 and len(x.flatten(1).unique(dim=0)) == 30


def test_class_names_stand_on_the_page(trained, tmp_path):
    x, y = digits_images()
    text = report(trained, tmp_path, (x[:100], y[:100]), names=[f"digit {i}" for i in range(10)]).read_text()
    assert "10 classes" in text
    loader = SimpleNamespace(dataset=SimpleNamespace(vocab=["cat", "dog"]))
    assert class_names(loader) == ["cat", "dog"] and class_names(x) is None


@pytest.mark.parametrize("backend", ["fused", "kornia"])
def test_every_backend_and_loader_of_pytorch(backend):
    "The whole page with PyTorch's loaders"
    x, y = digits_images()
    def loader(): return DataLoader(TensorDataset(x[:64].float()/255, y[:64]), 16)
    augs = get_barlow_twins_aug_pipelines(8, stats=None, backend=backend)
    learn = quiet(Learner(DataLoaders(loader(), loader()), small_model(), cbs=[BarlowTwins(augs)]))
    learn.fit(1)
    with TemporaryDirectory() as out: text = report(learn, out).read_text()
    assert text.count("<img ") == len(FIGURES) - 1 and "kNN top-1" in text and "No diagnosis" not in text


def test_values_between_measurements_are_left_empty(make_dls, make_learner):
    x, y = digits_images()
    learn = make_learner(cbs=[OnlineEvaluation((x[:60], y[:60]), every=3, probe=False)])
    learn.fit(6)
    assert reports.epochs_frame(learn).knn_accuracy.ne("").tolist() == [True, False, False, True, False, True]
    assert "before training" in str(reports._watched(learn).index.tolist())


def test_an_epoch_that_was_ended_early_has_its_numbers_under_their_names(make_learner):
    "fastai's Recorder leaves the training loss out of such a row"
    learn = make_learner()
    learn.fit(1, cbs=ShortEpochCallback(.3, short_valid=False))
    frame = reports.epochs_frame(learn)
    assert float(frame.valid_loss[0]) == pytest.approx(learn.recorder.values[0][0], rel=1e-2)
    assert "train_loss" not in frame


def test_the_page_for_every_width_style_and_reader(trained, tmp_path):
    text = report(trained, tmp_path).read_text()
    assert '<html lang="en">' in text and 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text and "@media print" in text
    alts = re.findall(r'alt="([^"]*)"', text)
    assert len(alts) == len(FIGURES) and all(re.search(r"\d", alt) for alt in alts), "a picture's numbers are missing"


def test_the_summary_says_what_was_trained(trained):
    summary = run_summary(trained)
    assert summary["training"].startswith("3 epochs, Adam")
    assert "lmb=0.005" in summary["loss"]
    assert summary["images"] == "96 to train on, in batches of 32"


def test_the_run_can_be_repeated_from_the_summary(make_dls):
    "Size, crop, jitter, normalisation, weight decay, schedule, seed and recipe"
    torch.manual_seed(17)
    recipe = get_recipe("digits", epochs=2, opt="adamw", wd=.125)
    learn = quiet(bt_learner(make_dls(n=64, bs=16), small_encoder(), recipe=recipe))
    learn.fit_recipe()
    summary = run_summary(learn)
    view = summary["views (2)"]
    parts = ("Crop(size=(16, 16), scale=(0.45, 1.0)", "Jitter(strengths=(0.4, 0.4, 0.4, 0.1), p=0.8")
    for part in parts: assert part in view
    assert "wd=0.125" in summary["training"] and "17" in summary["random seed"]
    assert "0.02 at step" in summary["schedule"]
    parts = ("epochs=2", "wd=0.125", "hidden_size=256", "views={'recipe': 'digits'}")
    for part in parts: assert part in summary["recipe"]


def test_bad_input(make_dls, tmp_path):
    learn = Learner(make_dls(), small_model(), loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="no BarlowTwins callback"): report(learn, tmp_path)


# Verdicts

LABELLED = {"kNN (k=20)": ["90.0", "80.0", "95.0"], "1 label per class": ["50.0 ± 1.0"]*3}
UNLABELLED = {"positive pairs found": ["31.2 %", "30.0 %", "93.4 %"], "chance": ["0.2 %"]*3,
              "effective rank of h": ["10.6", "3.9", "8.1"], "width": [64, 512, 512]}
ROWS = ["raw pixels", "untrained encoder", "trained encoder"]


@pytest.mark.parametrize("value, base, n, words", [(95, 90, 500, "better than"), ("90.0 %", "95 %", 500, "worse than"),
                                                   (95, 90, 20, "not clearly different from"),
                                                   (95.5, 95, 10**6, "not clearly different from")])
def test_a_difference_within_its_error_is_no_difference(value, base, n, words):
    assert versus(value, base, n) == words


def test_a_table_is_judged_in_a_sentence_with_and_without_labels():
    said = table_verdict(pd.DataFrame(LABELLED, ROWS), 500)
    assert said == ("kNN (k=20) of the trained encoder is 95.0 %: better than the untrained encoder (80.0 %) and "
                    "better than raw pixels (90.0 %).")
    said = table_verdict(pd.DataFrame(UNLABELLED, ROWS), 500)
    assert "same image in 93.4 % (chance 0.2 %): better than the untrained encoder (30.0 %)" in said
    assert "the effective rank of h is 8.1, its width 512." in said and "not helped" not in said
    worse = pd.DataFrame(LABELLED, ROWS).assign(**{"kNN (k=20)": ["90", "95", "80"]})
    assert "worse than the untrained encoder" in (said := table_verdict(worse, 500)) and "has not helped" in said
