"""Three hosts in network namespaces, of which one is cut off without a word and healed: who notices, and when."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from swav_testing.agents import Agents, agents
from swav_testing.runs import arguments, events, kill_tree

NUM_HOSTS = 3
CUT = 2  # not the one that hosts the rendezvous
_PORT = 29400
PACE_SECONDS = 0.2
SETTINGS = (
    "evaluate=null",
    "runtime.checkpoint_every_steps=5",
    "optim.epochs=10000",
)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str | None:
    """Why there can be no network namespaces here; None where there can."""
    name = f"swav-try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "exec", name, "ip", "link", "add", "bridge0", "type", "bridge")
    except (RuntimeError, OSError) as error:
        return f"no network namespaces: {error}"
    finally:
        with suppress(RuntimeError, OSError):
            _ip("netns", "del", name)
    return None


@dataclass
class Network:
    """Hosts 10.77.0.1, 10.77.0.2 ... at one switch, a namespace of its own: this host stays as it is."""

    name: str

    def host(self, number: int) -> str:
        """The namespace of a host."""
        return f"{self.name}-{number}"

    def in_host(self, number: int) -> tuple[str, ...]:
        """What a command line in a host starts with."""
        return ("ip", "netns", "exec", self.host(number))

    def cut(self, number: int) -> None:
        """Take a host's cable out of the switch; its own end stays up, and packets vanish."""
        _ip("-n", self.name, "link", "set", f"port{number}", "nomaster")

    def heal(self, number: int) -> None:
        """Put it in again."""
        _ip("-n", self.name, "link", "set", f"port{number}", "master", "bridge0")


def address(number: int) -> str:
    """Of a host."""
    return f"10.77.0.{number + 1}"


