"""Where bytes live: files, ``s3://`` and ``http(s)://``, behind the same functions.

Urls are text: a path, ``file://``, ``s3://bucket/key``, ``https://host/path``. A url never holds a secret; credentials
come from where the store's own tools find them.
"""

from swav.storage.counters import count, counts
from swav.storage.files import (
    absolute,
    is_remote,
    join,
    list_names,
    list_tars,
    name_of,
    open_atomic,
    open_file,
    read,
    remove,
    stat,
    write_atomic,
)
from swav.storage.local import cache_folder, has_pattern, local_path, locked
from swav.storage.types import FileStat, Location, RangeFile

__all__ = [
    "FileStat",
    "Location",
    "RangeFile",
    "absolute",
    "cache_folder",
    "count",
    "counts",
    "has_pattern",
    "is_remote",
    "join",
    "list_names",
    "list_tars",
    "local_path",
    "locked",
    "name_of",
    "open_atomic",
    "open_file",
    "read",
    "remove",
    "stat",
    "write_atomic",
]
