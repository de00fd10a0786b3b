"""Weighted k-nearest-neighbour classification (appendix B.6), with the train features spread over ranks."""

import torch
from torch import Tensor

from swav.distributed import all_reduce_max, all_reduce_sum, gather_rows, rank, world_size

_CHUNK = 512
_MAX_CLASSES = 1_000_000


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_neighbors: tuple[int, ...],
    temperature: float,
    own_rows: Tensor | None = None,
) -> dict[int, Tensor]:
    """Let the nearest train images vote with weight exp(cosine / temperature).

    Each rank finds the nearest among its own train images; only those candidates travel.

    Args:
        train_features: float32 [n, dim], unit norm, this rank's share.
        train_labels: int64 [n].
        test_features: float32 [m, dim], unit norm, equal on every rank.
        num_neighbors: the k's.
        temperature: 0.07 in the usual protocol.
        own_rows: int64 [m], per test image the row of ``train_features`` that is the same image, which gets no vote;
            -1 where it is not among this rank's.

    Returns:
        Per k, predicted labels int64 [m].

    Raises:
        ValueError: there are fewer train images than the largest k, or a label is too large to count votes for.
    """
    largest = max(num_neighbors)
    num_train = int(all_reduce_sum(torch.tensor([len(train_labels)])))
    available = num_train - (own_rows is not None)
    if available < largest:
        raise ValueError(f"k-NN with k={largest} needs as many train images, there are {available}; use a smaller k")
    num_classes = int(all_reduce_max(train_labels.max() + 1 if len(train_labels) else train_labels.new_zeros(())))
    if num_classes > _MAX_CLASSES:
        raise ValueError(f"the largest label is {num_classes - 1}; number the classes from 0, up to {_MAX_CLASSES - 1}")
    predictions: dict[int, list[Tensor]] = {k: [] for k in num_neighbors}
    for first in range(0, len(test_features), _CHUNK):
        chunk = test_features[first : first + _CHUNK]
        own = own_rows[first : first + _CHUNK] if own_rows is not None else None
        similarity, labels = _nearest(train_features, train_labels, chunk, own, largest)
        weights = (similarity / temperature).exp()
        for k in num_neighbors:
            votes = weights.new_zeros(len(chunk), num_classes)
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
            predictions[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def _nearest(features: Tensor, labels: Tensor, chunk: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Similarity and label of the k nearest train images over all ranks, [chunk, k], the nearest first."""
    similarity = chunk @ features.mT
    if own is not None:
        here = (own >= 0).nonzero().squeeze(1)
        similarity[here, own[here]] = -torch.inf
    num_here = min(k, similarity.shape[1])
    top, rows = similarity.topk(num_here, dim=1)
    candidates = top.new_full((k, len(chunk)), -torch.inf)
    candidates[:num_here] = top.mT
    candidate_labels = labels.new_zeros(k, len(chunk))
    candidate_labels[:num_here] = labels[rows].mT
    total = k * world_size()
    candidates = gather_rows(candidates, dim=0, offset=k * rank(), total=total)
    candidate_labels = gather_rows(candidate_labels, dim=0, offset=k * rank(), total=total)
    best, places = candidates.topk(k, dim=0)
    return best.mT, candidate_labels.gather(0, places).mT
