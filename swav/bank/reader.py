"""Reads an epoch's features by segments, each checked; what comes from a store is kept on the local disk meanwhile."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.bank.files import DamagedError, read_array, read_manifest
from swav.bank.layout import BankLayout
from swav.bank.writer import BANK_FORMAT
from swav.distributed import rank, world_size
from swav.partition import share

_ATTEMPTS = 3


class BankReader:
    """The features of one epoch, which have been published and do not change any more.

    Nothing is kept in memory. Segments in a store are downloaded once per host, into ``$SWAV_CACHE``, where they stay
    until the reader is closed, also over a crash.
    """

    def __init__(self, folder: str, layout: BankLayout) -> None:
        """Open.

        Args:
            folder: of the features.
            layout: of its segments.

        Raises:
            ValueError: the features are of other data or settings.
            RuntimeError: nothing has been published, or it is damaged.
        """
        manifest = read_manifest(folder, BANK_FORMAT)
        if manifest is None:
            raise RuntimeError(f"{folder} holds no published features; let the trainer finish its epoch")
        expected: dict[str, Any] = {"num_samples": int(layout.rows.sum()), "num_segments": layout.num_segments}
        expected |= {"num_crops": layout.num_crops, "dim": layout.dim, "data_identity": layout.data_identity}
        for name, value in expected.items():
            if manifest.get(name) != value:
                raise ValueError(
                    f"{folder} has {name}={manifest.get(name)}, and the data and settings given here make {value}; "
                    "give the data that the trainer has"
                )
        self.folder, self.layout, self.manifest = folder, layout, manifest
        self._checksums = self._read("segments.npy", manifest["segments_crc32c"]).reshape(-1)
        self._copies: Path | None = None
        if storage.is_remote(folder):
            digest = hashlib.sha256(json.dumps([folder, manifest]).encode()).hexdigest()[:32]
            self._copies = storage.cache_folder() / "bank" / digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the local copies once they are not needed any more."""
        if kind is None and self._copies is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            shutil.rmtree(self._copies, ignore_errors=True)

    @property
    def own_segments(self) -> range:
        """The segments that this worker takes."""
        return range(*share(self.layout.num_segments, rank(), world_size()))

    def prototypes(self) -> NDArray[np.float32]:
        """The prototypes of the model at the epoch's end, float32 [sets, K, dim]."""
        return self._read("prototypes.npy", self.manifest["prototypes_crc32c"])

    def segment(self, number: int) -> NDArray[np.float16]:
        """The features of a segment, float16 [crops, rows, dim]; a row of zeros is a sample without.

        Raises:
            DamagedError: it is not what was published.
            OSError: it cannot be read.
        """
        features = self._fetch(self.layout.name(number), int(self._checksums[number]))
        shape = (self.layout.num_crops, self.layout.num_rows(number), self.layout.dim)
        if features.shape != shape:
            url = storage.join(self.folder, self.layout.name(number))
            raise DamagedError(f"{url} has the shape {features.shape}, and the run's images make {shape}; restore it")
        return features

    def _fetch(self, name: str, expected: int) -> NDArray[np.float16]:
        """A segment, of which a copy on the local disk is kept where it comes from a store."""
        if self._copies is None:
            return self._read(name, expected)
        copy = self._copies / name
        try:
            features, checksum = read_array(str(copy))
            if checksum == expected:
                return features
        except (OSError, DamagedError):
            pass
        for attempt in range(1, _ATTEMPTS + 1):
            data = storage.read(storage.join(self.folder, name))
            try:
                features = self._checked(name, data, expected)
                break
            except DamagedError:
                if attempt == _ATTEMPTS:
                    raise
        storage.write_atomic(copy, data)
        return features

    def _read(self, name: str, checksum: int) -> NDArray[Any]:
        return self._checked(name, None, checksum)

    def _checked(self, name: str, data: bytes | None, expected: int) -> NDArray[Any]:
        url = storage.join(self.folder, name)
        array, checksum = read_array(url, data)
        if checksum != expected:
            raise DamagedError(f"{url} is not the file that was published (its checksum is another); restore it")
        return array

    def rows(self, positions: NDArray[np.int64], crop: int) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """Single rows of this worker's segments.

        Args:
            positions: int64 [n], rows counted over all segments.
            crop: whose feature.

        Yields:
            Where in ``positions`` a row stands, and its feature, float16 [dim].
        """
        starts = np.concatenate([[0], np.cumsum(self.layout.rows.reshape(-1))])
        segments = np.searchsorted(starts, positions, side="right") - 1
        own = self.own_segments
        for number in np.unique(segments):
            if number not in own:
                continue
            features = self.segment(int(number))[crop]
            for place in np.flatnonzero(segments == number):
                yield int(place), features[positions[place] - starts[number]]


def with_features(features_ND: NDArray[np.float16]) -> NDArray[np.bool_]:
    """Which rows are features, bool [N], and not the zeros of a sample without."""
    return np.asarray(features_ND.any(axis=1))
