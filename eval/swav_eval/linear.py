"""A linear classifier on a frozen network (appendices A.3 and A.5; Tables 2, 3 and 8 to 10).

``python -m swav_eval.linear --recipe linear_imagenet --backbone FILE --train URL --test URL [--output FILE]``
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from swav.data.index import DatasetIndex
from swav.distributed import rank, world_size
from swav.partition import share
from swav.storage import join
from swav_eval import command
from swav_eval.accuracy import Block, evaluate_classifier, feature_blocks, image_blocks
from swav_eval.classifier import Classifier, train_classifier
from swav_eval.command import Job
from swav_eval.config import LinearProtocol
from swav_eval.labelled_data import Batches, FeatureBatches, check_num_broken, labelled_pipeline
from swav_eval.labels import check_labelled, check_labels, check_stored_labels
from swav_eval.results import Outcome, identity
from swav_eval.subsets import hold_out
from swav_eval.training_report import RateGroup


@dataclass(frozen=True, slots=True)
class _Material:
    """What the classifier learns from and is judged by: images, or features of them."""

    trunk: nn.Module
    batches: Batches
    held_out: Callable[[], Iterator[Block]]
    test: Callable[[], Iterator[Block]]
    num_broken: dict[str, int]  # that are known before the training, by "train" and "test"


def carry_out(job: Job[LinearProtocol]) -> Outcome:
    """Train one classifier per learning rate, all at once; of several, the best on held-out images is the result's.

    Raises:
        ValueError: an image has no label of a class, or there are too few images.
        swav.program.Stopped: on SIGTERM or SIGINT.
        RuntimeError: the training has diverged, too many images are broken, or a file cannot be read or written.
    """
    protocol = job.protocol
    check_labelled(job.train)
    check_labels(job.indices["test"], protocol)
    rates = protocol.learning_rates
    learned, held_out = np.arange(job.train.num_samples), np.empty(0, dtype=np.int64)
    if len(rates) > 1:
        learned, held_out = hold_out(job.train.num_samples, protocol.held_out_fraction, seed=protocol.seed)
    with _material(job, learned, held_out) as material:
        classifier = Classifier(
            material.trunk,
            job.backbone.backbone.num_features,
            protocol.num_classes,
            num_heads=len(rates),
            seed=protocol.seed,
            is_frozen=True,
        ).to(job.device)
        trained = train_classifier(
            classifier,
            material.batches,
            [RateGroup("learning_rates", rate, list(head.parameters())) for rate, head in _pairs(rates, classifier)],
            protocol,
            device=job.device,
            folder=join(job.work, "checkpoints") if job.work is not None else None,
            identity=identity(protocol, backbone_sha256=job.backbone.sha256, data={"train": job.train.identity}),
        )
        facts: list[dict[str, Any]] = [{"learning_rate": rate} for rate in rates]
        num_broken = material.num_broken | {"train": material.num_broken["train"] + trained.num_broken}
        best = 0
        if len(rates) > 1:
            accuracies, seen = _judge(classifier, material.held_out(), protocol)
            num_broken["train"] += seen["broken"]
            for fact, accuracy in zip(facts, accuracies, strict=True):
                fact["held_out"] = accuracy | {"images": seen["images"]}
            best = _best(accuracies, trained.has_diverged)
        accuracies, seen = _judge(classifier, material.test(), protocol)
        num_broken["test"] += seen["broken"]
    for fact, accuracy, has_diverged in zip(facts, accuracies, trained.has_diverged, strict=True):
        fact["test"] = accuracy
        if has_diverged:
            fact |= {"held_out": None, "test": None}
    return Outcome(
        metrics=accuracies[best],
        broken=num_broken,
        facts={"learning_rate": rates[best], "rates": facts, "trained_on": len(learned)},
    )


def _pairs(rates: tuple[float, ...], classifier: Classifier) -> Iterator[tuple[float, nn.Module]]:
    return zip(rates, classifier.heads, strict=True)


def _best(accuracies: list[dict[str, float]], has_diverged: list[bool]) -> int:
    """The head with the highest accuracy; of equals, the first."""
    return max(
        (number for number, diverged in enumerate(has_diverged) if not diverged),
        key=lambda number: accuracies[number]["top1"],
    )


def _judge(
    classifier: Classifier, blocks: Iterator[Block], protocol: LinearProtocol
) -> tuple[list[dict[str, float]], dict[str, int]]:
    return evaluate_classifier(
        classifier, blocks, num_classes=protocol.num_classes, precision=protocol.runtime.precision
    )


@contextmanager
def _material(job: Job[LinearProtocol], learned: NDArray[np.int64], held_out: NDArray[np.int64]) -> Iterator[_Material]:
    """Open the images, or compute their features.

    Args:
        job: the evaluation.
        learned: int64 [n], ids of the images to train on, rising.
        held_out: int64 [m], ids of those by which a rate is chosen, rising.
    """
    if not job.protocol.augment:
        yield _features(job, learned, held_out)
        return

    def judged(index: DatasetIndex, ids: range | list[int]) -> Iterator[Block]:
        return image_blocks(
            index,
            ids,
            job.protocol,
            resize_px=job.resize_px,
            crop_px=job.crop_px,
            device=job.device,
            num_threads=job.num_threads,
        )

    with labelled_pipeline(
        job.train, learned, job.protocol, crop_px=job.crop_px, device=job.device, num_threads=job.num_threads
    ) as batches:
        yield _Material(
            _on_device(job),
            batches,
            held_out=lambda: judged(job.train, held_out.tolist()),
            test=lambda: judged(job.indices["test"], range(job.indices["test"].num_samples)),
            num_broken={"train": 0, "test": 0},
        )


def _on_device(job: Job[LinearProtocol]) -> nn.Module:
    network = job.backbone.backbone.to(job.device)
    return network.to(memory_format=torch.channels_last) if job.device.type == "cuda" else network


def _features(job: Job[LinearProtocol], learned: NDArray[np.int64], held_out: NDArray[np.int64]) -> _Material:
    protocol = job.protocol
    if job.work is None and world_size() > 1:
        raise ValueError(
            f"with augment=false, {world_size()} ranks share the features through a folder; give --output or --work"
        )
    stored = {name: job.features(name) for name in ("train", "test")}
    ids, labels, values = stored["train"].all_ids(), stored["train"].all_labels(), stored["train"].mapped()
    check_num_broken(stored["train"].num_broken, job.train.num_samples, protocol)
    check_stored_labels(job.train, ids, labels, protocol.num_classes)
    batches = FeatureBatches(
        job.train,
        ids,
        values,
        labels,
        chosen=np.flatnonzero(np.isin(ids, learned)),
        protocol=protocol,
        device=job.device,
    )

    def judged_held_out() -> Iterator[Block]:
        rows = np.flatnonzero(np.isin(ids, held_out))
        return feature_blocks(values, labels, rows[slice(*share(len(rows), rank(), world_size()))], device=job.device)

    def judged_test() -> Iterator[Block]:
        own = stored["test"]
        return feature_blocks(own.values.numpy(), own.labels, np.arange(len(own.ids)), device=job.device)

    return _Material(
        nn.Identity(),
        batches,
        held_out=judged_held_out,
        test=judged_test,
        num_broken={name: features.num_broken for name, features in stored.items()},
    )


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    return command.main(
        LinearProtocol,
        carry_out,
        arguments,
        prog="swav_eval.linear",
        description="Accuracy of a linear classifier on a frozen backbone.",
    )


if __name__ == "__main__":
    sys.exit(main())
