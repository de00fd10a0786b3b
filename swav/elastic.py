"""torchrun whose exit status says whether another try can help: ``python -m swav.elastic TORCHRUN_ARGUMENTS``.

It is torch's own launcher and agent with a few decisions of ours, made where the agent looks at its workers:

- A worker that refuses the command ends every node's agent, with status 64; torchrun would restart it for hours.
- A failure is followed by a restart only while the run gets further: after some without, all agents end with status 1.
- An agent that leaves because of the world around it leaves the rendezvous open, so that the others may go on.

Exit status: 0 done, 64 refused (do not try again), 75 stopped on request (state saved), 1 anything else (try again).
"""

import argparse
import faulthandler
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as launcher

from swav.life import Life
from swav.logs import start_logging
from swav.program import (
    EXIT_FAILED,
    EXIT_FUTILE,
    EXIT_REFUSED,
    EXIT_STOPPED,
    LAUNCHER_FOLDER,
    LAUNCHER_PID,
    SAID,
    USAGE_ERROR,
    status_of,
)
from swav.telemetry import forget_ranks, launcher_endpoint
from swav.watchdog import last_step

# Each loss of a peer costs every surviving node one restart; a long run on preemptible nodes sees many.
MAX_RESTARTS = 1000
MAX_FUTILE_RESTARTS = 3
# The agents' store answers at once or never: torch sets most of its calls no deadline, and TCP tries for 15 minutes.
AGENT_TIMEOUT_SECONDS = 120.0
# Minutes for the first nodes to come; a lost node is given up after 3 x 5 s; what is there then waits 15 s for more.
RENDEZVOUS_SETTINGS = "join_timeout=1800,last_call_timeout=15,keep_alive_interval=5,keep_alive_max_attempt=3"

_VERDICT, _SEEN = "swav/verdict", "swav/verdict_seen"
_VERDICT_EVERY_SECONDS = 1.0
_VERDICT_LINGER_SECONDS = 15.0

_logger = logging.getLogger(__name__)


