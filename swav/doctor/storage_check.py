"""Check 1: objects of a realistic size can be written, read back as they were, and removed; how fast."""

import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import POSIX_FADV_DONTNEED, posix_fadvise

import google_crc32c

from swav import storage
from swav.doctor.report import Facts, Finding, Member, failed, judged, skipped
from swav.storage.urls import redacted

_PIECE_BYTES = 1 << 20
_MB = 1_000_000
_WRITE_REMEDY = "see that --output is a folder or a bucket that these pods may write (role, keys, policy, free space)"
_SLOW_REMEDY = "look at the store, the network and the limits of both; more nodes do not help a store that is full"


class _StoppedEarlyError(Exception):
    """Another stream failed, or the preflight was asked to stop."""


@dataclass
class Trial:
    """Objects of this rank below a folder, all of which :meth:`remove` removes.

    Attributes:
        folder: where they are written, directly.
        sizes_bytes: of the objects of each stream.
        num_streams: threads that write, or read, side by side.
        urls: of the objects, named so that no two preflights meet.
    """

    folder: str
    sizes_bytes: Sequence[int]
    num_streams: int
    urls: list[str] = field(init=False)

    def __post_init__(self) -> None:
        own = secrets.token_hex(8)
        self.urls = [
            storage.join(self.folder, f".doctor-{own}-{number}")
            for number in range(self.num_streams * len(self.sizes_bytes))
        ]
        self._begun: list[int] = []
        self._written: list[int] = []
        self._stop = threading.Event()
        self._noise = secrets.token_bytes(_PIECE_BYTES)  # a store could pack what repeats itself; pieces differ at once

    def write(self) -> Facts:
        """Write all; returns bytes and seconds, or the error."""
        return self._timed("storage.write", "writing", self._write, range(len(self.urls)))

    def read(self) -> Facts:
        """Read what was written and compare it; returns bytes and seconds, or the error."""
        return self._timed("storage.read", "reading back", self._read, list(self._written))

    def remove(self) -> Facts:
        """Remove all, those too of which it is not known whether they were written; signals have to wait for it."""
        errors: dict[str, str] = {}
        unsure = [number for number in self._begun if number not in self._written]
        with _signals_ignored():
            for number in [*self._written, *unsure]:
                try:
                    storage.remove(self.urls[number])
                except (OSError, ValueError) as error:
                    if number in self._written:
                        errors["storage.remove"] = f"removing {self.urls[number]}: {describe(error)}"
                    break  # a store that does not answer costs a minute each time
        return {"errors": errors}

    def _size(self, number: int) -> int:
        return self.sizes_bytes[number // self.num_streams]

    def _pieces(self, number: int) -> Iterator[bytes]:
        """What an object holds: the same bytes every time, and others than any other object's."""
        left = self._size(number)
        place = 0
        while left > 0:
            head = f"{number} {place} ".encode()
            piece = (head + self._noise[len(head) :])[:left]
            yield piece
            left -= len(piece)
            place += 1

    def _write(self, number: int) -> None:
        self._begun.append(number)
        with storage.open_atomic(self.urls[number]) as file:
            for piece in self._pieces(number):
                if self._stop.is_set():
                    raise _StoppedEarlyError
                file.write(piece)
        self._written.append(number)

    def _read(self, number: int) -> None:
        url = self.urls[number]
        _forget_pages(url)
        checksum, expected, num_bytes = 0, 0, 0
        for piece in storage.open_file(url).stream(0, self._size(number)):
            if self._stop.is_set():
                raise _StoppedEarlyError
            checksum, num_bytes = google_crc32c.extend(checksum, piece), num_bytes + len(piece)
        for piece in self._pieces(number):
            expected = google_crc32c.extend(expected, piece)
        if (num_bytes, checksum) != (self._size(number), expected):
            raise RuntimeError(
                f"{num_bytes} bytes with the CRC-32C {checksum:08x} came back of the {self._size(number)} with "
                f"{expected:08x} that were written"
            )

    def _timed(self, name: str, verb: str, do: Callable[[int], None], numbers: Sequence[int]) -> Facts:
        self._stop.clear()

        def one(number: int) -> Exception | None:
            if not self._stop.is_set():
                try:
                    do(number)
                except _StoppedEarlyError:
                    return None
                except Exception as error:
                    self._stop.set()
                    return error
            return None

        began = time.monotonic()
        pool = ThreadPoolExecutor(self.num_streams)
        try:
            results = list(pool.map(one, numbers))
        finally:
            self._stop.set()
            with _signals_ignored():
                pool.shutdown()  # what is still being written would come after it was removed
        seconds = time.monotonic() - began
        for number, error in zip(numbers, results, strict=True):
            if error is not None:
                return {"errors": {name: f"{verb} {self.urls[number]}: {describe(error)}"}}
        return {"bytes": sum(self._size(number) for number in numbers), "seconds": seconds}


def describe(error: BaseException) -> str:
    """An error in words, without secrets; its kind too, where the text does not say it."""
    text = redacted(error) or "no text"
    return text if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def judge(
    told: Mapping[Member, Facts],
    *,
    min_write_mb_per_second: float | None,
    min_read_mb_per_second: float | None,
) -> list[Finding]:
    """Findings of what all ranks told, with ``write``, ``read`` and ``remove`` in each rank's facts."""
    limits = {"write": min_write_mb_per_second, "read": min_read_mb_per_second}
    findings = []
    for what, limit in limits.items():
        name = f"storage.{what}"
        parts = {member: facts.get(what, {}) for member, facts in told.items()}
        bad = failed(name, parts, _WRITE_REMEDY)
        done = [facts for facts in parts.values() if facts.get("bytes")]
        if bad is not None:
            findings.append(bad)
        elif not done:
            findings.append(skipped(name, "nothing could be written"))
        else:
            findings.append(judged(name, rate(done), at_least=limit, unit="MB/s in all", remedy=_SLOW_REMEDY))
    removed = failed(
        "storage.remove",
        {member: facts.get("remove", {}) for member, facts in told.items()},
        "give these pods the right to remove what they wrote: old checkpoints are removed; then remove .doctor-* there",
    )
    return [*findings, removed or Finding(name="storage.remove", status="pass", limit="no object is left")]


def rate(done: Sequence[Facts]) -> float:
    """What ranks did at the same time, in MB/s: bytes of all by the seconds of the slowest."""
    num_bytes: int = sum(facts["bytes"] for facts in done)
    seconds: float = max(facts["seconds"] for facts in done)
    return num_bytes / max(seconds, 1e-9) / _MB


def _forget_pages(url: str) -> None:
    """Read a local file from its disk, not from memory, where the file system can."""
    if not storage.is_remote(url):
        with storage.local_path(url).open("rb") as file:
            posix_fadvise(file.fileno(), 0, 0, POSIX_FADV_DONTNEED)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """A second Ctrl-C, or a launcher's SIGTERM after it, must not leave objects behind."""
    previous = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
