"""Which labelled images are trained on: so many of each class (appendices A.4 and B.5), or those of a list.

Draws are keyed by the seed and by sample ids, so a subset is the same for any number of ranks and in any order of
reading, and for shards of another size written from the same source. A class's images are taken by rising draws: 13 of
each class are among the 128 of the same seed, and 1 % among 10 %.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swav import rng, storage
from swav.bars import progress_bar
from swav.data.index import DatasetIndex
from swav.data.reader import ShardReader
from swav.watchdog import progress
from swav_eval.config import EvaluationRuntime, SubsetConfig
from swav_eval.name_list import NameList

_BLOCK_ROWS = 1 << 16  # draws at a time
_AHEAD_ROWS = 4096  # of remote shards, fetched ahead
_SHOWN = 5  # names of a list in a message


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """The chosen images.

    Attributes:
        ids: int64 [n], sample ids, rising.
        facts: how they were chosen, their number and digest, for the result.
    """

    ids: NDArray[np.int64]
    facts: dict[str, Any]


def choose_subset(
    index: DatasetIndex, config: SubsetConfig, *, seed: int, num_classes: int, runtime: EvaluationRuntime | None = None
) -> Subset:
    """Choose images.

    By seed, the labels of all samples are read; by names, the headers of all images, and the labels of the chosen ones.
    Of shards in a store, either costs a good part of reading them (docs/evaluation-data.md).

    Args:
        index: of the labelled images.
        config: what is asked for.
        seed: of the draw; names need none.
        num_classes: labels are 0 to num_classes - 1, and each class has images.
        runtime: how shards of a store are read.

    Raises:
        ValueError: a sample has no label or one outside these; a class has too few images; or a name of the list is
            unknown, ambiguous, or listed twice.
        RuntimeError, OSError: a shard or the list cannot be read.
    """
    runtime = EvaluationRuntime() if runtime is None else runtime
    with ShardReader(index, fetch_bytes=runtime.fetch_bytes, cache_bytes=runtime.cache_bytes) as reader:
        if config.names is not None:
            url = storage.absolute(config.names)
            ids, labels = _by_names(reader, url, num_classes)
            return _subset(ids, labels, {"chosen": "by names", "names": url})
        labels = _all_labels(reader, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    wanted = _wanted(index, config, counts)
    ids = _smallest_of_each_class(labels, counts, wanted, rng.key(seed, "labelled subset"))
    how = {"per_class": config.per_class} if config.fraction is None else {"fraction": config.fraction}
    return _subset(ids, labels[ids], {"chosen": "by seed", **how, "seed": seed})


def hold_out(num_samples: int, fraction: float, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split samples in two, the same for any number of ranks.

    Args:
        num_samples: their ids are 0 to num_samples - 1.
        fraction: held out, between 0 and 1; rounded, and at least one image on either side.
        seed: of the draw.

    Returns:
        The ids to train on, int64, and those held out, int64; both rising.

    Raises:
        ValueError: there are fewer than two samples, or the fraction is not between 0 and 1.
    """
    if num_samples < 2 or not 0 < fraction < 1:
        raise ValueError(
            f"{num_samples} images cannot be split with a fraction of {fraction} held out: that takes two images at "
            "least, and a fraction between 0 and 1"
        )
    num_held_out = min(_rounded(fraction, num_samples), num_samples - 1)
    order = np.argsort(_draws(rng.key(seed, "held out"), num_samples), kind="stable")
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _rounded(fraction: float, count: int) -> int:
    """A share of a number as it is written in decimals, halves up, at least one."""
    return max(1, int((Decimal(repr(fraction)) * count).to_integral_value(ROUND_HALF_UP)))


def _subset(ids: NDArray[np.int64], labels: NDArray[np.int64], how: dict[str, Any]) -> Subset:
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    num_classes = len(np.unique(labels))
    return Subset(ids, how | {"images": len(ids), "classes": num_classes, "ids_sha256": digest})


def _draws(key: int, num_samples: int) -> NDArray[np.float64]:
    """float64 [num_samples], of every sample one."""
    draws = np.empty(num_samples)
    for start in range(0, num_samples, _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, num_samples))
        draws[rows] = rng.uniforms(key, rows, 1)[:, 0]
    return draws


def _smallest_of_each_class(
    labels: NDArray[np.int64], counts: NDArray[np.int64], wanted: NDArray[np.int64], key: int
) -> NDArray[np.int64]:
    """The ids of each class's images with the smallest draws, rising; of equal draws, the smaller id."""
    order = np.lexsort((_draws(key, len(labels)), labels))  # stable
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank < np.repeat(wanted, counts)])


