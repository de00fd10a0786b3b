"""Trying again: how long storage waits for a store, when it asks a second time, and when it gives up.

There is one layer of retries, so that it is known how long a user waits for an error.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from swav.storage.answer import Answer, Fault
from swav.storage.counters import count

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


def attempt(what: str, call: Callable[[], T], patience: Patience) -> T:
    """Call until there is no fault: for requests whose answer is small.

    Args:
        what: for messages: the url, and what is done with it.
        call: one attempt.
        patience: of all of it.
    """
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
