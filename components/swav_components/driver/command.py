"""The driver's command line, and what is made of it."""

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import asdict
from types import FrameType

from swav.logs import answer, start_logging
from swav.program import Stopped, run
from swav.storage import absolute, check_conditions, join, read_tagged
from swav.watchdog import ends_when_stalled, progress
from swav_components.driver.control import PLAN, Driver, Outcome, Row
from swav_components.driver.lease import Lease
from swav_components.driver.plan import PRETRAINING, Plan, make_plan
from swav_components.driver.reconcile import Rules
from swav_components.driver.records import RunFolder
from swav_components.driver.scheduler import LOCAL, TorchxJobs, open_jobs

_STALLED_SECONDS = 900.0  # for one pass: an API server that never answers must not hold the driver up for good
_SLICE_SECONDS = 0.25  # of a pause, after which a request to stop is seen

_logger = logging.getLogger(__name__)


class _Stop:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """From now on; TorchX's local scheduler has handlers of its own, which would end the driver anywhere."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._hear)

    def _hear(self, _signum: int, _frame: FrameType | None) -> None:
        self.asked = True

    def wait(self, seconds: float) -> bool:
        """Sleep; at once True when asked to stop."""
        progress()
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE_SECONDS))
        return self.asked


def drive(plan: Plan, options: argparse.Namespace) -> Outcome:
    """Carry a plan to its end.

    Raises:
        ValueError: something that a user wrote is refused; nothing was submitted.
        OSError: the run's folder cannot be written.
    """
    holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    jobs = open_jobs(plan, options.scheduler, options.scheduler_args, holder)
    stop = _Stop()
    stop.listen()
    try:
        pause = _pause_seconds(options, jobs.end_with_driver)
        jobs.check()
        check_conditions(join(plan.run, "driver", "conditions"))
        local = jobs.end_with_driver
        folder = RunFolder(plan.run)
        lease = Lease(folder, holder, seconds=options.lease_seconds, monotonic=time.monotonic)
        rules = Rules(
            max_vanished=options.attempts,
            absent_passes=1 if local else 3,
            ends_with_driver=holder if local else None,
        )
        driver = Driver(plan, folder, jobs, lease, rules=rules, wait=lambda: stop.wait(pause), retry=options.retry)
        try:
            outcome = driver.run()
            if outcome in (Outcome.DONE, Outcome.FAILED):
                jobs.settle(lambda: stop.wait(pause))
                tell(driver.rows())
            return outcome
        finally:
            if local:
                jobs.close()  # before the lease: nobody starts a job again while it saves its state
            _release(lease)
    finally:
        jobs.close()


def _pause_seconds(options: argparse.Namespace, local: bool) -> float:
    """Between two passes.

    Raises:
        ValueError: a number is too small, or does not fit the others.
    """
    pause: float = (1.0 if local else 10.0) if options.poll_seconds is None else options.poll_seconds
    if pause <= 0 or options.attempts < 1:
        raise ValueError(f"--poll-seconds {pause:g}, --attempts {options.attempts}: both must be more than 0")
    if pause * 3 > options.lease_seconds:
        raise ValueError(
            f"--poll-seconds {pause:g} is more than a third of --lease-seconds {options.lease_seconds:g}: a pass that "
            "is a little late would lose the lease; give a longer one"
        )
    return pause


def _release(lease: Lease) -> None:
    try:
        lease.release()
    except OSError as error:
        _logger.warning("the lease was not released, and will run out: %s", error)


def status(options: argparse.Namespace, plan: Plan | None) -> list[Row]:
    """How a run's jobs stand, without taking part."""
    run_url = absolute(options.run)
    if plan is None:
        plan = recorded_plan(run_url)
    jobs: TorchxJobs = open_jobs(plan, options.scheduler, options.scheduler_args, "status")
    try:
        folder = RunFolder(run_url)
        lease = Lease(folder, "status", seconds=0.0, monotonic=time.monotonic)
        rules = Rules(ends_with_driver="status" if jobs.end_with_driver else None)
        return Driver(plan, folder, jobs, lease, rules=rules, wait=lambda: True).rows()
    finally:
        jobs.close()


