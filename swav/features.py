"""Features of labelled images from a frozen network, spread over ranks, and their k-NN accuracy."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import functional as TF  # noqa: N812

from swav.config import COLOUR_MEAN, COLOUR_STD, EvaluateConfig, RuntimeConfig
from swav.data.decode import BrokenImageError, decode_image
from swav.data.index import DatasetIndex
from swav.data.reader import ChecksumError, ShardReader
from swav.distributed import all_reduce_max, all_reduce_sum, gather_rows, rank, world_size
from swav.ops.knn import knn_predict
from swav.partition import share
from swav.watchdog import progress

_BATCH = 256
_READ_AHEAD = 16 * _BATCH
_DEFAULT_RUNTIME = RuntimeConfig()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of one data set, of which this rank holds some consecutive rows."""

    values: Tensor  # float32 [n, dim], unit norm
    labels: Tensor  # int64 [n]
    offset: int  # of this rank's first row among all
    total: int  # rows of all ranks
    num_broken: int  # images of all ranks that could not be decoded; they have no row


class Neighbors(Protocol):
    """The settings of k-NN."""

    @property
    def num_neighbors(self) -> tuple[int, ...]:
        """The k's."""

    @property
    def temperature(self) -> float:
        """Of the votes' weights."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation whose images have been opened."""

    config: EvaluateConfig
    train: DatasetIndex
    test: DatasetIndex | None  # None: leave one out of ``train``

    @property
    def num_voters(self) -> int:
        """How many labelled images may vote on another."""
        return self.train.num_samples - (self.test is None)


def centre_crop(data: bytes, *, resize_px: int, crop_px: int) -> Tensor:
    """Decode, resize the shorter side, cut the centre (appendix A.5): uint8 [3, crop_px, crop_px].

    Of an image more than four times as long as wide, the far ends go before the resize, which would make them huge.
    """
    pixels = decode_image(data)
    limit = 4 * min(pixels.shape[:2])
    top, left = (max(0, side - limit) // 2 for side in pixels.shape[:2])
    image = torch.from_numpy(pixels[top : top + limit, left : left + limit]).permute(2, 0, 1)
    resized = TF.resize(image, [resize_px], antialias=True)
    cropped: Tensor = TF.center_crop(resized, [crop_px, crop_px])
    return cropped


@torch.no_grad()
def extract_features(
    network: nn.Module,
    index: DatasetIndex,
    config: EvaluateConfig,
    *,
    device: torch.device,
    num_threads: int,
    runtime: RuntimeConfig = _DEFAULT_RUNTIME,
) -> Features:
    """Run every image of a labelled data set through a network once, whatever the number of ranks.

    Args:
        network: normalised images [B, 3, crop, crop] to features [B, dim]; used in evaluation mode.
        index: the data set.
        config: sizes of the resize and of the centre crop.
        device: where the network is.
        num_threads: decoding threads of this rank.
        runtime: how shards in an object store are read.

    Raises:
        ValueError: an image has no label.
    """
    first, last = share(index.num_samples, rank(), world_size())
    was_training = network.training
    network.eval()
    values, labels, num_broken = [], [], 0
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        for ids, images, broken in centre_crops(
            reader, first, last, resize_px=config.resize_px, crop_px=config.crop_px, num_threads=num_threads
        ):
            progress()
            num_broken += broken
            if len(images):
                labels.append(torch.tensor([label_of(reader, sample_id) for sample_id in ids.tolist()], device=device))
                values.append(F.normalize(network(normalized(images, device)).float(), dim=1))
    network.train(was_training)
    return _with_place(values, labels, num_broken, device)


def centre_crops(
    reader: ShardReader, first: int, last: int, *, resize_px: int, crop_px: int, num_threads: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, int]]:
    """Decode consecutive samples, from one id up to before another; see :func:`centre_crops_of`."""
    return centre_crops_of(reader, range(first, last), resize_px=resize_px, crop_px=crop_px, num_threads=num_threads)


