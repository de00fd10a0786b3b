import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from swav_testing.banks import (
    DIM,
    NUM_STEPS,
    contents,
    fill,
    make_config,
    make_features,
    make_index,
    make_layout,
    write_bank,
)
from swav_testing.ranks import run_ranks
from swav_testing.runs import files_of_at_most

from swav import storage
from swav.bank import writer as writer_module
from swav.bank.files import DamagedError, read_array, read_manifest, write_array
from swav.bank.layout import BankLayout
from swav.bank.reader import BankReader
from swav.bank.writer import BANK_FORMAT, BankWriter, remove_bank

FACTS = {"data_identity": "images of a test"}
BROKEN = (3, 41, 102)
PROTOTYPES = make_features(5, num_crops=3, seed=9)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("bank")
    write_bank(folder, make_layout(), make_features(), broken=BROKEN, prototypes=PROTOTYPES)
    return contents(folder)


def life(folder: str, first: int, end: int, lost_steps: int = 0) -> None:
    """What a world does between two restarts; steps after the last checkpoint are lost, but some leave files."""
    layout, features = make_layout(), make_features()
    with BankWriter(folder, layout, start_step=first, facts=FACTS) as writer:
        fill(writer, layout, features, range(first, end), BROKEN)
        if end == NUM_STEPS and not lost_steps:
            writer.publish(PROTOTYPES)
            return
        writer.flush()
        if lost_steps:
            fill(writer, layout, make_features(seed=5), range(end, min(end + lost_steps, NUM_STEPS)))
            writer.flush()


def test_rows_are_the_features_of_the_samples_that_the_layout_names(tmp_path: Path) -> None:
    layout, features = make_layout(), make_features()
    write_bank(tmp_path, layout, features, broken=BROKEN)
    features[:, list(BROKEN)] = 0
    for segment in range(layout.num_segments):
        found, _ = read_array(str(tmp_path / layout.name(segment)))
        assert found.dtype == np.float16
        assert found.shape == (2, layout.num_rows(segment), DIM)
        assert (found == features[:, layout.ids(segment)]).all()


def test_a_stretch_of_epochs_is_written_like_a_pass(tmp_path: Path) -> None:
    layout = make_layout(config=make_config(None, "data.epoch_images=96"), epoch=1)
    features = make_features()
    write_bank(tmp_path, layout, features)
    for segment in range(layout.num_segments):
        found, _ = read_array(str(tmp_path / layout.name(segment)))
        assert (found == features[:, layout.ids(segment)]).all()


@pytest.mark.parametrize("world", [2, 3])
def test_any_world_writes_the_same_bytes(tmp_path: Path, expected: dict[str, bytes], world: int) -> None:
    run_ranks(world, life, str(tmp_path), 0, NUM_STEPS)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("lost_steps", [0, 1, 3])
@pytest.mark.parametrize("cut", range(NUM_STEPS + 1))
def test_a_restart_at_any_step_changes_no_byte(
    tmp_path: Path, expected: dict[str, bytes], cut: int, lost_steps: int
) -> None:
    life(str(tmp_path), 0, cut, max(lost_steps, int(cut == NUM_STEPS)))
    assert "manifest.json" not in contents(tmp_path)
    life(str(tmp_path), cut, NUM_STEPS)
    assert contents(tmp_path) == expected


def test_restarts_in_other_worlds_change_no_byte(tmp_path: Path, expected: dict[str, bytes]) -> None:
    run_ranks(3, life, str(tmp_path), 0, 1, 3)
    life(str(tmp_path), 1, 3, 1)
    run_ranks(2, life, str(tmp_path), 3, NUM_STEPS)
    assert contents(tmp_path) == expected


def test_the_manifest_comes_last_and_without_it_there_is_no_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    written: list[str] = []
    write = storage.write_atomic

    def record(url: str, data: bytes) -> None:
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        written.append(Path(url).name)
        write(url, data)

    monkeypatch.setattr(storage, "write_atomic", record)
    with pytest.raises(KeyboardInterrupt):
        life(str(tmp_path), 0, NUM_STEPS)
    assert set(written) == set(expected) - {"manifest.json"}
    with pytest.raises(RuntimeError, match="holds no published features; let the trainer finish its epoch"):
        BankReader(str(tmp_path), make_layout())
    monkeypatch.undo()
    life(str(tmp_path), NUM_STEPS, NUM_STEPS)
    assert contents(tmp_path) == expected


def test_the_manifest_says_what_is_there(tmp_path: Path, expected: dict[str, bytes]) -> None:
    facts = json.loads(expected["manifest.json"])
    assert {name: facts[name] for name in ("format", "data_identity", "num_crops", "dim", "num_samples")} == {
        "format": BANK_FORMAT,
        **FACTS,
        "num_crops": 2,
        "dim": DIM,
        "num_samples": 103,
    }
    write_bank(tmp_path, make_layout(), make_features())
    found = read_manifest(str(tmp_path), BANK_FORMAT)
    assert found is not None
    assert "prototypes_crc32c" not in found


