"""Labelled images, or their features, in the batches that a classifier is trained on.

Batches have the order of pretraining (:mod:`swav.data.order`): the global batch is a contract, ranks take shares of its
lanes, and every sample comes exactly once per epoch.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav.config import AugmentConfig, CropConfig
from swav.data.augment import Augment
from swav.data.index import DatasetIndex
from swav.data.loader import Loader
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ShardReader
from swav.distributed import rank, world_size
from swav.metrics import quarantine_budget
from swav_eval.config import FinetuneProtocol, LinearProtocol
from swav_eval.labels import label_of_class

_CROP_SCALE = (0.08, 1.0)  # RandomResizedCrop's own (appendix A.3)
_MAX_LANES = 512
_WINDOW_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """One rank's share of a global batch, on the device."""

    inputs: Tensor  # float32: crops [n, 3, crop, crop], or features [n, dim]
    labels: Tensor  # int64 [n], NO_LABEL for an image in the place of a broken one
    global_size: int  # of the global batch
    num_broken: int  # images of this share that others have replaced


class Batches(Protocol):
    """What a classifier is trained on."""

    @property
    def num_samples(self) -> int:
        """Of an epoch."""

    @property
    def num_steps(self) -> int:
        """Of an epoch."""

    def epoch(self, epoch: int, start_step: int, /) -> Generator[LabelledBatch]:
        """This rank's shares of an epoch's batches, from a step on."""


class OrderOfIds:
    """One epoch over some samples of a data set.

    Positions among the chosen samples are ordered as the whole data set would be, shard by shard, in chunks as much
    smaller as the choice is: what is read together stays together, and few samples, far apart, are mixed one by one.
    """

    def __init__(
        self, index: DatasetIndex, ids: NDArray[np.int64], *, seed: int, epoch: int, global_batch: int
    ) -> None:
        """Prepare.

        Args:
            index: the data set.
            ids: int64 [n], sample ids, rising.
            seed: of the order.
            epoch: from 0.
            global_batch: samples per step over all ranks.

        Raises:
            ValueError: there are no samples.
        """
        self._ids = ids
        self._lanes = next(n for n in range(min(_MAX_LANES, global_batch), 0, -1) if global_batch % n == 0)
        self._order = EpochOrder(
            np.diff(np.searchsorted(ids, index.row_offsets)),
            chunk_rows=max(1, round(index.chunk_rows * len(ids) / index.num_samples)),
            seed=seed,
            epoch=epoch,
            global_batch=global_batch,
            num_lanes=self._lanes,
            window_chunks=_WINDOW_CHUNKS,
        )

    @property
    def num_samples(self) -> int:
        """Of the epoch."""
        return len(self._ids)

    @property
    def num_steps(self) -> int:
        """Batches of the epoch."""
        return self._order.num_steps

    def batch_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return self._order.batch_size(step)

    def rank_batch(self, step: int, of_rank: int, of_world: int) -> tuple[NDArray[np.int64], int]:
        """A rank's sample ids, and where they start in the global batch."""
        positions, offset = self._order.rank_batch(step, of_rank, of_world)
        return self._ids[positions], offset

    def check_world(self, of_world: int) -> None:
        """Refuse a world of which a rank would have no sample in some batch.

        Raises:
            ValueError: says how many ranks may take part.
        """
        if of_world > self._lanes:
            raise ValueError(
                f"{of_world} ranks are more than a global batch of this size is divided into; use at most {self._lanes}"
            )
        self._order.check_world(of_world)


@dataclass(frozen=True)
class ImageBatches:
    """Random crops of images, read and augmented anew in every epoch."""

    num_samples: int  # of an epoch
    num_classes: int
    loader: Loader
    augment: Augment
    reader: ShardReader

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return self.loader.order_of_epoch(0).num_steps

    def epoch(self, epoch: int, start_step: int) -> Generator[LabelledBatch]:
        """This rank's shares of an epoch's batches, from a step on."""
        with contextlib.closing(self.loader.epoch(epoch, start_step, self._labels)) as batches:
            for raw in batches:
                batch = self.augment(raw)
                assert batch.labels is not None
                yield LabelledBatch(batch.crops[0], batch.labels[:, 0], raw.global_size, int(raw.substituted.sum()))

    def _labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([[label_of_class(self.reader, sample_id, self.num_classes)] for sample_id in ids.tolist()])


