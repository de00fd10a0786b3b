"""Two pods of the pretrain image as TorchX renders them: killed, cut off, joined; data and run in an S3 server."""

import subprocess
import sys
from pathlib import Path

import pytest
from swav_testing.containers import Engine
from swav_testing.gated import delivered
from swav_testing.partition import why_not
from swav_testing.pods import DATA, OUTPUT, cluster, disturb, render, table
from swav_testing.runs import ROOT, STEPS_PER_EPOCH, TINY, arguments, environment, losses

# Enough for all that happens on the way; what is left of them is quick.
EPOCHS = 30
NUM_IMAGES = 103
SETTINGS = (f"optim.epochs={EPOCHS}", "evaluate=null", "runtime.checkpoint_every_steps=5")
COLLECTIVE_TIMEOUT = "runtime.collective_timeout_seconds=15"
RENDEZVOUS = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10"


@pytest.mark.timeout(1200)
def test_two_pods_are_killed_cut_off_and_joined_and_take_every_image_once(
    docker: Engine, images: dict[str, str], data: Path, cache: Path, tmp_path: Path
) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    gate = tmp_path / "swav-gate"
    gate.mkdir()
    gate.chmod(0o777)  # the containers' user is another
    data.chmod(0o755)
    overrides = [*TINY, *SETTINGS, COLLECTIVE_TIMEOUT]
    words = ["swav.pretrain", "--recipe", "demo", "--data", DATA, "--output", OUTPUT, "-j", "1:2x1", *overrides]
    job = render(docker, images["launcher"], *words)
    # Besides what a pod has: shorter times, float64, in which one and two ranks compute the same, and the notes.
    variables = {
        "PET_RDZV_CONF": RENDEZVOUS,
        "PRECISION": "double",
        "GATE": "/gate",
        "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH),
        "OMP_NUM_THREADS": "1",
    }
    with cluster(docker, images["pretrain"], job, data, gate, variables) as made:
        times = disturb(made, deadline_seconds=300)
        found = made.metrics()
    print(table(times))  # noqa: T201

    batches = delivered(gate)
    assert [*batches] == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS_PER_EPOCH)]
    for epoch in range(EPOCHS):
        ids = [number for step in range(STEPS_PER_EPOCH) for number in batches[epoch, step]]
        assert sorted(ids) == list(range(NUM_IMAGES))
    books = [event for event in found if event.get("event") == "epoch"]
    assert [(event["epoch"], event["images"] + event["quarantined"]) for event in books] == [
        (epoch, NUM_IMAGES) for epoch in range(EPOCHS)
    ]

    reference = _undisturbed(data, cache, tmp_path)
    steps = {event["step"]: event["loss"] for event in found if "loss" in event}
    assert steps.keys() == reference.keys()
    assert max(abs(steps[step] - reference[step]) for step in steps) < 1e-6  # sums in another order, in float64


def _undisturbed(data: Path, cache: Path, folder: Path) -> dict[int, float]:
    """The losses of the same run in one process here."""
    (folder / "gate").mkdir()
    words = ["-m", "swav_testing.gated", *arguments(data, folder / "run", *SETTINGS)]
    variables = {"GATE": str(folder / "gate"), "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH), "PRECISION": "double"}
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(cache) | variables, check=True, capture_output=True
    )
    return losses(folder / "run")
