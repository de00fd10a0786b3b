"""The preflight as a process that is asked to stop."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from swav_testing.runs import DEADLINE_SECONDS, ROOT, environment
from swav_testing.s3 import moto_server


def start(place: Path, output: str, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    sizes = ",".join(["2"] * 200)  # long enough to be stopped in the midst of it
    words = ["--output", output, "--object-mb", sizes, "--streams", "2", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "swav.doctor", *words], cwd=ROOT, env=environment(place / "cache") | variables
    )


def stop_when(process: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> int:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for signum in (signal.SIGTERM, signal.SIGINT):  # as a launcher sends one after the other
        process.send_signal(signum)
    try:
        return process.wait(DEADLINE_SECONDS)
    finally:
        process.kill()


def test_a_stop_leaves_no_object_in_a_bucket(tmp_path: Path) -> None:
    with moto_server() as server:
        server.make_bucket("bucket")
        process = start(tmp_path, "s3://bucket/run", server.env)
        assert stop_when(process, lambda: len(server.keys("bucket")) > 3) == 75
        assert server.keys("bucket") == []


def test_a_stop_leaves_no_file_in_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(tmp_path, str(output), {})
    assert stop_when(process, lambda: output.is_dir() and len(list(output.iterdir())) > 3) == 75
    assert list(output.iterdir()) == []
