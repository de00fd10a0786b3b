"""DeepCluster-v2 and SeLa-v2 on ImageNet: appendix D and the method comparison.

Settings are SwAV's (appendix D.2, "Implementation details"), with 3 sets of 3000 prototypes. Each run needs an assigner
beside it (docs/offline.md). Costs on 64 V100: Table 1's for SwAV, and an assignment phase per epoch, for which the
authors' release gives 193 s against SwAV's 174 s per epoch of 2x160 + 4x96. Expected numbers are the main paper's and
the authors' release's: top-1 accuracies of a linear classifier.
"""

from swav.config import CropConfig, DeepClusterV2Config, PretrainConfig, SelaV2Config
from swav.recipes.base import GLOBAL_SCALE, crops, large_batch

_SINGLE = (CropConfig(num_crops=1, size_px=224, scale=GLOBAL_SCALE),)


def _run(
    name: str, method: DeepClusterV2Config | SelaV2Config, views: tuple[CropConfig, ...], epochs: int = 400
) -> PretrainConfig:
    return large_batch(name, epochs, views, method)


def deepclusterv2_r50_2x224_400ep() -> PretrainConfig:
    """The method comparison without multi-crop. Expect 70.2."""
    return _run("deepclusterv2_r50_2x224_400ep", DeepClusterV2Config(), crops(224, 0))


def deepclusterv2_r50_2x160_4x96_400ep() -> PretrainConfig:
    """The method comparison with multi-crop. 21 h on 64 V100. Expect 74.3."""
    return _run("deepclusterv2_r50_2x160_4x96_400ep", DeepClusterV2Config(), crops(160, 4))


def deepclusterv2_r50_2x224_6x96_800ep() -> PretrainConfig:
    """The authors' best DeepCluster-v2. Expect 75.2."""
    return _run("deepclusterv2_r50_2x224_6x96_800ep", DeepClusterV2Config(), crops(224, 6), 800)


def deepclusterv2_r50_1x224_400ep() -> PretrainConfig:
    """One crop per image and batch, which offline methods admit (D.2). The paper states no accuracy."""
    return _run("deepclusterv2_r50_1x224_400ep", DeepClusterV2Config(), _SINGLE)


def selav2_r50_2x224_400ep() -> PretrainConfig:
    """The method comparison without multi-crop. Expect 67.2."""
    return _run("selav2_r50_2x224_400ep", SelaV2Config(), crops(224, 0))


def selav2_r50_2x160_4x96_400ep() -> PretrainConfig:
    """The method comparison with multi-crop. Expect 71.8."""
    return _run("selav2_r50_2x160_4x96_400ep", SelaV2Config(), crops(160, 4))


def selav2_r50_1x224_400ep() -> PretrainConfig:
    """One crop per image and batch, which offline methods admit (D.2). The paper states no accuracy."""
    return _run("selav2_r50_1x224_400ep", SelaV2Config(), _SINGLE)


RECIPES = (
    deepclusterv2_r50_2x224_400ep,
    deepclusterv2_r50_2x160_4x96_400ep,
    deepclusterv2_r50_2x224_6x96_800ep,
    deepclusterv2_r50_1x224_400ep,
    selav2_r50_2x224_400ep,
    selav2_r50_2x160_4x96_400ep,
    selav2_r50_1x224_400ep,
)
