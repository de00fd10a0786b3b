from typing import Any

import pytest
import timm
import torch
import torchvision

from swav.config import ModelConfig
from swav.models.architecture import build, identify
from swav.models.resnet import BLOCKS, ResNet


@pytest.mark.parametrize("width", [0.125, 0.75, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("stem", ["7x7", "3x3"])
@pytest.mark.parametrize("arch", BLOCKS)
def test_architecture_width_and_stem_are_told_from_shapes(arch: Any, width: float, stem: Any) -> None:
    with torch.device("meta"):
        weights = ResNet(arch, width=width, stem=stem).state_dict()
    assert identify(weights) == ModelConfig(arch=arch, width=width, stem=stem)


OTHERS = {
    "resnet152": r"has 3, 8, 36, 3 bottleneck blocks in its four layers \(a resnet152\)",
    "wide_resnet50_2": r"is wider inside its blocks than between them, 128 channels for 64 \(a wide_resnet\)",
    "resnext50_32x4d": r"has grouped convolutions, layer1.0.conv2.weight being \[128, 4, 3, 3\] \(a ResNeXt\)",
    "densenet121": "holds no ResNet: conv1.weight is not among",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        weights = torchvision.models.get_model(name).state_dict()
    with pytest.raises(ValueError, match=OTHERS[name]):
        identify(weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50d", "is a ResNet with several convolutions as its stem"),
        ("resnet26", r"bottleneck blocks in its four layers \(a resnet26\)"),
        ("resnet10t", "several convolutions as its stem"),
        ("vit_tiny_patch16_224", "holds no ResNet"),
    ],
)
def test_other_networks_of_timm_are_refused(name: str, message: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=message):
        identify(weights)


@pytest.mark.parametrize("name", ["seresnet50", "ecaresnet50t", "resnetaa50", "resnet50_gn"])
def test_networks_with_more_than_a_resnet_are_refused_in_the_end(name: str) -> None:
    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=0).state_dict()
    if name == "resnetaa50":  # its pooling has no weights: nothing in the file tells it from a resnet50
        assert identify(weights).arch == "resnet50"
        return
    with pytest.raises(ValueError, match=r"several convolutions|has beyond it|it lacks"):
        build(identify(weights), {name: torch.zeros(tensor.shape) for name, tensor in weights.items()})


def test_missing_blocks_are_told() -> None:
    weights = {
        name: tensor
        for name, tensor in ResNet("resnet34", width=0.125).state_dict().items()
        if not name.startswith("layer3.2.")
    }
    with pytest.raises(ValueError, match=r"lacks blocks: its four layers have those numbered"):
        identify(weights)


def test_a_stem_of_another_size_is_refused() -> None:
    weights = ResNet("resnet18", width=0.125).state_dict()
    for shape in [(8, 3, 5, 5), (8, 1, 7, 7), (8,), (0, 3, 7, 7)]:
        with pytest.raises(ValueError, match=r"has a conv1.weight of shape .*, not \[channels, 3, 7, 7\]"):
            identify({**weights, "conv1.weight": torch.zeros(shape)})


def test_a_sparse_weight_is_refused() -> None:
    weights = ResNet("resnet18", width=0.125).state_dict()
    sparse = torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (8,), check_invariants=True)
    with pytest.raises(ValueError, match=r"has of another type bn1\.weight torch\.float32"):
        build(ModelConfig(arch="resnet18", width=0.125), {**weights, "bn1.weight": sparse})


def test_weights_are_copied_and_laid_out_plainly() -> None:
    weights = ResNet("resnet18", width=0.125).to(memory_format=torch.channels_last).state_dict()
    state = torch.get_rng_state()
    backbone = build(ModelConfig(arch="resnet18", width=0.125), weights)
    assert torch.equal(torch.get_rng_state(), state)
    weights["conv1.weight"].zero_()
    assert bool(backbone.conv1.weight.any())
    assert all(tensor.is_contiguous() for tensor in backbone.state_dict().values())
    assert backbone.training
