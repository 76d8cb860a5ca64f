"Evaluation against references that share no code with it"
import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import image_items, small_encoder, small_model
from fastai.data.core import Datasets
from fastai.data.transforms import Normalize
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision import transforms

from self_supervised_bt.classifiers import subset_dl
from self_supervised_bt.data import digits_images, hold_out, image_files, tensor_dls
from self_supervised_bt.encoder_files import restore_input
from self_supervised_bt.evaluation import (
    OnlineEvaluation,
    RowBuffer,
    effective_rank,
    encode,
    encode_views,
    fit_logistic,
    half_probe,
    held_out_parts,
    k_shot_accuracy,
    knn_accuracy,
    knn_predict,
    knn_votes,
    label_table,
    linear_probe,
    mean_average_precision,
    neighbours,
    positive_pair_accuracy,
    processed_rows,
    sample_labels,
    standardised_rank,
    topk_accuracy,
    unlabelled_table,
)
from self_supervised_bt.folders import unlabelled_dls
from self_supervised_bt.layers import create_encoder


class Items(torch.utils.data.Dataset):
    "(image, label) items of a PyTorch dataset with a transform, as torchvision's"
    def __init__(self, items, transform=None): self.items, self.transform = items, transform
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        x, y = self.items[i]
        return (self.transform(x) if self.transform else x), y


@pytest.fixture
def reps():
    x, y, x_test, y_test = hold_out(*digits_images())
    return x.flatten(1).float(), y, x_test.flatten(1).float(), y_test


def test_encode_keeps_order_mode_and_every_image(make_learner, make_dls):
    learn = make_learner(make_dls(n=50, bs=16, n_valid=21))
    learn.model.train()
    learn.model.encoder[1].eval()
    h, y = encode(learn, learn.dls.train)
    x = torch.stack([o[0] for o in learn.dls.train_ds]).as_subclass(torch.Tensor)
    assert learn.model.encoder.training and not learn.model.encoder[1].training
    with torch.no_grad(): assert torch.allclose(h, learn.model.encoder.eval()(x), atol=1e-5)
    assert y.tolist() == [o[1] for o in learn.dls.train_ds]
    assert h.dtype == torch.float32 and not h.requires_grad
    assert torch.equal(h, encode(learn, x, progress=True)[0])
    assert encode(learn, x)[1] is None


