"""Cross-entropy with the true labels: the supervised row of the paper's tables."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from swav.config import SupervisedConfig
from swav.data.batch import CropBatch
from swav.methods.base import Method, MethodOutput


class Supervised(Method):
    """Classifying every crop by its image's class."""

    def __init__(
        self, backbone: nn.Module, num_features: int, config: SupervisedConfig, *, num_assign_crops: int
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images to features.
            num_features: of the backbone.
            config: the method's own settings.
            num_assign_crops: how many crops, of the first group, give the output's embeddings.
        """
        super().__init__()
        self.num_assign_crops = num_assign_crops
        self.trunk = backbone
        self.classifier = nn.Linear(num_features, config.num_classes)

    @property
    def backbone(self) -> nn.Module:
        """Images to features."""
        return self.trunk

    def forward(self, batch: CropBatch) -> MethodOutput:
        """Predict the class from each crop; an image in the place of a broken one has none and adds no loss."""
        assert batch.labels is not None
        features = torch.cat([self.trunk(group) for group in batch.crops])
        num_samples = len(batch.labels)
        labels = batch.labels[:, 0].repeat(len(features) // num_samples)
        with torch.autocast(features.device.type, enabled=False):
            scores = self.classifier(features.to(self.classifier.weight.dtype))
            losses = F.cross_entropy(scores, labels, reduction="none")
        assign_features = F.normalize(features.detach().to(scores.dtype), dim=1).unflatten(0, (-1, num_samples))
        losses_B = losses.unflatten(0, (-1, num_samples)).mean(dim=0)
        return MethodOutput.of_losses(losses_B, assign_features[: self.num_assign_crops], batch)
