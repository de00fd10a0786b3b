"""The scheduler as the driver sees it: submit a job of a name, say how it stands, cancel it. By TorchX's runner."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torchx.runner.api import Runner, get_runner
from torchx.specs import AppDef, AppDryRunInfo, AppState, CfgVal, make_app_handle

from swav.storage import cache_folder, is_remote, join, local_path, locked
from swav_components.driver import tether
from swav_components.driver.plan import Plan, Step, app_of, run_name
from swav_components.driver.reconcile import JobState

JOB = "SWAV_DRIVER_JOB"  # environment of local jobs: run, step and name, by which drivers find them
LOCAL, KUBERNETES = "local_cwd", "kubernetes"
_REFUSALS = frozenset({400, 401, 403, 404, 422})  # of an API server: another try will not help
_GONE = 404
_SETTLE_SECONDS = 120.0  # from a result to the end of the process that wrote it
_STATES = {
    AppState.SUCCEEDED: JobState.SUCCEEDED,
    AppState.FAILED: JobState.FAILED,
    AppState.CANCELLED: JobState.FAILED,
}

_logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """The scheduler will not have the job, and no job came to be."""


class Jobs(Protocol):
    """A scheduler that has at most one job of a name at a time."""

    @property
    def end_with_driver(self) -> bool:
        """Whether jobs end when the driver that submitted them does."""

    def submit(self, step: Step, name: str) -> None:
        """Have a job of that name; one that is there already will do.

        Raises:
            RefusedError: for good.
            Exception: whatever the scheduler raises: it is not known whether the job is there.
        """

    def state(self, step: Step, name: str) -> JobState:
        """How the job stands; raises what the scheduler raises."""

    def cancel(self, step: Step, name: str) -> None:
        """Ask for the job's end; it may be gone."""

    def handle(self, name: str) -> str:
        """TorchX's handle of the job, for ``torchx status`` and ``torchx log``."""

    def where(self, name: str) -> str:
        """How to find the job's logs."""

    def close(self) -> None:
        """Let go of the scheduler; local jobs of this driver end."""


def open_jobs(plan: Plan, scheduler: str, arguments: str, holder: str) -> "TorchxJobs":
    """The scheduler of a name, with its ``--scheduler_args``.

    Raises:
        ValueError: there is no such scheduler, or it refuses a job or an argument.
    """
    logging.getLogger("torchx").setLevel(logging.WARNING)  # it tells much of little use, with every rendering
    runner = get_runner()
    if scheduler not in (LOCAL, KUBERNETES):
        raise ValueError(
            f"--scheduler {scheduler}: choose from {LOCAL}, {KUBERNETES}; others name jobs themselves, so that "
            "a second submission would be a second job"
        )
    if scheduler == KUBERNETES and not is_remote(plan.run):
        raise ValueError(f"--run {plan.run}: pods cannot reach a folder of this machine; give s3://bucket/prefix")
    options = runner.scheduler_run_opts(scheduler)
    given = [pair.partition("=")[0] for pair in arguments.replace(";", ",").split(",") if "=" in pair]
    known = [name for name, _ in options]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"--scheduler_args: {scheduler} knows no {unknown[0]}; choose from {', '.join(known)}")
    config: dict[str, CfgVal] = dict(options.cfg_from_str(arguments))
    if scheduler != LOCAL:
        return TorchxJobs(plan, runner, scheduler, config)
    folder = config.get("log_dir") or (None if is_remote(plan.run) else join(plan.run, "driver", "logs"))
    if folder is not None:
        config["log_dir"] = join(str(folder), holder)  # TorchX refuses to write a log where one is
    return LocalJobs(plan, runner, scheduler, config)


