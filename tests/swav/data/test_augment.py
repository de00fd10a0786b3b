"""The batched augmentation equals torchvision's operations sample by sample, whoever else is in the batch."""

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from swav import rng
from swav.config import COLOUR_MEAN, COLOUR_STD, AugmentConfig
from swav.data.augment import Augment
from swav.data.batch import RawBatch

SEED, EPOCH = 7, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors on shared cores are slow with an OpenMP team."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def raw_batch(groups: list[tuple[int, int]], num: int = 8) -> RawBatch:
    """Blocks of random colours, with grey and saturated pixels among them; groups are (crops, size)."""
    draws = np.random.default_rng(0)
    crops = []
    for num_crops, size in groups:
        blocks = draws.integers(0, 256, (num_crops, num, size, size, 3), dtype=np.uint8)
        blocks[..., : size // 4, :] = blocks[..., : size // 4, :1]
        blocks[:, :, :2] = 0
        blocks[:, :, 2:3] = 255
        crops.append(torch.from_numpy(blocks).permute(0, 1, 4, 2, 3))
    return RawBatch(
        crops=crops,
        ids=draws.integers(0, 2**40, num),
        substituted=np.zeros(num, dtype=np.bool_),
        epoch=EPOCH,
        step=0,
        global_offset=16,
        global_size=64,
    )


def pick(raw: RawBatch, index: int) -> RawBatch:
    one = slice(index, index + 1)
    return RawBatch(
        crops=[group[:, one] for group in raw.crops],
        ids=raw.ids[one],
        substituted=raw.substituted[one],
        epoch=raw.epoch,
        step=raw.step,
        global_offset=raw.global_offset + index,
        global_size=raw.global_size,
    )


def one_by_one(image: Tensor, draws: list[float], config: AugmentConfig) -> Tensor:
    """What appendix A.2 asks for, by torchvision, for one uint8 crop [3, s, s]."""
    pixels = image.to(torch.float32) / 255
    size = image.shape[-1]
    if draws[0] < config.flip_probability:
        pixels = tv.horizontal_flip(pixels)
    if config.jitter_strength and draws[1] < config.jitter_probability:
        change = 0.8 * config.jitter_strength
        low = max(0.0, 1 - change)
        brightness, contrast, saturation = (low + (1 + change - low) * draw for draw in draws[2:5])
        hue = (2 * draws[5] - 1) * 0.2 * config.jitter_strength
        for operation in list(permutations(range(4)))[int(draws[6] * 24)]:
            if operation == 0:
                pixels = tv.adjust_brightness(pixels, brightness)
            elif operation == 1:
                pixels = tv.adjust_contrast(pixels, contrast)
            elif operation == 2:
                pixels = tv.adjust_saturation(pixels, saturation)
            else:
                pixels = tv.adjust_hue(pixels, hue)
    if draws[7] < config.grayscale_probability:
        pixels = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    radius = size // 10 // 2
    if draws[8] < config.blur_probability and radius:
        low, high = config.blur_sigma
        pixels = tv.gaussian_blur(pixels, [2 * radius + 1] * 2, [low + (high - low) * draws[9]] * 2)
    return tv.normalize(pixels, list(COLOUR_MEAN), list(COLOUR_STD))


CONFIGS = {
    "paper": AugmentConfig(),
    "all at once": AugmentConfig(jitter_probability=1, blur_probability=1, grayscale_probability=0.5),
    "half strength": AugmentConfig(jitter_strength=0.5, jitter_probability=1, grayscale_probability=0),
    "double strength": AugmentConfig(jitter_strength=2.0, jitter_probability=1, flip_probability=1),
    "nothing": AugmentConfig(flip_probability=0, jitter_strength=0, grayscale_probability=0, blur_probability=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_torchvision_on_each_crop(name: str) -> None:
    config = CONFIGS[name]
    groups = [(2, 40), (1, 33)]
    raw = raw_batch(groups, 24)
    batch = Augment(config, seed=SEED)(raw)
    number = 0
    for (num_crops, size), crops, group in zip(groups, batch.crops, raw.crops, strict=True):
        assert crops.shape == (num_crops * 24, 3, size, size)
        assert crops.dtype == torch.float32
        for crop in range(num_crops):
            draws = rng.uniforms(rng.key(SEED, "augment", EPOCH, number), raw.ids, 10)
            for sample in range(24):
                expected = one_by_one(group[crop, sample], draws[sample].tolist(), config)
                # 1e-5 in 0..1, divided by std 0.224
                assert (crops[crop * 24 + sample] - expected).abs().max() < 1e-5 / 0.224
            number += 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [[(2, 32), (3, 24)], [(1, 224), (2, 97)]])
def test_a_sample_is_the_same_to_the_bit_whoever_is_in_its_batch(
    groups: list[tuple[int, int]], channels_last: bool
) -> None:
    raw = raw_batch(groups)
    augment = Augment(AugmentConfig(), seed=SEED, channels_last=channels_last)
    together = augment(raw)
    for sample in range(8):
        alone = augment(pick(raw, sample))
        for whole, part, (num_crops, _) in zip(together.crops, alone.crops, groups, strict=True):
            assert torch.equal(whole.unflatten(0, (num_crops, 8))[:, sample], part)


def test_threads_and_memory_format_change_nothing() -> None:
    raw = raw_batch([(2, 224)])
    results = []
    for num_threads, channels_last in ((1, False), (2, False), (2, True)):
        torch.set_num_threads(num_threads)
        results.append(Augment(AugmentConfig(), seed=SEED, channels_last=channels_last)(raw).crops[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert results[1].is_contiguous()
    assert results[2].is_contiguous(memory_format=torch.channels_last)


def test_each_part_happens_as_often_as_asked() -> None:
    plan_of = Augment(AugmentConfig(), seed=SEED)._plan(raw_batch([(2, 24)], 4000), range(2), 24)
    tolerance = 4 * 0.5 / 8000**0.5
    assert abs(plan_of.flip.mean() - 0.5) < tolerance
    assert abs((plan_of.hue_place < 4).mean() - 0.8) < tolerance
    assert abs((plan_of.hue_place == 2).mean() - 0.2) < tolerance
    assert abs(plan_of.grey.mean() - 0.2) < tolerance
    assert abs((plan_of.sigma > 0).mean() - 0.5) < tolerance
    assert abs(plan_of.sigma[plan_of.sigma > 0].mean() - 1.05) < 0.05
    assert plan_of.sigma.max() < 2.0


def test_the_batch_keeps_its_place() -> None:
    batch = Augment(AugmentConfig(), seed=SEED)(raw_batch([(1, 24)]))
    assert (batch.epoch, batch.global_offset, batch.global_size) == (EPOCH, 16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_images_and_is_not_waited_for() -> None:
    raw = raw_batch([(2, 224), (3, 96)], 32)
    on_cpu = Augment(AugmentConfig(), seed=SEED)(raw)
    augment = Augment(AugmentConfig(), seed=SEED, device="cuda", channels_last=True)
    augment(raw)
    pinned = RawBatch(
        crops=[group.permute(0, 1, 3, 4, 2).pin_memory().permute(0, 1, 4, 2, 3) for group in raw.crops],
        ids=raw.ids,
        substituted=raw.substituted,
        epoch=raw.epoch,
        step=raw.step,
        global_offset=raw.global_offset,
        global_size=raw.global_size,
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = augment(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(on_cpu.crops, on_gpu.crops, strict=True):
        assert (one - other.cpu()).abs().max() < 1e-4
