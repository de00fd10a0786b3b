"""What the training loop asks of a method: crops in, loss out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from swav.data.batch import CropBatch


@dataclass(frozen=True, slots=True)
class MethodOutput:
    """What one forward pass gives."""

    loss: Tensor  # scalar; its gradient, averaged over ranks, is that of the mean over the global batch
    embeddings: Tensor  # float32 [assign crops, B, dim], detached, of unit norm
    metrics: dict[str, Tensor]  # scalars of the global batch, detached, equal on every rank


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
