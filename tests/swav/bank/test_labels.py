import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from swav_testing.banks import make_index
from swav_testing.ranks import run_ranks

from swav.bank import labels as labels_module
from swav.bank.files import DamagedError, labels_folder, read_array, write_array, write_manifest
from swav.bank.labels import LABELS_FORMAT, LabelTables, LabelWriter, decoded, label_type, table_url
from swav.data.batch import NO_LABEL
from swav.data.index import DatasetIndex
from swav.distributed import rank, world_size

Labels = NDArray[np.int64]

ROWS = (40, 0, 30, 33, 0)
NUM_SETS = 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))


def some_labels(num_samples: int = 103, num_prototypes: int = 50, seed: int = 0) -> Labels:
    labels = np.random.default_rng(seed).integers(0, num_prototypes, (num_samples, NUM_SETS))
    labels[::17] = NO_LABEL
    return labels


def write(
    output: Path, parts: list[tuple[Labels, Labels]], index: DatasetIndex, num_prototypes: int = 50
) -> dict[int, NDArray[Any]]:
    """Write labels of one worker as an assigner does; the tables that it has written."""
    folder = labels_folder(output, 0)
    with LabelWriter(folder, index, num_prototypes=num_prototypes, num_sets=NUM_SETS) as writer:
        for ids, labels in parts:
            writer.add(ids, labels)
        tables = dict(writer.tables())
    if rank() == 0:
        facts = {"data_identity": index.identity, "num_sets": NUM_SETS, "num_prototypes": num_prototypes}
        write_manifest(folder, {"format": LABELS_FORMAT, **facts})
    return tables


def split(labels: Labels, num_parts: int, seed: int = 0) -> list[tuple[Labels, Labels]]:
    order = np.random.default_rng(seed).permutation(len(labels))
    return [(ids, labels[ids]) for ids in np.array_split(order, num_parts)]


def read_all(output: Path, index: DatasetIndex) -> Labels:
    return LabelTables(output, 0, index)(np.arange(index.num_samples))


def files(output: Path) -> dict[str, bytes]:
    folder = Path(labels_folder(output, 0))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("num_parts", [1, 2, 40])
@pytest.mark.parametrize("bucket_rows", [1, 8, 40, 70, 103, 1 << 22])
@pytest.mark.parametrize("spill_bytes", [0, 300, 1 << 25])
def test_labels_come_back_by_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_parts: int, bucket_rows: int, spill_bytes: int
) -> None:
    monkeypatch.setattr(labels_module, "_BUCKET_ROWS", bucket_rows)
    monkeypatch.setattr(labels_module, "_SPILL_BYTES", spill_bytes)
    index, labels = make_index(ROWS), some_labels()
    tables = write(tmp_path, split(labels, num_parts), index)
    assert (read_all(tmp_path, index) == labels).all()
    assert sorted(tables) == [0, 2, 3]
    for shard, table in tables.items():
        first, end = index.row_offsets[shard : shard + 2]
        assert (decoded(table) == labels[first:end]).all()
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_buckets_and_spills_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_BUCKET_ROWS", 40)
    monkeypatch.setattr(labels_module, "_SPILL_BYTES", 0)
    index = make_index(ROWS)
    with LabelWriter(str(tmp_path / "x"), index, num_prototypes=9, num_sets=NUM_SETS) as writer:
        assert writer.num_buckets == 3
        writer.add(np.arange(103), np.zeros((103, NUM_SETS), dtype=np.int64))
        spilled = [path.stat().st_size for path in (tmp_path / "cache").rglob("0*")]
        assert sum(spilled) == 103 * (4 + 2 * NUM_SETS)


def world_writes(output: Path, num_parts: int, bucket_rows: int) -> list[int]:
    vars(labels_module)["_BUCKET_ROWS"] = bucket_rows
    index = make_index(ROWS)
    parts = split(some_labels()[:90], num_parts, seed=3)  # nobody has the last samples
    return list(write(output, parts[rank() :: world_size()], index))


@pytest.mark.parametrize(("world", "bucket_rows"), [(2, 20), (4, 103)])
def test_any_world_writes_the_same_bytes(tmp_path: Path, world: int, bucket_rows: int) -> None:
    index, labels = make_index(ROWS), some_labels()
    write(tmp_path / "one", split(labels[:90], 1), index)
    written = run_ranks(world, world_writes, tmp_path / "many", 11, bucket_rows)
    assert sorted(shard for shards in written for shard in shards) == [0, 2, 3]
    assert files(tmp_path / "many") == files(tmp_path / "one")
    labels[90:] = NO_LABEL
    assert (read_all(tmp_path / "many", index) == labels).all()


def world_writes_twice(output: Path) -> None:
    index, one, other = make_index(ROWS), some_labels(), some_labels(seed=1)
    parts = [(np.arange(103), one), (np.arange(103), other)]
    write(output, parts[rank() :: world_size()], index)


def test_of_a_sample_that_comes_twice_a_label_of_its_own_counts_in_any_world(tmp_path: Path) -> None:
    # A stretch can hold the end of a pass and the beginning of the next one, and a sample in both.
    index, one, other = make_index(ROWS), some_labels(), some_labels(seed=1)
    other[5:10], one[20:25] = NO_LABEL, NO_LABEL
    parts = [(np.arange(103), one), (np.arange(103), other)]
    write(tmp_path / "one", parts, index)
    write(tmp_path / "turned", parts[::-1], index)
    assert files(tmp_path / "one") == files(tmp_path / "turned")
    assert (read_all(tmp_path / "one", index) == np.maximum(one, other)).all()
    for world in (1, 2):
        run_ranks(world, world_writes_twice, tmp_path / f"{world}")
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert (read_all(tmp_path / "2", index) == np.maximum(some_labels(), some_labels(seed=1))).all()


