"""The rows that every table has for scale: labels, and no training at all."""

from dataclasses import replace

from swav.config import AugmentConfig, CropConfig, OptimConfig, PretrainConfig, SupervisedConfig
from swav.recipes.base import SIMCLR_SCALE, crops, large_batch


def supervised_r50_1x224_100ep_bs256() -> PretrainConfig:
    """ImageNet's labels, which the shards must hold. Expect 76 to 77; the paper has 76.5, training not stated.

    Settings are those that ResNet-50 is usually trained with: SGD, learning rate 0.1 for 256 images with momentum 0.9
    and decay 1e-4, cosine schedule, random crops of at least 8 % of the area, and flips.
    """
    views = (CropConfig(num_crops=1, size_px=224, scale=SIMCLR_SCALE),)
    return replace(
        large_batch("supervised_r50_1x224_100ep_bs256", 100, views, SupervisedConfig()),
        augment=AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0),
        optim=OptimConfig(
            optimizer="sgd",
            global_batch=256,
            epochs=100,
            warmup_epochs=5,
            base_lr=0.1,
            final_lr=0.0,
            weight_decay=1e-4,
        ),
    )


def random_r50() -> PretrainConfig:
    """The backbone as it is before training, for every protocol to judge. Takes seconds."""
    return large_batch("random_r50", 0, crops(224, 0))


RECIPES = (supervised_r50_1x224_100ep_bs256, random_r50)
