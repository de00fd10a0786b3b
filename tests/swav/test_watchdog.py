import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swav import watchdog
from swav.program import LAUNCHER_FOLDER

ROOT = Path(__file__).parents[2]


def child(body: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that imports the watchdog and does something; it says "ready" when it comes there."""
    head = "import ctypes, time\nfrom swav.watchdog import ends_when_stalled, progress\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + body],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ASLEEP = "time.sleep(600)"
# A function that is called by PyDLL keeps the interpreter's lock: no thread of Python runs until it returns.
HOLDING_THE_LOCK = "ctypes.PyDLL(None).sleep(600)"


@pytest.mark.parametrize("stuck", [ASLEEP, HOLDING_THE_LOCK])
def test_a_process_that_stands_still_ends_and_shows_where(stuck: str) -> None:
    body = f"""
import threading
def another(): time.sleep(600)
def stand_still(): {stuck}
threading.Thread(target=another, daemon=True).start()
with ends_when_stalled(0.5):
    stand_still()
"""
    process = child(body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout (0:00:00.5" in err
    assert "in stand_still" in err
    assert "in another" in err


def test_progress_keeps_a_process_alive_and_nothing_watches_after_it() -> None:
    body = """
with ends_when_stalled(2):
    for _ in range(30):
        time.sleep(0.1)
        progress()
time.sleep(2.5)
progress(3)
with ends_when_stalled(0):
    time.sleep(1)
"""
    process = child(body)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_signal_shows_every_stack_and_ends_nothing() -> None:
    process = child('with ends_when_stalled(0):\n    print("ready", flush=True)\n    time.sleep(2)\n')
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search('File "<string>", line [45] in <module>', err)  # the line after may not have begun


def test_the_launcher_sees_the_furthest_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog.last_step(tmp_path) == -1
    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path))
    for local_rank, step in (("0", 11), ("1", 12)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with watchdog.ends_when_stalled(0):
            watchdog.progress(10**9)
            watchdog.progress(step)
    assert watchdog.last_step(tmp_path) == 12
    watchdog.progress(99)  # nothing is watched, so nobody is told
    assert watchdog.last_step(tmp_path) == 12


def test_the_launcher_sees_when_work_last_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog.last_progress_in(tmp_path) == -math.inf
    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path))
    with watchdog.tells_launcher():
        begun = watchdog.last_progress_in(tmp_path)
        assert 0 < begun <= time.monotonic()
        assert watchdog.last_step(tmp_path) == -1
        watchdog.progress(7)
        with watchdog.ends_when_stalled(0):
            watchdog.progress()
        watchdog.progress()  # the outer block goes on
        assert watchdog.last_progress_in(tmp_path) == watchdog.last_progress() >= begun
    assert watchdog.last_step(tmp_path) == 7
    with watchdog.tells_launcher():  # another life keeps it until it has gone on
        assert watchdog.last_step(tmp_path) == 7


def test_progress_costs_little() -> None:
    start = time.monotonic()
    with watchdog.ends_when_stalled(600):
        for step in range(1000):
            watchdog.progress(step)
    seconds = (time.monotonic() - start) / 1000
    print(f"{1e6 * seconds:.0f} us per step")  # noqa: T201
    assert seconds < 0.01  # of a step's time; generous, as machines are shared
