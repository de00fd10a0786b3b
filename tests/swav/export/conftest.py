"""Two backbones as if trained: one that every format takes, and one that only ours do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swav.config import ModelConfig
from swav.models.backbone_file import BackboneFile, load_backbone, save_backbone
from swav.models.resnet import ResNet


def write_backbone(path: Path, *, resize_px: int, crop_px: int, **model: Any) -> Path:
    torch.manual_seed(2)
    backbone = ResNet("resnet18", **model)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_backbone(backbone, ModelConfig(arch="resnet18", **model), path, resize_px=resize_px, crop_px=crop_px)
    return path


@pytest.fixture(scope="session")
def usual_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("usual") / "backbone.pt", resize_px=72, crop_px=64)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "backbone.pt"
    return write_backbone(path, resize_px=36, crop_px=32, width=0.125, stem="3x3")


@pytest.fixture
def usual(usual_path: Path) -> BackboneFile:
    """A resnet18 of width 1 with the 7x7 stem."""
    return load_backbone(usual_path)


@pytest.fixture
def tiny(tiny_path: Path) -> BackboneFile:
    """A resnet18 of width 1/8 with the 3x3 stem."""
    return load_backbone(tiny_path)
