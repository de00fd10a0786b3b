from pathlib import Path

import pytest
import torch

from swav.doctor.identity import judge, measure, package_hash
from swav.doctor.report import Facts, Finding, Member

MEMBERS = [Member(rank, f"host-{rank // 2}", rank % 2) for rank in range(4)]


def by_name(told: dict[Member, Facts]) -> dict[str, Finding]:
    return {finding.name.removeprefix("identity."): finding for finding in judge(told)}


def on_gpus(**changes: object) -> dict[Member, Facts]:
    """What four equal ranks told, with changes on the last."""
    facts = measure(torch.device("cpu"))
    gpu = {"gpu": "H100, driver 1", "gpu_free_bytes": 79, "gpu_total_bytes": 80}
    return {member: facts | gpu | (changes if member.rank == 3 else {}) for member in MEMBERS}


def test_the_hash_of_a_package_is_of_its_files_names_and_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("a")
        (tmp_path / name / "inner" / "b.py").write_text("b")
        (tmp_path / name / "a.pyc").write_text(name)
    before = package_hash(tmp_path / "one")
    assert before == package_hash(tmp_path / "two")
    (tmp_path / "two" / "inner" / "b.py").write_text("c")
    assert before != package_hash(tmp_path / "two")
    (tmp_path / "two" / "inner" / "b.py").rename(tmp_path / "two" / "inner" / "c.py")
    assert before != package_hash(tmp_path / "two")


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_IMAGE", "swav@sha256:1")
    findings = by_name(on_gpus())
    assert {finding.status for finding in findings.values()} == {"pass"}
    assert findings["image"].measured == "swav@sha256:1"
    assert findings["gpu_memory"].measured == pytest.approx(98.75)


def test_on_a_cpu_and_without_an_image_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWAV_IMAGE", raising=False)
    findings = by_name({MEMBERS[0]: measure(torch.device("cpu"))})
    assert [findings[name].status for name in ("software", "package", "image", "gpu", "gpu_memory")] == [
        "pass",
        "pass",
        "skipped",
        "skipped",
        "skipped",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("software", "torch 1"), ("package", "0" * 16), ("image", "old"), ("gpu", "A100"), ("gpu", "none")],
)
def test_the_rank_that_differs_is_named(key: str, value: str) -> None:
    finding = by_name(on_gpus(**{key: value}))[key]
    assert finding.status == "fail"
    assert finding.reason.startswith(f"rank 3 (host host-1): {value}; the other ranks (3): ")


def test_a_gpu_that_others_use_is_named() -> None:
    finding = by_name(on_gpus(gpu_free_bytes=10))["gpu_memory"]
    assert (finding.status, finding.measured) == ("fail", 12.5)
    assert "rank 3 (host host-1)" in finding.remedy


def test_a_rank_without_its_gpu_is_named() -> None:
    told = on_gpus()
    told[MEMBERS[3]] = measure(torch.device("cpu")) | {"errors": {"identity.gpu": "invalid device ordinal"}}
    finding = by_name(told)["gpu"]
    assert (finding.status, finding.reason) == ("fail", "rank 3 (host host-1): invalid device ordinal")
    assert [one.status for one in judge({})] == ["skipped"]
