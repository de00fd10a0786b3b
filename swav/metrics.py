"""What a run says of itself: JSON lines in its folder, a progress bar, and the reasons for which it stops."""

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from swav import storage, telemetry
from swav.bars import progress_bar
from swav.config import PretrainConfig, SwavConfig
from swav.distributed import all_reduce_sum, rank, world_size
from swav.logs import set_context
from swav.storage import Location, join, local_path, write_atomic

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line; units stand in the keys.

    A resumed run first drops the lines after its checkpoint, so every step stands there once. Lines that a full disk
    does not take wait for the next one. An object store cannot append, so there the lines gather in memory until
    they are published.
    """

    def __init__(self, url: Location, *, resume_step: int) -> None:
        kept = b""
        if storage.stat(url) is not None:
            lines = storage.read(url).splitlines(keepends=True)
            kept = b"".join(line for line in lines if _is_before(line, resume_step))
        self._url = url
        self._waiting = b""
        self._is_remote = storage.is_remote(url)
        if self._is_remote:
            self._file: io.RawIOBase | io.BytesIO = io.BytesIO(kept)
            self._file.seek(0, io.SEEK_END)
        else:
            write_atomic(url, kept)
            self._file = local_path(url).open("ab", buffering=0)

    def write(self, step: int, **values: Any) -> None:
        """Append one line."""
        failed_before = bool(self._waiting)
        self._waiting += (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not failed_before:
                _logger.error(
                    "%s cannot be written (%s); training goes on, and its lines wait for free space", self._url, error
                )

    def publish(self) -> None:
        """Let an object store have the lines up to here; a failure is logged, and the next call tries again."""
        if not self._is_remote:
            return
        self._file.seek(0)
        try:
            write_atomic(self._url, self._file.read() or b"")
        except OSError as error:
            _logger.error("%s cannot be written (%s); training goes on", self._url, error)

    def close(self) -> None:
        """Publish and close the file."""
        self.publish()
        if self._waiting:
            _logger.error("%s lacks its last %d lines", self._url, self._waiting.count(b"\n"))
        self._file.close()


def _is_before(line: bytes, resume_step: int) -> bool:
    """Whether a line belongs to what the checkpoint has, which was taken before its epoch's end was noted."""
    if not line.endswith(b"\n"):  # torn
        return False
    try:
        values = json.loads(line)
        step, at_end = values["step"], values.get("event") in ("epoch", "storage", "knn", "labels")
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(step < resume_step or (step == resume_step and not at_end))


