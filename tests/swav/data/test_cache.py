"""One download per host, a budget that holds, and nothing wrong or left over, whatever dies when."""

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swav.data.cache import AbandonedError, BlockCache, CachedBlock
from swav.storage import counts

NEVER = threading.Event()
BLOCK_BYTES = 100_000
FOOTER_BYTES = 20


def content(key: str, num_bytes: int = BLOCK_BYTES) -> bytes:
    return random.Random(key).randbytes(num_bytes)


class Source:
    """What a store gives, in pieces, and how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pieces(self, key: str, num_bytes: int = BLOCK_BYTES) -> Callable[[], Iterator[bytes]]:
        def download() -> Iterator[bytes]:
            self.asked.append(key)
            data = content(key, num_bytes)
            yield from (data[start : start + 30_000] for start in range(0, num_bytes, 30_000))

        return download

    def get(self, cache: BlockCache, key: str, num_bytes: int = BLOCK_BYTES) -> bytes:
        block = cache.get(key, num_bytes, self.pieces(key, num_bytes), NEVER)
        return block.read(0, num_bytes)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"usage"}


def num_bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.block"))


def booked_bytes(folder: Path) -> int:
    return int.from_bytes((folder / "usage").read_bytes(), "little")


def test_a_block_is_downloaded_once_and_kept(tmp_path: Path) -> None:
    source = Source()
    for _ in range(2):  # the second cache is another run's
        cache = BlockCache(tmp_path, budget_bytes=10**9)
        assert [source.get(cache, key) for key in "aba"] == [content(key) for key in "aba"]
    assert source.asked == ["a", "b"]
    assert names(tmp_path) == {"a.block", "b.block"}
    assert booked_bytes(tmp_path) == num_bytes_in(tmp_path) == 2 * (BLOCK_BYTES + FOOTER_BYTES)


def test_threads_that_want_one_block_share_one_download(tmp_path: Path) -> None:
    cache, source = BlockCache(tmp_path, budget_bytes=10**9), Source()
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda number: source.get(cache, str(number % 4)), range(64)))
    assert got == [content(str(number % 4)) for number in range(64)]
    assert sorted(source.asked) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:50_000],
        lambda data: data[:-FOOTER_BYTES],
        lambda data: bytes(len(data)),
        lambda data: data[:70_000] + b"\x00\x01" + data[70_002:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
        lambda data: data + b"x",
    ],
)
def test_a_torn_or_rotten_file_is_fetched_again_by_the_next_process(
    tmp_path: Path, harm: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    source = Source()
    source.get(BlockCache(tmp_path, budget_bytes=10**9), "a")
    path = tmp_path / "a.block"
    path.write_bytes(harm(path.read_bytes()))
    before = counts()["checksum_failures"]
    with caplog.at_level(logging.WARNING):
        assert source.get(BlockCache(tmp_path, budget_bytes=10**9), "a") == content("a")
    assert source.asked == ["a", "a"]
    assert counts()["checksum_failures"] == before + 1
    assert "a.block is damaged" in caplog.text
    assert booked_bytes(tmp_path) == num_bytes_in(tmp_path)


def test_those_used_longest_ago_leave_first_and_stay_readable(tmp_path: Path) -> None:
    total = BLOCK_BYTES + FOOTER_BYTES
    cache, source = BlockCache(tmp_path, budget_bytes=10 * total), Source()
    opened: dict[str, CachedBlock] = {}
    for age, key in enumerate("abcdefghij"):
        opened[key] = cache.get(key, BLOCK_BYTES, source.pieces(key), NEVER)
        os.utime(tmp_path / f"{key}.block", (0, 1000 + age))
    source.get(cache, "a")  # used just now
    source.get(cache, "new")
    # Down to 90 % of the budget, so that the next one needs no more room to be made.
    assert names(tmp_path) == {f"{key}.block" for key in "adefghij"} | {"new.block"}
    assert booked_bytes(tmp_path) == num_bytes_in(tmp_path) == 9 * total
    source.get(cache, "newer")
    assert num_bytes_in(tmp_path) == 10 * total
    assert [block.read(0, BLOCK_BYTES) for block in opened.values()] == [content(key) for key in "abcdefghij"]


def test_use_is_noted_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = BlockCache(tmp_path, budget_bytes=10**9), Source()
    block = cache.get("a", BLOCK_BYTES, source.pieces("a"), NEVER)
    os.utime(block.path, (0, 1000))
    block.touch()
    assert block.path.stat().st_mtime == 1000
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    block.touch()
    assert block.path.stat().st_mtime > 1000


@pytest.mark.parametrize("budget_bytes", [1, BLOCK_BYTES, 3 * BLOCK_BYTES])
def test_a_budget_below_what_is_in_use_works(tmp_path: Path, budget_bytes: int) -> None:
    cache, source = BlockCache(tmp_path, budget_bytes=budget_bytes), Source()
    with ThreadPoolExecutor(8) as pool:
        keys = [str(number % 10) for number in range(200)]
        assert list(pool.map(lambda key: source.get(cache, key), keys)) == [content(key) for key in keys]
    assert booked_bytes(tmp_path) == num_bytes_in(tmp_path)
    source.get(cache, "last")
    assert num_bytes_in(tmp_path) <= max(budget_bytes, BLOCK_BYTES + FOOTER_BYTES)


def test_half_of_the_free_space_is_the_default_whatever_the_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = 9_000_000

    class Usage:
        def __init__(self, _folder: Path) -> None:
            self.free = free - num_bytes_in(tmp_path)

    monkeypatch.setattr("shutil.disk_usage", Usage)
    with caplog.at_level(logging.INFO):
        cache = BlockCache(tmp_path)
    assert cache.budget_bytes == free // 2
    assert f"kept in {tmp_path}" in caplog.text
    Source().get(cache, "a")
    assert BlockCache(tmp_path).budget_bytes == free // 2
    with pytest.raises(ValueError, match="cache_bytes"):
        BlockCache(tmp_path, budget_bytes=-1)


def test_a_failed_download_leaves_nothing_and_reaches_the_caller(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, budget_bytes=10**9)

    def fail() -> Iterator[bytes]:
        yield b"some"
        raise ConnectionError("s3://bucket/key: no route")

    with pytest.raises(ConnectionError, match="s3://bucket/key"):
        cache.get("a", BLOCK_BYTES, fail, NEVER)
    with pytest.raises(OSError, match="4 bytes came of the 100000"):
        cache.get("a", BLOCK_BYTES, lambda: iter([b"some"]), NEVER)
    stop = threading.Event()

    def stopped() -> Iterator[bytes]:
        yield b"some"
        stop.set()
        yield b"more"

    with pytest.raises(AbandonedError):
        cache.get("a", BLOCK_BYTES, stopped, stop)
    assert names(tmp_path) == set()
    assert booked_bytes(tmp_path) == 0


def test_a_full_disk_takes_the_oldest_blocks_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = BlockCache(tmp_path, budget_bytes=10**9), Source()
    for age, key in enumerate("abcdef"):
        source.get(cache, key)
        os.utime(tmp_path / f"{key}.block", (0, 1000 + age))
    write, room = os.write, 4 * (BLOCK_BYTES + FOOTER_BYTES)

    def write_to_a_small_disk(descriptor: int, data: bytes) -> int:
        if num_bytes_in(tmp_path) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_to_a_small_disk)
    assert source.get(cache, "new") == content("new")
    assert names(tmp_path) == {f"{key}.block" for key in ("c", "d", "e", "f", "new")}
    room = -1
    with pytest.raises(OSError, match=r"no room for a block .*SWAV_CACHE.*runtime\.cache_bytes") as caught:
        source.get(cache, "newer")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)
    assert names(tmp_path) == set()
    assert booked_bytes(tmp_path) == 0


def test_only_the_file_that_was_read_is_discarded(tmp_path: Path) -> None:
    cache, source = BlockCache(tmp_path, budget_bytes=10**9), Source()
    old = cache.get("a", BLOCK_BYTES, source.pieces("a"), NEVER)
    cache.discard(old)
    new = cache.get("a", BLOCK_BYTES, source.pieces("a"), NEVER)
    cache.discard(old)
    assert names(tmp_path) == {"a.block"}
    cache.discard(new)
    cache.discard(new)
    assert names(tmp_path) == set()
    assert booked_bytes(tmp_path) == 0


# A process that fetches blocks in random order, slowly; each download leaves a line in a log.
PROGRAM = """
import random, sys, threading, time
from pathlib import Path
from swav.data.cache import BlockCache