def test_encode_augments_nothing():
    items = [(o[0],) for o in image_items(32)]
    tds = Datasets(range(32), [[lambda i: items[i][0]]], splits=(range(32), range(32)))
    dls = tds.dataloaders(bs=8, device="cpu", num_workers=0, after_batch=[Flip(p=.5)])
    encoder = small_model().encoder
    images = torch.stack([o[0] for o in items])
    assert torch.allclose(encode(encoder, dls.train)[0], encode(encoder, images)[0], atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_plain_votes_equal_scikit_learn(reps, k):
    h, y, h_test, y_test = reps
    sk = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(h, y).predict(h_test)
    ours = knn_predict(h_test, h, y, k, temperature=1e6)
    assert (ours == torch.as_tensor(sk)).float().mean() > .99      # ties may differ


def test_knn_weighted_votes_equal_a_loop(reps):
    h, _, h_test, _ = reps
    h_test = h_test[:60]
    y = torch.randint(0, 10, (len(h),))      # random labels: every weight counts
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


@pytest.mark.parametrize("chunk", [1, 7, 64, 5000])
@pytest.mark.parametrize("alone", [False, True])
def test_neighbours_equal_the_full_matrix(chunk, alone):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(301, 6, generator=g, dtype=torch.float64).float()
    bank = h if alone else torch.randn(555, 6, generator=g)
    full = F.cosine_similarity(h[:, None].double(), bank[None].double(), dim=2)
    if alone: full.fill_diagonal_(-2)
    s, idx = neighbours(h, None if alone else bank, 12, chunk)
    assert torch.allclose(s.double(), full.topk(12).values, atol=1e-6)
    assert torch.equal(idx, full.topk(12).indices)


def test_a_bank_of_several_tiles():
    "A bank wider than one tile: the best of all tiles counts, and a query is excluded in whichever tile it is"
    g = torch.Generator().manual_seed(0)
    h = torch.randn(17000, 4, generator=g)
    rows = torch.tensor([0, 5, 511, 512, 8191, 8192, 16383, 16384, 16999])
    full = F.cosine_similarity(h[rows, None].double(), h[None].double(), dim=2)
    s, idx = neighbours(h[rows], h, k=9)
    assert torch.allclose(s.double(), full.topk(9).values, atol=1e-6)
    assert (s[:, 0] > 1 - 1e-6).all()
    full[torch.arange(len(rows)), rows] = -2
    s, idx = neighbours(h, k=9)
    assert torch.allclose(s[rows].double(), full.topk(9).values, atol=1e-6)
    assert not (idx == torch.arange(len(h))[:, None]).any()


def test_a_query_never_counts_itself_even_among_duplicates():
    h = torch.randn(50, 8).repeat_interleave(3, 0)   # every row three times: leaving out the nearest would be wrong
    y = torch.arange(150)                            # a class of its own for each row
    own = torch.arange(150)[:, None]
    s, idx = neighbours(h, k=2)
    assert not (idx == own).any() and (idx//3 == own//3).all()
    assert torch.allclose(s, torch.ones(150, 2))
    assert knn_accuracy(h, y, k=149) == 0.
    assert knn_accuracy(h, y//3, k=2) == 1.
    assert knn_votes(h, None, y, k=149).gather(1, own).abs().max() == 0


def test_leave_one_out_equals_a_loop(reps):
    h, y = reps[0][:80], reps[1][:80]
    right = 0
    for i in range(80):
        keep = torch.arange(80) != i
        right += int(knn_predict(h[i:i+1], h[keep], y[keep], k=7)[0] == y[i])
    assert knn_accuracy(h, y, k=7) == pytest.approx(right/80)


def test_top_5_equals_scikit_learn():
    from sklearn.metrics import top_k_accuracy_score
    scores, y = torch.rand(200, 9), torch.randint(0, 9, (200,))
    for k in (1, 5):
        expected = top_k_accuracy_score(y, scores, k=k, labels=range(9))
        assert topk_accuracy(scores, y, k) == pytest.approx(expected)
    assert topk_accuracy(scores[:, :3], y.clamp(max=2), 5) == 1.


def blobs(n, classes, width, noise, seed=0):
    "Overlapping classes with skewed axes: a probe has something to lose"
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=g)
    axes = torch.logspace(0, -3, width)
    y = torch.randint(0, classes, (n,), generator=g)
    return ((centres[y] + noise*torch.randn(n, width, generator=g))*axes + 3*axes), y


def test_linear_probe_equals_scikit_learn():
    rows, labels = blobs(5000, 12, 40, 2.)
    h, h_val = rows.split([3000, 2000])
    y, y_val = labels.split([3000, 2000])
    probe = linear_probe(h, y, h_val, y_val)
    a, b = (((t - h.mean(0))/h.std(0, correction=0)).double() for t in (h, h_val))
    sk = LogisticRegression(C=probe.C, max_iter=5000, tol=1e-6).fit(a, y)
    assert abs(probe.top1 - sk.score(b, y_val)) <= .003
    assert (probe.classifier(h_val).argmax(1) == torch.as_tensor(sk.predict(b))).float().mean() > .997
    best = max(LogisticRegression(C=C, max_iter=5000).fit(a, y).score(b, y_val) for C in probe.tried)
    assert probe.top1 > best - .01           # C is chosen without the test rows, and nearly their best
    assert probe.top5 > probe.top1


@pytest.mark.parametrize("C", [1e-3, 1., 100.])
def test_logistic_regression_reaches_scikit_learns_minimum(C):
    h, y = blobs(400, 4, 6, 1.)
    h = (h - h.mean(0))/h.std(0)
    w = fit_logistic(h.double(), y, C, max_iter=2000)
    sk = LogisticRegression(C=C, max_iter=10000, tol=1e-10).fit(h.double(), y)
    assert np.allclose(w[:, :-1], sk.coef_, atol=5e-3*np.abs(sk.coef_).max())


def test_the_probe_never_sees_test_rows():
    h, y = blobs(400, 3, 10, 1.5)
    g = torch.Generator().manual_seed(1)
    def probe(): return linear_probe(h, y, torch.randn(50, 10, generator=g), torch.randint(0, 3, (50,), generator=g))
    one, two = probe(), probe()
    assert one.C == two.C and one.tried == two.tried
    assert torch.equal(one.classifier.weight, two.classifier.weight)


def test_several_labels_per_image():
    from sklearn.metrics import average_precision_score
    h, y = blobs(600, 4, 10, 1.)
    several = torch.stack([y == 0, y > 1, (y % 2) == 0, h[:, 0] > 3.], 1).float()
    probe = linear_probe(h[:400], several[:400], h[400:], several[400:])
    assert probe.top1 is None and probe.mean_ap > .8
    scores = probe.classifier(h[400:]).detach()
    aps = np.array([average_precision_score(several[400:, c], scores[:, c]) for c in range(4)])
    assert probe.mean_ap == pytest.approx(aps.mean())
    absent = several.clone()
    absent[:, 1] = 0                          # a class that no row has does not count
    assert mean_average_precision(scores, absent[400:]) == pytest.approx(aps[[0, 2, 3]].mean())


def test_shares_of_labels_are_shares_of_every_class():
    y = torch.tensor([0]*100 + [1]*30 + [2]*3)
    assert y[sample_labels(y, .1)].bincount().tolist() == [10, 3, 1]


def test_encoding_needs_memory_for_its_rows_once():
    "Rows are written as they come: a million of them need no second copy at the end"
    rows = RowBuffer(1000)
    for _ in range(10): rows.add(torch.ones(100, 4))
    assert rows.rows().shape == (1000, 4)
    assert rows.rows().data_ptr() == rows.buffer.data_ptr()
    rows = RowBuffer(None)                    # a loader that gives more than it said
    for i in range(4): rows.add(torch.full((3, 2), float(i)))
    assert rows.rows()[:, 0].tolist() == [0]*3 + [1]*3 + [2]*3 + [3]*3


def test_a_stream_of_images_is_encoded():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter((image, label) for image, label in image_items(20))
    encoder = small_model().encoder
    images = torch.stack([o[0] for o in image_items(20)])
    h, y = encode(encoder, torch.utils.data.DataLoader(Stream(), batch_size=8))
    assert torch.allclose(h, encode(encoder, images)[0], atol=1e-5)
    assert y.tolist() == [o[1] for o in image_items(20)]


def test_images_of_another_size(make_learner):
    learn = make_learner(stats=([.3], [.35]))
    x = torch.rand(6, 1, 8, 8)
    larger = F.interpolate(x, size=12, mode="bilinear", antialias=True)
    with torch.no_grad(): expected = learn.model.encoder.eval()((larger - .3)/.35)
    assert torch.allclose(encode(learn, x, size=12)[0], expected, atol=1e-3)
    for size in (-4, 0):
        with pytest.raises(ValueError, match="size must be a positive int"): encode(learn, x, size=size)


def test_online_columns_are_those_of_the_encoder(make_learner, make_dls):
    x, y = digits_images()
    x, y = x[:60], y[:60]
    cb = OnlineEvaluation((x, y), every=2, k=5)
    learn = make_learner(make_dls(n=48), cbs=[cb])
    learn.fit(4, 1e-3)
    names, rows = learn.recorder.metric_names, [list(v) for v in learn.recorder.values]
    assert list(names)[3:5] == ["knn_accuracy", "linear_accuracy"] and not learn.metrics
    assert rows[0][2:] == rows[1][2:]
    assert len(cb.seconds) == 3 and 0 < cb.cost < 1
    assert rows[-1][2] == pytest.approx(knn_accuracy(*encode(learn, (x, y)), k=5))
    learn.validate()                                # neither is disturbed
    learn.lr_find(num_it=20, show_plot=False)


def test_online_evaluation_leaves_training_as_it_is(make_learner, make_dls):
    x, y = digits_images()
    weights = []
    for cbs in ([], [OnlineEvaluation((x[:60], y[:60]), k=5)]):
        set_seed(3)
        dls, model = make_dls(), small_model()
        set_seed(3)
        learn = make_learner(dls, model, cbs=cbs)
        learn.fit(2, 1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)


def test_a_failing_online_evaluation_costs_no_training(make_learner, monkeypatch):
    x, y = digits_images()
    cb = OnlineEvaluation((x[:60], y[:60]), k=5)
    learn = make_learner(cbs=[cb])
    whole, calls = cb.measure, []
    def fails_later():
        calls.append(1)
        if len(calls) > 2: raise RuntimeError("no more memory")
        whole()
    monkeypatch.setattr(cb, "measure", fails_later)
    with pytest.warns(UserWarning, match="no more memory.*training goes on"): learn.fit(3, 1e-3)
    assert len(learn.recorder.values) == 3 and math.isnan(learn.recorder.values[-1][-1])


def test_what_online_evaluation_cannot_use_is_said_before_training(make_learner):
    x, _ = digits_images()
    one_class = torch.zeros(40, dtype=torch.long)
    cases = [((x[:40], one_class), "1 class"), ((x[:10], torch.arange(10)), "k must be"), (x[:40], "is None")]
    for data, words in cases:
        learn = make_learner(cbs=[OnlineEvaluation(data)])
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(ValueError, match=words): learn.fit(1)
        assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters())) and not learn.metrics


