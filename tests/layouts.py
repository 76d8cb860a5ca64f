"Checkpoint files as other projects write them, made on the spot: the same names and shapes, by classes written here"
import argparse
import collections
import json
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from fastai.layers import AdaptiveConcatPool2d
from fastai.vision.models import xresnet
from fastcore.foundation import L
from safetensors.torch import save_file
from torch import nn


@dataclass
class Made:
    "A file, and what the source's own networks make of images"
    path: Path
    encoder: nn.Module               # images to representations
    keys: int                        # tensors among the weights
    format: str                      # words of the name it must get
    projector: nn.Module = None
    predictor: nn.Module = None
    head: nn.Module = None
    classes: list = None
    ignored: int = 0                 # tensors that must not be used
    stats: tuple = None              # first mean and std
    size: int = None
    call: dict = field(default_factory=dict)   # of what `created_by` must say
    source: str = None               # to be passed


def lived_in(net):
    "With running statistics and weights of norms as if it had been trained"
    for m in net.modules():
        if not isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): continue
        m.running_mean.uniform_(-.2, .2)
        m.running_var.uniform_(.8, 1.2)
        m.num_batches_tracked += 7
        if m.affine:
            nn.init.uniform_(m.weight, .8, 1.2)
            nn.init.uniform_(m.bias, -.2, .2)
    return net.eval()


@cache
def trunk(depth=18, stem=None):
    "A ResNet without classifier; stem: (padding, max-pool) of a 3x3 one"
    net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    net.fc = nn.Identity()
    if stem:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=stem[0], bias=False)
        if not stem[1]: net.maxpool = nn.Identity()
    return lived_in(net)


def mlp(widths, biases=False):
    "Linear, BatchNorm, ReLU, ..., Linear"
    layers = []
    *hidden, last = list(zip(widths, widths[1:]))
    for a, b in hidden: layers += [nn.Linear(a, b, bias=biases is True), nn.BatchNorm1d(b), nn.ReLU()]
    return lived_in(nn.Sequential(*layers, nn.Linear(*last, bias=bool(biases))))


def under(prefix, net): return {f"{prefix}{k}": v for k, v in net.state_dict().items()}


@contextmanager
def importable(**classes):
    "Classes and functions under the full names given, while a file is written; afterwards nobody can import them"
    before = dict(sys.modules)
    try:
        for full, o in classes.items():
            module, _, name = full.rpartition(".")
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
            o.__module__, o.__qualname__, o.__name__ = module, name, name
            setattr(sys.modules[module], name, o)
        yield
    finally:
        for full in classes:
            module, _, name = full.rpartition(".")
            delattr(sys.modules[module], name)
        for module in set(sys.modules) - set(before): del sys.modules[module]


IMAGENET = dict(stats=(.485, .229), size=224)
PROJECTOR = (512, 48, 48, 32)


# facebookresearch/barlowtwins and its relatives

class AuthorsModel(nn.Module):
    "backbone, projector, and the BatchNorm of the loss"
    def __init__(self, biases=False, bn=True):
        super().__init__()
        self.backbone, self.projector = trunk(), mlp(PROJECTOR, biases)
        if bn: self.bn = nn.BatchNorm1d(32, affine=False)


def lars(params, extra):
    group = dict(lr=.2, weight_decay=1e-6, params=[0, 1], **extra)
    return {"state": {0: {"mu": torch.ones(2)}}, "param_groups": [group]}


def authors_full(folder, function=False):
    model, path = AuthorsModel(), folder/"checkpoint.pth"
    def exclude_bias_and_norm(p): return p.ndim == 1
    names = {"__main__.exclude_bias_and_norm": exclude_bias_and_norm} if function else {}
    with importable(**names):
        filters = dict(weight_decay_filter=exclude_bias_and_norm if function else True)
        torch.save({"epoch": 3, "model": under("module.", model), "optimizer": lars(0, filters)}, path)
    return Made(path, model.backbone, len(model.state_dict()), "facebookresearch/barlowtwins, full", model.projector,
                ignored=3, **IMAGENET)


