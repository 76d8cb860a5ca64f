"Images in, weights out"
import os

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.core import imagenet_stats
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.recipes import bt_learner
from self_supervised_bt.checkpoints import load_encoder, save_encoder
from self_supervised_bt.data import digits, digits_dls, folder_labels, image_files, load_images, tensor_dls, train_test_split
from self_supervised_bt.evaluation import encode


def test_digits_are_scikit_learns():
    x, y = digits()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.uint8
    assert np.abs(x[:, 0].numpy()/255 - load_digits().images/16).max() < 1/255 and (y.numpy() == load_digits().target).all()


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("c", [1, 3])
def test_tensor_dls_give_floats_in_the_unit_range(as_float, c):
    x = torch.randint(0, 256, (70, c, 8, 8), dtype=torch.uint8)
    dls = tensor_dls(x/255 if as_float else x, torch.arange(70), bs=16, valid_pct=.3, device="cpu")
    xb, yb = dls.one_batch()
    assert type(xb) is (TensorImageBW if c == 1 else TensorImage)
    assert torch.allclose(xb.as_subclass(torch.Tensor), x[yb].float()/255)
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (49, 21, 3, 2)
    assert torch.cat([y for _, y in dls.valid]).tolist() == dls.valid_ds.y.tolist()
    both = torch.cat([dls.train_ds.y, dls.valid_ds.y])
    assert both.sort()[0].tolist() == list(range(70))
    first, second = (torch.cat([y for _, y in dls.train]).tolist() for _ in range(2))
    assert first != second and len(set(first)) == 48


def test_digits_dls_hold_images_alone():
    assert len(digits_dls(device="cpu").one_batch()) == 1 and len(digits_dls(labels=True, device="cpu").one_batch()) == 2


def test_split_is_whole_and_repeatable():
    x, y = digits()
    a, b = train_test_split(x, y, 300, seed=1), train_test_split(x, y, 300, seed=1)
    assert all(torch.equal(i, j) for i, j in zip(a, b)) and (len(a[0]), len(a[2])) == (1497, 300)
    assert torch.equal(torch.cat([a[1], a[3]]).bincount(), y.bincount())
    assert train_test_split(x, None, 300)[1] is None


def test_folder(folder):
    files = image_files(folder)
    x = load_images(files, 16, progress=False)
    assert x.shape == (40, 3, 16, 16) and x.dtype == torch.uint8
    y, classes = folder_labels(files)
    assert classes == ["dark", "light"] and y.bincount().tolist() == [20, 20]
    assert x[y == 0].float().mean() < 80 < 170 < x[y == 1].float().mean()        # rows and files belong together


def test_images_are_read_upright_square_and_in_the_mode_asked_for(tmp_path):
    left = np.zeros((20, 40, 3), dtype=np.uint8); left[:, :20] = 255
    exif = Image.Exif(); exif[0x0112] = 6                                        # shown turned by 90 degrees
    Image.fromarray(left).save(tmp_path/"turned.jpg", exif=exif, quality=95)
    Image.fromarray(left).convert("P").save(tmp_path/"palette.png")
    Image.fromarray(left).convert("CMYK").save(tmp_path/"print.jpg")
    Image.fromarray(np.dstack([left, left[..., :1]])).save(tmp_path/"alpha.png")
    x = dict(zip([f.name for f in image_files(tmp_path)], load_images(image_files(tmp_path), 16, progress=False)))
    assert x["turned.jpg"][0, :6].float().mean() > 200 and x["turned.jpg"][0, -6:].float().mean() < 50
    for name in ("palette.png", "print.jpg", "alpha.png"):
        assert x[name][0, :, :6].float().mean() > 200 and x[name][0, :, -6:].float().mean() < 50
    assert load_images(image_files(tmp_path), 8, n_in=1, progress=False).shape == (4, 1, 8, 8)


def test_bad_folders_and_tensors(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="not a folder"): image_files(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match=r"0 file\(s\)"): image_files(tmp_path/"empty")
    (tmp_path/"empty/notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"1 file\(s\), none with an image's ending"): image_files(tmp_path/"empty")
    (folder/"dark/broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.jpg cannot be read"): load_images(image_files(folder), 8, progress=False)
    whole = (folder/"light/00.png").read_bytes()
    (folder/"dark/broken.jpg").unlink(); (folder/"dark/cut.png").write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match="cut.png cannot be read"): load_images(image_files(folder), 8, progress=False)
    with pytest.raises(ValueError, match="size must"): load_images([], 0)
    with pytest.raises(ValueError, match="n_in must"): load_images([], 8, n_in=2)
    for args, words in [((torch.rand(5, 8, 8),), "(N,C,H,W)"), ((torch.rand(5, 1, 8, 8), torch.arange(4)), "4 labels for 5 images")]:
        with pytest.raises(ValueError) as e: tensor_dls(*args)
        assert words in str(e.value)
    with pytest.raises(ValueError, match="valid_pct"): tensor_dls(digits()[0], valid_pct=1.)
    with pytest.raises(ValueError, match="n_test"): train_test_split(digits()[0], n_test=0)


# Weights

@pytest.fixture
def trained():
    torch.manual_seed(0)
    learn = bt_learner(digits_dls(bs=64, device="cpu"), "timm/test_resnet", small_stem=False, hidden_size=16, projection_size=16,
                       aug_pipelines=get_barlow_twins_aug_pipelines(16, stats=imagenet_stats))
    learn.logger = print
    learn.fit(1)
    return learn


def test_a_saved_encoder_comes_back_with_its_input(trained, tmp_path):
    x = digits()[0][:40]
    again = load_encoder(save_encoder(trained, tmp_path/"deep/er/e.safetensors"))
    assert torch.allclose(encode(again, x)[0], encode(trained, x)[0], atol=1e-5)
    assert not again.training and os.listdir(tmp_path/"deep/er") == ["e.safetensors"]
    assert load_file(tmp_path/"deep/er/e.safetensors").keys() == trained.model.encoder.state_dict().keys()
    assert torch.allclose(encode(load_encoder(save_encoder(again, tmp_path/"twice")), x)[0], encode(trained, x)[0], atol=1e-5)


def test_a_failed_save_leaves_the_old_file_whole(trained, tmp_path, monkeypatch):
    file = save_encoder(trained, tmp_path/"e.safetensors")
    before = file.read_bytes()
    monkeypatch.setattr("self_supervised_bt.checkpoints.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): save_encoder(trained, file)
    assert file.read_bytes() == before


def test_bad_files(trained, tmp_path):
    with pytest.raises(FileNotFoundError): load_encoder(tmp_path/"nothing")
    (tmp_path/"text").write_text("hello there, this is no tensor file")
    with pytest.raises(ValueError, match="not a safetensors file"): load_encoder(tmp_path/"text")
    save_file({"a": torch.ones(1)}, tmp_path/"other")
    with pytest.raises(ValueError, match="how to use them"): load_encoder(tmp_path/"other")
    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="encoder="): load_encoder(save_encoder(own, tmp_path/"own"))
    assert torch.equal(load_encoder(tmp_path/"own", encoder=own)[0].weight, own[0].weight)
