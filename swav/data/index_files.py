"""The files of an index: written so that index.json alone decides, and verified when they are read.

``index.json`` is small and names the table of shards by its checksum; that table (``shards-<CRC-32C>.npy``) has the
checksum of each shard's table of rows (``index/<shard>.npy``). What stands in a store is fetched into the cache.
"""

import json
import logging
import threading
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data.scan import ROW_DTYPE
from swav.data.shard_table import Shard, identity_of, is_table, npy_bytes

FORMAT = "swav.index/2"
_ATTEMPTS = 3  # at what does not have its checksum
_PIECE_BYTES = 1 << 20
_NUM_LOCKS = 64  # of the files in the cache, shared out by checksum
_OPEN_TABLES = 256

_locks = [threading.Lock() for _ in range(_NUM_LOCKS)]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """What index.json says."""

    num_samples: int
    num_shards: int
    num_bytes: int  # of all shards
    chunk_rows: int
    identity: str
    shards_crc32c: int
    written_from: dict[str, Any] | None


def read_index(folder: str) -> tuple[IndexRecord, NDArray[np.void]] | None:
    """The record and the table of shards of the index in a folder; None where there is none of ours.

    Raises:
        RuntimeError: it is damaged, or of another version.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            record = _read_record(folder)
            return None if record is None else (record, _load_shards(folder, record))
        except _DamagedError as error:  # also where the index is replaced between its two files
            if attempt == _ATTEMPTS:
                raise RuntimeError(f"{error}; {remedy(folder)}") from error
    raise AssertionError


def write_index(
    folder: str, table: NDArray[np.void], *, chunk_rows: int, written_from: dict[str, Any] | None
) -> IndexRecord:
    """Write the table of shards, and then index.json; what was the index before holds until then."""
    before = _read_record_of_any_kind(folder)
    data = npy_bytes(table)
    record = IndexRecord(
        num_samples=int(table["rows"].sum(dtype=np.int64)),
        num_shards=len(table),
        num_bytes=int(table["num_bytes"].sum(dtype=np.int64)),
        chunk_rows=chunk_rows,
        identity=identity_of(table),
        shards_crc32c=google_crc32c.value(bytes(data)),
        written_from=written_from,
    )
    storage.write_atomic(_shards_url(folder, record), data)
    facts = {"format": FORMAT} | asdict(record)
    text = json.dumps(facts | {"crc32c": _crc32c_of_json(facts)}, indent=1) + "\n"
    storage.write_atomic(index_url(folder), text.encode())
    if before is not None and before.shards_crc32c != record.shards_crc32c:
        storage.remove(_shards_url(folder, before))
    return record


def table_url(folder: str, shard: Shard) -> str:
    """Where the rows of a shard stand; one listing never holds two shards of a name.

    A table with checksums has a name of its own: until index.json is replaced, the one without is used.
    """
    ending = ".crc32c.npy" if shard.has_checksums else ".npy"
    return storage.join(folder, "index", storage.name_of(shard.name) + ending)


def load_rows(folder: str, identity: str, shard: Shard) -> NDArray[np.void]:
    """The rows of a shard, ``ROW_DTYPE`` [rows], mapped from the disk.

    Raises:
        RuntimeError: they are missing or damaged.
    """
    if shard.rows == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=ROW_DTYPE)
    cached = _cache_of(identity) / f"{storage.name_of(shard.name)}-{shard.table_crc32c:08x}.npy"
    try:
        return _open_rows(table_url(folder, shard), cached, shard.table_crc32c, shard.rows)
    except _DamagedError as error:
        raise RuntimeError(f"the table of the shard {shard.name} cannot be read ({error}); {remedy(folder)}") from error


def index_url(folder: str) -> str:
    """Where a folder's index.json is."""
    return storage.join(folder, "index.json")


def remedy(folder: str) -> str:
    """What to do about an index that is no use any more."""
    return f"delete {index_url(folder)} and index again with `python -m swav.data.index`"


class _DamagedError(Exception):
    """A file is not what was written."""


