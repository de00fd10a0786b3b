"""How well the sample order mixes, and how evenly it reads: ours, a full shuffle, and webdataset's buffer.

    python bench/order.py [--samples 1281167] [--classes 1000] [--shards 1000]

Batches of 4,096; then the same for ten times the samples and shards (minutes).

The worst case for mixing: every shard holds neighbouring classes only. Deterministic: the tables are the same
anywhere. The buffer is webdataset's own, behind its own striping of shards over ranks and workers.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray
from webdataset import filters

from swav.data.order import EpochOrder

Ids = NDArray[np.int64]
Batches = list[Ids]

_BATCH = 4096
_LAYOUTS = [  # lanes, window, chunk rows; the first is the default for so many samples
    (512, 16, 64),
    (512, 8, 64),
    (512, 32, 64),
    (512, 16, 256),
    (512, 8, 256),
    (512, 4, 256),
    (64, 16, 64),
    (64, 16, 256),
    (2048, 16, 64),
]


@dataclass(frozen=True)
class Dataset:
    """Samples sorted by class, in shards of equal size."""

    num_samples: int
    num_classes: int
    num_shards: int

    @property
    def offsets(self) -> Ids:
        """int64 [shards + 1]."""
        return np.arange(self.num_shards + 1) * self.num_samples // self.num_shards

    def labels(self, ids: Ids) -> Ids:
        """int64 [n]."""
        return ids * self.num_classes // self.num_samples

    def shards(self, ids: Ids) -> Ids:
        """int64 [n]."""
        return np.searchsorted(self.offsets, ids, side="right").astype(np.int64) - 1

    def chunks(self, ids: Ids, chunk_rows: int) -> Ids:
        """Numbers of the chunks that hold the samples, int64 [n]."""
        first = np.concatenate([[0], np.cumsum(-(-np.diff(self.offsets) // chunk_rows))])
        shards = self.shards(ids)
        numbers: Ids = first[shards] + (ids - self.offsets[shards]) // chunk_rows
        return numbers

    def num_chunks(self, chunk_rows: int) -> int:
        """Chunks of all shards."""
        return int((-(-np.diff(self.offsets) // chunk_rows)).sum())

    def order(self, batch: int, *, lanes: int, window: int, chunk_rows: int, seed: int = 0) -> EpochOrder:
        """Our order of an epoch."""
        return EpochOrder(
            np.diff(self.offsets),
            chunk_rows=chunk_rows,
            seed=seed,
            epoch=0,
            global_batch=batch,
            num_lanes=lanes,
            window_chunks=window,
        )


def batches_of(order: EpochOrder) -> Batches:
    """All global batches."""
    return [order.batch(step) for step in range(order.num_steps)]


def full_shuffle(dataset: Dataset, batch: int) -> Batches:
    """The reference: batches of one permutation of all samples."""
    ids = np.random.default_rng(0).permutation(dataset.num_samples)
    return [ids[start : start + batch] for start in range(0, len(ids) - batch + 1, batch)]


def webdataset_shuffle(dataset: Dataset, batch: int, *, ranks: int, workers: int, buffer: int) -> Batches:
    """As ``WebDataset(urls, nodesplitter=split_by_node, shardshuffle=100).shuffle(buffer)`` in a DataLoader.

    Each worker has the shards of its stripe, shuffles them and buffers their samples; a rank takes whole batches of its
    workers in turn. The epoch ends where the first rank has no batch left, as data parallel training must.
    """
    share = batch // ranks

    def worker_batches(rank: int, worker: int) -> Iterator[Ids]:
        draws = random.Random(rank * workers + worker)
        mine = islice(range(rank, dataset.num_shards, ranks), worker, None, workers)
        shards = filters.shuffle(100, rng=draws)(iter(mine))
        rows = (sample for shard in shards for sample in range(*dataset.offsets[shard : shard + 2].tolist()))
        samples = filters.shuffle(buffer, rng=draws)(rows)
        while len(taken := list(islice(samples, share))) == share:
            yield np.array(taken)

    streams = [_in_turn([worker_batches(rank, worker) for worker in range(workers)]) for rank in range(ranks)]
    return [np.concatenate(parts) for parts in zip(*streams, strict=False)]


def _in_turn(streams: Iterable[Iterator[Ids]]) -> Iterator[Ids]:
    """One item of each stream in turn, passing over those that have ended."""
    left = list(streams)
    while left:
        for stream in list(left):
            try:
                yield next(stream)
            except StopIteration:
                left.remove(stream)


def entropies(dataset: Dataset, batches: Batches) -> NDArray[np.float64]:
    """Entropy of the labels of each batch in bits, float64 [batches]; batches below the usual size are left out."""
    found = []
    for ids in batches:
        if len(ids) == len(batches[0]):
            share = np.bincount(dataset.labels(ids)) / len(ids)
            found.append(-(share[share > 0] * np.log2(share[share > 0])).sum())
    return np.array(found)


def distances(dataset: Dataset, batches: Batches) -> NDArray[np.float64]:
    """How far neighbours in a shard end up from each other, as a share of the epoch, float64 [pairs]."""
    order = np.concatenate(batches)
    positions = np.full(dataset.num_samples, -1)
    positions[order] = np.arange(len(order))
    pairs = np.stack([positions[:-1], positions[1:]])
    inside = np.ones(dataset.num_samples - 1, dtype=np.bool_)
    inside[dataset.offsets[1:-1] - 1] = False
    pairs = pairs[:, inside & (pairs >= 0).all(axis=0)]
    apart: NDArray[np.float64] = np.abs(np.diff(pairs, axis=0))[0] / len(order)
    return apart


def mixing_row(name: str, dataset: Dataset, batches: Batches, ideal: float) -> str:
    """A row of the first table."""
    bits, apart = entropies(dataset, batches), distances(dataset, batches)
    shards = np.mean([len(np.unique(dataset.shards(ids))) for ids in batches[: len(bits)]])
    together = (apart * len(np.concatenate(batches)) < len(batches[0])).mean()  # less than a batch apart
    return (
        f"| {name} | {bits.mean():.2f} | {bits.min():.2f} | {bits.mean() / ideal:.4f} | {bits.min() / ideal:.4f} | "
        f"{shards:.0f} | {100 * np.median(apart):.2f} | {100 * np.percentile(apart, 1):.3f} | {100 * together:.2f} |\n"
    )


def readers(order: EpochOrder, step: int, world_size: int) -> Ids:
    """The rank that reads each sample of a global batch, int64 [batch]."""
    ends = [order.rank_range(step, rank, world_size)[1] for rank in range(world_size)]
    return np.searchsorted(ends, np.arange(order.batch_size(step)), side="right").astype(np.int64)


def new_chunks(dataset: Dataset, order: EpochOrder, chunk_rows: int, worlds: Iterable[int]) -> NDArray[np.int64]:
    """Chunks that a rank needs at a step and has not read since the world had another size.

    Args:
        dataset: what is read.
        order: of the epoch.
        chunk_rows: as the order has it.
        worlds: the number of ranks at each step.

    Returns:
        int64 [steps, most ranks].
    """
    sizes = list(islice(worlds, order.num_steps))
    num_chunks = dataset.num_chunks(chunk_rows)
    read = np.zeros(max(sizes) * num_chunks, dtype=np.bool_)
    new = np.zeros((order.num_steps, max(sizes)), dtype=np.int64)
    for step, world_size in enumerate(sizes):
        if step and world_size != sizes[step - 1]:
            read[:] = False
        chunks = dataset.chunks(order.batch(step), chunk_rows)
        needed = np.unique(readers(order, step, world_size) * num_chunks + chunks)
        fresh = needed[~read[needed]]
        read[fresh] = True
        new[step] = np.bincount(fresh // num_chunks, minlength=max(sizes))
    return new


def write_heading(*columns: str) -> None:
    """Start a table."""
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")


def print_mixing(dataset: Dataset, batch: int, layouts: list[tuple[int, int, int]]) -> None:
    """A table of how well orders mix: a full shuffle, and ours by (lanes, window, chunk rows)."""
    write = sys.stdout.write
    reference = full_shuffle(dataset, batch)
    ideal = float(entropies(dataset, reference).mean())
    write(f"\n{dataset.num_samples} samples of {dataset.num_classes} classes in {dataset.num_shards} shards:\n\n")
    write_heading(
        "order",
        "bits",
        "worst",
        "of full",
        "worst of full",
        "shards per batch",
        "neighbours apart: median % of the epoch",
        "1st percentile %",
        "less than a batch %",
    )
    write(mixing_row("full shuffle", dataset, reference, ideal))
    for lanes, window, chunk_rows in layouts:
        order = dataset.order(batch, lanes=lanes, window=window, chunk_rows=chunk_rows)
        name = f"ours, {lanes} lanes, window {window}, chunk {chunk_rows}"
        write(mixing_row(name, dataset, batches_of(order), ideal))


def print_webdataset(dataset: Dataset, batch: int) -> None:
    """More rows of that table: webdataset on 64 ranks."""
    ideal = float(entropies(dataset, full_shuffle(dataset, batch)).mean())
    for workers, buffer in [(1, 1000), (8, 1000), (1, 5000), (8, 5000)]:
        batches = webdataset_shuffle(dataset, batch, ranks=64, workers=workers, buffer=buffer)
        name = f"webdataset, 64 ranks x {workers}, shuffle({buffer})"
        sys.stdout.write(mixing_row(name, dataset, batches, ideal))


def print_reading(dataset: Dataset, batch: int, chunk_rows: int) -> None:
    """A table of how evenly chunks are needed, and how often."""
    write = sys.stdout.write
    order = dataset.order(batch, lanes=512, window=16, chunk_rows=chunk_rows)
    last = 2 * 16 * chunk_rows * 512 // batch  # from there on, lanes may be in their last window
    filled = 4 * 16  # steps until empty caches hold the first windows
    write(f"\n{dataset.num_samples} samples, {order.num_steps} steps, 512 lanes, window 16, chunk {chunk_rows}; ")
    write(f"new chunks per step without the first {filled} steps and the last {last}:\n\n")
    write_heading("ranks", "mean of all", "max of all", "mean of a rank", "max of a rank", "fetches per chunk")
    for world_size in (8, 64, 504):
        new = new_chunks(dataset, order, chunk_rows, repeat(world_size))
        middle, rates = new[filled:-last], "- | - | - | -"
        if order.num_steps > 4 * last:  # otherwise the start and the end are most of the epoch
            sums = middle.sum(axis=1)
            rates = f"{sums.mean():.1f} | {sums.max()} | {middle.mean():.2f} | {middle.max()}"
        write(f"| {world_size} | {rates} | {new.sum() / dataset.num_chunks(chunk_rows):.3f} |\n")
    drawn = np.repeat(np.random.default_rng(0).integers(1, 513, order.num_steps), 17).tolist()
    times = new_chunks(dataset, order, chunk_rows, drawn).sum() / dataset.num_chunks(chunk_rows)
    write(f"| anew from 1..512 every 17 steps | - | - | - | - | {times:.2f} |\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=1000)
    options = parser.parse_args()
    dataset = Dataset(options.samples, options.classes, options.shards)
    print_mixing(dataset, _BATCH, _LAYOUTS)
    print_webdataset(dataset, _BATCH)
    print_reading(dataset, _BATCH, 64)
    large = Dataset(10 * options.samples, options.classes, 10 * options.shards)
    print_mixing(large, _BATCH, [(512, 16, 64), (512, 16, 256), (512, 8, 256)])
    for chunk_rows in (64, 256):
        print_reading(large, _BATCH, chunk_rows)


if __name__ == "__main__":
    main()
