import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from swav_testing.shards import write_dataset, write_tar

from swav.data.index import build_index
from swav.data.reader import ShardReader


def _reader(data: Path, *, max_open_files: int = 128) -> ShardReader:
    return ShardReader(build_index(str(data), str(data)), max_open_files=max_open_files)


def test_every_image_and_label(tmp_path: Path) -> None:
    with _reader(write_dataset(tmp_path, [3, 1, 5])) as reader:
        assert [reader.image(i) for i in range(9)] == [b"image-%d" % i for i in range(9)]
        assert [reader.label(i) for i in range(9)] == reader.labels().tolist() == [i % 3 for i in range(9)]
        assert reader.name(4) == "shard-000002.tar:000004"
        assert reader.member_name(4) == "000004.jpg"
        assert reader.labels().dtype == np.int64


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
