import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from swav_testing import eval_oracles

from swav_eval.config import SvmProtocol
from swav_eval.linear_svm import Choice, choose, fit


def protocol(**settings: Any) -> SvmProtocol:
    return SvmProtocol(name="svm_voc07", **settings)


def rows_of(seed: int, *, num_rows: int = 80, dim: int = 6) -> tuple[eval_oracles.Array, Any]:
    draws = np.random.default_rng(seed)
    rows = draws.standard_normal((num_rows, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, rows[:, 0] + 0.3 * draws.standard_normal(num_rows) > 0.3


def finished(steps: Generator[None, None, Choice]) -> tuple[Choice, int]:
    """What came out, and after how many steps."""
    num_steps = 0
    while True:
        try:
            next(steps)
        except StopIteration as stopped:
            return stopped.value, num_steps
        num_steps += 1


def chosen(rows: Any, present: Any, one: SvmProtocol, *, num_threads: int = 1) -> tuple[Choice, int]:
    with ThreadPoolExecutor(num_threads) as pool:
        return finished(choose(rows, present, one, pool))


@pytest.mark.parametrize("cost", [2.0**-19, 2.0**-5, 1.0, 30.0])
@pytest.mark.parametrize("positive_weight", [1.0, 2.0])
def test_the_weights_minimise_liblinears_objective(cost: float, positive_weight: float) -> None:
    rows, present = rows_of(0)
    svm = fit(rows, present, cost=cost, protocol=protocol(positive_weight=positive_weight))
    expected = eval_oracles.svm_weights(rows, present, cost, positive_weight)
    found = np.append(svm.weights, svm.bias)
    assert svm.is_converged
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    values = [eval_oracles.svm_objective(one, rows, present, cost, positive_weight) for one in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    nearby = expected + 0.05 * np.abs(expected).max() * np.random.default_rng(1).standard_normal(len(expected))
    assert eval_oracles.svm_objective(nearby, rows, present, cost, positive_weight) > values[1]
    np.testing.assert_allclose(svm.scores(rows), rows @ svm.weights + svm.bias)


def test_the_cost_is_the_one_that_ranks_held_out_images_best() -> None:
    rows, present = rows_of(3, dim=20)
    one = protocol(costs=(10.0, 0.001, 0.1, 1.0), num_folds=4, seed=5)
    found, num_steps = chosen(rows, present, one)
    means = {}
    for cost in one.costs:
        precisions = []
        for train, held_out in StratifiedKFold(4, shuffle=True, random_state=5).split(rows, present):
            weights = eval_oracles.svm_weights(rows[train], present[train], cost, 2.0)
            scores = rows[held_out] @ weights[:-1] + weights[-1]
            precisions.append(eval_oracles.average_precision(scores, present[held_out], "all-point"))
        means[cost] = float(np.mean(precisions))
    assert len(set(means.values())) > 1
    assert found.cost == max(means, key=lambda cost: means[cost])
    assert found.fold_precision == pytest.approx(means[found.cost], abs=1e-6)
    whole = eval_oracles.svm_weights(rows, present, found.cost, 2.0)
    assert np.abs(np.append(found.svm.weights, found.svm.bias) - whole).max() < 2e-3 * np.abs(whole).max()
    assert num_steps == 4 * 4 + 1


def test_of_equal_costs_the_smallest_is_taken() -> None:
    rows = np.repeat(np.eye(2), 10, axis=0)  # any cost ranks these without a fault
    found, _ = chosen(rows, rows[:, 0] > 0, protocol(costs=(1.0, 0.25, 4.0)))
    assert (found.cost, found.fold_precision) == (0.25, 1.0)


def test_threads_change_nothing() -> None:
    rows, present = rows_of(1)
    one, several = (chosen(rows, present, protocol(), num_threads=number)[0] for number in (1, 3))
    assert np.array_equal(one.svm.weights, several.svm.weights)
    assert (one.cost, one.svm.bias, one.fold_precision) == (several.cost, several.svm.bias, several.fold_precision)


def test_a_fold_has_an_image_of_each_kind_however_few_there_are() -> None:
    rows, _ = rows_of(2, num_rows=30)
    for positives in ([3, 11, 29], sorted(set(range(30)) - {0, 1, 2})):
        present = np.zeros(30, dtype=bool)
        present[positives] = True
        found, _ = chosen(rows, present, protocol(costs=(1.0,), num_folds=3))
        assert 0 < found.fold_precision <= 1


def test_fits_that_do_not_converge_are_counted() -> None:
    rows, present = rows_of(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found, _ = chosen(rows, present, protocol(costs=(100.0,), max_iterations=1))
    assert found.num_unconverged == 4
    assert not found.svm.is_converged
    assert {warning.category for warning in seen} == {ConvergenceWarning}
    assert chosen(rows, present, protocol(costs=(100.0,)))[0].num_unconverged == 0
