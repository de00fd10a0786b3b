"""The driver in worlds where all goes wrong, drawn from seeds; and drivers with bugs, which these worlds show."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from swav_testing.driver_world import BrokenError, Nature, World, simple_plan

from swav_components.driver import control
from swav_components.driver.control import Driver, Outcome
from swav_components.driver.reconcile import Job, Observed, Seen, Submit, Verdict, reconcile
from swav_components.driver.records import INTENTS, Record, record_of

CHAOS_TICKS = 3000
SEEDS_PER_NATURE = 120
HARSH = Nature(vanish=0.9, pause=0.02, jump=0.05, forget=0.9)
NATURES = {
    "quiet": Nature(crash=0, lost=0, stale=0, pause=0, jump=0, vanish=0, forget=0),
    "jobs stay": Nature(vanish=0, forget=0, pause=0.03, crash=0.02),
    "usual": Nature(),
    "jobs vanish": Nature(vanish=0.5, forget=0.5, jump=0.03),
    "scheduler lies": Nature(stale=0.4, lost=0.05),
    "drivers crash": Nature(crash=0.05),
    "drivers pause": Nature(pause=0.03, jump=0.03, vanish=0.5, forget=0.8),
    "harsh": HARSH,
    "an evaluation fails": Nature(fails="knn-1"),
    "pretraining fails": Nature(fails="pretrain"),
}


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    logger = logging.getLogger("swav_components.driver")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def _play(seed: int, nature: Nature, driver: Any = Driver) -> tuple[World, Outcome]:
    world = World(simple_plan(assign=seed % 2 == 1), seed, nature, 2 + seed // 2 % 2, driver)
    return world, world.play(CHAOS_TICKS)


@pytest.mark.parametrize("name", NATURES)
def test_no_job_is_submitted_twice_and_none_is_lost(name: str) -> None:
    """1,200 worlds; the promises that hold at each moment are checked by the world itself."""
    nature = NATURES[name]
    for seed in range(SEEDS_PER_NATURE):
        try:
            world, outcome = _play(seed, nature)
        except BrokenError as broken:
            pytest.fail(f"seed {seed} of {name!r}: {broken}")
        told = f"seed {seed} of {name!r}\n" + "\n".join(world.story[-100:])
        done = {step.key for step in world.plan.steps if step.manifest in world.files}
        steps = {step.key for step in world.plan.steps}
        failing = {"knn-1"} if nature.fails == "knn-1" else steps if nature.fails is not None else set()
        assert done == steps - failing, told
        assert outcome is (Outcome.FAILED if failing else Outcome.DONE), told
        per_step = Counter(step for step, _ in world.created)
        if nature.vanish == nature.forget == 0:  # a name that is there cannot be had twice: each job came to be once
            assert per_step == dict.fromkeys(steps, 1), told
        if nature.fails is not None:
            assert "knn-1" not in per_step or nature.fails == "knn-1", told


class _WithoutLeaseCheck(Driver):
    def _submit(self, action: Submit) -> None:
        lease: Any = self._lease
        confirm, lease.confirm = lease.confirm, lambda: True
        try:
            super()._submit(action)
        finally:
            lease.confirm = confirm


class _CountsInMemory(Driver):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._numbers: Counter[str] = Counter()

    def _submit(self, action: Submit) -> None:
        if action.tag is None:
            self._numbers[action.step.key] += 1
            number = self._numbers[action.step.key]
            name = self._plan.job_name(action.step, number)
            found = self._storage.read(record_of(name))
            record = replace(action.record, number=number, name=name)
            action = Submit(action.step, record, None if found is None else found.tag)
        super()._submit(action)


class _IntentAfterSubmission(Driver):
    def _submit(self, action: Submit) -> None:
        if not self._lease.confirm():
            raise control._LostLeaseError
        try:
            self._jobs.submit(action.step, action.record.name)
        except Exception:
            return
        self._write(action.record.with_call(self._lease.holder, self._lease.fencing, made=1, returned=1), action.tag)


class _IgnoresCallsInDoubt(Driver):
    def look(self) -> Verdict:
        verdict = super().look()
        for place, action in enumerate(verdict.actions):
            if isinstance(action, Submit) and action.tag is not None and action.record.vanished:
                old = action.record
                name = self._plan.job_name(action.step, old.number + 1)
                record = Record(name, old.step, old.number + 1, old.command, vanished=old.vanished)
                verdict.actions[place] = Submit(action.step, record, None)
        return verdict


class _LooksAtManifestsFirst(Driver):
    def look(self) -> Verdict:
        names = list(self._storage.names(INTENTS))
        steps = {}
        for step in self._plan.steps:
            done = self._storage.exists(step.manifest)
            jobs: tuple[Job, ...] = () if done else self._jobs_of(step, names)
            steps[step.key] = Seen(done, jobs)
        return reconcile(Observed(self._plan, self._rules, steps))


class _BelievesOneAnswer(Driver):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._rules = replace(self._rules, absent_passes=1)


class _KeepsCountingMissingJobs(Driver):
    """As the driver once did: times before a job's submission counted too."""

    def _count(self, name: str, tag: str, state: Any) -> int:
        del tag
        return super()._count(name, "", state)


@pytest.mark.parametrize(
    ("driver", "nature", "told"),
    [
        (_WithoutLeaseCheck, HARSH, "without the lease"),
        (_CountsInMemory, HARSH, "is submitted twice"),
        (_IntentAfterSubmission, HARSH, "without an intent on record"),
        (_IgnoresCallsInDoubt, HARSH, "is submitted"),
        (_LooksAtManifestsFirst, HARSH, "is submitted twice"),
        (_BelievesOneAnswer, NATURES["scheduler lies"], "is submitted while"),
        (_KeepsCountingMissingJobs, NATURES["scheduler lies"], "is submitted while"),
    ],
)
def test_the_worlds_find_bugs(driver: type[Driver], nature: Nature, told: str) -> None:
    for seed in range(600):
        try:
            _play(seed, nature, driver)
        except BrokenError as broken:
            found = str(broken)
            break
    else:
        pytest.fail("600 worlds did not show the bug")
    assert told in found, seed
