"""The table of docs/driver.md, row by row."""

from dataclasses import replace

import pytest
from swav_testing.driver_world import simple_plan

from swav_components.driver.plan import Plan
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
from swav_components.driver.records import Calls, End, Record

PLAN, OFFLINE = simple_plan(), simple_plan(assign=True)
RUN = "photos-c58511"
RETURNED, IN_DOUBT = Calls("a", 1, made=1, returned=1), Calls("b", 2, made=1)


def _record(step: str = "pretrain", number: int = 1, *calls: Calls, ended: End | None = None) -> Record:
    name = f"{RUN}-{step}" + (f"-a{number}" if number > 1 else "")
    confirmed_by = "a" if any(one.returned for one in calls) else None
    return Record(name, step, number, step, calls, confirmed_by=confirmed_by, ended=ended)


def _job(state: JobState, record: Record | None = None, *, absent: int = 0) -> Job:
    return Job(record or _record("pretrain", 1, RETURNED), "tag", state, absent)


def _reconcile(*jobs: Job, plan: Plan = PLAN, rules: Rules | None = None, **others: Seen) -> Verdict:
    steps = {step.key: Seen(False) for step in plan.steps} | {"pretrain": Seen(False, jobs)}
    steps |= {key.replace("_", "-"): seen for key, seen in others.items()}
    return reconcile(Observed(plan, rules or Rules(), steps))


def _of_both(jobs: dict[str, Seen]) -> Verdict:
    """Of a trainer and its assigner."""
    steps = {step.key: Seen(False) for step in OFFLINE.steps} | jobs
    return reconcile(Observed(OFFLINE, Rules(), steps))


def _names(actions: list[Action]) -> list[str]:
    return [action.name if isinstance(action, Cancel) else action.record.name for action in actions]


def test_at_the_start_pretraining_is_due_and_evaluations_wait() -> None:
    verdict = _reconcile()
    assert [state for state, _ in verdict.states.values()] == [StepState.DUE, StepState.WAITING, StepState.WAITING]
    assert verdict.actions == [Submit(PLAN.steps[0], _record(), None)]
    assert not verdict.finished


def test_evaluations_follow_when_the_manifest_is_there_whatever_the_scheduler_says() -> None:
    for state in JobState:
        verdict = _reconcile(pretrain=Seen(True, (_job(state),)))
        assert verdict.states["pretrain"] == (StepState.DONE, "")
        assert _names(verdict.actions) == [f"{RUN}-knn-1", f"{RUN}-knn-2"]


@pytest.mark.parametrize(
    ("state", "expected"), [(JobState.LIVE, StepState.RUNNING), (JobState.UNSEEN, StepState.UNSEEN)]
)
def test_a_job_that_lives_or_cannot_be_seen_is_waited_for(state: JobState, expected: StepState) -> None:
    verdict = _reconcile(_job(state))
    assert verdict.states["pretrain"][0] is expected
    assert verdict.actions == []
    assert not verdict.finished


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.SUCCEEDED])
def test_a_job_that_ends_without_its_manifest_has_failed_and_stops_what_needs_it(state: JobState) -> None:
    verdict = _reconcile(_job(state))
    (action,) = verdict.actions
    assert isinstance(action, Close)
    assert action.record.ended is End.FAILED
    assert ("did not write result.json" in action.record.why) == (state is JobState.SUCCEEDED)
    assert verdict.states["pretrain"][0] is StepState.FAILED
    assert verdict.states["knn-1"] == (StepState.BLOCKED, "pretrain has failed")
    after = _reconcile(_job(state, action.record))
    assert (after.actions, after.finished, after.succeeded) == ([], True, False)


def test_a_failure_that_is_written_down_outlives_the_schedulers_memory() -> None:
    verdict = _reconcile(_job(JobState.ABSENT, _record("pretrain", 1, RETURNED, ended=End.FAILED), absent=9))
    assert verdict.finished
    assert verdict.actions == []


def test_one_evaluation_that_fails_does_not_stop_the_other() -> None:
    failed = _job(JobState.FAILED, _record("knn-1", 1, RETURNED, ended=End.FAILED))
    verdict = _reconcile(pretrain=Seen(True), knn_1=Seen(False, (failed,)))
    assert _names(verdict.actions) == [f"{RUN}-knn-2"]
    verdict = _reconcile(pretrain=Seen(True), knn_1=Seen(False, (failed,)), knn_2=Seen(True))
    assert (verdict.finished, verdict.succeeded) == (True, False)


def test_a_name_of_which_no_call_returned_is_submitted_again() -> None:
    record = _record("pretrain", 1, IN_DOUBT)
    assert _reconcile(_job(JobState.ABSENT, record, absent=1)).actions == [Submit(PLAN.steps[0], record, "tag")]


