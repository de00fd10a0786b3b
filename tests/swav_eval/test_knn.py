import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from swav_testing import oracles
from swav_testing.runs import arguments, command_line, finish, make_scene, run, write_scenes

from swav.config import ModelConfig
from swav.data.reader import ShardReader
from swav.data.source import open_dataset
from swav.features import centre_crop
from swav.models.backbone_file import load_backbone, save_backbone
from swav.models.resnet import ResNet
from swav_eval.knn import main


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data"), broken=(7,))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "backbone.pt"
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    config = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    save_backbone(network, config, path, resize_px=24, crop_px=20)
    return path


def words(backbone: Path, train: Path, *more: str) -> list[str]:
    return ["--backbone", str(backbone), "--train", str(train), "--k", "1", "5", "--device", "cpu", *more]


def test_the_command_writes_a_result_that_can_be_repeated(tmp_path: Path, backbone: Path, data: Path) -> None:
    test = write_scenes(tmp_path / "test", (20, 17), first_seed=1000)
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main(words(backbone, data, "--test", str(test), "--output", str(one))) == 0
    result = json.loads(one.read_text())
    assert result["protocol"] == "knn"
    assert list(result["metrics"]) == ["knn_1", "knn_5"]
    assert result["metrics"] == pytest.approx(accuracies_by_hand(backbone, data, test), abs=1e-6)
    assert result["settings"]["temperature"] == 0.07
    assert (result["resize_px"], result["crop_px"]) == (24, 20)  # of the backbone's run
    assert result["backbone_sha256"] == hashlib.sha256(backbone.read_bytes()).hexdigest()
    assert {name: (facts["images"], facts["broken"]) for name, facts in result["data"].items()} == {
        "train": (103, 1),
        "test": (37, 0),
    }
    more = words(backbone, data, "--test", str(test), "--output", str(two))
    status, out, err = finish(command_line("swav_eval.knn", *more, cache=tmp_path / "cache", ranks=2))
    assert status == 0, err
    assert json.loads(two.read_text()) | {"command": result["command"]} == result
    assert out == two.read_text()  # once, not per rank
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["one.json", "two.json"]


def accuracies_by_hand(backbone: Path, train: Path, test: Path) -> dict[str, float]:
    """In float64, from the images as the loop over a few of them has them."""
    rows, labels = zip(*(features_by_hand(backbone, folder) for folder in (train, test)), strict=True)
    found = {}
    for k in (1, 5):
        predicted = oracles.knn_predict(rows[0], labels[0], rows[1], k, 0.07)
        found[f"knn_{k}"] = float(np.mean(np.array(predicted) == labels[1]))
    return found


def features_by_hand(backbone: Path, folder: Path) -> tuple[oracles.Array, oracles.Array]:
    network = load_backbone(backbone).backbone.double().eval()
    index = open_dataset(str(folder))
    rows, labels = [], []
    with ShardReader(index) as reader, torch.no_grad():
        for sample_id in range(index.num_samples):
            if reader.image(sample_id) != b"no image":
                crop = centre_crop(reader.image(sample_id), resize_px=24, crop_px=20).double() / 255
                mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[:, :, None, None]
                row = network(((crop - mean) / std)[None])[0]
                rows.append((row / row.norm()).numpy())
                labels.append(reader.label(sample_id))
    return np.array(rows), np.array(labels)


def test_a_run_is_judged_on_a_folder_of_class_folders(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(48):
        path = tmp_path / "photos" / ("red", "green", "blue")[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_scene(number % 3, number))
    output = tmp_path / "run"
    run(arguments(tmp_path / "photos", output, "optim.epochs=1"), cache)
    accuracy = json.loads((output / "result.json").read_text())["trained backbone"]["knn_5"]
    capsys.readouterr()
    assert main(words(output / "backbone.pt", tmp_path / "photos")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["knn_5"] == accuracy  # leave-one-out, as in the run
    assert list(result["data"]) == ["train"]
    assert result["data"]["train"]["images"] == 48


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "5", "200"], "k-NN with k=200 needs as many train images, there are 101; use a smaller k"),
        (["--k", "0"], "numbers of neighbours of at least 1"),
        (["--crop-px", "64"], "crop_px must be from 1 to resize_px"),
        (["--resize-px", "0"], "crop_px must be from 1 to resize_px"),
        (["--temperature", "0"], "a temperature above 0"),
        (["--train", "nowhere"], "nowhere: there is no such file or folder"),
        (["--backbone", "nowhere.pt"], "nowhere.pt: there is no such file"),
        (
            ["--recipe", "svm_voc07"],
            "protocol svm_voc07 is not one of this program's; choose from knn, knn_20, knn_200",
        ),
        (["--recipe", "knn_2"], "unknown protocol 'knn_2'; the nearest of"),
    ],
)
def test_what_cannot_be_is_refused(
    backbone: Path, data: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words(backbone, data, *more)) == 64
    assert message in caplog.records[-1].message
    assert caplog.records[-1].message.startswith("error: ")


def test_a_recipe_and_settings_may_be_given_by_name(
    backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--backbone", str(backbone), "--train", str(data), "runtime.device=cpu"]
    assert main([*some, "--recipe", "knn_20"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert (named["protocol"], list(named["metrics"])) == ("knn_20", ["knn_20"])
    assert main([*some, "num_neighbors=[20]", "temperature=0.07", "resize_px=24", "crop_px=20"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == named["metrics"]


def test_features_in_a_work_folder_serve_other_settings_and_no_other_backbone(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pt"
    torch.manual_seed(1)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    save_backbone(network, ModelConfig(arch="resnet18", width=0.125, stem="3x3"), other, resize_px=24, crop_px=20)

    def metrics(which: Path, *more: str) -> dict[str, float]:
        assert main(words(which, data, *more)) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)["metrics"]
        return found

    work = ("--work", str(tmp_path / "work"))
    first = metrics(backbone, *work)
    (block,) = (tmp_path / "work").glob("train-*.safetensors")
    written = block.stat().st_mtime_ns
    assert metrics(backbone, *work, "--k", "1", "3")["knn_1"] == first["knn_1"]
    assert block.stat().st_mtime_ns == written
    assert metrics(other, *work) == metrics(other)
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2
    assert metrics(backbone, *work) == first


def test_unlabelled_images_are_refused_on_the_command_line(tmp_path: Path, backbone: Path, cache: Path) -> None:
    unlabelled = write_scenes(tmp_path / "data", (20,), labelled=False)
    status, out, err = finish(command_line("swav_eval.knn", *words(backbone, unlabelled), cache=cache))
    assert (status, out) == (64, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("has no label (.cls); an evaluation needs labelled images")
