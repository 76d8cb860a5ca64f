"The loss against references that share no code with it"
import copy
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import gradcheck

from self_supervised_bt import losses
from self_supervised_bt.losses import (
    FORMS, VARIANTS, AllPairs, BarlowTwinsLoss, barlow_twins_loss, cheaper_form, correlation_terms, cross_correlation, normalise, off_diagonal,
    variant_loss)

EPS = 1e-5


def standardised(z, constant=False):
    "Columns to mean 0 and variance 1; with `constant` no gradient runs through mean and variance"
    z = z.double()
    s = z.detach() if constant else z
    return (z - s.mean(0))/((s - s.mean(0))**2).mean(0).add(EPS).sqrt()


def textbook(z1, z2, lmb=5e-3, target=0., constant=False):
    "Equations 1-2 with the whole matrix and its mask, in double precision"
    c = standardised(z1, constant).T @ standardised(z2, constant)/len(z1)
    eye = torch.eye(len(c), dtype=torch.double)
    return (eye*(1 - c)**2).sum() + lmb*((1 - eye)*(c - target)**2).sum()


def by_entry(z1, z2, lmb):
    "Equations 1-2 without a matrix product, entry by entry"
    z1, z2 = (np.asarray(standardised(z.detach())) for z in (z1, z2))
    c = np.einsum("bi,bj->ij", z1, z2)/len(z1)
    return ((1 - np.diag(c))**2).sum() + lmb*(c**2 - np.diag(np.diag(c))**2).sum()


def value_and_gradients(loss, *zs):
    zs = [z.detach().clone().requires_grad_() for z in zs]
    value = loss(*zs)
    return [value.detach().double()] + [g.double() for g in torch.autograd.grad(value, zs)]


def distance(ours, reference):
    return max(float((o - r).norm()/r.norm().clamp(min=1e-30)) for o, r in zip(ours, reference))


def case(seed):
    "Two embeddings of random shape, agreement, scale, offset, dtype; some dimensions constant or nearly so"
    g, r = torch.Generator().manual_seed(seed), random.Random(seed)
    n, d = r.choice([2, 3, 7, 16, 64, 65, 200, 300]), r.choice([1, 2, 5, 16, 64, 65, 200, 300])
    z1 = torch.randn(n, d, generator=g, dtype=torch.double)
    z2 = r.random()*z1 + r.random()*torch.randn(n, d, generator=g, dtype=torch.double)
    scales, offsets = [10**r.uniform(-3, 3) for _ in range(2)], [r.choice([0, 1, -10])*r.random() for _ in range(2)]
    z1, z2 = ((z + o)*s for z, o, s in zip((z1, z2), offsets, scales))
    if r.random() < .4: z1[:, r.randrange(d)] = r.uniform(-5, 5)
    if r.random() < .4: z2[:, 0] = 1 + 1e-3*z2[:, 0]/scales[1]
    if r.random() < .2: z1[:, -1], z2[:, -1] = .5, .5
    dtype = r.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    if dtype == torch.float16: z1, z2 = z1.clamp(-6e4, 6e4), z2.clamp(-6e4, 6e4)
    return z1.to(dtype), z2.to(dtype), 10**r.uniform(-4, 0)


def condition(z):
    "How much the distance of a dimension from 0 exceeds its spread: what float32 loses in taking the mean away"
    z = z.double()
    return float((z.mean(0).abs()/(z.var(0, correction=0) + EPS).sqrt()).max())


@pytest.fixture(params=["gram", "gram in blocks", "direct"])
def form(request, monkeypatch):
    "Either form; the Gram form in one block of columns and in several"
    if request.param == "gram in blocks":
        monkeypatch.setattr(losses, "_blocks", lambda z, width=3: [(j, min(j + width, z.shape[1])) for j in range(0, z.shape[1], width)])
    return request.param.split()[0]


