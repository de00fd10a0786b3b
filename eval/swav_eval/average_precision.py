"""Average precision as Pascal VOC defines it, in float64."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["11-point", "all-point"]

_RECALLS = 11  # 0, 0.1, ..., 1


def average_precision(scores: ArrayLike, present: ArrayLike, *, kind: Kind, ignored: ArrayLike | None = None) -> float:
    """How well scores rank the images of a class before all others.

    Precision and recall are taken at each score that occurs, as a threshold: images of equal scores enter together, so
    that the order in which they stand changes nothing. (VOC's own program lets them enter one by one.)

    - "11-point", VOC2007's: the mean, over recalls of 0, 0.1, ..., 1, of the best precision at a recall of at least
      this.
    - "all-point", from VOC2010 on: the area under the curve of the best precision at a recall of at least r, over r
      from 0 to 1. (scikit-learn's ``average_precision_score`` leaves out "the best ... of at least", and is lower.)

    Args:
        scores: [n], finite.
        present: bool [n], whether the image has the class.
        kind: which definition.
        ignored: bool [n], images that are neither positive nor negative: those in which the class is only difficult.

    Returns:
        In (0, 1].

    Raises:
        ValueError: no image that counts has the class, a score is not finite, or the lengths differ.
    """
    score, truth = np.asarray(scores, dtype=np.float64), np.asarray(present, dtype=bool)
    if score.ndim != 1 or score.shape != truth.shape:
        raise ValueError(f"average precision needs a score and a truth per image, got {score.shape} and {truth.shape}")
    if ignored is not None:
        counts = ~np.asarray(ignored, dtype=bool)
        if counts.shape != score.shape:
            raise ValueError(f"ignored must be one bool per image, got {counts.shape} for {score.shape}")
        score, truth = score[counts], truth[counts]
    if not np.isfinite(score).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(score))} of {len(score)} scores are not finite")
    num_positives = int(truth.sum())
    if num_positives == 0:
        raise ValueError(f"none of the {len(truth)} images that count has the class, so it has no average precision")
    found, retrieved = _at_thresholds(score, truth)
    best = np.maximum.accumulate((found / retrieved)[::-1])[::-1]  # precision at this recall or a higher one
    if kind == "11-point":
        # The first threshold with a recall of at least i / 10, in whole numbers.
        first = np.searchsorted(found * (_RECALLS - 1), np.arange(_RECALLS) * num_positives)
        return float(best[first].mean())
    if kind == "all-point":
        return float((np.diff(found, prepend=0) * best).sum() / num_positives)
    raise ValueError(f"kind={kind!r} is neither '11-point' nor 'all-point'")


def _at_thresholds(score: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per score that occurs, the highest first: how many positives, and how many images, score at least so high."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    return np.cumsum(truth[order])[ends], ends + 1
