"""Tiny images and tars."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image

from swav.data.index_files import write_index
from swav.data.scan import ROW_DTYPE
from swav.data.shard_table import Shard, npy_bytes, pack
from swav.storage.local import LocalFile

Members = Iterable[tuple[str, bytes]]


def make_jpeg(seed: int, *, width: int = 24, height: int = 16) -> bytes:
    """A small JPEG of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, members: Members, *, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with the given members, written by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_dataset(folder: Path, rows_per_shard: Iterable[int], *, num_classes: int = 3, jpeg: bool = False) -> Path:
    """Labelled shards; image i is ``image-i`` as text, or a JPEG of seed i, and its label i % num_classes."""
    number = 0
    for shard, rows in enumerate(rows_per_shard):
        members: list[tuple[str, bytes]] = []
        for _ in range(rows):
            image = make_jpeg(number) if jpeg else b"image-%d" % number
            members += [(f"{number:06d}.jpg", image), (f"{number:06d}.cls", b"%d" % (number % num_classes))]
            number += 1
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return folder


class CountingFile(LocalFile):
    """A file that keeps the ranges which were asked for: what a store would be asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ranges: list[tuple[int, int]] = []

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range."""
        data = super().read(offset, num_bytes)
        self.ranges.append((offset, offset + len(data)))
        return data


def write_large_index(folder: Path, *, num_shards: int, rows_per_shard: int, num_tables: int) -> Path:
    """The index of shards that are not there; the first of their tables are links to one, the others are missing."""
    rows = np.zeros(rows_per_shard, dtype=ROW_DTYPE)
    rows["image_offset"], rows["image_bytes"] = np.arange(rows_per_shard) * 1024 + 512, 1
    (folder / "index").mkdir(parents=True)
    data = npy_bytes(rows)
    (folder / "rows.npy").write_bytes(data)
    crc32c = google_crc32c.value(bytes(data))
    for number in range(num_tables):
        (folder / "index" / f"{number:06d}.tar.npy").symlink_to("../rows.npy")
    names = (f"{number:06d}.tar" for number in range(num_shards))
    shards = [Shard(name, rows_per_shard * 100_000, 0, "", rows_per_shard, 0, 0, False, crc32c) for name in names]
    write_index(str(folder), pack(shards), chunk_rows=64, written_from=None)
    return folder