@contextmanager
def network(num_hosts: int, processes: Sequence[int] = ()) -> Iterator[Network]:
    """Hosts at a switch; removed at the end of the block.

    Args:
        num_hosts: each gets a namespace,
        processes: or is the namespace that one of these has, where they are given.
    """
    made = Network(f"swav{os.getpid()}")
    namespaces = [made.name, *(made.host(number) for number in range(num_hosts))]
    try:
        for namespace, process in zip_longest(namespaces, (None, *processes)):
            _ip("netns", *(("add", namespace) if process is None else ("attach", namespace, str(process))))
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", made.name, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", made.name, "link", "set", "bridge0", "up")
        for number in range(num_hosts):
            host, port = made.host(number), f"port{number}"
            _ip("-n", made.name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", made.name, "link", "set", port, "up")
            _ip("-n", host, "address", "add", f"{address(number)}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            made.heal(number)
        yield made
    finally:
        for namespace in namespaces:
            with suppress(RuntimeError):
                _ip("netns", "del", namespace)


@dataclass
class Hosts:
    """An agent on each host, started again when it ends, as Kubernetes would."""

    agents: Agents
    network: Network
    rendezvous: str
    agent_timeout_seconds: float
    running: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    logs: dict[int, list[int]] = field(default_factory=dict)

    def look(self) -> None:
        """Start what does not run."""
        for number in range(NUM_HOSTS):
            process = self.running.get(number)
            if process is not None and process.poll() is None:
                continue
            conf = f"--rdzv-conf={self.rendezvous},is_host={int(number == 0)}"
            patience = f"--agent-timeout-seconds={self.agent_timeout_seconds}"
            self.logs.setdefault(number, []).append(len(self.agents.started))
            self.running[number] = self.agents.start(
                prefix=self.network.in_host(number),
                options=(f"--rdzv-endpoint={address(0)}:{_PORT}", f"--local-addr={address(number)}", conf, patience),
            )

    def restarts(self, number: int) -> int:
        """How often a host's agents have found that their workers failed, or have ended themselves."""
        texts = [self.agents.log(log).read_text(errors="replace") for log in self.logs[number]]
        return sum(text.count("starting them again") for text in texts) + len(texts) - 1


@dataclass(frozen=True)
class Times:
    """Seconds since the cut, or since it was healed."""

    noticed: float  # since the cut: the other hosts' ranks have failed
    recovered: float  # since the cut: first step without the host
    host_noticed: float  # since the cut: its own agent has ended, or started its rank again
    joined: float  # since it was healed: first step with the host
    lost_steps: int  # taken by all three, and taken again by two


def measure(
    folder: Path, cache: Path, data: Path, *, timeout_seconds: float, rendezvous: str, deadline_seconds: float
) -> Times:
    """Cut a host off, wait until the others go on without it, heal it, and wait until it takes part again.

    Args:
        folder: for the run and what it prints.
        cache: of indexes.
        data: images to train on.
        timeout_seconds: ``runtime.collective_timeout_seconds``, and the agents' ``--agent-timeout-seconds``.
        rendezvous: ``--rdzv-conf``.
        deadline_seconds: for each of these.

    Raises:
        TimeoutError: one of these did not come; tells what the agents printed.
    """
    output, gate = folder / "run", folder / "gate"
    gate.mkdir(parents=True)
    environment = {
        "GATE": str(gate),
        "STEPS_PER_EPOCH": "5",
        "PACE_SECONDS": str(PACE_SECONDS),
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    timeout = f"runtime.collective_timeout_seconds={timeout_seconds}"
    words = ["-m", "swav_testing.gated", *arguments(data, output, *SETTINGS, timeout)]
    with (
        network(NUM_HOSTS) as net,
        agents(folder / "agents", cache, words, nodes=f"2:{NUM_HOSTS}", environment=environment) as started,
    ):
        hosts = Hosts(started, net, rendezvous, timeout_seconds)
        before = [0] * NUM_HOSTS
        noticed_at: dict[int, float] = {}

        def wait(condition: Callable[[], bool], what: str) -> float:
            since = time.monotonic()
            while not condition():
                hosts.look()
                for number in range(NUM_HOSTS):
                    if hosts.restarts(number) > before[number]:
                        noticed_at.setdefault(number, time.monotonic())
                if time.monotonic() - since > deadline_seconds:
                    raise TimeoutError(f"{what} not within {deadline_seconds} s: {started.printed()[-20_000:]}")
                time.sleep(0.1)
            return time.monotonic()

        wait(lambda: _has_stepped(output, NUM_HOSTS), "first steps of three hosts")
        before[:] = [hosts.restarts(number) for number in range(NUM_HOSTS)]
        noticed_at.clear()
        last = max(event["step"] for event in events(output))
        cut_at = time.monotonic()
        net.cut(CUT)
        recovered = wait(lambda: _has_stepped(output, NUM_HOSTS - 1), "steps of two hosts")
        resumed = [event["step"] for event in events(output) if event.get("event") == "start"][-1]
        wait(lambda: len(noticed_at) == NUM_HOSTS, "notice of the host itself")
        since_cut = {number: at - cut_at for number, at in noticed_at.items()}
        healed_at = time.monotonic()
        net.heal(CUT)
        joined = wait(lambda: _has_stepped(output, NUM_HOSTS), "steps of three hosts again")
        _stop(hosts)
    return Times(
        noticed=max(seconds for number, seconds in since_cut.items() if number != CUT),
        recovered=recovered - cut_at,
        host_noticed=since_cut[CUT],
        joined=joined - healed_at,
        lost_steps=last - resumed,
    )


def _has_stepped(output: Path, world: int) -> bool:
    """Whether the last start was of so many ranks, and a step has been taken since."""
    found = events(output)
    starts = [number for number, event in enumerate(found) if event.get("event") == "start"]
    if not starts or found[starts[-1]]["world_size"] != world:
        return False
    return any("loss" in event for event in found[starts[-1] :])


def _stop(hosts: Hosts) -> None:
    for process in hosts.running.values():
        process.send_signal(signal.SIGTERM)
    for process in hosts.running.values():
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)


def table(times: Times) -> str:
    """For people."""
    rows = [
        ("the other hosts notice: their ranks fail", times.noticed),
        ("the host itself notices: its agent ends", times.host_noticed),
        ("first step without the host", times.recovered),
        ("after it is healed: first step with it again", times.joined),
    ]
    lines = ["| | seconds |", "|---|---|", *(f"| {what} | {seconds:.0f} |" for what, seconds in rows)]
    return "\n".join([*lines, f"| steps taken again | {times.lost_steps} (no. of steps) |"])
