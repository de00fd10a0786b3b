"""The Kubernetes scheduler against an API server over HTTP that keeps jobs as the real one does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torchx.runner.api import Runner, get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories
from torchx.schedulers.api import Stream
from torchx.specs import AppState
from torchx.specs.finder import ComponentValidationException

from swav_components import jobs, schedulers

# Of the client of Kubernetes, in code of its own.
pytestmark = pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning")

ROOT = Path(__file__).parents[2]
PREFIX = "/apis/batch.volcano.sh/v1alpha1/namespaces/"


class ApiServer(BaseHTTPRequestHandler):
    """As much of an API server as is asked."""

    jobs: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {}
    logs: ClassVar[dict[str, str]] = {}
    queries: ClassVar[list[str]] = []

    def _answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status, "Conflict" if status == 409 else None)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _job(self) -> tuple[str, str]:
        namespace, _, rest = self.path.partition("?")[0].removeprefix(PREFIX).partition("/jobs")
        return namespace, rest.strip("/").removesuffix("/status")

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self._job()[0], job["metadata"]["name"])
        if key in self.jobs:
            self._answer(409, {"kind": "Status", "reason": "AlreadyExists", "details": {"name": key[1]}})
            return
        self.jobs[key] = job
        self._answer(201, job)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.queries.append(query)
        if path.endswith("/log"):
            pod = path.split("/")[-2]
            self._answer(200, self.logs[pod], "text/plain") if pod in self.logs else self._answer(404, {})
            return
        namespace, name = self._job()
        if not name:
            self._answer(200, {"items": [job for key, job in self.jobs.items() if key[0] == namespace]})
            return
        found = self.jobs.get((namespace, name))
        self._answer(404, {"kind": "Status", "code": 404}) if found is None else self._answer(200, found)

    def do_DELETE(self) -> None:
        self._answer(*((200, {}) if self.jobs.pop(self._job(), None) else (404, {"kind": "Status"})))

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ApiServer]]:
    for kept in (ApiServer.jobs, ApiServer.logs):
        kept.clear()
    ApiServer.queries.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), ApiServer) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{listener.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield ApiServer
        listener.shutdown()
        thread.join()


@pytest.fixture
def runner() -> Iterator[Runner]:
    with get_runner() as found:
        yield found


def submit(runner: Runner, name: str | None = None) -> str:
    app = jobs.pretrain(recipe="demo", name=name, j="1:3x2")
    return str(runner.run(app, "kubernetes", {"queue": "q"}))


def tell(server: type[ApiServer], phase: str, tasks: dict[str, dict[str, int]]) -> None:
    """Have the controller write a job's status."""
    (job,) = server.jobs.values()
    counted = {task: {"phase": phases} for task, phases in tasks.items()}
    job["status"] = {"state": {"phase": phase}, "taskStatusCount": counted}


def test_ours_is_the_one_under_its_name_and_the_others_stay() -> None:
    factories = get_scheduler_factories()
    assert set(DEFAULT_SCHEDULER_MODULES) <= set(factories)
    assert isinstance(factories["kubernetes"]("test"), schedulers.KubernetesScheduler)


def test_job_is_submitted_followed_and_cancelled(server: type[ApiServer], runner: Runner) -> None:
    handle = submit(runner)
    ((namespace, name),) = server.jobs
    assert handle == f"kubernetes://torchx/swav:{name}"
    assert namespace == "swav"
    pending = runner.status(handle)
    assert pending is not None
    assert pending.state is AppState.PENDING
    tell(server, "Running", {"pretrain-0": {"Running": 1}, "pretrain-1": {"Running": 1, "Pending": 1}})
    running = runner.status(handle)
    assert running is not None
    assert running.state is AppState.RUNNING
    (role,) = running.roles
    assert [(one.id, one.state) for one in role.replicas] == [
        (0, AppState.RUNNING),
        (1, AppState.RUNNING),
        (2, AppState.PENDING),
    ]
    runner.cancel(handle)
    assert server.jobs == {}


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        ("Completing", AppState.RUNNING),
        ("SomethingNew", AppState.RUNNING),
        ("Completed", AppState.SUCCEEDED),
        ("Terminated", AppState.FAILED),
        ("Failed", AppState.FAILED),
    ],
)
def test_every_phase_has_a_state(server: type[ApiServer], runner: Runner, phase: str, state: AppState) -> None:
    handle = submit(runner)
    tell(server, phase, {"pretrain-0": {"NotYetKnown": 1}})
    status = runner.status(handle)
    assert status is not None
    assert status.state is state
    assert [app.state for app in runner.list("kubernetes")] == [state]


