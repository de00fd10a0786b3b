"""Schedulers as the driver uses them: this machine's, and Kubernetes before an API server that answers over HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from swav_testing.runs import ROOT, environment
from swav_testing.s3 import S3Server, moto_server
from torchx import specs
from torchx.specs import AppState, AppStatus

from swav_components.driver import scheduler as driver_scheduler
from swav_components.driver.command import main
from swav_components.driver.plan import Plan, Step, make_plan, run_name
from swav_components.driver.reconcile import JobState
from swav_components.driver.scheduler import KUBERNETES, LOCAL, RefusedError, TorchxJobs, open_jobs

SECONDS = 120


def _wait_for(what: Callable[[], object], told: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)


# --- processes of this machine ---


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(str(tmp_path / "run"), "pretrain", "--recipe demo", assign=None, evaluations=[])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Has each job of any step run a script instead of its program."""

    def use(text: str) -> None:
        def app(step: Step, name: str) -> specs.AppDef:
            del step
            role = specs.Role("work", image="", entrypoint="bash", args=["-c", text], num_replicas=2)
            return specs.AppDef(name, roles=[role])

        monkeypatch.setattr(driver_scheduler, "app_of", app)

    return use


@pytest.fixture
def opened(plan: Plan) -> Iterator[Callable[[], TorchxJobs]]:
    made: list[TorchxJobs] = []

    def new() -> TorchxJobs:
        made.append(open_jobs(plan, LOCAL, "", f"holder-{len(made)}"))
        return made[-1]

    yield new
    for jobs in made:
        jobs.close()


def _state(jobs: TorchxJobs, plan: Plan, name: str) -> JobState:
    return jobs.state(plan.steps[0], name)


def _local_name(jobs: TorchxJobs) -> str:
    """TorchX's local scheduler makes a name of its own for roles that are not ours."""
    scheduler: Any = jobs._runner._scheduler(LOCAL)
    (name,) = scheduler._apps
    return str(name)


def test_drivers_of_one_machine_see_each_others_jobs_and_start_none_twice(
    plan: Plan, script: Callable[[str], None], opened: Callable[[], TorchxJobs], tmp_path: Path
) -> None:
    script(f"mktemp -p {tmp_path} started.XXXX; exec sleep 600")
    first, second = opened(), opened()
    assert second.end_with_driver
    first.submit(plan.steps[0], "a")
    assert _state(second, plan, "a") is JobState.LIVE
    assert _state(second, plan, "a-a2") is JobState.ABSENT
    second.submit(plan.steps[0], "a")
    second.submit(plan.steps[0], "a-a2")  # not even another attempt of the step
    second.cancel(plan.steps[0], "a")  # its processes are the first one's
    assert _state(second, plan, "a") is JobState.LIVE
    _wait_for(lambda: len(list(tmp_path.glob("started.*"))) == 2)
    first.close()
    assert _state(second, plan, "a") is JobState.ABSENT
    second.submit(plan.steps[0], "a-a2")
    _wait_for(lambda: len(list(tmp_path.glob("started.*"))) == 4)


@pytest.mark.parametrize(("status", "expected"), [(0, JobState.SUCCEEDED), (64, JobState.FAILED)])
def test_a_local_job_ends_as_its_processes_do(
    plan: Plan, script: Callable[[str], None], opened: Callable[[], TorchxJobs], status: int, expected: JobState
) -> None:
    script(f"exit {status}")
    jobs = opened()
    jobs.submit(plan.steps[0], "a")
    jobs.settle(lambda: False)
    name = _local_name(jobs)
    _wait_for(lambda: _state(jobs, plan, name) is not JobState.LIVE)
    assert _state(jobs, plan, name) is expected
    assert f"{plan.run}/driver/logs/holder-0/torchx/{name}" in jobs.where(name)


def test_a_scheduler_that_gives_another_name_is_refused(
    opened: Callable[[], TorchxJobs], script: Callable[[str], None]
) -> None:
    """Roles that are not ours get a name that TorchX makes up."""
    opened().check()
    script("true")
    with pytest.raises(ValueError, match="could not be found again"):
        opened().check()


