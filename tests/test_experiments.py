"Experiments: cells that repeat, folders that resume and are shared, statistics, tables"
import json
import math
import os
import signal
import time
import traceback
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image
from scipy import stats

from self_supervised_bt import experiments as ex
from self_supervised_bt.barlow_twins import create_barlow_twins_model
from self_supervised_bt.cli import bt_experiment
from self_supervised_bt.core import write_json
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import RECIPES, get_recipe

DIGITS = get_recipe("digits", epochs=1, bs=32)
TWO = ex.Experiment("two", DIGITS, {"baseline": {}, "wide": dict(projection_size=300)})


def fake_cell(images, recipe, options, seed, half=False):
    "Numbers that depend on row and seed, without training"
    knn = 50 + recipe.projection_size/100 + recipe.lr + seed**2 + len(str(sorted(options.items())))*(1 + seed/50)
    return dict(epochs=recipe.epochs, knn=knn, linear=knn + 1, one_label=knn - 9, rank=7., seconds=.1)


def in_child(f):
    "The process id of a copy of this process that calls `f` and ends"
    pid = os.fork()
    if pid: return pid
    try: f()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.01)


def without_time(out):
    "What an experiment wrote, without durations"
    cells = {f.name: {**json.loads(f.read_text()), "seconds": 0} for f in out.glob("cells/*.json")}
    table = pd.read_csv(out/"table.csv").drop(columns="seconds")
    return cells, table.to_csv(), (out/"table.md").read_text()


