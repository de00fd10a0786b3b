"""All checks in their order, on one rank, and the judgement on rank 0."""

import argparse
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from swav import storage
from swav.config import PretrainConfig
from swav.data.source import open_dataset
from swav.distributed import pick_device
from swav.doctor import clock, collectives, data_check, host, identity, storage_check
from swav.doctor.clock import Clock
from swav.doctor.peers import Peers
from swav.doctor.report import Facts, Finding, Member, name_ranks, passed, table, to_json
from swav.doctor.storage_check import Trial, describe
from swav.logs import answer
from swav.program import Stopped
from swav.watchdog import progress

REPORT_SECONDS = 300.0  # to write it
_NCCL_SHM_MB = 1024.0
_MB = 1_000_000

_logger = logging.getLogger(__name__)


class Preflight:
    """One preflight, as one rank sees it.

    Attributes:
        findings: of all ranks; only rank 0 has them.
    """

    def __init__(
        self, options: argparse.Namespace, config: PretrainConfig | None, peers: Peers, own_clock: Clock
    ) -> None:
        """Prepare.

        Args:
            options: of the command line.
            config: the run that is to come, if it is named.
            peers: all ranks.
            own_clock: of this node.
        """
        self._options, self._config, self._peers, self._clock = options, config, peers, own_clock
        self._data: str | None = config.data.url if config is not None else options.data
        self.findings: list[Finding] = []

    def examine(self) -> bool:
        """Measure, and on rank 0 judge and report; returns whether all passed, the same on every rank.

        Raises:
            RuntimeError: rank 0 is silent.
        """
        began = time.time()
        members, own_device, device = self._introduce()
        own = members.get(self._peers.rank) or self._member()
        facts = self._measure(own, members, own_device, device)
        self._peers.tell("facts", facts)
        verdict = False
        if self._peers.is_first:
            told = self._peers.hear("facts")
            by_member = {member: told[rank] for rank, member in members.items() if rank in told}
            missing = [member for rank, member in members.items() if rank not in told]
            self.findings = self._judge(by_member, missing, device)
            reported = self._report(
                by_member, {"device": device.type, "started": began, "seconds": time.time() - began}
            )
            verdict = passed(self.findings) and reported
        return bool(self._peers.agree("verdict", verdict, seconds=self._peers.timeout_seconds + REPORT_SECONDS))

    def _member(self) -> Member:
        names = [os.environ.get(name, "") for name in ("POD_NAME", "NODE_NAME")]
        place = " on ".join(filter(None, [names[0] or socket.gethostname(), names[1]]))
        return Member(self._peers.rank, place, int(os.environ.get("LOCAL_RANK", "0")))

    def _introduce(self) -> tuple[dict[int, Member], torch.device, torch.device]:
        """Who takes part, by rank; this rank's device; and where all compute: on GPUs only if every rank has one."""
        self._device_errors: dict[str, str] = {}
        try:
            device = pick_device(self._options.device)
        except (ValueError, RuntimeError) as error:
            device = torch.device("cpu")
            self._device_errors = {"identity.gpu": describe(error).splitlines()[0]}
        own = self._member()
        hello = {"host": own.host, "local_rank": own.local_rank, "device": device.type}
        self._peers.tell("hello", hello)
        self._peers.meet("start")
        everybody = self._peers.hear("hello") if self._peers.is_first else {}
        plan = self._peers.agree("plan", everybody, seconds=self._peers.timeout_seconds + REPORT_SECONDS)
        members = {int(rank): Member(int(rank), said["host"], said["local_rank"]) for rank, said in plan.items()}
        all_cuda = all(said["device"] == "cuda" for said in plan.values())
        return members, device, device if all_cuda else torch.device("cpu")

    def _measure(
        self, own: Member, members: Mapping[int, Member], own_device: torch.device, device: torch.device
    ) -> Facts:
        peers, options = self._peers, self._options
        facts: Facts = {"identity": _attempt("identity.software", lambda: identity.measure(own_device))}
        facts["identity"].setdefault("errors", {}).update(self._device_errors)
        if own.speaks_for_host:
            facts["host"] = _attempt("host.memory", host.measure)
        facts["clock"] = self._compare_clocks(own, members)
        if peers.meet("collectives"):
            rehearsal = collectives.Rehearsal(peers, device, options.collective_timeout_seconds)
            facts["collectives"] = rehearsal.measure()
        facts["storage"] = self._try_storage()
        facts["data"] = self._try_data()
        return facts

    def _compare_clocks(self, own: Member, members: Mapping[int, Member]) -> Facts:
        spokesmen = [rank for rank, member in members.items() if member.speaks_for_host]
        facts: Facts = {}
        if own.speaks_for_host and self._store_url is not None:
            url = self._store_url
            facts["store"] = _attempt("clock.store", lambda: clock.compare_with_store(url, self._clock))
        if self._peers.meet("clock"):
            facts["peers"] = clock.compare_with_peers(self._peers, self._clock, spokesmen)
        return facts

    @property
    def _store_url(self) -> str | None:
        """Something in a store, whose clock matters."""
        urls = [url for url in (self._options.output, self._data) if url is not None and storage.is_remote(url)]
        return urls[0] if urls else None

    def _try_storage(self) -> Facts:
        sizes = [int(size * _MB) for size in self._options.object_mb]
        trial = Trial(storage.absolute(self._options.output), sizes, self._options.streams)
        facts: Facts = {}
        try:
            self._peers.meet("storage.write")
            facts["write"] = _attempt("storage.write", trial.write)
            self._peers.meet("storage.read")
            facts["read"] = _attempt("storage.read", trial.read)
        finally:
            facts["remove"] = trial.remove()
        return facts

    def _try_data(self) -> Facts:
        url = self._data
        if url is None:
            return {}
        progress()
        try:
            index = open_dataset(url)
        except (ValueError, RuntimeError, OSError) as error:
            self._peers.meet("data.read")
            return {"open": {"errors": {"data.index": describe(error)}}}
        facts = {"open": data_check.open_facts(index, self._config, self._peers.world_size)}
        self._peers.meet("data.read")
        return facts | {"read": _attempt("data.read", lambda: data_check.read_facts(index))}

    def _judge(self, told: Mapping[Member, Facts], missing: list[Member], device: torch.device) -> list[Finding]:
        options, peers = self._options, self._peers

        def part(name: str, only: Callable[[Member], bool] = lambda _: True) -> dict[Member, Facts]:
            return {member: facts.get(name, {}) for member, facts in told.items() if only(member)}

        min_shm_mb = options.min_shm_mb
        if min_shm_mb is None and device.type == "cuda" and any(not member.speaks_for_host for member in told):
            min_shm_mb = _NCCL_SHM_MB
        return [
            self._presence(told, missing),
            *storage_check.judge(
                part("storage"),
                min_write_mb_per_second=options.min_write_mb_per_second,
                min_read_mb_per_second=options.min_read_mb_per_second,
            ),
            *data_check.judge(
                part("data"), min_read_mb_per_second=options.min_read_mb_per_second, has_data=self._data is not None
            ),
            *collectives.judge(
                part("collectives"),
                world_size=peers.world_size,
                broken=peers.broken,
                min_allreduce_gb_per_second=options.min_allreduce_gb_per_second,
            ),
            *clock.judge(
                part("clock"),
                max_skew_seconds=options.max_clock_skew_seconds,
                has_store=self._store_url is not None,
                broken=peers.broken,
            ),
            *host.judge(
                part("host", lambda member: member.speaks_for_host),
                min_free_disk_gb=options.min_free_disk_gb,
                min_shm_mb=min_shm_mb,
            ),
            *identity.judge(part("identity")),
        ]

    def _presence(self, told: Mapping[Member, Facts], missing: list[Member]) -> Finding:
        world = self._peers.world_size
        finding = Finding(
            name="ranks", status="pass", measured=f"{len(told)} of {world}", limit="all, to the end", unit=""
        )
        if len(told) == world and not self._peers.broken:
            return finding
        named = f"; {name_ranks(missing)} did not tell what they measured" if missing else ""
        reason = (self._peers.broken + named).removeprefix("; ") or "some did not say hello"
        remedy = "look at the log of the ranks that are missing and of their nodes"
        return replace(finding, status="fail", reason=reason, remedy=remedy)

    def _report(self, told: Mapping[Member, Facts], facts: Facts) -> bool:
        """Print the table and write the report; returns whether it was written."""
        url = self._options.report or storage.join(self._options.output, "doctor.json")
        whole = to_json(
            self.findings,
            told,
            facts
            | {"world_size": self._peers.world_size, "output": storage.absolute(self._options.output)}
            | {"data": self._data, "recipe": self._options.recipe},
        )
        title = f"the preflight {'passed' if whole['passed'] else 'failed'}"
        answer(table(self.findings), title=title, findings=whole["findings"])
        try:
            storage.write_atomic(url, (json.dumps(whole, indent=2) + "\n").encode())
        except (OSError, ValueError) as error:
            _logger.error("the report was not written to %s: %s", url, describe(error))
            return False
        return True


def _attempt(name: str, measure: Callable[[], Facts]) -> Facts:
    """What a check measured, or that it failed: the next one is made in any case."""
    progress()
    try:
        return measure()
    except Stopped:
        raise
    except Exception as error:  # libraries raise what they like
        return {"errors": {name: describe(error)}}
