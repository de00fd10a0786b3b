from pathlib import Path

import pytest

from swav.doctor import host
from swav.doctor.host import cgroup_values, judge, measure
from swav.doctor.report import Facts, Finding, Member

MEMBERS = [Member(0, "a", 0), Member(8, "b", 0)]


def by_name(told: dict[Member, Facts], **limits: float | None) -> dict[str, Finding]:
    findings = judge(told, **({"min_free_disk_gb": None, "min_shm_mb": None} | limits))
    return {finding.name.removeprefix("host."): finding for finding in findings}


def test_this_host_has_what_a_test_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    facts = measure()
    assert facts["errors"] == {}
    assert 0 < facts["memory_limit_bytes"] <= facts["memory_total_bytes"]
    assert 0 < facts["cores_quota"] <= facts["cores_seen"]
    findings = by_name({MEMBERS[0]: facts})
    assert {name for name, finding in findings.items() if finding.status != "pass"} <= {"open_files", "temporary_disk"}


def test_the_node_with_too_little_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    facts = measure()
    poor = facts | {"cache_free_bytes": 10**9, "shared_memory_bytes": 64 << 20, "open_files": 256}
    rich = facts | {"cache_free_bytes": 10**12, "shared_memory_bytes": 1 << 36, "open_files": 4096}
    findings = by_name({MEMBERS[0]: rich, MEMBERS[1]: poor}, min_free_disk_gb=10, min_shm_mb=1024)
    assert (findings["cache_disk"].status, findings["cache_disk"].measured) == ("fail", 1.0)
    assert findings["cache_disk"].reason == f"rank 8 (host b) in {tmp_path}/cache"
    assert "SWAV_CACHE" in findings["cache_disk"].remedy
    assert findings["shared_memory"].reason == findings["open_files"].reason == "rank 8 (host b)"
    assert findings["shared_memory"].status == findings["open_files"].status == "fail"


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache"
    place.write_text("")
    monkeypatch.setenv("SWAV_CACHE", str(place))
    facts = measure()
    assert f"the cache folder {place} cannot be written" in facts["errors"]["host.cache_disk"]
    findings = by_name({MEMBERS[0]: facts})
    assert findings["cache_disk"].status == "fail"
    assert findings["memory"].status == "pass"


def test_the_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    facts = measure()
    assert (facts["memory_limit_bytes"], facts["cores_quota"]) == (10**9, 0.5)
    findings = by_name({MEMBERS[0]: facts})
    assert (findings["memory"].measured, findings["cores"].measured) == (1.0, 0.5)
    assert "set runtime.loader_threads=1" in findings["cores"].reason
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    facts = measure()
    assert facts["memory_limit_bytes"] == facts["memory_total_bytes"]
    assert facts["cores_quota"] == facts["cores_seen"]


def test_limits_of_the_older_kind_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2000000000\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("25000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    facts = measure()
    assert (facts["memory_limit_bytes"], facts["cores_quota"]) == (2 * 10**9, 0.25)
    assert cgroup_values(tmp_path, "memory.max", "") == []


def test_a_host_that_told_nothing_hides_no_other() -> None:
    assert {finding.status for finding in judge({}, min_free_disk_gb=1, min_shm_mb=1)} == {"skipped"}
    assert by_name({MEMBERS[0]: {"errors": {"host.memory": "no"}}})["memory"].status == "fail"
