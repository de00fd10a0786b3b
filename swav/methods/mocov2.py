"""MoCo-v2: a momentum encoder and a queue of negatives (He et al., 2020; Chen et al., 2020; the paper's baseline).

Shapes: B images of this rank, N images of the global batch, Q images of the queue, D dimensions.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from swav.config import Mocov2Config
from swav.data.batch import CropBatch
from swav.distributed import gather_rows
from swav.methods.base import Method, MethodOutput
from swav.models.multicrop import MultiCropModel
from swav.ops.queue import FeatureQueue


def info_nce(queries_BD: Tensor, keys_BD: Tensor, negatives_QD: Tensor, *, temperature: float) -> Tensor:
    """Tell a query's own key from the queue's.

    Args:
        queries_BD: float [B, D], unit embeddings.
        keys_BD: float [B, D], of the other view; no gradient flows into them.
        negatives_QD: float [Q, D], earlier keys.
        temperature: of the softmax.

    Returns:
        float [B]: the cross-entropy of the own key among it and the queue.
    """
    positives_B1 = (queries_BD * keys_BD).sum(dim=1, keepdim=True)
    logits = torch.cat([positives_B1, queries_BD @ negatives_QD.mT], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none")


class MoCoV2(Method):
    """Matching a view to the momentum encoder's embedding of the other.

    The first crop is the query, the second the key.

    Differs: the authors shuffle the samples of the key among GPUs, so that batch norm of one GPU cannot tell which
    images belong together. Here batch norm takes the statistics of the global batch (``runtime.sync_batch_norm``),
    which hides that as well, and N ranks compute what one does.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, config: Mocov2Config, *, dim: int) -> None:
        """Put the parts together.

        Args:
            backbone: images to features.
            head: features to unit embeddings [B, dim].
            config: the method's own settings.
            dim: size of the embedding.
        """
        super().__init__()
        self.config = config
        self.model = MultiCropModel(backbone, head)
        self.key_model = copy.deepcopy(self.model).requires_grad_(False)
        self.queue = FeatureQueue(1, config.queue_samples, dim)
        self.queue.push(F.normalize(torch.randn(1, config.queue_samples, dim), dim=-1))  # negatives from the first step

    @property
    def backbone(self) -> nn.Module:
        """Images to features: the query's encoder, which is trained."""
        return self.model.backbone

    @torch.no_grad()
    def before_step(self) -> None:
        """Move the momentum encoder towards the encoder."""
        keys: list[Tensor] = list(self.key_model.parameters())
        queries: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.config.momentum)

    def forward(self, batch: CropBatch) -> MethodOutput:
        """Embed one view by each encoder, contrast them with the queue, and queue the keys."""
        query_images, key_images = batch.crops[0].chunk(2)
        queries_BD = self.model([query_images])
        with torch.no_grad():
            keys_BD = self.key_model([key_images])
        with torch.autocast(queries_BD.device.type, enabled=False):
            negatives = self.queue.embeddings[0].clone()  # the queue moves on before the gradient is taken
            losses_B = info_nce(queries_BD, keys_BD, negatives, temperature=self.config.temperature)
        self.queue.push(gather_rows(keys_BD[None], dim=1, offset=batch.global_offset, total=batch.global_size))
        return MethodOutput.of_losses(losses_B, torch.stack([queries_BD.detach(), keys_BD]), batch)
