import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from swav_testing.s3 import S3Server, moto_server
from swav_testing.shards import write_dataset, write_tar

from swav import storage
from swav.data.index import DatasetIndex, build_index
from swav.data.index_build import Building
from swav.data.reader import ChecksumError, ShardReader
from swav.storage import counts


def _reader(data: Path, *, max_open_files: int = 128) -> ShardReader:
    return ShardReader(build_index(str(data), str(data)), max_open_files=max_open_files)


def test_every_image_and_label(tmp_path: Path) -> None:
    with _reader(write_dataset(tmp_path, [3, 1, 5])) as reader:
        assert [reader.image(i) for i in range(9)] == [b"image-%d" % i for i in range(9)]
        assert [reader.label(i) for i in range(9)] == reader.labels().tolist() == [i % 3 for i in range(9)]
        assert reader.name(4) == "shard-000002.tar:000004"
        assert reader.member_name(4) == "000004.jpg"
        assert reader.labels().dtype == np.int64
        counts = list[int]()
        reader.labels(counts.append)
        assert counts == [3, 1, 5]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_from_their_extension_header(tmp_path: Path, tar_format: int) -> None:
    key = "folder/" * 30 + "photo"
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (f"{key}.jpg", b"2")], tar_format=tar_format)
    with _reader(tmp_path) as reader:
        assert (reader.name(1), reader.image(1)) == (f"x.tar:{key}", b"2")


def test_samples_without_label_or_with_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("b.jpg", b"2"), ("b.json", b'{"a": 1}'), ("b.cls", b" -1\n")])
    with _reader(tmp_path) as reader:
        assert (reader.image(0), reader.label(0), reader.member(0, "json")) == (b"", None, None)
        assert (reader.label(1), reader.member(1, "json")) == (-1, b'{"a": 1}')
        with pytest.raises(ValueError, match=r"x\.tar:a has no label"):
            reader.labels()


@pytest.mark.parametrize("label", [b"dog", b"1.5", b"", b"9" * 20])
def test_a_label_that_is_no_number_is_named(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.cls", label)])
    with _reader(tmp_path) as reader, pytest.raises(ValueError, match=rf"x\.tar:a\.cls holds {label!r}"):
        reader.label(0)


def test_a_shard_that_shrank_is_named(tmp_path: Path) -> None:
    with _reader(write_dataset(tmp_path, [3])) as reader:
        assert reader.image(0) == b"image-0"
        os.truncate(tmp_path / "shard-000000.tar", 515)
        with pytest.raises(RuntimeError, match=r"shard-000000\.tar ends inside the bytes 512\.\.519"):
            reader.image(0)


def test_ids_outside_and_a_closed_reader_are_refused(tmp_path: Path) -> None:
    reader = _reader(write_dataset(tmp_path, [3]))
    with pytest.raises(ValueError, match="sample id 3 is not inside the index's 3"):
        reader.image(3)
    reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.image(0)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the entries of /proc/self/fd")
def test_threads_share_few_open_files(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, [2] * 40)
    order = np.random.default_rng(0).integers(0, 80, 2000).tolist()
    with _reader(data, max_open_files=3) as reader, ThreadPoolExecutor(8) as pool:
        tables = [reader.index.rows(shard) for shard in range(40)]  # each mapping holds a descriptor too
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        assert len(tables) == 40
        assert list(pool.map(reader.image, order)) == [b"image-%d" % i for i in order]
        assert len(os.listdir("/proc/self/fd")) - before <= 3  # noqa: PTH208


def test_a_damaged_shard_still_gives_names(tmp_path: Path) -> None:
    with _reader(write_dataset(tmp_path, [3])) as reader:
        path = tmp_path / "shard-000000.tar"
        path.write_bytes(bytes(path.stat().st_size))
        assert reader.name(1) == "shard-000000.tar:row 1"


def failures() -> int:
    return counts()["checksum_failures"]


def test_wrong_bytes_in_a_local_shard_are_read_again_and_then_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, [3])
    index = build_index(str(data), str(data), Building(checksums=True))
    path = data / "shard-000000.tar"
    content, before = path.read_bytes(), failures()
    path.write_bytes(content.replace(b"image-1", b"imagE-1"))
    with ShardReader(index) as reader:
        with pytest.raises(ChecksumError, match=r"7 bytes at byte \d+ of shard .*shard-000000\.tar are not those"):
            reader.image(1)
        assert failures() == before + 2
        assert (reader.image(0), reader.label(1)) == (b"image-0", 1)
        path.write_bytes(content)
        assert reader.image(1) == b"image-1"


def test_a_local_shard_that_was_replaced_is_refused_and_others_are_read(tmp_path: Path) -> None:
    with _reader(write_dataset(tmp_path, [3, 3])) as reader:
        write_dataset(tmp_path, [9])
        with pytest.raises(
            RuntimeError, match=r"shard-000000\.tar is not the one that was indexed: .*index the data again"
        ):
            reader.image(0)
        assert reader.image(3) == b"image-3"
        assert reader.prefetch(np.arange(6))


