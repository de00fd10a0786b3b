"""The table of a dataset's shards, and the record of each shard, in memory and as bytes."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swav import storage


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a dataset, as it was when it was indexed."""

    name: str  # relative to the folder of index.json, or absolute
    num_bytes: int
    mtime_ns: int  # 0 where the store has none
    etag: str  # empty for local files
    rows: int
    labelled: int  # rows with a .cls
    keys_without_image: int  # passed over: they are no samples
    has_checksums: bool  # whether its rows have the CRC-32C of each member
    table_crc32c: int  # of the file of its rows

    def change_since(self, found: storage.FileStat | None, *, exact_times: bool) -> str | None:
        """In what the shard differs from what is there now; None where it does not.

        Args:
            found: what is there now.
            exact_times: where there are no ETags, compare modification times, which differ in a copy of a dataset.
        """
        if found is None:
            return f"the shard {self.name} is missing"
        if found.num_bytes != self.num_bytes:
            return f"the shard {self.name} has {found.num_bytes} bytes and had {self.num_bytes} when it was indexed"
        if found.etag and self.etag:
            if found.etag != self.etag:
                return f"the shard {self.name} was written since (its ETag is {found.etag} and was {self.etag})"
        elif exact_times and found.mtime_ns != self.mtime_ns:
            return f"the shard {self.name} was written since"
        return None


_NUMBERS = {
    "num_bytes": "<u8",
    "mtime_ns": "<i8",
    "rows": "<u4",
    "labelled": "<u4",
    "keys_without_image": "<u4",
    "has_checksums": "?",
    "table_crc32c": "<u4",
}
_TEXTS = ("name", "etag")


def pack(shards: Sequence[Shard]) -> NDArray[np.void]:
    """The table of some shards, structured [shards]: the fields of :class:`Shard`, texts as bytes of a fixed width."""
    rows = [tuple(_encode(getattr(shard, field.name)) for field in fields(Shard)) for shard in shards]
    widths = {name: max(1, *(len(_encode(getattr(shard, name))) for shard in shards)) for name in _TEXTS}  # type: ignore[arg-type]
    dtype = [(field.name, _NUMBERS.get(field.name) or f"S{widths[field.name]}") for field in fields(Shard)]
    return np.array(rows, dtype=dtype)


def unpack(row: np.void) -> Shard:
    """One shard of a table."""
    values: Any = row.item()
    name, num_bytes, mtime_ns, etag, *rest = values
    return Shard(decode_name(name), num_bytes, mtime_ns, decode_name(etag), *rest)


def is_table(table: NDArray[Any]) -> bool:
    """Whether an array is a table of shards of this version."""
    names = tuple(field.name for field in fields(Shard))
    return table.ndim == 1 and table.dtype.names == names and all(table.dtype[n] == t for n, t in _NUMBERS.items())


def decode_name(name: bytes) -> str:
    """A name as :func:`pack` keeps it, as text."""
    return name.decode("utf-8", "surrogateescape")


def identity_of(table: NDArray[np.void]) -> str:
    """A digest of the shards' file names, sizes and rows: equal for a copy of the dataset, wherever it stands."""
    names = (storage.name_of(decode_name(name)) for name in table["name"].tolist())
    facts = zip(names, table["num_bytes"].tolist(), table["rows"].tolist(), strict=True)
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()


def shard_to_json(shard: Shard) -> bytes:
    """The record of one shard, which stands beside its rows."""
    return (json.dumps(asdict(shard)) + "\n").encode()


def shard_from_json(data: bytes) -> Shard | None:
    """Read a record; None where it is damaged or of another version, and the shard is to be indexed again."""
    try:
        return Shard(**json.loads(data))
    except (ValueError, TypeError):
        return None


def npy_bytes(array: NDArray[np.void]) -> memoryview:
    """An array as the bytes of an .npy file (NumPy would write to a file without an error number on a full disk)."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getbuffer()


def _encode(value: object) -> object:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
