"""Real object stores, with and without faults in every way at once: what is read does not change."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from swav_testing.faults import ALL, FaultProxy, Kind
from swav_testing.runs import make_scene
from swav_testing.s3 import S3Server, environment, moto_server, s3rver_server

from swav import storage
from swav.config import CropConfig
from swav.data.index import DatasetIndex, open_index
from swav.data.loader import Loader, Quarantined
from swav.data.order import EpochOrder, substitutes
from swav.data.reader import ShardReader
from swav.data.write_shards import write_shards
from swav.storage import ChangedError, remote

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
    assert_clean(tmp_path / "cache")


def assert_clean(cache: Path) -> None:
    """Nothing half written is left, and the books are right."""
    files = list((cache / "blocks").iterdir())
    assert {path.suffix for path in files} == {".block", ""}
    blocks = [path for path in files if path.suffix == ".block"]
    assert int.from_bytes((cache / "blocks" / "usage").read_bytes(), "little") == sum(p.stat().st_size for p in blocks)


CROPS = (CropConfig(num_crops=2, size_px=16, scale=(0.3, 1.0)), CropConfig(num_crops=2, size_px=12, scale=(0.1, 0.3)))


def loader(index: DatasetIndex, reader: ShardReader, *, broken: list[Quarantined] | None = None) -> Loader:
    return Loader(
        reader,
        lambda epoch: EpochOrder(
            index.rows_per_shard,
            chunk_rows=index.chunk_rows,
            seed=1,
            epoch=epoch,
            global_batch=24,
            num_lanes=8,
            window_chunks=4,
        ),
        CROPS,
        substitutes=lambda sample_id: substitutes(index.row_offsets, sample_id),
        seed=3,
        num_threads=2,
        on_quarantine=(lambda record: None) if broken is None else broken.append,
    )


def test_an_epoch_through_faults_is_the_epoch_of_the_local_copy(proxy: FaultProxy, shards: Path) -> None:
    local_index = open_index(str(shards))
    proxy.rate = 0.1
    index = open_index("s3://bucket/data")
    assert index.identity == local_index.identity
    seen: list[int] = []
    with ShardReader(index, fetch_bytes=FETCH_BYTES) as reader, ShardReader(local_index) as local_reader:
        ours, expected = loader(index, reader), loader(local_index, local_reader)
        for batch, local_batch in zip(ours.epoch(0), expected.epoch(0), strict=True):
            assert batch.ids.tolist() == local_batch.ids.tolist()
            assert not batch.substituted.any()
            for crops, local_crops in zip(batch.crops, local_batch.crops, strict=True):
                assert torch.equal(crops, local_crops)
            seen += batch.ids.tolist()
    assert sorted(seen) == list(range(NUM_SAMPLES))
    proxy.settle(60)
    assert len(proxy.counts) > 5


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(server: S3Server, proxy: FaultProxy) -> None:
    old, new = b"old" * 500_000, b"new" * 500_000
    server.put("bucket", "replaced", old)
    file = storage.open_file("s3://bucket/replaced")
    assert file.read(0, 1000) == old[:1000]
    stream = file.stream(0, len(old))
    proxy.plan(Kind.DROP, key="replaced", at_byte=1_200_000)
    received = next(stream)
    server.put("bucket", "replaced", new)
    with pytest.raises(ChangedError, match=r"s3://bucket/replaced was replaced .*while it was being read"):
        received += b"".join(stream)
    assert received == old[: len(received)]
    with pytest.raises(ChangedError, match=r"s3://bucket/replaced was replaced .*while it was being read"):
        file.read(0, 1000)
    server.delete("bucket", "replaced")
    with pytest.raises(ChangedError, match="s3://bucket/replaced was removed"):
        file.read(0, 1000)


def test_what_is_corrupt_in_the_store_is_left_out_and_nothing_else(
    server: S3Server, proxy: FaultProxy, images: list[bytes], shards: Path
) -> None:
    corrupt = {7, 100, 101, 310}
    server.upload_folder("bucket", "rotten", shards)
    for sample in corrupt:
        key = f"rotten/shard-{sample // ROWS_PER_SHARD:06d}.tar"
        data = bytearray(server.get("bucket", key))
        start = data.find(images[sample])
        data[start + len(images[sample]) // 2] ^= 0x40
        server.put("bucket", key, bytes(data))
    index = open_index("s3://bucket/rotten")
    broken: list[Quarantined] = []
    delivered: list[int] = []
    replaced: list[int] = []
    with ShardReader(index, fetch_bytes=FETCH_BYTES) as reader:
        for batch in loader(index, reader, broken=broken).epoch(0):
            delivered += batch.ids[~batch.substituted].tolist()
            replaced += batch.ids[batch.substituted].tolist()
    assert {record.sample_id for record in broken} == set(replaced) == corrupt
    assert all("checksum" in record.reason for record in broken)
    assert len(broken) + len(delivered) == NUM_SAMPLES
    assert sorted(delivered + replaced) == list(range(NUM_SAMPLES))


def test_a_store_that_dies_and_comes_back_costs_retries_only(
    shards: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", replace(remote.PATIENCE, attempts=50, backoff_cap_seconds=0.5))
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path))
    with s3rver_server() as server, ThreadPoolExecutor(3) as pool:
        server.make_bucket("bucket")
        url = server.upload_folder("bucket", "data", shards)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        index = open_index(url)
        with ShardReader(index, fetch_bytes=FETCH_BYTES) as reader:
            found = pool.map(reader.image, range(NUM_SAMPLES // 3))
            rest = pool.map(reader.image, range(NUM_SAMPLES // 3, NUM_SAMPLES))
            assert list(found) == images[: NUM_SAMPLES // 3]
            server.kill()
            before = storage.counts()["retries"]
            while storage.counts()["retries"] < before + 3:
                time.sleep(0.01)
            server.start()
            assert list(rest) == images[NUM_SAMPLES // 3 :]
    assert_clean(tmp_path)
