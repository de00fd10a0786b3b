import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.runs import files_of_at_most

from swav.config import ModelConfig
from swav.models.backbone_file import FORMAT, load_backbone, save_backbone
from swav.models.resnet import ResNet

CONFIG = ModelConfig(arch="resnet18", width=0.125, stem="3x3")


def saved_backbone(path: Path) -> ResNet:
    torch.manual_seed(0)
    backbone = ResNet("resnet18", width=0.125, stem="3x3")
    for buffer in backbone.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_backbone(backbone, CONFIG, path, resize_px=36, crop_px=32)
    return backbone.eval()


def test_round_trip(tmp_path: Path) -> None:
    backbone = saved_backbone(tmp_path / "new" / "backbone.pt")
    found = load_backbone(tmp_path / "new" / "backbone.pt")
    assert (found.resize_px, found.crop_px) == (36, 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.backbone.eval()(images), backbone(images))


def test_the_layout_in_memory_is_not_part_of_the_file(tmp_path: Path) -> None:
    backbone = saved_backbone(tmp_path / "backbone.pt").to(memory_format=torch.channels_last)
    save_backbone(backbone, CONFIG, tmp_path / "again.pt", resize_px=36, crop_px=32)
    weights = load_backbone(tmp_path / "again.pt").backbone.state_dict()
    assert all(tensor.is_contiguous() for tensor in weights.values())


def change(**values: Any) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **values}, path)

    return harm


def without_a_weight(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    del saved["state_dict"]["conv1.weight"]
    torch.save(saved, path)


def with_one_too_many(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["fc.weight"] = torch.zeros(1)
    torch.save(saved, path)


def without_sizes(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    del saved["crop_px"]
    torch.save(saved, path)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is not a backbone that swav wrote"),
    "text": (lambda path: path.write_text("just some notes\n"), "is not a backbone that swav wrote"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is not a backbone that swav wrote"),
    "another zip": (other_zip, "is not a backbone that swav wrote"),
    "a pickle that runs code": (lambda path: path.write_bytes(pickle.dumps(print, protocol=2)), "is not a backbone"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "is not a backbone that swav wrote"),
    "a list": (lambda path: torch.save([1], path), "is not a backbone that swav wrote"),
    "a state dict": (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "is not a backbone"),
    "another format": (change(format="swav.backbone/9"), "has the format 'swav.backbone/9', this version reads"),
    "another architecture": (change(model={"arch": "vit"}), "arch"),
    "another width": (change(model={"arch": "resnet18", "width": 0.25, "stem": "3x3"}), "does not hold what its"),
    "a weight missing": (without_a_weight, r"does not hold.*Missing key.*conv1\.weight"),
    "a weight too many": (with_one_too_many, r"does not hold.*Unexpected key.*fc\.weight"),
    "no sizes": (without_sizes, "does not hold.*crop_px"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_and_corrupt_files_are_refused_in_a_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "backbone.pt"
    saved_backbone(path)
    harm, message = FOREIGN[kind]
    harm(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.pt: there is no such file; a run writes its backbone to"):
        load_backbone(tmp_path / "none.pt")


def test_a_failed_write_keeps_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pt"
    saved_backbone(path)
    before = path.read_bytes()
    assert torch.load(path, weights_only=True)["format"] == FORMAT
    with files_of_at_most(1000), pytest.raises(OSError, match=r"backbone\.pt"):
        save_backbone(ResNet("resnet18", width=0.125, stem="3x3"), CONFIG, path, resize_px=36, crop_px=32)
    assert path.read_bytes() == before
