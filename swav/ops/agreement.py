"""How much two labellings of the same samples agree, and how evenly one uses its labels."""

import numpy as np
from numpy.typing import NDArray


def add_pairs(pairs: NDArray[np.int64], one_N: NDArray[np.int64], other_N: NDArray[np.int64]) -> None:
    """Count how many samples have each pair of labels, in place: often there are far fewer samples than pairs.

    Args:
        pairs: int64 [labels of the one, labels of the other], contiguous.
        one_N: int64 [N]; samples with a negative label in either are left out.
        other_N: int64 [N].
    """
    both = (one_N >= 0) & (other_N >= 0)
    np.add.at(pairs.reshape(-1), one_N[both] * pairs.shape[1] + other_N[both], 1)


def normalized_mutual_information(pairs: NDArray[np.int64]) -> float:
    """Mutual information of two labellings, divided by the mean of their entropies; 1 where both have one label only.

    Args:
        pairs: int64 [.., ..], from :func:`add_pairs`.

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
