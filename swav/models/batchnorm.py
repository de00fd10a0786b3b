"""Batch norm whose statistics are those of the batch of all ranks (appendix A.1)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swav.distributed import world_size


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What ``nn.SyncBatchNorm`` is on a GPU, for the CPU, where torch has none; ranks may hold uneven shares.

    The variance is the mean square deviation from the global mean, which keeps more digits than the difference of two
    sums, for a second all-reduce.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (torch's own name)
        """Any number of trailing dimensions will do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name)
        """Normalise [B, C, ...] over the samples of all ranks in the group."""
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = _SumOverRanks.apply(torch.cat([values.sum(dim=axes), count]), self.process_group)
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(dim=axes), self.process_group) / total
        self._update_running_statistics(mean.detach(), variance.detach(), total)
        scale = (variance + self.eps).rsqrt() * self.weight
        result: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (total / (total - 1)), self.momentum)


def synchronize(module: nn.Module, device: torch.device, *, group_size: int = 0) -> nn.Module:
    """Replace every batch norm below ``module`` by one that spans ranks; names and values stay.

    Args:
        module: changed in place where it holds batch norms, and returned.
        device: where it will compute.
        group_size: consecutive ranks that share statistics; 0 for all.

    Raises:
        ValueError: the world does not divide into groups of this size.
    """
    world = world_size()
    if world == 1:
        return module
    group = None
    if group_size not in (0, world):
        if world % group_size:
            raise ValueError(
                f"runtime.sync_batch_norm_group={group_size} does not divide the world of {world} ranks; "
                "use a divisor, or 0 for all ranks"
            )
        group, _ = dist.new_subgroups(group_size)
    if device.type == "cpu":
        return _replace(module, group)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    return converted


def _replace(module: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        synced = CpuSyncBatchNorm(module.num_features, eps=module.eps, momentum=module.momentum)
        synced.process_group = group
        synced.load_state_dict(module.state_dict())
        synced.weight, synced.bias = module.weight, module.bias  # the very parameters: trained, or not
        return synced
    for name, child in module.named_children():
        setattr(module, name, _replace(child, group))
    return module
