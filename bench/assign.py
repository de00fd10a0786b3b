"""The assigner on a synthetic bank: time and memory of a worker, and what its iterations send over the network.

    python bench/assign.py [--rows 10000000] [--method deepclusterv2|selav2] [--sets 3] [--workers 1] [--folder F]

Writes a run without images (settings, an index, the features of an epoch, the labels of the epoch before) to the
folder, or uses what is there, and then makes labels from it as ``python -m swav.assign`` does, in fresh processes.
Features are unit vectors around some thousand centres, each with noise of the centre's norm.

For every pass over the features: seconds, those that this worker's threads were on a core, GFLOP/s as if every inner
product were made in float32, and the bytes that the worker read; for every phase its peak memory, which is the
process's own and not the page cache's. With several workers, all on this host, also the bytes on its loopback
interface in each iteration, anybody's; in a network of its own they are the workers' alone:

    unshare --net sh -c 'ip link set lo up && python bench/assign.py --rows 20000 --iterations 4 --workers 4'

With --plan nothing is written but for a label pass's scratch files: what data sets of other sizes take, by arithmetic
and, where it says ms or s, by doing it once.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from swav import storage
from swav.assign import previous_labels, write_labels
from swav.bank.files import bank_folder, checksum_of, labels_folder, write_array, write_manifest
from swav.bank.labels import LABELS_FORMAT, LabelWriter, label_type
from swav.bank.layout import BankLayout, bank_layout, order_epoch_of
from swav.bank.reader import BankReader
from swav.bank.writer import BANK_FORMAT
from swav.clustering import Workshop, cluster, partition
from swav.config import DeepClusterV2Config, PretrainConfig, SelaV2Config, from_json, to_json
from swav.data.index import DatasetIndex, open_index
from swav.data.index_files import write_index
from swav.data.shard_table import Shard, pack
from swav.distributed import all_reduce_max, barrier, cores_of_rank, process_group, rank, world_size
from swav.recipes import get_recipe

_EPOCH = 1  # the first that has labels before it to be compared with
_SHARD_ROWS = 10_000
_IMAGE_BYTES = 110_000
_NUM_CENTRES = 4000
_CPU = torch.device("cpu")
_BLANK = Shard("", 0, 0, "", 0, 0, 0, has_checksums=False, table_crc32c=0)

T = TypeVar("T")


def run_config(folder: Path, options: argparse.Namespace) -> PretrainConfig:
    """A run with the paper's global batch, of ResNet-50's embeddings."""
    recipe = get_recipe("swav_r50_2x224_6x96_800ep")
    numbers = {"num_prototypes": options.clusters, "num_sets": options.sets, "num_iters": options.iterations}
    method = DeepClusterV2Config(**numbers) if options.method == "deepclusterv2" else SelaV2Config(**numbers)
    crops = (replace(recipe.crops[0], num_crops=options.crops), *recipe.crops[1:])
    return replace(recipe, method=method, crops=crops, data=replace(recipe.data, url=str(folder / "data")))


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the run, as far as it is not there."""
    config = run_config(folder, options)
    storage.write_atomic(folder / "config.json", to_json(config).encode())
    if not (folder / "data" / "index.json").exists():
        write_shards(folder / "data", options.rows)
    index = open_index(config.data.url)
    layout = bank_layout(config, index, order_epoch_of(config, _EPOCH))
    write_bank(bank_folder(folder, _EPOCH), layout, index.identity, options)
    write_previous(labels_folder(folder, _EPOCH - 1), index, options)
    shutil.rmtree(labels_folder(folder, _EPOCH), ignore_errors=True)


