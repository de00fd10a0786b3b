"""What is to be done, as a pure function of what is seen: the table of docs/driver.md.

A job is done when its manifest is there. Whatever else the scheduler says only tells whether to wait, to submit, or to
give up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from swav_components.driver.plan import Plan, Step
from swav_components.driver.records import End, Record


class JobState(StrEnum):
    """What the scheduler says of a job."""

    LIVE = "live"  # submitted, waiting or running
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # for good, or cancelled
    ABSENT = "absent"  # the scheduler knows no such job
    UNSEEN = "unseen"  # the scheduler did not answer


class StepState(StrEnum):
    """Where a step stands."""

    DONE = "done"
    ENDED = "ended"  # a companion's job: its partner is not done yet
    RUNNING = "running"
    DUE = "due"
    MISSING = "missing"  # the scheduler does not know the job, and did before
    UNSEEN = "unseen"
    WAITING = "waiting"  # for what it needs
    FAILED = "failed"
    BLOCKED = "blocked"  # what it needs has failed


@dataclass(frozen=True)
class Job:
    """A job that was asked for at least once.

    Attributes:
        record: of its name.
        tag: of the record as it was read.
        state: by the scheduler.
        absent: how often in a row, up to now, this driver was told that there is no such job.
    """

    record: Record
    tag: str
    state: JobState
    absent: int = 0


@dataclass(frozen=True)
class Seen:
    """Of one step: whether its manifest is there, and its jobs by number; the jobs of a done step are not looked at."""

    done: bool
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Numbers that decide.

    Attributes:
        max_vanished: jobs of one step that may vanish without a result.
        absent_passes: how often in a row a job must be missing before it counts as vanished.
        ends_with_driver: the driver whose jobs count where jobs end with their driver, which is no fault of theirs;
            None where jobs outlive drivers, and all count.
    """

    max_vanished: int = 3
    absent_passes: int = 3
    ends_with_driver: str | None = None


@dataclass(frozen=True)
class Observed:
    """All that is seen in one pass."""

    plan: Plan
    rules: Rules
    steps: Mapping[str, Seen]


@dataclass(frozen=True)
class Submit:
    """Write the record (anew where ``tag`` is None, else instead of the one that has this tag), then submit the job."""

    step: Step
    record: Record
    tag: str | None


@dataclass(frozen=True)
class Close:
    """Write down how a job ended."""

    record: Record
    tag: str


@dataclass(frozen=True)
class Cancel:
    """Stop a job that is not wanted any more."""

    name: str
    why: str


Action = Submit | Close | Cancel

_WAITING = {
    JobState.LIVE: (StepState.RUNNING, ""),
    JobState.UNSEEN: (StepState.UNSEEN, "the scheduler does not answer"),
}


@dataclass
class Verdict:
    """What follows.

    Attributes:
        states: of each step, and why.
        actions: to take, in order.
    """

    states: dict[str, tuple[StepState, str]] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Whether all is done."""
        return all(state is StepState.DONE for state, _ in self.states.values())

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen by itself."""
        last = (StepState.DONE, StepState.FAILED, StepState.BLOCKED)
        failed = any(state is StepState.FAILED for state, _ in self.states.values())
        lasting = (*last, StepState.ENDED) if failed else last
        return not self.actions and all(state in lasting for state, _ in self.states.values())


def reconcile(observed: Observed) -> Verdict:
    """Decide what to do now.

    Args:
        observed: manifests, records and jobs, the jobs looked at before the manifests.

    Returns:
        The state of every step, and the actions that the holder of the lease is to take.
    """
    verdict = Verdict()
    found: dict[str, list[Action]] = {}
    for step in observed.plan.steps:
        state, why, found[step.key] = _of_step(step, observed, verdict)
        verdict.states[step.key] = state, why
    for step in observed.plan.steps:
        if step.partner is not None and verdict.states[step.partner][0] is StepState.FAILED:
            found[step.key] = _without_partner(step, observed, verdict, found[step.key])
    verdict.actions = [action for step in observed.plan.steps for action in found[step.key]]
    return verdict


