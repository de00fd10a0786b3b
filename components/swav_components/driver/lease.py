"""Which driver of a run acts: one object in the run's folder, taken and renewed by conditional writes.

Clocks of two hosts are never compared: a driver that waits for the lease watches, by its own clock, whether the object
changes, and takes it when it has not for as long as its holder promised to renew it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from swav_components.driver.records import RunStorage

LEASE = "driver/lease.json"


@dataclass(frozen=True)
class _Content:
    holder: str  # empty: released
    fencing: int  # larger with each holder
    renewal: int
    seconds: float  # that may pass without a renewal before others take it


class Lease:
    """One driver's side of it.

    Args:
        storage: of the run.
        holder: this driver, unlike any other that ever was.
        seconds: that others are to wait without a renewal.
        monotonic: this process's clock, in seconds.
    """

    def __init__(self, storage: RunStorage, holder: str, *, seconds: float, monotonic: Callable[[], float]) -> None:
        self.holder = holder
        self.fencing = 0
        self._storage = storage
        self._seconds = seconds
        self._monotonic = monotonic
        self._held: tuple[_Content, str] | None = None
        self._watched: tuple[str, float] | None = None  # the other holder's tag, and since when it is the same

    @property
    def held(self) -> bool:
        """Whether it was this driver's when it was last looked at."""
        return self._held is not None

    def acquire(self) -> bool:
        """Try to take the lease; call it now and then until it returns True.

        Raises:
            OSError: the storage fails.
        """
        found = self._storage.read(LEASE)
        if found is None:
            return self._take(0, None)
        content = _Content(**json.loads(found.data))
        if content.holder == self.holder:  # taken by a write whose answer was lost
            return self._hold(content, found.tag)
        if content.holder:
            now = self._monotonic()
            if self._watched is None or self._watched[0] != found.tag:
                self._watched = found.tag, now
            if now - self._watched[1] < content.seconds:
                return False
        return self._take(content.fencing, found.tag)

    def confirm(self) -> bool:
        """Renew it; False where another driver has taken it.

        Raises:
            OSError: the storage fails; whether the lease is held is not known.
        """
        if self._held is None:
            return False
        if self._renew(*self._held):
            return True
        found = self._storage.read(LEASE)  # another driver's, or a renewal of ours whose answer was lost
        if found is not None:
            content = _Content(**json.loads(found.data))
            ours = (content.holder, content.fencing) == (self.holder, self.fencing)
            if ours and self._renew(content, found.tag):
                return True
        self._held = None
        return False

    def release(self) -> None:
        """Let another driver take it at once; does nothing where it is not held.

        Raises:
            OSError: the storage fails.
        """
        if self._held is not None:
            content, tag = self._held
            self._held = None
            self._storage.write(LEASE, _to_json(_Content("", content.fencing, content.renewal + 1, 0.0)), tag)

    def _renew(self, content: _Content, tag: str) -> bool:
        renewed = replace(content, renewal=content.renewal + 1)
        written = self._storage.write(LEASE, _to_json(renewed), tag)
        return written is not None and self._hold(renewed, written)

    def _take(self, fencing: int, tag: str | None) -> bool:
        content = _Content(self.holder, fencing + 1, 0, self._seconds)
        written = self._storage.write(LEASE, _to_json(content), tag)
        return written is not None and self._hold(content, written)

    def _hold(self, content: _Content, tag: str) -> bool:
        self.fencing = content.fencing
        self._held, self._watched = (content, tag), None
        return True


def _to_json(content: _Content) -> bytes:
    return (json.dumps(asdict(content)) + "\n").encode()
