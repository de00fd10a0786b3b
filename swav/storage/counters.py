"""What this process has asked of object storage so far, and how often it was failed."""

import threading

_NAMES = ("requests", "bytes_received", "retries", "hedges", "resumed_streams", "checksum_failures")
_totals = dict.fromkeys(_NAMES, 0)
_lock = threading.Lock()


def count(name: str, number: int = 1) -> None:
    """Add to one of the totals."""
    with _lock:
        _totals[name] += number


def counts() -> dict[str, int]:
    """All totals since the process started, always with the same names in the same order."""
    with _lock:
        return dict(_totals)