@pytest.fixture
def quick_probe(monkeypatch):
    "A probe that searches no weight of its regularisation, which takes most of a small cell"
    monkeypatch.setattr(ex, "linear_probe", partial(ex.linear_probe, Cs=(1e-2,)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_table5_killed_and_resumed_gives_the_same_table(tmp_path, quick_probe):
    def run(out): bt_experiment("table5", out=str(out), seeds=1, epochs=1, images=64)
    killed, whole = tmp_path/"killed", tmp_path/"whole"
    pid = in_child(lambda: run(killed))
    wait_for(lambda: len(list(killed.glob("cells/*.json"))) == 3)
    time.sleep(.1)   # in the middle of the fourth cell
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    complete = {f: f.stat().st_mtime_ns for f in killed.glob("cells/*.json")}
    assert len(complete) < 8 and not (killed/"table.md").exists()
    run(killed)
    run(whole)
    assert without_time(killed) == without_time(whole)
    assert all(f.stat().st_mtime_ns == t for f, t in complete.items()), "complete cells are not trained again"
    rows = ex.table5(DIGITS).rows
    assert list(pd.read_csv(whole/"table.csv")["row"]) == list(rows) and len(without_time(whole)[0]) == len(rows)


def test_a_cell_depends_on_its_seed_alone(quick_probe):
    images = ex.experiment_images("digits", 16, 64)
    def run(seed, options=None, **changes):
        result = ex.run_cell(images, DIGITS.changed(**changes), options or {}, seed)
        return {k: v for k, v in result.items() if k != "seconds"}
    first = run(0)
    run(1, dict(loss="hsic"))
    assert run(0) == first
    assert run(1) != first and run(0, dict(loss="redundancy only")) != first


# Sharing, differing and damaged folders

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_share_a_folder_train_every_cell_once(tmp_path, monkeypatch):
    log = tmp_path/"log"
    def slow(images, recipe, options, seed, half=False):
        with open(log, "a") as f: f.write(f"{recipe.projection_size} {seed}\n")
        time.sleep(.03)
        return fake_cell(images, recipe, options, seed)
    monkeypatch.setattr(ex, "run_cell", slow)
    def run(): ex.run_experiment(TWO, seeds=6, images=64, out=tmp_path/"out", verbose=False)
    pids = [in_child(run) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert sorted(log.read_text().split("\n")[:-1]) == sorted(f"{w} {s}" for w in (256, 300) for s in range(6))
    assert pd.read_csv(tmp_path/"out/table.csv")["seeds"].tolist() == [6, 6]


def test_a_cell_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "run_cell", fake_cell)
    cell = ex.Cell("wide", 0)
    def theirs(_):
        write_json(cell.file(tmp_path), dict(epochs=1, knn=1., linear=1., one_label=1., rank=1., seconds=1.))
    monkeypatch.setattr(ex.time, "sleep", theirs)   # they end while this process waits
    with ex.locked(cell, tmp_path/"x") as ours: assert ours
    (tmp_path/"cells").mkdir()
    write_json(tmp_path/"experiment.json", ex.settings_of(TWO, ex.experiment_images("digits", 16, 64), False))
    from filelock import FileLock
    cell.lock(tmp_path).parent.mkdir()
    with FileLock(cell.lock(tmp_path)): table = ex.run_experiment(TWO, seeds=1, images=64, out=tmp_path, verbose=False)
    assert table.loc["wide", "knn"] == 1 and table.loc["baseline", "knn"] > 50


def test_other_settings_are_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "run_cell", fake_cell)
    def run(e=TWO, seeds=2, images=64, **kwargs):
        return ex.run_experiment(e, seeds=seeds, images=images, out=tmp_path/"out", verbose=False, **kwargs)
    first = run()
    pd.testing.assert_frame_equal(run(), first)
    for match, kwargs in [(r"lr=0\.5 \(was 0\.05\)", dict(lr=.5)), ("half=True", dict(half=True)),
                          ("images=", dict(images=65)), ("row 'narrow' is new", dict(e=replace(
                              TWO, rows={**TWO.rows, "narrow": dict(projection_size=9)}))),
                          (r"projection_size=301 \(was 300\)", dict(e=replace(
                              TWO, rows={"baseline": {}, "wide": dict(projection_size=301)}))),
                          ("loss='hsic'", dict(e=replace(TWO, rows={
                              "baseline": {}, "wide": dict(projection_size=300, loss="hsic")})))]:
        with pytest.raises(ValueError, match=match): run(**kwargs)
    assert run(seeds=3)["seeds"].tolist() == [3, 3] and run(seeds=2)["seeds"].tolist() == [2, 2]
    file = ex.Cell("wide", 1).file(tmp_path/"out")
    file.write_text("{")
    with pytest.raises(ValueError, match=f"{file.name} is damaged: delete it"): run()
    file.unlink()
    pd.testing.assert_frame_equal(run(), first)


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, monkeypatch):
    def fails(images, recipe, options, seed, half=False):
        if recipe.projection_size == 300 and seed == 1: return dict(epochs=1, error="the loss is nan")
        return fake_cell(images, recipe, options, seed)
    monkeypatch.setattr(ex, "run_cell", fails)
    table = ex.run_experiment(TWO, images=64, out=tmp_path/"out", verbose=False)
    line = table.loc["wide"]
    assert line["failed"] == 1 and math.isnan(line["knn"]) and math.isnan(line["p"]), "no mean of what is left over"
    assert "wide (1 failed)" in (tmp_path/"out/table.md").read_text()


def test_a_training_that_fails_is_caught(monkeypatch):
    def nan(self, **kwargs): raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(ex.Learner, "fit_recipe", nan)
    result = ex.run_cell(ex.experiment_images("digits", 16, 64), DIGITS, {}, 0)
    assert result == dict(epochs=1, error="the loss is nan")


def test_equal_seconds_are_timed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "run_cell", fake_cell)
    times = []
    def timed(learners, turns=3):
        times.append(1)
        return {"baseline": .002, "wide": .0051}
    monkeypatch.setattr(ex, "seconds_per_image", timed)
    e = replace(TWO, equal_seconds=True)
    for _ in range(2):
        table = ex.run_experiment(e, images=64, out=tmp_path/"out", verbose=False, epochs=100)
        assert table["epochs"].tolist() == [100, 39] and len(times) == 1
    assert "39" in (tmp_path/"out/table.md").read_text()


