import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from swav_testing.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swav.config import DeepClusterV2Config, SelaV2Config
from swav.data.batch import NO_LABEL, CropBatch
from swav.distributed import rank, world_size
from swav.methods.offline import Offline, labels_loss
from swav.models.batchnorm import synchronize
from swav.models.heads import ProjectionHead
from swav.models.resnet import ResNet

SAMPLES, PROTOTYPES, SETS, DIM = 12, 5, 3, 8
DEEPCLUSTER = DeepClusterV2Config(num_prototypes=PROTOTYPES, num_sets=SETS)
SELA = SelaV2Config(num_prototypes=PROTOTYPES, num_sets=SETS)


def make_method(config: DeepClusterV2Config | SelaV2Config, *, num_assign_crops: int = 2) -> Offline:
    torch.manual_seed(5)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    head = ProjectionHead(network.num_features, 16, DIM, batch_norm=True)
    method = Offline(network, head, config, num_assign_crops=num_assign_crops, dim=DIM)
    synchronized = synchronize(method, torch.device("cpu")).double()
    assert isinstance(synchronized, Offline)
    return synchronized


def make_crops(*num_crops: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(crops, SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)
        for crops, size in zip(num_crops, (32, 16), strict=False)
    ]


def make_labels() -> Tensor:
    """One set without gaps, one with some, and one in which only the first and the last samples have a label."""
    labels = torch.randint(PROTOTYPES, (SAMPLES, SETS), generator=torch.Generator().manual_seed(8))
    labels[3:6, 1] = NO_LABEL
    labels[1:-1, 2] = NO_LABEL
    return labels


def make_batch(crops: list[Tensor], labels: Tensor, first: int = 0, last: int = SAMPLES) -> CropBatch:
    return CropBatch(
        crops=[group[:, first:last].flatten(0, 1) for group in crops],
        epoch=0,
        global_offset=first,
        global_size=SAMPLES,
        labels=labels[first:last],
    )


def by_loops(
    embeddings: NDArray[np.float64],
    prototypes: list[NDArray[np.float64]],
    labels: NDArray[np.int64],
    temperature: float,
) -> float:
    """Eq. 2: the mean over sets of the mean over crops and labelled samples of the cross-entropy."""
    total = 0.0
    for number, vectors in enumerate(prototypes):
        losses = []
        for crop in embeddings:
            for row, label in zip(crop, labels[:, number], strict=True):
                if label == NO_LABEL:
                    continue
                logits = [float(row @ vector) / temperature for vector in vectors]
                losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[label])
        total += sum(losses) / len(losses) if losses else 0.0
    return total / len(prototypes)


def embeddings_of(method: Offline, crops: list[Tensor]) -> NDArray[np.float64]:
    flat = method.model([group.flatten(0, 1) for group in crops])
    found: NDArray[np.float64] = flat.detach().unflatten(0, (-1, SAMPLES)).numpy()
    return found


@pytest.mark.parametrize("num_crops", [(2, 3), (2,), (1, 2), (1,)])
@pytest.mark.parametrize("config", [DEEPCLUSTER, SELA], ids=["deepclusterv2", "selav2"])
def test_loss_is_that_of_the_equation_by_loops(
    config: DeepClusterV2Config | SelaV2Config, num_crops: tuple[int, ...]
) -> None:
    method, crops, labels = make_method(config, num_assign_crops=num_crops[0]), make_crops(*num_crops), make_labels()
    embeddings = embeddings_of(method, crops)
    output = method(make_batch(crops, labels))
    prototypes = [head.detach().numpy() for head in method.prototypes.heads]
    expected = by_loops(embeddings, prototypes, labels.numpy(), config.temperature)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=2e-7)  # weights of sets are float32
    assert float(output.metrics["loss"]) == pytest.approx(expected, rel=2e-7)  # weights of sets are float32
    np.testing.assert_allclose(output.embeddings.numpy(), embeddings[: num_crops[0]], rtol=1e-10)
    assert not output.embeddings.requires_grad