def test_k_shot_accuracy_equals_scikit_learn(reps):
    h, y, h_test, y_test = reps
    acc = k_shot_accuracy(h, y, h_test, y_test, n=5, samples=3, seed=7)
    a, b = (np.asarray(F.normalize(t - h.mean(0), dim=1)) for t in (h, h_test))
    for i in range(3):
        idx = sample_labels(y, 5, 7 + i)
        assert (y[idx].bincount() == 5).all() and len(idx.unique()) == 50
        sk = LogisticRegression(C=10., max_iter=1000).fit(a[idx], y[idx])
        assert float(acc[i]) == pytest.approx(sk.score(b, y_test))


def test_effective_rank_equals_its_formula():
    h = torch.randn(50, 20) @ torch.diag(torch.logspace(0, -2, 20))
    s = np.linalg.svd(np.asarray(h, dtype=np.float64), compute_uv=False)
    p = s/s.sum() + 1e-7
    assert effective_rank(h) == pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-6)
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1, abs=1e-3)


def test_each_rank_has_one_name_and_one_input(make_learner):
    "Effective rank is RankMe, uncentred; what is centred and scaled first is called the standardised rank"
    z = torch.randn(400, 10) + 100
    centred = (z - z.mean(0))/z.std(0, correction=0)
    assert effective_rank(z) < 1.5 and standardised_rank(z) == pytest.approx(effective_rank(centred), rel=1e-4)
    assert standardised_rank(z*torch.logspace(0, 4, 10)) == pytest.approx(standardised_rank(z), rel=1e-4)
    assert "effective rank of h" in unlabelled_table({"a": (z, z)})


def test_images_are_not_normalised_twice(make_learner, make_dls):
    learn = make_learner(stats=([.3], [.35]))
    x, y = digits_images()
    normalise = Normalize.from_stats([.3], [.35], cuda=False)
    dls = tensor_dls(x[:40], y[:40], bs=8, device="cpu", batch_tfms=[normalise])
    items = [(im, int(l)) for im, l in zip((x[:40].float()/255), y)]
    ds = Items(items, transforms.Compose([transforms.Normalize([.3], [.35])]))
    torch_dl = torch.utils.data.DataLoader(torch.utils.data.Subset(ds, range(20)), 8)
    for dl in (dls.train, torch_dl):
        with pytest.raises(ValueError, match="would do it again"): encode(learn, dl)
        with pytest.raises(ValueError, match="would do it again"): encode_views(learn, dl)
    with pytest.raises(ValueError, match="would do it again"): make_learner(cbs=[OnlineEvaluation(dls.train)],
                                                                            stats=([.3], [.35])).fit(1)
    encoder = small_model().encoder              # without a normalisation of its own: the loader's counts
    own = (dls.valid_ds.x.float()/255 - .3)/.35
    assert torch.allclose(encode(encoder, dls.valid)[0], encode(encoder, own)[0], atol=1e-4)


def test_encode_refuses_what_training_refuses(make_learner):
    x = torch.rand(6, 1, 8, 8)
    for stats in (([.3], [.35]), None):          # a normalisation, or views that need [0,1]
        with pytest.raises(ValueError, match=r"\[0,1\], got"): encode(make_learner(stats=stats), x*255)
    x[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"): encode(small_model().encoder, x)


def torch_loader(x, **kwargs): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8, **kwargs)


