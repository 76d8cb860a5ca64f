"The well-known example page, line for line, on small images made on the spot"
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def tiny_mnist(tmp_path):
    "train/ and valid/, one folder per digit, 28x28 grey PNGs"
    for i, (im, label) in enumerate(zip(load_digits().images[:120], load_digits().target)):
        f = tmp_path/("train" if i < 90 else "valid")/str(label)/f"{i}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((im*15).astype(np.uint8)).resize((28, 28)).save(f)
    return tmp_path


def test_the_page(tiny_mnist, capsys):
    from fastai.vision.all import (
        Categorize,
        Datasets,
        GrandparentSplitter,
        IntToFloatTensor,
        Learner,
        PILImageBW,
        ShortEpochCallback,
        ToTensor,
        get_image_files,
        parent_label,
    )

    from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
    from self_supervised_bt.barlow_twins import BarlowTwins, create_barlow_twins_model
    from self_supervised_bt.layers import PoolingType, create_encoder

    encoder = create_encoder("tf_efficientnet_b0_ns", n_in=3, pretrained=False, pool_type=PoolingType.CatAvgMax)
    model = create_barlow_twins_model(encoder, hidden_size=2048, projection_size=128, nlayers=2)
    out = model(torch.randn((2, 3, 224, 224)))
    assert out.shape == (2, 128)

    aug_pipelines = get_barlow_twins_aug_pipelines(size=28, rotate=False, jitter=False, bw=False, blur=False,
                                                   stats=None, cuda=False)
    assert str(aug_pipelines) == ("[Pipeline: RandomResizedCrop -> RandomHorizontalFlip, "
                                  "Pipeline: RandomResizedCrop -> RandomHorizontalFlip]")

    items = get_image_files(tiny_mnist)
    tds = Datasets(items, [PILImageBW.create, [parent_label, Categorize()]], splits=GrandparentSplitter()(items))
    dls = tds.dataloaders(bs=5, after_item=[ToTensor(), IntToFloatTensor()], device="cpu")

    fastai_encoder = create_encoder("xresnet18", n_in=1, pretrained=False)
    model = create_barlow_twins_model(fastai_encoder, hidden_size=1024, projection_size=1024)
    aug_pipelines = get_barlow_twins_aug_pipelines(size=28, rotate=False, jitter=False, bw=False, blur=False,
                                                   stats=None, cuda=False)
    learn = Learner(dls, model, cbs=[BarlowTwins(aug_pipelines, print_augs=True), ShortEpochCallback(0.001)])
    assert capsys.readouterr().out == "Pipeline: RandomResizedCrop -> RandomHorizontalFlip\n"*2

    b = dls.one_batch()
    learn._split(b)
    learn("before_batch")
    axes = learn.barlow_twins.show(n=5)
    assert len(axes) == 10

    learn.fit(1)
    losses = learn.recorder.losses
    assert len(losses) == 1 and losses[0].isfinite() and losses[0] > 100


def test_the_six_lines_on_images_without_labels(tiny_mnist):
    from fastai.vision.all import DataBlock, ImageBlock, Learner, PILImageBW, Resize, get_image_files

    from self_supervised_bt.all import (
        BarlowTwins,
        create_barlow_twins_model,
        create_encoder,
        encode,
        get_barlow_twins_aug_pipelines,
    )
    block = DataBlock(blocks=(ImageBlock(PILImageBW),), get_items=get_image_files, item_tfms=Resize(28))
    dls = block.dataloaders(tiny_mnist, bs=16, device="cpu", num_workers=0)

    encoder = create_encoder("xresnet18", n_in=1, pretrained=False)
    model = create_barlow_twins_model(encoder, hidden_size=1024, projection_size=1024)
    augs = get_barlow_twins_aug_pipelines(size=28, stats=None)
    learn = Learner(dls, model, cbs=[BarlowTwins(augs)])
    before = encoder[0][0].weight.clone()
    learn.barlow_twins.show(n=5)
    learn.fit(1)

    assert not torch.equal(before, encoder[0][0].weight)
    assert len(encode(learn, dls.valid)[0]) == len(dls.valid_ds)
