from dataclasses import replace

import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav.config import QueueConfig, SinkhornConfig, SwavConfig
from swav.data.batch import CropBatch
from swav.distributed import rank, world_size
from swav.methods.swav import SwAV, swapped_prediction_loss
from swav.models.batchnorm import synchronize
from swav.models.heads import ProjectionHead
from swav.models.resnet import ResNet
from swav.optim.lars import LARS

CONFIG = SwavConfig(num_prototypes=30)
SAMPLES = 12
CPU = torch.device("cpu")


class Flat(nn.Module):
    """Images of any size to 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))


def small_swav(config: SwavConfig, *, real_network: bool = False) -> SwAV:
    torch.manual_seed(5)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    backbone: nn.Module = network if real_network else Flat()
    features = network.num_features if real_network else 12
    head = ProjectionHead(features, 16, 8, batch_norm=real_network)
    return SwAV(backbone, head, config, num_assign_crops=2, dim=8)


def crops_of(step: int, *, small_crops: int = 6, size: int = 8) -> list[Tensor]:
    """Crops of the global batch: per group, [crops, samples, 3, size, size]."""
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(2, SAMPLES, 3, size, size, generator=generator),
        torch.randn(small_crops, SAMPLES, 3, size // 2, size // 2, generator=generator),
    ]


def share_of(crops: list[Tensor], *, epoch: int = 1, dtype: torch.dtype = torch.float32) -> CropBatch:
    """This rank's share, uneven on purpose."""
    bounds = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 5, 9, 12]}[world_size()]
    first, last = bounds[rank()], bounds[rank() + 1]
    return CropBatch(
        crops=[group[:, first:last].flatten(0, 1).to(dtype) for group in crops],
        epoch=epoch,
        global_offset=first,
        global_size=SAMPLES,
    )


@pytest.mark.parametrize("num_small", [0, 6])
def test_loss_equals_the_double_loop(num_small: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2 + num_small, 5, 30, generator=generator) * 2 - 1
    codes = torch.softmax(torch.randn(2, 5, 30, generator=generator) * 3, dim=-1)
    loss = swapped_prediction_loss(scores, codes, temperature=0.1).mean()
    expected = oracles.swav_loss(scores.double().numpy(), codes.double().numpy(), 0.1)
    assert float(loss) == pytest.approx(expected, abs=2e-6)