def test_a_samples_loss_is_the_mean_over_its_crops_and_0_without_label() -> None:
    scores = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([2, NO_LABEL, 0, 5])
    found = labels_loss(scores, labels, temperature=0.3)
    log_shares = torch.log_softmax(scores / 0.3, dim=2)
    expected = [
        -log_shares[:, b, label].mean().item() if label >= 0 else 0.0 for b, label in enumerate(labels.tolist())
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", [DEEPCLUSTER, SELA], ids=["deepclusterv2", "selav2"])
def test_a_batch_without_any_label_changes_nothing(config: DeepClusterV2Config | SelaV2Config) -> None:
    method = make_method(config)
    output = method(make_batch(make_crops(2, 1), torch.full((SAMPLES, SETS), NO_LABEL)))
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    for parameter in method.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert (parameter.grad == 0).all()


def test_centroids_are_no_parameters_that_train_and_the_partitions_prototypes_are() -> None:
    for config, trains in ((DEEPCLUSTER, False), (SELA, True)):
        method = make_method(config)
        method(make_batch(make_crops(2), make_labels())).loss.backward()
        gradients = [head.grad for head in method.prototypes.heads]
        assert [gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients] == [trains] * SETS
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.backbone.parameters())


def test_only_the_partitions_prototypes_are_frozen_at_first() -> None:
    sela = make_method(SELA)
    assert [len(list(sela.frozen_parameters(epoch))) for epoch in (0, 1, 2)] == [SETS, 0, 0]
    assert {id(p) for p in sela.frozen_parameters(0)} == {id(head) for head in sela.prototypes.heads}
    assert list(make_method(DEEPCLUSTER).frozen_parameters(0)) == []


def test_centroids_become_the_prototypes_as_they_are() -> None:
    method = make_method(DEEPCLUSTER).float()
    centroids = nn.functional.normalize(torch.randn(SETS, PROTOTYPES, DIM), dim=2)
    method.set_prototypes(centroids)
    method.before_step()
    assert torch.equal(torch.stack(list(method.prototypes.heads)), centroids)
    with pytest.raises(ValueError, match="zip"):
        method.set_prototypes(centroids[:2])


def test_the_partitions_prototypes_are_brought_to_unit_norm_before_a_step() -> None:
    method = make_method(SELA)
    with torch.no_grad():
        for head in method.prototypes.heads:
            head.mul_(3)
    method.before_step()
    for head in method.prototypes.heads:
        torch.testing.assert_close(head.detach().norm(dim=1), torch.ones(PROTOTYPES, dtype=torch.float64))


def test_features_alone_are_those_of_the_assign_crops() -> None:
    method, crops = make_method(DEEPCLUSTER), make_crops(2, 3)
    batch = make_batch(crops, make_labels())
    found = method.embed(batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, method(make_batch(make_crops(2), make_labels())).embeddings)
    without_labels = CropBatch(batch.crops, epoch=0, global_offset=0, global_size=SAMPLES)
    assert torch.equal(method.embed(without_labels), found)


def loss_and_gradients(kind: str) -> list[Tensor]:
    method = make_method(DEEPCLUSTER if kind == "deepclusterv2" else SELA)
    model: nn.Module = DistributedDataParallel(method) if world_size() > 1 else method
    # the middle ranks of four have no label in the last set
    bounds: Any = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 5, 9, 12]}[world_size()]
    first, last = bounds[rank()], bounds[rank() + 1]
    output = model(make_batch(make_crops(2, 3), make_labels(), first, last))
    output.loss.backward()
    assert output.embeddings.shape == (2, last - first, DIM)
    return [output.metrics["loss"], *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["deepclusterv2", "selav2"])
def test_ranks_with_uneven_shares_and_labels_give_the_loss_and_gradients_of_one_process(kind: str, world: int) -> None:
    expected = loss_and_gradients(kind)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for found in run_ranks(world, loss_and_gradients, kind):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