def recorded_plan(run_url: str) -> Plan:
    """The plan that a driver of the run has noted.

    Raises:
        ValueError: there was no driver yet.
    """
    found = read_tagged(join(run_url, PLAN))
    if found is None:
        raise ValueError(f"--run {run_url}: no driver has begun this run; start one with --pretrain '...'")
    commands = [step["command"] for step in json.loads(found.data)["steps"]]
    component, _, words = commands[0].partition(" ")
    assign = next((command.partition(" ")[2] for command in commands[1:] if command.split()[0] == "assign"), None)
    evaluations = [command for command in commands[1:] if command.split()[0] != "assign"]
    return make_plan(run_url, component, words, assign=assign, evaluations=evaluations)


def tell(rows: list[Row]) -> None:
    """Print how the jobs stand."""
    answer(table(rows).rstrip(), title="jobs", jobs=[asdict(row) for row in rows])


def table(rows: list[Row]) -> str:
    """Rows for a terminal."""
    cells = [("STEP", "STATE", "SINCE", "JOB", "MANIFEST", "")]
    cells += [(row.step, row.state, row.since or "-", row.job or "-", row.manifest, row.why) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = (
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[5]]) for line in cells
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m swav_components.driver", description="Pretraining, then evaluations, as jobs of a scheduler."
    )
    parser.add_argument("--run", required=True, help="the run's folder, or s3://bucket/prefix")
    parser.add_argument("--scheduler", default=LOCAL, help=f"of TorchX: {LOCAL}, kubernetes (default: {LOCAL})")
    parser.add_argument("--scheduler_args", default="", help="its arguments, as torchx run has them: k=v,...")
    for component in PRETRAINING:
        parser.add_argument(f"--{component}", metavar="ARGS", help=f"arguments of swav.{component}, in quotes")
    parser.add_argument("--assign", metavar="ARGS", help="arguments of swav.assign, for a job of its own; '' for none")
    parser.add_argument(
        "--evaluate", metavar="'COMPONENT ARGS'", action="append", default=[], help="a job after it; may be repeated"
    )
    parser.add_argument("--retry", action="store_true", help="try steps again that have failed by now")
    parser.add_argument("--status", action="store_true", help="print how the jobs stand, and end")
    parser.add_argument("--attempts", type=int, default=3, help="jobs of a step that may vanish (default: 3)")
    parser.add_argument("--poll-seconds", type=float, help="between two looks (default: 10, locally 1)")
    parser.add_argument(
        "--lease-seconds", type=float, default=60.0, help="until another driver takes over (default: 60)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    start_logging()

    def body() -> None:
        options = parse(arguments)
        plan = asked_plan(options)
        if options.status:
            tell(status(options, plan))
        elif plan is None:
            raise ValueError("give --pretrain, --deepclusterv2 or --selav2 with the component's arguments in quotes")
        else:
            with ends_when_stalled(_STALLED_SECONDS):
                _finish(drive(plan, options))

    return run(body)


def _finish(outcome: Outcome) -> None:
    if outcome is Outcome.STOPPED:
        raise Stopped("stopped on request")
    if outcome is Outcome.LOST:
        raise Stopped("another driver has taken over this run")
    if outcome is Outcome.FAILED:
        raise RuntimeError("a job has failed for good; mend what its log names, then run again with --retry")


def asked_plan(options: argparse.Namespace) -> Plan | None:
    """The plan of the command line; None where it has none.

    Raises:
        ValueError: it is refused.
    """
    given = [(name, getattr(options, name)) for name in PRETRAINING if getattr(options, name) is not None]
    if not given:
        if options.evaluate or options.assign is not None:
            raise ValueError("--evaluate and --assign go with --pretrain, --deepclusterv2 or --selav2")
        return None
    if len(given) > 1:
        raise ValueError(f"--{given[0][0]} and --{given[1][0]}: a run has one pretraining; give one of them")
    return make_plan(options.run, *given[0], assign=options.assign, evaluations=options.evaluate)
