"""Trainer and assigner beside each other: whatever happens to either, labels and weights are the same."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from swav_testing.agents import agents
from swav_testing.handover import (
    EPOCHS,
    METHODS,
    Death,
    HandOver,
    assign_rank,
    died,
    hand_over,
    plan,
    settings,
    step_of,
    train_rank,
)
from swav_testing.ranks import run_ranks
from swav_testing.runs import STEPS_PER_EPOCH, events, last_step, losses, tiny_config, weights
from swav_testing.s3 import S3Server, moto_server

from swav.bank.files import read_array
from swav.config import to_json
from swav.program import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED

KINDS = sorted(METHODS)
KEPT_EPOCHS = range(EPOCHS - 3, EPOCHS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, data: Path) -> dict[str, Path]:
    """Of each method, a finished run that keeps all features and labels."""
    outputs = {}
    for kind in KINDS:
        with hand_over(tmp_path_factory.mktemp(kind), data, cache, settings(kind), assigner_options=("--keep",)) as run:
            run.carry_to_the_end()
            outputs[kind] = Path(run.output)
    return outputs


@pytest.fixture
def draw() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    return random.Random(seed)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by name, but for what a killed process was writing."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_labels(output: Path, expected: Path, epochs: range = range(EPOCHS)) -> None:
    """Bitwise the same tables, centroids and manifests, and nothing else."""
    for epoch in epochs:
        name = f"assign/{epoch:06d}"
        wanted = files(expected / name)
        assert {"manifest.json", "centroids.npy", "labels/000000.npy"} <= wanted.keys()
        assert files(output / name) == wanted, name


def assert_same_training(output: Path, expected: Path) -> None:
    """Bitwise the same losses and weights."""
    assert sorted(losses(expected)) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert losses(output) == losses(expected)
    found, wanted = weights(output), weights(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def labels_used(output: Path) -> dict[int, int]:
    """By epoch, the epoch whose labels it trained on."""
    return {event["epoch"]: event["labels_of_epoch"] for event in events(output) if event.get("event") == "labels"}


def wait_for(path: Path, run: HandOver) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, run.printed("trainer") + run.printed("assigner")
        time.sleep(0.02)


def deaths_of_trainer(draw: random.Random) -> list[Death]:
    """In the order in which their moments come, as no life repeats what an earlier one has finished."""
    write = draw.choice(["write", "written"])
    return [
        Death("progress _forward_pass", draw.randint(1, STEPS_PER_EPOCH)),
        Death(f"{write} bank/000000/*", draw.randint(1, 10)),
        Death("progress _wait_for", draw.randint(1, 2)),
        Death("progress train", draw.randint(1, STEPS_PER_EPOCH)),
        Death(f"{write} bank/000001/*", draw.randint(1, 10)),
        Death(f"{write} checkpoints/*", draw.randint(1, 4)),
        Death("progress _wait_for", draw.randint(1, 2)),
        Death("progress train", draw.randint(1, STEPS_PER_EPOCH)),
        Death(f"{write} bank/00000[34]/manifest.json"),
    ]


def deaths_of_assigner(draw: random.Random) -> list[Death]:
    write = draw.choice(["write", "written"])
    return [
        Death("progress wait_until", draw.randint(1, 3)),
        Death("progress until_stopped", draw.randint(1, 40)),
        Death(f"{write} assign/000000/state-*", draw.randint(1, 3)),
        Death(f"{write} assign/000000/labels/*", draw.randint(1, 3)),
        Death(f"{write} assign/000000/manifest.json"),
        Death("remove bank/000000/*", draw.randint(1, 10)),
        Death(f"{write} assign/000001/centroids.npy"),
        Death(f"{write} assign/00000[23]/state-*", draw.randint(1, 3)),
        Death("remove assign/000000/*", draw.randint(1, 4)),
        Death(f"{write} assign/000004/*", draw.randint(1, 6)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_killed_again_and_again_leave_what_an_undisturbed_run_leaves(
    tmp_path: Path, cache: Path, data: Path, undisturbed: dict[str, Path], draw: random.Random, kind: str
) -> None:
    planned = {"trainer": deaths_of_trainer(draw), "assigner": deaths_of_assigner(draw)}
    deaths = {program: plan(tmp_path / f"deaths-{program}", found) for program, found in planned.items()}
    with hand_over(tmp_path, data, cache, settings(kind), deaths=deaths) as run:
        run.carry_to_the_end()
    moments = {program: died(folder) for program, folder in deaths.items()}
    print(moments)  # noqa: T201
    assert len(moments["trainer"]) >= 7
    assert len(moments["assigner"]) == len(planned["assigner"])
    output = Path(run.output)
    assert_same_labels(output, undisturbed[kind], KEPT_EPOCHS)
    assert_same_training(output, undisturbed[kind])
    left = [epoch for epoch in range(EPOCHS) if files(output / f"assign/{epoch:06d}")]
    assert left == list(KEPT_EPOCHS)
    assert files(output / "bank") == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, cache: Path, undisturbed: dict[str, Path], kind: str, num_workers: int
) -> None:
    output = features_of(undisturbed[kind], tmp_path / "run")
    run_ranks(num_workers, assign_rank, str(output), str(cache))
    assert_same_labels(output, undisturbed[kind])


def features_of(run: Path, output: Path) -> Path:
    """A run's folder with its features alone."""
    for name, content in files(run).items():
        if name == "config.json" or name.startswith("bank/"):
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return output


