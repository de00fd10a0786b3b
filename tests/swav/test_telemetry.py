"""Runs that are scraped and probed while they run, as in a pod."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
from swav_testing.agents import agents
from swav_testing.gated import allow
from swav_testing.runs import (
    DEADLINE_SECONDS,
    NUM_STEPS,
    ROWS_PER_SHARD,
    STEPS_PER_EPOCH,
    arguments,
    children,
    environment,
    losses,
)
from swav_testing.scrape import get, health, metrics, wait_for_health, wait_for_metrics, wait_for_port

from swav import telemetry
from swav.storage import count as count_storage

ROOT = Path(__file__).parents[2]
OF_THE_RUN = {"swav_step", "swav_epoch", "swav_loss", "swav_learning_rate", "swav_images_per_second"}
OF_THE_RUN |= {"swav_step_seconds", "swav_data_wait_fraction", "swav_checkpoint_age_seconds"}
OF_A_POD = {"swav_world_size", "swav_progress_age_seconds", "swav_restarts_total", "swav_goodput_ratio"}
OF_A_POD |= {"swav_build_info", "swav_images_total", "swav_quarantined_total"}
OF_A_POD |= {"swav_storage_retries_total", "swav_storage_hedges_total", "swav_storage_bytes_total"}


def gate_in(tmp_path: Path, step: int) -> dict[str, str]:
    """The environment of a run whose steps up to one may begin."""
    gate = tmp_path / "gate"
    gate.mkdir()
    allow(gate, step)
    return {"GATE": str(gate), "STEPS_PER_EPOCH": str(STEPS_PER_EPOCH), "SWAV_METRICS_PORT": "0"}


def test_a_run_by_itself_is_scraped_while_it_runs(tmp_path: Path, cache: Path, data: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    words = [sys.executable, "-m", "swav_testing.gated", *arguments(data, output)]
    settings = environment(cache) | gate_in(tmp_path, 4) | {"SWAV_IMAGE": "swav-pretrain@sha256:0"}
    with log.open("wb") as file, subprocess.Popen(words, cwd=ROOT, env=settings, stdout=file, stderr=file) as process:
        port = wait_for_port(log)
        found = wait_for_metrics(port, lambda found: "swav_loss" in found and found["swav_step"] == 4)[-1]
        assert found.keys() == OF_THE_RUN | OF_A_POD
        assert found["swav_loss"] == losses(output)[4]
        assert found["swav_images_total"] == 88  # 24 + 24 + 24 + 16
        assert (found["swav_epoch"], found["swav_world_size"], found["swav_restarts_total"]) == (0, 1, 0)
        assert 0 < found["swav_goodput_ratio"] <= 1
        assert 0 <= found["swav_data_wait_fraction"] <= 1
        assert min(found["swav_images_per_second"], found["swav_step_seconds"], found["swav_learning_rate"]) > 0
        assert 'image="swav-pretrain@sha256:0"' in get(port, "/metrics")[1]
        status, why = health(port)
        assert (status, why["status"]) == (200, "running")
        assert metrics(port)["swav_progress_age_seconds"] >= found["swav_progress_age_seconds"]
        allow(tmp_path / "gate", NUM_STEPS)
        assert process.wait(DEADLINE_SECONDS) == 0, log.read_text()
    with pytest.raises(urllib.error.URLError):
        health(port)


def test_a_killed_rank_leaves_counters_and_takes_its_gauges(tmp_path: Path, cache: Path, data: Path) -> None:
    output = tmp_path / "run"
    folders = tmp_path / "tmp"
    folders.mkdir()
    words = ["-m", "swav_testing.gated", *arguments(data, output, "runtime.collective_timeout_seconds=60")]
    settings = gate_in(tmp_path, 4) | {"TMPDIR": str(folders)}
    with agents(tmp_path / "agents", cache, words, ranks_per_node=2, environment=settings) as started:
        process = started.start()
        port = wait_for_port(started.log(0))
        scrapes = wait_for_metrics(port, lambda found: "swav_loss" in found and found["swav_step"] == 4)
        assert scrapes[-1].keys() == OF_THE_RUN | OF_A_POD
        assert (scrapes[-1]["swav_world_size"], scrapes[-1]["swav_images_total"]) == (2, 88)
        files = sorted(path.name for path in folders.glob("swav-elastic-*/metrics/*"))
        assert files == [f"{kind}_{rank}.db" for kind in ("counter", "gauge_livemostrecent") for rank in (0, 1)]
        os.kill(children(process.pid)[0], signal.SIGKILL)
        between = wait_for_metrics(port, lambda found: found["swav_restarts_total"] == 1)
        assert OF_THE_RUN.isdisjoint(between[-1])  # they were the dead rank's, and starting another takes a while
        assert between[-1]["swav_goodput_ratio"] < scrapes[-1]["swav_goodput_ratio"]  # step 4 is lost
        allow(tmp_path / "gate", 5)
        scrapes += between + wait_for_metrics(port, lambda found: found.get("swav_step") == 5)
        assert scrapes[-1]["swav_images_total"] == 88 + 16 + 15  # those of step 4 once more
        assert sorted(path.name for path in folders.glob("swav-elastic-*/metrics/*")) == files
    for name in [name for name in OF_A_POD if name.endswith("_total")]:
        counts = [scrape[name] for scrape in scrapes]
        assert counts == sorted(counts), name
    ratios = [scrape["swav_goodput_ratio"] for scrape in scrapes if "swav_goodput_ratio" in scrape]
    assert 0 <= min(ratios) < ratios[-1] <= max(ratios) <= 1
    assert sum(ROWS_PER_SHARD) == 88 + 15


# Says that it goes on until it is told to end.
GOING_ON = """
import sys, time
from pathlib import Path
from swav.program import end_with_launcher
from swav.watchdog import ends_when_stalled, progress
end_with_launcher()
with ends_when_stalled(0):
    while not Path(sys.argv[1]).exists():
        progress()
        time.sleep(0.02)