def authors_backbone(folder):
    torch.save(trunk(50).state_dict(), folder/"resnet50.pth")
    return Made(folder/"resnet50.pth", trunk(50), 318, "torchvision", source="facebookresearch/imagenet",
                call=dict(arch="resnet50", pool_type="avg", small_stem=False), **IMAGENET)


def authors_linear(folder):
    head, path = nn.Linear(512, 1000), folder/"checkpoint.pth"
    content = {"epoch": 1, "best_acc": argparse.Namespace(top1=70., top5=90.), "optimizer": {}, "scheduler": {},
               "model": under("module.", trunk()) | under("module.fc.", head)}
    torch.save(content, path)
    classes = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    return Made(path, trunk(), 122, "facebookresearch", head=head, classes=classes, **IMAGENET)


def vicreg_full(folder):
    model, path = AuthorsModel(biases=True, bn=False), folder/"resnet50_fullckpt.pth"
    model.projector[-1].bias = None
    torch.save({"epoch": 1, "model": under("module.", model), "optimizer": {}}, path)
    return Made(path, model.backbone, len(model.state_dict()), "VICReg", model.projector, **IMAGENET)


# wgcban/mix-bt

class Numbered(nn.Module):
    "f without the layers that are left out, g"
    def __init__(self, depth, pool, g=None):
        super().__init__()
        net = trunk(depth, (1, pool))
        kept = [m for m in net.children() if not isinstance(m, (nn.Linear, nn.Identity, nn.AdaptiveAvgPool2d))]
        self.f = nn.Sequential(*kept, nn.AdaptiveAvgPool2d(1))
        if g is not None: self.g = g


