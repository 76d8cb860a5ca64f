"bfloat16 in the model's forward pass, and nowhere else"
import copy
import pickle

import pytest
import torch
from callbacks import DoAt
from conftest import small_model
from fastai.torch_core import set_seed

from self_supervised_bt.evaluation import encode
from self_supervised_bt.training import Autocast, WarmupCosine


@pytest.fixture
def watched():
    "A model, and the list of dtypes that its projector computes in"
    model, seen = small_model(), []
    model.projector[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    return model, seen


def test_forward_in_bfloat16_loss_and_weights_in_float32(make_learner, watched):
    model, seen = watched
    losses = []
    def look(learn): losses.append((learn.loss_grad.dtype, torch.is_autocast_enabled("cpu")))
    learn = make_learner(model=model, cbs=[Autocast(), DoAt("after_loss", look)])
    before = [p.clone() for p in model.parameters()]
    learn.fit(1, 1e-2)
    assert set(seen) == {torch.bfloat16} and set(losses) == {(torch.float32, False)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def has_hooks(model):
    "Does the model differ from one that was never in a fit?"
    return bool(model._forward_pre_hooks or model._forward_hooks or vars(model).get("_compiled_call_impl"))


def test_float32_after_the_fit(make_learner, watched):
    model, seen = watched
    learn = make_learner(model=model, cbs=[Autocast()])
    learn.fit(1, 1e-2)
    learn.lr_find(num_it=20, show_plot=False)
    seen.clear()
    model(torch.rand(4, 1, 8, 8))
    encode(learn, learn.dls.valid)
    assert set(seen) == {torch.float32} and not has_hooks(model)


def test_hooks_are_removed_before_other_callbacks_end_the_fit(make_learner, watched):
    model, seen = watched
    def predict(learn):
        seen.clear()
        learn.model(torch.rand(4, 1, 8, 8))
    learn = make_learner(model=model)
    learn.fit(1, 1e-2, cbs=[Autocast(), DoAt("after_fit", predict, order=Autocast.order + 1)])
    assert set(seen) == {torch.float32} and not has_hooks(model)
    learn.validate()
    learn.get_preds()
    assert not has_hooks(model)


@pytest.mark.parametrize("what", ["validate", "get_preds"])
@pytest.mark.parametrize("where, order", [("after_pred", 90), ("before_epoch", 90), ("after_fit", Autocast.order - 1)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_float32_after_a_prediction_that_failed(make_learner, watched, what, where, order, error):
    model, seen = watched
    def fail(learn): raise error("failed")
    learn = make_learner(model=model, cbs=[Autocast()])
    with pytest.raises(error), learn.added_cbs(DoAt(where, fail, order=order)): getattr(learn, what)()
    assert not has_hooks(model) and not torch.is_autocast_enabled("cpu")
    learn.validate()
    assert set(seen) >= {torch.bfloat16}


def test_still_bfloat16_after_a_validation_within_the_fit(make_learner, watched):
    model, seen = watched
    learn = make_learner(model=model, cbs=[Autocast()])
    def release(learn): learn.autocast.release()   # what learn.validate() does in the middle of a fit
    learn.fit(2, 1e-2, cbs=DoAt("after_epoch", release))
    assert set(seen) == {torch.bfloat16} and not has_hooks(model)


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_a_compiled_model_trains_in_bfloat16(make_learner, compiled):
    learn = make_learner(model=small_model(), cbs=[Autocast()])
    if compiled == "in place": learn.model.compile(backend="eager", fullgraph=True)
    else: learn.model = torch.compile(learn.model, backend="eager", fullgraph=True)
    own, dtypes = learn.model._compiled_call_impl, []
    learn.fit(1, 1e-2, cbs=DoAt("after_pred", lambda learn: dtypes.append(learn.model(learn.xb[0]).dtype)))
    assert set(dtypes) == {torch.bfloat16} and learn.model._compiled_call_impl is own
    assert learn.model(torch.rand(4, 1, 8, 8)).dtype == torch.float32


def test_a_model_that_is_saved_in_a_fit_is_in_float32(make_learner):
    copies = []
    def save(learn): copies.extend([copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))])
    learn = make_learner(model=small_model(), cbs=[Autocast()])
    learn.fit(1, 1e-2, cbs=DoAt("after_batch", save))
    assert all(m(torch.rand(4, 1, 8, 8)).dtype == torch.float32 and not has_hooks(m) for m in copies)


@pytest.mark.parametrize("warmup, lr", [(float("nan"), [1.]), (1, [0.]), (1, [float("inf")]), ("a", [1.])])
def test_a_schedule_of_no_numbers_is_refused(warmup, lr):
    with pytest.raises(ValueError, match="must be a finite number"): WarmupCosine(lr, warmup)


@pytest.mark.parametrize("where", ["in the model", "in a callback"])
def test_float32_after_an_exception(make_learner, watched, where):
    model, seen = watched
    def fail(*_): raise RuntimeError("failed")
    learn = make_learner(model=model, cbs=[Autocast()])
    if where == "in the model": model.encoder.register_forward_hook(fail)
    else: learn.add_cb(DoAt("after_backward", fail))
    with pytest.raises(RuntimeError, match="failed"): learn.fit(1, 1e-2)
    assert not torch.is_autocast_enabled("cpu") and not has_hooks(model)


def test_close_to_float32(make_learner):
    losses = []
    for cbs in ([], [Autocast()]):
        set_seed(0)
        learn = make_learner(model=small_model(), cbs=cbs)
        learn.fit(2, 1e-3)
        losses.append(float(learn.recorder.losses[-1]))
    assert losses[0] == pytest.approx(losses[1], rel=.05) and losses[0] != losses[1]


def test_float16_is_refused():
    with pytest.raises(ValueError, match="to_fp16"): Autocast(torch.float16)
