"Losses, predictor and more than two views"
from copy import deepcopy

import pytest
import torch
from callbacks import DoAt, RecordBatches, record_calls
from conftest import same, small_model
from fastai.learner import Learner
from test_multiview import AUGS

from self_supervised_bt.augmentations import (
    get_barlow_twins_aug_pipelines,
    get_multi_aug_pipelines,
)
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.layers import PoolingType, create_encoder
from self_supervised_bt.losses import BarlowTwinsLoss, barlow_twins_loss, variant_loss
from self_supervised_bt.mixed import MixedBarlowTwins


def test_any_loss_of_two_embeddings(make_dls):
    augs, calls = get_barlow_twins_aug_pipelines(**AUGS), []
    def mean_distance(z1, z2):
        calls.append((z1.shape, z2.shape))
        return (z1 - z2).square().mean()
    learn = Learner(make_dls(), small_model(), cbs=BarlowTwins(augs, loss=mean_distance))
    learn.fit(1)
    assert calls[0] == ((16, 16), (16, 16)) and learn.barlow_twins.lmb is None
    hsic = Learner(make_dls(), small_model(), cbs=BarlowTwins(augs, loss=variant_loss("hsic", lmb=.02)))
    hsic.fit(1)
    assert hsic.barlow_twins.lmb == .02 and hsic.recorder.losses[0] > 1.5


def test_invalid_losses_raise():
    augs = get_barlow_twins_aug_pipelines(**AUGS)
    with pytest.raises(TypeError, match="loss must be a function"): BarlowTwins(augs, loss="hsic")
    with pytest.raises(ValueError, match="lmb=0.1 would have no effect"):
        BarlowTwins(augs, lmb=.1, loss=BarlowTwinsLoss())
    with pytest.raises(ValueError, match="terms=True needs a loss"):
        BarlowTwins(augs, loss=lambda a, b: (a - b).mean(), terms=True)


def test_lmb_can_be_set_during_training(make_learner):
    learn = make_learner(lmb=.02)
    assert learn.barlow_twins.lmb == .02
    learn.barlow_twins.lmb = .5
    assert learn.barlow_twins.objective.lmb == .5
    with pytest.raises(ValueError, match="lmb"): learn.barlow_twins.lmb = -1


def test_predictor_is_applied_to_view_1_only(make_dls):
    model = create_barlow_twins_model(small_model().encoder, 32, 16, predictor=True)
    seen = record_calls(model.predictor)
    spy = RecordBatches()
    bt = BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), loss=variant_loss("stop-gradient"))
    learn = Learner(make_dls(), model, cbs=[bt, spy])
    before = model.predictor[0].weight.clone()
    learn.fit(1)
    assert [len(x) for x, _ in seen] == [16, 16, 16, 16, 4] and not torch.equal(before, model.predictor[0].weight)
    x = spy.inputs[-1]
    with torch.no_grad():
        model.eval()
        z = model.projector(model.encoder(x))
        assert torch.equal(model(x), z)
        assert torch.equal(model(x, True), torch.cat([model.predictor(z[:len(z)//2]), z[len(z)//2:]]))
    assert learn.get_preds()[0].shape == (20, 16)


@pytest.mark.parametrize("predictor", [False, True])
def test_separate_bn_passes_each_view_by_itself(make_dls, predictor):
    "As the authors' code does: the embeddings, and a running mean that has seen one view after the other"
    model = create_barlow_twins_model(small_model().encoder, 32, 16, predictor=predictor)
    by_hand = deepcopy(model).train()
    spy = RecordBatches()
    bt = BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), separate_bn=True)
    learn = Learner(make_dls(n=16), model, lr=0., wd=0., cbs=[bt, spy])
    keep_z = DoAt("after_pred", lambda learn: seen.append(learn.pred.detach().clone()))
    seen = []
    learn.fit(1, cbs=keep_z)
    with torch.no_grad():
        z1, z2 = (by_hand.projector(by_hand.encoder(v)) for v in spy.inputs[0].chunk(2))
        if predictor: z1 = by_hand.predictor(z1)
    assert torch.equal(seen[0], torch.cat([z1, z2]))
    assert same(dict(model.named_buffers()), dict(by_hand.named_buffers()))
    with torch.no_grad(): assert not torch.allclose(seen[0], by_hand(spy.inputs[0], predictor), atol=1e-3)


def test_separate_bn_needs_a_model_that_can(make_dls):
    class OneBatch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.projector = small_model().encoder, torch.nn.Linear(8, 16)
        def forward(self, x): return self.projector(self.encoder(x))
    learn = Learner(make_dls(), OneBatch(), cbs=BarlowTwins(get_barlow_twins_aug_pipelines(**AUGS), separate_bn=True))
    with pytest.raises(ValueError, match="separate_bn=True needs a model"): learn.fit(1)
    learn.model = torch.nn.DataParallel(small_model())
    with pytest.raises(ValueError, match="DataParallel divides"): learn.fit(1)


# More than two views

def test_three_views_make_three_pairs(make_learner):
    losses, spy = [], RecordBatches()
    keep_loss = DoAt("after_loss", lambda learn: losses.append(float(learn.loss.detach())))
    learn = make_learner(cbs=[spy, keep_loss], lmb=.02, views=3)
    learn.barlow_twins.terms = True
    learn.fit(1)
    assert [len(x) for x in spy.inputs] == [48, 48, 48, 48, 12] and learn.recorder.loss.count == 20
    learn.barlow_twins.columns = ()
    learn.barlow_twins.swap_loss()
    z = torch.randn(48, 16)
    v1, v2, v3 = z.chunk(3)
    expected = sum(float(barlow_twins_loss(a, b, lmb=.02)) for a, b in ((v1, v2), (v1, v3), (v2, v3)))/3
    assert float(learn.barlow_twins.loss(z)) == pytest.approx(expected, rel=1e-5)
    assert learn.barlow_twins.lmb == .02 and len(losses) == 5


def test_predictions_with_three_views_have_one_row_per_image(make_learner):
    learn = make_learner(views=3, metrics=lambda pred, y: pred.new_tensor(float(len(pred) == len(y))))
    learn.fit(1)
    assert learn.recorder.values[-1][2] == 1 and learn.get_preds()[0].shape == (20, 16)
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert learn.recorder.values[-1][1] == 1


def test_options_for_two_views_raise_with_three(make_dls):
    three = get_multi_aug_pipelines(3, **AUGS)
    with pytest.raises(ValueError, match="queue"): BarlowTwins(three, loss=variant_loss(queue=8))
    with pytest.raises(ValueError, match="two views, got 3"): MixedBarlowTwins(three)
    model = create_barlow_twins_model(small_model().encoder, 16, 8, predictor=True)
    learn = Learner(make_dls(labels=False), model, cbs=BarlowTwins(three))
    with pytest.raises(ValueError, match="predictor"): learn.fit(1)


def test_size_of_the_papers_model():
    with torch.device("meta"):
        encoder = create_encoder("timm/resnet50", pretrained=False, pool_type=PoolingType.Avg)
        model = create_barlow_twins_model(encoder, hidden_size=8192, projection_size=8192, bias=False)
    assert sum(p.numel() for p in model.parameters()) == 174_535_744


@pytest.mark.parametrize("callback", [BarlowTwins, MixedBarlowTwins])
def test_pipelines_are_printed_only_with_print_augs(callback, capsys):
    augs = get_barlow_twins_aug_pipelines(8, "digits")
    callback(augs)
    assert capsys.readouterr().out == ""
    callback(augs, print_augs=True)
    assert capsys.readouterr().out == f"{augs[0]}\n{augs[1]}\n"
