import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor

from swav.distributed import all_reduce_sum, rank, world_size
from swav.ops.equipartition import equal_labels, next_log_scales, prototype_sums
from swav.ops.sinkhorn import sinkhorn
from swav.partition import share

SAMPLES, PROTOTYPES, BLOCK = 90, 6, 16


def cosines(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(SAMPLES, 8, generator=generator, dtype=torch.float64), dim=1)
    prototypes = torch.nn.functional.normalize(
        torch.randn(PROTOTYPES, 8, generator=generator, dtype=torch.float64), dim=1
    )
    return (features @ prototypes.mT).to(dtype)


def passes(scores: Tensor, epsilon: float, num_iters: int, *, reverse: bool = False) -> tuple[Tensor, list[float]]:
    """Passes over fixed blocks, of which this rank takes a share; the scales, and the error before each update."""
    blocks = list(scores.split(BLOCK))
    first, last = share(len(blocks), rank(), world_size())
    log_scales, errors = torch.zeros(scores.shape[1], dtype=torch.float64), []
    for _ in range(num_iters):
        sums = torch.zeros(scores.shape[1], dtype=torch.int64)
        for block in reversed(blocks[first:last]) if reverse else blocks[first:last]:
            sums += prototype_sums(block, log_scales, epsilon=epsilon)
        log_scales, error = next_log_scales(log_scales, all_reduce_sum(sums), len(scores))
        errors.append(error)
    return log_scales, errors


def plan(scores: Tensor, log_scales: Tensor, epsilon: float) -> Tensor:
    return torch.softmax(scores / epsilon + log_scales, dim=1)


def rows_first(scores: Tensor, epsilon: float) -> Tensor:
    """Scores that differ by a constant per sample: where each sample's sum is 1 before the first pass, as here."""
    return epsilon * torch.log_softmax(scores / epsilon, dim=1)


# SwAV's, and that of SeLa's lambda 25 at temperature 0.1, which converges slowly.
@pytest.mark.parametrize(("epsilon", "limit"), [(0.05, 1e-9), (0.004, 5e-3)])
def test_it_converges_to_the_oracles_equal_partition(epsilon: float, limit: float) -> None:
    scores = cosines()
    log_scales, errors = passes(scores, epsilon, 1000)
    assert errors[-1] < limit
    assert errors[-1] < errors[10] < errors[0]
    found = plan(scores, log_scales, epsilon)
    expected = oracles.sinkhorn_log(rows_first(scores, epsilon).numpy(), epsilon, 1000)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(expected.sum(axis=0), SAMPLES / PROTOTYPES, rtol=limit)
    labels = equal_labels(scores, log_scales, epsilon=epsilon)
    assert labels.tolist() == expected.argmax(axis=1).tolist()


@pytest.mark.parametrize("epsilon", [0.05, 0.004])
def test_it_is_swavs_sinkhorn_on_the_whole_data_set(epsilon: float) -> None:
    scores = cosines(1)
    for num_iters in (1, 3, 10, 300):
        log_scales, _ = passes(scores, epsilon, num_iters)
        expected = sinkhorn(rows_first(scores, epsilon)[None], epsilon=epsilon, num_iters=num_iters)[0]
        torch.testing.assert_close(plan(scores, log_scales, epsilon), expected, rtol=0, atol=1e-6)


def test_in_single_precision_it_gives_the_same_labels() -> None:
    scores = cosines(2)
    exact, errors = passes(scores, 0.004, 300)
    single, single_errors = passes(scores.float(), 0.004, 300)
    assert single_errors[-1] == pytest.approx(errors[-1], abs=1e-3)
    labels = equal_labels(scores, exact, epsilon=0.004)
    same = labels == equal_labels(scores.float(), single, epsilon=0.004)
    assert same.double().mean() > 0.99


def test_a_prototype_that_nobody_is_near_gets_its_share() -> None:
    scores = cosines(3)
    scores[:, 0] = -1.0
    log_scales, errors = passes(scores, 0.004, 1000)
    assert errors[0] >= 1
    assert errors[-1] < 1e-3
    assert torch.isfinite(log_scales).all()


def in_this_world(reverse: bool) -> tuple[Tensor, list[float]]:
    return passes(cosines(4, torch.float32), 0.004, 20, reverse=reverse)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_gives_the_same_bits(world: int) -> None:
    log_scales, errors = in_this_world(False)
    for found, found_errors in run_ranks(world, in_this_world, False):
        assert torch.equal(found, log_scales)
        assert found_errors == errors
    assert torch.equal(in_this_world(True)[0], log_scales)
