import dataclasses
import threading

import pytest

from swav.storage import attempts
from swav.storage.answer import Fault
from swav.storage.attempts import Patience


def test_a_fault_of_one_of_two_requests_waits_for_the_other() -> None:
    patience = Patience(first_byte_seconds=0.05)
    may_fail, may_answer = threading.Event(), threading.Event()
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) == 1:
            may_fail.wait(30)
            may_answer.set()
            raise Fault("the first one failed")
        may_fail.set()
        may_answer.wait(30)
        return "the second one"

    assert attempts.hedged(call, patience) == "the second one"


def test_silence_on_both_connections_is_a_fault_in_time() -> None:
    patience = Patience(first_byte_seconds=0.05, connect_seconds=0.05, answer_seconds=0.05)
    never = threading.Event()
    with pytest.raises(Fault, match="no answer came in time"):
        attempts.hedged(lambda: never.wait(20), patience)
    never.set()


def test_pauses_double_up_to_a_cap_and_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    longest: list[float] = []

    def half(low: float, high: float) -> float:
        longest.append(high)
        return (low + high) / 2

    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(attempts._jitter, "uniform", half)
    budget = attempts.Attempts("it", Patience())
    for _ in range(9):
        budget.failed(Fault("no"))
    with pytest.raises(TimeoutError, match="it: gave up after 10 attempts"):
        budget.failed(Fault("no", TimeoutError))
    assert longest == [0.5, 1, 2, 4, 8, 16, 20, 20, 20]
    assert pauses == [high / 2 for high in longest]


def test_patience_is_said_in_one_place() -> None:
    assert all(value > 0 for value in dataclasses.asdict(Patience()).values())
