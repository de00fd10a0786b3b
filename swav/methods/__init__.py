"""Self-supervised objectives, independent of one another."""

import torch
from torch import nn

from swav import rng
from swav.config import Mocov2Config, PretrainConfig, SimclrConfig, SupervisedConfig, SwavConfig
from swav.methods.base import Method
from swav.methods.mocov2 import MoCoV2
from swav.methods.offline import Offline
from swav.methods.simclr import SimCLR
from swav.methods.supervised import Supervised
from swav.methods.swav import SwAV
from swav.models.heads import ProjectionHead
from swav.models.resnet import ResNet


def build_backbone(config: PretrainConfig) -> ResNet:
    """The run's untrained backbone; the same config gives the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(config.seed, "backbone"))
        return ResNet(config.model.arch, width=config.model.width, stem=config.model.stem)


def build_method(config: PretrainConfig) -> Method:
    """Build the run's method with its initial weights, on the CPU."""
    backbone, num_assign_crops = build_backbone(config), config.crops[0].num_crops
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(config.seed, "head"))
        if isinstance(config.method, SupervisedConfig):
            return Supervised(backbone, backbone.num_features, config.method, num_assign_crops=num_assign_crops)
        head: nn.Module = ProjectionHead(
            backbone.num_features,
            config.model.head_hidden,
            config.model.embedding_dim,
            batch_norm=config.model.head_batch_norm,
        )
        if isinstance(config.method, Mocov2Config):
            return MoCoV2(backbone, head, config.method, dim=config.model.embedding_dim)
        if isinstance(config.method, SimclrConfig):
            return SimCLR(backbone, head, config.method, num_assign_crops=num_assign_crops)
        dim = config.model.embedding_dim
        if isinstance(config.method, SwavConfig):
            return SwAV(backbone, head, config.method, num_assign_crops=num_assign_crops, dim=dim)
        return Offline(backbone, head, config.method, num_assign_crops=num_assign_crops, dim=dim)