def _of_step(step: Step, observed: Observed, verdict: Verdict) -> tuple[StepState, str, list[Action]]:
    seen = observed.steps[step.key]
    if seen.done:
        return StepState.DONE, "", []
    cancels = _unwanted(seen)
    missing = [need for need in step.needs if verdict.states[need][0] is not StepState.DONE]
    for need in missing:
        if verdict.states[need][0] in (StepState.FAILED, StepState.BLOCKED):
            return StepState.BLOCKED, f"{need} has failed", cancels
    if missing:
        return StepState.WAITING, f"for {', '.join(missing)}", cancels
    if not seen.jobs:
        first = Record(observed.plan.job_name(step, 1), step.key, 1, step.command)
        return StepState.DUE, "", [Submit(step, first, None)]
    state, why, actions = _of_job(step, seen.jobs[-1], observed)
    return state, why, [*cancels, *actions]


def _unwanted(seen: Seen) -> list[Action]:
    """Live jobs whose name has been given up."""
    kept = (None, End.SUCCEEDED)
    return [
        Cancel(job.record.name, job.record.why or "another attempt has taken its place")
        for job in seen.jobs
        if job.state is JobState.LIVE and (job.record.ended not in kept or job is not seen.jobs[-1])
    ]


def _of_job(step: Step, job: Job, observed: Observed) -> tuple[StepState, str, list[Action]]:
    """By the newest job of a step whose manifest is not there."""
    if job.record.ended is not None:
        return _of_ended(step, job, observed)
    if job.state in _WAITING:
        return *_WAITING[job.state], []
    if job.state is JobState.ABSENT:
        return _of_absent(step, job, observed)
    if job.state is JobState.SUCCEEDED and step.follows:
        return StepState.ENDED, "", [_close(job, End.SUCCEEDED, "")]
    why = f"job {job.record.name} has failed"
    if job.state is JobState.SUCCEEDED:
        why = f"job {job.record.name} ended well, but did not write {step.manifest}"
    return StepState.FAILED, why, [_close(job, End.FAILED, why)]


def _of_ended(step: Step, job: Job, observed: Observed) -> tuple[StepState, str, list[Action]]:
    """By the newest job of a step, whose end was written down."""
    record = job.record
    if record.ended is End.SUPERSEDED and job.state in _WAITING:
        return StepState.WAITING, f"for the end of {record.name}", []
    if record.ended is End.SUPERSEDED:
        return StepState.DUE, "asked for again", [_next(step, job, observed, 0)]
    if record.ended is End.SUCCEEDED:
        return StepState.ENDED, "", []
    return StepState.FAILED, record.why, []


def _of_absent(step: Step, job: Job, observed: Observed) -> tuple[StepState, str, list[Action]]:
    """By the newest job of a step, which the scheduler does not know: never submitted, or gone without a result."""
    record, rules = job.record, observed.rules
    if record.confirmed_by is None:  # nobody knows that it ever was there: the same name is safe in either case
        return StepState.DUE, "", [Submit(step, record, job.tag)]
    if job.absent < rules.absent_passes:
        return StepState.MISSING, f"the scheduler knows no job {record.name}", []
    counts = rules.ends_with_driver in (None, record.confirmed_by)
    vanished = record.vanished + counts
    if vanished >= rules.max_vanished:
        why = f"jobs of {step.key} vanished without a result {vanished} times, the last of them {record.name}"
        return StepState.FAILED, why, [_close(job, End.FAILED, why)]
    if record.in_doubt:  # a call for this very name may still come through, so no other name may be used beside it
        again = replace(record, vanished=vanished, confirmed_by=None)
        return StepState.DUE, "its job vanished", [Submit(step, again, job.tag)]
    return StepState.DUE, "its job vanished", [_next(step, job, observed, vanished)]


def _next(step: Step, job: Job, observed: Observed, vanished: int) -> Submit:
    number = job.record.number + 1
    name = observed.plan.job_name(step, number)
    return Submit(step, Record(name, step.key, number, step.command, vanished=vanished), None)


def _close(job: Job, ended: End, why: str) -> Close:
    return Close(replace(job.record, ended=ended, why=why), job.tag)


def _without_partner(step: Step, observed: Observed, verdict: Verdict, actions: list[Action]) -> list[Action]:
    """Stop what would wait for a partner that has failed."""
    state, _ = verdict.states[step.key]
    if state in (StepState.DONE, StepState.FAILED, StepState.ENDED):
        return actions
    why = f"{step.partner} has failed"
    verdict.states[step.key] = StepState.BLOCKED, why
    jobs = observed.steps[step.key].jobs
    cancels: list[Action] = [action for action in actions if isinstance(action, Cancel)]
    if jobs and jobs[-1].record.ended is None:
        return [*cancels, _close(jobs[-1], End.CANCELLED, why)]
    return cancels