class TorchxJobs:
    """Jobs of a cluster, which outlive the driver.

    Args:
        plan: of the run.
        runner: TorchX's.
        scheduler: its name.
        config: the scheduler's own arguments.
    """

    end_with_driver = False

    def __init__(self, plan: Plan, runner: Runner, scheduler: str, config: Mapping[str, CfgVal]) -> None:
        self._plan = plan
        self._runner = runner
        self._scheduler = scheduler
        self._config = dict(runner.scheduler_run_opts(scheduler).resolve(config))
        self._closed = False

    def check(self) -> None:
        """Render every job, as it would be submitted.

        Raises:
            ValueError: one cannot be.
        """
        for step in self._plan.steps:
            name = self._plan.job_name(step, 1)
            try:
                request = self._rendered(step, name).request
            except Exception as error:
                raise ValueError(f"{step.command}: {error}") from error
            found = request.app_id if self._scheduler == LOCAL else request.resource["metadata"]["name"]
            if found != name:
                raise ValueError(
                    f"{step.command}: the job would be called {found}, not {name}, and could not be found again; "
                    "install swav anew, so that TorchX finds its scheduler"
                )

    def submit(self, step: Step, name: str) -> None:
        """Submit it; "already exists" is as good."""
        try:
            rendered = self._rendered(step, name)
        except Exception as error:
            raise RefusedError(f"it cannot be rendered: {error}") from error
        try:
            self._runner.schedule(rendered)
        except ValueError as error:
            if "already exists" not in str(error):
                raise RefusedError(str(error)) from error
        except Exception as error:
            if getattr(error, "status", None) in _REFUSALS:
                raise RefusedError(_short(error)) from error
            raise

    def state(self, step: Step, name: str) -> JobState:
        """As TorchX has it; what it does not know counts as live."""
        del step
        try:
            status = self._runner.status(self.handle(name))
        except Exception as error:
            if getattr(error, "status", None) == _GONE:
                return JobState.ABSENT
            raise
        return JobState.ABSENT if status is None else _STATES.get(status.state, JobState.LIVE)

    def cancel(self, step: Step, name: str) -> None:
        """Ask for its end."""
        del step
        self._runner.cancel(self.handle(name))

    def handle(self, name: str) -> str:
        """Known before the job is submitted, as its name is."""
        namespace = self._config.get("namespace")
        app_id = name if namespace is None else f"{namespace}:{name}"
        handle: str = make_app_handle(self._scheduler, self._runner.name(), app_id)
        return handle

    def where(self, name: str) -> str:
        """The command that shows its logs."""
        return f"torchx log {self.handle(name)}"

    def settle(self, wait: Callable[[], bool]) -> None:
        """Let jobs whose steps are done come to their ends, where closing would cut these short."""

    def close(self) -> None:
        """Let go of the runner."""
        if not self._closed:
            self._closed = True
            self._runner.close()

    def _app(self, step: Step, name: str) -> AppDef:
        return app_of(step, name)

    def _rendered(self, step: Step, name: str) -> AppDryRunInfo[Any]:
        return self._runner.dryrun(self._app(step, name), self._scheduler, cfg=self._config)


class LocalJobs(TorchxJobs):
    """Jobs that are processes beside the driver and end with it.

    TorchX's local scheduler knows the processes that it started itself, and nothing of another driver's. So every
    process carries its job's name in its environment, and is found by that; and the kernel asks it to end when its
    driver dies. A driver that finds one waits for its end.
    """

    end_with_driver = True

    def __init__(self, plan: Plan, runner: Runner, scheduler: str, config: Mapping[str, CfgVal]) -> None:
        super().__init__(plan, runner, scheduler, config)
        self._started: dict[str, Step] = {}

    def submit(self, step: Step, name: str) -> None:
        """Start the processes, unless some of this step are there."""
        with locked(self._lock()):
            if list(_processes(self._mark(step))):
                return
            try:
                self._runner.schedule(self._rendered(step, name))
            except Exception as error:
                raise RefusedError(f"it could not be started: {error}") from error
            self._started[name] = step

    def state(self, step: Step, name: str) -> JobState:
        """By its processes, and by how they ended where this driver started them."""
        found = super().state(step, name)
        if found is JobState.ABSENT and list(_processes(self._mark(step, name))):
            return JobState.LIVE
        return found

    def cancel(self, step: Step, name: str) -> None:
        """End the processes of this driver's job; those of another driver's end with it."""
        if super().state(step, name) is not JobState.ABSENT:
            super().cancel(step, name)

    def handle(self, name: str) -> str:
        """Of use to this driver only."""
        handle: str = make_app_handle(self._scheduler, self._runner.name(), name)
        return handle

    def where(self, name: str) -> str:
        """The folder of its logs."""
        folder = self._config.get("log_dir")
        if folder is None:
            return "give --scheduler_args log_dir=FOLDER to keep its logs"
        return f"its logs are in {folder}/{self._runner.name()}/{name}"

    def settle(self, wait: Callable[[], bool]) -> None:
        """Wait for the processes of this driver's jobs, not for ever; ``wait`` returns True to stop waiting."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while any(super(LocalJobs, self).state(step, name) is JobState.LIVE for name, step in self._started.items()):
            if wait() or time.monotonic() > deadline:
                return

    def _rendered(self, step: Step, name: str) -> AppDryRunInfo[Any]:
        app = self._app(step, name)
        for role in app.roles:
            role.env[JOB] = self._mark(step, name)
        rendered = self._runner.dryrun(app, self._scheduler, cfg=self._config)
        tethered = [sys.executable, str(Path(tether.__file__)), str(os.getpid())]
        for replicas in rendered.request.role_params.values():
            for replica in replicas:
                replica.args = [*tethered, *replica.args]
        return rendered

    def _mark(self, step: Step, name: str | None = None) -> str:
        """Of a step, or of one job of it; what begins one mark is no other's."""
        return f"{self._plan.run}#{step.key}#" + ("" if name is None else f"{name}#")

    def _lock(self) -> Path:
        """Of all drivers of this run on this host."""
        if is_remote(self._plan.run):
            return cache_folder() / f"{run_name(self._plan.run)}.lock"
        return local_path(self._plan.run) / "driver" / ".submit.lock"


def _processes(mark: str) -> Iterator[int]:
    """Processes of this user whose job's mark begins so."""
    wanted = f"{JOB}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if any(variable.startswith(wanted) for variable in variables):
            yield int(folder.name)


def _short(error: Exception) -> str:
    """What an API server says, without headers."""
    body = getattr(error, "body", None)
    return str(body or getattr(error, "reason", None) or error)
