"""Counter-based randomness: every draw is a pure function of what it is for.

No generator is advanced anywhere in this package. A draw is named by (seed, purpose, scalars...) and, for many draws
at once, by one 64-bit counter per row. A resumed run, another world size or another number of loader threads
therefore sees the same numbers.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def key(seed: int, purpose: str, *scalars: int) -> int:
    """Derive the 64-bit key of one family of draws.

    Args:
        seed: the run's seed.
        purpose: what the draws are for, for example ``"crop"``; keeps families independent.
        scalars: further coordinates that all rows share, for example the epoch.
    """
    text = "/".join([purpose, str(seed), *map(str, scalars)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox(counters: NDArray[np.uint64], key_word: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., SC 2011), vectorised.

    Args:
        counters: uint64 [..., 4], each a 32-bit word.
        key_word: 64-bit key; its low half is the first key word.

    Returns:
        uint64 [..., 4], each a 32-bit random word.
    """
    c0, c1, c2, c3 = (counters[..., i] for i in range(4))
    k0, k1 = key_word & 0xFFFFFFFF, key_word >> 32
    for _ in range(10):
        product_0 = _MULTIPLIERS[0] * c0
        product_1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(key_word: int, rows: NDArray[np.integer], num: int) -> NDArray[np.float64]:
    """Draw ``num`` uniform numbers in (0, 1) for every row.

    Args:
        key_word: from :func:`key`.
        rows: integers [n], for example sample ids; each row has draws of its own.
        num: draws per row.

    Returns:
        float64 [n, num]; row i depends on ``key_word`` and ``rows[i]`` only.
    """
    ids = np.asarray(rows).astype(np.uint64)
    num_blocks = -(-num // 4)
    counters = np.zeros((len(ids), num_blocks, 4), dtype=np.uint64)
    counters[..., 0] = (ids & _LOW)[:, None]
    counters[..., 1] = (ids >> _SHIFT)[:, None]
    counters[..., 2] = np.arange(num_blocks, dtype=np.uint64)
    words = philox(counters, key_word).reshape(len(ids), 4 * num_blocks)[:, :num]
    return (words.astype(np.float64) + 0.5) / 2.0**32


def generator(seed: int, purpose: str, *scalars: int) -> np.random.Generator:
    """A NumPy generator for draws that are made once, in one place."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *scalars)))
