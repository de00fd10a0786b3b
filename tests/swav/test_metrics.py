import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swav_testing.runs import files_of_at_most, tiny_config

from swav.metrics import MetricsLog, Report, quarantine_budget

NUM_SAMPLES = 103


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    for step in range(1, 6):
        log.write(step, loss=step / 10)
    log.close()
    resumed = MetricsLog(path, resume_step=3)
    resumed.write(4, loss=7.0)
    resumed.close()
    assert lines(path) == [{"step": step, "loss": step / 10} for step in (1, 2, 3)] + [{"step": 4, "loss": 7.0}]


def test_what_comes_after_the_checkpoint_at_an_epochs_end_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    log.write(4, event="epoch", epoch=0)
    log.write(5, loss=0.5)
    log.write(5, event="epoch", epoch=1)  # the checkpoint of step 5 was taken before
    log.write(5, event="knn", knn_20=0.5)
    log.close()
    MetricsLog(path, resume_step=5).close()
    assert lines(path) == [{"step": 4, "event": "epoch", "epoch": 0}, {"step": 5, "loss": 0.5}]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', '{"step": 2, "loss": 1.0}', "\0\0\0", "{}\n", "[2]\n", "\xff\n"])
def test_a_torn_or_foreign_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + tail, encoding="latin-1")
    log = MetricsLog(path, resume_step=2)
    log.write(3, loss=1.5)
    log.close()
    assert lines(path) == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=0)
    log.write(1, loss=1.0)
    with files_of_at_most(path.stat().st_size + 10):  # room for the beginning of a line
        log.write(2, loss=2.0)
        log.write(3, loss=3.0)
    assert path.read_bytes().count(b"\n") == 1
    log.write(4, loss=4.0)
    log.close()
    assert lines(path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    (record,) = caplog.records  # once, not for every line
    assert f"{path} cannot be written" in record.message


def test_lines_that_are_lost_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    with files_of_at_most(10):
        log.write(1, loss=1.0)
        log.write(2, loss=2.0)
        log.close()
    assert "lacks its last 2 lines" in caplog.text


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Report]:
    with Report(tiny_config("data"), tmp_path, num_samples=NUM_SAMPLES, step=0, steps_per_epoch=5) as report:
        yield report


def note(report: Report, step: int, loss: float) -> None:
    report.step(step, epoch=0, num_images=24, own_images=24, lr=0.1, metrics={"loss": torch.tensor(loss)})


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_and_says_what_to_try(report: Report, tmp_path: Path, loss: float) -> None:
    note(report, 1, 4.0)
    with pytest.raises(RuntimeError) as caught:
        note(report, 2, loss)
    for part in ("step 1: the loss is", "optim.base_lr (now 0.05)", "optim.warmup_epochs (now 1", "runtime.precision"):
        assert part in str(caught.value)
    assert [event["step"] for event in lines(tmp_path / "metrics.jsonl")] == [0, 1]  # and no NaN, which is not JSON


def test_a_score_that_is_not_finite_is_explained_too(report: Report) -> None:
    with (
        pytest.raises(RuntimeError, match=r"step 3: a prototype score is not finite\..*Try a lower optim.base_lr"),
        report.explained_divergence(3),
    ):
        raise FloatingPointError("a prototype score is not finite")


def test_a_pending_loss_is_looked_at_before_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_config("data", "runtime.log_every_steps=100")
    with Report(config, tmp_path, num_samples=NUM_SAMPLES, step=0, steps_per_epoch=5) as report:
        note(report, 1, float("nan"))
        with pytest.raises(RuntimeError, match="the loss is nan"):
            report.check_finite()


@pytest.mark.parametrize("counts", [[102, 0], [103, 1], [0, 0]])
def test_books_that_do_not_balance_are_a_defect(report: Report, counts: list[int]) -> None:
    with pytest.raises(
        RuntimeError, match=f"delivered {counts[0]} images and quarantined {counts[1]}.*has 103.*report"
    ):
        report.epoch(5, 0, torch.tensor(counts), num_images=NUM_SAMPLES)


def test_an_epochs_books_are_written(report: Report, tmp_path: Path) -> None:
    report.epoch(5, 0, torch.tensor([100, 3]), num_images=NUM_SAMPLES)
    books = {"step": 5, "event": "epoch", "epoch": 0, "images": 100, "quarantined": 3}
    assert lines(tmp_path / "metrics.jsonl")[-1] == books


def test_too_many_broken_images_stop_the_run(report: Report) -> None:
    report.epoch(5, 0, torch.tensor([93, 10]), num_images=NUM_SAMPLES)
    with pytest.raises(RuntimeError, match=r"11 of 103 images are broken, more than the 10 that data.max_quarantined"):
        report.epoch(5, 0, torch.tensor([92, 11]), num_images=NUM_SAMPLES)


@pytest.mark.parametrize(("num_samples", "fraction", "budget"), [(100, 0.001, 10), (10**6, 0.001, 1000), (5, 0.0, 10)])
def test_a_handful_of_broken_images_is_always_borne(num_samples: int, fraction: float, budget: int) -> None:
    assert quarantine_budget(num_samples, fraction) == budget


def test_what_a_step_says(report: Report, tmp_path: Path) -> None:
    batches = (number for number in range(3))
    with report.timed(batches) as passed_on:
        assert next(passed_on) == 0
    assert list(batches) == []  # leaving early has ended them
    note(report, 1, 4.5)
    (line,) = [event for event in lines(tmp_path / "metrics.jsonl") if "loss" in event]
    assert line["loss"] == 4.5
    assert line["learning_rate"] == 0.1
    assert set(line) == {"step", "epoch", "loss", "learning_rate", "images_per_second", "data_wait_fraction"}
