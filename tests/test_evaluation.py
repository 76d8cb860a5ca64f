"Evaluation and diagnostics against references that share no code with them"
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from fastai.data.core import Datasets
from fastai.vision.augment import Flip

from conftest import image_items, small_model
from self_supervised_bt.data import digits, tensor_dls, train_test_split
from self_supervised_bt.diagnostics import (
    expected_losses, nearest, plot_cross_correlation, plot_losses, plot_neighbours)
from self_supervised_bt.evaluation import (
    draw_labels, effective_rank, encode, encode_views, few_labels_accuracy, knn_accuracy, knn_predict, label_table, twin_accuracy,
    unlabelled_table)
from self_supervised_bt.losses import barlow_twins_loss


@pytest.fixture
def reps():
    x, y, x_test, y_test = train_test_split(*digits())
    return x.flatten(1).float(), y, x_test.flatten(1).float(), y_test


def test_encode_keeps_order_mode_and_every_image(make_learner, make_dls):
    learn = make_learner(make_dls(n=50, bs=16, n_valid=21))
    learn.model.train()
    learn.model.encoder[1].eval()
    h, y = encode(learn, learn.dls.train)
    x = torch.stack([o[0] for o in learn.dls.train_ds]).as_subclass(torch.Tensor)
    assert learn.model.encoder.training and not learn.model.encoder[1].training
    with torch.no_grad(): assert torch.allclose(h, learn.model.encoder.eval()(x), atol=1e-5)
    assert y.tolist() == [o[1] for o in learn.dls.train_ds] and h.dtype == torch.float32
    assert torch.equal(h, encode(learn, x, progress=True)[0]) and encode(learn, x)[1] is None
    assert not h.requires_grad


def test_encode_augments_nothing():
    items = [(o[0],) for o in image_items(32)]
    tds = Datasets(range(32), [[lambda i: items[i][0]]], splits=(range(32), range(32)))
    dls = tds.dataloaders(bs=8, device="cpu", num_workers=0, after_batch=[Flip(p=.5)])
    encoder = small_model().encoder
    assert torch.allclose(encode(encoder, dls.train)[0], encode(encoder, torch.stack([o[0] for o in items]))[0], atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_plain_votes_equal_scikit_learn(reps, k):
    h, y, h_test, y_test = reps
    sk = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(h, y).predict(h_test)
    assert (knn_predict(h_test, h, y, k, temperature=1e6) == torch.as_tensor(sk)).float().mean() > .99      # ties may differ


def test_knn_weighted_votes_equal_a_loop(reps):
    h, _, h_test, _ = reps
    h_test, y = h_test[:60], torch.randint(0, 10, (len(h),))      # chance labels: every weight counts
    expected = []
    for q in h_test.double():
        s = np.array([float(q @ b/(q.norm()*b.norm())) for b in h.double()])
        votes = np.zeros(10)
        for i in np.argsort(-s)[:25]: votes[y[i]] += math.exp(s[i]/.07)
        expected.append(votes.argmax())
    assert knn_predict(h_test, h, y, k=25, temperature=.07, chunk=13).tolist() == expected


def test_knn_survives_a_tiny_temperature(reps):
    h, y, h_test, y_test = reps
    assert knn_accuracy(h_test, y_test, h, y, k=5, temperature=1e-3) > .9


def test_few_labels_equal_scikit_learn(reps):
    h, y, h_test, y_test = reps
    acc = few_labels_accuracy(h, y, h_test, y_test, n=5, draws=3, seed=7)
    a, b = (np.asarray(F.normalize(t - h.mean(0), dim=1)) for t in (h, h_test))
    for i in range(3):
        idx = draw_labels(y, 5, 7 + i)
        assert (y[idx].bincount() == 5).all() and len(idx.unique()) == 50
        assert float(acc[i]) == pytest.approx(LogisticRegression(C=10., max_iter=1000).fit(a[idx], y[idx]).score(b, y_test))


def test_effective_rank_equals_its_formula():
    h = torch.randn(50, 20) @ torch.diag(torch.logspace(0, -2, 20))
    s = np.linalg.svd(np.asarray(h, dtype=np.float64), compute_uv=False)
    p = s/s.sum() + 1e-7
    assert effective_rank(h) == pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-6)
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1, abs=1e-3)


