"Runs side by side: states, settings that differ, damaged files, tables of 80 columns"
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from self_supervised_bt.compared import fitted, run_table, say, text_table


def make_run(run, epochs=3, planned=10, state="running", **recipe):
    run.mkdir(parents=True)
    recipe = dict(name="laptop", lr=.04, views=dict(recipe="cifar"), epochs=planned, **recipe)
    settings = dict(data="/photos", seed=0, base_recipe="laptop", recipe=recipe)
    (run/"run.json").write_text(json.dumps(settings))
    (run/"results.json").write_text(json.dumps(dict(state=state, epochs=epochs, seconds=12.5, recipe=recipe)))
    rows = dict(train_loss=np.linspace(9, 3, epochs), effective_rank_z=[None]*(epochs - 1) + [7.])
    pd.DataFrame(rows).to_csv(run/"history.csv", index_label="epoch")
    return run


def test_settings_that_differ_and_newest_values(tmp_path):
    make_run(tmp_path/"a", lmb=.1)
    make_run(tmp_path/"deep/b", epochs=10, state="ended", lmb=.2)
    table = run_table(tmp_path)
    assert list(table.index) == ["a", "deep/b"] and list(table["lmb"]) == ["0.1", "0.2"] and "lr" not in table
    assert list(table["state"]) == ["stopped at epoch 3", "ended"] and list(table["epochs"]) == ["3/10", "10/10"]
    assert list(table["train loss"]) == [3, 3] and list(table["rank of z"]) == [7, 7]
    assert list(table["seconds"]) == [12.5]*2
    assert "valid loss" not in table and "kNN (%)" not in table   # measured by none
    assert list(run_table(tmp_path/"a").index) == ["a"]


def test_kNN_of_the_evaluation_comes_before_that_of_the_training(tmp_path):
    run = make_run(tmp_path/"a", epochs=1)
    (run/"history.csv").write_text("epoch,train_loss,knn_accuracy\n0,3.0,0.25\n")
    assert run_table(tmp_path)["kNN (%)"].iloc[0] == 25
    rows = {"photos": {"images": 9, "kNN (k=20)": 61.5, "linear": 70.}}
    (run/"evaluation.json").write_text(json.dumps(dict(rows=rows)))
    assert run_table(tmp_path)["kNN (%)"].iloc[0] == 61.5


def test_states(tmp_path):
    "A lock is held by a process; one that is left tells of a process that was killed"
    run = make_run(tmp_path/"a", epochs=7)
    assert run_table(tmp_path)["state"].iloc[0] == "stopped at epoch 7"
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "f.write('process 7 of tea'); f.flush(); print(flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", hold, run/".lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert run_table(tmp_path)["state"].iloc[0] == "running"
        other.communicate()
    assert run_table(tmp_path)["state"].iloc[0] == "killed at epoch 7" and (run/".lock").exists()
    (run/".lock").write_text(f"process {os.getpid()} of here")
    assert run_table(tmp_path)["state"].iloc[0] == "running"
    (run/".lock").unlink()
    longer = json.loads((run/"run.json").read_text())
    (run/"results.json").write_text(json.dumps(dict(state="ended", epochs=10)))
    longer["recipe"]["epochs"] = 30
    (run/"run.json").write_text(json.dumps(longer))
    assert run_table(tmp_path)["state"].iloc[0] == "stopped at epoch 10"   # it was to have more epochs


@pytest.mark.parametrize("name", ["run.json", "results.json", "history.csv", "evaluation.json"])
@pytest.mark.parametrize("bytes_", [b"", b"{", b"[]", b"\xff\xfe", b'{"recipe": 7, "rows": 3}'])
def test_a_damaged_file_does_not_hide_the_others(tmp_path, name, bytes_):
    make_run(tmp_path/"a")
    (make_run(tmp_path/"b")/name).write_bytes(bytes_)
    assert list(run_table(tmp_path).index) == ["a", "b"]


