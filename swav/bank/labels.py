"""An epoch's labels: one table per data shard, ``[rows, sets]``, so that they can be read beside it.

Labels are uint16, or uint32 above 65,535 prototypes; the largest number of the type stands for "none".
"""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from swav import storage
from swav.bank.files import DamagedError, labels_folder, read_array, read_manifest, write_array
from swav.data.batch import NO_LABEL
from swav.data.index import DatasetIndex
from swav.distributed import all_reduce_max, all_reduce_sum, rank, world_size

LABELS_FORMAT = "swav.labels/1"
_BUCKET_ROWS = 1 << 22  # whose labels are put together at a time
_SPILL_BYTES = 1 << 25
_TABLE_BYTES = 1 << 28  # of tables that a reader keeps
_THREADS = 8


def label_type(num_prototypes: int) -> np.dtype[Any]:
    """The smallest type of labels that has a number left for "none"."""
    return np.dtype(np.uint16 if num_prototypes < np.iinfo(np.uint16).max + 1 else np.uint32)


class LabelTables:
    """The published labels of an epoch; any number of threads may read."""

    def __init__(
        self, output: storage.Location, epoch: int, index: DatasetIndex, *, kept_bytes: int | None = None
    ) -> None:
        """Open.

        Args:
            output: the run's folder.
            epoch: that trains on the labels.
            index: of the data set.
            kept_bytes: of tables that stay in memory, beside the last one that was read.

        Raises:
            ValueError: they are of other data.
            RuntimeError: there are none, or they are damaged.
        """
        self.folder = labels_folder(output, epoch)
        manifest = read_manifest(self.folder, LABELS_FORMAT)
        if manifest is None:
            raise RuntimeError(f"{self.folder} holds no published labels")
        if manifest["data_identity"] != index.identity:
            raise ValueError(
                f"the labels in {self.folder} are of other data (identity {manifest['data_identity']}, here "
                f"{index.identity}); give the assigner the trainer's data"
            )
        self.manifest = manifest
        self._index = index
        self._written, _ = read_array(storage.join(self.folder, "written.npy"))
        self._tables: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._num_bytes = 0
        self._kept_bytes = _TABLE_BYTES if kept_bytes is None else kept_bytes
        self._lock = threading.Lock()

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of samples, int64 [n, sets], NO_LABEL where there is none.

        Raises:
            DamagedError: a table is not what was written.
            OSError: it cannot be read.
        """
        shards, rows = self._index.locate(ids)
        labels = np.empty((len(ids), self.manifest["num_sets"]), dtype=np.int64)
        for shard in np.unique(shards):
            mine = shards == shard
            labels[mine] = decoded(self.table(int(shard))[rows[mine]])
        return labels

    def table(self, shard: int) -> NDArray[Any]:
        """The labels of a shard as they are written, uint16 or uint32 [rows, sets]; all "none" where it has none."""
        with self._lock:
            found = self._tables.get(shard)
            if found is not None:
                self._tables.move_to_end(shard)
                return found
        url = table_url(self.folder, shard)
        rows = int(self._index.rows_per_shard[shard])
        if not self._written[shard]:
            none = label_type(self.manifest["num_prototypes"])
            return np.full((rows, self.manifest["num_sets"]), np.iinfo(none).max, dtype=none)
        table, _ = read_array(url)
        if table.shape != (rows, self.manifest["num_sets"]):
            raise DamagedError(f"{url} has the shape {table.shape}, and the shard {rows} rows; restore it")
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = table
                self._num_bytes += table.nbytes
            while self._num_bytes > self._kept_bytes and len(self._tables) > 1:
                self._num_bytes -= self._tables.popitem(last=False)[1].nbytes
        return table

    def centroids(self) -> NDArray[np.float32]:
        """What the labels are numbers of, float32 [sets, K, dim]."""
        return read_array(storage.join(self.folder, "centroids.npy"))[0]


def decoded(table: NDArray[Any]) -> NDArray[np.int64]:
    """Written labels as int64, with NO_LABEL for none."""
    labels = table.astype(np.int64)
    labels[table == np.iinfo(table.dtype).max] = NO_LABEL
    return labels


def table_url(folder: str, shard: int) -> str:
    """Where a shard's labels stand."""
    return storage.join(folder, "labels", f"{shard:06d}.npy")


