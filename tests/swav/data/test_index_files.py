import json
import multiprocessing
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swav_testing.shards import write_dataset, write_large_index

from swav import storage
from swav.data.index import DatasetIndex, build_index, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = write_dataset(tmp_path / "data", [3, 2])
    build_index(str(folder), str(folder))
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(data: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(data)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _shards(folder: Path) -> Path:
    (path,) = folder.glob("shards-*.npy")
    return path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("index.json", lambda path: _flip(path, 60)),
        ("index.json", _cut),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"num_samples": 5', '"num_samples": 6'))),
        ("shards-*.npy", lambda path: _flip(path, 200)),
        ("shards-*.npy", _cut),
        ("shards-*.npy", Path.unlink),
    ],
)
def test_damage_of_an_index_is_noticed_with_the_remedy(data: Path, name: str, harm: Callable[[Path], object]) -> None:
    (path,) = data.glob(name)
    harm(path)
    with pytest.raises(RuntimeError, match=rf"{path.name}.*; delete .*index\.json and index again with `python -m"):
        open_index(str(data))


@pytest.mark.parametrize("harm", [lambda path: _flip(path, 200), _cut, Path.unlink])
def test_a_damaged_table_is_noticed_and_made_again(data: Path, harm: Callable[[Path], object]) -> None:
    path = data / "index" / "shard-000001.tar.npy"
    before = path.read_bytes()
    harm(path)
    with pytest.raises(RuntimeError, match=r"table of the shard shard-000001\.tar cannot be read.*index again"):
        open_index(str(data)).rows(1)
    (data / "index.json").unlink()  # the remedy
    build_index(str(data), str(data))
    assert path.read_bytes() == before
    assert len(open_index(str(data)).rows(1)) == 2


def test_a_remote_index_is_fetched_once_and_verified(data: Path, served: str, cache: Path) -> None:
    index = open_index(served)
    assert (index.folder, index.shard_url(1)) == (served, f"{served}/shard-000001.tar")
    assert index.rows(1).tolist() == open_index(str(data)).rows(1).tolist()
    assert open_index(f"{served}/shard-00000{{1..1}}.tar").rows_per_shard.tolist() == [2]
    assert open_index(f"{served}/shard-000000.tar").rows_per_shard.tolist() == [3]
    (copy,) = cache.glob("index/*/shard-000001.tar-*.npy")
    (data / "index" / "shard-000001.tar.npy").unlink()
    _forget_open_tables()
    assert len(index.rows(1)) == 2  # from the cache
    _flip(copy, 200)
    _forget_open_tables()
    with pytest.raises(RuntimeError, match=r"shard-000001\.tar\.npy is missing"):
        index.rows(1)


def test_a_damaged_copy_in_the_cache_is_fetched_again(served: str, cache: Path) -> None:
    index = open_index(served)
    rows = index.rows(0).tolist()
    for path in cache.glob("index/*/*.npy"):
        _flip(path, 200)
    _forget_open_tables()
    assert open_index(served).rows(0).tolist() == rows


def test_damage_on_the_way_is_fetched_again(data: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 2
    read = storage.read

    def damaged(url: str) -> bytes:
        nonlocal wrong
        content = read(url)
        if url.endswith(".npy") and wrong:
            wrong -= 1
            return content[:-1]
        return content

    monkeypatch.setattr("swav.storage.read", damaged)
    before = storage.counts()["checksum_failures"]
    assert open_index(served).num_samples == 5
    assert storage.counts()["checksum_failures"] == before + 2
    wrong = 10**6
    with pytest.raises(RuntimeError, match=r"shard-000000\.tar\.npy does not have its checksum, in 3 attempts"):
        open_index(served).rows(0)


def test_processes_of_a_host_share_the_cache(served: str, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(served, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert found == [found[0]] * 4
    assert len(list(cache.glob("index/*/*.npy"))) == 3


def _open(url: str, results: Any) -> None:
    index = open_index(url)
    results.put([index.rows(shard).tolist() for shard in range(index.num_shards)])


def _forget_open_tables() -> None:
    from swav.data.index_files import _open_rows

    _open_rows.cache_clear()


LARGE = """
import os, resource, sys, time
import numpy as np
from swav.data.index import open_index

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before = resident()
index = open_index(sys.argv[1])
ids = np.random.default_rng(0).integers(0, index.num_samples, 100_000)
shards, rows = index.locate(ids)
assert index.locate_one(10**9 - 1) == (99_999, 9_999)
for shard in range(1000):
    assert index.rows(shard)["image_bytes"][0] == 1
print(index.num_samples, index.num_shards, resident() - before)
"""


def test_a_billion_samples_take_little_memory(tmp_path: Path) -> None:
    """10^5 shards; of 1,000, more than stay open at once, the tables are read."""
    folder = write_large_index(tmp_path / "large", num_shards=100_000, rows_per_shard=10_000, num_tables=1000)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400)),
    )
    samples, shards, used = map(int, done.stdout.split())
    assert (samples, shards) == (10**9, 10**5)
    assert used < 100 << 20


def test_the_record_is_small(data: Path) -> None:
    record = json.loads((data / "index.json").read_text())
    assert (record["format"], record["num_samples"], record["num_shards"]) == ("swav.index/2", 5, 2)
    assert len((data / "index.json").read_bytes()) < 1000
    assert isinstance(open_index(str(data)), DatasetIndex)
    assert np.load(_shards(data))["rows"].tolist() == [3, 2]
