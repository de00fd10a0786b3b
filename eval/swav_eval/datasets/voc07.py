"""Pascal VOC (VOC07, appendix A.5): images in which several classes are present.

SOURCE is a folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, or one with ``VOC2007`` or
``VOCdevkit/VOC2007`` in it, or a tar that holds such a folder, as ``VOCtrainval_06-Nov-2007.tar``. A split is
``ImageSets/Main/<split>.txt``. A sample has no ``.cls``; its ``.json`` is ``{"present": [...], "difficult": [...]}``:
classes with an object that is not difficult, and classes all of whose objects are (neither positive nor negative).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from swav import storage
from swav.bars import progress_bar
from swav.data import tar
from swav.data.image_source import FileSource, ImageSource
from swav.data.windows import Windows
from swav.watchdog import progress
from swav_eval.datasets.listing import ArchivedImages, Split, numbered_lines, read_named

SPLITS = ("train", "val", "trainval", "test")
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_FOLDERS = ("", "VOC2007", "VOCdevkit/VOC2007")
_THREADS = 16  # that read annotations
_DECLARATION = re.compile(r"<!(DOCTYPE|ENTITY)")


@dataclass(frozen=True, slots=True)
class AnnotatedImages:
    """Images with a ``.json`` each; an ``ImageSource``."""

    images: FileSource | ArchivedImages
    annotations: list[bytes]
    classes: list[str] | None

    @property
    def num_skipped(self) -> int:
        """Only what the split names is looked at."""
        return 0

    def __len__(self) -> int:
        return len(self.annotations)

    def digest(self) -> str:
        """A digest of the images', and of the annotations."""
        return hashlib.sha256(b"\n".join([self.images.digest().encode(), *self.annotations])).hexdigest()

    def load(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Read one image, as it is.

        Raises:
            RuntimeError, OSError: it cannot be read.
        """
        stem, members = self.images.load(number)
        return stem, members | {"json": self.annotations[number]}


def open_split(source: str, split: str) -> Split:
    """Read a split's list and annotations; reads no image.

    Args:
        source: a folder or a tar, local or in a store.
        split: "train", "val", "trainval" or "test".

    Raises:
        ValueError: there is no such split; its list names what is not there, or something twice; or an annotation is
            not as VOC has them.
        RuntimeError: the tar is damaged.
        OSError: the store or the disk fails.
    """
    url = storage.absolute(source)
    return _from_tar(url, split) if url.endswith(".tar") else _from_folder(url, split)


def _from_folder(folder: str, split: str) -> Split:
    roots = [storage.join(folder, name) if name else folder for name in _FOLDERS]
    root = next((root for root in roots if storage.stat(_list_of(root, split)) is not None), None)
    if root is None:
        found = sorted({name for root in roots for name in storage.list_names(_list_of(root, ""), "*.txt")})
        raise _no_split(folder, split, found)
    url = _list_of(root, split)
    names = _names(url, read_named(url, remedy="restore it"))
    if not storage.is_remote(root):
        for name, line in names.items():
            for file in (f"Annotations/{name}.xml", f"JPEGImages/{name}.jpg"):
                if not Path(root, file).is_file():
                    raise _missing(url, line, storage.join(root, file))
    annotations = _annotations(names, lambda name: storage.join(root, "Annotations", f"{name}.xml"), storage.read)
    images = FileSource(storage.join(root, "JPEGImages"), [f"{name}.jpg" for name in names], None, None, 0)
    return Split(_annotated(images, annotations), url)


def _from_tar(url: str, split: str) -> Split:
    if storage.stat(url) is None:
        raise ValueError(f"there is no {url}; a folder or a tar of Pascal VOC was expected")
    file = storage.open_file(url)
    members = {member.name: member for member in tar.walk(Windows(file))}
    suffix = _list_of("", split)
    lists = [name for name in members if f"/{name}".endswith(suffix)]
    if not lists:
        found = [name.rpartition("/")[2] for name in members if "/ImageSets/Main/" in f"/{name}"]
        raise _no_split(url, split, found)
    if len(lists) > 1:
        raise ValueError(f"{url} holds {' and '.join(sorted(lists))}; unpack it, and name the folder of one")

    def read(name: str) -> bytes:
        return file.read(members[name].offset, members[name].num_bytes)

    root = lists[0].removesuffix(suffix[1:])
    names = _names(f"{url}:{lists[0]}", read(lists[0]))
    for name, line in names.items():
        for path in (f"{root}Annotations/{name}.xml", f"{root}JPEGImages/{name}.jpg"):
            if path not in members:
                raise _missing(f"{url}:{lists[0]}", line, f"{path} in {url}")
    annotations = _annotations(names, lambda name: f"{root}Annotations/{name}.xml", read)
    places = [members[f"{root}JPEGImages/{name}.jpg"] for name in names]
    spans = np.array([(member.offset, member.num_bytes) for member in places], dtype=np.int64)
    images = ArchivedImages(file, [f"{name}.jpg" for name in names], spans, None, None, 0)
    return Split(_annotated(images, annotations), f"{url}:{lists[0]}")


def _list_of(root: str, split: str) -> str:
    folder = f"{root.rstrip('/')}/ImageSets/Main"
    return f"{folder}/{split}.txt" if split else folder


def _no_split(url: str, split: str, found: list[str]) -> ValueError:
    known = [name for name in SPLITS if f"{name}.txt" in found]
    what = f"it has {', '.join(known)}" if known else "it has no split; Pascal VOC's folder or tar was expected"
    return ValueError(f"{url} has no ImageSets/Main/{split}.txt: {what}")


def _missing(url: str, line: int, what: str) -> ValueError:
    return ValueError(f"{url}, line {line}: there is no {what}; unpack the data set anew, or take the line out")


def _names(url: str, data: bytes) -> dict[str, int]:
    """The names of a list in its order, with their lines."""
    names: dict[str, int] = {}
    for line, name in numbered_lines(url, data):
        if re.search(r"[\s/]", name):
            raise ValueError(f"{url}, line {line} must be the name of one image, such as 000005; it is {name!r}")
        if name in names:
            raise ValueError(f"{url}, line {line}: {name} stands there a second time (first: line {names[name]})")
        names[name] = line
    return names


def _annotations(
    names: Iterable[str], path_of: Callable[[str], str], read: Callable[[str], bytes]
) -> list[dict[str, list[str]]]:
    paths = [path_of(name) for name in names]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="swav-voc") as pool:
        found = []
        read_ahead = pool.map(read, paths)
        for path in progress_bar(iterable=paths, desc="reading annotations", unit="image", delay=0.5):
            found.append(classes_of(path, next(read_ahead)))
            progress()
        return found


def classes_of(path: str, data: bytes) -> dict[str, list[str]]:
    """The classes of an annotation: those present, and those all of whose objects are difficult; each sorted.

    Args:
        path: of the annotation, for messages.
        data: its XML; one that declares a document type or entities is refused, as it can grow without bound.

    Raises:
        ValueError: it is no annotation of Pascal VOC's.
    """
    try:
        text = data.decode("utf-8-sig")  # so that what is searched is what is parsed
        if _DECLARATION.search(text):
            raise ValueError(f"{path} declares a document type or entities, which no annotation of VOC's does")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise ValueError(f"{path} is no XML in UTF-8 ({error}); unpack the data set anew") from error
    if root.tag != "annotation":
        raise ValueError(f"{path} must be an <annotation>, as Pascal VOC has them; it is a <{root.tag}>")
    present: set[str] = set()
    seen: set[str] = set()
    for entry in root.findall("object"):
        name = (entry.findtext("name") or "").strip()
        difficult = (entry.findtext("difficult") or "0").strip()
        if len(name.splitlines()) != 1 or difficult not in ("0", "1"):
            raise ValueError(f"{path}: an object needs a name, and difficult as 0 or 1; it has {name!r}, {difficult!r}")
        seen.add(name)
        if difficult == "0":
            present.add(name)
    return {"present": sorted(present), "difficult": sorted(seen - present)}


def _annotated(images: FileSource | ArchivedImages, annotations: list[dict[str, list[str]]]) -> ImageSource:
    seen = {name for found in annotations for names in found.values() for name in names}
    classes = list(CLASSES) if seen <= set(CLASSES) else sorted(seen)
    return AnnotatedImages(images, [json.dumps(found).encode() for found in annotations], classes)
