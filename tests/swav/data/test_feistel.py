import numpy as np
import pytest

from swav.data import feistel


def _keys(*keys: int) -> feistel.Words:
    return np.array(keys, dtype=np.uint64)


@pytest.mark.parametrize("size", [*range(1, 34), 255, 256, 257, 10_000])
def test_bijection_and_inverse(size: int) -> None:
    values, sizes = np.arange(size), np.array([size])
    for key in (0, 1, 2**64 - 1):
        permuted = feistel.permute(values, sizes, _keys(key))
        assert sorted(permuted.tolist()) == values.tolist()
        assert feistel.invert(permuted, sizes, _keys(key)).tolist() == values.tolist()


def test_sizes_and_keys_may_differ_by_element() -> None:
    sizes = np.array([5, 1000, 1, 2**40])
    values = np.array([4, 999, 0, 2**40 - 1])
    keys = _keys(7, 8, 9, 10)
    together = feistel.permute(values, sizes, keys)
    alone = [feistel.permute(values[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
    assert feistel.invert(together, sizes, keys).tolist() == values.tolist()


def test_neighbours_and_keys_are_unrelated() -> None:
    size = 4096
    values, sizes = np.arange(size), np.array([size])
    one, two = (feistel.permute(values, sizes, _keys(key)) for key in (1, 2))
    # for a random permutation |correlation| < 0.05 with probability 0.999
    for other in (values, np.roll(one, 1), two):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_small_permutations_are_all_reached_about_equally() -> None:
    keys = np.repeat(np.arange(6000, dtype=np.uint64), 3)
    permuted = feistel.permute(np.tile(np.arange(3), 6000), np.array([3]), feistel.mix(keys)).reshape(-1, 3)
    _, counts = np.unique(permuted, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 400
