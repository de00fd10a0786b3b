"""Finds the images that a user names: a folder, a list of files, or shards."""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swav import storage
from swav.data.image_list import read_list
from swav.data.index import open_index
from swav.data.reader import ShardReader
from swav.data.scan import IMAGE_EXTENSIONS, known_extensions

_SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"))


class ImageSource(Protocol):
    """All samples of a source, in its sorted order."""

    @property
    def classes(self) -> list[str] | None:
        """The name of each label, where classes have names."""

    @property
    def num_skipped(self) -> int:
        """Files or keys that are no images."""

    def __len__(self) -> int:
        """How many samples there are."""

    def digest(self) -> str:
        """Changes when an image or a label is added, removed or changed; reads no image."""

    def load(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read a sample: what it is called there, and its members by extension."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """Images as files, of this machine or of a store."""

    root: str  # a folder's url
    names: list[str]  # relative to the root, or absolute
    labels: list[int] | None
    classes: list[str] | None
    num_skipped: int

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """A digest of names and labels, and of sizes and modification times.

        A store is not asked for the latter, which would cost a request per image.

        Raises:
            ValueError: a name is no regular file, such as a link to nothing.
            RuntimeError: a file cannot be looked at.
        """
        digest = hashlib.sha256()
        for number, name in enumerate(self.names):
            url = storage.join(self.root, name)
            facts: list[object] = [url]
            if not storage.is_remote(url):
                found = _stat_file(Path(url))
                facts = [name, found.st_size, found.st_mtime_ns]
            facts.append(None if self.labels is None else self.labels[number])
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def load(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read one file, as it is.

        Raises:
            RuntimeError: it cannot be read.
        """
        name = self.names[number]
        url = storage.join(self.root, name)
        suffix = Path(name).suffix
        try:
            members = {suffix[1:].lower(): storage.read(url) if storage.is_remote(url) else Path(url).read_bytes()}
        except OSError as error:
            reason = error.strerror or str(error)
            raise RuntimeError(f"{url} cannot be read ({reason}); make it readable, or leave it out") from error
        if self.labels is not None:
            members["cls"] = str(self.labels[number]).encode()
        return name.removesuffix(suffix), members


@dataclass(frozen=True, slots=True)
class TarSource:
    """Samples of shards."""

    reader: ShardReader
    classes: list[str] | None
    num_skipped: int

    def __len__(self) -> int:
        return self.reader.index.num_samples

    def digest(self) -> str:
        """A digest of the shards' names, sizes and ETags or modification times."""
        table = self.reader.index.table
        facts = f"{self.reader.index.identity} {table['mtime_ns'].tolist()} {table['etag'].tolist()}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def load(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read a sample's image, label and JSON."""
        stem, _, extension = self.reader.member_name(number).rpartition("/")[2].partition(".")
        members = {extension.rpartition(".")[2].lower(): self.reader.image(number)}
        for kind in ("cls", "json"):
            data = self.reader.member(number, kind)
            if data is not None:
                members[kind] = data
        return stem, members


def find_images(source: str) -> ImageSource:
    """List the samples of a source; reads no image.

    Args:
        source: a folder of images (no labels); a folder with one subfolder for each class (the label is the place of
            the subfolder's name among the sorted names; images may lie deeper); tars, as a folder, a pattern or one
            file; or a ``.csv`` or ``.jsonl`` list with ``path`` (of a file, or a url) and, if there are labels,
            ``label``. Tars and lists may stand in a store.

    Raises:
        ValueError: there are no images, or it is not clear what is meant; says what to do.
    """
    location = storage.absolute(source)
    if not storage.is_remote(source) and Path(location).is_dir():
        return images_in(Path(location), list_folder(Path(location)))
    if location.lower().endswith((".csv", ".jsonl")):
        return _from_list(location)
    if storage.is_remote(source):
        return _from_tars(source, location.rpartition("/")[0] if location.endswith(".tar") else location)
    if location.endswith(".tar") or storage.has_pattern(source):
        return _from_tars(source, location.rpartition("/")[0])
    if Path(location).exists():
        raise ValueError(f"{source} is one file; give a folder of images, a .csv or .jsonl list, or tars")
    raise ValueError(f"{source}: there is no such folder; give a folder, a .csv or .jsonl list, or tars")


@dataclass(frozen=True, slots=True)
class FolderListing:
    """What a folder holds, of one kind at most; sorted, relative to it."""

    names: list[str]  # of all files below
    tars: list[str]
    images: list[str]  # directly in it
    nested: list[str]  # images in its subfolders


def list_folder(folder: Path) -> FolderListing:
    """List a folder's tree.

    Raises:
        ValueError: it holds tars and images, or images and folders of images: one of them would be forgotten.
        RuntimeError: a part of it cannot be listed.
    """
    names = _files_below(folder)
    top = [name for name in names if "/" not in name]
    tars = [name for name in top if name.endswith(".tar")]
    images = [name for name in top if _is_image(name)]
    nested = [name for name in names if "/" in name and _is_image(name)]
    kinds = {"tars": tars, "images": images, "images in subfolders": nested}
    present = [f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds.items() if found]
    if len(present) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(present)}; put one kind into a folder of its own and name that"
            + (f", or name the tars alone as '{folder}/*.tar'" if tars else "")
        )
    return FolderListing(names, tars, images, nested)


