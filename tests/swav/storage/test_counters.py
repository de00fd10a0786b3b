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
