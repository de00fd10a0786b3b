"""The launcher, with workers that do nothing but end."""

import re
import signal
import time
from pathlib import Path

import pytest
from swav_testing.agents import Agents, agents
from swav_testing.runs import DEADLINE_SECONDS, children

from swav import elastic
from swav.program import EXIT_FUTILE, EXIT_REFUSED, EXIT_STOPPED

# Notes each life of a rank, and gives each the next of the statuses that its rank is told ("1,1,0"; "-" waits).
WORKER = """
import os, signal, sys, time
from pathlib import Path
from swav.program import LAUNCHER_FOLDER, end_with_launcher
from swav.watchdog import ends_when_stalled, progress

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
end_with_launcher()
life = len(list(folder.glob(f"{rank}-*")))
(folder / f"{rank}-{life}-{os.getpid()}").touch()
statuses = sys.argv[2:][min(rank, len(sys.argv) - 3)].split(",")
status, _, step = statuses[min(life, len(statuses) - 1)].partition("@")
with ends_when_stalled(0):
    if step:
        progress(int(step))
    if status == "-":
        time.sleep(600)
sys.exit(int(status))
"""


def words(tmp_path: Path, *statuses: str) -> list[str]:
    """Of a worker that ends so; one argument per rank, the last one for all that are left."""
    script, lives = tmp_path / "worker.py", tmp_path / "lives"
    script.write_text(WORKER)
    lives.mkdir()
    return [str(script), str(lives), *statuses]


def lives(tmp_path: Path) -> list[int]:
    """How often each rank was started."""
    names = [path.name for path in (tmp_path / "lives").iterdir()]
    ranks = sorted({name.partition("-")[0] for name in names})
    return [sum(name.startswith(f"{rank}-") for name in names) for rank in ranks]


def wait_for_lives(tmp_path: Path, expected: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while sum(lives(tmp_path)) < expected:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(tmp_path: Path, cache: Path, *statuses: str, ranks: int = 1, options: tuple[str, ...] = ()) -> tuple[int, str]:
    with agents(tmp_path, cache, words(tmp_path, *statuses), ranks_per_node=ranks, options=options) as started:
        started.start()
        return started.statuses()[0], started.printed()


@pytest.mark.parametrize("status", ["64", "2"])  # 2: what argparse ends with
def test_a_refused_command_is_not_tried_again(tmp_path: Path, cache: Path, status: str) -> None:
    ended, printed = end(tmp_path, cache, "-", status, ranks=2)
    assert ended == EXIT_REFUSED
    assert set(lives(tmp_path)) == {1}
    assert "a worker refused the command, so no other try is made" in printed
    assert "Traceback" not in printed


def test_a_crash_that_repeats_ends_after_three_restarts(tmp_path: Path, cache: Path) -> None:
    status, printed = end(tmp_path, cache, "1@5,3@7,1@6,-9@7,1@7")
    assert status == EXIT_FUTILE
    assert lives(tmp_path) == [5]  # the second life got further
    assert "3 restarts in a row got no further (beyond step 7)" in printed


def test_crashes_with_progress_between_are_restarted(tmp_path: Path, cache: Path) -> None:
    status, _ = end(tmp_path, cache, "1,1,1@1,1,1,1@2,75,75,75,75,1,0", options=("--max-futile-restarts=3",))
    assert status == 0
    assert lives(tmp_path) == [12]


def test_a_request_to_stop_reaches_the_workers(tmp_path: Path, cache: Path) -> None:
    with agents(tmp_path, cache, words(tmp_path, "-"), ranks_per_node=2) as started:
        process = started.start()
        wait_for_lives(tmp_path, 2)
        process.send_signal(signal.SIGTERM)
        assert started.statuses() == [EXIT_STOPPED]
    assert lives(tmp_path) == [1, 1]


def two_nodes(tmp_path: Path, cache: Path, *statuses: str) -> tuple[list[int], Agents]:
    with agents(tmp_path, cache, words(tmp_path, *statuses), nodes="2") as started:
        started.start()
        started.start()
        return started.statuses(), started


def test_one_refusal_ends_every_node(tmp_path: Path, cache: Path) -> None:
    statuses, started = two_nodes(tmp_path, cache, "-", "64")
    assert statuses == [EXIT_REFUSED, EXIT_REFUSED]
    assert set(lives(tmp_path)) == {1}
    assert started.printed().count("a worker refused the command") == 2


def test_a_refusal_is_the_reason_where_others_only_fail(tmp_path: Path, cache: Path) -> None:
    assert two_nodes(tmp_path, cache, "1", "64")[0] == [EXIT_REFUSED, EXIT_REFUSED]


def test_all_nodes_end_well_where_one_is_restarted_at_the_very_end(tmp_path: Path, cache: Path) -> None:
    assert two_nodes(tmp_path, cache, "1", "0")[0] == [0, 0]


def test_ranks_stop_when_their_agent_is_killed(tmp_path: Path, cache: Path) -> None:
    with agents(tmp_path, cache, words(tmp_path, "-"), ranks_per_node=2) as started:
        process = started.start()
        wait_for_lives(tmp_path, 2)
        ranks = children(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while any(Path(f"/proc/{rank}/cmdline").read_bytes() for rank in ranks if Path(f"/proc/{rank}").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_arguments_are_torchruns_with_other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = elastic.parse(["-m", "swav.pretrain"])
    assert (bare.max_restarts, bare.max_futile_restarts) == (1000, 3)
    assert bare.rdzv_conf == elastic.RENDEZVOUS_SETTINGS
    given = elastic.parse(["--max-restarts=2", "--rdzv-conf=join_timeout=5", "script.py", "--max-restarts=7"])
    assert given.max_restarts == 2
    assert given.rdzv_conf == f"{elastic.RENDEZVOUS_SETTINGS},join_timeout=5"
    assert (given.training_script, given.training_script_args) == ("script.py", ["--max-restarts=7"])
    monkeypatch.setenv("PET_MAX_RESTARTS", "4")
    assert int(elastic.parse(["script.py"]).max_restarts) == 4


@pytest.mark.parametrize("arguments", [["--no-such-option", "script.py"], ["--max-futile-restarts=0", "script.py"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert elastic.main(arguments) == EXIT_REFUSED
    assert re.search("usage: python -m swav.elastic", capsys.readouterr().err)
