"""Check 4: the nodes' clocks agree with one another, and with the store's.

Signatures of requests and the times in logs depend on them: Amazon's stores refuse a clock that is 15 minutes off.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from swav import storage
from swav.doctor.peers import Peers
from swav.doctor.report import Facts, Finding, Member, failed, judged, name_ranks, skipped
from swav.storage.urls import quieten

_NUM_ROUNDS = 8
_ROUND_SECONDS = 5.0
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 10.0
_REMEDY = "set the clock of the node by NTP (chrony), or drain the node"


class Clock:
    """The time of this node, in seconds since 1970."""

    def now(self) -> float:
        """The time."""
        return time.time()


def compare_with_peers(peers: Peers, clock: Clock, spokesmen: list[int]) -> Facts:
    """How far the clocks of other nodes are from rank 0's.

    Rank 0 asks each in turn for its time, some times; the answer that took the shortest counts, as given half-way.

    Args:
        peers: all ranks; what is asked goes through their store.
        clock: of this node.
        spokesmen: a rank of each node; rank 0 among them.

    Returns:
        On rank 0, by rank: the other clock less its own in seconds, and how much of it the journey may be.
    """
    if not peers.is_first:
        if peers.rank in spokesmen:
            _answer(peers, clock)
        return {}
    facts: Facts = {"offsets": {}, "errors": {}}
    for rank in spokesmen:
        if rank == 0:
            continue
        rounds = [found for number in range(_NUM_ROUNDS) if (found := _ask(peers, clock, rank, number)) is not None]
        if not rounds:
            facts["errors"]["clock.nodes"] = f"rank {rank} does not tell its time"
            continue
        journey, offset = min(rounds)
        facts["offsets"][str(rank)] = [offset, journey / 2]
    return facts


def _ask(peers: Peers, clock: Clock, rank: int, number: int) -> tuple[float, float] | None:
    """Seconds of the journey there and back, and the other's time less ours; None where it is silent."""
    key = f"clock/{rank}/{number}"
    before = clock.now()
    peers.store.set(f"{key}/ask", "")
    if not peers.wait(f"{key}/answer", _ROUND_SECONDS, longest_pause_seconds=0.001):
        return None
    after = clock.now()
    answer = float(peers.store.get(f"{key}/answer"))
    return after - before, answer - (before + after) / 2


def _answer(peers: Peers, clock: Clock) -> None:
    for number in range(_NUM_ROUNDS):
        key = f"clock/{peers.rank}/{number}"
        seconds, pause = (peers.timeout_seconds, 0.02) if number == 0 else (_ROUND_SECONDS, 0.001)
        if not peers.wait(f"{key}/ask", seconds, longest_pause_seconds=pause):
            return
        peers.store.set(f"{key}/answer", repr(clock.now()))


def compare_with_store(url: str, clock: Clock) -> Facts:
    """How far the clock of the store behind a url is from this node's, by the Date that it puts on an answer.

    Returns:
        This clock less the store's in seconds, and how much of it is a date's half second and the journey; nothing
        where the store is a folder or gives no date.

    Raises:
        Exception: of boto3 or urllib3.
    """
    if not storage.is_remote(url):
        return {}
    before = clock.now()
    date = _date_of_s3(url) if url.startswith("s3://") else _date_of_web(url)
    after = clock.now()
    if date is None:
        return {}
    theirs = parsedate_to_datetime(date).timestamp() + 0.5  # it is cut to whole seconds
    return {"store_offset": [(before + after) / 2 - theirs, 0.5 + (after - before) / 2]}


def _date_of_s3(url: str) -> str | None:
    """The Date of any answer, a refusal's too."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import ClientError, NoCredentialsError

    quieten("boto3", "botocore", "urllib3")

    def ask(signature: Any) -> Any:
        config = Config(
            signature_version=signature,
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_ANSWER_SECONDS,
            retries={"total_max_attempts": 1},
        )
        try:
            return boto3.session.Session().client("s3", config=config).head_bucket(Bucket=urlsplit(url).netloc)
        except ClientError as error:
            return error.response

    try:
        answer = ask(None)
    except NoCredentialsError:
        answer = ask(UNSIGNED)
    date: str | None = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return date


def _date_of_web(url: str) -> str | None:
    import urllib3

    timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_ANSWER_SECONDS)
    with urllib3.PoolManager() as pool:
        date: str | None = pool.request("HEAD", url, timeout=timeout, retries=False).headers.get("Date")
    return date


def judge(told: Mapping[Member, Facts], *, max_skew_seconds: float, has_store: bool, broken: str = "") -> list[Finding]:
    """Findings of what all ranks told, with ``peers`` and ``store`` in each rank's facts."""
    return [_nodes(told, max_skew_seconds, broken), _store(told, max_skew_seconds, has_store)]


def _nodes(told: Mapping[Member, Facts], limit: float, broken: str) -> Finding:
    first = next(iter(told.values()), {}).get("peers", {})
    bad = failed("clock.nodes", {member: facts.get("peers", {}) for member, facts in told.items()}, _REMEDY)
    if bad is not None:
        return bad
    if broken:
        return skipped("clock.nodes", broken)
    offsets = first.get("offsets", {})
    if not offsets:
        return skipped("clock.nodes", "there is one node")
    by_member = {member: offsets[str(member.rank)] for member in told if str(member.rank) in offsets}
    return _worst("clock.nodes", by_member, limit, "rank 0's")


def _store(told: Mapping[Member, Facts], limit: float, has_store: bool) -> Finding:
    if not has_store:
        return skipped("clock.store", "neither --output nor --data is in a store")
    parts = {member: facts.get("store", {}) for member, facts in told.items()}
    bad = failed("clock.store", parts, "see what storage.write says; the store must answer for its clock to be read")
    if bad is not None:
        return bad
    offsets = {member: facts["store_offset"] for member, facts in parts.items() if "store_offset" in facts}
    if not offsets:
        return skipped("clock.store", "the store's answers have no Date")
    return _worst("clock.store", offsets, limit, "the store's")


def _worst(name: str, offsets: Mapping[Member, list[float]], limit: float, whose: str) -> Finding:
    """The largest difference among nodes, less what the journey may account for.

    Args:
        name: of the finding.
        offsets: by a rank of each node, the difference and what of it is uncertain; the base is 0.
        limit: of the difference.
        whose: clock is the base.
    """
    member = max(offsets, key=lambda one: abs(offsets[one][0]) - offsets[one][1])
    offset, unsure = offsets[member]
    certain = max(0.0, abs(offset) - unsure)
    # Two nodes may be off to both sides of the base.
    ends = [sign * max(0.0, sign * value - doubt) for value, doubt in offsets.values() for sign in (-1, 1)]
    spread = max(0.0, *ends) - min(0.0, *ends)
    finding = judged(name, max(certain, spread), at_most=limit, unit="s", remedy=_REMEDY)
    word = "ahead of" if offset > 0 else "behind"
    return replace(finding, reason=f"{name_ranks([member])} is {abs(offset):.3f} s {word} {whose}, +-{unsure:.3f} s")
