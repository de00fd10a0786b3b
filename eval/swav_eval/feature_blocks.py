"""Blocks of features: one file for so many consecutive samples, which is verified when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from swav.storage import Location, is_remote, join, list_names, local_path, read, stat, write_atomic

NO_LABEL = -1

_DTYPES = {"features": np.dtype(np.float32), "ids": np.dtype(np.int64), "labels": np.dtype(np.int64)}


@dataclass(frozen=True, slots=True)
class Block:
    """The features of some consecutive samples."""

    features: NDArray[np.float32]  # [n, dim], as the network gives them; [0, 0] where no image decodes
    ids: NDArray[np.int64]  # [n], rising
    labels: NDArray[np.int64]  # [n], NO_LABEL where a sample has no .cls
    num_broken: int  # images that could not be decoded; they have no row

    @property
    def num_samples(self) -> int:
        """With the broken ones."""
        return len(self.ids) + self.num_broken

    def without_rows(self) -> "Block":
        """What to remember of a block that is in a folder: its features are gone, but for the number of columns."""
        return Block(self.features[:0].copy(), self.ids, self.labels, self.num_broken)


@dataclass(frozen=True, slots=True)
class BlockFolder:
    """Which blocks a data set has, and where they are kept."""

    prefix: str  # of their names: ``<name>-<digest>``
    num_samples: int
    block_samples: int  # consecutive samples of a block; the last one may have fewer
    folder: Location | None  # None: nowhere, they stay in memory

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.num_samples // self.block_samples)

    def samples(self, number: int) -> tuple[int, int]:
        """The half-open range of a block's sample ids."""
        return number * self.block_samples, min((number + 1) * self.block_samples, self.num_samples)

    def size(self, number: int) -> int:
        """How many samples a block has."""
        first, last = self.samples(number)
        return last - first

    def url(self, number: int) -> str:
        """Where a block is."""
        assert self.folder is not None
        return join(self.folder, self._name(number))

    def present(self) -> set[int]:
        """Numbers of the blocks that are there, damaged or not."""
        if self.folder is None or not (is_remote(self.folder) or local_path(self.folder).is_dir()):
            return set()
        names = set(list_names(self.folder, f"{self.prefix}-*"))
        return {number for number in range(self.num_blocks) if self._name(number) in names}

    def load(self, number: int) -> Block:
        """Read and verify a block.

        Raises:
            ValueError: it is damaged; the message says how.
            OSError: it cannot be read.
        """
        return _decoded(read(self.url(number)), *self.samples(number))

    def load_again(self, number: int) -> Block:
        """Read a block that this evaluation has written or verified before, on this host or another.

        Raises:
            RuntimeError: it is not there, or damaged.
            OSError: it cannot be read.
        """
        url = self.url(number)
        if stat(url) is None:
            raise RuntimeError(
                f"{url} is not there, and this evaluation has written it: all hosts must share the folder, and nobody "
                "may empty it; give --work (or --output) in an object store or on a shared disk, and run again"
            )
        try:
            return self.load(number)
        except ValueError as error:
            raise RuntimeError(f"{url} is damaged ({error}); run again, and it is computed again") from error

    def keep(self, number: int, block: Block) -> Block:
        """Write a block, whole or not at all; returns what has to stay in memory of it."""
        if self.folder is None:
            return block
        write_atomic(self.url(number), _encoded(block))
        return block.without_rows()

    def _name(self, number: int) -> str:
        return f"{self.prefix}-{number:06d}.safetensors"


def joined(parts: list[Block]) -> Block:
    """One block of neighbouring ones, at least one."""
    features = [part.features for part in parts if len(part.ids)] or [parts[0].features]
    return Block(
        np.concatenate(features),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        sum(part.num_broken for part in parts),
    )


def _encoded(block: Block) -> bytes:
    """A block as a safetensors file, with a CRC-32C of its tensors."""
    tensors: dict[str, NDArray[Any]] = {
        "features": block.features,
        "ids": block.ids,
        "labels": block.labels,
        "num_broken": np.array([block.num_broken], np.int64),
    }
    data: bytes = safetensors.save(tensors | {"crc32c": np.array([_checksum(tensors)], np.int64)})
    return data


def _decoded(data: bytes, first: int, last: int) -> Block:
    """Read what :func:`_encoded` wrote of the samples first..last.

    Raises:
        ValueError: it is not that.
    """
    try:
        tensors: dict[str, NDArray[Any]] = dict(safetensors.load(data))
        checksum = int(tensors.pop("crc32c")[0])
        block = Block(tensors["features"], tensors["ids"], tensors["labels"], int(tensors["num_broken"][0]))
        dtypes = {name: tensors[name].dtype for name in _DTYPES}
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"it is no block of features: {error}") from error
    if checksum != _checksum(tensors):
        raise ValueError("its checksum does not fit")
    num_rows = len(block.ids)
    if (
        dtypes != _DTYPES
        or block.features.ndim != 2
        or (len(block.features), len(block.labels), block.num_samples) != (num_rows, num_rows, last - first)
        or (np.diff(block.ids, prepend=first - 1, append=last) < 1).any()
    ):
        raise ValueError("it is another block")
    return block


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = google_crc32c.extend(checksum, tensors[name].tobytes())
    return checksum
