"""Files of this machine."""

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from swav.storage.types import PIECE_BYTES, FileStat, Location
from swav.storage.urls import check_remote, has_marks, is_remote

logger = logging.getLogger(__name__)


def local_path(url: Location) -> Path:
    """The path behind a plain path or a ``file://`` url; ``~`` is expanded.

    Raises:
        ValueError: another scheme, or a ``file://`` url that names a host.
    """
    url = os.fspath(url)
    if "://" not in url:
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise ValueError(
            f"{check_remote(url) if is_remote(url) else url}: the scheme {parts.scheme}:// is not supported here; give "
            "a path or file://, or, where a store will do, s3:// or http(s):// in small letters"
        )
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url}: file://{parts.netloc}/ names a host; write file:///path with three slashes")
    return Path(unquote(parts.path))


def list_tars(url: Location) -> list[str]:
    """The tars behind a url, as absolute paths in sorted name order.

    Args:
        url: a folder (its ``*.tar``, not those of its subfolders), a pattern such as ``/data/train-*.tar``, or one tar.

    Raises:
        ValueError: nothing is there, or a file of another kind.
    """
    path = local_path(url).absolute()
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(f"{url} is no .tar by name; give a folder of images or tars, a tar (unpacked) or a list")
        return [str(path)]
    folder, pattern = (path.parent, path.name) if not path.exists() and has_marks(str(path)) else (path, "*.tar")
    if not folder.is_dir():
        raise ValueError(f"{url}: there is no such file or folder")
    names = list_names(folder, pattern)
    return [str(folder / name) for name in names if name.endswith(".tar") and not name.startswith(".")]


def list_names(folder: Location, pattern: str) -> list[str]:
    """The names of the files directly in a folder, sorted; empty where there is no folder."""
    path = local_path(folder)
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(path) if fnmatchcase(entry.name, pattern) and entry.is_file())


def stat(url: Location) -> FileStat | None:
    """Size and modification time of a file; None where there is none."""
    try:
        found = local_path(url).stat()
    except FileNotFoundError:
        return None
    return FileStat(found.st_size, found.st_mtime_ns, "")


class LocalFile:
    """A file that is read by ranges, from any number of threads at once.

    It is closed when the last reference to it goes, so a cache may drop one that another thread still reads.
    """

    def __init__(self, url: Location) -> None:
        """Open a file.

        Raises:
            OSError: it cannot be opened.
        """
        self._descriptor = -1
        self._descriptor = os.open(local_path(url), os.O_RDONLY | os.O_CLOEXEC)
        self.url = os.fspath(url)
        found = os.fstat(self._descriptor)
        if S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(url))
        self.stat = FileStat(found.st_size, found.st_mtime_ns, "")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def num_bytes(self) -> int:
        """The size of the file now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range; shorter than asked for only where the file ends."""
        data = os.pread(self._descriptor, num_bytes, offset)
        while len(data) < num_bytes:  # the kernel caps one call at 2 GiB and may stop at a signal
            more = os.pread(self._descriptor, num_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def stream(self, offset: int, num_bytes: int) -> Iterator[bytes]:
        """Read a range in pieces."""
        end = offset + num_bytes
        while offset < end and (piece := self.read(offset, min(PIECE_BYTES, end - offset))):
            yield piece
            offset += len(piece)


@contextmanager
def open_atomic(url: Location) -> Iterator[BinaryIO]:
    """Write a file that appears whole or not at all.

    The bytes go to a hidden ``.<name>.<random>.partial`` in the same folder (made if missing), are forced to disk, and
    take their name at the end of the block. If the block raises, the partial file is removed and what was under the
    name before is untouched. Only a killed process leaves a partial file behind.

    Raises:
        OSError: the disk is full or the folder cannot be written; names the file.
    """
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def cache_folder() -> Path:
    """Where indexes and shards that are made on the way are kept: ``$SWAV_CACHE``, or ``~/.cache/swav``. Is made here.

    Raises:
        ValueError: it cannot be made or written.
    """
    folder = Path(os.environ.get("SWAV_CACHE") or "~/.cache/swav").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ValueError(f"the cache folder {folder} cannot be written ({reason}); set SWAV_CACHE to one that can")
    return folder


@contextmanager
def locked(path: Location) -> Iterator[None]:
    """Let one process of this host at a time into the block; the others wait.

    Args:
        path: the lock's file, made if missing and left there. A killed process holds no lock.
    """
    place = local_path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that holds %s", place)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
