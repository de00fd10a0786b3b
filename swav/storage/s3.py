"""``s3://bucket/key`` by boto3: one attempt of each request, and what their errors mean."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from swav.storage import remote
from swav.storage.answer import Answer, Fault, WireBody, byte_range, span
from swav.storage.attempts import Patience, attempt
from swav.storage.counters import count
from swav.storage.local import cache_folder
from swav.storage.s3_errors import translated
from swav.storage.types import FileStat
from swav.storage.urls import literal_head, pattern_of, quieten, redacted, split_s3

_POOL_CONNECTIONS = 64
_PAGE_KEYS = 1000  # of a listing
_PART_BYTES = 8 << 20  # of a multipart upload
_WRITE_SECONDS = 60.0  # for the answer to a write: a store may take its time to join the parts
_WRITE_ATTEMPTS = 10
_CONDITION_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
# A client is made anew where one of these changes.
_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "SWAV_S3_UNSIGNED",
)
_clients: dict[tuple[object, ...], Any] = {}
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def get(url: str, start: int, end: int | None, expected: FileStat, patience: Patience) -> Answer:
    """One GET; see :class:`swav.storage.remote.Store`."""
    bucket, key = _object(url)
    condition = {"IfMatch": f'"{expected.etag}"'} if expected.etag else {}
    client = _reader(patience)
    with _answered(url):
        found = client.get_object(Bucket=bucket, Key=key, Range=byte_range(start, end), **condition)
    num_bytes = found.get("ContentLength", -1)
    body = WireBody(found["Body"]._raw_stream, num_bytes, idle_seconds=patience.idle_seconds)
    try:
        first, total = span(found.get("ContentRange"), num_bytes)
        return Answer(first, num_bytes, _stat(total, found), body)
    except Fault:
        body.close()
        raise


def head(url: str, patience: Patience) -> FileStat | None:
    """One HEAD."""
    bucket, key = _object(url)
    client = _reader(patience)
    try:
        with _answered(url):
            found = client.head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return _stat(found.get("ContentLength", -1), found)


def list_names(folder: str, pattern: str) -> list[str]:
    """The names directly under a prefix, sorted; page by page, each of them tried until it is good."""
    bucket, prefix = split_s3(folder)
    prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
    arguments: dict[str, Any] = {
        "Bucket": bucket,
        "Prefix": prefix + literal_head(pattern),
        "Delimiter": "/",
        "MaxKeys": _PAGE_KEYS,
    }
    fits = pattern_of(pattern)
    names: list[str] = []
    while True:
        page = attempt(f"{folder}: listing", lambda: _page(folder, arguments), remote.PATIENCE)
        found = (entry["Key"][len(prefix) :] for entry in page.get("Contents", ()))
        names.extend(name for name in found if name and fits.match(name))
        if not page.get("IsTruncated"):
            return sorted(names)
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def _page(folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    client = _reader(remote.PATIENCE)
    with _answered(folder):
        page: dict[str, Any] = client.list_objects_v2(**arguments)
    if page.get("IsTruncated") and not page.get("NextContinuationToken"):
        raise Fault("a page of the listing says that there are more, but not where")
    return page


def write(url: str, data: bytes) -> None:
    """Write a small object with one request."""
    bucket, key = _object(url)
    with _written(url):
        _writer().put_object(Bucket=bucket, Key=key, Body=data)


def write_conditional(url: str, data: bytes, etag: str | None) -> str | None:
    """Write a small object if the store has this content, or none, under its name.

    Args:
        url: of the object.
        data: its new content.
        etag: of the content that it must have; None: there must be no such object.

    Returns:
        The new ETag; None where something else is there, or another write of the object is under way.
    """
    from botocore.exceptions import ClientError

    bucket, key = _object(url)
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    try:
        with _written(url):
            try:
                answer = _writer().put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _CONDITION_CODES:
                    return None
                raise
    except FileNotFoundError:  # removed since its ETag was seen
        return None
    found: str = answer["ETag"].strip('"')
    return found


@contextmanager
def open_atomic(url: str) -> Iterator[BinaryIO]:
    """Write an object that appears whole or not at all.

    The bytes wait in a file without a name in the cache folder, and are sent at the end of the block: in parts where
    they are many; the store drops the parts where one fails.
    """
    from boto3.s3.transfer import TransferConfig

    bucket, key = _object(url)
    config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
    with TemporaryFile(dir=cache_folder()) as file:
        yield file
        file.seek(0)
        with _written(url):
            _writer().upload_fileobj(file, bucket, key, Config=config)


def remove(url: str) -> None:
    """Remove an object; it may be gone already."""
    bucket, key = _object(url)
    with _written(url):
        _writer().delete_object(Bucket=bucket, Key=key)


def _object(url: str) -> tuple[str, str]:
    bucket, key = split_s3(url)
    if not key:
        raise ValueError(f"{url} names a bucket; write s3://bucket/key")
    return bucket, key


def _stat(num_bytes: int, found: dict[str, Any]) -> FileStat:
    if num_bytes < 0:
        raise Fault("the answer does not say the object's size")
    modified = found.get("LastModified")
    mtime_ns = 0 if modified is None else int(modified.timestamp()) * 10**9
    return FileStat(num_bytes, mtime_ns, found.get("ETag", "").strip('"'))


def _reader(patience: Patience) -> Any:
    """The client that reads. It tries once: :mod:`swav.storage.remote` knows more of what was received.

    botocore's own retries do not see bodies, and share a quota that a hundred retries of all threads together use up,
    so that a minute in which a store is overloaded would end a run.
    """
    return _client(1, patience.connect_seconds, patience.answer_seconds)


def _writer() -> Any:
    """The client that writes, with botocore's retries: the parts of an upload are its business."""
    return _client(_WRITE_ATTEMPTS, remote.PATIENCE.connect_seconds, _WRITE_SECONDS)


