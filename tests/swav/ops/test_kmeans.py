import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor

from swav.distributed import rank, world_size
from swav.ops.kmeans import ClusterSums, nearest_centroids
from swav.partition import share

ROWS, DIM, CLUSTERS, BLOCK = 700, 16, 12, 64


def bank(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = (
        torch.randn(ROWS, DIM, generator=generator)
        + 2 * torch.randn(8, DIM, generator=generator)[torch.arange(ROWS) % 8]
    )
    return torch.nn.functional.normalize(features, dim=1).half()


def iterate(features: Tensor, centroids: Tensor, num_iters: int, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Passes over fixed blocks, of which this rank takes a share; labels of the last pass, of this rank's blocks."""
    blocks = list(features.split(BLOCK))
    first, last = share(len(blocks), rank(), world_size())
    labels: list[Tensor] = []
    for _ in range(num_iters):
        found = ClusterSums.zeros(len(centroids), DIM)
        labels = []
        for block in reversed(blocks[first:last]) if reverse else blocks[first:last]:
            labels.append(nearest_centroids(block, centroids)[0])
            found.add(block, labels[-1])
        found.all_reduce()
        centroids = found.centroids(centroids)
    return centroids, torch.cat(labels)


def test_every_iteration_equals_brute_force() -> None:
    features = bank()
    centroids = features[:CLUSTERS].float()
    for num_iters in (1, 2, 5):
        found, labels = iterate(features, centroids, num_iters)
        expected, expected_labels = oracles.spherical_kmeans(
            features.double().numpy(), centroids.double().numpy(), num_iters
        )
        assert labels.tolist() == expected_labels.tolist()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(CLUSTERS))


def test_an_empty_cluster_and_one_whose_rows_cancel_keep_their_centroids() -> None:
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).half()
    found = ClusterSums.zeros(3, 2)
    found.add(features, torch.tensor([0, 0, 2]))
    previous = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    assert found.centroids(previous).tolist() == [previous[0].tolist(), previous[1].tolist(), [0.0, 1.0]]
    assert found.counts.tolist() == [2, 0, 1]


def test_sums_are_exact() -> None:
    features = bank()
    found = ClusterSums.zeros(1, DIM)
    found.add(features, torch.zeros(ROWS, dtype=torch.int64))
    exact = (features.double() * 2**24).sum(dim=0)
    assert found.sums[0].tolist() == exact.long().tolist()


def test_equal_scores_go_to_the_first_centroid() -> None:
    labels, similarities = nearest_centroids(
        torch.tensor([[1.0, 0.0]]).half(), torch.tensor([[0.0, 1.0], [1, 0], [1, 0]])
    )
    assert (labels.tolist(), similarities.tolist()) == ([1], [1.0])


def in_this_world(reverse: bool) -> tuple[Tensor, Tensor]:
    features = bank(1)
    return iterate(features, features[:CLUSTERS].float(), 10, reverse=reverse)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_gives_the_same_bits(world: int) -> None:
    centroids, labels = in_this_world(False)
    found = run_ranks(world, in_this_world, False)
    assert all(torch.equal(other, centroids) for other, _ in found)
    assert torch.equal(torch.cat([part for _, part in found]), labels)
    assert torch.equal(in_this_world(True)[0], centroids)
