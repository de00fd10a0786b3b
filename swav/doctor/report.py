"""What the checks found: for a person as a table, for a program as JSON.

A check has two halves. Every rank measures and tells its :data:`Facts`; rank 0 judges the facts of all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

# What one rank measured in one check, as JSON has it. Under "errors": what went wrong, by the name of the finding.
Facts = dict[str, Any]
Status = Literal["pass", "fail", "skipped"]

REPORT_FORMAT = "swav-doctor-1"
_WIDTHS = (21, 7, 30)
_MAX_NAMED_HOSTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of the check, e.g. ``storage.write``.
        status: of the check.
        measured: the figure; None where there is none.
        unit: of the figure and of the limit.
        limit: what the figure had to be, in words.
        reason: of a failure or of leaving the check out; a remark on what passed.
        remedy: what to do, where it failed.
    """

    name: str
    status: Status
    measured: float | str | None = None
    unit: str = ""
    limit: str = "none"
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A rank, as the report names it."""

    rank: int
    host: str
    local_rank: int

    @property
    def speaks_for_host(self) -> bool:
        """Whether it measures what all ranks of a host have in common."""
        return self.local_rank == 0


def judged(
    name: str, value: float, *, at_least: float | None = None, at_most: float | None = None, unit: str, remedy: str
) -> Finding:
    """Compare a figure with its limit; without one it passes."""
    bounds = {"at least": at_least, "at most": at_most}
    words = [f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None]
    fails = (at_least is not None and value < at_least) or (at_most is not None and value > at_most)
    return Finding(
        name=name,
        status="fail" if fails else "pass",
        measured=value,
        unit=unit,
        limit=" and ".join(words) or "none",
        remedy=remedy if fails else "",
    )


def failed(name: str, told: Mapping[Member, Facts], remedy: str) -> Finding | None:
    """The finding for what went wrong on any rank; None where nothing did."""
    errors = [(facts["errors"][name], member) for member, facts in told.items() if name in facts.get("errors", {})]
    if not errors:
        return None
    by_message = [
        f"{name_ranks([member for _, member in group])}: {message}"
        for message, group in groupby(sorted(errors, key=lambda error: (error[0], error[1].rank)), lambda one: one[0])
    ]
    return Finding(name=name, status="fail", reason="; ".join(by_message), remedy=remedy)


def differing(name: str, values: Mapping[Member, str], *, remedy: str) -> Finding:
    """Whether all ranks have the same; where they have not, which differ from what most have."""
    count: dict[str, int] = {}
    for value in values.values():
        count[value] = count.get(value, 0) + 1
    usual = max(count, key=lambda value: count[value])
    others = {
        value: [member for member, own in values.items() if own == value] for value in sorted(count) if value != usual
    }
    if not others:
        return Finding(name=name, status="pass", measured=usual, limit="equal on all ranks")
    parts = [f"{name_ranks(members)}: {value}" for value, members in others.items()]
    return Finding(
        name=name,
        status="fail",
        measured=f"{len(count)} different",
        limit="equal on all ranks",
        reason=f"{'; '.join(parts)}; the other ranks ({count[usual]}): {usual}",
        remedy=remedy,
    )


def skipped(name: str, reason: str) -> Finding:
    """A check that was left out."""
    return Finding(name=name, status="skipped", reason=reason)


def name_ranks(members: Iterable[Member]) -> str:
    """Some ranks with their hosts: ``rank 3 (host b)``, ``ranks 0-2, 5 (hosts a, b)``."""
    some = sorted(members, key=lambda member: member.rank)
    ranges: list[list[int]] = []
    for member in some:
        if ranges and ranges[-1][1] == member.rank - 1:
            ranges[-1][1] = member.rank
        else:
            ranges.append([member.rank, member.rank])
    ranks = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    hosts = list(dict.fromkeys(member.host for member in some))
    named = ", ".join(hosts[:_MAX_NAMED_HOSTS])
    if len(hosts) > _MAX_NAMED_HOSTS:
        named += f" and {len(hosts) - _MAX_NAMED_HOSTS} more"
    return f"rank{'s' * (len(some) > 1)} {ranks} (host{'s' * (len(hosts) > 1)} {named})"


def passed(findings: Sequence[Finding]) -> bool:
    """Whether no check failed."""
    return all(finding.status != "fail" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """The findings for a person, one line each; below a line why, and what to do."""
    lines = [_row("CHECK", "RESULT", "MEASURED", "LIMIT")]
    for finding in findings:
        status = "FAIL" if finding.status == "fail" else finding.status
        limit = finding.limit if finding.limit == "none" else f"{finding.limit} {finding.unit}".rstrip()
        lines.append(_row(finding.name, status, _figure(finding), "" if status == "skipped" else limit))
        if finding.reason:
            lines.append(f"    {'why' if status != 'pass' else 'note'}: {finding.reason}")
        if finding.remedy:
            lines.append(f"    do:  {finding.remedy}")
    count = {status: sum(finding.status == status for finding in findings) for status in ("pass", "fail", "skipped")}
    lines.append(f"{count['pass']} passed, {count['fail']} failed, {count['skipped']} skipped")
    return "\n".join(lines)


def to_json(findings: Sequence[Finding], told: Mapping[Member, Facts], facts: Facts) -> Facts:
    """The findings for a program, with what each rank measured.

    Args:
        findings: of all checks.
        told: of all ranks, by the name of the check.
        facts: of the whole preflight.
    """
    ranks = [{"rank": member.rank, "host": member.host, "measured": measured} for member, measured in told.items()]
    whole = {"format": REPORT_FORMAT, "passed": passed(findings), **facts}
    return whole | {"findings": [asdict(finding) for finding in findings], "ranks": ranks}


def _row(*cells: str) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)]
    return "  ".join([*padded, *cells[len(_WIDTHS) :]]).rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(finding: Finding) -> str:
    if finding.measured is None:
        return "-"
    value = finding.measured if isinstance(finding.measured, str) else _number(finding.measured)
    return f"{value} {finding.unit}".rstrip()
