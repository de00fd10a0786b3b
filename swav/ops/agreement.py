"""How much two labellings of the same samples agree, and how evenly one uses its labels."""

import numpy as np
from numpy.typing import NDArray


def count_pairs(
    one_N: NDArray[np.int64], other_N: NDArray[np.int64], num_one: int, num_other: int
) -> NDArray[np.int64]:
    """How many samples have each pair of labels.

    Args:
        one_N: int64 [N], from 0 to ``num_one - 1``; samples with a negative label in either are left out.
        other_N: int64 [N], from 0 to ``num_other - 1``.
        num_one: labels of the first.
        num_other: labels of the second.

    Returns:
        int64 [num_one, num_other]; sums over disjoint samples add up.
    """
    both = (one_N >= 0) & (other_N >= 0)
    pairs = one_N[both] * num_other + other_N[both]
    return np.bincount(pairs, minlength=num_one * num_other).reshape(num_one, num_other)


def normalized_mutual_information(pairs: NDArray[np.int64]) -> float:
    """Mutual information of two labellings, divided by the mean of their entropies; 1 where both have one label only.

    Args:
        pairs: int64 [.., ..], from :func:`count_pairs`.

    Returns:
        From 0, independent, to 1, equal but for the labels' names; NaN without samples.
    """
    total = int(pairs.sum())
    if total == 0:
        return float("nan")
    rows, columns = pairs.sum(axis=1), pairs.sum(axis=0)
    entropies = entropy(rows) + entropy(columns)
    if entropies == 0:
        return 1.0
    mutual = entropies - entropy(pairs[pairs > 0])
    return min(max(float(2 * mutual / entropies), 0.0), 1.0)  # rounding can lead a little beyond both


def entropy(sizes_K: NDArray[np.int64]) -> float:
    """Entropy of the shares of some clusters, in bits; at most log2 of their number.

    Args:
        sizes_K: int64 [K].
    """
    total = int(sizes_K.sum())
    if total == 0:
        return 0.0
    shares = sizes_K[sizes_K > 0] / total
    return float(-(shares * np.log2(shares)).sum()) + 0.0