class Report:
    """Follows the training loop. Rank 0 writes; every rank watches the loss."""

    def __init__(
        self, config: PretrainConfig, output: Location, *, num_samples: int, step: int, steps_per_epoch: int
    ) -> None:
        """Open the log and the bar.

        Args:
            config: the run.
            output: its folder.
            num_samples: images per epoch.
            step: the step that the run resumes at, 0 for a new one.
            steps_per_epoch: steps per epoch.
        """
        self._config = config
        self._log = MetricsLog(join(output, "metrics.jsonl"), resume_step=step) if rank() == 0 else None
        epochs_done, rest = divmod(step, steps_per_epoch)
        self._bar = progress_bar(
            total=num_samples * config.optim.epochs,
            initial=num_samples * epochs_done + min(num_samples, rest * config.optim.global_batch),
            desc=config.name,
            unit=" images",
            unit_scale=True,
            disable=rank() != 0,
        )
        self._pending: tuple[int, Tensor] | None = None
        self._begin_window(step)
        self._step_began = self._since
        self._storage_counts: dict[str, int] = {}
        telemetry.begin_training(step)
        self._write(step, event="start", world_size=world_size(), torch_version=torch.__version__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    @contextlib.contextmanager
    def timed(self, batches: Generator[T]) -> Iterator[Iterator[T]]:
        """Pass the batches on, adding up how long the loop waits for them; leaving the block ends them."""

        def pass_on() -> Iterator[T]:
            is_first = True  # waits for the loader to start
            while True:
                before = time.monotonic()
                batch = next(batches, None)
                now = time.monotonic()
                self._waited_seconds += now - before
                if batch is None:
                    return
                self._step_began, is_first = now if is_first else before, False
                yield batch

        with contextlib.closing(batches):
            yield pass_on()

    @contextlib.contextmanager
    def explained_divergence(self, step: int) -> Iterator[None]:
        """Add to a number that is not finite what to try."""
        try:
            yield
        except FloatingPointError as error:
            raise self._divergence(step, str(error)) from error

    def step(
        self, step: int, *, epoch: int, num_images: int, own_images: int, lr: float, metrics: dict[str, Tensor]
    ) -> None:
        """Take note of a step that is done.

        The loss is looked at one step late, so that a GPU need not be waited for.

        Args:
            step: of the whole run, counting the one that is done.
            epoch: the running one.
            num_images: of the global batch.
            own_images: of them, those of this rank.
            lr: learning rate of the step.
            metrics: scalars of the global batch, ``loss`` among them.
        """
        self.check_finite()
        self._pending = (step, metrics["loss"])
        self._images += num_images
        if step % self._config.runtime.log_every_steps == 0:
            self.check_finite()
            seconds = time.monotonic() - self._since
            values = {name: float(value) for name, value in metrics.items()}
            rates = {
                "learning_rate": lr,
                "images_per_second": self._images / seconds,
                "data_wait_fraction": self._waited_seconds / seconds,
            }
            self._write(step, epoch=epoch, **values, **rates, **_device_memory(metrics["loss"].device))
            num_steps = max(1, step - self._logged_step)
            telemetry.show(loss=values["loss"], step_seconds=seconds / num_steps, **rates)
            self._bar.set_postfix(epoch=epoch, loss=f"{values['loss']:.3f}", lr=f"{lr:.3g}", refresh=False)
            self._begin_window(step)
        self._bar.update(num_images)
        set_context(step=step, epoch=epoch)
        telemetry.step_done(step, epoch=epoch, num_images=own_images, seconds=time.monotonic() - self._step_began)

    def check_finite(self) -> None:
        """Stop on a loss that is not finite.

        Raises:
            RuntimeError: it is not; says what to try.
        """
        if self._pending is not None:
            step, loss = self._pending
            self._pending = None
            if not math.isfinite(float(loss)):
                raise self._divergence(step - 1, f"the loss is {float(loss)}")

    def labels(self, step: int, epoch: int, facts: dict[str, Any]) -> None:
        """Write what an assigner says of an epoch's labels; waiting for them is not counted into the images/s."""
        self._begin_window(step)
        self._write(step, event="labels", epoch=epoch, **facts)

    def epoch(self, step: int, epoch: int, counts: Tensor, *, num_images: int) -> None:
        """Close an epoch's books.

        Args:
            step: of the whole run.
            epoch: the one that ended.
            counts: int64 [2], images of all ranks that were delivered, and that were replaced because they are broken.
            num_images: that the epoch has.

        Raises:
            RuntimeError: too many images are broken, or they do not add up to the data set.
        """
        delivered, quarantined = (int(count) for count in counts)
        self._write(step, event="epoch", epoch=epoch, images=delivered, quarantined=quarantined)
        if delivered + quarantined != num_images:
            raise RuntimeError(
                f"epoch {epoch} delivered {delivered} images and quarantined {quarantined}, but it has "
                f"{num_images}; this is a defect of swav, please report it with the run's metrics.jsonl"
            )
        budget = quarantine_budget(num_images, self._config.data.max_quarantined_fraction)
        if quarantined > budget:
            raise RuntimeError(
                f"{quarantined} of {num_images} images are broken, more than the {budget} that "
                "data.max_quarantined_fraction admits; mend the data (the run's quarantine folder names each image), "
                "or raise the fraction"
            )

    def storage_use(self, step: int, epoch: int) -> None:
        """Write what the ranks together have asked of object storage since the last time, and how often it failed them.

        Every rank calls this; a run on local files writes nothing.
        """
        totals = storage.counts()
        since = torch.tensor([total - self._storage_counts.get(name, 0) for name, total in totals.items()])
        self._storage_counts = totals
        all_reduce_sum(since)
        if since.any():
            self._write(step, event="storage", epoch=epoch, **dict(zip(totals, since.tolist(), strict=True)))

    def publish(self) -> None:
        """Make the lines up to here as durable as the checkpoint that is to follow."""
        if self._log is not None:
            self._log.publish()

    def knn(self, step: int, accuracies: dict[str, float]) -> None:
        """Write accuracies on labelled images."""
        self._write(step, event="knn", **accuracies)
        self._bar.clear()
        _logger.info("step %d: %s", step, ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))

    def _begin_window(self, step: int) -> None:
        """Measure rates anew from here."""
        self._images, self._waited_seconds, self._since, self._logged_step = 0, 0.0, time.monotonic(), step

    def _write(self, step: int, **values: Any) -> None:
        if self._log is not None:
            self._log.write(step, **values)

    def _divergence(self, step: int, what: str) -> RuntimeError:
        optim, runtime, method = self._config.optim, self._config.runtime, self._config.method
        freeze = ""
        if isinstance(method, SwavConfig):
            freeze = f"a longer method.freeze_prototypes_epochs (now {method.freeze_prototypes_epochs}), "
        return RuntimeError(
            f"step {step}: {what}. The run stops; its checkpoints are of earlier steps. Try a lower optim.base_lr (now "
            f"{optim.base_lr}), a longer optim.warmup_epochs (now {optim.warmup_epochs}), {freeze}or "
            f"runtime.precision=fp32 (now {runtime.precision})"
        )


def quarantine_budget(num_samples: int, max_fraction: float) -> int:
    """How many images of an epoch may be broken before the run stops; a handful always may."""
    return max(10, int(num_samples * max_fraction))


def _device_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"peak_memory_gigabytes": torch.cuda.max_memory_allocated(device) / 1e9}