ROWS = [30, 5, 17]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture
def remote(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> DatasetIndex:
    """An indexed dataset in a bucket of its own, and an empty cache."""
    for name, value in {**server.env, "SWAV_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    data = write_dataset(tmp_path / "data", ROWS)
    bucket = f"reader-{abs(hash(request.node.name))}"
    server.make_bucket(bucket)
    server.upload_folder(bucket, "", data)
    url = f"s3://{bucket}"
    return build_index(url, url, Building(checksums=True))


def bucket_of(index: DatasetIndex) -> str:
    return index.folder.removeprefix("s3://")


@pytest.mark.parametrize("fetch_bytes", [1, 20_000, 10**12])
def test_a_remote_dataset_reads_as_a_local_one(remote: DatasetIndex, tmp_path: Path, fetch_bytes: int) -> None:
    threads, before = threading.active_count(), counts()["bytes_received"]
    order = np.random.default_rng(0).permutation(sum(ROWS))
    for _ in range(2):  # the second reader finds everything in the cache
        with ShardReader(remote, fetch_bytes=fetch_bytes, cache_bytes=10**9) as reader, ThreadPoolExecutor(4) as pool:
            assert reader.prefetch(order)
            assert list(pool.map(reader.image, order.tolist())) == [b"image-%d" % i for i in order]
            assert reader.labels().tolist() == [i % 3 for i in range(sum(ROWS))]
            assert reader.name(33) == "shard-000001.tar:000033"
            assert reader.member(33, "json") is None
    assert threading.active_count() <= threads + 1  # storage may keep one
    received = counts()["bytes_received"] - before
    assert received < 1.1 * sum(path.stat().st_size for path in (tmp_path / "data").glob("*.tar"))


def test_a_block_that_rots_on_the_disk_is_fetched_again(remote: DatasetIndex, tmp_path: Path) -> None:
    with ShardReader(remote, cache_bytes=10**9) as reader:
        assert reader.image(4) == b"image-4"
        before = failures()
        (block,) = (tmp_path / "cache" / "blocks").glob("*.block")
        with block.open("r+b") as file:
            file.seek(block.read_bytes().index(b"image-7"))
            file.write(b"imagE")
        assert reader.image(7) == b"image-7"
        assert failures() == before + 1
        (block,) = (tmp_path / "cache" / "blocks").glob("*.block")
        os.truncate(block, 1000)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(reader.image, range(30))) == [b"image-%d" % i for i in range(30)]


def test_bytes_that_are_wrong_in_the_store_are_refused_after_some_tries(server: S3Server, remote: DatasetIndex) -> None:
    # An object whose ETag is the index's, and whose bytes are not those that were summed.
    bucket = bucket_of(remote)
    server.put(bucket, "shard-000000.tar", server.get(bucket, "shard-000000.tar").replace(b"image-7", b"imagE-7"))
    found = storage.stat(f"s3://{bucket}/shard-000000.tar")
    assert found is not None
    table = remote.table.copy()
    assert table["etag"][0] != found.etag.encode()
    table["etag"][0] = found.etag.encode()
    with ShardReader(replace(remote, table=table), cache_bytes=10**9) as reader:
        before = failures()
        with pytest.raises(ChecksumError, match=r"checksum mismatch: the 7 bytes at byte \d+ of shard s3://.*000\.tar"):
            reader.image(7)
        assert failures() == before + 4
        assert reader.image(8) == b"image-8"


def test_a_replaced_object_is_refused_and_others_are_read(server: S3Server, remote: DatasetIndex) -> None:
    bucket = bucket_of(remote)
    server.put(bucket, "shard-000001.tar", server.get(bucket, "shard-000001.tar").replace(b"image-", b"imagE-"))
    with ShardReader(remote, cache_bytes=10**9) as reader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"shard s3://.*/shard-000001\.tar is not .*index the data again"):
                reader.image(31)
        assert reader.image(0) == b"image-0"


def test_a_missing_object_is_named(server: S3Server, remote: DatasetIndex) -> None:
    server.delete(bucket_of(remote), "shard-000001.tar")
    with ShardReader(remote, cache_bytes=10**9) as reader:
        with pytest.raises((OSError, RuntimeError), match=r"s3://.*/shard-000001\.tar"):
            reader.image(31)
        assert reader.image(40) == b"image-40"


def test_a_full_cache_folder_says_so(remote: DatasetIndex, tmp_path: Path) -> None:
    (tmp_path / "cache" / "blocks").write_bytes(b"")
    with ShardReader(remote, cache_bytes=10**9) as reader, pytest.raises(OSError, match="blocks"):
        reader.prefetch(np.arange(3))
