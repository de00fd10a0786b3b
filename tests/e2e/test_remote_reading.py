"""Batches from an object store: equal to those of local shards, without growth, and ended cleanly."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swav_testing.s3 import S3Server, moto_server
from swav_testing.shards import write_dataset

from swav.config import CropConfig
from swav.data.batch import RawBatch
from swav.data.index import DatasetIndex, build_index, open_index
from swav.data.index_build import Building
from swav.data.loader import Loader
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ShardReader

ROWS = [64] * 8
CROPS = (CropConfig(num_crops=2, size_px=16, scale=(0.3, 1.0)), CropConfig(num_crops=1, size_px=8, scale=(0.1, 0.3)))
BLOCK_BYTES = 32 * 2048


def loader_of(reader: ShardReader, **settings: int) -> Loader:
    index = reader.index

    def order(epoch: int) -> EpochOrder:
        return EpochOrder(
            index.rows_per_shard, chunk_rows=8, seed=1, epoch=epoch, global_batch=8, num_lanes=4, window_chunks=2
        )

    return Loader(
        reader,
        order,
        CROPS,
        substitutes=lambda sample: substitutes(index.row_offsets, sample),
        seed=2,
        max_quarantined=0,
        **({"num_threads": 2} | settings),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    data = write_dataset(tmp_path_factory.mktemp("data"), ROWS, jpeg=True)
    return build_index(str(data), str(data), Building(checksums=True))


@pytest.fixture(scope="module")
def server(local: DatasetIndex) -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("data")
        server.upload_folder("data", "", Path(local.folder))
        yield server


@pytest.fixture
def remote(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetIndex:
    for name, value in {**server.env, "SWAV_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    return open_index("s3://data")


def assert_equal(one: RawBatch, other: RawBatch) -> None:
    assert (one.ids == other.ids).all()
    assert not other.substituted.any()
    for crops, other_crops in zip(one.crops, other.crops, strict=True):
        assert torch.equal(crops, other_crops)


@pytest.mark.parametrize(
    ("fetch_bytes", "cache_bytes", "settings"),
    [
        (1, 10**9, {"num_threads": 1, "read_ahead_batches": 0}),
        (BLOCK_BYTES, 10**9, {"num_threads": 3}),
        (BLOCK_BYTES, 2 * BLOCK_BYTES, {"read_ahead_batches": 3}),
        (10**12, 1, {"num_threads": 2}),
    ],
)
def test_batches_do_not_depend_on_where_and_how_shards_are_read(
    local: DatasetIndex, remote: DatasetIndex, fetch_bytes: int, cache_bytes: int, settings: dict[str, int]
) -> None:
    with (
        ShardReader(local) as reader,
        ShardReader(remote, fetch_bytes=fetch_bytes, cache_bytes=cache_bytes) as remote_reader,
    ):
        expected = list(loader_of(reader).epoch(3))
        for start in (0, 50):
            found = loader_of(remote_reader, **settings).epoch(3, start)
            for one, other in zip(expected[start:], found, strict=True):
                assert_equal(one, other)


def test_ranks_together_read_the_same_batches(local: DatasetIndex, remote: DatasetIndex) -> None:
    with ShardReader(local) as reader, ShardReader(remote, cache_bytes=10**9, fetch_bytes=BLOCK_BYTES) as remote_reader:
        ranks = [loader_of(remote_reader, rank=rank, world_size=3).epoch(0) for rank in range(3)]
        for whole, *parts in zip(loader_of(reader).epoch(0), *ranks, strict=True):
            for group, crops in enumerate(whole.crops):
                assert torch.equal(torch.cat([part.crops[group] for part in parts], dim=1), crops)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_a_thousand_steps_leave_nothing_behind(remote: DatasetIndex, tmp_path: Path) -> None:
    budget = remote.num_bytes // 3  # so that blocks leave and come again
    threads = threading.active_count()
    with ShardReader(remote, fetch_bytes=BLOCK_BYTES, cache_bytes=budget) as reader:
        loader = loader_of(reader)
        seen: list[tuple[int, int, int]] = []
        steps = 0
        for epoch in range(16):
            for batch in loader.epoch(epoch):
                steps += 1
                if steps % 100 == 0:
                    blocks = sum(path.stat().st_size for path in (tmp_path / "blocks").iterdir())
                    assert blocks <= budget + 8
                    seen.append((threading.active_count(), open_files(), resident_bytes()))
                del batch
        assert steps == 1024
    gc.collect()
    warm, last = seen[3], seen[-1]
    assert max(num_threads for num_threads, _, _ in seen) <= threads + 2 + 8 + 8  # decoding, fetching, requests
    assert last[1] <= warm[1] + 16
    assert last[2] - warm[2] < 8 << 20
    assert not list((tmp_path / "blocks").glob("*.partial"))


def test_leaving_in_the_middle_ends_all_threads_and_files(remote: DatasetIndex, tmp_path: Path) -> None:
    with ShardReader(remote, fetch_bytes=1, cache_bytes=10**9) as reader:
        batches = loader_of(reader).epoch(0)
        next(batches)
        batches.close()
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("swav-loader")] == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("swav-fetch")] == []
    assert not list((tmp_path / "blocks").glob("*.partial"))
