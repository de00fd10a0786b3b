"""Reading samples without decoding, and the whole way to a batch: this project beside others, in the same run.

    python bench/reading.py DATA [--rounds 5] [--copies 4] [--fetch-bytes N] [--whole] [--mds-python PYTHON]

DATA is a folder of shards. They are joined to one, which is put into a temporary folder, ``copies`` times, and read
from there and from an S3 server over it (bench/static_s3.py) that has a core to itself; this process keeps to another.
Each way reads all samples once per round; rounds alternate. A figure is images per second of this process's CPU time
(all its threads), and of wall time, the median over the rounds; ratios are of CPU time. "Cold": the disk cache is
empty. Copies move the same tars whole and look at nothing. With ``--whole``: from S3 to a ready batch of 2x224 and 6x96
crops, uint8 here; beside webdataset, PIL and torchvision's augmentation and default_collate, float32.
``--mds-python``: a Python with mosaicml-streaming.
"""

import argparse
import io
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torchvision import transforms
from webdataset.gopen import gopen_schemes

from swav import storage
from swav.config import COLOUR_MEAN, COLOUR_STD, RuntimeConfig
from swav.data.index import DatasetIndex, build_index
from swav.data.index_build import Building
from swav.data.loader import Loader
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ShardReader
from swav.recipes import get_recipe

HERE = Path(__file__).parent
RECIPE = "swav_r50_2x224_6x96_800ep"
PIECE_BYTES = 1 << 20
BATCH = 64
CACHE_BYTES = 10**12


@dataclass
class Way:
    """One way of reading everything once; returns the number of images."""

    name: str
    read: Callable[[], int]
    prepare: Callable[[], None] = lambda: None  # not timed
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    num_images: int = 0

    def run(self) -> None:
        """Read once, and note the times."""
        self.prepare()
        wall, cpu = time.perf_counter(), time.process_time()
        self.num_images = self.read()
        self.cpu_seconds.append(time.process_time() - cpu)
        self.wall_seconds.append(time.perf_counter() - wall)


def order_of(index: DatasetIndex) -> EpochOrder:
    """The training order, in as many lanes as the samples of a batch."""
    return EpochOrder(
        index.rows_per_shard,
        chunk_rows=index.chunk_rows,
        seed=1,
        epoch=0,
        global_batch=BATCH,
        num_lanes=BATCH,
        window_chunks=16,
    )


def ours(index: DatasetIndex, batches: list[NDArray[np.int64]], fetch_bytes: int) -> int:
    """All images, prefetched as the loader does."""
    ahead = 0
    with ShardReader(index, fetch_bytes=fetch_bytes, cache_bytes=CACHE_BYTES) as reader:
        for step, batch in enumerate(batches):
            while ahead < min(step + 17, len(batches)) and reader.prefetch(batches[ahead]):
                ahead += 1
            for sample in batch.tolist():
                reader.image(sample)
    return index.num_samples


def webdataset(urls: list[str]) -> int:
    """All samples as webdataset gives them, undecoded."""
    return sum(1 for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False) if sample["jpg"])


def read_files(paths: list[Path], num_images: int) -> int:
    """All bytes of the files, each into new memory."""
    for path in paths:
        path.read_bytes()
    return num_images


def copy_files(paths: list[Path], out: Path, num_images: int) -> int:
    """All bytes of the files, into another file."""
    for path in paths:
        shutil.copyfile(path, out / "copy")
    return num_images


def copy_objects(urls: list[str], num_images: int, out: Path | None) -> int:
    """All bytes of the objects, thrown away or written to a file as ``aws s3 cp`` does."""
    for url in urls:
        with closing(body_of(url)) as body, (out / "copy").open("wb") if out else nullcontext() as file:
            for piece in body.iter_chunks(PIECE_BYTES):
                if file is not None:
                    file.write(piece)
    return num_images


