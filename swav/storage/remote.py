"""Reading objects from stores that fail now and then: what ``s3://`` and ``http(s)://`` share.

A store (:mod:`swav.storage.s3`, :mod:`swav.storage.http`) makes one attempt; what is here goes on where one ended.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from typing import Protocol

from swav.storage.answer import Answer, BeyondEndError, Fault
from swav.storage.attempts import Attempts, Patience, attempt, hedged
from swav.storage.counters import count
from swav.storage.types import PIECE_BYTES, ChangedError, FileStat, changed

PATIENCE = Patience()
_UNKNOWN = FileStat(-1, 0, "")


class Store(Protocol):
    """One attempt at a time."""

    def get(self, url: str, start: int, end: int | None, expected: FileStat, patience: Patience) -> Answer:
        """Ask for bytes ``start <= i < end`` of an object; all of it where end is None.

        Args:
            url: of the object.
            start: of the range.
            end: of the range.
            expected: what the object must be; its etag is empty where nothing is known.
            patience: of connecting and waiting.

        Raises:
            Fault: try again.
            OSError: trying again does not help.
            ValueError: the url is wrong.
        """

    def head(self, url: str, patience: Patience) -> FileStat | None:
        """What an object is; None where there is none."""


class _Speed:
    """Notices a body that trickles, from the time spent waiting for it: the caller's own pauses do not count."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._seconds = 0.0
        self._num_bytes = 0

    def saw(self, num_bytes: int, seconds: float) -> None:
        self._seconds += seconds
        self._num_bytes += num_bytes
        if self._seconds >= self._patience.slow_seconds:
            if self._num_bytes < self._seconds * self._patience.slow_bytes_per_second:
                raise Fault(f"only {self._num_bytes} bytes came in {self._seconds:.0f} s", TimeoutError)
            self._seconds, self._num_bytes = 0.0, 0


