import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav.config import SimclrConfig
from swav.data.batch import CropBatch
from swav.distributed import rank, world_size
from swav.methods import simclr
from swav.methods.simclr import SimCLR, contrastive_loss
from swav.models.batchnorm import synchronize
from swav.models.heads import ProjectionHead
from swav.models.resnet import ResNet

SAMPLES = 12


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


@pytest.mark.parametrize(("num_crops", "temperature"), [(2, 0.1), (2, 0.5), (3, 0.2), (6, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_equals_equation_1_by_loops(num_crops: int, temperature: float, dtype: torch.dtype) -> None:
    embeddings = unit(num_crops, 5, 7)
    found = contrastive_loss(embeddings.to(dtype), embeddings.to(dtype), offset=0, temperature=temperature)
    expected = oracles.simclr_loss(embeddings.numpy(), temperature)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 2e-6)


def test_two_crops_give_nt_xent() -> None:
    embeddings = unit(2, 6, 5)
    flat = embeddings.flatten(0, 1)
    logits = (flat @ flat.mT / 0.3).fill_diagonal_(float("-inf"))
    partners = torch.arange(12).roll(6)
    expected = nn.functional.cross_entropy(logits, partners)
    torch.testing.assert_close(contrastive_loss(embeddings, embeddings, offset=0, temperature=0.3).mean(), expected)


def test_blocks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for similarities in (1 << 24, 1, 3 * 3 * 9 * 4):  # all images at once, one, and four of the seven
        monkeypatch.setattr(simclr, "_SIMILARITIES", similarities)
        whole = unit(3, 9, 5).requires_grad_()
        losses = contrastive_loss(whole[:, 1:8], whole, offset=1, temperature=0.1)
        losses.sum().backward()
        results.append((losses.detach(), whole.grad))
    for losses, gradient in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-11, atol=1e-14)


def test_the_gradient_is_that_of_the_loss() -> None:
    embeddings = unit(3, 4, 5).requires_grad_()

    def loss(whole: Tensor) -> Tensor:
        return contrastive_loss(whole[:, 1:3], whole, offset=1, temperature=0.4)

    assert torch.autograd.gradcheck(loss, (embeddings,))


def test_embeddings_that_agree_wholly_stay_finite() -> None:
    same = torch.ones(2, 3, 4) / 2
    losses = contrastive_loss(same, same, offset=0, temperature=0.001)
    np.testing.assert_allclose(losses.numpy(), np.log(5), rtol=1e-5)  # one positive and four negatives, all alike


def loss_and_gradients() -> list[Tensor]:
    torch.manual_seed(5)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    head = ProjectionHead(network.num_features, 16, 8, batch_norm=True)
    method = SimCLR(network, head, SimclrConfig(), num_assign_crops=2)
    synchronize(method, torch.device("cpu")).double()
    model: nn.Module = DistributedDataParallel(method) if world_size() > 1 else method
    generator = torch.Generator().manual_seed(7)
    crops = [
        torch.randn(2, SAMPLES, 3, 32, 32, generator=generator, dtype=torch.float64),
        torch.randn(3, SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64),
    ]
    bounds = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 5, 9, 12]}[world_size()]
    first, last = bounds[rank()], bounds[rank() + 1]
    batch = CropBatch(
        crops=[group[:, first:last].flatten(0, 1) for group in crops],
        epoch=0,
        global_offset=first,
        global_size=SAMPLES,
    )
    output = model(batch)
    output.loss.backward()
    assert output.embeddings.shape == (2, last - first, 8)
    return [output.metrics["loss"], *(p.grad for p in method.parameters())]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_uneven_shares_give_the_loss_and_gradients_of_one_process(world: int) -> None:
    expected = loss_and_gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for found in run_ranks(world, loss_and_gradients):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
