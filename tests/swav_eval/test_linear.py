import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from swav_testing.oracles import classifier_steps
from swav_testing.ranks import run_ranks
from swav_testing.runs import write_scenes

from swav.config import ModelConfig
from swav.data.source import open_dataset
from swav.models.backbone_file import load_backbone, save_backbone
from swav.models.resnet import ResNet
from swav_eval import linear
from swav_eval.classifier import Classifier
from swav_eval.command import Request, evaluate
from swav_eval.config import LinearProtocol
from swav_eval.feature_store import extract_features
from swav_eval.labelled_data import OrderOfIds
from swav_eval.linear import main
from swav_eval.recipes import configure
from swav_eval.subsets import hold_out

BROKEN = (3, 40, 102)
TINY = (
    "num_classes=3",
    "global_batch=24",
    "epochs=3",
    "runtime.device=cpu",
    "runtime.loader_threads=2",
    "runtime.checkpoint_every_steps=4",
)
EITHER_WAY = {
    "augmented": ("epochs=2",),
    "kept": ("augment=false", "learning_rates=[0.3,0.03]"),
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_scenes(folder / "train", broken=BROKEN)
    write_scenes(folder / "test", (50, 53), first_seed=1000, broken=(7,))
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    model = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    save_backbone(network, model, folder / "backbone.pt", resize_px=24, crop_px=20)
    return folder


def words(files: Path, output: Path | None, *more: str) -> list[str]:
    where = [f"--{name}={files / name}" for name in ("train", "test")] + ["--backbone", str(files / "backbone.pt")]
    where += ["--output", str(output)] if output is not None else []
    return ["--recipe", "linear_imagenet", *where, *TINY, *more]


def result_of(files: Path, output: Path, *more: str) -> dict[str, Any]:
    assert main(words(files, output, *more)) == 0
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def results_here(files: str, folder: str, cache: str, world: int) -> list[dict[str, Any]]:
    """Of this rank's part, with augmentation and without."""
    os.environ["SWAV_CACHE"] = cache
    results = []
    for name, settings in EITHER_WAY.items():
        output = Path(folder) / f"{name}-{world}.json"
        assert main(words(Path(files), output, *settings)) == 0
        results.append(found(json.loads(output.read_text())))
    return results


def found(result: dict[str, Any]) -> dict[str, Any]:
    """What a result says, without how it was asked for."""
    return {key: value for key, value in result.items() if key != "command"}


def test_the_result_says_what_was_trained_and_counted(tmp_path: Path, files: Path) -> None:
    result = result_of(files, tmp_path / "one.json")
    assert list(result["metrics"]) == ["top1"]  # of five classes or fewer there is no top five
    assert result["metrics"]["top1"] * 102 == pytest.approx(round(result["metrics"]["top1"] * 102))
    assert result["metrics"]["top1"] > 0.6  # the classes are colours
    assert (result["learning_rate"], result["trained_on"]) == (0.3, 103)
    assert result["rates"] == [{"learning_rate": 0.3, "test": result["metrics"]}]
    assert {name: (one["images"], one["broken"]) for name, one in result["data"].items()} == {
        "train": (103, 3),
        "test": (103, 1),
    }
    assert not (tmp_path / "one.json.work").exists()
    assert found(result_of(files, tmp_path / "two.json")) == found(result)


def test_any_number_of_ranks_gives_the_same_results(tmp_path: Path, cache: Path, files: Path) -> None:
    expected = results_here(str(files), str(tmp_path), str(cache), 1)
    for world in (2, 4):
        for results in run_ranks(world, results_here, str(files), str(tmp_path), str(cache), world):
            assert results == expected


def weights_of(monkeypatch: pytest.MonkeyPatch) -> list[Classifier]:
    """The classifiers that are trained from here on."""
    made: list[Classifier] = []
    train: Callable[..., Any] = vars(linear)["train_classifier"]

    def spy(classifier: Classifier, *args: Any, **settings: Any) -> Any:
        made.append(classifier)
        return train(classifier, *args, **settings)

    monkeypatch.setattr(linear, "train_classifier", spy)
    return made


def test_on_kept_features_it_is_softmax_regression(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a slow float64 training and counting, on the features of the images that decode."""
    made = weights_of(monkeypatch)
    rates = (0.3, 0.02)
    settings = ("augment=false", f"learning_rates={list(rates)}", "weight_decay=0.001", "held_out_fraction=0.2")
    result = result_of(files, tmp_path / "one.json", *settings)
    backbone = load_backbone(files / "backbone.pt")
    features = {}
    for name in ("train", "test"):
        stored = extract_features(
            backbone.backbone,
            open_dataset(str(files / name)),
            backbone_sha256=backbone.sha256,
            name=name,
            resize_px=24,
            crop_px=20,
            device=torch.device("cpu"),
            precision="fp32",
            num_threads=1,
            folder=None,
        )
        features[name] = (stored.ids, stored.values.numpy().astype(np.float64), stored.labels)
    ids, values, labels = features["train"]
    learned, held_out = hold_out(103, 0.2, seed=31)
    learned, held_out = np.setdiff1d(learned, BROKEN), np.setdiff1d(held_out, BROKEN)
    batches = []
    for epoch in range(3):
        order = OrderOfIds(open_dataset(str(files / "train")), learned, seed=31, epoch=epoch, global_batch=24)
        batches += [np.searchsorted(ids, order.rank_batch(step, 0, 1)[0]) for step in range(order.num_steps)]
    start = Classifier(torch.nn.Identity(), values.shape[1], 3, num_heads=1, seed=31, is_frozen=True).heads[0]
    assert result["trained_on"] == 103 - round(0.2 * 103)
    for number, rate in enumerate(rates):
        weight, bias = classifier_steps(
            start.weight.detach().double().numpy(),
            start.bias.detach().double().numpy(),
            [(values[rows], labels[rows]) for rows in batches],
            rates=[rate * (1 + np.cos(np.pi * step / len(batches))) / 2 for step in range(len(batches))],
            momentum=0.9,
            decay=0.001,
        )
        head = made[0].heads[number]
        np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=0, atol=1e-4 * np.abs(weight).max())
        np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=0, atol=1e-4 * np.abs(weight).max())
        rows = np.searchsorted(ids, held_out)
        told = result["rates"][number]
        assert told["held_out"] == {
            "top1": float(((values[rows] @ weight.T + bias).argmax(axis=1) == labels[rows]).mean()),
            "images": len(held_out),
        }
        _, test_values, test_labels = features["test"]
        assert told["test"] == {"top1": float(((test_values @ weight.T + bias).argmax(axis=1) == test_labels).mean())}
    best = max((0, 1), key=lambda number: result["rates"][number]["held_out"]["top1"])
    assert result["learning_rate"] == rates[best]
    assert result["metrics"] == result["rates"][best]["test"]
    assert {name: one["broken"] for name, one in result["data"].items()} == {"train": 3, "test": 1}


def test_several_rates_hold_images_out_and_the_best_there_is_the_results(tmp_path: Path, files: Path) -> None:
    result = result_of(files, tmp_path / "one.json", "learning_rates=[1e-6,0.3]", "held_out_fraction=0.3")
    low, high = result["rates"]
    assert low["held_out"]["top1"] < high["held_out"]["top1"]
    assert (result["learning_rate"], result["metrics"]) == (0.3, high["test"])
    assert result["trained_on"] == 103 - 31
    held_out = set(hold_out(103, 0.3, seed=31)[1].tolist())
    assert low["held_out"]["images"] == high["held_out"]["images"] == len(held_out - set(BROKEN))
    assert result["data"]["train"]["broken"] == 3  # of both parts


def test_a_rate_that_diverges_has_no_accuracy(tmp_path: Path, files: Path) -> None:
    result = result_of(files, tmp_path / "one.json", "augment=false", "learning_rates=[1e38,0.1]")
    assert result["learning_rate"] == 0.1
    assert result["rates"][0] == {"learning_rate": 1e38, "held_out": None, "test": None}


def test_more_than_five_classes_have_a_top_five(tmp_path: Path, files: Path) -> None:
    result = result_of(files, tmp_path / "one.json", "augment=false", "num_classes=6")
    assert list(result["metrics"]) == ["top1", "top5"]
    assert result["metrics"]["top1"] <= result["metrics"]["top5"] <= 1


def test_the_backbone_is_left_as_it_is(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = weights_of(monkeypatch)
    result_of(files, tmp_path / "one.json")
    before = load_backbone(files / "backbone.pt").backbone.state_dict()
    after = made[0].trunk.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["num_classes=2"], "has the label 2, and with num_classes=2 labels are 0 to 1; set num_classes to that of"),
        (["num_classes=1"], "num_classes >= 2"),
        (["learning_rates=[]"], "must be different rates above 0"),
        (["global_batch=0"], "global_batch >= 1"),
        (["crop_px=30"], "crop_px must be from 1 to resize_px"),
        (["epoch=3"], "unknown setting 'epoch'"),
        (["runtime.checkpoint_every_steps=0"], "must be at least 1, got 0 and 50"),
        (['schedule={"kind":"steps","epochs":[3],"factor":0.1}'], "must lie below epochs=3"),
    ],
)
def test_what_cannot_be_is_refused(
    files: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words(files, None, *more)) == 64
    assert message in caplog.records[-1].message


@pytest.mark.parametrize("name", ["train", "test"])
def test_unlabelled_images_are_refused(
    tmp_path: Path, files: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    unlabelled = write_scenes(tmp_path / "data", (20,), labelled=False)
    assert main([*words(files, None), f"--{name}", str(unlabelled)]) == 64
    assert "has no labels (.cls), and a classifier needs labelled images" in caplog.records[-1].message


def test_a_diverged_training_names_the_rate(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(words(files, None, "augment=false", "learning_rates=[1e38]")) == 1
    assert "give lower rates than learning_rates=1e+38" in caplog.records[-1].message


def test_too_many_broken_images_stop_either_way(tmp_path: Path, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = write_scenes(tmp_path / "data", (60,), broken=tuple(range(0, 55, 5)))
    for augment in ("true", "false"):
        assert main([*words(files, None, f"augment={augment}"), "--train", str(broken)]) == 1
        assert "runtime.max_quarantined_fraction" in caplog.records[-1].message


def refusal(files: str, cache: str) -> str:
    os.environ["SWAV_CACHE"] = cache
    protocol = configure("linear_imagenet", LinearProtocol, [*TINY, "augment=false"])
    backbone, train, test = (str(Path(files) / name) for name in ("backbone.pt", "train", "test"))
    try:
        evaluate(Request(backbone, train, test, None, None, ""), protocol, linear.carry_out, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_without_a_folder_to_share_features_in_are_refused_at_once(files: Path, cache: Path) -> None:
    messages = run_ranks(2, refusal, str(files), str(cache))
    assert messages == ["with augment=false, 2 ranks share the features through a folder; give --output or --work"] * 2


def test_a_few_epochs_on_photographs(tmp_path: Path) -> None:
    """An untrained network's features of CIFAR-10 tell the classes better than chance."""
    shards = Path(__file__).parents[3] / "shared/data/cifar10"
    if not shards.is_dir():
        pytest.skip(f"{shards} is not there")
    torch.manual_seed(0)
    model = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    path = tmp_path / "backbone.pt"
    save_backbone(ResNet("resnet18", width=0.125, stem="3x3"), model, path, resize_px=16, crop_px=16)
    images = str(shards / "test-000001.tar")
    output = tmp_path / "result.json"
    settings = ["num_classes=10", "epochs=10", "learning_rates=[0.1,1]", "augment=false", "runtime.device=cpu"]
    arguments = ["--recipe=linear_imagenet", f"--backbone={path}", f"--train={images}", f"--test={images}"]
    assert main([*arguments, "--output", str(output), *settings]) == 0
    result = json.loads(output.read_text())
    assert result["metrics"]["top1"] > 0.2
    assert result["metrics"]["top5"] > 0.6
