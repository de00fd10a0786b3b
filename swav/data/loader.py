"""Samples to batches of raw crops: one process per rank, N threads, every pixel a function of its sample.

A thread reads a sample, decodes it once and cuts all its crops straight into the batch; the order is known, so the
reader is told ahead what will be asked of it. Decoding and resizing run without the GIL. The threads stay off torch's
intra-op pool (see :func:`swav.data.multicrop.cut_crops`), so neither they nor ``torch.set_num_threads`` in the main
thread disturb one another.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav.config import CropConfig
from swav.data.batch import NO_LABEL, RawBatch
from swav.data.decode import BrokenImageError, decode_image
from swav.data.multicrop import crop_boxes, crop_draws, cut_crops
from swav.data.reader import ChecksumError

_MAX_SAMPLES_PER_TASK = 16  # handing over a task costs as much as cutting one or two small crops

# Sample ids, int64 [n], to labels, int64 [n, sets], with NO_LABEL where there is none; called from several threads.
LabelSource = Callable[[NDArray[np.int64]], NDArray[np.int64]]

_logger = logging.getLogger(__name__)


class SampleReader(Protocol):
    """What the loader needs of :class:`swav.data.reader.ShardReader`; called from many threads at once."""

    def image(self, sample_id: int, /) -> bytes:
        """The encoded image."""

    def name(self, sample_id: int, /) -> str:
        """The sample's name for messages."""

    def prefetch(self, ids: NDArray[np.int64], /) -> bool:
        """Begin to fetch samples; false when it has enough to do."""

    def abandon(self) -> None:
        """Give up what it is fetching."""


class SampleOrder(Protocol):
    """What the loader needs of :class:`swav.data.order.EpochOrder`."""

    @property
    def num_steps(self) -> int:
        """Batches of the epoch."""

    def batch_size(self, step: int, /) -> int:
        """Samples of the global batch."""

    def rank_batch(self, step: int, rank: int, world_size: int, /) -> tuple[NDArray[np.int64], int]:
        """A rank's sample ids, and where they start in the global batch."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that could not be read or decoded, and is left out of an epoch."""

    epoch: int
    step: int
    sample_id: int
    name: str
    reason: str


class _NoSubstituteError(Exception):
    """No sound image was found in the place of a broken one, as far as it was looked for."""

    def __init__(self, broken: list[Quarantined]) -> None:
        super().__init__()
        self.broken = broken


@dataclass(frozen=True, slots=True)
class _Share:
    """A rank's samples of a step."""

    step: int
    ids: NDArray[np.int64]
    offset: int  # in the global batch


