import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks

from swav.distributed import rank, world_size
from swav.ops.sinkhorn import harden, sinkhorn
from swav.partition import share


def unit_scores(num_crops: int, batch: int, num_prototypes: int, *, seed: int, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(num_crops, batch, dim, generator=generator), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(num_prototypes, dim, generator=generator), dim=-1)
    return embeddings @ prototypes.mT


def oracle_codes(scores: torch.Tensor, epsilon: float, num_iters: int) -> np.ndarray:
    return np.stack([oracles.sinkhorn(crop.double().numpy(), epsilon, num_iters) for crop in scores])


@pytest.mark.parametrize(("batch", "num_prototypes"), [(1, 1), (3, 2), (8, 30), (64, 300), (64, 7)])
@pytest.mark.parametrize("epsilon", [0.05, 0.03])
@pytest.mark.parametrize("num_iters", [1, 3, 10])
def test_codes_equal_the_pseudo_code(batch: int, num_prototypes: int, epsilon: float, num_iters: int) -> None:
    scores = unit_scores(2, batch, num_prototypes, seed=batch)
    codes = sinkhorn(scores, epsilon=epsilon, num_iters=num_iters)
    assert codes.dtype == torch.float32
    assert np.abs(codes.double().numpy() - oracle_codes(scores, epsilon, num_iters)).max() <= 1e-6


@pytest.mark.parametrize("epsilon", [0.05, 0.03])
def test_codes_equal_the_pseudo_code_on_scores_that_fill_the_whole_range(epsilon: float) -> None:
    scores = torch.rand(2, 64, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = sinkhorn(scores, epsilon=epsilon, num_iters=3)
    assert np.abs(codes.double().numpy() - oracle_codes(scores, epsilon, 3)).max() <= 1e-6


@pytest.mark.parametrize(("batch", "num_prototypes"), [(600, 4), (4, 600)])
def test_many_iterations_neither_overflow_nor_vanish(batch: int, num_prototypes: int) -> None:
    scores = unit_scores(2, batch, num_prototypes, seed=3)
    codes = sinkhorn(scores, epsilon=0.05, num_iters=100)  # (samples / prototypes) ** 100 is beyond any float
    assert np.abs(codes.double().numpy() - oracle_codes(scores, 0.05, 100)).max() <= 2e-6


def codes_of_my_share(scores: torch.Tensor, epsilon: float, num_iters: int) -> torch.Tensor:
    first, last = share(scores.shape[1], rank(), world_size())
    return sinkhorn(scores[:, first:last], epsilon=epsilon, num_iters=num_iters)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("batch", "epsilon"), [(64, 0.05), (63, 0.03), (63, 0.004)])
def test_ranks_together_give_the_codes_of_the_whole_batch(world: int, batch: int, epsilon: float) -> None:
    scores = unit_scores(2, batch, 300, seed=1)
    parts = run_ranks(world, codes_of_my_share, scores, epsilon, 3)
    whole = torch.cat(parts, dim=1).double().numpy()
    expected = np.stack([oracles.sinkhorn_log(crop.double().numpy(), epsilon, 3) for crop in scores])
    assert np.abs(whole - expected).max() <= 1e-6


@pytest.mark.parametrize("epsilon", [0.02, 0.01, 0.004, 0.001])
@pytest.mark.parametrize("spread", ["cosines", "extremes"])
def test_small_epsilon_is_exact_and_never_nan(epsilon: float, spread: str) -> None:
    scores = unit_scores(2, 32, 50, seed=2)
    if spread == "extremes":
        scores = scores.sign()
    codes = sinkhorn(scores, epsilon=epsilon, num_iters=3)
    assert torch.isfinite(codes).all()
    expected = np.stack([oracles.sinkhorn_log(crop.double().numpy(), epsilon, 3) for crop in scores])
    assert np.abs(codes.double().numpy() - expected).max() <= 1e-6


def test_a_batch_that_agrees_on_everything_gives_uniform_codes() -> None:
    codes = sinkhorn(torch.ones(1, 8, 4), epsilon=0.05, num_iters=3)
    torch.testing.assert_close(codes, torch.full_like(codes, 0.25))


def test_half_precision_scores_are_computed_in_fp32() -> None:
    scores = unit_scores(1, 16, 20, seed=3).bfloat16()
    codes = sinkhorn(scores, epsilon=0.05, num_iters=3)
    assert np.abs(codes.double().numpy() - oracle_codes(scores.float(), 0.05, 3)).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [0.05, 0.001])
def test_autocast_does_not_reach_the_codes(dtype: torch.dtype, epsilon: float) -> None:
    scores = torch.rand(2, 64, 30, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    expected = sinkhorn(scores, epsilon=epsilon, num_iters=3)
    with torch.autocast("cpu", dtype=dtype):
        codes = sinkhorn(scores, epsilon=epsilon, num_iters=3)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, expected)


def test_scores_are_left_as_they_were() -> None:
    scores = unit_scores(1, 8, 5, seed=4)
    before = scores.clone()
    sinkhorn(scores, epsilon=0.05, num_iters=3)
    sinkhorn(scores, epsilon=0.001, num_iters=3)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = unit_scores(1, 8, 5, seed=4)
    scores[0, 3, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        sinkhorn(scores, epsilon=0.05, num_iters=3)


@pytest.mark.parametrize(("epsilon", "num_iters"), [(0.0, 3), (-1.0, 3), (0.05, 0)])
def test_settings_that_make_no_sense_are_refused(epsilon: float, num_iters: int) -> None:
    with pytest.raises(ValueError, match="epsilon > 0 and num_iters >= 1"):
        sinkhorn(torch.zeros(1, 2, 2), epsilon=epsilon, num_iters=num_iters)


def test_hard_codes_are_one_hot_at_the_largest() -> None:
    hard = harden(torch.tensor([[[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]]))
    assert hard.tolist() == [[[0, 1, 0], [1, 0, 0]]]
