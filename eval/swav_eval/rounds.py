"""Uneven work on many ranks, of which none waits for another for longer than a collective may take."""

import time
from collections.abc import Iterator

from swav.distributed import any_rank
from swav.watchdog import progress

ROUND_SECONDS = 30.0


def in_rounds(work: Iterator[object], *, round_seconds: float = ROUND_SECONDS) -> None:
    """Carry out this rank's work, and wait until every rank has carried out its own. Every rank must call it.

    A rank that is done before the others, after a restart perhaps, meets them once a round: a process group's timeout
    then bounds one step of the work and not the whole.

    Args:
        work: does a step whenever it is asked for its next value.
        round_seconds: between two meetings.
    """
    is_done = False
    while any_rank(not is_done):
        progress()
        until = time.monotonic() + round_seconds
        is_done = True
        for _ in work:
            if time.monotonic() > until:
                is_done = False
                break
