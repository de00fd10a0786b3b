"""Turns a tar into the table of its samples that the index keeps."""

from collections.abc import Iterator

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from swav.data import tar
from swav.data.windows import Windows
from swav.storage import RangeFile

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff", "gif"))
_MEMBERS = ("image", "cls", "json")
_PIECE_BYTES = 1 << 20
# Version 2. An offset of 0 means that the sample has no such member; an image of 0 bytes is there, and broken.
# A CRC-32C of 0 means that it is not known.
ROW_DTYPE = np.dtype(
    [
        ("image_offset", "<u8"),
        ("image_bytes", "<u4"),
        ("image_header_blocks", "<u2"),  # of 512 bytes before the image: 1, more for a long name
        ("image_crc32c", "<u4"),
        ("cls_offset", "<u8"),
        ("cls_bytes", "<u4"),
        ("cls_crc32c", "<u4"),
        ("json_offset", "<u8"),
        ("json_bytes", "<u4"),
        ("json_crc32c", "<u4"),
    ]
)


def known_extensions() -> str:
    """The image extensions, for messages."""
    return ", ".join(sorted(IMAGE_EXTENSIONS))


def scan(file: RangeFile, *, checksums: bool = False) -> tuple[NDArray[np.void], int]:
    """Read a tar's headers, or all of it where checksums are wanted.

    A key without an image is passed over, unless it has a label: then a sample has lost its image.

    Returns:
        ``ROW_DTYPE`` [rows], one row for each sample in the tar's order, and the number of keys passed over.

    Raises:
        ValueError: a labelled sample without an image, one with two, or two members of one name.
        RuntimeError: the tar is damaged.
    """
    rows: list[tuple[int, ...]] = []
    without = 0
    for key, members, crc32c in _samples(Windows(file, whole=checksums), checksums):
        image = _image(file.url, key, members)
        if image is None:
            if "cls" in members:
                raise ValueError(
                    f"{file.url}: the sample {key!r} has a label and no image (members: {', '.join(members)}); all "
                    f"members of a sample must stand together in the tar. Known image extensions: {known_extensions()}"
                )
            without += 1
            continue
        found = [image, members.get("cls"), members.get("json")]
        if any(member is not None and member.num_bytes >= 1 << 32 for member in found):
            raise ValueError(
                f"{file.url}: the sample {key!r} has a member of 4 GiB or more; leave it out of the dataset"
            )
        rows.append(make_row(found, crc32c))
    return np.array(rows, dtype=ROW_DTYPE), without


def make_row(members: list[tar.TarMember | None], crc32c: dict[str, int]) -> tuple[int, ...]:
    """A row of ``ROW_DTYPE``.

    Args:
        members: the image, the ``.cls`` and the ``.json``.
        crc32c: their CRC-32Cs by name, as far as they are known.
    """
    row: list[int] = []
    for kind, member in zip(_MEMBERS, members, strict=True):
        row += [0, 0] if member is None else [member.offset, member.num_bytes]
        if kind == "image":
            assert member is not None
            row.append((member.offset - member.header_offset) // tar.BLOCK_BYTES)
        row.append(0 if member is None else crc32c.get(member.name, 0))
    return tuple(row)


def _samples(file: Windows, checksums: bool) -> Iterator[tuple[str, dict[str, tar.TarMember], dict[str, int]]]:
    """Group neighbouring members by key; yields the key, its members by lower-case extension, and CRC-32Cs by name."""
    current: str | None = None
    members: dict[str, tar.TarMember] = {}
    crc32c: dict[str, int] = {}
    for member in tar.walk(file, forget=file.forget):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:  # hidden files, and files such as LICENSE: as in webdataset, not part of a sample
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current is not None:
                yield current, members, crc32c
            current, members, crc32c = key, {}, {}
        extension = extension.lower()
        if extension in members:
            raise ValueError(f"{file.url}: the sample {key!r} has two members .{extension}; keys must be unique")
        members[extension] = member
        if checksums:
            crc32c[member.name] = _crc32c(file, member)
    if current is not None:
        yield current, members, crc32c


def _crc32c(file: Windows, member: tar.TarMember) -> int:
    """Computed before the walk goes on, so that the file is read once."""
    crc32c, end = 0, member.offset + member.num_bytes
    for start in range(member.offset, end, _PIECE_BYTES):
        crc32c = google_crc32c.extend(crc32c, file.read(start, min(_PIECE_BYTES, end - start)))
    return crc32c


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
