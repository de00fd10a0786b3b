"""The queue of earlier embeddings for small batches (appendix A.6)."""

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """A first-in-first-out store of the last embeddings of the global batch, per assign crop.

    Every rank holds the whole (3,840 vectors are 4 MB for two assign crops), so a checkpoint has it once and any world
    size can take it up.
    """

    embeddings: Tensor  # float32 [assign crops, samples, dim], oldest first

    def __init__(self, num_assign_crops: int, num_samples: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_assign_crops, num_samples, dim))
        self._num_filled = 0

    @property
    def is_full(self) -> bool:
        """Whether every place holds an embedding."""
        return self._num_filled == self.embeddings.shape[1]

    @torch.no_grad()
    def push(self, newest: Tensor) -> None:
        """Append the global batch and drop the oldest.

        Args:
            newest: float32 [assign crops, global batch, dim], equal on every rank.
        """
        capacity = self.embeddings.shape[1]
        self.embeddings.copy_(torch.cat([self.embeddings, newest], dim=1)[:, -capacity:])
        self._num_filled = min(capacity, self._num_filled + newest.shape[1])

    def get_extra_state(self) -> int:
        """How many places are filled; part of the state dict."""
        return self._num_filled

    def set_extra_state(self, state: int) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        self._num_filled = state
