"""MoCo-v2 on ImageNet, as its authors train it: the baseline of the paper's transfer tables (Tables 3 to 5).

Settings are those of Chen et al., 2020 ("Improved baselines with momentum contrastive learning"): SGD, 256 images per
step, learning rate 0.03 without warm-up, decay 1e-4, crops of at least a fifth of the image, half of SimCLR's colour
distortion, a head without batch norm. Costs on other machines than theirs (8 V100) are not known.
"""

from dataclasses import replace

from swav.config import AugmentConfig, CropConfig, Mocov2Config, ModelConfig, OptimConfig, PretrainConfig
from swav.recipes.base import large_batch


def _mocov2(name: str, epochs: int) -> PretrainConfig:
    views = (CropConfig(num_crops=2, size_px=224, scale=(0.2, 1.0)),)
    return replace(
        large_batch(name, epochs, views, Mocov2Config()),
        model=ModelConfig(head_batch_norm=False),
        augment=AugmentConfig(jitter_strength=0.5),
        optim=OptimConfig(
            optimizer="sgd",
            global_batch=256,
            epochs=epochs,
            warmup_epochs=0,
            base_lr=0.03,
            final_lr=0.0,
            weight_decay=1e-4,
        ),
    )


def mocov2_r50_2x224_200ep_bs256() -> PretrainConfig:
    """The short schedule, for comparison with Table 1; about 53 h on 8 V100. Expect 67.5 (both MoCo-v2's paper)."""
    return _mocov2("mocov2_r50_2x224_200ep_bs256", 200)


def mocov2_r50_2x224_800ep_bs256() -> PretrainConfig:
    """The long schedule, of the backbone in Tables 3 to 5. Expect 71.1 (MoCo-v2's paper); Table 3 for the transfers."""
    return _mocov2("mocov2_r50_2x224_800ep_bs256", 800)


RECIPES = (mocov2_r50_2x224_200ep_bs256, mocov2_r50_2x224_800ep_bs256)