class LabelWriter:
    """Brings labels from the order of the features into that of the shards, and writes them.

    Every worker adds what it has, in any order, which goes to its local disk; then they put together some million rows
    at a time. No worker ever holds all labels.
    """

    def __init__(self, folder: str, index: DatasetIndex, *, num_prototypes: int, num_sets: int) -> None:
        """Prepare.

        Args:
            folder: of the epoch's labels.
            index: of the data set.
            num_prototypes: labels are below this number.
            num_sets: labels of each sample.
        """
        self._folder, self._index, self._num_sets = folder, index, num_sets
        self._type = label_type(num_prototypes)
        self._record = np.dtype([("row", "<u4"), ("labels", self._type, (num_sets,))])
        starts = index.row_offsets[:-1]
        first_shards = np.flatnonzero(np.diff(starts // _BUCKET_ROWS, prepend=-1))
        self._bounds = [*first_shards.tolist(), index.num_shards]  # of the shards of each bucket
        self._first_ids = index.row_offsets[self._bounds]
        cache = storage.cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        self._spill = tempfile.TemporaryDirectory(prefix="labels-", dir=cache)
        self._waiting: list[list[NDArray[Any]]] = [[] for _ in range(self.num_buckets)]
        self._num_bytes = 0
        self._written = np.zeros(index.num_shards, dtype=np.int64)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spill.cleanup()

    @property
    def num_buckets(self) -> int:
        """Groups of neighbouring shards whose labels are put together at a time."""
        return len(self._bounds) - 1

    def add(self, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Take labels of some samples; several threads may.

        Args:
            ids: int64 [n].
            labels: int64 [n, sets], NO_LABEL for none.
        """
        buckets = np.searchsorted(self._first_ids, ids, side="right") - 1
        records = np.empty(len(ids), dtype=self._record)
        records["row"] = ids - self._first_ids[buckets]
        records["labels"] = labels  # NO_LABEL is written as the type's largest number below
        records["labels"][labels == NO_LABEL] = np.iinfo(self._type).max
        with self._lock:
            for bucket in np.unique(buckets):
                self._waiting[bucket].append(records[buckets == bucket])
            self._num_bytes += records.nbytes
            if self._num_bytes > _SPILL_BYTES:
                self._write_waiting()

    def tables(self) -> Iterable[tuple[int, NDArray[Any]]]:
        """Put the labels of all workers together, shard by shard; every worker calls this, and writes some shards.

        Shards without any label are left out, as are most where an epoch is a stretch of a pass.

        Yields:
            The shards that this worker has written, and their tables.
        """
        self._write_waiting()
        with ThreadPoolExecutor(_THREADS) as pool:
            for bucket in range(self.num_buckets):
                whole = self._put_together(bucket)
                if bucket % world_size() != rank():
                    continue
                shards = range(self._bounds[bucket], self._bounds[bucket + 1])
                starts = self._index.row_offsets[shards.start : shards.stop + 1] - self._first_ids[bucket]
                parts = zip(shards, (whole[start:end] for start, end in pairwise(starts)), strict=True)
                written = [(shard, table) for shard, table in parts if (table != np.iinfo(self._type).max).any()]
                for _ in pool.map(lambda part: write_array(table_url(self._folder, part[0]), part[1]), written):
                    pass
                self._written[[shard for shard, _ in written]] = 1
                yield from written
        written_by_all = all_reduce_sum(torch.from_numpy(self._written)).numpy().astype(np.bool_)
        if rank() == 0:
            write_array(storage.join(self._folder, "written.npy"), written_by_all)

    def _put_together(self, bucket: int) -> NDArray[Any]:
        """All workers' labels of a bucket, in the order of its rows."""
        path = self._path(bucket)
        records = np.fromfile(path, dtype=self._record) if path.exists() else np.empty(0, dtype=self._record)
        path.unlink(missing_ok=True)
        num_rows = int(self._first_ids[bucket + 1] - self._first_ids[bucket])
        none = np.iinfo(self._type).max
        dense = torch.zeros((num_rows, self._num_sets), dtype=torch.int64 if self._type.itemsize > 2 else torch.int32)
        # One more than the label, and 0 for none. A stretch that begins in one pass and ends in the next can have a
        # sample twice: the larger label counts, whoever has it.
        for number, column in enumerate(dense.numpy().T):
            labels = records["labels"][:, number]
            values = np.where(labels == none, 0, labels.astype(np.int64) + 1)
            while (is_larger := column[records["row"]] < values).any():
                column[records["row"][is_larger]] = values[is_larger]
        merged = all_reduce_max(dense).numpy() - 1
        merged[merged < 0] = none
        return merged.astype(self._type)

    def _write_waiting(self) -> None:
        for bucket, parts in enumerate(self._waiting):
            if parts:
                with self._path(bucket).open("ab") as file:
                    file.write(np.concatenate(parts).tobytes())
            parts.clear()
        self._num_bytes = 0

    def _path(self, bucket: int) -> Path:
        return Path(self._spill.name, f"{bucket:06d}")
