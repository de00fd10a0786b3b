"""What the protocols compute, written out slowly in float64 and independently of the package."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]


def average_precision(scores: Any, present: Any, kind: str, ignored: Any = None) -> float:
    """Pascal VOC's definitions by loops over thresholds; images of one score enter together."""
    images = [
        (float(score), bool(truth))
        for score, truth, is_ignored in zip(
            scores, present, [False] * len(scores) if ignored is None else ignored, strict=True
        )
        if not is_ignored
    ]
    num_positives = sum(truth for _, truth in images)
    points = []  # (positives found, precision)
    for threshold in sorted({score for score, _ in images}, reverse=True):
        retrieved = [truth for score, truth in images if score >= threshold]
        points.append((sum(retrieved), sum(retrieved) / len(retrieved)))
    if kind == "11-point":
        total = 0.0
        for tenth in range(11):
            total += max(precision for found, precision in points if found * 10 >= tenth * num_positives)
        return total / 11
    area = 0.0
    for number in range(1, num_positives + 1):  # each positive is a step of recall
        area += max(precision for found, precision in points if found >= number) / num_positives
    return area


def svm_objective(parameters: Array, rows: Array, present: Any, cost: float, positive_weight: float) -> float:
    """LIBLINEAR's, of weights and bias [dim + 1]: squared hinge, and a bias that counts in the norm."""
    total = float(parameters @ parameters) / 2
    for row, truth in zip(rows, present, strict=True):
        margin = (1 if truth else -1) * (float(row @ parameters[:-1]) + float(parameters[-1]))
        total += cost * (positive_weight if truth else 1.0) * max(0.0, 1 - margin) ** 2
    return total


def svm_weights(rows: Array, present: Any, cost: float, positive_weight: float) -> Array:
    """The minimum of :func:`svm_objective` by quasi-Newton steps: weights and bias [dim + 1]."""
    signs = np.where(present, 1.0, -1.0)
    weights = np.where(present, positive_weight, 1.0)
    extended = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)

    def value_and_gradient(parameters: Array) -> tuple[float, Array]:
        slack = np.maximum(0, 1 - signs * (extended @ parameters))
        value = parameters @ parameters / 2 + cost * (weights * slack**2).sum()
        return float(value), parameters - 2 * cost * extended.T @ (weights * slack * signs)

    found = minimize(
        value_and_gradient,
        np.zeros(extended.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10},
    )
    minimum: Array = found.x
    return minimum
