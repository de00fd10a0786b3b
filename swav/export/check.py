"""Whether an export computes what the backbone does."""

import importlib
import logging
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from swav.models.backbone_file import BackboneFile
from swav.models.layouts import of_many

_SEED = 6

_logger = logging.getLogger(__name__)


def check_outputs(what: str, compute: Callable[[Tensor], Tensor], file: BackboneFile, *, tolerance: float) -> float:
    """Compare features of random images, in batches of 1 and 3, of the evaluation's size and a larger one.

    Args:
        what: was written, for the message.
        compute: float32 images [B, 3, H, W] -> features [B, D], by what was read back.
        file: the backbone.
        tolerance: the largest difference allowed, relative to the largest feature; 0 for the same bits.

    Returns:
        The largest difference that was found, relative to the largest feature.

    Raises:
        RuntimeError: it is above the tolerance, or not a number.
    """
    backbone = file.backbone.eval()
    generator = torch.Generator().manual_seed(_SEED)
    worst = 0.0
    for batch, size_px in ((1, file.crop_px), (3, file.crop_px + 32)):
        images = torch.randn(batch, 3, size_px, size_px, generator=generator)
        with torch.no_grad():
            expected, found = backbone(images), compute(images)
        if found.shape != expected.shape:
            raise RuntimeError(f"{what} gives {list(found.shape)} for {list(expected.shape)}; {_NOT_KEPT}")
        scale = float(expected.abs().max())
        if scale == 0:
            _logger.warning("all features of the backbone are 0, so trying %s says little", what)
        difference = float((found - expected).abs().max()) / (scale or 1.0)
        if not difference <= tolerance:
            raise RuntimeError(
                f"{what} does not compute what the backbone does: at {size_px} px features differ by {difference:.2g} "
                f"of the largest, {tolerance:g} is allowed; {_NOT_KEPT}"
            )
        worst = max(worst, difference)
    return worst


def check_weights(what: str, found: Mapping[str, Tensor], file: BackboneFile, *, without: str = "") -> None:
    """Compare every weight, bit by bit.

    Args:
        what: was written, for the message.
        found: what was read back.
        file: the backbone.
        without: how names end that the format does not have; empty for none.

    Raises:
        RuntimeError: they differ.
    """
    expected = {
        name: tensor for name, tensor in file.backbone.state_dict().items() if not (without and name.endswith(without))
    }
    differing = sorted(expected.keys() ^ found.keys())
    differing += [name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])]
    if differing:
        raise RuntimeError(f"{what} does not hold the backbone's {of_many(differing)}; {_NOT_KEPT}")


def needed(name: str, to: str) -> ModuleType:
    """Import a package of the extra ``export``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--to {to} needs the package {error.name}, which is not installed: pip install 'swav[export]'"
        ) from error


_NOT_KEPT = "nothing was kept. This is a fault of swav or of the library's version: please report it"
