"""Where the labels of an epoch come from: from nowhere, from the data, or from an assigner (appendix D).

Trainer and assigner share the run's folder and nothing else. What is published there, by a manifest that is written
last, never changes; each side may be killed and started again at any moment.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from swav import storage
from swav.bank.files import bank_folder, labels_folder, manifest_url
from swav.bank.labels import LabelTables
from swav.bank.layout import bank_layout, is_forward_pass, order_epoch_of
from swav.bank.writer import BankWriter
from swav.config import DeepClusterV2Config, PretrainConfig, SupervisedConfig
from swav.data.augment import Augment
from swav.data.batch import RawBatch
from swav.data.epochs import epoch_order
from swav.data.index import DatasetIndex
from swav.data.loader import LabelSource, Loader
from swav.data.reader import ShardReader
from swav.distributed import all_reduce_max, any_rank, rank
from swav.methods.base import autocast
from swav.methods.offline import Offline
from swav.program import Stopped
from swav.watchdog import progress

_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 2.0
_SAY_EVERY_SECONDS = 60.0

_logger = logging.getLogger(__name__)


class Unlabelled:
    """A method without labels; what others do beside the loop."""

    saves_epochs = False  # whether a checkpoint is due at the end of each epoch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is open; nothing here."""

    def begin(self, epoch: int, start_step: int) -> LabelSource | None:
        """Prepare for the steps of an epoch from one on; the labels of its images, where the method has any."""

    def take(self, raw: RawBatch, embeddings: Tensor) -> None:
        """See a step that is done."""

    def flush(self) -> None:
        """Make durable what a checkpoint builds upon."""

    def end(self) -> None:
        """See the end of the epoch."""


class TrueLabels(Unlabelled):
    """The classes that stand beside the images."""

    def __init__(self, index: DatasetIndex, config: PretrainConfig) -> None:
        assert isinstance(config.method, SupervisedConfig)
        runtime = config.runtime
        self._reader = ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes)
        self._num_classes = config.method.num_classes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the shards."""
        self._reader.close()

    def begin(self, epoch: int, start_step: int) -> LabelSource:
        """The images' labels, the same in every epoch."""
        return self._labels

    def _labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([[self._label(sample_id)] for sample_id in ids.tolist()])

    def _label(self, sample_id: int) -> int:
        label = self._reader.label(sample_id)
        if label is None or not 0 <= label < self._num_classes:
            found = "no label (.cls)" if label is None else f"the label {label}"
            raise ValueError(
                f"{self._reader.name(sample_id)} has {found}, and supervised training needs one from 0 to "
                f"{self._num_classes - 1}; label it, or set method.num_classes"
            )
        return label


