"""The data path at scale, by simulation: time and memory of one rank of 512, and what a store is asked for.

    python bench/scale.py [--photos ../shared/data/photos500]

Datasets of 10^6, 10^8 and 10^9 samples have a real index, without images: the table of all shards, and the rows of
those that the rank reads. Each is opened in a fresh process that never imports torch. An epoch of real shards is
resumed through the loader too, where they are there.
"""

import argparse
import hashlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from swav import storage
from swav.data.index import open_index
from swav.data.index_files import table_url, write_index
from swav.data.order import EpochOrder
from swav.data.scan import ROW_DTYPE
from swav.data.shard_table import Shard, npy_bytes, pack

_BATCH, _LANES, _WINDOW, _CHUNK_ROWS, _SEED = 4096, 512, 16, 64, 31
_WORLD, _RANK = 512, 300
_IMAGE_BYTES = 110_000
_NUM_RESUMED = 10
_STEPS_AHEAD = 3  # batches that a loader has in the making
_GPUS_PER_NODE = 8
_IMAGES_PER_SECOND = 1000  # of a GPU
_GETS_PER_SECOND = 5500  # that S3 documents for a partitioned prefix


def synthetic_shard(number: int, rows: int, table_crc32c: int) -> Shard:
    """A shard without images."""
    return Shard(
        name=f"train-{number:06d}.tar",
        num_bytes=rows * _IMAGE_BYTES,
        mtime_ns=0,
        etag="",
        rows=rows,
        labelled=0,
        keys_without_image=0,
        has_checksums=False,
        table_crc32c=table_crc32c,
    )


