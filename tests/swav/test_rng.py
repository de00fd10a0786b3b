"""Counter-based draws against the published test vectors and against what "counter-based" promises."""

import numpy as np
import pytest

from swav import rng

# Known answers that the authors of Philox publish with Random123: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    low, high = _words(key)
    words = rng.philox(np.array([_words(counter)], dtype=np.uint64), low | high << 32)
    assert words.tolist() == [_words(expected)]


def test_philox_is_the_same_for_any_shape() -> None:
    counters = np.arange(2 * 3 * 4, dtype=np.uint64).reshape(2, 3, 4)
    whole = rng.philox(counters, 99)
    assert np.array_equal(whole[1, 2], rng.philox(counters[1, 2], 99))


def test_draws_depend_on_the_row_alone() -> None:
    key = rng.key(31, "crop", 4)
    ids = np.array([7, 3, 2**40 + 5, 0, 7])
    together = rng.uniforms(key, ids, 10)
    for place, sample in enumerate(ids):
        assert np.array_equal(together[place], rng.uniforms(key, np.array([sample]), 10)[0])
    assert np.array_equal(together[0], together[4])


def test_fewer_draws_are_the_first_of_more() -> None:
    key = rng.key(31, "crop")
    assert np.array_equal(rng.uniforms(key, np.arange(5), 3), rng.uniforms(key, np.arange(5), 9)[:, :3])


def test_rows_above_32_bits_are_not_folded() -> None:
    low, high = rng.uniforms(1, np.array([1, 1 + 2**32]), 4)
    assert not np.array_equal(low, high)


def test_families_are_independent() -> None:
    keys = {
        rng.key(seed, purpose, *scalars)
        for seed in (1, 11)
        for purpose in ("crop", "order")
        for scalars in [(), (1,), (11,), (1, 1), (0, 1)]
    }
    assert len(keys) == 20
    assert rng.key(31, "crop", 1) == rng.key(31, "crop", 1)
    rows = np.arange(20000)
    first, second = (rng.uniforms(rng.key(31, "crop", epoch), rows, 1) for epoch in (0, 1))
    correlation = 12 * ((first - 0.5) * (second - 0.5)).mean()
    assert abs(correlation) < 4 / np.sqrt(len(rows))  # four standard errors


def test_draws_are_uniform_inside_the_open_interval() -> None:
    draws = rng.uniforms(rng.key(31, "uniform"), np.arange(50000), 4)
    assert draws.min() > 0
    assert draws.max() < 1
    for column in draws.T:
        counts, _ = np.histogram(column, bins=100, range=(0, 1))
        chi_square = ((counts - 500) ** 2 / 500).sum()
        assert chi_square < 99 + 5 * np.sqrt(2 * 99)  # mean and five standard deviations at 99 degrees of freedom
    assert abs(np.corrcoef(draws.T) - np.eye(4)).max() < 5 / np.sqrt(len(draws))


def test_extreme_words_stay_inside_the_interval() -> None:
    assert (0 + 0.5) / 2.0**32 > 0
    assert (0xFFFFFFFF + 0.5) / 2.0**32 < 1


def test_no_rows_and_no_draws() -> None:
    assert rng.uniforms(1, np.array([], dtype=np.int64), 3).shape == (0, 3)
    assert rng.uniforms(1, np.arange(3), 0).shape == (3, 0)


def test_generator_repeats_itself_and_differs_by_purpose() -> None:
    first = rng.generator(31, "demo", 1).integers(0, 2**32, 8)
    assert np.array_equal(first, rng.generator(31, "demo", 1).integers(0, 2**32, 8))
    assert not np.array_equal(first, rng.generator(31, "demo", 2).integers(0, 2**32, 8))
