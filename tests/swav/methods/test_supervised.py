import math

import pytest
import torch
from swav_testing.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav.config import SupervisedConfig
from swav.data.batch import NO_LABEL, CropBatch
from swav.distributed import rank, world_size
from swav.methods.supervised import Supervised
from swav.models.batchnorm import synchronize
from swav.models.resnet import ResNet

SAMPLES, CLASSES = 12, 4


def make_method(num_assign_crops: int = 1) -> Supervised:
    torch.manual_seed(5)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    config = SupervisedConfig(num_classes=CLASSES)
    method = Supervised(network, network.num_features, config, num_assign_crops=num_assign_crops)
    synchronized = synchronize(method, torch.device("cpu")).double()
    assert isinstance(synchronized, Supervised)
    return synchronized


def make_batch(num_crops: tuple[int, ...], labels: Tensor, first: int = 0, last: int = SAMPLES) -> CropBatch:
    generator = torch.Generator().manual_seed(7)
    crops = [
        torch.randn(crops, SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)
        for crops, size in zip(num_crops, (32, 16), strict=False)
    ]
    return CropBatch(
        crops=[group[:, first:last].flatten(0, 1) for group in crops],
        epoch=0,
        global_offset=first,
        global_size=SAMPLES,
        labels=labels[first:last],
    )


def make_labels() -> Tensor:
    labels = torch.randint(CLASSES, (SAMPLES, 1), generator=torch.Generator().manual_seed(8))
    labels[4] = NO_LABEL
    return labels


@pytest.mark.parametrize("num_crops", [(1,), (2,), (2, 3)])
def test_loss_is_the_cross_entropy_by_loops(num_crops: tuple[int, ...]) -> None:
    method, labels = make_method(num_crops[0]), make_labels()
    batch = make_batch(num_crops, labels)
    features = torch.cat([method.backbone(group) for group in batch.crops])
    scores = method.classifier(features).detach().unflatten(0, (-1, SAMPLES)).tolist()
    losses = [
        math.log(sum(math.exp(score) for score in row)) - row[label]
        for crop in scores
        for row, label in zip(crop, labels[:, 0].tolist(), strict=True)
        if label != NO_LABEL
    ]
    output = method(batch)
    expected = sum(losses) / (SAMPLES * len(scores))  # an image in the place of a broken one adds none
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-10)
    assert output.embeddings.shape == (num_crops[0], SAMPLES, features.shape[1])
    torch.testing.assert_close(output.embeddings.norm(dim=2), torch.ones(num_crops[0], SAMPLES, dtype=torch.float64))
    assert not output.embeddings.requires_grad


def test_a_batch_without_any_label_changes_nothing() -> None:
    method = make_method()
    output = method(make_batch((1, 2), torch.full((SAMPLES, 1), NO_LABEL)))
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    for parameter in method.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_a_class_that_the_classifier_has_not_is_refused() -> None:
    labels = make_labels()
    labels[0] = CLASSES
    with pytest.raises(IndexError, match="out of bounds"):
        make_method()(make_batch((1,), labels))


def loss_and_gradients() -> list[Tensor]:
    method = make_method(2)
    model: nn.Module = DistributedDataParallel(method) if world_size() > 1 else method
    bounds = {1: [0, 12], 2: [0, 5, 12], 4: [0, 4, 5, 9, 12]}[world_size()]  # of four, one has no label at all
    first, last = bounds[rank()], bounds[rank() + 1]
    output = model(make_batch((2, 3), make_labels(), first, last))
    output.loss.backward()
    return [output.metrics["loss"], *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_uneven_shares_give_the_loss_and_gradients_of_one_process(world: int) -> None:
    expected = loss_and_gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for found in run_ranks(world, loss_and_gradients):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
