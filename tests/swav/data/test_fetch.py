"""Blocks cover the shards, come once, ahead of their use and within bounds, and failures reach those who read."""

import itertools
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from swav_testing.shards import write_dataset

from swav import storage
from swav.data import fetch
from swav.data.cache import AbandonedError, BlockCache
from swav.data.fetch import BlockFetcher, open_cache
from swav.data.index import DatasetIndex, build_index

ROWS = [40, 1, 16, 23]
STARTS = np.concatenate([[0], np.cumsum(ROWS)])


class Store:
    """Local files under remote names; notes the ranges that are asked for, and can be held up or fail."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ranges: list[tuple[str, int, int]] = []
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Semaphore(0)
        self.error: Exception | None = None

    def open_file(self, url: str, *, etag: str = "") -> "Shard":
        return Shard(self, str(url), self._folder / storage.name_of(url))


class Shard:
    def __init__(self, store: Store, url: str, path: Path) -> None:
        self.url, self._store, self._path = url, store, path
        found = path.stat()
        self.stat = storage.FileStat(found.st_size, 0, "")

    def num_bytes(self) -> int:
        return self.stat.num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        return self._path.read_bytes()[offset : offset + num_bytes]

    def stream(self, offset: int, num_bytes: int) -> Iterator[bytes]:
        self._store.ranges.append((storage.name_of(self.url), offset, num_bytes))
        self._store.waiting.release()
        if self._store.error is not None:
            raise self._store.error
        data = self.read(offset, num_bytes)
        yield data[:100]
        assert self._store.open.wait(30)
        yield data[100:]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(write_dataset(tmp_path / "data", ROWS))
    build_index(str(tmp_path / "data"), str(tmp_path / "data"))
    monkeypatch.setattr(storage, "open_file", store.open_file)
    return store


@pytest.fixture
def index(store: Store, tmp_path: Path) -> DatasetIndex:
    """The shards' index, in which they have remote names."""
    local = build_index(str(tmp_path / "data"), str(tmp_path / "data"))
    table = local.table.astype(
        [(name, "S40" if name == "name" else local.table.dtype[name]) for name in local.table.dtype.names]
    )
    table["name"] = [b"s3://bucket/" + name for name in local.table["name"]]
    return replace(local, table=table, chunk_rows=4)


def make(
    index: DatasetIndex, folder: Path, *, fetch_rows: int = 8, budget: int = 10**9, threads: int = 4
) -> BlockFetcher:
    cache = BlockCache(folder / "blocks", budget_bytes=budget)
    fetch_bytes = math.ceil(fetch_rows * index.num_bytes / index.num_samples)
    return BlockFetcher(index, cache, fetch_bytes=fetch_bytes, num_threads=threads)


def image(fetcher: BlockFetcher, index: DatasetIndex, sample: int) -> bytes:
    shard, row = index.locate_one(sample)
    entry = index.rows(shard)[row]
    return fetcher.block(shard, row).read(int(entry["image_offset"]), int(entry["image_bytes"]))


def prefetch(fetcher: BlockFetcher, index: DatasetIndex, samples: list[int]) -> bool:
    return fetcher.prefetch(*index.locate(np.array(samples, dtype=np.int64)))