class HandOver(Unlabelled):
    """Features to the assigner, labels from it."""

    saves_epochs = True  # so that a stop while waiting loses nothing

    def __init__(
        self,
        config: PretrainConfig,
        index: DatasetIndex,
        output: storage.Location,
        method: Offline,
        *,
        loader: Loader,
        augment: Augment,
        is_stopping: Callable[[], bool],
        on_labels: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """Prepare.

        Args:
            config: the run.
            index: its images.
            output: its folder.
            method: that computes features.
            loader: of the run.
            augment: of the run.
            is_stopping: whether this rank has been asked to stop.
            on_labels: is told an epoch's number and what its assigner says of its labels.
        """
        self._config, self._index, self._output, self._method = config, index, output, method
        self._loader, self._augment = loader, augment
        self._is_stopping, self._on_labels = is_stopping, on_labels
        self._bank: BankWriter | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is being written."""
        if self._bank is not None:
            self._bank.__exit__(kind, error, trace)

    def begin(self, epoch: int, start_step: int) -> LabelSource | None:
        """Open the features that the epoch is to leave; wait for its labels, after a pass for features if need be.

        Raises:
            Stopped: while waiting; all that was trained is saved.
            RuntimeError: the assigner has not made labels within ``runtime.labels_timeout_seconds``.
        """
        labels = None
        if start_step < epoch_order(self._config, self._index, epoch).num_steps:
            labels = self._labels(epoch)
        target = epoch + 1
        is_last = target >= self._config.optim.epochs
        if not is_last and not is_forward_pass(self._config, target) and not self._is_made(target):
            self._bank = self._writer(target, start_step)
        return labels

    def take(self, raw: RawBatch, embeddings: Tensor) -> None:
        """Keep a step's features."""
        if self._bank is not None:
            self._bank.append(raw, embeddings)

    def flush(self) -> None:
        """Make durable the features of the steps that a checkpoint has."""
        if self._bank is not None:
            self._bank.flush()

    def end(self) -> None:
        """Publish the epoch's features."""
        if self._bank is not None:
            with self._bank:
                self._bank.publish(self._prototypes())
            self._bank = None

    def _labels(self, epoch: int) -> LabelTables:
        assert self._config.offline is not None
        wanted = max(epoch - self._config.offline.stale_epochs, 0)
        for number in sorted({wanted, epoch}):
            if is_forward_pass(self._config, number) and not self._is_made(number):
                self._forward_pass(number)
        began = time.monotonic()
        self._wait_for(wanted)
        tables = LabelTables(self._output, wanted, self._index)
        if isinstance(self._config.method, DeepClusterV2Config):
            self._method.set_prototypes(torch.from_numpy(tables.centroids()))
        facts = {"labels_of_epoch": wanted, "waited_seconds": time.monotonic() - began}
        self._on_labels(epoch, facts | {"sets": tables.manifest["sets"]})
        return tables

    def _prototypes(self) -> NDArray[np.float32] | None:
        """What the features are to be partitioned by, float32 [sets, K, dim]; None for k-means."""
        if isinstance(self._config.method, DeepClusterV2Config):
            return None
        # The model's own stay as the checkpoint has them: to bring them to unit norm twice changes their last bits.
        heads = [F.normalize(head.detach().float(), dim=1) for head in self._method.prototypes.heads]
        return torch.stack(heads).cpu().numpy()

    def _writer(self, target: int, start_step: int) -> BankWriter:
        order_epoch = order_epoch_of(self._config, target)
        layout = bank_layout(self._config, self._index, order_epoch)
        facts = {"epoch": target, "order_epoch": order_epoch, "data_identity": self._index.identity}
        return BankWriter(bank_folder(self._output, target), layout, start_step=start_step, facts=facts)

    def _is_made(self, epoch: int) -> bool:
        """Whether an epoch's features have been published, or its labels, after which the features may be gone."""
        folders = (bank_folder(self._output, epoch), labels_folder(self._output, epoch))
        found = rank() == 0 and any(storage.stat(manifest_url(folder)) is not None for folder in folders)
        return any_rank(found)

    def _forward_pass(self, epoch: int) -> None:
        """Compute features of an epoch's images before it trains, each rank its share.

        Batch norm normalises by the batch, as in training, and its running statistics stay as they are: so a pass that
        is interrupted and repeated gives the same. Views are drawn as for no epoch that trains.
        """
        _logger.info("computing features of all images for the labels of epoch %d", epoch)
        passing = replace(
            self._loader,
            order_of_epoch=lambda number: epoch_order(self._config, self._index, -1 - number),
            crops=self._config.crops[:1],
            on_quarantine=None,
        )
        with self._kept_buffers(), self._writer(epoch, 0) as bank:
            for raw in passing.epoch(-1 - epoch):
                batch = self._augment(raw)
                with autocast(batch.crops[0].device, self._config.runtime.precision):
                    embeddings = self._method.embed(batch)
                bank.append(raw, embeddings)
                progress()
                if any_rank(self._is_stopping()):
                    raise Stopped(f"stopped on request in the pass for features before epoch {epoch}")
            bank.publish(self._prototypes())

    @contextmanager
    def _kept_buffers(self) -> Iterator[None]:
        """Leave batch norm's running statistics as they were, however the block ends."""
        buffers = {name: value.clone() for name, value in self._method.named_buffers()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._method.named_buffers():
                    value.copy_(buffers[name])

    def _wait_for(self, epoch: int) -> None:
        """Return when an epoch's labels have been published; all ranks together."""
        folder = labels_folder(self._output, epoch)
        seconds = _REMOTE_POLL_SECONDS if storage.is_remote(self._output) else _POLL_SECONDS
        began, said = time.monotonic(), None
        limit = self._config.runtime.labels_timeout_seconds
        while True:
            now = time.monotonic()
            found = rank() == 0 and storage.stat(manifest_url(folder)) is not None
            is_late = rank() == 0 and now - began > limit
            answers = all_reduce_max(torch.tensor([int(found), int(self._is_stopping()), int(is_late)])).tolist()
            if answers[0]:
                return
            if answers[1]:
                raise Stopped(f"stopped on request while waiting for the labels of epoch {epoch}; all is saved")
            if answers[2]:
                raise RuntimeError(
                    f"no labels of epoch {epoch} in {folder} after {limit:g} s (runtime.labels_timeout_seconds); see "
                    f"that an assigner works on this run: python -m swav.assign --output {self._output}; then run the "
                    "same command again to go on"
                )
            if said is None:
                said = now
                _logger.info("waiting for the labels of epoch %d (%s)", epoch, folder)
            elif now - said > _SAY_EVERY_SECONDS:
                said = now
                _logger.warning("still waiting for the labels of epoch %d, %.0f s by now", epoch, now - began)
            progress()
            time.sleep(seconds)
