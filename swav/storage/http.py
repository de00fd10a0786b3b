"""``http(s)://`` by urllib3: one attempt of each request. A web server is only read."""

import os
import threading
from email.utils import formatdate, parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from swav.storage.answer import Answer, BeyondEndError, Fault, WireBody, byte_range, span
from swav.storage.attempts import Patience
from swav.storage.counters import count
from swav.storage.types import ChangedError, FileStat, changed
from swav.storage.urls import check_remote, quieten, redacted

_POOL_CONNECTIONS = 64
_REDIRECTS = 5
_AGAIN_STATUSES = frozenset({408, 425, 429})  # and all from 500 but 501 and 505
_pools: dict[tuple[int, str, str], Any] = {}
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def get(url: str, start: int, end: int | None, expected: FileStat, patience: Patience) -> Answer:
    """One GET; see :class:`swav.storage.remote.Store`."""
    headers = {"Range": byte_range(start, end)}
    if expected.etag and not expected.etag.startswith("W/"):  # a weak one never matches
        headers["If-Match"] = f'"{expected.etag}"'
    elif expected.mtime_ns:
        headers["If-Unmodified-Since"] = formatdate(expected.mtime_ns // 10**9, usegmt=True)
    raw = _send("GET", url, headers, patience)
    try:
        num_bytes = _length(url, raw)
        first, total = span(raw.headers.get("Content-Range"), num_bytes)
        body = WireBody(raw, num_bytes, idle_seconds=patience.idle_seconds)
        return Answer(first, num_bytes, _stat(total, raw), body)
    except BaseException:
        raw.close()
        raise


def head(url: str, patience: Patience) -> FileStat | None:
    """One HEAD."""
    try:
        raw = _send("HEAD", url, {}, patience)
    except FileNotFoundError:
        return None
    raw.release_conn()
    return _stat(_length(url, raw), raw)


def _send(method: str, url: str, headers: dict[str, str], patience: Patience) -> Any:
    """Send a request and refuse what is no good answer.

    Raises:
        Fault: try again.
        OSError: trying again does not help.
    """
    from urllib3 import Timeout
    from urllib3.exceptions import HTTPError
    from urllib3.util.retry import Retry

    count("requests")
    timeout = Timeout(connect=patience.connect_seconds, read=patience.answer_seconds)
    once = Retry(total=None, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS)
    headers = {"Accept-Encoding": "identity", "User-Agent": "swav", **headers}
    try:
        raw = _pool(url).request(
            method, check_remote(url), headers=headers, preload_content=False, retries=once, timeout=timeout
        )
    except HTTPError as error:
        raise _of_error(url, error) from None
    try:
        _refuse(url, raw)
    except BaseException:
        raw.close()
        raise
    return raw


def _of_error(url: str, error: Exception) -> Exception:
    from urllib3 import exceptions

    reason = error.reason if isinstance(error, exceptions.MaxRetryError) else error
    if isinstance(reason, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(reason):
        return ConnectionError(
            f"{url}: the server's certificate is not trusted; name its authority's file in SSL_CERT_FILE"
        )
    if "redirect" in str(reason):
        return OSError(f"{url}: the server redirected more than {_REDIRECTS} times")
    if isinstance(reason, exceptions.LocationValueError):
        return ValueError(f"{url}: {redacted(reason)}")
    if isinstance(reason, exceptions.NewConnectionError):
        return Fault(f"no connection to the server ({_cause(reason)})", ConnectionError)
    if isinstance(reason, exceptions.TimeoutError):
        return Fault("the server did not answer in time", TimeoutError)
    return Fault(f"the connection broke ({type(reason).__name__})", ConnectionError)


def _cause(error: Exception) -> str:
    return redacted(error).rpartition(": ")[2]


def _refuse(url: str, raw: Any) -> None:
    status = raw.status
    if status in (200, 206):
        return
    answer = f"the server answered {status}"
    if status in _AGAIN_STATUSES or (status >= 500 and status not in (501, 505)):
        wait = raw.headers.get("Retry-After", "")
        raise Fault(answer, pause_seconds=float(wait) if wait.isdigit() else 0.0)
    if status in (404, 410):
        raise FileNotFoundError(f"{url}: there is no such file on the server")
    if status in (401, 403):
        raise PermissionError(f"{url}: {answer}; swav sends no credentials over http(s)://, so copy the data to s3://")
    if status == 412:
        raise ChangedError(changed(url, "was replaced"))
    if status == 416:
        raise BeyondEndError
    raise OSError(f"{url}: {answer}")


def _length(url: str, raw: Any) -> int:
    length = raw.headers.get("Content-Length", "")
    if not length.isdigit():
        raise OSError(
            f"{url}: the server does not say how long the file is (no Content-Length); serve it as a plain file"
        )
    return int(length)


def _stat(num_bytes: int, raw: Any) -> FileStat:
    etag = raw.headers.get("ETag", "")
    weak = etag.startswith("W/")
    try:
        mtime_ns = int(parsedate_to_datetime(raw.headers.get("Last-Modified", "")).timestamp()) * 10**9
    except ValueError:  # none, or none that can be read
        mtime_ns = 0
    return FileStat(num_bytes, mtime_ns, ("W/" if weak else "") + etag.removeprefix("W/").strip('"'))


def _pool(url: str) -> Any:
    """The connections of this process to a server: they do not survive a fork."""
    parts = urlsplit(url)
    key = (os.getpid(), parts.scheme, parts.netloc)
    pool = _pools.get(key)
    if pool is None:
        with _lock:
            pool = _pools.get(key)
            if pool is None:
                pool = _pools[key] = _make_pool(parts.scheme, parts.hostname or "")
    return pool


def _make_pool(scheme: str, host: str) -> Any:
    import urllib3

    quieten("urllib3")
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=_POOL_CONNECTIONS)
    return urllib3.PoolManager(maxsize=_POOL_CONNECTIONS)