def test_blocks_cover_every_column_once():
    for n, d in ((2, 1), (256, 8192), (512, 1100), (4096, 513)):
        blocks = losses._blocks(torch.empty(n, d))
        assert [c for i, j in blocks for c in range(i, j)] == list(range(d))
    assert len(losses._blocks(torch.empty(512, 1100))) == 3 and len(losses._blocks(torch.empty(512, 1100, device="meta"))) == 1


@pytest.mark.parametrize("seed", range(240))
def test_value_and_gradients_equal_the_textbook(seed, form):
    z1, z2, lmb = case(seed)
    ours = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, lmb, form=form), z1, z2)
    reference = value_and_gradients(lambda a, b: textbook(a, b, lmb), z1, z2)
    assert float(reference[0]) == pytest.approx(by_entry(z1, z2, lmb), rel=1e-9)
    tol = 1e-11 if z1.dtype == torch.float64 else 1e-5*(1 + max(condition(z1), condition(z2))/10)
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=tol, abs=tol*z1.shape[1]/50)   # 1 - c_ii loses digits as c_ii nears 1
    before = value_and_gradients(lambda a, b: textbook(a, b, lmb, constant=True), z1, z2)   # mean and variance cancel most of it, N=2 nearly all
    tol = max(100*tol if z1.dtype == torch.float64 else tol, 2*torch.finfo(z1.dtype).eps)
    least = max(1e-7*tol/1e-5, z1.numel()**.5*torch.finfo(z1.dtype).smallest_normal*torch.finfo(z1.dtype).eps)
    for g, r, b in zip(ours[1:], reference[1:], before[1:]): assert float((g - r).norm()) <= tol*float(max(r.norm(), b.norm())) + least


def test_the_cases_cover_what_they_say():
    cases = [case(s)[:2] for s in range(240)]
    shapes = [z.shape for z, _ in cases]
    assert {z.dtype for z, _ in cases} == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    for holds in (lambda n, d: n < d, lambda n, d: n == d, lambda n, d: n > d): assert sum(holds(*s) for s in shapes) > 20
    constant = [(z.double().var(0, correction=0) == 0).any() for z, _ in cases]
    nearly = [((0 < (v := z.double().var(0, correction=0))) & (v < 1e-5)).any() for pair in cases for z in pair]
    assert sum(constant) > 40 and sum(nearly) > 40


@pytest.mark.parametrize("n,d", [(16, 8), (64, 64), (64, 300), (128, 2048), (512, 1100)])
def test_both_forms_agree(n, d):
    z1 = torch.randn(n, d)
    z2 = z1 + .3*torch.randn(n, d)
    gram, direct = (value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), z1, z2) for form in FORMS)
    assert distance(gram, direct) < 1e-5


@pytest.mark.parametrize("n,d", [(16, 8), (64, 300)])
def test_equals_lightly(n, d):
    lightly = pytest.importorskip("lightly.loss", reason="peer of the benchmarks extra")
    z1, z2 = torch.randn(2, n, d)
    for form in FORMS:
        assert distance(value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), z1, z2),
                        value_and_gradients(lightly.BarlowTwinsLoss(), z1, z2)) < 1e-5


@pytest.mark.parametrize("n,d", [(5, 3), (3, 5), (4, 4), (2, 1)])
def test_gradient_by_finite_differences(n, d, form):
    z1, z2 = torch.randn(2, n, d, dtype=torch.double).requires_grad_()
    assert gradcheck(lambda a, b: barlow_twins_loss(a, b, lmb=.1, form=form), (z1, z2))
    assert gradcheck(lambda a, b: BarlowTwinsLoss(.1, normalisation="none", off_target=-1, form=form)(a, b), (z1, z2))


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_refused_not_wrong(form):
    z1, z2 = torch.randn(2, 6, 4).requires_grad_()
    grad, = torch.autograd.grad(barlow_twins_loss(z1, z2, form=form), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): grad.square().sum().backward()