def test_a_job_that_vanished_is_followed_by_one_of_the_next_name() -> None:
    assert _reconcile(_job(JobState.ABSENT, absent=2)).states["pretrain"][0] is StepState.MISSING
    (action,) = _reconcile(_job(JobState.ABSENT, absent=3)).actions
    assert isinstance(action, Submit)
    assert (action.record.name, action.record.number, action.tag) == (f"{RUN}-pretrain-a2", 2, None)
    assert action.record.vanished == 1


def test_no_other_name_is_used_while_a_call_may_still_come_through() -> None:
    (action,) = _reconcile(_job(JobState.ABSENT, _record("pretrain", 1, RETURNED, IN_DOUBT), absent=3)).actions
    assert isinstance(action, Submit)
    assert (action.record.name, action.tag) == (f"{RUN}-pretrain", "tag")
    assert (action.record.vanished, action.record.confirmed_by) == (1, None)


def test_jobs_that_vanish_again_and_again_are_given_up() -> None:
    record = replace(_record("pretrain", 3, RETURNED), vanished=2)
    (action,) = _reconcile(_job(JobState.ABSENT, record, absent=3)).actions
    assert isinstance(action, Close)
    assert "vanished without a result 3 times" in action.record.why


def test_local_jobs_that_ended_with_their_driver_do_not_count() -> None:
    record = replace(_record("pretrain", 3, RETURNED), vanished=2)
    rules = Rules(absent_passes=1, ends_with_driver="another")
    (action,) = _reconcile(_job(JobState.ABSENT, record, absent=1), rules=rules).actions
    assert isinstance(action, Submit)
    assert (action.record.name, action.record.vanished) == (f"{RUN}-pretrain-a4", 2)


def test_a_superseded_failure_is_followed_by_the_next_name() -> None:
    record = _record("pretrain", 1, RETURNED, ended=End.SUPERSEDED)
    (action,) = _reconcile(_job(JobState.FAILED, record)).actions
    assert isinstance(action, Submit)
    assert (action.record.name, action.record.vanished) == (f"{RUN}-pretrain-a2", 0)


@pytest.mark.parametrize("state", [JobState.LIVE, JobState.UNSEEN])
def test_a_superseded_job_has_ended_before_the_next_one_begins(state: JobState) -> None:
    verdict = _reconcile(_job(state, _record("pretrain", 1, RETURNED, ended=End.SUPERSEDED)))
    assert [type(action) for action in verdict.actions] == ([Cancel] if state is JobState.LIVE else [])
    assert verdict.states["pretrain"][0] is StepState.WAITING


def test_live_jobs_of_names_that_were_given_up_are_cancelled() -> None:
    old = _job(JobState.LIVE, _record("pretrain", 1, RETURNED))
    new = _job(JobState.LIVE, _record("pretrain", 2, RETURNED))
    assert _names(_reconcile(old, new).actions) == [f"{RUN}-pretrain"]
    ended = _job(JobState.LIVE, _record("pretrain", 1, RETURNED, ended=End.FAILED))
    verdict = _reconcile(ended)
    assert [type(action) for action in verdict.actions] == [Cancel]
    assert not verdict.finished


def test_trainer_and_assigner_are_submitted_together_and_the_assigner_may_end_first() -> None:
    assert _names(_reconcile(plan=OFFLINE).actions) == [f"{RUN}-pretrain", f"{RUN}-assign"]
    ended = _job(JobState.SUCCEEDED, _record("assign", 1, RETURNED))
    verdict = _reconcile(_job(JobState.LIVE), plan=OFFLINE, assign=Seen(False, (ended,)))
    (action,) = verdict.actions
    assert isinstance(action, Close)
    assert action.record.ended is End.SUCCEEDED
    gone = _job(JobState.ABSENT, action.record, absent=9)
    assert _reconcile(_job(JobState.LIVE), plan=OFFLINE, assign=Seen(False, (gone,))).actions == []


@pytest.mark.parametrize(("failed", "other"), [("pretrain", "assign"), ("assign", "pretrain")])
def test_who_waits_for_a_partner_that_has_failed_is_stopped(failed: str, other: str) -> None:
    jobs = {
        failed: Seen(False, (_job(JobState.FAILED, _record(failed, 1, RETURNED, ended=End.FAILED)),)),
        other: Seen(False, (_job(JobState.LIVE, _record(other, 1, RETURNED)),)),
    }
    (action,) = _of_both(jobs).actions
    assert isinstance(action, Close)
    assert (action.record.step, action.record.ended) == (other, End.CANCELLED)
    jobs[other] = Seen(False, (_job(JobState.LIVE, action.record),))
    verdict = _of_both(jobs)
    assert [type(action) for action in verdict.actions] == [Cancel]
    jobs[other] = Seen(False, (_job(JobState.ABSENT, action.record, absent=1),))
    verdict = _of_both(jobs)
    assert (verdict.actions, verdict.finished) == ([], True)


def test_all_is_over_when_all_manifests_are_there() -> None:
    verdict = _reconcile(pretrain=Seen(True), knn_1=Seen(True), knn_2=Seen(True))
    assert (verdict.actions, verdict.finished, verdict.succeeded) == ([], True, True)
