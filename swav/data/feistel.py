"""Keyed permutations of 0..n-1 that are computed element by element, in no memory.

An alternating Feistel network permutes the numbers of b bits, where 2^b is the next power of two; a result outside
0..n-1 is permuted again until it is inside (cycle walking), at most twice on average.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: Words) -> Words:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64-bit words, wrapping."""
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIER_2
    return words ^ (words >> np.uint64(31))


def permute(values: NDArray[np.int64], sizes: NDArray[np.int64], keys: Words) -> NDArray[np.int64]:
    """Permute each value inside 0..size-1.

    Args:
        values: int64 [n], each in 0..size-1.
        sizes: int64 [n] or [1], at least 1.
        keys: uint64 [n] or [1]; each key names one permutation.

    Returns:
        int64 [n].
    """
    return _walk(values, sizes, keys, range(_ROUNDS))


def invert(values: NDArray[np.int64], sizes: NDArray[np.int64], keys: Words) -> NDArray[np.int64]:
    """Undo :func:`permute`."""
    return _walk(values, sizes, keys, range(_ROUNDS - 1, -1, -1))


def _walk(values: NDArray[np.int64], sizes: NDArray[np.int64], keys: Words, rounds: range) -> NDArray[np.int64]:
    limits = np.broadcast_to(sizes.astype(np.uint64), values.shape)
    keys = np.broadcast_to(keys, values.shape)
    # frexp gives the number of bits of size-1 exactly, as sizes stay far below 2^53
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)
    bits = np.broadcast_to(bits, values.shape)
    out = _rounds(values.astype(np.uint64), bits, keys, rounds)
    outside = np.flatnonzero(out >= limits)
    while outside.size:
        out[outside] = _rounds(out[outside], bits[outside], keys[outside], rounds)
        outside = outside[out[outside] >= limits[outside]]
    return out.astype(np.int64)


def _rounds(words: Words, bits: Words, keys: Words, rounds: range) -> Words:
    one = np.uint64(1)
    low_bits = bits >> one
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
    low, high = words & low_mask, words >> low_bits
    for number in rounds:
        round_keys = keys + np.uint64((number + 1) * _GOLDEN & _MASK)
        if number % 2:
            low = low ^ (mix(mix(high + round_keys)) & low_mask)
        else:
            high = high ^ (mix(mix(low + round_keys)) & high_mask)
    joined: Words = (high << low_bits) | low
    return joined
