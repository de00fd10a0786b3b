"""A host that is cut off without a word, and comes back."""

from pathlib import Path

import pytest
from swav_testing.partition import measure, table, why_not

TIMEOUT_SECONDS = 15.0
RENDEZVOUS = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10"


@pytest.mark.timeout(1200)
def test_a_host_that_is_cut_off_is_noticed_left_behind_and_taken_back(tmp_path: Path, cache: Path, data: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    times = measure(tmp_path, cache, data, timeout_seconds=TIMEOUT_SECONDS, rendezvous=RENDEZVOUS, deadline_seconds=300)
    print(table(times))  # noqa: T201
    assert TIMEOUT_SECONDS / 2 < times.noticed < TIMEOUT_SECONDS + 60  # generous: machines are shared
    assert times.noticed <= times.recovered
    assert 0 <= times.lost_steps <= 60
