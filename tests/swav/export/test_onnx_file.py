import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from swav.export.__main__ import export, main
from swav.export.onnx_file import for_onnx
from swav.models.backbone_file import BackboneFile
from swav.models.resnet import ResNet

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def place(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    result = export(tiny_path, "onnx", place)
    difference = result["largest_difference"]
    assert isinstance(difference, float)
    assert difference < 1e-5
    return place


@pytest.fixture
def written(place: Path) -> bytes:
    return place.read_bytes()


def test_the_file_computes_the_features_of_any_batch_and_size(written: bytes, tiny: BackboneFile) -> None:
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    for shape in [(1, 3, 32, 32), (3, 3, 32, 32), (5, 3, 48, 40)]:
        images = torch.randn(shape)
        (features,) = session.run(["features"], {"images": images.numpy()})
        expected = tiny.backbone.eval()(images).detach().numpy()
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_axes_are_named_and_nothing_tells_of_the_machine(written: bytes) -> None:
    model = onnx.load_from_string(written)
    onnx.checker.check_model(model, full_check=True)
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 64]
    assert str(ROOT).encode() not in written
    assert b"site-packages" not in written
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (facts["swav"]["arch"], facts["swav"]["crop_px"]) == ("resnet18", 32)
    assert facts["std"] == [0.229, 0.224, 0.225]


def test_the_same_backbone_gives_the_same_file(
    place: Path, tiny_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert main(["--backbone", str(tiny_path), "--to", "onnx", "--output", str(place)]) == 0
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"{place}  sha256 ")
    assert [record.name for record in caplog.records] == ["swav.models.backbone_file"]


def test_a_backbone_above_the_limit_of_the_format_is_refused(tiny: BackboneFile) -> None:
    with torch.device("meta"):
        large = ResNet("resnet50", width=5)
    file = BackboneFile(large, tiny.model, 256, 224, "swav backbone", (), "")
    with pytest.raises(ValueError, match=r"holds at most 2 GB, and this backbone has 2\.3; export it --to hub or"):
        for_onnx(file)