def _client(tries: int, connect_seconds: float, answer_seconds: float) -> Any:
    settings = tuple(os.environ.get(name) for name in _SETTINGS)
    key = (os.getpid(), tries, connect_seconds, answer_seconds, settings)  # connections do not survive a fork
    client = _clients.get(key)
    if client is None:
        with _lock:
            client = _clients.get(key)
            if client is None:
                client = _clients[key] = _make_client(tries, connect_seconds, answer_seconds)
    return client


def _make_client(tries: int, connect_seconds: float, answer_seconds: float) -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise RuntimeError(
            "s3:// needs boto3, which is not installed; install it with pip install 'swav[train]'"
        ) from error
    quieten("boto3", "botocore", "s3transfer", "urllib3")
    config = Config(
        signature_version=UNSIGNED if os.environ.get("SWAV_S3_UNSIGNED") == "1" else None,
        connect_timeout=connect_seconds,
        read_timeout=answer_seconds,
        max_pool_connections=_POOL_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": tries},
        request_checksum_calculation="when_required",  # stores other than Amazon's refuse its trailing checksums
        response_checksum_validation="when_required",  # the reader has checksums of its own
    )
    try:
        with translated("s3://"):
            client = boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        if "endpoint" not in str(error):
            raise
        raise ValueError(f"{redacted(error)}; write AWS_ENDPOINT_URL as https://host or http://host:port") from None
    client.meta.events.register("before-send.s3", _count_request)
    return client


def _count_request(request: Any, **_: Any) -> None:
    count("requests")
    if not _is_first(request.headers.get("amz-sdk-request", b"")):
        count("retries")


def _is_first(header: str | bytes) -> bool:
    text = header.decode() if isinstance(header, bytes) else header
    return not text or "attempt=1" in text.replace(" ", "").split(";")


@contextmanager
def _answered(url: str) -> Iterator[None]:
    """One attempt to read: botocore takes a head that was cut for a whole one, and then stumbles over half a number."""
    with translated(url):
        try:
            yield
        except ValueError:
            raise Fault("the answer's head is cut or unreadable", ConnectionError) from None


@contextmanager
def _written(url: str) -> Iterator[None]:
    """Turns a fault that botocore's retries did not cure into an error."""
    try:
        with translated(url):
            yield
    except Fault as fault:
        raise fault.kind(f"{url} was not written: {fault}; botocore tried up to {_WRITE_ATTEMPTS} times") from None
