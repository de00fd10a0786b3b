"""The driver as a program, with real jobs on this machine and real kills."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from swav_testing.runs import ROOT, TINY, environment, last_step, losses, wait_for_step

from swav_components.driver.command import main
from swav_components.driver.plan import run_name
from swav_components.driver.records import from_json
from swav_components.driver.scheduler import JOB

EPOCHS = 24
NUM_STEPS = 5 * EPOCHS
SECONDS = 240


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "Photos_1"


def _words(data: Path, run: Path, *others: str) -> list[str]:
    training = ["--recipe", "demo", "--data", str(data), *TINY, f"optim.epochs={EPOCHS}", "evaluate=null"]
    evaluations = [["knn", "--train", str(data), "-k", number] for number in ("3", "5")]
    return [
        *("--run", str(run), "--pretrain", shlex.join(training)),
        *(word for words in evaluations for word in ("--evaluate", shlex.join(words))),
        *("--poll-seconds", "0.3", "--lease-seconds", "5", *others),
    ]


@contextmanager
def _driver(words: list[str], cache: Path, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    variables = environment(cache)
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "components"), variables["PYTHONPATH"]])
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "swav_components.driver", *words], stdout=file, stderr=file, env=variables, cwd=ROOT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(what: Callable[[], bool], told: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


def _processes(run: Path) -> list[int]:
    wanted = f"{JOB}={run}#".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _ended_well(run: Path) -> list[str]:
    """The jobs whose processes all ended with 0, once for each time."""
    found = []
    for path in run.glob("driver/logs/*/torchx/*/SUCCESS"):
        roles = json.loads(path.read_text())["roles"]
        if all(replica["exitcode"] == 0 for replicas in roles.values() for replica in replicas):
            found.append(path.parent.name)
    return sorted(found)


def test_drivers_are_killed_and_stopped_and_two_at_once_and_each_job_ends_once(
    data: Path, cache: Path, run: Path, tmp_path: Path
) -> None:
    words, name = _words(data, run), run_name(str(run))
    logs = [tmp_path / f"driver-{number}.log" for number in range(3)]

    def told() -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs if log.exists())

    with _driver(words, cache, logs[0]) as first:
        wait_for_step(run, 10, lambda: first.poll() is None)
        first.send_signal(signal.SIGKILL)
        first.wait()
    with _driver(words, cache, logs[1]) as second, _driver(words, cache, logs[2]) as third:
        reached = last_step(run)
        assert reached < NUM_STEPS, "the run was over before its driver was killed"
        _wait_for(lambda: last_step(run) > reached + 10, told)
        holder = second if f"-{second.pid}-" in (run / "driver" / "lease.json").read_text() else third
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(SECONDS) == 75, told()
        assert last_step(run) < NUM_STEPS, "the run was over before its driver was stopped"
        other = third if holder is second else second
        assert other.wait(SECONDS) == 0, told()
    assert _processes(run) == []
    assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
    assert (run / "result.json").exists()
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == ["knn-1.json", "knn-2.json"]
    assert [json.loads((run / "evaluations" / f"knn-{n}.json").read_text())["protocol"] for n in (1, 2)] == ["knn"] * 2
    # Attempt 1 ended with the driver that was killed, 2 with the one that was stopped; no job ended well twice.
    records = [from_json(path.read_bytes()) for path in (run / "driver" / "intents").glob("*.json")]
    assert {record.name for record in records} == {
        *(f"{name}-pretrain", f"{name}-pretrain-a2", f"{name}-pretrain-a3", f"{name}-knn-1", f"{name}-knn-2")
    }
    assert _ended_well(run) == [f"{name}-knn-1", f"{name}-knn-2", f"{name}-pretrain-a3"], told()
    assert sorted({calls.fencing for record in records for calls in record.calls}) == [1, 2, 3]


def test_a_failed_job_stops_the_rest_and_is_tried_again_on_request(
    data: Path, cache: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The images are missing: the trainer ends with 64."""
    log = tmp_path / "log"
    nothing = str(tmp_path / "nothing")
    training = shlex.join(["--recipe", "demo", "--data", nothing, *TINY, "evaluate=null"])
    options = ["--run", str(run), "--poll-seconds", "0.3", "--lease-seconds", "5"]
    words = [*options, "--pretrain", training, "--evaluate", f"knn --train {shlex.quote(str(data))} -k 5"]
    with _driver(words, cache, log) as process:
        assert process.wait(SECONDS) == 1
    text = log.read_text()
    assert f"job {run_name(str(run))}-pretrain has failed; its logs are in {run}/driver/logs/" in text
    assert "knn-1: blocked, pretrain has failed" in text
    assert "run again with --retry" in text
    with _driver(words, cache, log) as process:  # the failure is remembered
        assert process.wait(SECONDS) == 1
    assert len(list((run / "driver" / "intents").glob("*.json"))) == 1
    Path(nothing).symlink_to(data)
    assert main([*options, "--status"]) == 0
    assert "failed" in capfd.readouterr().out
    words[words.index(training)] = training + " optim.epochs=1"
    with _driver(words, cache, log) as process:
        assert process.wait(SECONDS) == 64
    assert "give the same words" in log.read_text()
    with _driver([*words, "--retry"], cache, log) as process:
        assert process.wait(SECONDS) == 0, log.read_text()
    assert main([*options, "--status"]) == 0
    (pretrain,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("pretrain"))
    assert pretrain.split()[1] == "done"
    assert "pretrain-a2" in pretrain
