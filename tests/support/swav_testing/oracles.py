"""The paper's formulas, written out slowly in float64 and independently of the package."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sinkhorn(scores: Array, epsilon: float, num_iters: int) -> Array:
    """The pseudo-code of appendix A.1: scores [B, K] -> codes [B, K].

    The shift by the maximum cancels in the first division and only keeps float64 from overflowing.
    """
    q = np.exp((scores - scores.max()) / epsilon).T
    q = q / q.sum()
    num_prototypes, batch = q.shape
    row_target = np.ones(num_prototypes) / num_prototypes
    column_target = np.ones(batch) / batch
    for _ in range(num_iters):
        u = q.sum(axis=1)
        q = q * (row_target / u)[:, None]
        q = q * (column_target / q.sum(axis=0))[None, :]
    return (q / q.sum(axis=0, keepdims=True)).T


def sinkhorn_log(scores: Array, epsilon: float, num_iters: int) -> Array:
    """The same over logarithms, for an epsilon at which even float64 underflows."""
    log_q = scores.T / epsilon
    for _ in range(num_iters):
        log_q = log_q - np.logaddexp.reduce(log_q, axis=1, keepdims=True)
        log_q = log_q - np.logaddexp.reduce(log_q, axis=0, keepdims=True)
    return np.exp(log_q).T


def swav_loss(scores: Array, codes: Array, temperature: float) -> float:
    """Swapped prediction by loops: scores [V, B, K], codes [A, B, K] of the first A crops."""
    num_crops, batch, num_prototypes = scores.shape
    total = 0.0
    for i in range(len(codes)):
        crop_loss = 0.0
        for v in range(num_crops):
            if v == i:
                continue
            for b in range(batch):
                logits = scores[v, b] / temperature
                log_normalizer = math.log(sum(math.exp(x - logits.max()) for x in logits)) + logits.max()
                for k in range(num_prototypes):
                    crop_loss -= codes[i, b, k] * (logits[k] - log_normalizer) / batch
        total += crop_loss / (num_crops - 1)
    return total / len(codes)


def simclr_loss(embeddings: Array, temperature: float) -> float:
    """Appendix A.8, Eq. 1, by loops over anchors, positives and negatives; embeddings [crops, images, dim]."""
    num_crops, num_images, _ = embeddings.shape
    crops = [(v, b) for v in range(num_crops) for b in range(num_images)]
    total = 0.0
    for v, b in crops:
        negatives = sum(
            np.exp(embeddings[v, b] @ embeddings[w, other] / temperature) for w, other in crops if other != b
        )
        for w in range(num_crops):
            if w != v:
                positive = np.exp(embeddings[v, b] @ embeddings[w, b] / temperature)
                total -= np.log(positive / (positive + negatives))
    return float(total / len(crops) / (num_crops - 1))


def info_nce(query: Array, key: Array, negatives: Array, temperature: float) -> float:
    """MoCo's loss of one query, by a loop over the negatives."""
    positive = np.exp(query @ key / temperature)
    total = positive + sum(np.exp(query @ negative / temperature) for negative in negatives)
    return float(-np.log(positive / total))


def spherical_kmeans(features: Array, centroids: Array, num_iters: int) -> tuple[Array, Any]:
    """Appendix D.2, Eq. 5, by brute force; centroids, and the labels that the last ones were made from."""
    labels = None
    for _ in range(num_iters):
        labels = np.array([max(range(len(centroids)), key=lambda k: row @ centroids[k]) for row in features])
        sums = [
            features[labels == k].sum(axis=0) if (labels == k).any() else centroids[k] for k in range(len(centroids))
        ]
        centroids = np.array([total / np.linalg.norm(total) for total in sums])
    return centroids, labels


def lars_step(
    weight: Array, gradient: Array, velocity: Array, *, lr: float, momentum: float, decay: float, trust: float
) -> tuple[Array, Array]:
    """One LARS update of one tensor: new weight, new velocity."""
    weight_norm, gradient_norm = float(np.sqrt((weight**2).sum())), float(np.sqrt((gradient**2).sum()))
    if weight_norm > 0 and gradient_norm > 0:
        rate = trust * weight_norm / (gradient_norm + decay * weight_norm + 1e-8)
        gradient = (gradient + decay * weight) * rate
    velocity = momentum * velocity + gradient
    return weight - lr * velocity, velocity


def knn_predict(train: Array, labels: Any, test: Array, k: int, temperature: float) -> list[int]:
    """Weighted vote of the k most similar rows, by loops."""
    predictions = []
    for row in test:
        similarity = [float(np.dot(row, other)) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp(similarity[i] / temperature)
        predictions.append(max(sorted(votes), key=lambda label: votes[label]))
    return predictions


def classifier_steps(
    weight: Array,
    bias: Array,
    batches: list[tuple[Array, Any]],
    *,
    rates: list[float],
    momentum: float,
    decay: float,
) -> tuple[Array, Array]:
    """Softmax regression by SGD with momentum: weight [C, D], bias [C] after batches of (features [B, D], labels)."""
    velocity_w, velocity_b = np.zeros_like(weight), np.zeros_like(bias)
    for (features, labels), rate in zip(batches, rates, strict=True):
        gradient_w, gradient_b = decay * weight, decay * bias
        for row, label in zip(features, labels, strict=True):
            scores = weight @ row + bias
            errors = np.exp(scores - scores.max())
            errors = errors / errors.sum()
            errors[label] -= 1.0
            gradient_w = gradient_w + np.outer(errors, row) / len(labels)
            gradient_b = gradient_b + errors / len(labels)
        velocity_w = momentum * velocity_w + gradient_w
        velocity_b = momentum * velocity_b + gradient_b
        weight, bias = weight - rate * velocity_w, bias - rate * velocity_b
    return weight, bias
