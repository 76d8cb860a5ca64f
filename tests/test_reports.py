"The report: whole, self-contained, and there even when a part of it fails"
import re

import pandas as pd
import pytest
import torch
from conftest import same, small_model, weights
from fastai.learner import Learner

from self_supervised_bt import reports
from self_supervised_bt.data import digits_images
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.reports import FIGURES, first_images, report, run_summary


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
    names = ("closer to the other view", "kNN", "positive pairs found", "invariance", "effective_rank", "torch")
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
    before = weights(trained)
    report(trained, tmp_path)
    assert same(before, weights(trained))


def test_the_images_are_the_first(make_dls):
    dls = make_dls(n=50, bs=16, n_valid=21)
    x, y = first_images(dls.train, 20)
    images, labels = zip(*[dls.train_ds[i] for i in range(20)])
    assert torch.equal(x, torch.stack(images).as_subclass(torch.Tensor))
    assert y.tolist() == list(labels)
    assert first_images(torch.rand(5, 1, 4, 4), 3)[0].shape[0] == 3


def test_the_summary_says_what_was_trained(trained):
    summary = run_summary(trained)
    assert summary["training"].startswith("3 epochs, Adam")
    assert "lmb = 0.005" in summary["loss"]
    assert summary["images"] == "96 to train on, in batches of 32"


def test_bad_input(make_dls, tmp_path):
    learn = Learner(make_dls(), small_model(), loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="no BarlowTwins callback"): report(learn, tmp_path)
