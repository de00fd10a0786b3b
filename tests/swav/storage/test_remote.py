import multiprocessing
import random
import threading
import time
import tracemalloc
from typing import Any

import pytest
from swav_testing import web as web_server
from swav_testing.web import WebServer

from swav import storage
from swav.storage.attempts import Patience
from swav.storage.types import PIECE_BYTES, ChangedError


def _gained(before: dict[str, int]) -> dict[str, int]:
    return {name: number - before[name] for name, number in storage.counts().items() if number != before[name]}


def test_a_range_is_read_by_one_request(web: WebServer) -> None:
    file = storage.open_file(web.url)
    before = storage.counts()
    assert file.read(1000, 5000) == web.data[1000:6000]
    assert _gained(before) == {"requests": 1, "bytes_received": 5000}
    size = len(web.data)
    assert [file.read(size - 3, 10), file.read(size, 10), file.read(5, 0)] == [bytes(web.data[-3:]), b"", b""]
    assert web.gets() == ["bytes=0-0", "bytes=1000-5999", f"bytes={size - 3}-{size - 1}"]


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_a_broken_stream_goes_on_at_its_byte(web: WebServer, hasty: Patience, how: str) -> None:
    file = storage.open_file(web.url)
    web.plans = [getattr(web_server, how)(300_000)]
    before = storage.counts()
    assert file.read(7, 900_000) == web.data[7:900_007]
    gained = _gained(before)
    assert gained == {"requests": 2, "bytes_received": 900_000, "retries": 1, "resumed_streams": 1}
    assert web.seen[-1] == ("GET", "bytes=300007-900006", '"one"')


def test_a_trickling_stream_is_dropped_and_goes_on_elsewhere(web: WebServer, hasty: Patience) -> None:
    web.plans = [web_server.trickle]
    before = storage.counts()
    assert storage.read(web.url) == web.data
    assert _gained(before)["resumed_streams"] == 1
    start = int(web.gets()[1].removeprefix("bytes=").partition("-")[0])
    assert 0 < start < 1000


def test_a_slow_reader_of_a_stream_is_no_trickle(web: WebServer, hasty: Patience) -> None:
    before = storage.counts()
    pieces = []
    for piece in storage.open_file(web.url).stream(0, len(web.data)):
        pieces.append(piece)
        if len(pieces) < 3:
            time.sleep(2 * hasty.slow_seconds)
    assert b"".join(pieces) == web.data
    assert "retries" not in _gained(before)


@pytest.mark.parametrize(
    "claim",
    [
        {"num_bytes": 400_000},
        {"num_bytes": 600_000},
        {"content_range": "bytes 0-499999/1048577"},
        {"content_range": "bytes 1-500000/1048576"},
        {"content_range": "bytes 0-499998/1048576", "num_bytes": 499_999},
        {"content_range": "nonsense"},
    ],
)
def test_an_answer_to_another_question_is_never_delivered(
    web: WebServer, hasty: Patience, claim: dict[str, Any]
) -> None:
    file = storage.open_file(web.url)
    web.plans = [web_server.claim(**claim)]
    before = storage.counts()
    assert file.read(0, 500_000) == web.data[:500_000]
    assert _gained(before) == {"requests": 2, "bytes_received": 500_000, "retries": 1}


def test_a_late_answer_is_asked_for_a_second_time_and_then_left(web: WebServer, hasty: Patience) -> None:
    file = storage.open_file(web.url)
    answered = threading.Event()
    web.plans = [web_server.late(answered)]
    before = storage.counts()
    assert file.read(0, 1000) == web.data[:1000]
    assert _gained(before) == {"requests": 2, "bytes_received": 1000, "hedges": 1}
    answered.set()
    assert file.read(5, 1000) == web.data[5:1005]


@pytest.mark.parametrize("conditions", [True, False])
def test_an_object_that_is_replaced_while_it_is_read_is_an_error(
    web: WebServer, hasty: Patience, conditions: bool
) -> None:
    web.conditions = conditions
    web.plans = [web_server.cut(200_000, lambda: setattr(web, "etag", '"two"'))]
    stream = storage.open_file(web.url).stream(0, 900_000)
    with pytest.raises(ChangedError, match=r"a\.tar was replaced.*must not change.*under a new name"):
        b"".join(stream)
    assert len(web.gets()) == 2  # it is not tried again


def test_an_object_that_is_removed_while_it_is_read_is_an_error(web: WebServer, hasty: Patience) -> None:
    web.plans = [web_server.cut(200_000), web_server.status(404)]
    with pytest.raises(ChangedError, match=r"a\.tar was removed while"):
        storage.read(web.url)


