"Convolutions of small maps as matrix products: the same numbers, on the CPU, in fits alone"
import copy
import pickle
from itertools import product

import pytest
import torch
from callbacks import DoAt
from conftest import small_model
from fastai.torch_core import set_seed
from torch import nn

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwinsModel
from self_supervised_bt.data import tensor_dls
from self_supervised_bt.layers import create_mlp_module
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.training import Autocast, MatmulConvs, by_matmul, conv_by_matmul, conv_forward, is_replaceable


def gradients(out, *inputs):
    g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, inputs, g)


@pytest.mark.parametrize("kernel, stride, padding", [
    (3, 1, 1), (3, 2, 1), (3, 1, 0), (2, 2, 0), (5, 1, 2), (5, 2, 4), (1, 2, 0),
    ((3, 1), 1, (1, 0)), ((1, 3), (1, 2), (0, 1))])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_pytorchs_convolution(kernel, stride, padding, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding, bias=bias).double()
    for h, w in product(range(1, 6), repeat=2):
        x = torch.randn(2, 3, h, w, dtype=torch.float64, requires_grad=True)
        try: expected = conv(x)
        except RuntimeError: continue   # the kernel is larger than the padded image
        out = conv_by_matmul(conv, x, conv.weight)
        if bias: out = out + conv.bias[:, None, None]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(conv_forward(conv, x, conv.weight, conv.bias), expected, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(gradients(out, x, conv.weight), gradients(expected, x, conv.weight)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_only_where_it_is_faster():
    def taken(size, *conv): return by_matmul(nn.Conv2d(3, 4, *conv), torch.zeros(1, 3, size, size))
    assert taken(2, 3, 1, 1) and taken(1, 3, 1, 1) and taken(4, 3, 2, 1)
    assert not taken(3, 3, 1, 1) and not taken(5, 3, 2, 1)
    assert not taken(2, 1), "a kernel of one pixel is a product already"
    assert not taken(2, 5), "PyTorch's error says that the kernel is larger than the image"
    assert not by_matmul(nn.Conv2d(3, 4, 3), torch.zeros(3, 3, 3)), "without a batch"
    assert not by_matmul(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 3, 3, device="meta"))


def test_what_is_no_plain_convolution_stays():
    class Own(nn.Conv2d): pass
    assert is_replaceable(nn.Conv2d(4, 4, 3, padding=1))
    others = [Own(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Linear(4, 4),
              nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
              nn.Conv2d(4, 4, 3, padding=3), nn.ConvTranspose2d(4, 4, 3)]
    assert not any(map(is_replaceable, others))


def network():
    "An encoder whose last maps have 2 x 2 pixels, of images of 8 pixels"
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
              nn.Conv2d(8, 8, 3, 1, 1, bias=False)]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return BarlowTwinsModel(encoder, create_mlp_module(8, 16, 16))


def replaced(model): return [m for m in model.modules() if "_conv_forward" in vars(m)]


def fitted(make_learner, model, *cbs):
    "A Learner after two epochs"
    set_seed(0)
    learn = make_learner(model=model, cbs=cbs)
    learn.fit(2, 1e-3)
    return learn


def test_a_fit_learns_the_same(make_learner):
    learners = [fitted(make_learner, network().double(), *cbs) for cbs in ([], [MatmulConvs()])]
    weights = [nn.utils.parameters_to_vector(learn.model.encoder.parameters()).detach() for learn in learners]
    assert not torch.equal(*weights), "PyTorch's convolution was used"
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_in_bfloat16(make_learner):
    learners = [fitted(make_learner, network(), Autocast(), *cbs) for cbs in ([], [MatmulConvs()])]
    plain, ours = [torch.tensor(learn.recorder.losses) for learn in learners]
    assert not torch.equal(plain, ours)
    torch.testing.assert_close(ours, plain, rtol=.02, atol=0)


def test_in_a_fit_alone(make_learner):
    seen = []
    count = DoAt("after_loss", lambda learn: seen.append(len(replaced(learn.model))))
    learn = make_learner(model=network(), cbs=[MatmulConvs(), count])
    learn.fit(1, 1e-3)
    assert set(seen) == {3} and not replaced(learn.model)
    learn.lr_find(num_it=10, show_plot=False)
    assert not replaced(learn.model)


def test_not_after_an_exception(make_learner):
    def fail(learn): raise RuntimeError("failed")
    learn = make_learner(model=network(), cbs=[MatmulConvs(), DoAt("after_backward", fail)])
    with pytest.raises(RuntimeError, match="failed"): learn.fit(1, 1e-3)
    assert not replaced(learn.model)


def test_copies_in_a_fit_are_pytorchs_own(make_learner):
    copies = []
    def save(learn): copies.extend([copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))])
    learn = make_learner(model=network(), cbs=[MatmulConvs()])
    learn.fit(1, 1e-3, cbs=DoAt("after_batch", save))
    x = torch.rand(4, 1, 8, 8)
    for model in copies:
        assert all(m._conv_forward.func is nn.Conv2d._conv_forward for m in replaced(model))
        before = model.eval()(x)
        with torch.no_grad(): model.encoder[0].weight.mul_(2)
        assert not torch.equal(model(x), before), "the copy computes with the weights of another model"


def test_a_compiled_model_keeps_its_convolutions(make_learner):
    model = network()
    model.compile(backend="eager", fullgraph=True)
    make_learner(model=model, cbs=[MatmulConvs()]).fit(1, 1e-3)
    assert not replaced(model)


def test_recipes_have_it():
    x = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
    augs = get_barlow_twins_aug_pipelines(8, stats=None)
    learn = bt_learner(tensor_dls(x, bs=16, valid_pct=0), small_model().encoder, aug_pipelines=augs)
    assert any(isinstance(cb, MatmulConvs) for cb in learn.cbs)