@contextlib.contextmanager
def labelled_pipeline(
    index: DatasetIndex,
    ids: NDArray[np.int64],
    protocol: LinearProtocol | FinetuneProtocol,
    *,
    crop_px: int,
    device: torch.device,
    num_threads: int,
) -> Iterator[ImageBatches]:
    """Random crops and flips of some images, for as long as the block lasts (appendix A.3).

    A broken image is replaced by a neighbour that has no label, and counted.

    Args:
        index: of the images.
        ids: int64 [n], those to train on, rising.
        protocol: seed, global batch, number of classes, and how shards are read.
        crop_px: size of the crops.
        device: where they are augmented.
        num_threads: of this rank, that decode.

    Raises:
        ValueError: there are too few images for so many ranks; and, while iterating, an image has no label of a class.
        RuntimeError: while iterating, more images are broken than the protocol admits.
    """
    runtime = protocol.runtime
    order_of_epoch = _orders(index, ids, protocol)
    on_gpu = device.type == "cuda"
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        loader = Loader(
            reader,
            order_of_epoch,
            [CropConfig(num_crops=1, size_px=crop_px, scale=_CROP_SCALE)],
            substitutes=lambda sample_id: substitutes(index.row_offsets, sample_id),
            seed=protocol.seed,
            num_threads=num_threads,
            rank=rank(),
            world_size=world_size(),
            pin_memory=on_gpu,
            max_quarantined=quarantine_budget(len(ids), runtime.max_quarantined_fraction),
            budget_setting="runtime.max_quarantined_fraction",
        )
        flips = AugmentConfig(jitter_strength=0, jitter_probability=0, grayscale_probability=0, blur_probability=0)
        augment = Augment(flips, seed=protocol.seed, device=device, channels_last=on_gpu)
        yield ImageBatches(len(ids), protocol.num_classes, loader, augment, reader)


class FeatureBatches:
    """Features that were computed once, in the order in which their images would come."""

    def __init__(
        self,
        index: DatasetIndex,
        ids: NDArray[np.int64],
        values: NDArray[np.float32],
        labels: NDArray[np.int64],
        *,
        chosen: NDArray[np.int64],
        protocol: LinearProtocol,
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            index: of the images.
            ids: int64 [rows], sample ids of the features, rising.
            values: float32 [rows, dim]; may be mapped from a file.
            labels: int64 [rows].
            chosen: int64 [n], the rows to train on, rising.
            protocol: seed and global batch.
            device: where batches are needed.

        Raises:
            ValueError: there are too few images for so many ranks.
        """
        self._ids, self._values, self._labels, self._device = ids, values, labels, device
        self._order_of_epoch = _orders(index, ids[chosen], protocol)
        self.num_samples = len(chosen)
        self.num_steps = self._order_of_epoch(0).num_steps

    def epoch(self, epoch: int, start_step: int) -> Generator[LabelledBatch]:
        """This rank's shares of an epoch's batches, from a step on."""
        order = self._order_of_epoch(epoch)
        for step in range(start_step, order.num_steps):
            rows = np.searchsorted(self._ids, order.rank_batch(step, rank(), world_size())[0])
            inputs, labels = torch.from_numpy(self._values[rows]), torch.from_numpy(self._labels[rows])
            yield LabelledBatch(inputs.to(self._device), labels.to(self._device), order.batch_size(step), 0)


def _orders(
    index: DatasetIndex, ids: NDArray[np.int64], protocol: LinearProtocol | FinetuneProtocol
) -> Callable[[int], OrderOfIds]:
    """The orders of all epochs, by their number."""

    @lru_cache(maxsize=2)
    def order_of_epoch(epoch: int) -> OrderOfIds:
        return OrderOfIds(index, ids, seed=protocol.seed, epoch=epoch, global_batch=protocol.global_batch)

    order_of_epoch(0).check_world(world_size())
    return order_of_epoch


def check_num_broken(num_broken: int, num_samples: int, protocol: LinearProtocol | FinetuneProtocol) -> None:
    """Stop where too many images are broken.

    Args:
        num_broken: of the images to train on, over all ranks.
        num_samples: how many these are.
        protocol: how many may be.

    Raises:
        RuntimeError: there are more.
    """
    budget = quarantine_budget(num_samples, protocol.runtime.max_quarantined_fraction)
    if num_broken > budget:
        raise RuntimeError(
            f"{num_broken} of {num_samples} images to train on are broken, more than the {budget} that "
            "runtime.max_quarantined_fraction admits; mend the data (the log names each image), or raise the fraction"
        )
