"""How the ranks of a preflight talk: through the store by which they meet, so also where collectives fail."""

import json
import os
import time
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from swav.doctor.report import Facts
from swav.watchdog import progress

_GONE_SECONDS = 5.0  # for the word of a rank that did not come to a meeting
_LEAVE_SECONDS = 15.0
_SEEN_SECONDS = 0.5  # more than ranks pause between two looks at the store
_BROKEN = "broken"


class Peers:
    """All ranks, this one among them.

    Attributes:
        rank: of this process, from 0.
        world_size: how many there are.
        store: that all share; keys of others begin with a word of their own.
        timeout_seconds: in which all ranks come to a meeting.
        broken: why the ranks no longer wait for one another; empty while they do.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, timeout_seconds: float) -> None:
        """Take part.

        Args:
            store: that all share.
            rank: of this process.
            world_size: how many there are.
            timeout_seconds: in which all ranks come to a meeting.
        """
        self.rank, self.world_size, self.store = rank, world_size, store
        self.broken = ""
        self.timeout_seconds = timeout_seconds

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which judges."""
        return self.rank == 0

    def meet(self, where: str) -> bool:
        """Wait for all ranks; returns whether all have come to every meeting so far.

        Ranks that wait in vain note who is missing and wait no more, there and at later meetings.
        """
        progress()
        self._notice_break()
        if self.broken:
            return False
        self.store.set(f"meet/{where}/{self.rank}", "")
        if self.store.add(f"meet/{where}", 1) == self.world_size:
            self.store.set(f"go/{where}", "")
        if self.wait(f"go/{where}", self.timeout_seconds):
            return True
        missing = [rank for rank in range(self.world_size) if not self.store.check([f"meet/{where}/{rank}"])]
        ranks = ", ".join(map(str, missing))
        word = f"rank {ranks} did not" if len(missing) == 1 else f"ranks {ranks} did not"
        self.store.set(_BROKEN, f"{word} come to the check {where} in {self.timeout_seconds:g} s")
        self._notice_break()
        return False

    def tell(self, what: str, facts: Facts) -> None:
        """Tell rank 0."""
        self.store.set(f"tell/{what}/{self.rank}", json.dumps(facts))

    def hear(self, what: str) -> dict[int, Facts]:
        """What the ranks told, by rank; ranks that do not tell it in time are left out."""
        self._notice_break()
        deadline = time.monotonic() + (_GONE_SECONDS if self.broken else self.timeout_seconds)
        told = {}
        for rank in range(self.world_size):
            progress()
            key = f"tell/{what}/{rank}"
            if self.wait(key, deadline - time.monotonic()):
                told[rank] = json.loads(self.store.get(key))
        return told

    def agree(self, what: str, value: Any, *, seconds: float = 0.0) -> Any:
        """The value that rank 0 has, on every rank.

        Args:
            what: it is, a word of its own.
            value: of rank 0.
            seconds: to wait for rank 0; at least ``timeout_seconds``.

        Raises:
            RuntimeError: rank 0 is silent.
        """
        if self.is_first:
            self.store.set(f"agree/{what}", json.dumps(value))
        seconds = max(seconds, self.timeout_seconds)
        if not self.wait(f"agree/{what}", seconds):
            raise RuntimeError(f"rank 0 did not say its {what} in {seconds:g} s; look at its log")
        return json.loads(self.store.get(f"agree/{what}"))

    def leave(self) -> None:
        """Wait, for a while, until all are about to leave: rank 0 may hold the store, and a launcher ends all at once.

        Rank 0 then goes first, so that a launcher's log of a failure points at it: it has the table.
        """
        try:
            if self.store.add("leave", 1) == self.world_size:
                self.store.set("left", "")
            self.wait("left", _GONE_SECONDS if self.broken else _LEAVE_SECONDS)
        except DistError:  # rank 0 is gone
            return
        if self.world_size > 1:
            time.sleep(_SEEN_SECONDS if self.is_first else 1.2 * _SEEN_SECONDS)

    def _notice_break(self) -> None:
        if not self.broken and self.store.check([_BROKEN]):
            self.broken = self.store.get(_BROKEN).decode()

    def wait(self, key: str, seconds: float, *, longest_pause_seconds: float = 0.2) -> bool:
        """Wait for a key of the store, so that signals are heeded; returns whether it came.

        Args:
            key: of the store.
            seconds: to wait at most.
            longest_pause_seconds: between two looks; the first are a millisecond apart.
        """
        deadline, pause = time.monotonic() + seconds, 0.001
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(min(pause, longest_pause_seconds))
            pause *= 1.5
        return True


def join(timeout_seconds: float) -> Peers:
    """Meet the ranks that torchrun describes in the environment; without torchrun, be alone.

    Raises:
        RuntimeError: rank 0's host cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Peers(HashStore(), 0, 1, timeout_seconds=timeout_seconds)
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    except DistError as error:
        raise RuntimeError(
            f"the ranks cannot meet at {where}: {error}; see that this host reaches that port (network policy, service)"
        ) from error
    return Peers(PrefixStore("doctor", store), rank, world_size, timeout_seconds=timeout_seconds)