@pytest.mark.parametrize(
    ("fetch_rows", "block_rows"), [(0.001, 4), (4, 4), (5, 4), (8, 8), (12.5, 8), (30, 16), (64, 64), (10**9, 64)]
)
def test_blocks_are_runs_of_a_power_of_two_of_rows_up_to_the_shard(
    store: Store, index: DatasetIndex, tmp_path: Path, fetch_rows: float, block_rows: int
) -> None:
    fetcher = BlockFetcher(
        index,
        BlockCache(tmp_path / "blocks"),
        fetch_bytes=math.ceil(fetch_rows * index.num_bytes / index.num_samples),
    )
    assert fetcher.block_rows == block_rows
    order = np.random.default_rng(0).permutation(sum(ROWS)).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda sample: image(fetcher, index, sample), order)) == [b"image-%d" % i for i in order]
    assert len(store.ranges) == sum(-(-rows // block_rows) for rows in ROWS)
    for (shard, start, size), (next_shard, next_start, _) in itertools.pairwise(sorted(store.ranges)):
        assert shard < next_shard or start + size <= next_start
    fetcher.close()


def test_a_block_has_all_that_its_rows_need(store: Store, index: DatasetIndex, tmp_path: Path) -> None:
    fetcher = make(index, tmp_path)
    whole = (tmp_path / "data" / "shard-000000.tar").read_bytes()
    rows = index.rows(0)
    for row in range(40):
        block = fetcher.block(0, row)
        start, end = int(rows["image_offset"][row]) - 512, int(rows["cls_offset"][row] + rows["cls_bytes"][row])
        assert block.read(start, end - start) == b"".join(block.stream(start, end - start)) == whole[start:end]
        assert block.num_bytes() == len(whole)
    assert fetcher.block(0, 8).read(0, 512) == b""  # outside
    fetcher.close()


def test_what_is_prefetched_is_there_when_it_is_read(store: Store, index: DatasetIndex, tmp_path: Path) -> None:
    fetcher = make(index, tmp_path)
    threads = threading.active_count()
    assert store.ranges == []
    samples = [0, 1, 9, 41, 2]
    assert prefetch(fetcher, index, samples)
    assert [image(fetcher, index, sample) for sample in samples] == [b"image-%d" % sample for sample in samples]
    assert prefetch(fetcher, index, samples)
    assert sorted(name for name, _, _ in store.ranges) == ["shard-000000.tar"] * 2 + ["shard-000002.tar"]
    fetcher.close()
    assert threading.active_count() == threads


def test_prefetching_stops_at_its_budget_until_something_is_read(
    store: Store, index: DatasetIndex, tmp_path: Path
) -> None:
    row_bytes = index.num_bytes / index.num_samples
    fetcher = make(index, tmp_path, budget=round(4 * 3.5 * 8 * row_bytes))  # a quarter holds three blocks
    everything = list(range(sum(ROWS)))
    assert not prefetch(fetcher, index, everything)
    assert not prefetch(fetcher, index, everything)
    for sample in (0, 8, 16):
        assert image(fetcher, index, sample) == b"image-%d" % sample
    assert len(store.ranges) == 3
    assert prefetch(fetcher, index, [0, 24])
    assert not prefetch(fetcher, index, everything)
    fetcher.abandon()  # what was waiting for its use counts no more
    assert prefetch(fetcher, index, [40, 41, 57])
    fetcher.close()


def test_ranks_of_a_host_share_what_may_be_fetched_ahead(
    store: Store, index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fetcher = make(index, tmp_path, budget=round(2 * 4 * 1.5 * 8 * index.num_bytes / index.num_samples))
    assert prefetch(fetcher, index, [0])
    assert not prefetch(fetcher, index, [8])
    fetcher.close()


def test_a_budget_below_one_block_still_lets_one_be_prefetched(
    store: Store, index: DatasetIndex, tmp_path: Path
) -> None:
    fetcher = make(index, tmp_path, budget=100)
    assert prefetch(fetcher, index, [0])
    assert not prefetch(fetcher, index, [8])
    assert [image(fetcher, index, sample) for sample in range(sum(ROWS))] == [b"image-%d" % i for i in range(sum(ROWS))]
    fetcher.close()


def test_a_reader_does_not_queue_behind_what_is_prefetched(store: Store, index: DatasetIndex, tmp_path: Path) -> None:
    fetcher = make(index, tmp_path, threads=1)
    store.open.clear()
    assert prefetch(fetcher, index, [0, 8, 16, 24])
    assert store.waiting.acquire(timeout=30)
    with ThreadPoolExecutor(2) as pool:
        late, early = pool.submit(image, fetcher, index, 24), pool.submit(image, fetcher, index, 0)
        assert store.waiting.acquire(timeout=30)  # the reader itself fetches the block of sample 24
        assert len(store.ranges) == 2
        store.open.set()
        assert (early.result(), late.result()) == (b"image-0", b"image-24")
    fetcher.close()
    assert len(store.ranges) <= 4


def test_a_failed_prefetch_is_no_error_until_the_sample_is_read(
    store: Store, index: DatasetIndex, tmp_path: Path
) -> None:
    fetcher = make(index, tmp_path)
    store.error = ConnectionError("s3://bucket/shard-000000.tar: gave up")
    assert prefetch(fetcher, index, [0, 8])
    for _ in range(2):
        assert store.waiting.acquire(timeout=30)
    with pytest.raises(ConnectionError, match=r"s3://bucket/shard-000000\.tar"):
        image(fetcher, index, 0)
    store.error = None
    assert image(fetcher, index, 0) == b"image-0"
    fetcher.close()


def test_abandoning_frees_those_who_wait_and_leaves_the_fetcher_usable(
    store: Store, index: DatasetIndex, tmp_path: Path
) -> None:
    fetcher = make(index, tmp_path, threads=1)
    store.open.clear()
    assert prefetch(fetcher, index, [0, 8])
    assert store.waiting.acquire(timeout=30)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(image, fetcher, index, 16)
        assert store.waiting.acquire(timeout=30)
        fetcher.abandon()
        again = pool.submit(image, fetcher, index, 0)
        store.open.set()
        with pytest.raises(AbandonedError):
            waiting.result()
        assert again.result() == b"image-0"
    assert not list((tmp_path / "blocks").glob("*.partial"))
    fetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        image(fetcher, index, 60)


def test_only_the_block_that_was_read_is_discarded(store: Store, index: DatasetIndex, tmp_path: Path) -> None:
    fetcher = make(index, tmp_path)
    old = fetcher.block(0, 0)
    fetcher.discard(0, 0, old)
    new = fetcher.block(0, 1)
    assert new is not old
    fetcher.discard(0, 0, old)
    assert fetcher.block(0, 2) is new
    assert len(store.ranges) == 2
    fetcher.close()


def test_few_blocks_stay_open(
    store: Store, index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_MAX_OPEN_BLOCKS", 3)
    fetcher = make(index, tmp_path, fetch_rows=4)
    for sample in range(sum(ROWS)):
        image(fetcher, index, sample)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for sample in np.random.default_rng(0).integers(0, sum(ROWS), 300).tolist():
        assert image(fetcher, index, sample) == b"image-%d" % sample
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208
    assert len(store.ranges) == 10 + 1 + 4 + 6  # each once: the rest came from the disk
    fetcher.close()
    assert len(os.listdir("/proc/self/fd")) == before - 3  # noqa: PTH208


def test_a_shard_of_another_size_is_refused_and_others_are_read(
    store: Store, index: DatasetIndex, tmp_path: Path
) -> None:
    path = tmp_path / "data" / "shard-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    fetcher = make(index, tmp_path)
    with pytest.raises(RuntimeError, match=r"s3://bucket/shard-000002\.tar is not the one .* index the data again"):
        image(fetcher, index, 41)
    assert image(fetcher, index, 40) == b"image-40"
    fetcher.close()


def test_impossible_sizes_are_refused(index: DatasetIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runtime\.fetch_bytes must be positive, got 0"):
        BlockFetcher(index, BlockCache(tmp_path), fetch_bytes=0)


def test_the_environment_sets_the_caches_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path))
    monkeypatch.setenv("SWAV_CACHE_BYTES", "123456")
    assert open_cache(0).budget_bytes == 123456
    assert open_cache(99).budget_bytes == 99  # the run's own setting counts
    monkeypatch.setenv("SWAV_CACHE_BYTES", "40G")
    with pytest.raises(ValueError, match="SWAV_CACHE_BYTES=40G is no number of bytes"):
        open_cache(0)
