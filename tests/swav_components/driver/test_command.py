import time
from pathlib import Path

import pytest

from swav_components.driver.command import _Stop, main, table
from swav_components.driver.control import Row
from swav_components.driver.reconcile import StepState


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "Photos_1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --pretrain"),
        (["--status"], "no driver has begun this run"),
        (["--evaluate", "knn --train x"], "go with --pretrain"),
        (["--pretrain", "--recipe dem"], "dem"),
        (["--pretrain", "--recipe demo", "--selav2", "--recipe demo"], "one pretraining"),
        (
            ["--pretrain", "--recipe demo", "--evaluate", "knn --tran x"],
            "the following arguments are required: --train",
        ),
        (["--pretrain", "--recipe demo", "--scheduler", "local_docker"], "choose from local_cwd, kubernetes"),
        (["--pretrain", "--recipe demo", "--scheduler_args", "queu=x"], "knows no queu"),
        (["--pretrain", "--recipe demo", "--poll-seconds", "30"], "give a longer one"),
        (["--pretrain", "--recipe demo", "--poll-seconds", "0"], "more than 0"),
        (["--pretrain", "--recipe demo", "--attempts", "0"], "more than 0"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_submitted(
    words: list[str], told: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--run", str(run), *words]) == 64
    assert told in caplog.text
    assert not (run / "driver" / "intents").exists()


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_and_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == (0 if words else 64)
    told = capsys.readouterr()
    assert "--run" in told.out + told.err


def test_rows_stand_in_columns() -> None:
    rows = [
        Row("pretrain", StepState.DONE, "", "k://s/a", "2026-01-02T03:04:05+00:00", "result.json"),
        Row("knn-1", StepState.WAITING, "for pretrain", "", "", "evaluations/knn-1.json"),
    ]
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["STEP", "pretrain", "knn-1"]
    assert len({line.index(word) for line, word in zip(lines, ("MANIFEST", "result", "evaluations"), strict=True)}) == 1
    assert lines[2].endswith("for pretrain")


def test_a_pause_ends_at_once_when_asked_to_stop() -> None:
    stop = _Stop()
    assert not stop.wait(0.01)
    stop._hear(15, None)
    before = time.monotonic()
    assert stop.wait(3600)
    assert time.monotonic() - before < 600
