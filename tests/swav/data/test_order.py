import hashlib
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swav.data.order import EpochOrder, Ids, substitutes
from swav.partition import share


def _order(
    rows: list[int] | Ids,
    *,
    batch: int,
    lanes: int,
    chunk_rows: int = 4,
    window_chunks: int = 4,
    seed: int = 31,
    epoch: int = 0,
) -> EpochOrder:
    return EpochOrder(
        np.asarray(rows),
        chunk_rows=chunk_rows,
        seed=seed,
        epoch=epoch,
        global_batch=batch,
        num_lanes=lanes,
        window_chunks=window_chunks,
    )


def _epoch(order: EpochOrder) -> Ids:
    return np.concatenate([order.batch(step) for step in range(order.num_steps)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40), st.just(200)), min_size=1, max_size=6),
    lanes=st.integers(2, 12),
    per_lane=st.integers(1, 5),
    chunk_rows=st.sampled_from([1, 2, 3, 8, 64]),
    window_chunks=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_in_batches_of_even_size(
    rows: list[int], lanes: int, per_lane: int, chunk_rows: int, window_chunks: int, epoch: int
) -> None:
    rows = [*rows, 1]
    size, total = lanes * per_lane, sum(rows)
    order = _order(rows, batch=size, lanes=lanes, chunk_rows=chunk_rows, window_chunks=window_chunks, epoch=epoch)
    batches = [order.batch(step) for step in range(order.num_steps)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(total))
    sizes = [len(batch) for batch in batches]
    assert sizes == [order.batch_size(step) for step in range(order.num_steps)]
    assert len(sizes) == -(-total // size)
    if total % size == 0:
        assert set(sizes) == {size}
    elif total > size:
        assert set(sizes[:-2]) <= {size}
        assert abs(sizes[-1] - sizes[-2]) <= 1
        assert min(sizes) * 2 >= size


@pytest.mark.parametrize("rows", [[1], [7], [63], [64], [65], [1] * 100, [300, 1, 1, 1], [0, 0, 129, 0]])
def test_every_sample_once_at_the_edges(rows: list[int]) -> None:
    for batch, lanes in [(64, 64), (64, 1), (1, 1), (8, 4)]:
        assert sorted(_epoch(_order(rows, batch=batch, lanes=lanes)).tolist()) == list(range(sum(rows)))


def _gathered(order: EpochOrder, step: int, world_size: int) -> Ids:
    parts: list[Ids] = []
    for rank in range(world_size):
        ids, offset = order.rank_batch(step, rank, world_size)
        assert offset == sum(len(part) for part in parts)
        parts.append(ids)
    return np.concatenate(parts)


def test_the_order_is_the_same_for_every_world() -> None:
    order = _order([301, 1, 650, 77, 900, 5], batch=128, lanes=64, chunk_rows=8)
    expected = hashlib.sha256(_epoch(order).tobytes()).hexdigest()
    assert order.num_steps > 12
    worlds = np.random.default_rng(0).integers(1, 60, order.num_steps)
    for sizes in [[w] * order.num_steps for w in (1, 2, 3, 5, 7, 64)] + [np.repeat(worlds, 3)]:
        steps = [_gathered(order, step, int(sizes[step])) for step in range(order.num_steps)]
        assert hashlib.sha256(np.concatenate(steps).tobytes()).hexdigest() == expected


def test_worlds_drawn_anew_from_1_to_512_give_every_sample_once_in_one_order() -> None:
    rows = [3001, 10, 4005, 5300]
    order = _order(rows, batch=1024, lanes=512)
    worlds = [512, *np.random.default_rng(1).integers(1, 513, order.num_steps - 2).tolist(), 511]
    steps = [_gathered(order, step, world_size) for step, world_size in enumerate(worlds)]
    found = np.concatenate(steps)
    assert hashlib.sha256(found.tobytes()).digest() == hashlib.sha256(_epoch(order).tobytes()).digest()
    assert sorted(found.tolist()) == list(range(sum(rows)))


def test_a_rank_says_which_part_of_the_batch_is_its_own() -> None:
    order = _order([301, 1, 650, 77, 900, 5], batch=128, lanes=64, chunk_rows=8)
    for step in range(order.num_steps):
        for world_size in (1, 3, 60):
            ends = 0
            for rank in range(world_size):
                first, end = order.rank_range(step, rank, world_size)
                ids, offset = order.rank_batch(step, rank, world_size)
                assert (first, end - first) == (ends, len(ids))
                assert first == offset
                ends = end
            assert ends == order.batch_size(step)


shapes = {
    "rows": st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40), st.just(200)), min_size=1, max_size=5).filter(
        any
    ),
    "lanes": st.integers(1, 12),
    "per_lane": st.integers(1, 4),
    "chunk_rows": st.sampled_from([1, 3, 64]),
    "epoch": st.integers(0, 3),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**shapes, data=st.data())
