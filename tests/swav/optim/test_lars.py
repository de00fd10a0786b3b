import numpy as np
import pytest
import torch
from swav_testing import oracles
from torch import nn

from swav.optim.lars import LARS, parameter_groups

SETTINGS = {"lr": 0.7, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.001}


def random_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (16, 8), (16,), (1,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def test_five_steps_equal_the_formula() -> None:
    parameters = random_parameters()
    zero = nn.Parameter(torch.zeros(5, dtype=torch.float64))  # weight norm 0: raw gradient, no decay
    parameters.append(zero)
    weights = [p.detach().numpy().copy() for p in parameters]
    velocities = [np.zeros_like(w) for w in weights]
    optimizer = LARS(parameters, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if i == 1 and step == 2:
                p.grad.zero_()  # gradient norm 0
            weights[i], velocities[i] = oracles.lars_step(
                weights[i],
                p.grad.numpy(),
                velocities[i],
                lr=SETTINGS["lr"],
                momentum=SETTINGS["momentum"],
                decay=SETTINGS["weight_decay"],
                trust=SETTINGS["trust_coefficient"],
            )
        optimizer.step()
        for p, weight in zip(parameters, weights, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), weight, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_gradient_stays() -> None:
    moved, kept = random_parameters()[:2]
    before = kept.detach().clone()
    moved.grad = torch.ones_like(moved)
    LARS([moved, kept], **SETTINGS).step()
    assert torch.equal(kept, before)


def test_excluded_tensors_get_plain_sgd_without_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    groups = parameter_groups(module, exclude_bias_and_norm=True)
    assert [len(group["params"]) for group in groups] == [1, 3]
    before = module[0].bias.detach().clone()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    LARS(groups, **SETTINGS).step()
    torch.testing.assert_close(module[0].bias.detach(), before - SETTINGS["lr"])


def test_everything_is_adapted_by_default() -> None:
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), exclude_bias_and_norm=False)
    assert [len(group["params"]) for group in groups] == [4]


def test_restored_optimizer_continues_bitwise() -> None:
    def run(parameters: list[nn.Parameter], optimizer: LARS, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(parameters):
                p.grad = torch.full_like(p, 0.1 * (step + 1) + i)
            optimizer.step()

    whole = random_parameters()
    run(whole, LARS(whole, **SETTINGS), range(4))
    first = random_parameters()
    optimizer = LARS(first, **SETTINGS)
    run(first, optimizer, range(2))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    restored = LARS(second, **SETTINGS)
    restored.load_state_dict(optimizer.state_dict())
    run(second, restored, range(2, 4))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        LARS(random_parameters(), **SETTINGS).step(lambda: 0.0)


def test_without_adaptation_it_is_sgd() -> None:
    ours, theirs = random_parameters(), random_parameters()
    module = nn.Module()
    for number, p in enumerate(ours):
        module.register_parameter(f"p{number}", p)
    groups = parameter_groups(module, exclude_bias_and_norm=False, adapt=False)
    optimizers = (
        LARS(groups, lr=0.03, momentum=0.9, weight_decay=1e-4),
        torch.optim.SGD(theirs, lr=0.03, momentum=0.9, weight_decay=1e-4),
    )
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.full_like(a, 0.1 * step) + a.detach()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
