"""Detection of digits on noisy canvases by torchvision's Faster R-CNN, with four encoders: AP of COCO on other digits

Mean ± standard deviation over seeds (of split, weights, views, scenes and order).
"""
import argparse
import time

import pandas as pd
import torch
from _common import machine
from fastai.torch_core import set_seed
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from self_supervised_bt.augmentations import get_barlow_twins_aug_pipelines
from self_supervised_bt.data import digits_images, hold_out, tensor_dls
from self_supervised_bt.detection import box_ap, detection_backbone, digit_scenes, find_boxes, train_detector
from self_supervised_bt.layers import create_encoder
from self_supervised_bt.recipes import bt_learner


def pretrained(x, epochs, size):
    "An encoder, trained by Barlow Twins on single digits without labels"
    augs = get_barlow_twins_aug_pipelines(size, recipe="digits", stats=([.15], [.25]))
    encoder = create_encoder("timm/test_resnet", n_in=1, pretrained=False)
    learn = bt_learner(tensor_dls(x, bs=128), encoder, size=size, aug_pipelines=augs, recipe="digits")
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 2e-2)
    return learn.model.encoder


def faster_rcnn(encoder, trainable_layers, classes=1):
    "A small detector for scenes of 64 pixels"
    backbone = detection_backbone(encoder, ["layer1", "layer2", "layer3"], 64, trainable_layers,
                                  freeze_bn=trainable_layers == 0, extra=None, stats=([.15], [.25]))
    fewer = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
                 rpn_post_nms_top_n_test=100, box_batch_size_per_image=64)   # scenes are small
    return FasterRCNN(backbone, rpn_anchor_generator=backbone.anchors(4),
                      box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2), box_head=TwoMLPHead(64*5*5, 128),
                      box_predictor=FastRCNNPredictor(128, classes + 1),
                      **backbone.input_options(min_size=64, max_size=64), **fewer)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=20, help="of the pretraining")
parser.add_argument("--steps", type=int, default=150, help="of the training of a detector")
parser.add_argument("--size", type=int, default=32, help="of the views, pixels")
parser.add_argument("--rows", type=int, default=4)
args = parser.parse_args()
x, y = digits_images()
for seed in range(args.seeds):
    x_train, y_train, x_test, y_test = hold_out(x, y, n_test=397, seed=seed)
    scenes, targets = digit_scenes(x_train, y_train, 200, seed=seed)
    test_scenes, test_targets = digit_scenes(x_test, y_test, 200, seed=seed + 1000)
    set_seed(seed)
    start = time.process_time()
    random = create_encoder("timm/test_resnet", n_in=1, pretrained=False)
    trained = pretrained(x_train, args.epochs, args.size)
    print(seed, "pretraining", time.process_time() - start, flush=True)
    for name, encoder, layers in (("frozen random", random, 0), ("frozen BT", trained, 0), ("scratch", random, 3), ("finetuned", trained, 3))[:args.rows]:
        set_seed(seed)
        for t in targets + test_targets: t["labels"] = torch.ones_like(t["labels"])
        start = time.process_time()
        detector = faster_rcnn(encoder, layers)
        train_detector(detector, scenes, targets, args.steps, seed=seed)
        print(seed, name, box_ap(find_boxes(detector, test_scenes), test_targets), time.process_time() - start, flush=True)
