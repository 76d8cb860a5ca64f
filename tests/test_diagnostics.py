"Diagnostics: numbers against their definitions, plots from tensors, columns and figures in their loggers"
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from callbacks import KillAfter, Killed, RaiseAt
from conftest import quiet, small_model
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastai.torch_core import set_seed

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins
from self_supervised_bt.checkpoints import Checkpoints
from self_supervised_bt.diagnostics import (
    PALETTE,
    Diagnostics,
    ImageLogger,
    dead_dimensions,
    expected_losses,
    map_2d,
    plot_cross_correlation,
    plot_losses,
    plot_map,
    plot_neighbours,
    plot_spectrum,
    plot_std,
    plot_terms,
)
from self_supervised_bt.evaluation import effective_rank, singular_values
from self_supervised_bt.losses import barlow_twins_loss
from self_supervised_bt.mixed import MixedBarlowTwins


def test_expected_losses_are_those_of_random_batches():
    n, d, lmb = 32, 16, .1
    independent, identical = expected_losses(n, d, lmb)
    pairs = [(torch.randn(n, d), torch.randn(n, d)) for _ in range(400)]
    assert np.mean([float(barlow_twins_loss(a, b, lmb)) for a, b in pairs]) == pytest.approx(independent, rel=.02)
    assert np.mean([float(barlow_twins_loss(a, a, lmb)) for a, _ in pairs]) == pytest.approx(identical, rel=.02)


def test_plots_take_tensors_and_return_axes():
    ax = plot_cross_correlation(torch.eye(300))
    assert ax.get_title() == "diagonal 1.00, rest 0.00 (RMS)"
    assert ax.get_images()[0].get_array().shape == (128, 128)
    ax = plot_losses([3., 2., 1.], (4., .5))
    assert ax.get_yscale() == "log" and ax.yaxis.get_major_formatter()(100.) == "100"
    assert [(t.get_text(), t.xy[1]) for t in ax.texts] == [
        ("independent views", 4.), ("identical views, random batch", .5)]
    assert len(plot_neighbours(torch.rand(2, 3, 8, 8), torch.rand(2, 4, 3, 8, 8))) == 10
    ax = plot_spectrum({"h": singular_values(torch.randn(40, 6)), "z": singular_values(torch.randn(40, 9))})
    assert len(ax.lines) == 2 and "of 9" in ax.get_legend().get_texts()[1].get_text()
    assert plot_std(torch.tensor([1., .5, 0., 1e-9])).get_title() == "2 of 4 dimensions dead"
    assert len(plot_map(torch.randn(30, 2), torch.arange(30) % 3).collections) == 3
    assert len(plot_map(torch.randn(30, 2)).collections) == 1


def test_a_wide_matrix_keeps_its_diagonal():
    shown = plot_cross_correlation(torch.eye(1000), size=50).get_images()[0].get_array()
    assert shown.shape == (50, 50) and np.allclose(shown, np.eye(50))
    block = torch.zeros(1000, 1000)
    block[900:, :100] = 1.   # what is far from the first dimensions is shown, too
    assert plot_cross_correlation(block, size=50).get_images()[0].get_array().sum() > 0


def test_maps():
    h = torch.cat([torch.randn(40, 8), torch.randn(40, 8) + 20])
    xy = map_2d(h)
    assert abs(float(xy[:40, 0].mean() - xy[40:, 0].mean())) > 40 and xy.shape == (80, 2)
    u, s, _ = np.linalg.svd(h.double() - h.double().mean(0), full_matrices=False)
    assert np.allclose(np.abs(xy), np.abs(u[:, :2]*s[:2]), atol=1e-3)
    assert map_2d(h, "tsne").shape == (80, 2)
    with pytest.raises(ValueError, match="pca"): map_2d(h, "mds")
    with pytest.raises(ValueError, match="at least 5"): map_2d(h[:3])
    with pytest.raises(ValueError, match="1 wide"): map_2d(h[:, :1])


def test_tsne_of_wide_representations_keeps_their_neighbours():
    "It works on 50 principal components, which hold all there is to find here"
    h = torch.randn(60, 6) @ torch.randn(6, 200)
    xy = map_2d(h, "tsne", perplexity=10)
    nearest = torch.cdist(h, h).fill_diagonal_(torch.inf).argmin(1)
    found = torch.cdist(xy, xy).fill_diagonal_(torch.inf).topk(5, largest=False)[1]
    assert (found == nearest[:, None]).any(1).float().mean() > .7


