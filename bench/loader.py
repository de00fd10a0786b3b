"""The loader alone: shards on the local disk to uint8 batches of 2x224 and 6x96 crops.

    python bench/loader.py DATA [--recipe swav_r50_2x224_6x96_800ep] [--batch 50] [--threads 1 2] [--rounds 5]

Prints images/s for each number of threads: the median of alternating rounds over the whole data set, and its ratio to
the first. Colour, blur and normalisation, which run on the device, are not part of it.
"""

import argparse
import statistics
import sys
import time

import torch

from swav.data.loader import Loader
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ShardReader
from swav.data.source import open_dataset
from swav.recipes import get_recipe


def images_per_second(loader: Loader, epoch: int) -> float:
    """One epoch from the first request to the last batch."""
    start = time.perf_counter()
    num_images = sum(len(batch.ids) for batch in loader.epoch(epoch))
    return num_images / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="swav_r50_2x224_6x96_800ep")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    index = open_dataset(options.data)
    config = get_recipe(options.recipe)

    def order_of_epoch(epoch: int) -> EpochOrder:
        return EpochOrder(
            index.rows_per_shard,
            chunk_rows=index.chunk_rows,
            seed=config.seed,
            epoch=epoch,
            global_batch=options.batch,
            num_lanes=options.batch,
            window_chunks=config.data.window_chunks,
        )

    with ShardReader(index) as reader:
        loaders = {
            threads: Loader(
                reader,
                order_of_epoch,
                config.crops,
                substitutes=lambda sample_id: substitutes(index.row_offsets, sample_id),
                seed=config.seed,
                num_threads=threads,
            )
            for threads in options.threads
        }
        for loader in loaders.values():
            images_per_second(loader, 0)  # warms the page cache
        rates: dict[int, list[float]] = {threads: [] for threads in loaders}
        for number in range(options.rounds):
            for threads, loader in loaders.items():
                rates[threads].append(images_per_second(loader, number))
    medians = {threads: statistics.median(values) for threads, values in rates.items()}
    write = sys.stdout.write
    write(f"{options.recipe}, batch {options.batch}, {index.num_samples} images, torch {torch.__version__}\n")
    write("| threads | images/s | ratio |\n|---|---|---|\n")
    for threads, median in medians.items():
        write(f"| {threads} | {median:.0f} | {median / medians[options.threads[0]]:.2f} |\n")


if __name__ == "__main__":
    main()
