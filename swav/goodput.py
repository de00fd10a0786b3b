"""Which seconds of a launcher's life went into steps that counted: the books of its ranks, one file for each.

A rank adds up the time of its steps, and notes the sum at each checkpoint. A later life of the rank that resumes at a
step goes on from the sum of that step, so what was lost and is repeated counts once. While no rank runs, what counts is
what the last checkpoint has.
"""

import logging
import os
import struct
from pathlib import Path

from swav.program import LAUNCHER_FOLDER

_ENTRY = struct.Struct("<qd")  # a step of the run, seconds in steps up to it
_BOOK = "kept-"

_logger = logging.getLogger(__name__)


class StepBook:
    """The book of one rank: the present sum, then the sums at checkpoints, in ascending order.

    A full disk ends the book, not the run.
    """

    def __init__(self, step: int) -> None:
        """Open the book, in the launcher's folder where there is one.

        Args:
            step: that the rank resumes at.
        """
        self._file = -1
        self.seconds = 0.0
        folder = os.environ.get(LAUNCHER_FOLDER)
        if folder is None:
            return
        path = Path(folder, _BOOK + os.environ.get("LOCAL_RANK", "0"))
        kept = [entry for entry in _entries(path)[1:] if entry[0] <= step]
        self.seconds = kept[-1][1] if kept else 0.0
        try:
            _replace(path, [(step, self.seconds), *kept])
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, seconds: float) -> None:
        """Count a step that is done."""
        self.seconds += seconds
        self._write(step, 0)

    def keep(self, step: int) -> None:
        """Note that the state after this step is being saved."""
        if self._file >= 0:
            self._write(step, os.fstat(self._file).st_size)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, step: int, offset: int) -> None:
        if self._file < 0:
            return
        try:
            os.pwrite(self._file, _ENTRY.pack(step, self.seconds), offset)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _logger.warning("goodput is not known from here on: %s; training goes on", error)
        self.close()


def settle(folder: Path) -> None:
    """Forget what came after the last checkpoint; no rank of the launcher with this folder runs."""
    for path in folder.glob(_BOOK + "*"):
        entries = _entries(path)
        _replace(path, [entries[-1] if len(entries) > 1 else (0, 0.0), *entries[1:]])


def kept_seconds(folder: Path) -> float | None:
    """Seconds in steps that count, by the book of the rank that has most; None before any rank has begun to train."""
    firsts = [path.read_bytes()[: _ENTRY.size] for path in folder.glob(_BOOK + "*")]
    return max((_ENTRY.unpack(first)[1] for first in firsts if len(first) == _ENTRY.size), default=None)


def _entries(path: Path) -> list[tuple[int, float]]:
    data = path.read_bytes() if path.exists() else b""
    return list(_ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]))


def _replace(path: Path, entries: list[tuple[int, float]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(b"".join(_ENTRY.pack(*entry) for entry in entries))
    partial.replace(path)
