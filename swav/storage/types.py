"""What all kinds of storage have in common."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Location = str | os.PathLike[str]

PIECE_BYTES = 1 << 20  # of a stream


@dataclass(frozen=True, slots=True)
class FileStat:
    """What identifies the content of a file without reading it."""

    num_bytes: int
    mtime_ns: int  # 0 where the store has none
    etag: str  # empty for local files


class ChangedError(OSError):
    """An object was replaced or removed since it was opened, or since it was indexed."""


def changed(url: str, what: str) -> str:
    """The message of a :class:`ChangedError`."""
    return (
        f"{url} {what} while it was being read, or since it was indexed; data that is in use must not change: put the "
        "old object back, or write the new data under a new name and index that"
    )


class RangeFile(Protocol):
    """A file that is read by ranges, from any number of threads at once.

    Its content is the one that it had when it was opened: where a store can tell that it was replaced, reading
    raises.
    """

    @property
    def url(self) -> str:
        """Where it is, without secrets: for messages."""

    @property
    def stat(self) -> FileStat:
        """What it was when it was opened."""

    def num_bytes(self) -> int:
        """The size of the file now."""

    def read(self, offset: int, num_bytes: int, /) -> bytes:
        """Read a range; shorter than asked for only where the file ends."""

    def stream(self, offset: int, num_bytes: int, /) -> Iterator[bytes]:
        """Read a range in pieces of at most ``PIECE_BYTES``; memory holds one of them."""
