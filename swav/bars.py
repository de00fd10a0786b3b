"""Progress bars, which a log of JSON has as records."""

import io
import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from swav.logs import FACTS, is_json

_BAR_EVERY_SECONDS = 15.0
_BAR_FORMAT = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

_logger = logging.getLogger(__name__)


def above_bars() -> AbstractContextManager[Any]:
    """Within the block, lines of the log do not tear a progress bar."""
    return nullcontext() if is_json() else logging_redirect_tqdm()


def progress_bar(**settings: Any) -> "tqdm[Any]":
    """A progress bar of tqdm's, every 15 s at most where nobody watches; as JSON, records as often.

    Args:
        settings: of tqdm.
    """
    if is_json():
        return _LoggedBar(**settings)
    return tqdm(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else _BAR_EVERY_SECONDS, **settings)


class _LoggedBar(tqdm):  # type: ignore[type-arg]
    """Says how far it is by records of the log."""

    def __init__(self, **settings: Any) -> None:
        self._said_at = time.monotonic()
        settings |= {"file": io.StringIO(), "mininterval": _BAR_EVERY_SECONDS, "bar_format": _BAR_FORMAT}
        super().__init__(**settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Say it, if the last time is long enough ago."""
        if time.monotonic() - self._said_at < _BAR_EVERY_SECONDS:
            return
        self._said_at = time.monotonic()
        shown = self.format_dict
        facts = {"done": shown["n"], "total": shown["total"], "per_second": shown["rate"]}
        _logger.info("%s", self, extra={FACTS: {"progress": {"of": self.desc, "unit": self.unit.strip(), **facts}}})

    def clear(self, nolock: bool = False) -> None:
        """Nothing is drawn."""
