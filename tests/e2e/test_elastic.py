"""Ranks that crash, stall or are refused, nodes that come and go: the run goes on, or ends for good."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swav_testing.agents import Agents, agents, kill_agent
from swav_testing.gated import allow, delivered
from swav_testing.ranks import run_ranks
from swav_testing.runs import (
    DEADLINE_SECONDS,
    NUM_STEPS,
    QUEUE,
    ROWS_PER_SHARD,
    STEPS_PER_EPOCH,
    arguments,
    assert_same_run,
    children,
    command_line,
    events,
    finish,
    last_step,
    losses,
    recorded_run,
    wait_for_step,
)

from swav.checkpoint import checkpoint_steps
from swav.program import EXIT_FAILED, EXIT_FUTILE, EXIT_REFUSED, EXIT_STOPPED

SHORT = "runtime.collective_timeout_seconds=15"
NEVER = "runtime.checkpoint_every_steps=1000"


def gated(tmp_path: Path, cache: Path, data: Path, *overrides: str, **settings: Any) -> Any:
    """Agents of a run in ``tmp_path/run`` whose steps wait to be let through."""
    gate = tmp_path / "gate"
    gate.mkdir()
    environment = {"GATE": str(gate), "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH)}
    words = ["-m", "swav_testing.gated", *arguments(data, tmp_path / "run", *overrides)]
    return agents(tmp_path / "agents", cache, words, environment=environment, **settings)


def wait_until(condition: Callable[[], bool], started: Agents) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, started.printed()
        time.sleep(0.02)


def wait_for(started: Agents, output: Path, step: int) -> None:
    wait_until(lambda: last_step(output) >= step, started)


def worlds(output: Path) -> list[int]:
    """Ranks of each start that is not undone."""
    return [event["world_size"] for event in events(output) if event.get("event") == "start"]


def steps_of_starts(output: Path) -> list[int]:
    return [event["step"] for event in events(output) if event.get("event") == "start"]


@pytest.fixture(scope="module")
def reference_of_two(tmp_path_factory: pytest.TempPathFactory, cache: Path, data: Path) -> Path:
    output = tmp_path_factory.mktemp("two") / "reference"
    run_ranks(2, recorded_run, str(data), str(output), str(cache), (QUEUE,), None)
    return output


def test_a_killed_rank_is_started_again_and_nothing_changes(
    tmp_path: Path, cache: Path, data: Path, reference_of_two: Path
) -> None:
    output = tmp_path / "run"
    allow_first = NUM_STEPS - 2
    with gated(tmp_path, cache, data, QUEUE, SHORT, ranks_per_node=2) as started:
        allow(tmp_path / "gate", allow_first)
        process = started.start()
        wait_for(started, output, allow_first)
        os.kill(random.choice(children(process.pid)), signal.SIGKILL)
        allow(tmp_path / "gate", NUM_STEPS)
        assert started.statuses() == [0], started.printed()
    assert_same_run(output, reference_of_two)


def test_a_refusal_ends_both_nodes_and_is_said_once_by_each(tmp_path: Path, cache: Path, data: Path) -> None:
    words = ["-m", "swav.pretrain", *arguments(data, tmp_path / "run", "data.lanes=1")]
    with agents(tmp_path, cache, words, nodes="2", ranks_per_node=2) as started:
        started.start()
        started.start()
        assert started.statuses() == [EXIT_REFUSED, EXIT_REFUSED]
        assert started.printed().count("error: 4 ranks are more than 1 lanes; raise data.lanes") == 2
    assert not (tmp_path / "run").exists()


def test_a_node_that_joins_costs_no_step(tmp_path: Path, cache: Path, data: Path) -> None:
    output, gate = tmp_path / "run", tmp_path / "gate"
    with gated(tmp_path, cache, data, QUEUE, NEVER, SHORT, nodes="1:2") as started:
        allow(gate, 3)
        started.start()
        wait_for(started, output, 3)
        started.start()
        wait_until(lambda: worlds(output) == [1, 2], started)
        reached = steps_of_starts(output)[1]
        assert reached >= 3  # saved when asked to stop: there are no other checkpoints
        allow(gate, NUM_STEPS)
        assert started.statuses() == [0, 0], started.printed()
    assert sorted(losses(output)) == list(range(1, NUM_STEPS + 1))
    assert worlds(output) == [1, 2]
    check_samples(gate)


def check_samples(gate: Path) -> None:
    batches = delivered(gate)
    for epoch in {key[0] for key in batches}:
        ids = [sample_id for key, batch in batches.items() if key[0] == epoch for sample_id in batch]
        assert sorted(ids) == list(range(sum(ROWS_PER_SHARD)))


@pytest.mark.parametrize("how", ["killed", "asked"])
def test_the_run_goes_on_without_a_node_that_leaves(tmp_path: Path, cache: Path, data: Path, how: str) -> None:
    output, gate = tmp_path / "run", tmp_path / "gate"
    with gated(tmp_path, cache, data, QUEUE, SHORT, nodes="1:2") as started:
        allow(gate, 4)
        started.start()
        wait_until(started.is_met, started)  # the node that stays hosts the meeting
        leaving = started.start()
        wait_for(started, output, 4)
        (before,) = set(worlds(output)) - {1}
        assert before == 2
        if how == "killed":
            kill_agent(leaving)
        else:
            leaving.send_signal(signal.SIGTERM)
        allow(gate, NUM_STEPS)
        statuses = started.statuses()
        assert statuses[0] == 0, started.printed()
        assert statuses[1] == (EXIT_STOPPED if how == "asked" else -signal.SIGKILL), started.printed()
    assert sorted(losses(output)) == list(range(1, NUM_STEPS + 1))
    assert worlds(output)[-1] == 1
    assert steps_of_starts(output)[-1] >= 3  # the last checkpoint at least
    check_samples(gate)


@pytest.mark.parametrize("signum", [signal.SIGSTOP])
def test_a_rank_that_is_stopped_is_noticed_by_its_peers(
    tmp_path: Path, cache: Path, data: Path, reference_of_two: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "run"
    with gated(tmp_path, cache, data, QUEUE, SHORT, ranks_per_node=2) as started:
        allow(tmp_path / "gate", 4)
        process = started.start()
        wait_for(started, output, 4)
        os.kill(children(process.pid)[1], signum)
        allow(tmp_path / "gate", NUM_STEPS)
        assert started.statuses() == [0], started.printed()
    assert_same_run(output, reference_of_two)


def test_a_run_that_stands_still_is_ended_with_its_stacks(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    options = ("--max-futile-restarts=1",)
    with gated(tmp_path, cache, data, "runtime.stalled_after_seconds=8", options=options) as started:
        allow(tmp_path / "gate", 4)
        started.start()
        assert started.statuses() == [EXIT_FUTILE], started.printed()
        printed = started.printed()
    assert "Timeout (0:00:08)!" in printed
    assert "gated.py" in printed
    assert "1 restarts in a row got no further (beyond step 4)" in printed
    assert last_step(output) == 4


def test_two_runs_in_one_folder(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    with gated(tmp_path, cache, data) as started:
        allow(tmp_path / "gate", 2)
        process = started.start()
        wait_for(started, output, 2)
        second = command_line("swav.pretrain", *arguments(data, output), cache=cache)
        status, _, err = finish(second)
        assert status == EXIT_FAILED
        assert f"error: {output} is being written by another run, process {children(process.pid)[0]} on" in err
        assert "Traceback" not in err
        process.send_signal(signal.SIGTERM)
        assert started.statuses() == [EXIT_STOPPED]
    assert checkpoint_steps(output / "checkpoints")[0] == max(losses(output))


def test_a_stop_in_the_last_evaluation_is_followed(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    words = arguments(data, output, "evaluate.resize_px=900", "evaluate.crop_px=900")
    process = command_line("swav.pretrain", *words, cache=cache)
    wait_for_step(output, NUM_STEPS, lambda: process.poll() is None)
    while not (output / "backbone.pt").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == EXIT_STOPPED, err
    assert not (output / "result.json").exists()
