import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from torch import Tensor

from swav.distributed import rank, world_size
from swav.ops.knn import knn_predict
from swav.partition import share


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    train = torch.nn.functional.normalize(torch.randn(57, 6, generator=generator), dim=1)
    labels = torch.randint(0, 4, (57,), generator=generator)
    test = torch.nn.functional.normalize(torch.randn(23, 6, generator=generator), dim=1)
    return train, labels, test


def predict_with_my_share() -> list[list[int]]:
    train, labels, test = data()
    first, last = share(len(train), rank(), world_size())
    found = knn_predict(train[first:last], labels[first:last], test, num_neighbors=(5, 20, 50), temperature=0.07)
    return [found[k].tolist() for k in (5, 20, 50)]


def test_votes_equal_the_loop() -> None:
    train, labels, test = data()
    expected = [
        oracles.knn_predict(train.double().numpy(), labels, test.double().numpy(), k, 0.07) for k in (5, 20, 50)
    ]
    assert predict_with_my_share() == expected


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_predicts_the_same(world: int) -> None:
    expected = predict_with_my_share()
    assert run_ranks(world, predict_with_my_share) == [expected] * world


def test_leaving_one_out_ignores_the_image_itself() -> None:
    train, labels, _ = data()
    expected = []
    for i in range(len(train)):
        rest = [j for j in range(len(train)) if j != i]
        row = train[i : i + 1].double().numpy()
        expected += oracles.knn_predict(train[rest].double().numpy(), labels[rest], row, 5, 0.07)
    found = knn_predict(train, labels, train, num_neighbors=(5,), temperature=0.07, own_rows=torch.arange(len(train)))
    assert found[5].tolist() == expected


def test_more_neighbours_than_images_are_refused() -> None:
    train, labels, test = data()
    with pytest.raises(ValueError, match="k=100 needs as many train images, there are 57"):
        knn_predict(train, labels, test, num_neighbors=(100,), temperature=0.07)


def test_labels_that_votes_cannot_be_counted_for_are_refused() -> None:
    train, labels, test = data()
    with pytest.raises(ValueError, match="the largest label is 1000000000; number the classes from 0"):
        knn_predict(train, labels + 10**9 - labels.max(), test, num_neighbors=(5,), temperature=0.07)
