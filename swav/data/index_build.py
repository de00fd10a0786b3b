"""Builds the index of a dataset, with many processes, and goes on where a build was interrupted.

Each shard's table of rows is written, and after it the shard's record; a later build takes what has both and fits the
shard. The table of all shards and index.json come last.
"""

import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.bars import progress_bar
from swav.data.index_files import index_url, read_index, table_url, write_index
from swav.data.scan import known_extensions, scan
from swav.data.shard_table import Shard, npy_bytes, pack, shard_from_json, shard_to_json, unpack
from swav.watchdog import progress

UNFINISHED_MARK = "write_shards.json"  # stands beside shards that are still being written
_SHUFFLED_CHUNKS = 512 * 16  # default lanes times default window: with fewer chunks than this, chunks shrink
_CHUNK_BYTES = 8 << 20  # one request's worth
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 16, 256
_THREADS_LOCAL = 4
_THREADS_REMOTE = 32  # reading headers from a store is waiting
_SHARDS_PER_PROCESS = 128  # fewer are done before another process has started

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Building:
    """How to build an index."""

    _: KW_ONLY
    # None: one per core that may be used, fewer for few shards. They run the caller's main module again, as Python's
    # processes do, so a library call uses threads alone unless it is told otherwise.
    processes: int | None = 1
    part: tuple[int, int] | None = None  # (i, n): only the i-th of n parts, from 1, and no index.json
    checksums: bool = False  # read the shards whole, and keep the CRC-32C of every member
    append: bool = False  # keep the ids of the index that is there


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to be indexed."""

    url: str
    name: str
    known: Shard | None  # in the index that is appended to
    has_record: bool


def build(url: str, out: str, how: Building, *, written_from: dict[str, Any] | None = None) -> int:
    """Index the tars behind ``url``, in the folder ``out``.

    Only parts may be built at once: of whole builds in one folder, the caller lets one go on at a time.

    Returns:
        How many shards were looked at: all, or those of the part.

    Raises:
        ValueError: there are no tars, no images in them, or a sample that cannot be understood.
        RuntimeError: a tar is damaged, or the index that is appended to does not fit its shards any more.
    """
    folder = storage.absolute(out)
    if how.part is None:
        _remove_partials(folder)
    jobs, before = _jobs(url, folder, how, written_from is not None)
    if how.part is not None:
        number, parts = how.part
        return len(_index_all(folder, jobs[number - 1 :: parts], how))
    table = pack(_index_all(folder, jobs, how))
    total = int(table["rows"].sum(dtype=np.int64))
    if total == 0:
        raise ValueError(f"{url}: no image in {len(table)} tars; known extensions: {known_extensions()}")
    if before is None:
        chunk_rows = chunk_rows_for(total, int(table["num_bytes"].sum(dtype=np.int64)))
    else:
        chunk_rows, written_from = before
    write_index(folder, table, chunk_rows=chunk_rows, written_from=written_from)
    _remove_unused(folder, table)
    without = int(table["keys_without_image"].sum(dtype=np.int64))
    logger.info("indexed %s: %d samples in %d tars", url, total, len(table))
    if without:
        logger.warning("%s: %d keys have no image and are passed over; %d samples remain", url, without, total)
    return len(table)


def write_rows(folder: str, shard: Shard, rows: NDArray[np.void]) -> Shard:
    """Write a shard's table and then its record.

    Args:
        folder: of the index.
        shard: what is known of it without the table: ``rows``, ``labelled`` and ``table_crc32c`` are filled in.
        rows: ``ROW_DTYPE`` [rows].
    """
    data = npy_bytes(rows)
    labelled = int((rows["cls_offset"] > 0).sum())
    shard = replace(shard, rows=len(rows), labelled=labelled, table_crc32c=google_crc32c.value(bytes(data)))
    storage.write_atomic(table_url(folder, shard), data)
    storage.write_atomic(_record_url(folder, shard.name), shard_to_json(shard))
    return shard


def finished_shard(folder: str, name: str, found: storage.FileStat | None) -> Shard | None:
    """A shard's record, where it and its table are whole and fit the shard that is there now."""
    shard = shard_from_json(storage.read(_record_url(folder, name)))
    if shard is None or shard.name != name or shard.change_since(found, exact_times=True) is not None:
        return None
    table = table_url(folder, shard)
    if storage.stat(table) is None or google_crc32c.value(storage.read(table)) != shard.table_crc32c:
        return None
    return shard


