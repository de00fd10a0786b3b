"""SimCLR's runs on ImageNet as the paper compares them with SwAV (appendix A.8, B.1).

Everything but the loss is SwAV's: the same crops, augmentation, batch, optimiser and schedule (appendix A.1).
"""

from swav.config import CropConfig, PretrainConfig, SimclrConfig
from swav.recipes.base import crops, large_batch


def _simclr(name: str, epochs: int, views: tuple[CropConfig, ...]) -> PretrainConfig:
    return large_batch(name, epochs, views, SimclrConfig())


def simclr_r50_2x224_100ep() -> PretrainConfig:
    """Table 1. 4 h 00 on 64 V100, 8.6 GB each. The paper states no accuracy for 100 epochs."""
    return _simclr("simclr_r50_2x224_100ep", 100, crops(224, 0))


def simclr_r50_2x224_400ep() -> PretrainConfig:
    """The method comparison without multi-crop. 16 h on 64 V100 (Table 1). There is no accuracy in the supplement."""
    return _simclr("simclr_r50_2x224_400ep", 400, crops(224, 0))


def simclr_r50_2x160_4x96_400ep() -> PretrainConfig:
    """The method comparison with multi-crop (A.8). SwAV's cost, about; no accuracy in the supplement."""
    return _simclr("simclr_r50_2x160_4x96_400ep", 400, crops(160, 4))


def simclr_r50_2x224_1000ep() -> PretrainConfig:
    """Fig. 2: the length at which SimCLR is best. 40 h on 64 V100. Expect the transfers of Table 3."""
    return _simclr("simclr_r50_2x224_1000ep", 1000, crops(224, 0))


RECIPES = (
    simclr_r50_2x224_100ep,
    simclr_r50_2x224_400ep,
    simclr_r50_2x160_4x96_400ep,
    simclr_r50_2x224_1000ep,
)
