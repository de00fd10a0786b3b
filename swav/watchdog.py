"""Ends a process that stands still and shows where it stood; tells the launcher how far a run has come.

The timer is faulthandler's thread in C, which needs no GIL: a process that is stuck in C, holding it, ends as well.
"""

import faulthandler
import math
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swav.program import LAUNCHER_FOLDER

_REPORT = struct.Struct("<qd")  # a step, and a time of the monotonic clock, which a host's processes share
_TIME = struct.Struct("<d")
_PROGRESS = "progress-"
_STANDARD_ERROR = 2  # the descriptor: it is written to by C

# A process has one such timer and one report; there is nothing to hold them apart from the module.
_seconds = 0.0
_report = -1
_progress_at = -math.inf


@contextmanager
def ends_when_stalled(seconds: float) -> Iterator[None]:
    """End this process, with status 1 and every thread's stack, where the block is this long without :func:`progress`.

    Within the block, SIGUSR1 shows the stacks and ends nothing.

    Args:
        seconds: without progress; 0 to wait for ever.
    """
    global _seconds
    _seconds = seconds
    faulthandler.register(signal.SIGUSR1, file=_STANDARD_ERROR, all_threads=True)
    with tells_launcher():
        try:
            progress()
            yield
        finally:
            _seconds = 0.0
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR1)


@contextmanager
def tells_launcher() -> Iterator[None]:
    """Within the block, :func:`progress` reaches the launcher, if one of ours has started this process."""
    global _report
    folder = os.environ.get(LAUNCHER_FOLDER)
    if folder is None or _report >= 0:
        yield
        return
    name = _PROGRESS + os.environ.get("LOCAL_RANK", "0")
    _report = os.open(Path(folder, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        if os.fstat(_report).st_size < _REPORT.size:
            os.pwrite(_report, _REPORT.pack(-1, time.monotonic()), 0)
        yield
    finally:
        os.close(_report)
        _report = -1


def progress(step: int | None = None) -> None:
    """Say that work goes on, at least once per ``seconds`` of :func:`ends_when_stalled`.

    Args:
        step: of the whole run, if one is done: the launcher restarts a run that fails only while it gets further.
    """
    global _progress_at
    if _seconds > 0:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=_STANDARD_ERROR)
    _progress_at = time.monotonic()
    if _report < 0:
        return
    if step is None:
        os.pwrite(_report, _TIME.pack(_progress_at), _REPORT.size - _TIME.size)
    else:
        os.pwrite(_report, _REPORT.pack(step, _progress_at), 0)


def last_progress() -> float:
    """When this process last said :func:`progress`, by the monotonic clock; minus infinity where it never has."""
    return _progress_at


def last_step(folder: Path) -> int:
    """The last step that a worker of the launcher with this folder has reported; -1 where none has."""
    return max((step for step, _ in _reports(folder)), default=-1)


def last_progress_in(folder: Path) -> float:
    """When a worker of the launcher with this folder last said :func:`progress`, as :func:`last_progress`."""
    return max((at for _, at in _reports(folder)), default=-math.inf)


def _reports(folder: Path) -> list[tuple[int, float]]:
    reports = [path.read_bytes() for path in folder.glob(_PROGRESS + "*")]
    return [_REPORT.unpack(report) for report in reports if len(report) == _REPORT.size]
