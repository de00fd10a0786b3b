"""The index of a dataset: which samples there are, and where their bytes stand.

A sample is a run of neighbouring tar members with the same key (the path up to the first dot of the file name, as
webdataset has it). Its id is its position in the index: shards in the order of their names, samples in the order of the
tar; shards that are added later come after all others. docs/data.md describes the files.
"""

import argparse
import bisect
import hashlib
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data.index_build import Building, build, chunk_rows_for
from swav.data.index_files import index_url, load_rows, read_index, remedy
from swav.data.shard_table import Shard, decode_name, identity_of, unpack
from swav.logs import answer, start_logging
from swav.program import run

_MAX_CHECKED_SHARDS = 10_000  # at opening; of a larger dataset, the reader checks the shards that it opens
_STAT_THREADS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The samples of a dataset. Opening one costs no memory per sample, and no Python object per shard.

    Attributes:
        folder: the url of the folder with index.json.
        table: structured [shards], in sample order; see :func:`swav.data.shard_table.pack`.
        chunk_rows: rows that the sample order keeps together; a power of two.
        identity: a digest of the shards' file names, sizes and rows: equal for a copy, wherever it stands.
        written_from: what write_shards made the shards from; None for any other dataset.
        row_offsets: int64 [shards + 1], the id of each shard's first sample, and the number of samples.
    """

    folder: str
    table: NDArray[np.void] = field(repr=False)
    chunk_rows: int
    identity: str
    written_from: dict[str, Any] | None = None
    row_offsets: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        offsets = np.zeros(len(self.table) + 1, dtype=np.int64)
        np.cumsum(self.table["rows"], out=offsets[1:])
        object.__setattr__(self, "row_offsets", offsets)

    @property
    def num_shards(self) -> int:
        """How many tars there are."""
        return len(self.table)

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return int(self.row_offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return int(self.table["num_bytes"].sum(dtype=np.int64))

    @property
    def rows_per_shard(self) -> NDArray[np.int64]:
        """int64 [shards]."""
        return np.diff(self.row_offsets)

    def shard(self, number: int) -> Shard:
        """What the index knows of a shard."""
        return unpack(self.table[number])

    def shard_url(self, number: int) -> str:
        """Where a shard is."""
        return storage.join(self.folder, decode_name(self.table["name"][number].item()))

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find samples.

        Args:
            ids: int64 [n], sample ids.

        Returns:
            Shard numbers, int64 [n], and rows inside them, int64 [n].

        Raises:
            ValueError: an id is outside the index.
        """
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_samples:
            raise ValueError(f"sample ids {ids.min()}..{ids.max()} are not all inside the index's {self.num_samples}")
        shards = np.searchsorted(self.row_offsets, ids, side="right").astype(np.int64) - 1
        return shards, ids - self.row_offsets[shards]

    def locate_one(self, sample_id: int) -> tuple[int, int]:
        """The shard number and the row of one sample.

        Raises:
            ValueError: the id is outside the index.
        """
        if not 0 <= sample_id < self.num_samples:
            raise ValueError(f"sample id {sample_id} is not inside the index's {self.num_samples}")
        shard = bisect.bisect_right(self.row_offsets, sample_id) - 1
        return shard, sample_id - int(self.row_offsets[shard])

    def rows(self, shard: int) -> NDArray[np.void]:
        """One shard's table, ``ROW_DTYPE`` [rows], mapped from the disk when it is first asked for.

        Where the index stands in a store, the table is fetched into the cache first, by one process of the host.

        Raises:
            RuntimeError: the table is missing or damaged.
            OSError: it cannot be fetched.
        """
        return load_rows(self.folder, self.identity, self.shard(shard))


def open_index(url: str) -> DatasetIndex:
    """Open the index of a dataset, building it if there is none.

    An ``index.json`` beside the shards is used if it is there. Otherwise an index is built, with a progress bar, in
    ``$SWAV_CACHE`` (default ``~/.cache/swav``), and used again as long as names, sizes and ETags or modification times
    of the shards stay the same. Nothing is ever written beside the shards.

    Args:
        url: a folder of tars, a folder with an ``index.json``, a pattern such as ``/data/train-*.tar``, or one tar;
            local, or in a store.

    Raises:
        ValueError: there are no tars, no images in them, or a sample that cannot be understood.
        RuntimeError: a tar or the index is damaged, or the ``index.json`` beside the shards does not fit them any more.
        OSError: the store cannot be read.
    """
    location = storage.absolute(url)
    is_folder = _is_folder(location)
    folder = location if is_folder else location.rpartition("/")[0]
    beside = _read(folder)
    if beside is not None:
        _check_shards(beside)
        return beside if is_folder else _subset(beside, url)
    shards = storage.list_tars(url)
    cache = _cache_of(location)
    with storage.locked(cache.with_suffix(".lock")):
        cached = _read_cached(str(cache))
        if cached is not None and [cached.shard_url(number) for number in range(cached.num_shards)] == shards:
            changed = _change(cached, exact_times=True)
            if changed is None:
                return cached
            logger.info("indexing %s again: %s", url, changed)
        return build_index(url, str(cache))