def _read_record(folder: str) -> IndexRecord | None:
    url = index_url(folder)
    if storage.stat(url) is None:
        return None
    data = storage.read(url)
    try:
        facts = json.loads(data)
    except ValueError as error:
        if b'"swav.index/' in data:
            raise _DamagedError(f"{url} is damaged ({error})") from error
        facts = None
    form = facts.get("format") if isinstance(facts, dict) else None
    if not isinstance(form, str) or not form.startswith("swav.index/"):
        logger.info("%s is no index of ours; it is left alone", url)
        return None
    if form != FORMAT:
        raise RuntimeError(f"{url} has the format {form}, this version reads {FORMAT}; {remedy(folder)}")
    crc32c = facts.pop("crc32c", None)
    if crc32c != _crc32c_of_json(facts):
        raise _DamagedError(f"{url} is damaged (it does not have its checksum)")
    try:
        return IndexRecord(**{field.name: facts[field.name] for field in fields(IndexRecord)})
    except KeyError as error:
        raise _DamagedError(f"{url} is damaged (it lacks {error})") from error


def _read_record_of_any_kind(folder: str) -> IndexRecord | None:
    """The index that is about to be replaced, whatever its state."""
    try:
        return _read_record(folder)
    except (_DamagedError, RuntimeError):
        return None


def _crc32c_of_json(facts: dict[str, Any]) -> int:
    value: int = google_crc32c.value(json.dumps(facts, sort_keys=True).encode())
    return value


def _shards_url(folder: str, record: IndexRecord) -> str:
    return storage.join(folder, f"shards-{record.shards_crc32c:08x}.npy")


def _load_shards(folder: str, record: IndexRecord) -> NDArray[np.void]:
    url = _shards_url(folder, record)
    table = _open_array(url, _cache_of(record.identity) / storage.name_of(url), record.shards_crc32c)
    fits = is_table(table) and len(table) == record.num_shards
    if not fits or int(table["rows"].sum(dtype=np.int64)) != record.num_samples:
        raise _DamagedError(f"{url} does not fit {index_url(folder)}")
    return table


def _cache_of(identity: str) -> Path:
    return storage.cache_folder() / "index" / identity[:32]


@lru_cache(maxsize=_OPEN_TABLES)
def _open_rows(url: str, cached: Path, crc32c: int, num_rows: int) -> NDArray[np.void]:
    rows = _open_array(url, cached, crc32c)
    if rows.dtype != ROW_DTYPE or rows.shape != (num_rows,):
        raise _DamagedError(f"{url} does not fit the index")
    return rows


def _open_array(url: str, cached: Path, crc32c: int) -> NDArray[np.void]:
    """Map an .npy file that has a checksum; from a store it is fetched first, unless it was before."""
    if not storage.is_remote(url):
        return _map(storage.local_path(url), url, crc32c)
    if cached.exists():
        try:
            return _map(cached, url, crc32c)
        except _DamagedError as error:
            logger.warning("fetching %s again: in the cache, %s", url, error)
    _fetch(url, cached, crc32c)
    return _map(cached, url, crc32c)


def _fetch(url: str, path: Path, crc32c: int) -> None:
    """Bring a file onto this host; one thread of one process does, and the others wait."""
    number = crc32c % _NUM_LOCKS
    with _locks[number], storage.locked(path.parent / f".lock-{number:02d}"):
        if path.exists() and _crc32c_of_file(path) == crc32c:
            return
        for _ in range(_ATTEMPTS):
            try:
                data = storage.read(url)
            except FileNotFoundError as error:
                raise _DamagedError(f"{url} is missing") from error
            if google_crc32c.value(data) == crc32c:
                storage.write_atomic(path, data)
                return
            storage.count("checksum_failures")
    raise _DamagedError(f"{url} does not have its checksum, in {_ATTEMPTS} attempts")


def _map(path: Path, url: str, crc32c: int) -> NDArray[np.void]:
    try:
        if _crc32c_of_file(path) != crc32c:
            raise _DamagedError(f"{url} does not have its checksum")
        array: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    return array


def _crc32c_of_file(path: Path) -> int:
    """Read and not mapped, so that no page of it counts as this process's memory."""
    crc32c = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            crc32c = google_crc32c.extend(crc32c, piece)
    return crc32c
