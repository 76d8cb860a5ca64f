"""Trained encoders through PyTorch Hub.

    encoder = torch.hub.load("OWNER/REPOSITORY", "resnet50")
    model = torch.hub.load("OWNER/REPOSITORY", "barlow_twins", "barlowtwins_resnet50_8xb256-coslr-300e_in1k")
"""
dependencies = ["torch", "torchvision", "fastai", "fasttransform", "timm", "kornia", "safetensors", "filelock"]


def resnet50(pretrained=True, progress=True):
    """The encoder of Barlow Twins' authors: normalised images (B,3,H,W) to representations (B,2048), no classifier.

    pretrained: download the weights? Or the path of their file. They are loaded strictly.
    """
    from self_supervised_bt.zoo import get_model
    return get_model("resnet50", pretrained, progress=progress).encoder


def barlow_twins(name, pretrained=True, device=None, progress=True):
    """A published model by its name, as self_supervised_bt.zoo.list_models() gives them.

    model(x) gives logits, embeddings or representations; model.extract_feat(x) representations; model.transforms
    makes of a picture what the source evaluates with; print(model.info) shows where it comes from and how good it is.
    """
    from self_supervised_bt.zoo import get_model
    return get_model(name, pretrained, device, progress=progress)
