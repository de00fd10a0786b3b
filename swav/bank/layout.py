"""How an epoch's features are cut into segments: by the order alone, whatever the world that computes them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swav.config import PretrainConfig
from swav.data.epochs import EpochStretch, epoch_order
from swav.data.index import DatasetIndex
from swav.data.order import EpochOrder

_OPEN_BYTES = 1 << 29  # of the segments that are being written, over all ranks
_MAX_STEPS = 1024


@dataclass(frozen=True, eq=False)
class BankLayout:
    """The segments of one epoch's features.

    A segment holds what one lane of the order gives in a block of steps, row by row as the order has them, so that no
    ids need be stored; a rank that owns a lane writes all of it. Segments are numbered block by block, lane by lane.

    Attributes:
        order: of the epoch whose features they are.
        data_identity: of the images.
        num_lanes: of that order.
        num_crops: features of each sample.
        dim: of a feature.
        steps: of a block; the last one may have fewer.
        rows: int64 [blocks, lanes], samples in each segment.
    """

    order: EpochOrder | EpochStretch
    data_identity: str
    num_lanes: int
    num_crops: int
    dim: int
    steps: int
    rows: NDArray[np.int64]

    @property
    def num_segments(self) -> int:
        """Of all blocks and lanes."""
        return self.rows.size

    def place(self, segment: int) -> tuple[int, int]:
        """The block and the lane of a segment."""
        return divmod(segment, self.num_lanes)

    def num_rows(self, segment: int) -> int:
        """Samples in a segment."""
        return int(self.rows[self.place(segment)])

    def ids(self, segment: int) -> NDArray[np.int64]:
        """The samples of a segment's rows, int64 [rows]."""
        block, lane = self.place(segment)
        first = block * self.steps
        return self.order.lane_batches(lane, first, min(first + self.steps, self.order.num_steps))

    def name(self, segment: int) -> str:
        """Of a segment's file."""
        block, lane = self.place(segment)
        return f"segment-{block:06d}-{lane:05d}.npy"


def bank_layout(config: PretrainConfig, index: DatasetIndex, order_epoch: int) -> BankLayout:
    """The segments of the features that a run computes over one epoch's images.

    Args:
        config: the run.
        index: its images.
        order_epoch: the epoch whose order they come in.
    """
    order, lanes = epoch_order(config, index, order_epoch), config.num_lanes
    num_crops, dim = config.crops[0].num_crops, config.model.embedding_dim
    steps = min(_MAX_STEPS, max(1, _OPEN_BYTES // (config.optim.global_batch * num_crops * dim * 2)))
    sizes = np.array([order.batch_size(step) for step in range(order.num_steps)])
    bounds = np.arange(lanes + 1)
    rows = np.zeros((-(-order.num_steps // steps), lanes), dtype=np.int64)
    for block, first in enumerate(range(0, order.num_steps, steps)):
        for size, count in zip(*np.unique(sizes[first : first + steps], return_counts=True), strict=True):
            rows[block] += np.diff(size * bounds // lanes) * count
    return BankLayout(order, index.identity, lanes, num_crops, dim, steps, rows)


def is_forward_pass(config: PretrainConfig, epoch: int) -> bool:
    """Whether an epoch's labels are made of features that a pass of their own computes.

    The first epoch has no other. Where epochs are stretches of a pass that is never finished, no other has seen the
    images that are to be labelled.
    """
    return epoch == 0 or config.data.epoch_images is not None


def order_epoch_of(config: PretrainConfig, epoch: int) -> int:
    """The epoch in whose order the features for an epoch's labels come: the one before, or the epoch itself."""
    return epoch if is_forward_pass(config, epoch) else epoch - 1