def test_encode_keeps_the_order_and_all_images_of_a_pytorch_loader():
    x = torch.rand(21, 1, 8, 8)
    encoder = small_model().encoder
    g = torch.Generator().manual_seed(0)
    before = g.get_state()
    for kwargs in (dict(shuffle=True, drop_last=True), dict(drop_last=True), dict(generator=g)):
        h, y = encode(encoder, torch_loader(x, **kwargs))
        assert torch.allclose(h, encode(encoder, x)[0], atol=1e-6) and y is None
    assert torch.equal(g.get_state(), before)    # reading uses no generator of the user's
    choosing = torch.utils.data.SubsetRandomSampler(range(5))
    with pytest.raises(ValueError, match="no order that could be kept"):
        encode(encoder, torch_loader(x, sampler=choosing))
    random = transforms.Compose([transforms.RandomHorizontalFlip()])
    ds = Items([(im, 0) for im in x], random)
    with pytest.warns(UserWarning, match="RandomHorizontalFlip"): encode(encoder, torch.utils.data.DataLoader(ds, 8))


def test_encode_keeps_the_order_of_a_subset():
    x, y = digits_images()
    dls = tensor_dls(x[:60], y[:60], bs=16, valid_pct=0, device="cpu")
    idx = torch.tensor([31, 3, 17, 40, 8])
    encoder = small_model().encoder
    h, labels = encode(encoder, subset_dl(dls.train, idx))
    assert torch.equal(labels, y[idx.sort()[0]])
    assert torch.allclose(h, encode(encoder, x[idx.sort()[0]])[0], atol=1e-6)


def test_encode_takes_images_as_they_lie_about_or_says_what_to_pass(folder):
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    encoder = small_model().encoder
    expected = encode(encoder, x)[0]
    for data in (list(x), x.numpy(), list(x.numpy()), (x, y.numpy()), (x.numpy(), y.tolist()), (x, None)):
        h, labels = encode(encoder, data)
        assert torch.equal(h, expected)
        assert labels is None or torch.equal(labels, y)
    named = torch.utils.data.DataLoader([(im, f"{i}.png") for i, im in enumerate(x)], 3)
    dls = tensor_dls(x, bs=2, device="cpu")
    cases = [(folder, "unlabelled_dls"), (str(folder), "unlabelled_dls"), (image_files(folder), "load_images"),
             ([torch.rand(1, 8, 8), torch.rand(1, 9, 9)], "2 shapes"), (dls, "dls.valid"), (dls.train_ds, "DataLoader"),
             (np.zeros((6, 8, 8, 1)), "transpose"), (named, "class index"), ((x, ["a"]*6), "labels must be numbers")]
    for data, words in cases:
        with pytest.raises(ValueError, match=words): encode(encoder, data)


def test_broken_files_have_no_row(folder):
    "A copy of the next image in their place would be a double, which names its own class at any labels"
    files = image_files(folder)
    for f in files[::2]: f.write_bytes(b"no image")
    dls = unlabelled_dls(folder, 16, bs=8, valid_pct=0, labels=True, num_workers=0, device="cpu")
    with pytest.warns(UserWarning, match="20 of 40 images have no row"):
        h, y = encode(small_model(channels=3).encoder, dls.train)
    assert len(h) == len(y) == 20 == len(h.unique(dim=0))
    assert torch.equal(y, dls.train_ds.y[1::2]) and len(dls.train_ds.codes.nonzero()) == 20


def test_encode_in_the_precision_of_the_model():
    encoder = small_model().encoder
    x = torch.rand(5, 1, 8, 8)
    h = encode(encoder.double(), x)[0]
    assert h.dtype == torch.float32 and torch.allclose(h, encode(encoder.float(), x.double())[0], atol=1e-5)
    assert torch.equal(encode(torch.nn.Flatten(), x)[0], x.flatten(1))       # no parameters at all
    with pytest.raises(ValueError, match="pool and flatten"): encode(encoder[:3], x)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, "numpy", "list"])
def test_labels_of_any_whole_number_type(kind):
    h, y = torch.randn(100, 8), torch.arange(100) % 3
    other = {"numpy": lambda: y.numpy().astype("int32"), "list": y.tolist}.get(kind, lambda: y.to(kind))()
    one, two = (linear_probe(h[:80], t[:80], h[80:], t[80:], Cs=1.) for t in (y, other))
    assert one.top1 == two.top1 and torch.equal(one.classifier.weight, two.classifier.weight)
    assert knn_accuracy(h, other, k=np.int64(5)) == knn_accuracy(h, y, k=5)
    assert torch.equal(sample_labels(other, np.int32(2)), sample_labels(y, 2))


def test_two_classes_as_booleans():
    h, y = torch.randn(100, 8), torch.arange(100) % 2
    assert linear_probe(h[:80], y[:80] > 0, h[80:], y[80:] > 0, Cs=1.).top1 == \
        linear_probe(h[:80], y[:80], h[80:], y[80:], Cs=1.).top1


def test_labels_from_one_on_and_with_gaps():
    h, y = blobs(300, 4, 6, 1.)
    for other in (y + 1, 3*y):
        one, two = (linear_probe(h[:200], t[:200], h[200:], t[200:], Cs=1.) for t in (y, other))
        assert one.top1 == two.top1 and one.top5 == two.top5
        assert torch.equal(one.classifier.weight, two.classifier.weight[other.unique()])
        assert set(two.classifier(h).argmax(1).tolist()) <= set(other.tolist())
    table = label_table({"h": (h[:200], h[200:])}, y[:200] + 1, y[200:] + 1, labels=(1, 5), samples=2)
    assert list(table.columns) == ["kNN (k=20)", "1 label per class", "5 labels per class"]


