import os
from pathlib import Path

import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.ranks import run_ranks
from swav_testing.runs import make_scene, write_scenes
from swav_testing.shards import write_tar
from torch import nn

from swav import features
from swav.config import EvaluateConfig
from swav.data.decode import decode_image
from swav.data.source import open_dataset
from swav.features import Evaluation, Features, evaluate_backbone, extract_features, knn_accuracies
from swav.models.resnet import ResNet

CPU = torch.device("cpu")
BROKEN = (3, 40, 41, 102)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))
    monkeypatch.setattr(features, "_BATCH", 16)  # several blocks, the last one smaller


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"), broken=BROKEN)


def config_of(train: Path, test: Path | None = None, *, neighbors: tuple[int, ...] = (1, 5)) -> EvaluateConfig:
    test_url = str(test) if test is not None else None
    return EvaluateConfig(train_url=str(train), test_url=test_url, num_neighbors=neighbors, resize_px=20, crop_px=16)


def network() -> nn.Module:
    torch.manual_seed(3)
    return ResNet("resnet18", width=0.125, stem="3x3")


def features_here(data: str, cache: str) -> Features:
    os.environ["SWAV_CACHE"] = cache
    features._BATCH = 16
    return extract_features(network(), open_dataset(data), config_of(Path(data)), device=CPU, num_threads=2)


def test_any_number_of_ranks_gives_the_same_features(data: Path, cache: Path) -> None:
    one = features_here(str(data), str(cache))
    good = [number for number in range(103) if number not in BROKEN]
    assert one.labels.tolist() == [number % 3 for number in good]
    assert (one.offset, one.total, one.num_broken) == (0, 99, 4)
    torch.testing.assert_close(one.values.norm(dim=1), torch.ones(99))
    for world in (2, 3):
        parts = run_ranks(world, features_here, str(data), str(cache))
        assert [part.offset for part in parts] == np.cumsum([0, *(len(part.values) for part in parts[:-1])]).tolist()
        assert {(part.total, part.num_broken) for part in parts} == {(99, 4)}
        assert torch.equal(torch.cat([part.labels for part in parts]), one.labels)
        torch.testing.assert_close(torch.cat([part.values for part in parts]), one.values, rtol=1e-4, atol=1e-6)


def accuracies_here(train: str, test: str | None, cache: str) -> dict[str, float]:
    os.environ["SWAV_CACHE"] = cache
    features._BATCH = 16
    config = config_of(Path(train), Path(test) if test else None, neighbors=(1, 5, 30))
    evaluation = Evaluation(config, open_dataset(train), open_dataset(test) if test else None)
    return evaluate_backbone(network(), evaluation, device=CPU, num_threads=1)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_any_number_of_ranks_gives_the_oracles_accuracy(
    tmp_path: Path, data: Path, cache: Path, leave_one_out: bool
) -> None:
    test = write_scenes(tmp_path / "test", (20, 17), first_seed=1000)
    urls = (str(data), None if leave_one_out else str(test))
    train_features = features_here(str(data), str(cache))
    votes, labels = train_features.values.double().numpy(), train_features.labels.numpy()
    expected = {}
    for k in (1, 5, 30):
        if leave_one_out:
            rest = [np.delete(np.arange(99), row) for row in range(99)]
            found = [
                oracles.knn_predict(votes[keep], labels[keep], votes[[row]], k, 0.07)[0]
                for row, keep in enumerate(rest)
            ]
            expected[f"knn_{k}"] = float(np.mean(np.array(found) == labels))
        else:
            queries = features_here(str(test), str(cache))
            assert queries.total == 37
            found = oracles.knn_predict(votes, labels, queries.values.double().numpy(), k, 0.07)
            expected[f"knn_{k}"] = float(np.mean(np.array(found) == queries.labels.numpy()))
    for world in (1, 2, 3):
        for result in run_ranks(world, accuracies_here, *urls, str(cache)):
            assert result == pytest.approx(expected, abs=1e-6)


