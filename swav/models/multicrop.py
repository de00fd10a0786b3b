"""The forward pass over crops of several sizes."""

import torch
from torch import Tensor, nn


class MultiCropModel(nn.Module):
    """Backbone once per group of equal-size crops, then the head once on all of them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Embed every crop.

        Args:
            crops: per group, float32 [num_crops * B, 3, size, size], crop-major.

        Returns:
            float32 embeddings of unit norm [V * B, dim], over all V crops of all groups, crop-major.
        """
        embeddings: Tensor = self.head(torch.cat([self.backbone(group) for group in crops]))
        return embeddings
