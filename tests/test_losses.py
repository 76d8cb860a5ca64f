"The loss compared with references that share no code with it"
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
    FORMS,
    VARIANTS,
    AllPairs,
    BarlowTwinsLoss,
    VariantLoss,
    barlow_twins_loss,
    cheaper_form,
    correlation_terms,
    cross_correlation,
    normalise,
    off_diagonal,
    variant_loss,
)

EPS = 1e-5


def standardised(z, constant=False):
    "Columns to mean 0 and variance 1; with `constant` mean and variance have no gradient"
    z = z.double()
    s = z.detach() if constant else z
    return (z - s.mean(0))/((s - s.mean(0))**2).mean(0).add(EPS).sqrt()


def textbook(z1, z2, lmb=5e-3, target=0., constant=False):
    "Equations 1-2 with the complete matrix and its mask, in double precision"
    c = standardised(z1, constant).T @ standardised(z2, constant)/len(z1)
    eye = torch.eye(len(c), dtype=torch.double)
    return (eye*(1 - c)**2).sum() + lmb*((1 - eye)*(c - target)**2).sum()


def by_entry(z1, z2, lmb):
    "Equations 1-2 without a matrix product, entry by entry"
    z1, z2 = (np.asarray(standardised(z.detach())) for z in (z1, z2))
    c = np.einsum("bi,bj->ij", z1, z2)/len(z1)
    diag = np.diag(c)
    return ((1 - diag)**2).sum() + lmb*(c**2 - np.diag(diag)**2).sum()


def value_and_gradients(loss, *zs):
    zs = [z.detach().clone().requires_grad_() for z in zs]
    value = loss(*zs)
    return [value.detach().double()] + [g.double() for g in torch.autograd.grad(value, zs)]


def distance(ours, reference):
    return max(float((o - r).norm()/r.norm().clamp(min=1e-30)) for o, r in zip(ours, reference))


def case(seed):
    "Two embeddings of random shape, agreement, scale, offset, dtype; some dimensions constant or nearly so"
    g = torch.Generator().manual_seed(seed)
    r = random.Random(seed)
    n = r.choice([2, 3, 7, 16, 64, 65, 200, 300])
    d = r.choice([1, 2, 5, 16, 64, 65, 200, 300])
    z1 = torch.randn(n, d, generator=g, dtype=torch.double)
    z2 = r.random()*z1 + r.random()*torch.randn(n, d, generator=g, dtype=torch.double)
    scales = [10**r.uniform(-3, 3) for _ in range(2)]
    offsets = [r.choice([0, 1, -10])*r.random() for _ in range(2)]
    z1, z2 = ((z + o)*s for z, o, s in zip((z1, z2), offsets, scales))
    if r.random() < .4: z1[:, r.randrange(d)] = r.uniform(-5, 5)
    if r.random() < .4: z2[:, 0] = 1 + 1e-3*z2[:, 0]/scales[1]
    if r.random() < .2: z1[:, -1], z2[:, -1] = .5, .5
    dtype = r.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    if dtype == torch.float16: z1, z2 = (z.clamp(-6e4, 6e4) for z in (z1, z2))
    return z1.to(dtype), z2.to(dtype), 10**r.uniform(-4, 0)


def condition(z):
    "Largest ratio of mean to standard deviation: the precision that float32 loses in subtracting the mean"
    z = z.double()
    return float((z.mean(0).abs()/(z.var(0, correction=0) + EPS).sqrt()).max())


def narrow_blocks(z, width=3):
    d = z.shape[1]
    return [(j, min(j + width, d)) for j in range(0, d, width)]


@pytest.fixture(params=["gram", "gram in blocks", "direct"])
def form(request, monkeypatch):
    "Either form; the Gram form in one block of columns and in several"
    if request.param == "gram in blocks": monkeypatch.setattr(losses, "_blocks", narrow_blocks)
    return request.param.split()[0]


def test_blocks_cover_every_column_once():
    for n, d in ((2, 1), (256, 8192), (512, 1100), (4096, 513)):
        blocks = losses._blocks(torch.empty(n, d))
        assert [c for i, j in blocks for c in range(i, j)] == list(range(d))
    assert len(losses._blocks(torch.empty(512, 1100))) == 3
    assert len(losses._blocks(torch.empty(512, 1100, device="meta"))) == 1


