"""One run of many lives: ranks, agents and nodes are killed at random times, and nothing of it shows in the end."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swav_testing.agents import Agents, agents, kill_agent
from swav_testing.gated import allow, delivered
from swav_testing.runs import QUEUE, arguments, children, events, last_step, losses, write_scenes

NUM_KILLS = int(os.environ.get("SWAV_TEST_KILLS", "15"))  # each takes about 16 s
NUM_KILLS_OF_ONE_WORLD = 8
MIN_NODES, MAX_NODES = 2, 3
EPOCHS, STEPS_PER_EPOCH = 3, 22
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
ROWS_PER_SHARD = (61, 44, 71)  # 176 images in batches of 8
SETTINGS = (
    QUEUE,
    "optim.global_batch=8",
    f"optim.epochs={EPOCHS}",
    "data.lanes=8",
    "runtime.checkpoint_every_steps=1",
    "runtime.collective_timeout_seconds=20",
    "evaluate=null",
)
KINDS = ("rank", "agent", "node")
DEADLINE_SECONDS = 900
LATECOMERS_SECONDS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"), ROWS_PER_SHARD)


@contextlib.contextmanager
def run(tmp_path: Path, cache: Path, data: Path, *, nodes: str, ranks_per_node: int, double: bool) -> Iterator[Agents]:
    """Agents of a run in ``tmp_path/run``."""
    gate = tmp_path / "gate"
    gate.mkdir(parents=True)
    environment = {"GATE": str(gate), "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH)}
    if double:
        environment["PRECISION"] = "double"
    words = ["-m", "swav_testing.gated", *arguments(data, tmp_path / "run", *SETTINGS)]
    # Restarts without progress are the point here: many kills find a run that has just been started.
    options = (f"--max-futile-restarts={NUM_KILLS}",)
    with agents(
        tmp_path / "agents",
        cache,
        words,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        options=options,
        environment=environment,
    ) as started:
        yield started


class Supervisor:
    """Starts again the agents that end before the run does, as Kubernetes would, at once or when there is a node."""

    def __init__(self, started: Agents, output: Path, num_nodes: int) -> None:
        self._agents = started
        self._output = output
        self._nodes: list[subprocess.Popen[bytes]] = [started.start() for _ in range(num_nodes)]
        self._missing: dict[int, int] = {}  # nodes of which there is none until the run has taken a step
        self._since = time.monotonic()

    def look(self) -> bool:
        """Start again what has failed; whether the run is over."""
        assert time.monotonic() - self._since < DEADLINE_SECONDS, self._agents.printed()[-20_000:]
        if any(process.poll() == 0 for process in self._nodes):
            return True
        step = last_step(self._output)
        self._missing = {number: until for number, until in self._missing.items() if step < until}
        for number, process in enumerate(self._nodes):
            if process.poll() is not None and number not in self._missing:
                self._nodes[number] = self._agents.start()
        return False

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kill a rank, an agent or both at once; False where there is none at this moment."""
        number = draw.randrange(len(self._nodes))
        node = self._nodes[number]
        if node.poll() is not None:
            return False
        if kind == "node":
            kill_agent(node)
            if len(self._nodes) > MIN_NODES and not self._missing:
                self._missing[number] = last_step(self._output) + 1
            return True
        victims = [node.pid] if kind == "agent" else children(node.pid)
        if not victims:
            return False
        try:
            os.kill(draw.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def kill_at_random_times(started: Agents, output: Path, gate: Path, num_nodes: int, num_kills: int) -> None:
    """Carry a run to its end, killing something again and again; the gate keeps it from ending before the last kill."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    draw = random.Random(seed)
    allow(gate, 1)
    supervisor = Supervisor(started, output, num_nodes)
    since = time.monotonic()
    for number in range(num_kills):
        # Most kills come while steps are taken, some while the run is being started again after the one before.
        goal = number * (NUM_STEPS - 2) // num_kills + 1
        allow(gate, goal + 1)
        while number % 5 and last_step(output) < goal:
            supervisor.look()
            time.sleep(0.05)
        wait = time.monotonic() + draw.uniform(0, 1.5)
        while time.monotonic() < wait or not supervisor.kill(draw.choice(KINDS), draw):
            assert not supervisor.look(), "the run ended before the last kill"
            time.sleep(0.01)
    print(f"{num_kills} kills in {time.monotonic() - since:.0f} s")  # noqa: T201
    allow(gate, NUM_STEPS)
    while not supervisor.look():
        time.sleep(0.05)
    take_away_latecomers(started)
    started.statuses()


def take_away_latecomers(started: Agents) -> None:
    """End agents that were started when the run was nearly over, as a cluster does with the pods of a job that is done.

    They would wait for others to go on with.
    """
    deadline = time.monotonic() + LATECOMERS_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in started.started):
        time.sleep(0.05)
    for process in started.started:
        if process.poll() is None:
            process.terminate()


def check_samples(gate: Path) -> None:
    """Every image once per epoch, counting the last time that a step was taken."""
    batches = delivered(gate)
    assert len(batches) == NUM_STEPS
    for epoch in range(EPOCHS):
        ids = [sample_id for key, batch in batches.items() if key[0] == epoch for sample_id in batch]
        assert sorted(ids) == list(range(sum(ROWS_PER_SHARD)))


def state(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "backbone.pt", weights_only=True)["state_dict"]


@pytest.mark.timeout(DEADLINE_SECONDS + 300)
def test_a_run_that_is_killed_many_times_in_changing_worlds(tmp_path: Path, cache: Path, data: Path) -> None:
    with run(tmp_path / "reference", cache, data, nodes="1", ranks_per_node=1, double=True) as started:
        started.start()
        assert started.statuses() == [0], started.printed()
    nodes = f"{MIN_NODES}:{MAX_NODES}"
    with run(tmp_path / "killed", cache, data, nodes=nodes, ranks_per_node=1, double=True) as started:
        output, gate = tmp_path / "killed" / "run", tmp_path / "killed" / "gate"
        kill_at_random_times(started, output, gate, MAX_NODES, NUM_KILLS)
    reference = tmp_path / "reference" / "run"
    check_samples(gate)
    assert delivered(gate) == delivered(tmp_path / "reference" / "gate")
    worlds = [event["world_size"] for event in events(output) if event.get("event") == "start"]
    print(f"worlds {worlds}")  # noqa: T201
    assert set(worlds) == {MIN_NODES, MAX_NODES}
    assert losses(output) == pytest.approx(losses(reference), rel=1e-7)
    books = [[event for event in events(folder) if event.get("event") == "epoch"] for folder in (output, reference)]
    assert books[0] == books[1]
    found = state(output)
    for name, tensor in state(reference).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.timeout(DEADLINE_SECONDS + 300)
def test_a_run_that_is_killed_in_one_world_is_bitwise_the_same(tmp_path: Path, cache: Path, data: Path) -> None:
    with run(tmp_path / "reference", cache, data, nodes="1", ranks_per_node=2, double=False) as started:
        started.start()
        assert started.statuses() == [0], started.printed()
    with run(tmp_path / "killed", cache, data, nodes="1", ranks_per_node=2, double=False) as started:
        output, gate = tmp_path / "killed" / "run", tmp_path / "killed" / "gate"
        kill_at_random_times(started, output, gate, 1, NUM_KILLS_OF_ONE_WORLD)
    reference = tmp_path / "reference" / "run"
    check_samples(gate)
    assert losses(output) == losses(reference)
    expected, found = state(reference), state(output)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
