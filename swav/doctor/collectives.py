"""Check 3: all-reduce over all ranks gives the right sum, how fast, and ends by a deadline where it cannot.

It runs in a thread of its own, since a peer that is silent may hold the joining of the group, the making of NCCL's
connections, or a sum, none of which can be interrupted.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from swav.doctor.peers import Peers
from swav.doctor.report import Facts, Finding, Member, failed, judged, skipped
from swav.doctor.storage_check import describe
from swav.watchdog import progress

_NAMES = ("collectives.sum", "collectives.bandwidth", "collectives.latency")
_THREAD = "collectives"
_LARGE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # ResNet-50's gradients have 94 MB
_NUM_LARGE, _NUM_SMALL = 5, 20
_NCCL_GRACE_SECONDS = 60.0  # NCCL's own timeout ends the process, and what it measured with it: ours comes first
_REMEDY = (
    "see that the pods reach one another on all ports (network policy, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME), and "
    "look at the log of the ranks that are named; NCCL_DEBUG=INFO says more"
)
_SLOW_REMEDY = "look at the network between the nodes: placement, interface (NCCL_SOCKET_IFNAME), other jobs"


@dataclass
class Rehearsal:
    """All-reduces of this rank with all others.

    Attributes:
        peers: the ranks.
        device: where a run's gradients would be.
        timeout_seconds: for each step of it.
    """

    peers: Peers
    device: torch.device
    timeout_seconds: float

    def __post_init__(self) -> None:
        self._doing = ""
        self._moved = threading.Condition()
        self._has_ended = False
        self._facts: Facts = {}

    def measure(self) -> Facts:
        """Returns seconds and sums, or the error; within the timeout for each step, whatever the peers do."""
        thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        thread.start()
        with self._moved:
            while not self._has_ended:
                doing = self._doing
                grace = 5.0  # where the library notices too, it says more
                if not self._moved.wait_for(
                    lambda doing=doing: self._has_ended or self._doing != doing,  # type: ignore[misc]
                    self.timeout_seconds + grace,
                ):
                    word = f"{self._doing} did not end in {self.timeout_seconds:g} s: a peer is silent"
                    return {"errors": {"collectives.sum": word}}
                progress()
        thread.join()
        return self._facts

    def _run(self) -> None:
        try:
            facts = self._measure()
        except Exception as error:
            facts = {"errors": {"collectives.sum": f"{self._doing}: {describe(error).splitlines()[0]}"}}
        with self._moved:
            self._facts, self._has_ended = facts, True
            self._moved.notify_all()

    def _at(self, doing: str) -> None:
        with self._moved:
            self._doing = doing
            self._moved.notify_all()

    def _measure(self) -> Facts:
        is_cuda = self.device.type == "cuda"
        self._at("joining the process group")
        if is_cuda:
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=self.timeout_seconds + (_NCCL_GRACE_SECONDS if is_cuda else 0))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            store=PrefixStore("group", self.peers.store),
            rank=self.peers.rank,
            world_size=self.peers.world_size,
            timeout=timeout,
        )
        self._at("a sum on the CPU")
        wrong = self._wrong_sums(torch.device("cpu"))
        if is_cuda:
            self._at("a sum on the GPU")
            wrong += self._wrong_sums(self.device)
        large_bytes = _LARGE_BYTES[self.device.type]
        large = torch.zeros(large_bytes // 4, device=self.device)
        facts: Facts = {"backend": "nccl" if is_cuda else "gloo", "wrong_sums": wrong, "large_bytes": large_bytes}
        facts["large_seconds"] = self._timed(large, _NUM_LARGE, "large all-reduces")
        facts["small_seconds"] = self._timed(torch.zeros(2, device=self.device), _NUM_SMALL, "small all-reduces")
        dist.destroy_process_group()  # not after an error, when it may wait for what never comes
        if wrong:
            facts["errors"] = {"collectives.sum": f"{wrong} of {2**16} sums are wrong"}
        return facts

    def _wrong_sums(self, device: torch.device) -> int:
        """How many elements of an all-reduce are not the sum; all are whole numbers, so float32 has them exactly."""
        world = self.peers.world_size
        places = torch.arange(2**16, device=device, dtype=torch.float32) % 1000
        found = places + self.peers.rank
        dist.all_reduce(found)
        return int((found != places * world + world * (world - 1) // 2).sum())

    def _timed(self, tensor: torch.Tensor, count: int, doing: str) -> float:
        """The median time of an all-reduce, after one that is not counted."""
        seconds = []
        for number in range(count + 1):
            self._at(f"{doing} ({number} of {count} done)")
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
            seconds.append(time.perf_counter() - began)
        return median(seconds[1:])


def is_abandoned() -> bool:
    """Whether collectives of this process have not ended: it cannot end in the usual way, which waits for them."""
    return dist.is_initialized() or any(thread.name == _THREAD for thread in threading.enumerate())


def judge(
    told: Mapping[Member, Facts], *, world_size: int, broken: str, min_allreduce_gb_per_second: float | None
) -> list[Finding]:
    """Findings of what all ranks told.

    Args:
        told: facts by rank.
        world_size: how many ranks there should be.
        broken: why the ranks no longer waited for one another; empty where they did.
        min_allreduce_gb_per_second: limit of the bus bandwidth.
    """
    bad = failed("collectives.sum", told, _REMEDY)
    measured = [facts for facts in told.values() if "large_seconds" in facts]
    if bad is None and len(measured) < world_size:
        reason = broken or "not all ranks told"
        bad = Finding(name="collectives.sum", status="fail", reason=f"not tried: {reason}", remedy=_REMEDY)
    if bad is not None:
        return [bad, *(skipped(name, "the sums failed") for name in _NAMES[1:])]
    backend = measured[0]["backend"]
    right = Finding(
        name="collectives.sum",
        status="pass",
        measured=f"{world_size} rank{'s' * (world_size > 1)}, {backend}",
        limit="exact",
    )
    if world_size == 1:
        return [right, *(skipped(name, "there is one rank") for name in _NAMES[1:])]
    seconds = max(facts["large_seconds"] for facts in measured)
    # As nccl-tests has it: what each link carries, whatever the number of ranks.
    bandwidth = measured[0]["large_bytes"] / seconds * 2 * (world_size - 1) / world_size / 1e9
    latency = 1e3 * max(facts["small_seconds"] for facts in measured)
    limit = min_allreduce_gb_per_second
    return [
        right,
        judged("collectives.bandwidth", bandwidth, at_least=limit, unit="GB/s (bus)", remedy=_SLOW_REMEDY),
        judged("collectives.latency", latency, unit="ms", remedy=""),
    ]