@pytest.mark.parametrize(("kind", "num_workers"), [("deepclusterv2", 4), ("selav2", 2)])
def test_workers_killed_in_each_phase_are_started_again_and_give_the_same_bytes(
    tmp_path: Path,
    cache: Path,
    data: Path,
    undisturbed: dict[str, Path],
    draw: random.Random,
    kind: str,
    num_workers: int,
) -> None:
    output = features_of(undisturbed[kind], tmp_path / "run")
    deaths = plan(
        tmp_path / "deaths",
        [
            Death("progress until_stopped", draw.randint(1, 10), rank=num_workers - 1),
            Death("writ* assign/000000/labels/*", draw.randint(1, 6)),
        ],
    )
    options = ("--keep", "--epoch", "0")
    run = HandOver(data, str(output), cache, [], tmp_path, options, deaths={"assigner": deaths})
    words = ["-m", "swav_testing.handover", *run.words("assigner")]
    with agents(
        tmp_path / "agent", cache, words, ranks_per_node=num_workers, environment=run.variables("assigner")
    ) as started:
        started.start()
        assert started.statuses() == [0], started.printed()
    assert len(died(deaths)) == 2, started.printed()
    assert_same_labels(output, undisturbed[kind], range(1))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_that_goes_on_with_other_ranks_publishes_the_same_features(
    tmp_path: Path, cache: Path, data: Path, undisturbed: dict[str, Path], before: int, after: int
) -> None:
    gentle = settings("deepclusterv2", "optim.base_lr=0.02", "optim.epochs=2", temperature=0.5)
    with hand_over(tmp_path / "one", data, cache, gentle, assigner_options=("--keep",)) as reference:
        reference.carry_to_the_end()
    with hand_over(tmp_path / "two", data, cache, gentle, assigner_options=("--keep",)) as run:
        assigner = run.start("assigner")
        arguments = (str(data), run.output, str(cache), gentle)
        assert set(run_ranks(before, train_rank, *arguments, step_of(0, 2))) == {EXIT_STOPPED}
        stopped_at = last_step(Path(run.output))
        assert stopped_at == step_of(0, 2)
        assert set(run_ranks(after, train_rank, *arguments, None)) == {0}
        assert run.finish(assigner) == [0], run.printed("assigner")
    worlds = [event["world_size"] for event in events(Path(run.output)) if event.get("event") == "start"]
    assert worlds == [before, after]
    for epoch in (0, 1):
        found, expected = (arrays(Path(each.output) / f"bank/{epoch:06d}") for each in (run, reference))
        assert found.keys() == expected.keys()
        for name, features in expected.items():
            assert found[name].shape == features.shape
            if name.startswith("segment-"):
                np.testing.assert_allclose(found[name].astype(float), features.astype(float), atol=1e-2, err_msg=name)
    found, expected = (arrays(Path(each.output) / "assign/000001/labels") for each in (run, reference))
    agreeing = np.concatenate([(found[name] == expected[name]).reshape(-1) for name in expected])
    assert agreeing.mean() > 0.9


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_array(str(path))[0] for path in sorted(folder.glob("*.npy"))}


def test_a_trainer_without_an_assigner_says_so_and_goes_on_when_there_is_one(
    tmp_path: Path, cache: Path, data: Path, undisturbed: dict[str, Path]
) -> None:
    patient, hasty = settings("deepclusterv2"), settings("deepclusterv2", "runtime.labels_timeout_seconds=2")
    with hand_over(tmp_path, data, cache, hasty) as run:
        assert run.finish(run.start("trainer")) == [EXIT_FAILED]
        printed = run.printed("trainer")
        assert "waiting for the labels of epoch 0" in printed
        said = "no labels of epoch 0 in .* after 2 s .*python -m swav.assign --output .* run the same command again"
        assert_said(said, printed)
        run.overrides = patient
        trainer = run.start("trainer")
        while run.printed("trainer").count("waiting for the labels of epoch 0") < 2:
            time.sleep(0.02)
        asked = time.monotonic()
        trainer.terminate()
        assert run.finish(trainer) == [EXIT_STOPPED]
        assert time.monotonic() - asked < 10
        assert "stopped on request while waiting for the labels of epoch 0" in run.printed("trainer")
        run.carry_to_the_end()
    assert run.printed("trainer").count("computing features of all images") == 1
    assert "Traceback" not in run.printed("trainer")
    assert_same_training(Path(run.output), undisturbed["deepclusterv2"])
    assert_same_labels(Path(run.output), undisturbed["deepclusterv2"], KEPT_EPOCHS)


