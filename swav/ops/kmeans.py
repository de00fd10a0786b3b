"""Spherical k-means by passes over blocks of features (appendix D.2, Eq. 5).

Nothing here holds more than a block: neither all features nor their scores. Sums are exact, so any split of the blocks
over workers, in any order, gives the same centroids to the bit.

Shapes: B rows of a block, K clusters, D dimensions.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from swav.distributed import all_reduce_sum

# float16 numbers up to 1 are multiples of 2^-24, so their sums over 2^39 rows are exact in 64 bits.
_UNIT = 2.0**24


def nearest_centroids(features_BD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The centroid of the largest inner product, the first one among equals.

    A row's result can depend on the block that it is in, by the last bit of a sum: whoever wants the same labels from
    any number of workers cuts the rows into the same blocks.

    Args:
        features_BD: floating point [B, D].
        centroids_KD: float32 [K, D].

    Returns:
        Labels, int64 [B], and the inner products, float32 [B].
    """
    features = features_BD.float()
    if features.device.type == "cpu":  # NumPy's matrix product runs at 1.5 times the speed of torch's on many CPUs
        scores = features.numpy() @ centroids_KD.numpy().T
        labels = torch.from_numpy(scores.argmax(axis=1))
        return labels, torch.from_numpy(scores).gather(1, labels[:, None])[:, 0]
    similarities, labels = (features @ centroids_KD.mT).max(dim=1)
    return labels, similarities


@dataclass(frozen=True, slots=True)
class ClusterSums:
    """What an iteration keeps of the rows that it has seen: per cluster their sum and their number."""

    sums: Tensor  # int64 [K, D], in units of 2^-24
    counts: Tensor  # int64 [K]

    @classmethod
    def zeros(cls, num_clusters: int, dim: int, device: torch.device | None = None) -> Self:
        """Before the first block."""
        return cls(
            torch.zeros(num_clusters, dim, dtype=torch.int64, device=device),
            torch.zeros(num_clusters, dtype=torch.int64, device=device),
        )

    def add(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Add a block's rows to their clusters.

        Args:
            features_BD: float16 [B, D], absolute values up to 1.
            labels_B: int64 [B].
        """
        assert features_BD.dtype == torch.float16
        self.sums.index_add_(0, labels_B, (features_BD.float() * _UNIT).long())
        self.counts.add_(torch.bincount(labels_B, minlength=len(self.counts)))

    def all_reduce(self) -> None:
        """Add what the other ranks have."""
        all_reduce_sum(self.sums)
        all_reduce_sum(self.counts)

    def centroids(self, previous_KD: Tensor) -> Tensor:
        """The next centroids: the clusters' means, brought to unit norm; an empty cluster keeps its centroid.

        Args:
            previous_KD: float32 [K, D].

        Returns:
            float32 [K, D].
        """
        means = F.normalize(self.sums.double(), dim=1).float()
        keep = (self.counts == 0) | (self.sums == 0).all(dim=1)  # rows that cancel point nowhere
        return torch.where(keep[:, None], previous_KD, means)
