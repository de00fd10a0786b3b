"""How every command of ours ends: its exit status, and what it says of an error."""

import logging
from collections.abc import Callable

EXIT_FAILED = 1  # something in the world went wrong: mend it, and the same command goes on
EXIT_REFUSED = 64  # the command is wrong: another try will not help
EXIT_STOPPED = 75  # stopped on request, state saved: run again (not 0, which would tell torchrun that all is done)

_logger = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  (a request that was met, not an error)
    """The program was asked to stop and has saved its state; the same command takes it up again."""


def run(body: Callable[[], None]) -> int:
    """Run a program's body.

    An error that a line of ours raised says all in its message; one from below is told with its place.

    Returns:
        The exit status.
    """
    try:
        body()
    except Stopped as stopped:
        _logger.info("%s; run the same command to go on", stopped)
        return EXIT_STOPPED
    except (ValueError, RuntimeError, OSError) as error:
        _logger.error("error: %s", error, exc_info=not _raised_here(error))
        return EXIT_REFUSED if isinstance(error, ValueError) else EXIT_FAILED
    return 0


def _raised_here(error: BaseException) -> bool:
    """Whether an error was raised by a line of this project, not of one below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("swav")
