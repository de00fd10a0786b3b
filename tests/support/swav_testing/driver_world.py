"""A world for drivers: storage with real conditions, a scheduler that is as bad as they come, clocks and crashes.

The drivers are the real ones, each in a thread of its own, of which one runs at a time: each stops before every effect
that it has on the world, and a seed decides who goes on, and whether the effect fails, its answer is lost, or the
driver dies before or after it. A driver that is not chosen for long is a paused one.
"""

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from swav.storage import Tagged
from swav_components.driver.control import Driver, Outcome
from swav_components.driver.lease import LEASE, Lease
from swav_components.driver.plan import RESULT, Plan, Step
from swav_components.driver.reconcile import JobState, Rules
from swav_components.driver.records import INTENTS, from_json, record_of

T = TypeVar("T")

LEASE_SECONDS = 30.0
ABSENT_PASSES = 3
_MAX_TICKS = 40_000
_JOIN_SECONDS = 60


class CrashError(BaseException):
    """The driver is dead: nothing that it does has an effect any more."""


class BrokenError(BaseException):
    """A promise of the driver was broken; not an exception that the driver might catch."""


@dataclass(frozen=True)
class Nature:
    """What may happen in a world, as probabilities per step of the world.

    Attributes:
        crash: of a driver, before or after an effect.
        lost: an effect fails, before or after it has happened.
        stale: the scheduler tells how a job was before.
        pause: a driver is not run for a long time.
        jump: the clock goes on by up to twice the lease.
        vanish: a job goes without a result.
        forget: an ended job is removed.
        fails: the step whose job fails for good, if any.
    """

    crash: float = 0.01
    lost: float = 0.01
    stale: float = 0.1
    pause: float = 0.01
    jump: float = 0.01
    vanish: float = 0.1
    forget: float = 0.2
    fails: str | None = None


@dataclass
class _Job:
    step: Step
    state: JobState = JobState.LIVE
    before: JobState = JobState.ABSENT  # what a stale answer says
    stale: int = ABSENT_PASSES - 1  # such answers that are left


@dataclass
class _Driver:
    """A driver's thread, and the baton that lets it run up to its next effect."""

    number: int
    holder: str
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fate: str = ""
    dead: bool = False
    ended: bool = False
    at: str = ""  # the effect that it stops before
    called: int = 0  # when it last began to submit,
    doubtful: bool = False  # and whether another's call for that name was under way then
    paused_until: int = 0
    outcome: Outcome | None = None
    error: BaseException | None = None


