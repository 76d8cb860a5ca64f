"The demo command, as a person starts it"
import pandas as pd
import pytest

from self_supervised_bt.weights import load_encoder
from self_supervised_bt.cli import bt_demo, bt_diagnose, digits_job, folder_job


def test_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(epochs=2)
    out = capsys.readouterr().out
    assert "1,297 to train on without labels, 500 held out" in out and "trained encoder" in out
    table = pd.read_csv(tmp_path/"runs/digits/table.csv", index_col=0)
    assert list(table.index) == ["raw pixels", "untrained encoder", "trained encoder"] and table.shape[1] == 4
    assert {f.name for f in (tmp_path/"runs/digits").iterdir()} == {
        "cross_correlation.png", "encoder.safetensors", "loss.png", "neighbours.png", "report", "table.csv", "views.png"}
    assert "Is it well?" in (tmp_path/"runs/digits/report/report.html").read_text()
    assert load_encoder(tmp_path/"runs/digits/encoder.safetensors").created_by["arch"] == "timm/test_resnet"


def test_a_folder_with_and_without_labels(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(data=str(folder), epochs=1)
    out = capsys.readouterr().out
    assert "in 2 class folders" in out and "1 label per class" in out and (tmp_path/"runs/pictures/encoder.safetensors").exists()
    bt_demo(data=str(folder), epochs=1, no_labels=True, out="plain")
    out = capsys.readouterr().out
    assert "without labels" in out and "positive pairs found" in out and (tmp_path/"plain/loss.png").exists()


def test_jobs_suit_their_images(folder):
    assert digits_job().x.shape == (1797, 1, 8, 8)
    job = folder_job(str(folder))
    assert (job.recipe.size, job.n_test, job.recipe.bs, tuple(job.x.shape)) == (32, 8, 16, (40, 3, 32, 32))


@pytest.mark.parametrize("make,words", [
    (lambda f: f/"nowhere", "not a folder"), (lambda f: f/"empty", "no image files"), (lambda f: f/"few", "at least 20"),
    (lambda f: f/"broken", "can be read")])
def test_bad_folders_end_with_one_line(folder, make, words):
    for name in ("empty", "few", "broken"): (folder/name).mkdir()
    (folder/"few/a.png").write_bytes((folder/"dark/01.png").read_bytes())
    for i in range(30): (folder/f"broken/{i}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as e: bt_demo(data=str(make(folder)))
    assert str(e.value).startswith("bt_demo: ") and words in str(e.value)


def test_diagnose_says_what_is_wrong_and_ends_with_1(folder, capsys):
    bt_diagnose(data=str(folder), bs=8, width=16)
    out = capsys.readouterr().out
    assert "40 images" in out and "Nothing wrong was seen" in out
    with pytest.raises(SystemExit) as e: bt_diagnose(bs=16, width=2048)
    assert e.value.code == 1 and "! batch too small" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="bt_diagnose: .*not a folder"): bt_diagnose(data="nowhere")