@pytest.mark.parametrize("seed", range(240))
def test_value_and_gradients_equal_the_textbook(seed, form):
    z1, z2, lmb = case(seed)
    value, *grads = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, lmb, form=form), z1, z2)
    expected, *reference = value_and_gradients(lambda a, b: textbook(a, b, lmb), z1, z2)
    assert float(expected) == pytest.approx(by_entry(z1, z2, lmb), rel=1e-9)
    double = z1.dtype == torch.float64
    tol = 1e-11 if double else 1e-5*(1 + max(condition(z1), condition(z2))/10)
    # 1 - c_ii loses digits as c_ii nears 1
    assert float(value) == pytest.approx(float(expected), rel=tol, abs=tol*z1.shape[1]/50)
    # the gradient through mean and variance cancels most of the rest, at N=2 nearly all
    _, *uncancelled = value_and_gradients(lambda a, b: textbook(a, b, lmb, constant=True), z1, z2)
    numbers = torch.finfo(z1.dtype)
    tol = max(100*tol if double else tol, 2*numbers.eps)
    least = max(1e-7*tol/1e-5, z1.numel()**.5*numbers.smallest_normal*numbers.eps)
    for g, r, u in zip(grads, reference, uncancelled):
        assert float((g - r).norm()) <= tol*float(max(r.norm(), u.norm())) + least


def test_the_cases_cover_all_kinds_of_input():
    cases = [case(s)[:2] for s in range(240)]
    shapes = [z1.shape for z1, _ in cases]
    assert {z1.dtype for z1, _ in cases} == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    for holds in (lambda n, d: n < d, lambda n, d: n == d, lambda n, d: n > d):
        assert sum(holds(*s) for s in shapes) > 20
    variances = [[z.double().var(0, correction=0) for z in pair] for pair in cases]
    assert sum(bool((v1 == 0).any()) for v1, _ in variances) > 40
    assert sum(bool(((0 < v) & (v < 1e-5)).any()) for pair in variances for v in pair) > 40


@pytest.mark.parametrize("n,d", [(16, 8), (64, 64), (64, 300), (128, 2048), (512, 1100)])
def test_both_forms_agree(n, d):
    z1 = torch.randn(n, d)
    z2 = z1 + .3*torch.randn(n, d)
    gram = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form="gram"), z1, z2)
    direct = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form="direct"), z1, z2)
    assert distance(gram, direct) < 1e-5


@pytest.mark.parametrize("n,d", [(16, 8), (64, 300)])
def test_equals_lightly(n, d):
    lightly = pytest.importorskip("lightly.loss", reason="peer of the benchmarks extra")
    z1, z2 = torch.randn(2, n, d)
    reference = value_and_gradients(lightly.BarlowTwinsLoss(), z1, z2)
    for form in FORMS:
        ours = value_and_gradients(lambda a, b: barlow_twins_loss(a, b, form=form), z1, z2)
        assert distance(ours, reference) < 1e-5


@pytest.mark.parametrize("n,d", [(5, 3), (3, 5), (4, 4), (2, 1)])
def test_gradient_by_finite_differences(n, d, form):
    z1, z2 = torch.randn(2, n, d, dtype=torch.double).requires_grad_()
    assert gradcheck(lambda a, b: barlow_twins_loss(a, b, lmb=.1, form=form), (z1, z2))
    assert gradcheck(variant_loss("hsic", lmb=.1, normalisation="none", form=form), (z1, z2))


def second_derivative(loss, z1, z2):
    grad, = torch.autograd.grad(loss(z1, z2), z1, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), z1)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_second_derivatives_are_right_or_refused(name):
    "In the direct form those of autograd in float64; the Gram form raises"
    z1, z2 = torch.randn(2, 12, 5, dtype=torch.double).requires_grad_()
    lmb = {} if name == "invariance only" else {"lmb": .01}
    ours = second_derivative(variant_loss(name, form="direct", **lmb), z1, z2)
    assert torch.allclose(ours, second_derivative(REFERENCES[name], z1, z2), rtol=1e-6, atol=1e-12)
    if name == "cross-entropy": return   # has no Gram form
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second_derivative(variant_loss(name, form="gram", **lmb), z1, z2)


def test_the_sum_over_a_large_matrix_is_exact():
    "A single float32 sum over 16 million squares has a larger error than this"
    a = normalise(torch.randn(16, 4096))
    c = a.double().T @ a.double()/16
    c.diagonal().zero_()
    for form in FORMS:
        assert float(correlation_terms(a, a, form).redundancy) == pytest.approx(float(c.square().sum()), rel=1e-6)


