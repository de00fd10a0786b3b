import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from swav.export.publish import ALONE
from swav.export.state_dicts import for_timm, for_torchvision
from swav.models.backbone_file import BackboneFile, load_backbone
from swav.models.resnet import ResNet


@pytest.mark.parametrize("make", [for_torchvision, for_timm])
def test_import_of_an_export_gives_the_backbone(tmp_path: Path, usual: BackboneFile, make: Any) -> None:
    files, difference = make(usual)
    assert difference < 1e-5
    (tmp_path / "weights.pth").write_bytes(files[ALONE])
    found = load_backbone(tmp_path / "weights.pth")
    assert (found.layout, found.model) == ("torchvision", usual.model)
    assert all(
        torch.equal(tensor, usual.backbone.state_dict()[name]) for name, tensor in found.backbone.state_dict().items()
    )


def test_the_lines_of_the_docs_load_them(tmp_path: Path, usual: BackboneFile) -> None:
    images = torch.randn(2, 3, 64, 64)
    expected = usual.backbone.eval()(images)
    (tmp_path / "timm.pth").write_bytes(for_timm(usual)[0][ALONE])
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "timm.pth"))
    assert torch.allclose(network.eval()(images), expected, rtol=1e-5, atol=1e-5)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(io.BytesIO(for_torchvision(usual)[0][ALONE]), weights_only=True))
    assert torch.equal(network.eval()(images), expected)


@pytest.mark.parametrize("make", [for_torchvision, for_timm])
def test_networks_that_others_do_not_have_are_refused(tiny: BackboneFile, make: Any) -> None:
    with pytest.raises(
        ValueError, match=r"has no resnet18 of width 0\.125 with the 3x3 stem, .*--to hub, safetensors and"
    ):
        make(tiny)


def test_a_network_that_computes_otherwise_is_not_kept(usual: BackboneFile, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ResNet):
        """The network of a timm to come, say, that computes something else with the same weights."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.flip(3))

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Other("resnet18"))
    with pytest.raises(RuntimeError, match="the file for timm does not compute what the backbone does"):
        for_timm(usual)
