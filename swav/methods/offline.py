"""Predicting labels that were made for the whole data set: DeepCluster-v2 and SeLa-v2 (appendix D.1).

Shapes: V crops, B samples of this rank, H sets of K prototypes, D dimensions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from swav.config import DeepClusterV2Config, SelaV2Config
from swav.data.batch import NO_LABEL, CropBatch
from swav.distributed import all_reduce_sum
from swav.methods.base import Method, MethodOutput
from swav.models.heads import Prototypes
from swav.models.multicrop import MultiCropModel


def labels_loss(scores_VBK: Tensor, labels_B: Tensor, *, temperature: float) -> Tensor:
    """Predict a sample's label from each of its crops (Eq. 2).

    Args:
        scores_VBK: float32 [V, B, K], prototype scores of all crops.
        labels_B: int64 [B]; NO_LABEL is ignored.
        temperature: of the softmax.

    Returns:
        float32 [B]: the mean cross-entropy over the crops, 0 where there is no label.
    """
    num_crops = len(scores_VBK)
    losses: Tensor = F.cross_entropy(
        scores_VBK.flatten(0, 1) / temperature, labels_B.repeat(num_crops), ignore_index=NO_LABEL, reduction="none"
    )
    losses_B: Tensor = losses.unflatten(0, (num_crops, -1)).mean(dim=0)
    return losses_B


class Offline(Method):
    """Classifying crops by labels of the whole data set, in several sets.

    DeepCluster-v2's prototypes are the centroids of its clusters and are not trained (Eq. 3); SeLa-v2's are (Eq. 4).
    The mean of a set is over the samples that have a label.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        config: DeepClusterV2Config | SelaV2Config,
        *,
        num_assign_crops: int,
        dim: int,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images to features.
            head: features to unit embeddings [B, dim].
            config: the method's own settings.
            num_assign_crops: how many crops, of the first group, give features for the next labels.
            dim: size of the embedding.
        """
        super().__init__()
        self.config = config
        self.num_assign_crops = num_assign_crops
        self.model = MultiCropModel(backbone, head)
        self.prototypes = Prototypes(config.num_prototypes, dim, num_heads=config.num_sets)
        self.prototypes.requires_grad_(isinstance(config, SelaV2Config))

    @property
    def backbone(self) -> nn.Module:
        """Images to features."""
        return self.model.backbone

    @torch.no_grad()
    def embed(self, batch: CropBatch) -> Tensor:
        """Embeddings of the assign crops alone, float32 [A, B, D]."""
        embeddings: Tensor = self.model(batch.crops[:1])
        embeddings_ABD: Tensor = embeddings.unflatten(0, (self.num_assign_crops, -1))
        return embeddings_ABD

    @torch.no_grad()
    def set_prototypes(self, centroids_HKD: Tensor) -> None:
        """Take the centroids of the clusters that the labels name, float32 [H, K, D]."""
        for head, centroids in zip(self.prototypes.heads, centroids_HKD, strict=True):
            head.copy_(centroids)

    def before_step(self) -> None:
        """Bring the prototypes to unit norm, as SwAV does; centroids have it."""
        if isinstance(self.config, SelaV2Config):
            self.prototypes.normalize()

    def frozen_parameters(self, epoch: int) -> Iterable[nn.Parameter]:
        """SeLa-v2's prototypes, while they are frozen: its settings are SwAV's (appendix D.2)."""
        if isinstance(self.config, SelaV2Config) and epoch < self.config.freeze_prototypes_epochs:
            return self.prototypes.parameters()
        return ()

    def forward(self, batch: CropBatch) -> MethodOutput:
        """Embed all crops and predict the labels from each, in every set."""
        assert batch.labels is not None
        embeddings = self.model(batch.crops)  # [V * B, D]
        num_samples = len(batch.crops[0]) // self.num_assign_crops
        labelled_H = all_reduce_sum((batch.labels != NO_LABEL).sum(dim=0).float())
        weights_H = batch.global_size / (labelled_H.clamp_min(1) * len(self.prototypes.heads))
        losses_B = embeddings.new_zeros(num_samples)
        for scores, labels_B, weight in zip(self.prototypes(embeddings), batch.labels.mT, weights_H, strict=True):
            scores_VBK = scores.unflatten(0, (-1, num_samples))
            losses_B = losses_B + weight * labels_loss(scores_VBK, labels_B, temperature=self.config.temperature)
        assign_embeddings = embeddings.detach().unflatten(0, (-1, num_samples))[: self.num_assign_crops]
        return MethodOutput.of_losses(losses_B, assign_embeddings, batch)