def test_timing_is_per_image_whatever_the_batch():
    images = ex.experiment_images("digits", 16, 64)
    class Clock:   # every batch takes a second
        now = 0.
    def learner(bs):
        from fastai.callback.core import Callback
        class Tick(Callback):
            def after_batch(self): Clock.now += 1
        dls = ex.tensor_dls(images.sample(4*bs), bs=bs, valid_pct=0)
        learn = ex.cell_learner(dls, DIGITS.changed(bs=bs), {})
        learn.add_cb(Tick())
        return learn
    patch = pytest.MonkeyPatch()
    patch.setattr(ex.time, "perf_counter", lambda: Clock.now)
    try: assert ex.seconds_per_image(dict(a=learner(8), b=learner(16)), turns=1) == dict(a=1/8, b=1/16)
    finally: patch.undo()


# Statistics

def test_paired_t_is_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        a, b = rng.normal(70, 3, n).tolist(), rng.normal(71, 3, n).tolist()
        assert ex.paired_t(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-10)
        assert ex.paired_t(b, a) == pytest.approx(ex.paired_t(a, b), rel=1e-12)
    assert math.isnan(ex.paired_t([1, 2, 3], [2, 3, 4])) and math.isnan(ex.paired_t([1, math.nan], [2, 3]))
    one_image = [[100*torch.tensor(k/500).item() for k in ks] for ks in ((492, 491, 480), (491, 490, 479))]
    assert math.isnan(ex.paired_t(*one_image))   # equal but for the rounding of float32


def test_holm_by_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        p = rng.uniform(size=6)**3
        order = np.sort(p)
        def adjusted(x): return max(min(1, (6 - j)*order[j]) for j in range(6) if order[j] <= x)
        assert ex.holm(p.tolist()) == pytest.approx([adjusted(x) for x in p])
    got = ex.holm([.04, math.nan, .01])
    assert got[::2] == pytest.approx([.04, .02]) and math.isnan(got[1])


def test_a_table_says_what_the_numbers_say():
    knn = {"baseline": [80., 82., 81.], "worse": [60., 61.5, 61.2], "like it": [81., 81.5, 80.]}
    e = ex.Experiment("three", DIGITS, {row: {} for row in knn}, paper={"worse": 57.3})
    cells = pd.DataFrame([dict(row=row, seed=s, epochs=1, knn=k, linear=k, one_label=k, rank=2., seconds=1., error=None)
                          for row, ks in knn.items() for s, k in enumerate(ks)])
    table = ex.summary(e, cells.sample(frac=1, random_state=0))   # the order of the cells does not matter
    ps = [stats.ttest_rel(knn[row], knn["baseline"]).pvalue for row in ("worse", "like it")]
    assert table["p"].tolist()[1:] == pytest.approx(ps) and math.isnan(table.loc["baseline", "p"])
    assert table["p_holm"].tolist()[1:] == pytest.approx([2*ps[0], ps[1]])
    assert table.loc["worse", "difference"] == pytest.approx(60.9 - 81)
    assert table.loc["baseline", "knn_sd"] == pytest.approx(1)
    shown = ex.shown_table(table)["difference of kNN"].tolist()
    assert shown == ["", f"-20.1, p = {2*ps[0]:.2g}", "-0.2, not told apart"]
    paired = ex.summary(replace(e, against={"like it": "worse", "worse": "worse"}), cells)
    assert paired.loc["like it", "against"] == "worse" and paired.loc["like it", "difference"] > 19
    assert math.isnan(paired.loc["worse", "difference"])
    lacking = ex.summary(e, cells.drop(cells.index[5]))   # the third seed of "worse"
    assert list(ex.shown_table(lacking).index) == ["baseline", "worse (2 of 3)", "like it"]
    assert lacking.loc["worse", "difference"] == pytest.approx(-20.25), "only seeds that both rows have"