def body_of(url: str, *_args: object, **_settings: object) -> Any:
    """An object's body, from boto3."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return client().get_object(Bucket=bucket, Key=key)["Body"]


@cache
def client() -> Any:
    """The one client; making it takes as long as reading a hundred images."""
    return boto3.client("s3")


def our_batches(index: DatasetIndex, num_threads: int) -> int:
    """Ready uint8 batches of all crops."""
    with ShardReader(index, cache_bytes=CACHE_BYTES) as reader:
        loader = Loader(
            reader,
            lambda _: order_of(index),
            get_recipe(RECIPE).crops,
            substitutes=lambda sample: substitutes(index.row_offsets, sample),
            seed=1,
            num_threads=num_threads,
        )
        return sum(len(batch.ids) for batch in loader.epoch(0))


def official_batches(urls: list[str]) -> int:
    """Ready float32 batches by webdataset, PIL and torchvision, with the paper's augmentation (appendix A.2)."""

    def view(size_px: int, scale: tuple[float, float]) -> transforms.Compose:
        jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size_px, scale=scale),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([blur], p=0.5),
                transforms.ToTensor(),
                transforms.Normalize(COLOUR_MEAN, COLOUR_STD),
            ]
        )

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    views = [view(group.size_px, group.scale) for group in get_recipe(RECIPE).crops for _ in range(group.num_crops)]
    num_images, waiting = 0, []
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        waiting.append([view(image) for view in views])
        if len(waiting) == BATCH:
            num_images += len(default_collate(waiting)[0])
            waiting = []
    return num_images + (len(default_collate(waiting)[0]) if waiting else 0)


def empty_cache() -> None:
    """Remove all blocks."""
    shutil.rmtree(Path(os.environ["SWAV_CACHE"]) / "blocks", ignore_errors=True)


