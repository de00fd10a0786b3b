"""Places205 (appendix A.5): a list for each split, and a tree of images.

SOURCE holds ``train_places205.csv`` and ``val_places205.csv`` (lines such as ``a/abbey/gsun_0.jpg 0``: path and label,
from 0) and the images below ``images256``.
"""

import re
from collections.abc import Iterator

from swav import storage
from swav_eval.datasets.listing import Entry, Split, listed_files, text_lines

SPLITS = ("train", "val")
IMAGES = "images256"
_LINE = re.compile(r"(\S.*)\s([0-9]{1,9})")


def open_split(source: str, split: str) -> Split:
    """List a split; reads no image.

    Args:
        source: the folder, local or in a store.
        split: "train" or "val".

    Raises:
        ValueError: the list is missing or has a line that is no path and label, or a file is missing or named twice.
        OSError: the store or the disk fails.
    """
    folder = storage.absolute(source)
    url = storage.join(folder, f"{split}_places205.csv")
    return Split(listed_files(url, storage.join(folder, IMAGES), _entries(url)), url)


def _entries(url: str) -> Iterator[Entry]:
    remedy = f"Places205's lists stand beside the folder {IMAGES} of its images"
    for number, line in text_lines(url, remedy=remedy):
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{url}, line {number} must be a path and a label, as 'a/abbey/x.jpg 0'; it is {line!r}")
        yield Entry(f"line {number}", found[1].strip(), int(found[2]))
