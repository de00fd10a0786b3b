from typing import Any

import pytest
import torch
from swav_testing.ranks import run_ranks
from torch import nn

from swav.distributed import all_reduce_sum, rank, world_size
from swav.models.batchnorm import CpuSyncBatchNorm, synchronize

CPU = torch.device("cpu")


def images() -> torch.Tensor:
    return torch.randn(9, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10


def share_of_images() -> slice:
    bounds = {1: [0, 9], 2: [0, 2, 9], 4: [0, 1, 3, 4, 9]}[world_size()]  # uneven on purpose
    return slice(bounds[rank()], bounds[rank() + 1])


def normalize_and_differentiate() -> dict[str, torch.Tensor]:
    plain = nn.BatchNorm2d(4)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    norm: Any = synchronize(plain, CPU)
    mine: Any = images()[share_of_images()].requires_grad_()
    output = norm(mine)
    (output * torch.sin(torch.arange(9.0))[share_of_images(), None, None, None]).sum().backward()
    return {
        "output": output.detach(),
        "input gradient": mine.grad,
        "weight gradient": all_reduce_sum(norm.weight.grad),
        "bias gradient": all_reduce_sum(norm.bias.grad),
        "running mean": norm.running_mean,
        "running variance": norm.running_var,
    }


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_uneven_shares_equal_one_process(world: int) -> None:
    expected = normalize_and_differentiate()
    results = run_ranks(world, normalize_and_differentiate)
    for name, value in expected.items():
        if name in ("output", "input gradient"):
            torch.testing.assert_close(torch.cat([r[name] for r in results]), value, rtol=1e-5, atol=1e-5)
        else:
            for r in results:
                torch.testing.assert_close(r[name], value, rtol=1e-5, atol=1e-5)


def means_in_pairs() -> torch.Tensor:
    norm: Any = synchronize(nn.BatchNorm1d(1), CPU, group_size=2)
    norm(torch.tensor([[float(rank())], [float(rank())]]))
    return norm.running_mean / 0.1


def test_groups_share_statistics_among_consecutive_ranks_only() -> None:
    found = torch.cat(run_ranks(4, means_in_pairs))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 2.5, 2.5]))


def group_of_three() -> str:
    with pytest.raises(ValueError, match="divide") as error:
        synchronize(nn.BatchNorm1d(1), CPU, group_size=3)
    return str(error.value)


def test_a_group_that_does_not_divide_the_world_is_refused() -> None:
    assert "does not divide the world of 2 ranks" in run_ranks(2, group_of_three)[0]


def names_after_synchronize() -> list[bool]:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = list(module.state_dict())
    synchronize(module, CPU)
    assert isinstance(module[1], CpuSyncBatchNorm)
    return [before == list(module.state_dict())]


def test_names_in_the_state_dict_stay() -> None:
    assert run_ranks(2, names_after_synchronize) == [[True], [True]]
