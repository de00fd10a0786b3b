from pathlib import Path

import pytest
from swav_testing.shards import make_jpeg, write_dataset

from swav.data.index import DatasetIndex, build_index, open_index
from swav.data.index_build import Building
from swav.doctor.data_check import judge, open_facts, read_facts
from swav.doctor.report import Facts, Finding, Member
from swav.recipes import configure

MEMBERS = [Member(0, "a", 0), Member(1, "b", 0)]
ROWS = (5, 4)


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    """Of nine images, with checksums."""
    folder = write_dataset(tmp_path / "data", ROWS, jpeg=True)
    return build_index(str(folder), str(folder), Building(checksums=True))


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.name.removeprefix("data."): finding.status for finding in findings}


def test_ranges_are_read_compared_and_an_image_is_decoded(index: DatasetIndex) -> None:
    facts = read_facts(index)
    assert facts["errors"] == {}
    assert facts["verified"] == facts["images"] >= 8
    assert facts["decoded"] == "24x16 pixels"
    config = configure("demo", overrides=["optim.global_batch=6"])
    told: dict[Member, Facts] = {member: {"open": open_facts(index, config, 2), "read": facts} for member in MEMBERS}
    findings = judge(told, min_read_mb_per_second=None, has_data=True)
    assert set(statuses(findings).values()) == {"pass"}
    assert findings[0].measured == f"9 images, 2 shards, {index.identity[:12]}"
    assert findings[3].measured == "6 lanes"
    assert statuses(judge(told, min_read_mb_per_second=1e9, has_data=True))["read"] == "fail"


def test_without_checksums_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAV_CACHE", str(tmp_path / "cache"))
    plain = open_index(str(write_dataset(tmp_path / "plain", ROWS, jpeg=True)))
    facts = read_facts(plain)
    assert facts["verified"] == 0 < facts["images"]
    told = {MEMBERS[0]: {"open": open_facts(plain, None, 1), "read": facts}}
    findings = judge(told, min_read_mb_per_second=None, has_data=True)
    assert "index the data with --checksums" in findings[1].reason
    assert statuses(findings) == {"index": "pass", "read": "pass", "decode": "pass", "lanes": "skipped"}


def test_bytes_that_rot_are_noticed(index: DatasetIndex) -> None:
    for shard in Path(index.folder).glob("*.tar"):
        data = bytearray(shard.read_bytes())
        place = 0
        while (place := data.find(b"\xff\xd8\xff", place)) >= 0:
            data[place + 200] ^= 1
            place += 1
        shard.write_bytes(data)
    error = read_facts(index)["errors"]["data.read"]
    assert error.startswith(f"reading {index.folder}/shard-00000")
    assert "is not what was indexed" in error


def test_a_shard_that_is_gone_is_named(index: DatasetIndex) -> None:
    for shard in Path(index.folder).glob("*.tar"):
        shard.unlink()
    error = read_facts(index)["errors"]["data.read"]
    assert error.startswith(f"reading {index.folder}/shard-00000")
    assert "FileNotFoundError" in error
    told = {MEMBERS[1]: {"open": open_facts(index, None, 1), "read": read_facts(index)}}
    findings = judge(told, min_read_mb_per_second=None, has_data=True)
    assert statuses(findings) == {"index": "pass", "read": "fail", "decode": "skipped", "lanes": "skipped"}
    assert findings[1].reason.startswith("rank 1 (host b): reading ")


def test_some_broken_images_are_nothing_and_no_good_one_is(tmp_path: Path) -> None:
    text = write_dataset(tmp_path / "text", ROWS)  # its images are words
    index = build_index(str(text), str(text))
    error = read_facts(index)["errors"]["data.decode"]
    assert error.startswith("none of 8 images can be decoded; sample ")
    assert make_jpeg(0)


def test_a_world_without_lanes_and_data_that_differ_are_failures(index: DatasetIndex) -> None:
    config = configure("demo", overrides=["optim.global_batch=2"])
    facts = open_facts(index, config, 4)
    assert "4 ranks are more than 2 lanes" in facts["errors"]["data.lanes"]
    other = facts | {"identity": "0" * 32}
    read = read_facts(index)
    told = {MEMBERS[0]: {"open": facts, "read": read}, MEMBERS[1]: {"open": other, "read": read}}
    findings = judge(told, min_read_mb_per_second=None, has_data=True)
    assert statuses(findings) == {"index": "fail", "read": "pass", "decode": "pass", "lanes": "fail"}
    assert "(host b): 9 images, 2 shards, 000000000000" in findings[0].reason or "(host a)" in findings[0].reason


def test_one_rank_that_cannot_open_the_data_is_named() -> None:
    told: dict[Member, Facts] = {
        MEMBERS[0]: {"open": {"identity": "a" * 32, "samples": 9, "shards": 2, "lanes": 4}, "read": {}},
        MEMBERS[1]: {"open": {"errors": {"data.index": "there is nothing"}}},
    }
    findings = judge(told, min_read_mb_per_second=None, has_data=True)
    assert (findings[0].status, findings[0].reason) == ("fail", "rank 1 (host b): there is nothing")


def test_without_data_all_is_left_out() -> None:
    assert {finding.status for finding in judge({}, min_read_mb_per_second=None, has_data=False)} == {"skipped"}
