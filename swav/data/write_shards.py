"""Writes a dataset as shards: plain webdataset tars and their index.

Images are copied byte for byte, never encoded again; a broken one is copied too, and found by the loader.
"""

import argparse
import json
import logging
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from swav import rng, storage
from swav.bars import progress_bar
from swav.data.image_source import ImageSource, find_images
from swav.data.index import DatasetIndex, build_index, open_index
from swav.data.index_build import UNFINISHED_MARK, finished_shard, write_rows
from swav.data.scan import ROW_DTYPE
from swav.data.shard_table import Shard
from swav.data.shard_writer import Sample, write_shard
from swav.logs import answer, start_logging
from swav.program import run
from swav.watchdog import progress

_FORMAT = "swav.write_shards/2"
_LOCK_NAME = ".write_shards.lock"
_SHARD = re.compile(r"shard-[0-9]{6,}\.tar")
_PARTIAL = re.compile(
    r"\.(shard-[0-9]{6,}\.tar|write_shards\.json|classes\.txt|index\.json|shards-[0-9a-f]{8}\.npy)"
    r"\.[0-9a-f]+\.partial"
)
_THREADS = 16  # that read images ahead

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """How samples are laid out in shards; see :func:`write_shards`."""

    samples_per_shard: int = 10_000
    bytes_per_shard: int = 256_000_000
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if min(self.samples_per_shard, self.bytes_per_shard) < 1:
            raise ValueError(
                f"a shard needs at least 1 sample and 1 byte, got {self.samples_per_shard} and {self.bytes_per_shard}"
            )


def write_shards(
    source: str,
    out: str,
    *,
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 256_000_000,
    shuffle: int | None = None,
) -> DatasetIndex:
    """Write the images of a source as shards, and index them.

    The folder then holds ``shard-000000.tar`` and so on, the index, and, if classes have names, ``classes.txt`` (one
    name per line, in the order of the labels). A sample's key is its number and its old path without dots, so keys are
    unique and lead back to the file. The index, with the CRC-32C of each member, is written last: a folder without it
    is not finished, and the same call goes on after the last whole shard; of several calls at once on one host, one
    writes to a local folder and the others wait. A folder that was finished with the same options from a source that
    has not changed is opened.

    Args:
        source: see :func:`swav.data.image_source.find_images`.
        out: a new or empty folder, local or in a store.
        samples_per_shard: a new shard begins after so many samples,
        bytes_per_shard: or once its members have so many bytes.
        shuffle: seed of a shuffle of the samples; None keeps the source's sorted order, which is enough for training,
            as the sample order shuffles across shards.

    Raises:
        ValueError: the source is not understood, ``out`` holds something else, or an option is below 1.
        RuntimeError: an image cannot be read.
        OSError: a shard cannot be written, or the disk is full; the same call then goes on.
    """
    options = ShardOptions(samples_per_shard, bytes_per_shard, shuffle)
    images = find_images(source)
    return write_images(images, images.digest(), source, out, options)


def write_images(
    images: ImageSource,
    digest: str,
    source: str,
    out: str,
    options: ShardOptions = ShardOptions(),
) -> DatasetIndex:
    """Write a source that was listed, and whose digest is known; see :func:`write_shards`."""
    folder = storage.absolute(out)
    record = {
        "format": _FORMAT,
        "source": storage.absolute(source),
        "digest": digest,
        "num_samples": len(images),
        "options": [options.samples_per_shard, options.bytes_per_shard, options.shuffle],
    }
    index = _finished(folder, record)
    if index is None:
        with _lock(folder):
            index = _finished(folder, record)  # by whom we waited for
            if index is None:
                return _write(images, folder, record, options)
    _tidy(folder)
    logger.info("%s already holds these %d samples", folder, len(images))
    return index


def _lock(folder: str) -> AbstractContextManager[None]:
    return nullcontext() if storage.is_remote(folder) else storage.locked(storage.join(folder, _LOCK_NAME))


def _write(images: ImageSource, folder: str, record: dict[str, Any], options: ShardOptions) -> DatasetIndex:
    """Write shards and index into a folder that is locked."""
    shards = _start(folder, record)
    if images.num_skipped:
        logger.warning(
            "%s: %d files are no images by their name and are left out", record["source"], images.num_skipped
        )
    order = np.arange(len(images))
    if options.shuffle is not None:
        rng.generator(options.shuffle, "write shards").shuffle(order)
    _write_all(images, order.tolist(), folder, shards, options)
    if images.classes is not None:
        names = "\n".join(images.classes) + "\n"
        storage.write_atomic(storage.join(folder, "classes.txt"), names.encode("utf-8", "surrogateescape"))
    index = build_index(folder, folder, written_from=record)
    _tidy(folder)
    return index


def _tidy(folder: str) -> None:
    """Remove what only an unfinished folder needs; whoever waits for the lock then finds a finished one."""
    storage.remove(storage.join(folder, UNFINISHED_MARK))
    if not storage.is_remote(folder):
        storage.remove(storage.join(folder, _LOCK_NAME))


def _finished(folder: str, record: dict[str, Any]) -> DatasetIndex | None:
    """The folder's index, where it holds what is to be written.

    Raises:
        ValueError: it holds shards of something else.
    """
    if storage.stat(storage.join(folder, "index.json")) is None:
        return None
    index = open_index(folder)
    found = index.written_from
    if found is not None and {**found, "source": None} == {**record, "source": None}:  # the source may have moved
        return index
    what = "shards that this program did not write" if found is None else f"shards of {found.get('source')}"
    if found is not None and found.get("source") == record["source"]:
        changed = "source has" if found.get("digest") != record["digest"] else "options have"
        what = f"shards of this source, but the {changed} changed since"
    raise ValueError(f"{folder} already holds {what}; choose another folder, or remove it first")