def write_shards(folder: Path, num_samples: int) -> None:
    """Write an index, and shards that take no room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, num_samples, _SHARD_ROWS)):
        rows = min(_SHARD_ROWS, num_samples - start)
        shard = replace(_BLANK, name=f"train-{number:06d}.tar", rows=rows, num_bytes=rows * _IMAGE_BYTES)
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.num_bytes)
        shards.append(shard)
    write_index(str(folder), pack(shards), chunk_rows=64, written_from=None)


def write_bank(folder: str, layout: BankLayout, data_identity: str, options: argparse.Namespace) -> None:
    """Write and publish features; segments that are there stay."""
    centres = unit(np.random.default_rng(0).standard_normal((_NUM_CENTRES, layout.dim), dtype=np.float32))

    def write(segment: int) -> int:
        url = storage.join(folder, layout.name(segment))
        if storage.stat(url) is not None:
            return checksum_of(url)
        draws = np.random.default_rng([1, segment])
        rows = (layout.num_crops, layout.num_rows(segment))
        features = draws.standard_normal((*rows, layout.dim), dtype=np.float32)
        features *= layout.dim**-0.5
        features += centres[draws.integers(_NUM_CENTRES, size=rows)]
        return write_array(url, unit(features).astype(np.float16))

    with ThreadPoolExecutor(2) as pool:
        checksums = np.array(list(pool.map(write, range(layout.num_segments))), dtype=np.uint32)
    facts: dict[str, Any] = {"format": BANK_FORMAT, "data_identity": data_identity}
    facts |= {"num_crops": layout.num_crops, "dim": layout.dim}
    facts |= {"num_samples": int(layout.rows.sum()), "num_segments": layout.num_segments}
    facts["segments_crc32c"] = write_array(storage.join(folder, "segments.npy"), checksums)
    prototypes = centres[np.arange(options.sets * options.clusters) % _NUM_CENTRES]
    prototypes = prototypes.reshape(options.sets, options.clusters, layout.dim)
    facts["prototypes_crc32c"] = write_array(storage.join(folder, "prototypes.npy"), prototypes)
    write_manifest(folder, facts)


def print_plan(options: argparse.Namespace) -> None:
    """What an epoch takes on the disk and in requests, and what the host does for each segment and bucket."""
    say(
        "| N | shards | crops | segments | rows in one | bank | labels | scratch | PUTs by trainer | by assigner | "
        "ids of a segment, first / last | adding its labels | a bucket, but for its rows | buckets |\n"
    )
    say("|---" * 14 + "|\n")
    for num_samples, num_shards in [(1_281_167, 1000), (10**7, 1000), (10**9, 10**5)]:
        for num_crops in (1, 2):
            sizes = np.diff(np.arange(num_shards + 1) * num_samples // num_shards)
            table = np.repeat(pack([_BLANK]), num_shards)
            table["rows"] = sizes + np.arange(num_shards) % 3 - 1  # so that not all shards end with a whole chunk
            index = DatasetIndex("", table, 64, "none")
            options.crops = num_crops
            config = run_config(Path(), options)
            layout = bank_layout(config, index, 0)
            label_bytes = options.sets * label_type(options.clusters).itemsize
            flushes = layout.order.num_steps // config.runtime.checkpoint_every_steps
            cells = [f"{index.num_samples:,}", f"{num_shards:,}", f"{num_crops}", f"{layout.num_segments:,}"]
            cells += [f"{layout.num_rows(0):,}"]
            row_bytes = (num_crops * layout.dim * 2, label_bytes, 4 + label_bytes)
            cells += [f"{index.num_samples * one / 1e9:.3g} GB" for one in row_bytes]
            cells += [f"{layout.num_segments + flushes * layout.num_lanes + 3:,}"]
            cells += [f"{num_shards + options.iterations + 3:,}", *host_costs(layout, index, options)]
            say(f"| {' | '.join(cells)} |\n")


def host_costs(layout: BankLayout, index: DatasetIndex, options: argparse.Namespace) -> list[str]:
    """Time on a core for segments' ids, for taking their labels, and for putting a bucket of labels together."""
    num, draws = 20, np.random.default_rng(3)

    def cpu_ms(work: Callable[[Any], object], on: Iterable[Any]) -> float:
        start, count = time.process_time(), 0
        for one in on:
            work(one)
            count += 1
        return 1e3 * (time.process_time() - start) / count

    first, last = range(num), range(layout.num_segments - num, layout.num_segments)
    ids = [layout.ids(segment) for segment in first]
    pairs = [(rows, draws.integers(options.clusters, size=(len(rows), options.sets))) for rows in ids]
    with LabelWriter("", index, num_prototypes=options.clusters, num_sets=options.sets) as writer:
        added = cpu_ms(lambda pair: writer.add(*pair), pairs)
        writer._write_waiting()
        bucket = cpu_ms(writer._put_together, [0])
        parts = [f"{cpu_ms(layout.ids, part):.1f}" for part in (first, last)]
        return [f"{' / '.join(parts)} ms", f"{added:.2f} ms", f"{bucket / 1e3:.2f} s", f"{writer.num_buckets}"]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring rows to unit norm."""
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows


def write_previous(folder: str, index: DatasetIndex, options: argparse.Namespace) -> None:
    """Write and publish labels to compare with, anything."""
    draws = np.random.default_rng(2)
    with LabelWriter(folder, index, num_prototypes=options.clusters, num_sets=options.sets) as writer:
        for start, end in pairwise(index.row_offsets):
            writer.add(np.arange(start, end), draws.integers(options.clusters, size=(end - start, options.sets)))
        for _ in writer.tables():
            pass
    facts = {"format": LABELS_FORMAT, "data_identity": index.identity}
    write_manifest(folder, facts | {"num_sets": options.sets, "num_prototypes": options.clusters})


@dataclass(frozen=True, slots=True)
class Pass:
    """Over all of this worker's segments."""

    began: float
    seconds: float
    cpu_seconds: float
    bytes_read: int


