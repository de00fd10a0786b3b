import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swav_testing.banks import make_config, make_features, make_index, make_layout, write_bank
from swav_testing.ranks import run_ranks
from swav_testing.s3 import S3Server, moto_server

from swav import storage
from swav.bank.files import DamagedError, read_array, write_array
from swav.bank.reader import BankReader, with_features
from swav.distributed import rank, world_size

PROTOTYPES = make_features(5, num_crops=3, seed=9)
BROKEN = (3, 41, 102)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bank(tmp_path / "bank", make_layout(), make_features(), broken=BROKEN, prototypes=PROTOTYPES)
    return tmp_path / "bank"


def test_segments_are_what_was_written(folder: Path) -> None:
    layout, features = make_layout(), make_features()
    features[:, list(BROKEN)] = 0
    with BankReader(str(folder), layout) as bank:
        assert bank.own_segments == range(layout.num_segments)
        for segment in bank.own_segments:
            found = bank.segment(segment)
            assert (found == features[:, layout.ids(segment)]).all()
            assert with_features(found[0]).tolist() == (~np.isin(layout.ids(segment), BROKEN)).tolist()
        assert (bank.prototypes() == PROTOTYPES).all()


@pytest.mark.parametrize("name", ["segment-000001-00004.npy", "prototypes.npy", "segments.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"flip": bytes(data), "cut": path.read_bytes()[:-9], "empty": b""}[damage])
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")), BankReader(str(folder), make_layout()) as bank:
        bank.prototypes() if name == "prototypes.npy" else bank.segment(12)


@pytest.mark.parametrize("name", ["segment-000001-00004.npy", "prototypes.npy", "segments.npy"])
def test_a_sound_file_of_another_time_is_not_the_one_that_was_published(
    folder: Path, tmp_path: Path, name: str
) -> None:
    other = make_features(5, num_crops=3, seed=8)
    write_bank(tmp_path / "other", make_layout(), make_features(seed=1), prototypes=other)
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with (
        pytest.raises(DamagedError, match="is not the file that was published"),
        BankReader(str(folder), make_layout()) as bank,
    ):
        bank.prototypes() if name == "prototypes.npy" else bank.segment(12)


def test_other_data_or_settings_are_refused_with_both_numbers(folder: Path) -> None:
    cases = [
        (make_layout(make_index((40, 30, 32))), "has num_samples=103, and the data and settings given here make 102"),
        (make_layout(config=make_config(num_crops=1)), "has num_crops=2, .* make 1"),
        (make_layout(config=make_config(None, "model.embedding_dim=8")), "has dim=16, .* make 8"),
        (make_layout(config=make_config(None, "data.lanes=4")), "has num_segments=24, .* make 12"),
    ]
    for layout, message in cases:
        with pytest.raises(ValueError, match=message):
            BankReader(str(folder), layout)


def test_other_images_in_shards_of_the_same_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has data_identity=images of a test, .* make other images"):
        BankReader(str(folder), make_layout(make_index(identity="other images")))


def test_a_segment_with_too_few_rows_is_refused(folder: Path) -> None:
    name = make_layout().name(3)
    array, _ = read_array(str(folder / name))
    checksums, _ = read_array(str(folder / "segments.npy"))
    checksums.reshape(-1)[3] = write_array(str(folder / name), array[:, :-1])
    facts = json.loads((folder / "manifest.json").read_text())
    facts["segments_crc32c"] = write_array(str(folder / "segments.npy"), checksums)
    (folder / "manifest.json").write_text(json.dumps(facts))
    with BankReader(str(folder), make_layout()) as bank, pytest.raises(DamagedError, match=f"{name} has the shape"):
        bank.segment(3)


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(facts | {"format": "swav.bank/7"}))
    with pytest.raises(DamagedError, match=r"is of the format 'swav\.bank/7'"):
        BankReader(str(folder), make_layout())


def rows_of_this_worker(folder: str, positions: list[int]) -> list[tuple[int, list[float]]]:
    with BankReader(folder, make_layout()) as bank:
        return [(place, row.tolist()) for place, row in bank.rows(np.array(positions), 1)]


def test_single_rows_are_found_by_one_worker_each(folder: Path) -> None:
    layout, features = make_layout(), make_features()
    ids = np.concatenate([layout.ids(segment) for segment in range(layout.num_segments)])
    positions = [*np.random.default_rng(0).permutation(103)[:40].tolist(), 0, 102]
    features[:, list(BROKEN)] = 0
    expected = [(place, features[1, ids[position]].tolist()) for place, position in enumerate(positions)]
    assert sorted(rows_of_this_worker(str(folder), positions)) == expected
    parts = run_ranks(3, rows_of_this_worker, str(folder), positions)
    assert sorted(row for part in parts for row in part) == expected
    assert all(parts)


def own_segments(folder: str) -> tuple[int, int, list[int]]:
    with BankReader(folder, make_layout()) as bank:
        return rank(), world_size(), list(bank.own_segments)


def test_workers_tile_the_segments(folder: Path) -> None:
    found = run_ranks(3, own_segments, str(folder))
    assert [segment for _, _, segments in found for segment in segments] == list(range(24))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture
def remote(server: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bank in a store, and an empty cache."""
    for name, value in {**server.env, "SWAV_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bank-{abs(hash(str(tmp_path)))}"
    server.make_bucket(bucket)
    return server.upload_folder(bucket, "run/bank/000001", folder)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each remote file is read."""
    found: Counter[str] = Counter()
    read = storage.read

    def counted(url: str) -> bytes:
        if storage.is_remote(url):
            found[storage.name_of(url)] += 1
        return read(url)

    monkeypatch.setattr(storage, "read", counted)
    return found


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_remote_bank_is_downloaded_once_and_its_copies_go_at_the_end(
    remote: str, reads: Counter[str], tmp_path: Path
) -> None:
    layout, features = make_layout(), make_features()
    features[:, list(BROKEN)] = 0
    with BankReader(remote, layout) as bank:
        for _ in range(3):
            for segment in bank.own_segments:
                assert (bank.segment(segment) == features[:, layout.ids(segment)]).all()
        assert {name: count for name, count in reads.items() if name.startswith("segment-")} == {
            layout.name(segment): 1 for segment in range(24)
        }
        assert len(copies(tmp_path)) == 24
    assert copies(tmp_path) == []


def crash_after(remote: str, num_segments: int) -> list[Any]:
    bank = BankReader(remote, make_layout()).__enter__()
    found = [bank.segment(segment).tolist() for segment in range(num_segments)]
    bank.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    return found


def test_copies_survive_a_crash_and_rotten_ones_are_fetched_again(
    remote: str, reads: Counter[str], tmp_path: Path
) -> None:
    layout = make_layout()
    expected = crash_after(remote, 4)
    kept = copies(tmp_path)
    assert len(kept) == 4
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    kept[1].write_bytes(kept[2].read_bytes())  # sound, but not what was published
    reads.clear()
    with BankReader(remote, layout) as bank:
        assert [bank.segment(segment).tolist() for segment in range(4)] == expected
        segments = {name: count for name, count in reads.items() if name.startswith("segment-")}
        assert segments == {layout.name(0): 1, layout.name(1): 1}


def test_copies_of_a_bank_are_not_taken_for_those_of_another_under_its_name(
    remote: str, server: S3Server, tmp_path: Path
) -> None:
    layout = make_layout()
    crash_after(remote, 1)
    write_bank(tmp_path / "other", layout, make_features(seed=1), prototypes=PROTOTYPES)
    bucket, _, prefix = remote.removeprefix("s3://").partition("/")
    server.upload_folder(bucket, prefix, tmp_path / "other")
    with BankReader(remote, layout) as bank:
        assert (bank.segment(0) == make_features(seed=1)[:, layout.ids(0)]).all()


def test_wrong_bytes_in_the_store_are_refused_after_some_tries(
    remote: str, server: S3Server, reads: Counter[str], tmp_path: Path
) -> None:
    layout = make_layout()
    bucket, _, prefix = remote.removeprefix("s3://").partition("/")
    server.put(bucket, f"{prefix}/{layout.name(3)}", b"not an array")
    with BankReader(remote, layout) as bank:
        with pytest.raises(DamagedError, match=layout.name(3)):
            bank.segment(3)
        assert reads[layout.name(3)] == 3
        assert copies(tmp_path) == []
