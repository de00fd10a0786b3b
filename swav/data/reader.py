"""Reads the members of samples, by sample id."""

import re
import threading
from collections import OrderedDict
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swav.data import tar
from swav.data.index import DatasetIndex
from swav.storage import RangeFile, open_file

_MAX_OPEN_FILES = 256  # with as many open tables of the index, half of the usual limit of 1024
_INTEGER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


class ShardReader:
    """Bytes, labels and names of samples; any number of threads may use one reader.

    At most ``max_open_files`` shards are kept open, those used last.
    """

    def __init__(self, index: DatasetIndex, *, max_open_files: int = _MAX_OPEN_FILES) -> None:
        self.index = index
        self._max_open_files = max_open_files
        self._files: OrderedDict[int, RangeFile] | None = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards; reads of other threads that are under way still end well."""
        with self._lock:
            self._files = None

    def image(self, sample_id: int) -> bytes:
        """The encoded image of a sample.

        Raises:
            ValueError: the id is outside the index.
            RuntimeError: the shard is shorter than when it was indexed, or the reader is closed.
        """
        shard, row = self._row(sample_id)
        return self._read(shard, int(row["image_offset"]), int(row["image_bytes"]))

    def label(self, sample_id: int) -> int | None:
        """The number in a sample's ``.cls``; None where it has none.

        Raises:
            ValueError: the member is no decimal number, or the id is outside the index.
            RuntimeError: as for :meth:`image`.
        """
        text = self.member(sample_id, "cls")
        if text is None:
            return None
        if not _INTEGER.fullmatch(text):
            raise ValueError(
                f"{self.name(sample_id)}.cls holds {text[:40]!r}, and a label is a number such as 7; "
                "number the classes and write the shards again"
            )
        return int(text)

    def labels(self) -> NDArray[np.int64]:
        """The labels of all samples, int64 [num_samples].

        Raises:
            ValueError: a sample has no label, or one that is no number.
            RuntimeError: as for :meth:`image`.
        """
        labels = np.empty(self.index.num_samples, dtype=np.int64)
        for sample_id in range(len(labels)):
            label = self.label(sample_id)
            if label is None:
                raise ValueError(f"{self.name(sample_id)} has no label (.cls)")
            labels[sample_id] = label
        return labels

    def member(self, sample_id: int, kind: Literal["cls", "json"]) -> bytes | None:
        """The bytes of a sample's ``.cls`` or ``.json``; None where it has none.

        Raises:
            ValueError: the id is outside the index.
            RuntimeError: as for :meth:`image`.
        """
        shard, row = self._row(sample_id)
        offset = int(row[f"{kind}_offset"])
        return self._read(shard, offset, int(row[f"{kind}_bytes"])) if offset else None

    def name(self, sample_id: int) -> str:
        """A sample's name for messages, ``<shard>.tar:<key>``; the key is read from the tar.

        Where the tar is damaged there, or gone, it is ``<shard>.tar:row <n>``.

        Raises:
            ValueError: the id is outside the index.
        """
        shard, row = self.index.locate_one(sample_id)
        try:
            folder, slash, name = self.member_name(sample_id).rpartition("/")
        except (RuntimeError, OSError):
            return f"{self.index.shards[shard].name}:row {row}"
        return f"{self.index.shards[shard].name}:{folder}{slash}{name.partition('.')[0]}"

    def member_name(self, sample_id: int) -> str:
        """The path of a sample's image inside its tar, with its extension.

        Raises:
            ValueError: the id is outside the index.
            RuntimeError: as for :meth:`image`.
        """
        shard, row = self._row(sample_id)
        start = int(row["image_offset"]) - int(row["image_header_blocks"]) * tar.BLOCK_BYTES
        return tar.member_at(self._open(shard), start).name

    def _row(self, sample_id: int) -> tuple[int, np.void]:
        shard, row = self.index.locate_one(sample_id)
        return shard, self.index.rows(shard)[row]

    def _read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        data = self._open(shard).read(offset, num_bytes)
        if len(data) < num_bytes:
            raise RuntimeError(
                f"shard {self.index.shard_path(shard)} ends inside the bytes {offset}..{offset + num_bytes}, and had "
                f"{self.index.shards[shard].num_bytes} bytes when it was indexed; restore it, or index the data again"
            )
        return data

    def _open(self, shard: int) -> RangeFile:
        """An open shard; the one used longest ago is closed once nobody reads it any more."""
        with self._lock:
            if self._files is None:
                raise RuntimeError("this ShardReader is closed")
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = open_file(self.index.shard_path(shard))
                if len(self._files) > self._max_open_files:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file
