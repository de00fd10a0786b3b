import threading

import pytest

from swav import storage


def test_totals_add_up_over_threads() -> None:
    def work() -> None:
        for _ in range(500):
            storage.count("retries")

    before = storage.counts()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = storage.counts()
    assert after["retries"] - before["retries"] == 2000
    assert list(after) == list(before)
    with pytest.raises(KeyError):
        storage.count("retrys")


def test_an_observer_is_told_at_once_and_until_it_is_sent_away() -> None:
    told: list[tuple[str, int]] = []
    storage.observe_counts(lambda name, number: told.append((name, number)))
    try:
        storage.count("hedges")
        storage.count("bytes_received", 70)
    finally:
        storage.observe_counts(None)
    storage.count("hedges")
    assert told == [("hedges", 1), ("bytes_received", 70)]
