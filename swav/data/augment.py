"""Flip, colour distortion, blur and normalisation of whole batches, on the device (appendix A.2, which follows SimCLR).

Every draw is made on the host and belongs to (seed, epoch, sample id, crop number), so what a sample becomes does not
depend on its batch, the world size or the device. Nothing waits for the device.

Shape letters: ``C`` crops of a group, ``B`` samples, ``N = C * B`` crops, crop-major, ``n`` crops done at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav import rng
from swav.config import COLOUR_MEAN, COLOUR_STD, AugmentConfig
from swav.data import colour
from swav.data.batch import CropBatch, RawBatch

_NUM_DRAWS = 10
_ORDERS = np.array(list(permutations(range(4))))  # of brightness, contrast, saturation, hue
_HUE_PLACE = np.argmax(_ORDERS == 3, axis=1)
_BLEND_ORDERS = _ORDERS[_ORDERS != 3].reshape(-1, 3)
_NO_JITTER = 4  # as a hue place: after all
_NEGLIGIBLE = 1e-7  # a blur weight, relative to the centre's, below float32's resolution
# Values done at a time. Small enough for a CPU's cache; some 300 MB on a GPU.
_CHUNK_VALUES = {"cpu": 3 * 2**18, "cuda": 2**24}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is done to the crops of one group."""

    flip: NDArray[np.bool_]  # [N]
    hue_place: NDArray[np.int64]  # [N], how many of the three blends come before hue; _NO_JITTER: no colour change
    blends: NDArray[np.float32]  # [3, 3, N]: first to third blend; keep, grey share, mean share
    hue: NDArray[np.float32]  # [N]
    grey: NDArray[np.bool_]  # [N]
    sigma: NDArray[np.float64]  # [N], 0: no blur