def test_nothing_to_list(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"): run_table(tmp_path/"no")
    with pytest.raises(ValueError, match="holds no run"): run_table(tmp_path)


@pytest.mark.parametrize("rows, columns", [(1, 3), (2, 12), (30, 3), (3, 40)])
def test_no_value_is_lost_in_80_columns(rows, columns):
    numbers = np.arange(rows*columns).reshape(rows, columns) + 1000.
    names = [f"measure {i} of some length" for i in range(columns)]
    table = pd.DataFrame(numbers, index=[f"run {i}" for i in range(rows)], columns=names)
    text = text_table(table)
    assert max(map(len, text.splitlines())) <= 80
    for value in numbers.ravel(): assert f"{value:.0f}" in text


def test_cells():
    text = text_table(pd.DataFrame({"a b": [None, 12.3456, 12345.6, "x", 3]}, index=list("vwxyz")))
    assert text.splitlines() == ["     a b", "v", "w  12.35", "x  12346", "y      x", "z      3"]


def test_long_settings_are_broken_and_nothing_is_lost():
    settings = '{"channels": [32, 64, 128, 256], "stem_width": 16, "name": "a-name-without-any-space-that-is-long"}'
    table = pd.DataFrame({"arch_args": [settings, "{}"], **{f"setting_{i}": ["a", "b"] for i in range(12)}},
                         index=["runs/with/a/long/name/of/its/own", "b"])
    for width in (30, 60, 80):
        text = text_table(table, width)
        assert max(map(len, text.splitlines())) <= width
        for part in ("channels", "setting_11", "128"): assert part in text
        assert text.replace(" ", "").replace("\n", "").count("a-name") == 1


def test_long_names_of_rows_are_broken_between_words():
    index = ["stop-gradient and a predictor of two layers", "baseline"]
    table = pd.DataFrame({"kNN": ["84.2 ± 3.5", "9.0 ± 1.0"], "difference": ["", "+0.3"]}, index)
    for width in (42, 50, 60):
        lines = text_table(table, width).splitlines()
        assert max(map(len, lines)) <= width and lines[-1].split() == ["baseline", "9.0", "±", "1.0", "+0.3"]
        assert lines[1].endswith("84.2 ± 3.5") and all(line.startswith("  ") for line in lines[2:-1])
        assert " ".join(f"{line:{width}}"[:width - 24].strip() for line in lines[1:-1]) == index[0]
    assert text_table(table, 36).splitlines()[-1].split() == ["difference", "+0.3"]   # turned: no room for a word


def test_prose_is_broken_between_words_and_tables_are_not():
    fact = "step       changes the weights by 8.3e-02 of their norm; 0 % of the time is waiting for data"
    lines = fitted(fact, 50).splitlines()
    assert max(map(len, lines)) <= 50 and all(line.startswith(" "*11) for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(fact.split())
    assert fitted("  -> use bs=256 or fewer dimensions", 20).splitlines()[1].startswith("     ")
    row = "a row of a table  95.6  65.8 ± 4.5  85.3 ± 2.5"
    assert fitted(row, 20) == row
    assert "runs/photos/a-very-long-name/report.html" in fitted("Open runs/photos/a-very-long-name/report.html now", 20)


def test_text_in_a_pipe_stays_as_it_is(capsys, monkeypatch):
    say(text := "word "*60)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    say(text)
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 50 and len(out) == 6


def test_numbers_of_a_column_have_the_same_decimals():
    table = pd.DataFrame({"kNN": [8.3, 0., 50., None], "lr": [.04, .005, 1., 2.], "n": [1, 2, 3, 4],
                          "s": [1234.5, 2.5, float("nan"), 3.]}, index=list("abcd"))
    assert [line.split() for line in text_table(table).splitlines()[1:]] == [
        ["a", "8.3", "0.04", "1", "1234"], ["b", "0.0", "0.005", "2", "2.5"], ["c", "50.0", "1", "3"],
        ["d", "2", "4", "3.0"]]
