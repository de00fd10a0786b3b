import pytest

from swav.models.detectron2_names import from_detectron2, to_detectron2
from swav.models.resnet import BLOCKS, ResNet

PAIRS = {
    "conv1.weight": "stem.conv1.weight",
    "bn1.running_var": "stem.conv1.norm.running_var",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer1.0.bn2.bias": "res2.0.conv2.norm.bias",
    "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
    "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
    "layer4.0.downsample.1.running_mean": "res5.0.shortcut.norm.running_mean",
    "fc.weight": "stem.fc.weight",
}


@pytest.mark.parametrize("name", PAIRS)
def test_names_as_its_own_converter_writes_them(name: str) -> None:
    if not name.startswith("fc."):
        assert to_detectron2(name) == PAIRS[name]
    assert from_detectron2(PAIRS[name]) == name


@pytest.mark.parametrize("arch", BLOCKS)
def test_names_go_both_ways(arch: str) -> None:
    names = list(ResNet(arch, width=0.125).state_dict())
    there = [to_detectron2(name) for name in names]
    assert len(set(there)) == len(names)
    assert [from_detectron2(name) for name in there] == names
