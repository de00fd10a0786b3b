"""iNaturalist 2018 (appendix A.5): a COCO-like list for each split, and a tree of images.

SOURCE holds ``train2018.json`` and ``val2018.json``, with ``images`` (``id`` and ``file_name``) and ``annotations``
(``image_id`` and ``category_id``), and the files that they name, ``train_val2018/...``. Labels are the categories' ids.
"""

import json
from collections.abc import Iterator
from typing import Any

from swav import storage
from swav_eval.datasets.listing import Entry, Split, listed_files, read_named

SPLITS = ("train", "val")


def open_split(source: str, split: str) -> Split:
    """List a split; reads no image.

    Args:
        source: the folder, local or in a store.
        split: "train" or "val".

    Raises:
        ValueError: the list is missing or not as described, an image has no category or two, or a file is missing or
            named twice.
        OSError: the store or the disk fails.
    """
    folder = storage.absolute(source)
    url = storage.join(folder, f"{split}2018.json")
    data = read_named(url, remedy="iNaturalist 2018's lists stand beside the folder train_val2018 of its images")
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{url} is no JSON ({error}); download it again") from error
    return Split(listed_files(url, folder, _entries(url, record)), url)


def _entries(url: str, record: Any) -> Iterator[Entry]:
    """The images in the list's order."""
    categories: dict[int, int] = {}
    for number, annotation in enumerate(_list(url, record, "annotations")):
        image = _field(url, annotation, f"annotations[{number}]", "image_id", int)
        if image in categories:
            raise ValueError(f"{url}, annotations[{number}]: image {image} has a category already; it needs one")
        categories[image] = _field(url, annotation, f"annotations[{number}]", "category_id", int)
        if categories[image] < 0:
            raise ValueError(f"{url}, annotations[{number}]: category_id {categories[image]} is below 0")
    for number, image in enumerate(_list(url, record, "images")):
        where = f"images[{number}]"
        category = categories.pop(_field(url, image, where, "id", int), None)
        name = _field(url, image, where, "file_name", str)
        if category is None:
            raise ValueError(f"{url}, {where}: {name} has no annotation with its id, or another image has that id")
        yield Entry(where, name, category)
    if categories:
        raise ValueError(f"{url} has {len(categories)} annotations of images that it lacks; first: {min(categories)}")


def _list(url: str, record: Any, name: str) -> list[Any]:
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{url} must be an object with the lists images and annotations; {name} is no such list")
    return found


def _field(url: str, entry: Any, where: str, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{url}, {where} must be an object with {name} of type {kind.__name__}; it has {value!r}")
    return value
