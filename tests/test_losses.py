"The loss against references that share no code with it"
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from self_supervised_bt.losses import barlow_twins_loss, cross_correlation, off_diagonal


def textbook(z1, z2, lmb, eps=1e-5):
    "Equations 1-2, entry by entry, in double precision"
    z1, z2 = (np.asarray(z.detach().double()) for z in (z1, z2))
    z1, z2 = ((z - z.mean(0))/np.sqrt(((z - z.mean(0))**2).mean(0) + eps) for z in (z1, z2))
    c = np.einsum("bi,bj->ij", z1, z2)/len(z1)
    return ((1 - np.diag(c))**2).sum() + lmb*(c**2 - np.diag(np.diag(c))**2).sum()


SHAPES = [(2, 1), (2, 3), (8, 4), (16, 16), (33, 7), (32, 200), (256, 64)]


@pytest.mark.parametrize("n,d", SHAPES)
@pytest.mark.parametrize("lmb", [0., 5e-3, 1.])
@pytest.mark.parametrize("scale,offset", [(1, 0), (1e-2, 0), (1e3, 5.), (1, -100.)])
def test_equals_the_textbook(n, d, lmb, scale, offset):
    z1 = torch.randn(n, d)
    z2 = .7*z1 + .5*torch.randn(n, d)
    z1, z2 = z1*scale + offset, z2*scale - offset
    expected = textbook(z1, z2, lmb)
    assert float(barlow_twins_loss(z1.double(), z2.double(), lmb)) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert float(barlow_twins_loss(z1, z2, lmb)) == pytest.approx(expected, rel=1e-5 if offset >= 0 else 1e-4, abs=1e-6)


@pytest.mark.parametrize("n,d", [(16, 8), (64, 300)])
def test_equals_lightly(n, d):
    lightly = pytest.importorskip("lightly.loss", reason="peer of the benchmarks extra")
    z1, z2 = torch.randn(2, n, d)
    assert float(barlow_twins_loss(z1, z2)) == pytest.approx(float(lightly.BarlowTwinsLoss()(z1, z2)), rel=1e-5)


def test_gradient_by_finite_differences():
    z1, z2 = torch.randn(2, 5, 3, dtype=torch.double).requires_grad_()
    assert gradcheck(lambda a, b: barlow_twins_loss(a, b, lmb=.1), (z1, z2))


def test_each_view_may_be_shifted_and_scaled_on_its_own():
    z1, z2 = torch.randn(2, 64, 10)
    shift, scale = torch.randn(10), torch.rand(10)*3 + .5
    assert torch.allclose(barlow_twins_loss(z1*scale + shift, z2), barlow_twins_loss(z1, z2), rtol=1e-3)


def test_views_are_normalised_apart():
    "Jointly normalised views of different means would not agree on the diagonal"
    z = torch.randn(64, 10)
    assert torch.allclose(cross_correlation(z, z + 10).diagonal(), torch.ones(10), atol=1e-3)


@pytest.mark.parametrize("offset", [0., 5., 1e4])
def test_constant_dimensions_give_finite_loss_and_gradient(offset):
    z1, z2 = torch.randn(2, 32, 6)
    z1[:, 0], z2[:, 3] = offset, offset
    z1.requires_grad_(), z2.requires_grad_()
    loss = barlow_twins_loss(z1, z2)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-2, 1., 1e3])
def test_float32_under_autocast(dtype, scale):
    z1, z2 = (torch.randn(2, 64, 32)*scale).to(dtype)
    with torch.autocast("cpu", dtype): loss = barlow_twins_loss(z1, z2)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(textbook(z1, z2, 5e-3), rel=1e-4)


def test_off_diagonal_is_everything_else():
    c = torch.randn(7, 7)
    assert off_diagonal(c).numel() == 42
    assert torch.allclose(off_diagonal(c).square().sum(), c.square().sum() - c.diagonal().square().sum())


@pytest.mark.parametrize("args,error,words", [
    ((torch.rand(4, 3), torch.rand(4, 2)), ValueError, "(4, 3) and (4, 2)"),
    ((torch.rand(4, 3), torch.rand(5, 3)), ValueError, "one shape"),
    ((torch.rand(4), torch.rand(4)), ValueError, "(N,D)"),
    ((torch.rand(1, 3), torch.rand(1, 3)), ValueError, "at least 2"),
    ((torch.ones(4, 3).long(), torch.rand(4, 3)), TypeError, "z1 must be a floating-point tensor, got torch.int64"),
    ((torch.rand(4, 3), [1.]), TypeError, "z2 must be a floating-point tensor, got list"),
    ((torch.rand(4, 3), torch.rand(4, 3), -1.), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), float("nan")), ValueError, "lmb"),
])
def test_bad_input(args, error, words):
    with pytest.raises(error) as e: barlow_twins_loss(*args)
    assert words in str(e.value)
