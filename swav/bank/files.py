"""Arrays as files of a run's folder: ``.npy`` with the CRC-32C of all bytes before it as their last four.

NumPy reads them as they are. Everything appears whole or not at all, and a manifest, written last, says that it does.
"""

import io
import json
import struct
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from swav import storage

_CHECKSUM = struct.Struct("<I")


class DamagedError(RuntimeError):
    """A file of the run's folder is not what was written."""


def write_array(url: str, array: NDArray[Any]) -> int:
    """Write an array; returns its checksum.

    Raises:
        OSError: it cannot be written.
    """
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    checksum = int(google_crc32c.value(file.getvalue()))
    file.write(_CHECKSUM.pack(checksum))
    storage.write_atomic(url, file.getbuffer())
    return checksum


def read_array(url: str, data: bytes | None = None) -> tuple[NDArray[Any], int]:
    """An array and its checksum.

    Args:
        url: of the file.
        data: its bytes, where they have been read.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    data = storage.read(url) if data is None else data
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if not body or checksum != _CHECKSUM.pack(google_crc32c.value(body)):
        raise DamagedError(f"{url} does not have its checksum; restore it, or start over with another --output")
    return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False), _CHECKSUM.unpack(checksum)[0]


def checksum_of(url: str) -> int:
    """The checksum that an array was written with; reads no more than it.

    Raises:
        OSError: it cannot be read.
    """
    file = storage.open_file(url)
    return int(_CHECKSUM.unpack(file.read(file.num_bytes() - _CHECKSUM.size, _CHECKSUM.size))[0])


def write_manifest(folder: str, facts: dict[str, Any]) -> None:
    """Publish what a folder holds."""
    storage.write_atomic(manifest_url(folder), (json.dumps(facts, indent=2) + "\n").encode())


def read_manifest(folder: str, form: str) -> dict[str, Any] | None:
    """What a folder holds; None where nothing has been published.

    Raises:
        DamagedError: it is of another version, or no manifest.
    """
    url = manifest_url(folder)
    if storage.stat(url) is None:
        return None
    try:
        facts: dict[str, Any] = json.loads(storage.read(url))
        found = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{url} is no manifest ({error!r}); restore it, or remove its folder") from error
    if found != form:
        raise DamagedError(f"{url} is of the format {found!r}, this version reads {form!r}")
    return facts


def manifest_url(folder: str) -> str:
    """Where a folder's manifest is."""
    return storage.join(folder, "manifest.json")


def bank_folder(output: storage.Location, epoch: int) -> str:
    """Of the features that the labels of an epoch are made of."""
    return storage.join(storage.absolute(output), "bank", f"{epoch:06d}")


def labels_folder(output: storage.Location, epoch: int) -> str:
    """Of an epoch's labels."""
    return storage.join(storage.absolute(output), "assign", f"{epoch:06d}")
