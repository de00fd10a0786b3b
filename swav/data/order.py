"""The order of an epoch's samples: a pure function of the seed, the epoch and the position.

Rows are grouped into chunks of neighbouring rows of one shard, so that reading stays local. The epoch's order of
chunks is a keyed permutation; lane l owns the chunks at its positions l, l + L, l + 2L, ...; inside a lane, the rows of
every window of some chunks are permuted again. A step takes equally many consecutive rows of every lane, and a rank
takes whole lanes, so the global batch is the same for any number of ranks, and a rank reads only its own lanes. The
lanes' windows are staggered, so that a rank's lanes, and all ranks, need new chunks at different steps.

Nothing here is a state: every batch is computed from its number, in time that does not depend on the position and in
memory that depends on the number of shards, not of samples.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from swav import rng
from swav.data import feistel
from swav.partition import share

Ids = NDArray[np.int64]

_SUBSTITUTES_PER_SHARD = 16  # before the next shard is tried
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: any run of its multiples is spread evenly, modulo 2^64
_TURNS = 1 << 32  # a power of two above any lane's rows and with them below 2^63


class EpochOrder:
    """One epoch's batches.

    All batches have the global batch's size where the samples divide into such batches. Otherwise the last two share
    what is left evenly, as a tiny last batch would harm Sinkhorn and batch norm; each then has at least half the size.
    A dataset smaller than one batch is one batch. Every sample comes exactly once.

    The first steps take equally many rows of every lane. Lanes differ in length, so the last steps take of every lane
    in proportion to what it has left: they too mix all lanes, and a rank reads about its own.
    """

    def __init__(
        self,
        rows_per_shard: Ids,
        *,
        chunk_rows: int,
        seed: int,
        epoch: int,
        global_batch: int,
        num_lanes: int,
        window_chunks: int,
    ) -> None:
        """Prepare an epoch; costs O(shards).

        Args:
            rows_per_shard: int64 [shards]; 0 is allowed.
            chunk_rows: rows of a chunk; a shard's last chunk may have fewer.
            seed: the run's seed.
            epoch: from 0.
            global_batch: samples per step over all ranks.
            num_lanes: most ranks that can take part; divides ``global_batch``.
            window_chunks: chunks of a lane whose rows are permuted together; a lane's first and last window have from
                half to one and a half as many.

        Raises:
            ValueError: there are no samples, lanes do not divide the batch, or a size is below 1.
        """
        if min(chunk_rows, global_batch, num_lanes, window_chunks) < 1:
            raise ValueError(
                "chunk_rows, global_batch, num_lanes and window_chunks must be at least 1, got "
                f"{chunk_rows}, {global_batch}, {num_lanes} and {window_chunks}"
            )
        if global_batch % num_lanes:
            raise ValueError(f"{num_lanes} lanes do not divide the global batch {global_batch}; choose a divisor")
        rows = np.asarray(rows_per_shard, dtype=np.int64)
        if rows.size == 0 or rows.min() < 0 or rows.sum() == 0:
            raise ValueError(f"an epoch needs samples, and {rows.size} shards hold {int(rows.sum())}")
        self._chunk_rows, self._batch, self._lanes = chunk_rows, global_batch, num_lanes
        self._window_chunks = window_chunks
        self._chunk_key = np.array([rng.key(seed, "chunk order", epoch)], dtype=np.uint64)
        self._window_key = np.uint64(rng.key(seed, "window order", epoch))
        self._stagger_key = np.uint64(rng.key(seed, "window stagger", epoch))
        self._row_offsets = np.concatenate([[0], np.cumsum(rows)])
        self._chunk_offsets = np.concatenate([[0], np.cumsum(-(-rows // chunk_rows))])
        self._num_chunks = np.array([self._chunk_offsets[-1]])
        self._find_short_chunks(rows)
        self.num_samples = int(self._row_offsets[-1])
        self.num_steps = -(-self.num_samples // global_batch)
        self._stagger_windows()
        self._plan_tail()

    def batch_size(self, step: int) -> int:
        """Samples in the global batch of a step.

        Raises:
            ValueError: the epoch has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside this epoch's {self.num_steps} steps")
        start, end = self._tail_range(step) if step >= self._lane_steps else (0, self._batch)
        return end - start

    def batch(self, step: int) -> Ids:
        """The global batch of a step: sample ids, int64 [batch_size(step)]."""
        return self.rank_batch(step, 0, 1)[0]

    def rank_batch(self, step: int, rank: int, world_size: int) -> tuple[Ids, int]:
        """One rank's part of the global batch.

        Returns:
            Sample ids, int64 [n], and where they start in the global batch.

        Raises:
            ValueError: see :meth:`check_world`; or the epoch has no such step.
        """
        first, end = self.rank_range(step, rank, world_size)
        places = np.arange(first, end)
        if step >= self._lane_steps:
            return self._tail_rows(step, places), first
        lanes, rows = np.divmod(places, self._batch // self._lanes)
        return self._ids(lanes, rows + step * (self._batch // self._lanes)), first

    def lane_batches(self, lane: int, first_step: int, end_step: int) -> Ids:
        """What the rank of one lane gets in some steps, in a world that has a rank for every lane.

        Returns:
            Sample ids, int64 [n], in the order of the steps.

        Raises:
            ValueError: the epoch has no such step.
        """
        rows = self._batch // self._lanes
        numbers = np.arange(first_step * rows, min(end_step, self._lane_steps) * rows)
        parts = [(np.full_like(numbers, lane), numbers)]
        parts += [
            self._tail_places(step, np.arange(*self._lane_range(step, lane, lane + 1)))
            for step in range(max(first_step, self._lane_steps), end_step)
        ]
        lanes, places = (np.concatenate(part) for part in zip(*parts, strict=True))
        return self._ids(lanes, places)

    def rank_range(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Where one rank's part of the global batch starts and ends in it.

        Raises:
            ValueError: as for :meth:`rank_batch`.
        """
        self.check_world(world_size)
        return self._lane_range(step, *share(self._lanes, rank, world_size))

    def check_world(self, world_size: int) -> None:
        """Refuse a world that this order cannot feed.

        Raises:
            ValueError: there are more ranks than lanes, or one has no sample in the smallest batch.
        """
        if world_size > self._lanes:
            raise ValueError(
                f"{world_size} ranks are more than {self._lanes} lanes; raise data.lanes (a divisor of the global "
                f"batch {self._batch} is used) or use at most {self._lanes} ranks"
            )
        if not self._feeds(world_size):
            most = next(ranks for ranks in range(world_size - 1, 0, -1) if self._feeds(ranks))
            raise ValueError(
                f"the smallest batch of the epoch has {self.batch_size(self.num_steps - 1)} samples "
                f"({self.num_samples} samples in batches of {self._batch}), too few for {world_size} ranks; use at "
                f"most {most} ranks"
            )

    def _feeds(self, world_size: int) -> bool:
        """Whether every rank has a sample in every batch."""
        first_lanes = np.arange(world_size + 1) * self._lanes // world_size
        return bool(np.diff(self.batch_size(self.num_steps - 1) * first_lanes // self._lanes).all())

    def _lane_range(self, step: int, first_lane: int, end_lane: int) -> tuple[int, int]:
        """The places in a batch that belong to some lanes: to each an equal share, to one sample."""
        size = self.batch_size(step)
        return size * first_lane // self._lanes, size * end_lane // self._lanes

    def _find_short_chunks(self, rows: Ids) -> None:
        """Find in which lane, and where in it, the chunks with fewer rows than the others stand."""
        missing = -rows % self._chunk_rows
        short = np.flatnonzero(missing)
        chunks = self._chunk_offsets[short + 1] - 1
        positions = feistel.invert(chunks, self._num_chunks, self._chunk_key)
        self._stride = -(-int(self._num_chunks[0]) // self._lanes) + 1
        places = positions % self._lanes * self._stride + positions // self._lanes
        order = np.argsort(places)
        self._short_places = places[order]
        self._short_missing = np.concatenate([[0], np.cumsum(missing[short][order])])

    def _stagger_windows(self) -> None:
        """Settle where each lane's windows start: every ``window_chunks`` from a phase of its own.

        Were the phases equal, all lanes would need a new window's chunks at the same step. Windows of less than half
        the width at a lane's ends would mix too little, so they are left to their neighbours.
        """
        lanes, width = np.arange(self._lanes), self._window_chunks
        self._lane_chunks = (self._num_chunks[0] - lanes + self._lanes - 1) // self._lanes
        turns = (lanes.astype(np.uint64) * _GOLDEN + self._stagger_key) >> np.uint64(32)
        phases = (turns * np.uint64(width) >> np.uint64(32)).astype(np.int64)
        half = (width + 1) // 2
        # window w > 0 of a lane starts at its chunk base + w * width
        self._window_base = np.where(phases < half, phases, phases - width)
        self._last_window = np.maximum((self._lane_chunks - half - self._window_base) // width, 0)

    def _plan_tail(self) -> None:
        """Settle how many steps take equally many rows of every lane, and how many rows each lane has left."""
        lanes = np.arange(self._lanes)
        lane_rows = self._rows_before(lanes, self._lane_chunks)
        rows = self._batch // self._lanes
        steps = int(lane_rows.min()) // rows
        if self.num_samples % self._batch:  # the last two batches, or the only one, come from the rest
            steps = min(steps, max(self.num_steps - 2, 0))
        self._lane_steps = steps
        self._left = lane_rows - steps * rows  # [L]
        self._num_left = int(self._left.sum())
        self._taken_before: dict[int, Ids] = {}

    def _tail_range(self, step: int) -> tuple[int, int]:
        """The positions of a step in the rest."""
        total = self._num_left
        start = (step - self._lane_steps) * self._batch
        if self.num_samples % self._batch == 0 or step < self.num_steps - 2:
            return start, start + self._batch
        if self.num_steps == 1:
            return 0, total
        last_two = (self.num_steps - 2 - self._lane_steps) * self._batch
        middle = last_two + (total - last_two + 1) // 2
        return (last_two, middle) if step == self.num_steps - 2 else (middle, total)

    def _tail_rows(self, step: int, places: Ids) -> Ids:
        """The samples at the given places of a batch that takes unequally many rows of the lanes."""
        return self._ids(*self._tail_places(step, places))

    def _tail_places(self, step: int, places: Ids) -> tuple[Ids, Ids]:
        """The lanes of the given places of such a batch, and the rows in them."""
        start, end = (self._taken(position) for position in self._tail_range(step))
        lane_places = np.concatenate([[0], np.cumsum(end - start)])
        lanes = np.searchsorted(lane_places, places, side="right") - 1
        return lanes, self._lane_steps * (self._batch // self._lanes) + start[lanes] + places - lane_places[lanes]

    def _taken(self, position: int) -> Ids:
        """How many of each lane's rows that are left stand before a position of the rest, int64 [L].

        A lane's i-th row has its turn at the time i / (rows left in the lane); rows of one turn go by lane.
        """
        if position in self._taken_before:
            return self._taken_before[position]
        low, high = 0, _TURNS
        while low < high:
            middle = (low + high + 1) // 2
            fits = int((self._left * middle // _TURNS).sum()) <= position
            low, high = (middle, high) if fits else (low, middle - 1)
        taken: Ids = self._left * low // _TURNS
        next_turn = self._left * (low + 1) // _TURNS > taken
        taken += next_turn & (np.cumsum(next_turn) <= position - taken.sum())
        self._taken_before[position] = taken  # all lanes ask for the same; there are few such steps
        return taken

    def _rows_before(self, lanes: Ids, chunks: Ids) -> Ids:
        """Rows of a lane before its chunk of that number, int64 [n]."""
        places = lanes * self._stride
        before = np.searchsorted(self._short_places, places + chunks)
        missing = self._short_missing[before] - self._short_missing[np.searchsorted(self._short_places, places)]
        rows: Ids = chunks * self._chunk_rows - missing
        return rows

    def _ids(self, lanes: Ids, rows: Ids) -> Ids:
        """The samples at the given rows of the given lanes, int64 [n]."""
        width, base, last = self._window_chunks, self._window_base[lanes], self._last_window[lanes]
        earliest = np.maximum((rows // self._chunk_rows - base) // width, 0)
        windows = self._last_not_after(lanes, rows, earliest, last, base, width)
        first_chunks = np.where(windows == 0, 0, base + windows * width)
        end_chunks = np.where(windows == last, self._lane_chunks[lanes], base + (windows + 1) * width)
        starts = self._rows_before(lanes, first_chunks)
        sizes = self._rows_before(lanes, end_chunks) - starts
        keys = feistel.mix(feistel.mix(lanes.astype(np.uint64) + self._window_key) + windows.astype(np.uint64))
        shuffled = starts + feistel.permute(rows - starts, sizes, keys)
        own_chunks = self._last_not_after(lanes, shuffled, first_chunks, end_chunks - 1, np.zeros_like(base), 1)
        inside = shuffled - self._rows_before(lanes, own_chunks)
        chunk_ids = feistel.permute(own_chunks * self._lanes + lanes, self._num_chunks, self._chunk_key)
        shards = np.searchsorted(self._chunk_offsets, chunk_ids, side="right") - 1
        first_rows = self._row_offsets[shards] + (chunk_ids - self._chunk_offsets[shards]) * self._chunk_rows
        ids: Ids = first_rows + inside
        return ids

    def _last_not_after(self, lanes: Ids, rows: Ids, low: Ids, high: Ids, base: Ids, width: int) -> Ids:
        """The largest i in low..high with i = low or chunk ``base + i * width`` of the lane at or before the row."""
        low, high = np.minimum(low, high), high.copy()
        open_ = np.flatnonzero(low < high)
        while open_.size:
            middle = (low[open_] + high[open_] + 1) // 2
            fits = self._rows_before(lanes[open_], base[open_] + middle * width) <= rows[open_]
            low[open_] = np.where(fits, middle, low[open_])
            high[open_] = np.where(fits, high[open_], middle - 1)
            open_ = open_[low[open_] < high[open_]]
        return low


def substitutes(row_offsets: Ids, sample_id: int) -> Iterator[int]:
    """All other samples, the likeliest first: replacements for a broken one.

    First come the next rows of the sample's shard, from its end around to its start. After some of them come as many of
    the next shard, and so on around all shards: where a whole shard is broken, or a sample is alone in its shard, a
    replacement is near all the same.

    Args:
        row_offsets: int64 [shards + 1], each shard's first id, and the number of samples.
        sample_id: the broken sample.
    """
    own = int(np.searchsorted(row_offsets, sample_id, side="right")) - 1
    num_shards = len(row_offsets) - 1
    for first in range(0, int(np.diff(row_offsets).max()), _SUBSTITUTES_PER_SHARD):
        for turn in range(num_shards):
            shard = (own + turn) % num_shards
            start, rows = int(row_offsets[shard]), int(row_offsets[shard + 1] - row_offsets[shard])
            skipped, offset = (1, sample_id + 1 - start) if shard == own else (0, 0)
            for row in range(first, min(first + _SUBSTITUTES_PER_SHARD, rows - skipped)):
                yield start + (offset + row) % rows
