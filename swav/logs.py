"""What programs of ours say while they run: text for a person, or a JSON object per line for a machine.

``SWAV_LOG_FORMAT=json`` asks for JSON; docs/observability.md has the fields.
"""

import argparse
import json
import logging
import os
import sys
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

LOG_FORMAT = "SWAV_LOG_FORMAT"
_TEXT = "%(message)s"
_USAGE_ERROR = 2  # as argparse ends
FACTS = "facts"  # name of what a record carries beside its message

_logger = logging.getLogger(__name__)

# What every record of this process says, such as its step. A process has one log, so there is one such place.
_context: dict[str, Any] = {}


def start_logging(level: int | None = None) -> None:
    """Send this process's log to standard error, as text or JSON; every program calls this first.

    As JSON, so go Python's warnings, what torch logs by handlers of its own, a wrong command line, and the error that
    ends the process.

    Args:
        level: the least to be said; None for INFO on the first rank, and WARNING on others, which would only repeat it.
    """
    if level is None:
        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format=_TEXT)
    wanted = os.environ.get(LOG_FORMAT, "")
    if is_json():
        _use_json()
    elif wanted not in ("", "text"):
        _logger.warning("%s=%s is neither text nor json; the log is text", LOG_FORMAT, wanted)


def is_json() -> bool:
    """Whether the log is to be JSON."""
    return os.environ.get(LOG_FORMAT) == "json"


def set_context(**facts: Any) -> None:
    """Set what every record of this process says from now on, for example ``step=3``; as JSON only."""
    _context.update(facts)


def answer(text: str, *, title: str | None = None, **facts: Any) -> None:
    """Write to standard output what a program was run for.

    Args:
        text: for a person.
        title: JSON's message instead of the text.
        facts: the same for a machine; JSON alone has them.
    """
    if is_json():
        record = logging.LogRecord(__name__, logging.INFO, __file__, 0, title or text, None, None)
        vars(record)[FACTS] = facts
        text = JsonFormatter().format(record)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        milliseconds = int(record.created % 1 * 1000)
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, variable in (("rank", "RANK"), ("world_size", "WORLD_SIZE")):
            if os.environ.get(variable, "").isdigit():
                said[name] = int(os.environ[variable])
        if os.environ.get("POD_NAME"):
            said["pod"] = os.environ["POD_NAME"]
        said |= _context | getattr(record, FACTS, {})
        if record.exc_info and record.exc_info[0] is not None:
            said["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.stack_info:
            said["stack"] = record.stack_info
        return json.dumps(said, default=str)


def _use_json() -> None:
    formatter = JsonFormatter()
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if getattr(handler, "stream", None) in (sys.stderr, sys.stdout):  # torch has a class of its own
                handler.setFormatter(formatter)
    logging.captureWarnings(True)
    sys.excepthook = _say_end
    argparse.ArgumentParser.error = _say_usage  # type: ignore[assignment,method-assign]


def _say_usage(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    _logger.error("error: %s (%s)", message, " ".join(parser.format_usage().split()))
    sys.exit(_USAGE_ERROR)


def _say_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _logger.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
