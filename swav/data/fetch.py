"""Fetches the samples of remote shards in blocks of neighbours, ahead of their use and through the disk cache."""

import hashlib
import json
import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data import tar
from swav.data.cache import AbandonedError, BlockCache, CachedBlock
from swav.data.index import DatasetIndex
from swav.storage import FileStat, RangeFile

_NUM_THREADS = 8
_MAX_OPEN_SHARDS = 256
_MAX_OPEN_BLOCKS = 4096
_MAX_AHEAD_BYTES = 32 << 30
_AHEAD_SHARE = 4  # of the cache's budget, a quarter may be waiting for its first use, over all ranks

_Key = tuple[int, int]  # shard, number of the block in it


class Block:
    """A run of a remote shard's bytes on the local disk; reads like the shard, inside that run."""

    def __init__(self, cached: CachedBlock, url: str, stat: FileStat, start: int) -> None:
        self.cached = cached
        self.url = url
        self.stat = stat  # of the shard
        self._start = start

    def num_bytes(self) -> int:
        """The size of the shard."""
        return self.stat.num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range of the shard; empty where it begins before the block, short where it goes on after it."""
        if offset < self._start:
            return b""
        return self.cached.read(offset - self._start, num_bytes)

    def stream(self, offset: int, num_bytes: int) -> Iterator[bytes]:
        """Read a range at once."""
        yield self.read(offset, num_bytes)


@dataclass(slots=True)
class _Flight:
    """A block on its way; whoever claims it fetches it, all others wait."""

    stop: threading.Event
    claimed: bool = False
    block: Future[Block] = field(default_factory=Future)


class BlockFetcher:
    """Blocks of an index's remote shards; any number of threads may use one.

    A block is a run of rows of one shard: a power of two of them, in the mean with at most ``fetch_bytes``, but no less
    than a chunk of the order. Where a whole shard has fewer, it is the shard.
    """

    def __init__(
        self, index: DatasetIndex, cache: BlockCache, *, fetch_bytes: int, num_threads: int = _NUM_THREADS
    ) -> None:
        """Prepare; nothing is fetched and no thread starts yet.

        Args:
            index: of the shards.
            cache: where blocks go.
            fetch_bytes: aimed at in one request; the rows that the order keeps together are not torn apart for it.
            num_threads: downloads ahead of use at a time.

        Raises:
            ValueError: ``fetch_bytes`` is not positive.
        """
        if fetch_bytes < 1:
            raise ValueError(f"runtime.fetch_bytes must be positive, got {fetch_bytes}")
        self._index = index
        self._cache = cache
        row_bytes = max(index.num_bytes / max(index.num_samples, 1), 1.0)
        largest = max(int(index.rows_per_shard.max(initial=1)), 1)
        rows = max(2 ** int(math.log2(max(fetch_bytes / row_bytes, 1.0))), index.chunk_rows)
        self.block_rows = min(rows, 2 ** math.ceil(math.log2(largest)))
        self._block_bytes = math.ceil(self.block_rows * row_bytes)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun: those that share the cache
        self._ahead_limit = min(cache.budget_bytes // (_AHEAD_SHARE * ranks), _MAX_AHEAD_BYTES)
        self._num_threads = num_threads
        self._max_open_blocks = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, _MAX_OPEN_BLOCKS)
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, RangeFile] = OrderedDict()
        self._open: OrderedDict[_Key, Block] = OrderedDict()
        self._flights: dict[_Key, _Flight] = {}
        self._ahead: set[_Key] = set()  # asked for and not used yet
        self._stop = threading.Event()  # of the downloads under way
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def block(self, shard: int, row: int) -> Block:
        """The block that holds a row, fetched if it has not been.

        Raises:
            AbandonedError: :meth:`abandon` or :meth:`close` came in between.
            RuntimeError: the shard is not the one that was indexed, or the fetcher is closed.
            OSError: the store does not give it, or the disk is full.
        """
        key = (shard, row // self.block_rows)
        with self._lock:
            self._ahead.discard(key)
            block = self._open.get(key)
            if block is not None:
                self._open.move_to_end(key)
        if block is None:
            flight, mine = self._join(key)
            if mine:
                self._fetch(key, flight)
            block = flight.block.result()
        block.cached.touch()
        return block

    def prefetch(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> bool:
        """Begin to fetch the blocks of some rows; returns at once.

        What fails here fails again when a row is read, and says so there.

        Args:
            shards: int64 [n].
            rows: int64 [n], inside the shards.

        Returns:
            Whether all of them are there or on their way. If not, so much is waiting for its first use that the caller
            should come back after some of it has been read.
        """
        keys, first = np.unique(shards << 32 | rows // self.block_rows, return_index=True)
        for packed in keys[np.argsort(first)].tolist():
            key = (packed >> 32, packed & 0xFFFFFFFF)
            with self._lock:
                if self._closed or key in self._open or key in self._flights:
                    continue
                if self._ahead and (len(self._ahead) + 1) * self._block_bytes > self._ahead_limit:
                    return False
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="swav-fetch")
                flight = self._flights[key] = _Flight(self._stop)
                self._ahead.add(key)
                self._pool.submit(self._fetch_ahead, key, flight)
        return True

    def discard(self, shard: int, row: int, block: Block) -> None:
        """Forget a block whose bytes are wrong, so that it is fetched again; not one that has replaced it meanwhile."""
        key = (shard, row // self.block_rows)
        with self._lock:
            if self._open.get(key) is block:
                del self._open[key]
        self._cache.discard(block.cached)

    def abandon(self) -> None:
        """Give up everything that is on its way; reads that wait for it raise, later ones begin anew."""
        with self._lock:
            self._stop.set()
            self._stop = threading.Event()
            flights, self._flights = self._flights, {}
            self._ahead.clear()
            idle = [flight for flight in flights.values() if not flight.claimed]
            for flight in idle:
                flight.claimed = True
        for flight in idle:
            flight.block.set_exception(AbandonedError())

    def close(self) -> None:
        """Give up what is on its way, and wait for the threads."""
        with self._lock:
            self._closed = True
            pool = self._pool
        self.abandon()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._shards.clear()

    def _join(self, key: _Key) -> tuple[_Flight, bool]:
        """The flight of a block, and whether it is ours to fetch it; a queued one is not waited for."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this ShardReader is closed")
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(self._stop)
            mine, flight.claimed = not flight.claimed, True
            return flight, mine

    def _fetch_ahead(self, key: _Key, flight: _Flight) -> None:
        with self._lock:
            taken, flight.claimed = flight.claimed, True
        if not taken:
            self._fetch(key, flight)

    def _fetch(self, key: _Key, flight: _Flight) -> None:
        """Fetch a block and hand it, or what went wrong, to those who wait."""
        try:
            block = self._load(key, flight.stop)
        except BaseException as error:
            with self._lock:
                self._land(key, flight)
                self._ahead.discard(key)
            flight.block.set_exception(error)
            return
        with self._lock:
            self._land(key, flight)
            if not self._closed:
                self._open[key] = block
                if len(self._open) > self._max_open_blocks:
                    self._open.popitem(last=False)
        flight.block.set_result(block)

    def _land(self, key: _Key, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _load(self, key: _Key, stop: threading.Event) -> Block:
        shard, number = key
        url, known = self._index.shard_url(shard), self._index.shard(shard)
        start, end = self._byte_range(shard, number)
        source = json.dumps([url, known.etag or known.mtime_ns, known.num_bytes, start, end])
        digest = hashlib.sha256(source.encode()).hexdigest()

        def download() -> Iterator[bytes]:
            return self._shard(shard).stream(start, end - start)

        try:
            cached = self._cache.get(digest, end - start, download, stop)
        except storage.ChangedError as error:
            raise _changed(url, str(error)) from error
        return Block(cached, url, FileStat(known.num_bytes, known.mtime_ns, known.etag), start)

    def _byte_range(self, shard: int, number: int) -> tuple[int, int]:
        """From the first to the last byte that any row of a block needs; rows stand in the order of the tar."""
        rows = self._index.rows(shard)[number * self.block_rows : (number + 1) * self.block_rows]
        first, last = rows[0], rows[-1]
        starts = [int(first["image_offset"]) - int(first["image_header_blocks"]) * tar.BLOCK_BYTES]
        starts += [int(first[f"{kind}_offset"]) for kind in ("cls", "json") if first[f"{kind}_offset"]]
        ends = [int(last[f"{kind}_offset"]) + int(last[f"{kind}_bytes"]) for kind in ("image", "cls", "json")]
        return min(starts), max(ends)

    def _shard(self, shard: int) -> RangeFile:
        with self._lock:
            file = self._shards.get(shard)
            if file is not None:
                self._shards.move_to_end(shard)
                return file
        file = open_shard(self._index, shard)
        with self._lock:
            self._shards[shard] = file
            if len(self._shards) > _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return file


def open_shard(index: DatasetIndex, number: int) -> RangeFile:
    """Open a shard, and make sure that it is the one that was indexed.

    Where its ETag is known, the store is asked only when the shard is read.

    Raises:
        RuntimeError: it is another one.
        OSError: it cannot be opened.
    """
    known = index.shard(number)
    file = storage.open_file(index.shard_url(number), etag=known.etag)
    change = None if known.etag else known.change_since(file.stat, exact_times=False)
    if change is not None:
        raise _changed(file.url, change)
    return file


def remote_shards(index: DatasetIndex) -> NDArray[np.bool_]:
    """Which shards are in an object store, bool [shards]."""
    names = index.table["name"]
    elsewhere = np.char.startswith(names, b"/") if storage.is_remote(index.folder) else np.zeros(len(names), dtype=bool)
    schemes = [np.char.startswith(names, scheme) for scheme in (b"s3://", b"http://", b"https://")]
    remote: NDArray[np.bool_] = (storage.is_remote(index.folder) & ~elsewhere) | np.any(schemes, axis=0)
    return remote


def _changed(url: str, change: str) -> RuntimeError:
    return RuntimeError(
        f"shard {url} is not the one that was indexed: {change}; restore it, or index the data again with "
        "`python -m swav.data.index`"
    )


def open_cache(cache_bytes: int) -> BlockCache:
    """The host's cache of blocks, ``$SWAV_CACHE/blocks``.

    Args:
        cache_bytes: its budget; 0: ``$SWAV_CACHE_BYTES``, or half of what is free where that is not set either.

    Raises:
        ValueError: the environment has no number there.
    """
    given = os.environ.get("SWAV_CACHE_BYTES") or "0"
    if not given.isdecimal():
        raise ValueError(f"SWAV_CACHE_BYTES={given} is no number of bytes; set one, such as 40000000000, or none")
    return BlockCache(storage.cache_folder() / "blocks", budget_bytes=cache_bytes or int(given))
