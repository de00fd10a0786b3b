import json
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.runs import command_line, finish, make_scene, write_scenes
from swav_testing.shards import write_tar

from swav.config import ModelConfig
from swav.models.backbone_file import save_backbone
from swav.models.resnet import ResNet
from swav_eval import paper
from swav_eval.config import EvaluationRuntime
from swav_eval.paper import main, plan, result_file

SMALL = [
    "runtime.device=cpu",
    "knn:num_neighbors=[1,5]",
    "linear_imagenet:num_classes=3",
    "linear_imagenet:epochs=2",
    "svm_voc07:costs=[0.01,1.0]",
]
PROTOCOLS = ["--protocols", "knn", "svm_voc07", "linear_imagenet", "linear_places205"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(cache))


def write_voc(folder: Path, number: int, first_seed: int) -> None:
    """Shards of scenes with one or two of three classes each."""
    members: list[tuple[str, bytes]] = []
    for key in range(number):
        present = ["red", "green", "blue"][key % 3 :][:2]
        facts = json.dumps({"present": present, "difficult": []}).encode()
        members += [(f"{key:06d}.jpg", make_scene(key % 3, first_seed + key)), (f"{key:06d}.json", facts)]
    write_tar(folder / "shard-000000.tar", members)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "imagenet/train", (60,))
    write_scenes(folder / "imagenet/val", (30,), first_seed=1000)
    write_voc(folder / "voc07/trainval", 45, 0)
    write_voc(folder / "voc07/test", 30, 1000)
    write_scenes(folder / "places205/train", (3,))
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "backbone.pt"
    torch.manual_seed(0)
    network = ResNet("resnet18", width=0.125, stem="3x3")
    save_backbone(network, ModelConfig(arch="resnet18", width=0.125, stem="3x3"), path, resize_px=24, crop_px=20)
    return path


def words(backbone: Path, data: Path, *more: str) -> list[str]:
    return ["--backbone", str(backbone), "--data", str(data), *more, "--", *SMALL]


