"""The data set that comes with the software: drawn on the spot, the same on every machine.

An image of 64 pixels shows eight to ten copies of one of ten shapes, at random places, sizes and angles, over a mottled
background and clutter. The shape is the label, which only the evaluation reads. Colours are a nuisance: every copy,
patch of background and piece of clutter has a hue of its own, so that pixels and untrained features tell images apart
by what says nothing about the shape. What all parts of an image share is the shape: were there a palette per image,
training could settle for that and never look at the shapes (it did, for one seed in three). Shapes are lighter than
what they lie on and of one kind per image, so that minutes are enough to learn them.
"""

import colorsys
import io
import math
import shutil
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from swav import rng
from swav.bars import progress_bar
from swav.data.index import build_index
from swav.storage import write_atomic

DEMO_VERSION = 2  # of the images; names the folder that keeps them
_SIZE_PX = 64
_OVERSAMPLING = 2
_SPLITS = {"train": range(4000), "test": range(4000, 5000)}
_SAMPLES_PER_SHARD = 1000

Points = NDArray[np.float64]  # [corners, 2], the shape fits the unit circle


def write_demo_shards(out: Path) -> None:
    """Draw all images and write them as shards: ``out/train`` with 4,000 and ``out/test`` with 1,000.

    Args:
        out: a folder that does not exist yet; it appears when it is complete.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    num_images = sum(map(len, _SPLITS.values()))
    with progress_bar(total=num_images, desc="drawing the demo's images", unit="image") as progress:
        for split, numbers in _SPLITS.items():
            folder = partial / split
            folder.mkdir(parents=True)
            for first in numbers[::_SAMPLES_PER_SHARD]:
                shard = folder / f"shard-{(first - numbers[0]) // _SAMPLES_PER_SHARD:06d}.tar"
                with webdataset.TarWriter(str(shard), encoder=False, mtime=0) as writer:
                    for number in range(first, first + _SAMPLES_PER_SHARD):
                        writer.write(_sample(number))
                        progress.update()
            write_atomic(folder / "classes.txt", ("\n".join(SHAPES) + "\n").encode())
            build_index(str(folder), str(folder))
    partial.rename(out)


def _sample(number: int) -> dict[str, str | bytes]:
    label = number % len(SHAPES)
    file = io.BytesIO()
    draw_image(number, label).save(file, "JPEG", quality=92)
    return {"__key__": f"{number:06d}", "jpg": file.getvalue(), "cls": str(label).encode()}


def draw_image(number: int, label: int) -> Image.Image:
    """Draw one image; all that is random about it is keyed by its number."""
    generator = rng.generator(0, "demo", number)
    side = _SIZE_PX * _OVERSAMPLING
    patches = [[_colour(generator, value=(0.05, 0.5)) for _ in range(5)] for _ in range(5)]
    image = Image.fromarray(np.array(patches, np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    _draw_clutter(canvas, generator, side)
    for x, y, radius in _places(generator, side):
        angle = generator.uniform(-math.pi, math.pi)
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        points = SHAPES[list(SHAPES)[label]] * radius @ rotation + [x, y]
        fill = _colour(generator, value=(0.6, 1.0))
        canvas.polygon([(float(a), float(b)) for a, b in points], fill=fill)
    pixels = np.asarray(image.reduce(_OVERSAMPLING), np.float64)
    noisy = pixels + generator.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _colour(generator: np.random.Generator, *, value: tuple[float, float]) -> tuple[int, int, int]:
    """Any hue, of a brightness within the range (HSV's value)."""
    hue, saturation = generator.random(), generator.uniform(0.1, 0.9)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, generator.uniform(*value))
    return int(255 * red), int(255 * green), int(255 * blue)


def _draw_clutter(canvas: ImageDraw.ImageDraw, generator: np.random.Generator, side: int) -> None:
    """Six lines, blobs and polygons that say nothing about the label."""
    for _ in range(6):
        fill = _colour(generator, value=(0.2, 0.6))
        x, y = generator.uniform(0, side, 2)
        kind = generator.integers(3)
        if kind == 0:
            dx, dy = generator.normal(0, side / 4, 2)
            canvas.line((x, y, x + dx, y + dy), fill=fill, width=int(generator.integers(1, 4)) * _OVERSAMPLING)
        elif kind == 1:
            a, b = generator.uniform(1, 6, 2) * _OVERSAMPLING
            canvas.ellipse((x - a, y - b, x + a, y + b), fill=fill)
        else:
            offsets = generator.normal(0, 5 * _OVERSAMPLING, (int(generator.integers(3, 6)), 2))
            points = np.array([x, y]) + offsets
            canvas.polygon([(float(a), float(b)) for a, b in points], fill=fill)


def _places(generator: np.random.Generator, side: int) -> list[tuple[float, float, float]]:
    """Eight to ten circles that hardly overlap: centre and radius."""
    wanted = int(generator.integers(8, 11))
    placed: list[tuple[float, float, float]] = []
    for _ in range(80):
        if len(placed) == wanted:
            break
        radius = float(generator.uniform(6, 10)) * _OVERSAMPLING
        x, y = (float(place) for place in generator.uniform(0.5 * radius, side - 0.5 * radius, 2))
        if all(math.hypot(x - a, y - b) >= 0.95 * (radius + other) for a, b, other in placed):
            placed.append((x, y, radius))
    return placed


def _arc(radius: float, start: float, end: float, num: int) -> Points:
    angles = np.linspace(start, end, num)
    points: Points = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return points


def _polar(*radii: float) -> Points:
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    points: Points = np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return points


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    points: Points = np.stack([16 * np.sin(t) ** 3, -height], axis=-1) / 16
    return points


SHAPES: dict[str, Points] = {
    "ring": np.concatenate([_arc(1, 0, 2 * math.pi, 29), _arc(0.58, 2 * math.pi, 0, 29)]),
    "star": _polar(*([1, 0.4] * 5)),
    "cross": np.array(
        [
            *[(-0.28, -1), (0.28, -1), (0.28, -0.28), (1, -0.28), (1, 0.28), (0.28, 0.28)],
            *[(0.28, 1), (-0.28, 1), (-0.28, 0.28), (-1, 0.28), (-1, -0.28), (-0.28, -0.28)],
        ]
    ),
    "crescent": np.concatenate(
        [_arc(1, 0.7, 2 * math.pi - 0.7, 25), _arc(0.78, 2 * math.pi - 1.0, 1.0, 21) + np.array([0.35, 0])]
    ),
    "triangle": np.concatenate([_polar(1.1, 1.1, 1.1)[[0, 1, 2, 0]], 0.42 * _polar(1.1, 1.1, 1.1)[[0, 2, 1, 0]]]),
    "heart": _heart(),
    "arrow": np.array([(1, 0), (0.1, -0.85), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.85)]),
    "gear": _polar(*([1.0, 1.0, 0.72, 0.72] * 8)),
    "bolt": np.array([(0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1), (0.6, -0.2), (0.05, -0.2)]),
    "comb": np.array(
        [
            *[(-1, -1), (1, -1), (1, -0.6), (-0.55, -0.6), (-0.55, -0.2), (0.6, -0.2)],
            *[(0.6, 0.2), (-0.55, 0.2), (-0.55, 0.6), (1, 0.6), (1, 1), (-1, 1)],
        ]
    ),
}