def write_synthetic(folder: Path, num_samples: int, num_shards: int) -> None:
    """Write the index of a dataset that has no images."""
    rows = num_samples // num_shards
    table = np.zeros(rows, dtype=ROW_DTYPE)
    table["image_offset"] = 512 + np.arange(rows) * _IMAGE_BYTES
    table["image_bytes"], table["image_header_blocks"] = _IMAGE_BYTES - 1024, 1
    data = npy_bytes(table)
    shards = [synthetic_shard(number, rows, google_crc32c.value(bytes(data))) for number in range(num_shards)]
    if num_shards <= 1000:  # an index of so few looks whether its shards are there
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                file.truncate(shard.num_bytes)  # takes no room on the disk
    write_index(str(folder), pack(shards), chunk_rows=_CHUNK_ROWS, written_from=None)
    order = order_of(np.full(num_shards, rows))
    for step in random_steps(order, _NUM_RESUMED):
        for ahead in range(step, min(step + _STEPS_AHEAD, order.num_steps)):
            for number in np.unique(order.rank_batch(ahead, _RANK, _WORLD)[0] // rows).tolist():
                storage.write_atomic(table_url(str(folder), shards[number]), data)


def order_of(rows_per_shard: np.ndarray[Any, np.dtype[np.int64]], epoch: int = 3) -> EpochOrder:
    """The order of one epoch, by the default settings."""
    return EpochOrder(
        rows_per_shard,
        chunk_rows=_CHUNK_ROWS,
        seed=_SEED,
        epoch=epoch,
        global_batch=_BATCH,
        num_lanes=_LANES,
        window_chunks=_WINDOW,
    )


def random_steps(order: EpochOrder, num: int) -> list[int]:
    """Steps anywhere in the epoch; the same for every process, and the first and the last among them."""
    draws = random.Random(0)
    return [0, order.num_steps - 1, *(draws.randrange(order.num_steps) for _ in range(num - 2))]


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def peak_memory_mb() -> float:
    """Of this process since it was started (ru_maxrss would know its parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def resume(folder: str, step: int) -> None:
    """All that comes before the first byte of an image is read: index, order, batches ahead, rows of their samples."""
    index = open_index(folder)
    order = order_of(index.rows_per_shard)
    for ahead in range(step, min(step + _STEPS_AHEAD, order.num_steps)):
        shards, rows = index.locate(order.rank_batch(ahead, _RANK, _WORLD)[0])
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            assert index.rows(shard)["image_bytes"][row]


def measure_rank(folder: str) -> dict[str, float]:
    """Time and memory of one rank; run in a process of its own."""
    assert "torch" not in sys.modules
    started = peak_memory_mb()
    index = open_index(folder)
    rows_per_shard = index.rows_per_shard
    order = order_of(rows_per_shard)
    resumed = [seconds(resume, folder, step) for step in random_steps(order, _NUM_RESUMED)]
    batches = [seconds(order.rank_batch, step, _RANK, _WORLD) for step in random_steps(order, 1000)]

    def assign_lanes() -> None:
        for rank in range(_WORLD):
            order.rank_range(0, rank, _WORLD)

    opened = [seconds(open_index, folder) for _ in range(5)]
    ordered = [seconds(order_of, rows_per_shard, epoch) for epoch in range(5)]
    lanes = seconds(assign_lanes)
    peak = peak_memory_mb()
    assert "torch" not in sys.modules
    return {
        "index_seconds": statistics.median(opened),
        "order_seconds": statistics.median(ordered),
        "batch_seconds": statistics.median(batches),
        "batch_max_seconds": max(batches),
        "lanes_seconds": lanes,
        "resume_max_seconds": max(resumed),
        "start_mb": started,
        "peak_mb": peak,
        "worlds_checked": worlds_equal(order, 20),
    }


def worlds_equal(order: EpochOrder, num_steps: int) -> int:
    """Check that worlds of any size give one order: how many of them were tried.

    Raises:
        RuntimeError: one gives another.
    """
    steps = random_steps(order, num_steps)
    expected = hashlib.sha256(np.concatenate([order.batch(step) for step in steps]).tobytes()).digest()
    draws = random.Random(1)
    for _ in range(3):
        found = hashlib.sha256()
        for step in steps:
            world_size = draws.randint(1, _WORLD)
            for rank in range(world_size):
                found.update(order.rank_batch(step, rank, world_size)[0].tobytes())
        if found.digest() != expected:
            raise RuntimeError("worlds of different sizes do not give the same order")
    return 3 * num_steps


def print_ranks() -> None:
    """The table of one rank's time and memory."""
    sys.stdout.write(
        "| samples | shards | open the index | an epoch's order | a batch, median / max | lanes of 512 ranks | "
        "resume, slowest of 10 | memory: Python and NumPy / peak | worlds redrawn and equal |\n" + "|---" * 9 + "|\n"
    )
    for num_samples, num_shards in [(10**6, 100), (10**8, 10**5), (10**9, 10**5)]:
        with tempfile.TemporaryDirectory() as name:
            write_synthetic(Path(name), num_samples, num_shards)
            command = [sys.executable, str(Path(__file__).absolute()), "--rank", name]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        cells = [
            f"1e{math.log10(num_samples):.0f}",
            f"{num_shards:,}",
            f"{found['index_seconds']:.3f} s",
            f"{found['order_seconds']:.3f} s",
            f"{1000 * found['batch_seconds']:.1f} / {1000 * found['batch_max_seconds']:.1f} ms",
            f"{1000 * found['lanes_seconds']:.1f} ms",
            f"{found['resume_max_seconds']:.3f} s",
            f"{found['start_mb']:.0f} / {found['peak_mb']:.0f} MB",
            f"{found['worlds_checked']}",
        ]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def print_requests() -> None:
    """What a store is asked for while training, by arithmetic."""
    write = sys.stdout.write
    write(
        f"\n{_IMAGES_PER_SECOND} images/s per GPU, {_GPUS_PER_NODE} GPUs per node:\n\n"
        "| GPUs | image | all nodes | a node | chunks of 64: GET/s | chunks of 256: GET/s | 8 MB blocks: GET/s | "
        "prefixes for these |\n" + "|---" * 8 + "|\n"
    )
    for gpus in (8, 64, 128, 512):
        for image_bytes in (75_000, 110_000):
            images = gpus * _IMAGES_PER_SECOND
            gets = [images / 64, images / 256, images * image_bytes / 8e6]
            prefixes = " / ".join(str(math.ceil(rate / _GETS_PER_SECOND)) for rate in gets)
            write(
                f"| {gpus} | {image_bytes // 1000} KB | {images * image_bytes / 1e9:.1f} GB/s | "
                f"{_GPUS_PER_NODE * _IMAGES_PER_SECOND * image_bytes * 8 / 1e9:.1f} Gb/s | "
                f"{gets[0]:,.0f} | {gets[1]:,.0f} | {gets[2]:,.0f} | {prefixes} |\n"
            )


def print_working_set() -> None:
    """The disk that a node's windows take, and what the index takes, by arithmetic."""
    write = sys.stdout.write
    write("\n512 lanes, window 16; a node's windows, and what its first batch waits for where the cache is empty:\n\n")
    write("| chunk | image | 1 node | 8 nodes | 16 nodes | 64 nodes |\n" + "|---" * 6 + "|\n")
    touched = 1 - (1 - 1 / _WINDOW) ** (_BATCH // _LANES)  # of a window's chunks, by the rows that a step takes of it
    for chunk_rows in (64, 256):
        for image_bytes in (75_000, 110_000):
            total = _LANES * _WINDOW * chunk_rows * image_bytes / 1e9
            cells = " | ".join(f"{total / nodes:.1f} / {touched * total / nodes:.1f} GB" for nodes in (1, 8, 16, 64))
            write(f"| {chunk_rows} | {image_bytes // 1000} KB | {cells} |\n")
    row, shard = ROW_DTYPE.itemsize, pack([synthetic_shard(0, 0, 0)]).dtype.itemsize
    write(f"\nindex: {row} bytes per sample, {row} MB per million, {row * 1e9 / 1e9:.0f} GB for 1e9; ")
    write(f"table of shards: {shard} bytes per shard and the ETag's, {shard * 1e5 / 1e6:.0f} MB for 1e5\n")
    write(
        "\n1e9 samples, 1e5 shards, one epoch of a node:\n\n"
        "| nodes | chunk | chunks | tables of rows | their bytes |\n" + "|---" * 5 + "|\n"
    )
    for nodes in (1, 8, 64):
        for chunk_rows in (64, 256):
            chunks = 10**9 / chunk_rows / nodes
            tables = 1e5 * -math.expm1(-chunks / 1e5)
            write(f"| {nodes} | {chunk_rows} | {chunks:,.0f} | {tables:,.0f} | {tables * 1e4 * row / 1e9:.0f} GB |\n")


def print_photos(folder: str) -> None:
    """Resume real shards in mid-epoch, each time in a process of its own."""
    if not Path(folder).exists():
        sys.stdout.write(f"\n{folder} is not there: no resume of real shards\n")
        return
    command = [sys.executable, str(Path(__file__).absolute()), "--resume", folder]
    runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(5)]
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    sys.stdout.write(
        f"\n{folder}, 2x224 + 6x96, batch {found['batch']}, resumed at step {found['step']} of {found['steps']}: "
        f"{found['seconds']:.2f} s from opening the dataset to the first batch, with {found['ahead']} samples in the "
        f"making; the imports before took {found['import_seconds']:.1f} s (medians of {len(runs)})\n"
    )


def resume_photos(folder: str) -> dict[str, float]:
    """Time from opening a dataset to its first batch in mid-epoch."""
    start = time.perf_counter()
    from swav.data.loader import Loader  # torch, which the other measurements do without
    from swav.data.order import substitutes
    from swav.data.reader import ShardReader
    from swav.data.source import open_dataset
    from swav.recipes import get_recipe

    crops, batch = get_recipe("swav_r50_2x224_6x96_800ep").crops, 20
    opening = time.perf_counter()
    index = open_dataset(folder)

    def order(epoch: int) -> EpochOrder:
        return EpochOrder(
            index.rows_per_shard,
            chunk_rows=index.chunk_rows,
            seed=_SEED,
            epoch=epoch,
            global_batch=batch,
            num_lanes=batch,
            window_chunks=_WINDOW,
        )

    with ShardReader(index) as reader:
        loader = Loader(
            reader, order, crops, substitutes=lambda sample: substitutes(index.row_offsets, sample), seed=_SEED
        )
        step = order(0).num_steps // 2
        batches = loader.epoch(0, step)
        first = next(batches)
        end = time.perf_counter()
        batches.close()
    assert first.step == step
    return {
        "seconds": end - opening,
        "import_seconds": opening - start,
        "step": step,
        "steps": order(0).num_steps,
        "batch": batch,
        "ahead": batch * (loader.prefetch_batches + 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default="../shared/data/photos500", help="real shards to resume")
    parser.add_argument("--requests", action="store_true", help="only the tables that are arithmetic")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        sys.stdout.write(json.dumps(measure_rank(options.rank)))
    elif options.resume:
        sys.stdout.write(json.dumps(resume_photos(options.resume)))
    else:
        if not options.requests:
            print_ranks()
            print_photos(options.photos)
        print_requests()
        print_working_set()


if __name__ == "__main__":
    main()
