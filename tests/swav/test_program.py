import logging
from collections.abc import Callable

import pytest
import torch

from swav.config import from_json
from swav.program import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, Stopped, run


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
