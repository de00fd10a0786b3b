"""What a process tells of itself while it runs: its metrics, where ``SWAV_METRICS_PORT`` asks for them.

A program says what happens by :func:`count` and :func:`show`, which cost next to nothing where nobody asked. A process
by itself serves its own endpoint (:mod:`swav.endpoint`); the ranks of :mod:`swav.elastic` report to that of their
launcher. docs/observability.md defines every metric.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from swav import goodput, watchdog
from swav.goodput import StepBook
from swav.life import METRICS_PORT, Life
from swav.program import LAUNCHER_FOLDER
from swav.storage import observe_counts

if TYPE_CHECKING:
    from swav.meters import Meters

_MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable
_OF_STORAGE = {"retries": "storage_retries", "hedges": "storage_hedges", "bytes_received": "storage_bytes"}

_logger = logging.getLogger(__name__)

# A process has one set of metrics, as it has one log: what is said anywhere in it goes there.
_meters: "Meters | None" = None
_book: StepBook | None = None
_life: Life | None = None  # of a process that serves its own


def is_wanted() -> bool:
    """Whether the environment asks for metrics."""
    return bool(os.environ.get(METRICS_PORT))


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Within the block, serve this process's metrics, or report them to the launcher; every program's first block.

    Without a launcher of ours, and with several ranks per host, the first of them serves its own.
    """
    global _meters, _life
    with contextlib.ExitStack() as stack:
        stack.enter_context(watchdog.tells_launcher())
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if is_wanted() and _meters is None and (LAUNCHER_FOLDER in os.environ or local_rank == "0"):
            from swav.meters import Meters  # where nobody asks, it need not be loaded

            if LAUNCHER_FOLDER in os.environ:
                try:
                    _meters = Meters(local_rank)
                except OSError as error:
                    _logger.warning("this rank has no metrics: %s; its work goes on", error)
            else:
                from swav.endpoint import serving

                _meters = Meters()
                _life = Life()
                _life.ranks_start(int(os.environ.get("WORLD_SIZE", "1")))
                stack.enter_context(serving(os.environ[METRICS_PORT], _life, _meters.collect))
            stack.callback(_forget)
            observe_counts(_count_storage)
        yield


@contextlib.contextmanager
def launcher_endpoint(life: Life) -> Iterator[None]:
    """Within the block, serve what the ranks that this process starts report."""
    folder = life.rank_metrics()
    if folder is None or not is_wanted():
        yield
        return
    from swav.endpoint import serving
    from swav.meters import collect_ranks

    folder.mkdir()
    os.environ[_MULTIPROCESS_FOLDER] = str(folder)
    try:
        with serving(os.environ[METRICS_PORT], life, lambda: collect_ranks(folder)):
            yield
    finally:
        os.environ.pop(_MULTIPROCESS_FOLDER, None)


def forget_ranks(life: Life) -> None:
    """Forget what ranks that are no more showed, and their steps that nothing has saved; what they counted stays."""
    if life.folder is None or not is_wanted():
        return
    from swav.meters import forget_gauges

    try:
        goodput.settle(life.folder)
        forget_gauges(life.folder / "metrics")
    except OSError as error:
        _logger.warning("metrics may show what ranks that are no more have left: %s", error)


def count(name: str, number: int = 1) -> None:
    """Add to a counter of :mod:`swav.meters`; the ranks' counters are added up."""
    if _meters is not None:
        _meters.count(name, number)


def show(**values: float) -> None:
    """Set gauges of :mod:`swav.meters`; on the first of all ranks alone, which speaks for the run.

    Args:
        values: by name; a time of the monotonic clock where an age is shown.
    """
    if _meters is not None and os.environ.get("RANK", "0") == "0":
        for name, value in values.items():
            _meters.show(name, value)


def begin_training(step: int) -> None:
    """Note that training starts, or resumes, at a step: nothing is lost by a crash at this moment."""
    global _book
    if _meters is not None:
        _book = StepBook(step)
        if _life is not None:
            _life.book = _book
        show(step=step, checkpoint_age_seconds=time.monotonic())


def step_done(step: int, *, epoch: int, num_images: int, seconds: float) -> None:
    """Note a step that is done.

    Args:
        step: of the whole run.
        epoch: the running one.
        num_images: of this rank.
        seconds: that the step took.
    """
    if _meters is not None:
        _meters.count("images", num_images)
        show(step=step, epoch=epoch)
        if _book is not None:
            _book.add(step, seconds)


def saving(step: int) -> None:
    """Note that the state after a step is being saved; every rank says so."""
    if _book is not None:
        _book.keep(step)


def _count_storage(name: str, number: int) -> None:
    if name in _OF_STORAGE:
        count(_OF_STORAGE[name], number)


def _forget() -> None:
    global _meters, _book, _life
    observe_counts(None)
    if _book is not None:
        _book.close()
    _meters = _book = _life = None
