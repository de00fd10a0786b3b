"""SimCLR with multi-crop (appendix A.8, Eq. 1).

Shapes: V crops of an image, B images of this rank, N images of the global batch, D dimensions.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swav.config import SimclrConfig
from swav.data.batch import CropBatch
from swav.distributed import gather_rows_with_gradient
from swav.methods.base import Method, MethodOutput
from swav.models.multicrop import MultiCropModel

_SIMILARITIES = 1 << 24  # of one block, so 64 MiB in float32


def contrastive_loss(own_VBD: Tensor, all_VND: Tensor, *, offset: int, temperature: float) -> Tensor:
    """Tell each crop's other views from the views of all other images, one positive at a time.

    The similarities of some images at a time are formed, and formed again for the gradient: memory is linear in the
    local batch and does not depend on the global one.

    Args:
        own_VBD: float [V, B, D], unit embeddings of this rank's images: the anchors.
        all_VND: float [V, N, D], those of the global batch, in its order.
        offset: where this rank's images stand in the global batch.
        temperature: of the softmax.

    Returns:
        float [B]: per image, the mean over its V anchors and their V - 1 positives.
    """
    num_crops, num_own, _ = own_VBD.shape
    block = max(1, _SIMILARITIES // (num_crops * num_crops * all_VND.shape[1]))
    losses = [
        checkpoint(
            _block_loss, own_VBD[:, start : start + block], all_VND, offset + start, temperature, use_reentrant=False
        )
        for start in range(0, num_own, block)
    ]
    return torch.cat(losses)


def _block_loss(anchors_VbD: Tensor, all_VND: Tensor, offset: int, temperature: float) -> Tensor:
    num_crops, num_images, _ = anchors_VbD.shape
    logits_VbVN = torch.einsum("vbd,wnd->vbwn", anchors_VbD, all_VND) / temperature
    images = torch.arange(num_images, device=anchors_VbD.device)
    positives_VbV = logits_VbVN[:, images, :, offset + images].transpose(0, 1)  # indexing put the images first
    same_image = torch.zeros(num_images, all_VND.shape[1], dtype=torch.bool, device=anchors_VbD.device)
    same_image[images, offset + images] = True
    negatives = logits_VbVN.masked_fill(same_image[None, :, None], float("-inf"))
    negatives_Vb1 = torch.logsumexp(negatives.flatten(2), dim=2, keepdim=True)
    # -log(exp(p) / (exp(p) + sum exp(n))) = log(1 + exp(logsumexp(n) - p)), for the views other than the anchor itself.
    losses_VbV = nn.functional.softplus(negatives_Vb1 - positives_VbV)
    others = ~torch.eye(num_crops, dtype=torch.bool, device=losses_VbV.device)
    return (losses_VbV * others[:, None]).sum(dim=(0, 2)) / (num_crops * (num_crops - 1))


class SimCLR(Method):
    """Contrasting views over the global batch."""

    def __init__(self, backbone: nn.Module, head: nn.Module, config: SimclrConfig, *, num_assign_crops: int) -> None:
        """Put the parts together.

        Args:
            backbone: images to features.
            head: features to unit embeddings [B, dim].
            config: the method's own settings.
            num_assign_crops: how many crops, of the first group, give the output's embeddings.
        """
        super().__init__()
        self.config = config
        self.num_assign_crops = num_assign_crops
        self.model = MultiCropModel(backbone, head)

    @property
    def backbone(self) -> nn.Module:
        """Images to features."""
        return self.model.backbone

    def forward(self, batch: CropBatch) -> MethodOutput:
        """Embed all crops, gather those of all ranks with their gradients, contrast them."""
        embeddings = self.model(batch.crops)  # [V * B, D]
        num_samples = len(batch.crops[0]) // self.num_assign_crops
        own_VBD = embeddings.unflatten(0, (-1, num_samples))
        with torch.autocast(embeddings.device.type, enabled=False):
            all_VND = gather_rows_with_gradient(own_VBD, dim=1, offset=batch.global_offset, total=batch.global_size)
            losses_B = contrastive_loss(
                own_VBD, all_VND, offset=batch.global_offset, temperature=self.config.temperature
            )
        return MethodOutput.of_losses(losses_B, own_VBD[: self.num_assign_crops].detach(), batch)
