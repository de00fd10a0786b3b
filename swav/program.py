"""How every command of ours ends: its exit status, and what it says of an error."""

import ctypes
import hashlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

EXIT_FAILED = 1  # something in the world went wrong: mend it, and the same command goes on
EXIT_REFUSED = 64  # the command is wrong: another try will not help
EXIT_FUTILE = 70  # so do others, again and again: a person has to look (swav.elastic alone ends so)
EXIT_STOPPED = 75  # stopped on request, state saved: run again (not 0, which would tell torchrun that all is done)

USAGE_ERROR = 2  # what argparse ends with; a program of ours ends with EXIT_REFUSED instead where run() sees it

# What swav.elastic tells the workers of its host: its process, and a folder that they share with it.
LAUNCHER_PID = "SWAV_LAUNCHER_PID"
LAUNCHER_FOLDER = "SWAV_LAUNCHER_FOLDER"
SAID = "said-"  # files of that folder: messages of errors, each of which one rank is to print

_PR_SET_PDEATHSIG = 1

_logger = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  (a request that was met, not an error)
    """The program was asked to stop and has saved its state; the same command takes it up again."""


def run(body: Callable[[], None]) -> int:
    """Run a program's body.

    An error that a line of ours raised says all in its message; one from below is told with its place. Of the ranks
    of a host that :mod:`swav.elastic` started, one says what several would.

    Returns:
        The exit status.
    """
    try:
        end_with_launcher()
        body()
    except Stopped as stopped:
        _logger.info("%s; run the same command to go on", stopped)
        return EXIT_STOPPED
    except (ValueError, RuntimeError, OSError) as error:
        told_with_its_place = not _raised_here(error)
        if told_with_its_place or _is_first_to_say(str(error)):
            _logger.error("error: %s", error, exc_info=told_with_its_place)
        return EXIT_REFUSED if isinstance(error, ValueError) else EXIT_FAILED
    except SystemExit as ended:
        return status_of(ended)
    return 0


def status_of(ended: SystemExit) -> int:
    """The exit status for argparse's end of a program: 0 after ``--help``, refused after a wrong command line."""
    return EXIT_REFUSED if ended.code == USAGE_ERROR else int(ended.code or 0)


@contextmanager
def stop_at_once(what: str) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the block by :class:`Stopped`: for work that has nothing to save.

    Args:
        what: was stopped, for the message.
    """

    def stop(_signum: int, _frame: FrameType | None) -> None:
        raise Stopped(what)

    previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@dataclass(slots=True)
class StopFlag:
    """Whether this process has been asked to stop."""

    is_set: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGTERM or SIGINT into a flag that the loop reads between steps; a second one acts at once."""
    flag = StopFlag()

    def request(signum: int, _frame: FrameType | None) -> None:
        flag.is_set = True
        signal.signal(signum, previous[signal.Signals(signum)])

    previous = {signum: signal.signal(signum, request) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when the launcher that started it dies, however it dies.

    Ranks without an agent would go on alone, or wait for peers that have been started anew.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def _is_first_to_say(message: str) -> bool:
    """Whether no other rank of this host has said it; always so without a launcher of ours."""
    folder = os.environ.get(LAUNCHER_FOLDER)
    if folder is None:
        return True
    try:
        Path(folder, SAID + hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher is gone
        return True
    return True


def _raised_here(error: BaseException) -> bool:
    """Whether an error was raised by a line of this project, not of one below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    module = trace.tb_frame.f_globals
    spec = module.get("__spec__")  # of what ``python -m`` runs, too, whose __name__ is "__main__"
    return str(spec.name if spec is not None else module.get("__name__")).startswith("swav")
