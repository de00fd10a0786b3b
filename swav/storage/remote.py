"""Reading objects from stores that fail now and then: what ``s3://`` and ``http(s)://`` share.

A store (:mod:`swav.storage.s3`, :mod:`swav.storage.http`) makes one attempt; what is here makes attempts until one is
good. There is one layer of retries, so that it is known how long a user waits for an error.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from swav.storage.answer import Answer, BeyondEndError, Fault
from swav.storage.counters import count
from swav.storage.types import PIECE_BYTES, ChangedError, FileStat, changed

logger = logging.getLogger(__name__)

T = TypeVar("T")

_UNKNOWN = FileStat(-1, 0, "")
_jitter = random.SystemRandom()  # has no state that a fork would share


@dataclass(frozen=True, slots=True)
class Patience:
    """How long storage waits for a store, and how often it tries."""

    connect_seconds: float = 5.0
    first_byte_seconds: float = 2.0  # then the request is sent a second time, beside the first
    answer_seconds: float = 10.0  # for the status and the headers of one attempt
    idle_seconds: float = 5.0  # between two bytes of a body
    slow_bytes_per_second: float = 10e3  # over `slow_seconds` of waiting: the body is fetched elsewhere
    slow_seconds: float = 10.0
    attempts: int = 10  # without progress
    progress_bytes: int = 64 << 10  # that an attempt must bring to count as progress
    backoff_seconds: float = 0.5  # doubled with every attempt, and drawn anew between 0 and that
    backoff_cap_seconds: float = 20.0


PATIENCE = Patience()


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


class Attempts:
    """Tries one thing until it works, with a pause drawn anew between tries (full jitter)."""

    def __init__(self, what: str, patience: Patience) -> None:
        self._what = what
        self._patience = patience
        self._failed = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """The store brought something: its budget is whole again."""
        self._failed = 0
        self._since = time.monotonic()

    def failed(self, fault: Fault) -> None:
        """Wait before the next try.

        Raises:
            OSError: there were enough; of the kind that the last fault names.
        """
        self._failed += 1
        if self._failed >= self._patience.attempts:
            seconds = time.monotonic() - self._since
            raise fault.kind(
                f"{self._what}: gave up after {self._failed} attempts in {seconds:.0f} s, the last of which ended "
                f"with: {fault}; look at the store, at the network between and at AWS_ENDPOINT_URL"
            ) from None
        count("retries")
        longest = min(self._patience.backoff_seconds * 2 ** (self._failed - 1), self._patience.backoff_cap_seconds)
        pause = max(_jitter.uniform(0, longest), min(fault.pause_seconds, self._patience.backoff_cap_seconds))
        level = logging.WARNING if self._failed > 2 else logging.INFO
        logger.log(
            level,
            "%s: %s; attempt %d of %d in %.1f s",
            self._what,
            fault,
            self._failed + 1,
            self._patience.attempts,
            pause,
        )
        time.sleep(pause)


def attempt(what: str, call: Callable[[], T], *, patience: Patience | None = None) -> T:
    """Call until there is no fault: for requests whose answer is small.

    Args:
        what: for messages: the url, and what is done with it.
        call: one attempt.
        patience: instead of ``PATIENCE``.
    """
    patience = patience or PATIENCE
    attempts = Attempts(what, patience)
    while True:
        try:
            return hedged(call, patience)
        except Fault as fault:
            attempts.failed(fault)


class _Race:
    """The same request on one or two connections; the first answer wins and the other is closed."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._over = False
        self.answers: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()

    def send(self) -> None:
        # The store's client blocks, so the request gets a thread of its own; one that nobody waits for ends by itself.
        threading.Thread(target=self._run, name="swav-storage", daemon=True).start()

    def _run(self) -> None:
        answer, error = None, None
        try:
            answer = self._call()
        except BaseException as caught:
            error = caught
        with self._lock:
            if not self._over:
                self.answers.put((answer, error))
                return
        _let_go(answer)

    def end(self) -> None:
        with self._lock:
            self._over = True
        while not self.answers.empty():
            _let_go(self.answers.get()[0])


