import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swav_components.driver import tether


def _starter(command: list[str], *, pid: str = "os.getpid()") -> list[str]:
    """A process that starts a tethered command, says its number and waits."""
    code = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, {tether.__file__!r}, str({pid}), *{command!r}])\n"
        "print(child.pid, flush=True)\n"
        "sys.exit(child.wait())\n"
    )
    return [sys.executable, "-c", code]


def test_the_command_takes_its_place_and_its_status_is_the_commands() -> None:
    done = subprocess.run(_starter(["bash", "-c", "echo $$; exit 3"]), capture_output=True, text=True, timeout=120)
    pid, own = done.stdout.split()
    assert (pid, done.returncode) == (own, 3)


def test_the_command_is_asked_to_end_when_its_starter_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    script = f"trap 'echo ended > {told}; exit 0' TERM; echo started > {told}; while :; do sleep 0.1; done"
    starter = subprocess.Popen(_starter(["bash", "-c", script]), stdout=subprocess.PIPE, text=True)
    assert told.read_text() == "started\n"
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert told.read_text() == "ended\n"
    assert starter.stdout is not None
    starter.stdout.close()


def test_it_does_not_start_where_its_starter_is_gone() -> None:
    done = subprocess.run(_starter(["echo", "started"], pid="1"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert "started" not in done.stdout


def test_a_wrong_command_is_told() -> None:
    with pytest.raises(FileNotFoundError):
        tether.main([str(os.getppid()), "no-such-command-anywhere"])
