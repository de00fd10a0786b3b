"""Check 5: what a node has: free disk, shared memory, memory, cores, open files."""

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from swav import storage
from swav.doctor.report import Facts, Finding, Member, failed, judged, name_ranks, skipped
from swav.doctor.storage_check import describe

_MB, _GB = 1e6, 1e9
_MIN_TEMPORARY_GB = 1.0
_MIN_OPEN_FILES = 1024  # a reader keeps up to 256 shards and as many tables open, beside its connections
_CGROUP = Path("/sys/fs/cgroup")


def measure() -> Facts:
    """What this node has; each part may fail for itself."""
    parts: dict[str, Callable[[], Facts]] = {
        "host.cache_disk": lambda: _disk("cache", storage.cache_folder()),
        "host.temporary_disk": lambda: _disk("temporary", Path(tempfile.gettempdir())),
        "host.shared_memory": lambda: {"shared_memory_bytes": shutil.disk_usage("/dev/shm").total},
        "host.memory": lambda: _memory(_CGROUP),
        "host.cores": lambda: _cores(_CGROUP),
        "host.open_files": lambda: {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]},
    }
    facts: Facts = {"errors": {}, "ranks_here": int(os.environ.get("LOCAL_WORLD_SIZE", "1"))}
    for name, part in parts.items():
        try:
            facts |= part()
        except (OSError, ValueError, RuntimeError) as error:
            facts["errors"][name] = describe(error)
    return facts


def _disk(what: str, folder: Path) -> Facts:
    with tempfile.TemporaryFile(dir=folder):  # a folder that can only be read is of no use
        return {f"{what}_folder": str(folder), f"{what}_free_bytes": shutil.disk_usage(folder).free}


def _memory(root: Path) -> Facts:
    """The memory that this container may use: the least limit of its cgroup and those above; else the machine's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    facts = {f"memory_{key}_bytes": int(lines[name].split()[0]) * 1024 for key, name in _MEMORY_LINES.items()}
    limits = [int(text) for text in cgroup_values(root, "memory.max", "memory/memory.limit_in_bytes") if text.isdigit()]
    facts["memory_limit_bytes"] = min([facts["memory_total_bytes"], *limits])
    return facts


_MEMORY_LINES = {"total": "MemTotal", "available": "MemAvailable"}


def _cores(root: Path) -> Facts:
    """Cores that a thread may be put on, and how many the cgroup pays for at a time."""
    quotas = []
    for text in cgroup_values(root, "cpu.max", ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    quotas += _old_quota(root)
    seen = len(os.sched_getaffinity(0))
    return {"cores_seen": seen, "cores_quota": min([float(seen), *quotas])}


def _old_quota(root: Path) -> list[float]:
    """Of cgroups of version 1."""
    try:
        quota, period = (int((root / "cpu" / f"cpu.cfs_{word}_us").read_text()) for word in ("quota", "period"))
    except (OSError, ValueError):
        return []
    return [quota / period] if quota > 0 and period > 0 else []


def cgroup_values(root: Path, name: str, old_name: str) -> list[str]:
    """What a file of this process's cgroup and of those above it says.

    Args:
        root: where cgroups are mounted.
        name: of the file, for version 2.
        old_name: below the root, for version 1; empty for none.
    """
    own = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            own = line.removeprefix("0::").lstrip("/")
    folder = root / own
    files = [place / name for place in (folder, *folder.parents) if place.is_relative_to(root)]
    files += [root / old_name] if old_name else []
    return [file.read_text().strip() for file in files if file.is_file()]


def judge(told: Mapping[Member, Facts], *, min_free_disk_gb: float | None, min_shm_mb: float | None) -> list[Finding]:
    """Findings of what a rank of each node told."""
    return [
        _least(
            told,
            "host.cache_disk",
            "cache_free_bytes",
            _GB,
            "GB free",
            min_free_disk_gb,
            "set SWAV_CACHE to a larger folder, free space there, or raise the pod's ephemeral storage",
        ),
        _least(
            told,
            "host.temporary_disk",
            "temporary_free_bytes",
            _GB,
            "GB free",
            _MIN_TEMPORARY_GB,
            "set TMPDIR to a larger folder that can be written, or mount one at /tmp",
        ),
        _least(
            told,
            "host.shared_memory",
            "shared_memory_bytes",
            _MB,
            "MB",
            min_shm_mb,
            "mount a memory-backed volume of that size at /dev/shm: NCCL's ranks of a node talk through it",
        ),
        _memory_finding(told),
        _cores_finding(told),
        _least(
            told,
            "host.open_files",
            "open_files",
            1.0,
            "files",
            _MIN_OPEN_FILES,
            "raise the limit (ulimit -n, LimitNOFILE of the container runtime)",
        ),
    ]


def _least(
    told: Mapping[Member, Facts], name: str, key: str, unit_size: float, unit: str, limit: float | None, remedy: str
) -> Finding:
    """The node that has the least of something."""
    bad = failed(name, told, remedy)
    if bad is not None:
        return bad
    values = {member: facts[key] / unit_size for member, facts in told.items() if key in facts}
    if not values:
        return skipped(name, "no node told")
    least = min(values.values())
    finding = judged(name, least, at_least=limit, unit=unit, remedy=remedy)
    if finding.status == "pass":
        return finding
    assert limit is not None
    too_few = [member for member, value in values.items() if value < limit]
    folder = key.replace("_free_bytes", "_folder")
    folders = sorted({told[member][folder] for member in too_few}) if folder != key else []
    return replace(finding, reason=name_ranks(too_few) + f" in {', '.join(folders)}" * bool(folders))


def _memory_finding(told: Mapping[Member, Facts]) -> Finding:
    return _least(told, "host.memory", "memory_limit_bytes", _GB, "GB", None, "see /proc/meminfo and the cgroup")


def _cores_finding(told: Mapping[Member, Facts]) -> Finding:
    finding = _least(told, "host.cores", "cores_quota", 1.0, "cores", None, "see the cgroup's cpu.max")
    throttled = [member for member, facts in told.items() if facts.get("cores_quota", 0) < facts.get("cores_seen", 0)]
    if finding.status != "pass" or not throttled:
        return finding
    facts = told[throttled[0]]
    threads = max(1, int(facts["cores_quota"]) // facts["ranks_here"])
    return replace(
        finding,
        reason=f"{name_ranks(throttled)}: programs see {facts['cores_seen']} cores, the quota pays for "
        f"{facts['cores_quota']:g}; set runtime.loader_threads={threads} and OMP_NUM_THREADS={threads}, or give the "
        "pods whole cores of their own (requests = limits, static CPU manager)",
    )