def test_the_sum_over_a_large_matrix_is_exact():
    "One running float32 sum over 16 million squares would be off by more than this"
    a = normalise(torch.randn(16, 4096))
    c = a.double().T @ a.double()/16
    c.diagonal().zero_()
    for form in FORMS: assert float(correlation_terms(a, a, form).redundancy) == pytest.approx(float(c.square().sum()), rel=1e-6)


def test_the_cheaper_form_is_chosen(monkeypatch):
    used = []
    for form, kind in (("gram", "_BatchGram"), ("direct", "_Direct")):
        kind = getattr(__import__("self_supervised_bt.losses", fromlist=["_"]), kind)
        monkeypatch.setattr(kind, "forward", staticmethod(lambda ctx, *a, f=kind.forward, form=form: used.append(form) or f(ctx, *a)))
    for n, d in ((8, 192), (64, 8)): barlow_twins_loss(torch.randn(n, d), torch.randn(n, d))
    assert used == ["gram", "direct"] == [cheaper_form(8, 192), cheaper_form(64, 8)]


def test_redundancy_is_never_negative():
    "Perfectly independent dimensions: the Gram form subtracts two equal numbers"
    h = torch.tensor([[1.]])
    for _ in range(6): h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    for form in FORMS:
        loss = BarlowTwinsLoss(form=form)
        loss(h[:, 1:], h[:, 1:])
        for terms in (loss.terms, correlation_terms(h[:, 1:], h[:, 1:], form)):
            assert 0 <= float(terms.redundancy) < 1e-4 and float(terms.off_diagonal_rms) >= 0


@pytest.mark.parametrize("n,d", [(40, 100), (100, 40), (8, 1)])
def test_terms_are_what_they_are_called(n, d):
    z1 = torch.randn(n, d)
    z2 = z1 + torch.randn(n, d)
    c = standardised(z1).T @ standardised(z2)/n
    diag, rest = c.diagonal(), c - c.diagonal().diag()
    for form in FORMS:
        loss = BarlowTwinsLoss(.02, form=form)
        value = loss(z1.requires_grad_(), z2)
        assert value.requires_grad and not any(t.requires_grad for t in loss.terms[:4]) and loss.terms.regulariser is None
        assert value.item() == pytest.approx(float(loss.terms.invariance + .02*loss.terms.redundancy), rel=1e-6)
        assert float(loss.terms.invariance) == pytest.approx(float((1 - diag).square().sum()), rel=1e-5)
        assert float(loss.terms.redundancy) == pytest.approx(float(rest.square().sum()), rel=1e-5, abs=1e-5)
        assert float(loss.terms.diagonal_mean) == pytest.approx(float(diag.mean()), rel=1e-4)
        assert float(loss.terms.off_diagonal_rms) == pytest.approx(float(rest.square().sum().div(max(1, d*(d-1))).sqrt()), rel=1e-5, abs=1e-3)


def test_each_view_may_be_shifted_and_scaled_on_its_own():
    z1, z2 = torch.randn(2, 64, 10)
    shift, scale = torch.randn(10), torch.rand(10)*3 + .5
    assert torch.allclose(barlow_twins_loss(z1*scale + shift, z2), barlow_twins_loss(z1, z2), rtol=1e-3)


def test_views_are_normalised_apart():
    "Jointly normalised views of different means would not agree on the diagonal"
    z = torch.randn(64, 10)
    assert torch.allclose(cross_correlation(z, z + 10).diagonal(), torch.ones(10), atol=1e-3)


@pytest.mark.parametrize("offset", [0., 5., 1e4])
def test_constant_dimensions_give_finite_loss_and_gradient(offset, form):
    z1, z2 = torch.randn(2, 32, 6)
    z1[:, 0], z2[:, 3] = offset, offset
    z1.requires_grad_(), z2.requires_grad_()
    loss = barlow_twins_loss(z1, z2, form=form)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all() and z2.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1., 30., 1e3])
