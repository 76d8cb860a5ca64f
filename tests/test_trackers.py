"Trackers: TensorBoard itself, and the calls that the others get"
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastai.callback.core import Callback

from self_supervised_bt.data import digits_dls
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.trackers import EpochTracker, check_tracker, tracker_callbacks


def logged(make_learner, cbs, epochs=2):
    learn = make_learner(cbs=cbs)
    learn.fit(epochs)
    return learn


def test_tensorboard_has_the_columns_of_every_epoch(make_learner, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    learn = logged(make_learner, tracker_callbacks("tensorboard", tmp_path, {}))
    events = accumulator.EventAccumulator(str(tmp_path/"tensorboard"))
    events.Reload()
    valid = [e.value for e in events.Scalars("valid_loss")]
    assert valid == pytest.approx([float(row[1]) for row in learn.recorder.values], rel=1e-5)
    assert len(events.Scalars("lr_0")) == learn.train_iter
    assert [f.name for f in tmp_path.iterdir()] == ["tensorboard"]


def test_tensorboard_leaves_out_what_is_no_number(tmp_path):
    "As settings of Muon are"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    learn = bt_learner(digits_dls(bs=256), recipe="digits", cbs=tracker_callbacks("tensorboard", tmp_path, {}))
    assert any(isinstance(v, str) for h in learn.create_opt() or learn.opt.hypers for v in h.values())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    events = accumulator.EventAccumulator(str(tmp_path/"tensorboard"))
    events.Reload()
    assert {"lr_0", "lr_1", "train_loss", "valid_loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("lr_0")) == learn.train_iter


def fake(monkeypatch, name, **functions):
    "A package that notes how its functions are called"
    calls = []
    def noted(f): return lambda *args, **kwargs: calls.append((f, args, kwargs))
    names = ("init", "log", "finish", "set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics",
             "end_run")
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{f: noted(f) for f in names}, run=None, **functions))
    return calls


def test_trackio_gets_a_row_per_epoch(make_learner, tmp_path, monkeypatch):
    calls = fake(monkeypatch, "trackio")
    learn = logged(make_learner, tracker_callbacks("trackio", tmp_path/"mine", dict(lr=.1)))
    assert [f for f, *_ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][2] == dict(project="self_supervised_bt", name="mine", config=dict(lr=.1))
    rows = [args[0] for f, args, _ in calls if f == "log"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["valid_loss"] == pytest.approx(float(learn.recorder.values[1][1]))


def test_mlflow_writes_below_the_run_unless_it_is_told_where(make_learner, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    calls = fake(monkeypatch, "mlflow")
    logged(make_learner, tracker_callbacks("mlflow", tmp_path/"mine", dict(lr=.1, views=dict(a=1))))
    assert calls[0] == ("set_tracking_uri", ((tmp_path/"mine/mlruns").as_uri(),), {})
    assert [kwargs["step"] for f, _, kwargs in calls if f == "log_metrics"] == [1, 2] and calls[-1][0] == "end_run"
    assert next(args[0] for f, args, _ in calls if f == "log_params") == dict(lr="0.1", views="{'a': 1}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    calls.clear()
    tracker_callbacks("mlflow", tmp_path, {})
    assert "set_tracking_uri" not in [f for f, *_ in calls]


def test_wandb_is_fastais_callback_and_is_finished(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "wandb")
    class WandbCallback(Callback):
        def __init__(self, **kwargs): self.kwargs = kwargs
    monkeypatch.setitem(sys.modules, "fastai.callback.wandb", SimpleNamespace(WandbCallback=WandbCallback))
    theirs, end = tracker_callbacks("wandb", tmp_path/"mine", dict(lr=.1))
    assert isinstance(theirs, WandbCallback) and theirs.kwargs == dict(log_preds=False)
    assert calls == [("init", (), dict(project="self_supervised_bt", name="mine", dir=str(tmp_path/"mine"),
                                       config=dict(lr=.1)))]
    end.release()
    assert calls[-1][0] == "finish"


def test_a_fit_that_fails_is_finished_too(make_learner):
    ended = []
    class Fails(Callback):
        def before_batch(self): raise RuntimeError("no more")
    with pytest.raises(RuntimeError, match="no more"):
        logged(make_learner, [EpochTracker(lambda *_: None, lambda: ended.append(1)), Fails()])
    assert ended == [1]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)   # as if it were not installed
    with pytest.raises(ImportError, match="tracker='trackio' needs .* not installed: pip install trackio"):
        check_tracker("trackio")
    with pytest.raises(ValueError, match="tracker must be one of 'tensorboard'"): tracker_callbacks("x", Path(), {})
    check_tracker(None)
