"""k-nearest neighbours on frozen features (appendix B.6, Table 7).

``python -m swav_eval.knn --backbone FILE --train URL [--test URL] [--output FILE] [--k 20 200]``
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.features import Features, knn_accuracies, label_of
from swav_eval import command
from swav_eval.command import Job
from swav_eval.config import KnnProtocol
from swav_eval.results import Outcome

_SHORT: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("--k", "num_neighbors", {"type": int, "nargs": "+", "metavar": "K"}),
    ("--temperature", "temperature", {"type": float}),
    ("--resize-px", "resize_px", {"type": int}),
    ("--crop-px", "crop_px", {"type": int}),
    ("--device", "runtime.device", {"choices": ["auto", "cpu", "cuda"]}),
)


def carry_out(job: Job[KnnProtocol]) -> Outcome:
    """Let the nearest train images vote on each test image; without test images, on each train image but by itself.

    Returns:
        ``knn_<k>``: the share of test images whose label is predicted.

    Raises:
        ValueError: an image has no label, or there are fewer train images than a k.
    """
    for index in job.indices.values():
        with _reader(job, index) as reader:
            label_of(reader, 0)  # unlabelled images are refused before all features are computed
    features = {name: _features(job, index, name) for name, index in job.indices.items()}
    accuracies = knn_accuracies(features["train"], features.get("test"), job.protocol)
    return Outcome(
        metrics={f"knn_{k}": accuracy for k, accuracy in accuracies.items()},
        broken={name: found.num_broken for name, found in features.items()},
    )


def _features(job: Job[KnnProtocol], index: DatasetIndex, name: str) -> Features:
    """Features of unit norm with their labels, on the device."""
    found = job.features(name)
    if (found.labels < 0).any():
        with _reader(job, index) as reader:
            label_of(reader, int(found.ids[found.labels.argmin()]))
    return Features(
        values=F.normalize(found.values.to(job.device), dim=1),
        labels=torch.from_numpy(found.labels).to(job.device),
        offset=found.offset,
        total=found.total,
        num_broken=found.num_broken,
    )


def _reader(job: Job[KnnProtocol], index: DatasetIndex) -> ShardReader:
    runtime = job.protocol.runtime
    return ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    return command.main(
        KnnProtocol,
        carry_out,
        arguments,
        prog="swav_eval.knn",
        description="k-NN accuracy of a backbone (appendix B.6).",
        needs_test=False,
        recipe="knn",
        short=_SHORT,
    )


if __name__ == "__main__":
    sys.exit(main())