@pytest.mark.parametrize("name", [n for n in ex.EXPERIMENTS if n != "methods" or hasattr(RECIPES["digits"], "method")])
def test_tables_fit_a_terminal(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ex, "run_cell", fake_cell)
    monkeypatch.setattr(ex, "seconds_per_image", lambda learners, turns=3: dict.fromkeys(learners, 1.))
    table = ex.run_experiment(name, images=64, out=tmp_path/"out")
    text = capsys.readouterr().out.split("\n\n", 1)[1]
    assert max(map(len, text.splitlines())) <= 80
    assert len(table) > 3 and set(table.index) == set(pd.read_csv(tmp_path/"out/table.csv")["row"])
    assert (tmp_path/"out/table.md").read_text().startswith("|  | ")


# Settings and images

def test_a_row_with_a_predictor_has_the_model_of_the_method():
    set_seed(0)
    images = ex.experiment_images("digits", 16, 64)
    recipe = DIGITS.changed(lmb=.02)
    learn = ex.cell_learner(images.divided(32, 0)[0], recipe, dict(loss="stop-gradient", predictor=True))
    encoder = create_encoder(DIGITS.arch, n_in=1, pretrained=False)
    theirs = create_barlow_twins_model(encoder, DIGITS.hidden_size, DIGITS.projection_size, predictor=True)
    assert str(learn.model.predictor) == str(theirs.predictor)
    before = [p.clone() for p in learn.model.predictor.parameters()]
    ex.quiet_fit(learn, learn.fit_recipe)
    assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.predictor.parameters())), "it is trained"
    assert learn.barlow_twins.objective.stop_gradient and learn.barlow_twins.lmb == .02


@pytest.mark.parametrize("name", [n for n in ex.EXPERIMENTS if n != "methods" or hasattr(RECIPES["digits"], "method")])
@pytest.mark.parametrize("recipe", ["digits", "cifar", "mixed-cifar10", "paper"])
def test_every_row_can_be_built(name, recipe):
    e = ex.named_experiment(name, get_recipe(recipe, lmb_reg=None))
    settings = [ex.row_settings(e, row) for row in e.rows]
    assert len({str((r.changed(name="x"), o)) for r, o in settings}) == len(settings), "no two rows are the same"


def test_baselines():
    assert ex.baseline_recipe("digits", "small", 8) == get_recipe("digits")
    assert ex.baseline_recipe("photos", "small", 32) == get_recipe("cifar", name="cifar", nviews=2)
    cifar, imagenet = (ex.baseline_recipe("photos", "paper", side) for side in (32, 400))
    assert (cifar.lmb_reg, cifar.epochs, cifar.projection_size) == (None, 2000, 1024)
    assert (imagenet.arch, imagenet.epochs, imagenet.bs) == ("timm/resnet50", 300, 2048)
    with pytest.raises(ValueError, match="scale='paper' is for photographs"): ex.baseline_recipe("digits", "paper", 8)
    with pytest.raises(ValueError, match="scale must be one of"): ex.baseline_recipe("digits", "large", 8)


