"""A rendered job's pods as containers on a network of their own, with an S3 server beside them.

As in a cluster, a pod's network and name outlive its container: one that does nothing holds them, and the job's
container joins it. The network is that of :mod:`swav_testing.partition`, whose hosts are these.
"""

import json
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from swav_testing.containers import LOCKED_DOWN, Engine
from swav_testing.gated import allow, records
from swav_testing.partition import Network, address, network
from swav_testing.runs import STEPS_PER_EPOCH

from swav.program import EXIT_REFUSED

SUPPORT = Path(__file__).parents[1]
_ALL = 10**9  # steps
_PACE_SECONDS, _RARE_SECONDS = 0.2, 3.0
_STORE = 0  # of the network's hosts; the pods are the next ones
_STORE_PORT = 9000
_BUCKET = "images"
STORAGE = {
    "AWS_ENDPOINT_URL": f"http://store:{_STORE_PORT}",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
DATA, OUTPUT = f"s3://{_BUCKET}/data", f"s3://{_BUCKET}/run"
_SERVE = f"""
import threading
from moto.server import ThreadedMotoServer
ThreadedMotoServer("0.0.0.0", {_STORE_PORT}, verbose=False).start()
threading.Event().wait()
"""
_FILL = f"""
import boto3, pathlib, socket, time
from swav.storage import write_atomic
deadline = time.monotonic() + 120
while True:
    try:
        socket.create_connection(("store", {_STORE_PORT})).close()
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
boto3.client("s3").create_bucket(Bucket="{_BUCKET}")
for path in sorted(pathlib.Path("/scenes").iterdir()):
    write_atomic("{DATA}/" + path.name, path.read_bytes())
"""
_READ = f'import sys; from swav.storage import read; sys.stdout.write(read("{OUTPUT}/metrics.jsonl").decode())'


def render(found: Engine, launcher: str, *words: str) -> dict[str, Any]:
    """The Volcano job that TorchX in the launcher's image would submit.

    Args:
        found: engine.
        launcher: image.
        words: of ``torchx run --dryrun -s kubernetes``.
    """
    command = ("torchx", "run", "--dryrun", "-s", "kubernetes", *words)
    done = found.call("run", "--rm", *LOCKED_DOWN, "--network", "none", launcher, *command)
    _, _, request = done.stdout.partition("=== SCHEDULER REQUEST ===")
    job: dict[str, Any] = yaml.safe_load(request)
    return job


@dataclass
class Pod:
    """One of a job's pods."""

    engine: Engine
    holder: str  # container that has its network
    name: str
    image: str
    command: list[str]
    options: list[str]
    lives: list[str] = field(default_factory=list)  # containers that ran its command

    def start(self) -> None:
        """Start its command in a fresh container."""
        name = f"{self.holder}-{len(self.lives)}"
        joined = f"container:{self.holder}"
        self.engine.call(
            "run", "--detach", "--name", name, "--network", joined, *self.options, self.image, *self.command
        )
        self.lives.append(name)

    def kill(self) -> None:
        """End it without a word."""
        self.engine.call("kill", "--signal", "KILL", self.lives[-1])

    def status(self) -> int | None:
        """Exit status of its last container; None while that runs."""
        text = self.engine.call("inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", self.lives[-1]).stdout
        running, status = text.split()
        return None if running == "true" else int(status)

    def printed(self) -> str:
        """What all its containers have printed."""
        parts = [self.engine.call("logs", name) for name in self.lives]
        return "\n".join(part.stdout + part.stderr for part in parts)

    def notices(self) -> int:
        """How often its agents have found that ranks failed, or have ended themselves."""
        return self.printed().count("starting them again") + len(self.lives)


def _variables(pod: dict[str, Any], container: dict[str, Any], name: str) -> dict[str, str]:
    """The environment of a container, as a cluster would fill it in."""
    fields = {"metadata.name": name, "spec.nodeName": f"node-of-{name}", "metadata.namespace": "swav"}
    fields |= {f"metadata.labels['{key}']": value for key, value in pod["metadata"].get("labels", {}).items()}
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        assert {*source} & {"configMapRef", "secretRef"}
        variables |= STORAGE
    for entry in container.get("env", []):
        given = "value" in entry
        variables[entry["name"]] = entry["value"] if given else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    return variables


def _mounts(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    kinds = {volume["name"]: {*volume} - {"name"} for volume in pod["spec"].get("volumes", [])}
    options = []
    for mount in container.get("volumeMounts", []):
        assert kinds[mount["name"]] == {"emptyDir"}, mount
        options += ["--tmpfs", f"{mount['mountPath']}:size=1g"]
    return options


@dataclass
class Cluster:
    """The pods of one job, an S3 server, and what the ranks have noted."""

    engine: Engine
    network: Network
    pods: list[Pod]
    gate: Path  # see swav_testing.gated
    client: list[str]  # arguments of `docker run` for a container that reaches the store, its image included
    allowed_at: float = 0.0

    def wait(self, condition: Callable[[], bool], what: str, num_ranks: int, deadline_seconds: float) -> float:
        """Let the run take a step now and then until the condition holds.

        Args:
            condition: waited for.
            what: it is, for the message.
            num_ranks: that are to step; others do so rarely, as the run must not end before they come.
            deadline_seconds: for all this.

        Returns:
            The time, of :func:`time.time`.

        Raises:
            TimeoutError: it did not come to hold; says what the pods printed.
        """
        since = time.time()
        while not condition():
            now = time.time()
            if now - since > deadline_seconds:
                printed = "\n\n".join(f"{pod.name}: {pod.printed()[-10_000:]}" for pod in self.pods)
                raise TimeoutError(f"{what} not within {deadline_seconds} s: {printed}")
            noted = records(self.gate)
            last = max(noted, key=lambda record: record["at"], default={"world": num_ranks})
            if now - self.allowed_at > (_PACE_SECONDS if last["world"] == num_ranks else _RARE_SECONDS):
                allow(self.gate, 1 + max(map(_step, noted), default=0))
                self.allowed_at = now
            time.sleep(0.05)
        return time.time()

    def steps_in(self, num_ranks: int, since: float) -> bool:
        """Whether the last ranks to note something since are so many, and have got beyond a first step."""
        found = [record for record in records(self.gate) if record["at"] > since * 1e9]
        last = max(found, key=lambda record: record["at"], default=None)
        if last is None or last["world"] != num_ranks:
            return False
        return len({_step(record) for record in found if record["life"] == last["life"]}) > 1

    def replace_ended(self) -> None:
        """Do what the job's policies say of a pod that failed, unless its command was refused."""
        for pod in self.pods:
            status = pod.status()
            assert status != EXIT_REFUSED, pod.printed()
            if status:
                pod.start()

    def metrics(self) -> list[dict[str, Any]]:
        """The run's metrics.jsonl, out of its bucket."""
        text = self.engine.call("run", "--rm", *self.client, "python", "-c", _READ).stdout
        return [json.loads(line) for line in text.splitlines()]


def _step(record: dict[str, Any]) -> int:
    step: int = record["epoch"] * STEPS_PER_EPOCH + record["step"] + 1
    return step


@contextmanager
def cluster(
    found: Engine, image: str, job: dict[str, Any], scenes: Path, gate: Path, variables: dict[str, str]
) -> Iterator[Cluster]:
    """What a job needs, and its pods, which are not started yet.

    Args:
        found: engine.
        image: of the pods.
        job: as :func:`render` gives it.
        scenes: shards for the bucket ``DATA``.
        gate: folder for what the ranks note, which any user may write to.
        variables: of the environment, besides those of the job.
    """
    prefix, name = gate.name, job["metadata"]["name"]
    tasks = job["spec"]["tasks"]
    hosts = [f"{name}-{task['name']}-0" for task in tasks]
    names = ["--add-host", f"store:{address(_STORE)}"]
    for number, host in enumerate(hosts, 1):
        for alias in (f"{host}.{name}.swav.svc.cluster.local", f"{host}.{name}", host):
            names += ["--add-host", f"{alias}:{address(number)}"]
    holders = [f"{prefix}-{number}" for number in range(len(hosts) + 1)]
    meeting = {
        f"VC_{task['name'].upper().replace('-', '_')}_HOSTS": f"{host}.{name}"
        for task, host in zip(tasks, hosts, strict=True)
    }
    pods = []
    try:
        for holder, host in zip(holders, ["store", *hosts], strict=True):
            alone = ["--network", "none", "--hostname", host, *names]
            found.call("run", "--detach", "--name", holder, *alone, *LOCKED_DOWN, image, "sleep", "infinity")
        for holder, host, task in zip(holders[1:], hosts, tasks, strict=True):
            pod = task["template"]
            [container] = pod["spec"]["containers"]
            given = _variables(pod, container, host) | meeting | {"VC_TASK_INDEX": "0"} | variables
            options = [*LOCKED_DOWN, *_mounts(pod, container), "--volume", f"{gate}:/gate"]
            options += ["--volume", f"{SUPPORT}:/support:ro", "--env", "PYTHONPATH=/support/container:/support"]
            options += [word for key, value in given.items() for word in ("--env", f"{key}={value}")]
            command = [_expanded(word, given) for word in [*container["command"], *container.get("args", [])]]
            pods.append(Pod(found, holder, host, image, command, options))
        joined = ["--network", f"container:{holders[_STORE]}", *LOCKED_DOWN]
        client = [*joined, *(word for key, value in STORAGE.items() for word in ("--env", f"{key}={value}"))]
        packages = ["--volume", f"{sysconfig.get_path('purelib')}:/packages:ro", "--env", "PYTHONPATH=/packages"]
        with network(len(holders), [_process(found, holder) for holder in holders]) as net:
            holders.append(f"{prefix}-serve")
            found.call("run", "--detach", "--name", holders[-1], *joined, *packages, image, "python", "-c", _SERVE)
            found.call("run", "--rm", *client, "--volume", f"{scenes}:/scenes:ro", image, "python", "-c", _FILL)
            yield Cluster(found, net, pods, gate, [*client, image])
    finally:
        containers = [life for pod in pods for life in pod.lives] + holders[::-1]
        found.call("rm", "--force", *containers, check=False)


def _process(found: Engine, container: str) -> int:
    return int(found.call("inspect", "--format", "{{.State.Pid}}", container).stdout)


def _expanded(word: str, variables: dict[str, str]) -> str:
    """A word of a command as Kubernetes starts it."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda match: variables.get(match[1], match[0]), word)


@dataclass(frozen=True)
class Times:
    """Seconds."""

    kill_noticed: float  # since a pod was killed: the other's ranks have failed
    kill_recovered: float  # since then: a step without it
    joined: float  # since the pod was started again: a step with it
    cut_noticed: float  # since a pod was cut off: the other's ranks have failed
    cut_recovered: float  # since then: a step without it
    healed: float  # since its cable passes packets again: a step with it


def disturb(made: Cluster, deadline_seconds: float) -> Times:
    """Run a job of two pods to its end; on the way kill one, let it join again, cut it off and heal it.

    Args:
        made: with pods that are not started.
        deadline_seconds: for each of these.

    Raises:
        TimeoutError: one of these did not come.
    """
    first, second = made.pods

    def wait(condition: Callable[[], bool], what: str, num_ranks: int) -> float:
        return made.wait(condition, what, num_ranks, deadline_seconds)

    def together(since: float) -> bool:
        made.replace_ended()
        return made.steps_in(2, since)

    begun = time.time()
    for pod in made.pods:
        pod.start()
    wait(lambda: together(begun), "first steps of two pods", 2)

    before, killed_at = first.notices(), time.time()
    second.kill()
    noticed = wait(lambda: first.notices() > before, "notice of a killed pod", 2)
    recovered = wait(lambda: made.steps_in(1, noticed), "steps without a killed pod", 1)
    kill_noticed, kill_recovered = noticed - killed_at, recovered - killed_at

    started_at = time.time()
    second.start()
    joined = wait(lambda: together(started_at), "steps with a pod that joins", 2) - started_at

    before, cut_at = first.notices(), time.time()
    made.network.cut(2)
    noticed = wait(lambda: first.notices() > before, "notice of a pod that is cut off", 2)
    recovered = wait(lambda: made.steps_in(1, noticed), "steps without a pod that is cut off", 1)

    healed_at = time.time()
    made.network.heal(2)
    healed = wait(lambda: together(healed_at), "steps with a pod that is healed", 2) - healed_at

    allow(made.gate, _ALL)
    made.allowed_at = float("inf")
    wait(lambda: all(pod.status() == 0 for pod in made.pods), "the end of both pods with 0", 2)
    return Times(kill_noticed, kill_recovered, joined, noticed - cut_at, recovered - cut_at, healed)


def table(times: Times) -> str:
    """For people."""
    rows = [
        ("a pod is killed: the other's rank fails", times.kill_noticed),
        ("a pod is killed: first step without it", times.kill_recovered),
        ("the pod is started again: first step with it", times.joined),
        ("a pod is cut off: the other's rank fails", times.cut_noticed),
        ("a pod is cut off: first step without it", times.cut_recovered),
        ("its network is back: first step with it", times.healed),
    ]
    return "\n".join(["| | seconds |", "|---|---|", *(f"| {what} | {seconds:.1f} |" for what, seconds in rows)])
