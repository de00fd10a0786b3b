"""A folder with ``model.safetensors`` and a model card."""

import hashlib
import json
import struct
from dataclasses import asdict

import safetensors.torch

from swav.config import PretrainConfig
from swav.export.card import model_card
from swav.export.check import check_outputs, check_weights
from swav.models.architecture import build
from swav.models.backbone_file import FORMAT, METADATA, BackboneFile
from swav.models.weight_files import parse

_WHAT = "model.safetensors"


def for_safetensors(
    file: BackboneFile, run: PretrainConfig | None, *, license_id: str
) -> tuple[dict[str, bytes], float]:
    """The files of the folder, the card last.

    Args:
        file: the backbone.
        run: that trained it, where it is known.
        license_id: of the weights, for the card.

    Returns:
        The files, and the largest difference of their features.
    """
    described = {"format": FORMAT, "model": asdict(file.model), "resize_px": file.resize_px, "crop_px": file.crop_px}
    metadata = {"format": "pt", METADATA: json.dumps(described, sort_keys=True)}
    data = _in_order(safetensors.torch.save(dict(file.backbone.state_dict()), metadata=metadata))
    weights, _ = parse(data)
    check_weights(_WHAT, weights, file)
    difference = check_outputs(_WHAT, build(file.model, weights).eval(), file, tolerance=0.0)
    card = model_card(file, run, license_id=license_id, sha256=hashlib.sha256(data).hexdigest())
    return {"model.safetensors": data, "README.md": card.encode()}, difference


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted; the library writes them in another order each time."""
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + data[8 + header_bytes :]
