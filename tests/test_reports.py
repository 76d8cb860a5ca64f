"The report: whole, self-contained, and there even when a part of it fails"
import re

import pandas as pd
import pytest
import torch
from fastai.learner import Learner

from conftest import small_model
from self_supervised_bt import reports
from self_supervised_bt.data import digits_images
from self_supervised_bt.diagnostics import Diagnostics
from self_supervised_bt.reports import PARTS, report, settings, some_images


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
    assert page.name == "report.html" and {f.stem for f in page.parent.glob("*.png")} == set(PARTS)
    assert text.count('<img src="data:image/png;base64,') == len(PARTS) and "No picture" not in text
    assert "<title>A &amp; B" in text and "My &lt;results&gt;" in text and "mine &amp; yours" in text and "41.5 ± 0.2" in text
    for name in ("closer to their twin", "kNN", "positive pairs found", "invariance", "effective_rank", "torch"): assert name in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_without_labels_and_untrained(make_learner, make_dls, tmp_path):
    text = report(make_learner(make_dls(n=64, labels=False, bs=32)), tmp_path).read_text()
    assert "nothing was trained yet" in text and "Diagnostics()" in text and "kNN" not in text
    assert text.count("<img ") == len(PARTS) - 2


def test_a_part_that_fails_costs_the_others_nothing(trained, tmp_path, monkeypatch):
    def fails(*_, **__): raise RuntimeError("out of <memory>")
    monkeypatch.setattr(reports, "map_2d", fails)
    monkeypatch.setattr(reports, "diagnose", fails)
    text = report(trained, tmp_path).read_text()
    assert text.count("<img ") == len(PARTS) - 1 and text.count("out of &lt;memory&gt;") == 2


def test_looking_changes_nothing(trained, tmp_path):
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    report(trained, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in trained.model.state_dict().items())


def test_some_images_are_the_first(make_dls):
    dls = make_dls(n=50, bs=16, n_valid=21)
    x, y = some_images(dls.train, 20)
    assert torch.equal(x, torch.stack([o[0] for o in dls.train_ds][:20]).as_subclass(torch.Tensor)) and y.tolist() == [o[1] for o in dls.train_ds][:20]
    assert some_images(torch.rand(5, 1, 4, 4), 3)[0].shape[0] == 3


def test_settings_say_what_was_trained(trained):
    s = settings(trained)
    assert s["training"].startswith("3 epochs, Adam") and "lmb = 0.005" in s["loss"] and s["images"] == "96 to train on, in batches of 32"


def test_bad_input(make_dls, tmp_path):
    with pytest.raises(ValueError, match="no BarlowTwins callback"): report(Learner(make_dls(), small_model(), loss_func=lambda *_: 0), tmp_path)
