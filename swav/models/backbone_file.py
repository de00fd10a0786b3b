"""A trained backbone as one file: ours, which says how to build its network, and others', from which it can be told."""

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swav.checkpoint import latest_step
from swav.config import EvaluateConfig, ModelConfig, from_json
from swav.models.architecture import build, identify
from swav.models.layouts import SWAV_CHECKPOINT, find_backbone
from swav.models.resnet import ResNet
from swav.models.weight_files import first_line, parse
from swav.storage import Location, is_remote, join, local_path, read, stat, write_atomic

FORMAT = "swav.backbone/1"
METADATA = "swav"  # of a safetensors file of ours: JSON with what a backbone.pt says beside its weights

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BackboneFile:
    """A backbone and what its file tells of it."""

    backbone: ResNet
    model: ModelConfig  # settings of the head are the defaults where the file does not have them
    resize_px: int  # shorter side of an image at evaluation; the paper's 256 where the file does not say
    crop_px: int  # centre crop of it; the paper's 224
    layout: str  # for example "swav backbone", "SwAV release", "MoCo-v2", "torchvision"
    left_out: tuple[str, ...]  # groups of tensors in the file that a backbone has no use for, for example "head"
    sha256: str  # of the file


def image_sizes(evaluation: EvaluateConfig | None) -> dict[str, int]:
    """How large an evaluation sees its images; the paper's 256 and 224 where there is none."""
    if evaluation is None:
        return {"resize_px": 256, "crop_px": 224}
    return {"resize_px": evaluation.resize_px, "crop_px": evaluation.crop_px}


def save_backbone(backbone: nn.Module, config: ModelConfig, path: Location, *, resize_px: int, crop_px: int) -> None:
    """Write a backbone's weights, under torchvision's names, its architecture, and its evaluation's image sizes."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    buffer = io.BytesIO()
    sizes = {"resize_px": resize_px, "crop_px": crop_px}
    torch.save({"format": FORMAT, "model": asdict(config), **sizes, "state_dict": weights}, buffer)
    write_atomic(path, buffer.getbuffer())


def load_backbone(path: Location) -> BackboneFile:
    """Read a backbone from a file of any layout in docs/models.md, told from the file alone, or from a run's folder.

    Every tensor of the file is taken into the backbone or belongs to a group that is known to be no part of one, and
    every weight of the backbone is taken from the file. Nothing in the file is run.

    Raises:
        ValueError: there is no such file, or it is of no known layout, or of a network that is not among ours, or
            damaged, or not complete to the last tensor.
        RuntimeError: of the checkpoints of a run's folder, none is whole.
        OSError: the file cannot be read.
    """
    url = locate(path)
    data = read(url)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        content, metadata = parse(data)
        del data
        found = _interpret(content, metadata, sha256)
    except ValueError as error:
        raise ValueError(f"{url} {error}") from error
    _logger.info(
        "%s: %s, a %s of width %g with the %s stem; left out: %s",
        *(url, found.layout, found.model.arch, found.model.width, found.model.stem),
        ", ".join(found.left_out) or "nothing",
    )
    return found


def locate(path: Location) -> str:
    """The file of a backbone: ``path`` itself, or what a folder, of a run or of an export, has of one.

    Raises:
        ValueError: nothing is there.
        RuntimeError: of the checkpoints of a run's folder, none is whole.
        OSError: a store does not say.
    """
    if not is_remote(path) and not local_path(path).exists():
        raise ValueError(f"{path}: there is no such file; a run writes its backbone to <output>/backbone.pt")
    if local_path(path).is_file() if not is_remote(path) else stat(path) is not None:
        return str(path)
    for name in ("backbone.pt", "model.safetensors"):
        if stat(join(path, name)) is not None:
            _logger.info("%s is a folder; its %s is read", path, name)
            return join(path, name)
    folder = join(path, "checkpoints")
    step = latest_step(folder) if not str(path).startswith(("http://", "https://")) else None
    if step is None:
        raise ValueError(
            f"{path}: there is no such file, nor a folder with backbone.pt, model.safetensors or checkpoints; a run "
            "writes its backbone to <output>/backbone.pt"
        )
    _logger.info("%s is the folder of a run that has not ended; its checkpoint of step %d is read", path, step)
    return join(folder, f"step-{step:09d}.pt")


def _interpret(content: Any, metadata: Mapping[str, str], sha256: str) -> BackboneFile:
    """Make the backbone of what a file held."""
    layout = "swav backbone"
    left_out: tuple[str, ...] = ()
    if METADATA in metadata:
        layout, content = "swav safetensors", {**_described(metadata[METADATA]), "state_dict": content}
    entries = content if isinstance(content, Mapping) else {}
    declared = entries.get("format")
    if isinstance(declared, str):
        if declared != FORMAT:
            raise ValueError(f"has the format {declared!r}, this version reads {FORMAT!r}")
        model, sizes, weights = _of_format(entries)
    elif {"method", "config", "data_identity"} <= entries.keys():
        model, sizes = _of_config(entries["config"])
        beside = {key: value for key, value in entries.items() if key != "method"}
        found = find_backbone({**beside, "state_dict": entries["method"]}, SWAV_CHECKPOINT)
        layout, weights, left_out = found.layout, found.weights, found.left_out
    else:
        found = find_backbone(content)
        model, sizes = identify(found.weights), image_sizes(None)
        layout, weights, left_out = found.layout, found.weights, found.left_out
    return BackboneFile(build(model, weights), model, **sizes, layout=layout, left_out=left_out, sha256=sha256)


def _described(text: str) -> dict[str, Any]:
    """What the metadata of a safetensors file of ours say."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"has metadata of ours that cannot be read ({first_line(error)}); write it again") from error


def _of_format(entries: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, int], Mapping[str, Any]]:
    """Architecture, sizes and weights of a file that :func:`save_backbone` wrote."""
    try:
        model = ModelConfig(**entries["model"])
        sizes = {name: entries[name] for name in image_sizes(None)}
        weights = {name: entries["state_dict"][name] for name in entries["state_dict"]}
        if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise TypeError("its state_dict has something else than tensors")
        if not all(isinstance(size, int) for size in sizes.values()):
            raise TypeError(f"its sizes are {sizes}")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"does not hold what its format says: {first_line(error)}") from error
    return model, sizes, weights


def _of_config(text: Any) -> tuple[ModelConfig, dict[str, int]]:
    """Architecture and sizes of a run."""
    try:
        config = from_json(text)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"is a checkpoint whose settings this version cannot read ({first_line(error)}); read it with the version "
            "that wrote it"
        ) from error
    return config.model, image_sizes(config.evaluate)
