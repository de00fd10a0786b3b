"""Files as others write them, built from their layouts alone; torchvision's own network is the oracle."""

import argparse
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from swav.config import ModelConfig
from swav.models.backbone_file import BackboneFile, load_backbone
from swav.models.resnet import ResNet

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    """Torchvision's network, as if trained, without its classifier."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        else:
            buffer.fill_(7)
    network.fc = nn.Identity()
    return network.eval()


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def mlp(prefix: str, width: int = 512, *, norm: bool = True) -> Weights:
    layers: dict[str, nn.Module] = {"0": nn.Linear(width, 32), "3" if norm else "2": nn.Linear(32, 16)}
    if norm:
        layers["1"] = nn.BatchNorm1d(32)
    return {f"{prefix}{at}.{name}": value for at, layer in layers.items() for name, value in layer.state_dict().items()}


def swav_release(weights: Weights) -> Any:
    return prefixed({**weights, **mlp("projection_head."), "prototypes.weight": torch.randn(30, 16)}, "module.")


def swav_training(weights: Weights) -> Any:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    amp = OrderedDict(loss_scaler0={"loss_scale": 65536.0, "unskipped": 5})
    return {"epoch": 3, "state_dict": swav_release(weights), "optimizer": optimizer.state_dict(), "amp": amp}


def deepcluster_release(weights: Weights) -> Any:
    prototypes = {f"prototypes.prototypes{number}.weight": torch.randn(30, 16) for number in range(3)}
    return prefixed({**weights, **mlp("projection_head."), **prototypes}, "module.")


def without_norm_in_the_head(weights: Weights) -> Any:
    return prefixed({**weights, **mlp("projection_head.", norm=False)}, "module.")


def linear_head(weights: Weights) -> Any:
    return {**weights, **prefixed(dict(nn.Linear(512, 16).state_dict()), "projection_head.")}


def moco_release(weights: Weights) -> Any:
    query = prefixed({**weights, **mlp("fc.", norm=False)}, "module.encoder_q.")
    return {"epoch": 200, "arch": "resnet18", "state_dict": query}


def moco_training(weights: Weights) -> Any:
    release = moco_release(weights)
    other = {name: torch.randn_like(value.float()) for name, value in release["state_dict"].items()}
    release["state_dict"] |= {name.replace("encoder_q", "encoder_k"): value for name, value in other.items()}
    release["state_dict"] |= {"module.queue": torch.randn(16, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {**release, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}}


def supervised(weights: Weights) -> Any:
    return OrderedDict(**weights, **prefixed(dict(nn.Linear(512, 10).state_dict()), "fc."))


def compiled(weights: Weights) -> Any:
    return {"model": prefixed(weights, "_orig_mod.module."), "args": argparse.Namespace(lr=0.1, data="/images")}


def very_old(weights: Weights) -> Any:
    return {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}


def with_figures(weights: Weights) -> Any:
    return {"state_dict": weights, "best_acc": np.float64(0.5), "accuracies": {"top1": np.float32(0.4)}}


LAYOUTS = {
    swav_release: ("SwAV release", ("head", "prototypes")),
    swav_training: ("SwAV release", ("head", "prototypes", "optimizer")),
    deepcluster_release: ("SwAV release", ("head", "prototypes")),
    without_norm_in_the_head: ("SwAV release", ("head",)),
    linear_head: ("SwAV release", ("head",)),
    moco_release: ("MoCo-v2", ("head",)),
    moco_training: ("MoCo-v2", ("head", "key encoder", "queue", "optimizer")),
    supervised: ("torchvision", ("fc",)),
    dict: ("torchvision", ()),
    compiled: ("torchvision", ()),
    very_old: ("torchvision", ()),
    with_figures: ("torchvision", ()),
}


def assert_same(found: BackboneFile, oracle: nn.Module) -> None:
    assert found.model == ModelConfig(arch="resnet18")
    assert (found.resize_px, found.crop_px) == (256, 224)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.backbone.eval()(images), oracle(images))


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_features_of_its_network(
    tmp_path: Path, oracle: nn.Module, layout: Any, old_format: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pth.tar"
    torch.save(layout(dict(oracle.state_dict())), path, _use_new_zipfile_serialization=not old_format)
    with caplog.at_level(logging.INFO):
        found = load_backbone(path)
    assert (found.layout, found.left_out) == LAYOUTS[layout]
    told = ", ".join(found.left_out) or "nothing"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: {found.layout}, a resnet18 of width 1 with the 7x7 stem; left out: {told}"
    ]
    assert_same(found, oracle)
    assert all(parameter.requires_grad for parameter in found.backbone.parameters())
    counted = found.backbone.state_dict()["bn1.num_batches_tracked"]
    assert int(counted) == (0 if layout is very_old else 7)


def small(**changes: Tensor | None) -> Weights:
    weights = {**ResNet("resnet18", width=0.125, stem="3x3").state_dict()}
    for name, value in changes.items():
        weights[name.replace("__", ".")] = value if value is not None else torch.zeros(1)
    return weights


def without(name: str) -> Weights:
    return {key: value for key, value in small().items() if key != name}


HALF = {name: tensor.half() for name, tensor in small().items() if tensor.is_floating_point()}
REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown tensor": (
        small(mask_token=None),
        "it has beyond it mask_token. Nothing is filled in or dropped: save the whole",
    ),
    "six unknown": (small(**{f"x{i}": None for i in range(6)}), "it has beyond it x0, x1, x2, x3, x4 and 1 more"),
    "a part of a head": (
        prefixed(small(projection_head__7__weight=None), "module."),
        "it has beyond it projection_head.7.weight",
    ),
    "half wrapped": ({**small(), **prefixed(small(), "module.")}, "it has beyond it module.bn1.bias, .* and 115 more"),
    "a block missing": (without("layer3.1.conv2.weight"), r"it lacks layer3\.1\.conv2\.weight\. Nothing is filled in"),
    "some counters missing": (without("bn1.num_batches_tracked"), r"it lacks bn1\.num_batches_tracked\."),
    "a query without weights": (
        {"encoder_q.fc.0.weight": torch.zeros(1)},
        "holds no ResNet: conv1.weight is not among",
    ),
    "a key encoder alone": (
        prefixed(small(), "module.encoder_k."),
        "holds no ResNet: conv1.weight is not among encoder_k.bn1.bias",
    ),
    "half precision": ({**small(), **HALF}, "of another type bn1.bias torch.float16 for torch.float32, .* 95 more"),
    "not a number": (small(bn1__weight=torch.full((8,), torch.nan)), "values that are not finite bn1.weight. Nothing"),
    "a wrong shape": (small(bn1__weight=torch.zeros(9)), r"of another shape bn1.weight \[9\] for \[8\]"),
    "text among weights": ({**small(), "note": "hello"}, "has note that belong to no known part"),
    "moving average": (
        {"state_dict": small(), "state_dict_ema": small()},
        "holds tensors beside its 'state_dict', as state_dict_ema; save the state dict that you mean",
    ),
    "two state dicts": (
        {"state_dict": small(), "model": small()},
        "has state dicts as state_dict, model; save the one",
    ),
    "a queue file": ({"queue": torch.zeros(2, 8, 4)}, "conv1.weight is not among queue"),
    "numbers as names": ({0: torch.zeros(1)}, "holds a dict, not a state dict"),
    "numbers as names inside": ({"state_dict": {0: torch.zeros(1)}}, "holds as 'state_dict' something else"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_backbone_to_the_last_tensor_is_refused(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(tmp_path / "weights.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'weights.pth'} ")
    assert len(str(caught.value)) < 700


def test_names_from_a_file_do_not_break_the_line(tmp_path: Path) -> None:
    torch.save({**small(), "a\nb": torch.zeros(1), "x" * 5000: torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"has beyond it 'a\\nb', x{100}\. Nothing"):
        load_backbone(tmp_path / "weights.pth")
