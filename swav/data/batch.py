"""What travels from the loader to the method."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NO_LABEL = -100  # what torch's cross-entropy ignores


@dataclass(frozen=True, slots=True)
class RawBatch:
    """One rank's share of a global batch: cropped and resized, colour untouched.

    This is the seam at which another decoder and cropper, for example a fused native kernel, can be put in.
    """

    crops: list[Tensor]  # per crop group: uint8 [num_crops, B, 3, size, size], channels-last in memory
    ids: NDArray[np.int64]  # [B], the samples that the order asked for
    substituted: NDArray[np.bool_]  # [B], true where a broken sample was replaced by a neighbour
    epoch: int
    step: int  # of the epoch
    global_offset: int  # where this share starts in the global batch
    global_size: int  # samples in the global batch
    labels: NDArray[np.int64] | None = None  # [B, sets], NO_LABEL where there is none


@dataclass(frozen=True, slots=True)
class CropBatch:
    """One rank's share of a global batch, augmented, on the device."""

    crops: list[Tensor]  # per crop group: float32 [num_crops * B, 3, size, size], crop-major
    epoch: int
    global_offset: int
    global_size: int
    labels: Tensor | None = None  # int64 [B, sets]
