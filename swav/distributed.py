"""The process group, and the few collectives that this project needs.

Every function works without a process group, where the world is one rank.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's place among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_of_rank() -> int:
    """The cores that this process may use, divided among the ranks of this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Join the group that torchrun describes in the environment; without torchrun, do nothing.

    CPU tensors always travel by gloo, so that flags and counters never make a GPU wait.

    Args:
        device: where this rank computes.
        timeout_seconds: for every collective, and to join: a peer that is silent for longer counts as lost, and this
            rank fails. Torch's default of 10 to 30 minutes wastes a node's time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        barrier()  # who fails next must not break others' joining
        yield
    finally:
        dist.destroy_process_group()


def pick_device(wanted: str) -> torch.device:
    """Resolve "auto" to this process's GPU, or to the CPU where there is none.

    Raises:
        ValueError: a GPU is asked for where torch sees none.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("runtime.device=cuda, but torch sees no GPU here; use runtime.device=cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device(wanted)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns its argument."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place; returns its argument."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank gets the same answer."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_max(torch.tensor([int(flag)])).item())


def gather_rows(local: Tensor, *, dim: int, offset: int, total: int) -> Tensor:
    """Put the ranks' rows together, in global order; shares may be uneven.

    Args:
        local: this rank's rows along ``dim``.
        dim: the dimension that is split over ranks.
        offset: where this rank's rows start in the whole.
        total: rows in the whole.

    Returns:
        The whole, equal on every rank, without gradient.
    """
    if world_size() == 1:
        return local.detach()
    shape = list(local.shape)
    shape[dim] = total
    whole = local.new_zeros(shape)
    whole.narrow(dim, offset, local.shape[dim]).copy_(local.detach())
    return all_reduce_sum(whole)


class _GatherRows(torch.autograd.Function):
    """:func:`gather_rows`; a row's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, offset: int, total: int) -> Tensor:
        ctx.place = (dim, offset, local.shape[dim])
        return gather_rows(local, dim=dim, offset=offset, total=total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return all_reduce_sum(gradient.clone()).narrow(*ctx.place), None, None, None


def gather_rows_with_gradient(local: Tensor, *, dim: int, offset: int, total: int) -> Tensor:
    """As :func:`gather_rows`, and the ranks' gradients of the whole flow back to the rows' owners, summed.

    Every rank must take the gradient.
    """
    whole: Tensor = _GatherRows.apply(local, dim, offset, total)
    return whole


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values that rank 0 has, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1))
