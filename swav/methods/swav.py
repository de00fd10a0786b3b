"""SwAV: swapped prediction of online codes (appendix A.1, A.6, C.2, C.3).

Shapes: V crops, A assign crops (the first A of V), B samples of this rank, K prototypes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from swav.config import SwavConfig
from swav.data.batch import CropBatch
from swav.distributed import gather_rows, rank, world_size
from swav.methods.base import Method, MethodOutput
from swav.models.heads import Prototypes
from swav.models.multicrop import MultiCropModel
from swav.ops.queue import FeatureQueue
from swav.ops.sinkhorn import harden, sinkhorn
from swav.partition import share


def swapped_prediction_loss(scores_VBK: Tensor, codes_ABK: Tensor, *, temperature: float) -> Tensor:
    """Predict the codes of each assign crop from every other crop.

    Differs: the pseudo-code of appendix A.1 also averages over K, which would make the loss K times smaller; the text's
    cross-entropy does not, nor does this.

    Args:
        scores_VBK: float32 [V, B, K], prototype scores of all crops, the assign crops first.
        codes_ABK: float32 [A, B, K], rows sum to 1; no gradient flows into them.
        temperature: of the softmax.

    Returns:
        float32 [B]: per sample, the mean over assign crops of the mean cross-entropy over the other crops.
    """
    num_crops, num_assign_crops = len(scores_VBK), len(codes_ABK)
    logits_VBK = scores_VBK / temperature
    normalizers_VB = torch.logsumexp(logits_VBK, dim=2)
    # -sum_k q log p = logsumexp - <q, logits>, as q sums to 1; the sum over the other crops is all but the own.
    agreement_AB = (codes_ABK * (logits_VBK.sum(dim=0) - logits_VBK[:num_assign_crops])).sum(dim=2)
    others_AB = normalizers_VB.sum(dim=0) - normalizers_VB[:num_assign_crops]
    return (others_AB - agreement_AB).mean(dim=0) / (num_crops - 1)


class SwAV(Method):
    """Swapping assignments between views."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, config: SwavConfig, *, num_assign_crops: int, dim: int
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images to features.
            head: features to unit embeddings [B, dim].
            config: what the method's own settings are.
            num_assign_crops: how many crops, of the first group, get codes.
            dim: size of the embedding.
        """
        super().__init__()
        self.config = config
        self.num_assign_crops = num_assign_crops
        self.model = MultiCropModel(backbone, head)
        self.prototypes = Prototypes(config.num_prototypes, dim)
        self.prototypes.requires_grad_(config.learn_prototypes)
        self.queue = None
        if config.queue is not None:
            self.queue = FeatureQueue(num_assign_crops, config.queue.num_samples, dim)

    @property
    def backbone(self) -> nn.Module:
        """Images to features."""
        return self.model.backbone

    def before_step(self) -> None:
        """Bring the prototypes to unit norm: the paper's "after the update", and right for the first step too."""
        self.prototypes.normalize()

    def frozen_parameters(self, epoch: int) -> Iterable[nn.Parameter]:
        """The prototypes, while they are frozen."""
        return self.prototypes.parameters() if epoch < self.config.freeze_prototypes_epochs else ()

    def forward(self, batch: CropBatch) -> MethodOutput:
        """Embed all crops, compute codes over the global batch, predict them."""
        embeddings = self.model(batch.crops)  # [V * B, dim]
        num_samples = len(batch.crops[0]) // self.num_assign_crops
        (scores,) = self.prototypes(embeddings)
        scores_VBK = scores.unflatten(0, (-1, num_samples))
        assign_embeddings = embeddings.detach().unflatten(0, (-1, num_samples))[: self.num_assign_crops]
        codes_ABK = self._codes(scores_VBK[: self.num_assign_crops].detach(), assign_embeddings, batch)
        losses_B = swapped_prediction_loss(scores_VBK, codes_ABK, temperature=self.config.temperature)
        return MethodOutput.of_losses(losses_B, assign_embeddings, batch)

    @torch.no_grad()
    def _codes(self, scores_ABK: Tensor, embeddings: Tensor, batch: CropBatch) -> Tensor:
        """Codes of this rank's samples; a full queue joins the Sinkhorn, this rank holding its share of the rows."""
        queue_rows = 0
        queue_started = self.config.queue is not None and batch.epoch >= self.config.queue.start_epoch
        if self.queue is not None and queue_started:
            if self.queue.is_full:
                first, last = share(self.queue.embeddings.shape[1], rank(), world_size())
                (queue_scores,) = self.prototypes(self.queue.embeddings[:, first:last])
                queue_rows = last - first
                scores_ABK = torch.cat([queue_scores, scores_ABK], dim=1)
            self.queue.push(gather_rows(embeddings, dim=1, offset=batch.global_offset, total=batch.global_size))
        sinkhorn_config = self.config.sinkhorn
        codes = sinkhorn(scores_ABK, epsilon=sinkhorn_config.epsilon, num_iters=sinkhorn_config.num_iters)
        codes = codes[:, queue_rows:]
        return harden(codes) if self.config.codes == "hard" else codes
