"""Spherical k-means by passes over blocks of features (appendix D.2, Eq. 5).

Nothing here holds more than a block: neither all features nor their scores. Sums are exact, so any split of the blocks
over workers, in any order, gives the same centroids to the bit.

Shapes: B rows of a block, K clusters, D dimensions.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from swav.distributed import all_reduce_sum

# float16 numbers up to 1 are multiples of 2^-24, so their sums over 2^39 rows are exact in 64 bits.
_UNIT = 2.0**24

_CPU_ROWS = 256  # rows whose scores are made at once: more would leave the cache
_DEVICE_ROWS = 8192
_SUM_ROWS = 1024  # rows that are widened to float64 at once
_CANDIDATE_COST = 100  # the time for the inner product of a candidate, in those of a matrix product

Found = tuple[NDArray[np.int64], NDArray[np.float32]]  # labels and inner products of some rows


def nearest_centroids(features_BD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The centroid of the largest inner product, the first one among equals.

    A row's result can depend on its place in the block that it is in, by the last bit of a sum: whoever wants the same
    labels from any number of workers cuts the rows into the same blocks.

    Args:
        features_BD: floating point [B, D].
        centroids_KD: float32 [K, D].

    Returns:
        Labels, int64 [B], and the inner products, float32 [B].
    """
    if features_BD.device.type != "cpu":
        best = [(rows.float() @ centroids_KD.mT).max(dim=1) for rows in features_BD.split(_DEVICE_ROWS)]
        return torch.cat([indices for _, indices in best]), torch.cat([values for values, _ in best])
    labels = torch.empty(len(features_BD), dtype=torch.int64)
    similarities = torch.empty(len(features_BD))
    centroids_DK = centroids_KD.mT.contiguous().numpy()
    worth_it = len(centroids_KD) >= 2 * _CANDIDATE_COST and _coarse_scores_are_fast()
    coarse = _CoarseCentroids.of(centroids_KD) if worth_it else None
    for start in range(0, len(features_BD), _CPU_ROWS):
        rows = slice(start, start + _CPU_ROWS)
        rows_RD = features_BD[rows].float()
        found = None if coarse is None else coarse.nearest(rows_RD)
        if found is None:
            coarse = None  # the block's other rows are likely to be as close to many centroids
            found = _nearest_of_all(rows_RD, centroids_DK)
        labels.numpy()[rows], similarities.numpy()[rows] = found
    return labels, similarities


def _nearest_of_all(rows_RD: Tensor, centroids_DK: NDArray[np.float32]) -> Found:
    """All inner products; NumPy's product and argmax are faster than torch's on many CPUs."""
    scores_RK = rows_RD.numpy() @ centroids_DK
    labels: NDArray[np.int64] = scores_RK.argmax(axis=1)
    return labels, scores_RK[np.arange(len(labels)), labels]


@cache
def _coarse_scores_are_fast() -> bool:
    """Whether this CPU has 8 bit dot products, without which torch's are slow, or saturate and are wrong."""
    if not torch.cpu._is_vnni_supported():
        return False
    ones = torch.ones(64, 64, dtype=torch.int8)
    return bool((torch._int_mm(127 * ones, 127 * ones) == 64 * 127**2).all())  # oneDNN can be told not to use them


