import time
from pathlib import Path

import pytest

from swav import watchdog
from swav.goodput import StepBook
from swav.life import Life
from swav.program import LAUNCHER_FOLDER


def test_a_launchers_ranks_are_as_old_as_their_start_or_their_last_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(tmp_path)
    assert life.progress_at() == life.began_at
    assert life.kept_seconds() is None
    life.ranks_start(2)
    assert life.runs_since is not None
    assert life.progress_at() == life.runs_since
    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path))
    with watchdog.tells_launcher():
        watchdog.progress()
        assert life.progress_at() == watchdog.last_progress() > life.runs_since
    StepBook(0).close()
    assert life.kept_seconds() == 0
    life.ranks_end("others")
    assert (life.world_size, life.waits_for) == (0, "others")


def test_a_process_by_itself_knows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER_FOLDER, raising=False)
    life = Life()
    life.ranks_start(1)
    assert life.kept_seconds() is None
    before = time.monotonic()
    watchdog.progress()
    assert before <= life.progress_at() <= time.monotonic()
    life.book = StepBook(0)
    life.book.add(1, 0.5)
    assert life.kept_seconds() == 0.5
