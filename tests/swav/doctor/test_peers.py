import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from swav.doctor.peers import Peers, join


def together(world: int, part: Callable[[Peers], Any], *, timeout_seconds: float = 60) -> list[Any]:
    """Ranks as threads that share a store."""
    store = HashStore()
    peers = [Peers(store, rank, world, timeout_seconds=timeout_seconds) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(part, peers))


def test_ranks_meet_tell_and_agree() -> None:
    def part(peers: Peers) -> Any:
        assert peers.meet("here")
        peers.tell("what", {"rank": peers.rank})
        heard = peers.hear("what") if peers.is_first else None
        agreed = peers.agree("value", peers.rank + 7)
        peers.leave()
        return heard, agreed

    first, *others = together(3, part)
    assert first == ({rank: {"rank": rank} for rank in range(3)}, 7)
    assert others == [(None, 7)] * 2


def test_who_does_not_come_is_named_and_not_waited_for_again() -> None:
    late = threading.Event()

    def part(peers: Peers) -> Any:
        if peers.rank == 1:
            late.wait(60)
            came = [peers.meet("here"), peers.meet("there")]
            return came, peers.broken
        peers.timeout_seconds = 0.5
        came = [peers.meet("here"), peers.meet("there")]
        late.set()
        return came, peers.broken

    said = "rank 1 did not come to the check here in 0.5 s"
    assert together(3, part) == [([False, False], said)] * 3


def test_who_tells_nothing_is_left_out() -> None:
    def part(peers: Peers) -> Any:
        if peers.rank == 1:
            return None
        peers.tell("what", {})
        return peers.hear("what")

    assert together(2, part, timeout_seconds=0.3)[0] == {0: {}}


def test_a_silent_first_rank_is_an_error() -> None:
    def part(peers: Peers) -> Any:
        if peers.rank:
            with pytest.raises(RuntimeError, match=r"rank 0 did not say its plan in 0\.2 s"):
                peers.agree("plan", None)

    together(2, part, timeout_seconds=0.2)


def test_without_a_launcher_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    peers = join(1)
    assert (peers.rank, peers.world_size) == (0, 1)
    assert peers.meet("here")


def test_a_first_host_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(RuntimeError, match=r"the ranks cannot meet at 127\.0\.0\.1:1: "):
        join(1)