def test_float32_under_autocast(dtype, scale, form):
    "The backward pass, too, when it runs inside the user's autocast"
    z1 = torch.randn(64, 96)
    z2 = z1 + .5*torch.randn(64, 96)
    half = [(z*scale).to(dtype) for z in (z1, z2)]
    with torch.autocast("cpu", dtype): ours = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), *half)
    assert all(v.isfinite().all() for v in ours)
    assert distance(ours[:1], value_and_gradients(barlow_twins_loss, z1*scale, z2*scale)[:1]) < 1e-3   # of float32 embeddings
    exact = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), *(z.float() for z in half))
    assert distance(ours[:1], exact[:1]) < 1e-6
    assert distance(ours[1:], [g.to(dtype).double() for g in exact[1:]]) < 1e-6                        # only the result is rounded


def test_compiles_into_one_graph(form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: barlow_twins_loss(a, b, form=form), fullgraph=True, backend="aot_eager")
    z1, z2 = torch.randn(2, 12, 20)
    plain = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), z1, z2)
    assert distance(value_and_gradients(compiled, z1, z2), plain) < 1e-5


def test_gradients_accumulate(form):
    z1, z2 = torch.randn(2, 12, 20)
    once = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), z1, z2)[1]
    z1.requires_grad_()
    for _ in range(3): (barlow_twins_loss(z1, z2, form=form)/3).backward()
    assert distance([z1.grad.double()], [once]) < 1e-6
    loss = barlow_twins_loss(z1, z2, form=form)
    first, second = (torch.autograd.grad(loss, z1, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_off_diagonal_is_everything_else():
    c = torch.randn(7, 7)
    assert off_diagonal(c).numel() == 42
    assert torch.allclose(off_diagonal(c).square().sum(), c.square().sum() - c.diagonal().square().sum())


# Variants


def correlation(z1, z2): return standardised(z1).T @ standardised(z2)/len(z1)
def diagonal_sum(c): return (1 - c.diagonal()).square().sum()
def rest(c): return c[~torch.eye(len(c), dtype=torch.bool)]
def rms_rows(z): return z.double()/(z.double().square().mean(1, keepdim=True) + EPS).sqrt()


REFERENCES = {
    "baseline": lambda a, b: textbook(a, b, .01),
    "invariance only": lambda a, b: diagonal_sum(correlation(a, b)),
    "redundancy only": lambda a, b: .01*rest(correlation(a, b)).square().sum(),
    "feature normalisation": lambda a, b: (lambda c: diagonal_sum(c) + .01*rest(c).square().sum())(rms_rows(a).T @ rms_rows(b)/len(a)),
    "no normalisation": lambda a, b: (lambda c: diagonal_sum(c) + .01*rest(c).square().sum())(a.double().T @ b.double()/len(a)),
    "cross-entropy": lambda a, b: (lambda c: -(c.diagonal()/.1).exp().sum().log() + .01*(rest(c).clamp(min=0)/.1).exp().sum().log()
                                   )(correlation(a, b)),
    "stop-gradient": lambda a, b: textbook(a, b.detach(), .01) + 0*b.sum(),
    "hsic": lambda a, b: textbook(a, b, .01, target=-1.),
}


@pytest.mark.parametrize("n,d", [(24, 60), (60, 24)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_their_formulas(name, n, d):
    z1 = torch.randn(n, d)
    z2 = z1 + .5*torch.randn(n, d) + .3
    lmb = {} if name == "invariance only" else {"lmb": .01}
    loss = variant_loss(name, **lmb)
    ours = value_and_gradients(lambda a, b: loss(a, b) + 0*b.sum(), z1, z2)
    assert distance(ours, value_and_gradients(REFERENCES[name], z1, z2)) < 2e-5


@pytest.mark.parametrize("target", [-1., .3])
@pytest.mark.parametrize("form", FORMS)
def test_off_target_in_both_forms(form, target):
    z1, z2 = torch.randn(2, 30, 50)
    ours = value_and_gradients(BarlowTwinsLoss(.01, off_target=target, form=form), z1, z2)
    assert distance(ours, value_and_gradients(lambda a, b: textbook(a, b, .01, target), z1, z2)) < 1e-5


def test_scale_multiplies_everything():
    z1, z2 = torch.randn(2, 30, 50)
    assert float(BarlowTwinsLoss(scale=.024)(z1, z2)) == pytest.approx(.024*float(barlow_twins_loss(z1, z2)), rel=1e-6)


def test_stop_gradient_reaches_view_1_alone():
    z1, z2 = (torch.randn(8, 4).requires_grad_() for _ in range(2))
    variant_loss("stop-gradient")(z1, z2).backward()
    assert z1.grad.abs().sum() > 0 and z2.grad is None


def test_the_queue_joins_the_batch_as_constants():
    batches = [torch.randn(2, 8, 5) for _ in range(4)]
    loss = BarlowTwinsLoss(.01, queue=20)
    for z in batches: got = value_and_gradients(loss, *z)
    past = torch.cat([batches[2], batches[1], batches[0][:, :4]], 1)   # newest first, 20 rows
    expected = value_and_gradients(lambda a, b: textbook(torch.cat([a, past[0]]), torch.cat([b, past[1]]), .01), *batches[3])
    assert distance(got, expected) < 1e-5
    with torch.no_grad(): assert float(loss(*batches[0])) == pytest.approx(float(textbook(*batches[0], .01)), rel=1e-5)
    assert torch.equal(loss.queue.past[0], torch.cat([batches[3][0], batches[2][0], batches[1][0][:4]]))
    assert math.isfinite(value_and_gradients(loss, *torch.randn(2, 8, 6))[0])   # another width: the past is dropped
    loss.reset()
    assert loss.queue.past is None and loss.terms is None


def test_all_pairs_is_the_mean_over_pairs():
    zs = torch.randn(4, 20, 12)
    ours = AllPairs(BarlowTwinsLoss(.03))
    reference = value_and_gradients(lambda *z: sum(textbook(a, b, .03) for a, b in itertools.combinations(z, 2))/6, *zs)
    assert distance(value_and_gradients(ours, *zs), reference) < 1e-5
    assert float(ours.terms.invariance + .03*ours.terms.redundancy) == pytest.approx(float(reference[0]), rel=1e-5)
    assert 0 < float(ours.terms.off_diagonal_rms) < 1 and ours.term_names == BarlowTwinsLoss.term_names
    ours.lmb = .5
    assert ours.objective.lmb == .5
    ours.reset()
    assert ours.terms is None


def test_all_pairs_of_a_plain_function_and_bad_input():
    zs = torch.randn(3, 4, 5)
    assert float(AllPairs(lambda a, b: (a - b).square().sum())(*zs)) == pytest.approx(
        sum(float((zs[i] - zs[j]).square().sum()) for i, j in ((0, 1), (0, 2), (1, 2)))/3, rel=1e-5)
    with pytest.raises(ValueError, match="at least two"): AllPairs(BarlowTwinsLoss())(zs[0])
    with pytest.raises(ValueError, match="queue"): AllPairs(BarlowTwinsLoss(queue=4))
    zs[2, 1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="views 1 and 3: .* z2 has 1 nan"): AllPairs(BarlowTwinsLoss())(*zs)


def test_a_used_loss_can_be_copied_and_saved():
    "A Learner pickles its callbacks, and what they hold, when it is exported"
    loss = BarlowTwinsLoss(queue=8)
    z = [torch.randn(8, 4).requires_grad_() for _ in range(2)]
    loss(*(v*2 for v in z))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert float(other.terms.invariance) == float(loss.terms.invariance)


# Bad input


@pytest.mark.parametrize("args,error,words", [
    ((torch.rand(4, 3), torch.rand(4, 2)), ValueError, "(4, 3) and (4, 2)"),
    ((torch.rand(4, 3), torch.rand(5, 3)), ValueError, "one shape"),
    ((torch.rand(4), torch.rand(4)), ValueError, "(N,D)"),
    ((torch.rand(1, 3), torch.rand(1, 3)), ValueError, "at least 2"),
    ((torch.ones(4, 3).long(), torch.rand(4, 3)), TypeError, "z1 must be a floating-point tensor, got torch.int64"),
    ((torch.rand(4, 3), [1.]), TypeError, "z2 must be a floating-point tensor, got list"),
    ((torch.rand(4, 3), torch.rand(4, 3), -1.), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), float("nan")), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), float("inf")), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), .1, 0.), ValueError, "eps must be > 0"),
    ((torch.rand(4, 3), torch.rand(4, 3), .1, 1e-5, "gramm"), ValueError, "form must be one of None, 'gram', 'direct', got 'gramm'"),
])
def test_bad_input(args, error, words):
    with pytest.raises(error) as e: barlow_twins_loss(*args)
    assert words in str(e.value)


