"""Small files that several programs write at once, none of them over another's words: read, then write if unchanged.

In a store these are its conditional writes (``If-None-Match: *``, ``If-Match``); here, one lock per folder. What is
written should say who wrote it: a writer whose answer was lost is told apart from another one by the bytes alone.
"""

import hashlib
import os
from dataclasses import dataclass

from swav.storage import files, local, s3
from swav.storage.types import ChangedError, Location
from swav.storage.urls import is_remote

_LOCK = ".conditional.lock"
_READS = 5  # of an object that is replaced while it is read


@dataclass(frozen=True, slots=True)
class Tagged:
    """A file's content, and what stands for just this content when it is to be replaced."""

    data: bytes
    tag: str


def read_tagged(url: Location) -> Tagged | None:
    """A small file and its tag; None where there is none.

    Raises:
        ValueError: ``http(s)://``, where nothing is written.
        OSError: the storage fails.
    """
    if not is_remote(url):
        return _read_local(url)
    _check_kind(url)
    for _ in range(_READS):
        try:
            file = files.open_file(url)
            data = file.read(0, file.num_bytes())
        except FileNotFoundError:
            return None
        except ChangedError:
            continue
        if not file.stat.etag:
            raise RuntimeError(f"{os.fspath(url)}: the store gives no ETag, without which nothing is replaced safely")
        return Tagged(data, file.stat.etag)
    raise RuntimeError(f"{os.fspath(url)} was replaced each time while it was read; see who writes it so often")


def write_conditional(url: Location, data: bytes, *, tag: str | None) -> str | None:
    """Write a small file if what is there is what the writer has seen.

    Args:
        url: of the file.
        data: what to write, with something in it that only this writer writes: where just these bytes are there, they
            count as written by this call (its answer was lost, and the store was asked again).
        tag: of the content that was seen; None: there was no such file.

    Returns:
        The new tag; None where something else is there now.

    Raises:
        ValueError: ``http(s)://``.
        OSError: the storage fails; it is not known whether the file was written.
    """
    if not is_remote(url):
        return _write_local(url, data, tag)
    _check_kind(url)
    written = s3.write_conditional(os.fspath(url), data, tag)
    if written is not None:
        return written
    found = read_tagged(url)
    return found.tag if found is not None and found.data == data else None


def check_conditions(url: Location) -> None:
    """Find out whether conditions are heeded where a file is; some stores ignore them without a word.

    Args:
        url: of a file to try it with, which is left there.

    Raises:
        ValueError: they are not.
        OSError: the storage fails.
    """
    write_conditional(url, b"conditional writes are tried with this file\n", tag=None)
    if not is_remote(url):
        return
    for tag in (None, "0" * 32):
        if s3.write_conditional(os.fspath(url), b"a conditional write was ignored\n", tag) is not None:
            raise ValueError(
                f"{os.fspath(url)}: the store ignores {'If-None-Match' if tag is None else 'If-Match'} when writing, "
                "so two writers could not be kept apart; use a store that heeds it, or a local folder"
            )


def _check_kind(url: Location) -> None:
    if not os.fspath(url).startswith("s3://"):
        raise ValueError(f"{os.fspath(url)}: a web server is only read; give a folder or s3://bucket/key")


def _read_local(url: Location) -> Tagged | None:
    try:
        data = files.read(url)
    except FileNotFoundError:
        return None
    return Tagged(data, hashlib.sha256(data).hexdigest())


def _write_local(url: Location, data: bytes, tag: str | None) -> str | None:
    file = local.local_path(url)
    with local.locked(file.parent / _LOCK):
        found = _read_local(url)
        if found is not None and found.data == data:
            return found.tag
        if (None if found is None else found.tag) != tag:
            return None
        files.write_atomic(file, data)
    return hashlib.sha256(data).hexdigest()