def test_the_cheaper_form_is_chosen(monkeypatch):
    used = []
    def spy(form, function):
        forward = function.forward
        monkeypatch.setattr(function, "forward", staticmethod(lambda *args: used.append(form) or forward(*args)))
    spy("gram", losses._BatchGram)
    spy("direct", losses._Direct)
    for n, d in ((8, 192), (64, 8)): barlow_twins_loss(torch.randn(n, d), torch.randn(n, d))
    assert used == ["gram", "direct"] == [cheaper_form(8, 192), cheaper_form(64, 8)]


def test_redundancy_is_never_negative():
    "Exactly independent dimensions: the Gram form subtracts two equal numbers"
    h = torch.tensor([[1.]])
    for _ in range(6): h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    for form in FORMS:
        loss = BarlowTwinsLoss(form=form)
        loss(h[:, 1:], h[:, 1:])
        for terms in (loss.terms, correlation_terms(h[:, 1:], h[:, 1:], form)):
            assert 0 <= float(terms.redundancy) < 1e-4 and float(terms.off_diagonal_rms) >= 0


@pytest.mark.parametrize("n,d", [(40, 100), (100, 40), (8, 1)])
def test_terms_equal_their_definitions(n, d):
    z1 = torch.randn(n, d)
    z2 = z1 + torch.randn(n, d)
    c = standardised(z1).T @ standardised(z2)/n
    diag = c.diagonal()
    squares = c.square().sum() - diag.square().sum()
    for form in FORMS:
        loss = BarlowTwinsLoss(.02, form=form)
        value = loss(z1.requires_grad_(), z2)
        terms = loss.terms
        assert value.requires_grad and not any(t.requires_grad for t in terms[:4]) and terms.regulariser is None
        assert value.item() == pytest.approx(float(terms.invariance + .02*terms.redundancy), rel=1e-6)
        assert float(terms.invariance) == pytest.approx(float((1 - diag).square().sum()), rel=1e-5)
        assert float(terms.redundancy) == pytest.approx(float(squares), rel=1e-5, abs=1e-5)
        assert float(terms.diagonal_mean) == pytest.approx(float(diag.mean()), rel=1e-4)
        rms = (squares/max(1, d*(d-1))).sqrt()
        assert float(terms.off_diagonal_rms) == pytest.approx(float(rms), rel=1e-5, abs=1e-3)


def test_loss_is_invariant_to_shift_and_scale_per_view():
    z1, z2 = torch.randn(2, 64, 10)
    shift, scale = torch.randn(10), torch.rand(10)*3 + .5
    assert torch.allclose(barlow_twins_loss(z1*scale + shift, z2), barlow_twins_loss(z1, z2), rtol=1e-3)


def test_views_are_normalised_separately():
    "With joint normalisation, views of different means would not give a diagonal of ones"
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
    "Also the backward pass inside the user's autocast"
    z1 = torch.randn(64, 96)
    z2 = z1 + .5*torch.randn(64, 96)
    half = [(z*scale).to(dtype) for z in (z1, z2)]
    def loss(a, b): return barlow_twins_loss(a, b, form=form)
    with torch.autocast("cpu", dtype): value, *grads = value_and_gradients(loss, *half)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    of_float32_embeddings = value_and_gradients(barlow_twins_loss, z1*scale, z2*scale)[0]
    assert distance([value], [of_float32_embeddings]) < 1e-3
    exact, *reference = value_and_gradients(loss, *(z.float() for z in half))
    assert distance([value], [exact]) < 1e-6
    rounded = [g.to(dtype).double() for g in reference]   # only the result is rounded
    assert distance(grads, rounded) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_in_float32_under_autocast(name, dtype):
    z1, z2 = torch.randn(2, 32, 48)
    plain = variant_loss(name)(z1, z2)
    with torch.autocast("cpu", dtype):
        assert variant_loss(name)(z1, z2) == plain
    assert plain.dtype == torch.float32


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
    first, = torch.autograd.grad(loss, z1, retain_graph=True)
    second, = torch.autograd.grad(loss, z1)
    assert torch.equal(first, second)


def test_off_diagonal_entries():
    c = torch.randn(7, 7)
    assert off_diagonal(c).numel() == 42
    assert torch.allclose(off_diagonal(c).square().sum(), c.square().sum() - c.diagonal().square().sum())


# Variants


def correlation(z1, z2): return standardised(z1).T @ standardised(z2)/len(z1)
def diagonal_sum(c): return (1 - c.diagonal()).square().sum()
def rest(c): return c[~torch.eye(len(c), dtype=torch.bool)]
def rms_rows(z): return z.double()/(z.double().square().mean(1, keepdim=True) + EPS).sqrt()
def equation1(c): return diagonal_sum(c) + .01*rest(c).square().sum()