class Ended(Exception):  # noqa: N818  (it may have ended well)
    """The run is over on every node; the rendezvous is to be closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Left(SignalException):
    """This agent ends and the run may go on without it: only after this exception torch leaves the rendezvous open."""


class Agent(LocalElasticAgent):
    """Torch's agent of one host, which looks at its workers' exit statuses before it restarts them."""

    def __init__(
        self,
        *arguments: Any,
        folder: Path,
        life: Life,
        max_futile_restarts: int,
        timeout_seconds: float,
        **settings: Any,
    ) -> None:
        """Prepare.

        Args:
            arguments: of torch's agent.
            folder: shared with the workers of this host.
            life: told what becomes of them.
            max_futile_restarts: restarts in a row after which the run has got no further.
            timeout_seconds: between two looks at the workers, after which this agent ends itself.
            settings: of torch's agent.
        """
        super().__init__(*arguments, **settings)
        self._folder = folder
        self._life = life
        self._num_starts = 0
        self._max_futile_restarts = max_futile_restarts
        self._timeout_seconds = timeout_seconds
        self._num_futile = 0
        self._furthest_step = -1
        self._failed_world: int | None = None
        self._asked_at = time.monotonic()
        self._has_seen_verdict = False

    def run(self, role: str = "default") -> RunResult:
        """Run to the end.

        Raises:
            Ended: the run is over, well or badly.
            SignalException: this agent has been asked to stop; its workers have been, too.
            Left: something around this agent failed.
        """
        try:
            result: RunResult | None = super().run(role)
        except Ended:
            self._wait_until_peers_know()
            raise
        except SignalException:
            raise
        except Exception as error:
            raise Left(str(error), signal.SIGTERM) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if result is None:  # a node too many, which waited until the others were done
            raise Ended(0, "the run ended without needing this node")
        return result

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        faulthandler.cancel_dump_traceback_later()  # other nodes may be long in coming
        for path in self._folder.glob(SAID + "*"):
            path.unlink()
        self._life.ranks_end("the other nodes")
        forget_ranks(self._life)
        try:
            super()._initialize_workers(worker_group)
        except RendezvousClosedError:
            self._follow_verdict()
            raise

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._life.num_restarts, self._num_starts = self._num_starts, self._num_starts + 1
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._life.ranks_start(worker_group.workers[0].world_size)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.SUCCEEDED:
            self._life.ranks_end("the other nodes' ranks to end")
            faulthandler.cancel_dump_traceback_later()  # the exit barrier comes
            self._tell(0, "the run is done")
        elif result.state is WorkerState.FAILED:
            self._follow_verdict()
            self._judge([failure.exitcode for failure in result.failures.values()])
        elif time.monotonic() - self._asked_at > _VERDICT_EVERY_SECONDS:
            self._follow_verdict(may_end_by_itself=True)
        return result

    def _shutdown(self, *arguments: Any, **settings: Any) -> None:
        faulthandler.cancel_dump_traceback_later()  # the workers may need their time to save
        self._life.ranks_end("this pod's ranks to save and end")
        super()._shutdown(*arguments, **settings)

    def _judge(self, exit_statuses: list[int]) -> None:
        """Return if the workers are to be restarted.

        Raises:
            Ended: they are not.
        """
        if {EXIT_REFUSED, USAGE_ERROR} & set(exit_statuses):
            self._end(EXIT_REFUSED, "a worker refused the command, so no other try is made")
        if EXIT_STOPPED in exit_statuses:
            _logger.warning("the workers stopped with their state saved, as a node leaves or joins; going on")
            return
        step, world = last_step(self._folder), self._worker_group.group_world_size
        if step > self._furthest_step:
            self._num_futile, self._furthest_step = 0, step
        elif world == self._failed_world:  # or a node was lost or gained, which is no fault of the run's
            self._num_futile += 1
        self._failed_world = world
        if self._num_futile >= self._max_futile_restarts:
            where = f"beyond step {self._furthest_step}" if self._furthest_step >= 0 else "to a first step"
            self._end(
                EXIT_FUTILE,
                f"{self._num_futile} restarts in a row got no further ({where}); mend what the workers say above, then "
                "run the same command again",
            )
        _logger.warning("workers ended with the statuses %s; starting them again", sorted(set(exit_statuses)))

    def _end(self, status: int, reason: str) -> None:
        self._tell(status, reason)
        raise Ended(status, reason)

    def _tell(self, status: int, reason: str) -> None:
        """Tell the other nodes' agents how the run ended, those too that wait for another round."""
        _ask(lambda store: store.set(_VERDICT, f"{status} {reason}"), self._worker_group)
        self._see_verdict()
        try:
            self._rdzv_handler.set_closed()
        except RendezvousError as error:
            _logger.info("the rendezvous cannot be closed: %s", error)

    def _follow_verdict(self, *, may_end_by_itself: bool = False) -> None:
        """End as another node's agent has found that the run ends.

        Args:
            may_end_by_itself: this node's workers run, and need not be disturbed where the run is done.

        Raises:
            Ended: the run is over.
        """
        self._asked_at = time.monotonic()
        if not _ask(lambda store: store.check([_VERDICT]), self._worker_group):
            return
        verdict = _ask(lambda store: store.get(_VERDICT).decode(), self._worker_group)
        if verdict is None:
            return
        status, _, reason = verdict.partition(" ")
        if int(status) == 0 and may_end_by_itself:
            return
        self._see_verdict()
        if int(status) == 0:
            self._exit_barrier()  # type: ignore[no-untyped-call]  # the others wait there
        raise Ended(int(status), reason)

    def _see_verdict(self) -> None:
        if not self._has_seen_verdict:
            self._has_seen_verdict = True
            _ask(lambda store: store.add(_SEEN, 1), self._worker_group)

    def _wait_until_peers_know(self) -> None:
        """Wait, for a while, until all agents of the last round know: the store may end with this process."""
        deadline = time.monotonic() + _VERDICT_LINGER_SECONDS
        world = self._worker_group.group_world_size or 1
        while world > 1 and time.monotonic() < deadline:
            seen = _ask(lambda store: store.add(_SEEN, 0), self._worker_group)
            if seen is None or seen >= world:
                return
            time.sleep(0.2)


