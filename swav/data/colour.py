"""Colour and blur on batches of planes, every sample with strengths of its own.

Pixels are float32 planes [3, n, height, width] in 0..1 and are changed in place; colour channels come first, so that
each is one contiguous block. The operations are torchvision's. What happens to one sample never depends, to the last
bit, on which others are in the batch: nothing is reduced or convolved over more than one sample's rows.

Shape letters: ``n`` samples, ``s`` height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, the digits that torchvision uses
_TINY = 1e-20


def grey(planes: Tensor) -> Tensor:
    """Luma [n, s, s]."""
    return planes[0].mul(_GREY[0]).add_(planes[1], alpha=_GREY[1]).add_(planes[2], alpha=_GREY[2])


def blend(planes: Tensor, keep: Tensor, grey_share: Tensor, mean_share: Tensor) -> None:
    """Set pixels to keep * pixel + grey_share * grey + mean_share * mean grey, clamped to 0..1.

    This one form is brightness by f (f, 0, 0), saturation by f (f, 1 - f, 0) and contrast by f (f, 0, 1 - f), so
    that samples which get different operations go through together. (1, 0, 0) leaves a sample as it is, exactly.

    Args:
        planes: float32 [3, n, s, s], changed in place.
        keep: float32 [n].
        grey_share: float32 [n].
        mean_share: float32 [n].
    """
    luma = grey(planes)
    # Row sums first: one sum over everything is split over threads when there is one sample only.
    mean = luma.sum(-1).sum(-1).div_(luma.shape[-2] * luma.shape[-1])
    target = luma.mul_(grey_share[:, None, None]).add_(mean.mul_(mean_share)[:, None, None])
    torch.addcmul(target, planes, keep[:, None, None], out=planes).clamp_(0, 1)


def shift_hue(planes: Tensor, shift: Tensor) -> None:
    """Turn hue (HSV) by a fraction of the full circle, keeping saturation and value.

    With m the largest channel and c the range of the channels, red's distance from its own pole on the hexagon is
    2 + (g + b - r - m) / c, without a case for each largest channel; and a channel at distance d from its pole is
    m - c * clamp(d - 1, 0, 1).

    Args:
        planes: float32 [3, n, s, s], changed in place.
        shift: float32 [n].
    """
    red, green, blue = planes
    largest = torch.maximum(red, green).clamp_(min=blue)
    chroma = torch.minimum(red, green).clamp_(max=blue).neg_().add_(largest)
    distance = green.add(blue).sub_(red).sub_(largest).div_(chroma.clamp(min=_TINY)).add_(2)
    turn = distance.copysign_(green.sub(blue)).mul_(1 / 6).add_(shift[:, None, None])
    poles = torch.arange(3, device=planes.device, dtype=planes.dtype).div_(3)
    torch.sub(turn, poles[:, None, None, None], out=planes)
    planes.sub_(planes.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
    planes.mul_(chroma).neg_().add_(largest)


def blur(planes: Tensor, taps: Tensor, reached: Sequence[int]) -> Tensor:
    """Separable symmetric convolution with a kernel per sample, the image reflected at its edges.

    Args:
        planes: float32 [3, n, s, s]; samples in descending order of kernel width.
        taps: float32 [radius + 1, n], weights by distance from the centre.
        reached: for each distance how many of the samples, counted from the first, have a weight worth adding.

    Returns:
        float32 [3, n, s, s].
    """
    for dim in (-1, -2):
        planes = _blur_along(planes, dim, taps[:, :, None, None], reached)
    return planes


def _blur_along(planes: Tensor, dim: int, taps: Tensor, reached: Sequence[int]) -> Tensor:
    radius, size = len(taps) - 1, planes.shape[dim]
    padded = pad(planes, (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius), mode="reflect")
    blurred = planes.mul(taps[0])
    for distance in range(1, radius + 1):
        num = reached[distance]
        if num == 0:
            break
        before = padded[:, :num].narrow(dim, radius - distance, size)
        after = padded[:, :num].narrow(dim, radius + distance, size)
        blurred[:, :num].addcmul_(before + after, taps[distance, :num])
    return blurred
