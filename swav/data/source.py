"""What a user may name as data: shards, a folder of images, or the embedded demo."""

import errno
import logging
from pathlib import Path

import numpy as np

from swav import storage
from swav.data.demo import DEMO_VERSION, write_demo_shards
from swav.data.image_source import ImageSource, find_images, images_in, list_folder
from swav.data.index import DatasetIndex, open_index
from swav.data.reader import ShardReader
from swav.data.write_shards import write_images

_logger = logging.getLogger(__name__)


def open_dataset(url: str) -> DatasetIndex:
    """Open the data set at ``url``. The first process on a host prepares it, others wait.

    Args:
        url: shards, as :func:`swav.data.index.open_index` takes them; a folder of images, flat or with a subfolder per
            class, or a .csv or .jsonl list of them, which is written as shards into the cache first; or ``demo/train``
            or ``demo/test``, which are made on the spot. A folder of that name is ``./demo/train``.

    Raises:
        ValueError: there is nothing of the kind at ``url``, or images and tars side by side.
        RuntimeError: a shard is damaged, an image cannot be read, or the cache is full.
    """
    if url in ("demo/train", "demo/test"):
        return open_index(_demo_shards(url.removeprefix("demo/")))
    try:
        location = storage.absolute(url)
        folder = None if storage.is_remote(url) or not Path(location).is_dir() else Path(location)
        if folder is None and location.lower().endswith((".csv", ".jsonl")):
            return _shards_of_images(url, find_images(url))
        if folder is None or (folder / "index.json").exists():
            return open_index(url)
        listing = list_folder(folder)
        return open_index(url) if listing.tars else _shards_of_images(url, images_in(folder, listing))
    except OSError as error:
        remedy = "mend that"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"free space in {storage.cache_folder()}, or set SWAV_CACHE to a larger folder"
        raise RuntimeError(f"{url} cannot be prepared: {error}; {remedy}, then run the same command again") from error


def has_labels(index: DatasetIndex) -> bool:
    """Whether the samples have labels; reads the index, and one label.

    Raises:
        ValueError: some have and others have not, or the first label is no number.
    """
    labelled = int(index.table["labelled"].sum(dtype=np.int64))
    first_without = -1
    partly = np.flatnonzero(index.table["labelled"] < index.table["rows"])
    if labelled and partly.size:
        rows = index.rows(int(partly[0]))
        first_without = int(index.row_offsets[partly[0]]) + int((rows["cls_offset"] == 0).argmax())
    with ShardReader(index) as reader:
        if first_without >= 0:
            raise ValueError(
                f"{reader.name(first_without)} has no label (.cls), and {labelled} of {index.num_samples} samples have "
                "one; label all or none"
            )
        if labelled:
            reader.label(0)
    return labelled > 0


def _demo_shards(split: str) -> str:
    folder = storage.cache_folder() / f"demo-{DEMO_VERSION}"
    with storage.locked(folder.with_suffix(".lock")):
        if not folder.exists():
            write_demo_shards(folder)
    return str(folder / split)


def _shards_of_images(url: str, images: ImageSource) -> DatasetIndex:
    digest = images.digest()
    folder = storage.cache_folder() / "shards" / digest[:32]
    with storage.locked(folder.with_suffix(".lock")):
        if not (folder / "index.json").exists():
            _logger.info("writing the images of %s as shards into %s", url, folder)
        return write_images(images, digest, url, str(folder))