@dataclass(frozen=True)
class TimedWorkshop(Workshop):
    """A workshop that knows what its passes took."""

    passes: list[Pass] = field(default_factory=list)
    loopback: list[int] = field(default_factory=list)  # bytes up to the end of each iteration

    def over_segments(self, body: Callable[..., T]) -> list[T]:
        """As the workshop's."""
        began, cpu, read = time.perf_counter(), time.process_time(), bytes_read()
        found = super().over_segments(body)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        self.passes.append(Pass(began, seconds, cpu_seconds, bytes_read() - read))
        return found

    def save_state(self, iteration: int, state: NDArray[Any]) -> None:
        """As the workshop's."""
        super().save_state(iteration, state)
        barrier()
        self.loopback.append(loopback_bytes())


def bytes_read() -> int:
    """By this process, from the disk or from the page cache."""
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split("rchar:")[1].split()[0])


def loopback_bytes() -> int:
    """Received on this host's loopback interface."""
    return int(Path("/proc/net/dev").read_text(encoding="utf-8").split("lo:")[1].split()[0])


def take_peak_mb() -> float:
    """The most memory that this process has had since the last call."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def measure(folder: Path) -> None:
    """One worker's part: make the labels of an epoch, and print what it took."""
    torch.set_num_threads(1)
    config = from_json((folder / "config.json").read_text(encoding="utf-8"))
    index = open_index(config.data.url)
    method = config.offline
    assert method is not None
    with process_group(_CPU, 600):
        layout = bank_layout(config, index, order_epoch_of(config, _EPOCH))
        with BankReader(bank_folder(folder, _EPOCH), layout) as bank, threadpool_limits(1):
            work = TimedWorkshop(bank, labels_folder(folder, _EPOCH), _CPU, cores_of_rank(), 0)
            say(f"{layout.num_segments} segments, {world_size()} workers of {work.num_threads} threads; ")
            say(f"{take_peak_mb():.0f} MB before the first phase\n")
            began = time.perf_counter()
            if isinstance(method, DeepClusterV2Config):
                solution = cluster(work, method, seed=config.seed, epoch=_EPOCH)
            else:
                solution = partition(work, method)
            say(f"before the first pass: {work.passes[0].began - began:.1f} s\n")
            print_passes(work, index.num_samples, method)
            work.passes.clear()
            began = time.perf_counter()
            facts = write_labels(work, solution, index, previous=previous_labels(folder, _EPOCH, index))
            seconds = time.perf_counter() - began
            print_passes(work, index.num_samples, method)
            say(f"tables and their comparison after the pass: {seconds - work.passes[0].seconds:.1f} s\n{facts}\n")


def print_passes(work: TimedWorkshop, num_samples: int, method: DeepClusterV2Config | SelaV2Config) -> None:
    """What the passes of a phase took, and its peak memory, the largest of all workers'."""
    gflop = 2e-9 * num_samples * work.bank.layout.dim * method.num_prototypes * method.num_sets
    for number, one in enumerate(work.passes):
        say(f"pass {number + 1}: {one.seconds:.2f} s, on a core {one.cpu_seconds:.2f} s; ")
        say(f"{num_samples / one.seconds:,.0f} rows/s, {gflop / one.seconds:.0f} GFLOP/s, ")
        say(f"{one.bytes_read / 1e6:,.0f} MB read\n")
    if world_size() > 1 and work.loopback:
        say(f"loopback, bytes per iteration: {np.diff(work.loopback).tolist()}\n")
    work.loopback.clear()
    peak = float(all_reduce_max(torch.tensor(take_peak_mb())))
    say(f"peak of the phase: {peak:.0f} MB\n")


def say(text: str) -> None:
    """Write what rank 0 has to say."""
    if rank() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def start_workers(folder: Path, num_workers: int) -> int:
    """Measure in processes of their own; returns the first bad exit status, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).absolute()), "--measure", "--folder", str(folder)]
    world = {"WORLD_SIZE": str(num_workers), "LOCAL_WORLD_SIZE": str(num_workers)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = [{"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(num_workers)]
    workers = [subprocess.Popen(command, env={**os.environ, **world, **own}) for own in numbers]
    statuses = [worker.wait() for worker in workers]
    return next((status for status in statuses if status), 0)


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--method", choices=["deepclusterv2", "selav2"], default="deepclusterv2")
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--crops", type=int, default=1, help="features of each sample")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="default: in the folder for temporary files; it stays")
    parser.add_argument("--plan", action="store_true", help="of data sets of other sizes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder)
        return 0
    if options.plan:
        print_plan(options)
        return 0
    folder = options.folder or Path(tempfile.gettempdir(), f"bench-assign-{options.rows}-{options.crops}")
    folder = folder.absolute()
    prepare(folder, options)
    sys.stdout.write(f"{vars(options)}\n")
    sys.stdout.flush()
    return start_workers(folder, options.workers)


if __name__ == "__main__":
    sys.exit(main())
