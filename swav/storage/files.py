"""The functions that work on any url."""

import os
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import BinaryIO, NoReturn

from swav.storage import local
from swav.storage.types import FileStat, Location, RangeFile

_REMOTE = ("s3://", "http://", "https://")


def is_remote(url: Location) -> bool:
    """Whether a url names an object in a store, and not a file of this machine."""
    return os.fspath(url).startswith(_REMOTE)


def absolute(url: Location) -> str:
    """A url that means the same in any working folder; without a slash at its end."""
    return os.fspath(url).rstrip("/") if is_remote(url) else str(local.local_path(url).absolute())


def join(folder: Location, *names: str) -> str:
    """The url of something inside a folder; an absolute path or a remote url among the names starts anew."""
    url = os.fspath(folder)
    for name in names:
        url = name if is_remote(name) or name.startswith("/") else f"{url.rstrip('/')}/{name}"
    return url


def name_of(url: Location) -> str:
    """The last part of a url."""
    return os.fspath(url).rstrip("/").rpartition("/")[2]


def stat(url: Location) -> FileStat | None:
    """What identifies the content of a file; None where there is none."""
    if is_remote(url):
        _not_yet(url)
    return local.stat(url)


def open_file(url: Location, *, etag: str = "") -> RangeFile:
    """Open a file to read ranges of it.

    Args:
        url: of the file.
        etag: the content that is expected, where it is known; a store that has another one now refuses.

    Raises:
        OSError: it cannot be opened, is not there, or has changed.
    """
    if is_remote(url):
        _not_yet(url)
    return local.LocalFile(url)


def read(url: Location) -> bytes:
    """Read a whole file.

    Raises:
        OSError: it cannot be read.
    """
    file = open_file(url)
    return file.read(0, file.num_bytes())


def list_names(folder: Location, pattern: str = "*") -> list[str]:
    """The names of the files directly in a folder, sorted; empty where there is no folder."""
    if is_remote(folder):
        _not_yet(folder)
    path = local.local_path(folder)
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if fnmatchcase(entry.name, pattern) and entry.is_file())


def list_tars(url: Location) -> list[str]:
    """The tars behind a url, as absolute urls in sorted name order.

    Args:
        url: a folder (its ``*.tar``, not those of its subfolders), a pattern such as ``/data/train-*.tar``, or one tar.

    Raises:
        ValueError: nothing is there, or a file of another kind.
    """
    if is_remote(url):
        _not_yet(url)
    return local.list_tars(url)


def open_atomic(url: Location) -> AbstractContextManager[BinaryIO]:
    """Write a file that appears whole or not at all; see :func:`swav.storage.local.open_atomic`."""
    if is_remote(url):
        _not_yet(url)
    return local.open_atomic(url)


def write_atomic(url: Location, data: bytes | memoryview) -> None:
    """Write a whole file that appears whole or not at all."""
    with open_atomic(url) as file:
        file.write(data)


def remove(url: Location) -> None:
    """Remove a file; it may be gone already."""
    if is_remote(url):
        _not_yet(url)
    local.local_path(url).unlink(missing_ok=True)


def _not_yet(url: Location) -> NoReturn:
    raise NotImplementedError(f"{url}: to be written in swav/storage")