def cross_entropy(c, temperature=.1):
    on = (c.diagonal()/temperature).exp().sum().log()
    off = (rest(c).clamp(min=0)/temperature).exp().sum().log()
    return -on + .01*off


REFERENCES = {
    "baseline": lambda a, b: textbook(a, b, .01),
    "invariance only": lambda a, b: diagonal_sum(correlation(a, b)),
    "redundancy only": lambda a, b: .01*rest(correlation(a, b)).square().sum(),
    "feature normalisation": lambda a, b: equation1(rms_rows(a).T @ rms_rows(b)/len(a)),
    "no normalisation": lambda a, b: equation1(a.double().T @ b.double()/len(a)),
    "cross-entropy": lambda a, b: cross_entropy(correlation(a, b)),
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
    ours = value_and_gradients(VariantLoss(.01, off_target=target, form=form), z1, z2)
    assert distance(ours, value_and_gradients(lambda a, b: textbook(a, b, .01, target), z1, z2)) < 1e-5


def test_scale_multiplies_the_loss():
    z1, z2 = torch.randn(2, 30, 50)
    assert float(BarlowTwinsLoss(scale=.024)(z1, z2)) == pytest.approx(.024*float(barlow_twins_loss(z1, z2)), rel=1e-6)


def test_stop_gradient_gives_gradient_to_view_1_only():
    z1, z2 = (torch.randn(8, 4).requires_grad_() for _ in range(2))
    variant_loss("stop-gradient")(z1, z2).backward()
    assert z1.grad.abs().sum() > 0 and z2.grad is None


def test_only_losses_with_the_papers_terms_are_divisible():
    class Own(BarlowTwinsLoss):
        def terms_of(self, z1, z2): return super().terms_of(z1, z2)
    divisible = {name for name in VARIANTS if variant_loss(name).divisible}
    assert divisible == {"baseline", "invariance only", "redundancy only", "stop-gradient"}
    assert BarlowTwinsLoss(.1, scale=2.).divisible and not Own().divisible and not variant_loss(queue=4).divisible


def test_queue_is_appended_to_the_batch_as_constants():
    batches = [torch.randn(2, 8, 5) for _ in range(4)]
    loss = variant_loss(lmb=.01, queue=20)
    for z in batches: got = value_and_gradients(loss, *z)
    past = torch.cat([batches[2], batches[1], batches[0][:, :4]], 1)   # newest first, 20 rows
    def with_past(a, b): return textbook(torch.cat([a, past[0]]), torch.cat([b, past[1]]), .01)
    assert distance(got, value_and_gradients(with_past, *batches[3])) < 1e-5
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


def test_all_pairs_of_a_plain_function_and_invalid_input():
    zs = torch.randn(3, 4, 5)
    expected = sum(float((a - b).square().sum()) for a, b in itertools.combinations(zs, 2))/3
    assert float(AllPairs(lambda a, b: (a - b).square().sum())(*zs)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least two"): AllPairs(BarlowTwinsLoss())(zs[0])
    with pytest.raises(ValueError, match="queue"): AllPairs(variant_loss(queue=4))
    zs[2, 1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="views 1 and 3: .* z2 has 1 nan"): AllPairs(BarlowTwinsLoss())(*zs)


def test_a_used_loss_can_be_copied_and_saved():
    "Exporting a Learner pickles its callbacks and their attributes"
    loss = variant_loss(queue=8)
    z = [torch.randn(8, 4).requires_grad_() for _ in range(2)]
    loss(*(v*2 for v in z))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert float(other.terms.invariance) == float(loss.terms.invariance)
        assert torch.equal(other.queue.past[0], loss.queue.past[0])


# Invalid input


@pytest.mark.parametrize("args,error,words", [
    ((torch.rand(4, 3), torch.rand(4, 2)), ValueError, "(4, 3) and (4, 2)"),
    ((torch.rand(4, 3), torch.rand(5, 3)), ValueError, "the same shape"),
    ((torch.rand(4), torch.rand(4)), ValueError, "(N,D)"),
    ((torch.rand(1, 3), torch.rand(1, 3)), ValueError, "at least 2"),
    ((torch.ones(4, 3).long(), torch.rand(4, 3)), TypeError, "z1 must be a floating-point tensor, got torch.int64"),
    ((torch.rand(4, 3), [1.]), TypeError, "z2 must be a floating-point tensor, got list"),
    ((torch.rand(4, 3), torch.rand(4, 3), -1.), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), float("nan")), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), float("inf")), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), 1e30), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), "5e-3"), ValueError, "lmb"),
    ((torch.rand(4, 3), torch.rand(4, 3), .1, 0.), ValueError, "eps must be > 0"),
    ((torch.rand(4, 3), torch.rand(4, 3), .1, 1e-5, "gramm"), ValueError,
     "form must be one of None, 'gram', 'direct', got 'gramm'"),
])
def test_invalid_input_raises(args, error, words):
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
    (dict(scale=0), "scale must be > 0"),
    (dict(temperature=math.nan), "temperature must be > 0"),
    (dict(off_target=math.nan), "off_target must be finite"),
    (dict(invariance=False, lmb=0.), "leave no loss"),
])
def test_invalid_options_raise(options, words):
    with pytest.raises(ValueError, match=words): variant_loss(**options)