def test_job_that_is_gone_is_no_error(server: type[ApiServer], runner: Runner) -> None:
    handle = submit(runner)
    server.jobs.clear()
    assert runner.status(handle) is None
    runner.cancel(handle)
    assert runner.list("kubernetes") == []


def test_command_line_says_that_a_job_is_gone(server: type[ApiServer], runner: Runner) -> None:
    handle = submit(runner)
    server.jobs.clear()
    torchx = str(Path(sys.executable).with_name("torchx"))
    status = subprocess.run([torchx, "status", handle], capture_output=True, text=True, check=False, env=os.environ)
    assert "does not exist" in status.stderr + status.stdout
    assert "Traceback" not in status.stderr


def test_second_submission_of_a_name_is_recognised(server: type[ApiServer], runner: Runner) -> None:
    first = submit(runner, "photos-1")
    (job,) = server.jobs.values()
    assert job["metadata"]["name"] == "photos-1"
    assert submit(runner, "photos-1") == first
    assert len(server.jobs) == 1


def test_job_of_another_name_is_refused_by_the_server_as_before(server: type[ApiServer], runner: Runner) -> None:
    dryrun = runner.dryrun(jobs.pretrain(recipe="demo"), "kubernetes", {"queue": "q"})
    runner.schedule(dryrun)
    with pytest.raises(ValueError, match="already exists"):
        runner.schedule(dryrun)


def test_logs_are_those_of_the_replicas_pod(server: type[ApiServer], runner: Runner) -> None:
    handle = submit(runner, "photos-1")
    server.logs.update({"photos-1-pretrain-0-0": "a\nb\n", "photos-1-pretrain-1-1": "c\n"})
    assert list(runner.log_lines(handle, "pretrain", 0, streams=Stream.COMBINED)) == ["a\n", "b\n"]
    assert list(runner.log_lines(handle, "pretrain", 0, regex="b")) == ["b\n"]
    scheduler = schedulers.create_scheduler("test")
    since = datetime.now() - timedelta(seconds=90)
    assert list(scheduler.log_iter("swav:photos-1", "pretrain", 2, since=since)) == ["c\n"]
    assert "sinceSeconds=90" in server.queries[-1] or "sinceSeconds=91" in server.queries[-1]
    assert list(scheduler.log_iter("swav:photos-1", "pretrain", 0, should_tail=True)) == ["a", "b"]
    with pytest.raises(RuntimeError, match="no pod photos-1-pretrain-1-0 in swav"):
        list(scheduler.log_iter("swav:photos-1", "pretrain", 1))


def test_without_a_cluster_a_dry_run_works_and_a_submission_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    scheduler = schedulers.create_scheduler("test")
    found = scheduler.submit_dryrun(jobs.pretrain(recipe="demo"), {})
    with pytest.raises(RuntimeError, match=r"no cluster is known here .* KUBECONFIG"):
        scheduler.schedule(found)


def test_other_peoples_roles_are_rendered_as_before() -> None:
    from torchx.components import utils

    app = utils.echo("hello", image="alpine:3")
    found = schedulers.create_scheduler("test").submit_dryrun(app, {"queue": "q"}).request
    assert "minSuccess" not in found.resource["spec"]
    assert found.resource["spec"]["tasks"][0]["template"].spec.security_context is None


def test_command_line_renders_from_the_repository_root() -> None:
    torchx = str(Path(sys.executable).with_name("torchx"))
    command = [torchx, "run", "--dryrun", "-s", "kubernetes", "swav.pretrain", "--recipe", "demo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    job = yaml.safe_load(result.stdout.partition("=== SCHEDULER REQUEST ===")[2])
    assert job["spec"]["minSuccess"] == 1
    refused = subprocess.run([*command, "--output", "runs/a"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "--output runs/a is a path of this machine" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_refusal_is_the_kind_that_torchx_prints() -> None:
    with pytest.raises(ComponentValidationException):
        schedulers.create_scheduler("test").submit_dryrun(jobs.pretrain(recipe="demo", output="runs/a"), {})