"""


def test_ranks_that_are_stopped_are_not_well_until_they_go_on(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(GOING_ON)
    settings = {"SWAV_METRICS_PORT": "0", "SWAV_LIVENESS_SECONDS": "2"}
    words = [str(script), str(tmp_path / "end")]
    with agents(tmp_path / "agents", cache, words, ranks_per_node=2, environment=settings) as started:
        process = started.start()
        port = wait_for_port(started.log(0))
        wait_for_metrics(port, lambda found: found["swav_world_size"] == 2)
        wait_for_health(port, 200)
        first, second = children(process.pid)
        os.kill(first, signal.SIGSTOP)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:  # the other one goes on
            time.sleep(0.2)
        assert wait_for_health(port, 200)["status"] == "running"
        os.kill(second, signal.SIGSTOP)
        why = wait_for_health(port, 503)
        assert why["status"] == "stalled"
        assert "SWAV_LIVENESS_SECONDS=2" in why["reason"]
        assert metrics(port)["swav_progress_age_seconds"] > 2
        for rank in (first, second):
            os.kill(rank, signal.SIGCONT)
        wait_for_health(port, 200)
        (tmp_path / "end").touch()
        assert started.statuses() == [0], started.printed()


def test_a_launcher_that_waits_for_other_nodes_is_well(tmp_path: Path, cache: Path) -> None:
    settings = {"SWAV_METRICS_PORT": "0", "SWAV_LIVENESS_SECONDS": "0.2"}
    with agents(tmp_path / "agents", cache, ["none.py"], nodes="2", environment=settings) as started:
        process = started.start()
        port = wait_for_port(started.log(0))
        wait_for_metrics(port, lambda found: found["swav_world_size"] == 0)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (why := health(port))[1]["seconds_since_progress"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert why[0] == 200
        assert "waiting for the " in why[1]["reason"]
        assert metrics(port)["swav_progress_age_seconds"] >= 1
        process.kill()


def test_a_port_that_is_taken_ends_no_run(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("from swav import telemetry\nwith telemetry.reporting():\n    telemetry.count('images', 3)\n")
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        settings = {"SWAV_METRICS_PORT": str(port)}
        with agents(tmp_path / "agents", cache, [str(script)], ranks_per_node=2, environment=settings) as started:
            started.start()
            assert started.statuses() == [0], started.printed()
            assert started.printed().count(f"port {port} cannot be served") == 1


def test_nothing_is_served_or_loaded_where_nobody_asks() -> None:
    code = (
        "import sys, swav.pretrain\n"
        "with swav.telemetry.reporting():\n    swav.telemetry.count('images'); swav.telemetry.begin_training(0)\n"
        "sys.exit('prometheus_client' in sys.modules)"
    )
    settings = {name: value for name, value in os.environ.items() if name != "SWAV_METRICS_PORT"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, check=True)


def test_only_the_first_rank_shows_and_storage_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SWAV_METRICS_PORT", "0")
    monkeypatch.setenv("RANK", "1")
    with telemetry.reporting():
        port = int(caplog.records[-1].getMessage().rpartition(" ")[2])
        telemetry.show(loss=3.0)
        count_storage("retries", 2)
        count_storage("bytes_received", 1000)
        count_storage("requests")
        found = metrics(port)
        assert "swav_loss" not in found
        assert (found["swav_storage_retries_total"], found["swav_storage_bytes_total"]) == (2, 1000)
        monkeypatch.setenv("RANK", "0")
        telemetry.show(loss=3.0, assign_epoch=2, labels_age_seconds=time.monotonic())
        found = metrics(port)
        assert (found["swav_loss"], found["swav_assign_epoch"]) == (3.0, 2)
        assert 0 <= found["swav_labels_age_seconds"] < 600
    count_storage("retries")  # nobody listens


def test_other_local_ranks_of_a_plain_torchrun_serve_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SWAV_METRICS_PORT", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with telemetry.reporting():
        telemetry.count("images")
    assert caplog.records == []


def test_telling_costs_little(tmp_path: Path) -> None:
    code = """
import os, sys, time
os.environ |= {"SWAV_LAUNCHER_FOLDER": sys.argv[1], "PROMETHEUS_MULTIPROC_DIR": sys.argv[1], "SWAV_METRICS_PORT": "0"}
from swav import telemetry
with telemetry.reporting():
    telemetry.begin_training(0)
    start = time.monotonic()
    for step in range(5000):
        telemetry.step_done(step, epoch=0, num_images=24, seconds=0.1)
    print(f"{1e6 * (time.monotonic() - start) / 5000:.1f}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    print(f"{done.stdout.strip()} us per step")  # noqa: T201
    assert float(done.stdout) < 10_000  # generous, as machines are shared
