import hashlib
import json
from pathlib import Path

import pytest
import torch
from swav_testing.runs import arguments, command_line, finish, make_scene, run, write_scenes

from swav.config import ModelConfig
from swav.models.backbone_file import save_backbone
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
    assert list(result["accuracy"]) == ["1", "5"]
    assert all(value * 37 == pytest.approx(round(value * 37), abs=1e-4) for value in result["accuracy"].values())
    assert (result["temperature"], result["resize_px"], result["crop_px"]) == (0.07, 24, 20)  # of the backbone's run
    assert result["backbone_sha256"] == hashlib.sha256(backbone.read_bytes()).hexdigest()
    assert {name: (facts["images"], facts["broken"]) for name, facts in result["data"].items()} == {
        "train": (102, 1),
        "test": (37, 0),
    }
    more = words(backbone, data, "--test", str(test), "--output", str(two))
    status, out, err = finish(command_line("swav_eval.knn", *more, cache=tmp_path / "cache", ranks=2))
    assert status == 0, err
    assert json.loads(two.read_text()) == result
    assert out == two.read_text()  # once, not per rank


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
    assert result["accuracy"]["5"] == accuracy  # leave-one-out, as in the run
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
        (["--backbone", "nowhere.pt"], "nowhere.pt: there is no such file; a run writes its backbone to"),
    ],
)
def test_what_cannot_be_is_refused(
    backbone: Path, data: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(words(backbone, data, *more)) == 64
    assert message in caplog.records[-1].message
    assert caplog.records[-1].message.startswith("error: ")


def test_unlabelled_images_are_refused_on_the_command_line(tmp_path: Path, backbone: Path, cache: Path) -> None:
    unlabelled = write_scenes(tmp_path / "data", (20,), labelled=False)
    status, out, err = finish(command_line("swav_eval.knn", *words(backbone, unlabelled), cache=cache))
    assert (status, out) == (64, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("has no label (.cls); an evaluation needs labelled images")
