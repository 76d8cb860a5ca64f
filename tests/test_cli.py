"The commands of short runs"
import pandas as pd
import pytest

from self_supervised_bt.cli import bt_demo, bt_diagnose
from self_supervised_bt.runs import run_dls, short_run
from self_supervised_bt.weights import load_encoder


def test_bt_demo_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(epochs=2)
    out = capsys.readouterr().out
    assert "1,297 to train on without labels, 500 held out" in out and "trained encoder" in out
    table = pd.read_csv(tmp_path/"runs/digits/table.csv", index_col=0)
    assert list(table.index) == ["raw pixels", "untrained encoder", "trained encoder"] and table.shape[1] == 4
    assert {f.name for f in (tmp_path/"runs/digits").iterdir()} == {
        "cross_correlation.png", "encoder.safetensors", "history.csv", "loss.png", "neighbours.png", "report",
        "results.json", "table.csv", "views.png"}
    assert "<h2>Diagnosis</h2>" in (tmp_path/"runs/digits/report/report.html").read_text()
    assert load_encoder(tmp_path/"runs/digits/encoder.safetensors").created_by["arch"] == "timm/test_resnet"


def test_bt_demo_on_a_folder_with_and_without_labels(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_demo(data=str(folder), epochs=1)
    out = capsys.readouterr().out
    assert "in 2 class folders" in out and "1 label per class" in out
    assert (tmp_path/"runs/pictures/encoder.safetensors").exists()
    bt_demo(data=str(folder), epochs=1, no_labels=True, out="plain")
    out = capsys.readouterr().out
    assert "without labels" in out and "positive pairs found" in out and (tmp_path/"plain/loss.png").exists()


def test_settings_depend_on_the_images(folder):
    def images(run):
        dls = run_dls(run.images, run.recipe, run.n_test/run.n, in_memory=True)
        train, held_out = dls.train_ds.x, dls.valid_ds.x
        assert len(held_out) == run.n_test
        return (len(train) + len(held_out), *train.shape[1:])
    assert images(short_run()) == (1797, 1, 8, 8)
    run = short_run(folder)
    assert (run.recipe.size, run.n_test, run.recipe.bs) == (32, 8, 16) and images(run) == (40, 3, 32, 32)


def test_short_run_does_not_overwrite_checkpoints(folder, tmp_path):
    (tmp_path/"step-0000000001.pt").touch()
    with pytest.raises(SystemExit, match="bt_demo: .*choose another folder"):
        bt_demo(data=str(folder), out=str(tmp_path))


@pytest.mark.parametrize("name,words", [("nowhere", "not a folder"), ("empty", "no image files"),
                                        ("few", "at least 20"), ("broken", "can be read")])
def test_invalid_folders_give_one_line_of_error(folder, name, words):
    for made in ("empty", "few", "broken"): (folder/made).mkdir()
    (folder/"few/a.png").write_bytes((folder/"dark/01.png").read_bytes())
    for i in range(30): (folder/f"broken/{i}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as e: bt_demo(data=str(folder/name))
    assert str(e.value).startswith("bt_demo: ") and words in str(e.value)


def test_bt_diagnose_lists_problems_and_exits_with_1(folder, capsys):
    bt_diagnose(data=str(folder), bs=8, width=16)
    out = capsys.readouterr().out
    assert "40 images" in out and "No problem found" in out
    with pytest.raises(SystemExit) as e: bt_diagnose(bs=16, width=2048)
    assert e.value.code == 1 and "! batch too small" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="bt_diagnose: .*not a folder"): bt_diagnose(data="nowhere")
