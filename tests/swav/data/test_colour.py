"""Colour operations equal torchvision's, also where hue has no meaning, and blur leaves its neighbours alone."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from swav.data import colour

LEVELS = torch.tensor([0.0, 1e-6, 0.25, 0.5, 0.999, 1.0])


def awkward_colours() -> Tensor:
    """Every mixture of some levels, greys and ties among them: float32 [3, 1, 12, 18]."""
    return torch.cartesian_prod(LEVELS, LEVELS, LEVELS).T.reshape(3, 1, 12, 18).contiguous()


def test_hue_equals_torchvision() -> None:
    colours = awkward_colours()
    for shift in (-0.5, -0.2, -1e-3, 0.0, 0.1, 1 / 3, 0.5):
        planes = colours.clone()
        colour.shift_hue(planes, torch.tensor([shift]))
        assert (planes[:, 0] - tv.adjust_hue(colours[:, 0], shift)).abs().max() < 1e-5


def test_one_blend_is_brightness_saturation_or_contrast() -> None:
    colours = awkward_colours()
    planes = colours.repeat(1, 4, 1, 1)
    keep = torch.tensor([1.4, 0.3, 1.7, 1.0])
    colour.blend(planes, keep, torch.tensor([0, 0.7, 0, 0]), torch.tensor([0, 0, -0.7, 0]))
    expected = [
        tv.adjust_brightness(colours[:, 0], 1.4),
        tv.adjust_saturation(colours[:, 0], 0.3),
        tv.adjust_contrast(colours[:, 0], 1.7),
    ]
    for sample, pixels in enumerate(expected):
        assert (planes[:, sample] - pixels).abs().max() < 1e-6
    assert torch.equal(planes[:, 3], colours[:, 0])


def test_grey_equals_torchvision() -> None:
    colours = awkward_colours()
    assert (colour.grey(colours)[0] - tv.rgb_to_grayscale(colours[:, 0])[0]).abs().max() < 1e-6


def test_blur_takes_each_samples_own_kernel() -> None:
    planes = torch.rand(3, 2, 9, 14, generator=torch.Generator().manual_seed(0))
    wide, narrow = (torch.exp(-0.5 * (torch.arange(4) / sigma) ** 2) for sigma in (2.0, 0.1))
    taps = torch.stack([kernel / (2 * kernel.sum() - kernel[0]) for kernel in (wide, narrow)], dim=1)
    blurred = colour.blur(planes, taps, [2, 1, 1, 1])
    for sample, sigma in enumerate((2.0, 0.1)):
        expected = tv.gaussian_blur(planes[:, sample], [7, 7], [sigma, sigma])
        assert (blurred[:, sample] - expected).abs().max() < 1e-6
    assert torch.equal(blurred[:, 1], planes[:, 1])
