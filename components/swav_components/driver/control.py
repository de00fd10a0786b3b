"""The driver's loop: look, decide, act, and look again. It remembers nothing that it could not see anew."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from swav_components.driver.lease import Lease
from swav_components.driver.plan import Plan, Step
from swav_components.driver.reconcile import (
    Action,
    Cancel,
    Close,
    Job,
    JobState,
    Observed,
    Rules,
    Seen,
    StepState,
    Submit,
    Verdict,
    reconcile,
)
from swav_components.driver.records import INTENTS, End, Record, RunStorage, from_json, record_of
from swav_components.driver.scheduler import Jobs, RefusedError

PLAN = "driver/plan.json"
_NOTES = 5  # tries to write down that a call returned

_logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a driver's work ended."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"  # its lease, to another driver


class _LostLeaseError(Exception):
    """Another driver has taken over: nothing more may be submitted."""


@dataclass(frozen=True)
class Row:
    """A step, for people."""

    step: str
    state: StepState
    why: str
    job: str
    since: str
    manifest: str


class Driver:
    """Carries a plan to its end.

    Args:
        plan: what to do.
        storage: the run's folder.
        jobs: the scheduler.
        lease: of this driver.
        rules: for decisions.
        wait: sleeps for a pass's pause; returns True when the driver is asked to stop.
        retry: whether steps that have failed by now are tried again.
    """

    def __init__(
        self,
        plan: Plan,
        storage: RunStorage,
        jobs: Jobs,
        lease: Lease,
        *,
        rules: Rules,
        wait: Callable[[], bool],
        retry: bool = False,
    ) -> None:
        self._plan = plan
        self._storage = storage
        self._jobs = jobs
        self._lease = lease
        self._rules = rules
        self._wait = wait
        self._retry = retry
        self._absent: dict[str, tuple[str, int]] = {}
        self._said: dict[str, str] = {}
        self._begun = False

    def run(self) -> Outcome:
        """Go on until nothing more will happen by itself, or until asked to stop.

        Raises:
            ValueError: the run was begun with other words.
        """
        while True:
            try:
                outcome = self._pass()
            except _LostLeaseError:
                return Outcome.LOST
            except OSError as error:
                _logger.warning("the run's folder cannot be read or written now, and is tried again: %s", error)
                outcome = None
            if outcome is not None:
                return outcome
            if self._wait():
                return Outcome.STOPPED

    def look(self) -> Verdict:
        """Where every step stands, and what would be done now; does nothing."""
        return reconcile(self._observe())

    def rows(self) -> list[Row]:
        """Where every step stands, for people."""
        observed = self._observe(jobs_of_done=True)
        verdict = reconcile(observed)
        rows = []
        for step in self._plan.steps:
            job = observed.steps[step.key].jobs[-1:]
            record = job[0].record if job else None
            rows.append(
                Row(
                    step.key,
                    *verdict.states[step.key],
                    "" if record is None else self._jobs.handle(record.name),
                    "" if record is None else record.at,
                    step.manifest,
                )
            )
        return rows

    def _pass(self) -> Outcome | None:
        held = self._hold()
        if not held:
            self._say("lease", "another driver of this run is at work; this one waits in case it ends")
        verdict = self.look()
        for key, (state, why) in verdict.states.items():
            self._say(key, f"{key}: {state}{why and ', '}{why}")
        if held:
            for action in verdict.actions:
                self._perform(action)
        if not verdict.finished:
            return None
        return Outcome.DONE if verdict.succeeded else Outcome.FAILED

    def _hold(self) -> bool:
        """Whether this driver has the lease, renewed just now."""
        if self._lease.held:
            if not self._lease.confirm():
                raise _LostLeaseError
        elif not self._lease.acquire():
            return False
        self._say("lease", f"this driver has the run's lease (number {self._lease.fencing})")
        if not self._begun:
            self._begin()
            self._begun = True
        return True

    def _begin(self) -> None:
        """Once, with the lease: refuse another run's words, note the plan, and let failed steps be tried again."""
        for step, seen in self._observe(jobs_of_done=True).steps.items():
            if not seen.jobs:
                continue
            newest = seen.jobs[-1]
            again = self._retry and not seen.done and newest.record.ended in (End.FAILED, End.CANCELLED)
            self._check_words(step, newest.record, again)
            if again:
                self._write(replace(newest.record, ended=End.SUPERSEDED), newest.tag)
        found = self._storage.read(PLAN)
        steps = [{"key": step.key, "command": step.command, "manifest": step.manifest} for step in self._plan.steps]
        text = json.dumps({"run": self._plan.run, "steps": steps}, indent=2) + "\n"
        if found is None or found.data != text.encode():
            self._storage.write(PLAN, text.encode(), None if found is None else found.tag)

    def _check_words(self, key: str, record: Record, again: bool) -> None:
        step = next(step for step in self._plan.steps if step.key == key)
        if record.command != step.command and not again:
            self._lease.release()
            raise ValueError(
                f"{key} of this run was submitted as {record.command!r}, and is {step.command!r} now; give the same "
                "words (new evaluations come last), --retry where it has failed, or another --run"
            )

    def _perform(self, action: Action) -> None:
        if isinstance(action, Submit):
            self._submit(action)
        elif isinstance(action, Close):
            if self._write(action.record, action.tag) is not None and action.record.ended is End.FAILED:
                _logger.error("%s; %s", action.record.why, self._jobs.where(action.record.name))
        else:
            self._cancel(action)

    def _cancel(self, action: Cancel) -> None:
        _logger.warning("cancelling job %s: %s", action.name, action.why)
        step = next(step for step in self._plan.steps if self._is_of(action.name, step))
        try:
            self._jobs.cancel(step, action.name)
        except Exception as error:
            _logger.warning("job %s could not be cancelled now: %s", action.name, error)

    def _submit(self, action: Submit) -> None:
        """Write the intent, make sure of the lease, submit, and note that the call returned.

        Where this ends in between, the record says that a call may still come through, and whoever goes on uses the
        same name again: the scheduler has one job of a name.
        """
        holder, fencing = self._lease.holder, self._lease.fencing
        name = action.record.name
        record = action.record.with_call(holder, fencing, made=1)
        tag = self._write(record, action.tag)
        if tag is None:  # another driver was faster
            return
        if not self._lease.confirm():
            self._write(action.record.with_call(holder, fencing), tag)  # no call was made
            raise _LostLeaseError
        try:
            self._jobs.submit(action.step, name)
        except RefusedError as refusal:
            why = f"job {name} was refused: {refusal}"
            _logger.error("%s", why)
            self._note(
                name, lambda found: replace(found.with_call(holder, fencing, returned=1), ended=End.FAILED, why=why)
            )
            return
        except Exception as error:
            _logger.warning("job %s may not have been submitted, which will be seen: %s", name, error)
            return
        _logger.info("submitted job %s", self._jobs.handle(name))
        self._note(name, lambda found: replace(found.with_call(holder, fencing, returned=1), confirmed_by=holder))
        if not self._lease.confirm():
            self._regret(action)
            raise _LostLeaseError

    def _regret(self, action: Submit) -> None:
        """Take back a job that came late, after another driver has seen the step's end."""
        found = self._storage.read(record_of(action.record.name))
        given_up = found is not None and from_json(found.data).ended is not None
        if given_up or self._storage.exists(action.step.manifest):
            self._cancel(Cancel(action.record.name, "it was submitted after the end of its step"))

    def _note(self, name: str, change: Callable[[Record], Record]) -> None:
        """Change a record that another driver may change too."""
        for _ in range(_NOTES):
            found = self._storage.read(record_of(name))
            if found is None or self._write(change(from_json(found.data)), found.tag) is not None:
                return
        _logger.warning("%s could not be brought up to date; another driver writes it", record_of(name))

    def _write(self, record: Record, tag: str | None) -> str | None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        count = sum(calls.made + calls.returned for calls in record.calls)
        written = replace(record, at=now, writer=f"{self._lease.holder}/{self._lease.fencing}/{count}")
        return self._storage.write(record_of(record.name), written.to_json(), tag)

    def _observe(self, *, jobs_of_done: bool = False) -> Observed:
        """Look at the jobs first, then at the manifests: a job that has ended has written its manifest before."""
        names = list(self._storage.names(INTENTS))
        steps = {}
        for step in self._plan.steps:
            done = self._storage.exists(step.manifest)
            jobs: tuple[Job, ...] = ()
            if not done or jobs_of_done:
                jobs = self._jobs_of(step, names)
                done = done or self._storage.exists(step.manifest)
            steps[step.key] = Seen(done, jobs)
        return Observed(self._plan, self._rules, steps)

    def _jobs_of(self, step: Step, names: list[str]) -> tuple[Job, ...]:
        found = []
        for file in names:
            name = file.removesuffix(".json")
            tagged = self._storage.read(record_of(name)) if self._is_of(name, step) else None
            if tagged is None:
                continue
            state = self._state(step, name)
            found.append(Job(from_json(tagged.data), tagged.tag, state, self._count(name, tagged.tag, state)))
        return tuple(sorted(found, key=lambda job: job.record.number))

    def _count(self, name: str, tag: str, state: JobState) -> int:
        """How often in a row the job was missing since its record was last written, as by a call."""
        before, count = self._absent.get(name, (tag, 0))
        count = (count if before == tag else 0) + 1 if state is JobState.ABSENT else 0
        self._absent[name] = tag, count
        return count

    def _is_of(self, name: str, step: Step) -> bool:
        first = self._plan.job_name(step, 1)
        return name == first or (name.startswith(f"{first}-a") and name.removeprefix(f"{first}-a").isdigit())

    def _state(self, step: Step, name: str) -> JobState:
        try:
            return self._jobs.state(step, name)
        except Exception as error:
            _logger.warning("the scheduler does not say how job %s stands: %s", name, error)
            return JobState.UNSEEN

    def _say(self, what: str, text: str) -> None:
        """Log what is new."""
        if self._said.get(what) != text:
            self._said[what] = text
            _logger.info("%s", text)