@pytest.fixture
def half(tmp_path: Path) -> tuple[Path, BankLayout]:
    """A bank up to the middle of its second block, as a checkpoint has it."""
    life(str(tmp_path), 0, 3)
    return tmp_path, make_layout()


def test_a_missing_open_segment_is_named_at_the_restart(half: tuple[Path, BankLayout]) -> None:
    folder, layout = half
    (folder / layout.name(8 + 5)).unlink()
    with pytest.raises(RuntimeError, match=r"before the restart are missing: .*segment-000001-00005\.npy .*restore"):
        life(str(folder), 3, NUM_STEPS)


def test_an_open_segment_with_too_few_rows_is_named_at_the_restart(half: tuple[Path, BankLayout]) -> None:
    folder, layout = half
    url = str(folder / layout.name(8 + 6))
    write_array(url, read_array(url)[0][:, :2])
    with pytest.raises(RuntimeError, match=r"segment-000001-00006\.npy \(holds 2 of 3 rows\)"):
        life(str(folder), 3, NUM_STEPS)


@pytest.mark.parametrize("keep", [0, 3, 40, -1])
def test_a_cut_open_segment_is_refused_at_the_restart(half: tuple[Path, BankLayout], keep: int) -> None:
    folder, layout = half
    path = folder / layout.name(8 + 2)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=r"segment-000001-00002\.npy does not have its checksum"):
        life(str(folder), 3, NUM_STEPS)


def test_a_missing_full_segment_is_noticed_before_anything_is_published(half: tuple[Path, BankLayout]) -> None:
    folder, layout = half
    (folder / layout.name(4)).unlink()
    with pytest.raises(RuntimeError, match=r"before the restart are missing: .*segment-000000-00004\.npy"):
        life(str(folder), 3, NUM_STEPS)
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("keep", [0, 2])
def test_a_full_segment_without_a_checksum_is_refused_before_anything_is_published(
    half: tuple[Path, BankLayout], keep: int
) -> None:
    folder, layout = half
    path = folder / layout.name(4)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=r"segment-000000-00004\.npy|features from before"):
        life(str(folder), 3, NUM_STEPS)
    assert not (folder / "manifest.json").exists()


def test_a_full_segment_that_was_cut_does_not_pass_for_features(half: tuple[Path, BankLayout]) -> None:
    folder, layout = half
    path = folder / layout.name(4)
    path.write_bytes(path.read_bytes()[:-7])
    life(str(folder), 3, NUM_STEPS)
    with BankReader(str(folder), layout) as bank, pytest.raises(DamagedError, match=r"segment-000000-00004\.npy"):
        bank.segment(4)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, array: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", url)

    monkeypatch.setattr(writer_module, "write_array", fail)


REMEDY = r"features cannot be written to .* \(.*\); free space or mend the storage, then run the same command again"


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("end", [1, 2, NUM_STEPS])
def test_a_full_disk_ends_the_run_with_the_remedy(tmp_path: Path, end: int) -> None:
    with pytest.raises(RuntimeError, match=REMEDY):
        life(str(tmp_path), 0, end)
    assert contents(tmp_path) == {}


def test_a_disk_that_refuses_bytes_leaves_nothing_half_written(tmp_path: Path, expected: dict[str, bytes]) -> None:
    life(str(tmp_path), 0, 2)
    before = contents(tmp_path)
    with files_of_at_most(100), pytest.raises(RuntimeError, match=REMEDY):
        life(str(tmp_path), 2, NUM_STEPS)
    assert contents(tmp_path) == before
    life(str(tmp_path), 2, NUM_STEPS)
    assert contents(tmp_path) == expected


def test_a_disk_that_is_full_at_the_very_end_ends_the_run_with_the_remedy(
    half: tuple[Path, BankLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, layout = half
    write = storage.write_atomic

    def fail(url: str, data: bytes) -> None:
        if url.endswith(("manifest.json", "segments.npy")):
            raise OSError(errno.ENOSPC, "No space left on device", url)
        write(url, data)

    monkeypatch.setattr(storage, "write_atomic", fail)
    with BankWriter(str(folder), layout, start_step=3, facts=FACTS) as writer:
        fill(writer, layout, make_features(), range(3, NUM_STEPS))
        with pytest.raises(RuntimeError, match=REMEDY):
            writer.publish()
    assert not (folder / "manifest.json").exists()


def test_removing_a_bank_begins_with_its_manifest_and_leaves_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bank(tmp_path, make_layout(), make_features(), prototypes=PROTOTYPES)
    (tmp_path / "notes.txt").write_text("mine")
    removed: list[str] = []
    remove = storage.remove

    def record(url: str) -> None:
        removed.append(Path(url).name)
        remove(url)

    monkeypatch.setattr(storage, "remove", record)
    remove_bank(str(tmp_path), make_layout())
    assert removed[0] == "manifest.json"
    assert list(contents(tmp_path)) == ["notes.txt"]
    remove_bank(str(tmp_path), make_layout(make_index()))  # again, where nothing is left
