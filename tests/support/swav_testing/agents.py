"""Launchers as processes of their own: several on one host stand for several nodes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from swav_testing.runs import DEADLINE_SECONDS, ROOT, children, environment, kill_tree

# Short, as nodes here are near one another; a lost one is given up after 3 x 1 s.
RENDEZVOUS = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=3"


def free_port() -> int:
    """A port that nobody listens on, now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Agents:
    """The agents of one run, and what they say."""

    folder: Path  # for what they print
    cache: Path
    words: list[str]  # what torchrun starts in each process
    nodes: str = "1"
    ranks_per_node: int = 1
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    def start(self, prefix: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """Start one more.

        Args:
            prefix: of the command line.
            options: of this one alone.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        meeting = ["--standalone"]
        if self.nodes != "1":
            endpoint = f"--rdzv-endpoint=localhost:{self.port}"
            meeting = ["--rdzv-backend=c10d", endpoint, "--rdzv-id=test", f"--rdzv-conf={RENDEZVOUS}"]
        shape = [f"--nnodes={self.nodes}", f"--nproc-per-node={self.ranks_per_node}"]
        with self.log(len(self.started)).open("wb") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "swav.elastic", *shape, *meeting, *self.options, *options, *self.words],
                cwd=ROOT,
                env=environment(self.cache) | self.environment,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def is_met(self) -> bool:
        """Whether one of them hosts the meeting of all by now."""
        tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()[1:]]
        return any(line[1].endswith(f":{self.port:04X}") and line[3] == "0A" for line in lines)  # 0A: listens

    def log(self, number: int) -> Path:
        """What an agent and its workers print."""
        return self.folder / f"agent-{number}.log"

    def printed(self) -> str:
        """What all have printed."""
        return "\n".join(self.log(number).read_text(errors="replace") for number in range(len(self.started)))

    def statuses(self) -> list[int]:
        """Wait for all; their exit statuses."""
        return [process.wait(DEADLINE_SECONDS) for process in self.started]


@contextmanager
def agents(folder: Path, cache: Path, words: list[str], **settings: object) -> Iterator[Agents]:
    """Agents of a run; none of their processes outlives the block."""
    started = Agents(folder, cache, words, **settings)  # type: ignore[arg-type]
    try:
        yield started
    finally:
        for process in started.started:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()


def kill_agent(process: "subprocess.Popen[bytes]") -> None:
    """Kill a node: its agent and its ranks at once, as far as the kernel lets us."""
    ranks = children(process.pid)
    process.send_signal(signal.SIGKILL)
    for rank in ranks:
        try:
            os.kill(rank, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