def test_a_local_job_that_cannot_be_started_is_refused(
    plan: Plan, opened: Callable[[], TorchxJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = opened()
    monkeypatch.setattr(jobs, "_rendered", lambda *_: 1 / 0)
    with pytest.raises(RefusedError, match="could not be started"):
        jobs.submit(plan.steps[0], "a")


# --- TorchX's answers ---


class _ApiError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status, self.reason = status, f"reason {status}"


class _Runner:
    """Answers of TorchX's runner, as a test plans them."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def name(self) -> str:
        return "torchx"

    def scheduler_run_opts(self, _: str) -> specs.runopts:
        return specs.runopts()

    def dryrun(self, *_: Any, **__: Any) -> None:
        return None

    def schedule(self, _: Any) -> Any:
        return self.status("")

    def status(self, _: str) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _jobs(plan: Plan, answer: Any) -> TorchxJobs:
    runner: Any = _Runner(answer)
    return TorchxJobs(plan, runner, KUBERNETES, {})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, JobState.ABSENT),
        (_ApiError(404), JobState.ABSENT),
        (AppStatus(AppState.PENDING), JobState.LIVE),
        (AppStatus(AppState.RUNNING), JobState.LIVE),
        (AppStatus(AppState.UNKNOWN), JobState.LIVE),
        (AppStatus(AppState.SUCCEEDED), JobState.SUCCEEDED),
        (AppStatus(AppState.FAILED), JobState.FAILED),
        (AppStatus(AppState.CANCELLED), JobState.FAILED),
    ],
)
def test_states(plan: Plan, answer: object, expected: JobState) -> None:
    assert _state(_jobs(plan, answer), plan, "a") is expected


def test_an_api_server_that_does_not_answer_is_not_a_missing_job(plan: Plan) -> None:
    with pytest.raises(_ApiError):
        _state(_jobs(plan, _ApiError(503)), plan, "a")


@pytest.mark.parametrize("answer", ["handle", ValueError("Job `a` already exists. Try again")])
def test_submitted_and_already_there_are_the_same(plan: Plan, answer: object) -> None:
    _jobs(plan, answer).submit(plan.steps[0], "a")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_ApiError(403), RefusedError),
        (_ApiError(422), RefusedError),
        (ValueError("no"), RefusedError),
        (_ApiError(500), _ApiError),
        (TimeoutError(), TimeoutError),
    ],
)
def test_refusals_are_told_from_what_may_have_come_through(
    plan: Plan, error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        _jobs(plan, error).submit(plan.steps[0], "a")


def test_kubernetes_needs_a_folder_that_pods_reach(plan: Plan) -> None:
    with pytest.raises(ValueError, match="pods cannot reach"):
        open_jobs(plan, KUBERNETES, "", "holder")


# --- a cluster ---


class _Cluster:
    """An API server that keeps jobs, and can wait before it answers, and then not answer."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}  # phase by name
        self.made: list[str] = []
        self.deleted: list[str] = []
        self.before_answer: Callable[[], object] | None = None
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = job["metadata"]["name"]
                if name in cluster.jobs:
                    self._answer(409, {"reason": "AlreadyExists", "details": {"name": name}})
                    return
                cluster.made.append(name)
                cluster.jobs[name] = "Running"
                if cluster.before_answer is not None:
                    cluster.before_answer()
                    cluster.before_answer = None
                    return
                self._answer(201, job)

            def do_GET(self) -> None:
                name = self.path.partition("/jobs/")[2].partition("/")[0]
                if name not in cluster.jobs:
                    self._answer(404, {"reason": "NotFound"})
                    return
                self._answer(200, {"metadata": {"name": name}, "status": {"state": {"phase": cluster.jobs[name]}}})

            def do_DELETE(self) -> None:
                cluster.deleted.append(self.path)
                self._answer(200, {})

            def _answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status, "Conflict" if status == 409 else None)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kubeconfig(self, path: Path) -> Path:
        """A file by which clients find it."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {"token": "none"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "swav"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path


@pytest.fixture
def cluster() -> Iterator[_Cluster]:
    made = _Cluster()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


class _Drivers:
    """Drivers of one run on the cluster, each a process with a log."""

    def __init__(self, run: str, variables: dict[str, str], folder: Path) -> None:
        self.words = ["--run", run, "--scheduler", "kubernetes", "--poll-seconds", "0.3", "--lease-seconds", "5"]
        self.words += ["--pretrain", "--recipe demo --data s3://driven/data -j 2x8"]
        self.words += ["--evaluate", "knn --train s3://driven/data", "--evaluate", "knn --train s3://driven/data -k 20"]
        self._variables = environment(folder / "cache") | variables
        self._variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "components"), self._variables["PYTHONPATH"]])
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> "subprocess.Popen[bytes]":
        with (self._folder / f"driver-{len(self._processes)}.log").open("wb") as log:
            command = [sys.executable, "-m", "swav_components.driver", *self.words]
            process = subprocess.Popen(command, env=self._variables, stdout=log, stderr=log, cwd=self._folder)
        self._processes.append(process)
        return process

    def told(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self._folder.glob("driver-*.log")))

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def drivers(cluster: _Cluster, store: S3Server, tmp_path: Path) -> Iterator[_Drivers]:
    variables = {"KUBECONFIG": str(cluster.kubeconfig(tmp_path / "kubeconfig")), **store.env}
    found = _Drivers(store.make_bucket("driven") + "/runs/photos", variables, tmp_path)
    yield found
    found.end()


@pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning")  # of the client of Kubernetes
def test_a_run_on_a_cluster_outlives_its_drivers(
    cluster: _Cluster,
    store: S3Server,
    drivers: _Drivers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, told = run_name("s3://driven/runs/photos"), drivers.told

    def has_lease(process: "subprocess.Popen[bytes]") -> bool:
        return f"-{process.pid}-" in json.loads(store.get("driven", "runs/photos/driver/lease.json"))["holder"]

    # The first driver dies when the API server has its job, before it hears of it.
    is_killed = threading.Event()
    cluster.before_answer = is_killed.wait
    first = drivers.start()
    _wait_for(lambda: cluster.made, told)
    first.kill()
    first.wait()
    is_killed.set()
    # Two take over; the job is found by its name, though its phase is one that TorchX does not know.
    cluster.jobs[f"{name}-pretrain"] = "Completing"
    second, third = drivers.start(), drivers.start()
    _wait_for(lambda: "pretrain: running" in told() and (has_lease(second) or has_lease(third)), told)
    assert cluster.made == [f"{name}-pretrain"]
    # It is done, and removed, as a cluster does after a while.
    store.put("driven", "runs/photos/result.json", b"{}")
    del cluster.jobs[f"{name}-pretrain"]
    _wait_for(lambda: len(cluster.made) == 3, told)
    # An evaluation vanishes without a result.
    del cluster.jobs[f"{name}-knn-1"]
    _wait_for(lambda: len(cluster.made) == 4, told)
    # The holder is asked to stop: its jobs go on, and the other driver has the lease.
    stopped, other = (second, third) if has_lease(second) else (third, second)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(SECONDS) == 75, told()
    _wait_for(lambda: has_lease(other), told)
    for number in (1, 2):
        store.put("driven", f"runs/photos/evaluations/knn-{number}.json", b"{}")
    assert other.wait(SECONDS) == 0, told()
    assert cluster.made == [f"{name}-{job}" for job in ("pretrain", "knn-1", "knn-2", "knn-1-a2")]
    assert cluster.deleted == []
    for variable, value in {"KUBECONFIG": str(tmp_path / "kubeconfig"), **store.env}.items():
        monkeypatch.setenv(variable, value)
    assert main([*drivers.words[:4], "--status"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("knn-1"))
    assert row.split()[1] == "done"
    assert f"kubernetes://torchx/swav:{name}-knn-1-a2" in row
