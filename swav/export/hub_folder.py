"""A folder that ``torch.hub.load`` reads without swav: code, weights, entry point."""

import inspect
import io
import sys
import tempfile
from pathlib import Path
from string import Template

import torch

from swav.export.check import check_outputs, check_weights
from swav.models import resnet
from swav.models.backbone_file import BackboneFile, save_backbone

_MODULE = "swav_resnet"
_WEIGHTS = "backbone.pt"
_ENTRY = Template('''"""A backbone of swav: torch.hub.load(FOLDER, "$entry", source="local")."""

from pathlib import Path

import torch
from $module import ResNet

dependencies = ["torch", "torchvision"]


def $entry():
    """Load $arch of width $width with the $stem stem: images [B, 3, H, W], normalised -> features [B, $features]."""
    saved = torch.load(Path(__file__).with_name("$weights"), map_location="cpu", weights_only=True)
    network = ResNet("$arch", width=$width, stem="$stem")
    network.load_state_dict(saved["state_dict"])
    return network.eval()
''')


def entry_name(file: BackboneFile) -> str:
    """The entry point's name, for example ``resnet50``, ``resnet50w2`` or ``resnet18w0_125_3x3``."""
    width = "" if file.model.width == 1 else f"w{file.model.width:g}".replace(".", "_")
    return file.model.arch + width + ("" if file.model.stem == "7x7" else f"_{file.model.stem}")


def for_hub(file: BackboneFile) -> tuple[dict[str, bytes], float]:
    """The files of the folder, ``hubconf.py`` last.

    Returns:
        The files, and the largest difference of their features.
    """
    entry = entry_name(file)
    settings = {"arch": file.model.arch, "width": repr(file.model.width), "stem": file.model.stem}
    hubconf = _ENTRY.substitute(
        settings, entry=entry, module=_MODULE, weights=_WEIGHTS, features=file.backbone.num_features
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"resize_px": file.resize_px, "crop_px": file.crop_px}
        save_backbone(file.backbone, file.model, folder / _WEIGHTS, **sizes)
        (folder / f"{_MODULE}.py").write_text(inspect.getsource(resnet))
        (folder / "hubconf.py").write_text(hubconf)
        files = {name: (folder / name).read_bytes() for name in (_WEIGHTS, f"{_MODULE}.py", "hubconf.py")}
        try:
            network = torch.hub.load(name, entry, source="local")
        finally:
            sys.modules.pop(_MODULE, None)
    check_weights("the hub folder", network.state_dict(), file)
    check_weights("the hub folder", torch.load(io.BytesIO(files[_WEIGHTS]), weights_only=True)["state_dict"], file)
    return files, check_outputs("the hub folder", network, file, tolerance=0.0)
