"""A list that names images, one on each line, with or without folders and extension, as SimCLR's ``1percent.txt``."""

import re
from collections.abc import Iterator

from swav import storage
from swav.data.scan import IMAGE_EXTENSIONS
from swav.data.shard_writer import key_name
from swav.storage import Location

_NUMBERED_KEY = re.compile(r"[0-9]{9}-(.+)")


class NameList:
    """The names, and which of them an image of a shard has.

    An image has a name if the last parts of their paths are equal, extensions apart, and the folders of one are the end
    of the other's; of several such names, the one that shares most of the path.

    A key of our own shards is a number and the end of the old path, with ``_`` for slashes and other signs; the same is
    then done to the name, and a last part may begin after any ``_``.

    Attributes:
        lines: the line of each name.
    """

    def __init__(self, url: Location) -> None:
        """Read the list.

        Raises:
            ValueError: there is none, it is not UTF-8 or empty, or names an image twice.
            OSError: it cannot be read.
        """
        if storage.stat(url) is None:
            raise ValueError(f"subset.names: there is no {url}")
        try:
            text = storage.read(url).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{url} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
        self.lines: dict[str, int] = {}
        self._exact, self._keyed = _Paths("/"), _Paths("_")
        seen: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            name = line.strip()
            path = _without_extension(name.strip("/"))
            if not path:
                continue
            if path in seen:
                raise ValueError(f"{url}, line {number}: {name} stands there a second time (first: line {seen[path]})")
            seen[path] = self.lines[name] = number
            ends = list(_ends(path, "/"))
            self._exact.add(ends, name)
            self._keyed.add([key_name(end) for end in ends], name)
        if not self.lines:
            raise ValueError(f"{url} is empty; it names one image on each line")

    def match(self, member: str) -> str | None:
        """The name, as it is listed, of the image with this path inside its tar; None where it is not listed."""
        path = _without_extension(member)
        numbered = _NUMBERED_KEY.fullmatch(path.rpartition("/")[2])
        return self._exact.find(path) if numbered is None else self._keyed.find(numbered[1])


class _Paths:
    """Names by their paths and by the ends of these."""

    def __init__(self, separator: str) -> None:
        """Have none; paths have this between their parts."""
        self._separator = separator
        self._whole: dict[str, str] = {}
        self._ends: dict[str, str] = {}

    def add(self, ends: list[str], name: str) -> None:
        """Add a name: its path, and what follows each of the path's folders."""
        self._whole.setdefault(ends[0], name)
        for end in ends[1:]:
            self._ends.setdefault(end, name)

    def find(self, path: str) -> str | None:
        """The name that shares most of an image's path."""
        found = self._whole.get(path) or self._ends.get(path)
        return found or next((self._whole[end] for end in _ends(path, self._separator) if end in self._whole), None)


def _without_extension(path: str) -> str:
    stem, _, extension = path.rpartition(".")
    return stem if stem and extension.lower() in IMAGE_EXTENSIONS else path


def _ends(path: str, separator: str) -> Iterator[str]:
    """A path, and what follows each separator in it."""
    yield path
    start = path.find(separator)
    while start >= 0:
        yield path[start + 1 :]
        start = path.find(separator, start + 1)