def test_an_object_that_is_not_the_indexed_one_is_refused(web: WebServer) -> None:
    assert storage.open_file(web.url, etag="one").read(3, 4) == web.data[3:7]
    with pytest.raises(ChangedError, match="replaced"):
        storage.open_file(web.url, etag="other").read(3, 4)
    with pytest.raises(ChangedError, match="replaced"):
        storage.open_file(web.url, etag="other").num_bytes()


def test_a_known_etag_saves_the_question_for_the_size(web: WebServer) -> None:
    file = storage.open_file(web.url, etag="one")
    assert web.seen == []
    assert file.read(7, 99) == web.data[7:106]
    assert [method for method, _, _ in web.seen] == ["GET"]
    assert storage.open_file(web.url, etag="one").read(len(web.data) + 5, 9) == b""


def test_one_answer_alone_does_not_shorten_an_object(web: WebServer, hasty: Patience) -> None:
    file = storage.open_file(web.url, etag="one")
    web.plans = [web_server.claim(content_range="bytes 0-9/10", num_bytes=10)]
    assert file.read(0, 1000) == web.data[:1000]
    assert [method for method, _, _ in web.seen] == ["GET", "GET", "GET"]


def test_a_store_that_is_overloaded_is_asked_again(web: WebServer, hasty: Patience) -> None:
    web.plans = [web_server.status(503), web_server.status(500), web_server.status(429, ("Retry-After", "1")), None]
    before = storage.counts()
    assert storage.read(web.url) == web.data
    assert _gained(before)["retries"] == 3


def test_a_budget_ends_in_an_error_that_says_what_was_tried(
    web: WebServer, hasty: Patience, caplog: pytest.LogCaptureFixture
) -> None:
    web.plans = [web_server.status(503)] * 20
    with pytest.raises(OSError, match=r"a\.tar: reading bytes 0 to the end: gave up after 5 attempts.*answered 503"):
        storage.read(web.url)
    assert len(web.gets()) == hasty.attempts
    assert "attempt 4 of 5" in caplog.text


def test_progress_makes_the_budget_whole_again_and_a_few_bytes_do_not(web: WebServer, hasty: Patience) -> None:
    web.plans = [web_server.cut(hasty.progress_bytes)] * 12
    assert storage.read(web.url) == web.data
    web.plans = [web_server.cut(10)] * 12
    with pytest.raises(ConnectionError, match="gave up after 5 attempts"):
        storage.read(web.url)


def test_a_stream_comes_in_pieces_and_holds_one_of_them(web: WebServer) -> None:
    web.data = memoryview(bytes(48 << 20))
    file = storage.open_file(web.url)
    file.read(0, 1)
    tracemalloc.start()
    try:
        sizes = [len(piece) for piece in file.stream(0, len(web.data))]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == len(web.data)
    assert max(sizes) <= PIECE_BYTES
    assert peak < 4 * PIECE_BYTES


def test_a_stream_that_is_left_gives_its_connection_up(web: WebServer) -> None:
    stream = storage.open_file(web.url).stream(0, len(web.data))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert storage.read(web.url) == web.data


def _read_in_child(url: str, queue: Any) -> None:
    queue.put((storage.read(url)[:9], storage.counts()["requests"]))


def test_a_forked_process_has_connections_and_totals_of_its_own(web: WebServer) -> None:
    file = storage.open_file(web.url)
    file.read(0, 9)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(web.url, queue))
    child.start()
    assert queue.get(timeout=60) == (web.data[:9], 1)
    child.join()
    assert file.read(5, 9) == web.data[5:14]


def test_threads_read_one_file_through_many_faults(web: WebServer, hasty: Patience) -> None:
    """A small version of the test against a real S3 server, with faults that it cannot be made to show."""
    draws = random.Random(5)
    kinds = [
        None,
        web_server.status(503),
        web_server.claim(num_bytes=5),
        web_server.claim(content_range="bytes 9-8/7"),
        web_server.cut(0),
        web_server.cut(777),
    ]
    web.plans = draws.choices(kinds, weights=[30, 1, 1, 1, 1, 1], k=2000)
    file = storage.open_file(web.url)
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(100):
            start, size = draws.randrange(len(web.data)), draws.randrange(1, 5000)
            if file.read(start, size) != web.data[start : start + size]:
                wrong.append((start, size))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(web.gets()) > 400