def test_a_lane_gets_what_the_rank_of_a_world_with_one_per_lane_would(
    rows: list[int], lanes: int, per_lane: int, chunk_rows: int, epoch: int, data: st.DataObject
) -> None:
    order = _order(rows, batch=lanes * per_lane, lanes=lanes, chunk_rows=chunk_rows, epoch=epoch)
    first = data.draw(st.integers(0, order.num_steps))
    end = data.draw(st.integers(first, order.num_steps))
    batches = [order.batch(step) for step in range(first, end)]
    for lane in range(lanes):
        # a world of so many ranks may be refused, where one would have no sample in the smallest batch
        expected = [b[len(b) * lane // lanes : len(b) * (lane + 1) // lanes].tolist() for b in batches]
        assert order.lane_batches(lane, first, end).tolist() == list(chain(*expected))
        if order.batch_size(order.num_steps - 1) >= lanes:
            of_rank = [order.rank_batch(step, lane, lanes)[0].tolist() for step in range(first, end)]
            assert expected == of_rank


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**shapes)
def test_a_share_is_that_of_its_lanes_and_none_is_empty(
    rows: list[int], lanes: int, per_lane: int, chunk_rows: int, epoch: int
) -> None:
    order = _order(rows, batch=lanes * per_lane, lanes=lanes, chunk_rows=chunk_rows, epoch=epoch)
    for world_size in range(1, lanes + 1):
        try:
            order.check_world(world_size)
        except ValueError:
            sizes = [order.batch_size(step) for step in range(order.num_steps)]
            assert min(sizes) < lanes  # else every lane, and so every rank, has a sample
            continue
        for step in {0, max(order.num_steps - 2, 0), order.num_steps - 1}:
            parts = [order.rank_batch(step, rank, world_size)[0].tolist() for rank in range(world_size)]
            assert all(parts)
            assert list(chain(*parts)) == order.batch(step).tolist()
            for rank, part in enumerate(parts):
                own = range(*share(lanes, rank, world_size))
                assert part == list(chain(*(order.lane_batches(lane, step, step + 1).tolist() for lane in own)))


def test_lanes_of_steps_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="step 4 is outside this epoch's 4 steps"):
        _order([64], batch=16, lanes=4).lane_batches(0, 3, 5)


def test_seeking_equals_walking() -> None:
    rows = [301, 40, 650]
    walked = _order(rows, batch=32, lanes=16)
    batches = [walked.batch(step) for step in range(walked.num_steps)]
    for step in reversed(range(walked.num_steps)):
        assert _order(rows, batch=32, lanes=16).batch(step).tolist() == batches[step].tolist()