def test_folders_with_and_without_test_images(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, n in (("train", 9), ("val", 4)):
        for label in ("a", "b"):
            for i in range(n):
                f = tmp_path/part/label/f"{i}.png"
                f.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(f)
    images = ex.experiment_images(tmp_path, 12)
    _, (x, y), (x_test, y_test) = images.divided(4, 0)
    assert (len(x), len(x_test)) == (18, 8) and torch.equal(y.bincount(), torch.tensor([9, 9]))
    assert torch.equal(images.divided(4, 1)[2][0], x_test), "test images are those of the folder"
    monkeypatch.setattr(ex, "IN_MEMORY", 0)
    ex.folder_images.cache_clear()
    files = ex.experiment_images(tmp_path, 12)
    dls, train, test = files.divided(6, 0)
    assert isinstance(files, ex.ImagesInFiles) and (len(train.dataset), len(test.dataset)) == (18, 8)
    assert dls.train.bs == 6 and files.sample(20).shape == (20, 3, 12, 12)
    with pytest.raises(ValueError, match="leave it out"): ex.experiment_images(tmp_path, 12, 4)
    (tmp_path/"val").rename(tmp_path/"vals")
    with pytest.raises(ValueError, match="no test or val"): ex.train_and_test_folders(tmp_path)


def test_a_table_gives_the_images_and_labels_that_a_folder_gives(tmp_path, monkeypatch):
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        label = "ab"[i % 2]
        f = tmp_path/"images"/label/f"{i:02}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(f)
        rows.append(dict(picture=f"images/{label}/{i:02}.png", species=label, split=str(i % 3)))
    table = pd.DataFrame(rows).sort_values("picture")
    table.to_csv(tmp_path/"photos.csv", index=False)
    which = dict(labels="species", column="picture")
    folder = ex.experiment_images(tmp_path/"images", 12)
    images = ex.experiment_images(tmp_path/"photos.csv", 12, **which)
    assert torch.equal(images.x, folder.x) and torch.equal(images.y, folder.y)
    assert images.n_test == 6 and ex.side_of(str(tmp_path/"photos.csv"), "picture") == 12
    three = ex.experiment_images(tmp_path/"photos.csv", 12, labels="split", column="picture")
    assert three.y.unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="choose one with column='name'"):
        ex.experiment_images(tmp_path/"photos.csv", 12)
    with pytest.raises(ValueError, match="labels='species' is for files, not for 'digits'"):
        ex.experiment_images("digits", 8, labels="species")
    monkeypatch.setattr(ex, "IN_MEMORY", 0)
    ex.folder_images.cache_clear()
    dls, train, test = ex.experiment_images(tmp_path/"photos.csv", 12, **which).divided(6, 0)
    assert len(train.dataset) + len(test.dataset) == 30 and list(train.dataset.vocab) == ["a", "b"]
    assert [ex.held_out_of(n) for n in (10, 1249, 1797, 5000, 90_000)] == [2, 249, 500, 1000, 5000]


def test_data_sets_by_name_are_divided_as_published(monkeypatch):
    def part(name, part, root, size, download):
        n = dict(train=20, test=8)[part]
        return torch.randint(0, n, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 4
    monkeypatch.setattr(ex, "known_images", part)
    ex.named_images.cache_clear()
    images = ex.experiment_images("cifar10", 24, 12)
    _, (x, y), (x_test, y_test) = images.divided(4, 0)
    assert (len(x), len(x_test), int(x.max()), int(x_test.max())) == (12, 8, 19, 7)
    ex.named_images.cache_clear()
    with pytest.raises(ValueError, match="several labels per image"): ex.experiment_images("voc2007", 24)
    with pytest.raises(ValueError, match="root=.* is for data sets by name"):
        ex.experiment_images("digits", 16, root="/data")
    assert ex.baseline_recipe("stl10", "paper", 64).size == 64 and ex.baseline_recipe("stl10", "small", 96).size == 24


# The command

def test_the_command_lists_refuses_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bt_experiment()
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(ex.EXPERIMENTS) and "Table 5" in listed
    with pytest.raises(SystemExit, match="bt_experiment: name must be one of 'table5'"): bt_experiment("table6")
    with pytest.raises(SystemExit, match="bt_experiment: --images must lie in 2 to 1297"):
        bt_experiment("table5", images=9999)
    def interrupted(*_, **__): os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(ex, "run_cell", interrupted)
    monkeypatch.setattr("sys.argv", ["bt_experiment", "table5", "--out", "a b"])
    with pytest.raises(SystemExit) as e: bt_experiment("table5", out="a b")
    assert e.value.code == 130
    assert "stopped by SIGINT: the cells that are complete are kept, go on with bt_experiment table5 --out 'a b'" \
        in capsys.readouterr().err
