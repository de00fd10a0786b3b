"""ResNet backbones of any width, with torchvision's blocks, names and initialisation."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """A ResNet that ends in pooled features, or in logits where ``num_classes`` is given.

    At width 1 with the 7x7 stem its parameters have torchvision's names and shapes, so that state dicts go both ways.

    Attributes:
        num_features: size of the pooled features.
    """

    def __init__(
        self, arch: str, *, width: float = 1.0, stem: Literal["7x7", "3x3"] = "7x7", num_classes: int | None = None
    ) -> None:
        """Build and initialise.

        Args:
            arch: resnet18, resnet34, resnet50 or resnet101.
            width: multiplies the channels of every layer, the stem's too (Table 2: 2, 4 and 5).
            stem: 7x7 with stride 2 and max-pooling, or 3x3 with stride 1 and none, for 32x32 images.
            num_classes: adds a linear classifier ``fc``.
        """
        super().__init__()
        if arch not in BLOCKS:
            raise ValueError(f"unknown arch {arch!r}; known are {', '.join(BLOCKS)}")
        block, depths = BLOCKS[arch]
        base = round(64 * width)
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, base, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        channels = [base * block.expansion * 2**number for number in range(4)]
        self.layer1 = _layer(block, base, channels[0], depths[0], stride=1)
        self.layer2 = _layer(block, channels[0], channels[1], depths[1], stride=2)
        self.layer3 = _layer(block, channels[1], channels[2], depths[2], stride=2)
        self.layer4 = _layer(block, channels[2], channels[3], depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.num_features = channels[3]
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes is not None else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W], normalised -> features [B, num_features], or logits [B, num_classes]."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        features = torch.flatten(self.avgpool(maps), 1)
        if self.fc is not None:
            features = self.fc(features)
        return features


def _layer(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, depth: int, *, stride: int
) -> nn.Sequential:
    planes = channels // block.expansion
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
    blocks = [block(in_channels, planes, stride, downsample)]
    blocks += [block(channels, planes) for _ in range(1, depth)]
    return nn.Sequential(*blocks)