class RemoteFile:
    """An object that is read by ranges, from any number of threads at once.

    Args:
        url: of the object.
        store: that has it.
        etag: the content that is expected, where it is known. The store is then first asked when it is read.
    """

    def __init__(self, url: str, store: Store, *, etag: str = "") -> None:
        self.url = url
        self._store = store
        self._stat = FileStat(-1, 0, etag)

    @property
    def known_bytes(self) -> int | None:
        """The size of the object, where the store has said it already."""
        return self._stat.num_bytes if self._stat.num_bytes >= 0 else None

    @property
    def stat(self) -> FileStat:
        """What it was when it was opened.

        Raises:
            FileNotFoundError: it is not there.
            ChangedError: it is not what was expected.
        """
        if self._stat.num_bytes < 0:
            found = stat(self.url, self._store)
            if found is None:
                raise self._missing()
            self._learn(found)
        return self._stat

    def num_bytes(self) -> int:
        """The size of the object that was opened."""
        return self.stat.num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range; shorter than asked for only where the object ends."""
        return self._read(offset, offset + num_bytes) if num_bytes > 0 else b""

    def read_whole(self) -> bytes:
        """Read all of it, with one request where nothing goes wrong."""
        return self._read(0, None)

    def stream(self, offset: int, num_bytes: int) -> Iterator[bytes]:
        """Read a range in pieces of at most ``PIECE_BYTES``."""
        with closing(_Range(self, offset, offset + num_bytes)) as wanted:
            left = wanted.begin() if num_bytes > 0 else 0
            while left > 0:
                piece = _filled(min(PIECE_BYTES, left), wanted.fill)
                left -= len(piece)
                yield piece

    def _read(self, start: int, end: int | None) -> bytes:
        with closing(_Range(self, start, end)) as wanted:
            return _filled(wanted.begin(), wanted.fill)

    def ask(self, start: int, end: int | None, patience: Patience) -> Answer:
        """An answer to one request, which is about the object that was opened and about this range of it.

        Raises:
            Fault: try again.
            BeyondEndError: the object ends before the range.
        """
        try:
            answer = hedged(lambda: self._store.get(self.url, start, end, self._stat, patience), patience)
        except FileNotFoundError:
            if self._stat == _UNKNOWN:
                raise
            raise self._missing() from None
        try:
            answer.body.wait()  # before anything in the head is believed
            self._check(answer, start, end)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check(self, answer: Answer, start: int, end: int | None) -> None:
        """Refuse an answer to another question than was asked."""
        expected_end = answer.stat.num_bytes if end is None else min(end, answer.stat.num_bytes)
        whole = answer.start == 0 and answer.num_bytes == answer.stat.num_bytes
        if self._stat.num_bytes < 0 and end is not None and answer.stat.num_bytes < end:
            self.num_bytes()  # that the object ends so early is not taken from one answer
        self._learn(answer.stat)
        if answer.start != start:
            if whole:
                raise OSError(f"{self.url}: the server does not serve ranges; copy the object to a store that does")
            raise Fault(f"asked for bytes from {start}, the answer starts at {answer.start}")
        if answer.start + answer.num_bytes != expected_end and not whole:
            raise Fault(f"asked for bytes up to {expected_end}, the answer ends at {answer.start + answer.num_bytes}")

    def _learn(self, found: FileStat) -> None:
        """Take what the store says of the object, or refuse it where it is not the object that was opened."""
        known = self._stat
        if known.etag and found.etag and known.etag != found.etag:
            raise ChangedError(changed(self.url, f"was replaced (its ETag is {found.etag} and was {known.etag})"))
        if known.num_bytes < 0:
            self._stat = (
                found if found.etag or not known.etag else FileStat(found.num_bytes, found.mtime_ns, known.etag)
            )
        elif known.num_bytes != found.num_bytes:
            raise Fault(f"the object had {known.num_bytes} bytes and has {found.num_bytes} by this answer")

    def _missing(self) -> OSError:
        if self._stat == _UNKNOWN:
            return FileNotFoundError(f"{self.url}: there is no such object")
        return ChangedError(changed(self.url, "was removed"))


class _Range:
    """A range that is being read: one answer of the store after the other, until all of it has come."""

    def __init__(self, file: RemoteFile, start: int, end: int | None) -> None:
        self._file = file
        self._start, self._position, self._end = start, start, end
        self._patience = PATIENCE
        what = f"{file.url}: reading bytes {start} to {'the end' if end is None else end}"
        self._attempts = Attempts(what, self._patience)
        self._answer: Answer | None = None
        self._speed = _Speed(self._patience)
        self._gained = 0

    def begin(self) -> int:
        """The number of bytes that will come, which the store is asked for where the object's size is not known."""
        while (size := self._file.known_bytes) is None:
            try:
                self._ask()
            except BeyondEndError:
                self._file.num_bytes()
            except Fault as fault:
                self._wait(fault)
        self._end = size if self._end is None else min(self._end, size)
        return max(self._end - self._start, 0)

    def fill(self, view: memoryview) -> None:
        """Fill a buffer with the next bytes."""
        done = 0
        while done < len(view):
            try:
                answer = self._answer or self._ask()
                before = time.monotonic()
                num_bytes = answer.body.readinto(view[done : done + PIECE_BYTES])
                if num_bytes == 0:
                    raise Fault("the body ended before its length", ConnectionError)
                done += num_bytes
                self._position += num_bytes
                self._gained += num_bytes
                count("bytes_received", num_bytes)
                self._speed.saw(num_bytes, time.monotonic() - before)
            except BeyondEndError:
                raise ChangedError(changed(self._file.url, "is shorter now")) from None
            except Fault as fault:
                self._wait(fault)

    def close(self) -> None:
        """Let the connection go."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def _ask(self) -> Answer:
        self._speed = _Speed(self._patience)
        self._answer = self._file.ask(self._position, self._end, self._patience)
        return self._answer

    def _wait(self, fault: Fault) -> None:
        """Before the next request."""
        self.close()
        if self._gained >= self._patience.progress_bytes:
            self._attempts.progress()
        if self._position > self._start:
            count("resumed_streams")
        self._gained = 0
        self._attempts.failed(fault)


def _filled(num_bytes: int, fill: Callable[[memoryview], None]) -> bytes:
    """Bytes that are received where they stay: joining pieces costs several times as much."""
    if num_bytes == 0:
        return b""
    buffer = BytesIO()
    buffer.seek(num_bytes - 1)
    buffer.write(b"\0")
    with buffer.getbuffer() as view:
        fill(view)
    return buffer.getvalue()


def stat(url: str, store: Store) -> FileStat | None:
    """What an object is; None where there is none."""
    patience = PATIENCE
    return attempt(f"{url}: asking for its size", lambda: _stat(url, store, patience), patience)


def _stat(url: str, store: Store, patience: Patience) -> FileStat | None:
    """Ask for one byte rather than for the head alone: of a head that was cut inside a number nobody could tell."""
    try:
        answer = store.get(url, 0, 1, _UNKNOWN, patience)
    except FileNotFoundError:
        return None
    except BeyondEndError:
        return store.head(url, patience)
    with closing(answer):
        answer.body.wait()
        return answer.stat
