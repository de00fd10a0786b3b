"""Turns a tar into the table of its samples that the index keeps."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data import tar

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"))
# An offset of 0 means that the sample has no such member; an image of 0 bytes is there, and broken.
ROW_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),
        ("image_bytes", "<u4"),
        ("image_header_blocks", "<u2"),  # of 512 bytes before the image: 1, more for a long name
        ("cls_offset", "<u8"),
        ("cls_bytes", "<u4"),
        ("json_offset", "<u8"),
        ("json_bytes", "<u4"),
    ]
)


def known_extensions() -> str:
    """The image extensions, for messages."""
    return ", ".join(sorted(IMAGE_EXTENSIONS))


def scan(path: str) -> tuple[NDArray[np.void], int]:
    """Read a tar's headers.

    A key without an image is passed over, unless it has a label: then a sample has lost its image.

    Returns:
        ``ROW_DTYPE`` [rows], one row for each sample in the tar's order, and the number of keys passed over.

    Raises:
        ValueError: a labelled sample without an image, one with two, or two members of one name.
        RuntimeError: the tar is damaged.
    """
    rows: list[tuple[int, ...]] = []
    without = 0
    for key, members in _samples(storage.open_file(path)):
        image = _image(path, key, members)
        if image is None:
            if "cls" in members:
                raise ValueError(
                    f"{path}: the sample {key!r} has a label and no image (members: {', '.join(members)}); all members "
                    f"of a sample must stand together in the tar. Known image extensions: {known_extensions()}"
                )
            without += 1
            continue
        blocks = (image.offset - image.header_offset) // tar.BLOCK_BYTES
        row = [image.offset, image.num_bytes, blocks]
        for extension in ("cls", "json"):
            member = members.get(extension)
            row += [0, 0] if member is None else [member.offset, member.num_bytes]
        if max(row[1], row[4], row[6]) >= 1 << 32:
            raise ValueError(f"{path}: the sample {key!r} has a member of 4 GiB or more; leave it out of the dataset")
        rows.append(tuple(row))
    return np.array(rows, dtype=ROW_DTYPE), without


def _samples(file: storage.RangeFile) -> Iterator[tuple[str, dict[str, tar.TarMember]]]:
    """Group neighbouring members by key; yields the key and its members by lower-case extension."""
    current: str | None = None
    members: dict[str, tar.TarMember] = {}
    for member in tar.walk(file):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:  # hidden files, and files such as LICENSE: as in webdataset, not part of a sample
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        extension = extension.lower()
        if extension in members:
            raise ValueError(f"{file.url}: the sample {key!r} has two members .{extension}; keys must be unique")
        members[extension] = member
    if current is not None:
        yield current, members


def _image(path: str, key: str, members: dict[str, tar.TarMember]) -> tar.TarMember | None:
    """The image among a sample's members: ``key.jpg`` before ``key.anything.jpg``."""
    found = [name for name in members if name in IMAGE_EXTENSIONS]
    found = found or [name for name in members if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if len(found) > 1:
        raise ValueError(
            f"{path}: the sample {key!r} has {len(found)} images ({', '.join(found)}). The key of a sample ends at the "
            "first dot of the file name; give each image a key of its own, for example with "
            "`python -m swav.data.write_shards` on the files"
        )
    return members[found[0]] if found else None
