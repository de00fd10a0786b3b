"""The index: its size and the time to build it per million images, and the cost of opening a very large one.

    python bench/index.py [--samples 200000] [--image-bytes 100000] [--processes 1 2] [--shards 100000]

Shards are synthetic: their images are holes in the file, so that a million of them needs no disk. The large index has
10,000 rows per shard; its shards are not there. Each opening is a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import google_crc32c
import numpy as np

from swav.data.index import build_index, open_index
from swav.data.index_build import Building
from swav.data.index_files import write_index
from swav.data.scan import ROW_DTYPE
from swav.data.shard_table import Shard, npy_bytes, pack

_ROWS_PER_SHARD = 10_000
_NUM_TABLES = 1000

_OPEN = """
import resource, sys, time
import numpy as np
from swav.data.index import open_index

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

memory, start = resident(), time.perf_counter()
index = open_index(sys.argv[1])
opened = time.perf_counter() - start
memory_opened = resident() - memory
ids = np.random.default_rng(0).integers(0, index.num_samples, 1_000_000)
start = time.perf_counter()
index.locate(ids)
located = time.perf_counter() - start
start = time.perf_counter()
for shard in range(int(sys.argv[2])):
    index.rows(shard)[shard]
print(opened, memory_opened, located, (time.perf_counter() - start) / int(sys.argv[2]), resident() - memory)
"""


def write_sparse_tar(path: Path, num_samples: int, image_bytes: int) -> None:
    """A shard whose images are holes."""
    padded = -(-image_bytes // 512) * 512
    with path.open("wb") as file:
        for number in range(num_samples):
            for name, size in ((f"{number:09d}.cls", 1), (f"{number:09d}.jpg", image_bytes)):
                info = tarfile.TarInfo(name)
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                if size == 1:
                    file.write(b"1" + bytes(511))
                else:
                    file.seek(padded, os.SEEK_CUR)
        file.write(bytes(10_240))


def write_large_index(folder: Path, num_shards: int) -> None:
    """The index of shards that are not there; its first tables are links to one."""
    rows = np.zeros(_ROWS_PER_SHARD, dtype=ROW_DTYPE)
    data = npy_bytes(rows)
    (folder / "index").mkdir(parents=True)
    (folder / "rows.npy").write_bytes(data)
    for number in range(_NUM_TABLES):
        (folder / "index" / f"shard-{number:06d}.tar.npy").symlink_to("../rows.npy")
    crc32c, etag = google_crc32c.value(bytes(data)), "0" * 32
    names = (f"shard-{number:06d}.tar" for number in range(num_shards))
    shards = [Shard(name, 10**9, 0, etag, _ROWS_PER_SHARD, 0, 0, False, crc32c) for name in names]
    write_index(str(folder), pack(shards), chunk_rows=256, written_from=None)


def measure_build(data: Path, out: Path, processes: int) -> float:
    """Seconds to index the shards from their headers."""
    start = time.perf_counter()
    build_index(str(data), str(out), Building(processes=processes))
    return time.perf_counter() - start


def index_bytes(folder: Path) -> int:
    """The size of all files of an index."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--image-bytes", type=int, default=100_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shards", type=int, default=100_000, help="of the large index")
    options = parser.parse_args()
    write = sys.stdout.write
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["SWAV_CACHE"] = str(folder / "cache")
        (folder / "data").mkdir()
        for number in range(-(-options.samples // _ROWS_PER_SHARD)):
            write_sparse_tar(folder / "data" / f"shard-{number:06d}.tar", _ROWS_PER_SHARD, options.image_bytes)
        write("| build, headers from the local disk | value |\n|---|---|\n")
        for processes in options.processes:
            out = folder / f"index-{processes}"
            seconds = measure_build(folder / "data", out, processes)
            millions = open_index(str(out)).num_samples / 1e6
            write(f"| seconds per million images, {processes} processes | {seconds / millions:.1f} |\n")
        write(f"| bytes of index per million images | {index_bytes(out) / millions / 1e6:.1f} MB |\n")
        start = time.perf_counter()
        write_large_index(folder / "large", options.shards)
        write(f"| seconds to write the table of {options.shards} shards | {time.perf_counter() - start:.1f} |\n")
        table = next((folder / "large").glob("shards-*.npy"))
        write(f"| its size | {table.stat().st_size / 1e6:.1f} MB |\n")
        command = [sys.executable, "-c", _OPEN, str(folder / "large"), str(_NUM_TABLES)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        opened, memory, located, table_seconds, all_memory = map(float, done.stdout.split())
    num_samples = options.shards * _ROWS_PER_SHARD
    write(f"\n| {num_samples:.0e} samples in {options.shards} shards | value |\n|---|---|\n")
    write(f"| seconds to open | {opened:.3f} |\n| memory after it | {memory:.1f} MB |\n")
    write(f"| microseconds to locate a sample, of a million at once | {located:.2f} |\n")
    write(f"| milliseconds to open and verify a shard's table | {1e3 * table_seconds:.2f} |\n")
    write(f"| memory with {_NUM_TABLES} tables read, of which 256 stay open | {all_memory:.1f} MB |\n")


if __name__ == "__main__":
    main()
