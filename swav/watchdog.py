"""Ends a process that stands still and shows where it stood; tells the launcher how far a run has come.

The timer is faulthandler's thread in C, which needs no GIL: a process that is stuck in C, holding it, ends as well.
"""

import faulthandler
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swav.program import LAUNCHER_FOLDER

_STEP = struct.Struct("<q")
_PROGRESS = "progress-"
_STANDARD_ERROR = 2  # the descriptor: it is written to by C

# A process has one such timer and one report; there is nothing to hold them apart from the module.
_seconds = 0.0
_report = -1


@contextmanager
def ends_when_stalled(seconds: float) -> Iterator[None]:
    """End this process, with status 1 and every thread's stack, where the block is this long without :func:`progress`.

    Within the block, SIGUSR1 shows the stacks and ends nothing.

    Args:
        seconds: without progress; 0 to wait for ever.
    """
    global _seconds, _report
    _seconds = seconds
    faulthandler.register(signal.SIGUSR1, file=_STANDARD_ERROR, all_threads=True)
    folder = os.environ.get(LAUNCHER_FOLDER)
    if folder is not None:
        name = _PROGRESS + os.environ.get("LOCAL_RANK", "0")
        _report = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        progress()
        yield
    finally:
        _seconds = 0.0
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        if _report >= 0:
            os.close(_report)
            _report = -1


def progress(step: int | None = None) -> None:
    """Say that work goes on, at least once per ``seconds``; does nothing outside :func:`ends_when_stalled`.

    Args:
        step: of the whole run, if one is done: the launcher restarts a run that fails only while it gets further.
    """
    if _seconds > 0:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=_STANDARD_ERROR)
    if step is not None and _report >= 0:
        os.pwrite(_report, _STEP.pack(step), 0)


def last_step(folder: Path) -> int:
    """The last step that a worker of the launcher with this folder has reported; -1 where none has."""
    reports = [path.read_bytes() for path in folder.glob(_PROGRESS + "*")]
    return max((_STEP.unpack(report)[0] for report in reports if len(report) == _STEP.size), default=-1)
