import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swav.config import ModelConfig
from swav.export.hub_folder import entry_name, for_hub
from swav.export.publish import publish
from swav.models.backbone_file import BackboneFile, load_backbone

ROOT = Path(__file__).parents[3]
WITHOUT_SWAV = """
import sys, torch
sys.modules["swav"] = None  # importing it is an error
folder, entry, images, features = sys.argv[1:]
network = torch.hub.load(folder, entry, source="local")
assert not network.training
torch.save(network(torch.load(images)), features)
"""


def test_the_folder_loads_where_swav_is_not_installed(tmp_path: Path, tiny: BackboneFile) -> None:
    files, difference = for_hub(tiny)
    assert difference == 0
    assert list(files)[-1] == "hubconf.py"
    publish(files, tmp_path / "hub")
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    words = [str(tmp_path / "hub"), "resnet18w0_125_3x3", str(tmp_path / "images.pt"), str(tmp_path / "features.pt")]
    (tmp_path / "try.py").write_text(WITHOUT_SWAV)
    subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "try.py"), *words], cwd=tmp_path, check=True, timeout=100
    )
    assert torch.equal(torch.load(tmp_path / "features.pt"), tiny.backbone.eval()(images))


def test_import_of_an_export_gives_the_backbone(tmp_path: Path, tiny: BackboneFile) -> None:
    publish(for_hub(tiny)[0], tmp_path / "hub")
    found = load_backbone(tmp_path / "hub")
    assert (found.layout, found.model, found.crop_px) == ("swav backbone", tiny.model, 32)
    assert all(
        torch.equal(tensor, tiny.backbone.state_dict()[name]) for name, tensor in found.backbone.state_dict().items()
    )
    assert "swav_resnet" not in sys.modules


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelConfig(), "resnet50"),
        (ModelConfig(width=2), "resnet50w2"),
        (ModelConfig(arch="resnet18", stem="3x3"), "resnet18_3x3"),
    ],
)
def test_entries_have_names_of_python(tiny: BackboneFile, model: ModelConfig, name: str) -> None:
    file = BackboneFile(tiny.backbone, model, 36, 32, "swav backbone", (), "")
    assert entry_name(file) == name
    assert name.isidentifier()


def test_the_repository_is_a_hub_folder_too(tiny_path: Path, tiny: BackboneFile) -> None:
    network = torch.hub.load(str(ROOT), "swav_backbone", path=str(tiny_path), source="local")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), tiny.backbone.eval()(images))