class _ReadAhead:
    """The shares of coming steps, which the reader fetches ahead as far as it can."""

    def __init__(self, reader: SampleReader, shares: Iterator[_Share], num_batches: int) -> None:
        self._reader, self._shares, self._num_batches = reader, shares, num_batches
        self._asked: deque[_Share] = deque()
        self._refused = False  # of the last one, the reader has not taken all yet

    def take(self) -> _Share | None:
        """The next share; None at the end."""
        self._ask()
        if not self._asked:
            return next(self._shares, None)
        if len(self._asked) == 1:
            self._refused = False
        return self._asked.popleft()

    def _ask(self) -> None:
        if self._refused:
            self._refused = not self._reader.prefetch(self._asked[-1].ids)
        while not self._refused and len(self._asked) <= self._num_batches:
            share = next(self._shares, None)
            if share is None:
                return
            self._asked.append(share)
            self._refused = not self._reader.prefetch(share.ids)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch in the making; each task gives the broken samples that it met."""

    batch: RawBatch
    tasks: list[Future[list[Quarantined]]]
    labels: Future[NDArray[np.int64]] | None

    def labelled(self) -> RawBatch:
        """The batch with its labels; an image in the place of a broken one has none."""
        if self.labels is None:
            return self.batch
        labels = self.labels.result().copy()
        labels[self.batch.substituted] = NO_LABEL
        return replace(self.batch, labels=labels)


@dataclass(frozen=True)
class Loader:
    """Streams one rank's share of every global batch, in step order.

    Every batch is newly allocated and belongs to whoever takes it, for as long as they like. Pinned memory comes from
    torch's caching host allocator, which reuses a block only after the copies to the device that read it. At most
    ``prefetch_batches + 1`` batches are in the making, besides those that the caller keeps. Nothing is read and no
    thread starts before an epoch is iterated.

    Raises:
        ValueError: a number is out of range.
    """

    reader: SampleReader
    order_of_epoch: Callable[[int], SampleOrder]
    crops: Sequence[CropConfig]
    _: KW_ONLY
    substitutes: Callable[[int], Iterable[int]]  # for a broken sample, those to try in its place, in a fixed order
    seed: int
    num_threads: int = 1  # that decode and cut
    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False  # for copies to a GPU that nobody waits for
    prefetch_batches: int = 2  # how far to work ahead of the caller
    read_ahead_batches: int = 16  # how far to fetch ahead of that, where the reader fetches from a store
    max_quarantined: int | None = None  # broken samples that this rank bears in an epoch; None: any number
    budget_setting: str = "data.max_quarantined_fraction"  # what raises that number, for the message
    on_quarantine: Callable[[Quarantined], None] | None = None  # in the caller's thread, once per epoch and sample

    def __post_init__(self) -> None:
        ahead = min(self.prefetch_batches, self.read_ahead_batches)
        if self.num_threads < 1 or ahead < 0 or not 0 <= self.rank < self.world_size or not self.crops:
            raise ValueError(
                "a loader needs crops, num_threads >= 1, prefetch_batches and read_ahead_batches >= 0 and "
                f"0 <= rank < world_size, got {len(self.crops)} crop groups, {self.num_threads}, "
                f"{self.prefetch_batches}, {self.read_ahead_batches}, rank {self.rank} of {self.world_size}"
            )

    def epoch(self, epoch: int, start_step: int = 0, labels: LabelSource | None = None) -> Generator[RawBatch]:
        """Stream an epoch from a step on; the batches equal those of an uninterrupted epoch.

        A sample that is broken, or whose bytes do not have their checksum, is reported once, and its place goes to the
        first sound substitute, cut by the draws of the sample that it replaces. Leaving early, by ``close()`` or an
        exception, ends the threads and gives up what the reader is fetching.

        Raises:
            ValueError: the epoch has fewer than ``start_step`` steps.
            RuntimeError: while iterating: reading failed, no sample at all is sound, or more than ``max_quarantined``
                samples are broken.
        """
        order = self.order_of_epoch(epoch)
        if not 0 <= start_step <= order.num_steps:
            raise ValueError(f"cannot start at step {start_step} of an epoch of {order.num_steps} steps")
        return self._batches(order, epoch, start_step, labels)

    def _batches(
        self, order: SampleOrder, epoch: int, start_step: int, labels: LabelSource | None
    ) -> Generator[RawBatch]:
        quarantined: dict[int, Quarantined] = {}
        ahead = _ReadAhead(self.reader, self._shares(order, start_step), self.read_ahead_batches)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="swav-loader")
        pending: deque[_Pending] = deque()
        try:
            while True:
                while len(pending) <= self.prefetch_batches and (share := ahead.take()) is not None:
                    label = pool.submit(labels, share.ids) if labels is not None else None
                    pending.append(_Pending(*self._start(pool, stop, order, epoch, share), label))
                if not pending:
                    return
                first = pending.popleft()
                for task in first.tasks:
                    self._take(task, quarantined)
                yield first.labelled()
                del first  # before the next ones are allocated
        finally:
            stop.set()
            self.reader.abandon()
            pool.shutdown(wait=True, cancel_futures=True)

    def _shares(self, order: SampleOrder, start_step: int) -> Iterator[_Share]:
        for step in range(start_step, order.num_steps):
            yield _Share(step, *order.rank_batch(step, self.rank, self.world_size))

    def _start(
        self, pool: ThreadPoolExecutor, stop: threading.Event, order: SampleOrder, epoch: int, share: _Share
    ) -> tuple[RawBatch, list[Future[list[Quarantined]]]]:
        num = len(share.ids)
        batch = RawBatch(
            crops=[self._allocate(group, num) for group in self.crops],
            ids=share.ids,
            substituted=np.zeros(num, dtype=np.bool_),
            epoch=epoch,
            step=share.step,
            global_offset=share.offset,
            global_size=order.batch_size(share.step),
        )
        draws = crop_draws(self.seed, epoch, share.ids, self.crops)
        size = max(min(_MAX_SAMPLES_PER_TASK, -(-num // (4 * self.num_threads))), 1)
        tasks = [pool.submit(self._fill, batch, draws, range(num)[at : at + size], stop) for at in range(0, num, size)]
        return batch, tasks

    def _allocate(self, group: CropConfig, num: int) -> Tensor:
        shape = (group.num_crops, num, group.size_px, group.size_px, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory).permute(0, 1, 4, 2, 3)

    def _fill(
        self, batch: RawBatch, draws: NDArray[np.float64], places: range, stop: threading.Event
    ) -> list[Quarantined]:
        """Decode and cut the samples at some places of a batch (in a thread)."""
        broken: list[Quarantined] = []
        part = slice(places.start, places.stop)
        slots = zip(*(crop[part].split(1) for group in batch.crops for crop in group.unbind()), strict=True)
        for place, own_slots in zip(places, slots, strict=True):
            if stop.is_set():
                break
            before = len(broken)
            image = self._decode(batch, int(batch.ids[place]), broken)
            batch.substituted[place] = len(broken) > before
            cut_crops(image, crop_boxes(draws[place], *image.shape[:2]), own_slots)
        return broken

    def _decode(self, batch: RawBatch, wanted: int, broken: list[Quarantined]) -> NDArray[np.uint8]:
        """The pixels of a sample or of its first sound substitute; adds the broken samples on the way there.

        Raises:
            _NoSubstituteError: no sample is sound, or more are broken than are admitted.
        """
        for tried, sample_id in enumerate(_chain(wanted, self.substitutes)):
            if self.max_quarantined is not None and tried > self.max_quarantined:
                break
            try:
                return decode_image(self.reader.image(sample_id))
            except (BrokenImageError, ChecksumError) as error:
                broken.append(Quarantined(batch.epoch, batch.step, sample_id, self._name(sample_id), str(error)))
            except Exception as error:
                raise RuntimeError(f"sample {sample_id} ({self._name(sample_id)}) cannot be read: {error}") from error
        raise _NoSubstituteError(broken)

    def _name(self, sample_id: int) -> str:
        try:
            return self.reader.name(sample_id)
        except (RuntimeError, OSError, ValueError):  # what broke the sample may hide its name too
            return "name unreadable"

    def _take(self, task: Future[list[Quarantined]], known: dict[int, Quarantined]) -> None:
        """Wait for a part of a batch, and account for the broken samples that it met."""
        try:
            self._quarantine(task.result(), known)
        except _NoSubstituteError as error:
            self._quarantine(error.broken, known)
            first = error.broken[0]
            raise RuntimeError(
                f"no image can be decoded: all {len(known)} that were tried are broken (the first, {first.name}: "
                f"{first.reason}); mend the data, or name other data"
            ) from None

    def _quarantine(self, broken: list[Quarantined], known: dict[int, Quarantined]) -> None:
        for record in broken:
            if record.sample_id in known:
                continue
            known[record.sample_id] = record
            _logger.warning("sample %d (%s) is left out: %s", record.sample_id, record.name, record.reason)
            if self.on_quarantine is not None:
                self.on_quarantine(record)
        if self.max_quarantined is not None and len(known) > self.max_quarantined:
            examples = "; ".join(f"{record.name}: {record.reason}" for record in islice(known.values(), 3))
            raise RuntimeError(
                f"{len(known)} broken images in one epoch are more than the {self.max_quarantined} that are admitted "
                f"({examples}); mend the data, or raise {self.budget_setting}"
            )


def _chain(wanted: int, substitutes: Callable[[int], Iterable[int]]) -> Iterator[int]:
    yield wanted
    yield from substitutes(wanted)
