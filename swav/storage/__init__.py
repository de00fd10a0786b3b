"""Where bytes live: files, ``s3://`` and ``http(s)://``, behind the same functions.

Urls are text: a path, ``file://``, ``s3://bucket/key``, ``https://host/path``. A url never holds a secret; credentials
come from where the store's own tools find them.
"""

from swav.storage.conditional import Tagged, check_conditions, read_tagged, write_conditional
from swav.storage.counters import count, counts, observe_counts
from swav.storage.files import (
    absolute,
    has_pattern,
    join,
    list_names,
    list_tars,
    name_of,
    open_atomic,
    open_file,
    read,
    readable,
    remove,
    stat,
    write_atomic,
)
from swav.storage.local import cache_folder, local_path, locked
from swav.storage.types import ChangedError, FileStat, Location, RangeFile
from swav.storage.urls import is_remote

__all__ = [
    "ChangedError",
    "FileStat",
    "Location",
    "RangeFile",
    "Tagged",
    "absolute",
    "cache_folder",
    "check_conditions",
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
    "observe_counts",
    "open_atomic",
    "open_file",
    "read",
    "read_tagged",
    "readable",
    "remove",
    "stat",
    "write_atomic",
    "write_conditional",
]
