"Callbacks that tests share: they act or raise at one event of a fit, or record what passes"
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import CancelFitException, CancelTrainException

from self_supervised_bt.barlow_twins import BarlowTwins


class DoAt(Callback):
    "Call `do(learn)` at an event: every time, or only at the training steps `step` (one or several)"
    def __init__(self, event, do, step=None, order=0):
        self.do, self.order = do, order
        self.steps = (step,) if isinstance(step, int) else step
        setattr(self, event, self.act)

    def act(self):
        if self.steps is None or (self.training and self.train_iter in self.steps): self.do(self.learn)


class DoToImages(DoAt):
    "Call `do(learn)` when a batch holds images, just before the views are made"
    def __init__(self, do, step=None): super().__init__("before_batch", do, step, BarlowTwins.order - .5)


class DoToViews(DoAt):
    "Call `do(learn)` when a batch holds views, just after they are made"
    def __init__(self, do, step=None): super().__init__("before_batch", do, step, BarlowTwins.order + .5)


class RaiseAt(DoAt):
    "Raise an error (with a message, or fastai fails) at an event: every time, or only at the training steps `step`"
    def __init__(self, event, error, step=None, order=0):
        super().__init__(event, self.fail, step, order)
        self.error = error

    def fail(self, learn): raise self.error


class Killed(Exception): "Raised by `KillAfter`"


class KillAfter(RaiseAt):
    "End the fit with `Killed` after `step` training steps, when all other callbacks have seen the last one"
    def __init__(self, step): super().__init__("after_batch", Killed(f"after {step} steps"), step, order=2000)


class RecordBatches(Callback):
    "Keep what the model was given (`inputs`) and what it gave (`preds`), with the targets, of every batch"
    order = MixedPrecision.order + 50
    def __init__(self): self.inputs, self.targets, self.preds = [], [], []
    def after_pred(self): self.inputs.append(self.xb[0].detach().clone())
    def after_loss(self):
        self.targets.append(self.yb)
        self.preds.append(self.pred.detach().clone())


def record_calls(module):
    "A list to which every later call of `module` adds its first input and its output"
    calls = []
    def record(module, inputs, output): calls.append((inputs[0].detach().clone(), output.detach().clone()))
    module.register_forward_hook(record)
    return calls


class EndEarly(Callback):
    "Ends every fit after its first training batch and the validation that follows"
    order = 2000
    def after_batch(self):
        if self.training: raise CancelTrainException
    def after_epoch(self): raise CancelFitException
