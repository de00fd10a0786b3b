"""The functions that work on any url."""

import os
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NoReturn

from swav.storage import http, local, remote, s3
from swav.storage.types import FileStat, Location, RangeFile
from swav.storage.urls import check_remote, expand_braces, has_braces, has_marks, is_remote

_ONE_REQUEST_BYTES = 8 << 20  # larger objects are written in parts


def absolute(url: Location) -> str:
    """A url that means the same in any working folder; without a slash at its end.

    Raises:
        ValueError: a remote url that holds a secret.
    """
    if is_remote(url):
        return check_remote(os.fspath(url)).rstrip("/")
    return str(local.local_path(url).absolute())


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
    """What identifies the content of a file; None where there is none.

    Raises:
        OSError: a store does not say.
    """
    return remote.stat(os.fspath(url), _store(url)) if is_remote(url) else local.stat(url)


def open_file(url: Location, *, etag: str = "") -> RangeFile:
    """Open a file to read ranges of it.

    Args:
        url: of the file.
        etag: the content that is expected, where it is known; a store that has another one now refuses. Then no request
            is made before the file is read.

    Raises:
        OSError: it cannot be opened, is not there, or has changed.
    """
    if not is_remote(url):
        return local.LocalFile(url)
    file = remote.RemoteFile(os.fspath(url), _store(url), etag=etag)
    if not etag:
        file.num_bytes()
    return file


def read(url: Location) -> bytes:
    """Read a whole file.

    Raises:
        OSError: it cannot be read.
    """
    if is_remote(url):
        return remote.RemoteFile(os.fspath(url), _store(url)).read_whole()
    file = local.LocalFile(url)
    return file.read(0, file.num_bytes())


def readable(url: Location) -> Path | BytesIO:
    """What a library that reads files can be given: the path of a local file, a remote one's bytes in memory.

    Raises:
        OSError: it cannot be read.
    """
    return BytesIO(read(url)) if is_remote(url) else local.local_path(url)


def list_names(folder: Location, pattern: str = "*") -> list[str]:
    """The names of the files directly in a folder, sorted; empty where there is no folder.

    Raises:
        ValueError: a folder of a web server, which cannot be listed.
    """
    if is_remote(folder):
        if _store(folder) is http:
            _no_list(folder)
        return s3.list_names(os.fspath(folder), pattern)
    return local.list_names(folder, pattern)


def has_pattern(url: Location) -> bool:
    """Whether a url stands for several files: a pattern such as ``train-*.tar``, or braces as ``train-{000..146}.tar``.

    The name of something that is there is no pattern; a remote url with a slash at its end is a folder.
    """
    text = os.fspath(url)
    if not is_remote(url):
        path = local.local_path(url)
        return not path.exists() and (has_braces(str(path)) or has_marks(str(path)))
    return has_braces(text) or (has_marks(text) and (_store(url) is s3 and stat(url) is None))


def list_tars(url: Location) -> list[str]:
    """The tars behind a url, as absolute urls in sorted name order.

    Args:
        url: a folder (its ``*.tar``, not those of its subfolders), a pattern such as ``/data/train-*.tar``, a range in
            webdataset's notation, ``/data/train-{000..146}.tar`` (whose tars are not looked for here), or one tar. A
            folder or a pattern of a web server cannot be listed.

    Raises:
        ValueError: nothing is there, or a file of another kind.
    """
    if has_braces(os.fspath(url)) and has_pattern(url):
        return _expanded(url)
    if not is_remote(url):
        return local.list_tars(url)
    text = absolute(url)
    if has_pattern(url):
        folder, _, pattern = text.rpartition("/")
    elif text.endswith(".tar"):
        if stat(text) is None:
            raise ValueError(f"{text}: there is no such object")
        return [text]
    else:
        folder, pattern = text, "*.tar"
    names = list_names(folder, pattern)
    return [join(folder, name) for name in names if name.endswith(".tar") and not name.startswith(".")]


def _expanded(url: Location) -> list[str]:
    urls = sorted({absolute(one) for one in expand_braces(os.fspath(url))})
    other = next((one for one in urls if not one.endswith(".tar") or has_marks(one)), None)
    if other is not None:
        raise ValueError(f"{url} stands for {other}, which is no .tar by name; write train-{{000..146}}.tar")
    return urls


def open_atomic(url: Location) -> AbstractContextManager[BinaryIO]:
    """Write a file that appears whole or not at all; see :func:`swav.storage.local.open_atomic`.

    Raises:
        ValueError: ``http(s)://``, which is only read.
    """
    if not is_remote(url):
        return local.open_atomic(url)
    if _store(url) is http:
        _no_write(url)
    return s3.open_atomic(os.fspath(url))


def write_atomic(url: Location, data: bytes | memoryview) -> None:
    """Write a whole file that appears whole or not at all.

    Raises:
        ValueError: ``http(s)://``, which is only read.
    """
    if is_remote(url) and _store(url) is s3 and len(data) <= _ONE_REQUEST_BYTES:
        s3.write(os.fspath(url), bytes(data))
        return
    with open_atomic(url) as file:
        file.write(data)


def remove(url: Location) -> None:
    """Remove a file; it may be gone already.

    Raises:
        ValueError: ``http(s)://``, which is only read.
    """
    if not is_remote(url):
        local.local_path(url).unlink(missing_ok=True)
    elif _store(url) is http:
        _no_write(url)
    else:
        s3.remove(os.fspath(url))


def _store(url: Location) -> remote.Store:
    check_remote(os.fspath(url))
    return s3 if os.fspath(url).startswith("s3://") else http


def _no_write(url: Location) -> NoReturn:
    raise ValueError(f"{url}: a web server is only read; write to a folder or to s3://bucket/key")


def _no_list(url: Location) -> NoReturn:
    raise ValueError(
        f"{url}: a web server's folder cannot be listed; give a range such as {url}/train-{{000..146}}.tar, or put the "
        "index.json of the dataset beside its shards"
    )
