"""LARS (You et al., 2017), as appendix A.1 uses it."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose gradient is scaled, per tensor, to the size of the weight.

    With weight p, gradient g and weight decay d: g <- (g + d p) * c |p| / (|g| + d |p| + 1e-8); where |p| or |g| is 0,
    g is left as it is, without decay. Then v <- momentum v + g, p <- p - lr v. All tensors go through one call per
    operation and no value is read back to the host.

    Parameter groups may set ``adapt=False``: plain SGD with that group's decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Closures are not supported."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return None

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        if group["adapt"]:
            updates = _adapt(params, gradients, group["weight_decay"], group["trust_coefficient"])
        else:
            updates = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        buffers = [self._momentum_buffer(p) for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _adapt(params: list[Tensor], gradients: list[Tensor], decay: float, coefficient: float) -> list[Tensor]:
    weight_norms = torch.stack(torch._foreach_norm(params))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    adapted = (weight_norms > 0) & (gradient_norms > 0)
    ratios = coefficient * weight_norms / (gradient_norms + decay * weight_norms + 1e-8)
    ratios = torch.where(adapted, ratios, 1.0)
    decays = decay * ratios * adapted
    updates = list(torch._foreach_mul(gradients, list(ratios.unbind())))
    decayed = torch._foreach_mul(params, list(decays.unbind()))
    torch._foreach_add_(updates, decayed)
    return updates


def parameter_groups(module: nn.Module, *, exclude_bias_and_norm: bool, adapt: bool = True) -> list[dict[str, Any]]:
    """The module's parameters as LARS groups.

    Args:
        module: whose trainable parameters are taken.
        exclude_bias_and_norm: put tensors of at most one dimension (biases, batch norm) into a group without
            adaptation and decay. The paper excludes nothing.
        adapt: scale gradients to the size of the weights; without, this is SGD with momentum.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    if not exclude_bias_and_norm:
        return [{"params": params, "adapt": adapt}]
    return [
        {"params": [p for p in params if p.ndim > 1], "adapt": adapt},
        {"params": [p for p in params if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]