def _start(folder: str, record: dict[str, Any]) -> list[Shard]:
    """Take possession of a folder: empty, or left by a call of ours that was interrupted.

    Returns:
        The shards of such a call that are whole.

    Raises:
        ValueError: it holds other files.
    """
    mark = storage.join(folder, UNFINISHED_MARK)
    present = [name for name in _names(folder) if name != _LOCK_NAME]
    foreign = [name for name in present if not _PARTIAL.fullmatch(name)]
    if foreign and UNFINISHED_MARK not in present:
        if not storage.is_remote(folder):
            storage.remove(storage.join(folder, _LOCK_NAME))
        raise ValueError(f"{folder} is not empty (it holds {foreign[0]}); choose a new folder for the shards")
    same = UNFINISHED_MARK in present and _read_mark(mark) == record
    shards = _whole_shards(folder) if same else []
    kept = {shard.name for shard in shards}
    leftovers = [name for name in present if _PARTIAL.fullmatch(name) or (_SHARD.fullmatch(name) and name not in kept)]
    tables = _names(storage.join(folder, "index"))
    leftovers += [f"index/{name}" for name in tables if name.endswith(".partial") or not same]
    if leftovers or kept:
        logger.info(
            "%s: an interrupted call left %d whole shards, which are kept, and %d other files, which are not",
            folder,
            len(kept),
            len(leftovers),
        )
    for name in leftovers:
        storage.remove(storage.join(folder, name))
    if not same:
        storage.write_atomic(mark, (json.dumps(record, indent=1) + "\n").encode())
    return shards


def _names(folder: str) -> list[str]:
    """What is in a folder; in a local one, folders too."""
    if storage.is_remote(folder):
        return storage.list_names(folder)
    path = storage.local_path(folder)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _read_mark(mark: str) -> object:
    try:
        return json.loads(storage.read(mark))
    except ValueError:
        return None


def _whole_shards(folder: str) -> list[Shard]:
    """The first shards of an interrupted call, up to one that is missing or not whole."""
    records = set(storage.list_names(storage.join(folder, "index"), "*.json"))
    shards: list[Shard] = []
    while f"{(name := _shard_name(len(shards)))}.json" in records:
        shard = finished_shard(folder, name, storage.stat(storage.join(folder, name)))
        if shard is None:
            break
        shards.append(shard)
    return shards


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _write_all(images: ImageSource, order: list[int], folder: str, shards: list[Shard], options: ShardOptions) -> None:
    """Write the samples in the given order, after those of the shards that are there."""
    written = sum(shard.rows for shard in shards)
    with (
        progress_bar(total=len(order), initial=written, desc="writing shards", unit="image", delay=0.5) as bar,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="swav-write") as pool,
    ):
        samples = _ahead(pool, images, order[written:])
        try:
            for number in range(len(shards), len(order)):
                if written == len(order):
                    break
                members: list[tuple[int, ...]] = []
                url = storage.join(folder, _shard_name(number))
                with storage.open_atomic(url) as file:
                    end = min(written + options.samples_per_shard, len(order))
                    for row in write_shard(file, samples, written, end, options.bytes_per_shard):
                        members.append(row)
                        bar.update()
                        progress()
                written += len(members)
                _record(folder, _shard_name(number), members)
        finally:
            pool.shutdown(cancel_futures=True)


def _record(folder: str, name: str, rows: list[tuple[int, ...]]) -> None:
    found = storage.stat(storage.join(folder, name))
    if found is None:
        raise RuntimeError(f"{storage.join(folder, name)} went away while shards were written; run the same call again")
    shard = Shard(name, found.num_bytes, found.mtime_ns, found.etag, 0, 0, 0, True, 0)
    write_rows(folder, shard, np.array(rows, dtype=ROW_DTYPE))


def _ahead(pool: ThreadPoolExecutor, images: ImageSource, order: list[int]) -> Iterator[Sample]:
    """Load samples in order, some of them ahead."""
    numbers = iter(order)
    pending: deque[Future[Sample]] = deque()
    while True:
        for number in islice(numbers, 2 * _THREADS - len(pending)):
            pending.append(pool.submit(images.load, number))
        if not pending:
            return
        yield pending.popleft().result()


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`ShardOptions` to a command line."""
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N")
    parser.add_argument("--bytes-per-shard", type=int, default=256_000_000, metavar="N")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the samples (default: the source's order)")


def main(arguments: list[str] | None = None) -> int:
    """Write shards from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m swav.data.write_shards", description="Write images as webdataset shards with an index."
    )
    parser.add_argument("source", help="folder of images, flat or one subfolder per class; .csv/.jsonl list; or tars")
    parser.add_argument("out", help="new folder for the shards, local or s3://")
    add_shard_options(parser)
    start_logging()
    options = parser.parse_args(arguments)

    def body() -> None:
        index = write_shards(
            options.source,
            options.out,
            samples_per_shard=options.samples_per_shard,
            bytes_per_shard=options.bytes_per_shard,
            shuffle=options.shuffle,
        )
        answer(f"{index.folder}: {index.num_samples} samples in {index.num_shards} shards, {index.num_bytes} bytes")

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
