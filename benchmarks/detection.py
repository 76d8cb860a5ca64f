"""Detection of digits on noisy scenes by torchvision's Faster R-CNN, with frozen and trained encoders

COCO's AP on scenes of held-out digits, ten classes: mean ± standard deviation over seeds (of the split, the weights,
the views, the scenes and their order). The last column counts a box as found whatever its class.
"""
import argparse
import time

import pandas as pd
import torch
from _common import machine
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import DisplayedTransform
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import digits_images, hold_out, tensor_dls
from self_supervised_bt.detection import box_ap, detection_backbone, digit_scenes, find_boxes, train_detector
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import bt_learner

# The functions are those of nbs/63_tutorial_detection.ipynb, which a test compares.
STATS = [.15],[.25]   # mean and standard deviation of the scenes


class Noise(DisplayedTransform):
    "Noise of the scenes, on normalised views"
    split_idx,order = 0,100
    def encodes(self, x:TensorImage): return x + torch.randn_like(x)

def barlow_twins_learner(x, size=24):
    augs = get_barlow_twins_aug_pipelines(size, recipe="digits", stats=STATS, xtra_tfms=[Noise()])
    return bt_learner(tensor_dls(x, bs=128), size=size, aug_pipelines=augs, recipe="digits")

def faster_rcnn(encoder, trainable_layers=0, classes=10):
    "A small detector for scenes of 64 pixels"
    backbone = detection_backbone(encoder, ["layer1", "layer2", "layer3"], 64, trainable_layers,
                                  freeze_bn=trainable_layers == 0, extra=None, stats=STATS)
    few = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
               rpn_post_nms_top_n_test=100, box_batch_size_per_image=64)
    return FasterRCNN(backbone, rpn_anchor_generator=backbone.anchors(4),
                      box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2), box_head=TwoMLPHead(64*5*5, 128),
                      box_predictor=FastRCNNPredictor(128, classes + 1),
                      **backbone.input_options(min_size=64, max_size=64), **few)


def compare(seed, epochs, steps):
    "AP by encoder, and CPU seconds"
    x, y, x_test, y_test = hold_out(*digits_images(), n_test=397, seed=seed)
    scenes, targets = digit_scenes(x, y, seed=seed)
    test_scenes, test_targets = digit_scenes(x_test, y_test, seed=seed + 1000)
    set_seed(seed)
    random = create_encoder("timm/test_resnet", n_in=1, pretrained=False)
    start = time.process_time()
    learn = barlow_twins_learner(x)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 2e-2)
    print(f"seed {seed}: Barlow Twins, {time.process_time() - start:.0f} CPU s", flush=True)
    rows = {"frozen random": (random, 0), "frozen Barlow Twins": (learn.model.encoder, 0),
            "trained from scratch": (random, 3), "Barlow Twins, fine-tuned": (learn.model.encoder, 3)}
    table = {}
    for name, (encoder, trainable_layers) in rows.items():
        set_seed(seed)
        start = time.process_time()
        detector = faster_rcnn(encoder, trainable_layers)
        train_detector(detector, scenes, targets, steps, seed=seed)
        found = find_boxes(detector, test_scenes)
        any_class = box_ap(found, test_targets, agnostic=True)["AP50"]
        table[name] = {**box_ap(found, test_targets), "AP50, any class": any_class}
        print(f"  {name}: {table[name]['AP50']:.1f} AP50, {time.process_time() - start:.0f} CPU s", flush=True)
    return pd.DataFrame(table).T


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=40, help="of Barlow Twins")
parser.add_argument("--steps", type=int, default=150, help="of each detector")
args = parser.parse_args()
print(machine("torchvision", "fastai", "timm", "pycocotools"))
tables = pd.concat([compare(seed, args.epochs, args.steps) for seed in range(args.seeds)], keys=range(args.seeds))
by_row = tables.groupby(level=1, sort=False)
print((by_row.mean().map("{:.1f}".format) + " ± " + by_row.std().map("{:.1f}".format)).to_string())
