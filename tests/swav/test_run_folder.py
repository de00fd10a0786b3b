import json
import subprocess
import sys
from pathlib import Path

import pytest

from swav.run_folder import sole_writer

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from swav.run_folder import sole_writer
with sole_writer(sys.argv[1], wait_seconds=0):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(output: Path, seconds: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", HOLD, str(output), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    process = holder(tmp_path / "run", 600)
    with pytest.raises(RuntimeError, match=f"being written by another run, process {process.pid} on"):  # noqa: SIM117
        with sole_writer(tmp_path / "run", wait_seconds=600):
            pass
    with sole_writer(tmp_path / "another", wait_seconds=0):
        process.kill()
    process.wait()
    with sole_writer(tmp_path / "run", wait_seconds=0):  # a killed process holds nothing
        assert (tmp_path / "run" / ".lock").exists()
    assert list((tmp_path / "run").iterdir()) == []
    process.communicate()


def test_a_launched_run_waits_for_the_ranks_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    process = holder(tmp_path, 1)
    with sole_writer(tmp_path, wait_seconds=60):
        assert process.wait() == 0
        assert json.loads((tmp_path / ".lock").read_text())["launch"] == "this"
    process.communicate()


def test_a_launched_run_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    process = holder(tmp_path, 600)
    with pytest.raises(RuntimeError, match="or give another --output"), sole_writer(tmp_path, wait_seconds=0.5):
        pass
    process.kill()
    process.communicate()


def test_an_object_store_is_not_locked() -> None:
    with sole_writer("s3://bucket/run", wait_seconds=0), sole_writer("s3://bucket/run", wait_seconds=0):
        pass
