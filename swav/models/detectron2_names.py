"""Names of a ResNet's weights in detectron2, whose stages count from 2 and whose norms belong to convolutions."""

import re

_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer([1-4])\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bbn([123])\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_FROM_DETECTRON2 = (
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\bconv([123])\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)


def to_detectron2(name: str) -> str:
    """The name of a tensor that torchvision calls ``name``, for example ``res2.0.conv1.norm.weight``."""
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name


def from_detectron2(name: str) -> str:
    """What torchvision calls it, for example ``layer1.0.bn1.weight``."""
    for pattern, replacement in _FROM_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name