def test_a_class_without_a_training_row_is_refused():
    h, y = torch.randn(60, 4), torch.arange(60) % 3
    known = y != 1
    with pytest.raises(ValueError, match="y_val has class 1 in 20"): linear_probe(h[known], y[known], h, y, Cs=1.)
    with pytest.raises(ValueError, match="y_test has class 1"): k_shot_accuracy(h[known], y[known], h, y, n=2)
    with pytest.warns(UserWarning, match="no row of class 1"): knn_accuracy(h, y, h[known], y[known], k=3)
    several = F.one_hot(y)
    without = several*(y != 1)[:, None]
    with pytest.raises(ValueError, match="y_val has class 1"): linear_probe(h, without, h, several)


def test_scores_and_labels_that_are_no_numbers():
    scores, y = torch.randn(20, 3), F.one_hot(torch.arange(20) % 3)
    with pytest.raises(ValueError, match="from -1 to 1"): mean_average_precision(scores, y*2 - 1)
    with pytest.raises(ValueError, match="NaN"): mean_average_precision(scores*float("nan"), y)
    with pytest.raises(ValueError, match="20 row.s. with NaN"): topk_accuracy(scores*float("nan"), y.argmax(1))
    with pytest.raises(ValueError, match="no 1"): mean_average_precision(scores, y*0)


@pytest.mark.parametrize("Cs, words", [(0, "positive"), ((1., -1.), "positive"), ((), "Cs is empty"),
                                       (float("nan"), "positive")])
def test_impossible_regularisation(Cs, words):
    h, y = torch.randn(40, 4), torch.arange(40) % 2
    with pytest.raises(ValueError, match=words): linear_probe(h, y, h, y, Cs=Cs)
    assert linear_probe(h, y, h, y, Cs=1.).C == linear_probe(h, y, h, y, Cs=[np.float32(1)]).C == 1.
    with pytest.raises(ValueError, match="C must be"): OnlineEvaluation((h, y), C=0.)


@pytest.mark.parametrize("C", [.1, 10.])
def test_C_of_two_classes_is_scikit_learns(C):
    h, y = blobs(300, 2, 6, 1.)
    h = ((h - h.mean(0))/h.std(0)).double()
    w = fit_logistic(h, y, C, max_iter=2000)
    sk = LogisticRegression(C=C, max_iter=10000, tol=1e-10).fit(h, y)
    assert np.allclose(w[1, :-1] - w[0, :-1], sk.coef_[0], atol=5e-3*np.abs(sk.coef_).max())


def test_C_is_chosen_on_enough_rows():
    y = torch.arange(60) % 3
    parts = held_out_parts(y, .1, 0)
    assert len(parts) == 5 and torch.equal(torch.cat(parts).sort()[0], torch.arange(60))
    assert all((y[part].bincount() == 4).all() for part in parts)
    large, = held_out_parts(torch.arange(1000) % 3, .1, 0)
    assert len(large) == 100


def test_all_labels_are_all_labels():
    y = torch.arange(60) % 3
    assert torch.equal(sample_labels(y, 1.).sort()[0], torch.arange(60))
    assert torch.equal(sample_labels(y, np.float32(1)).sort()[0], torch.arange(60))
    assert len(sample_labels(y, 1)) == 3
    for n in (2., True, 0, -.1):
        with pytest.raises(ValueError, match="1.0 for all labels"): sample_labels(y, n)


def test_a_table_says_over_how_many_samples(reps):
    h, y, h_test, y_test = reps
    table = label_table({"a": (h, h_test)}, y, y_test, labels=(1, .02), samples=2)
    assert table.columns.name == "% (mean ± std of 2 samples)" and "±" in table.loc["a", "2 % of the labels"]
    assert "±" not in label_table({"a": (h, h_test)}, y, y_test, labels=(1,), samples=1).loc["a", "1 label per class"]


def test_a_resumed_online_evaluation_continues():
    x, y = digits_images()
    cb, resumed = (OnlineEvaluation((x[:60], y[:60])) for _ in range(2))
    for column, value in zip(cb.columns, (.25, .75)): column.value = value
    cb.seconds, cb.start = [2., 3.], cb.start - 10
    resumed.load_state_dict(cb.state_dict())
    assert [c.value for c in resumed.columns] == [.25, .75] and resumed.seconds == [2., 3.]
    assert resumed.cost == pytest.approx(.5, rel=.1)


def test_a_class_of_one_row_is_left_out_of_the_halves():
    h, y = blobs(61, 3, 4, .1)
    y[30] = 7
    assert half_probe(h, y, .1) == half_probe(h[y < 7], y[y < 7], .1)


def test_positive_pairs_are_found_by_cosine_similarity():
    h = torch.randn(200, 16)
    assert positive_pair_accuracy(h, h*3) == 1.
    assert positive_pair_accuracy(h, h.roll(1, 0)) == 0.
    assert positive_pair_accuracy(h, torch.randn(200, 16)) < .05


def test_encode_views_are_those_of_the_callback(make_learner):
    learn = make_learner()
    x = torch.stack([o[0] for o in learn.dls.valid_ds])
    rng = torch.get_rng_state()
    h1, h2, z1, z2 = encode_views(learn, learn.dls.valid, seed=3)
    assert torch.equal(torch.get_rng_state(), rng) and not torch.allclose(h1, h2)
    assert torch.equal(encode_views(learn, learn.dls.valid, seed=3)[3], z2)
    with torch.no_grad(): assert torch.allclose(learn.model.projector.eval()(h1), z1, atol=1e-6)
    assert len(h1) == len(x)


def test_encode_views_needs_a_callback_that_makes_views(make_learner):
    learn = make_learner()
    learn.remove_cb(learn.barlow_twins)
    with pytest.raises(ValueError, match="no callback that makes views"): encode_views(learn, learn.dls.valid)


