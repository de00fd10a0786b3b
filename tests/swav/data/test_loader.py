"""Batches do not depend on threads or ranks, are full in spite of broken images, and leave nothing behind."""

import io
import logging
import os
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from swav.config import CropConfig
from swav.data.batch import RawBatch
from swav.data.loader import Loader, Quarantined
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ChecksumError

CROPS = (CropConfig(num_crops=2, size_px=24, scale=(0.3, 1.0)), CropConfig(num_crops=3, size_px=16, scale=(0.1, 0.3)))
PAPER = (
    CropConfig(num_crops=2, size_px=224, scale=(0.14, 1.0)),
    CropConfig(num_crops=6, size_px=96, scale=(0.05, 0.14)),
)


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def picture(sample: int, height: int = 40, width: int = 50) -> Image.Image:
    draws = np.random.default_rng(sample)
    small = Image.fromarray(draws.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


class Shards:
    """Images in memory, in shards of ten, read as from disk."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images
        self.rows = np.array([len(images[start : start + 10]) for start in range(0, len(images), 10)])

    def image(self, sample_id: int) -> bytes:
        return self.images[sample_id]

    def name(self, sample_id: int) -> str:
        return f"shard-{sample_id // 10}.tar:{sample_id % 10}"

    def prefetch(self, ids: NDArray[np.int64]) -> bool:
        return True

    def abandon(self) -> None:
        pass

    def substitutes(self, sample_id: int) -> Iterator[int]:
        return substitutes(np.concatenate([[0], np.cumsum(self.rows)]), sample_id)

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.rows, chunk_rows=3, seed=1, epoch=epoch, global_batch=12, num_lanes=6, window_chunks=2)


def loader_of(shards: Shards, **settings: object) -> Loader:
    crops = settings.pop("crops", CROPS)
    defaults: dict[str, object] = {"substitutes": shards.substitutes, "seed": 5, "num_threads": 2}
    return Loader(shards, shards.order, crops, **(defaults | settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shards() -> Shards:
    return Shards([encode(picture(sample)) for sample in range(50)])


def assert_equal(one: RawBatch, other: RawBatch) -> None:
    assert (one.epoch, one.step, one.global_offset, one.global_size) == (
        other.epoch,
        other.step,
        other.global_offset,
        other.global_size,
    )
    assert (one.ids == other.ids).all()
    assert (one.substituted == other.substituted).all()
    for crops, other_crops in zip(one.crops, other.crops, strict=True):
        assert torch.equal(crops, other_crops)


def test_batches_have_the_promised_form(shards: Shards) -> None:
    batches = list(loader_of(shards).epoch(0))
    assert [batch.step for batch in batches] == list(range(shards.order(0).num_steps))
    assert sorted(np.concatenate([batch.ids for batch in batches]).tolist()) == list(range(50))
    for batch in batches:
        assert batch.global_size == len(batch.ids)
        assert not batch.substituted.any()
        for crops, group in zip(batch.crops, CROPS, strict=True):
            assert crops.dtype == torch.uint8
            assert crops.shape == (group.num_crops, len(batch.ids), 3, group.size_px, group.size_px)
            assert crops.permute(0, 1, 3, 4, 2).is_contiguous()


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_nothing(shards: Shards, num_threads: int) -> None:
    expected = loader_of(shards, num_threads=1, prefetch_batches=0).epoch(2)
    for one, other in zip(expected, loader_of(shards, num_threads=num_threads).epoch(2), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_same_batch(shards: Shards, world_size: int) -> None:
    ranks = [loader_of(shards, rank=rank, world_size=world_size).epoch(1) for rank in range(world_size)]
    for whole, *parts in zip(loader_of(shards).epoch(1), *ranks, strict=True):
        offset = 0
        for part in parts:
            assert part.global_offset == offset
            assert part.global_size == whole.global_size
            offset += len(part.ids)
        assert (np.concatenate([part.ids for part in parts]) == whole.ids).all()
        for group, crops in enumerate(whole.crops):
            assert torch.equal(torch.cat([part.crops[group] for part in parts], dim=1), crops)


def test_starting_late_equals_never_having_stopped(shards: Shards) -> None:
    whole = list(loader_of(shards).epoch(3))
    for start in range(len(whole) + 1):
        rest = list(loader_of(shards).epoch(3, start))
        for one, other in zip(whole[start:], rest, strict=True):
            assert_equal(one, other)
    with pytest.raises(ValueError, match="cannot start at step 9 of an epoch of 5 steps"):
        loader_of(shards).epoch(3, 9)


def broken_shards() -> tuple[Shards, dict[int, str]]:
    """Fifty images of which five are broken, two of them neighbours."""
    images = [encode(picture(sample)) for sample in range(50)]
    images[7] = images[7][:-30]
    images[8] = b"<html>404</html>" * 10
    images[19] = b""
    images[30] = encode(picture(30), "PNG")[:300]
    images[49] = images[49][:-2]
    reasons = {7: "Premature end", 8: "not an image", 19: "empty", 30: "damaged image", 49: "Premature end"}
    return Shards(images), reasons


def test_broken_images_are_recorded_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    shards, reasons = broken_shards()
    replaced_by = {7: 9, 8: 9, 19: 10, 30: 31, 49: 40}
    records: list[Quarantined] = []
    with caplog.at_level(logging.WARNING):
        batches = list(loader_of(shards, on_quarantine=records.append, max_quarantined=5).epoch(0))
    assert sorted(record.sample_id for record in records) == sorted(reasons)
    for record in records:
        assert reasons[record.sample_id] in record.reason
        assert record.name == shards.name(record.sample_id)
        assert record.name in caplog.text
    ids = np.concatenate([batch.ids for batch in batches])
    substituted = np.concatenate([batch.substituted for batch in batches])
    assert sorted(ids.tolist()) == list(range(50))
    assert sorted(ids[substituted].tolist()) == sorted(reasons)
    # In each place stands the substitute's image, cut by the draws of the sample that it replaces.
    mended = Shards([shards.images[replaced_by.get(sample, sample)] for sample in range(50)])
    for one, other in zip(batches, loader_of(mended).epoch(0), strict=True):
        for crops, other_crops in zip(one.crops, other.crops, strict=True):
            assert torch.equal(crops, other_crops)


def test_broken_images_are_recorded_alike_for_any_number_of_threads() -> None:
    shards, _ = broken_shards()
    seen: list[list[Quarantined]] = [[], [], []]
    for records, num_threads in zip(seen, (1, 2, 5), strict=True):
        for _batch in loader_of(shards, num_threads=num_threads, on_quarantine=records.append).epoch(0):
            pass
    assert seen[0] == seen[1] == seen[2]


DOT = encode(Image.new("RGB", (1, 1)))


@st.composite
def damaged_data(draw: st.DrawFn) -> tuple[list[int], set[int], EpochOrder]:
    """Rows of shards, some of them empty; which samples are broken, often neighbours; and an order."""
    rows = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda rows: sum(rows) >= 4))
    total = sum(rows)
    first, run = draw(st.integers(0, total - 1)), draw(st.integers(0, 15))
    broken = draw(st.sets(st.integers(0, total - 1))) | set(range(first, min(first + run, total)))
    broken.discard(draw(st.integers(0, total - 1)))  # one at least is sound
    lanes = draw(st.sampled_from([3, 4, 6]))
    order = EpochOrder(
        np.array(rows),
        chunk_rows=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 99)),
        epoch=draw(st.integers(0, 3)),
        global_batch=lanes * draw(st.integers(1, 3)),
        num_lanes=lanes,
        window_chunks=draw(st.integers(1, 3)),
    )
    return rows, broken, order


def is_fed(order: EpochOrder, world_size: int) -> bool:
    """Whether every rank of such a world has a sample in every batch."""
    try:
        order.check_world(world_size)
    except ValueError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(damaged_data())
def test_every_sample_is_delivered_or_quarantined_exactly_once_by_any_number_of_ranks(
    case: tuple[list[int], set[int], EpochOrder],
) -> None:
    rows, broken, order = case
    images = [b"broken" if sample in broken else DOT for sample in range(sum(rows))]
    offsets = np.concatenate([[0], np.cumsum(rows)])
    crops = (CropConfig(num_crops=2, size_px=8, scale=(0.5, 1.0)),)
    for world_size in filter(partial(is_fed, order), (1, 2, 3)):
        delivered: list[int] = []
        replaced: list[int] = []
        recorded: set[int] = set()
        for rank in range(world_size):
            records: list[Quarantined] = []
            loader = Loader(
                Shards(images),
                lambda _: order,
                crops,
                substitutes=lambda sample: substitutes(offsets, sample),
                seed=0,
                num_threads=2,
                rank=rank,
                world_size=world_size,
                max_quarantined=len(broken),
                on_quarantine=records.append,
            )
            for batch in loader.epoch(0):
                delivered += batch.ids[~batch.substituted].tolist()
                replaced += batch.ids[batch.substituted].tolist()
            found = [record.sample_id for record in records]
            assert len(set(found)) == len(found)
            recorded |= set(found)
        assert sorted(delivered) == [sample for sample in range(len(images)) if sample not in broken]
        assert sorted(replaced) == sorted(recorded) == sorted(broken)


def test_too_many_broken_images_stop_the_run() -> None:
    shards, _ = broken_shards()
    with pytest.raises(RuntimeError, match=r"3 broken images .* more than the 2 .*shard-.*max_quarantined_fraction"):
        list(loader_of(shards, max_quarantined=2, num_threads=1).epoch(0))


def test_a_shard_without_any_sound_image_is_replaced_by_the_next(shards: Shards) -> None:
    images = [b"text" if 10 <= sample < 20 or sample == 50 else image for sample, image in enumerate(shards.images)]
    records: list[Quarantined] = []
    batches = list(loader_of(Shards([*images, b"text"]), max_quarantined=11, on_quarantine=records.append).epoch(0))
    assert {record.sample_id for record in records} == {*range(10, 20), 50}
    assert sum(int(batch.substituted.sum()) for batch in batches) == 11
    mended = Shards([images[20] if 10 <= sample < 20 else image for sample, image in enumerate(images)] + [images[0]])
    for one, other in zip(batches, loader_of(mended).epoch(0), strict=True):
        for crops, other_crops in zip(one.crops, other.crops, strict=True):
            assert torch.equal(crops, other_crops)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (None, r"no image can be decoded: all 50 that were tried are broken \(the first, shard-.*: not an image"),
        (10, r"11 broken images in one epoch are more than the 10 that are admitted"),
    ],
)
def test_data_without_any_sound_image_stops_the_run(limit: int | None, message: str) -> None:
    records: list[Quarantined] = []
    with pytest.raises(RuntimeError, match=message):
        list(loader_of(Shards([b"text"] * 50), max_quarantined=limit, on_quarantine=records.append).epoch(0))
    assert len(records) == (limit or 49) + 1


def test_odd_images_are_delivered() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = [
        encode(Image.new("RGB", (1, 1), (200, 100, 50)), quality=100, subsampling=0),
        encode(picture(1).convert("CMYK")),
        encode(picture(2).quantize(16), "PNG"),
        encode(Image.fromarray(np.full((30, 40), 32768, dtype=np.uint16)), "PNG"),
        encode(picture(4), exif=exif),
        encode(picture(5).convert("RGBA"), "WEBP"),
    ]
    shards = Shards(odd * 2)
    batches = list(loader_of(shards, max_quarantined=0).epoch(0))
    assert sum(len(batch.ids) for batch in batches) == 12
    for batch in batches:
        for place in np.flatnonzero(batch.ids % 6 == 3):
            assert (batch.crops[0][:, place] == 128).all()
        for place in np.flatnonzero(batch.ids % 6 == 0):
            colour = batch.crops[1][:, place].float().mean(dim=(0, 2, 3))
            assert (colour - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3  # JPEG


class Failing(Shards):
    def image(self, sample_id: int) -> bytes:
        if sample_id == 23:
            raise OSError("the disk is gone")
        return super().image(sample_id)


def test_a_failing_reader_stops_the_run_and_is_named(shards: Shards) -> None:
    with pytest.raises(RuntimeError, match=r"sample 23 \(shard-2.tar:3\) cannot be read: the disk is gone") as caught:
        list(loader_of(Failing(shards.images)).epoch(0))
    assert isinstance(caught.value.__cause__, OSError)


def leave_early(batches: Generator[RawBatch]) -> None:
    next(batches)
    batches.close()


def read_all(batches: Iterator[RawBatch]) -> None:
    list(batches)


def never_start(batches: Iterator[RawBatch]) -> None:
    del batches


def fail_in_the_loop(batches: Iterator[RawBatch]) -> None:
    try:
        for _ in batches:
            raise KeyError
    except KeyError:
        del batches


@pytest.mark.parametrize("use", [leave_early, read_all, never_start, fail_in_the_loop])
def test_no_thread_outlives_the_epoch(shards: Shards, use: Callable[[Iterator[RawBatch]], None]) -> None:
    before = threading.active_count()
    use(loader_of(shards, num_threads=4).epoch(0))
    assert threading.active_count() == before


def test_no_thread_outlives_a_failure(shards: Shards) -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeError):
        list(loader_of(Failing(shards.images), num_threads=4).epoch(0))
    assert threading.active_count() == before


class Counting(Shards):
    reads = 0

    def image(self, sample_id: int) -> bytes:
        self.reads += 1
        return super().image(sample_id)


def test_the_loader_works_ahead_no_further_than_asked(shards: Shards) -> None:
    counting = Counting(shards.images)
    batches = loader_of(counting, num_threads=1, prefetch_batches=1).epoch(0)
    assert counting.reads == 0
    next(batches)
    deadline = time.monotonic() + 10
    while counting.reads < 24 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert counting.reads == 24  # the batch at hand and the next
    batches.close()


class Fetching(Shards):
    """Notes what it is asked to fetch, and takes so many batches ahead of those that were read."""

    def __init__(self, images: list[bytes], room: int) -> None:
        super().__init__(images)
        self.room = room
        self.fetched: list[int] = []
        self.unread: set[int] = set()
        self.abandoned = 0

    def prefetch(self, ids: NDArray[np.int64]) -> bool:
        new = [sample for sample in ids.tolist() if sample not in self.fetched]
        if len(self.unread) + len(new) > self.room:
            return False
        self.fetched += new
        self.unread.update(new)
        return True

    def image(self, sample_id: int) -> bytes:
        self.unread.discard(sample_id)
        return super().image(sample_id)

    def abandon(self) -> None:
        self.abandoned += 1


def test_coming_batches_are_fetched_in_their_order(shards: Shards) -> None:
    expected = list(loader_of(shards).epoch(4, 1))
    fetching = Fetching(shards.images, room=1000)
    batches = loader_of(fetching, prefetch_batches=0, read_ahead_batches=2).epoch(4, 1)
    assert fetching.fetched == []
    first = next(batches)
    assert fetching.fetched == np.concatenate([batch.ids for batch in expected[:3]]).tolist()
    for one, other in zip([first, *batches], expected, strict=True):
        assert_equal(one, other)
    assert fetching.fetched == np.concatenate([batch.ids for batch in expected]).tolist()
    assert fetching.abandoned == 1


@pytest.mark.parametrize("room", [0, 12, 30])
def test_a_reader_that_has_enough_to_fetch_is_asked_again(shards: Shards, room: int) -> None:
    fetching = Fetching(shards.images, room)
    batches = loader_of(fetching, prefetch_batches=0, num_threads=1).epoch(0)
    for one, other in zip(batches, loader_of(shards).epoch(0), strict=True):
        assert_equal(one, other)
        assert len(fetching.unread) <= room
    assert len(fetching.fetched) == (50 if room else 0)


def test_leaving_early_gives_up_what_is_fetched(shards: Shards) -> None:
    fetching = Fetching(shards.images, room=1000)
    leave_early(loader_of(fetching).epoch(0))
    assert fetching.abandoned == 1


class Rotten(Shards):
    def image(self, sample_id: int) -> bytes:
        if sample_id in (3, 44):
            raise ChecksumError(f"checksum mismatch: the 9 bytes at byte 512 of shard s3://b/{sample_id}.tar")
        return super().image(sample_id)


def test_a_sample_with_a_wrong_checksum_is_replaced_as_a_broken_one(shards: Shards) -> None:
    records: list[Quarantined] = []
    batches = list(loader_of(Rotten(shards.images), on_quarantine=records.append, max_quarantined=2).epoch(0))
    assert sum(int(batch.substituted.sum()) for batch in batches) == 2
    assert {(record.sample_id, record.reason) for record in records} == {
        (sample, f"checksum mismatch: the 9 bytes at byte 512 of shard s3://b/{sample}.tar") for sample in (3, 44)
    }


def test_a_batch_stays_as_it_is_while_others_come(shards: Shards) -> None:
    batches = list(loader_of(shards).epoch(0))
    pointers = {crops.data_ptr() for batch in batches for crops in batch.crops}
    assert len(pointers) == len(batches) * len(CROPS)


def test_torch_threads_are_left_alone(shards: Shards) -> None:
    before = torch.get_num_threads()
    big = Shards([encode(picture(0, 400, 600))] * 12)
    torch.set_num_threads(2)
    try:
        torch.ones(1_000_000).add_(1)  # the main thread's own OpenMP team
        os_threads = len(list(Path("/proc/self/task").iterdir()))
        batches = loader_of(big, num_threads=1, crops=PAPER).epoch(0)
        next(batches)
        # One loader thread, and no OpenMP team of its own.
        assert len(list(Path("/proc/self/task").iterdir())) <= os_threads + 1
        assert torch.get_num_threads() == 2
        list(batches)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_threads": 0},
        {"rank": 2, "world_size": 2},
        {"prefetch_batches": -1},
        {"read_ahead_batches": -1},
        {"crops": ()},
    ],
)
def test_impossible_settings_are_refused(shards: Shards, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a loader needs"):
        loader_of(shards, **settings)


def test_photographs_come_as_the_papers_crops() -> None:
    repository = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("SWAV_SHARED", repository.parent / "shared")) / "data" / "photos500"
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        pytest.skip(f"no photographs in {folder}; set SWAV_SHARED")
    images: list[bytes] = []
    with tarfile.open(paths[0]) as shard:
        for member in shard:
            stream = shard.extractfile(member)
            if stream is not None and member.name.endswith(".jpg"):
                images.append(stream.read())
    batches = list(loader_of(Shards(images), crops=PAPER, max_quarantined=0).epoch(0))
    assert sum(len(batch.ids) for batch in batches) == len(images) == 100
    brightness = np.concatenate([batch.crops[0].double().mean(dim=(0, 2, 3, 4)).numpy() for batch in batches])
    assert brightness.std() > 20  # each place holds a photograph of its own
