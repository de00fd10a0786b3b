"""Finds the members of a tar from its headers alone; no member's bytes are read.

The standard library's ``tarfile`` takes a bad header after the first member for the end of the archive, and neither it
nor webdataset notices a file that was cut between two members. Both lose samples without a word, so this walk is ours:
every header's checksum is verified, and a tar that does not end in an end-of-archive marker is refused, also where the
cut falls exactly between two members.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_FILE_TYPES = (b"0", b"\0", b"7")
_TYPES_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_MAX_EXTENSION_BYTES = 1 << 20
_MORE_READS = 3  # of a header that is bad
_MAX_PADDING_BYTES = 10240  # tar writes records of this size


class Readable(Protocol):
    """What the walk needs of a file."""

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def num_bytes(self) -> int:
        """Its size."""

    def read(self, offset: int, num_bytes: int, /) -> bytes:
        """Read a range; shorter than asked for only where the file ends."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file inside a tar."""

    name: str
    offset: int  # of its first byte
    num_bytes: int
    header_offset: int  # of its first header block; extension headers stand before the main one


@dataclass(slots=True)
class _Extensions:
    """What extension headers say about the next member."""

    start: int | None = None  # offset of the first one
    name: str | None = None
    num_bytes: int | None = None


def walk(file: Readable, *, forget: Callable[[], None] | None = None) -> Iterator[TarMember]:
    """Yield the regular files of a tar in their order; folders and links are passed over.

    Reads ustar, old V7, GNU (long names, base-256 sizes) and pax headers.

    Args:
        file: the tar.
        forget: makes ``file`` read anew what it has read before. A header that is bad is then read some more times:
            its bytes may have been spoilt on the way.

    Raises:
        RuntimeError: the file is empty, has no member, holds a bad header, is cut anywhere before its end-of-archive
            marker, or goes on after it. The message names the file, the byte and the remedy.
    """
    total = file.num_bytes()
    if total == 0:
        raise RuntimeError(f"shard {file.url} is empty (0 bytes); write it again, or remove it and rebuild the index")
    _refuse_other_formats(file, total)
    position, count, failures = 0, 0, 0
    while position + BLOCK_BYTES <= total:
        try:
            found = None if _is_end(file, position, total) else _next_member(file, position, total, count)
        except RuntimeError:
            failures += 1
            if forget is None or failures > _MORE_READS:
                raise
            forget()
            continue
        if found is None:
            if count == 0:
                raise RuntimeError(f"shard {file.url} is a tar without members; remove it and rebuild the index")
            return
        member, position = found
        count, failures = count + 1, 0
        if member is not None:
            yield member
    raise RuntimeError(
        f"shard {file.url} is cut in the middle: it ends at byte {total} after {count} whole members, without the "
        "end-of-archive marker, so members may be missing; copy or write it again"
    )


def member_at(file: Readable, header_offset: int) -> TarMember:
    """The member whose first header block stands at ``header_offset``.

    Raises:
        RuntimeError: there is none.
    """
    member, _ = _next_member(file, header_offset, file.num_bytes(), 0)
    if member is None:
        raise RuntimeError(f"shard {file.url} has no file at byte {header_offset}; rebuild its index")
    return member


def _next_member(file: Readable, position: int, total: int, count: int) -> tuple[TarMember | None, int]:
    """The member at ``position`` (None for a folder or a link) and where the next one starts."""
    extensions = _Extensions()
    while True:
        header = file.read(position, BLOCK_BYTES)
        _verify(header, file.url, position)
        kind = header[156:157]
        if kind not in (b"L", b"K", b"x", b"g"):
            break
        size = _number(header[124:136], file.url, position)
        if extensions.start is None:
            extensions.start = position
        _check_inside(file.url, position + BLOCK_BYTES, size, total, count)
        _read_extension(file, kind, position + BLOCK_BYTES, size, extensions)
        position += BLOCK_BYTES + padded(size)
        if position + BLOCK_BYTES > total:
            _check_inside(file.url, position, BLOCK_BYTES, total, count)
    if kind == b"S":
        raise RuntimeError(f"shard {file.url} holds a sparse file at byte {position}; write it again without --sparse")
    if kind in _TYPES_WITHOUT_DATA:
        return None, position + BLOCK_BYTES
    size = _number(header[124:136], file.url, position) if extensions.num_bytes is None else extensions.num_bytes
    _check_inside(file.url, position + BLOCK_BYTES, size, total, count)
    name = _header_name(header) if extensions.name is None else extensions.name
    start = position if extensions.start is None else extensions.start
    member = TarMember(name, position + BLOCK_BYTES, size, start)
    is_file = kind in _FILE_TYPES and not name.endswith("/")
    return member if is_file else None, position + BLOCK_BYTES + padded(size)


