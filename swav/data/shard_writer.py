"""Writes one shard: a plain webdataset tar, and the table of its rows on the way."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c
import webdataset

from swav.data import tar
from swav.data.scan import make_row

KEY_NAME_LENGTH = 60  # of a longer path, the end is kept
Sample = tuple[str, dict[str, bytes]]  # what it is called where it comes from, and its members by extension


def write_shard(
    file: BinaryIO, samples: Iterator[Sample], start: int, end: int, bytes_per_shard: int
) -> Iterator[tuple[int, ...]]:
    """Write one shard.

    Args:
        file: where to.
        samples: the next ones; taken one by one.
        start: the number of the first, which its key begins with.
        end: where this shard ends at the latest.
        bytes_per_shard: it ends once its members have so many bytes.

    Yields:
        a row of the index (``ROW_DTYPE``) for each sample.
    """
    layout = _Layout()
    num_bytes = 0
    # mtime: the present time as a float would cost a pax header of 1 KiB for every member
    with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number in range(start, end):
            stem, members = next(samples)
            key = _key(number, stem)
            num_bytes += writer.write({"__key__": key} | members)
            yield layout.add(members)
            if num_bytes >= bytes_per_shard:
                break
        assert writer.tarstream.offset == layout.position, "a member has more than one header block"


@dataclass(slots=True)
class _Layout:
    """Where the members of a shard stand that is being written: sorted in a sample, one header block before each."""

    position: int = 0

    def add(self, members: dict[str, bytes]) -> tuple[int, ...]:
        """The row of the next sample."""
        found: dict[str, tar.TarMember] = {}
        for extension in sorted(members):
            offset = self.position + tar.BLOCK_BYTES
            found[extension] = tar.TarMember(extension, offset, len(members[extension]), self.position)
            self.position = offset + tar.padded(len(members[extension]))
        cls, metadata = found.pop("cls", None), found.pop("json", None)
        (image,) = found.values()
        crc32c = {extension: google_crc32c.value(data) for extension, data in members.items()}
        return make_row([image, cls, metadata], crc32c)


def key_name(stem: str) -> str:
    """What a key says of the path that a sample comes from: short ASCII without dots, so that ustar headers do.

    Args:
        stem: the path without its extension, or an earlier key.
    """
    return re.sub(r"[^0-9A-Za-z_-]+", "_", re.sub(r"^[0-9]{9}-", "", stem))[-KEY_NAME_LENGTH:]


def _key(number: int, stem: str) -> str:
    """A unique key that shows where the sample comes from."""
    return f"{number:09d}-{key_name(stem)}"