folder, log, seed, budget, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache = BlockCache(Path(folder), budget_bytes=budget)
draws = random.Random(seed)
print("ready", flush=True)
for _ in range(rounds):
    key = str(draws.randrange(12))
    data = random.Random(key).randbytes(100_000)
    def download():
        with open(log, "a") as file:
            file.write(key + "\\n")
        for start in range(0, len(data), 10_000):
            time.sleep(0.0005)
            yield data[start : start + 10_000]
    block = cache.get(key, len(data), download, threading.Event())
    assert block.read(0, len(data)) == data, key
"""


def start(folder: Path, log: Path, seed: int, *, budget: int = 10**9, rounds: int = 60) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(log), str(seed), str(budget), str(rounds)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def test_processes_share_one_download(tmp_path: Path) -> None:
    processes = [start(tmp_path / "cache", tmp_path / "log", seed) for seed in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    asked = (tmp_path / "log").read_text().split()
    assert sorted(asked) == sorted({str(number) for number in range(12)})


def test_processes_keep_one_budget(tmp_path: Path) -> None:
    budget = 5 * (BLOCK_BYTES + FOOTER_BYTES)
    processes = [start(tmp_path / "cache", tmp_path / "log", seed, budget=budget) for seed in range(3)]
    largest = 0
    while any(process.poll() is None for process in processes):
        largest = max(largest, booked_bytes(tmp_path / "cache"))
    assert [process.wait() for process in processes] == [0] * 3
    assert 0 < largest <= budget
    assert booked_bytes(tmp_path / "cache") == num_bytes_in(tmp_path / "cache") <= budget


def test_killed_writers_leave_nothing_that_hurts(tmp_path: Path) -> None:
    folder, draws = tmp_path / "cache", random.Random(0)
    for seed in range(8):
        victim = start(folder, tmp_path / "log", seed, rounds=10_000, budget=8 * BLOCK_BYTES)
        bystander = start(folder, tmp_path / "log", 100 + seed, budget=8 * BLOCK_BYTES)
        time.sleep(draws.uniform(0, 0.05))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert bystander.wait() == 0
    cache = BlockCache(folder, budget_bytes=10**9)
    assert not list(folder.glob("*.partial"))
    assert booked_bytes(folder) == num_bytes_in(folder)
    assert all(Source().get(cache, str(number)) == content(str(number)) for number in range(12))


def test_a_file_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    cache, started, go_on = BlockCache(tmp_path, budget_bytes=10**9), threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield content("a")[:10]
        started.set()
        assert go_on.wait(30)
        yield content("a")[10:]

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(cache.get, "a", BLOCK_BYTES, slow, NEVER)
        assert started.wait(30)
        (tmp_path / "b.partial").write_bytes(b"of a killed process")
        other = BlockCache(tmp_path, budget_bytes=10**9)
        assert names(tmp_path) == {"a.partial"}
        stop = threading.Event()
        waiting = ThreadPoolExecutor(1).submit(other.get, "a", BLOCK_BYTES, slow, stop)
        stop.set()
        with pytest.raises(AbandonedError):
            waiting.result()
        go_on.set()
        assert writing.result().read(0, BLOCK_BYTES) == content("a")
    assert booked_bytes(tmp_path) == num_bytes_in(tmp_path)
