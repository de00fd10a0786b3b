import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from swav_testing.s3 import S3Server, moto_server

from swav.storage import Tagged
from swav_components.driver.lease import LEASE, Lease
from swav_components.driver.records import Record, RunFolder, record_of

_ROUNDS = 4
_SECONDS = 3.0
_DEADLINE_SECONDS = 120


class _Memory:
    """A run's folder in memory, which may lose answers."""

    def __init__(self) -> None:
        self.files: dict[str, Tagged] = {}
        self.loses = False

    def exists(self, name: str) -> bool:
        return name in self.files

    def names(self, folder: str) -> list[str]:
        return [name for name in self.files if name.startswith(folder)]

    def read(self, name: str) -> Tagged | None:
        return self.files.get(name)

    def write(self, name: str, data: bytes, tag: str | None) -> str | None:
        found = self.files.get(name)
        if (None if found is None else found.tag) != tag:
            return None
        self.files[name] = Tagged(data, f"{name}-{hash(data)}")
        if self.loses:
            raise ConnectionError("the answer was lost")
        return self.files[name].tag


class _Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> _Memory:
    return _Memory()


def _lease(memory: _Memory, holder: str, clock: _Clock | None = None) -> Lease:
    return Lease(memory, holder, seconds=30, monotonic=clock or _Clock())


def test_one_holds_it_and_others_wait(memory: _Memory) -> None:
    first, second = _lease(memory, "a"), _lease(memory, "b")
    assert first.acquire()
    assert (first.held, first.fencing) == (True, 1)
    assert not second.acquire()
    assert not second.confirm()
    assert first.confirm()


def test_it_is_taken_when_it_stood_still_by_the_watchers_own_clock(memory: _Memory) -> None:
    """The clocks differ by an hour, and only what passes on one of them counts."""
    there, here = _Clock(3600.0), _Clock()
    first, second = _lease(memory, "a", there), _lease(memory, "b", here)
    assert first.acquire()
    assert not second.acquire()
    here.now = 29
    assert first.confirm()
    assert not second.acquire()
    here.now = 58.9  # 29.9 since it was seen to change
    assert not second.acquire()
    here.now = 59.1
    assert second.acquire()
    assert second.fencing == 2
    assert not first.confirm()
    assert not first.held


def test_a_released_one_is_taken_at_once(memory: _Memory) -> None:
    first, second = _lease(memory, "a"), _lease(memory, "b")
    assert first.acquire()
    first.release()
    first.release()
    assert second.acquire()
    assert second.fencing == 2


def test_a_release_does_not_take_it_from_the_next_holder(memory: _Memory) -> None:
    clock = _Clock()
    first, second = _lease(memory, "a"), _lease(memory, "b", clock)
    assert first.acquire()
    assert not second.acquire()
    clock.now = 31
    assert second.acquire()
    first.release()
    assert second.confirm()


def test_lost_answers_cost_nothing(memory: _Memory) -> None:
    lease = _lease(memory, "a")
    memory.loses = True
    with pytest.raises(ConnectionError):
        lease.acquire()
    memory.loses = False
    assert lease.acquire()
    memory.loses = True
    with pytest.raises(ConnectionError):
        lease.confirm()
    memory.loses = False
    assert lease.confirm()
    assert json.loads(memory.files[LEASE].data)["renewal"] == 2
    assert lease.fencing == 1


def test_a_removed_one_is_lost(memory: _Memory) -> None:
    lease = _lease(memory, "a")
    assert lease.acquire()
    del memory.files[LEASE]
    assert not lease.confirm()


# --- two real processes, on a real store ---


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server = request.getfixturevalue("store")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return f"{server.make_bucket(f'lease-{abs(hash(request.node.nodeid)):x}')}/run"


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


def _contend(run: str, number: int, log: str) -> None:
    """Hold the lease some times, each time for some renewals; note when it begins and ends."""
    folder = RunFolder(run)
    lease = Lease(folder, f"process-{number}", seconds=_DEADLINE_SECONDS, monotonic=time.monotonic)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for turn in range(_ROUNDS):
        while not lease.acquire():
            time.sleep(0.02)
        os.write(descriptor, f"{lease.fencing} begins\n".encode())
        name = f"job-{turn}"
        record = Record(name, "knn-1", 1, "knn", writer=lease.holder)
        if folder.write(record_of(name), record.to_json(), None) is not None:
            os.write(descriptor, f"{lease.fencing} made {name}\n".encode())
        for _ in range(3):
            assert lease.confirm()
        os.write(descriptor, f"{lease.fencing} ends\n".encode())
        lease.release()


def _hold_until_killed(run: str, log: str) -> None:
    lease = Lease(RunFolder(run), "killed", seconds=_SECONDS, monotonic=time.monotonic)
    while not lease.acquire():
        time.sleep(0.02)
    Path(log).write_text("held")
    signal.pause()


def test_processes_take_turns_and_one_of_them_writes_each_intent(run: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_contend, args=(run, number, str(log))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_DEADLINE_SECONDS)
        assert process.exitcode == 0
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    held = [(int(fencing), what) for fencing, what in lines if not what.startswith("made")]
    assert held == [(fencing, what) for fencing in range(1, 2 * _ROUNDS + 1) for what in ("begins", "ends")]
    assert sorted(what for _, what in lines if what.startswith("made")) == [f"made job-{n}" for n in range(_ROUNDS)]


def test_the_lease_of_a_killed_process_runs_out(run: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_hold_until_killed, args=(run, str(tmp_path / "held")))
    process.start()
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not (tmp_path / "held").exists():
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    lease = Lease(RunFolder(run), "next", seconds=_SECONDS, monotonic=time.monotonic)
    before = time.monotonic()
    while not lease.acquire():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert time.monotonic() - before >= _SECONDS
    assert lease.fencing == 2
