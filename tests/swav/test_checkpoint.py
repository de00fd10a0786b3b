import json
import logging
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swav_testing.ranks import _CONTEXT
from swav_testing.runs import files_of_at_most

from swav import checkpoint, storage
from swav.checkpoint import CheckpointWriter, checkpoint_steps, latest_step, load

NUM_VALUES = 40_000


def state_of(step: int, num_values: int = NUM_VALUES) -> dict[str, Any]:
    return {"step": step, "method": {"weight": torch.full((num_values,), float(step))}, "groups": [{"lr": 0.5}]}


def write(folder: Path, *steps: int, keep: int = 3) -> None:
    with CheckpointWriter(folder, keep=keep) as writer:
        for step in steps:
            writer.save(step, state_of(step))


def assert_whole(folder: Path, step: int) -> None:
    saved = load(folder, step)  # with weights_only=True
    assert saved["step"] == step
    assert saved["groups"] == [{"lr": 0.5}]
    assert bool((saved["method"]["weight"] == step).all())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    write(tmp_path, 7)
    assert latest_step(tmp_path) == 7
    assert_whole(tmp_path, 7)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    assert latest_step(tmp_path / "none") is None


def test_the_state_is_copied_before_training_goes_on(tmp_path: Path) -> None:
    state = state_of(1)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, state)
        state["method"]["weight"].zero_()
        state["groups"][0]["lr"] = 0.0
    assert_whole(tmp_path, 1)


def test_a_disabled_writer_writes_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "none", keep=1, enabled=False) as writer:
        writer.save(1, state_of(1))
        writer.wait()
    assert not (tmp_path / "none").exists()


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def spy(path: str, data: bytes) -> None:
        written.append((Path(path).name, sorted(other.name for other in tmp_path.iterdir())))
        storage.write_atomic(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", spy)
    write(tmp_path, 5)
    assert written == [("step-000000005.pt", []), ("step-000000005.json", ["step-000000005.pt"])]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 10, keep=2)
    assert checkpoint_steps(tmp_path) == [10, 3]
    assert len(list(tmp_path.iterdir())) == 4


def truncate(folder: Path, name: str) -> None:
    data = (folder / f"{name}.pt").read_bytes()
    (folder / f"{name}.pt").write_bytes(data[: len(data) // 2])


def flip_a_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / f"{name}.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / f"{name}.pt").write_bytes(data)


def remove(folder: Path, name: str) -> None:
    (folder / f"{name}.pt").unlink()


def put_a_folder_there(folder: Path, name: str) -> None:
    (folder / f"{name}.pt").unlink()
    (folder / f"{name}.pt").mkdir()


def manifest(text: str) -> Callable[[Path, str], object]:
    return lambda folder, name: (folder / f"{name}.json").write_text(text)


def foreign_format(folder: Path, name: str) -> None:
    values = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**values, "format": "swav.checkpoint/9"}))


