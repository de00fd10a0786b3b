"""Tells a ResNet's architecture from the shapes of its weights, and fills one with weights that fit to the last."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from swav.config import ModelConfig
from swav.models.layouts import of_many
from swav.models.resnet import BLOCKS, ResNet

_STEMS: dict[tuple[int, ...], Literal["7x7", "3x3"]] = {(7, 7): "7x7", (3, 3): "3x3"}
_OTHERS = {(3, 8, 36, 3): "resnet152", (2, 2, 2, 2): "resnet26", (3, 24, 36, 3): "resnet200"}  # of bottleneck blocks
_COUNTER = "num_batches_tracked"


def identify(weights: Mapping[str, Tensor]) -> ModelConfig:
    """Tell architecture, width and stem; the head's settings are not those of the file.

    What leaves no trace in names and shapes cannot be told: where a block has its stride (here, as in torchvision and
    timm, in the 3x3 convolution), what pools between layers, the epsilon of batch norm.

    Args:
        weights: under torchvision's names.

    Raises:
        ValueError: they are of no ResNet, or of a variant that is not among ours; the message follows the file's name.
    """
    stem = weights.get("conv1.weight")
    if stem is None:
        if any(name.startswith("conv1.0.") for name in weights):
            raise _not_ours("is a ResNet with several convolutions as its stem (a resnet50d or the like)")
        raise ValueError(f"holds no ResNet: conv1.weight is not among {of_many(sorted(weights)) or 'its no tensors'}")
    if stem.ndim != 4 or stem.shape[1] != 3 or tuple(stem.shape[2:]) not in _STEMS or stem.shape[0] == 0:
        raise _not_ours(
            f"has a conv1.weight of shape {list(stem.shape)}, not [channels, 3, 7, 7] or [channels, 3, 3, 3]"
        )
    bottleneck = "layer1.0.conv3.weight" in weights
    if bottleneck:
        _check_bottleneck(weights, stem.shape[0])
    blocks = [[*_blocks(weights, number)] for number in range(1, 5)]
    if any(sorted(numbers) != list(range(len(numbers))) for numbers in blocks):
        raise ValueError(f"lacks blocks: its four layers have those numbered {blocks}; copy or save it again")
    depths = tuple(map(len, blocks))
    for arch, (block, known) in BLOCKS.items():
        if depths == known and bottleneck == (block is Bottleneck):
            settings: dict[str, Any] = {
                "arch": arch,
                "width": stem.shape[0] / 64,
                "stem": _STEMS[tuple(stem.shape[2:])],
            }
            return ModelConfig(**settings)
    kind = "bottleneck" if bottleneck else "basic"
    name = f" (a {_OTHERS[depths]})" if bottleneck and depths in _OTHERS else ""
    raise _not_ours(f"has {', '.join(map(str, depths))} {kind} blocks in its four layers{name}")


def build(model: ModelConfig, weights: Mapping[str, Tensor]) -> ResNet:
    """Make the ResNet of these weights.

    Args:
        model: its architecture.
        weights: every tensor of it, float32, under torchvision's names; the counters of batch norm, which no output
            depends on, may all be missing, as in files of torch before 0.4.1 and in detectron2's.

    Raises:
        ValueError: a tensor is missing, left over, of another shape or type, or not finite; the message follows the
            file's name.
    """
    with torch.device("meta"):
        backbone = ResNet(model.arch, width=model.width, stem=model.stem)
    expected = backbone.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(_COUNTER)}
    given = {**weights} if counters.keys() & weights.keys() else {**weights, **counters}
    problems = {
        "lacks": [name for name in expected if name not in given],
        "has beyond it": [name for name in given if name not in expected],
        "has of another shape": [],
        "has of another type": [],
        "has with values that are not finite": [],
    }
    for name in expected.keys() & given.keys():
        found, wanted = given[name], expected[name]
        if found.shape != wanted.shape:
            problems["has of another shape"].append(f"{name} {list(found.shape)} for {list(wanted.shape)}")
        elif found.dtype != wanted.dtype or found.layout != torch.strided:
            problems["has of another type"].append(f"{name} {found.dtype} for {wanted.dtype}")
        elif not bool(found.isfinite().all()):
            problems["has with values that are not finite"].append(name)
    told = [f"{problem} {of_many(sorted(names))}" for problem, names in problems.items() if names]
    if told:
        raise ValueError(
            f"does not hold what a {model.arch} of width {model.width:g} with the {model.stem} stem has: it "
            f"{'; it '.join(told)}. Nothing is filled in or dropped: save the whole backbone's state dict, as float32"
        )
    own = {name: given[name].detach().clone(memory_format=torch.contiguous_format) for name in expected}
    backbone.load_state_dict(own, assign=True)
    return backbone


def _blocks(weights: Mapping[str, Tensor], layer: int) -> set[int]:
    """The numbers of a layer's blocks."""
    found = (re.match(rf"layer{layer}\.([0-9]+)\.", name) for name in weights)
    return {int(match[1]) for match in found if match}


def _check_bottleneck(weights: Mapping[str, Tensor], base: int) -> None:
    first, second = (weights.get(f"layer1.0.conv{number}.weight") for number in (1, 2))
    if second is not None and second.ndim == 4 and second.shape[0] != second.shape[1]:
        raise _not_ours(f"has grouped convolutions, layer1.0.conv2.weight being {list(second.shape)} (a ResNeXt)")
    if first is not None and first.shape[0] != base:
        raise _not_ours(
            f"is wider inside its blocks than between them, {first.shape[0]} channels for {base} (a wide_resnet)"
        )


def _not_ours(what: str) -> ValueError:
    return ValueError(
        f"{what}; the networks here are {', '.join(BLOCKS)} of any width, with all layers as wide, and a stem of one "
        "7x7 or 3x3 convolution"
    )