@dataclass(frozen=True, slots=True)
class _CoarseCentroids:
    """Centroids in 8 bits: they tell, at a quarter of the price, which centroids can be the nearest.

    The scores of a row x and a centroid c, and of their roundings x' and c', differ by (x - x')c + x'(c - c'), which is
    at most |x - x'| |c| + |x'| |c - c'|. So a centroid whose coarse score is below the largest one by more than twice
    this is not the nearest. The others, a few of thousands, are compared by their inner products in float32.
    """

    exact_KD: Tensor  # float32 [K, D]
    coarse_DK: Tensor  # int8 [D, K], in units of `scale`
    scale: Tensor  # float32 [1, 1]
    norm: Tensor  # float32 [], the largest
    error: Tensor  # float32 [], the largest norm of what rounding took away

    @classmethod
    def of(cls, centroids_KD: Tensor) -> Self:
        """Round centroids, float32 [K, D]; all by one scale, so that the scores of a row compare as integers."""
        coarse_KD, scale = _round_to_8_bits(centroids_KD, centroids_KD.abs().max().view(1, 1))
        return cls(
            exact_KD=centroids_KD,
            coarse_DK=_as_int8(coarse_KD.mT),
            scale=scale,
            norm=centroids_KD.norm(dim=1).max(),
            error=(centroids_KD - coarse_KD * scale).norm(dim=1).max(),
        )

    def nearest(self, rows_RD: Tensor) -> Found | None:
        """As `nearest_centroids`; None where so many centroids are about as near that this is no way to find them.

        Args:
            rows_RD: float32 [R, D].
        """
        largest_R1 = rows_RD.abs().amax(dim=1, keepdim=True)
        coarse_RD, scale_R1 = _round_to_8_bits(rows_RD, largest_R1)
        rounded_RD = coarse_RD * scale_R1
        error_R = (rows_RD - rounded_RD).norm(dim=1) * self.norm + rounded_RD.norm(dim=1) * self.error
        # Twice the error, and a bit more for the rounding of these lines themselves.
        margin_R = 2.01 * error_R / (scale_R1 * self.scale)[:, 0] + 1
        if not bool(torch.isfinite(margin_R).all()):
            return None
        # Of a row of zeros, no centroid becomes a candidate: it gets the first one, at 0.
        margin_R = torch.where(largest_R1[:, 0] > 0, margin_R.clamp(max=2.0**30), -1).ceil().int()
        scores_RK = torch._int_mm(_as_int8(coarse_RD), self.coarse_DK).numpy()
        is_candidate_RK = scores_RK >= (scores_RK.max(axis=1) - margin_R.numpy())[:, None]
        candidates = np.flatnonzero(is_candidate_RK)
        if len(candidates) * _CANDIDATE_COST > scores_RK.size:
            return None
        return self._nearest_of(candidates, rows_RD)

    def _nearest_of(self, candidates: NDArray[Any], rows_RD: Tensor) -> Found:
        """The best among pairs of a row and a centroid, ascending int64 [pairs]: row times K plus centroid."""
        rows, centroids = np.divmod(candidates, len(self.exact_KD))
        products = rows_RD.index_select(0, torch.from_numpy(rows))
        products.mul_(self.exact_KD.index_select(0, torch.from_numpy(centroids)))
        scores = products.sum(dim=1).numpy()
        best_R = np.full(len(rows_RD), -np.inf, dtype=np.float32)
        np.maximum.at(best_R, rows, scores)
        hits = np.flatnonzero(scores == best_R[rows])[::-1]  # from the last, so that the first of equals stays
        labels_R = np.zeros(len(rows_RD), dtype=np.int64)
        labels_R[rows[hits]] = centroids[hits]
        best_R[np.isneginf(best_R)] = 0
        return labels_R, best_R


def _round_to_8_bits(values_RD: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Values as whole numbers up to 127, float32 [R, D], and their unit, for which `largest` becomes 127."""
    scale = largest.clamp(min=1e-30) / 127
    return (values_RD / scale).round_(), scale


def _as_int8(values: Tensor) -> Tensor:
    """A copy in plain strides: torch._int_mm fails silently on others of a dimension of size 1 (PyTorch #195066)."""
    return torch.empty(values.shape, dtype=torch.int8).copy_(values)


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
        if len(features_BD) < len(self.sums):
            self.sums.index_add_(0, labels_B, (features_BD.float() * _UNIT).long())
        else:  # torch adds float64 rows 4 times as fast as int64 rows; sums of up to 2^29 rows are exact there, too
            block_sums = torch.zeros_like(self.sums, dtype=torch.float64)
            for rows, labels in zip(features_BD.split(_SUM_ROWS), labels_B.split(_SUM_ROWS), strict=True):
                block_sums.index_add_(0, labels, rows.double())
            self.sums.add_(block_sums.mul_(_UNIT).long())
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
