"""Which seconds counted, over the lives of a launcher's ranks."""

from pathlib import Path

import pytest
from swav_testing.runs import files_of_at_most

from swav.goodput import StepBook, kept_seconds, settle
from swav.program import LAUNCHER_FOLDER


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    return tmp_path


def live(resumed_at: int, steps: int, *, saved: tuple[int, ...] = (), seconds: float = 1.0) -> None:
    """A rank's life of some steps."""
    book = StepBook(resumed_at)
    for step in range(resumed_at + 1, resumed_at + steps + 1):
        book.add(step, seconds)
        if step in saved:
            book.keep(step)
    book.close()


def test_lost_steps_count_once_they_are_repeated(folder: Path) -> None:
    assert kept_seconds(folder) is None
    live(0, 7, saved=(3, 6))
    assert kept_seconds(folder) == 7  # while it ran, all counted
    settle(folder)
    assert kept_seconds(folder) == 6
    live(6, 2, saved=(8,), seconds=10)
    assert kept_seconds(folder) == 26


def test_a_checkpoint_that_was_not_whole_takes_its_steps_with_it(folder: Path) -> None:
    live(0, 7, saved=(3, 6))
    settle(folder)
    live(3, 1)
    assert kept_seconds(folder) == 4
    settle(folder)
    assert kept_seconds(folder) == 3


def test_a_run_that_never_saved_has_nothing_that_counts(folder: Path) -> None:
    live(0, 7)
    settle(folder)
    assert kept_seconds(folder) == 0
    live(0, 0)
    assert kept_seconds(folder) == 0


def test_steps_of_others_meanwhile_are_not_counted_here(folder: Path) -> None:
    live(0, 4, saved=(4,))
    settle(folder)
    live(20, 2)  # 5 to 20 were done by other nodes
    assert kept_seconds(folder) == 6


def test_the_rank_that_has_most_counts_for_its_pod(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(0, 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    live(0, 5)
    assert kept_seconds(folder) == 5


def test_a_process_by_itself_keeps_its_book_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER_FOLDER, raising=False)
    book = StepBook(5)
    book.add(6, 2.5)
    book.keep(6)
    book.close()
    assert book.seconds == 2.5


def test_a_full_disk_ends_the_book_and_not_the_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = StepBook(0)
    with files_of_at_most(16):  # the first entry's size
        book.add(1, 2.0)
        book.keep(1)
        book.add(2, 2.0)
    assert kept_seconds(folder) == 2
    book.close()
    with files_of_at_most(8):
        StepBook(1).add(2, 3.0)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["goodput is not known from here on"] * 2


def test_books_stay_small(folder: Path) -> None:
    for life in range(300):
        live(10 * life, 10, saved=(10 * life + 10,))
        settle(folder)
    assert kept_seconds(folder) == 3000
    (file,) = folder.iterdir()
    assert file.stat().st_size == 16 * 301  # one entry for each checkpoint
