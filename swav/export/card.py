"""The model card beside exported weights."""

import json
import logging
import re
from typing import Any

import swav
from swav.config import COLOUR_MEAN, COLOUR_STD, PretrainConfig, from_json
from swav.models.backbone_file import BackboneFile
from swav.storage import Location, is_remote, join, read, stat

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LOAD_ELSEWHERE = """import safetensors.torch, torch, torchvision
network = torchvision.models.{arch}()
network.fc = torch.nn.Identity()
network.load_state_dict(safetensors.torch.load_file("model.safetensors"))"""
_LOAD_HERE = """from swav.models.backbone_file import load_backbone
network = load_backbone("model.safetensors").backbone.eval()"""

_logger = logging.getLogger(__name__)


def check_license(license_id: str) -> str:
    """A licence's id as the card has it.

    Raises:
        ValueError: it is none.
    """
    if not _LICENSE.fullmatch(license_id):
        raise ValueError(
            f"--license {license_id!r} is no id of a licence; write it as Hugging Face does, for example apache-2.0, "
            "cc-by-nc-4.0, or other"
        )
    return license_id


def run_of(url: Location, file: BackboneFile) -> PretrainConfig | None:
    """The run that wrote a backbone or checkpoint, by the ``config.json`` of its folder.

    Args:
        url: of the file.
        file: what it holds.

    Returns:
        None where the file is of another layout, or lies beside no settings, or beside those of another network.
    """
    folder = str(url).rpartition("/")[0] or "."
    if file.layout == "swav checkpoint":
        folder = join(folder, "..") if not is_remote(folder) else folder.rpartition("/")[0]
    path = join(folder, "config.json")
    if file.layout not in ("swav backbone", "swav checkpoint") or stat(path) is None:
        return None
    try:
        run = from_json(read(path).decode())
    except ValueError as error:
        _logger.warning("%s cannot be read (%s), so the card does not name the run", path, error)
        return None
    return run if run.model == file.model else None


def model_card(file: BackboneFile, run: PretrainConfig | None, *, license_id: str, sha256: str) -> str:
    """The card, in Markdown with the front matter of Hugging Face. It names no data and no urls.

    Args:
        file: the backbone.
        run: that trained it, where it is known.
        license_id: of the weights.
        sha256: of ``model.safetensors``.
    """
    model = file.model
    parameters = sum(parameter.numel() for parameter in file.backbone.parameters())
    usual = (model.width, model.stem) == (1.0, "7x7")
    facts: dict[str, Any] = {
        "architecture": f"{model.arch}, width {model.width:g}, {model.stem} stem",
        "parameters": f"{parameters:,}",
        "features": f"{file.backbone.num_features}, pooled, before any head",
        "input": "RGB in 0..1, float32 [B, 3, H, W]",
        "mean": json.dumps(COLOUR_MEAN),
        "standard deviation": json.dumps(COLOUR_STD),
        "images at evaluation": f"shorter side {file.resize_px} px, then the centre {file.crop_px} px",
        "read from": f"{file.layout}, SHA-256 {file.sha256}",
        "left out of it": ", ".join(file.left_out) or "nothing",
        "SHA-256 of model.safetensors": sha256,
        **(_run_facts(run) if run is not None else {"method and recipe": "not recorded beside the file"}),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    method = [run.method.kind] if run is not None else []
    tags = "\n".join(f"- {tag}" for tag in ("image-feature-extraction", "self-supervised-learning", "resnet", *method))
    load = _LOAD_ELSEWHERE.format(arch=model.arch) if usual else _LOAD_HERE
    return f"""---
license: {license_id}
library_name: pytorch
pipeline_tag: image-feature-extraction
tags:
{tags}
---

# {model.arch} backbone

Written by swav {swav.__version__}. The weights have torchvision's names.

| | |
|---|---|
{table}

```python
{load}
```
"""


def _run_facts(run: PretrainConfig) -> dict[str, Any]:
    return {
        "method": run.method.kind,
        "recipe": run.name,
        "epochs": run.optim.epochs,
        "global batch": run.optim.global_batch,
        "seed": run.seed,
    }
