from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve
from swav_testing import eval_oracles

from swav_eval.average_precision import Kind, average_precision

KINDS: tuple[Kind, ...] = ("11-point", "all-point")
IMAGES = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(IMAGES, st.randoms(use_true_random=False))
def test_it_is_the_definition_whatever_the_order(images: list[tuple[int, bool, bool]], draws: Any) -> None:
    scores, present, ignored = map(list, zip(*images, strict=True))
    if not any(truth and not is_ignored for _, truth, is_ignored in images):
        with pytest.raises(ValueError, match="images that count has the class"):
            average_precision(scores, present, kind="all-point", ignored=ignored)
        return
    shuffled = list(images)
    draws.shuffle(shuffled)
    for kind in KINDS:
        found = average_precision(scores, present, kind=kind, ignored=ignored)
        assert found == pytest.approx(eval_oracles.average_precision(scores, present, kind, ignored), abs=1e-12)
        assert 0 < found <= 1
        again = map(list, zip(*shuffled, strict=True))
        assert found == average_precision(next(again), next(again), kind=kind, ignored=next(again))


@pytest.mark.parametrize("seed", range(20))
def test_it_fits_scikit_learns_curve(seed: int) -> None:
    draws = np.random.default_rng(seed)
    present = draws.random(200) < 0.2
    scores = present + draws.standard_normal(200)
    precision, recall, _ = precision_recall_curve(present, scores)  # recall falls to 0
    best = np.maximum.accumulate(precision)  # at this recall or a higher one
    area = -(np.diff(recall) * best[:-1]).sum()
    assert average_precision(scores, present, kind="all-point") == pytest.approx(area, abs=1e-12)
    tenths = [best[np.flatnonzero(recall >= tenth / 10 - 1e-12)[-1]] for tenth in range(1, 11)]
    of_none = precision[:-1].max()  # the curve ends in a precision of 1 that no threshold has
    expected = (sum(tenths) + of_none) / 11
    assert average_precision(scores, present, kind="11-point") == pytest.approx(expected, abs=1e-12)
    assert average_precision_score(present, scores) <= area


def test_precision_that_never_rises_is_scikit_learns() -> None:
    scores, present = np.arange(10, 0, -1.0), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=bool)
    for kind in KINDS:
        assert average_precision(scores, present, kind=kind) == average_precision_score(present, scores) == 1
        assert average_precision(np.zeros(10), present, kind=kind) == pytest.approx(0.3)  # one threshold


def test_examples_by_hand() -> None:
    # Found at ranks 1 and 4 of 5: precisions 1 and 1/2 at recalls 1/2 and 1.
    scores, present = [5, 4, 3, 2, 1], [True, False, False, True, False]
    assert average_precision(scores, present, kind="all-point") == pytest.approx(0.75)
    assert average_precision(scores, present, kind="11-point") == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    ignored = [False, True, True, False, False]
    assert average_precision(scores, present, kind="11-point", ignored=ignored) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, float("nan")], [True, False]), "1 of 2 scores are not finite"),
        (([1.0, float("inf")], [True, False]), "1 of 2 scores are not finite"),
        (([1.0, 2.0], [False, False]), "none of the 2 images that count has the class"),
        (([], []), "none of the 0 images"),
        (([1.0, 2.0], [True]), r"a score and a truth per image, got \(2,\) and \(1,\)"),
        (([[1.0]], [[True]]), "a score and a truth per image"),
    ],
)
def test_what_has_no_average_precision_is_refused(arguments: Any, message: str) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=message):
            average_precision(*arguments, kind=kind)


def test_wrong_flags_and_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="ignored must be one bool per image"):
        average_precision([1.0, 2.0], [True, False], kind="11-point", ignored=[True])
    with pytest.raises(ValueError, match="kind='12-point' is neither"):
        average_precision([1.0, 2.0], [True, False], kind="12-point")  # type: ignore[arg-type]
    hidden = average_precision([1.0, float("nan")], [True, False], kind="11-point", ignored=[False, True])
    assert hidden == 1  # the score of an image that does not count