DAMAGES: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "torn": (truncate, "bytes, the manifest says"),
    "rotten": (flip_a_byte, "SHA-256"),
    "gone": (remove, "cannot be read"),
    "a folder": (put_a_folder_there, "cannot be read"),
    "manifest empty": (manifest(""), "its manifest cannot be read"),
    "manifest torn": (manifest('{"format": "swav.ch'), "its manifest cannot be read"),
    "manifest null": (manifest("null"), "its manifest cannot be read"),
    "manifest a list": (manifest("[1]"), "its manifest cannot be read"),
    "manifest no text": (manifest("\0\xff"), "its manifest cannot be read"),
    "manifest without size": (manifest('{"format": "swav.checkpoint/1"}'), "its manifest cannot be read"),
    "another format": (foreign_format, "swav.checkpoint/9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 4, 8)
    harm, reason = DAMAGES[damage]
    harm(tmp_path, "step-000000008")
    assert latest_step(tmp_path) == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "checkpoint of step 8" in record.message
    assert reason in record.message


def test_a_run_without_a_whole_checkpoint_does_not_start_over_by_itself(tmp_path: Path) -> None:
    write(tmp_path, 4, 8)
    truncate(tmp_path, "step-000000004")
    remove(tmp_path, "step-000000008")
    with pytest.raises(RuntimeError, match=r"none of the 2 checkpoints in .* is whole; restore it, or start over"):
        latest_step(tmp_path)


def test_files_of_others_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 4)
    for name in ("step-old.json", "step-000000004 (copy).json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    write(tmp_path, 5, keep=1)
    assert checkpoint_steps(tmp_path) == [5]
    assert (tmp_path / "step-000000004 (copy).json").exists()


def test_a_broken_newer_checkpoint_does_not_take_a_whole_ones_place(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    truncate(tmp_path, "step-000000030")
    assert latest_step(tmp_path) == 20  # the run goes on from here, and saves at another step than before
    write(tmp_path, 25, keep=2)
    assert checkpoint_steps(tmp_path) == [25, 20]
    truncate(tmp_path, "step-000000025")
    assert latest_step(tmp_path) == 20


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".step-000000002.pt.0a1b2c3d.partial").write_bytes(b"torn")
    (tmp_path / "step-000000002.pt").write_bytes(b"killed before its manifest")
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("step-000000001.json", "step-000000001.pt", "step-000000003.json", "step-000000003.pt")
    ]


def test_a_failed_write_keeps_what_is_there_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, state_of(1))
        writer.wait()
        with files_of_at_most(100_000):
            writer.save(2, state_of(2))
            writer.wait()
        assert latest_step(tmp_path) == 1
        assert_whole(tmp_path, 1)
        assert len(list(tmp_path.iterdir())) == 2  # nothing half-written takes up the space that is short
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        for part in ("step 2 (0.2 MB)", str(tmp_path), "File too large", "training goes on", "free space", "failure 1"):
            assert part in record.message
        writer.save(3, state_of(3))
    assert latest_step(tmp_path) == 3
    assert checkpoint_steps(tmp_path) == [3]


def test_a_success_in_between_starts_the_count_again(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=1) as writer:
        for step, works in enumerate([False, False, True, False, False, True], start=1):
            with files_of_at_most(10**9 if works else 100_000):
                writer.save(step, state_of(step))
                writer.wait()
    assert latest_step(tmp_path) == 6


def test_three_failures_in_a_row_stop_the_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with files_of_at_most(100_000), pytest.raises(RuntimeError, match=r"too large.*intact\. Free space.*resume"):
        write(tmp_path, 2, 3, 4, 5)
    assert_whole(tmp_path, 1)


def test_a_last_write_that_fails_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    with files_of_at_most(100_000), pytest.raises(RuntimeError, match=f"checkpoints cannot be written to {tmp_path}"):
        write(tmp_path, 1)


def test_an_unforeseen_error_of_the_writing_thread_reaches_the_loop(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)), CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, {"step": lambda: None})
    assert latest_step(tmp_path) is None


def save_for_ever(folder: str) -> None:
    torch.set_num_threads(1)
    with CheckpointWriter(Path(folder), keep=2) as writer:
        step = latest_step(Path(folder)) or 0
        while True:
            step += 1
            writer.save(step, state_of(step, 3_000_000))


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  (shown where the test fails)
    draw = random.Random(seed)
    reached = hits = 0
    for _ in range(8):
        process = _CONTEXT.Process(target=save_for_ever, args=(str(tmp_path),))
        process.start()
        deadline = time.monotonic() + 60
        while max(checkpoint_steps(tmp_path), default=0) < reached + 2:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))  # the moment is what is random here
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = latest_step(tmp_path)
        assert newest is not None
        assert newest >= reached + 2
        assert_whole(tmp_path, newest)
        names = {path.name for path in tmp_path.iterdir()}
        hits += any(name.endswith(".partial") or name.replace(".pt", ".json") not in names for name in names)
        reached = newest
    print(f"{hits} of 8 kills fell into the writing of a file")  # noqa: T201
    write(tmp_path, reached + 1, keep=2)
    assert len(list(tmp_path.iterdir())) == 4