@pytest.mark.parametrize(
    ("num_prototypes", "expected"),
    [(1, np.uint16), (65_534, np.uint16), (65_535, np.uint16), (65_536, np.uint32), (1_000_000, np.uint32)],
)
def test_the_largest_label_survives_beside_none(tmp_path: Path, num_prototypes: int, expected: type) -> None:
    assert label_type(num_prototypes) == expected
    index = make_index((4, 3))
    labels = np.full((7, NUM_SETS), num_prototypes - 1)
    labels[3, 1], labels[5], labels[6] = NO_LABEL, 0, NO_LABEL
    tables = write(tmp_path, [(np.arange(7), labels)], index, num_prototypes)
    assert all(table.dtype == expected for table in tables.values())
    assert (read_all(tmp_path, index) == labels).all()


def test_shards_without_any_label_have_no_file_and_no_labels(tmp_path: Path) -> None:
    index, labels = make_index(ROWS), some_labels()
    labels[40:70] = NO_LABEL
    assert sorted(write(tmp_path, split(labels, 3), index)) == [0, 3]
    assert not Path(table_url(labels_folder(tmp_path, 0), 2)).exists()
    assert (read_all(tmp_path, index) == labels).all()


def test_data_without_any_label_has_none(tmp_path: Path) -> None:
    index = make_index(ROWS)
    assert write(tmp_path, [], index) == {}
    assert (read_all(tmp_path, index) == NO_LABEL).all()


def test_unpublished_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="holds no published labels"):
        LabelTables(tmp_path, 0, make_index(ROWS))


def test_labels_of_other_data_are_refused(tmp_path: Path) -> None:
    write(tmp_path, split(some_labels(), 1), make_index(ROWS))
    with pytest.raises(
        ValueError, match=r"are of other data .identity images of a test, here others.*give the assigner"
    ):
        LabelTables(tmp_path, 0, make_index(ROWS, identity="others"))


def test_a_damaged_table_is_named_and_others_are_read(tmp_path: Path) -> None:
    index, labels = make_index(ROWS), some_labels()
    write(tmp_path, split(labels, 1), index)
    url = table_url(labels_folder(tmp_path, 0), 2)
    data = bytearray(Path(url).read_bytes())
    data[-20] ^= 1
    Path(url).write_bytes(data)
    tables = LabelTables(tmp_path, 0, index)
    with pytest.raises(DamagedError, match=r"000002\.npy does not have its checksum"):
        tables(np.array([0, 50]))
    assert (tables(np.array([0, 102])) == labels[[0, 102]]).all()
    write_array(url, np.zeros((29, NUM_SETS), dtype=np.uint16))
    with pytest.raises(DamagedError, match=r"has the shape \(29, 3\), and the shard 30 rows"):
        tables(np.array([50]))


def test_a_reader_keeps_no_more_tables_than_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index((10,) * 30)
    labels = some_labels(300)
    write(tmp_path, split(labels, 1), index)
    table_bytes = 10 * NUM_SETS * 2
    monkeypatch.setattr(labels_module, "_TABLE_BYTES", 4 * table_bytes)
    reads: list[str] = []

    def record(url: str) -> tuple[NDArray[Any], int]:
        reads.append(url)
        return read_array(url)

    monkeypatch.setattr(labels_module, "read_array", record)
    tables = LabelTables(tmp_path, 0, index)
    reads.clear()
    for _ in range(3):
        assert (tables(np.arange(300)) == labels).all()
        assert tables._num_bytes == sum(table.nbytes for table in tables._tables.values()) == 4 * table_bytes
    assert len(reads) == 90  # in turns, none is there any more when it is asked for
    reads.clear()
    for _ in range(5):
        tables(np.arange(260, 300))
    assert len(reads) <= 4


def test_threads_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, labels = make_index((10,) * 30), some_labels(300)
    write(tmp_path, split(labels, 1), index)
    monkeypatch.setattr(labels_module, "_TABLE_BYTES", 200)
    tables = LabelTables(tmp_path, 0, index)
    barrier = threading.Barrier(8)

    def read(seed: int) -> bool:
        barrier.wait()
        draws = np.random.default_rng(seed)
        asked = [draws.integers(0, 300, 25) for _ in range(40)]
        return all((tables(ids) == labels[ids]).all() for ids in asked)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert tables._num_bytes == sum(table.nbytes for table in tables._tables.values()) <= 200


def test_threads_add_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_BUCKET_ROWS", 500)
    monkeypatch.setattr(labels_module, "_SPILL_BYTES", 5000)
    index, labels = make_index((400, 700, 900)), some_labels(2000)
    folder = labels_folder(tmp_path, 0)
    with LabelWriter(folder, index, num_prototypes=50, num_sets=NUM_SETS) as writer:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda part: writer.add(*part), split(labels, 200))) == [None] * 200
        tables = dict(writer.tables())
    assert (np.concatenate([decoded(tables[shard]) for shard in range(3)]) == labels).all()


@pytest.mark.parametrize("ids", [[-1], [103], [5, 200]])
def test_ids_outside_the_data_are_refused(tmp_path: Path, ids: list[int]) -> None:
    index = make_index(ROWS)
    write(tmp_path, split(some_labels(), 1), index)
    with pytest.raises(ValueError, match="are not all inside the index's 103"):
        LabelTables(tmp_path, 0, index)(np.array(ids))
