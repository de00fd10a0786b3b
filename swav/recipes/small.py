"""Runs for small images: what the paper does not have, and a first user needs.

An image of 32 pixels holds one object and little detail, so crops cover more of it than in appendix A.2, the backbone
keeps its resolution in the stem, and blur, which would leave nothing to recognise, is off.
"""

from swav.config import (
    AugmentConfig,
    CropConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    SinkhornConfig,
    SwavConfig,
)
from swav.recipes.base import NO_DATA

_CROPS = (
    CropConfig(num_crops=2, size_px=32, scale=(0.2, 1.0)),
    CropConfig(num_crops=4, size_px=24, scale=(0.08, 0.3)),
)
_AUGMENT = AugmentConfig(jitter_strength=0.5, blur_probability=0.0)


def demo() -> PretrainConfig:
    """The main job on embedded data: minutes on two CPU cores, with raw pixels and an untrained backbone for scale."""
    return PretrainConfig(
        name="demo",
        method=SwavConfig(num_prototypes=300, sinkhorn=SinkhornConfig(epsilon=0.02)),
        model=ModelConfig(arch="resnet18", width=0.25, head_hidden=256),
        data=DataConfig(url="demo/train"),
        crops=(
            CropConfig(num_crops=2, size_px=48, scale=(0.3, 0.8)),
            CropConfig(num_crops=2, size_px=32, scale=(0.2, 0.5)),
        ),
        augment=AugmentConfig(jitter_strength=0.5, grayscale_probability=0.3, blur_probability=0.0),
        optim=OptimConfig(global_batch=64, epochs=15, warmup_epochs=1, base_lr=2.5, final_lr=0.0025),
        evaluate=EvaluateConfig(
            train_url="demo/train",
            test_url="demo/test",
            num_neighbors=(20,),
            resize_px=48,
            crop_px=48,
            baselines=True,
        ),
        runtime=RuntimeConfig(precision="fp32"),
    )


def swav_r18_cifar10_200ep() -> PretrainConfig:
    """CIFAR-10 (50,000 images of 32 pixels) with a ResNet-18. Settings of our own; give the data by ``--data``."""
    return PretrainConfig(
        name="swav_r18_cifar10_200ep",
        method=SwavConfig(num_prototypes=512),
        model=ModelConfig(arch="resnet18", stem="3x3"),
        data=NO_DATA,
        crops=_CROPS,
        augment=_AUGMENT,
        optim=OptimConfig(global_batch=256, epochs=200, base_lr=0.6, final_lr=0.0006),
        evaluate=EvaluateConfig(train_url=NO_DATA.url, resize_px=32, crop_px=32),
    )


RECIPES = (demo, swav_r18_cifar10_200ep)
