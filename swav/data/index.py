"""The index of a dataset: which samples there are, and where their bytes stand.

An index is ``index.json`` and, for each shard, one ``.npy`` table of ``ROW_DTYPE``. A sample is a run of neighbouring
tar members with the same key (the path up to the first dot of the file name, as webdataset has it). Its id is its
position in the index: shards in the order of their names, samples in the order of the tar.
"""

import argparse
import bisect
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from swav import storage
from swav.data.scan import ROW_DTYPE, known_extensions, scan

FORMAT = "swav.index/1"
UNFINISHED_MARK = "write_shards.json"  # stands beside shards that are still being written
_SHUFFLED_CHUNKS = 512 * 16  # default lanes times default window: with fewer chunks than this, chunks shrink
_MAX_CHUNK_ROWS = 64
_NUM_THREADS = 8
_OPEN_TABLES = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a dataset, as it was when it was indexed."""

    name: str  # relative to the folder of index.json, or absolute
    num_bytes: int
    mtime_ns: int
    rows: int
    keys_without_image: int  # passed over: they are no samples
    crc32: int | None = None  # zlib.crc32 of the whole file, known where write_shards made it


@dataclass(frozen=True)
class DatasetIndex:
    """The samples of a dataset.

    Attributes:
        folder: where index.json stands.
        shards: in sample order.
        chunk_rows: rows that the sample order keeps together; a power of two.
        row_offsets: int64 [shards + 1], the id of each shard's first sample, and the number of samples.
        written_from: what write_shards made the shards from; None for any other dataset.
    """

    folder: Path
    shards: tuple[Shard, ...]
    chunk_rows: int
    written_from: dict[str, Any] | None = None
    row_offsets: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        offsets = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)])
        object.__setattr__(self, "row_offsets", offsets.astype(np.int64))

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return int(self.row_offsets[-1])

    @property
    def rows_per_shard(self) -> NDArray[np.int64]:
        """int64 [shards]."""
        return np.diff(self.row_offsets)

    @property
    def identity(self) -> str:
        """A digest of the shards' file names, sizes and rows: equal for a copy of the dataset, wherever it stands."""
        facts = [[Path(shard.name).name, shard.num_bytes, shard.rows] for shard in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def shard_path(self, shard: int) -> str:
        """Where a shard is."""
        return str(self.folder / self.shards[shard].name)

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find samples.

        Args:
            ids: int64 [n], sample ids.

        Returns:
            Shard numbers, int64 [n], and rows inside them, int64 [n].

        Raises:
            ValueError: an id is outside the index.
        """
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_samples:
            raise ValueError(f"sample ids {ids.min()}..{ids.max()} are not all inside the index's {self.num_samples}")
        shards = np.searchsorted(self.row_offsets, ids, side="right").astype(np.int64) - 1
        return shards, ids - self.row_offsets[shards]

    def locate_one(self, sample_id: int) -> tuple[int, int]:
        """The shard number and the row of one sample.

        Raises:
            ValueError: the id is outside the index.
        """
        if not 0 <= sample_id < self.num_samples:
            raise ValueError(f"sample id {sample_id} is not inside the index's {self.num_samples}")
        shard = bisect.bisect_right(self.row_offsets, sample_id) - 1
        return shard, sample_id - int(self.row_offsets[shard])

    def rows(self, shard: int) -> NDArray[np.void]:
        """One shard's table, ``ROW_DTYPE`` [rows], mapped from the disk when it is first asked for.

        Raises:
            RuntimeError: the table is missing or does not fit the index.
        """
        return _load_rows(self.folder, self.shards[shard])


def open_index(url: str) -> DatasetIndex:
    """Open the index of a dataset, building it if there is none.

    An ``index.json`` beside the shards is used if it is there. Otherwise an index is built, with a progress bar, in
    ``$SWAV_CACHE`` (default ``~/.cache/swav``), and used again as long as names, sizes and modification times of the
    shards stay the same. Nothing is ever written beside the shards.

    Args:
        url: a folder of tars, a folder with an ``index.json``, a pattern such as ``/data/train-*.tar``, or one tar.

    Raises:
        ValueError: there are no tars, no images in them, or a sample that cannot be understood.
        RuntimeError: a tar is damaged, or the ``index.json`` beside the shards does not fit them any more.
    """
    path = storage.local_path(url).absolute()
    beside = _read(path if path.is_dir() else path.parent)
    if beside is not None:
        _check_shards(beside)
        return beside if path.is_dir() else _subset(beside, url)
    shards = storage.list_tars(url)
    folder = storage.cache_folder() / "index" / hashlib.sha256(str(path).encode()).hexdigest()[:32]
    with storage.locked(folder.with_suffix(".lock")):
        cached = _read(folder)
        if cached is not None and [shard.name for shard in cached.shards] == shards:
            changed = _mismatch(cached, exact_times=True)
            if changed is None:
                return cached
            logger.info("indexing %s again: %s", url, changed)
        for leftover in folder.glob("**/.*.partial"):  # of a process that was killed; nobody else writes here now
            leftover.unlink()
        return build_index(url, str(folder))


def build_index(
    url: str,
    out: str,
    *,
    crc32: dict[str, int] | None = None,
    written_from: dict[str, Any] | None = None,
) -> DatasetIndex:
    """Index the tars behind ``url`` and write the index to the folder ``out``, index.json last.

    Args:
        url: as for :func:`open_index`.
        out: the folder for the index; the folder of the shards is fine, and then the dataset can be moved as a whole.
        crc32: checksums of shards by file name, where they are known.
        written_from: kept in the index as it is.

    Raises:
        ValueError: there are no tars, no images in them, or a sample that cannot be understood.
        RuntimeError: a tar is damaged.
    """
    paths = [Path(path) for path in storage.list_tars(url)]
    if not paths:
        raise ValueError(
            f"{url}: there is no .tar; turn a folder of images into shards with "
            "`python -m swav.data.write_shards SOURCE OUT`"
        )
    mark = paths[0].parent / UNFINISHED_MARK
    if written_from is None and mark.exists():
        raise RuntimeError(f"{mark} says that the shards beside it are not all written; run write_shards again")
    folder = storage.local_path(out).absolute()
    shards = tuple(_index_all(paths, folder, crc32 or {}))
    total = sum(shard.rows for shard in shards)
    if total == 0:
        raise ValueError(f"{url}: no image in {len(shards)} tars; known extensions: {known_extensions()}")
    index = DatasetIndex(folder, shards, chunk_rows_for(total), written_from)
    record = {
        "format": FORMAT,
        "num_samples": total,
        "chunk_rows": index.chunk_rows,
        "shards": [asdict(shard) for shard in shards],
        "written_from": written_from,
    }
    storage.write_atomic(str(folder / "index.json"), (json.dumps(record, indent=1) + "\n").encode())
    without = sum(shard.keys_without_image for shard in shards)
    logger.info("indexed %s: %d samples in %d tars", url, total, len(shards))
    if without:
        logger.warning("%s: %d keys have no image and are passed over; %d samples remain", url, without, total)
    return index


def chunk_rows_for(num_samples: int) -> int:
    """Rows per chunk: a power of two up to 64, and 1 for a small dataset, which is then shuffled sample by sample."""
    wanted = min(max(num_samples // _SHUFFLED_CHUNKS, 1), _MAX_CHUNK_ROWS)
    return 1 << (wanted.bit_length() - 1)


def _index_all(paths: list[Path], folder: Path, crc32: dict[str, int]) -> Iterator[Shard]:
    """Index shards with some threads; write each one's table."""

    def index_one(path: Path) -> Shard:
        found = storage.stat(str(path))
        if found is None:
            raise RuntimeError(f"shard {path} went away while it was indexed; start again")
        rows, without = scan(str(path))
        name = path.name if path.parent == folder else str(path)
        table = io.BytesIO()  # NumPy would write to a file without an error number where the disk is full
        np.lib.format.write_array(table, rows, allow_pickle=False)
        storage.write_atomic(str(_table_path(folder, name)), table.getbuffer())
        return Shard(name, found.num_bytes, found.mtime_ns, len(rows), without, crc32.get(path.name))

    with ThreadPoolExecutor(min(_NUM_THREADS, len(paths))) as pool:
        try:
            yield from tqdm(pool.map(index_one, paths), total=len(paths), desc="indexing", unit="tar", delay=0.5)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(folder: Path) -> DatasetIndex | None:
    """The index in a folder; None where there is none, or an index.json of another program."""
    path = folder / "index.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    form = record.get("format") if isinstance(record, dict) else None
    if not isinstance(form, str) or not form.startswith("swav.index/"):
        logger.info("%s is no index of ours; it is left alone", path)
        return None
    if form != FORMAT:
        raise RuntimeError(f"{path} has the format {form}, this version reads {FORMAT}; {_remedy(path)}")
    try:
        shards = tuple(Shard(**shard) for shard in record["shards"])
        return DatasetIndex(folder, shards, record["chunk_rows"], record.get("written_from"))
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged ({type(error).__name__}: {error}); {_remedy(path)}") from error


def _check_shards(index: DatasetIndex) -> None:
    """Refuse an index whose shards are not those on disk; times differ in a copy of a dataset."""
    path = index.folder / "index.json"
    problem = _mismatch(index, exact_times=False)
    if problem is not None:
        raise RuntimeError(f"{path} does not fit its shards any more: {problem}; {_remedy(path)}")
    if not any(Path(shard.name).is_absolute() for shard in index.shards):
        known = {shard.name for shard in index.shards}
        added = [path for path in storage.list_tars(str(index.folder)) if Path(path).name not in known]
        if added:
            raise RuntimeError(f"{path} lacks {len(added)} shards that are there: {added[0]}; {_remedy(path)}")


def _mismatch(index: DatasetIndex, *, exact_times: bool) -> str | None:
    """In what the first changed shard differs from the index; None where none does."""
    for number, shard in enumerate(index.shards):
        found = storage.stat(index.shard_path(number))
        if found is None:
            return f"the shard {shard.name} is missing"
        if found.num_bytes != shard.num_bytes:
            return f"the shard {shard.name} has {found.num_bytes} bytes and had {shard.num_bytes} when it was indexed"
        if exact_times and found.mtime_ns != shard.mtime_ns:
            return f"the shard {shard.name} was written since"
    return None


def _subset(index: DatasetIndex, url: str) -> DatasetIndex:
    """The shards that a pattern or one tar's name asks for."""
    pattern = storage.local_path(url).name
    exact = not storage.has_pattern(url)
    shards = tuple(
        shard
        for shard in index.shards
        if (Path(shard.name).name == pattern if exact else fnmatchcase(Path(shard.name).name, pattern))
    )
    total = sum(shard.rows for shard in shards)
    if total == 0:
        raise ValueError(f"{url}: no sample of {index.folder / 'index.json'} is in a shard of that name")
    return DatasetIndex(index.folder, shards, chunk_rows_for(total), index.written_from)


@lru_cache(maxsize=_OPEN_TABLES)
def _load_rows(folder: Path, shard: Shard) -> NDArray[np.void]:
    path, remedy = _table_path(folder, shard.name), _remedy(folder / "index.json")
    if shard.rows == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=ROW_DTYPE)
    try:
        rows: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the table of the shard {shard.name} cannot be read ({error}); {remedy}") from error
    if rows.dtype != ROW_DTYPE or len(rows) != shard.rows:
        raise RuntimeError(f"{path} does not fit the index of the shard {shard.name}; {remedy}")
    return rows


def _table_path(folder: Path, name: str) -> Path:
    """Where a shard's table stands; one listing never holds two shards of a name."""
    return folder / "index" / f"{Path(name).name}.npy"


def _remedy(path: Path) -> str:
    return f"delete {path} and index again with `python -m swav.data.index`"


def main(arguments: list[str] | None = None) -> None:
    """Index a dataset from the command line."""
    parser = argparse.ArgumentParser(prog="python -m swav.data.index", description="Index a dataset of tars.")
    parser.add_argument("url", help="a folder of tars, a pattern such as '/data/train-*.tar', or one tar")
    parser.add_argument("--out", help="folder for the index (default: the folder of the tars)")
    options = parser.parse_args(arguments)
    path = storage.local_path(options.url)
    out = options.out or str(path if path.is_dir() else path.parent)
    try:
        index = build_index(options.url, out)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(
        f"{index.folder / 'index.json'}: {index.num_samples} samples in {len(index.shards)} tars, "
        f"chunks of {index.chunk_rows}, identity {index.identity[:16]}\n"
    )


if __name__ == "__main__":
    main()
