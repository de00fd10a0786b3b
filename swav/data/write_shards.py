"""Writes a dataset as shards: plain webdataset tars and their index.

Images are copied byte for byte, never encoded again; a broken one is copied too, and found by the loader.
"""

import argparse
import json
import logging
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from tqdm import tqdm

from swav import rng, storage
from swav.data.image_source import ImageSource, find_images
from swav.data.index import DatasetIndex, build_index, open_index
from swav.data.index_build import UNFINISHED_MARK

_FORMAT = "swav.write_shards/1"
_LOCK_NAME = ".write_shards.lock"
_SHARD = re.compile(r"shard-[0-9]{6,}\.tar")
_PARTIAL = re.compile(r"\.(shard-[0-9]{6,}\.tar|write_shards\.json|classes\.txt|index\.json)\.[0-9a-f]+\.partial")

logger = logging.getLogger(__name__)


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
    unique and lead back to the file. The index, with each shard's CRC-32, is written last: a folder without it is not
    finished, and the same call starts it again; of several calls at once on one host, one writes and the others wait.
    A folder that was finished with the same options from a source that has not changed is opened.

    Args:
        source: see :func:`swav.data.image_source.find_images`.
        out: a new or empty folder.
        samples_per_shard: a new shard begins after so many samples,
        bytes_per_shard: or once its members have so many bytes.
        shuffle: seed of a shuffle of the samples; None keeps the source's sorted order, which is enough for training,
            as the sample order shuffles across shards.

    Raises:
        ValueError: the source is not understood, ``out`` holds something else, or an option is below 1.
        RuntimeError: an image cannot be read.
        OSError: a shard cannot be written, or the disk is full; the same call then starts again.
    """
    if min(samples_per_shard, bytes_per_shard) < 1:
        raise ValueError(f"a shard needs at least 1 sample and 1 byte, got {samples_per_shard} and {bytes_per_shard}")
    images = find_images(source)
    folder = storage.local_path(out).absolute()
    record = {
        "format": _FORMAT,
        "source": str(storage.local_path(source).absolute()),
        "digest": images.digest(),
        "num_samples": len(images),
        "options": [samples_per_shard, bytes_per_shard, shuffle],
    }
    if not _is_finished(folder, record):
        with storage.locked(folder / _LOCK_NAME):
            if not _is_finished(folder, record):  # by whom we waited for
                return _write(images, folder, record)
    _tidy(folder)
    logger.info("%s already holds these %d samples", folder, len(images))
    return open_index(str(folder))


def _write(images: ImageSource, folder: Path, record: dict[str, Any]) -> DatasetIndex:
    """Write shards and index into a folder that is locked."""
    _start(folder, record)
    samples_per_shard, bytes_per_shard, shuffle = record["options"]
    if images.num_skipped:
        logger.warning(
            "%s: %d files are no images by their name and are left out", record["source"], images.num_skipped
        )
    order = np.arange(len(images))
    if shuffle is not None:
        rng.generator(shuffle, "write shards").shuffle(order)
    _write_all(images, [int(number) for number in order], folder, samples_per_shard, bytes_per_shard)
    if images.classes is not None:
        names = "\n".join(images.classes) + "\n"
        storage.write_atomic(folder / "classes.txt", names.encode("utf-8", "surrogateescape"))
    index = build_index(str(folder), str(folder), written_from=record)
    _tidy(folder)
    return index


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished folder needs; whoever waits for the lock then finds a finished one."""
    for name in (UNFINISHED_MARK, _LOCK_NAME):
        if (folder / name).exists():
            (folder / name).unlink(missing_ok=True)


def _is_finished(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the folder holds what is to be written.

    Raises:
        ValueError: it holds shards of something else.
    """
    if not (folder / "index.json").exists():
        return False
    found = open_index(str(folder)).written_from
    if found is not None and {**found, "source": None} == {**record, "source": None}:  # the source may have moved
        return True
    what = "shards that this program did not write" if found is None else f"shards of {found.get('source')}"
    if found is not None and found.get("source") == record["source"]:
        changed = "source has" if found.get("digest") != record["digest"] else "options have"
        what = f"shards of this source, but the {changed} changed since"
    raise ValueError(f"{folder} already holds {what}; choose another folder, or remove it first")


def _start(folder: Path, record: dict[str, Any]) -> None:
    """Take possession of a folder: empty, or left by a call of ours that was interrupted.

    Raises:
        ValueError: it holds other files.
    """
    mark = folder / UNFINISHED_MARK
    present = sorted(path.name for path in folder.iterdir() if path.name != _LOCK_NAME)
    foreign = [name for name in present if not _PARTIAL.fullmatch(name)]
    if foreign and not mark.exists():
        (folder / _LOCK_NAME).unlink(missing_ok=True)
        raise ValueError(f"{folder} is not empty (it holds {foreign[0]}); choose a new folder for the shards")
    leftovers = [folder / name for name in present if _PARTIAL.fullmatch(name) or _SHARD.fullmatch(name)]
    leftovers += (folder / "index").glob(".*.partial")
    if leftovers:
        logger.info("%s: an interrupted call left %d files; starting again", folder, len(leftovers))
    for path in leftovers:
        path.unlink()
    storage.write_atomic(mark, (json.dumps(record, indent=1) + "\n").encode())


def _write_all(
    images: ImageSource, order: list[int], folder: Path, samples_per_shard: int, bytes_per_shard: int
) -> dict[str, int]:
    """Write the samples in the given order; returns each shard's CRC-32 by its name."""
    checksums: dict[str, int] = {}
    with tqdm(total=len(order), desc="writing shards", unit="image", delay=0.5) as progress:
        written = 0
        while written < len(order):
            name = f"shard-{len(checksums):06d}.tar"
            with storage.open_atomic(folder / name) as file:
                stream = _ChecksumStream(file)
                # mtime: the present time as a float would cost a pax header of 1 KiB for every member
                with webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
                    end, num_bytes = min(written + samples_per_shard, len(order)), 0
                    while written < end and num_bytes < bytes_per_shard:
                        stem, members = images.load(order[written])
                        num_bytes += writer.write({"__key__": _key(written, stem)} | members)
                        written += 1
                        progress.update()
            checksums[name] = stream.crc32
    return checksums


def _key(number: int, stem: str) -> str:
    """A unique key without dots that shows where the sample comes from; short ASCII, so that ustar headers do."""
    name = re.sub(r"[^0-9A-Za-z_-]+", "_", re.sub(r"^[0-9]{9}-", "", stem))
    return f"{number:09d}-{name[-60:]}"


@dataclass(slots=True)
class _ChecksumStream:
    """A file that keeps the checksum of what is written to it."""

    file: BinaryIO
    crc32: int = 0

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return len(data)


def main(arguments: list[str] | None = None) -> None:
    """Write shards from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m swav.data.write_shards", description="Write images as webdataset shards with an index."
    )
    parser.add_argument("source", help="folder of images, flat or one subfolder per class; .csv/.jsonl list; or tars")
    parser.add_argument("out", help="new folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N")
    parser.add_argument("--bytes-per-shard", type=int, default=256_000_000, metavar="N")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the samples (default: sorted order)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        index = write_shards(
            options.source,
            options.out,
            samples_per_shard=options.samples_per_shard,
            bytes_per_shard=options.bytes_per_shard,
            shuffle=options.shuffle,
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(
        f"{index.folder}: {index.num_samples} samples in {index.num_shards} shards, {index.num_bytes} bytes\n"
    )


if __name__ == "__main__":
    main()