def test_an_image_has_no_vote_on_itself() -> None:
    train = Features(torch.eye(4), torch.tensor([0, 0, 1, 1]), offset=0, total=4, num_broken=0)
    config = config_of(Path("none"), neighbors=(1,))
    assert knn_accuracies(train, train, config) == {1: 1.0}
    lonely = Features(torch.eye(2), torch.tensor([0, 1]), offset=0, total=2, num_broken=0)
    assert knn_accuracies(lonely, None, config) == {1: 0.0}


def test_what_the_network_sees(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", (1,))
    config = EvaluateConfig(train_url=str(data), num_neighbors=(1,), resize_px=24, crop_px=16)
    found = extract_features(nn.Flatten(), open_dataset(str(data)), config, device=CPU, num_threads=1)
    pixels = decode_image(make_scene(0, 0))[4:20, 4:20].astype(np.float64) / 255  # 24 pixels, not resized
    normalized = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = torch.from_numpy(normalized).permute(2, 0, 1).flatten()
    torch.testing.assert_close(found.values[0].double(), expected / expected.norm(), rtol=1e-4, atol=1e-6)


def test_the_network_is_evaluated_and_left_as_it_was(data: Path) -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = extract_features(model, open_dataset(str(data)), config_of(data), device=CPU, num_threads=1)
    assert model.training
    assert not found.values.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_of_broken_images_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_scenes(tmp_path / "data", (20,), broken=(16, 17, 18, 19))
    found = extract_features(network(), open_dataset(str(data)), config_of(data), device=CPU, num_threads=1)
    assert (found.total, found.num_broken) == (16, 4)
    assert caplog.text.count("is left out of the evaluation") == 4
    assert "shard-000000.tar:000019" in caplog.text


def two_images(data: str, cache: str) -> tuple[int, int, int, dict[int, float]]:
    os.environ["SWAV_CACHE"] = cache
    config = config_of(Path(data), neighbors=(1,))
    found = extract_features(network(), open_dataset(data), config, device=CPU, num_threads=1)
    return len(found.values), found.total, found.num_broken, knn_accuracies(found, None, config)


def test_ranks_without_images_take_part(tmp_path: Path, cache: Path) -> None:
    data = write_scenes(tmp_path / "data", (3,), broken=(1,))
    results = run_ranks(4, two_images, str(data), str(cache))
    assert sorted(number for number, *_ in results) == [0, 0, 1, 1]
    assert [result[1:] for result in results] == [(2, 1, {1: 0.0})] * 4  # two classes


def test_images_that_are_all_broken_are_refused(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", (2,), broken=(0, 1))
    with pytest.raises(ValueError, match="none of the 2 images to evaluate on can be decoded"):
        extract_features(network(), open_dataset(str(data)), config_of(data), device=CPU, num_threads=1)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", (4,), labelled=False)
    with pytest.raises(ValueError, match=r"shard-000000\.tar:000000 has no label \(\.cls\); an evaluation needs"):
        extract_features(network(), open_dataset(str(data)), config_of(data), device=CPU, num_threads=1)


@pytest.mark.parametrize(("label", "message"), [(b"-1", "number the classes from 0"), (b"cat", "a label is a number")])
def test_labels_that_cannot_be_are_refused(tmp_path: Path, label: bytes, message: str) -> None:
    write_tar(tmp_path / "data" / "shard-0.tar", [("a.jpg", make_scene(0, 0)), ("a.cls", label)])
    with pytest.raises(ValueError, match=message):
        extract_features(
            network(), open_dataset(str(tmp_path / "data")), config_of(tmp_path), device=CPU, num_threads=1
        )


def test_more_neighbours_than_images_are_refused() -> None:
    train = Features(torch.eye(4), torch.tensor([0, 0, 1, 1]), offset=0, total=4, num_broken=0)
    assert knn_accuracies(train, train, config_of(Path("none"), neighbors=(4,)))
    with pytest.raises(ValueError, match="k=4 needs as many train images, there are 3; use a smaller k"):
        knn_accuracies(train, None, config_of(Path("none"), neighbors=(4,)))