def _let_go(answer: object) -> None:
    if isinstance(answer, Answer):
        answer.close()


def hedged(call: Callable[[], T], patience: Patience) -> T:
    """Call, and call a second time beside it where the first answer is late; whoever answers first is taken.

    Raises:
        Fault: neither answered in time, or both failed.
    """
    race = _Race(call)
    race.send()
    running, hedge = 1, True
    deadline = time.monotonic() + patience.connect_seconds + patience.answer_seconds
    try:
        while True:
            wait = patience.first_byte_seconds if hedge else deadline - time.monotonic()
            try:
                answer, error = race.answers.get(timeout=max(wait, 0.0))
            except Empty:
                if not hedge:
                    raise Fault("no answer came in time", TimeoutError) from None
                hedge = False
                running += 1
                count("hedges")
                race.send()
                continue
            if error is None:
                return answer  # type: ignore[return-value]
            running -= 1
            if running == 0 or not isinstance(error, Fault):
                raise error
    finally:
        race.end()


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
        return b"".join(self.stream(offset, num_bytes))

    def read_whole(self) -> bytes:
        """Read all of it, with one request where nothing goes wrong."""
        return b"".join(self._pieces(0, None))

    def stream(self, offset: int, num_bytes: int) -> Iterator[bytes]:
        """Read a range in pieces of at most ``PIECE_BYTES``."""
        return self._pieces(offset, offset + num_bytes) if num_bytes > 0 else iter(())

    def _pieces(self, start: int, end: int | None) -> Iterator[bytes]:
        patience = PATIENCE
        attempts = Attempts(f"{self.url}: reading bytes {start} to {'the end' if end is None else end}", patience)
        position, gained = start, 0
        while True:
            if self._stat.num_bytes >= 0:
                end = self._stat.num_bytes if end is None else min(end, self._stat.num_bytes)
            if end is not None and position >= end:
                return
            try:
                with closing(self._ask(position, end, patience)) as answer:
                    end = answer.start + answer.num_bytes if end is None else min(end, answer.stat.num_bytes)
                    speed = _Speed(patience)
                    while position < end:
                        piece = self._next_piece(answer, end - position, speed)
                        position += len(piece)
                        gained += len(piece)
                        yield piece
            except BeyondEndError:
                if self._stat.num_bytes >= 0:
                    raise ChangedError(changed(self.url, "is shorter now")) from None
                self.stat  # noqa: B018 - the size of the object ends the loop
            except Fault as fault:
                if gained >= patience.progress_bytes:
                    attempts.progress()
                if position > start:
                    count("resumed_streams")
                gained = 0
                attempts.failed(fault)

    def _next_piece(self, answer: Answer, most: int, speed: _Speed) -> bytes:
        before = time.monotonic()
        piece = answer.body.read(min(PIECE_BYTES, most))
        if not piece:
            raise Fault("the body ended before its length", ConnectionError)
        count("bytes_received", len(piece))
        speed.saw(len(piece), time.monotonic() - before)
        return piece

    def _ask(self, start: int, end: int | None, patience: Patience) -> Answer:
        try:
            answer = hedged(lambda: self._store.get(self.url, start, end, self._stat, patience), patience)
        except FileNotFoundError:
            if self._stat == _UNKNOWN:
                raise
            raise self._missing() from None
        try:
            self._check(answer, start, end)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check(self, answer: Answer, start: int, end: int | None) -> None:
        """Refuse an answer to another question than was asked."""
        expected_end = answer.stat.num_bytes if end is None else min(end, answer.stat.num_bytes)
        whole = answer.start == 0 and answer.num_bytes == answer.stat.num_bytes
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


def stat(url: str, store: Store) -> FileStat | None:
    """What an object is; None where there is none."""
    patience = PATIENCE
    return attempt(f"{url}: asking for its size", lambda: store.head(url, patience), patience=patience)
