import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swav_testing.s3 import S3Server, moto_server

from swav.export.__main__ import export, main
from swav.models.backbone_file import load_backbone


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


def arguments(backbone: Path | str, to: str, output: Path | str) -> list[str]:
    return ["--backbone", str(backbone), "--to", to, "--output", str(output)]


@pytest.mark.parametrize(
    ("to", "name"),
    [("torchvision", "a.pth"), ("timm", "a.pt"), ("detectron2", "a.pkl"), ("hub", "a"), ("safetensors", "a")],
)
def test_every_format_is_written_and_read_back(
    tmp_path: Path, usual_path: Path, to: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(usual_path, to, tmp_path / name)) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / name}" in said
    assert "read back and tried: features differ by 0.0e+00 of the largest" in said
    images = torch.randn(1, 3, 64, 64)
    expected = load_backbone(usual_path).backbone.eval()(images)
    assert torch.equal(load_backbone(tmp_path / name).backbone.eval()(images), expected)
    if to == "safetensors":
        assert main(arguments(usual_path, to, tmp_path / name)) == 0


def test_runs_and_exports_in_a_store(
    moto: S3Server, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    bucket = moto.make_bucket("exports")
    moto.put("exports", "run/backbone.pt", tiny_path.read_bytes())
    result = export(f"{bucket}/run", "safetensors", f"{bucket}/shared/model", license_id="mit")
    assert (
        result["files"]
        == export(f"{bucket}/run/backbone.pt", "safetensors", f"{bucket}/shared/model", license_id="mit")["files"]
    )
    images = torch.randn(1, 3, 32, 32)
    found = load_backbone(f"{bucket}/shared/model")
    assert found.layout == "swav safetensors"
    assert torch.equal(found.backbone.eval()(images), load_backbone(tiny_path).backbone.eval()(images))
    with pytest.raises(ValueError, match="there is no such file, nor a folder with"):
        load_backbone(f"{bucket}/other")


def test_wrong_commands_are_refused(tmp_path: Path, tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "hubconf.py").write_text("mine")
    for words, message in [
        (arguments(tiny_path, "timm", tmp_path / "a.pth"), "timm has no resnet18 of width 0.125 with the 3x3 stem"),
        (arguments(tiny_path, "detectron2", tmp_path / "a.pth"), "end it with .pkl"),
        (arguments(tmp_path / "none.pt", "hub", tmp_path / "a"), "there is no such file"),
        (arguments(tiny_path, "hub", tmp_path / "taken"), "is there already and is not this export"),
        ([*arguments(tiny_path, "hub", tmp_path / "a"), "--license", "My own"], "is no id of a licence"),
        (arguments(tiny_path, "pytorch", tmp_path / "a"), ""),  # argparse says it
    ]:
        caplog.clear()
        assert main(words) == 64
        assert message in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["hubconf.py"]


def test_a_missing_extra_is_named(
    tmp_path: Path, usual_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert main(arguments(usual_path, "timm", tmp_path / "a.pth")) == 64
    assert "--to timm needs the package timm, which is not installed: pip install 'swav[export]'" in caplog.text
    assert not list(tmp_path.iterdir())


def test_answers_for_machines(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("swav.logs.is_json", lambda: True)
    monkeypatch.setattr("swav.export.__main__.start_logging", lambda: None)
    assert main(arguments(tiny_path, "hub", tmp_path / "a")) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert (result["to"], result["entry"], result["largest_difference"]) == ("hub", "resnet18w0_125_3x3", 0.0)
    assert len(result["files"]) == 3