def images_in(folder: Path, listing: FolderListing) -> ImageSource:
    """The samples of a folder that was listed; see :func:`find_images`."""
    names, images, nested = listing.names, listing.images, listing.nested
    if listing.tars:
        return _from_tars(str(folder), str(folder))
    classes = sorted({name.partition("/")[0] for name in nested})
    if classes and {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"{folder} holds {', '.join(classes)}, which look like splits and not classes; name one of them, for "
            f"example {folder / classes[0]}"
        )
    if images:
        return FileSource(str(folder), images, None, None, len(names) - len(images))
    if not classes:
        raise ValueError(f"{folder}: no images found ({_kinds(names)}); known extensions: {known_extensions()}")
    unwritable = [name for name in classes if len(name.splitlines()) != 1]
    if unwritable:
        raise ValueError(f"{folder} has a folder named {unwritable[0]!r}, which is no line of text; rename it")
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name.partition("/")[0]] for name in nested]
    return FileSource(str(folder), nested, labels, classes, len(names) - len(nested))


def _kinds(names: list[str]) -> str:
    """What files there are instead of images."""
    suffixes = Counter(Path(name).suffix.lower() or "without extension" for name in names)
    found = f"{len(names)} other files"
    if names:
        found += ": " + ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3))
    if ".tar" in suffixes:
        tar = next(name for name in names if name.lower().endswith(".tar"))
        found += f"; to use tars, name their folder, here {os.path.dirname(tar)}"  # noqa: PTH120
    return found


def _files_below(folder: Path) -> list[str]:
    """All files of a tree, hidden ones apart, as sorted relative paths.

    Raises:
        ValueError: a link leads back to a folder that it is in.
        RuntimeError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise RuntimeError(
            f"the folder {error.filename} cannot be read ({error.strerror}); make it readable, or move it away"
        ) from error

    names: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = Path(root).resolve()
        for name in folders:
            link = Path(root, name)
            if link.is_symlink() and real.is_relative_to(link.resolve()):
                raise ValueError(f"{link} is a link to a folder that it is in; remove it")
        prefix = os.path.relpath(root, folder) + "/" if Path(root) != folder else ""
        names += [prefix + name for name in files if not name.startswith(".")]
    return sorted(names)


def _from_list(url: str) -> ImageSource:
    rows = read_list(url)
    texts = [label for _, _, label in rows if label is not None]
    if len(texts) not in (0, len(rows)):
        line = next(line for line, _, label in rows if label is None)
        raise ValueError(f"{url}, line {line} has no label and others have one; label all images or none")
    numbered = all(re.fullmatch(r"-?[0-9]+", text) for text in texts)
    classes = None if numbered else sorted(set(texts))
    numbers = {text: int(text) if classes is None else classes.index(text) for text in set(texts)}
    folder = url.rpartition("/")[0]
    names, labels = [], []
    for line, name, label in rows:
        file = storage.join(folder, name)
        if not storage.is_remote(file) and not Path(file).is_file():
            raise ValueError(f"{url}, line {line}: there is no file {file} (paths are relative to the list)")
        if _is_image(name):
            names.append(name)
            labels += [] if label is None else [numbers[label]]
    if not names:
        listed = [name for _, name, _ in rows]
        raise ValueError(f"{url}: no images found ({_kinds(listed)}); known extensions: {known_extensions()}")
    return FileSource(folder, names, labels or None, classes, len(rows) - len(names))


def _from_tars(url: str, folder: str) -> ImageSource:
    index = open_index(url)
    names = storage.join(folder, "classes.txt")
    classes = None
    if storage.stat(names) is not None:
        classes = storage.read(names).decode("utf-8", "surrogateescape").splitlines()
    return TarSource(ShardReader(index), classes, int(index.table["keys_without_image"].sum()))


def _stat_file(path: Path) -> os.stat_result:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} is a link to nothing, or has just gone; remove it, or mend the link") from None
    except OSError as error:
        raise RuntimeError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file (a pipe or a device); remove it")
    return found


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS
