"""Reads a shard's headers, or all of it, in few requests."""

from swav.data.tar import Readable

_SMALL_BYTES = 4 << 10  # holds a .cls, a .json and the headers around them
_LARGE_BYTES = 256 << 10
_NEAR_BYTES = 32 << 10  # bytes passed over are cheaper than a request of their own: about 1 ms of a connection
_WHOLE_BYTES = 8 << 20


class Windows:
    """A file that is read forwards in windows, from one thread.

    Where members are large, every window is a few KiB that begin at a header: one request per image, and no more of the
    image than what is left of the window. Where the next header is always near, windows grow, and images are read too.
    """

    def __init__(self, file: Readable, *, whole: bool = False) -> None:
        """Read through windows.

        Args:
            file: where the bytes are; read by nobody else meanwhile.
            whole: every byte will be asked for, so that windows are large.
        """
        self.url = file.url
        self._file = file
        self._smallest, self._largest = (_WHOLE_BYTES, _WHOLE_BYTES) if whole else (_SMALL_BYTES, _LARGE_BYTES)
        self._num_bytes = file.num_bytes()
        self._start, self._data = 0, b""
        self._window = self._smallest // 2  # doubled before the first one

    def num_bytes(self) -> int:
        """The size of the file when it was opened."""
        return self._num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range; shorter than asked for only where the file ends."""
        first = offset - self._start
        last = min(first + num_bytes, self._num_bytes - self._start)
        if first < 0 or last > len(self._data):
            self._fetch(offset, num_bytes)
            first, last = 0, num_bytes
        return self._data[first:last]

    def forget(self) -> None:
        """Read everything anew from here on."""
        self._data = b""

    def _fetch(self, offset: int, num_bytes: int) -> None:
        skipped = offset - (self._start + len(self._data))
        near = offset >= self._start and skipped <= _NEAR_BYTES
        self._window = min(2 * self._window, self._largest) if near else self._smallest
        kept = self._data[offset - self._start :] if near else b""  # no byte is asked for twice
        wanted = min(max(num_bytes, self._window), self._num_bytes - offset)
        self._start = offset
        self._data = kept + self._file.read(offset + len(kept), max(wanted - len(kept), 0))
