"""ImageNet (ILSVRC2012): folders of classes, or the archives as they are published.

SOURCE holds ``train/n01440764/*.JPEG`` and ``val/n01440764/*.JPEG``, or in place of either ``ILSVRC2012_img_train.tar``
(a tar of one tar per class) and ``ILSVRC2012_img_val.tar`` (flat). The latter's labels come from the development kit,
``ILSVRC2012_devkit_t12.tar.gz``. A label is the place of the class's
WordNet id among the sorted ids. Samples and their order are the same from folders and from archives.
"""

import gzip
import logging
import re
import tarfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np

from swav import storage
from swav.bars import progress_bar
from swav.data import tar
from swav.data.image_source import FileSource, images_in, list_folder
from swav.data.windows import Windows
from swav.storage import RangeFile
from swav.watchdog import progress
from swav_eval.datasets.listing import ArchivedImages, Split, is_image, numbered_lines, read_named

SPLITS = ("train", "val")
_NUM_CLASSES = 1000
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_WORDNET_ID = re.compile(r"n[0-9]{8}")
_VAL_NAME = "ILSVRC2012_val_{:08d}.JPEG"

_Found = tuple[str, int, int]  # name, first byte, number of bytes

logger = logging.getLogger(__name__)


def open_split(source: str, split: str) -> Split:
    """List a split; reads no image, and of archives the headers.

    Args:
        source: the folder; with archives, local or in a store.
        split: "train" or "val".

    Raises:
        ValueError: SOURCE does not hold what is described above.
        RuntimeError: an archive is damaged.
        OSError: the store or the disk fails.
    """
    folder = storage.absolute(source)
    classes, archive = storage.join(folder, split), storage.join(folder, f"ILSVRC2012_img_{split}.tar")
    images: FileSource | ArchivedImages
    if not storage.is_remote(folder) and Path(classes).is_dir():
        url, images = classes, _of_folders(Path(folder), split)
    elif storage.stat(archive) is not None:
        file = storage.open_file(archive)
        url, images = archive, _of_class_tars(file) if split == "train" else _of_flat_tar(file, folder)
    else:
        raise ValueError(
            f"{folder} holds neither {split}, a folder with one folder per class (n01440764 and so on), nor "
            f"{storage.name_of(archive)}; name the folder that does"
        )
    assert images.classes is not None
    if len(images.classes) != _NUM_CLASSES:
        logger.warning(
            "%s has %d classes, and ImageNet has %d: labels are places among those that are there",
            url,
            len(images.classes),
            _NUM_CLASSES,
        )
    return Split(images, url)


def _of_folders(folder: Path, split: str) -> FileSource:
    images = images_in(folder / split, list_folder(folder / split))
    if not isinstance(images, FileSource) or images.classes is None:
        raise ValueError(
            f"{folder / split} holds images without folders of classes, so their labels are not known; move it away "
            f"and put ILSVRC2012_img_{split}.tar into {folder}" + (f", with {_DEVKIT}.tar.gz" if split == "val" else "")
        )
    strange = [name for name in images.classes if not _WORDNET_ID.fullmatch(name)]
    if strange:
        raise ValueError(
            f"{folder / split} has a folder {strange[0]}, which is no WordNet id such as n01440764; for classes of "
            "your own, use `python -m swav.data.write_shards`"
        )
    other = folder / next(name for name in SPLITS if name != split)
    if other.is_dir():
        theirs = {path.name for path in other.iterdir() if path.is_dir() and _WORDNET_ID.fullmatch(path.name)}
        if theirs and theirs != set(images.classes):
            name = min(theirs ^ set(images.classes))
            raise ValueError(
                f"of {folder / split} and {other}, only one has images of {name}, so a label would mean different "
                "classes in them; complete the folders"
            )
    return images


