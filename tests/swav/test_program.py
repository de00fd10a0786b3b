import ctypes
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swav.config import from_json
from swav.program import (
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    LAUNCHER_FOLDER,
    LAUNCHER_PID,
    Stopped,
    end_with_launcher,
    run,
    stop_at_once,
    stop_on_signals,
)


def raising(error: Exception) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such recipe"), EXIT_REFUSED),
        (RuntimeError("the disk is full"), EXIT_FAILED),
        (OSError("gone"), EXIT_FAILED),
        (Stopped("stopped after step 3"), EXIT_STOPPED),
    ],
)
def test_every_end_has_its_status_and_its_reason(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert run(raising(error)) == status
    assert str(error) in caplog.text


def test_success_is_zero() -> None:
    assert run(lambda: None) == 0


def test_an_error_of_ours_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def body() -> None:
        from_json('{"name": 1}')

    assert run(body) == EXIT_REFUSED
    assert "Traceback" not in caplog.text


def test_an_error_from_below_says_where_it_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    def body() -> None:
        torch.zeros(2, 3) @ torch.zeros(2, 3)

    assert run(body) == EXIT_FAILED
    assert "Traceback" in caplog.text


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(AssertionError):
        run(raising(AssertionError("ours")))


def test_one_rank_says_what_several_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(what: str) -> Callable[[], None]:
        def body() -> None:
            from_json(json.dumps({what: 1}))

        return body

    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path))
    assert run(refused("this")) == run(refused("this")) == run(refused("that")) == EXIT_REFUSED
    assert [caplog.text.count(f"{what}=1: Unexpected") for what in ("this", "that")] == [1, 1]
    monkeypatch.setenv(LAUNCHER_FOLDER, str(tmp_path / "gone"))
    run(refused("this"))
    assert caplog.text.count("this=1: Unexpected") == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_work_without_state_stops_at_once(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)

    def body() -> None:
        with stop_at_once("stopped in the evaluation"):
            os.kill(os.getpid(), signum)
            time.sleep(60)

    assert run(body) == EXIT_STOPPED
    assert signal.getsignal(signum) is before


def test_a_process_whose_launcher_is_gone_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        with stop_at_once("no launcher"):
            end_with_launcher()
            time.sleep(60)

    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))  # a process is never its own parent
    with pytest.raises(Stopped, match="no launcher"):
        body()
    ctypes.CDLL(None).prctl(1, 0)  # the tests themselves may outlive what started them


def test_a_second_signal_acts_at_once() -> None:
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append("outer"))
    try:
        with stop_on_signals() as flag:
            os.kill(os.getpid(), signal.SIGTERM)
            assert flag.is_set
            assert not caught
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == ["outer"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == ["outer"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
