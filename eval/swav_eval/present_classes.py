"""Which classes are in which image, for data sets with several to an image (VOC07, appendix A.5).

A sample has a ``.json`` with ``{"present": [...], "difficult": [...]}``, names of classes, of which the difficult ones
are neither in the image nor absent from it; or it has a ``.cls`` alone, and then one class.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swav import storage
from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.features import label_of
from swav.watchdog import progress
from swav_eval.config import EvaluationRuntime

_READ_AHEAD = 4096
CLASSES_FILE = "classes.txt"

_Names = tuple[frozenset[str], frozenset[str]]  # present, difficult


@dataclass(frozen=True, slots=True)
class Presence:
    """Which classes are in the images of one data set."""

    present: NDArray[np.bool_]  # [n, classes]
    ignored: NDArray[np.bool_]  # [n, classes], where a class is only difficult


def read_presence(
    samples: Mapping[str, tuple[DatasetIndex, NDArray[np.int64]]], runtime: EvaluationRuntime
) -> tuple[tuple[str, ...], dict[str, Presence]]:
    """Read the classes of some samples of some data sets.

    The classes are those of the ``classes.txt`` beside the shards, one name per line, in its order; without one, all
    names that occur, sorted. A ``.cls`` counts its lines from 0; without the file, its number is the name.

    Args:
        samples: by "train" and "test", the data set and the sample ids int64 [n].
        runtime: how shards in an object store are read.

    Returns:
        The names of the classes, and which are where, by "train" and "test".

    Raises:
        ValueError: a sample has neither a ``.json`` with classes nor a ``.cls``, or one that cannot be understood, or a
            class that is not in classes.txt; or the data sets number their classes differently.
        RuntimeError, OSError: a shard cannot be read.
    """
    lists = {name: _listed(index) for name, (index, _) in samples.items()}
    listed = list(dict.fromkeys(line for lines in lists.values() for line in lines))
    found: dict[str, list[_Names]] = {}
    for name, (index, ids) in samples.items():
        with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
            found[name] = []
            for place, sample_id in enumerate(ids.tolist()):
                if place % _READ_AHEAD == 0:
                    reader.prefetch(ids[place : place + _READ_AHEAD])
                    progress()
                found[name].append(_names(reader, sample_id, lists, listed))
    occurring = {one for names in found.values() for present, difficult in names for one in present | difficult}
    classes = tuple(listed) or tuple(
        sorted(occurring, key=lambda one: (int(one) if one.isdecimal() else math.inf, one))
    )
    return classes, {name: _presence(classes, names) for name, names in found.items()}


def check_counts(classes: tuple[str, ...], train: Presence, test: Presence, *, num_folds: int) -> None:
    """Refuse classes that cannot be cross-validated, and test images that judge none.

    Raises:
        ValueError: names the class, and says how many images have it.
    """
    for number, name in enumerate(classes):
        with_it = int(train.present[:, number].sum())
        without = len(train.present) - with_it - int(train.ignored[:, number].sum())
        if min(with_it, without) < num_folds:
            raise ValueError(
                f"of the training images, {with_it} have the class {name!r} and {without} have not (those in which it "
                f"is only difficult do not count); num_folds={num_folds} needs as many of each: give more images, or "
                "fewer folds (at least 2), or leave the class out of the data"
            )
    if not test.present.any():
        raise ValueError(f"no test image has any of the {len(classes)} classes; give other --test images")


def _listed(index: DatasetIndex) -> list[str]:
    """The lines of the classes.txt beside the shards; none where there is no such file."""
    url = storage.join(index.shard_url(0).rpartition("/")[0], CLASSES_FILE)
    if storage.stat(url) is None:
        return []
    lines = storage.read(url).decode("utf-8", "surrogateescape").splitlines()
    if not lines or len(set(lines)) < len(lines) or not all(lines):
        raise ValueError(f"{url} must have one name per line, each once, and no empty line")
    return lines


def _names(reader: ShardReader, sample_id: int, lists: Mapping[str, list[str]], listed: list[str]) -> _Names:
    """The classes of a sample."""
    text = reader.member(sample_id, "json")
    names = None if text is None else _of_json(reader, sample_id, text)
    if names is None:
        return frozenset([_of_label(reader, sample_id, lists, listed)]), frozenset()
    unknown = sorted((names[0] | names[1]).difference(listed)) if listed else []
    if unknown:
        near = difflib.get_close_matches(unknown[0], listed, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{reader.name(sample_id)}.json has the class {unknown[0]!r}, which is not in {CLASSES_FILE}; the nearest "
            f"of {len(listed)} there is {near!r}"
        )
    return names


def _of_json(reader: ShardReader, sample_id: int, text: bytes) -> _Names | None:
    """What a ``.json`` says of classes; None where it is about something else."""
    example = '{"present": ["dog"], "difficult": ["person"]}'
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{reader.name(sample_id)}.json is no JSON ({error}); {example} was expected") from error
    if not isinstance(record, dict) or "present" not in record:
        if reader.member(sample_id, "cls") is not None:
            return None
        raise ValueError(
            f"{reader.name(sample_id)}.json says nothing of classes, and there is no .cls; {example} was expected"
        )
    lists = record["present"], record.get("difficult", [])
    if not all(isinstance(names, list) and all(isinstance(name, str) and name for name in names) for names in lists):
        raise ValueError(f"{reader.name(sample_id)}.json must have lists of names, such as {example}")
    present, difficult = map(frozenset, lists)
    if present & difficult:
        raise ValueError(
            f"{reader.name(sample_id)}.json has {min(present & difficult)!r} as present and as difficult; a class is "
            "difficult where all its objects are"
        )
    return present, difficult


def _of_label(reader: ShardReader, sample_id: int, lists: Mapping[str, list[str]], listed: list[str]) -> str:
    """The name of the class in a ``.cls``."""
    label = label_of(reader, sample_id)
    if not listed:
        return str(label)
    if any(lines and lines != listed for lines in lists.values()):
        raise ValueError(
            f"{' and '.join(lists)} images have labels (.cls) that count the lines of different {CLASSES_FILE}; number "
            "them by one list"
        )
    if label >= len(listed):
        raise ValueError(
            f"{reader.name(sample_id)} has the label {label}, and {CLASSES_FILE} has {len(listed)} lines, from 0"
        )
    return listed[label]


def _presence(classes: tuple[str, ...], names: list[_Names]) -> Presence:
    column = {name: number for number, name in enumerate(classes)}
    flags = np.zeros((2, len(names), len(classes)), dtype=bool)
    for row, sets in enumerate(names):
        for kind, some in enumerate(sets):
            flags[kind, row, [column[name] for name in some]] = True
    return Presence(present=flags[0], ignored=flags[1])