# Linear RGB as seen without the cones for long, middle and short waves (Machado et al. 2009, severity 1)
SIGHT = {
    "all": np.eye(3),
    "protanopia": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
    "deuteranopia": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
    "tritanopia": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}
TO_LMS = [[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566],
          [.0883024619, .2817188376, .6299787005]]
TO_OKLAB = [[.2104542553, .7936177850, -.0040720468], [1.9779984951, -2.4285922050, .4505937099],
            [.0259040371, .7827717662, -.8086757660]]


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_stay_apart(sight):
    "Distances in OKLab, where white and black are 1 apart; with protanopia two of matplotlib's ten are .007 apart"
    def nearest(colours):
        rgb = np.array([[int(c[i:i+2], 16)/255 for i in (1, 3, 5)] for c in colours])
        linear = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)
        seen = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
        lab = np.cbrt(seen @ np.transpose(TO_LMS)) @ np.transpose(TO_OKLAB)
        return np.linalg.norm(lab[:, None] - lab, axis=-1)[~np.eye(len(lab), dtype=bool)].min(), linear
    least, linear = nearest(PALETTE)
    assert least > .1, "two colours look alike"
    luminance = linear @ [.2126, .7152, .0722]
    assert luminance.min() > .09 and luminance.max() < .63, "a colour hardly shows on black or on white"


def test_points_without_a_class_are_grey():
    ax = plot_map(torch.randn(30, 2), torch.arange(30) % 3 - 1, ["cat", "dog"])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["none", "cat", "dog"]
    twelve = plot_map(torch.randn(24, 2), torch.arange(24) % 12).collections
    looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in twelve}
    assert len(looks) == 12, "two classes look alike"
    grey = ax.collections[0].get_facecolor()[0]
    assert grey[0] == grey[1] == grey[2]


def test_umap_is_used_or_asked_for(monkeypatch):
    import sys
    import types
    h = torch.randn(20, 4)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="umap-learn"): map_2d(h, "umap")
    class UMAP:
        def __init__(self, random_state, n_jobs, n_neighbors): self.options = random_state, n_neighbors
        def fit_transform(self, h): return h[:, :2] + self.options
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    for n, seed, given, used in [(20, 0, None, 15), (10, 3, None, 9), (20, 0, 4, 4)]:
        xy = map_2d(h[:n], "umap", seed, n_neighbors=given)
        assert torch.allclose(xy.float(), h[:n, :2] + torch.tensor([seed, used]))


