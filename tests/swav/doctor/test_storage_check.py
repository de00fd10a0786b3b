import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from swav_testing.faults import FaultProxy, Kind
from swav_testing.s3 import S3Server, environment, moto_server

from swav import storage
from swav.doctor.report import Facts, Member
from swav.doctor.storage_check import Trial, judge, rate
from swav.storage import s3 as s3_store

MEMBERS = [Member(0, "a", 0), Member(1, "b", 0)]
SIZES = (300_000, 1_500_000)


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def s3(moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    for name, value in (moto.env | {"SWAV_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return moto


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """The folder cannot be written within the block: not by root either, which becomes somebody else."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_is_written_read_and_left_as_it_was(tmp_path: Path) -> None:
    trial = Trial(str(tmp_path), SIZES, 2)
    written = trial.write()
    assert written["bytes"] == 2 * sum(SIZES)
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == sorted(2 * SIZES)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4
    assert trial.read()["bytes"] == 2 * sum(SIZES)
    assert trial.remove() == {"errors": {}}
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_written_read_and_left_as_it_was(s3: S3Server) -> None:
    trial = Trial("s3://bucket/run", SIZES, 3)
    assert trial.write()["bytes"] == trial.read()["bytes"] == 3 * sum(SIZES)
    assert len(s3.keys("bucket")) == 6
    assert trial.remove() == {"errors": {}}
    assert s3.keys("bucket") == []


def test_other_bytes_than_were_written_are_noticed(tmp_path: Path) -> None:
    trial = Trial(str(tmp_path), SIZES, 1)
    trial.write()
    spoilt = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 1
    spoilt.write_bytes(data)
    error = trial.read()["errors"]["storage.read"]
    assert error.startswith(f"reading back {spoilt}: 1500000 bytes with the CRC-32C ")
    spoilt.write_bytes(data[:-1])
    assert "1499999 bytes" in trial.read()["errors"]["storage.read"]


def test_bits_that_flip_on_the_way_are_noticed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3.endpoint_url, rate=0) as proxy:
        for name, value in environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        trial = Trial("s3://bucket/run", SIZES[:1], 1)
        trial.write()
        proxy.plan(Kind.CORRUPT, times=2)  # the first asks for the size alone
        assert "came back" in trial.read()["errors"]["storage.read"]
        trial.remove()
    assert s3.keys("bucket") == []


def test_what_may_not_be_written_is_told_with_its_url(tmp_path: Path) -> None:
    trial = Trial(str(tmp_path), SIZES, 2)
    with unprivileged(tmp_path):
        error = trial.write()["errors"]["storage.write"]
        assert error.startswith(f"writing {tmp_path}/.doctor-")
        assert "PermissionError" in error
        assert trial.read()["bytes"] == 0
        assert trial.remove() == {"errors": {}}


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.write_text("")
    trial = Trial(str(place), SIZES, 1)
    assert f"writing {place}/.doctor-" in trial.write()["errors"]["storage.write"]
    assert trial.remove() == {"errors": {}}


def test_what_cannot_be_removed_is_named(tmp_path: Path) -> None:
    trial = Trial(str(tmp_path), SIZES, 1)
    trial.write()
    with unprivileged(tmp_path):
        error = trial.remove()["errors"]["storage.remove"]
    assert error.startswith(f"removing {tmp_path}/.doctor-")
    trial.remove()


def test_no_such_bucket_and_no_such_store_are_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("s3://another/run", SIZES, 2)
    assert "there is no such bucket" in trial.write()["errors"]["storage.write"]
    trial.remove()
    monkeypatch.setattr(s3_store, "_WRITE_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    trial = Trial("s3://bucket/run", SIZES, 2)
    error = trial.write()["errors"]["storage.write"]
    assert error.startswith("writing s3://bucket/run/.doctor-")
    assert "ConnectionError" in error
    assert trial.remove() == {"errors": {}}


def test_speeds_of_ranks_add_up() -> None:
    facts = {"bytes": 10_000_000, "seconds": 2.0}
    slow = {"bytes": 10_000_000, "seconds": 4.0}
    assert rate([facts, slow]) == 5.0
    told = {
        MEMBERS[0]: {"write": facts, "read": facts, "remove": {"errors": {}}},
        MEMBERS[1]: {"write": slow, "read": facts, "remove": {"errors": {}}},
    }
    write, read, remove = judge(told, min_write_mb_per_second=6, min_read_mb_per_second=6)
    assert (write.measured, write.status) == (5.0, "fail")
    assert (read.measured, read.status) == (10.0, "pass")
    assert remove.status == "pass"


def test_a_rank_that_cannot_write_is_named_and_reading_is_not_blamed() -> None:
    told: dict[Member, Facts] = {
        MEMBERS[0]: {"write": {"bytes": 8, "seconds": 1.0}, "read": {"bytes": 8, "seconds": 1.0}, "remove": {}},
        MEMBERS[1]: {"write": {"errors": {"storage.write": "no"}}, "read": {"bytes": 0, "seconds": 0.0}, "remove": {}},
    }
    write, read, _ = judge(told, min_write_mb_per_second=None, min_read_mb_per_second=None)
    assert (write.status, write.reason) == ("fail", "rank 1 (host b): no")
    assert read.status == "pass"
    alone = {MEMBERS[1]: told[MEMBERS[1]]}
    assert [f.status for f in judge(alone, min_write_mb_per_second=None, min_read_mb_per_second=None)] == [
        "fail",
        "skipped",
        "pass",
    ]


def test_the_names_of_two_trials_differ() -> None:
    urls = [url for _ in range(2) for url in Trial("s3://b/run", (1, 2), 2).urls]
    assert len(set(urls)) == 8
    assert all(storage.name_of(url).startswith(".doctor-") for url in urls)
