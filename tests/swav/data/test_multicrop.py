"""Crops have torchvision's distribution and PIL's pixels, and depend on their sample alone."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from swav.config import CropConfig
from swav.data.decode import decode_image
from swav.data.multicrop import crop_boxes, crop_draws, cut_crops

PAPER = (
    CropConfig(num_crops=2, size_px=224, scale=(0.14, 1.0)),
    CropConfig(num_crops=6, size_px=96, scale=(0.05, 0.14)),
)


def photographs(num: int) -> list[bytes]:
    """The first photographs of the shared set; skips the test where it is not at hand."""
    repository = Path(__file__).resolve().parents[3]
    shared = Path(os.environ.get("SWAV_SHARED", repository.parent / "shared"))
    shards = sorted((shared / "data" / "photos500").glob("*.tar"))
    if not shards:
        pytest.skip(f"no photographs under {shared}/data/photos500; set SWAV_SHARED")
    photos: list[bytes] = []
    with tarfile.open(shards[0]) as shard:
        for member in shard:
            stream = shard.extractfile(member)
            if stream is not None and member.name.endswith(".jpg") and len(photos) < num:
                photos.append(stream.read())
    return photos


def slots_for(groups: tuple[CropConfig, ...]) -> list[Tensor]:
    return [
        torch.empty(1, group.size_px, group.size_px, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for group in groups
        for _ in range(group.num_crops)
    ]


def kolmogorov_smirnov(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest distance between two empirical distribution functions."""
    both = np.concatenate([one, other])
    return float(
        np.abs(
            np.searchsorted(np.sort(one), both, side="right") / len(one)
            - np.searchsorted(np.sort(other), both, side="right") / len(other)
        ).max()
    )


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14), (0.08, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float], height: int, width: int) -> None:
    num = 3000
    group = (CropConfig(num_crops=1, size_px=224, scale=scale),)
    draws = crop_draws(0, 0, np.arange(num), group)
    ours = np.concatenate([crop_boxes(row, height, width) for row in draws]).astype(float)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(num)])
    columns = {"top": 0, "left": 1, "height": 2, "width": 3}
    for column in columns.values():
        assert kolmogorov_smirnov(ours[:, column], theirs[:, column]) < 0.044  # 99.4 % of pairs of 3000 lie below
    area, other_area = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    assert kolmogorov_smirnov(area, other_area) < 0.044
    aspect, other_aspect = ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]
    assert kolmogorov_smirnov(aspect, other_aspect) < 0.044


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (900, 1), (2, 3), (7, 500), (375, 500)])
def test_boxes_lie_inside_images_of_any_shape(height: int, width: int) -> None:
    for row in crop_draws(3, 1, np.arange(200), PAPER):
        top, left, box_height, box_width = crop_boxes(row, height, width).T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (box_height >= 1).all()
        assert (box_width >= 1).all()
        assert (top + box_height <= height).all()
        assert (left + box_width <= width).all()


def test_where_nothing_fits_the_centre_is_taken_as_torchvision_does() -> None:
    draws = crop_draws(0, 0, np.arange(1), PAPER)[0]
    for height, width in ((10, 900), (900, 10)):
        assert crop_boxes(draws, height, width)[0].tolist() == list(
            RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        )


def test_draws_depend_on_the_sample_not_on_its_batch() -> None:
    ids = np.array([5, 2**40, 7, 0, 123456])
    together = crop_draws(31, 4, ids, PAPER)
    for row, sample in zip(together, ids, strict=True):
        assert (crop_draws(31, 4, np.array([sample]), PAPER)[0] == row).all()
    fewer = (PAPER[0], CropConfig(num_crops=1, size_px=64, scale=PAPER[1].scale))
    assert (crop_draws(31, 4, ids, fewer) == together[:, :3]).all()  # crop 2 is crop 2, whatever follows
    assert (crop_draws(31, 5, ids, PAPER) != together).all()
    assert len(np.unique(together)) > 0.99 * together.size  # crops and samples do not share draws


def test_crops_are_pils_to_a_grey_level() -> None:
    groups = (*PAPER, CropConfig(num_crops=1, size_px=33, scale=(0.3, 1.0)))
    differences = np.zeros(256, dtype=int)
    for sample, data in enumerate(photographs(20)):
        image = decode_image(data)
        slots = slots_for(groups)
        boxes = crop_boxes(crop_draws(0, 0, np.array([sample]), groups)[0], *image.shape[:2])
        before = [slot.data_ptr() for slot in slots]
        cut_crops(image, boxes, slots)
        assert [slot.data_ptr() for slot in slots] == before
        for (top, left, height, width), slot in zip(boxes.tolist(), slots, strict=True):
            crop = Image.fromarray(image).crop((left, top, left + width, top + height))
            pil = np.asarray(crop.resize((slot.shape[2], slot.shape[3]), Image.Resampling.BILINEAR)).astype(int)
            difference = np.abs(slot[0].permute(1, 2, 0).numpy() - pil)
            differences += np.bincount(difference.ravel(), minlength=256)
    assert differences[0] > 0.94 * differences.sum()
    assert differences[2] <= 1e-6 * differences.sum()  # torch rounds its weights to 15 bits, PIL to 22
    assert differences[3:].sum() == 0


def test_one_pixel_fills_every_crop() -> None:
    slots = slots_for(PAPER)
    image = np.full((1, 1, 3), (1, 2, 3), dtype=np.uint8)
    cut_crops(image, crop_boxes(crop_draws(0, 0, np.array([0]), PAPER)[0], 1, 1), slots)
    for slot in slots:
        assert (slot == torch.tensor([1, 2, 3]).view(1, 3, 1, 1)).all()
