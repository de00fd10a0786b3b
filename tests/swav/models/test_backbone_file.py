import dataclasses
import hashlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.runs import QUEUE, TINY, files_of_at_most

from swav.checkpoint import CheckpointWriter
from swav.config import ModelConfig, to_json
from swav.methods import build_method
from swav.models.backbone_file import FORMAT, load_backbone, save_backbone
from swav.models.resnet import ResNet
from swav.recipes import configure

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
    assert (found.model, found.layout, found.left_out) == (CONFIG, "swav backbone", ())
    assert found.sha256 == hashlib.sha256((tmp_path / "new" / "backbone.pt").read_bytes()).hexdigest()
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


def with_a_rotten_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "backbone.pt is empty; docs/models.md names the layouts"),
    "text": (lambda path: path.write_text("just some notes\n"), "is not a file of weights: neither torch's, nor"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is cut or damaged.*copy it again"),
    "another zip": (other_zip, "is not a file of weights that torch can read"),
    "a pickle that runs code": (
        lambda path: path.write_bytes(pickle.dumps(print, protocol=2)),
        "is a pickle that asks for __builtin__.print; of pickles only those of NumPy arrays are read",
    ),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor, not a state dict"),
    "a list": (lambda path: torch.save([1], path), "holds a list, not a state dict"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no state dict: its entries are epoch; give a"),
    "a weight": (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), r"conv1.weight of shape \[1\], not"),
    "a rotten byte": (with_a_rotten_byte, "is cut or damaged .BadZipFile: Bad CRC-32 .*; copy it again"),
    "another format": (change(format="swav.backbone/9"), "has the format 'swav.backbone/9', this version reads"),
    "another architecture": (change(model={"arch": "vit"}), "arch"),
    "another width": (
        change(model={"arch": "resnet18", "width": 0.25, "stem": "3x3"}),
        r"shape bn1.bias \[8\] for \[16\]",
    ),
    "a weight missing": (without_a_weight, r"does not hold what a resnet18 of width 0.125.*lacks conv1\.weight\."),
    "a weight too many": (with_one_too_many, r"does not hold what a resnet18.*has beyond it fc\.weight\."),
    "no weights": (change(state_dict={}), r"it lacks bn1.bias, .* and 95 more\. Nothing is filled in"),
    "weights of text": (
        change(state_dict={"conv1.weight": "none"}),
        "does not hold what its format says.*than tensors",
    ),
    "sizes of text": (change(crop_px="32"), "does not hold what its format says.*'crop_px': '32'"),
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


NO_CROPS = ["model.width=0.125", "model.stem=3x3", "evaluate.resize_px=24", "evaluate.crop_px=24"]
METHODS: dict[str, list[str]] = {
    "swav": [*TINY],
    "queue": [*TINY, QUEUE],
    "mocov2": [
        'crops=[{"num_crops":2,"size_px":16,"scale":[0.5,1]}]',
        'method={"kind":"mocov2","queue_samples":48}',
        *NO_CROPS,
    ],
    "deepclusterv2": ['method={"kind":"deepclusterv2","num_prototypes":16}', *NO_CROPS],
    "supervised": ['method={"kind":"supervised","num_classes":3}', *NO_CROPS],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_every_method_gives_its_backbone(tmp_path: Path, method: str) -> None:
    config = configure("demo", data=str(tmp_path), overrides=METHODS[method])
    trained = build_method(config)
    state: dict[str, object] = {
        "method": trained.state_dict(),
        "config": to_json(config),
        "data_identity": "x",
        "counts": torch.zeros(2),
    }
    state |= {"step": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    with CheckpointWriter(tmp_path / "run" / "checkpoints", keep=2) as writer:
        writer.save(3, state)
    images = torch.randn(2, 3, 32, 32)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000000003.pt"):
        found = load_backbone(path)
        assert (found.layout, found.model) == ("swav checkpoint", config.model)
        assert (found.resize_px, found.crop_px) == (24, 24)
        assert torch.equal(found.backbone(images), trained.backbone(images))
        assert found.left_out[-2:] == ("counts", "optimizer")
        assert found.left_out[0] == ("fc" if method == "supervised" else "head")


def test_a_folder_gives_its_backbone_else_its_newest_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        ValueError, match=r"there is no such file, nor a folder with backbone\.pt, model\.safetensors or"
    ):
        load_backbone(tmp_path)
    config = configure("demo", data=str(tmp_path), overrides=[*TINY])
    for step in (3, 6):
        with CheckpointWriter(tmp_path / "checkpoints", keep=2) as writer:
            method = build_method(dataclasses.replace(config, seed=step))
            writer.save(step, {"method": method.state_dict(), "config": to_json(config), "data_identity": "x"})
    newest = tmp_path / "checkpoints" / "step-000000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level("INFO"):
        assert load_backbone(str(tmp_path)).layout == "swav checkpoint"
    assert "has not ended; its checkpoint of step 3 is read" in caplog.text
    saved_backbone(tmp_path / "backbone.pt")
    with caplog.at_level("INFO"):
        assert load_backbone(tmp_path).layout == "swav backbone"
    assert f"{tmp_path} is a folder; its backbone.pt is read" in caplog.text


def test_a_checkpoint_with_unknown_settings_is_refused(tmp_path: Path) -> None:
    state = {"method": {}, "config": '{"name": "x", "new_setting": 1}', "data_identity": "x"}
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(
        ValueError, match=r"is a checkpoint whose settings this version cannot read.*version that wrote"
    ):
        load_backbone(tmp_path / "step.pt")
