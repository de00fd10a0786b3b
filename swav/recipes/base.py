"""What the paper's runs share: crops (appendix A.2), the large batch (A.1) and the small one (A.6)."""

from dataclasses import replace

from swav.config import (
    CropConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    QueueConfig,
    SwavConfig,
)

GLOBAL_SCALE = (0.14, 1.0)
LOCAL_SCALE = (0.05, 0.14)
SIMCLR_SCALE = (0.08, 1.0)  # RandomResizedCrop's default, kept in the ablations (appendix A.7)

# ImageNet is not ours to name a place for: a recipe of the paper is refused until its data are given.
NO_DATA = DataConfig(url="")

_SWAV = SwavConfig()


def crops(size_px: int, num_local: int, *, scale: tuple[float, float] = GLOBAL_SCALE) -> tuple[CropConfig, ...]:
    """Two global crops, and ``num_local`` crops of 96 pixels.

    Args:
        size_px: of the global crops, 224 or 160.
        num_local: 0, 4 or 6.
        scale: area fraction of the global crops.
    """
    views = (CropConfig(num_crops=2, size_px=size_px, scale=scale),)
    if num_local == 0:
        return views
    return (*views, CropConfig(num_crops=num_local, size_px=96, scale=LOCAL_SCALE))


def large_batch(name: str, epochs: int, views: tuple[CropConfig, ...], method: MethodConfig = _SWAV) -> PretrainConfig:
    """A method as appendix A.1 trains SwAV: ResNet-50, 4096 images per step, learning rate 4.8."""
    return PretrainConfig(
        name=name,
        method=method,
        model=ModelConfig(),
        data=NO_DATA,
        crops=views,
        optim=OptimConfig(epochs=epochs, warmup_epochs=min(10, epochs)),
    )


def small_batch(name: str, epochs: int, views: tuple[CropConfig, ...]) -> PretrainConfig:
    """SwAV as appendix A.6 trains it: 256 images per step, and a queue of the last 15 batches from epoch 15 on.

    No warm-up: A.6 states the learning rate, its decay and its final value, and no ramp. Prototypes stay frozen for the
    first epoch, which A.1 states of SwAV in general. With a ramp instead: ``optim.warmup_epochs=10``.
    """
    run = large_batch(name, epochs, views)
    return replace(
        run,
        method=SwavConfig(queue=QueueConfig(num_samples=3840, start_epoch=15)),
        optim=OptimConfig(global_batch=256, epochs=epochs, warmup_epochs=0, base_lr=0.6, final_lr=0.0006),
    )


def wide(
    name: str,
    width: float,
    *,
    head_hidden: int,
    head_batch_norm: bool = True,
    global_batch: int = 4096,
    queue: QueueConfig | None = None,
) -> PretrainConfig:
    """A wider ResNet-50 as appendix B.2 trains it: 400 epochs, 2x224 and 4x96 crops, the rest as in A.1."""
    run = large_batch(name, 400, crops(224, 4))
    return replace(
        run,
        method=SwavConfig(queue=queue),
        model=ModelConfig(width=width, head_hidden=head_hidden, head_batch_norm=head_batch_norm),
        optim=replace(run.optim, global_batch=global_batch),
    )