def test_columns_are_the_means_of_what_their_names_say(make_learner, make_dls):
    seen = []
    class Look(Diagnostics):
        def look(self):
            super().look()
            z1, z2 = (z.double().numpy() for z in self.zs)
            a, b = ((z - z.mean(0))/np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
            c = a.T @ b/len(a)
            diagonal, off = c.diagonal(), c[~np.eye(len(c), dtype=bool)]
            grads = [p.grad.double() for p in self.model.parameters() if p.grad is not None]
            seen.append({"invariance": ((1 - diagonal)**2).sum(), "redundancy": (off**2).sum(),
                         "diagonal_mean": diagonal.mean(), "off_diagonal_rms": np.sqrt((off**2).mean()),
                         "embedding_std": np.sort(z1.std(0))[(len(c)-1)//2], "dead_dimensions": 0.,
                         "gradient_norm": math.sqrt(sum(float(g.square().sum()) for g in grads)),
                         "effective_rank_z": effective_rank(self.zs[0])})
    cb = Look(every=2)
    learn = make_learner(make_dls(n=80), cbs=[cb])
    learn.fit(2, 1e-2)
    table, expected = cb.table(), pd.DataFrame(seen)
    assert table.index.tolist() == [0, 2, 4, 5, 7, 9]   # five batches per epoch
    assert set(table.columns) == set(expected.columns)
    names = [name for name in expected if name != "effective_rank_z"]   # which is that of an epoch
    assert np.allclose(table[names], expected[names], rtol=1e-4)
    last = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    for name in names: assert last[name] == pytest.approx(expected[name][3:].mean(), rel=1e-4)
    assert last["effective_rank_z"] == pytest.approx(seen[-1]["effective_rank_z"], rel=1e-4)
    assert not learn.metrics
    learn.lr_find(num_it=20, show_plot=False)
    learn.get_preds(ds_idx=1)


def test_no_column_comes_twice(make_learner):
    learn = make_learner(cbs=[Diagnostics()])
    learn.barlow_twins.terms = True
    learn.fit(1, 1e-3)
    assert len(set(learn.recorder.metric_names)) == len(learn.recorder.metric_names)


def test_columns_may_be_hidden(make_learner):
    learn = make_learner(cbs=[Diagnostics(show=False)])
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "time"]
    assert "effective_rank_z" in learn.diagnostics.table()


def test_the_gradient_norm_is_taken_before_clipping(make_learner):
    learn = make_learner(cbs=[GradientClip(1e-4), Diagnostics()])
    learn.fit(1, 1e-3)
    assert learn.diagnostics.rows[0]["gradient_norm"] > 1
    assert MixedPrecision.order < Diagnostics.order < GradientClip.order


def test_no_step_waits_for_the_device(make_learner, monkeypatch):
    "What the callback does in a step must not read a value off the device"
    class Watched(Diagnostics):
        def look(self):
            read = []
            for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
                monkeypatch.setattr(torch.Tensor, name, lambda t, *a, n=name, **k: read.append(n))
            super().look()
            monkeypatch.undo()
            assert not read, read
    make_learner(cbs=[Watched(every=1)]).fit(1, 1e-3)


def test_an_epoch_that_was_resumed_has_all_its_numbers(make_learner, make_dls, tmp_path):
    "A run that ends within an epoch, after its only measurement, and goes on from there"
    def learner(name, *cbs, resume=False):
        set_seed(0)
        checkpoints = Checkpoints(tmp_path/name, every=1, resume=resume)
        return make_learner(make_dls(n=96, bs=16), cbs=[Diagnostics(every=4), checkpoints, *cbs])
    whole = learner("whole")
    whole.fit(3, 1e-3)
    with pytest.raises(Killed): learner("killed", KillAfter(9)).fit(3, 1e-3)
    resumed = learner("killed", resume=True)
    resumed.fit(3, 1e-3)
    pd.testing.assert_frame_equal(whole.diagnostics.table(), resumed.diagnostics.table())
    assert list(whole.recorder.values) == list(resumed.recorder.values)


def test_one_dimension_that_is_5000_times_larger_makes_no_other_dead():
    z = torch.randn(100, 64)
    z[:, 3] *= 5000
    assert int(dead_dimensions(z.std(0))) == 0


def test_dead_dimensions_are_counted():
    z = torch.randn(64, 10)*torch.tensor([1.]*7 + [0., 1e-6, 5e-4])
    assert int(dead_dimensions(z.std(0))) == 3 and int(dead_dimensions(torch.zeros(5))) == 5


def test_columns_and_figures_reach_tensorboard(make_learner, tmp_path):
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tensorboard = TensorBoardCallback(tmp_path, trace_model=False)   # log_preds=True
    learn = make_learner(cbs=[Diagnostics(), ImageLogger(every=2), tensorboard])
    learn.fit(4, 1e-3)
    assert tensorboard.log_preds   # off in the fit alone: there are no labels
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"train_loss", "invariance", "effective_rank_z", "gradient_norm"} <= set(events.Tags()["scalars"])
    logged = [e.value for e in events.Scalars("invariance")]
    assert logged == pytest.approx([v[2] for v in learn.recorder.values], rel=1e-5)
    for name in ("views", "cross_correlation"):
        images = events.Images(name)
        assert len(images) == 3   # epochs 0, 2 and the last
        assert images[0].encoded_image_string.startswith(b"\x89PNG") and images[0].width > 100


