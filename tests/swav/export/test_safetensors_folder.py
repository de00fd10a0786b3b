from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import nn

from swav.export.publish import publish
from swav.export.safetensors_folder import for_safetensors
from swav.models.backbone_file import BackboneFile, load_backbone


def test_import_of_an_export_gives_the_backbone_and_its_sizes(tmp_path: Path, tiny: BackboneFile) -> None:
    files, difference = for_safetensors(tiny, None, license_id="mit")
    assert difference == 0
    publish(files, tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_backbone(path)
        assert (found.layout, found.model, found.left_out) == ("swav safetensors", tiny.model, ())
        assert (found.resize_px, found.crop_px) == (36, 32)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(found.backbone.eval()(images), tiny.backbone.eval()(images))
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["license"] == "mit"
    assert for_safetensors(found, None, license_id="mit")[0]["model.safetensors"] == files["model.safetensors"]


def test_others_read_the_tensors_under_torchvisions_names(tmp_path: Path, usual: BackboneFile) -> None:
    publish(for_safetensors(usual, None, license_id="unknown")[0], tmp_path)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.eval()(images), usual.backbone.eval()(images))


def test_safetensors_of_others_are_read(tmp_path: Path, usual: BackboneFile) -> None:
    weights = {**usual.backbone.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_backbone(tmp_path / "model.safetensors")
    assert (found.layout, found.left_out, found.crop_px) == ("torchvision", ("fc",), 224)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("no json", "has metadata of ours that cannot be read"),
        ('{"format": "swav.backbone/9"}', "has the format 'swav.backbone/9', this version reads"),
        ('{"format": "swav.backbone/1"}', "does not hold what its format says: KeyError: 'model'"),
        ("{}", "torchvision|state dict"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, tiny: BackboneFile, described: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    weights = dict(tiny.backbone.state_dict())
    safetensors.torch.save_file(weights, path, metadata={"swav": described})
    if described == "{}":
        weights.pop("bn1.weight")
        safetensors.torch.save_file(weights, path, metadata={"swav": described})
        message = "lacks bn1.weight"
    with pytest.raises(ValueError, match=message):
        load_backbone(path)
