import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch

from swav.export.detectron2_pickle import for_detectron2
from swav.export.publish import ALONE
from swav.models.backbone_file import BackboneFile, load_backbone


def test_import_of_an_export_gives_the_backbone(tmp_path: Path, usual: BackboneFile) -> None:
    files, difference = for_detectron2(usual)
    assert difference == 0
    (tmp_path / "weights.pkl").write_bytes(files[ALONE])
    found = load_backbone(tmp_path / "weights.pkl")
    assert (found.layout, found.model, found.left_out) == ("detectron2", usual.model, ())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.backbone.eval()(images), usual.backbone.eval()(images))


def test_the_file_is_what_the_checkpointer_of_detectron2_matches_by_suffix(usual: BackboneFile) -> None:
    data = for_detectron2(usual)[0][ALONE]
    content = pickle.loads(data, encoding="latin1")
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert (content["__author__"], content["matching_heuristics"]) == ("swav", True)
    weights = content["model"]
    assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in weights.values())
    assert len(weights) == 20 * 5  # of each convolution: itself and four of its norm
    assert {"stem.conv1.weight", "res2.0.conv1.norm.running_var", "res5.0.shortcut.weight"} <= weights.keys()
    assert not any(name.endswith("num_batches_tracked") for name in weights)
    names = list(weights)
    assert not [(a, b) for a in names for b in names if a != b and a.endswith(f".{b}")]


def test_numpy_of_before_knows_the_names_in_the_pickle(usual: BackboneFile) -> None:
    data = for_detectron2(usual)[0][ALONE]
    asked = {argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert asked == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_a_file_of_its_own_converter_is_read(tmp_path: Path, usual: BackboneFile) -> None:
    content = pickle.loads(for_detectron2(usual)[0][ALONE])
    content["model"] |= {"stem.fc.weight": np.zeros((10, 512), np.float32), "stem.fc.bias": np.zeros(10, np.float32)}
    (tmp_path / "r18.pkl").write_bytes(pickle.dumps(content))
    assert load_backbone(tmp_path / "r18.pkl").left_out == ("fc",)


def test_norms_folded_into_two_numbers_are_refused(tmp_path: Path, usual: BackboneFile) -> None:
    content = pickle.loads(for_detectron2(usual)[0][ALONE])
    content["model"] = {name: array for name, array in content["model"].items() if "running" not in name}
    (tmp_path / "msra.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=r"it lacks bn1\.running_mean, bn1\.running_var, .* and 35 more\. Nothing is filled"
    ):
        load_backbone(tmp_path / "msra.pkl")


def test_other_networks_are_refused(tiny: BackboneFile) -> None:
    with pytest.raises(ValueError, match=r"detectron2 has no resnet18 of width 0\.125"):
        for_detectron2(tiny)