class World:
    """Storage, scheduler and clock, with some drivers in it.

    Args:
        plan: of the run.
        seed: decides everything.
        nature: what may happen.
        num_drivers: at once.
        driver: makes the driver under test.
    """

    def __init__(
        self, plan: Plan, seed: int, nature: Nature, num_drivers: int, driver: Callable[..., Driver] = Driver
    ) -> None:
        self.plan = plan
        self.random = random.Random(seed)
        self.nature = nature
        self.calm = False  # from here on nothing bad happens
        self.now = 0.0
        self.tick = 0
        self.files: dict[str, tuple[bytes, str]] = {}
        self.jobs: dict[str, _Job] = {}
        self.created: list[tuple[str, str]] = []  # (step, name)
        self.gone: dict[str, int] = {}  # when a job of this name last went
        self.manifests: dict[str, int] = {}  # when each was first there
        self.story: list[str] = []
        self._num_drivers = num_drivers
        self._make = driver
        self._drivers: list[_Driver] = []
        self._num_started = 0
        self._num_writes = 0

    # --- what drivers do ---

    def effect(self, driver: _Driver, what: str, act: Callable[[], T]) -> T:
        """Stop; then, as fate has it, act."""
        if driver.dead:
            raise CrashError
        driver.at = what
        driver.back.release()
        driver.go.acquire()
        fate = driver.fate
        if driver.dead or fate == "crash before":
            driver.dead = True
            raise CrashError
        if fate == "fails":
            raise ConnectionError("it did not get there")
        found = act()
        if fate == "crash after":
            driver.dead = True
            raise CrashError
        if fate == "answer lost":
            raise ConnectionError("the answer was lost")
        return found

    def write(self, name: str, data: bytes, tag: str | None) -> str | None:
        """A conditional write."""
        found = self.files.get(name)
        if found is not None and found[0] == data:
            return found[1]
        if (None if found is None else found[1]) != tag:
            return None
        self._num_writes += 1
        self.files[name] = data, f"tag-{self._num_writes}"
        return self.files[name][1]

    def holds_lease(self, holder: str) -> bool:
        """Whether a driver has the lease now, by what is in storage."""
        return LEASE in self.files and f'"holder": "{holder}"'.encode() in self.files[LEASE][0]

    def called(self, driver: _Driver, name: str) -> None:
        """A driver is about to submit: it must have the lease, and its intent must be on record."""
        driver.called, driver.doubtful = self.tick, self._in_doubt(name, driver.holder)
        if not self.holds_lease(driver.holder):
            raise BrokenError(f"{driver.holder} submits {name} without the lease")
        found = self.files.get(record_of(name))
        calls = () if found is None else from_json(found[0]).calls
        if not any(one.holder == driver.holder and one.made > one.returned for one in calls):
            raise BrokenError(f"{driver.holder} submits {name} without an intent on record")

    def create(self, driver: _Driver, step: Step, name: str) -> None:
        """The scheduler gets a job; one of that name that is there will do."""
        if name in self.jobs:
            return
        live = [other for other, job in self.jobs.items() if job.step == step and job.state is JobState.LIVE]
        if live:
            raise BrokenError(f"{name} is submitted while {live[0]} is live")
        missing = [need for need in step.needs if not self._is_done(self._step(need))]
        if missing:
            raise BrokenError(f"{name} is submitted before {missing[0]} is done")
        if not driver.doubtful:  # else this name, and no other, is to be had again
            if driver.called > self.gone.get(name, self.tick):
                raise BrokenError(f"{name} is submitted twice")
            if driver.called > self.manifests.get(step.manifest, self.tick):
                raise BrokenError(f"{name} is submitted after its step is done")
        self.created.append((step.key, name))
        self.jobs[name] = _Job(step)

    def state(self, name: str) -> JobState:
        """What the scheduler says."""
        job = self.jobs.get(name)
        if job is None:
            return JobState.ABSENT
        if not self.calm and job.stale > 0 and self.random.random() < self.nature.stale:
            job.stale -= 1
            return job.before
        return job.state

    # --- what happens ---

    def play(self, chaos_ticks: int) -> Outcome:
        """Let things happen, bad ones for a while, until a driver says that all is over."""
        try:
            while self.tick < _MAX_TICKS:
                self.tick += 1
                self.calm = self.tick > chaos_ticks
                self._live_on()
                driver = self._next_driver()
                if driver is None:
                    continue
                self._resume(driver, self._fate(driver))
                if driver.error is not None:
                    raise driver.error
                if driver.ended and driver.outcome in (Outcome.DONE, Outcome.FAILED):
                    return driver.outcome
            raise BrokenError(f"not at its end after {_MAX_TICKS} steps")
        finally:
            self._end_all()

    def _live_on(self) -> None:
        """Time goes on, jobs come to their ends, drivers are started."""
        jump = not self.calm and self.random.random() < self.nature.jump
        self.now += self.random.uniform(0, 2 * LEASE_SECONDS if jump else 0.2)
        for name, job in list(self.jobs.items()):
            if self.random.random() < 0.02:
                self._live_job(name, job)
        if len(self._drivers) < self._num_drivers:
            self._start_driver()

    def _live_job(self, name: str, job: _Job) -> None:
        if job.state is not JobState.LIVE:
            if not self.calm and self.random.random() < self.nature.forget:
                self._remove(name, "is forgotten")
            return
        if not self.calm and self.random.random() < self.nature.vanish:
            self._remove(name, "vanishes")
            return
        if job.step.key == self.nature.fails:
            self._end_job(name, job, JobState.FAILED)
        elif job.step.follows or (job.step.partner is not None and not self._has_live(job.step.partner)):
            if self._is_done(job.step) or (job.step.follows and self.random.random() < 0.1):
                self._end_job(name, job, JobState.SUCCEEDED)
        else:
            self.files[job.step.manifest] = b"{}", job.step.manifest
            self.manifests.setdefault(job.step.manifest, self.tick)
            if self.random.random() < 0.5:
                self._end_job(name, job, JobState.SUCCEEDED)

    def _remove(self, name: str, how: str) -> None:
        self.story.append(f"{self.tick}: {name} {how}")
        self.gone[name] = self.tick
        self.jobs.pop(name, None)

    def _end_job(self, name: str, job: _Job, state: JobState) -> None:
        self.story.append(f"{self.tick}: {name} has {state}")
        job.before, job.state = job.state, state

    def _has_live(self, key: str) -> bool:
        """Whether a partner works, or has ended its work."""
        jobs = [job for job in self.jobs.values() if job.step.key == key]
        return any(job.state in (JobState.LIVE, JobState.SUCCEEDED) for job in jobs) or any(
            from_json(data).ended == "succeeded"
            for name, (data, _) in self.files.items()
            if name.startswith(INTENTS) and from_json(data).step == key
        )

    def _is_done(self, step: Step) -> bool:
        return step.manifest in self.files

    def _step(self, key: str) -> Step:
        return next(step for step in self.plan.steps if step.key == key)

    def _in_doubt(self, name: str, holder: str) -> bool:
        """Whether a call for this name, other than the one that is being made, has not been noted as returned."""
        found = self.files.get(record_of(name))
        calls = () if found is None else from_json(found[0]).calls
        return any(one.made - one.returned > (one.holder == holder) for one in calls)

    # --- who goes on ---

    def _start_driver(self) -> None:
        self._num_started += 1
        driver = _Driver(self._num_started, f"driver-{self._num_started}")
        self._drivers.append(driver)
        driver.thread = threading.Thread(target=self._body, args=(driver,), daemon=True)
        driver.thread.start()
        driver.back.acquire()

    def _body(self, driver: _Driver) -> None:
        try:
            storage = _Storage(self, driver)
            lease = Lease(storage, driver.holder, seconds=LEASE_SECONDS, monotonic=lambda: self.now)
            made = self._make(
                self.plan,
                storage,
                _Jobs(self, driver),
                lease,
                rules=Rules(max_vanished=1000, absent_passes=ABSENT_PASSES),
                wait=lambda: self.effect(driver, "wait", lambda: False),
            )
            driver.outcome = made.run()
            lease.release()
        except CrashError:
            pass
        except OSError:  # of the release
            pass
        except BaseException as error:
            driver.error = error
        finally:
            driver.ended = True
            driver.back.release()

    def _next_driver(self) -> _Driver | None:
        able = [one for one in self._drivers if self.calm or one.paused_until <= self.tick]
        if not able:
            return None
        driver = self.random.choice(able)
        pause = self.nature.pause * (20 if driver.at.startswith("submit") else 1)
        if not self.calm and self.random.random() < pause:
            driver.paused_until = self.tick + self.random.choice([50, 300, 1000, 3000])
            self.story.append(f"{self.tick}: {driver.holder} is paused before {driver.at}")
            return None
        return driver

    def _fate(self, driver: _Driver) -> str:
        if self.calm:
            return ""
        crash = self.nature.crash * (10 if driver.at.startswith("submit") else 1)
        drawn = self.random.random()
        if drawn < crash:
            return self.random.choice(["crash before", "crash after"])
        if driver.at != "wait" and drawn < crash + self.nature.lost:
            return self.random.choice(["fails", "answer lost"])
        return ""

    def _resume(self, driver: _Driver, fate: str) -> None:
        driver.fate = fate
        if fate or driver.at.startswith(("write", "submit", "cancel")):
            self.story.append(f"{self.tick}: {driver.holder} {driver.at} {fate}".rstrip())
        driver.go.release()
        driver.back.acquire()
        if driver.ended:
            assert driver.thread is not None
            driver.thread.join(_JOIN_SECONDS)
            self._drivers.remove(driver)

    def _end_all(self) -> None:
        for driver in self._drivers:
            driver.dead = True
            driver.go.release()
        for driver in self._drivers:
            assert driver.thread is not None
            driver.thread.join(_JOIN_SECONDS)


