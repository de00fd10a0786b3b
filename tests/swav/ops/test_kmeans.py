from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor

from swav.distributed import rank, world_size
from swav.ops import kmeans
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


def mixture(num_rows: int, dim: int, num_clusters: int, *, common: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit rows, float16, and as many of them as centroids; with `common`, all of them point about the same way."""
    draws = torch.Generator().manual_seed(num_rows)
    centres = torch.randn(num_clusters, dim, generator=draws) + common * torch.randn(dim, generator=draws)
    features = centres[torch.randint(num_clusters, (num_rows,), generator=draws)]
    features = features + torch.randn(num_rows, dim, generator=draws)
    features = torch.nn.functional.normalize(features, dim=1).half()
    chosen = torch.randperm(num_rows, generator=draws)[:num_clusters]
    return features, torch.nn.functional.normalize(features[chosen].float(), dim=1)


def assert_nearest(features: Tensor, centroids: Tensor, labels: Tensor, similarities: Tensor) -> None:
    """Against float64: the same labels, except where two scores are the same to within float32 rounding."""
    scores = features.double() @ centroids.double().mT
    best, expected = scores.max(dim=1)
    found = scores.gather(1, labels[:, None])[:, 0]
    assert ((labels == expected) | (best - found < 1e-6)).all()
    torch.testing.assert_close(similarities.double(), best, atol=1e-6, rtol=0)


@pytest.fixture(params=[True, False], ids=["coarse scores first", "matrix product"])
def coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to the nearest centroids, where this CPU has both."""
    if request.param and not kmeans._coarse_scores_are_fast():
        pytest.skip("needs a CPU with 8 bit dot products")
    monkeypatch.setattr(kmeans, "_coarse_scores_are_fast", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("num_rows", [0, 1, kmeans._CPU_ROWS - 1, kmeans._CPU_ROWS, 3 * kmeans._CPU_ROWS + 1])
@pytest.mark.parametrize("dim", [3, 32])
@pytest.mark.parametrize("common", [0, 3])
def test_labels_equal_brute_force_in_float64(num_rows: int, dim: int, common: float) -> None:
    features, centroids = mixture(2000, dim, 800, common=common)
    for rows in (features[:num_rows], features[:num_rows].float(), features.mT.contiguous().mT[:num_rows]):
        labels, similarities = nearest_centroids(rows, centroids)
        assert (labels.dtype, similarities.dtype) == (torch.int64, torch.float32)
        assert_nearest(rows, centroids, labels, similarities)


@pytest.mark.skipif(not kmeans._coarse_scores_are_fast(), reason="needs a CPU with 8 bit dot products")
def test_few_candidates_are_left_for_rows_with_a_clear_cluster_and_many_where_all_are_alike() -> None:
    features, centroids = mixture(2000, 64, 1000)
    assert kmeans._CoarseCentroids.of(centroids).nearest(features[:256].float()) is not None
    features, centroids = mixture(2000, 64, 1000, common=10)
    assert kmeans._CoarseCentroids.of(centroids).nearest(features[:256].float()) is None


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 3.0])
def test_features_and_centroids_need_not_be_of_unit_norm(scale: float) -> None:
    features, centroids = mixture(1500, 48, 700)
    features = (features * scale).half()
    centroids = centroids * torch.linspace(0.1, 1, 700)[:, None]
    labels, similarities = nearest_centroids(features, centroids)
    assert_nearest(features.double() / scale, centroids, labels, similarities / scale)


@pytest.mark.usefixtures("coarse")
def test_the_best_of_centroids_that_8_bits_cannot_tell_apart() -> None:
    features, centroids = mixture(1000, 32, 500)
    centroids = centroids[torch.arange(500) % 100 + 300]  # no row of the first 64 is among them
    features = torch.cat([mixture(999, 32, 64)[0][:64], features])
    near = torch.nn.functional.normalize(features[:64].float(), dim=1)
    centroids[100:164] = near * (1 - 1e-4)
    centroids[300:364] = near
    centroids[400:464] = near
    assert nearest_centroids(features[:64], centroids)[0].tolist() == list(range(300, 364))


@pytest.mark.usefixtures("coarse")
def test_rows_of_zeros_get_the_first_centroid_and_change_no_other_row() -> None:
    features, centroids = mixture(1000, 32, 500)
    expected = nearest_centroids(features, centroids)
    features[::3] = 0
    labels, similarities = nearest_centroids(features, centroids)
    assert labels[::3].eq(0).all()
    assert similarities[::3].eq(0).all()
    torch.testing.assert_close(labels[1::3], expected[0][1::3])
    torch.testing.assert_close(similarities[1::3], expected[1][1::3])


@pytest.mark.usefixtures("coarse")
def test_several_threads_at_once_give_the_same_bits() -> None:
    features, centroids = mixture(4000, 32, 600)
    blocks = features.split(700)
    expected = [nearest_centroids(block, centroids) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(nearest_centroids, blocks, [centroids] * len(blocks))
            for (labels, similarities), (other_labels, other_similarities) in zip(found, expected, strict=True):
                assert torch.equal(labels, other_labels)
                assert torch.equal(similarities, other_similarities)


@pytest.mark.parametrize("num_clusters", [2, 5000])  # fewer and more than the rows: two ways to add
def test_sums_of_the_largest_and_the_smallest_numbers_are_exact_in_any_order(num_clusters: int) -> None:
    draws = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, -1.0, 2.0**-24, -(2.0**-24), 3 * 2.0**-24, 1 - 2.0**-11, 2.0**-14, 0.0])
    features = values[torch.randint(len(values), (3000, 8), generator=draws)].half()
    labels = torch.randint(2, (3000,), generator=draws)
    found, other = ClusterSums.zeros(num_clusters, 8), ClusterSums.zeros(num_clusters, 8)
    found.add(features, labels)
    for part in torch.randperm(3000, generator=draws).split(77):
        other.add(features[part], labels[part])
    exact = [
        [sum(int(value * 2**24) for value in column) for column in features[labels == k].T.tolist()] for k in (0, 1)
    ]
    assert found.sums[:2].tolist() == exact
    assert torch.equal(found.sums, other.sums)
    assert torch.equal(found.counts, other.counts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_labels_of_the_cpu() -> None:
    features, centroids = mixture(20000, 64, 800)
    labels, similarities = nearest_centroids(features.cuda(), centroids.cuda())
    assert_nearest(features, centroids, labels.cpu(), similarities.cpu())
    found, expected = ClusterSums.zeros(800, 64, torch.device("cuda")), ClusterSums.zeros(800, 64)
    found.add(features.cuda(), labels)
    expected.add(features, labels.cpu())
    assert torch.equal(found.sums.cpu(), expected.sums)


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
