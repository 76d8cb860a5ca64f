"Small real inputs, made on the spot"
import gc
import signal
import threading
from contextlib import contextmanager
from functools import cache
from http.server import ThreadingHTTPServer

import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, defaults
from fastai.torch_core import TensorImage, set_seed
from PIL import Image
from torch import nn

from self_supervised_bt.augmentations import get_multi_aug_pipelines
from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
from self_supervised_bt.data import digits_images
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.weights import save_encoder

matplotlib.use("Agg")
# The first backward pass counts the devices. After torch.export or torch.compile it would also count a GPU that is not
# there and start threads for it, and processes with such threads cannot be forked into ranks.
torch.ones((), requires_grad=True).backward()
# A shell without job control lets its background jobs ignore Ctrl-C, which some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
if ProgressCallback in defaults.callbacks: defaults.callbacks.remove(ProgressCallback)


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from one random state"
    set_seed(0)


@cache
def all_digits(): return digits_images()   # scikit-learn parses a file every time


def image_items(n=48, labels=True, size=8, channels=1):
    "Handwritten digits as (image, label) or (image,) items"
    x, y = all_digits()
    x = nn.functional.interpolate(x[:n].float()/255, size=size).expand(-1, channels, -1, -1)
    return [(TensorImage(im), int(l)) if labels else (TensorImage(im),) for im, l in zip(x, y)]


@pytest.fixture
def make_dls():
    "Digits as `DataLoaders`; the first `n_valid` are validated as well"
    def make(n=48, labels=True, bs=16, n_valid=20, size=8, channels=1, **kwargs):
        items = image_items(n, labels, size, channels)
        return DataLoaders.from_dsets(items, items[:n_valid], bs=bs, device="cpu", num_workers=0, **kwargs)
    return make


def collate(items):
    "Labelled items as a batch of plain tensors, for PyTorch's `DataLoader`"
    x, y = zip(*items)
    return torch.stack([o.as_subclass(torch.Tensor) for o in x]), torch.tensor(y)


def small_encoder(channels=1):
    "One convolution, whose 8 channels are averaged over the image"
    convolution = [nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_model(channels=1, width=16, hidden=32):
    "`small_encoder`, and a projector of embeddings of `width`"
    return create_barlow_twins_model(small_encoder(channels), hidden, width)


def quiet(learn):
    "The Learner, which prints nothing from now on"
    learn.logger = lambda *_: None
    return learn


def weights(learn):
    "A copy of the weights and buffers of a Learner, by name"
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b):
    "Do two dicts hold the same tensors?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def make_learner(make_dls):
    "A silent Learner with `BarlowTwins`"
    def make(dls=None, model=None, stats=None, size=8, lmb=5e-3, cbs=(), views=2, backend="fused", **kwargs):
        augs = get_multi_aug_pipelines(views, size, stats=stats, backend=backend)
        cbs = [BarlowTwins(augs, lmb=lmb), *cbs]
        return quiet(Learner(dls or make_dls(), model or small_model(), cbs=cbs, **kwargs))
    return make


def class_pictures(folder, n=40, seed=0, cells=4, side=8):
    "Small pictures in two class folders, each of `cells` x `cells` squares; returns the folder"
    rng = np.random.default_rng(seed)
    for i in range(n):
        f = folder/("dark" if i % 2 else "light")/f"{i:02}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(rng.integers(0, 128, (cells, cells, 3)), np.ones((side, side, 1))) + (0 if i % 2 else 127)
        Image.fromarray(pixels.astype(np.uint8)).save(f)
    return folder


@pytest.fixture
def folder(tmp_path):
    "40 small pictures in two class folders"
    return class_pictures(tmp_path/"pictures")


@contextmanager
def serving(handler):
    "A web server on this machine, and its address"
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    "The file of a small encoder"
    torch.manual_seed(0)
    encoder = create_encoder("timm/test_resnet", pretrained=False, pool_type="avg")
    return save_encoder(encoder, tmp_path_factory.mktemp("good")/"encoder.safetensors")


def same_output(a, b, size=32):
    "Do two encoders give the same for some images?"
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(): return torch.equal(a.eval()(x), b.eval()(x))


@pytest.fixture
def quick_end(monkeypatch):
    "Worker processes of a loader that ended in an error are noticed at once: PyTorch waits 5 seconds for each"
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", .1)
    yield
    gc.collect()
