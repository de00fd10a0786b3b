"""Reads the members of samples, by sample id: from local shards in place, from remote ones through the disk cache."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data import tar
from swav.data.fetch import Block, BlockFetcher, open_cache, open_shard, remote_shards
from swav.data.index import DatasetIndex
from swav.storage import RangeFile

_MAX_OPEN_FILES = 256  # with as many open tables of the index, half of the usual limit of 1024
_FETCH_BYTES = 8_000_000
_REMOTE_ATTEMPTS = 4
_LOCAL_ATTEMPTS = 2  # bytes may be spoilt on the way from the disk too
_READ_AHEAD_ROWS = 4096  # for those who read in the order of the index
_INTEGER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


class ChecksumError(RuntimeError):
    """The bytes of a sample are not those that were written, however often they are read; the sample is lost."""


class _Row(NamedTuple):
    """One row of ``ROW_DTYPE``, in its order."""

    image_offset: int
    image_bytes: int
    image_header_blocks: int
    image_crc32c: int
    cls_offset: int
    cls_bytes: int
    cls_crc32c: int
    json_offset: int
    json_bytes: int
    json_crc32c: int


class _Shard(NamedTuple):
    """A shard in use."""

    number: int
    rows: NDArray[np.void]  # ROW_DTYPE
    file: RangeFile | None  # None: it is remote


class ShardReader:
    """Bytes, labels and names of samples; any number of threads may use one reader.

    Members whose checksum the index knows are verified. At most ``max_open_files`` shards are kept open, those used
    last. The cache is opened, and threads start, when a remote shard is first asked for.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        fetch_bytes: int = _FETCH_BYTES,
        cache_bytes: int = 0,
        max_open_files: int = _MAX_OPEN_FILES,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            index: of the samples.
            fetch_bytes: of neighbouring samples, aimed at in one request to an object store.
            cache_bytes: budget of the host's cache of remote shards; 0: half of what is free.
            max_open_files: shards that are kept open.
        """
        self.index = index
        self._fetch_bytes, self._cache_bytes = fetch_bytes, cache_bytes
        self._is_remote = remote_shards(index)
        self._any_remote = bool(self._is_remote.any())
        self._max_open_files = max_open_files
        self._shards: OrderedDict[int, _Shard] | None = OrderedDict()
        self._fetcher: BlockFetcher | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards and end all threads; reads of open files by other threads still end well."""
        with self._lock:
            self._shards = None
            fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.close()

    def image(self, sample_id: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            ValueError: the id is outside the index.
            ChecksumError: its bytes are not those that were written.
            RuntimeError: the shard is not the one that was indexed, or the reader is closed.
            OSError: the store or the disk fails.
        """
        shard, number, row = self._row(sample_id)
        return self._read(shard, number, row.image_offset, row.image_bytes, row.image_crc32c)

    def label(self, sample_id: int) -> int | None:
        """The number in a sample's ``.cls``; None where it has none.

        Raises:
            ValueError: the member is no decimal number, or the id is outside the index.
            RuntimeError, OSError: as for :meth:`image`.
        """
        text = self.member(sample_id, "cls")
        return None if text is None else self._number(sample_id, text)

    def labels(self, done: Callable[[int], object] | None = None) -> NDArray[np.int64]:
        """The labels of all samples, int64 [num_samples].

        Args:
            done: is called with how many more labels are going to be read, some thousands at a time.

        Raises:
            ValueError: a sample has no label, or one that is no number.
            RuntimeError, OSError: as for :meth:`image`.
        """
        labels = np.empty(self.index.num_samples, dtype=np.int64)
        for shard_number, start in enumerate(self.index.row_offsets[:-1].tolist()):
            shard = self._shard(shard_number)
            rows = shard.rows
            if not rows["cls_offset"].all():
                raise ValueError(f"{self.name(start + int(rows['cls_offset'].argmin()))} has no label (.cls)")
            columns = (rows[f"cls_{part}"].tolist() for part in ("offset", "bytes", "crc32c"))
            for number, (offset, num_bytes, checksum) in enumerate(zip(*columns, strict=True)):
                if number % _READ_AHEAD_ROWS == 0:
                    if done is not None:
                        done(min(_READ_AHEAD_ROWS, len(rows) - number))
                    self.prefetch(np.arange(start + number, min(start + number + 2 * _READ_AHEAD_ROWS, len(labels))))
                text = self._read(shard, number, offset, num_bytes, checksum)
                labels[start + number] = self._number(start + number, text)
        return labels

    def member(self, sample_id: int, kind: Literal["cls", "json"]) -> bytes | None:
        """The bytes of a sample's ``.cls`` or ``.json``; None where it has none.

        Raises:
            ValueError: the id is outside the index.
            RuntimeError, OSError: as for :meth:`image`.
        """
        shard, number, row = self._row(sample_id)
        if kind == "cls":
            offset, num_bytes, checksum = row.cls_offset, row.cls_bytes, row.cls_crc32c
        else:
            offset, num_bytes, checksum = row.json_offset, row.json_bytes, row.json_crc32c
        return self._read(shard, number, offset, num_bytes, checksum) if offset else None

    def name(self, sample_id: int) -> str:
        """A sample's name for messages, ``<shard>.tar:<key>``; the key is read from the tar.

        Where the tar is damaged there, or gone, it is ``<shard>.tar:row <n>``.

        Raises:
            ValueError: the id is outside the index.
        """
        shard, number = self.index.locate_one(sample_id)
        shard_name = self.index.shard(shard).name
        try:
            folder, slash, name = self.member_name(sample_id).rpartition("/")
        except (RuntimeError, OSError):
            return f"{shard_name}:row {number}"
        return f"{shard_name}:{folder}{slash}{name.partition('.')[0]}"

    def member_name(self, sample_id: int) -> str:
        """The path of a sample's image inside its tar, with its extension.

        Raises:
            ValueError: the id is outside the index.
            RuntimeError, OSError: as for :meth:`image`.
        """
        shard, number, row = self._row(sample_id)
        start = row.image_offset - row.image_header_blocks * tar.BLOCK_BYTES
        return tar.member_at(self._file(shard, number), start).name

    def prefetch(self, ids: NDArray[np.int64]) -> bool:
        """Begin to fetch the remote samples among some that are going to be read; returns at once.

        What fails here fails again when the sample is read, and says so there.

        Args:
            ids: int64 [n], sample ids, the first needed first.

        Returns:
            Whether all are there or on their way. If not, so much waits for its first use that the caller should come
            back after reading some of it.

        Raises:
            ValueError: an id is outside the index.
            OSError: the cache cannot be opened.
        """
        if not self._any_remote or not ids.size:
            return True
        shards, rows = self.index.locate(ids)
        remote = self._is_remote[shards]
        return self._remote().prefetch(shards[remote], rows[remote])

    def abandon(self) -> None:
        """Give up all fetching that is under way; reads that wait for it raise, and later ones begin anew."""
        with self._lock:
            fetcher = self._fetcher
        if fetcher is not None:
            fetcher.abandon()

    def _row(self, sample_id: int) -> tuple[_Shard, int, _Row]:
        """Shard, number in the shard, and table row of a sample."""
        shard_number, number = self.index.locate_one(sample_id)
        shard = self._shard(shard_number)
        return shard, number, _Row(*shard.rows[number].item())

    def _number(self, sample_id: int, text: bytes) -> int:
        if not _INTEGER.fullmatch(text):
            raise ValueError(
                f"{self.name(sample_id)}.cls holds {text[:40]!r}, and a label is a number such as 7; "
                "number the classes and write the shards again"
            )
        return int(text)

    def _read(self, shard: _Shard, number: int, offset: int, num_bytes: int, checksum: int) -> bytes:
        """Read a member of a row and verify it, if need be several times."""
        for _ in range(_LOCAL_ATTEMPTS if shard.file else _REMOTE_ATTEMPTS):
            file = self._file(shard, number)
            data = file.read(offset, num_bytes)
            if len(data) == num_bytes and (not checksum or google_crc32c.value(data) == checksum):
                return data
            storage.count("checksum_failures")
            if isinstance(file, Block):
                self._remote().discard(shard.number, number, file)
        if len(data) < num_bytes:
            before = self.index.shard(shard.number).num_bytes
            raise RuntimeError(
                f"shard {file.url} ends inside the bytes {offset}..{offset + num_bytes}, and had {before} bytes when "
                "it was indexed; restore it, or index the data again"
            )
        raise ChecksumError(
            f"checksum mismatch: the {num_bytes} bytes at byte {offset} of shard {file.url} are not those that were "
            "written; restore the shard"
        )

    def _file(self, shard: _Shard, number: int) -> RangeFile:
        """What a row can be read from."""
        return shard.file or self._remote().block(shard.number, number)

    def _remote(self) -> BlockFetcher:
        if self._fetcher is not None:
            return self._fetcher
        with self._lock:
            if self._shards is None:
                raise RuntimeError("this ShardReader is closed")
            if self._fetcher is None:
                self._fetcher = BlockFetcher(self.index, open_cache(self._cache_bytes), fetch_bytes=self._fetch_bytes)
            return self._fetcher

    def _shard(self, number: int) -> _Shard:
        """An open shard; the one used longest ago is closed once nobody reads it any more."""
        with self._lock:
            if self._shards is None:
                raise RuntimeError("this ShardReader is closed")
            shard = self._shards.get(number)
            if shard is not None:
                self._shards.move_to_end(number)
                return shard
        file = None if self._is_remote[number] else open_shard(self.index, number)
        shard = _Shard(number, np.asarray(self.index.rows(number)), file)
        with self._lock:
            if self._shards is not None:
                self._shards[number] = shard
                if len(self._shards) > self._max_open_files:
                    self._shards.popitem(last=False)
        return shard
