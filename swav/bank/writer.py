"""Writes the features that training computes, as it computes them (appendix D.2)."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swav import storage
from swav.bank.files import checksum_of, read_array, write_array, write_manifest
from swav.bank.layout import BankLayout
from swav.data.batch import RawBatch
from swav.distributed import all_reduce_sum, barrier, rank, world_size
from swav.partition import share
from swav.watchdog import progress

BANK_FORMAT = "swav.bank/1"
_THREADS = 8


class BankWriter:
    """One rank's part of an epoch's features.

    What a rank holds in memory are the open segments of its lanes. Full ones are written in the background.
    :meth:`flush` writes the open ones as far as they are, under the name that they will be written over: after it, a
    checkpoint may be taken, from which a run with any number of ranks goes on. A row of zeros is a sample without
    features, as its image is broken.

    Raises:
        RuntimeError: by any method: features cannot be written, or those from before a restart are not there.
    """

    def __init__(self, folder: str, layout: BankLayout, *, start_step: int, facts: dict[str, Any]) -> None:
        """Take up an epoch at a step.

        Args:
            folder: for the segments.
            layout: of the segments.
            start_step: of the epoch; the features of earlier steps are there.
            facts: for the manifest.
        """
        self._folder, self._layout, self._facts = folder, layout, facts
        self._first_lane, self._end_lane = share(layout.num_lanes, rank(), world_size())
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="swav-bank")
        self._writing: list[Future[None]] = []
        self._checksums = np.zeros(layout.rows.shape, dtype=np.int64)
        self._pending: tuple[int, NDArray[np.bool_], Tensor, torch.cuda.Event | None] | None = None
        self._first_block = self._block = start_step // layout.steps
        self._step = self._block * layout.steps
        self._open_block()
        if start_step > self._step:
            self._take_up(start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def append(self, batch: RawBatch, embeddings: Tensor) -> None:
        """Take the features of a step, the next one of the epoch; a GPU is not waited for.

        Args:
            batch: this rank's share.
            embeddings: float [crops, B, dim], of its images.
        """
        halves = embeddings.detach().to(torch.float16)
        event = None
        if halves.device.type == "cuda":
            host = torch.empty(halves.shape, dtype=halves.dtype, pin_memory=True)
            host.copy_(halves, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            halves = host
        self._store_pending()
        self._pending = (batch.step, batch.substituted, halves, event)

    def flush(self) -> None:
        """Make all features up to here durable."""
        self._store_pending()
        if self._filled.any():
            self._write_block()
        self._wait()

    def publish(self, prototypes: NDArray[np.float32] | None = None) -> None:
        """Write what is left, and the manifest; every rank calls this.

        Args:
            prototypes: float32 [sets, K, dim], of the model that the features are the last of, if it has any.
        """
        self.flush()
        assert self._step == self._layout.order.num_steps
        self._checksums[: self._first_block, self._first_lane : self._end_lane] = self._earlier_checksums()
        checksums = all_reduce_sum(torch.from_numpy(self._checksums)).numpy().astype(np.uint32)
        barrier()
        if rank() != 0:
            return
        facts = {"format": BANK_FORMAT, **self._facts, "num_crops": self._layout.num_crops, "dim": self._layout.dim}
        facts |= {"num_samples": int(self._layout.rows.sum()), "num_segments": self._layout.num_segments}
        try:
            facts["segments_crc32c"] = write_array(storage.join(self._folder, "segments.npy"), checksums)
            if prototypes is not None:
                facts["prototypes_crc32c"] = write_array(storage.join(self._folder, "prototypes.npy"), prototypes)
            write_manifest(self._folder, facts)
        except OSError as error:
            self._fail(error)

    def _open_block(self) -> None:
        rows = self._layout.rows[self._block] if self._block < len(self._layout.rows) else np.zeros(1, dtype=np.int64)
        lanes = self._end_lane - self._first_lane
        shape = (lanes, self._layout.num_crops, int(rows.max()), self._layout.dim)
        self._features = np.zeros(shape, dtype=np.float16)
        self._filled = np.zeros(lanes, dtype=np.int64)

    def _bounds(self, step: int) -> NDArray[np.int64]:
        """Where the own lanes' rows start in a global batch, and where the last one's end."""
        lanes = np.arange(self._first_lane, self._end_lane + 1)
        return self._layout.order.batch_size(step) * lanes // self._layout.num_lanes

    def _store_pending(self) -> None:
        if self._pending is None:
            return
        (step, substituted, halves, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        assert step == self._step
        features = halves.numpy().copy()
        features[:, substituted] = 0
        bounds = self._bounds(self._step)
        for lane, (start, end) in enumerate(zip(bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True)):
            filled = self._filled[lane]
            self._features[lane, :, filled : filled + end - start] = features[:, start:end]
        self._filled += np.diff(bounds)
        self._step += 1
        if self._step % self._layout.steps == 0 or self._step == self._layout.order.num_steps:
            self._write_block()
            self._block += 1
            self._open_block()

    def _write_block(self) -> None:
        """Begin to write the open segments as far as they are filled."""
        self._wait()  # for the ones before: of a block's two writings the later one counts
        own = range(self._first_lane, self._end_lane)
        self._writing = [
            self._pool.submit(self._write, self._block, lane, self._features[number, :, : self._filled[number]])
            for number, lane in enumerate(own)
        ]

    def _write(self, block: int, lane: int, features: NDArray[np.float16]) -> None:
        self._checksums[block, lane] = write_array(self._url(block, lane), features)

    def _wait(self) -> None:
        writing, self._writing = self._writing, []
        try:
            for write in writing:
                write.result()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        raise RuntimeError(
            f"features cannot be written to {self._folder} ({error}); free space or mend the storage, then run the "
            "same command again to resume"
        ) from error

    def _take_up(self, start_step: int) -> None:
        """Read what the running block's segments had before the restart."""
        wanted = sum((np.diff(self._bounds(step)) for step in range(self._step, start_step)), self._filled)
        own = range(self._first_lane, self._end_lane)
        for number, (lane, features) in enumerate(zip(own, self._pool.map(self._read_open, own), strict=True)):
            if features.shape[1] < wanted[number]:
                raise self._missing(self._url(self._block, lane), f"holds {features.shape[1]} of {wanted[number]} rows")
            self._features[number, :, : wanted[number]] = features[:, : wanted[number]]
        self._filled, self._step = wanted, start_step

    def _read_open(self, lane: int) -> NDArray[np.float16]:
        url = self._url(self._block, lane)
        try:
            return read_array(url)[0]
        except OSError as error:
            raise self._missing(url, str(error)) from error

    def _earlier_checksums(self) -> NDArray[np.int64]:
        """Of the own lanes' segments that were full before this life began."""
        own = range(self._first_lane, self._end_lane)
        urls = [self._url(block, lane) for block in range(self._first_block) for lane in own]
        try:
            found = list(self._pool.map(checksum_of, urls))
        except OSError as error:
            raise self._missing(self._folder, str(error)) from error
        return np.array(found, dtype=np.int64).reshape(self._first_block, len(own))

    def _missing(self, url: str, what: str) -> RuntimeError:
        return RuntimeError(
            f"features from before the restart are missing: {url} ({what}); restore them, or remove the checkpoints of "
            "this epoch so that it is repeated"
        )

    def _url(self, block: int, lane: int) -> str:
        return storage.join(self._folder, self._layout.name(block * self._layout.num_lanes + lane))


def remove_bank(folder: str, layout: BankLayout) -> None:
    """Remove an epoch's features, the manifest first; what is gone already does not matter. Every rank calls this."""
    remove_all([storage.join(folder, "manifest.json")])
    barrier()
    names = [layout.name(number) for number in range(layout.num_segments)]
    remove_all([storage.join(folder, name) for name in (*names, "segments.npy", "prototypes.npy")])


def remove_all(urls: Sequence[str]) -> None:
    """Remove files, every rank a share, several at a time: from a store, hundreds of thousands take minutes."""
    own = urls[rank() :: world_size()]

    def remove_some(number: int) -> None:
        for url in own[number::_THREADS]:
            storage.remove(url)
            progress()

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(remove_some, range(_THREADS)):
            pass