def mix_small(folder, depth=18, pool=False, thop=False, classes=None):
    width = 512 if depth == 18 else 2048
    g = nn.Sequential(nn.Linear(width, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 24))
    head = nn.Linear(width, classes) if classes else None
    model, path = Numbered(depth, pool, None if classes else lived_in(g)), folder/"abc_model.pth"
    weights = model.state_dict() | (under("fc.", head) if classes else {})
    n = len(weights)
    if thop:
        blocks = [name for name, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
        for name in ["", *(f"{b}." for b in blocks)]:
            for count in ("total_ops", "total_params"): weights[name + count] = torch.zeros(1, dtype=torch.float64)
    torch.save(weights, path)
    stats = dict(stats=(.43, .27) if pool else (.4914, .2023), size=64 if pool else 32)
    return Made(path, nn.Sequential(model.f, nn.Flatten()), len(weights), "wgcban/mix-bt", getattr(model, "g", None),
                head=head, ignored=len(weights) - n, source="mix-bt/stl10" if pool and not classes else None,
                call=dict(arch=f"resnet{depth}", small_stem="keep pool" if pool else True), **stats)


def mix_imagenet(folder):
    model, path = AuthorsModel(bn=False), folder/"checkpoint.pth"
    torch.save({"epoch": 1, "model": under("module.", model), "optimizer": {}}, path)
    return Made(path, model.backbone, len(model.state_dict()), "mix-bt, ImageNet", model.projector, **IMAGENET)


# OpenMMLab

MM_CONFIG = """data_preprocessor = dict(
    mean=[51.0, 102.0, 153.0],
    std=[
        25.5, 51.0, 76.5
    ], to_rgb=True)
model = dict(mean=[1.0])"""


def mm_pretrain(folder, preprocessor=False, raw=False, config="model = ..."):
    projector, path, bn = mlp(PROJECTOR), folder/"barlowtwins.pth", nn.BatchNorm1d(32, affine=False)
    neck = {"0": "fc0", "1": "bn0", "3": "fc1", "4": "bn1", "6": "fc2"}
    weights = under("backbone.", trunk()) | under("head.bn.", bn)
    for name, t in projector.state_dict().items():
        number, _, rest = name.partition(".")
        weights[f"neck.{neck[number]}.{rest}"] = t
    n = len(weights)
    if preprocessor:
        weights["data_preprocessor.mean"] = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        weights["data_preprocessor.std"] = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    content = {"meta": {"epoch": 300, "cfg": config, "dataset_meta": {}}, "state_dict": weights}
    class HistoryBuffer:
        def __init__(self): self.history, self.methods = np.ones(3), [getattr]
    with importable(**{"mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer}):
        if raw: content |= {"message_hub": {"log": HistoryBuffer()}, "optimizer": {}, "param_schedulers": []}
        torch.save(content, path)
    return Made(path, trunk(), len(weights), "mmselfsup, pre-training", projector, ignored=3 + len(weights) - n,
                **(IMAGENET if config != MM_CONFIG else dict(stats=(.2, .1), size=224)))


def mm_linear(folder, old=False):
    head, path, names = nn.Linear(512, 3), folder/"linear.pth", ["cat", "dog", "eel"]
    meta = {"CLASSES": tuple(names)} if old else {"dataset_meta": {"classes": names}}
    torch.save({"meta": meta, "state_dict": under("backbone.", trunk()) | under("head.fc.", head)}, path)
    return Made(path, trunk(), 122, "mmpretrain or mmcls, classifier", head=head, classes=names, **IMAGENET)


def mm_old_backbone(folder):
    torch.save({"state_dict": trunk().state_dict(), "author": "MMSelfSup"}, folder/"b.pth")
    return Made(folder/"b.pth", trunk(), 120, "mmselfsup 0.x", **IMAGENET)


# Lightning: lightly and solo-learn

class AttributeDict(dict): pass


class DictConfig:
    "Settings that refer to classes of their own and of Python"
    def __init__(self, **content): self.content = content
    def __getstate__(self): return {"_content": self.content, "type": dict, "kinds": (list, int)}


LIGHTNING = {"epoch": 1, "global_step": 5, "pytorch-lightning_version": "2.6", "loops": {}, "callbacks": {},
             "optimizer_states": [], "lr_schedulers": [], "hparams_name": "kwargs"}


def lightly(folder, settings=dict):
    projector, head, path = mlp(PROJECTOR, "last"), nn.Linear(512, 1000), folder/"epoch=99-step=500400.ckpt"
    weights = under("backbone.", trunk()) | under("projection_head.layers.", projector)
    weights |= under("online_classifier.classification_head.", head)
    names = {"lightning_fabric.utilities.data.AttributeDict": AttributeDict,
             "omegaconf.dictconfig.DictConfig": DictConfig}
    with importable(**names):
        content = {"hyper_parameters": settings(batch_size_per_device=8, num_classes=1000), "state_dict": weights}
        content["callbacks"] = {"x": collections.defaultdict(dict, a={})}
        torch.save(LIGHTNING | content, path)
    classes = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    return Made(path, trunk(), len(weights), "lightly", projector, head=head, classes=classes, **IMAGENET)


def solo(folder, dataset="cifar10", prefix="backbone.", args=True, strides=torch.contiguous_format, source=None):
    small = dataset.startswith("cifar")
    net = trunk(18, (2, False) if small else None)
    projector, head, path = mlp(PROJECTOR, True), nn.Linear(512, 10), folder/"bt-x1-ep=999.ckpt"
    weights = under(prefix, net) | under("projector.", projector) | under("classifier.", head)
    weights = {k: v.contiguous(memory_format=strides) if v.ndim == 4 else v for k, v in weights.items()}
    content = LIGHTNING | {"state_dict": weights}
    content.pop("hparams_name")
    settings = {"name": "bt", "method": "barlow_twins", "backbone": {"name": "resnet18", "kwargs": {}},
                "data": {"dataset": dataset, "num_classes": 10}}
    if args: (folder/"args.json").write_text(json.dumps(settings))
    elif source is None: content["hyper_parameters"] = AttributeDict(dataset=dataset)
    with importable(**{"pytorch_lightning.utilities.parsing.AttributeDict": AttributeDict}): torch.save(content, path)
    images = dict(stats=(.4914, .247), size=32) if small else dict(stats=(.4914, .247), size=96)
    return Made(path, net, len(weights), "solo-learn", projector, head=head, source=source,
                call=dict(small_stem="padding 2" if small else False), **images)


# VISSL and MoCo

def vissl(folder, container="consolidated", counters=True):
    projector, path = mlp(PROJECTOR), folder/"barlow_twins.torch"
    features = {k: v for k, v in under("_feature_blocks.", trunk()).items()
                if counters or not k.endswith("num_batches_tracked")}
    heads = {}
    for name, t in projector.state_dict().items():
        number, _, rest = name.partition(".")
        heads[f"{int(number)//3}.clf.{int(number) % 3}.{rest}"] = t
    both = container == "consolidated"
    model = {"model": {"trunk": features, "heads": heads}, "meta": {}}
    content = {"consolidated": {"phase_idx": 1, "iteration": 5, "loss": .1, "type": "consolidated",
                                "classy_state_dict": {"base_model": model, "optimizer": {"optim": {}}}},
               "model_state_dict": {"model_state_dict": features}, "bare": features}[container]
    torch.save(content, path)
    return Made(path, trunk(), len(features) + both*len(heads), "VISSL", projector if both else None, **IMAGENET)


def moco(folder, version=2):
    path = folder/"moco.pth.tar"
    if version == 2:
        fc = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
        weights = under("module.encoder_q.", trunk()) | under("module.encoder_q.fc.", fc)
        weights |= under("module.encoder_k.", trunk())
        weights |= {"module.queue": torch.rand(16, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        predictor, ignored = None, 122
    else:
        fc, predictor = mlp((512, 32, 16)), mlp((16, 32, 16))
        weights = under("module.base_encoder.", trunk()) | under("module.base_encoder.fc.", fc)
        weights |= under("module.base_encoder.fc.4.", nn.BatchNorm1d(16, affine=False))
        weights |= under("module.momentum_encoder.", trunk()) | under("module.predictor.", predictor)
        ignored = 123
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": weights, "optimizer": {}}, path)
    return Made(path, trunk(), len(weights), "MoCo", fc, predictor, ignored=ignored, **IMAGENET)


# KeremTurgutlu/self_supervised, fastai

def fastai_body(arch):
    "The encoder that the library made, whose names depend on where the architecture is from"
    if arch == "timm": return lived_in(timm.create_model("resnet18", num_classes=0, global_pool="catavgmax"))
    if arch == "xresnet": layers = list(xresnet.xresnet18())[:-4]
    else: layers = list(trunk().children())[:-2]
    return lived_in(nn.Sequential(*layers, AdaptiveConcatPool2d(), nn.Flatten()))


def kerem(folder, arch="torchvision", alone=False, optimizer=True):
    encoder, projector, path = fastai_body(arch), mlp((1024, 40, 40, 20), True), folder/"learner.pth"
    if alone: weights = encoder.state_dict()
    else: weights = under("encoder.", encoder) | under("projector.", projector)
    opt = {"state": [{"grad_avg": torch.ones(2), "step": 1}], "hypers": L([{"lr": 1e-3, "wd": .01}])}
    torch.save({"model": weights, "opt": opt} if optimizer and not alone else weights, path)
    names = dict(torchvision="resnet18", xresnet="xresnet18", timm="timm/resnet18")
    return Made(path, encoder, len(weights), "fastai", None if alone else projector,
                call=dict(arch=names[arch], pool_type="catavgmax"))


# Plain networks

def plain(folder, prefix="", classifier=False, file="weights.pth", format="torchvision"):
    head, path = nn.Linear(512, 1000) if classifier else None, folder/file   # whose classes nobody knows
    weights = under(prefix, trunk()) | (under(f"{prefix}fc.", head) if classifier else {})
    if file.endswith("safetensors"): save_file(weights, path)
    else: torch.save({"epoch": 1, "state_dict": weights} if prefix else weights, path)
    return Made(path, trunk(), len(weights), format, head=head)


def hugging_face(folder, arch="resnet18", pool="avg"):
    model = lived_in(timm.create_model(arch, num_classes=7, global_pool=pool, pretrained_cfg_overlay=dict(
        mean=(.1, .2, .3), std=(.4, .5, .6), input_size=(3, 48, 48))))
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=dict(global_pool=pool))
    encoder = timm.create_model(arch, num_classes=0, global_pool=pool)
    head = model.get_classifier()
    missing = encoder.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and len(missing.unexpected_keys) == 2
    return Made(folder, encoder.eval(), len(model.state_dict()), "timm", head=head, stats=(.1, .4), size=48,
                call=dict(arch=f"timm/{arch}", pool_type=pool))


def old_format(folder):
    torch.save(trunk().state_dict(), folder/"w.pth", _use_new_zipfile_serialization=False)
    return Made(folder/"w.pth", trunk(), 120, "torchvision")


LAYOUTS = {
    "barlowtwins full": authors_full, "barlowtwins full, with a function": partial(authors_full, function=True),
    "barlowtwins backbone ResNet-50": authors_backbone, "barlowtwins linear, with Namespace": authors_linear,
    "VICReg full": vicreg_full,
    "mix-bt cifar": mix_small, "mix-bt cifar, counters of thop": partial(mix_small, thop=True),
    "mix-bt stl10": partial(mix_small, pool=True), "mix-bt cifar ResNet-50": partial(mix_small, depth=50, thop=True),
    "mix-bt cifar linear": partial(mix_small, classes=10),
    "mix-bt stl10 linear": partial(mix_small, pool=True, classes=10), "mix-bt ImageNet": mix_imagenet,
    "mmpretrain pre-training": mm_pretrain,
    "mmpretrain pre-training, data_preprocessor": partial(mm_pretrain, preprocessor=True),
    "mmpretrain pre-training, other images": partial(mm_pretrain, config=MM_CONFIG),
    "mmpretrain pre-training, file of the runner": partial(mm_pretrain, raw=True),
    "mmpretrain linear": mm_linear, "mmcls linear": partial(mm_linear, old=True), "mmselfsup 0.x": mm_old_backbone,
    "lightly": lightly, "lightly, AttributeDict": partial(lightly, settings=AttributeDict),
    "lightly, DictConfig": partial(lightly, settings=DictConfig),
    "solo-learn cifar10": solo, "solo-learn stl10": partial(solo, dataset="stl10"),
    "solo-learn cifar10, old names": partial(solo, prefix="encoder."),
    "solo-learn cifar10, old settings": partial(solo, args=False),
    "solo-learn cifar10, source given": partial(solo, args=False, source="solo-learn/cifar10"),
    "solo-learn cifar10, channels last": partial(solo, strides=torch.channels_last),
    "VISSL": vissl, "VISSL, model_state_dict": partial(vissl, container="model_state_dict"),
    "VISSL, bare": partial(vissl, container="bare"), "VISSL without counters": partial(vissl, counters=False),
    "MoCo v2": moco, "MoCo v3": partial(moco, version=3),
    "fastai body": kerem, "fastai body, no optimizer": partial(kerem, optimizer=False),
    "fastai body alone": partial(kerem, alone=True), "fastai xresnet": partial(kerem, arch="xresnet"),
    "fastai xresnet alone": partial(kerem, arch="xresnet", alone=True), "fastai timm": partial(kerem, arch="timm"),
    "torchvision": plain, "torchvision classifier": partial(plain, classifier=True), "PyTorch before 1.6": old_format,
    "torchvision, DDP": partial(plain, prefix="module."),
    "torchvision, compiled DDP": partial(plain, prefix="_orig_mod.module."),
    "torchvision, safetensors": partial(plain, file="w.safetensors"),
    "torchvision, safetensors named .pth": partial(lambda f: Made(
        plain(f, file="w.safetensors").path.rename(f/"w.pth"), trunk(), 120, "torchvision")),
    "backbone and fc": partial(plain, prefix="backbone.", classifier=True, format="backbone."),
    "backbone alone": partial(plain, prefix="backbone.", format="backbone."),
    "timm, folder of Hugging Face": hugging_face,
    "timm, another architecture": partial(hugging_face, arch="test_efficientnet"),
    "timm, averages and maxima": partial(hugging_face, pool="catavgmax")}
