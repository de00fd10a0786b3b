"""One answer of a store: what it says of the object, and its body."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from swav.storage.types import FileStat

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


class Fault(Exception):  # noqa: N818
    """What may go well when it is tried again; never leaves this package.

    Args:
        reason: in words, without secrets.
        kind: the error that the user gets when trying does not help.
        pause_seconds: that the store asked for.
    """

    def __init__(self, reason: str, kind: type[OSError] = OSError, pause_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.pause_seconds = pause_seconds


class BeyondEndError(Exception):
    """A range starts after the last byte (416); never leaves this package."""


class Body(Protocol):
    """The bytes of an answer."""

    def wait(self) -> None:
        """Wait for the first byte: it shows that the head before it came whole, which http.client does not check.

        Raises:
            Fault: the connection broke or was silent for too long.
        """

    def readinto(self, view: memoryview, /) -> int:
        """Fill a buffer with what is there, and wait only where nothing is; returns the number of bytes, 0 at the end.

        Raises:
            Fault: the connection broke or was silent for too long.
        """

    def close(self) -> None:
        """Give the connection back, or drop it where bytes are left on it."""


@dataclass(slots=True)
class Answer:
    """What a store sends for a GET."""

    start: int  # of the body in the object
    num_bytes: int  # of the body
    stat: FileStat  # of the object
    body: Body

    def close(self) -> None:
        """Let the connection go."""
        self.body.close()


def byte_range(start: int, end: int | None) -> str:
    """The header of a request; a whole object is asked for as a range too, as the answer then says its size twice."""
    return f"bytes={start}-{'' if end is None else end - 1}"


def span(content_range: str | None, num_bytes: int) -> tuple[int, int]:
    """Where a body starts, and the size of the whole object.

    Args:
        content_range: the header, None where there is none.
        num_bytes: of the body, as Content-Length has it.

    Raises:
        Fault: they cannot be understood or contradict each other.
    """
    if content_range is None:
        return 0, num_bytes
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    if found is None or found[1] is None:
        raise Fault(f"the answer's Content-Range is {content_range!r}")
    first, last, total = int(found[1]), int(found[2]), int(found[3])
    if not first <= last < total or last - first + 1 != num_bytes:
        raise Fault(f"the answer's Content-Range is {content_range!r} and its length {num_bytes}")
    return first, total


class WireBody:
    """The body of an answer of urllib3, which boto3 uses too.

    It reads the socket's buffered stream below urllib3 and http.client, into the caller's memory and without a copy:
    they can only wait until as much is there as was asked for, so that a store that trickles would hold the caller, and
    what came before a connection broke would be lost.
    """

    def __init__(self, raw: Any, num_bytes: int, *, idle_seconds: float) -> None:
        self._raw = raw
        self._wire = raw._fp  # http.client.HTTPResponse
        self._stream = self._wire.fp  # io.BufferedReader; None where the body is empty
        self._left = num_bytes
        if self._stream is not None:
            self._stream.raw._sock.settimeout(idle_seconds)  # http.client may have let go of the socket's owner

    def wait(self) -> None:
        """Wait for the first byte, where there is one to come."""
        with _faults():
            if self._left and (self._stream is None or not self._stream.peek(1)):
                raise Fault("the connection ended before the body", ConnectionError)

    def readinto(self, view: memoryview) -> int:
        """Fill a buffer with what is there, and wait only where nothing is; returns how much it was, 0 at the end."""
        with _faults():
            num_bytes: int = self._stream.readinto1(view[: self._left])
        self._left -= num_bytes
        return num_bytes

    def close(self) -> None:
        """Give the connection back, or drop it where bytes are left on it."""
        with contextlib.suppress(OSError):
            if self._left == 0:
                self._wire.close()
            else:
                self._raw.close()
            self._raw.release_conn()


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise Fault("no byte came for too long", TimeoutError) from None
    except (OSError, ValueError) as error:  # ValueError: closed
        raise Fault(f"the connection broke ({type(error).__name__})", ConnectionError) from None
