"""What an endpoint knows of its process, or a launcher of its ranks: what runs, since when, and how far it is."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from swav import goodput, watchdog
from swav.goodput import StepBook

METRICS_PORT = "SWAV_METRICS_PORT"


@dataclass(slots=True)
class Life:
    """What an endpoint knows of its process or, in a launcher, of the ranks: one thread writes, others read."""

    folder: Path | None = None  # that a launcher shares with its ranks
    world_size: int = 0  # 0 while no rank runs
    num_restarts: int = 0
    runs_since: float | None = None  # by the monotonic clock; None while no rank runs, and none can be stuck
    waits_for: str = "the first meeting of the nodes"  # while no rank runs
    book: StepBook | None = None  # of a process by itself that trains
    began_at: float = field(default_factory=time.monotonic)

    def rank_metrics(self) -> Path | None:
        """The folder in which a launcher's ranks leave their metrics."""
        return None if self.folder is None else self.folder / "metrics"

    def progress_at(self) -> float:
        """When the process or a rank last said that work goes on, or began; by the monotonic clock."""
        said = watchdog.last_progress() if self.folder is None else watchdog.last_progress_in(self.folder)
        return max(said, self.began_at if self.runs_since is None else self.runs_since)

    def kept_seconds(self) -> float | None:
        """Seconds in steps that count; None where nothing has begun to train."""
        if self.folder is not None:
            return goodput.kept_seconds(self.folder)
        return None if self.book is None else self.book.seconds

    def ranks_start(self, world_size: int) -> None:
        """Note that a launcher has started its ranks."""
        self.world_size, self.runs_since = world_size, time.monotonic()

    def ranks_end(self, waits_for: str) -> None:
        """Note that a launcher ends its ranks, and what it will wait for."""
        self.world_size, self.runs_since, self.waits_for = 0, None, waits_for
