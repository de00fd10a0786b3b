"""Real object stores, with and without faults in every way at once: what is read does not change."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from swav_testing.faults import ALL, FaultProxy
from swav_testing.runs import make_scene
from swav_testing.s3 import S3Server, environment, moto_server, s3rver_server

from swav import storage
from swav.data.index import open_index
from swav.data.reader import ShardReader
from swav.data.write_shards import write_shards
from swav.storage import remote

NUM_SHARDS, ROWS_PER_SHARD, NUM_CLASSES = 52, 6, 3
NUM_SAMPLES = NUM_SHARDS * ROWS_PER_SHARD
FETCH_BYTES = 5_000  # two rows or so: many requests


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """In the order of the samples: a third per class."""
    num_per_class = NUM_SAMPLES // NUM_CLASSES
    return [make_scene(i // num_per_class, i, size=16 + i % 9) for i in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def shards(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 52 shards with an index and labels."""
    folder = tmp_path_factory.mktemp("data")
    for i, image in enumerate(images):
        path = folder / "images" / f"class-{i * NUM_CLASSES // NUM_SAMPLES}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    index = write_shards(str(folder / "images"), str(folder / "shards"), samples_per_shard=ROWS_PER_SHARD)
    assert index.num_shards == NUM_SHARDS >= 50
    return folder / "shards"


@pytest.fixture(scope="module", params=[moto_server, s3rver_server])
def server(request: pytest.FixtureRequest, shards: Path) -> Iterator[S3Server]:
    with request.param() as server:
        server.make_bucket("bucket")
        server.upload_folder("bucket", "data", shards)
        yield server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """Before the server, without faults yet; storage goes through it, with little patience and a cache of its own."""
    patience = replace(
        remote.PATIENCE,
        first_byte_seconds=0.5,
        answer_seconds=2.0,
        idle_seconds=0.5,
        slow_seconds=0.5,
        backoff_seconds=0.05,
        backoff_cap_seconds=0.5,
    )
    monkeypatch.setattr(remote, "PATIENCE", patience)
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    with FaultProxy(server.endpoint_url, rate=0, seed=2, slow_start_seconds=1.0) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.parametrize("rate", [0, 0.1])
def test_every_sample_is_read_byte_for_byte(
    proxy: FaultProxy, images: list[bytes], tmp_path: Path, rate: float
) -> None:
    proxy.rate = rate
    before = storage.counts()
    index = open_index("s3://bucket/data")
    assert index.num_samples == NUM_SAMPLES
    ids = np.random.default_rng(0).permutation(NUM_SAMPLES)
    with ShardReader(index, fetch_bytes=FETCH_BYTES) as reader, ThreadPoolExecutor(4) as pool:
        reader.prefetch(ids)
        found = list(pool.map(reader.image, ids.tolist()))
        assert reader.labels().tolist() == [i * NUM_CLASSES // NUM_SAMPLES for i in range(NUM_SAMPLES)]
    assert found == [images[i] for i in ids]
    proxy.settle(60)
    spent = {name: total - before[name] for name, total in storage.counts().items()}
    if rate == 0:
        assert not proxy.counts
        assert {name: spent[name] for name in ("retries", "resumed_streams", "checksum_failures")} == {
            "retries": 0,
            "resumed_streams": 0,
            "checksum_failures": 0,
        }
    else:
        assert proxy.counts.keys() == set(ALL)
        assert min(spent[name] for name in ("retries", "hedges", "resumed_streams", "checksum_failures")) > 0
    left = {path.suffix for path in (tmp_path / "cache" / "blocks").iterdir()}
    assert left == {".block", ""}  # nothing half written