def test_tables(reps):
    h, y, h_test, y_test = reps
    table = label_table({"a": (h, h_test), "b": (h*2, h_test*2)}, y, y_test, labels=(1, 5, 500), samples=2)
    assert list(table.columns) == ["kNN (k=20)", "1 label per class", "5 labels per class"]
    assert table.loc["a", "kNN (k=20)"] == table.loc["b", "kNN (k=20)"]
    assert unlabelled_table({"a": (h, h)}).loc["a", "positive pairs found"] == "100.0 %"


def test_bad_neighbours(reps):
    h, y, h_test, _ = reps
    nan = h.clone()
    nan[3, 5] = float("nan")
    nan[9, 0] = float("inf")
    cases = [((h_test, nan, y), "bank_h has 2 row"),
             ((nan, h, y), "h has 2 row"),
             ((h_test, h[:50], y[:50], 200), "1..50"),
             ((h_test, h, y, 0), "k must be"),
             ((h_test[:, :5], h, y), "5 wide"),
             ((h_test, h, y[:5]), "5 labels"),
             ((h_test[0], h, y), "(N,F)")]
    for args, words in cases:
        with pytest.raises(ValueError) as e: knn_predict(*args)
        assert words in str(e.value)
    with pytest.raises(ValueError, match="1..20"): neighbours(h[:2], h[:20], 21)
    with pytest.raises(ValueError, match="1..19, the other rows"): neighbours(h[:20], k=20)
    elsewhere = torch.empty(5, h.shape[1], device="meta")
    with pytest.raises(ValueError, match="h is on cpu and bank_h on meta"): neighbours(h[:2], elsewhere, 1)
    with pytest.raises(ValueError, match="temperature"): knn_predict(h_test, h, y, 5, temperature=0.)
    with pytest.raises(ValueError, match="chunk must be"): neighbours(h[:20], k=2, chunk=0)
    with pytest.raises(ValueError, match="bank_y needs bank_h"): knn_accuracy(h, y, bank_y=y)


def test_bad_probes(reps):
    h, y, h_test, y_test = reps
    nan = h.clone()
    nan[3, 5] = float("nan")
    cases = [(None, "y is None"),
             (y.float(), "whole numbers"),
             (y - 5, "from 0 on"),
             (y*0, "1 class"),
             (y[:7], "7 labels")]
    for bad, words in cases:
        with pytest.raises(ValueError, match=words): linear_probe(h, bad, h_test, y_test)
    known = y < 9
    with pytest.raises(ValueError, match="y_val has class 9"): linear_probe(h[known], y[known], h_test, y_test)
    with pytest.raises(ValueError, match="not finite"): linear_probe(nan, y, h_test, y_test)
    with pytest.raises(ValueError, match="zeros and ones"): linear_probe(h, F.one_hot(y)*2, h_test, F.one_hot(y_test))
    with pytest.raises(ValueError, match="label both alike"): linear_probe(h, F.one_hot(y), h_test, y_test)
    with pytest.raises(ValueError, match="too few to choose C"): linear_probe(h[:12], y[:12], h[:12], y[:12])
    with pytest.raises(ValueError, match="5 wide|64 wide"): linear_probe(h, y, h_test[:, :5], y_test)


def test_bad_input(reps, make_learner):
    h, y, h_test, y_test = reps
    nothing = tensor_dls(digits_images()[0][:5], valid_pct=0, device="cpu").valid
    with pytest.raises(ValueError, match="smaller n"): k_shot_accuracy(h, y, h_test, y_test, n=1000)
    with pytest.raises(ValueError, match="at least 2"): k_shot_accuracy(h, y*0, h_test, y_test, n=1)
    with pytest.raises(ValueError, match="no images"): encode(make_learner(), torch.rand(0, 1, 8, 8))
    with pytest.raises(ValueError, match="no images"): encode(make_learner(), nothing)
    with pytest.raises(ValueError, match="3 labels"): encode(make_learner(), (torch.rand(4, 1, 8, 8), y[:3]))
    with pytest.raises(ValueError, match="dead"): effective_rank(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="share"): sample_labels(y, 1.5)
    with pytest.raises(ValueError, match="every"): OnlineEvaluation((h, y), every=0)


# What lies about

def test_all_images_of_a_loader_with_a_batch_sampler_are_encoded():
    "PyTorch then says batch_size=None, which a new loader would take for no batches at all"
    x, y = torch.rand(20, 3, 8, 8), torch.arange(20)
    data = torch.utils.data.TensorDataset(x, y)
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), 8, True)
    h, labels = encode(nn.Flatten(), torch.utils.data.DataLoader(data, batch_sampler=batches))
    assert torch.equal(h, x.flatten(1)) and torch.equal(labels, y)


def test_images_of_other_channels_are_refused_in_words():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"takes images of 3 channel\(s\), and these have 1: .*n_in=3"):
        encode(encoder, torch.rand(2, 1, 8, 8))


def test_values_up_to_255_are_said_where_the_encoder_does_not_say_what_it_expects():
    x = torch.rand(9, 3, 8, 8)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(255*x), 2)
    with pytest.warns(UserWarning, match="values up to 25.*divide by 255") as said: encode(nn.Flatten(), data)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (x, x.mul(255).byte(), 3*x - 1.5, 60*(x - .5)): encode(nn.Flatten(), images)


@pytest.mark.parametrize("data, words", [
    ((torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)), r"data\[1\] must be labels"), ([1, 2], "got a list of int"),
    ({1, 2}, "images must be a tensor"), (((),), "no images")])
