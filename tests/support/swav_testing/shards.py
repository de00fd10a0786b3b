"""Tiny images and tars."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

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
