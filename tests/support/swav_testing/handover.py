"""Tiny runs of DeepCluster-v2 and SeLa-v2: trainer and assigner as processes that die at planned moments.

A moment has a name: ``write bank/000001/manifest.json`` before a file of the run appears and ``written ...`` after it,
``remove ...``, or ``progress FUNCTION`` where a loop says that it goes on. A launcher may start either program as
``python -m swav_testing.handover``.
"""

import fnmatch
import json
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from swav_testing.ranks import _CONTEXT
from swav_testing.runs import DEADLINE_SECONDS, STEPS_PER_EPOCH, TINY, RecordingLoader

import swav.train
from swav import assign, checkpoint, clustering, labelling, pretrain, storage, watchdog
from swav.config import PretrainConfig
from swav.distributed import rank
from swav.program import Stopped
from swav.recipes import configure

METHODS: dict[str, dict[str, Any]] = {
    "deepclusterv2": {"kind": "deepclusterv2", "num_prototypes": 8, "num_sets": 3},
    "selav2": {"kind": "selav2", "num_prototypes": 8, "num_sets": 3, "epsilon": 0.03, "tolerance": 0.002},
}
EPOCHS = 5  # more than an assigner keeps labels of
PROGRAMS = {"trainer": pretrain.main, "assigner": assign.main}
MODULES = (assign, clustering, labelling, swav.train)

_PLAN, _PLAN_VARIABLE, _OUTPUT_VARIABLE = "plan.json", "DEATHS", "DEATHS_OUTPUT"


def settings(kind: str, *overrides: str, **of_method: object) -> list[str]:
    """The overrides that make the demo a tiny run of a method."""
    rest = [setting for setting in TINY if not setting.startswith("method.")]
    method = "method=" + json.dumps(METHODS[kind] | of_method)
    return [method, *rest, f"optim.epochs={EPOCHS}", "evaluate=null", *overrides]


def config(data: str, overrides: list[str]) -> PretrainConfig:
    """The tiny run."""
    return configure("demo", data=data, overrides=overrides)


@dataclass(frozen=True)
class Death:
    """A process kills itself when it comes to the n-th moment with a name."""

    pattern: str
    number: int = 1
    rank: int = 0


def plan(folder: Path, deaths: list[Death]) -> Path:
    """Write down deaths, one for each life of a program in this order."""
    folder.mkdir(parents=True)
    (folder / _PLAN).write_text(json.dumps([asdict(death) for death in deaths]))
    return folder


def died(folder: Path) -> list[str]:
    """The moments at which a program has died."""
    return [path.read_text() for path in sorted(folder.glob("died-*"))]


@dataclass
class Fate:
    """Counts the moments of this process until it is due."""

    folder: Path
    output: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        deaths = [Death(**death) for death in json.loads((self.folder / _PLAN).read_text())]
        self._number = len(died(self.folder))
        due = deaths[self._number : self._number + 1]
        self._death = due[0] if due and due[0].rank == int(os.environ.get("RANK", "0")) else None
        self._seen = 0

    def moment(self, name: str) -> None:
        """Pass a moment, or do not survive it."""
        if self._death is None or not fnmatch.fnmatchcase(name, self._death.pattern):
            return
        with self.lock:
            self._seen += 1
            if self._seen == self._death.number:
                (self.folder / f"died-{self._number:03d}").write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)

    def lie_in_wait(self) -> None:
        """Have moments noticed wherever they are."""
        write, remove, progress = storage.write_atomic, storage.remove, watchdog.progress

        def noticed_write(url: storage.Location, data: bytes | memoryview) -> None:
            self.moment(f"write {self._name(url)}")
            write(url, data)
            self.moment(f"written {self._name(url)}")

        def noticed_remove(url: storage.Location) -> None:
            self.moment(f"remove {self._name(url)}")
            remove(url)

        def noticed_progress(step: int | None = None) -> None:
            self.moment(f"progress {sys._getframe(1).f_code.co_name}")
            progress(step)

        vars(storage).update(write_atomic=noticed_write, remove=noticed_remove)
        vars(checkpoint)["write_atomic"] = noticed_write
        for module in MODULES:
            vars(module)["progress"] = noticed_progress

    def _name(self, url: storage.Location) -> str:
        return storage.absolute(url).removeprefix(storage.absolute(self.output)).lstrip("/")


