import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav.config import Mocov2Config
from swav.data.batch import CropBatch
from swav.distributed import rank, world_size
from swav.methods.mocov2 import MoCoV2, info_nce
from swav.models.batchnorm import synchronize
from swav.models.heads import ProjectionHead
from swav.models.resnet import ResNet
from swav.optim.lars import LARS, parameter_groups

SAMPLES, QUEUE = 12, 30


def small_moco(*, momentum: float = 0.9) -> MoCoV2:
    torch.manual_seed(5)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    head = ProjectionHead(network.num_features, 16, 8, batch_norm=False)
    config = Mocov2Config(queue_samples=QUEUE, momentum=momentum)
    method = synchronize(MoCoV2(network, head, config, dim=8), torch.device("cpu")).double()
    assert isinstance(method, MoCoV2)
    return method


def share_of(step: int) -> CropBatch:
    generator = torch.Generator().manual_seed(100 + step)
    crops = torch.randn(2, SAMPLES, 3, 32, 32, generator=generator, dtype=torch.float64)
    bounds = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 5, 9, 12]}[world_size()]
    first, last = bounds[rank()], bounds[rank() + 1]
    views = [crops[:, first:last].flatten(0, 1)]
    return CropBatch(crops=views, epoch=0, global_offset=first, global_size=SAMPLES)


def test_loss_equals_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, queue = (
        nn.functional.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for n in (5, 5, 40)
    )
    for temperature in (0.2, 0.07):
        found = info_nce(queries, keys, queue, temperature=temperature)
        for i in range(5):
            expected = oracles.info_nce(queries[i].numpy(), keys[i].numpy(), queue.numpy(), temperature)
            assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_a_step_is_the_papers() -> None:
    method = small_moco()
    queue = method.queue.embeddings[0].clone()
    assert torch.allclose(queue.norm(dim=1), torch.ones(QUEUE, dtype=torch.float64), atol=1e-6)
    batch = share_of(0)
    twin = small_moco()
    twin.load_state_dict(method.state_dict())
    queries = twin.model([batch.crops[0][:SAMPLES]])
    keys = twin.key_model([batch.crops[0][SAMPLES:]])
    output = method(batch)
    expected = sum(
        oracles.info_nce(q.numpy(), k.numpy(), queue.numpy(), 0.2)
        for q, k in zip(queries.detach(), keys.detach(), strict=True)
    )
    assert float(output.loss.detach()) == pytest.approx(expected / SAMPLES, rel=1e-12)
    torch.testing.assert_close(method.queue.embeddings[0], torch.cat([queue, keys.detach()])[-QUEUE:])
    output.loss.backward()
    assert all(p.grad is None for p in method.key_model.parameters())
    assert all(p.grad is not None for p in method.model.parameters())


def test_the_momentum_encoder_follows_the_encoder() -> None:
    method = small_moco(momentum=0.75)
    before = [p.detach().clone() for p in method.key_model.parameters()]
    assert all(torch.equal(k, q) for k, q in zip(before, method.model.parameters(), strict=True))
    with torch.no_grad():
        for p in method.model.parameters():
            p.add_(1.0)
    method.before_step()
    for key, old in zip(method.key_model.parameters(), before, strict=True):
        torch.testing.assert_close(key.detach(), old + 0.25)


def three_steps() -> list[Tensor]:
    method = small_moco()
    model: nn.Module = DistributedDataParallel(method) if world_size() > 1 else method
    optimizer = LARS(parameter_groups(method, exclude_bias_and_norm=False, adapt=False), lr=0.1, weight_decay=1e-4)
    losses = []
    for step in range(3):
        method.before_step()
        output = model(share_of(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.metrics["loss"])
    return [*losses, method.queue.embeddings, *(p.detach() for p in method.parameters())]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_uneven_shares_take_the_steps_of_one_process(world: int) -> None:
    expected = three_steps()
    for found in run_ranks(world, three_steps):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_its_state_holds_the_momentum_encoder_and_the_queue() -> None:
    method, other = small_moco(), small_moco()
    method(share_of(0))
    with torch.no_grad():
        for p in method.model.parameters():
            p.mul_(1.1)
    method.before_step()
    other.load_state_dict(method.state_dict())
    for a, b in zip(method.key_model.parameters(), other.key_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(method.queue.embeddings, other.queue.embeddings)