def test_twins_are_found_by_their_views():
    h = torch.randn(200, 16)
    assert twin_accuracy(h, h*3) == 1. and twin_accuracy(h, h.roll(1, 0)) == 0. and twin_accuracy(h, torch.randn(200, 16)) < .05


def test_encode_views_are_those_of_the_callback(make_learner):
    learn = make_learner()
    x = torch.stack([o[0] for o in learn.dls.valid_ds])
    rng = torch.get_rng_state()
    h1, h2, z1, z2 = encode_views(learn, learn.dls.valid, seed=3)
    assert torch.equal(torch.get_rng_state(), rng) and not torch.allclose(h1, h2)
    assert torch.equal(encode_views(learn, learn.dls.valid, seed=3)[3], z2)
    with torch.no_grad(): assert torch.allclose(learn.model.projector.eval()(h1), z1, atol=1e-6)
    assert len(h1) == len(x)


def test_tables(reps):
    h, y, h_test, y_test = reps
    table = label_table({"a": (h, h_test), "b": (h*2, h_test*2)}, y, y_test, labels=(1, 5, 500), draws=2)
    assert list(table.columns) == ["kNN (k=20)", "1 label a class", "5 labels a class"] and table.loc["a", "kNN (k=20)"] == table.loc["b", "kNN (k=20)"]
    assert unlabelled_table({"a": (h, h)}).loc["a", "twins found"] == "100.0%"


def test_expected_losses_are_those_of_random_batches():
    n, d, lmb = 32, 16, .1
    independent, perfect = expected_losses(n, d, lmb)
    pairs = [(torch.randn(n, d), torch.randn(n, d)) for _ in range(400)]
    assert np.mean([float(barlow_twins_loss(a, b, lmb)) for a, b in pairs]) == pytest.approx(independent, rel=.02)
    assert np.mean([float(barlow_twins_loss(a, a, lmb)) for a, _ in pairs]) == pytest.approx(perfect, rel=.02)


def test_plots_take_tensors_and_return_axes():
    ax = plot_cross_correlation(torch.eye(300))
    assert ax.get_title() == "diagonal 1.00, rest 0.00 (RMS)" and ax.get_images()[0].get_array().shape == (128, 128)
    assert plot_losses([3., 2., 1.], (4., .5)).get_yscale() == "log"
    assert len(plot_neighbours(torch.rand(2, 3, 8, 8), torch.rand(2, 4, 3, 8, 8))) == 10
    h = torch.randn(20, 4)
    assert nearest(h[:3], h, 1)[:, 0].tolist() == [0, 1, 2]


def test_bad_input(reps, make_learner):
    h, y, h_test, y_test = reps
    nan = h.clone(); nan[3, 5], nan[9, 0] = float("nan"), float("inf")
    for args, words in [((h_test, nan, y), "bank_h has 2 row"), ((nan, h, y), "h has 2 row"), ((h_test, h[:50], y[:50], 200), "1..50"),
                        ((h_test, h, y, 0), "k must be"), ((h_test[:, :5], h, y), "5 wide"), ((h_test, h, y[:5]), "5 labels"),
                        ((h_test[0], h, y), "(N,F)")]:
        with pytest.raises(ValueError) as e: knn_predict(*args)
        assert words in str(e.value)
    with pytest.raises(ValueError, match="smaller n"): few_labels_accuracy(h, y, h_test, y_test, n=1000)
    with pytest.raises(ValueError, match="at least 2"): few_labels_accuracy(h, y*0, h_test, y_test, n=1)
    with pytest.raises(ValueError, match="no images"): encode(make_learner(), torch.rand(0, 1, 8, 8))
    with pytest.raises(ValueError, match="no images"): encode(make_learner(), tensor_dls(digits()[0][:5], valid_pct=0, device="cpu").valid)
    with pytest.raises(ValueError, match="square"): plot_cross_correlation(torch.rand(2, 3))
    with pytest.raises(ValueError, match="1..20"): nearest(h[:2], h[:20], 21)
