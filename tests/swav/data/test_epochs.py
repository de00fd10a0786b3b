from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swav_testing.banks import make_config, make_index

from swav.data.epochs import EpochStretch, epoch_order
from swav.data.index import DatasetIndex
from swav.data.order import EpochOrder


def stretch_of(rows: list[int], *, batch: int, lanes: int, num_steps: int, epoch: int) -> EpochStretch:
    overrides = [f"optim.global_batch={batch}", f"data.lanes={lanes}", f"data.epoch_images={batch * num_steps}"]
    found = epoch_order(make_config(None, *overrides), make_index(tuple(rows)), epoch)
    assert isinstance(found, EpochStretch)
    return found


def pass_of(index: DatasetIndex, number: int) -> EpochOrder:
    found = epoch_order(make_config(), index, number)
    assert isinstance(found, EpochOrder)
    return found


def test_without_a_stated_number_of_images_an_epoch_is_a_pass() -> None:
    index = make_index()
    for epoch in (0, 3):
        order = pass_of(index, epoch)
        assert sorted(np.concatenate([order.batch(step) for step in range(order.num_steps)])) == list(range(103))
    assert pass_of(index, 0).batch(0).tolist() != pass_of(index, 1).batch(0).tolist()


def test_stretches_one_after_another_are_the_passes() -> None:
    index = make_index()
    passes = [pass_of(index, number) for number in range(6)]
    expected = [order.batch(step).tolist() for order in passes for step in range(order.num_steps)]
    config = make_config(None, "data.epoch_images=95")  # three batches of 24, rounded down
    found = []
    for epoch in range(10):
        stretch = epoch_order(config, index, epoch)
        assert stretch.num_steps == 3
        batches = [stretch.rank_batch(step, 0, 1)[0].tolist() for step in range(3)]
        assert [len(batch) for batch in batches] == [stretch.batch_size(step) for step in range(3)]
        assert sum(len(batch) for batch in batches) == stretch.num_samples
        found += batches
    assert found == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any),
    lanes=st.integers(1, 8),
    per_lane=st.integers(1, 3),
    num_steps=st.integers(1, 12),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_a_lane_gets_what_the_rank_of_a_world_with_one_per_lane_would(
    rows: list[int], lanes: int, per_lane: int, num_steps: int, epoch: int, data: st.DataObject
) -> None:
    stretch = stretch_of(rows, batch=lanes * per_lane, lanes=lanes, num_steps=num_steps, epoch=epoch)
    first = data.draw(st.integers(0, num_steps))
    end = data.draw(st.integers(first, num_steps))
    batches = [stretch.rank_batch(step, 0, 1)[0] for step in range(num_steps)]
    for lane in range(lanes):
        expected = [
            batch[len(batch) * lane // lanes : len(batch) * (lane + 1) // lanes].tolist()
            for batch in batches[first:end]
        ]
        assert stretch.lane_batches(lane, first, end).tolist() == list(chain(*expected))
    assert stretch.num_samples == sum(len(batch) for batch in batches)


def test_ranks_tile_every_batch_of_a_stretch() -> None:
    stretch = stretch_of([40, 30, 33], batch=24, lanes=8, num_steps=7, epoch=2)
    for step in range(7):
        whole, _ = stretch.rank_batch(step, 0, 1)
        for world_size in (2, 3, 8):
            parts = [stretch.rank_batch(step, rank, world_size) for rank in range(world_size)]
            assert np.concatenate([ids for ids, _ in parts]).tolist() == whole.tolist()
            ranges = [stretch.rank_range(step, rank, world_size) for rank in range(world_size)]
            assert ranges == [(offset, offset + len(ids)) for ids, offset in parts]


@pytest.mark.parametrize("step", [-1, 3])
def test_steps_outside_a_stretch_are_refused(step: int) -> None:
    stretch = stretch_of([100], batch=24, lanes=8, num_steps=3, epoch=1)
    for ask in (stretch.batch_size, lambda step: stretch.rank_batch(step, 0, 1)):
        with pytest.raises(ValueError, match=f"step {step} is outside this epoch's 3 steps"):
            ask(step)


def test_a_stretch_refuses_a_world_that_the_smallest_batch_of_a_pass_cannot_feed() -> None:
    stretch_of([48], batch=24, lanes=24, num_steps=1, epoch=0).check_world(24)
    with pytest.raises(ValueError, match="smallest batch of the epoch has 12 samples"):
        stretch_of([25], batch=24, lanes=24, num_steps=1, epoch=0).check_world(24)
    with pytest.raises(ValueError, match="more than 8 lanes"):
        stretch_of([48], batch=24, lanes=8, num_steps=1, epoch=0).check_world(9)
