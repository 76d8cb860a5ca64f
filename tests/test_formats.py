"Checkpoint files of other projects: recognised, loaded strictly, and reported"
import torch
import torchvision
from torch import nn

from self_supervised_bt.formats import read_weights


def test_a_backbone_with_the_names_of_torchvision(tmp_path):
    theirs = torchvision.models.resnet50(weights=None).eval()
    theirs.fc = nn.Identity()
    torch.save(theirs.state_dict(), tmp_path/"resnet50.pth")
    loaded = read_weights(tmp_path/"resnet50.pth")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(loaded.encoder(x), theirs(x))
    assert loaded.report["keys"].sum() == 318
