import pytest
import torch
import torchvision

from swav.models.resnet import ResNet


def randomized(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(seed)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return module


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_torchvision_weights_load_unchanged_and_give_the_same_logits(arch: str) -> None:
    theirs = randomized(getattr(torchvision.models, arch)(), seed=3).eval()
    ours = ResNet(arch, num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("width", "millions"), [(1, 23.5), (2, 93.9), (4, 375.4), (5, 586.5)])
def test_resnet50_sizes(width: int, millions: float) -> None:
    with torch.device("meta"):
        backbone = ResNet("resnet50", width=width)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert backbone.num_features == 2048 * width


def test_small_stem_keeps_the_resolution() -> None:
    backbone = ResNet("resnet18", width=0.25, stem="3x3")
    assert backbone.maxpool(backbone.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 16, 32, 32)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


def test_unknown_arch_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known are resnet18, resnet34"):
        ResNet("resnet19")
