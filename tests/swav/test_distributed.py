import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from swav_testing.ranks import run_ranks

from swav.distributed import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    copy_from_first_rank,
    cores_of_rank,
    gather_rows,
    pick_device,
    process_group,
    rank,
    world_size,
)


def collectives() -> dict[str, Any]:
    mine = torch.full((rank() + 1, 2), float(rank()), requires_grad=True)  # uneven on purpose
    offset, total = rank() * (rank() + 1) // 2, world_size() * (world_size() + 1) // 2
    copied = [torch.tensor([rank() + 5.0]), torch.tensor([rank()])]
    copy_from_first_rank(copied)
    start = time.monotonic()
    if rank() == 0:
        time.sleep(0.3)  # what the others have to wait for
    barrier()
    gathered = gather_rows(mine, dim=0, offset=offset, total=total)
    return {
        "world": (rank(), world_size()),
        "sum": all_reduce_sum(torch.tensor([1, rank()])).tolist(),
        "max": all_reduce_max(torch.tensor([rank(), -rank()])).tolist(),
        "any": [any_rank(rank() == 1), any_rank(False), any_rank(True)],
        "rows": gathered.tolist(),
        "columns": gather_rows(mine.detach().T, dim=1, offset=offset, total=total).T.tolist(),
        "gradient": gathered.requires_grad,
        "copied": [tensor.item() for tensor in copied],
        "waited": time.monotonic() - start,
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives(world: int) -> None:
    results = run_ranks(world, collectives)
    rows = [[float(number)] * 2 for number in range(world) for _ in range(number + 1)]
    for number, result in enumerate(results):
        assert result["world"] == (number, world)
        assert result["sum"] == [world, world * (world - 1) // 2]
        assert result["max"] == [world - 1, 0]
        assert result["any"] == [world > 1, False, True]
        assert result["rows"] == result["columns"] == rows
        assert not result["gradient"]
        assert result["copied"] == [5.0, 0]
        assert result["waited"] >= 0.25


def test_without_a_group_the_world_is_one_rank() -> None:
    assert (rank(), world_size()) == (0, 1)
    values = torch.tensor([3.0])
    assert all_reduce_sum(values) is values
    assert all_reduce_max(values) is values
    assert any_rank(True)
    assert not any_rank(False)
    barrier()


def test_without_torchrun_no_group_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu"), 60):
        assert not dist.is_initialized()


def test_the_environment_of_torchrun_is_joined_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **settings: joined.append((args, settings)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: joined.append("left"))
    with pytest.raises(KeyError), process_group(torch.device("cpu"), 45.5):
        raise KeyError
    (arguments, settings), left = joined
    assert arguments == ("gloo",)
    assert settings["timeout"].total_seconds() == 45.5
    assert left == "left"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"runtime\.device=cuda, but torch sees no GPU here; use runtime\.device=cpu"):
        pick_device("cuda")


def test_cores_are_divided_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_of_rank() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores_of_rank() == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert cores_of_rank() == 1