def centre_crops_of(
    reader: ShardReader, ids: Sequence[int], *, resize_px: int, crop_px: int, num_threads: int
) -> Iterator[tuple[NDArray[np.int64], Tensor, int]]:
    """Decode samples in blocks; the next block is decoded while the last one is used.

    Args:
        reader: of the samples.
        ids: of the samples, in the order in which they come.
        resize_px: shorter side of the images before the crop.
        crop_px: centre crop.
        num_threads: that decode.

    Yields:
        Of a block, the ids of the images that can be decoded, int64 [n]; the images, uint8 [n, 3, crop_px, crop_px];
        and how many cannot, which the log names.
    """
    with ThreadPoolExecutor(num_threads) as pool:

        def load(sample_id: int) -> Tensor | None:
            try:
                return centre_crop(reader.image(sample_id), resize_px=resize_px, crop_px=crop_px)
            except (BrokenImageError, ChecksumError) as error:
                _logger.warning("%s is left out of the evaluation: %s", reader.name(sample_id), error)
                return None

        def submit(start: int) -> list[Future[Tensor | None]]:
            reader.prefetch(np.array(ids[start : start + _READ_AHEAD], dtype=np.int64))
            return [pool.submit(load, sample_id) for sample_id in ids[start : start + _BATCH]]

        pending = submit(0)
        for start in range(0, len(ids), _BATCH):
            loaded = [future.result() for future in pending]
            pending = submit(start + _BATCH)
            block = ids[start : start + _BATCH]
            sound = [sample_id for sample_id, image in zip(block, loaded, strict=True) if image is not None]
            images = [image for image in loaded if image is not None]
            whole = torch.stack(images) if images else torch.empty(0, 3, crop_px, crop_px, dtype=torch.uint8)
            yield np.array(sound, dtype=np.int64), whole, len(loaded) - len(images)


def normalized(images: Tensor, device: torch.device) -> Tensor:
    """What a network sees: uint8 [n, 3, height, width] -> float32 on the device, by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (COLOUR_MEAN, COLOUR_STD))
    return (images.to(device).float() / 255 - mean) / std


def label_of(reader: ShardReader, sample_id: int) -> int:
    """The class of a sample.

    Raises:
        ValueError: it has none, or a negative number.
    """
    label = reader.label(sample_id)
    if label is None:
        raise ValueError(f"{reader.name(sample_id)} has no label (.cls); an evaluation needs labelled images")
    if label < 0:
        raise ValueError(f"{reader.name(sample_id)} has the label {label}; number the classes from 0")
    return label


def _with_place(values: list[Tensor], labels: list[Tensor], num_broken: int, device: torch.device) -> Features:
    """Number the rows over all ranks; broken images have left gaps, and a rank may have none.

    Raises:
        ValueError: no rank has any.
    """
    dim = int(all_reduce_max(torch.tensor(values[0].shape[1] if values else 0)))
    counts = torch.zeros(world_size() + 1, dtype=torch.int64)
    counts[rank()] = sum(len(part) for part in values)
    counts[-1] = num_broken
    all_reduce_sum(counts)
    if not counts[:-1].any():
        raise ValueError(f"none of the {num_broken} images to evaluate on can be decoded; mend or replace them")
    return Features(
        values=torch.cat([torch.empty(0, dim, device=device), *values]),
        labels=torch.cat([torch.empty(0, dtype=torch.int64, device=device), *labels]),
        offset=int(counts[: rank()].sum()),
        total=int(counts[:-1].sum()),
        num_broken=int(counts[-1]),
    )


@torch.no_grad()
def knn_accuracies(train: Features, test: Features | None, config: Neighbors) -> dict[int, float]:
    """Top-1 accuracy of k-NN (appendix B.6), equal on every rank.

    Args:
        train: the images that vote.
        test: the images that are classified, each counted once; None to leave one out of ``train``.
        config: the k's and the temperature.

    Returns:
        Per asked k, the share of test images whose label is predicted, in [0, 1].
    """
    queries = test if test is not None else train
    values = gather_rows(queries.values, dim=0, offset=queries.offset, total=queries.total)
    labels = gather_rows(queries.labels, dim=0, offset=queries.offset, total=queries.total)
    own_rows = None
    if test is None:
        own_rows = torch.arange(train.total, device=values.device) - train.offset
        own_rows[own_rows >= len(train.values)] = -1
        own_rows.clamp_(min=-1)
    predictions = knn_predict(
        train.values,
        train.labels,
        values,
        num_neighbors=config.num_neighbors,
        temperature=config.temperature,
        own_rows=own_rows,
    )
    return {k: float((predicted == labels).double().mean()) for k, predicted in predictions.items()}


def evaluate_backbone(
    network: nn.Module,
    evaluation: Evaluation,
    *,
    device: torch.device,
    num_threads: int,
    runtime: RuntimeConfig = _DEFAULT_RUNTIME,
) -> dict[str, float]:
    """Accuracy of k-NN on a network's features, by name: ``{"knn_20": 0.59, ...}``.

    Args:
        network: as :func:`extract_features` takes it.
        evaluation: which images, and the protocol.
        device: where the network is.
        num_threads: decoding threads of this rank.
        runtime: how shards in an object store are read.
    """

    def features_of(index: DatasetIndex) -> Features:
        return extract_features(
            network, index, evaluation.config, device=device, num_threads=num_threads, runtime=runtime
        )

    train = features_of(evaluation.train)
    test = features_of(evaluation.test) if evaluation.test is not None else None
    return {f"knn_{k}": accuracy for k, accuracy in knn_accuracies(train, test, evaluation.config).items()}