@contextmanager
def static_s3(folder: Path, core: int | None) -> Iterator[None]:
    """The S3 server over a folder, as the environment's endpoint."""
    command = [sys.executable, str(HERE / "static_s3.py"), str(folder)]
    command += [] if core is None else ["--core", str(core)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none", AWS_DEFAULT_REGION="us-east-1")
        try:
            yield
        finally:
            server.stdin.close()


def put_data(source: str, folder: Path, copies: int) -> None:
    """Write all shards as one below ``folder``, so many times."""
    paths = sorted(storage.local_path(path) for path in storage.list_tars(source))
    folder.mkdir(parents=True)
    for copy in range(copies):
        with tarfile.open(folder / f"all-{copy:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for path in paths:
                with tarfile.open(path) as shard:
                    for member in shard:
                        out.addfile(member, shard.extractfile(member))


def table(title: str, ways: list[Way], base: str) -> str:
    """The ways as Markdown; ratios of images per CPU second to those of the way named ``base``."""
    rates = {way.name: way.num_images / statistics.median(way.cpu_seconds) for way in ways}
    lines = [
        f"\n| {title} | images/s of CPU time | us of CPU/image | images/s of wall time | ratio |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        wall = way.num_images / statistics.median(way.wall_seconds)
        rate = rates[way.name]
        lines.append(f"| {way.name} | {rate:.0f} | {1e6 / rate:.1f} | {wall:.0f} | {rate / rates[base]:.2f} |")
    return "\n".join(lines) + "\n"


def measure(title: str, ways: list[Way], rounds: int, base: str) -> None:
    """Run all ways in turn, and print their table."""
    for way in ways:
        way.run()  # warms caches and imports
        way.cpu_seconds.clear()
        way.wall_seconds.clear()
    for _ in range(rounds):
        for way in ways:
            way.run()
    sys.stdout.write(table(title, ways, base))
    sys.stdout.flush()


def mds_ways(python: str, data: Path, remote: str, index: DatasetIndex) -> tuple[list[Way], list[Way]]:
    """The ways of mosaicml-streaming, from the disk and from the store."""
    out = data.parent / "mds"
    command = [python, str(HERE / "reading_mds.py"), "write", str(data), str(out)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        sys.stdout.write("\nmosaicml-streaming: not installed\n")
        return [], []
    return [MDSWay(python, str(out), index.num_samples)], [MDSWay(python, f"{remote}/mds", index.num_samples)]


class MDSWay(Way):
    """mosaicml-streaming, in a process of its own that measures itself."""

    def __init__(self, python: str, source: str, num_images: int) -> None:
        super().__init__("mosaicml-streaming (MDS)", lambda: num_images)
        self._command = [python, str(HERE / "reading_mds.py"), "read", source]

    def run(self) -> None:
        """Read once, and note the times."""
        answer = json.loads(subprocess.run(self._command, check=True, capture_output=True, text=True).stdout)
        assert answer["num_images"] == self.read()
        self.num_images = answer["num_images"]
        self.cpu_seconds.append(answer["cpu_seconds"])
        self.wall_seconds.append(answer["wall_seconds"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--fetch-bytes", type=int, default=RuntimeConfig().fetch_bytes)
    parser.add_argument("--whole", action="store_true", help="up to batches, instead of reading alone")
    parser.add_argument("--mds-python", default=sys.executable)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    gopen_schemes["s3"] = body_of
    with tempfile.TemporaryDirectory(dir=storage.cache_folder()) as scratch:
        os.environ["SWAV_CACHE"] = f"{scratch}/cache"
        data = Path(scratch) / "bucket" / "data"
        put_data(options.data, data, 1 if options.whole else options.copies)
        local = build_index(str(data), f"{scratch}/local", Building(checksums=True))
        paths = sorted(data.glob("*.tar"))
        urls = [f"s3://bucket/data/{path.name}" for path in paths]
        total = local.num_samples
        with static_s3(Path(scratch), cores[1] if len(cores) > 1 else None):
            remote = build_index("s3://bucket/data", f"{scratch}/remote", Building(checksums=True))
            os.sched_setaffinity(0, cores[:1])
            if options.whole:
                ways = [
                    Way("webdataset, PIL, torchvision, default_collate", lambda: official_batches(urls)),
                    Way("swav, one thread, cold", lambda: our_batches(remote, 1), empty_cache),
                    Way("swav, one thread, from the disk cache", lambda: our_batches(remote, 1)),
                    Way("swav, one thread, local shards", lambda: our_batches(local, 1)),
                ]
                measure("from S3 to batches, one core", ways, options.rounds, ways[0].name)
                return
            order = order_of(local)
            shuffled = [order.batch(step) for step in range(order.num_steps)]
            sequential = np.array_split(np.arange(total), order.num_steps)
            from_disk, from_store = mds_ways(options.mds_python, data, "s3://bucket", local)
            ways = [
                Way("webdataset", lambda: webdataset([str(path) for path in paths])),
                Way("swav, training order", lambda: ours(local, shuffled, options.fetch_bytes)),
                Way("swav, shard order", lambda: ours(local, sequential, options.fetch_bytes)),
                Way("read whole files", lambda: read_files(paths, total)),
                Way("copy files (cp)", lambda: copy_files(paths, Path(scratch), total)),
                *from_disk,
            ]
            measure("local disk, one core", ways, options.rounds, "webdataset")
            ways = [
                Way("webdataset over boto3", lambda: webdataset(urls)),
                Way("swav, training order, cold", lambda: ours(remote, shuffled, options.fetch_bytes), empty_cache),
                Way("swav, shard order, cold", lambda: ours(remote, sequential, options.fetch_bytes), empty_cache),
                Way("swav, from the disk cache", lambda: ours(remote, shuffled, options.fetch_bytes)),
                Way("copy to a file (boto3)", lambda: copy_objects(urls, total, Path(scratch))),
                Way("copy to nowhere (boto3)", lambda: copy_objects(urls, total, None)),
                *from_store,
            ]
            measure("S3 server, one core", ways, options.rounds, ways[0].name)


if __name__ == "__main__":
    main()
