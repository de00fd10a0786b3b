"""A proxy before an object store that harms a share of the requests in every way that stores and networks know."""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from swav_testing.fault_http import Server
from swav_testing.fault_kinds import Answered, Behaviour, Fault, Kind, Request

__all__ = ["ALL", "Answered", "FaultProxy", "Kind", "Request"]

ALL = tuple(Kind)


@dataclass
class _Planned:
    kind: Kind | None
    method: str
    key: str | None
    at_byte: int | None
    times: int


class FaultProxy:
    """Forwards S3 over HTTP as it comes, ``Host`` included (signatures cover it), and harms some of it.

    Runs in threads of this process. Which requests are harmed, how and where is drawn from the seed and the request's
    number; requests in parallel are numbered as they arrive. Whole bodies are held in memory. Kinds that change what a
    client sees stay where it can notice: corruption hits objects, wrong lengths objects and listings, the others all.

    Attributes:
        url: of the proxy, to be used in place of the store's.
        rate: share of requests that are harmed; may be changed at any time.
        kinds: of harm that are drawn; may be changed at any time.
        behaviour: where the store is and how slow slow is; may be changed at any time.
        log: all requests that have ended, in that order.
    """

    def __init__(
        self,
        upstream_url: str,
        rate: float = 0.1,
        kinds: tuple[Kind, ...] = ALL,
        seed: int = 0,
        *,
        slow_start_seconds: float = 2.0,
        stall_seconds: float = 60.0,
        trickle_bytes_per_second: int = 500,
    ) -> None:
        """Start to listen.

        Args:
            upstream_url: of the store, ``http://host:port``.
            rate: share of requests that are harmed.
            kinds: how; one that cannot harm a request is not drawn for it.
            seed: of the draws.
            slow_start_seconds: before the first byte.
            stall_seconds: of silence, then the connection is closed; a client that leaves earlier ends it.
            trickle_bytes_per_second: speed of a trickle.
        """
        self.rate, self.kinds = rate, kinds
        self.log: list[Answered] = []
        self._seed, self._num_drawn = seed, 0
        self._planned: list[_Planned] = []
        self._deck: list[Kind] = []
        self._lock = threading.Lock()
        self.behaviour = Behaviour(
            upstream_url, slow_start_seconds, stall_seconds, trickle_bytes_per_second, self._draw, self.log.append
        )
        self._server = Server(self.behaviour)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fault-proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, whatever they wait for."""
        self._server.end()
        self._thread.join()

    @property
    def counts(self) -> Counter[str]:
        """Harmed requests that have ended, by kind."""
        return Counter(str(answered.kind) for answered in list(self.log) if answered.kind is not None)

    def settle(self, timeout_seconds: float = 30) -> None:
        """Wait until the log has every request so far: a client can have its answer a moment before."""
        deadline = time.monotonic() + timeout_seconds
        while len(self.log) < self._num_drawn:
            assert time.monotonic() < deadline, f"{self._num_drawn - len(self.log)} requests are still under way"
            time.sleep(0.002)

    def plan(
        self,
        kind: Kind | None,
        *,
        key: str | None = None,
        method: str = "GET",
        at_byte: int | None = None,
        times: int = 1,
    ) -> None:
        """Say what happens to the next requests of a key; plans come before chance, and older plans first.

        Args:
            kind: of the harm; None lets them pass.
            key: of the object; None for any request, "" for those on a bucket, such as listings.
            method: of the request.
            at_byte: of the body where it happens, negative: so many bytes before it (of what is uploaded, for PUT; of
                the head, where there is no body; the claimed length, for LENGTH); drawn where None.
            times: how many requests.
        """
        with self._lock:
            self._planned.append(_Planned(kind, method, key, at_byte, times))

    def _draw(self, request: Request) -> Fault | None:
        with self._lock:
            self._num_drawn += 1
            draws = random.Random(f"{self._seed}-{self._num_drawn}")
            for planned in self._planned:
                if planned.times and planned.method == request.method and planned.key in (None, request.key):
                    planned.times -= 1
                    return Fault(planned.kind, planned.at_byte, draws) if planned.kind is not None else None
            if draws.random() >= self.rate or not any(_can_harm(kind, request) for kind in self.kinds):
                return None
            return Fault(self._next_kind(request, draws), None, draws)

    def _next_kind(self, request: Request, draws: random.Random) -> Kind:
        """As from a deck of cards: each kind comes before any comes again, so that a short test meets all (locked)."""
        self._deck = [kind for kind in self._deck if kind in self.kinds]
        if not any(_can_harm(kind, request) for kind in self._deck):
            self._deck += draws.sample(self.kinds, len(self.kinds))
        kind = next(kind for kind in self._deck if _can_harm(kind, request))
        self._deck.remove(kind)
        return kind


def _can_harm(kind: Kind, request: Request) -> bool:
    if kind is Kind.CORRUPT:
        return request.is_object
    return kind is not Kind.LENGTH or request.method == "GET"
