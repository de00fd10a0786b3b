import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swav.ops.agreement import add_pairs, entropy, normalized_mutual_information

Labels = list[int]


def table(one: Labels, other: Labels) -> NDArray[np.int64]:
    pairs = np.zeros((max(one, default=0) + 1, max(other, default=0) + 1), dtype=np.int64)
    for a, b in zip(one, other, strict=True):
        pairs[a, b] += 1
    return pairs


def nmi(one: Labels, other: Labels) -> float:
    return normalized_mutual_information(table(one, other))


def by_definition(one: Labels, other: Labels) -> float:
    """Twice the sum of p(a, b) log p(a, b) / (p(a) p(b)), over the sum of both entropies."""
    total = len(one)
    mutual = 0.0
    for a, b in itertools.product(set(one), set(other)):
        both = sum((x, y) == (a, b) for x, y in zip(one, other, strict=True)) / total
        if both:
            mutual += both * math.log(both / (one.count(a) / total * other.count(b) / total))
    entropies = [
        -sum(labels.count(a) / total * math.log(labels.count(a) / total) for a in set(labels))
        for labels in (one, other)
    ]
    return 1.0 if sum(entropies) == 0 else 2 * mutual / sum(entropies)


labellings = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(labellings)
def test_agreement_is_that_of_the_definition(pairs: list[tuple[int, int]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    assert nmi(one, other) == pytest.approx(by_definition(one, other), abs=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(labellings, st.permutations(range(7)))
def test_agreement_is_symmetric_and_does_not_know_names(pairs: list[tuple[int, int]], names: list[int]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    assert nmi(one, other) == pytest.approx(nmi(other, one), abs=1e-12)
    assert nmi([names[a] for a in one], other) == pytest.approx(nmi(one, other), abs=1e-12)
    assert nmi(one, [names[a] for a in one]) == pytest.approx(1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(labellings)
def test_agreement_is_from_0_to_1(pairs: list[tuple[int, int]]) -> None:
    assert 0 <= nmi([a for a, _ in pairs], [b for _, b in pairs]) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_independent_labels_do_not_agree(rows: list[int], columns: list[int]) -> None:
    if len(rows) == len(columns) == 1:
        return
    found = normalized_mutual_information(np.outer(rows, columns))
    assert 0 <= found < 1e-9


def test_labels_drawn_at_random_hardly_agree() -> None:
    draws = np.random.default_rng(0).integers(0, 10, (2, 100_000))
    assert nmi(*draws.tolist()) < 1e-3


def test_labels_that_are_empty_change_nothing() -> None:
    pairs = table([0, 1, 1, 2], [1, 0, 0, 1])
    larger = np.zeros((9, 8), dtype=np.int64)
    larger[3:6, 2:4] = pairs
    assert normalized_mutual_information(larger) == normalized_mutual_information(pairs)


def test_edges() -> None:
    assert nmi([0, 0, 0], [0, 0, 0]) == 1  # one label each
    assert nmi([0, 0, 0], [0, 1, 2]) == 0  # one says nothing of the other
    assert math.isnan(normalized_mutual_information(np.zeros((3, 3), dtype=np.int64)))
    assert math.isnan(normalized_mutual_information(np.zeros((0, 0), dtype=np.int64)))


def test_counts_of_a_billion_samples_do_not_overflow() -> None:
    assert normalized_mutual_information(np.eye(3, dtype=np.int64) * 10**12) == pytest.approx(1)


def test_entropy_is_in_bits() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy(np.array([0, 7, 0])) == 0
    assert math.copysign(1, entropy(np.array([7]))) == 1  # no minus zero in a report
    assert entropy(np.array([1, 3])) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert entropy(np.zeros(4, dtype=np.int64)) == 0
    assert entropy(np.ones(3000, dtype=np.int64)) == pytest.approx(math.log2(3000))


def test_pairs_are_counted_without_those_that_lack_a_label() -> None:
    pairs = np.zeros((3, 3), dtype=np.int64)
    one, other = np.array([0, 2, 2, -100, 1, 2]), np.array([1, 0, 0, 1, -100, 2])
    add_pairs(pairs, one, other)
    add_pairs(pairs, one[:2], other[:2])
    assert pairs.tolist() == [[0, 2, 0], [0, 0, 0], [3, 0, 1]]


def test_tables_need_not_be_square() -> None:
    pairs = np.zeros((2, 3), dtype=np.int64)
    add_pairs(pairs, np.array([0, 1, 1, -100]), np.array([2, 0, 0, 1]))
    assert pairs.tolist() == [[0, 0, 1], [2, 0, 0]]