class _Storage:
    """A run's folder, to one driver."""

    def __init__(self, world: World, driver: _Driver) -> None:
        self._world, self._driver = world, driver

    def exists(self, name: str) -> bool:
        return self._world.effect(self._driver, f"exists {name}", lambda: name in self._world.files)

    def names(self, folder: str) -> Iterable[str]:
        return self._world.effect(
            self._driver,
            f"names {folder}",
            lambda: sorted(
                name.removeprefix(f"{folder}/") for name in self._world.files if name.startswith(f"{folder}/")
            ),
        )

    def read(self, name: str) -> Tagged | None:
        def act() -> Tagged | None:
            found = self._world.files.get(name)
            return None if found is None else Tagged(*found)

        return self._world.effect(self._driver, f"read {name}", act)

    def write(self, name: str, data: bytes, tag: str | None) -> str | None:
        return self._world.effect(self._driver, f"write {name}", lambda: self._world.write(name, data, tag))


class _Jobs:
    """The scheduler, to one driver."""

    end_with_driver = False

    def __init__(self, world: World, driver: _Driver) -> None:
        self._world, self._driver = world, driver

    def submit(self, step: Step, name: str) -> None:
        self._world.called(self._driver, name)
        self._world.effect(self._driver, f"submit {name}", lambda: self._world.create(self._driver, step, name))

    def state(self, step: Step, name: str) -> JobState:
        del step
        return self._world.effect(self._driver, f"state {name}", lambda: self._world.state(name))

    def cancel(self, step: Step, name: str) -> None:
        del step
        self._world.effect(self._driver, f"cancel {name}", lambda: self._world._remove(name, "is cancelled"))

    def handle(self, name: str) -> str:
        return f"simulated://{name}"

    def where(self, name: str) -> str:
        return f"no logs of {name}"

    def close(self) -> None:
        pass


def simple_plan(*, assign: bool = False) -> Plan:
    """Pretraining, in two jobs or in one, and two evaluations."""
    steps = [Step("pretrain", "pretrain", (), "pretrain", RESULT, partner="assign" if assign else None)]
    if assign:
        steps.append(Step("assign", "assign", (), "assign", RESULT, partner="pretrain", follows=True))
    for number in (1, 2):
        key = f"knn-{number}"
        steps.append(Step(key, "knn", (), key, f"evaluations/{key}.json", needs=("pretrain",)))
    return Plan("s3://bucket/runs/photos", tuple(steps))
