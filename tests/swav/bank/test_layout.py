import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swav_testing.banks import make_config, make_index, make_layout

from swav.bank import layout as layout_module
from swav.bank.layout import BankLayout, bank_layout, is_forward_pass, order_epoch_of
from swav.config import SelaV2Config


def all_ids(layout: BankLayout) -> list[int]:
    parts = [layout.ids(segment) for segment in range(layout.num_segments)]
    assert [len(part) for part in parts] == [layout.num_rows(segment) for segment in range(layout.num_segments)]
    assert [len(part) for part in parts] == layout.rows.reshape(-1).tolist()
    return [int(sample) for part in parts for sample in part]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any),
    lanes=st.integers(1, 12),
    per_lane=st.integers(1, 4),
    steps=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_segments_hold_every_sample_once(rows: list[int], lanes: int, per_lane: int, steps: int, epoch: int) -> None:
    config = make_config(None, f"optim.global_batch={lanes * per_lane}", f"data.lanes={lanes}")
    layout = make_layout(make_index(tuple(rows)), config, epoch=epoch, steps=steps)
    assert layout.num_lanes == lanes
    assert sorted(all_ids(layout)) == list(range(sum(rows)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any),
    lanes=st.integers(1, 8),
    per_lane=st.integers(1, 3),
    num_batches=st.integers(1, 9),
    steps=st.integers(1, 4),
)
def test_segments_of_stretches_hold_every_sample_once_per_pass(
    rows: list[int], lanes: int, per_lane: int, num_batches: int, steps: int
) -> None:
    batch = lanes * per_lane
    config = make_config(
        None, f"optim.global_batch={batch}", f"data.lanes={lanes}", f"data.epoch_images={batch * num_batches}"
    )
    index = make_index(tuple(rows))
    per_pass = -(-sum(rows) // batch)
    layouts = [make_layout(index, config, epoch=epoch, steps=steps) for epoch in range(per_pass)]
    ids = [sample for layout in layouts for sample in all_ids(layout)]
    assert [layout.order.num_samples for layout in layouts] == [int(layout.rows.sum()) for layout in layouts]
    # so many stretches as a pass has steps are as many passes as a stretch has steps
    assert np.bincount(ids, minlength=sum(rows)).tolist() == [num_batches] * sum(rows)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_a_segment_is_what_the_rank_of_its_lane_gets_in_its_block(world_size: int) -> None:
    layout = make_layout(steps=2)
    found: list[list[list[int]]] = [[[] for _ in range(8)] for _ in range(3)]
    for step in range(layout.order.num_steps):
        parts = [layout.order.rank_batch(step, rank, world_size)[0] for rank in range(world_size)]
        batch, size = np.concatenate(parts), layout.order.batch_size(step)
        for lane in range(8):
            found[step // 2][lane] += batch[size * lane // 8 : size * (lane + 1) // 8].tolist()
    for segment in range(layout.num_segments):
        block, lane = layout.place(segment)
        assert layout.ids(segment).tolist() == found[block][lane]


def test_names_and_places_of_segments_are_their_own() -> None:
    layout = make_layout(steps=2)
    assert layout.num_segments == 3 * 8
    assert len({layout.name(segment) for segment in range(24)}) == 24
    assert layout.name(17) == "segment-000002-00001.npy"


def test_open_segments_of_all_ranks_fit_into_a_stated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, index = make_config(), make_index((2000,))
    for open_bytes in (1, 24 * 2 * 16 * 2 * 7, 1 << 30):
        monkeypatch.setattr(layout_module, "_OPEN_BYTES", open_bytes)
        layout = bank_layout(config, index, 0)
        most = layout.steps * 24 * 2 * 16 * 2
        assert most <= open_bytes or layout.steps == 1
        assert sorted(all_ids(layout)) == list(range(2000))
    assert layout.steps == layout_module._MAX_STEPS


def test_labels_are_made_of_the_epoch_before_unless_it_saw_other_images() -> None:
    whole = make_config(SelaV2Config())
    stretches = make_config(None, "data.epoch_images=48")
    assert [(is_forward_pass(whole, epoch), order_epoch_of(whole, epoch)) for epoch in range(3)] == [
        (True, 0),
        (False, 0),
        (False, 1),
    ]
    assert [(is_forward_pass(stretches, epoch), order_epoch_of(stretches, epoch)) for epoch in range(3)] == [
        (True, 0),
        (True, 1),
        (True, 2),
    ]
