"""State dicts that torchvision's and timm's own networks take."""

import io

import torch
from torch import nn
from torchvision.models import get_model

from swav.export.check import check_outputs, check_weights, needed
from swav.export.publish import ALONE
from swav.models.backbone_file import BackboneFile

_TIMM_TOLERANCE = 1e-5  # timm pools by another call


def refuse_other_networks(file: BackboneFile, to: str) -> None:
    """Refuse what a library has no network for.

    Raises:
        ValueError: the backbone has another width or stem than 1 and 7x7.
    """
    if (file.model.width, file.model.stem) != (1.0, "7x7"):
        raise ValueError(
            f"{to} has no {file.model.arch} of width {file.model.width:g} with the {file.model.stem} stem, only of "
            "width 1 with the 7x7 stem; --to hub, safetensors and onnx take every backbone"
        )


def for_torchvision(file: BackboneFile) -> tuple[dict[str, bytes], float]:
    """A file for ``torchvision.models``, whose network has Identity in the place of its classifier.

    Returns:
        The file, and the largest difference of its features.
    """
    refuse_other_networks(file, "torchvision")
    network = get_model(file.model.arch, weights=None)
    network.fc = nn.Identity()
    return _tried("the file for torchvision", network, file, tolerance=0.0)


def for_timm(file: BackboneFile) -> tuple[dict[str, bytes], float]:
    """A file for ``timm.create_model(arch, num_classes=0, checkpoint_path=FILE)``.

    Returns:
        The file, and the largest difference of its features.
    """
    refuse_other_networks(file, "timm")
    network: nn.Module = needed("timm", "timm").create_model(file.model.arch, pretrained=False, num_classes=0)
    return _tried("the file for timm", network, file, tolerance=_TIMM_TOLERANCE)


def _tried(what: str, network: nn.Module, file: BackboneFile, *, tolerance: float) -> tuple[dict[str, bytes], float]:
    buffer = io.BytesIO()
    torch.save(dict(file.backbone.state_dict()), buffer)
    data = buffer.getvalue()
    weights = torch.load(io.BytesIO(data), weights_only=True)
    check_weights(what, weights, file)
    network.load_state_dict(weights)
    return {ALONE: data}, check_outputs(what, network.eval(), file, tolerance=tolerance)