def test_epochs_seeds_and_the_shards_differ_in_order() -> None:
    runs = [(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders = [_epoch(_order([500, 500], batch=50, lanes=10, seed=seed, epoch=epoch)) for seed, epoch in runs]
    orders.append(np.arange(1000))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


def test_a_rank_reads_only_chunks_of_its_lanes() -> None:
    order = _order([6400], batch=64, lanes=16, chunk_rows=8)
    owner: dict[int, int] = {}
    for step in range(order.num_steps - 8):  # the rest of the lanes is shared
        for rank in range(4):
            for chunk in order.rank_batch(step, rank, 4)[0] // 8:
                assert owner.setdefault(int(chunk), rank) == rank


def _new_chunks(order: EpochOrder, chunk_rows: int, rank: int, world_size: int) -> list[int]:
    seen: set[int] = set()
    counts = []
    for step in range(order.num_steps):
        chunks = set((order.rank_batch(step, rank, world_size)[0] // chunk_rows).tolist())
        counts.append(len(chunks - seen))
        seen |= chunks
    return counts


def test_lanes_need_new_chunks_at_different_steps() -> None:
    num_chunks, lanes, filled = 1600, 32, 16  # steps until empty caches hold the first windows
    order = _order([32 * num_chunks], batch=8 * lanes, lanes=lanes, chunk_rows=32, window_chunks=16)
    mean = num_chunks / order.num_steps
    whole = _new_chunks(order, 32, 0, 1)
    assert sum(whole) == num_chunks
    assert max(whole[filled:]) < 4 * mean  # 26 times, were all windows to begin together
    for rank in range(4):
        assert max(_new_chunks(order, 32, rank, 4)[filled:]) < 8 * mean / 4


def test_class_sorted_shards_give_mixed_batches_to_the_last() -> None:
    num_classes, batch, rows = 200, 1024, [1003] * 200  # each shard ends in a short chunk: lanes differ in length
    total = sum(rows)
    labels = np.arange(total) * num_classes // total
    order = _order(rows, batch=batch, lanes=256, chunk_rows=16, window_chunks=16)
    shuffled = np.random.default_rng(0).permutation(total)

    def entropy(ids: Ids) -> float:
        share = np.bincount(labels[ids], minlength=num_classes) / len(ids)
        return float(-(share[share > 0] * np.log2(share[share > 0])).sum())

    ours = [entropy(order.batch(step)) for step in range(order.num_steps)]
    ideal = np.mean([entropy(shuffled[start : start + batch]) for start in range(0, total - batch, batch)])
    assert min(ours) >= 0.98 * ideal
    assert np.mean(ours) >= 0.99 * ideal


def test_a_billion_samples_need_little_memory() -> None:
    rows = 10_000 - np.arange(100_000) % 7
    tracemalloc.start()
    order = _order(rows, batch=4096, lanes=512, chunk_rows=64, window_chunks=16)
    seen = np.concatenate([order.rank_batch(step, 300, 512)[0] for step in (0, 200_000, order.num_steps - 1)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6
    assert order.num_samples == rows.sum() > 999e6
    assert 0 <= seen.min() <= seen.max() < order.num_samples


def test_more_ranks_than_lanes_are_refused() -> None:
    order = _order([1000], batch=64, lanes=16)
    order.check_world(16)
    with pytest.raises(ValueError, match=r"17 ranks are more than 16 lanes; raise data\.lanes"):
        order.rank_batch(0, 0, 17)


def test_a_batch_smaller_than_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smallest batch .* has 10 samples .*too few for 11 ranks; use at most 8"):
        _order([10], batch=64, lanes=16).rank_batch(0, 0, 11)
    with pytest.raises(ValueError, match="smallest batch of the epoch has 32 samples"):
        _order([65], batch=64, lanes=64).check_world(33)


@pytest.mark.parametrize(
    ("rows", "batch", "lanes", "message"),
    [
        ([10], 10, 3, "3 lanes do not divide the global batch 10"),
        ([], 4, 2, "0 shards hold 0"),
        ([0, 0], 4, 2, "2 shards hold 0"),
        ([4], 0, 1, "must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(rows: list[int], batch: int, lanes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _order(rows, batch=batch, lanes=lanes)


@pytest.mark.parametrize("step", [-1, 4])
def test_steps_outside_the_epoch_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside this epoch's 4 steps"):
        _order([64], batch=16, lanes=4).batch(step)


def test_substitutes_are_the_rest_of_the_shard_from_the_next_on_and_then_the_next_shards() -> None:
    offsets = np.array([0, 3, 3, 8, 9])
    assert list(substitutes(offsets, 5)) == [6, 7, 3, 4, 8, 0, 1, 2]
    assert list(substitutes(offsets, 2)) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert list(substitutes(offsets, 8)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert list(substitutes(np.array([0, 1]), 0)) == []


def test_substitutes_leave_a_broken_shard_soon_and_miss_no_sample() -> None:
    offsets = np.array([0, 100, 150, 150, 190])
    for sample in (0, 99, 120, 189):
        found = list(substitutes(offsets, sample))
        assert sorted([*found, sample]) == list(range(190))
        shard = np.searchsorted(offsets, sample, side="right")
        assert (np.searchsorted(offsets, found[:17], side="right") == shard).tolist() == [True] * 16 + [False]