def assert_said(pattern: str, printed: str) -> None:
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(printed)


def test_an_assigner_without_a_trainer_says_so(tmp_path: Path, cache: Path, data: Path) -> None:
    with hand_over(tmp_path, data, cache, [], assigner_options=("--timeout-seconds", "2")) as run:
        assert run.finish(run.start("assigner")) == [EXIT_FAILED]
        assert_said(r"no run in .* after 2 s; see that the trainer works on this run", run.printed("assigner"))
        assert "Traceback" not in run.printed("assigner")


def test_an_assigner_is_refused_by_a_run_that_needs_none(tmp_path: Path, cache: Path, data: Path) -> None:
    with hand_over(tmp_path, data, cache, []) as run:
        Path(run.output).mkdir()
        Path(run.output, "config.json").write_text(to_json(tiny_config(data)))
        assert run.finish(run.start("assigner")) == [EXIT_REFUSED]
        assert f"error: {run.output} holds a run of swav, which needs no assigner" in run.printed("assigner")


@pytest.mark.parametrize("program", ["trainer", "assigner"])
def test_a_stop_while_waiting_loses_nothing(
    tmp_path: Path, cache: Path, data: Path, undisturbed: dict[str, Path], program: str
) -> None:
    other = {"trainer": "assigner", "assigner": "trainer"}[program]
    only_first = ("--epoch", "0") if other == "assigner" else ()
    with hand_over(tmp_path, data, cache, settings("selav2")) as run:
        beside = run.start(other, *only_first)
        waiting = run.start(program)
        if program == "trainer":
            assert run.finish(beside) == [0]
            said = "waiting for the labels of epoch 1"
        else:
            said = "waiting for features for the labels of epoch 1"
        while said not in run.printed(program):
            assert waiting.is_alive(), run.printed(program)
            time.sleep(0.02)
        waiting.terminate()
        assert run.finish(waiting) == [EXIT_STOPPED], run.printed(program)
        beside.kill()
        beside.join()
        run.carry_to_the_end()
    assert_same_training(Path(run.output), undisturbed["selav2"])
    assert_same_labels(Path(run.output), undisturbed["selav2"], KEPT_EPOCHS)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_a_bucket_is_the_run_in_a_folder(
    tmp_path: Path, data: Path, undisturbed: dict[str, Path], server: S3Server, kind: str
) -> None:
    cache, prefix = tmp_path / "cache", f"{kind}/run"
    deaths = {
        "trainer": plan(tmp_path / "deaths-trainer", [Death("progress train", 4), Death("progress _wait_for", 2)]),
        "assigner": plan(tmp_path / "deaths-assigner", [Death("write assign/000001/labels/*", 2)]),
    }
    with hand_over(
        tmp_path,
        data,
        cache,
        settings(kind),
        output=f"s3://bucket/{prefix}",
        environment=server.env,
        deaths=deaths,
    ) as run:
        run.carry_to_the_end()
    assert len(died(deaths["trainer"]) + died(deaths["assigner"])) == 3
    found = {key.removeprefix(f"{prefix}/"): key for key in server.keys("bucket", prefix)}
    for name, content in files(undisturbed[kind]).items():
        if name.startswith(tuple(f"assign/{epoch:06d}" for epoch in KEPT_EPOCHS)):
            assert server.get("bucket", found[name]) == content, name
    assert [name for name in found if name.startswith("bank/")] == []
    for name in ("backbone.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes(server.get("bucket", found[name]))
    assert_same_training(tmp_path, undisturbed[kind])
    assert list((cache / "bank").iterdir()) == []  # copies of features go when they are not needed any more


def test_labels_of_the_epoch_before_last_are_not_waited_for(tmp_path: Path, cache: Path, data: Path) -> None:
    stale = settings("deepclusterv2", stale_epochs=1)
    with hand_over(tmp_path, data, cache, stale) as run:
        output = Path(run.output)
        trainer, assigner = run.start("trainer"), run.start("assigner", "--epoch", "0")
        assert run.finish(assigner) == [0], run.printed("assigner")
        wait_for(output / "bank/000002/manifest.json", run)  # epochs 0 and 1 are trained on the first labels
        assert last_step(output) == 2 * STEPS_PER_EPOCH
        while "waiting for the labels of epoch 1" not in run.printed("trainer"):
            assert trainer.is_alive()
            time.sleep(0.02)
        os.kill(trainer.pid or 0, signal.SIGTERM)
        assert run.finish(trainer) == [EXIT_STOPPED]
        run.carry_to_the_end()
    assert labels_used(output) == {epoch: max(epoch - 1, 0) for epoch in range(EPOCHS)}
    manifest = json.loads((output / f"assign/{EPOCHS - 1:06d}/manifest.json").read_text())
    assert manifest["epoch"] == EPOCHS - 1
