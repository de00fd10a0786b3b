"""What the training loop asks of a method: crops in, loss out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from swav.data.batch import CropBatch
from swav.distributed import all_reduce_sum, world_size

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Torch's automatic mixed precision on a device; none for ``fp32``."""
    return torch.autocast(device.type, dtype=_AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


@dataclass(frozen=True, slots=True)
class MethodOutput:
    """What one forward pass gives."""

    loss: Tensor  # scalar; its gradient, averaged over ranks, is that of the mean over the global batch
    embeddings: Tensor  # float32 [assign crops, B, dim], detached, of unit norm
    metrics: dict[str, Tensor]  # scalars of the global batch, detached, equal on every rank

    @classmethod
    def of_losses(cls, losses_B: Tensor, embeddings: Tensor, batch: CropBatch) -> Self:
        """The mean over the global batch of a loss per sample.

        Args:
            losses_B: float [B], of this rank's samples.
            embeddings: as the output has them.
            batch: this rank's.
        """
        share_of_mean = losses_B.sum() / batch.global_size
        return cls(
            loss=share_of_mean * world_size(),  # the mean over ranks is then the mean over the global batch
            embeddings=embeddings,
            metrics={"loss": all_reduce_sum(share_of_mean.detach().clone())},
        )


class Method(nn.Module, ABC):
    """One self-supervised objective. It opens no files and owns neither optimiser nor schedule."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """Images to features: what the run is for."""

    @abstractmethod
    def forward(self, batch: CropBatch) -> MethodOutput:
        """Compute the loss of this rank's share of the global batch."""

    def before_step(self) -> None:
        """Bring parameters into the form that the forward pass expects."""

    def frozen_parameters(self, epoch: int) -> Iterable[nn.Parameter]:
        """Parameters whose gradients are dropped in this epoch."""
        return ()
