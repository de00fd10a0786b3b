"""What storage did since the process started, for the metrics and for whoever asks why it is slow."""

import os
import threading
from collections.abc import Callable

_NAMES = ("requests", "bytes_received", "retries", "hedges", "resumed_streams", "checksum_failures")
_totals = dict.fromkeys(_NAMES, 0)
_lock = threading.Lock()
_observer: Callable[[str, int], None] | None = None


def observe_counts(observer: Callable[[str, int], None] | None) -> None:
    """Have what is added to a total told at once: its name and how much; None ends that. There is one observer."""
    global _observer
    _observer = observer


def count(name: str, n: int = 1) -> None:
    """Add to one of the totals."""
    with _lock:
        _totals[name] += n
    if _observer is not None:
        _observer(name, n)


def counts() -> dict[str, int]:
    """The totals of this process.

    Returns:
        ``requests`` sent, ``bytes_received`` of bodies, ``retries`` after a fault, ``hedges`` (requests sent a second
        time because the first answer was late), ``resumed_streams`` (retries that went on in mid-range) and
        ``checksum_failures`` (which the reader adds).
    """
    with _lock:
        return dict(_totals)


def _start_anew() -> None:
    """In a forked child: another thread of the parent may have held the lock, and the totals are the parent's."""
    global _lock, _observer
    _lock, _observer = threading.Lock(), None
    _totals.update(dict.fromkeys(_NAMES, 0))


os.register_at_fork(after_in_child=_start_anew)