def _ask(question: Callable[[Any], Any], worker_group: WorkerGroup) -> Any:
    """Ask the agents' store; None before the first round, and where the store is gone."""
    if worker_group.store is None:
        return None
    try:
        return question(worker_group.store.underlying_store)  # below the round's own keys
    except RuntimeError as error:
        _logger.info("the rendezvous store does not answer: %s", error)
        return None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Torchrun's arguments with defaults for long runs on nodes that come and go, and ``--max-futile-restarts``."""
    parser = torchrun.get_args_parser()
    parser.prog = "python -m swav.elastic"
    parser.add_argument(
        "--max-futile-restarts",
        type=int,
        default=MAX_FUTILE_RESTARTS,
        help="give up after so many restarts in a row in which the run got no further",
    )
    parser.add_argument(
        "--agent-timeout-seconds",
        type=float,
        default=AGENT_TIMEOUT_SECONDS,
        help="end this agent, for a supervisor to start it again, when the other agents' store is silent for so long",
    )
    if "PET_MAX_RESTARTS" not in os.environ:
        parser.set_defaults(max_restarts=MAX_RESTARTS)
    options = parser.parse_args(arguments)
    if options.max_futile_restarts < 1 or options.agent_timeout_seconds <= 0:
        parser.error(
            f"--max-futile-restarts {options.max_futile_restarts} must be at least 1, --agent-timeout-seconds "
            f"{options.agent_timeout_seconds} above 0"
        )
    options.rdzv_conf = ",".join(filter(None, [RENDEZVOUS_SETTINGS, options.rdzv_conf]))  # the last one counts
    return options


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise SignalException(f"asked to stop by {signal.Signals(signum).name}", signal.Signals(signum))


def launch(options: argparse.Namespace) -> int:
    """Start this host's workers and see them to their end; returns the exit status.

    Args:
        options: as :func:`parse` gives them.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or a restart meets the keys of the round before
    for signum in (signal.SIGTERM, signal.SIGINT):  # torch does so when it starts workers; until then they would kill
        signal.signal(signum, _stop)
    with tempfile.TemporaryDirectory(prefix="swav-elastic-") as folder:
        os.environ |= {LAUNCHER_FOLDER: folder, LAUNCHER_PID: str(os.getpid())}
        life = Life(Path(folder))
        agent = partial(
            Agent,
            folder=Path(folder),
            life=life,
            max_futile_restarts=options.max_futile_restarts,
            timeout_seconds=options.agent_timeout_seconds,
        )
        try:
            vars(launcher)["LocalElasticAgent"] = agent  # torch has no other way to give it another
            with launcher_endpoint(life):
                record(torchrun.run)(options)
        except Ended as ended:
            _logger.log(logging.ERROR if ended.status else logging.INFO, "%s (exit status %d)", ended, ended.status)
            return ended.status
        except Left as left:
            _logger.error("this node's agent ends, others may go on: %s", left)
            return EXIT_FAILED
        except SignalException as stopped:
            _logger.warning("%s; run the same command to go on", stopped)
            return EXIT_STOPPED
        except (ChildFailedError, RendezvousError) as failed:
            _logger.error("%s", failed)
            return EXIT_FAILED
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    start_logging(logging.WARNING)
    try:
        return launch(parse(arguments))
    except ValueError as error:
        _logger.error("error: %s", error)
        return EXIT_REFUSED
    except SystemExit as ended:
        return status_of(ended)


if __name__ == "__main__":
    sys.exit(main())
