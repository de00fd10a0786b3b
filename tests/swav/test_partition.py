from itertools import pairwise

import pytest

from swav.partition import share


@pytest.mark.parametrize("total", [0, 1, 7, 512])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 56])
def test_shares_tile_the_whole_and_differ_by_one_at_most(total: int, world: int) -> None:
    shares = [share(total, number, world) for number in range(world)]
    assert shares[0][0] == 0
    assert shares[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(shares))
    sizes = {end - first for first, end in shares}
    assert max(sizes) - min(sizes) <= 1