def test_what_the_data_allow_is_run_and_stands_beside_the_paper(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r50.json"
    arguments = words(backbone, data, "--output", str(output), *PROTOCOLS)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    table = json.loads(output.read_text())
    found = {(row["protocol"], row["metric"]): (row["ours"], row["paper"]) for row in table["rows"]}
    assert [key for key in found if key[0] == "knn"] == [("knn", "knn_1"), ("knn", "knn_5")]
    assert found["svm_voc07", "map_11_point"][1] == 88.9
    assert found["linear_imagenet", "top1"][1] == 75.3
    assert all(0 <= ours <= 100 for ours, _ in found.values())
    assert table["left_out"]["linear_places205"] == f"there is no {data}/places205/val"
    assert set(table["left_out"]) == {"linear_places205", "faster_rcnn_voc0712", "detr_coco"}
    assert "| linear_imagenet | top1 |" in text
    assert "left out: linear_places205: there is no" in text
    assert '"epochs": 2' in text  # the protocol as it was run, to the letter
    for protocol in ("knn", "svm_voc07", "linear_imagenet"):
        result = json.loads(Path(result_file(output, protocol)).read_text())
        assert result == table["results"][protocol]
    before = output.read_text()
    assert main(arguments) == 0  # nothing is computed again
    assert output.read_text() == before


def test_parts_side_by_side_give_the_same_table(tmp_path: Path, backbone: Path, data: Path) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert main(words(backbone, data, "--output", str(whole), *PROTOCOLS)) == 0
    for part in ("linear_imagenet", "linear_places205", "svm_voc07"):
        assert main(words(backbone, data, "--output", str(parts), *PROTOCOLS, "--part", part)) == 0
        assert not parts.exists()
    assert main(words(backbone, data, "--output", str(parts), *PROTOCOLS, "--part", "knn")) == 0
    one, other = (json.loads(path.read_text()) for path in (whole, parts))

    def without_commands(table: dict[str, Any]) -> dict[str, Any]:
        for result in table["results"].values():
            del result["command"]
        return table

    assert without_commands(other) == without_commands(one)


def test_a_part_takes_no_result_of_another_backbone_or_of_other_settings(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, changed = tmp_path / "table.json", tmp_path / "changed.pt"
    torch.manual_seed(1)
    model = ModelConfig(arch="resnet18", width=0.125, stem="3x3")
    save_backbone(ResNet("resnet18", width=0.125, stem="3x3"), model, changed, resize_px=24, crop_px=20)

    def part(of: Path, name: str, *settings: str) -> str:
        asked = ["--output", str(output), "--protocols", "knn", "svm_voc07", "--part", name]
        assert main(["--backbone", str(of), "--data", str(data), *asked, "--", *SMALL[:2], SMALL[4], *settings]) == 0
        return capsys.readouterr().out

    part(backbone, "svm_voc07")
    assert "svm_voc07.json is another evaluation's" in part(changed, "knn")
    Path(result_file(output, "knn")).unlink()
    assert "svm_voc07.json is another evaluation's" in part(backbone, "knn", "svm_voc07:positive_weight=1.0")
    assert not output.exists()
    part(backbone, "knn")
    assert set(json.loads(output.read_text())["results"]) == {"knn", "svm_voc07"}


def test_a_part_runs_as_its_own_settings_say(
    tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[EvaluationRuntime] = []

    def stop_there(runtime: EvaluationRuntime) -> None:
        opened.append(runtime)
        raise ValueError("stopped there")

    monkeypatch.setattr(paper, "session", stop_there)
    asked = ["--output", str(tmp_path / "table.json"), *PROTOCOLS, "--part", "svm_voc07"]
    assert main([*words(backbone, data, *asked), "svm_voc07:runtime.stalled_after_seconds=7"]) == 64
    assert [one.stalled_after_seconds for one in opened] == [7]


def test_two_ranks_print_one_table(tmp_path: Path, backbone: Path, data: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"

    def arguments(output: Path) -> list[str]:
        given = words(backbone, data, "--output", str(output), "--protocols", "knn", "linear_imagenet")
        return [word for word in given if not word.startswith("svm_voc07:")]

    assert main(arguments(one)) == 0
    process = command_line("swav_eval.paper", *arguments(two), cache=tmp_path / "cache", ranks=2)
    status, out, err = finish(process)
    assert status == 0, err
    assert out.count("| linear_imagenet | top1 |") == 1
    ours = [[(row["metric"], row["ours"]) for row in json.loads(path.read_text())["rows"]] for path in (one, two)]
    assert ours[0] == ours[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data nowhere has the images of no protocol; put them there as nowhere/imagenet"),
        (["--protocols", "knn", "--", "linear_imagenet:epochs=2"], "linear_imagenet is not asked for"),
        (["--protocols", "knn", "--", "knn:epochs=2"], "unknown setting 'epochs'"),
        (["--pretraining", "swav_r50"], "unknown recipe 'swav_r50'"),
        (["--protocols", "knn", "--part", "svm_voc07"], "--part svm_voc07 must be one of --protocols knn"),
    ],
)
def test_what_cannot_be_is_refused(
    backbone: Path, data: Path, more: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--backbone", str(backbone), "--data", str(data), *more]) == 64
    assert message in caplog.records[-1].message


def test_a_refusal_is_one_line_on_the_command_line(tmp_path: Path, backbone: Path) -> None:
    process = command_line("swav_eval.paper", *words(backbone, tmp_path)[:4], cache=tmp_path / "cache")
    status, out, err = finish(process)
    assert (status, out) == (64, "")
    assert "has the images of no protocol" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_setting_is_of_all_protocols_or_of_one(data: Path) -> None:
    found = plan(["knn", "linear_imagenet"], str(data), ["resize_px=32", "knn:crop_px=16"]).protocols
    assert [(one.resize_px, one.crop_px) for one in found.values()] == [(32, 16), (32, None)]
