"""Finds a backbone among the tensors of a file: our own layouts, SwAV's and MoCo's releases, torchvision, detectron2.

A layout is told from names alone. Every tensor is of the backbone, or of a group that is known to be no part of one;
any other is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swav.models.detectron2_names import from_detectron2

_AFFINE = r"(weight|bias)"
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_SHOWN = 100  # characters of a name, or of what is wrong with it
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_STATE_DICTS = ("state_dict", "model")  # where files keep the weights if not at the top
# What else training scripts save that holds tensors, and that no backbone needs.
_BESIDE = {"optimizer", "scaler", "amp", "amp_scaler", "lr_scheduler", "scheduler", "counts"}


@dataclass(frozen=True, slots=True)
class FoundBackbone:
    """A backbone's tensors and what lay beside them."""

    layout: str
    weights: dict[str, Tensor]  # under torchvision's names
    left_out: tuple[str, ...]  # names of groups


@dataclass(frozen=True, slots=True)
class _Layout:
    name: str
    sign: str  # pattern of a name that only this layout has
    backbone: str  # pattern of what stands before a backbone's names
    groups: dict[str, str]  # of tensors that are left out, by pattern of the whole name


SWAV_CHECKPOINT = _Layout(
    "swav checkpoint",
    sign="",
    backbone=r"model\.backbone\.|trunk\.",
    groups={
        "head": r"model\.head\..+",
        "prototypes": r"prototypes\..+",
        "key encoder": r"key_model\..+",
        "queue": r"queue\..+",
        "fc": rf"classifier\.{_AFFINE}",
    },
)
_LAYOUTS = (
    _Layout(
        "MoCo-v2",
        sign=r"encoder_q\.",
        backbone=r"encoder_q\.",
        groups={
            "head": rf"encoder_q\.fc\.([02]\.)?{_AFFINE}",
            "key encoder": r"encoder_k\..+",
            "queue": r"queue(_ptr)?",
        },
    ),
    _Layout(
        "SwAV release",
        sign=r"projection_head\.|prototypes\.",
        backbone="",
        groups={
            "head": rf"projection_head\.({_AFFINE}|[023]\.{_AFFINE}|1\.{_NORM})",
            "prototypes": r"prototypes\.(weight|prototypes[0-9]+\.weight)",
        },
    ),
    _Layout("detectron2", sign=r"stem\.conv1\.weight$", backbone="", groups={"fc": rf"stem\.fc\.{_AFFINE}"}),
    _Layout("torchvision", sign="", backbone="", groups={"fc": rf"fc\.{_AFFINE}"}),
)


def find_backbone(content: Any, layout: _Layout | None = None) -> FoundBackbone:
    """Find the backbone in what a file held.

    Args:
        content: a state dict, or a dict that holds one as ``state_dict`` or ``model``.
        layout: of the names, where it is known; None to tell it from them.

    Raises:
        ValueError: there is no state dict, or a tensor of it belongs to no known part; the message follows the file's
            name.
    """
    state_dict, beside = _state_dict(content)
    names = _unwrapped(state_dict)
    if layout is None:
        layout = next(one for one in _LAYOUTS if any(re.match(one.sign, name) for name in names))
    weights: dict[str, Tensor] = {}
    left_out: set[str] = set()
    unknown: list[str] = []
    for name, value in names.items():
        group = next((group for group, pattern in layout.groups.items() if re.fullmatch(pattern, name)), None)
        start = re.match(layout.backbone, name)
        if group is not None:
            left_out.add(group)
        elif start is None or not isinstance(value, Tensor):
            unknown.append(name)
        else:
            weights[name[start.end() :]] = value
    if unknown:
        raise ValueError(
            f"looks like {layout.name}, but has {of_many(unknown)} that belong to no known part of it; save the state "
            "dict of the backbone alone and give that file"
        )
    if layout.name == "detectron2":
        weights = {from_detectron2(name): tensor for name, tensor in weights.items()}
    in_order = [group for group in layout.groups if group in left_out]
    return FoundBackbone(layout.name, weights, (*in_order, *sorted(beside)))


def _state_dict(content: Any) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict of a file, and which entries beside it hold tensors."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"holds a {type(content).__name__}, not a state dict (tensors by name)")
    inside = [key for key in _STATE_DICTS if isinstance(content.get(key), Mapping)]
    if not inside:
        if not any(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(
                f"holds no state dict: its entries are {of_many(list(content))}; give a state dict, or a dict that has "
                f"one as {' or '.join(map(repr, _STATE_DICTS))}"
            )
        return content, []
    if len(inside) > 1:
        raise ValueError(f"has state dicts as {of_many(inside)}; save the one that you mean and give that file")
    beside = [key for key, value in content.items() if key != inside[0] and _holds_tensors(value)]
    unknown = sorted(set(beside) - _BESIDE)
    if unknown:
        raise ValueError(
            f"holds tensors beside its {inside[0]!r}, as {of_many(unknown)}; save the state dict that you mean and "
            "give that file"
        )
    state_dict: Mapping[str, Any] = content[inside[0]]
    if not all(isinstance(key, str) for key in state_dict):
        raise ValueError(f"holds as {inside[0]!r} something else than tensors by name")
    return state_dict, beside


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    names = dict(state_dict)
    for wrapper in _WRAPPERS * 2:  # in either order
        if names and all(name.startswith(wrapper) for name in names):
            names = {name.removeprefix(wrapper): value for name, value in names.items()}
    return names


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def of_many(names: list[str]) -> str:
    """The first five of some names, and how many there are; on one line, whatever they are."""
    shown = ", ".join((name if name.isprintable() else repr(name))[:_SHOWN] for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
