"""Blocks of remote shards on the local disk: one download per host, whatever its processes, threads and accidents.

A block is a file under the digest of what it holds. It is written under another name, ends in a footer with the
checksum of its content, and is renamed when it is whole. The writer holds a lock on the file that it writes: others
wait for it, the kernel frees it if the writer dies, and a file that nobody has locked is a dead writer's.
"""

import errno
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import google_crc32c

from swav import storage

Download = Callable[[], Iterator[bytes]]

_FOOTER = struct.Struct("<8sQI")  # magic, bytes, CRC-32C
_MAGIC = b"swavblk1"
_PIECE_BYTES = 1 << 20
_KEPT_SHARE = 0.9  # of the budget, after making room: listing all files must not happen for every block
_TOUCH_SECONDS = 60.0
_MAX_PAUSE_SECONDS = 0.1
_MAX_VERIFIED = 65_536  # files that this process knows to be sound
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_ATTEMPTS = 8

_logger = logging.getLogger(__name__)


class AbandonedError(Exception):
    """A download that nobody waits for any more was given up."""


class CachedBlock:
    """An open block. It stays readable after it left the cache, and is closed when the last reference goes."""

    def __init__(self, descriptor: int, path: Path, num_bytes: int) -> None:
        self._descriptor = descriptor
        self.path = path
        self.num_bytes = num_bytes
        self._touched = time.monotonic()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range that lies inside the block."""
        return os.pread(self._descriptor, num_bytes, offset)

    def touch(self) -> None:
        """Note that the block is used, so that others go before it; writes to the disk once a minute at most."""
        now = time.monotonic()
        if now - self._touched >= _TOUCH_SECONDS:
            self._touched = now
            os.utime(self._descriptor)

    @property
    def inode(self) -> int:
        """What tells this file from a later one of its name, as long as this one is open."""
        return os.fstat(self._descriptor).st_ino


class BlockCache:
    """A folder of blocks that is shared by all processes of a host and kept under a number of bytes.

    Any number of threads may use one cache. Blocks that were used longest ago leave first.
    """

    def __init__(self, folder: Path, *, budget_bytes: int = 0) -> None:
        """Open the folder, making it where it is missing, and remove what killed processes left.

        Args:
            folder: for blocks only.
            budget_bytes: most bytes in it; 0: half of what is free on its disk, counting what the cache holds already.

        Raises:
            ValueError: the budget is negative.
            OSError: the folder cannot be made or written.
        """
        if budget_bytes < 0:
            raise ValueError(f"a cache of {budget_bytes} bytes cannot be; give runtime.cache_bytes of 0 or more")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._verified: OrderedDict[str, int] = OrderedDict()  # name to inode
        self._verified_lock = threading.Lock()
        self._lock = threading.Lock()  # of the books
        self._books = os.open(folder / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._remove_leftovers()
        with self._locked():
            used = self._count()[0]
            self._set_used(used)
        self.budget_bytes = budget_bytes or (shutil.disk_usage(folder).free + used) // 2
        _logger.info(
            "blocks of remote shards are kept in %s: %.1f of at most %.1f GB",
            folder,
            used / 1e9,
            self.budget_bytes / 1e9,
        )

    def __del__(self) -> None:
        if hasattr(self, "_books"):
            os.close(self._books)

    def get(self, key: str, num_bytes: int, download: Download, stop: threading.Event) -> CachedBlock:
        """Open a block, downloading it if no process of this host has done or is doing so.

        Args:
            key: a digest of where the bytes come from; a file name.
            num_bytes: of the block.
            download: gives the bytes in pieces.
            stop: gives up the download, or the waiting for another process, soon after it is set.

        Raises:
            AbandonedError: ``stop`` was set.
            OSError: the disk is full, though everything else was removed; or the download raised it.
        """
        for _ in range(_FULL_DISK_ATTEMPTS):
            try:
                return self._get(key, num_bytes, download, stop)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                full = error
                if not self._make_room(num_bytes):
                    break
        raise OSError(
            full.errno,
            f"{full.strerror}: no room for a block of {num_bytes} bytes; free space, set SWAV_CACHE to a folder on a "
            "larger disk, or lower runtime.fetch_bytes and runtime.cache_bytes",
            str(self.folder),
        ) from full

    def discard(self, block: CachedBlock) -> None:
        """Remove a block whose content is wrong, unless it has been replaced already."""
        with self._locked():
            try:
                found = block.path.stat()
            except FileNotFoundError:
                return
            if found.st_ino == block.inode:
                self._remove(block.path, found.st_size)

    def _get(self, key: str, num_bytes: int, download: Download, stop: threading.Event) -> CachedBlock:
        pause = 0.002
        while True:
            found = self._open(key, num_bytes)
            if found is not None:
                return found
            descriptor = self._claim(key)
            if descriptor is not None:
                return self._write(descriptor, key, num_bytes, download, stop)
            if stop.wait(pause):
                raise AbandonedError
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    def _open(self, key: str, num_bytes: int) -> CachedBlock | None:
        """An open block; None where there is none, or a torn or rotten one, which is removed."""
        path = self.folder / f"{key}.block"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        block = CachedBlock(descriptor, path, num_bytes)
        found = os.fstat(descriptor)
        with self._verified_lock:
            known = self._verified.get(path.name) == found.st_ino
        if not known:
            if found.st_size != num_bytes + _FOOTER.size or not _is_sound(block):
                _logger.warning("%s is damaged, and is fetched again", path)
                storage.count("checksum_failures")
                self.discard(block)
                return None
            self._remember(block)
        if time.time() - found.st_mtime >= _TOUCH_SECONDS:
            os.utime(descriptor)
        return block

    def _claim(self, key: str) -> int | None:
        """The descriptor of the file to write a block to, locked; None while somebody else writes it."""
        path = self.folder / f"{key}.partial"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if _lock_if_current(descriptor, path):
            if not (self.folder / f"{key}.block").exists():  # or it was finished between our look and the lock
                return descriptor
            with self._locked():
                self._remove(path, os.fstat(descriptor).st_size)
        os.close(descriptor)
        return None

    def _write(
        self, descriptor: int, key: str, num_bytes: int, download: Download, stop: threading.Event
    ) -> CachedBlock:
        partial, path = self.folder / f"{key}.partial", self.folder / f"{key}.block"
        total = num_bytes + _FOOTER.size
        try:
            with self._locked():  # every file counts with its size
                self._set_used(self._used() - os.fstat(descriptor).st_size)  # of a killed writer
                os.ftruncate(descriptor, 0)
                self._shrink_for(total)
                try:
                    os.posix_fallocate(descriptor, 0, total)  # faster to write, and a full disk shows at once
                finally:
                    self._set_used(self._used() + os.fstat(descriptor).st_size)
            received, checksum = 0, 0
            for piece in download():
                if stop.is_set():
                    raise AbandonedError
                _write_all(descriptor, piece)
                received += len(piece)
                checksum = google_crc32c.extend(checksum, piece)
            if received != num_bytes:
                raise OSError(f"{received} bytes came of the {num_bytes} of a block")
            _write_all(descriptor, _FOOTER.pack(_MAGIC, num_bytes, checksum))
            with self._locked():
                partial.rename(path)
        except BaseException:
            with self._locked():
                self._remove(partial, os.fstat(descriptor).st_size)
            os.close(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        block = CachedBlock(descriptor, path, num_bytes)
        self._remember(block)
        return block

    def _remember(self, block: CachedBlock) -> None:
        with self._verified_lock:
            self._verified[block.path.name] = block.inode
            self._verified.move_to_end(block.path.name)
            if len(self._verified) > _MAX_VERIFIED:
                self._verified.popitem(last=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one thread of all processes at a time change what the folder holds, and count it."""
        with self._lock:
            fcntl.flock(self._books, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._books, fcntl.LOCK_UN)

    def _used(self) -> int:
        return int.from_bytes(os.pread(self._books, 8, 0), "little")

    def _set_used(self, num_bytes: int) -> None:
        os.pwrite(self._books, max(num_bytes, 0).to_bytes(8, "little"), 0)

    def _shrink_for(self, num_bytes: int) -> None:
        """Remove the oldest blocks where a file that is going to be written would not fit (locked)."""
        if self._used() + num_bytes > self.budget_bytes:
            self._shrink(int(_KEPT_SHARE * self.budget_bytes) - num_bytes)

    def _make_room(self, num_bytes: int) -> int:
        """Remove the oldest blocks because the disk is full; how many bytes that freed."""
        with self._locked():
            used = self._used()
            self._shrink(used - max(2 * num_bytes, int((1 - _KEPT_SHARE) * used)))
            return used - self._used()

    def _shrink(self, target_bytes: int) -> None:
        """Remove blocks, those used longest ago first, until at most so many bytes are left (locked)."""
        used, blocks = self._count()
        for _, size, path in sorted(blocks):
            if used <= target_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        self._set_used(used)

    def _count(self) -> tuple[int, list[tuple[int, int, str]]]:
        """The bytes of all files, and each block's time of use, bytes and path (locked)."""
        used, blocks = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith((".block", ".partial")):
                    try:
                        found = entry.stat()
                    except FileNotFoundError:  # a leftover that another process removes as it starts
                        continue
                    used += found.st_size
                    if entry.name.endswith(".block"):
                        blocks.append((found.st_mtime_ns, found.st_size, entry.path))
        return used, blocks

    def _remove(self, path: Path, num_bytes: int) -> None:
        """Remove a file that is counted (locked)."""
        path.unlink(missing_ok=True)
        self._set_used(self._used() - num_bytes)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob("*.partial"):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if _lock_if_current(descriptor, path):
                path.unlink()
            os.close(descriptor)


def _lock_if_current(descriptor: int, path: Path) -> bool:
    """Lock a file unless another process holds it, or it has another name by now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_sound(block: CachedBlock) -> bool:
    checksum = 0
    for offset in range(0, block.num_bytes, _PIECE_BYTES):
        checksum = google_crc32c.extend(checksum, block.read(offset, min(_PIECE_BYTES, block.num_bytes - offset)))
    return block.read(block.num_bytes, _FOOTER.size) == _FOOTER.pack(_MAGIC, block.num_bytes, checksum)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