def _refuse_other_formats(file: Readable, total: int) -> None:
    """Name a compressed file as such, and a file too short for a header."""
    start = file.read(0, 6)
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            raise RuntimeError(f"shard {file.url} is compressed; unpack it with {tool}, as samples are read by place")
    if total < BLOCK_BYTES:
        raise RuntimeError(
            f"shard {file.url} is no tar: its {total} bytes are less than one header; copy or write it again, or "
            "remove it"
        )


def _is_end(file: Readable, position: int, total: int) -> bool:
    """Whether the archive ends here; a marker cut short has lost nothing and is accepted."""
    if file.read(position, BLOCK_BYTES) != _ZEROS:
        return False
    rest = file.read(position, _MAX_PADDING_BYTES + BLOCK_BYTES)
    if rest.strip(b"\0"):
        raise RuntimeError(
            f"shard {file.url} goes on after its end-of-archive marker at byte {position} of {total}; readers would "
            "lose what follows (tars cannot be joined with cat); write it again as one tar, or as several"
        )
    return True


def _verify(header: bytes, url: str, position: int) -> None:
    """Check a header's checksum, which old writers sum over signed bytes."""
    field = header[148:156].split(b"\0")[0].strip()
    try:
        expected = int(field, 8)
    except ValueError:
        expected = -1
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if expected != unsigned:
        high = sum(byte >= 128 for byte in header) - sum(byte >= 128 for byte in header[148:156])
        if expected != unsigned - 256 * high:
            raise RuntimeError(
                f"shard {url} has a bad header at byte {position}: damaged or no tar; copy or write it again"
            )


def _number(field: bytes, url: str, position: int) -> int:
    """A size: octal text, or base-256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise RuntimeError(f"shard {url} has a bad size in the header at byte {position}; write it again") from None


def _read_extension(file: Readable, kind: bytes, offset: int, size: int, extensions: _Extensions) -> None:
    """Take the name and the size of the next member from a GNU or pax extension header."""
    if kind == b"K":
        return
    if size > _MAX_EXTENSION_BYTES:
        raise RuntimeError(f"shard {file.url} has an extension header of {size} bytes at byte {offset}; write it again")
    data = file.read(offset, size)
    if kind == b"L":
        extensions.name = _decode(data.split(b"\0")[0])
        return
    records = _pax_records(data, file.url, offset)
    if kind == b"g":
        if records.keys() & {b"path", b"size"}:
            raise RuntimeError(f"shard {file.url} gives all members one path or size at byte {offset}; write it again")
        return
    if b"path" in records:
        extensions.name = _decode(records[b"path"])
    if b"size" in records:
        extensions.num_bytes = int(records[b"size"])
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise RuntimeError(f"shard {file.url} holds a sparse file at byte {offset}; write it again without --sparse")


def _pax_records(data: bytes, url: str, offset: int) -> dict[bytes, bytes]:
    """Parse records of the form ``<length> <key>=<value>``, each ended by a newline."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data) and data[position] != 0:
        digits = data[position : position + 20].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[position + len(digits) + 1 : position + length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise RuntimeError(f"shard {url} has a bad pax header at byte {offset}; copy or write it again")
        records[key] = value[:-1]
        position += length
    return records


def _check_inside(url: str, start: int, size: int, total: int, count: int) -> None:
    if start + size > total:
        raise RuntimeError(
            f"shard {url} is cut in the middle: member {count} needs bytes {start}..{start + size} and the file has "
            f"{total}; copy or write it again"
        )


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:265] == b"ustar\x0000" else b""
    return _decode(prefix + b"/" + name if prefix else name)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def padded(size: int) -> int:
    """The bytes that a member of some size takes up."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
