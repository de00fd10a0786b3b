"""Linear SVMs on frozen features, one per class: mean average precision on VOC07 (appendix A.5, Table 3).

``python -m swav_eval.svm --backbone FILE --train URL --test URL [--output FILE]``
"""

import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from swav.bars import progress_bar
from swav.distributed import all_reduce_sum, rank, world_size
from swav.storage import join, read, stat, write_atomic
from swav_eval import command
from swav_eval.average_precision import Kind, average_precision
from swav_eval.command import Job
from swav_eval.config import SvmProtocol
from swav_eval.linear_svm import CHOSEN_BY, Choice, Rows, choose
from swav_eval.present_classes import Presence, check_counts, read_presence
from swav_eval.results import Outcome, identity
from swav_eval.rounds import in_rounds

FORMAT = "swav.svm/1"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClassResult:
    """What came out for one class; all are numbers, so that ranks can add them up."""

    cost: float
    fold_precision: float
    num_unconverged: float  # of its fits
    ap_11_point: float  # 0 for a class that no test image has
    ap_all_point: float


@dataclass(frozen=True, slots=True)
class _Images:
    """Of one data set."""

    rows: Rows  # [n, dim], unit norm
    classes: Presence


def carry_out(job: Job[SvmProtocol]) -> Outcome:
    """Fit an SVM for each class, on images that have it or not, and rank the test images by it.

    Images in which a class is only difficult take no part in its SVM or in its average precision. A class that no test
    image has is in no mean.

    Returns:
        ``map_11_point`` (VOC2007's definition, which Table 3 has) and ``map_all_point``.

    Raises:
        ValueError: an image's classes cannot be understood, or a class has too few images for the folds.
    """
    classes, images, broken = _prepared(job)
    train, test = images["train"], images["test"]
    check_counts(classes, train.classes, test.classes, num_folds=job.protocol.num_folds)
    results = _fitted(job, classes, train, test)
    num_test = test.classes.present.sum(axis=0).tolist()
    judged = [number for number in range(len(classes)) if num_test[number]]
    facts = {
        classes[number]: {
            "ap_11_point": one.ap_11_point if num_test[number] else None,
            "ap_all_point": one.ap_all_point if num_test[number] else None,
            "cost": one.cost,
            "fold_precision": one.fold_precision,
            "unconverged_fits": int(one.num_unconverged),
            "train_images": int(train.classes.present[:, number].sum()),
            "test_images": num_test[number],
        }
        for number, one in enumerate(results)
    }
    return Outcome(
        metrics={
            "map_11_point": float(np.mean([results[number].ap_11_point for number in judged])),
            "map_all_point": float(np.mean([results[number].ap_all_point for number in judged])),
        },
        broken=broken,
        facts={
            "classes": facts,
            "classes_without_test_images": [name for number, name in enumerate(classes) if not num_test[number]],
            "cost_chosen_by": f"{CHOSEN_BY} average precision over {job.protocol.num_folds} folds",
            "unconverged_fits": int(sum(one.num_unconverged for one in results)),
            "fits": len(classes) * (len(set(job.protocol.costs)) * job.protocol.num_folds + 1),
        },
    )


def _prepared(job: Job[SvmProtocol]) -> tuple[tuple[str, ...], dict[str, _Images], dict[str, int]]:
    """Names of the classes; features and classes of the images; and how many images are broken."""
    if job.work is None and world_size() > 1:
        raise ValueError(f"{world_size()} ranks share the features through a folder; give --output or --work")
    first = {name: (index, np.zeros(1, np.int64)) for name, index in job.indices.items()}
    read_presence(first, job.protocol.runtime)  # images without classes are refused before all features are computed
    rows, ids, broken = {}, {}, {}
    for name in job.indices:
        found = job.features(name)
        rows[name] = _of_unit_norm(found.mapped())
        ids[name], broken[name] = found.all_ids(), found.num_broken
    samples = {name: (index, ids[name]) for name, index in job.indices.items()}
    classes, presence = read_presence(samples, job.protocol.runtime)
    return classes, {name: _Images(rows[name], presence[name]) for name in job.indices}, broken


def _of_unit_norm(features: NDArray[np.float32]) -> Rows:
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


def _fitted(job: Job[SvmProtocol], classes: tuple[str, ...], train: _Images, test: _Images) -> list[ClassResult]:
    """The results of all classes, on every rank; those that the work folder has are not fitted again."""
    results: dict[int, ClassResult] = {}
    own = range(rank(), len(classes), world_size())
    digest = _digest(job, classes)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(job.num_threads, thread_name_prefix="swav-svm") as pool,
        progress_bar(total=len(own), desc="fitting SVMs", unit=" classes", disable=rank() != 0) as bar,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # they are counted

        def work() -> Iterator[None]:
            for number in own:
                url = join(job.work, f"svm-{digest}-{number:04d}.json") if job.work is not None else None
                one = _stored(url) if url is not None else None
                if one is None:
                    used = ~train.classes.ignored[:, number]
                    present = train.classes.present[used, number]
                    choice = yield from choose(train.rows[used], present, job.protocol, pool)
                    one = _judged(choice, test, number)
                    if url is not None:
                        write_atomic(url, json.dumps(asdict(one)).encode())
                results[number] = one
                bar.update()
                yield

        try:
            in_rounds(work())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    table = torch.zeros(len(classes), len(fields(ClassResult)), dtype=torch.float64)
    for number, one in results.items():
        table[number] = torch.tensor(astuple(one), dtype=torch.float64)
    return [ClassResult(*row) for row in all_reduce_sum(table).tolist()]


def _judged(choice: Choice, test: _Images, number: int) -> ClassResult:
    """Rank the test images by the SVM of a class."""
    present, ignored = test.classes.present[:, number], test.classes.ignored[:, number]
    precisions = [0.0, 0.0]
    if present.any():
        scores = choice.svm.scores(test.rows)
        kinds: tuple[Kind, ...] = ("11-point", "all-point")
        precisions = [average_precision(scores, present, kind=kind, ignored=ignored) for kind in kinds]
    return ClassResult(choice.cost, choice.fold_precision, choice.num_unconverged, *precisions)


def _digest(job: Job[SvmProtocol], classes: tuple[str, ...]) -> str:
    """Of all that the classes' results depend on."""
    data = {name: index.identity for name, index in job.indices.items()}
    whole = identity(job.protocol, backbone_sha256=job.backbone.sha256, data=data)
    facts = {"svm": FORMAT, "classes": classes, "sizes": [job.resize_px, job.crop_px], **whole}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _stored(url: str) -> ClassResult | None:
    """A class's result that an earlier evaluation has written; None where there is none."""
    if stat(url) is None:
        return None
    try:
        one = ClassResult(**json.loads(read(url)))
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in astuple(one)):
            raise ValueError(f"{one} has something else than numbers")
    except (ValueError, TypeError) as error:
        _logger.warning("%s is damaged (%s): the class is fitted again", url, error)
        return None
    return one


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    return command.main(
        SvmProtocol,
        carry_out,
        arguments,
        prog="swav_eval.svm",
        description="Linear SVMs on frozen features, mean average precision (appendix A.5, VOC07).",
    )


if __name__ == "__main__":
    sys.exit(main())
