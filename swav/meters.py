"""The metrics of a process or of a launcher's ranks, kept by prometheus_client.

Ranks keep theirs in files of their launcher's folder, named by the local rank: a rank that is started again goes on
with the files of the one before, so counters never fall and files are as many as ranks. Imported only where metrics are
asked for.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, disable_created_metrics, values
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

COUNTERS = {
    "images": "Images that ranks of this pod have trained on; those of repeated steps count again",
    "quarantined": "Broken images that ranks of this pod have met and replaced, per epoch and pass",
    "storage_retries": "Requests to object storage that ranks of this pod have sent again after a fault",
    "storage_hedges": "Requests to object storage sent a second time because the first answer was late",
    "storage_bytes": "Bytes received from object storage by ranks of this pod",
}
GAUGES = {
    "step": "Steps of the whole run that are done",
    "epoch": "Epoch of the run that is under way, from 0",
    "loss": "Loss of the global batch at the last step that was logged",
    "learning_rate": "Learning rate of the last step that was logged",
    "images_per_second": "Images per second of all ranks between the last two steps that were logged",
    "step_seconds": "Mean seconds per step between the last two steps that were logged",
    "data_wait_fraction": "Share of the seconds between the last two logged steps in which rank 0 waited for images, "
    "0 to 1",
    "checkpoint_age_seconds": "Seconds of work that a crash would cost: since the state of the newest whole "
    "checkpoint, or since the run started or resumed",
    "assign_epoch": "Epoch whose labels the assigner makes, or made last",
    "assign_iteration": "Iteration of k-means or pass of Sinkhorn that is done for that epoch",
    "labels_age_seconds": "Seconds since the assigner has published labels",
}
_AGES = {f"swav_{name}" for name in ("checkpoint_age_seconds", "labels_age_seconds")}  # kept as times
# What prometheus_client calls gauges of which the latest value counts, while its process lives.
_FORGOTTEN: Final = "livemostrecent"
_FILE_BYTES = 1 << 16  # as prometheus_client makes them; all metrics here take a tenth of it


class Meters:
    """The metrics of this process."""

    def __init__(self, local_rank: str | None = None) -> None:
        """Prepare; counters start at 0, gauges are there once they are shown.

        Args:
            local_rank: of a launcher's rank; None to keep them in memory.

        Raises:
            OSError: there is no room for a rank's files.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]
        if local_rank is not None:
            _reserve(local_rank)
            values.ValueClass = values.MultiProcessValue(lambda: local_rank)  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"swav_{name}_total", text, registry=self._registry) for name, text in COUNTERS.items()
        }
        self._gauges: dict[str, Gauge] = {}
        self._lock = Lock()

    def count(self, name: str, number: int) -> None:
        """Add to a counter."""
        self._counters[name].inc(number)

    def show(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            gauge = self._gauges.get(name)
            if gauge is None:
                gauge = Gauge(f"swav_{name}", GAUGES[name], registry=self._registry, multiprocess_mode=_FORGOTTEN)
                self._gauges[name] = gauge
        gauge.set(value)

    def collect(self) -> Iterator[Metric]:
        """What this process has counted and shown."""
        return _aged(self._registry.collect())


def collect_ranks(folder: Path) -> Iterator[Metric]:
    """What the ranks of a launcher have counted and show, put together."""
    files = [str(path) for path in folder.glob("*.db") if _size(path) > 0]  # a new one is empty for a moment
    found = {metric.name: metric for metric in MultiProcessCollector.merge(files)}  # type: ignore[no-untyped-call]
    for name, text in COUNTERS.items():  # before there are ranks
        found.setdefault(f"swav_{name}", CounterMetricFamily(f"swav_{name}", text, 0))
    return _aged(found.values())


def forget_gauges(folder: Path) -> None:
    """Remove what ranks showed that are no more."""
    for path in folder.glob(f"gauge_{_FORGOTTEN}_*.db"):
        path.unlink()


def _reserve(local_rank: str) -> None:
    """Take the room for a rank's files: they are written to as memory, where a full disk would kill the process."""
    for kind in ("counter", f"gauge_{_FORGOTTEN}"):
        path = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"{kind}_{local_rank}.db")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            os.posix_fallocate(file, 0, _FILE_BYTES)
        finally:
            os.close(file)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # forgotten meanwhile
        return 0


def _aged(metrics: Iterable[Metric]) -> Iterator[Metric]:
    """Turn times into ages."""
    now = time.monotonic()
    for metric in metrics:
        if metric.name in _AGES:
            metric.samples = [sample._replace(value=max(0.0, now - sample.value)) for sample in metric.samples]
        yield metric
