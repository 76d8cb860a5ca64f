"Callbacks that tests share: they do something at a moment of a fit, raise there, or record what passes"
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision


class DoAt(Callback):
    "Call `do(learn)` at an event: every time, or only at the training steps `step` (one or several)"
    def __init__(self, event, do, step=None, order=0):
        self.do, self.order = do, order
        self.steps = (step,) if isinstance(step, int) else step
        setattr(self, event, self.act)

    def act(self):
        if self.steps is None or (self.training and self.train_iter in self.steps): self.do(self.learn)


class RaiseAt(DoAt):
    "Raise an error at an event: every time, or only at the training steps `step`"
    def __init__(self, event, error, step=None, order=0):
        super().__init__(event, self.fail, step, order)
        self.error = error

    def fail(self, learn): raise self.error


class RecordBatches(Callback):
    "Keep what the model was given (`inputs`) and what it gave (`preds`), with the targets, of every batch"
    order = MixedPrecision.order + 50
    def __init__(self): self.inputs, self.targets, self.preds = [], [], []
    def after_pred(self): self.inputs.append(self.xb[0].detach().clone())
    def after_loss(self):
        self.targets.append(self.yb)
        self.preds.append(self.pred.detach().clone())