def _all_labels(reader: ShardReader, num_classes: int) -> NDArray[np.int64]:
    total = reader.index.num_samples
    with progress_bar(total=total, desc="reading labels", unit="image", delay=0.5) as bar:

        def done(more: int) -> None:
            bar.update(more)
            progress()

        labels = reader.labels(done)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        _refuse_label(reader, int(wrong.argmax()), int(labels[wrong.argmax()]), num_classes)
    return labels


def _refuse_label(reader: ShardReader, sample_id: int, label: int, num_classes: int) -> None:
    raise ValueError(
        f"{reader.name(sample_id)} has the label {label}, and with num_classes={num_classes} labels are 0 to "
        f"{num_classes - 1}; set num_classes to that of the data"
    )


def _wanted(index: DatasetIndex, config: SubsetConfig, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many images of each class, int64 [classes]; refuses where there are too few."""
    if config.per_class is not None:
        wanted = np.full(len(counts), config.per_class, dtype=np.int64)
    else:
        assert config.fraction is not None
        rounded = {count: _rounded(config.fraction, count) for count in set(counts.tolist())}
        wanted = np.array([rounded[count] for count in counts.tolist()], dtype=np.int64)
    lacking = np.flatnonzero(counts < wanted)
    if lacking.size:
        label = int(lacking[0])
        more = f", and {lacking.size - 1} other classes have too few" if lacking.size > 1 else ""
        absent = f", or set num_classes to that of the data (it is {len(counts)})" if not counts[label] else ""
        smaller = f"subset.per_class={counts[label]}" if counts[label] else "images of that class"
        raise ValueError(
            f"class {label}{_class_name(index, label)} of {index.folder} has {counts[label]} images and "
            f"{wanted[label]} are asked for{more}; ask for {smaller}{absent}"
        )
    return wanted


def _class_name(index: DatasetIndex, label: int) -> str:
    """The name of a class for messages, where the shards have a classes.txt."""
    url = storage.join(index.folder, "classes.txt")
    if storage.stat(url) is None:
        return ""
    names = storage.read(url).decode("utf-8", "replace").splitlines()
    return f" ({names[label]})" if label < len(names) else ""


def _by_names(reader: ShardReader, url: str, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids and labels of the images that a list names, rising by id."""
    names = NameList(url)
    chosen: dict[str, list[int]] = defaultdict(list)
    for sample_id, path in _member_names(reader):
        name = names.match(path)
        if name is not None:
            chosen[name].append(sample_id)
    _refuse_unmatched(url, names, chosen, reader)
    ids = np.array(sorted(found[0] for found in chosen.values()), dtype=np.int64)
    labels = np.empty(len(ids), dtype=np.int64)
    for number, sample_id in enumerate(ids.tolist()):
        if number % _AHEAD_ROWS == 0:
            reader.prefetch(ids[number : number + 2 * _AHEAD_ROWS])
            progress()
        label = reader.label(sample_id)
        if label is None:
            raise ValueError(f"{reader.name(sample_id)} has no label (.cls), and {url} names it for training")
        if not 0 <= label < num_classes:
            _refuse_label(reader, sample_id, label, num_classes)
        labels[number] = label
    return ids, labels


def _member_names(reader: ShardReader) -> Iterator[tuple[int, str]]:
    """The ids of all samples and the paths of their images inside the tars."""
    total = reader.index.num_samples
    with progress_bar(total=total, desc="reading names", unit="image", delay=0.5) as bar:
        for start in range(0, total, _AHEAD_ROWS):
            end = min(start + _AHEAD_ROWS, total)
            reader.prefetch(np.arange(start, min(end + _AHEAD_ROWS, total)))
            for sample_id in range(start, end):
                yield sample_id, reader.member_name(sample_id)
            bar.update(end - start)
            progress()


def _refuse_unmatched(url: str, names: NameList, chosen: dict[str, list[int]], reader: ShardReader) -> None:
    folder = reader.index.folder
    unknown = [name for name in names.lines if name not in chosen]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(names.lines)} names in {url} are of no image in {folder}: "
            f"{_some(unknown)}. A name is matched by its last part without extension, and by its folders where it has "
            f"any; an image there is {reader.member_name(0)}"
        )
    ambiguous = [f"{name} ({_some([reader.name(i) for i in found])})" for name, found in chosen.items() if found[1:]]
    if ambiguous:
        raise ValueError(
            f"{len(ambiguous)} of the names in {url} are of several images in {folder}: {_some(ambiguous)}; "
            "write them with the folders of the images"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
