"""Writes a public data set as shards: ``python -m swav_eval.datasets imagenet SOURCE OUT --split val``."""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from swav.data.index import DatasetIndex
from swav.data.write_shards import ShardOptions, add_shard_options, write_images
from swav.logs import answer, start_logging
from swav.program import run
from swav_eval.datasets import imagenet, inat18, places205, voc07
from swav_eval.datasets.listing import Split


class DataSet(NamedTuple):
    """How one data set is read."""

    splits: tuple[str, ...]
    open_split: Callable[[str, str], Split]  # of a source and a split


DATA_SETS = {
    "imagenet": DataSet(imagenet.SPLITS, imagenet.open_split),
    "places205": DataSet(places205.SPLITS, places205.open_split),
    "inat18": DataSet(inat18.SPLITS, inat18.open_split),
    "voc07": DataSet(voc07.SPLITS, voc07.open_split),
}


def write_split(name: str, source: str, out: str, split: str, options: ShardOptions) -> DatasetIndex:
    """Write a split of a data set as shards with their index; resumable, see :func:`swav.data.write_shards`.

    Args:
        name: of the data set.
        source: as its module describes.
        out: a new or empty folder, local or in a store.
        split: of the data set.
        options: how samples are laid out.

    Raises:
        ValueError: the source is not as described, or ``out`` holds something else.
        RuntimeError: an image cannot be read, or an archive is damaged.
        OSError: the store or the disk fails; the same call then goes on.
    """
    images, url = DATA_SETS[name].open_split(source, split)
    return write_images(images, images.digest(), url, out, options)


def main(arguments: list[str] | None = None) -> int:
    """Write a data set from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m swav_eval.datasets", description="Write a public data set as webdataset shards with an index."
    )
    data_sets = parser.add_subparsers(dest="name", required=True, metavar="DATA SET")
    for name, data_set in DATA_SETS.items():
        one = data_sets.add_parser(name, help=f"splits: {', '.join(data_set.splits)}")
        one.add_argument("source", help="the data set as it is published: docs/evaluation-data.md")
        one.add_argument("out", help="new folder for the shards, local or s3://")
        one.add_argument("--split", required=True, choices=data_set.splits)
        add_shard_options(one)
    start_logging()

    def body() -> None:
        given = parser.parse_args(arguments)
        options = ShardOptions(given.samples_per_shard, given.bytes_per_shard, given.shuffle)
        index = write_split(given.name, given.source, given.out, given.split, options)
        answer(f"{index.folder}: {index.num_samples} samples in {index.num_shards} shards, {index.num_bytes} bytes")

    return run(body)


if __name__ == "__main__":
    sys.exit(main())
