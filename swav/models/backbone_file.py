"""A trained backbone as one file that says how to build its network."""

import io
import pickle
from dataclasses import asdict, dataclass

import torch
from torch import nn

from swav.config import ModelConfig
from swav.models.resnet import ResNet
from swav.storage import Location, readable, stat, write_atomic

FORMAT = "swav.backbone/1"


@dataclass(frozen=True, slots=True)
class BackboneFile:
    """A backbone and what its run knew about looking at images."""

    backbone: ResNet
    resize_px: int  # shorter side of an image at evaluation
    crop_px: int  # centre crop of it


def save_backbone(backbone: nn.Module, config: ModelConfig, path: Location, *, resize_px: int, crop_px: int) -> None:
    """Write a backbone's weights, under torchvision's names, its architecture, and its evaluation's image sizes."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    buffer = io.BytesIO()
    sizes = {"resize_px": resize_px, "crop_px": crop_px}
    torch.save({"format": FORMAT, "model": asdict(config), **sizes, "state_dict": weights}, buffer)
    write_atomic(path, buffer.getbuffer())


def load_backbone(path: Location) -> BackboneFile:
    """Read what :func:`save_backbone` wrote.

    Raises:
        ValueError: the file is missing, or not of this format; weights that are missing or left over are refused.
    """
    if stat(path) is None:
        raise ValueError(f"{path}: there is no such file; a run writes its backbone to <output>/backbone.pt")
    try:
        saved = torch.load(readable(path), map_location="cpu", weights_only=True)
        found = saved["format"]
    except (LookupError, TypeError, RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a backbone that swav wrote ({_first_line(error)})") from error
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, this version reads {FORMAT!r}")
    try:
        model = ModelConfig(**saved["model"])
        backbone = ResNet(model.arch, width=model.width, stem=model.stem)
        backbone.load_state_dict(saved["state_dict"])
        return BackboneFile(backbone, resize_px=saved["resize_px"], crop_px=saved["crop_px"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold what its format says: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The gist of an error of torch, which may go on for a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