def ask_often() -> None:
    """Wait less between two looks at the run's folder."""
    for module in (assign, labelling):
        vars(module).update(_POLL_SECONDS=0.05, _REMOTE_POLL_SECONDS=0.05)


def main(words: list[str]) -> int:
    """Run the program that the first word names; returns its exit status."""
    torch.set_num_threads(1)
    ask_often()
    if _PLAN_VARIABLE in os.environ:
        Fate(Path(os.environ[_PLAN_VARIABLE]), os.environ[_OUTPUT_VARIABLE]).lie_in_wait()
    program, *rest = words
    return PROGRAMS[program](rest)


def _main(words: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ |= environment
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(words))


@dataclass
class HandOver:
    """The two programs on one run."""

    data: Path
    output: str
    cache: Path
    overrides: list[str]
    logs: Path
    assigner_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    deaths: dict[str, Path] = field(default_factory=dict)
    started: list[multiprocessing.process.BaseProcess] = field(default_factory=list)

    def words(self, program: str) -> list[str]:
        """The command line of a program, the same in each of its lives."""
        if program == "assigner":
            return [program, "--output", self.output, *self.assigner_options]
        return [program, "--recipe", "demo", "--data", str(self.data), "--output", self.output, *self.overrides]

    def variables(self, program: str) -> dict[str, str]:
        """What a program's environment has beside this process's."""
        variables = {**self.environment, "SWAV_CACHE": str(self.cache)}
        if program in self.deaths:
            variables |= {_PLAN_VARIABLE: str(self.deaths[program]), _OUTPUT_VARIABLE: self.output}
        return variables

    def start(self, program: str, *options: str) -> multiprocessing.process.BaseProcess:
        """Start a program in a process of its own."""
        arguments = (self.words(program) + list(options), self.variables(program), self.log(program))
        process = _CONTEXT.Process(target=_main, args=arguments)
        process.start()
        self.started.append(process)
        return process

    def log(self, program: str) -> Path:
        """What all lives of a program print."""
        return self.logs / f"{program}.log"

    def printed(self, program: str) -> str:
        """What a program has printed."""
        path = self.log(program)
        return path.read_text(errors="replace") if path.exists() else ""

    def finish(self, *programs: multiprocessing.process.BaseProcess) -> list[int | None]:
        """Wait for programs; their exit statuses, None where the time is up."""
        for process in programs:
            process.join(DEADLINE_SECONDS)
        return [process.exitcode for process in programs]

    def carry_to_the_end(self) -> None:
        """Run both beside each other and start again what is killed, by the same command."""
        running = {program: self.start(program) for program in PROGRAMS}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while running:
            assert time.monotonic() < deadline, self.printed("trainer") + self.printed("assigner")
            for program, process in list(running.items()):
                if process.is_alive():
                    continue
                if process.exitcode == -signal.SIGKILL:
                    running[program] = self.start(program)
                    continue
                assert process.exitcode == 0, self.printed(program)
                del running[program]
            time.sleep(0.02)


@contextmanager
def hand_over(
    folder: Path, data: Path, cache: Path, overrides: list[str], *, output: str | None = None, **others: Any
) -> Iterator[HandOver]:
    """A run in ``folder/run``, or elsewhere; none of its processes outlives the block."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = HandOver(data, output or str(folder / "run"), cache, overrides, folder, **others)
    try:
        yield whole
    finally:
        for process in whole.started:
            process.kill()
            process.join()


def train_rank(data: str, output: str, cache: str, overrides: list[str], stop_before: int | None) -> int:
    """One rank's part of a trainer, which rank 0 asks to stop before a step where one is given; the exit status."""
    os.environ["SWAV_CACHE"] = cache
    ask_often()
    RecordingLoader.delivered = []
    RecordingLoader.stop_before = stop_before if rank() == 0 else None
    vars(swav.train)["Loader"] = RecordingLoader
    try:
        pretrain.pretrain(config(data, overrides), output)
    except Stopped:
        return 75
    return 0


def assign_rank(output: str, cache: str) -> None:
    """One worker's part of an assigner."""
    os.environ["SWAV_CACHE"] = cache
    ask_often()
    assign.serve(output, torch.device("cpu"), data=None, epoch=None, seconds=5.0, keep=True)


def step_of(epoch: int, step: int) -> int:
    """The number, from 1, of a step of an epoch."""
    return epoch * STEPS_PER_EPOCH + step + 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
