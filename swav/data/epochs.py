"""A run's epochs: passes over all images, or stretches of so many images where no pass is ever finished."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from swav.config import PretrainConfig
from swav.data.index import DatasetIndex
from swav.data.order import EpochOrder, Ids


def epoch_order(config: PretrainConfig, index: DatasetIndex, epoch: int) -> "EpochOrder | EpochStretch":
    """In which order the images of a run's epoch come.

    Args:
        config: the run.
        index: its images.
        epoch: of the run, from 0.

    Raises:
        ValueError: as for :class:`swav.data.order.EpochOrder`.
    """

    def order_of_pass(number: int) -> EpochOrder:
        return EpochOrder(
            index.rows_per_shard,
            chunk_rows=index.chunk_rows,
            seed=config.seed,
            epoch=number,
            global_batch=config.optim.global_batch,
            num_lanes=config.num_lanes,
            window_chunks=config.data.window_chunks,
        )

    if config.data.epoch_images is None:
        return order_of_pass(epoch)
    return EpochStretch(order_of_pass, epoch, config.data.epoch_images // config.optim.global_batch)


class EpochStretch:
    """An epoch of a stated number of batches, cut out of one pass after another.

    It has the interface of :class:`swav.data.order.EpochOrder`, which says what its methods do.
    """

    def __init__(self, order_of_pass: Callable[[int], EpochOrder], epoch: int, num_steps: int) -> None:
        """Prepare.

        Args:
            order_of_pass: the order of a pass over all images, by its number.
            epoch: from 0.
            num_steps: batches of every epoch.
        """
        self._order_of_pass = lru_cache(maxsize=2)(order_of_pass)
        self._steps_per_pass = order_of_pass(0).num_steps
        self._first_step = epoch * num_steps
        self.num_steps = num_steps
        self.num_samples = self._count()

    def batch_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        order, inner = self._find(step)
        return order.batch_size(inner)

    def rank_batch(self, step: int, rank: int, world_size: int) -> tuple[Ids, int]:
        """One rank's part of the global batch: sample ids, and where they start in it."""
        order, inner = self._find(step)
        return order.rank_batch(inner, rank, world_size)

    def rank_range(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Where one rank's part of the global batch starts and ends in it."""
        order, inner = self._find(step)
        return order.rank_range(inner, rank, world_size)

    def lane_batches(self, lane: int, first_step: int, end_step: int) -> Ids:
        """What the rank of one lane gets in some steps, in a world that has a rank for every lane."""
        parts, step = [np.empty(0, dtype=np.int64)], first_step
        while step < end_step:
            order, inner = self._find(step)
            num = min(end_step - step, order.num_steps - inner)
            parts.append(order.lane_batches(lane, inner, inner + num))
            step += num
        return np.concatenate(parts)

    def check_world(self, world_size: int) -> None:
        """Refuse a world that this order cannot feed."""
        self._order_of_pass(0).check_world(world_size)

    def _find(self, step: int) -> tuple[EpochOrder, int]:
        """The pass that a step is of, and its number there."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside this epoch's {self.num_steps} steps")
        number, inner = divmod(self._first_step + step, self._steps_per_pass)
        return self._order_of_pass(number), inner

    def _count(self) -> int:
        """All batches have one size, but for the last two of a pass."""
        order = self._order_of_pass(0)
        first = self._first_step % self._steps_per_pass
        passes, last = divmod(first + self.num_steps, self._steps_per_pass)
        return passes * order.num_samples + _samples_before(order, last) - _samples_before(order, first)


def _samples_before(order: EpochOrder, end_step: int) -> int:
    """Samples in the batches of a pass before one."""
    irregular = range(max(0, order.num_steps - 2), end_step)
    regular = end_step - len(irregular)
    return regular * (order.batch_size(0) if regular else 0) + sum(order.batch_size(step) for step in irregular)