def chunk_rows_for(num_samples: int, num_bytes: int) -> int:
    """Rows per chunk: a power of two.

    A chunk of many samples has up to 8 MiB, one request's worth, and 16 to 256 rows. Of fewer samples, chunks are as
    large as leaves 8,192 of them (the default lanes times the default window); a small dataset is shuffled sample by
    sample.
    """
    enough = _CHUNK_BYTES * num_samples // max(num_bytes, 1)
    rows = min(max(enough, _MIN_CHUNK_ROWS), _MAX_CHUNK_ROWS, max(num_samples // _SHUFFLED_CHUNKS, 1))
    return 1 << (rows.bit_length() - 1)


def _jobs(
    url: str, folder: str, how: Building, is_written: bool
) -> tuple[list[_Job], tuple[int, dict[str, Any] | None] | None]:
    """What is to be done, in sample order, and what stays of the index that is appended to."""
    urls = storage.list_tars(url)
    before = read_index(folder) if how.append else None
    if not urls and before is None:
        raise ValueError(
            f"{url}: there is no .tar; turn a folder of images into shards with "
            "`python -m swav.data.write_shards SOURCE OUT`"
        )
    if urls and not is_written:
        mark = storage.join(_parent(urls[0]), UNFINISHED_MARK)
        if storage.stat(mark) is not None:
            raise RuntimeError(f"{mark} says that the shards beside it are not all written; run write_shards again")
    records = set(storage.list_names(storage.join(folder, "index"), "*.json"))
    known = [] if before is None else [unpack(row) for row in before[1]]
    names = {shard.name for shard in known}
    jobs = [_Job(storage.join(folder, shard.name), shard.name, shard, _has(records, shard.name)) for shard in known]
    for found in urls:
        name = storage.name_of(found) if _parent(found) == folder else found
        if name not in names:
            jobs.append(_Job(found, name, None, _has(records, name)))
    return jobs, None if before is None else (before[0].chunk_rows, before[0].written_from)


def _remove_partials(folder: str) -> None:
    """Remove what a process that was killed left of files that it was writing."""
    if not storage.is_remote(folder):
        path = storage.local_path(folder)
        for pattern in ("index/.*.partial", ".index.json.*.partial", ".shards-*.npy.*.partial"):
            for leftover in path.glob(pattern):
                leftover.unlink(missing_ok=True)


def _remove_unused(folder: str, table: NDArray[np.void]) -> None:
    """Remove tables that were replaced by others with checksums, and those of shards that are no more."""
    shards = [unpack(row) for row in table]
    used = {storage.name_of(table_url(folder, shard)) for shard in shards}
    used |= {storage.name_of(_record_url(folder, shard.name)) for shard in shards}
    for name in storage.list_names(storage.join(folder, "index")):
        if name not in used and name.endswith((".npy", ".json")):
            storage.remove(storage.join(folder, "index", name))


def _has(records: set[str], name: str) -> bool:
    return f"{storage.name_of(name)}.json" in records


def _parent(url: str) -> str:
    return url.rpartition("/")[0]


def _record_url(folder: str, name: str) -> str:
    return storage.join(folder, "index", f"{storage.name_of(name)}.json")


def _index_all(folder: str, jobs: list[_Job], how: Building) -> list[Shard]:
    """Index shards, in their order."""
    threads = _THREADS_REMOTE if any(storage.is_remote(job.url) for job in jobs[:1]) else _THREADS_LOCAL
    processes = how.processes or min(len(os.sched_getaffinity(0)), -(-len(jobs) // _SHARDS_PER_PROCESS))
    size = max(1, min(threads * 4, -(-len(jobs) // processes)))
    starts = range(0, len(jobs), size)
    work = partial(_index_some, folder, checksums=how.checksums, threads=threads)
    shards: dict[int, list[Shard]] = {}
    with (
        _pool(processes) as pool,
        progress_bar(total=len(jobs), desc="indexing", unit="tar", delay=0.5) as bar,
    ):
        futures: dict[Future[list[Shard]], int] = {
            pool.submit(work, jobs[start : start + size]): start for start in starts
        }
        try:
            for future in as_completed(futures):
                shards[futures[future]] = future.result()
                bar.update(len(shards[futures[future]]))
                progress()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [shard for start in starts for shard in shards[start]]


def _pool(processes: int) -> Executor:
    """Processes that end with this one, however it ends; for one, a thread will do."""
    if processes == 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")  # the caller may have threads
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and says what is to be done
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _index_some(folder: str, jobs: list[_Job], *, checksums: bool, threads: int) -> list[Shard]:
    """Index shards with some threads; the first error ends it."""
    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        try:
            return list(pool.map(partial(_index_one, folder, checksums=checksums), jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _index_one(folder: str, job: _Job, *, checksums: bool) -> Shard:
    found = storage.stat(job.url)
    if job.known is not None:
        changed = job.known.change_since(found, exact_times=False)
        if changed is not None:
            raise RuntimeError(
                f"{index_url(folder)} does not fit its shards any more: {changed}; restore it, or give all samples new "
                f"ids: delete {index_url(folder)} and index again with `python -m swav.data.index`"
            )
        if job.known.has_checksums or not checksums:
            return job.known
    if job.has_record:
        done = finished_shard(folder, job.name, found)
        if done is not None and (done.has_checksums or not checksums):
            return done
    if found is None:
        raise RuntimeError(f"the shard {job.url} went away while it was indexed; start again")
    file = storage.open_file(job.url)
    rows, without = scan(file, checksums=checksums)
    stat = file.stat
    shard = Shard(job.name, stat.num_bytes, stat.mtime_ns, stat.etag, 0, 0, without, checksums, 0)
    return write_rows(folder, shard, rows)
