"""What the readers of all data sets share: a split of images, as files that a list names or as members of a tar."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.bars import progress_bar
from swav.data.image_source import FileSource, ImageSource
from swav.data.scan import IMAGE_EXTENSIONS, known_extensions
from swav.storage import RangeFile
from swav.watchdog import progress


class Split(NamedTuple):
    """One split of a data set."""

    images: ImageSource
    url: str  # of the folder, list or archive that names its images; the index keeps it


class Entry(NamedTuple):
    """One image of a list."""

    where: str  # in the list, for messages
    name: str  # relative to the folder of images
    label: int


@dataclass(frozen=True, slots=True)
class ArchivedImages:
    """Images inside a tar, read in place by any number of threads; an ``ImageSource``."""

    file: RangeFile
    names: list[str]  # with extensions
    spans: NDArray[np.int64]  # [n, 2]: first byte, and number of bytes
    labels: list[int] | None
    classes: list[str] | None
    num_skipped: int

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """A digest of names, places and labels, and of the tar's size and ETag or modification time."""
        found = self.file.stat
        facts = [found.num_bytes, found.mtime_ns, found.etag, self.names, self.labels]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(self.spans.astype("<i8").tobytes())
        return digest.hexdigest()

    def load(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read one image, as it is.

        Raises:
            RuntimeError: the tar ends before the image does.
            OSError: it cannot be read.
        """
        offset, num_bytes = self.spans[number].tolist()
        data = self.file.read(offset, num_bytes)
        if len(data) < num_bytes:
            raise RuntimeError(f"{self.file.url} ends inside {self.names[number]}: it has changed while it was read")
        stem, _, extension = self.names[number].rpartition(".")
        members = {extension.lower(): data}
        if self.labels is not None:
            members["cls"] = str(self.labels[number]).encode()
        return stem, members


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def text_lines(url: str, *, remedy: str) -> Iterator[tuple[int, str]]:
    """The lines of a list with their numbers; empty ones are passed over.

    Raises:
        ValueError: there is no such list, it is not UTF-8, or it is empty. The message ends in the remedy.
        OSError: it cannot be read.
    """
    return numbered_lines(url, read_named(url, remedy=remedy))


def numbered_lines(url: str, data: bytes) -> Iterator[tuple[int, str]]:
    """As :func:`text_lines`, of a list that was read.

    Raises:
        ValueError: it is not UTF-8, or empty.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{url} is empty; it names one image on each line")
    return iter(found)


def read_named(url: str, *, remedy: str) -> bytes:
    """Read a file that has to be there.

    Raises:
        ValueError: it is not. The message ends in the remedy.
        OSError: it cannot be read.
    """
    if storage.stat(url) is None:
        raise ValueError(f"there is no {url}; {remedy}")
    return storage.read(url)


def listed_files(url: str, root: str, entries: Iterable[Entry]) -> FileSource:
    """The files that a list names, in its order.

    That files of a store are there is not asked, which would cost a request each; reading them tells.

    Args:
        url: of the list, for messages.
        root: the folder of the images.
        entries: of the list.

    Raises:
        ValueError: a file is missing, is no image by its name, or is named twice.
    """
    names: dict[str, str] = {}
    labels: list[int] = []
    for where, name, label in progress_bar(iterable=entries, desc="looking for images", unit="image", delay=0.5):
        file = storage.join(root, name)
        if name in names:
            raise ValueError(f"{url}, {where}: {name} stands there a second time (first: {names[name]}); name it once")
        if not is_image(name):
            raise ValueError(f"{url}, {where}: {name} is no image by its name; known: {known_extensions()}")
        if not storage.is_remote(file) and not Path(file).is_file():
            raise ValueError(f"{url}, {where}: there is no file {file}; unpack the images there")
        names[name] = where
        labels.append(label)
        if len(labels) % 10_000 == 0:
            progress()
    return FileSource(root, list(names), labels, None, 0)