def build_index(
    url: str, out: str, how: Building | None = None, *, written_from: dict[str, Any] | None = None
) -> DatasetIndex:
    """Index the tars behind ``url`` and write the index to the folder ``out``, index.json last.

    Args:
        url: as for :func:`open_index`.
        out: the folder for the index, local or in a store; the folder of the shards is fine, and then the dataset can
            be moved as a whole.
        how: see :class:`swav.data.index_build.Building`; not a part.
        written_from: kept in the index as it is.

    Raises:
        ValueError: there are no tars, no images in them, or a sample that cannot be understood.
        RuntimeError: a tar is damaged, or the index that is appended to does not fit its shards any more.
    """
    build(url, out, how or Building(), written_from=written_from)
    index = _read(storage.absolute(out))
    assert index is not None
    return index


def _cache_of(location: str) -> Path:
    return storage.cache_folder() / "index" / hashlib.sha256(os.fsencode(location)).hexdigest()[:32]


def _is_folder(location: str) -> bool:
    if storage.is_remote(location):
        return not location.endswith(".tar")
    return storage.local_path(location).is_dir()


def _read(folder: str) -> DatasetIndex | None:
    found = read_index(folder)
    if found is None:
        return None
    record, table = found
    return DatasetIndex(folder, table, record.chunk_rows, record.identity, record.written_from)


def _read_cached(folder: str) -> DatasetIndex | None:
    """What is in the cache is ours to replace."""
    try:
        return _read(folder)
    except RuntimeError as error:
        logger.info("indexing again: %s", error)
        return None


def _check_shards(index: DatasetIndex) -> None:
    """Refuse an index whose shards are not those on disk; times differ in a copy of a dataset."""
    path = index_url(index.folder)
    if storage.is_remote(index.shard_url(0)) or index.num_shards > _MAX_CHECKED_SHARDS:
        return
    problem = _change(index, exact_times=False)
    if problem is not None:
        raise RuntimeError(f"{path} does not fit its shards any more: {problem}; {remedy(index.folder)}")
    known = {decode_name(name) for name in index.table["name"].tolist()}
    if not any(name.startswith("/") for name in known):
        added = [path for path in storage.list_tars(index.folder) if storage.name_of(path) not in known]
        if added:
            raise RuntimeError(
                f"{path} lacks {len(added)} shards that are there: {added[0]}; add them with "
                f"`python -m swav.data.index --append {index.folder}`, or move them away"
            )


def _change(index: DatasetIndex, *, exact_times: bool) -> str | None:
    """In what the first changed shard differs from the index; None where none does."""
    urls = [storage.join(index.folder, decode_name(name)) for name in index.table["name"].tolist()]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        stats = pool.map(storage.stat, urls) if storage.is_remote(urls[0]) else map(storage.stat, urls)
        for number, found in enumerate(stats):
            change = index.shard(number).change_since(found, exact_times=exact_times)
            if change is not None:
                return change
    return None


def _subset(index: DatasetIndex, url: str) -> DatasetIndex:
    """The shards that a pattern or one tar's name asks for."""
    asked = {storage.name_of(tar) for tar in storage.list_tars(url)}
    names = [storage.name_of(decode_name(name)) for name in index.table["name"].tolist()]
    wanted = [number for number, name in enumerate(names) if name in asked]
    table = index.table[wanted]
    total = int(table["rows"].sum(dtype=np.int64))
    if total == 0:
        raise ValueError(f"{url}: no sample of {index_url(index.folder)} is in a shard of that name")
    chunk_rows = chunk_rows_for(total, int(table["num_bytes"].sum(dtype=np.int64)))
    return DatasetIndex(index.folder, table, chunk_rows, identity_of(table), index.written_from)


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 2/8, the second of eight")
    return int(number), int(parts)


def main(arguments: list[str] | None = None) -> int:
    """Index a dataset from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swav.data.index", description="Index a dataset of tars.")
    parser.add_argument("url", help="a folder of tars, a pattern such as '/data/train-*.tar', or one tar")
    parser.add_argument("--out", help="folder for the index, local or s3:// (default: the folder of the tars)")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per core")
    parser.add_argument("--part", type=_part, metavar="I/N", help="only the I-th of N parts, on one of N hosts")
    parser.add_argument("--checksums", action="store_true", help="read all bytes and keep the CRC-32C of every member")
    parser.add_argument("--append", action="store_true", help="add new shards after those of the index that is there")
    start_logging()
    options = parser.parse_args(arguments)
    return run(lambda: answer(_run(options)))


def _run(options: argparse.Namespace) -> str:
    """Do what the command line says; returns what to say of it."""
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    location = storage.absolute(options.url)
    out = storage.absolute(options.out or (location if _is_folder(location) else location.rpartition("/")[0]))
    if options.append and storage.stat(index_url(out)) is None:
        raise ValueError(f"there is no {index_url(out)} to append to; index without --append")
    append = options.append or read_index(out) is not None
    how = Building(processes=options.processes, part=options.part, checksums=options.checksums, append=append)
    if how.part is not None:
        done = build(options.url, out, how)
        return (
            f"part {how.part[0]} of {how.part[1]}: {done} tars are indexed; when all parts are, run the same command "
            "without --part"
        )
    with storage.locked(_cache_of(out).with_suffix(".lock")):
        index = build_index(options.url, out, how)
    return (
        f"{index_url(index.folder)}: {index.num_samples} samples in {index.num_shards} tars, "
        f"chunks of {index.chunk_rows}, identity {index.identity[:16]}"
    )


if __name__ == "__main__":
    sys.exit(main())
