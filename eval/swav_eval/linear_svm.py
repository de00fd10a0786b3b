"""A linear SVM of one class by LIBLINEAR, with its cost chosen by cross-validation (appendix A.5)."""

from collections.abc import Generator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from swav_eval.average_precision import Kind, average_precision
from swav_eval.config import SvmProtocol

Rows = NDArray[np.float64]
Flags = NDArray[np.bool_]

CHOSEN_BY: Kind = "all-point"  # average precision of the folds


@dataclass(frozen=True, slots=True)
class LinearSvm:
    """Scores ``rows @ weights + bias``, above 0 for the class."""

    weights: Rows  # [dim]
    bias: float
    is_converged: bool

    def scores(self, rows: Rows) -> Rows:
        """[n] for rows [n, dim]."""
        return rows @ self.weights + self.bias


@dataclass(frozen=True, slots=True)
class Choice:
    """The SVM of a class, and how it was found."""

    svm: LinearSvm
    cost: float
    fold_precision: float  # mean over the folds, of the cost that was chosen
    num_unconverged: int  # of all its fits


def fit(rows: Rows, present: Flags, *, cost: float, protocol: SvmProtocol) -> LinearSvm:
    """Minimise ``(|w|^2 + b^2) / 2 + cost * sum_i weight_i * max(0, 1 - y_i (w x_i + b))^2``.

    LIBLINEAR's primal solver (``dual=False``) is taken: it draws nothing at random, and converges in few iterations
    where the dual one does not for large costs. Both minimise the same. As in LIBLINEAR, the bias counts in the norm.

    Args:
        rows: float64 [n, dim].
        present: bool [n], positives, whose weight is ``protocol.positive_weight``; that of the others is 1.
        cost: how much the errors count.
        protocol: the other settings.
    """
    model = LinearSVC(
        penalty="l2",
        loss="squared_hinge",
        dual=False,
        C=cost,
        class_weight={1: protocol.positive_weight, 0: 1.0},
        max_iter=protocol.max_iterations,
        random_state=protocol.seed,
    )
    model.fit(rows, present.astype(np.int64))
    return LinearSvm(model.coef_[0], float(model.intercept_[0]), bool(model.n_iter_ < protocol.max_iterations))


def choose(rows: Rows, present: Flags, protocol: SvmProtocol, pool: Executor) -> Generator[None, None, Choice]:
    """Find the cost whose SVMs rank the images of held-out folds best, and fit all images with it.

    Folds are stratified and drawn by the seed. Of costs that are equally good, the smallest is taken.

    Args:
        rows: float64 [n, dim], without images in which the class is only difficult.
        present: bool [n].
        protocol: the settings.
        pool: threads for the fits; LIBLINEAR holds no lock of Python's.

    Yields:
        After each fit.
    """
    folds = StratifiedKFold(protocol.num_folds, shuffle=True, random_state=protocol.seed)
    parts = list(folds.split(rows, present))

    def judged(cost: float, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> tuple[float, bool]:
        svm = fit(rows[train], present[train], cost=cost, protocol=protocol)
        precision = average_precision(svm.scores(rows[held_out]), present[held_out], kind=CHOSEN_BY)
        return precision, svm.is_converged

    costs = sorted(set(protocol.costs))
    fits = [pool.submit(judged, cost, *part) for cost in costs for part in parts]
    for one in fits:
        one.result()
        yield
    precisions = np.array([one.result()[0] for one in fits]).reshape(len(costs), len(parts)).mean(axis=1)
    best = int(precisions.argmax())
    svm = pool.submit(fit, rows, present, cost=costs[best], protocol=protocol).result()
    yield
    num_unconverged = sum(not one.result()[1] for one in fits) + (not svm.is_converged)
    return Choice(svm, costs[best], float(precisions[best]), num_unconverged)