@pytest.mark.parametrize("options,words", [
    (dict(normalisation="layer"), "normalisation must be one of 'batch', 'feature', 'none', got 'layer'"),
    (dict(temperature=0), "temperature must be > 0"),
    (dict(temperature=.1, form="gram"), "every entry"),
    (dict(temperature=.1, off_target=-1), "no off_target"),
    (dict(queue=-1), "queue"),
    (dict(queue=1.5), "queue"),
    (dict(scale=-1), "scale must be"),
])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words): BarlowTwinsLoss(**options)


def test_unknown_names():
    with pytest.raises(ValueError, match="variant must be one of 'baseline'.*got 'vicreg'"): variant_loss("vicreg")
    with pytest.raises(ValueError, match="along must be one of"): normalise(torch.rand(3, 2), along="rows")
    with pytest.raises(ValueError, match="form must be one of"): correlation_terms(torch.rand(3, 2), torch.rand(3, 2), "fast")


@pytest.mark.parametrize("form", FORMS)
def test_nan_names_the_view_and_counts(form):
    z1, z2 = torch.randn(2, 8, 20)
    z2[1, 3], z2[1, 4], z2[5, 0] = float("nan"), float("nan"), float("inf")
    with pytest.raises(FloatingPointError) as e: barlow_twins_loss(z1, z2, form=form)
    assert "z1 is finite" in str(e.value) and "z2 has 2 nan and 1 inf, in 2 of 8 rows" in str(e.value)
    assert barlow_twins_loss(z1, z2, form=form, check_finite=False).isnan()
    with pytest.raises(FloatingPointError, match="too large to square"):
        BarlowTwinsLoss(normalisation="none", form=form)(torch.full((8, 20), 1e20), torch.full((8, 20), 1e20))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="older PyTorch asks the driver even for fake CUDA tensors")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("options", [*VARIANTS.values(), {"queue": 4}, {"form": "gram"}, {"form": "direct"}], ids=str)
def test_nothing_looks_at_a_number_on_an_accelerator(options):
    "A look at a number waits for the device. A fake tensor has shapes and no numbers: any look raises"
    with FakeTensorMode():
        on_gpu, on_cpu = ([torch.randn(8, 20, device=d, requires_grad=d == "cpu") for _ in range(2)] for d in ("cuda", "cpu"))
        assert BarlowTwinsLoss(**options)(*on_gpu).device.type == "cuda"
        BarlowTwinsLoss(check_finite=False, **options)(*on_cpu).backward()   # the backward engine wants a real device
        assert on_cpu[0].grad.shape == on_cpu[0].shape
        with pytest.raises(DataDependentOutputException): BarlowTwinsLoss(check_finite=True)(*on_gpu)