@dataclass(frozen=True, slots=True)
class _Part:
    """A tar inside a tar."""

    file: RangeFile
    member: tar.TarMember

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        return f"{self.file.url}:{self.member.name}"

    def num_bytes(self) -> int:
        """Its size."""
        return self.member.num_bytes

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read a range."""
        return self.file.read(self.member.offset + offset, max(0, min(num_bytes, self.member.num_bytes - offset)))


def _of_class_tars(file: RangeFile) -> ArchivedImages:
    parts: dict[str, _Part] = {}
    for member in tar.walk(Windows(file)):
        wordnet_id, _, extension = storage.name_of(member.name).partition(".")
        if extension != "tar" or not _WORDNET_ID.fullmatch(wordnet_id) or wordnet_id in parts:
            raise ValueError(
                f"{file.url}: a tar such as n01440764.tar was expected for each class, once, not {member.name}; "
                "download the archive of the training images again"
            )
        parts[wordnet_id] = _Part(file, member)
    classes = sorted(parts)
    found: list[_Found] = []
    labels: list[int] = []
    num_members = 0
    for label, wordnet_id in enumerate(progress_bar(iterable=classes, desc="listing", unit="class", delay=0.5)):
        part = parts[wordnet_id]
        members = [
            (f"{wordnet_id}/{storage.name_of(member.name)}", part.member.offset + member.offset, member.num_bytes)
            for member in tar.walk(Windows(part))
        ]
        num_members += len(members)
        images = sorted(member for member in members if is_image(member[0]))
        _refuse_twice(part.url, images)
        found += images
        labels += [label] * len(images)
        progress()
    return _archived(file, found, labels, classes, num_members - len(found))


def _of_flat_tar(file: RangeFile, folder: str) -> ArchivedImages:
    members = list(tar.walk(Windows(file)))
    images = {storage.name_of(member.name): member for member in members if is_image(member.name)}
    url, truth = _devkit_file(folder, _TRUTH)
    numbers = list(numbered_lines(url, truth))
    if len(numbers) != len(members):
        raise ValueError(
            f"{url} has {len(numbers)} lines and {file.url} has {len(members)} files; they do not belong together"
        )
    wordnet_ids = _wordnet_ids(folder)
    classes = sorted(wordnet_ids.values())
    found: list[tuple[_Found, int]] = []
    for image, (line, text) in enumerate(numbers, 1):
        name = _VAL_NAME.format(image)
        member = images.get(name)
        if member is None:
            raise ValueError(f"{file.url} lacks {name}; download the archive of the validation images again")
        wordnet_id = wordnet_ids.get(int(text)) if text.isdecimal() else None
        if wordnet_id is None:
            raise ValueError(f"{url}, line {line}: {text!r} is no ILSVRC2012_ID of a class in meta.mat")
        found.append(((f"{wordnet_id}/{name}", member.offset, member.num_bytes), classes.index(wordnet_id)))
    found.sort()
    return _archived(file, [entry for entry, _ in found], [label for _, label in found], classes, 0)


def _archived(
    file: RangeFile, found: list[_Found], labels: list[int], classes: list[str], num_skipped: int
) -> ArchivedImages:
    spans = np.array([entry[1:] for entry in found], dtype=np.int64).reshape(-1, 2)
    return ArchivedImages(file, [name for name, _, _ in found], spans, labels, classes, num_skipped)


def _refuse_twice(url: str, images: list[_Found]) -> None:
    for one, other in pairwise(images):
        if one[0] == other[0]:
            raise ValueError(f"{url} holds {one[0]} twice; download the archive again")


def _wordnet_ids(folder: str) -> dict[int, str]:
    """The WordNet id of each class by its ILSVRC2012_ID, from the development kit's meta.mat."""
    from scipy.io import loadmat

    url, data = _devkit_file(folder, "meta.mat")
    try:
        synsets = np.atleast_1d(loadmat(BytesIO(data), squeeze_me=True)["synsets"])
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets if int(row["num_children"]) == 0]
    except Exception as error:  # what loadmat says of a damaged file is of many kinds
        raise ValueError(f"{url} is not the development kit's ({error!r}); download the kit again") from error
    wordnet_ids = dict(rows)
    if not rows or len(wordnet_ids) < len(rows) or len(set(wordnet_ids.values())) < len(rows):
        raise ValueError(f"{url} has no classes, or one of them twice; download the development kit again")
    return wordnet_ids


def _devkit_file(folder: str, name: str) -> tuple[str, bytes]:
    """The url and the content of a file of the development kit.

    It is read from the archive alone, whose checksum is verified: loadmat may crash the process on a damaged file.
    """
    packed = storage.join(folder, f"{_DEVKIT}.tar.gz")
    data = read_named(packed, remedy="the labels of ImageNet's validation images come from its development kit")
    try:
        with tarfile.open(fileobj=BytesIO(gzip.decompress(data)), mode="r:") as archive:
            file = archive.extractfile(f"{_DEVKIT}/data/{name}")
            return f"{packed}:{name}", b"" if file is None else file.read()
    except (KeyError, EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{packed} cannot be read as the development kit ({error}); download it again") from error