def test_lmb_is_checked_wherever_it_is_set():
    loss, pairs = BarlowTwinsLoss(), AllPairs(variant_loss("hsic"))
    for objective in (loss, pairs, pairs.objective):
        for wrong in (-1, math.nan, math.inf, 1e30):
            with pytest.raises(ValueError, match="lmb must be"): objective.lmb = wrong
    with pytest.raises(ValueError, match="lmb=0.1 would have no effect"):
        AllPairs(lambda a, b: (a - b).square().sum()).lmb = .1


def test_numpy_scalars_are_numbers():
    z1, z2 = torch.randn(2, 30, 20).requires_grad_()
    loss = BarlowTwinsLoss(np.float64(.02), scale=np.float32(.5))(z1, z2)
    assert loss.dtype == torch.float32 and torch.equal(loss, BarlowTwinsLoss(.02, scale=.5)(z1, z2))


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="variant must be one of 'baseline'.*got 'vicreg'"): variant_loss("vicreg")
    with pytest.raises(ValueError, match="along must be one of"): normalise(torch.rand(3, 2), along="rows")
    z = torch.rand(3, 2)
    with pytest.raises(ValueError, match="form must be one of"): correlation_terms(z, z, "fast")


@pytest.mark.parametrize("form", FORMS)
def test_error_names_the_view_and_counts_nan(form):
    z1, z2 = torch.randn(2, 8, 20)
    z2[1, 3], z2[1, 4], z2[5, 0] = float("nan"), float("nan"), float("inf")
    with pytest.raises(FloatingPointError) as e: barlow_twins_loss(z1, z2, form=form)
    assert "z1 is finite" in str(e.value) and "z2 has 2 nan and 1 inf, in 2 of 8 rows" in str(e.value)
    assert barlow_twins_loss(z1, z2, form=form, check_finite=False).isnan()
    with pytest.raises(FloatingPointError, match="too large to square"):
        variant_loss("no normalisation", form=form)(torch.full((8, 20), 1e20), torch.full((8, 20), 1e20))


@pytest.mark.parametrize("large", ["all", "one column", "one view"])
@pytest.mark.parametrize("name", VARIANTS)
def test_embeddings_too_large_to_square_are_refused(name, form, large):
    "Their variance is infinite: dividing by it would give a loss of D with gradient 0"
    if name == "cross-entropy" and form == "gram": return   # has no Gram form
    z1, z2 = torch.randn(2, 12, 40)
    if large == "all": z1, z2 = z1*1e20, z2*1e20
    elif large == "one view": z2 = z2*1e20
    else: z1[:, 3] *= 1e20
    loss = variant_loss(name, form=form)
    with pytest.raises(FloatingPointError, match="too large to square"): loss(z1, z2)
    loss.check_finite = False
    assert not loss(z1, z2).isfinite()


@pytest.mark.skipif(torch.__version__ < "2.9", reason="older PyTorch asks the driver even for fake CUDA tensors")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("options", [*VARIANTS.values(), {"queue": 4}, {"form": "gram"}, {"form": "direct"}], ids=str)
def test_only_the_loss_is_read_and_only_once(options):
    "Reading a number waits for the device. Fake tensors have shapes but no values: reading one raises"
    with FakeTensorMode():
        on_gpu = [torch.randn(8, 20, device="cuda") for _ in range(2)]
        on_cpu = [torch.randn(8, 20, requires_grad=True) for _ in range(2)]
        assert VariantLoss(check_finite=False, **options)(*on_gpu).device.type == "cuda"
        VariantLoss(check_finite=False, **options)(*on_cpu).backward()   # backward needs a real device
        assert on_cpu[0].grad.shape == on_cpu[0].shape
        for zs in (on_gpu, on_cpu):
            with pytest.raises(DataDependentOutputException): VariantLoss(**options)(*zs)