def test_what_is_no_image_is_refused_in_words(data, words):
    with pytest.raises(ValueError, match=words): encode(nn.Flatten(), data)


@pytest.mark.parametrize("C", ["x", None, (None,), (1., "x")])
def test_a_regularisation_that_is_no_number(C):
    h, y = torch.randn(40, 4), torch.arange(40) % 2
    with pytest.raises(ValueError, match="C must be a positive number"): linear_probe(h, y, h, y, Cs=C)
    with pytest.raises(ValueError, match="C must be a positive number"): k_shot_accuracy(h, y, h, y, 2, C=C)
    with pytest.raises(ValueError, match="C must be a positive number"): OnlineEvaluation((h, y), C=C)


def test_scores_of_another_number_of_classes():
    with pytest.raises(ValueError, match="scores are .*4.* and y .*3"):
        mean_average_precision(torch.rand(5, 4), torch.ones(5, 3))


# After training, without labels

def spotted(n=12, size=16, channels=1, seed=0):
    "Images without any symmetry"
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def with_input(encoder, size=None):
    "The encoder in eval mode, which says that its images have this size and are normalised"
    described = {"stats": [[.4], [.3]], **({} if size is None else {"size": [size, size]})}
    encoder.clean_pipeline = restore_input(described)
    return encoder.eval()


def by_hand(encoder, x, size):
    "Representations of images resized and normalised without the library's pipelines"
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad(): return encoder((x - .4)/.3)


def test_tta_is_the_mean_over_versions_made_by_hand():
    encoder, x = with_input(small_encoder(), 16), spotted(size=32)
    plain = by_hand(encoder, x, (16, 16))
    flipped = by_hand(encoder, x.flip(-1), (16, 16))
    corners = [x, x[..., :28, :28], x[..., :28, 4:], x[..., 4:, :28], x[..., 4:, 4:]]
    sizes = [by_hand(encoder, x, (s, s)) for s in (16, 20, 24)]
    expected = {"flip": (plain + flipped)/2, "crops": sum(by_hand(encoder, c, (16, 16)) for c in corners)/5,
                "sizes": sum(sizes)/3, (16, 20): (sizes[0] + sizes[1])/2, 24: sizes[2], (): plain}
    for tta, h in expected.items(): torch.testing.assert_close(encode(encoder, x, tta=tta)[0], h, rtol=1e-4, atol=1e-5)
    all_of_them = [by_hand(encoder, v, (s, s)) for s in (16, 20, 24) for c in corners for v in (c, c.flip(-1))]
    got = encode(encoder, x, tta=("sizes", "flip", "crops"))[0]
    torch.testing.assert_close(got, sum(all_of_them)/30, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape, pixel", [((17, 13), 1e-5), ((9, 31), .02)])   # an odd margin has its middle pixel off
def test_tta_of_odd_sizes_and_of_an_encoder_without_a_size(channels, shape, pixel):
    encoder = with_input(small_encoder(channels))
    x = torch.rand(5, channels, *shape)
    h = encode(encoder, x, tta=["flip", "crops", "sizes"])[0]
    mirrored = encode(encoder, x.flip(-1), tta=("crops", "sizes", "flip"))[0]
    assert h.shape == (5, 8) and h.isfinite().all() and (h - mirrored).abs().max() < pixel
    assert encode(encoder, x, tta="crops")[0].shape == (5, 8)


@pytest.mark.parametrize("tta, words", [
    ("rotate", "got 'rotate'"), (True, "got True"), (("flip", 0), "got 0"), (("flip", -3), "got -3"), (1.5, "got 1.5"),
    (("sizes", 24), "leave out one"), ({"flip": 1}, "tta must be"), (("flip", None), "got None")])
def test_what_cannot_be_averaged_is_refused(tta, words):
    with pytest.raises(ValueError, match=words): encode(small_encoder(), spotted(), tta=tta)


def test_options_that_contradict_each_other_are_refused():
    encoder = with_input(small_encoder(), 16)
    with pytest.raises(ValueError, match="contradict"): encode(encoder, spotted(), size=16, tta=(16, 20))
    with pytest.raises(ValueError, match="levels=2 needs"): encode(encoder, spotted(), levels=2)
    for whiten in ("yes", 1.5, spotted(), "true"):
        with pytest.raises(ValueError, match="whiten must be True"): encode(encoder, spotted(), whiten=whiten)


def test_an_encoder_of_one_size_refuses_others_in_words():
    vit = create_encoder("timm/test_vit3", pretrained=False, size=32, pool_type="avg").eval()
    vit.clean_pipeline = restore_input({"size": [32, 32]})
    x = torch.rand(2, 3, 32, 32)
    assert encode(vit, x, tta=("flip", "crops"))[0].shape == encode(vit, x)[0].shape
    for kwargs in (dict(tta="sizes"), dict(tta=48), dict(size=48)):
        with pytest.raises(ValueError, match=r"trained at 32x32 pixels, and fails at (40|48)x"):
            encode(vit, x, **kwargs)
    flat = with_input(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), 16)
    with pytest.raises(ValueError, match="which have no mean"): encode(flat, spotted(), tta="sizes")


@pytest.fixture
def stages():
    "A small ResNet that expects images of 32 pixels"
    encoder = create_encoder("timm/test_resnet", pretrained=False, n_in=1, pool_type="avg").train()
    encoder(spotted(64, 32))   # moves the statistics off 0 and 1
    return with_input(encoder, 32)


OPTIONS = dict(size=None, tta=("flip", 32, 40), levels=2)


