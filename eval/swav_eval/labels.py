"""The classes of images, checked before and while they are trained on."""

import numpy as np
import torch
from numpy.typing import NDArray

from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.data.source import has_labels
from swav.distributed import all_reduce_max, rank, world_size
from swav.features import label_of
from swav.partition import share
from swav.watchdog import progress
from swav_eval.config import FinetuneProtocol, LinearProtocol

_LABELS_AT_ONCE = 4096


def check_labels(index: DatasetIndex, protocol: LinearProtocol | FinetuneProtocol) -> None:
    """Refuse images without a label of a class before anything is computed. Every rank must call it.

    Args:
        index: of the images, whose labels are all read, each by one rank.
        protocol: number of classes, and how shards are read.

    Raises:
        ValueError: names one such image.
    """
    runtime, wrong = protocol.runtime, -1
    first, last = share(index.num_samples, rank(), world_size())
    check_labelled(index)
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        for start in range(first, last, _LABELS_AT_ONCE):
            reader.prefetch(np.arange(start, min(start + 2 * _LABELS_AT_ONCE, last)))
            for sample_id in range(start, min(start + _LABELS_AT_ONCE, last)):
                label = reader.label(sample_id)
                if label is None or not 0 <= label < protocol.num_classes:
                    wrong = max(wrong, sample_id)
            progress()
        wrong = int(all_reduce_max(torch.tensor(wrong)))  # so that all ranks end alike
        if wrong >= 0:
            label_of_class(reader, wrong, protocol.num_classes)


def check_labelled(index: DatasetIndex) -> None:
    """Refuse images without labels by what the index knows.

    Raises:
        ValueError: some have none, or all.
    """
    if not has_labels(index):
        raise ValueError(
            f"{index.folder} has no labels (.cls), and a classifier needs labelled images; give a folder per class, or "
            "shards with labels"
        )


def check_stored_labels(index: DatasetIndex, ids: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> None:
    """Refuse labels that were stored with features and are of no class.

    Args:
        index: of the images.
        ids: int64 [n], of the samples.
        labels: int64 [n], theirs.
        classes: how many there are.

    Raises:
        ValueError: names one such image.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        with ShardReader(index) as reader:
            label_of_class(reader, int(ids[wrong[0]]), classes)


def label_of_class(reader: ShardReader, sample_id: int, num_classes: int) -> int:
    """The class of a sample.

    Raises:
        ValueError: it has none, or one that is not from 0 to ``num_classes - 1``.
    """
    label = label_of(reader, sample_id)
    if label >= num_classes:
        raise ValueError(
            f"{reader.name(sample_id)} has the label {label}, and with num_classes={num_classes} labels are 0 to "
            f"{num_classes - 1}; set num_classes to that of the data"
        )
    return label