class Augment:
    """Turns raw crops into what the model sees: ``augment(raw) -> CropBatch``.

    In this order, each per crop: horizontal flip; with ``jitter_probability`` brightness, contrast and saturation by
    factors in 1 +- 0.8 * strength and hue by +- 0.2 * strength (of the circle), in a random order, each clamped to
    0..1 (torchvision's definitions); grey; Gaussian blur with sigma uniform in ``blur_sigma`` and SimCLR's kernel,
    which has ``(size_px // 10) // 2`` taps on each side (11 for 224, 4 for 96, 1 for 32, and so no blur below 20);
    normalisation.

    Differs: the blur reflects the image at its edges; SimCLR's pads with zeros, which darkens the border.
    """

    def __init__(
        self, config: AugmentConfig, *, seed: int, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = torch.device(device)
        self.channels_last = channels_last
        std = torch.tensor(COLOUR_STD)
        self._scale = (1 / std).view(3, 1, 1, 1).to(self.device)
        self._shift = (-torch.tensor(COLOUR_MEAN) / std).view(3, 1, 1, 1).to(self.device)

    def __call__(self, raw: RawBatch) -> CropBatch:
        """Augment one batch; CUDA work is queued, not waited for.

        Returns:
            float32 [C * B, 3, size, size] per group, crop-major, in channels-last memory if so asked.
        """
        crops, first_crop = [], 0
        for group in raw.crops:
            pixels = group.permute(0, 1, 3, 4, 2).flatten(0, 1).to(self.device, non_blocking=True)
            plan = self._plan(raw, range(first_crop, first_crop + len(group)), group.shape[-1])
            crops.append(self._apply(pixels, plan))
            first_crop += len(group)
        labels = None
        if raw.labels is not None:
            labels = torch.from_numpy(raw.labels).to(self.device, non_blocking=True)
        return CropBatch(
            crops=crops,
            epoch=raw.epoch,
            global_offset=raw.global_offset,
            global_size=raw.global_size,
            labels=labels,
        )

    def _plan(self, raw: RawBatch, crop_numbers: range, size_px: int) -> _Plan:
        keys = [rng.key(self.seed, "augment", raw.epoch, crop) for crop in crop_numbers]
        draws = np.concatenate([rng.uniforms(key, raw.ids, _NUM_DRAWS) for key in keys]).T
        config = self.config
        jitter = draws[1] < (config.jitter_probability if config.jitter_strength > 0 else 0)
        strength = 0.8 * config.jitter_strength
        low = max(0.0, 1 - strength)
        factors = low + (1 + strength - low) * draws[2:5]
        order = (draws[6] * len(_ORDERS)).astype(np.int64)
        place = np.argsort(_BLEND_ORDERS, axis=1)[order].T  # [3, N], when each of the three blends has its turn
        everyone = np.arange(draws.shape[1])
        blends = np.zeros((3, 3, draws.shape[1]), dtype=np.float32)
        for operation, share in enumerate((None, 2, 1)):  # brightness, contrast, saturation
            blends[place[operation], 0, everyone] = factors[operation]
            if share is not None:
                blends[place[operation], share, everyone] = 1 - factors[operation]
        low, high = config.blur_sigma
        blurred = (draws[8] < config.blur_probability) & (_radius(size_px) > 0)
        return _Plan(
            flip=draws[0] < config.flip_probability,
            hue_place=np.where(jitter, _HUE_PLACE[order], _NO_JITTER),
            blends=blends,
            hue=((2 * draws[5] - 1) * 0.2 * config.jitter_strength).astype(np.float32),
            grey=draws[7] < config.grayscale_probability,
            sigma=np.where(blurred, low + (high - low) * draws[9], 0.0),
        )

    def _apply(self, pixels: Tensor, plan: _Plan) -> Tensor:
        """Augment uint8 [N, s, s, 3] into float32 [N, 3, s, s]."""
        num, size = pixels.shape[:2]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        out = torch.empty((num, 3, size, size), device=self.device, memory_format=layout)
        for flipped, members in _chunks(plan, _CHUNK_VALUES[self.device.type] // (3 * size * size)):
            hue_place = plan.hue_place[members]
            grey = np.flatnonzero(plan.grey[members])
            blurred = np.flatnonzero(plan.sigma[members])
            blurred = blurred[np.argsort(-plan.sigma[members][blurred], kind="stable")]
            taps = _taps(plan.sigma[members][blurred], _radius(size))
            reached = (taps > _NEGLIGIBLE * taps[0]).sum(axis=1).tolist()
            on_device = self._move(
                members, plan.blends[:, :, members], plan.hue[members], grey, blurred, taps.astype(np.float32)
            )
            rows, blends, hue, grey_rows, blurred_rows, device_taps = on_device
            planes = _planes(pixels.index_select(0, rows), flipped)
            _jitter(planes, hue_place, blends, hue)
            if len(grey):
                luma = colour.grey(planes.index_select(1, grey_rows))
                planes.index_copy_(1, grey_rows, luma.expand(3, -1, -1, -1))
            if len(blurred):
                planes.index_copy_(
                    1, blurred_rows, colour.blur(planes.index_select(1, blurred_rows), device_taps, reached)
                )
            planes.mul_(self._scale).add_(self._shift)
            if self.channels_last:
                out.permute(0, 2, 3, 1).index_copy_(0, rows, planes.permute(1, 2, 3, 0).contiguous())
            else:
                out.index_copy_(0, rows, planes.transpose(0, 1))
        return out

    def _move(self, *arrays: NDArray[np.generic]) -> list[Tensor]:
        """Bring small host arrays to the device, all in one copy."""
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if self.device.type == "cpu":
            return tensors
        sizes = [-(-tensor.nbytes // 8) * 8 for tensor in tensors]
        packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        starts = np.cumsum([0, *sizes]).tolist()
        for start, tensor in zip(starts, tensors, strict=False):
            packed[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        moved = packed.to(self.device, non_blocking=True)
        return [
            moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]


def _chunks(plan: _Plan, num_at_once: int) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    """Divide the crops into runs of which all or none are flipped, each ordered by when hue has its turn."""
    for flipped in (False, True):
        members = np.flatnonzero(plan.flip == flipped)
        members = members[np.argsort(plan.hue_place[members], kind="stable")]
        step = max(1, num_at_once)
        for start in range(0, len(members), step):
            yield flipped, members[start : start + step]


def _planes(pixels: Tensor, flipped: bool) -> Tensor:
    """uint8 [n, s, s, 3] to float32 planes [3, n, s, s] in 0..1."""
    planes = torch.empty((3, *pixels.shape[:3]), device=pixels.device, dtype=torch.float32).copy_(
        pixels.permute(3, 0, 1, 2)
    )
    return (planes.flip(-1) if flipped else planes).mul_(1 / 255)


def _jitter(planes: Tensor, hue_place: NDArray[np.int64], blends: Tensor, hue: Tensor) -> None:
    """Brightness, contrast, saturation and hue, each sample in its own order; samples are sorted by ``hue_place``."""
    ends: Sequence[int] = np.searchsorted(hue_place, np.arange(_NO_JITTER + 1)).tolist()
    num = ends[_NO_JITTER]
    for turn in range(_NO_JITTER):
        start, end = ends[turn], ends[turn + 1]
        if end > start:
            colour.shift_hue(planes[:, start:end], hue[start:end])
        if num and turn < 3:
            colour.blend(planes[:, :num], *blends[turn, :, :num])


def _radius(size_px: int) -> int:
    return size_px // 10 // 2


def _taps(sigma: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Gaussian weights by distance from the centre, [radius + 1, n]; both sides and the centre sum to 1."""
    weights = np.exp(-0.5 * (np.arange(radius + 1)[:, None] / sigma) ** 2)
    total: NDArray[np.float64] = weights / (2 * weights.sum(axis=0) - weights[0])
    return total