def oracle_loss_and_gradients(
    method: SwAV, crops: list[Tensor], queue: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The same network in float64, codes from the pseudo-code, loss by sums over pairs."""
    twin = small_swav(method.config)
    twin.load_state_dict(method.state_dict())
    twin = twin.double()
    embeddings = torch.cat([twin.model.backbone(group.double().flatten(0, 1)) for group in crops])
    head = twin.model.head
    embeddings = nn.functional.normalize(head.out(torch.relu(head.hidden(embeddings))), dim=1)
    scores = (embeddings @ twin.prototypes.heads[0].mT).unflatten(0, (-1, SAMPLES))
    codes = []
    for crop in range(2):
        rows = scores[crop].detach()
        if queue is not None:
            rows = torch.cat([queue[crop].double() @ twin.prototypes.heads[0].detach().mT, rows])
        codes.append(torch.from_numpy(oracles.sinkhorn(rows.numpy(), 0.05, 3))[-SAMPLES:])
    log_p = torch.log_softmax(scores / 0.1, dim=2)
    pairs = [
        -(codes[i] * log_p[v]).sum(dim=1).mean() / (len(scores) - 1)
        for i in range(2)
        for v in range(len(scores))
        if v != i
    ]
    loss = sum(pairs) / 2
    loss.backward()
    return loss.detach(), [p.grad for p in twin.parameters()]


@pytest.mark.parametrize("with_queue", [False, True])
def test_loss_and_gradients_equal_the_float64_oracle(with_queue: bool) -> None:
    config = replace(CONFIG, queue=QueueConfig(num_samples=20, start_epoch=0) if with_queue else None)
    method = small_swav(config)
    queue = None
    if with_queue:
        queue = nn.functional.normalize(torch.randn(2, 20, 8), dim=-1)
        method.queue.push(queue)
    crops = crops_of(0)
    expected_loss, expected_gradients = oracle_loss_and_gradients(method, crops, queue)
    output = method(share_of(crops))
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(expected_loss), abs=2e-6)
    for p, expected in zip(method.parameters(), expected_gradients, strict=True):
        assert (p.grad.double() - expected).abs().max() <= 2e-6


def in_this_world(config: SwavConfig) -> tuple[SwAV, nn.Module]:
    """A real network in float64, so that worlds can only differ by what they compute, not by rounding."""
    method = synchronize(small_swav(config, real_network=True), CPU).double()
    assert isinstance(method, SwAV)
    return method, DistributedDataParallel(method) if world_size() > 1 else method


def loss_and_gradients(config: SwavConfig) -> list[Tensor]:
    method, model = in_this_world(config)
    if method.queue is not None:
        method.queue.push(nn.functional.normalize(torch.randn(2, 20, 8, dtype=torch.float64), dim=-1))
    output = model(share_of(crops_of(0, size=32), dtype=torch.float64))
    output.loss.backward()
    queue = [method.queue.embeddings] if method.queue is not None else []
    return [output.metrics["loss"], *queue, *(p.grad for p in method.parameters())]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("with_queue", [False, True])
def test_ranks_with_uneven_shares_give_the_loss_and_gradients_of_one_process(world: int, with_queue: bool) -> None:
    config = replace(CONFIG, queue=QueueConfig(num_samples=20, start_epoch=0) if with_queue else None)
    expected = loss_and_gradients(config)
    for found in run_ranks(world, loss_and_gradients, config):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def eight_steps(config: SwavConfig) -> list[float]:
    method, model = in_this_world(config)
    optimizer = LARS(method.parameters(), lr=0.5)
    losses = []
    for step in range(8):
        method.before_step()
        output = model(share_of(crops_of(step, size=32), dtype=torch.float64))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.metrics["loss"]))
    return losses


@pytest.mark.parametrize("world", [2, 4])
def test_eight_steps_agree_between_worlds(world: int) -> None:
    config = replace(CONFIG, queue=QueueConfig(num_samples=24, start_epoch=0))
    expected = eight_steps(config)
    assert len(set(expected)) == 8
    for found in run_ranks(world, eight_steps, config):
        assert found == pytest.approx(expected, rel=1e-9)


def test_the_queue_waits_for_its_epoch_and_until_it_is_full() -> None:
    with_queue = small_swav(replace(CONFIG, queue=QueueConfig(num_samples=24, start_epoch=2)))
    without = small_swav(CONFIG)
    losses = []
    for step, epoch in enumerate([1, 2, 2, 2]):
        batch = share_of(crops_of(step), epoch=epoch)
        losses.append((float(with_queue(batch).loss.detach()), float(without(batch).loss.detach())))
    same = [a == b for a, b in losses]
    assert same == [True, True, True, False]  # epoch 1: not started; then two batches fill it; then it is used


def test_hard_codes_and_soft_codes_differ_only_in_rounding() -> None:
    batch = share_of(crops_of(0))
    soft, hard = small_swav(CONFIG), small_swav(replace(CONFIG, codes="hard"))
    scores = soft.prototypes(soft.model(batch.crops))[0].unflatten(0, (-1, SAMPLES))[:2].detach()
    soft_codes, hard_codes = (method._codes(scores, scores, batch) for method in (soft, hard))
    assert torch.equal(soft_codes.argmax(dim=-1), hard_codes.argmax(dim=-1))
    assert set(hard_codes.unique().tolist()) == {0.0, 1.0}


def test_fixed_prototypes_are_not_trained() -> None:
    method = small_swav(replace(CONFIG, learn_prototypes=False))
    method(share_of(crops_of(0))).loss.backward()
    assert all(p.grad is None for p in method.prototypes.parameters())
    assert all(p.grad is not None for p in method.model.parameters())


def test_prototypes_are_frozen_in_the_first_epoch_only() -> None:
    method = small_swav(CONFIG)
    assert list(method.frozen_parameters(0)) == list(method.prototypes.parameters())
    assert list(method.frozen_parameters(1)) == []


def test_before_step_normalises_the_prototypes() -> None:
    method = small_swav(CONFIG)
    with torch.no_grad():
        method.prototypes.heads[0].mul_(3)
    method.before_step()
    np.testing.assert_allclose(method.prototypes.heads[0].detach().norm(dim=1), 1, atol=1e-6)


def test_the_order_of_the_other_crops_does_not_matter() -> None:
    method = small_swav(CONFIG)
    crops = crops_of(0)
    flipped = [crops[0], crops[1].flip(0)]
    assert float(method(share_of(flipped)).loss.detach()) == pytest.approx(
        float(method(share_of(crops)).loss.detach()), rel=1e-6
    )


def test_log_domain_epsilon_trains() -> None:
    method = small_swav(replace(CONFIG, sinkhorn=SinkhornConfig(epsilon=0.001)))
    output = method(share_of(crops_of(0)))
    output.loss.backward()
    assert torch.isfinite(output.loss)