def test_both_sets_go_through_one_whitening_of_the_first(stages):
    x, query = spotted(150, 32), spotted(9, 32, seed=1)
    plain, plain_query = (encode(stages, images, **OPTIONS)[0].double().numpy() for images in (x, query))
    h, y = encode(stages, (x, torch.arange(150)), whiten="fit", **OPTIONS)
    mean = plain.mean(0)
    values, vectors = np.linalg.eigh((plain - mean).T @ (plain - mean)/150)
    matrix = vectors @ np.diag(np.maximum(values, .01*values.mean())**-.5) @ vectors.T
    assert y.tolist() == list(range(150)) and h.dtype == torch.float32
    for got, rows in ((h, plain), (encode(stages, query, whiten=True)[0], plain_query)):
        np.testing.assert_allclose(got.numpy(), (rows - mean) @ matrix, atol=5e-3*np.abs(matrix).max()*rows.std())
    assert torch.equal(encode(stages, query, whiten=True, **OPTIONS)[0], encode(stages, query, whiten=True)[0])
    assert not np.allclose(encode(stages, query)[0].shape, plain_query.shape)   # without whiten= it is a single view


def test_a_second_whitening_is_refused_where_it_would_be_mixed_with_the_first(stages):
    x, others = spotted(150, 32), spotted(150, 32, seed=1)
    with pytest.raises(ValueError, match="remembers no whitening"): encode(stages, x, whiten=True)
    h = encode(stages, x, whiten="fit")[0]
    kept = stages.whitening
    assert torch.equal(encode(stages, tensor_dls(x, bs=64, valid_pct=0, device="cpu").train, whiten="fit")[0], h)
    assert stages.whitening is kept                               # the same images again change nothing
    for kwargs in (dict(), dict(tta="flip")):
        with pytest.raises(ValueError, match="fitted on 150 images.* cannot be compared.*whitening = None"):
            encode(stages, others, whiten="fit", **kwargs)
    with pytest.raises(ValueError, match="cannot be compared"): encode(stages, x[:-1], whiten="fit")
    for kwargs, words in ((dict(tta="flip"), "tta="), (dict(levels=2), "levels=2"), (dict(size=40), r"size=\[40")):
        with pytest.raises(ValueError, match=f"{words}.* is not what the whitening was fitted with"):
            encode(stages, x, whiten=True, **kwargs)
    assert torch.equal(encode(stages, x, whiten=True, size=32, tta=(), levels=1)[0], h)
    stages.whitening = None
    encode(stages, others, whiten="fit")
    assert not torch.allclose(stages.whitening.mean, kept.mean)
    assert torch.equal(encode(stages, x, whiten=kept)[0], h)      # an object says which one


def test_a_whitening_does_not_outlive_the_weights(stages, make_learner):
    x = spotted(150, 32)
    encode(stages, x, whiten="fit")
    other = copy.deepcopy(stages)
    assert torch.equal(encode(other, x, whiten=True)[0], encode(stages, x, whiten=True)[0])
    opt = torch.optim.SGD(stages.parameters(), 1e-2)
    stages.train()(x[:32]).square().sum().backward()
    opt.step()
    stages.eval()
    for whiten, encoder in ((True, stages), (other.whitening, stages)):
        with pytest.raises(ValueError, match="fitted on representations of other weights"):
            encode(encoder, x, whiten=whiten)
    assert encode(stages, x, whiten="fit")[0].isfinite().all()    # fitted again: the old one could not be used
    encode(stages, x, whiten=True)


def test_whitening_through_a_learner_and_in_half_precision(make_learner, make_dls):
    learn = make_learner(make_dls(n=48, size=16))
    learn.fit(1)
    h = encode(learn, learn.dls.train, whiten="fit")[0]
    encoder = learn.model.encoder
    assert torch.equal(encode(encoder, learn.dls.train, whiten=True)[0], h)
    compiled = torch.compile(encoder, backend="eager")
    assert torch.allclose(encode(compiled, learn.dls.train, whiten=True)[0], h, atol=1e-4)
    half = copy.deepcopy(encoder).half()
    assert (encode(half, learn.dls.train, whiten=True)[0] - h).abs().max() < .2*h.abs().max()
    learn.fit(1)
    with pytest.raises(ValueError, match="was trained since"): encode(learn, learn.dls.train, whiten=True)


def test_options_change_no_random_state_no_mode_and_no_hooks(stages):
    stages.train()
    state = torch.get_rng_state()
    a, b = (encode(stages, spotted(150, 32), levels=3, tta=("flip", "crops"), whiten="fit")[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), state) and stages.training
    assert not any(m._forward_hooks for m in stages.modules())
    torch.testing.assert_close(encode(stages, spotted(150, 32)[:7], whiten=True)[0], a[:7], rtol=1e-3, atol=1e-3)


def test_rows_of_an_encoder_that_diverged_are_refused(stages):
    with torch.no_grad(): stages.bn1.running_mean[0] = torch.nan
    with pytest.raises(ValueError, match="20 row.s. that are not finite"): encode(stages, spotted(20, 32), whiten="fit")


def test_every_way_of_encoding_has_its_row(stages):
    x, test = spotted(150, 32), spotted(9, 32, seed=1)
    rows, y, y_test = processed_rows(stages, (x, torch.arange(150)), (test, torch.arange(9)))
    assert list(rows) == ["single view", "whitened", "flips averaged", "both"]
    assert (len(y), len(y_test)) == (150, 9) and getattr(stages, "whitening", None) is None
    for name, tta in (("whitened", None), ("both", "flip")):
        stages.whitening = None
        assert torch.equal(rows[name][0], encode(stages, x, tta=tta, whiten="fit")[0])
        assert torch.equal(rows[name][1], encode(stages, test, whiten=True)[0])
    for name, tta in (("single view", None), ("flips averaged", "flip")):
        assert torch.equal(rows[name][1], encode(stages, test, tta=tta)[0])
