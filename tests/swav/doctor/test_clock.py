import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from swav_testing.s3 import environment
from torch.distributed import HashStore  # type: ignore[attr-defined]

from swav.doctor.clock import Clock, compare_with_peers, compare_with_store, judge
from swav.doctor.peers import Peers
from swav.doctor.report import Facts, Finding, Member

MEMBERS = [Member(rank, f"host-{rank}", 0) for rank in range(3)]


class Off(Clock):
    """A clock that is wrong."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def now(self) -> float:
        return super().now() + self._seconds


def compared(offsets: list[float]) -> dict[Member, Facts]:
    """What ranks with such clocks measure."""
    store = HashStore()

    def part(rank: int) -> Facts:
        peers = Peers(store, rank, len(offsets), timeout_seconds=60)
        return compare_with_peers(peers, Off(offsets[rank]), list(range(len(offsets))))

    with ThreadPoolExecutor(len(offsets)) as pool:
        facts = pool.map(part, range(len(offsets)))
        return {member: {"peers": found} for member, found in zip(MEMBERS, facts, strict=False)}


def nodes(told: dict[Member, Facts], limit: float = 2.0) -> Finding:
    return judge(told, max_skew_seconds=limit, has_store=False)[0]


def test_clocks_that_agree_pass() -> None:
    finding = nodes(compared([0.0, 0.0, 0.0]))
    assert (finding.status, finding.limit, finding.unit) == ("pass", "at most 2", "s")
    assert "of rank 0's" in finding.reason or "behind rank 0's" in finding.reason


@pytest.mark.parametrize(("seconds", "word"), [(100.0, "ahead of"), (-100.0, "behind")])
def test_a_clock_that_is_off_is_named(seconds: float, word: str) -> None:
    finding = nodes(compared([0.0, 0.0, seconds]))
    assert finding.status == "fail"
    assert isinstance(finding.measured, float)
    assert 95 < finding.measured < 105
    assert finding.reason.startswith("rank 2 (host host-2) is ")
    assert word in finding.reason


def test_clocks_that_are_off_to_both_sides_differ_by_the_sum() -> None:
    finding = nodes(compared([0.0, 100.0, -100.0]), limit=150)
    assert finding.status == "fail"
    assert isinstance(finding.measured, float)
    assert 190 < finding.measured < 210


def test_one_node_has_nothing_to_compare() -> None:
    assert nodes(compared([0.0])).status == "skipped"
    assert nodes({}).status == "skipped"


class _Store(BaseHTTPRequestHandler):
    """Refuses everything, politely and with a date."""

    offset_seconds: float | None = 0.0

    def _refuse(self) -> None:
        self.send_response_only(403)
        if self.offset_seconds is not None:
            self.send_header("Date", formatdate(time.time() + self.offset_seconds, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_DELETE = _refuse

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def store(offset_seconds: float | None) -> Iterator[str]:
    """A server whose clock is off; yields its url."""
    handler = type("Handler", (_Store,), {"offset_seconds": offset_seconds})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("offset", "status"), [(0.0, "pass"), (300.0, "fail"), (-300.0, "fail")])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_the_clock_of_a_store_is_read_off_any_answer(
    offset: float, status: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(offset) as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        facts = compare_with_store("s3://bucket/run" if kind == "s3" else f"{url}/data", Clock())
    finding = judge({MEMBERS[1]: {"store": facts}}, max_skew_seconds=60, has_store=True)[1]
    assert finding.status == status
    if offset:
        assert ("behind the store's" if offset > 0 else "ahead of the store's") in finding.reason
        assert "rank 1 (host host-1)" in finding.reason


def test_without_credentials_the_store_still_tells_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with store(0.0) as url:
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "store_offset" in compare_with_store("s3://bucket/run", Clock())


def test_a_store_without_dates_or_none_is_left_out() -> None:
    with store(None) as url:
        assert compare_with_store(f"{url}/data", Clock()) == {}
    assert compare_with_store("/data", Clock()) == {}
    findings = judge({MEMBERS[0]: {"store": {}}}, max_skew_seconds=2, has_store=True)
    assert findings[1].reason == "the store's answers have no Date"
