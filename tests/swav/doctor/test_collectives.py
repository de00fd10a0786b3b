import threading

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from swav.doctor.collectives import Rehearsal, is_abandoned, judge
from swav.doctor.peers import Peers
from swav.doctor.report import Member

# Several ranks, and one that is silent, are in test_preflight.py: a group is a process's own.
MEMBERS = [Member(0, "a", 0), Member(1, "b", 0)]
FACTS = {"backend": "nccl", "wrong_sums": 0, "large_bytes": 2**28, "large_seconds": 0.01, "small_seconds": 2e-5}


def test_a_rank_alone_forms_a_group_and_leaves_it() -> None:
    peers = Peers(HashStore(), 0, 1, timeout_seconds=60)
    facts = Rehearsal(peers, torch.device("cpu"), 60).measure()
    assert (facts["backend"], facts["wrong_sums"]) == ("gloo", 0)
    assert not is_abandoned()
    findings = judge({MEMBERS[0]: facts}, world_size=1, broken="", min_allreduce_gb_per_second=5)
    assert [finding.status for finding in findings] == ["pass", "skipped", "skipped"]


def test_what_stands_still_ends_by_the_timeout() -> None:
    go_on = threading.Event()

    class Stuck(Rehearsal):
        def _measure(self) -> dict[str, object]:
            self._at("a sum on the CPU")
            go_on.wait(60)
            return {}

    peers = Peers(HashStore(), 0, 2, timeout_seconds=60)
    facts = Stuck(peers, torch.device("cpu"), -4.9).measure()
    assert is_abandoned()
    go_on.set()
    assert facts["errors"]["collectives.sum"].startswith("a sum on the CPU did not end in ")
    findings = judge({MEMBERS[0]: facts}, world_size=2, broken="", min_allreduce_gb_per_second=None)
    assert [finding.status for finding in findings] == ["fail", "skipped", "skipped"]
    assert findings[0].reason.startswith("rank 0 (host a): a sum on the CPU did not end")


def test_bandwidth_is_the_bus_bandwidth_of_the_slowest_rank() -> None:
    told = {MEMBERS[0]: FACTS, MEMBERS[1]: FACTS | {"large_seconds": 0.02, "small_seconds": 3e-5}}
    right, bandwidth, latency = judge(told, world_size=2, broken="", min_allreduce_gb_per_second=20)
    assert right.status == "pass"
    assert bandwidth.measured == pytest.approx(2**28 / 0.02 / 1e9)  # the factor 2 (n - 1) / n is 1
    assert bandwidth.status == "fail"
    assert latency.measured == pytest.approx(0.03)


def test_wrong_sums_and_missing_ranks_are_failures() -> None:
    told = {MEMBERS[0]: FACTS, MEMBERS[1]: FACTS | {"errors": {"collectives.sum": "3 of 65536 sums are wrong"}}}
    findings = judge(told, world_size=2, broken="", min_allreduce_gb_per_second=None)
    assert findings[0].reason == "rank 1 (host b): 3 of 65536 sums are wrong"
    findings = judge({}, world_size=2, broken="rank 1 did not come", min_allreduce_gb_per_second=None)
    assert findings[0].reason == "not tried: rank 1 did not come"