def test_figures_reach_weights_and_biases(make_learner, monkeypatch):
    sent = []
    wandb = SimpleNamespace(Image=lambda f: f, log=lambda d, step: sent.append((d, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    class LikeWandb(Callback):
        _wandb_step = 7
    make_learner(cbs=[ImageLogger(), LikeWandb()]).fit(1, 1e-3)
    assert [list(d) for d, _ in sent] == [["views"], ["cross_correlation"]] and sent[0][1] == 7


def test_weights_and_biases_reads_the_settings_of_every_callback(make_learner, monkeypatch):
    "fastai's own callback, which asks numbers and texts for attributes"
    settings, logged = {}, []
    wandb = ModuleType("wandb")
    wandb.run = SimpleNamespace(step=0, summary={})
    wandb.config = SimpleNamespace(update=lambda d, **_: settings.update(d))
    wandb.log = lambda d, **_: logged.append(d)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delitem(sys.modules, "fastai.callback.wandb", raising=False)
    from fastai.callback.wandb import WandbCallback
    logger = WandbCallback()   # log_preds=True
    make_learner(cbs=[Diagnostics(every=2), logger]).fit(1, 1e-3)
    assert settings["Diagnostics"]["every"] == 2 and any("invariance" in d for d in logged) and logger.log_preds


@pytest.mark.parametrize("callback", [BarlowTwins, MixedBarlowTwins])
def test_logged_figures_change_nothing(make_dls, callback):
    "Not even where a figure samples a mixture: neither in this step nor in the next"
    weights = []
    for logger in ([], [ImageLogger()]):
        set_seed(0)
        cb = callback(get_multi_aug_pipelines(2, 8, stats=None))
        learn = quiet(Learner(make_dls(), small_model(), cbs=[cb, *logger]))
        learn.fit(2, 1e-2)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("make", [Diagnostics, ImageLogger])
def test_a_search_that_is_interrupted_does_not_switch_it_off(make_learner, make):
    cb = make()
    stop = RaiseAt("after_step", KeyboardInterrupt())
    learn = make_learner(cbs=[cb])
    with learn.added_cbs(stop), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=5, show_plot=False)
    assert cb.run


def test_bad_input(make_learner, make_dls):
    with pytest.raises(ValueError, match="square"): plot_cross_correlation(torch.rand(2, 3))
    with pytest.raises(ValueError, match="every"): Diagnostics(every=0)
    with pytest.raises(ValueError, match="every"): ImageLogger(every=.5)
    for cb in (Diagnostics(), ImageLogger()):
        learn = Learner(make_dls(), small_model(), loss_func=lambda z, y: z.mean(), cbs=[cb])
        with pytest.raises(ValueError, match="no such callback"): learn.fit(1)


SQUARE = torch.eye(3)


@pytest.mark.parametrize("call, words", [
    (lambda: expected_losses(1, 8, .1), "n must be at least 2, got 1"),
    (lambda: expected_losses(8, 0, .1), "d must be a positive int, got 0"),
    (lambda: expected_losses(8, 8, math.nan), "lmb must be a finite number"),
    (lambda: plot_losses([]), "losses is empty.* learn.recorder.losses"),
    (lambda: plot_losses(["a"]), r"losses must be numbers, got \['a'\]"),
    (lambda: plot_losses(3), "losses must be numbers, got 3"),
    (lambda: plot_cross_correlation("x"), "c must be a tensor .D,D., got a str: cross_correlation"),
    (lambda: plot_std(SQUARE), r"std must be a tensor \(D,\), got \(3, 3\): z.std"),
    (lambda: plot_spectrum([SQUARE]), "spectra must be a dict of names"),
    (lambda: plot_spectrum({"h": SQUARE}), r"spectra\['h'\] must be a tensor \(K,\), got \(3, 3\)"),
    (lambda: plot_neighbours(SQUARE, SQUARE), r"queries must be a tensor \(N,C,H,W\), got \(3, 3\)"),
    (lambda: plot_neighbours(torch.rand(2, 3, 8, 8), torch.rand(3, 4, 3, 8, 8)), r"neighbours .*\(2,n,C,H,W\)"),
    (lambda: map_2d([1., 2.]), r"h must be representations \(N,F\), .*got list: encode\(model, data\)"),
    (lambda: map_2d(torch.full((9, 3), math.nan)), r"h has 9 row\(s\) that are not finite"),
    (lambda: plot_map(SQUARE), r"xy must be a tensor \(N,2\), got \(3, 3\): map_2d"),
    (lambda: plot_map(torch.rand(4, 2), torch.arange(3)), "xy has 4 rows and 3 labels"),
    (lambda: plot_map(torch.rand(3, 2), torch.arange(3), ["a", "b"]), "names has 2 classes, and y has class 2"),
    (lambda: plot_terms(pd.DataFrame({"redundancy": [1.]})), "table has no column diagonal_mean and no inv")])
def test_what_cannot_be_plotted_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_classes_of_a_map_may_be_a_list():
    assert len(plot_map(torch.rand(4, 2), [0, 1, 1, -1], ["a", "b"]).collections) == 3
